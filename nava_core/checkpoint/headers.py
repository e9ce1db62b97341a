"""Describes a model file from its header alone: tensors, metadata, what it is, or what is wrong with it."""

from __future__ import annotations

import json
import math
import os
import pickle
import re
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ..backbone.formats import QuantisedLayer
from .gguf import BLOCKS, MAGIC, GGUFError, read_gguf_header
from .kinds import BACKBONES, NOUNS, FileKind, Recognised, recognise
from .numpy_values import numpy_numbers
from .quantised import MARK, WEIGHT, layers_phrase, read_layers

MAX_SAFETENSORS_HEADER = 32 * 2**20  # bytes; the released backbone's is about 0.2 MB
MAX_PICKLE = 64 * 2**20  # bytes of a torch file's structure, tensors not counted
HEAD_BYTES = 1024
TEXT_BYTES = 64 * 2**10  # a file this small may be a message or a pointer instead of a model
WRAPPERS = ("state_dict", "model_state_dict", "model", "module", "params")  # keys that hold a state dict
SAFE_LEGACY_TORCH = (2, 6)  # before it, weights_only did not protect against every old-style torch file

SAFETENSORS_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    **({"F8_E8M0": torch.float8_e8m0fnu} if hasattr(torch, "float8_e8m0fnu") else {}),  # from torch 2.7 on
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
SHORT_NAMES = {
    "float32": "fp32",
    "float16": "fp16",
    "bfloat16": "bf16",
    "float64": "fp64",
    "float8_e4m3fn": "fp8",
    "float8_e5m2": "fp8 (e5m2)",
    **{name: name.upper() for name in BLOCKS},
}


class TensorInfo(NamedTuple):
    """A tensor as its file's header tells it. ``dtype`` is torch's name for it; ``offset`` its place in the
    file in bytes, None where the format does not tell."""

    shape: tuple[int, ...]
    dtype: str
    nbytes: int
    offset: int | None = None

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def torch_dtype(self) -> torch.dtype | None:
        """None for a type torch does not have."""
        found = getattr(torch, self.dtype, None)
        return found if isinstance(found, torch.dtype) else None


@dataclass(frozen=True)
class FileInfo:
    """What is known of a file without reading its tensors.

    ``tensors`` are by their names in the file (a torch file's wrapper, such as ``state_dict``, taken off);
    ``prefix`` is what stands before the model's own names. ``metadata`` maps text to text; a torch file's
    plain dictionaries beside the tensors are there as JSON. ``parts`` are all the kinds found: a merged
    file can hold several. ``detail`` continues the noun of ``kind``. ``layers`` are a backbone's layers in
    ComfyUI's quantised formats, by the model's own names; where one cannot be read there are none, and
    ``layers_problem`` is a phrase that says why.
    """

    path: Path
    kind: FileKind
    format: str  # "safetensors", "torch", "gguf", or "" where the file is none of them
    size: int  # bytes
    tensors: Mapping[str, TensorInfo] = field(default_factory=dict)
    metadata: Mapping[str, str] = field(default_factory=dict)
    prefix: str = ""
    wrapper: str = ""
    detail: str = ""
    parts: frozenset[FileKind] = frozenset()
    layers: Mapping[str, QuantisedLayer] = field(default_factory=dict)
    layers_problem: str = ""

    @property
    def is_backbone(self) -> bool:
        return self.kind in BACKBONES

    @property
    def is_readable(self) -> bool:
        """Whether its tensors can be read."""
        return bool(self.format)

    @property
    def what(self) -> str:
        """The kind as a phrase: "a NAVA backbone", "an incomplete download (...)"."""
        return f"{NOUNS[self.kind]} {self.detail}".rstrip()

    @property
    def model_tensors(self) -> dict[str, TensorInfo]:
        """The tensors below ``prefix``, by the model's own names."""
        cut = len(self.prefix)
        return {name[cut:]: tensor for name, tensor in self.tensors.items() if name.startswith(self.prefix)}

    @property
    def parameters(self) -> int:
        """Numbers in it; of a quantised weight those that it stands for."""
        packed = sum(math.prod(layer.shape) for layer in self.layers.values())
        return packed + sum(t.numel for name, t in self.tensors.items() if self._layer_of(name) is None)

    def _layer_of(self, name: str) -> QuantisedLayer | None:
        """The quantised layer that a tensor, by its name in the file, stores a part of."""
        own = name[len(self.prefix) :]
        layer = own.removesuffix(MARK) if own.endswith(MARK) else own.rpartition(WEIGHT)[0]
        return self.layers.get(layer) if layer and name.startswith(self.prefix) else None

    @property
    def dtypes(self) -> list[str]:
        """Floating-point types and quantised formats in it by their short names, the one with most bytes first."""
        weight: dict[str, int] = {}
        for name, tensor in self.tensors.items():
            layer = self._layer_of(name)
            short = SHORT_NAMES.get(tensor.dtype) if layer is None else layer.format.name
            if short:
                weight[short] = weight.get(short, 0) + tensor.nbytes
        return sorted(weight, key=lambda name: -weight[name])

    @property
    def summary(self) -> str:
        """One sentence: what the file is, and its size."""
        if not self.tensors:
            return f"{self.path.name} is {self.what}."
        types = f", {' and '.join(self.dtypes)}" if self.dtypes else ""
        tensors = "1 tensor" if len(self.tensors) == 1 else f"{len(self.tensors)} tensors"
        count = f"{format_count(self.parameters)} parameters in {tensors}"
        return f"{self.path.name} is {self.what}: {count}{types}, {format_bytes(self.size)}."


