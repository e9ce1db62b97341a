"""Linear weights in float8 with one scale a row: quantising, dequantising, and a Linear that keeps them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import nn

FP8 = torch.float8_e4m3fn
FP8_MAX = 448.0  # largest finite float8_e4m3fn
CHUNK_ROWS = 1024  # quantised at a time, so that the float32 form of a whole weight is never needed
MATMUL_CAPABILITY = (8, 9)  # first NVIDIA generation with float8 matrix units
MANTISSA_BITS = 3
MIN_EXPONENT = -6  # of the smallest normal float8_e4m3fn
MATMUL_MULTIPLE = 16  # both widths of the weight must be multiples of this in a scaled matmul


def quantise_rows(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Float8 form of a weight ``(out, in)``: ``(float8_e4m3fn (out, in), bfloat16 scales (out,))``.

    A row's scale is its largest magnitude / 448, rounded to bfloat16; the row is divided by that rounded
    scale, so that nothing but the float8 rounding itself is lost. A row of zeros gets the scale 1.

    Raises ValueError where the weight is not 2-d, or holds NaN or infinity.
    """
    if weight.ndim != 2:
        raise ValueError(f"Only a weight of two dimensions has rows to quantise, this one is {tuple(weight.shape)}.")
    quantised = torch.empty(weight.shape, dtype=FP8, device=weight.device)
    scale = torch.ones(weight.shape[0], dtype=torch.bfloat16, device=weight.device)
    if not weight.numel():
        return quantised, scale
    for start in range(0, weight.shape[0], CHUNK_ROWS):
        part = slice(start, start + CHUNK_ROWS)
        quantised[part], scale[part] = _quantise_chunk(weight[part].to(torch.float32))
    return quantised, scale


