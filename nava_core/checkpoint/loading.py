"""Loads a NAVA backbone: configuration from the file, weights streamed one by one into their final type and place."""

from __future__ import annotations

import json
import math
import os
import re
import zlib
from collections.abc import Callable, Collection, Container, Iterator, Mapping
from dataclasses import dataclass, fields

import torch
from torch import nn

from ..backbone.config import BackboneConfig
from ..backbone.formats import FORMATS, Format, QuantisedLayer, format_problem
from ..backbone.model import NavaBackbone
from ..backbone.quant_linear import QuantLinear
from ..backbone.quantized import FP8, Fp8Linear, RowFp8Layer
from .gguf import BLOCKS, gguf_problem
from .headers import FileInfo, TensorInfo, describe_file
from .kinds import FileKind, WrongFileError, explain_wrong_file
from .quantised import MARK, WEIGHT, layers_phrase
from .source import TensorSource, open_checkpoint

SCALE = "_scale"  # what a float8 weight's name is followed by in the name of its scales
BLOCK_LINEAR = re.compile(r"(double|single)_blocks\.\d+\.(self_attn|cross_attn|ffn)\..+\.weight")
READABLE = frozenset(
    {torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float8_e5m2}
)
SHOWN_NAMES = 3
SEED_PREFIX = "diffusion_model."  # before a weight's name where ComfyUI draws its rounding, to round as it does
MAX_TEXT_LEN = 8192  # tokens; a configuration that claims more is refused before memory is taken for them

# Called with a weight in float32; returns a new one of its shape, and leaves the given one as it is.
WeightChange = Callable[[torch.Tensor], torch.Tensor]
# How a layer's weight is kept where it is quantised.
Layer = QuantisedLayer | RowFp8Layer
# The type of all weights; ``torch.float8_e4m3fn`` is that of the blocks' Linears, with a scale a row, and all else
# bfloat16; None leaves quantised layers as they are, and all else the type that most of it is in; a mapping gives the
# formats of some of the blocks' Linears, by name, and all else is bfloat16.
Wanted = torch.dtype | Mapping[str, Format] | None


