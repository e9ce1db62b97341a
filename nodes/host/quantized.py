"""Quantised weights inside ComfyUI: its own formats, and the makers' fp8 with one scale a row as one more of them.

The host moves, offloads, patches (LoRA) and saves such weights as it does those of its own models. Run on ComfyUI
0.18.1 with comfy_kitchen 0.2.8 (fp8 with a scale a row) and 0.2.40, and on 0.33.0 with 0.2.31.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import comfy.model_management
import comfy.ops
import comfy.quant_ops
import comfy.utils
import torch
import torch.nn.functional as F
from comfy_kitchen.tensor import (
    BaseLayoutParams,
    QuantizedLayout,
    QuantizedTensor,
    dequantize_args,
    get_layout_class,
    register_layout_class,
    register_layout_op,
)
from torch import nn

from ...nava_core.backbone.formats import FORMATS, Format, format_problem, nvfp4_by_chance
from ...nava_core.backbone.quantized import (
    CHUNK_ROWS,
    FP8,
    MATMUL_MULTIPLE,
    dequantise_rows,
    fp8_matmul_problem,
    quantise_activations,
    quantise_rows,
    quantise_rows_stochastically,
)

LAYOUT = "NavaRowFP8Layout"
FORMAT = "nava_row_fp8"
NVFP4_LAYOUT = "NavaNVFP4Layout"
# What stands beside a quantised weight in a state dict.
STORED = frozenset(
    {"comfy_quant", "weight_scale", "weight_scale_2", "weight_s_rel", "weight_s_channel", "weight_codebook"}
)


class NavaRowFP8Layout(QuantizedLayout):
    """float8_e4m3fn (n, m) with a scale a row: bfloat16 (n,) for weights, float32 (n, 1) for activations.

    ``dequantize`` is exact: value times scale, rounded once to the type that is asked for.
    """

    MIN_SM_VERSION = (8, 9)

    @dataclass(frozen=True)
    class Params(BaseLayoutParams):
        """``scale`` is kept as the very tensor given: in offloading it is a view of the host's transfer buffer."""

    @classmethod
    def quantize(cls, tensor, scale=None, stochastic_rounding=None, inplace_ops=False, **_):
        """``scale``: "recalculate" for a weight (with ``stochastic_rounding`` a seed, as the host gives it after a
        LoRA), None for activations. ``inplace_ops`` only allows what is not needed here."""
        if scale is None:
            data, scale = quantise_activations(tensor)
        elif stochastic_rounding:
            data, scale = quantise_rows_stochastically(tensor, stochastic_rounding)
        else:
            data, scale = quantise_rows(tensor)
        return data, cls.Params(scale=scale, orig_dtype=tensor.dtype, orig_shape=tuple(tensor.shape))

    @classmethod
    def dequantize(cls, qdata, params):
        return dequantise_rows(qdata, params.scale, params.orig_dtype)

    @classmethod
    def get_plain_tensors(cls, qtensor):
        return qtensor._qdata, qtensor._params.scale

    @classmethod
    def state_dict_tensors(cls, qdata, params):
        return {"": qdata, "_scale": params.scale}


register_layout_class(LAYOUT, NavaRowFP8Layout)


class NavaNVFP4Layout(comfy.quant_ops.TensorCoreNVFP4Layout):
    """The host's nvfp4, but that a changed weight (a LoRA) is rounded by :func:`nvfp4_by_chance`: the host's own
    rounding moves every value, also those that nothing has changed, by 17 % of the weight's size."""

    @classmethod
    def quantize(cls, tensor, scale=None, stochastic_rounding=0, inplace_ops=False, tensor_scale=None, **_):
        """As the host's; ``tensor_scale``: of the weight before it was changed, None where that is not known."""
        if not stochastic_rounding:
            return super().quantize(tensor, scale=scale)
        if tensor_scale is None:
            tensor_scale = torch.zeros((), device=tensor.device)
        parts = nvfp4_by_chance(tensor, tensor_scale.to(tensor.device), stochastic_rounding)
        own = {"orig_dtype": tensor.dtype, "orig_shape": tuple(tensor.shape)}
        return parts[""], cls.Params(scale=parts["_scale_2"], block_scale=parts["_scale"], **own)

    @classmethod
    def requantize_kwargs(cls, qtensor):
        return {"tensor_scale": qtensor._params.scale}