class BrokenFileError(Exception):
    """A file of a known format that cannot be used; carries the kind and the detail for its description."""

    def __init__(self, kind: FileKind, detail: str) -> None:
        super().__init__(detail)
        self.kind = kind
        self.detail = f"({detail})"


def describe_file(path: str | os.PathLike) -> FileInfo:
    """Says what a file is by its content; reads no weight, and checks every size before memory is taken.

    A file that is not a model, or a damaged one, is described too (``kind``, ``summary``). Raises
    FileNotFoundError where there is nothing at ``path`` and ValueError where there is a folder.
    """
    path = Path(path)
    if path.is_dir():
        raise ValueError(f"{path} is a folder: give the model file inside it.")
    if not path.is_file():
        raise FileNotFoundError(f"There is no file {path}: check the name, or download it.")
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(HEAD_BYTES)
    try:
        return _describe_content(path, size, head)
    except BrokenFileError as error:
        return FileInfo(path, error.kind, "", size, detail=error.detail)


def _describe_content(path: Path, size: int, head: bytes) -> FileInfo:
    if not head:
        return FileInfo(path, FileKind.EMPTY, "", size)
    if not any(head):
        raise BrokenFileError(FileKind.TRUNCATED, "it begins with zeros, so its start never arrived")
    # First, because the length before a safetensors header can begin with any bytes, those of the others too.
    if head[8:9] == b"{" and not all(32 <= byte < 127 for byte in head[:8]):
        tensors, metadata = read_safetensors_header(path, size)
        return _model(path, size, "safetensors", tensors, metadata, "")
    if head.startswith(b"PK"):
        return _model(path, size, "torch", *_read_torch(path, size, zipped=True))
    if head.startswith((b"\x80\x03", b"\x80\x04", b"\x80\x05")):
        raise BrokenFileError(FileKind.UNSAFE, "a Python pickle that torch.save did not write")
    if head.startswith(b"\x80\x02"):
        return _model(path, size, "torch", *_read_torch(path, size, zipped=False))
    if head.startswith(MAGIC):
        return _describe_gguf(path, size)
    return _describe_text(path, size, head)


def _model(
    path: Path, size: int, form: str, tensors: dict[str, TensorInfo], metadata: dict[str, str], wrapper: str
) -> FileInfo:
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    found: Recognised = recognise(shapes, {name: tensor.dtype for name, tensor in tensors.items()})
    kind, detail, layers, problem = found.kind, found.detail, {}, ""
    if kind in BACKBONES and form == "safetensors":
        layers, problem = read_layers(path, tensors, metadata, found.prefix)
        if layers or problem:
            kind = FileKind.NAVA_BACKBONE_QUANTISED
            detail = f"({layers_phrase(layers)})" if layers else ""
    return FileInfo(
        path, kind, form, size, tensors, metadata, found.prefix, wrapper, detail, found.parts, layers, problem
    )


def _describe_gguf(path: Path, size: int) -> FileInfo:
    try:
        found, metadata = read_gguf_header(path, size)
    except GGUFError as error:
        raise BrokenFileError(FileKind.TRUNCATED if error.truncated else FileKind.CORRUPT, str(error)) from error
    tensors = {name: TensorInfo(*tensor) for name, tensor in found.items()}
    info = _model(path, size, "gguf", tensors, metadata, "")
    if info.is_backbone:
        return info
    detail = "" if info.kind is FileKind.UNKNOWN else f"({info.what})"
    return FileInfo(path, FileKind.GGUF, "", size, detail=detail)