def _quantise_chunk(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    largest = values.abs().amax(dim=1)
    if not torch.isfinite(largest).all():
        raise ValueError("The weight holds NaN or infinity, which float8 cannot carry: the file is damaged.")
    scale = (largest / FP8_MAX).to(torch.bfloat16)
    scale = torch.where(scale == 0, torch.ones_like(scale), scale)
    # Rounding a scale down can push the row's largest value past 448, where float8 ends.
    return (values / scale.to(torch.float32)[:, None]).clamp_(-FP8_MAX, FP8_MAX).to(FP8), scale


def quantise_rows_stochastically(weight: torch.Tensor, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """As ``quantise_rows``, but each value goes up or down by chance, in proportion to how near it is.

    A LoRA's change is mostly smaller than half a float8 step: rounding to nearest would drop it, this keeps it on
    average. A value that float8 has exactly stays as it is. The same seed gives the same weights.
    """
    generator = torch.Generator(device=weight.device).manual_seed(seed)
    data = torch.empty(weight.shape, dtype=FP8, device=weight.device)
    _, scale = quantise_rows(weight)
    for start in range(0, weight.shape[0], CHUNK_ROWS):
        part = slice(start, start + CHUNK_ROWS)
        values = weight[part].to(torch.float32) / scale[part].to(torch.float32)[:, None]
        data[part] = _round_by_chance(values, generator).clamp_(-FP8_MAX, FP8_MAX).to(FP8)
    return data, scale


def _round_by_chance(values: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """float32 values on float8's grid; every step but the comparison is exact."""
    exponent = torch.frexp(values).exponent - 1  # frexp's mantissa is below 1, float8's below 2
    step = _power_of_two(exponent.clamp_(min=MIN_EXPONENT) - MANTISSA_BITS)
    steps = values / step
    below = steps.floor()
    chance = torch.rand(values.shape, generator=generator, device=values.device)
    return below.add_(chance < steps - below).mul_(step)


def _power_of_two(exponent: torch.Tensor) -> torch.Tensor:
    """2 ** exponent (int32, of a normal float32), put together from its bits: exact on every device."""
    return ((exponent + 127) << 23).view(torch.float32)


def dequantise_rows(weight: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """``weight * scale`` along dimension 0, computed as if in float32 and rounded once to ``dtype``."""
    shape = (-1,) + (1,) * (weight.ndim - 1)
    if dtype == torch.bfloat16 and scale.dtype == torch.bfloat16:
        # Both factors are exact in bfloat16 and a product is rounded once: the float32 detour, without its memory.
        return weight.to(dtype).mul_(scale.reshape(shape))
    return weight.to(torch.float32).mul_(scale.to(torch.float32).reshape(shape)).to(dtype)


@dataclass(frozen=True)
class RowFp8Layer:
    """A layer's weight (out, in) in float8 with a scale a row, seen as the formats of ``formats`` are."""

    shape: tuple[int, int]

    @cached_property
    def parts(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Shapes and types of what is stored, by what follows the weight's name in a file."""
        return {"": (self.shape, FP8), "_scale": (self.shape[:1], torch.bfloat16)}

    def dequantise(self, parts: Mapping[str, torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
        """The weight (out, in) as ``dtype``."""
        return dequantise_rows(parts[""], parts["_scale"], dtype)

    def quantise(self, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        """As ``quantise_rows``."""
        return dict(zip(self.parts, quantise_rows(weight), strict=True))

    def requantise(self, parts: Mapping[str, torch.Tensor], weight: torch.Tensor, seed: int) -> dict[str, torch.Tensor]:
        """As ``quantise_rows_stochastically``."""
        return dict(zip(self.parts, quantise_rows_stochastically(weight, seed), strict=True))


def fp8_matmul_problem(device: torch.device | str) -> str | None:
    """Why a device cannot multiply float8 rows in hardware; None where it can."""
    device = torch.device(device)
    if device.type != "cuda" or torch.version.cuda is None:
        return f"float8 matmul needs an NVIDIA GPU, and the weights are on {device}"
    capability = torch.cuda.get_device_capability(device)
    if capability < MATMUL_CAPABILITY:
        return (
            f"float8 matmul needs a GPU of compute capability 8.9 or later, {torch.cuda.get_device_name(device)} "
            f"has {capability[0]}.{capability[1]}"
        )
    return None


class Fp8Linear(nn.Module):
    """A Linear whose weight stays float8, with a scale a row. ``(..., in) -> (..., out)`` in the input's dtype.

    Parameters are named as in a released fp8 file: ``weight`` float8_e4m3fn (out, in), ``weight_scale``
    bfloat16 (out,), ``bias`` (out,). By default the weight is dequantised for each call. With
    ``fp8_matmul`` the input is quantised too, a scale a row, and multiplied on the GPU's float8 units,
    which costs some accuracy; on a device without such units the call raises RuntimeError.

    Only inference: none of the parameters takes a gradient.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        device: torch.device | str | None = None,
        fp8_matmul: bool = False,
    ) -> None:
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.fp8_matmul = fp8_matmul
        self.weight = frozen((out_features, in_features), FP8, device)
        self.weight_scale = frozen((out_features,), torch.bfloat16, device)
        self.bias = frozen((out_features,), torch.bfloat16, device) if bias else None

    @classmethod
    def from_linear(cls, linear: nn.Linear, *, fp8_matmul: bool = False) -> Fp8Linear:
        """The float8 form of a Linear, on the same device; its bias is kept as it is."""
        made = cls(
            linear.in_features,
            linear.out_features,
            linear.bias is not None,
            device="meta",
            fp8_matmul=fp8_matmul,
        )
        weight, scale = quantise_rows(linear.weight.detach())
        made.weight = nn.Parameter(weight, requires_grad=False)
        made.weight_scale = nn.Parameter(scale, requires_grad=False)
        if linear.bias is not None:
            made.bias = nn.Parameter(linear.bias.detach(), requires_grad=False)
        return made

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        bias = None if self.bias is None else self.bias.to(x.dtype)
        if self.fp8_matmul:
            return self._scaled_matmul(x, bias)
        return F.linear(x, dequantise_rows(self.weight, self.weight_scale, x.dtype), bias)

    def _scaled_matmul(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        problem = fp8_matmul_problem(self.weight.device)
        if problem is None and (self.in_features % MATMUL_MULTIPLE or self.out_features % MATMUL_MULTIPLE):
            problem = f"float8 matmul needs widths that are multiples of 16, not {self.in_features}x{self.out_features}"
        if problem is not None:
            raise RuntimeError(f"{problem}: turn fp8_matmul off.")
        rows, row_scale = quantise_activations(x.reshape(-1, self.in_features))
        product = torch._scaled_mm(
            rows,
            self.weight.t(),
            scale_a=row_scale,
            scale_b=self.weight_scale.to(torch.float32)[None, :],
            out_dtype=torch.bfloat16,
        )
        product = product.to(x.dtype).reshape(*x.shape[:-1], self.out_features)
        return product if bias is None else product + bias

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, fp8_matmul={self.fp8_matmul}"


def quantise_activations(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Float8 form of activations ``(n, in)``: ``(float8_e4m3fn (n, in), float32 scales (n, 1))``."""
    values = rows.to(torch.float32)
    scale = values.abs().amax(dim=1, keepdim=True) / FP8_MAX
    scale = torch.where(scale == 0, torch.ones_like(scale), scale)
    return (values / scale).clamp_(-FP8_MAX, FP8_MAX).to(FP8), scale


def set_fp8_matmul(model: nn.Module, enabled: bool) -> int:
    """Switches float8 matmul in every ``Fp8Linear`` of a model and returns how many there are.

    Raises RuntimeError where it is asked for and the device has no float8 matrix units.
    """
    layers = [module for module in model.modules() if isinstance(module, Fp8Linear)]
    for device in {layer.weight.device for layer in layers} if enabled else ():
        problem = fp8_matmul_problem(device)
        if problem is not None:
            raise RuntimeError(f"{problem}: leave fp8_matmul off.")
    for layer in layers:
        layer.fp8_matmul = enabled
    return len(layers)


def frozen(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device | str | None) -> nn.Parameter:
    """A parameter without values and without a gradient."""
    return nn.Parameter(torch.empty(shape, dtype=dtype, device=device), requires_grad=False)
