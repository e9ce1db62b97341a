"""The makers' fp8 weights inside ComfyUI: float8 with one scale a row, as one of the host's quantised tensors.

The host moves, offloads, patches (LoRA) and saves such a weight as it does its own fp8; only the scale differs. Run on
ComfyUI 0.18.1 with comfy_kitchen 0.2.8 and 0.2.40, and on 0.33.0 with 0.2.31.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import comfy.ops
import comfy.utils
import torch
import torch.nn.functional as F
from comfy_kitchen.tensor import (
    BaseLayoutParams,
    QuantizedLayout,
    QuantizedTensor,
    dequantize_args,
    register_layout_class,
    register_layout_op,
)
from torch import nn

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


def has_values(quantised: QuantizedTensor, values: torch.Tensor) -> bool:
    """Whether the float8 weight is exactly ``values``, so that quantising them anew could only lose."""
    data, scale = NavaRowFP8Layout.get_plain_tensors(quantised)
    parts = zip(*(tensor.split(CHUNK_ROWS) for tensor in (data, scale, values)), strict=True)
    return all(torch.equal(dequantise_rows(d, s, torch.float32), v.to(torch.float32)) for d, s, v in parts)


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


def row_fp8_operations(dtype: torch.dtype, *, matmul: bool = False):
    """The host's mixed-precision operations, with a Linear that takes float8 weights with a scale a row.

    ``dtype``: of all other weights, and what dequantised ones count as. ``matmul``: multiply on the GPU's float8 units,
    for which activations are quantised too, each token with a scale of its own; otherwise they never are.
    """
    host = comfy.ops.mixed_precision_ops(compute_dtype=dtype, full_precision_mm=not matmul)

    class RowFP8Operations(host):
        class Linear(host.Linear):
            @property
            def weight_scale(self) -> torch.Tensor:
                """The weight's scales: the host looks up by name what it finds in a state dict."""
                return self.weight._params.scale

            def _load_from_state_dict(
                self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
            ):
                rest = (local_metadata, strict, missing_keys, unexpected_keys, error_msgs)
                weight_key, scale_key = f"{prefix}weight", f"{prefix}weight_scale"
                if weight_key not in state_dict or scale_key not in state_dict:
                    super()._load_from_state_dict(state_dict, prefix, *rest)
                    return
                self._take(state_dict.pop(weight_key), state_dict.pop(scale_key))
                nn.Module._load_from_state_dict(self, state_dict, prefix, *rest)
                missing_keys.remove(weight_key)

            def _take(self, weight: torch.Tensor, scale: torch.Tensor) -> None:
                shape = (self.out_features, self.in_features)
                params = NavaRowFP8Layout.Params(scale.to(torch.bfloat16), orig_dtype=dtype, orig_shape=shape)
                self.weight = nn.Parameter(QuantizedTensor(weight, LAYOUT, params), requires_grad=False)
                # The host reads both from the layer, not from the weight.
                self.layout_type, self.quant_format = LAYOUT, FORMAT
                if self.in_features % MATMUL_MULTIPLE or self.out_features % MATMUL_MULTIPLE:
                    self._full_precision_mm = True

            def convert_weight(self, weight, **_):
                """The exact values: float8 times its scale needs more digits than bfloat16 has."""
                return weight.to(dtype=torch.float32).dequantize() if isinstance(weight, QuantizedTensor) else weight

            def set_weight(self, weight, inplace_update=False, return_weight=False, **kwargs):
                if not isinstance(self.weight, QuantizedTensor):
                    return super().set_weight(weight, inplace_update, return_weight=return_weight, **kwargs)
                if inplace_update:
                    raise RuntimeError(
                        "This ComfyUI cannot switch LoRA hooks on fp8 weights during sampling: set weight_dtype to "
                        "bf16 in NAVA Load Backbone, or load the LoRA without hooks."
                    )
                # The host sets small layers that nothing has changed, only to have them on the GPU.
                kept = self.weight.detach().to(device=weight.device)
                if not has_values(kept, weight):
                    return super().set_weight(weight, inplace_update, return_weight=return_weight, **kwargs)
                if return_weight:
                    return kept
                self.weight = nn.Parameter(kept, requires_grad=False)

            def state_dict(self, *args, destination=None, prefix="", **kwargs):
                """Names and types of the makers' fp8 file: weight, weight_scale, bias."""
                if not isinstance(getattr(self, "weight", None), QuantizedTensor):
                    return super().state_dict(*args, destination=destination, prefix=prefix, **kwargs)
                out = {} if destination is None else destination
                out.update(self.weight.state_dict(f"{prefix}weight"))
                if self.bias is not None:
                    out[f"{prefix}bias"] = self.bias
                return out

            def patched_weight(self, key: str) -> QuantizedTensor:
                """The fp8 weight with the LoRAs that the host so far only adds as it computes (low or dynamic VRAM);
                ``key`` is the weight's full name, by which the host draws the rounding."""
                patches = [*self.weight_function, getattr(self, "weight_lowvram_function", None)]
                patches = [patch for patch in patches if patch is not None]
                if not patches:
                    return self.weight
                weight = self.convert_weight(self.weight)
                for patch in patches:
                    weight = patch(weight)
                return self.set_weight(weight, seed=comfy.utils.string_to_seed(key), return_weight=True)

    return RowFP8Operations


def quantised_for_saving(backbone: nn.Module, state: dict, prefix: str) -> dict:
    """A state dict the host is to write (names of ``backbone``), quantised tensors as weight and weight_scale.

    The host puts quantised tensors themselves in it where they are not wholly loaded, and cannot write those.
    ``prefix``: of the backbone's names in the host's model.
    """
    for name in [name for name, value in state.items() if isinstance(value, QuantizedTensor)]:
        layer = backbone.get_submodule(name.rpartition(".")[0])
        state.update(layer.patched_weight(prefix + name).to("cpu").state_dict(name))
    return state