register_layout_class(NVFP4_LAYOUT, NavaNVFP4Layout)


def has_values(quantised: QuantizedTensor, values: torch.Tensor) -> bool:
    """Whether the quantised weight is exactly ``values``, so that quantising them anew could only lose."""
    if quantised._layout_cls != LAYOUT:
        return torch.equal(quantised.to(dtype=torch.float32).dequantize(), values.to(torch.float32))
    data, scale = NavaRowFP8Layout.get_plain_tensors(quantised)
    parts = zip(*(tensor.split(CHUNK_ROWS) for tensor in (data, scale, values)), strict=True)
    return all(torch.equal(dequantise_rows(d, s, torch.float32), v.to(torch.float32)) for d, s, v in parts)


# ---------------------------------------------------------------- what the host and its device can do


def host_problem(format: Format, device: torch.device) -> str | None:
    """Why this host cannot keep weights in one of its formats on a device, as a phrase; None where it can."""
    algorithm = comfy.quant_ops.QUANT_ALGOS.get(format.algorithm)
    if algorithm is None:
        return f"this ComfyUI knows no {format.name} weights; update ComfyUI"
    problem = format_problem(format.name)
    if problem:
        return f"{problem[0].lower()}{problem[1:].rstrip('.')}"
    return None if format.name == "int8" else storage_problem(device)


def multiplies(algorithm: str, device: torch.device, fast: bool) -> bool:
    """Whether products are to be made of quantised inputs, on the device's units for the format.

    Those of the int8 units always where they are there: their rotated inputs of 8 bits were measured to cost no more
    than fp8 weights do. The others only where it is asked for: at 8 bits of float they make the guided error four times
    as large, at 4 bits they ruin the sound.
    """
    layout = get_layout_class(comfy.quant_ops.QUANT_ALGOS[algorithm]["comfy_tensor_layout"])
    if not layout.supports_fast_matmul():
        return False
    if any(each.algorithm == algorithm and each.on_int8_units for each in FORMATS.values()):
        return True
    kind = {"float8_e4m3fn": "fp8"}.get(algorithm, algorithm)
    return fast and getattr(comfy.model_management, f"supports_{kind}_compute")(device)


# ---------------------------------------------------------------- the product


@register_layout_op(torch.ops.aten.linear.default, NavaRowFP8Layout)
def _linear(_, args, kwargs):
    """Dequantised weight times input; on the float8 units where the host has quantised the input too."""
    rows, weight = args[:2]
    bias = args[2] if len(args) > 2 else kwargs.get("bias")
    both = isinstance(rows, QuantizedTensor) and isinstance(weight, QuantizedTensor)
    if both and matmul_problem(weight.device) is None:
        return _scaled_matmul(rows, weight, bias)
    return F.linear(*dequantize_args((rows, weight, bias)))


def _scaled_matmul(rows: QuantizedTensor, weight: QuantizedTensor, bias: torch.Tensor | None) -> torch.Tensor:
    data, row_scale = NavaRowFP8Layout.get_plain_tensors(rows)
    weight_data, weight_scale = NavaRowFP8Layout.get_plain_tensors(weight)
    product = torch._scaled_mm(
        data,
        weight_data.t(),
        scale_a=row_scale,
        scale_b=weight_scale.to(torch.float32)[None, :],
        out_dtype=torch.bfloat16,
    ).to(rows.dtype)
    return product if bias is None else product + bias