@dataclass(frozen=True)
class PlannedTensor:
    """A tensor as it will be in memory, or in a converted file."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    layer: Layer | None = None  # of a quantised weight, with its values; its scales are tensors of their own

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def plain(self) -> tuple:
        """The same without a class of this package, for processes that have it under another name."""
        layer = self.layer
        if isinstance(layer, QuantisedLayer):
            layer = (layer.shape, layer.format.name, dict(layer.options))
        elif layer is not None:
            layer = (layer.shape,)
        return self.name, tuple(self.shape), self.dtype, layer

    @classmethod
    def from_plain(cls, plain: tuple) -> PlannedTensor:
        """What ``plain`` gave."""
        name, shape, dtype, layer = plain
        if layer is not None:
            own, *rest = layer
            layer = QuantisedLayer(FORMATS[rest[0]], own, rest[1]) if rest else RowFp8Layer(own)
        return cls(name, shape, dtype, layer)


def load_backbone(
    path: str | os.PathLike | FileInfo,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    changes: Mapping[str, WeightChange] | None = None,
    in_ram: Collection[str] = (),
    mapped: bool = False,
) -> NavaBackbone:
    """A backbone from a checkpoint of any form, ready to run: safetensors, torch or GGUF; fp32, bf16, fp16, fp8, or one
    of ComfyUI's quantised formats.

    ``dtype``: None keeps the type most of the file is in (of GGUF: bfloat16), and quantised weights as they are
    (``Fp8Linear``, ``QuantLinear``, the rest bfloat16); ``torch.float8_e4m3fn`` quantises the blocks' Linears on the
    way in; any other floating type converts all to it. Beyond the loaded weights it takes the memory of the tensor
    being read (and of its float32 form where it is quantised). ``changes``, by a weight's name, are made to it on
    ``device`` as it comes in, such as those of :class:`LoraMerge`. ``in_ram``: beginnings of names (such as
    "single_blocks.3.") of weights that stay on the CPU. ``mapped``: of those on the CPU, the ones that are in the file
    as they are wanted stay in its pages, which are the system's cache, and take no memory of the process.

    Raises FileNotFoundError, WrongFileError where the file is no backbone, ValueError where it is damaged
    or incomplete, or of a format whose package is missing (RuntimeError).
    """
    info = readable_backbone(path)
    config = backbone_config(info)
    plan = {tensor.name: tensor for tensor in plan_tensors(info, dtype)}
    model = empty_backbone(config, plan, main_dtype(info, dtype))
    problem = _mismatch(model, plan)
    if problem:
        raise WrongFileError(f"{info.path.name} does not fit its own configuration: {problem}; download it again.")
    device, in_ram = torch.device(device), tuple(in_ram)

    def home(name: str) -> torch.device:
        return torch.device("cpu") if name.startswith(in_ram) else device

    def is_mapped(name: str) -> bool:
        return mapped and home(name).type == "cpu"

    with open_checkpoint(info) as source:
        for name, tensor in stream_tensors(source, dtype, changes, device, is_mapped):
            assign_tensor(model, name, tensor.to(home(name)))
    return model.eval()


def backbone_problem(path: str | os.PathLike | FileInfo) -> str | None:
    """The sentence ``load_backbone`` would fail with, found without reading a tensor; None where it would load."""
    try:
        info = readable_backbone(path)
        plan = {tensor.name: tensor for tensor in plan_tensors(info, None)}
        problem = _mismatch(empty_backbone(backbone_config(info), plan, torch.bfloat16), plan)
    except (ValueError, FileNotFoundError) as error:
        return str(error)
    return f"{info.path.name} does not fit its own configuration: {problem}; download it again." if problem else None


def backbone_config(info: FileInfo) -> BackboneConfig:
    """Configuration of a backbone file: its tensors' shapes, and the ``config`` JSON of its metadata for the rest.

    Raises ValueError where a tensor it is read from is missing, or the metadata holds nonsense.
    """
    shapes = weight_shapes(info)
    try:
        return BackboneConfig.from_shapes(shapes, _config_metadata(info))
    except (KeyError, IndexError) as error:
        missing = f"the tensor {error.args[0]} is missing" if isinstance(error, KeyError) else "a shape is wrong"
        raise WrongFileError(
            f"{info.path.name} is an incomplete NAVA backbone: {missing}; download it again."
        ) from error


def _config_metadata(info: FileInfo) -> dict:
    """The ``config`` of a file that nobody vouches for: only known fields, and only sensible numbers."""
    text = info.metadata.get("config")
    if text is None:
        return {}
    try:
        given = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise WrongFileError(f"{info.path.name}: the config in its metadata is not JSON; download it again.") from error
    if not isinstance(given, dict):
        return {}
    limits = {"num_heads": 1024, "text_len": MAX_TEXT_LEN, "eps": 1e-2}
    kept = {}
    for known in fields(BackboneConfig):
        if known.name not in given:
            continue
        value, wanted = given[known.name], type(known.default)
        number = isinstance(value, wanted) and not isinstance(value, bool)
        if not number or not 0 < value <= limits.get(known.name, 2**20):
            raise WrongFileError(
                f"{info.path.name}: the config in its metadata gives {known.name} = {str(value)[:40]}, which cannot be."
            )
        kept[known.name] = value
    return kept


def main_dtype(info: FileInfo, dtype: Wanted = None) -> torch.dtype:
    """The type a loaded backbone computes in: ``dtype``, or for None what most of the file is in.

    Quantised weights compute in bfloat16.
    """
    if isinstance(dtype, Mapping) or (dtype is None and (info.layers or info.format == "gguf")):
        return torch.bfloat16
    if dtype is None:
        weight: dict[torch.dtype, int] = {}
        for tensor in info.model_tensors.values():
            if tensor.torch_dtype is not None and tensor.torch_dtype.is_floating_point:
                weight[tensor.torch_dtype] = weight.get(tensor.torch_dtype, 0) + tensor.numel
        dtype = max(weight, key=weight.get, default=torch.bfloat16)
    return torch.bfloat16 if dtype.itemsize == 1 else dtype


def estimate_memory(info: FileInfo, dtype: Wanted = None) -> int:
    """Bytes the file's weights take when loaded as ``dtype`` (None: as ``load_backbone`` does by default)."""
    if info.is_backbone:
        return sum(tensor.nbytes for tensor in plan_tensors(info, dtype))
    return sum(_converted_bytes(tensor, dtype) for tensor in info.tensors.values())


def _converted_bytes(tensor: TensorInfo, dtype: torch.dtype | None) -> int:
    own = tensor.torch_dtype
    return tensor.nbytes if dtype is None or own is None or not own.is_floating_point else tensor.numel * dtype.itemsize


