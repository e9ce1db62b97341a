"""A Linear whose weight stays in one of ComfyUI's quantised formats."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .formats import Parts, QuantisedLayer
from .quantized import frozen


class QuantLinear(nn.Module):
    """A Linear whose weight stays in one of ComfyUI's formats. ``(..., in) -> (..., out)`` in the input's dtype.

    Parameters are named as in a file: ``weight``, what follows it (``weight_scale`` ...), ``bias``. The weight is
    dequantised for each call; the formats of the int8 units are multiplied there on a GPU that has them, which was
    measured to cost no more than fp8 weights do (``on_units`` True or False: always or never). ``parts``: shapes and
    types of what is stored, by what follows the weight's name. Only inference: none of the parameters takes a gradient.
    """

    def __init__(
        self,
        layer: QuantisedLayer,
        parts: Mapping[str, tuple[tuple[int, ...], torch.dtype]],
        bias: bool = True,
        *,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.layer = layer
        self.on_units: bool | None = None
        self.out_features, self.in_features = layer.shape
        self.kinds = {suffix: dtype for suffix, (_, dtype) in parts.items()}
        for suffix, (shape, dtype) in parts.items():
            self.register_parameter(f"weight{suffix}", frozen(shape, dtype, device))
        self.register_parameter("bias", frozen((self.out_features,), torch.bfloat16, device) if bias else None)

    def parts(self) -> Parts:
        """What the weight is stored as, by what follows its name in a file."""
        stored = {suffix: self._parameters[f"weight{suffix}"].data for suffix in self.kinds}
        return {suffix: part.view(self.kinds[suffix]) for suffix, part in stored.items()}

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(x.dtype)
        weight = self.layer.tensor(self.parts(), x.dtype)
        units = self.on_units
        if units is None:
            units = self.layer.format.on_int8_units and x.is_cuda and weight.layout_cls.supports_fast_matmul()
        return F.linear(x, weight if units else weight.dequantize(), bias)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, format={self.layer.format.name}"
