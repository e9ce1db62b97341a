"""Converts a NAVA backbone between fp32, bf16, fp16, fp8 and ComfyUI's quantised formats, tensor by tensor; the result
is whole or not there."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Callable, Collection, Iterable
from pathlib import Path
from typing import BinaryIO

import torch

from .backbone.formats import FORMATS, MADE_HERE, PROTECTING, QuantisedLayer
from .checkpoint import (
    FileInfo,
    FileKind,
    PlannedTensor,
    WrongFileError,
    backbone_config,
    backbone_problem,
    describe_file,
    explain_wrong_file,
    format_bytes,
    open_checkpoint,
    plan_tensors,
    stream_tensors,
)
from .checkpoint.gguf import bits_of
from .checkpoint.headers import SAFETENSORS_DTYPES
from .checkpoint.loading import Wanted, block_linears, layer_name, own_layers
from .checkpoint.quantised import MARK, METADATA, WEIGHT

DTYPES = {
    "fp8": torch.float8_e4m3fn,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp32": torch.float32,
}
TYPES = ("fp8", *MADE_HERE, "bf16", "fp16", "fp32")
BITS = {**{name: each.bits for name, each in FORMATS.items()}, "fp8": 8}
PREFIX = "backbone."  # of the released files' tensor names
CODES = {dtype: code for code, dtype in SAFETENSORS_DTYPES.items()}
HEADER_ALIGNMENT = 8

# Called with (bytes written so far, bytes in all) after each tensor.
Progress = Callable[[int, int], None]


def convert(
    source: str | os.PathLike,
    target: str | os.PathLike,
    *,
    dtype: str = "fp8",
    protected: Collection[str] = (),
    overwrite: bool = False,
    device: torch.device | str = "cpu",
    progress: Progress | None = None,
    say: Callable[[str], None] | None = None,
) -> FileInfo:
    """Writes a backbone checkpoint in another type, as safetensors in the released files' layout.

    ``dtype``: "fp8" (the blocks' Linears as float8 with a scale a row, all else bf16), "bf16", "fp16", "fp32", or for
    the blocks' Linears one of ComfyUI's formats "int8", "mxfp8", "nvfp4", "w4a8", "w6a8" (all else bf16).
    ``protected``: names of Linears that stay at 8 bits beside a smaller format (``quality.most_sensitive`` finds
    them). Tensor names begin with ``backbone.``; metadata is kept, and ``config`` added where there was none.
    Quantising runs on ``device``; no more than one tensor is in memory at a time. ``say`` is told, in a sentence, what
    is rounded twice. The target appears only when it is complete.

    Returns the new file's description. Raises FileNotFoundError, FileExistsError (and ``overwrite`` is not
    set), WrongFileError where the source is no sound backbone, ValueError for an unknown ``dtype``, a target
    that is the source, values that the type cannot hold or a source of fewer bits, RuntimeError where comfy_kitchen is
    missing, OSError where the disk is too small.
    """
    if dtype not in TYPES:
        raise ValueError(f"There is no weight type {dtype!r}: choose one of {', '.join(TYPES)}.")
    info = describe_file(source)
    if not info.is_backbone:
        raise WrongFileError(explain_wrong_file(info, FileKind.NAVA_BACKBONE))
    problem = backbone_problem(info)
    if problem:
        raise WrongFileError(problem)
    target = Path(target)
    check_target(info, target, overwrite)
    wanted = wanted_type(info, dtype, protected)
    warning = requantising(info, dtype)
    if warning and say is not None:
        say(warning)
    plan = plan_tensors(info, wanted)
    marks = {
        f"{tensor.name.removesuffix(WEIGHT)}{MARK}": tensor.layer.comfy_quant for tensor in plan if _marked(tensor)
    }
    header, offsets = _layout([*plan, *_planned_marks(marks)], _metadata(info))
    total = len(header) + sum(nbytes for _, nbytes in offsets.values())
    check_space(target, total)
    with complete_or_absent(target) as file:
        file.write(header)
        for name, text in marks.items():
            file.seek(offsets[name][0])
            file.write(text)
        _write_tensors(file, info, wanted, offsets, total, device, progress)
    return describe_file(target)


def wanted_type(info: FileInfo, dtype: str, protected: Collection[str] = ()) -> Wanted:
    """What each tensor of a file is to become; see :func:`convert`, which says what is raised."""
    if dtype in DTYPES:
        if protected:
            raise ValueError(
                f"Layers can be protected beside {', '.join(PROTECTING)}; {dtype} has 8 bits or more itself."
            )
        return DTYPES[dtype]
    linears = block_linears(info)
    unknown = [name for name in protected if name not in linears]
    if unknown:
        raise ValueError(f"{info.path.name} has no Linear {unknown[0]} in its blocks to protect.")
    if protected and dtype not in PROTECTING:
        raise ValueError(f"Layers can be protected beside {', '.join(PROTECTING)}; {dtype} has 8 bits itself.")
    formats = {name: FORMATS[PROTECTING[dtype] if name in protected else dtype] for name in linears}
    return {name: format for name, format in formats.items() if format.fits(linears[name])}


def requantising(info: FileInfo, dtype: str) -> str | None:
    """A warning where a quantised file is quantised anew; raises ValueError where that could only lose."""
    bits = {name: BITS[name] for name in map(layer_name, own_layers(info).values()) if name != dtype}
    bits |= {tensor.dtype.upper(): bits_of(tensor.dtype) for tensor in info.tensors.values() if bits_of(tensor.dtype)}
    if not bits or dtype not in BITS:
        return None
    fewest = min(bits, key=bits.get)
    if bits[fewest] < BITS[dtype]:
        raise ValueError(
            f"{info.path.name} has weights in {fewest}, {bits[fewest]} bits each: in {dtype} they would take more room "
            "and be no better. Convert the bf16 file instead."
        )
    return (
        f"{info.path.name} has weights in {fewest} already, which are rounded a second time: {dtype} made of the bf16 "
        "file is better."
    )


def check_target(info: FileInfo, target: Path, overwrite: bool) -> None:
    if target.is_dir():
        raise ValueError(f"{target} is a folder: give the name of the file to write in it.")
    if not target.parent.is_dir():
        raise FileNotFoundError(f"There is no folder {target.parent} to write {target.name} to: make it first.")
    if target.exists() and os.path.samefile(info.path, target):
        raise ValueError(f"{target} is the file to convert itself: give another name for the result.")
    if target.exists() and not overwrite:
        raise FileExistsError(f"{target} is already there: give another name, or allow overwriting it.")


def check_space(target: Path, needed: int) -> None:
    free = shutil.disk_usage(target.parent).free
    if free < needed:
        raise OSError(
            f"{target.name} needs {format_bytes(needed)}, the disk of {target.parent} has {format_bytes(free)} free: "
            "make room, or write to another disk."
        )


def _metadata(info: FileInfo) -> dict[str, str]:
    config = json.dumps(backbone_config(info).to_dict())
    # How the source's layers are kept stands beside each of them in the target.
    kept = {key: text for key, text in info.metadata.items() if key != METADATA}
    return {"format": "pt", "config": config, **kept}


def _marked(tensor: PlannedTensor) -> bool:
    return isinstance(tensor.layer, QuantisedLayer)


def _planned_marks(marks: dict[str, bytes]) -> list[PlannedTensor]:
    return [PlannedTensor(name, (len(text),), torch.uint8) for name, text in marks.items()]


def _layout(plan: Iterable[PlannedTensor], metadata: dict[str, str]) -> tuple[bytes, dict[str, tuple[int, int]]]:
    """The safetensors header, and each tensor's (place in the file, bytes)."""
    # Wider types first, so that every tensor begins at a multiple of its item size.
    ordered = sorted(plan, key=lambda tensor: (-tensor.dtype.itemsize, tensor.name))
    entries: dict[str, object] = {"__metadata__": metadata}
    end = 0
    for tensor in ordered:
        offsets = [end, end + tensor.nbytes]
        entries[PREFIX + tensor.name] = {
            "dtype": CODES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": offsets,
        }
        end = offsets[1]
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % HEADER_ALIGNMENT)
    header = len(text).to_bytes(8, "little") + text
    places, start = {}, len(header)
    for tensor in ordered:
        places[tensor.name] = (start, tensor.nbytes)
        start += tensor.nbytes
    return header, places