# --------------------------------------------------------------------------------------------------------
# the plan: which tensors come out, and in which type


def plan_tensors(info: FileInfo, dtype: Wanted) -> list[PlannedTensor]:
    """What ``stream_tensors`` will give for a backbone file, in the same order, read off its header."""
    own, wanted, rest = own_layers(info), wanted_layers(info, dtype), main_dtype(info, dtype)
    stored = {part for layer in own for part in _part_names(layer, own[layer])}
    planned = []
    for name, tensor in info.model_tensors.items():
        layer = name.removesuffix(WEIGHT)
        if layer != name and layer in wanted:
            kept = own.get(layer) == wanted[layer]
            planned += _planned_parts(info, layer, wanted[layer], kept)
        elif layer != name and layer in own:
            planned.append(PlannedTensor(name, own[layer].shape, rest))
        elif name not in stored:
            found = tensor.torch_dtype
            planned.append(PlannedTensor(name, tensor.shape, found if found and not found.is_floating_point else rest))
    return planned


def _planned_parts(info: FileInfo, name: str, layer: Layer, kept: bool) -> Iterator[PlannedTensor]:
    tensors = info.model_tensors
    for suffix, (shape, kind) in layer.parts.items():
        part = f"{name}{WEIGHT}{suffix}"
        if kept and isinstance(layer, QuantisedLayer):  # another tool's scales can be of another shape
            if part not in tensors:
                continue
            shape, kind = tensors[part].shape, tensors[part].torch_dtype
        yield PlannedTensor(part, shape, kind, layer if suffix == "" else None)


def stream_tensors(
    source: TensorSource,
    dtype: Wanted,
    changes: Mapping[str, WeightChange] | None = None,
    device: torch.device | str = "cpu",
    is_mapped: Callable[[str], bool] = lambda _: False,
    only: Container[str] | None = None,
) -> Iterator[tuple[str, torch.Tensor]]:
    """Tensors of a backbone in the type they are wanted in, one by one; ``dtype`` and ``changes`` as for
    ``load_backbone``. Changed and newly quantised ones are on ``device``, the others on the CPU; those that stay as
    they are in the file's pages where ``is_mapped`` says so of their name. ``only``: names of the weights to read,
    where it is not all of them."""
    info, changes = source.info, changes or {}
    own, wanted, rest = own_layers(info), wanted_layers(info, dtype), main_dtype(info, dtype)
    stored = {part for layer in own for part in _part_names(layer, own[layer])}
    for name in source:
        if name in stored or (only is not None and name not in only):
            continue
        layer = name.removesuffix(WEIGHT)
        if layer == name or not (layer in wanted or layer in own):
            yield name, _plain(source, name, rest, changes.get(name), device, is_mapped)
            continue
        yield from _layer_tensors(
            source, layer, own.get(layer), wanted.get(layer), rest, changes.get(name), device, is_mapped
        )


def _plain(
    source: TensorSource, name: str, dtype, change: WeightChange | None, device, is_mapped: Callable[[str], bool]
) -> torch.Tensor:
    found = source.tensors[name].torch_dtype
    stays = change is None and found is not None and (found is dtype or not found.is_floating_point)
    value = source.map(name) if stays and is_mapped(name) else source.read(name)
    value = value.to(dtype) if value.is_floating_point() else value
    return value if change is None else change(value.to(device, torch.float32)).to(value.dtype)


def _layer_tensors(
    source: TensorSource,
    name: str,
    own: Layer | None,
    wanted: Layer | None,
    rest: torch.dtype,
    change: WeightChange | None,
    device: torch.device | str,
    is_mapped: Callable[[str], bool],
) -> Iterator[tuple[str, torch.Tensor]]:
    """What becomes of one layer's weight: kept, dequantised, quantised, or changed and then kept as it was."""
    weight = f"{name}{WEIGHT}"
    if own is None:
        value = source.read(weight).to(device)
        parts = _quantised(weight, wanted, value)
    else:
        get = source.map if change is None and own == wanted and is_mapped(weight) else source.read
        parts = {suffix: get(weight + suffix) for suffix in own.parts if weight + suffix in source}
        if change is not None or own != wanted:
            parts = {suffix: part.to(device) for suffix, part in parts.items()}
    if wanted is None:
        value = own.dequantise(parts, rest)
        yield weight, value if change is None else change(value.to(torch.float32)).to(value.dtype)
        return
    if own is not None and own != wanted:
        parts = _quantised(weight, wanted, own.dequantise(parts, torch.float32))
    if isinstance(wanted, RowFp8Layer):
        parts["_scale"] = parts["_scale"].to(torch.bfloat16)
    if change is not None:
        parts = _changed(weight, wanted, parts, change)
    for suffix, part in parts.items():
        yield weight + suffix, part