def _describe_text(path: Path, size: int, head: bytes) -> FileInfo:
    start = head.removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    if start.startswith((b"<!doctype", b"<html", b"<?xml", b"<head", b"<!--")):
        return FileInfo(path, FileKind.HTML, "", size)
    if start.startswith(b"version https://git-lfs"):
        wanted = re.search(rb"\nsize (\d{1,15})\b", head)
        detail = f"({format_bytes(int(wanted[1]))})" if wanted else ""
        return FileInfo(path, FileKind.LFS_POINTER, "", size, detail=detail)
    text = head.decode("utf-8", errors="replace")
    if size <= TEXT_BYTES and sum(c.isprintable() or c.isspace() for c in text) >= 0.95 * len(text):
        words = " ".join(text.split())
        return FileInfo(path, FileKind.TEXT, "", size, detail=f'("{words[:80]}")')
    return FileInfo(path, FileKind.UNKNOWN, "", size, detail="(neither safetensors nor a torch file)")


# --------------------------------------------------------------------------------------------------------
# safetensors


def read_safetensors_header(path: Path, size: int) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    """Tensors, in their order in the file, and metadata. Raises BrokenFileError where they cannot be right."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > MAX_SAFETENSORS_HEADER:
            claim = f"its header would be {format_bytes(length)} long"
            raise BrokenFileError(FileKind.CORRUPT, claim)
        if 8 + length > size:
            raise BrokenFileError(FileKind.TRUNCATED, f"it ends within its header, after {format_bytes(size)}")
        raw = file.read(length)
    try:
        header = json.loads(raw)
        metadata = header.pop("__metadata__", None) or {}
        tensors = {name: _tensor_entry(entry, 8 + length) for name, entry in header.items()}
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise BrokenFileError(FileKind.CORRUPT, "its header cannot be read") from error
    ordered = dict(sorted(tensors.items(), key=lambda item: item[1].offset))
    _check_extents(ordered, 8 + length, size)
    texts = metadata.items() if isinstance(metadata, dict) else ()
    return ordered, {key: value for key, value in texts if isinstance(value, str)}


def _tensor_entry(entry: Any, data_start: int) -> TensorInfo:
    code, shape, (start, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not all(type(number) is int and number >= 0 for number in (*shape, start, end)) or end < start:
        raise ValueError("a size in the header is not a whole number")
    dtype = SAFETENSORS_DTYPES.get(code)
    if dtype is not None and math.prod(shape) * dtype.itemsize != end - start:
        raise ValueError("a shape in the header does not fit its bytes")
    name = str(dtype).removeprefix("torch.") if dtype is not None else str(code).lower()
    return TensorInfo(tuple(shape), name, end - start, data_start + start)


def _check_extents(tensors: Mapping[str, TensorInfo], data_start: int, size: int) -> None:
    end = data_start
    for tensor in tensors.values():
        if tensor.offset < end:
            raise BrokenFileError(FileKind.CORRUPT, "tensors overlap in its header")
        end = tensor.offset + tensor.nbytes
    if end > size:
        have, want = format_bytes(size), format_bytes(end)
        raise BrokenFileError(FileKind.TRUNCATED, f"{have} of {want} are there, {end - size:,} bytes are missing")


# --------------------------------------------------------------------------------------------------------
# torch files


def _read_torch(path: Path, size: int, zipped: bool) -> tuple[dict[str, TensorInfo], dict[str, str], str]:
    """Tensors, metadata and wrapper of a torch file; its tensors are made without memory."""
    if zipped:
        _check_zip(path)
    content = load_torch(path, map_location="meta", zipped=zipped)
    tensors, wrapper = unwrap(content)
    described = {name: _describe_tensor(tensor) for name, tensor in tensors.items()}
    storages = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors.values()}
    claimed = max(sum(storages.values()), max((t.nbytes for t in described.values()), default=0))
    if claimed > size:
        detail = f"its tensors would be {format_bytes(claimed)}, the file is {format_bytes(size)}"
        raise BrokenFileError(FileKind.CORRUPT, detail)
    return described, _torch_metadata(content), wrapper


def load_torch(path: Path, *, map_location: str, zipped: bool) -> Any:
    """A torch file through ``weights_only``; a zipped one stays on disk and is mapped, not read."""
    if not zipped and _torch_version() < SAFE_LEGACY_TORCH:
        raise BrokenFileError(
            FileKind.UNSAFE, f"an old torch format, which torch {torch.__version__} cannot read safely"
        )
    try:
        with numpy_numbers(_torch_version()):
            return torch.load(path, map_location=map_location, weights_only=True, mmap=zipped)
    except pickle.UnpicklingError as error:
        raise _refused_pickle(error) from error
    except (EOFError, OSError) as error:
        raise BrokenFileError(FileKind.TRUNCATED, "it ends too early") from error
    except Exception as error:  # whatever bytes can make an unpickler do, the file is at fault
        if "unexpected EOF" in str(error) or "unexpected pos" in str(error):
            raise BrokenFileError(FileKind.TRUNCATED, "it ends too early") from error
        if "TorchScript" in str(error):
            raise BrokenFileError(FileKind.UNSAFE, "a TorchScript program") from error
        raise BrokenFileError(FileKind.CORRUPT, f"reading it failed with {type(error).__name__}") from error


def _refused_pickle(error: pickle.UnpicklingError) -> BrokenFileError:
    """Tells a pickle with foreign objects from one with broken bytes; torch says both in one exception."""
    text = str(error)
    foreign = re.search(r"(?:GLOBAL|global|class|instantiate)\s+([A-Za-z_][\w.]*\.[\w.]+)", text)
    if foreign:
        return BrokenFileError(FileKind.UNSAFE, f"it asks for {foreign[1].rstrip('.')}")
    if "Unsupported operand" in text:
        return BrokenFileError(FileKind.CORRUPT, "its structure cannot be read")
    return BrokenFileError(FileKind.UNSAFE, "it asks for Python objects")


def _check_zip(path: Path) -> None:
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
    except (zipfile.BadZipFile, OSError) as error:
        raise BrokenFileError(FileKind.TRUNCATED, "the end of its zip archive is not there") from error
    except Exception as error:  # a version or a name that cannot be; which exception that is differs by Python
        raise BrokenFileError(FileKind.CORRUPT, "the directory of its zip archive cannot be read") from error
    pickles = [entry for entry in entries if entry.filename.split("/")[-1] == "data.pkl"]
    if not pickles:
        raise BrokenFileError(FileKind.UNKNOWN, "a zip archive without a torch model in it")
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
        raise BrokenFileError(FileKind.CORRUPT, "a torch file that was compressed afterwards")
    if sum(entry.file_size for entry in pickles) > MAX_PICKLE:
        raise BrokenFileError(FileKind.CORRUPT, "its structure is too large to be a model's")


def unwrap(content: Any) -> tuple[dict[str, torch.Tensor], str]:
    """The state dict inside a loaded torch file, and the dotted path of the wrappers around it."""
    path: list[str] = []
    while isinstance(content, Mapping) and len(path) < 4:
        tensors = {name: t for name, t in content.items() if isinstance(name, str) and _is_plain(t)}
        inner = next((key for key in WRAPPERS if isinstance(content.get(key), Mapping)), None)
        if inner is None or len(tensors) > len(content[inner]):
            return tensors, ".".join(path)
        path.append(inner)
        content = content[inner]
    return {}, ""


def _is_plain(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.layout == torch.strided


def _describe_tensor(tensor: torch.Tensor) -> TensorInfo:
    name = str(tensor.dtype).removeprefix("torch.")
    return TensorInfo(tuple(tensor.shape), name, tensor.numel() * tensor.element_size())


def _torch_metadata(content: Any) -> dict[str, str]:
    found = {}
    for key, value in content.items() if isinstance(content, Mapping) else ():
        if isinstance(key, str) and key not in WRAPPERS and isinstance(value, dict | str):
            try:
                found[key] = value if isinstance(value, str) else json.dumps(value, default=str)
            except (TypeError, ValueError, RecursionError):
                continue
    return found


def _torch_version() -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", torch.__version__)[:2])


def format_bytes(count: int) -> str:
    """Bytes for people, in decimal units as download pages give them."""
    for unit, scale in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if count >= scale:
            return f"{count / scale:.2f} {unit}"
    return f"{count} bytes"


def format_count(count: int) -> str:
    """A count of parameters for people: 6.30 B, 12.4 M."""
    for unit, scale in (("B", 10**9), ("M", 10**6), ("k", 10**3)):
        if count >= scale:
            return f"{count / scale:.2f} {unit}"
    return str(count)
