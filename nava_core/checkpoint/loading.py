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
from ..backbone.model import NavaBackbone
from ..backbone.quantized import FP8, Fp8Linear, dequantise_rows, quantise_rows, quantise_rows_stochastically
from .headers import FileInfo, TensorInfo, describe_file
from .kinds import FileKind, WrongFileError, explain_wrong_file
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


@dataclass(frozen=True)
class PlannedTensor:
    """A tensor as it will be in memory, or in a converted file."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def load_backbone(
    path: str | os.PathLike | FileInfo,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    changes: Mapping[str, WeightChange] | None = None,
    in_ram: Collection[str] = (),
    mapped: bool = False,
) -> NavaBackbone:
    """A backbone from a checkpoint of any form (safetensors or torch; fp32, bf16, fp16, fp8), ready to run.

    ``dtype``: None keeps the type most of the file is in, and the float8 weights of an fp8 file as they are
    (``Fp8Linear``, the rest bfloat16); ``torch.float8_e4m3fn`` quantises the blocks' Linears on the way in;
    any other floating type converts all to it. Beyond the loaded weights it takes the memory of the tensor
    being read (and of its float32 form where it is quantised). ``changes``, by a weight's name, are made to it on
    ``device`` as it comes in, such as those of :class:`LoraMerge`. ``in_ram``: beginnings of names (such as
    "single_blocks.3.") of weights that stay on the CPU. ``mapped``: of those on the CPU, the ones that are in the file
    as they are wanted stay in its pages, which are the system's cache, and take no memory of the process.

    Raises FileNotFoundError, WrongFileError where the file is no backbone, ValueError where it is damaged
    or incomplete.
    """
    info = _backbone_info(path)
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
        info = _backbone_info(path)
        plan = {tensor.name: tensor for tensor in plan_tensors(info, None)}
        problem = _mismatch(empty_backbone(backbone_config(info), plan, torch.bfloat16), plan)
    except (ValueError, FileNotFoundError) as error:
        return str(error)
    return f"{info.path.name} does not fit its own configuration: {problem}; download it again." if problem else None


def backbone_config(info: FileInfo) -> BackboneConfig:
    """Configuration of a backbone file: its tensors' shapes, and the ``config`` JSON of its metadata for the rest.

    Raises ValueError where a tensor it is read from is missing, or the metadata holds nonsense.
    """
    shapes = {name: tensor.shape for name, tensor in info.model_tensors.items()}
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


def main_dtype(info: FileInfo, dtype: torch.dtype | None = None) -> torch.dtype:
    """The type a loaded backbone computes in: ``dtype``, or for None what most of the file is in.

    float8 weights compute in bfloat16.
    """
    if dtype is None:
        weight: dict[torch.dtype, int] = {}
        for tensor in info.model_tensors.values():
            if tensor.torch_dtype is not None and tensor.torch_dtype.is_floating_point:
                weight[tensor.torch_dtype] = weight.get(tensor.torch_dtype, 0) + tensor.numel
        dtype = max(weight, key=weight.get, default=torch.bfloat16)
    return torch.bfloat16 if dtype.itemsize == 1 else dtype


def estimate_memory(info: FileInfo, dtype: torch.dtype | None = None) -> int:
    """Bytes the file's weights take when loaded as ``dtype`` (None: as ``load_backbone`` does by default)."""
    if info.is_backbone:
        return sum(tensor.nbytes for tensor in plan_tensors(info, dtype))
    return sum(_converted_bytes(tensor, dtype) for tensor in info.tensors.values())


def _converted_bytes(tensor: TensorInfo, dtype: torch.dtype | None) -> int:
    own = tensor.torch_dtype
    return tensor.nbytes if dtype is None or own is None or not own.is_floating_point else tensor.numel * dtype.itemsize


# --------------------------------------------------------------------------------------------------------
# the plan: which tensors come out, and in which type


def plan_tensors(info: FileInfo, dtype: torch.dtype | None) -> list[PlannedTensor]:
    """What ``stream_tensors`` will give for a backbone file, in the same order, read off its header."""
    tensors = info.model_tensors
    rest = main_dtype(info, dtype)
    planned = []
    for name, tensor in tensors.items():
        if _is_used_scale(name, tensors):
            continue
        if _ends_in_fp8(name, tensors, dtype):
            planned.append(PlannedTensor(name, tensor.shape, FP8))
            planned.append(PlannedTensor(name + SCALE, tensor.shape[:1], torch.bfloat16))
        else:
            own = tensor.torch_dtype
            planned.append(PlannedTensor(name, tensor.shape, own if own and not own.is_floating_point else rest))
    return planned


