"""ComfyUI's quantised weights (int8, mxfp8, nvfp4, w4a8, w6a8): what they consist of in a file, and their values.

The arithmetic is the package comfy_kitchen's, where ComfyUI's kernels come from; it is imported when it is needed.
Run with comfy_kitchen 0.2.31 and 0.2.40 on the CPU.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from .quantized import FP8, FP8_MAX

FP4_MAX = 6.0
FP4_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # by their codes; the sign is the fourth bit
ROTATIONS = (256, 64, 16)  # values that are rotated together, the widest that divides a row
TILE_ROWS, TILE_COLUMNS = 128, 4  # scales of blocks are stored in tiles, padded to whole ones

Parts = dict[str, Tensor]  # by what follows the weight's name in a file: "", "_scale", ...


@dataclass(frozen=True)
class Format:
    """A way to keep a weight. ``name`` is this project's word for it, ``algorithm`` ComfyUI's in its files, ``layout``
    comfy_kitchen's class; ``bits`` a value has, its scales not counted; ``work`` the bytes a value that its reference
    code takes to dequantise one to bfloat16, the result included, beside what is stored."""

    name: str
    algorithm: str
    layout: str
    bits: int
    multiple: int  # of a weight's widths
    work: int = 2
    on_int8_units: bool = False  # its product is that of the GPU's int8 units, on rotated inputs of 8 bits

    def fits(self, shape: tuple[int, ...]) -> bool:
        """Whether a weight (out, in) is of whole blocks."""
        return len(shape) == 2 and all(width > 0 and width % self.multiple == 0 for width in shape)


FORMATS = {
    each.name: each
    for each in (
        Format("int8", "int8_tensorwise", "TensorWiseINT8Layout", 8, 16, on_int8_units=True),
        Format("mxfp8", "mxfp8", "TensorCoreMXFP8Layout", 8, 32),
        Format("nvfp4", "nvfp4", "TensorCoreNVFP4Layout", 4, 16),
        Format("w4a8", "asym_w4a8_int8", "AsymW4A8Int8Layout", 4, 16, 13, on_int8_units=True),
        Format("w6a8", "asym_w4a8_int8", "AsymW4A8Int8Layout", 6, 32, 15, on_int8_units=True),
        # Of other tools; this project's own fp8 has a scale a row, see ``quantized``.
        Format("fp8 with one scale", "float8_e4m3fn", "TensorCoreFP8Layout", 8, 1),
    )
}
MADE_HERE = ("int8", "mxfp8", "nvfp4", "w4a8", "w6a8")
# What the most sensitive layers are kept in beside a smaller format: 8 bits that the same hosts and GPUs know.
PROTECTING = {"nvfp4": "mxfp8", "w4a8": "int8", "w6a8": "int8"}


class FormatError(ValueError):
    """A quantised layer of a file cannot be what it says it is; the message is a phrase."""


@lru_cache
def kitchen() -> ModuleType:
    """comfy_kitchen; raises RuntimeError, in a sentence, where it is not installed."""
    try:
        import comfy_kitchen.tensor
    except ImportError as error:
        raise RuntimeError(
            f"{', '.join(MADE_HERE)} weights need the package comfy-kitchen: install this project's extra [quantized], "
            "or run `pip install comfy-kitchen`."
        ) from error
    return comfy_kitchen


def format_problem(name: str) -> str | None:
    """Why weights of a format cannot be read or made here, as a sentence; None where they can."""
    try:
        layout = getattr(kitchen().tensor, FORMATS[name].layout, None)
    except RuntimeError as error:
        return str(error)
    # One class is that of 4 and 6 bits; the older ones of it have only 4.
    if layout is None or (name == "w6a8" and not hasattr(layout, "bits")):
        return f"The installed comfy-kitchen is too old for {name} weights: run `pip install -U comfy-kitchen`."
    return None


@dataclass(frozen=True)
class QuantisedLayer:
    """How one layer's weight (out, in) is kept: the format, and what ComfyUI's ``comfy_quant`` says beside its name."""

    format: Format
    shape: tuple[int, int]
    options: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def made(cls, format: Format, shape: tuple[int, ...]) -> QuantisedLayer:
        """A weight of ``shape`` as this project writes it."""
        rotation = next((size for size in ROTATIONS if shape[1] % size == 0), None)
        options: dict[str, Any] = {}
        if format.name == "int8" and rotation:
            options = {"convrot": True, "convrot_groupsize": rotation}
        if format.algorithm == "asym_w4a8_int8":
            options = {"group_size": 16, "convrot_groupsize": rotation}
        return cls(format, tuple(shape), options)

    @classmethod
    def read(cls, said: Mapping[str, Any], tensors: Mapping[str, tuple[tuple[int, ...], str]]) -> QuantisedLayer:
        """What a file holds: ``said`` is a layer's ``comfy_quant``, ``tensors`` the shapes and types (by torch's names)
        of its weight and scales, by what follows the weight's name. Raises FormatError where they do not fit."""
        stored, _ = tensors.get("", ((), ""))
        if len(stored) != 2 or 0 in stored:
            raise FormatError("has no weight of two dimensions")
        known = [each for each in FORMATS.values() if each.algorithm == said.get("format")]
        if not known:
            raise FormatError(f"is in the format {str(said.get('format'))[:40]!r}, which is not known here")
        options = _options(known[0], said)
        columns = _columns(known[0], options, stored, tensors)
        # One of ComfyUI's names is that of 4 and of 6 bits.
        fitting = [each for each in known if columns * each.bits == stored[1] * _stored_bits(known[0])]
        if not fitting:
            raise FormatError(f"is {known[0].name} and its scales are for {columns} values a row")
        layer = cls(fitting[0], (stored[0], columns), options)
        layer._check(tensors)
        return layer

    def _check(self, tensors: Mapping[str, tuple[tuple[int, ...], str]]) -> None:
        divisors = [self.options.get(name, 1) for name in ("convrot_groupsize", "group_size")]
        if any(self.shape[1] % each for each in divisors) or not self.format.fits(self.shape):
            raise FormatError(f"is {self.shape[0]} by {self.shape[1]}, of which {self.format.name} makes no blocks")
        for suffix, (shape, dtype) in self.parts.items():
            found = tensors.get(suffix)
            if found is None and suffix == "_codebook":
                continue
            if found is None:
                raise FormatError(f"is {self.format.name} and has no weight{suffix}")
            names = {str(dtype).removeprefix("torch."), *(("float8_e8m0fnu",) if dtype is torch.uint8 else ())}
            if dtype is FP8 and suffix:
                names.add("uint8")  # as some tools write scales
            shapes = {shape}
            if self.format.name == "int8" and suffix == "_scale":
                shapes |= {(1,), ()}
            if self.format.name == "fp8 with one scale" and suffix == "_scale":
                shapes.add((1,))
            if found[0] not in shapes or found[1] not in names:
                raise FormatError(f"is {self.format.name} and its weight{suffix} is {found[1]} {list(found[0])}")

    @property
    def comfy_quant(self) -> bytes:
        """The JSON that ComfyUI reads beside the weight."""
        return json.dumps({"format": self.format.algorithm, **self.options}).encode()

    @cached_property
    def parts(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Shapes and types of what is stored."""
        rows, columns = self.shape
        name = self.format.name
        if name == "int8":
            return {"": (self.shape, torch.int8), "_scale": ((rows, 1), torch.float32)}
        if name == "mxfp8":
            return {"": (self.shape, FP8), "_scale": (_tiled(rows, columns // 32), torch.uint8)}
        if name == "nvfp4":
            scales = {"_scale": (_tiled(rows, columns // 16), FP8), "_scale_2": ((), torch.float32)}
            return {"": ((rows, columns // 2), torch.uint8), **scales}
        if name == "fp8 with one scale":
            return {"": (self.shape, FP8), "_scale": ((), torch.float32)}
        groups = columns // self.options["group_size"]
        return {
            "": ((rows, columns * self.format.bits // 8), torch.int8),
            "_s_rel": ((rows, groups), FP8),
            "_s_channel": ((rows,), torch.float32),
            **({"_codebook": ((16,), torch.float32)} if self.format.bits == 4 else {}),
        }

    # ------------------------------------------------------------ values

    def tensor(self, parts: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
        """comfy_kitchen's quantised tensor over ``parts``; it counts as ``dtype``, float32, bfloat16 or float16."""
        problem = format_problem(self.format.name)
        if problem:
            raise RuntimeError(problem)
        tensor = kitchen().tensor
        common = {"orig_dtype": dtype, "orig_shape": self.shape}
        name, scale = self.format.name, parts.get("_scale")
        if name == "int8":
            extra = {"scale": scale, **{k: v for k, v in self.options.items() if k.startswith("convrot")}}
        elif name == "mxfp8":
            extra = {"scale": scale.view(torch.float8_e8m0fnu)}
        elif name == "nvfp4":
            extra = {"scale": parts["_scale_2"], "block_scale": scale.view(FP8)}
        elif name == "fp8 with one scale":
            extra = {"scale": scale}
        else:
            extra = {
                "scale": parts["_s_rel"].view(FP8),
                "s_channel": parts["_s_channel"],
                "codebook": parts.get("_codebook"),
                **{k: self.options[k] for k in ("group_size", "convrot_groupsize")},
            }
        layout = tensor.get_layout_class(self.format.layout)
        return tensor.QuantizedTensor(parts[""], self.format.layout, layout.Params(**extra, **common))

    def dequantise(self, parts: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
        """The weight (out, in) as ``dtype``, on the parts' device."""
        known = dtype in (torch.float32, torch.bfloat16, torch.float16)
        return self.tensor(parts, dtype if known else torch.float32).dequantize().to(dtype)

    def quantise(self, weight: Tensor) -> Parts:
        """The nearest parts for a weight (out, in), on its device. Raises ValueError where it holds NaN or infinity."""
        problem = format_problem(self.format.name)
        if problem:
            raise RuntimeError(problem)
        values = weight.to(torch.float32)
        if not all(torch.isfinite(extreme) for extreme in values.aminmax()):
            raise ValueError(f"The weight holds NaN or infinity, which {self.format.name} cannot carry.")
        layout = kitchen().tensor.get_layout_class(self.format.layout)
        return _stored(layout.state_dict_tensors(*layout.quantize(values, **self._how())))

    def _how(self) -> dict[str, Any]:
        """What comfy_kitchen's ``quantize`` is told."""
        if self.format.name == "int8":
            return {"per_channel": True, **{k: v for k, v in self.options.items() if k.startswith("convrot")}}
        if self.format.algorithm == "asym_w4a8_int8":
            return {**self.options, **({"bits": 6} if self.format.bits == 6 else {})}
        return {"scale": "recalculate"} if self.format.name == "fp8 with one scale" else {}

    def requantise(self, parts: Mapping[str, Tensor], weight: Tensor, seed: int) -> Parts:
        """Parts for a weight (float32) that ``parts`` were before it was changed, rounded by chance: to the nearest,
        most of a LoRA would be lost. The same seed gives the same parts, and where it can be those of ComfyUI."""
        if self.format.name == "nvfp4":
            return nvfp4_by_chance(weight, parts["_scale_2"], seed)
        if self.format.name == "mxfp8":
            return _mxfp8_by_chance(weight, seed)
        if self.format.name == "fp8 with one scale":
            return _fp8_by_chance(weight, seed)
        changed = self.tensor(parts, torch.float32).requantize_from_float(
            weight, scale="recalculate", stochastic_rounding=seed
        )
        return _stored(changed.state_dict())


def _stored_bits(format: Format) -> int:
    """Bits of one stored item: several values are packed into a byte, or each has an item of its own."""
    return 8 if format.name == "nvfp4" or format.algorithm == "asym_w4a8_int8" else format.bits


def _columns(
    format: Format, options: Mapping[str, Any], stored: tuple[int, ...], tensors: Mapping[str, tuple[tuple, str]]
) -> int:
    """Values a row, which packing hides."""
    if format.algorithm == "asym_w4a8_int8":
        scales, _ = tensors.get("_s_rel", ((), ""))
        if len(scales) != 2:
            raise FormatError(f"is {format.name} and has no weight_s_rel")
        return scales[1] * options["group_size"]
    return stored[1] * _stored_bits(format) // format.bits


def _options(format: Format, said: Mapping[str, Any]) -> dict[str, Any]:
    """The known ones of a file that nobody vouches for, with ComfyUI's defaults for what it does not say."""
    nested = said.get("params")
    said = {**(nested if isinstance(nested, dict) else {}), **said}
    options: dict[str, Any] = {}
    if said.get("full_precision_matrix_mult") is True:
        options["full_precision_matrix_mult"] = True
    rotated = format.algorithm == "asym_w4a8_int8" or (format.name == "int8" and said.get("convrot") is True)
    if rotated:
        options["convrot_groupsize"] = _whole(said.get("convrot_groupsize", 256), "convrot_groupsize")
        size = options["convrot_groupsize"]
        if size < 4 or size != 4 ** round(math.log(size, 4)):
            raise FormatError(f"is {format.name} with a convrot_groupsize of {size}, which is no power of 4")
    if format.name == "int8" and rotated:
        options = {"convrot": True, **options}
    if format.algorithm == "asym_w4a8_int8":
        options = {"group_size": _whole(said.get("group_size", 16), "group_size"), **options}
    return options


def _whole(value: Any, name: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= 1 << 16:
        raise FormatError(f"has a {name} of {str(value)[:20]}, which cannot be")
    return value


def _tiled(rows: int, columns: int) -> tuple[int, int]:
    """The shape of blocks' scales as they are stored: in whole tiles."""
    return -(-rows // TILE_ROWS) * TILE_ROWS, -(-columns // TILE_COLUMNS) * TILE_COLUMNS


def _stored(parts: Mapping[str, Tensor]) -> Parts:
    """Parts in the types of a file: powers of two as bytes, which every safetensors knows."""
    return {k: v.view(torch.uint8) if v.dtype is torch.float8_e8m0fnu else v for k, v in parts.items()}


# ---------------------------------------------------------------- rounding by chance


def nvfp4_by_chance(weight: Tensor, tensor_scale: Tensor, seed: int) -> Parts:
    """nvfp4 parts of a changed weight (out, in), float32: each value goes up or down in proportion to how near it is.

    ``tensor_scale`` is the one it had; it stays where it can, because then most blocks keep their scales too, and
    values that nothing has changed are exactly what they were. ComfyUI's own rounding moves those as well: over a
    weight that is nvfp4 already it adds an error of 17 % of the weight, this one none.
    """
    rows, columns = weight.shape
    blocks = weight.to(torch.float32).reshape(rows, columns // 16, 16)
    largest = blocks.abs().amax(dim=2)
    tensor_scale = torch.maximum(tensor_scale.to(torch.float32), largest.max() / (FP8_MAX * FP4_MAX))
    scales = (largest / FP4_MAX / tensor_scale).clamp(max=FP8_MAX).to(FP8)
    step = (scales.to(torch.float32) * tensor_scale)[:, :, None]
    values = torch.where(step > 0, blocks / step, 0).clamp_(-FP4_MAX, FP4_MAX)
    generator = torch.Generator(device=weight.device).manual_seed(seed)
    codes = _fp4_by_chance(values.abs(), generator) | (values < 0).to(torch.uint8) << 3
    codes = codes.reshape(rows, columns)
    tiled = kitchen().float_utils.to_blocked(scales, flatten=False)
    return {"": codes[:, 0::2] << 4 | codes[:, 1::2], "_scale": tiled, "_scale_2": tensor_scale}


def _fp4_by_chance(sizes: Tensor, generator: torch.Generator) -> Tensor:
    """Codes of one of the two neighbours on fp4's grid."""
    grid = torch.tensor(FP4_VALUES, device=sizes.device)
    below = torch.bucketize(sizes, grid, right=True).sub_(1).clamp_(max=len(FP4_VALUES) - 2)
    low, high = grid[below], grid[below + 1]
    chance = torch.rand(sizes.shape, generator=generator, device=sizes.device)
    return (below + ((sizes - low) / (high - low) > chance)).to(torch.uint8)


def _mxfp8_by_chance(weight: Tensor, seed: int) -> Parts:
    """As ComfyUI from 0.33 on rounds a changed weight, value by value."""
    rows, columns = weight.shape
    _, scales = kitchen().quantize_mxfp8(weight)
    powers = kitchen().float_utils.from_blocked(scales.view(torch.uint8), num_rows=rows, num_cols=columns // 32)
    sizes = torch.exp2(powers.to(torch.float32) - 127).repeat_interleave(32, dim=1)
    sizes = torch.where(powers.repeat_interleave(32, dim=1) == 0, 1, sizes)
    return {"": _draw_fp8(weight / sizes, seed), "_scale": scales.view(torch.uint8)}


def _fp8_by_chance(weight: Tensor, seed: int) -> Parts:
    scale = weight.abs().amax() / FP8_MAX
    return {"": _draw_fp8(weight * (1 / scale), seed), "_scale": scale}


def _draw_fp8(values: Tensor, seed: int) -> Tensor:
    generator = torch.Generator(device=values.device).manual_seed(seed)
    draw = torch.randint(0, 256, values.shape, dtype=torch.uint8, device=values.device, generator=generator)
    return kitchen().stochastic_rounding_fp8(values, draw, FP8)