@lru_cache
def matmul_problem(device: torch.device) -> str | None:
    """Why the device cannot multiply row-scaled float8 matrices, found by trying; None where it can."""
    problem = fp8_matmul_problem(device)
    if problem is not None:
        return problem
    size = MATMUL_MULTIPLE
    data, scale = torch.ones(size, size, device=device).to(FP8), torch.ones(size, 1, device=device)
    try:
        torch._scaled_mm(data, data.t(), scale_a=scale, scale_b=scale.t(), out_dtype=torch.bfloat16)
    except (RuntimeError, TypeError, ValueError) as error:
        return f"this PyTorch ({torch.__version__}) has no float8 matmul with row scales for {device}: {error}"
    return None


@lru_cache
def storage_problem(device: torch.device) -> str | None:
    """Why the device cannot hold float8 weights and dequantise them, found by trying; None where it can."""
    try:
        torch.ones(1, dtype=torch.bfloat16, device=device).to(FP8).to(torch.bfloat16)
    except (RuntimeError, TypeError) as error:
        return f"{device} cannot hold float8 weights: {error}"
    return None


# ---------------------------------------------------------------- the layers


class WholeNumbers(torch.Tensor):
    """Integers of a quantised weight in a state dict. Saving a model that is not wholly loaded, the host makes a
    parameter with a gradient of everything in it, which PyTorch refuses for integers; these leave the gradient out."""

    def requires_grad_(self, requires_grad=True):
        return self