def _quantised(name: str, layer: Layer, value: torch.Tensor) -> dict[str, torch.Tensor]:
    try:
        return layer.quantise(value)
    except ValueError as error:
        raise ValueError(f"{name} cannot be turned into {layer_name(layer)}. {error}") from error


def _changed(name: str, layer: Layer, parts: dict[str, torch.Tensor], change: WeightChange) -> dict[str, torch.Tensor]:
    """A quantised weight after a change, rounded by chance as in ComfyUI: to the nearest, most of a LoRA would be
    lost."""
    before = layer.dequantise(parts, torch.float32)
    after = change(before)
    if torch.equal(after, before):
        return parts
    seed = zlib.crc32(f"{SEED_PREFIX}{name}".encode())
    made = layer.requantise(parts, after, seed)
    return {suffix: part.view(parts[suffix].dtype).reshape(parts[suffix].shape) for suffix, part in made.items()}


def own_layers(info: FileInfo) -> dict[str, Layer]:
    """The file's quantised layers: ComfyUI's formats, and float8 with a scale a row."""
    tensors = info.model_tensors
    layers: dict[str, Layer] = dict(info.layers)
    for name, tensor in tensors.items():
        layer, scale = name.removesuffix(WEIGHT), tensors.get(name + SCALE)
        if layer == name or layer in layers or tensor.torch_dtype is not FP8 or len(tensor.shape) != 2:
            continue
        if scale is not None and scale.shape == tensor.shape[:1]:
            layers[layer] = RowFp8Layer(tensor.shape)
    return layers


def wanted_layers(info: FileInfo, dtype: Wanted) -> dict[str, Layer]:
    """The layers that are to be quantised in memory, or in a converted file; see :data:`Wanted`.

    Raises ValueError, in a sentence, where fp8 is wanted of a file that is in a quantised format already.
    """
    own = own_layers(info)
    if dtype is None:
        return {
            name: layer
            for name, layer in own.items()
            if isinstance(layer, QuantisedLayer) or BLOCK_LINEAR.fullmatch(f"{name}{WEIGHT}")
        }
    shapes = weight_shapes(info)
    linears = {n.removesuffix(WEIGHT): shape for n, shape in shapes.items() if BLOCK_LINEAR.fullmatch(n)}
    if dtype is FP8:
        if info.layers:
            kinds = layers_phrase(info.layers)
            raise ValueError(
                f"{info.path.name} is in {kinds}: another rounding, to fp8, would only lose. Load it as it is, or as "
                "bf16."
            )
        return {name: RowFp8Layer(shape) for name, shape in linears.items() if len(shape) == 2}
    if isinstance(dtype, torch.dtype):
        return {}
    made: dict[str, Layer] = {}
    for name, format in dtype.items():
        mine = own.get(name)
        kept = isinstance(mine, QuantisedLayer) and mine.format == format
        made[name] = mine if kept else QuantisedLayer.made(format, linears[name])
    return made


def block_linears(info: FileInfo) -> dict[str, tuple[int, int]]:
    """The Linears that are quantised, those inside the blocks, with the shapes of their weights."""
    shapes = weight_shapes(info).items()
    return {n.removesuffix(WEIGHT): shape for n, shape in shapes if len(shape) == 2 and BLOCK_LINEAR.fullmatch(n)}


def weight_shapes(info: FileInfo) -> dict[str, tuple[int, ...]]:
    """Shapes of the model's tensors by its own names, whatever form the file keeps them in."""
    own = own_layers(info)
    stored = {part for layer in own for part in _part_names(layer, own[layer])}
    shapes = {name: tensor.shape for name, tensor in info.model_tensors.items() if name not in stored}
    return {**shapes, **{f"{name}{WEIGHT}": tuple(layer.shape) for name, layer in own.items()}}


def layer_name(layer: Layer) -> str:
    """The format in a word."""
    return layer.format.name if isinstance(layer, QuantisedLayer) else "fp8"