def stream_tensors(
    source: TensorSource,
    dtype: torch.dtype | None,
    changes: Mapping[str, WeightChange] | None = None,
    device: torch.device | str = "cpu",
    is_mapped: Callable[[str], bool] = lambda _: False,
    only: Container[str] | None = None,
) -> Iterator[tuple[str, torch.Tensor]]:
    """Tensors of a backbone in the type they are wanted in, one by one; ``dtype`` and ``changes`` as for
    ``load_backbone``. Changed ones are on ``device``, the others on the CPU; those that stay as they are in the file's
    pages where ``is_mapped`` says so of their name. ``only``: names of the weights to read, where it is not all of
    them."""
    tensors, changes = source.tensors, changes or {}
    rest = main_dtype(source.info, dtype)
    for name in source:
        if _is_used_scale(name, tensors) or (only is not None and name not in only):
            continue
        change = changes.get(name)
        wanted = FP8 if _ends_in_fp8(name, tensors, dtype) else rest
        stays = change is None and tensors[name].torch_dtype is wanted
        value = source.map(name) if stays and is_mapped(name) else source.read(name)
        scale = source.read(name + SCALE) if _is_scaled(name, tensors) else None
        if change is not None:
            value, scale = value.to(device), scale if scale is None else scale.to(device)
        if not _ends_in_fp8(name, tensors, dtype):
            value = _cast(value, scale, rest)
            yield name, value if change is None else change(value.to(torch.float32)).to(value.dtype)
            continue
        if scale is None:
            value, scale = _quantise(name, value)
        if change is not None:
            value, scale = _changed_fp8(name, value, scale.to(torch.bfloat16), change)
        yield name, value
        yield name + SCALE, scale.to(torch.bfloat16)


def _cast(value: torch.Tensor, scale: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
    if scale is not None:
        return dequantise_rows(value, scale, dtype)
    return value.to(dtype) if value.is_floating_point() else value


def _quantise(name: str, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    try:
        return quantise_rows(value)
    except ValueError as error:
        raise ValueError(f"{name} cannot be turned into fp8. {error}") from error


def _changed_fp8(
    name: str, value: torch.Tensor, scale: torch.Tensor, change: WeightChange
) -> tuple[torch.Tensor, torch.Tensor]:
    """A float8 weight and its scales after a change, rounded by chance as in ComfyUI: to the nearest, most of a LoRA
    would be lost."""
    before = dequantise_rows(value, scale, torch.float32)
    after = change(before)
    if torch.equal(after, before):
        return value, scale
    return quantise_rows_stochastically(after, zlib.crc32(f"{SEED_PREFIX}{name}".encode()))


def _is_scaled(name: str, tensors: Mapping[str, TensorInfo]) -> bool:
    """Whether a weight is float8 with a scale for each of its rows."""
    tensor, scale = tensors[name], tensors.get(name + SCALE)
    return tensor.torch_dtype is FP8 and scale is not None and scale.shape == tensor.shape[:1]


def _is_used_scale(name: str, tensors: Mapping[str, TensorInfo]) -> bool:
    weight = name.removesuffix(SCALE)
    return weight != name and weight in tensors and _is_scaled(weight, tensors)


def _ends_in_fp8(name: str, tensors: Mapping[str, TensorInfo], dtype: torch.dtype | None) -> bool:
    if len(tensors[name].shape) != 2 or dtype not in (None, FP8):
        return False
    in_block = BLOCK_LINEAR.fullmatch(name) is not None
    return in_block and (dtype is FP8 or _is_scaled(name, tensors))


# --------------------------------------------------------------------------------------------------------
# the model


def _backbone_info(path: str | os.PathLike | FileInfo) -> FileInfo:
    info = path if isinstance(path, FileInfo) else describe_file(path)
    if not info.is_backbone:
        raise WrongFileError(explain_wrong_file(info, FileKind.NAVA_BACKBONE))
    foreign = {name: t.dtype for name, t in info.model_tensors.items() if t.torch_dtype not in READABLE}
    if foreign:
        name, dtype = next(iter(foreign.items()))
        raise WrongFileError(
            f"{info.path.name} has {len(foreign)} of {len(info.model_tensors)} tensors in a type that is not read here "
            f"({name}: {dtype}): get the backbone in fp32, bf16, fp16 or fp8."
        )
    return info


def empty_backbone(config: BackboneConfig, plan: Mapping[str, PlannedTensor], dtype: torch.dtype) -> NavaBackbone:
    """The network without memory for its weights, float8 Linears where the plan has them; see ``assign_tensor``."""
    model = NavaBackbone(config, dtype=dtype, device="meta")
    for name, module in list(model.named_modules()):
        planned = plan.get(f"{name}.weight")
        if isinstance(module, nn.Linear) and planned is not None and planned.dtype is FP8:
            linear = Fp8Linear(module.in_features, module.out_features, module.bias is not None, device="meta")
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, linear)
    return model.requires_grad_(False)


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