def quantised_operations(dtype: torch.dtype, device: torch.device, *, fast: bool = False):
    """The host's mixed-precision operations, with a Linear that also takes float8 weights with a scale a row.

    ``dtype``: of all other weights, and what dequantised ones count as. ``fast``: multiply on the units that ``device``
    has for the weights' own type, for which activations are quantised too; see :func:`multiplies`.
    """
    host = comfy.ops.mixed_precision_ops(compute_dtype=dtype)
    fast_rows = fast and matmul_problem(device) is None

    class QuantisedOperations(host):
        class Linear(host.Linear):
            def __getattr__(self, name: str):
                """What the weight is stored as: the host looks up by name what it finds in a state dict."""
                if name in STORED and isinstance(self._parameters.get("weight"), QuantizedTensor):
                    stored = self.state_dict()
                    if name in stored:
                        return stored[name]
                return super().__getattr__(name)

            def _load_from_state_dict(
                self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
            ):
                rest = (local_metadata, strict, missing_keys, unexpected_keys, error_msgs)
                weight_key, scale_key = f"{prefix}weight", f"{prefix}weight_scale"
                if f"{prefix}comfy_quant" in state_dict:
                    super()._load_from_state_dict(state_dict, prefix, *rest)
                    self._take_format()
                    return
                if weight_key not in state_dict or scale_key not in state_dict:
                    super()._load_from_state_dict(state_dict, prefix, *rest)
                    return
                self._take_rows(state_dict.pop(weight_key), state_dict.pop(scale_key))
                nn.Module._load_from_state_dict(self, state_dict, prefix, *rest)
                missing_keys.remove(weight_key)

            def _take_format(self) -> None:
                if self.quant_format == "nvfp4":
                    weight = QuantizedTensor(self.weight._qdata, NVFP4_LAYOUT, self.weight._params)
                    self.weight, self.layout_type = nn.Parameter(weight, requires_grad=False), NVFP4_LAYOUT
                if not multiplies(self.quant_format, device, fast):
                    self._full_precision_mm = True

            def _take_rows(self, weight: torch.Tensor, scale: torch.Tensor) -> None:
                shape = (self.out_features, self.in_features)
                params = NavaRowFP8Layout.Params(scale.to(torch.bfloat16), orig_dtype=dtype, orig_shape=shape)
                self.weight = nn.Parameter(QuantizedTensor(weight, LAYOUT, params), requires_grad=False)
                # The host reads both from the layer, not from the weight.
                self.layout_type, self.quant_format = LAYOUT, FORMAT
                misfit = self.in_features % MATMUL_MULTIPLE or self.out_features % MATMUL_MULTIPLE
                self._full_precision_mm = bool(misfit) or not fast_rows

            def _forward(self, input, weight, bias):
                # The host hands on a weight of the input's own type as it is, and some formats multiply by themselves.
                if self._full_precision_mm and isinstance(weight, QuantizedTensor):
                    weight = weight.dequantize()
                return super()._forward(input, weight, bias)

            def convert_weight(self, weight, **_):
                """The exact values: a quantised one times its scale needs more digits than bfloat16 has."""
                return weight.to(dtype=torch.float32).dequantize() if isinstance(weight, QuantizedTensor) else weight

            def set_weight(self, weight, inplace_update=False, return_weight=False, **kwargs):
                if not isinstance(self.weight, QuantizedTensor):
                    return super().set_weight(weight, inplace_update, return_weight=return_weight, **kwargs)
                if inplace_update:
                    raise RuntimeError(
                        "This ComfyUI cannot switch LoRA hooks on quantised weights during sampling: set weight_dtype "
                        "to bf16 in NAVA Load Backbone, or load the LoRA without hooks."
                    )
                # The host sets small layers that nothing has changed, only to have them on the GPU.
                kept = self.weight.detach().to(device=weight.device)
                if not has_values(kept, weight):
                    if self.layout_type != NVFP4_LAYOUT:
                        return super().set_weight(weight, inplace_update, return_weight=return_weight, **kwargs)
                    scale, seed = kept._params.scale, kwargs.get("seed")
                    kept = QuantizedTensor.from_float(
                        weight, NVFP4_LAYOUT, scale="recalculate", stochastic_rounding=seed, tensor_scale=scale
                    ).to(self.weight.dtype)
                if return_weight:
                    return kept
                self.weight = nn.Parameter(kept, requires_grad=False)

            def state_dict(self, *args, destination=None, prefix="", **kwargs):
                """Names and types of the makers' fp8 file: weight, weight_scale, bias."""
                if getattr(self, "layout_type", None) != LAYOUT:
                    out = super().state_dict(*args, destination=destination, prefix=prefix, **kwargs)
                    name = f"{prefix}weight"
                    if isinstance(getattr(self, "weight", None), QuantizedTensor) and not out[name].is_floating_point():
                        out[name] = out[name].as_subclass(WholeNumbers)
                    return out
                out = {} if destination is None else destination
                out.update(self.weight.state_dict(f"{prefix}weight"))
                if self.bias is not None:
                    out[f"{prefix}bias"] = self.bias
                return out

            def patched_weight(self, key: str) -> QuantizedTensor:
                """The weight with the LoRAs that the host so far only adds as it computes (low or dynamic VRAM);
                ``key`` is the weight's full name, by which the host draws the rounding."""
                patches = [*self.weight_function, getattr(self, "weight_lowvram_function", None)]
                patches = [patch for patch in patches if patch is not None]
                if not patches:
                    return self.weight
                weight = self.convert_weight(self.weight)
                for patch in patches:
                    weight = patch(weight)
                return self.set_weight(weight, seed=comfy.utils.string_to_seed(key), return_weight=True)

    return QuantisedOperations


def quantised_for_saving(backbone: nn.Module, state: dict, prefix: str) -> dict:
    """A state dict the host is to write (names of ``backbone``), quantised tensors as weight and weight_scale.

    The host puts quantised tensors themselves, or integers without the LoRAs, in it where they are not wholly loaded.
    ``prefix``: of the backbone's names in the host's model.
    """
    for name in [name for name, value in state.items() if isinstance(value, QuantizedTensor | WholeNumbers)]:
        layer = backbone.get_submodule(name.rpartition(".")[0])
        state.update(layer.patched_weight(prefix + name).to("cpu").state_dict(name))
    return state