def _part_names(name: str, layer: Layer) -> Iterator[str]:
    """What stands in the file beside a quantised layer's weight."""
    yield from (f"{name}{WEIGHT}{suffix}" for suffix in layer.parts if suffix)
    yield f"{name}{MARK}"


# --------------------------------------------------------------------------------------------------------
# the model


def readable_backbone(path: str | os.PathLike | FileInfo) -> FileInfo:
    """What is known of a backbone file that can be read here; raises as ``load_backbone`` does."""
    info = path if isinstance(path, FileInfo) else describe_file(path)
    if not info.is_backbone:
        raise WrongFileError(explain_wrong_file(info, FileKind.NAVA_BACKBONE))
    if info.layers_problem:
        raise WrongFileError(
            f"{info.path.name}: {info.layers_problem}: download or convert it again, or get the backbone in bf16."
        )
    stored = {part for name, layer in own_layers(info).items() for part in _part_names(name, layer)}
    stored |= {f"{name}{WEIGHT}" for name in info.layers}
    tensors = {name: tensor for name, tensor in info.model_tensors.items() if name not in stored}
    blocks = {name for name, tensor in tensors.items() if tensor.dtype in BLOCKS and info.format == "gguf"}
    foreign = {n: t.dtype for n, t in tensors.items() if t.torch_dtype not in READABLE and n not in blocks}
    if foreign:
        name, dtype = next(iter(foreign.items()))
        raise WrongFileError(
            f"{info.path.name} has {len(foreign)} of {len(info.model_tensors)} tensors in a type that is not read here "
            f"({name}: {dtype}): get the backbone in fp32, bf16, fp16 or fp8."
        )
    if blocks and gguf_problem():
        raise WrongFileError(f"{info.path.name} cannot be read. {gguf_problem()}")
    for format in {layer.format.name for layer in info.layers.values()}:
        problem = format_problem(format)
        if problem:
            raise WrongFileError(f"{info.path.name} cannot be read. {problem}")
    return info


def empty_backbone(config: BackboneConfig, plan: Mapping[str, PlannedTensor], dtype: torch.dtype) -> NavaBackbone:
    """The network without memory for its weights, with Linears of the quantised kinds where the plan has them; see
    ``assign_tensor``."""
    model = NavaBackbone(config, dtype=dtype, device="meta")
    for name, module in list(model.named_modules()):
        layer = getattr(plan.get(f"{name}{WEIGHT}"), "layer", None)
        if isinstance(module, nn.Linear) and layer is not None and layer.shape == tuple(module.weight.shape):
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, _quantised_linear(name, layer, module.bias is not None, plan))
    return model.requires_grad_(False)


def _quantised_linear(name: str, layer: Layer, bias: bool, plan: Mapping[str, PlannedTensor]) -> nn.Module:
    if isinstance(layer, RowFp8Layer):
        return Fp8Linear(layer.shape[1], layer.shape[0], bias, device="meta")
    parts = {suffix: plan.get(f"{name}{WEIGHT}{suffix}") for suffix in layer.parts}
    return QuantLinear(layer, {s: (p.shape, p.dtype) for s, p in parts.items() if p is not None}, bias, device="meta")


def _mismatch(model: NavaBackbone, plan: Mapping[str, PlannedTensor]) -> str:
    """What is missing, too much, or of another shape, as a phrase; empty where all fits."""
    wanted = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    missing = [name for name in wanted if name not in plan]
    unexpected = [name for name in plan if name not in wanted]
    misshaped = [
        f"{name} {tensor.shape} instead of {wanted[name]}"
        for name, tensor in plan.items()
        if name in wanted and tensor.shape != wanted[name]
    ]
    said = ((missing, "missing"), (unexpected, "not known"), (misshaped, "of another shape"))
    return "; ".join(_listed(names, what) for names, what in said if names)


def _listed(names: list[str], what: str) -> str:
    shown = ", ".join(names[:SHOWN_NAMES]) + (", ..." if len(names) > SHOWN_NAMES else "")
    return f"{len(names)} tensor{' is' if len(names) == 1 else 's are'} {what} ({shown})"


def assign_tensor(model: nn.Module, name: str, tensor: torch.Tensor) -> None:
    """Puts a tensor where the model has a parameter or buffer without memory."""
    path, _, leaf = name.rpartition(".")
    module = model.get_submodule(path)
    if leaf in module._parameters:
        module._parameters[leaf] = nn.Parameter(tensor, requires_grad=False)
    else:
        module._buffers[leaf] = tensor