def _write_tensors(
    file: BinaryIO,
    info: FileInfo,
    dtype: Wanted,
    places: dict[str, tuple[int, int]],
    total: int,
    device: torch.device | str,
    progress: Progress | None,
) -> None:
    done = 0
    with open_checkpoint(info) as source:
        for name, tensor in stream_tensors(source, dtype, device=device):
            check_finite(info, name, tensor, dtype)
            place, nbytes = places[name]
            file.seek(place)
            file.write(_raw(tensor.cpu()))
            done += nbytes
            if progress is not None:
                progress(done, total)


def check_finite(info: FileInfo, name: str, tensor: torch.Tensor, dtype: Wanted) -> None:
    # float8 was checked when it was quantised. The extremes carry NaN, and need no memory of the tensor's size.
    if not tensor.is_floating_point() or tensor.dtype.itemsize == 1 or not tensor.numel():
        return
    if not all(torch.isfinite(extreme) for extreme in tensor.aminmax()):
        hint = "they may be too large for fp16: use bf16" if dtype is torch.float16 else "download it again"
        raise ValueError(f"{info.path.name}: {name} holds values that are NaN or infinite; {hint}.")


def _raw(tensor: torch.Tensor) -> memoryview | bytes:
    """A tensor's bytes, without a copy of them."""
    if not tensor.numel():
        return b""
    return memoryview(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())


@contextlib.contextmanager
def complete_or_absent(target: Path):
    """A file to write beside ``target`` that takes its name when all went well, and else is removed."""
    part = target.with_name(f".{target.name}.{os.getpid()}.part")
    try:
        with part.open("w+b") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, target)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
    _sync_folder(target.parent)


def _sync_folder(folder: Path) -> None:
    """Makes the new name itself safe from a power cut, on systems that let a folder be opened."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
