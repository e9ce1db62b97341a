"""GGUF files: the header, read with every size checked, and tensors dequantised one by one through the package gguf."""

from __future__ import annotations

import math
import re
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch

MAGIC = b"GGUF"
VERSIONS = (2, 3)
MAX_HEADER = 64 * 2**20  # bytes
MAX_ENTRIES = 2**17  # tensors, or facts; the backbone has about 1,000
MAX_TEXT = 2**16  # bytes of a name, or of a fact that is kept
MAX_DIMENSIONS = 8
DEFAULT_ALIGNMENT = 32
ORIGINAL_SHAPE = "comfy.gguf.orig_shape."  # before a tensor's name: its shape, where ggml has too few dimensions for it
PLAIN = {0: "float32", 1: "float16", 28: "float64", 30: "bfloat16", 24: "int8", 25: "int16", 26: "int32", 27: "int64"}
# ggml's block formats: number, values a block, bytes a block.
BLOCKS = {
    "q4_0": (2, 32, 18), "q4_1": (3, 32, 20), "q5_0": (6, 32, 22), "q5_1": (7, 32, 24), "q8_0": (8, 32, 34),
    "q2_k": (10, 256, 84), "q3_k": (11, 256, 110), "q4_k": (12, 256, 144), "q5_k": (13, 256, 176),
    "q6_k": (14, 256, 210), "iq4_nl": (20, 32, 18), "iq4_xs": (23, 256, 136),
}  # fmt: skip
READ_VALUES = 2**22  # dequantised at a time

_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_TEXT, _ARRAY = 8, 9


class GGUFError(Exception):
    """What is wrong with a file, as a phrase; ``truncated`` where its end is missing."""

    def __init__(self, phrase: str, truncated: bool = False) -> None:
        super().__init__(phrase)
        self.truncated = truncated


class GGUFTensor(NamedTuple):
    """A tensor as the header tells it: its type by torch's name or by one of ``BLOCKS``."""

    shape: tuple[int, ...]
    dtype: str
    nbytes: int
    offset: int


def bits_of(dtype: str) -> int | None:
    """Bits of a value in one of ``BLOCKS``; None for another type."""
    return int(re.search(r"\d", dtype)[0]) if dtype in BLOCKS else None


def read_gguf_header(path: Path, size: int) -> tuple[dict[str, GGUFTensor], dict[str, str]]:
    """Tensors in their order in the file, and the facts that are text. Raises GGUFError."""
    with path.open("rb") as file:
        reader = _Reader(file, size)
        if reader.take(4) != MAGIC or reader.number("I") not in VERSIONS:
            raise GGUFError("a version of GGUF that is not known")
        tensors, facts = reader.number("Q"), reader.number("Q")
        if max(tensors, facts) > MAX_ENTRIES:
            raise GGUFError(f"its header claims {max(tensors, facts):,} entries")
        known = dict(reader.fact() for _ in range(facts))
        entries = [reader.tensor() for _ in range(tensors)]
        alignment = known.get("general.alignment", DEFAULT_ALIGNMENT)
        if not isinstance(alignment, int) or not 1 <= alignment <= 2**16:
            raise GGUFError("its alignment cannot be")
        start = -(-file.tell() // alignment) * alignment
    found = {}
    for name, stored, kind, offset in entries:
        dtype, nbytes = _type(kind, stored)
        if start + offset + nbytes > size:
            raise GGUFError(f"{name[:80]} would end past its end", truncated=True)
        found[name] = GGUFTensor(_shape(name, stored, known), dtype, nbytes, start + offset)
    ordered = dict(sorted(found.items(), key=lambda item: item[1].offset))
    return ordered, {key: value for key, value in known.items() if isinstance(value, str)}


def _type(kind: int, stored: tuple[int, ...]) -> tuple[str, int]:
    count = math.prod(stored)
    if kind in PLAIN:
        return PLAIN[kind], count * getattr(torch, PLAIN[kind]).itemsize
    for name, (number, values, nbytes) in BLOCKS.items():
        if number == kind:
            if not stored or stored[-1] % values:
                raise GGUFError(f"a row of {stored[-1:]} values has no whole {name} blocks")
            return name, count // values * nbytes
    raise GGUFError(f"it has ggml's type {kind}, which is not read here")


def _shape(name: str, stored: tuple[int, ...], facts: dict[str, Any]) -> tuple[int, ...]:
    original = facts.get(ORIGINAL_SHAPE + name)
    if original is None:
        return stored
    whole = isinstance(original, list) and len(original) <= MAX_DIMENSIONS and all(type(n) is int for n in original)
    if not whole or min(original, default=1) < 0 or math.prod(original) != math.prod(stored):
        raise GGUFError(f"the shape of {name[:80]} does not fit its values")
    return tuple(original)


class _Reader:
    """Reads little-endian values, never past the header's limit or the file's end."""

    def __init__(self, file: BinaryIO, size: int) -> None:
        self.file, self.limit, self.size = file, min(size, MAX_HEADER), size

    def take(self, count: int) -> bytes:
        self.skip(count, move=False)
        return self.file.read(count)

    def skip(self, count: int, move: bool = True) -> None:
        end = self.file.tell() + count
        if end > self.size:
            raise GGUFError("it ends within its header", truncated=True)
        if end > self.limit:
            raise GGUFError("its header is too long to be a model's")
        if move:
            self.file.seek(end)

    def number(self, code: str) -> Any:
        return struct.unpack(f"<{code}", self.take(struct.calcsize(code)))[0]

    def text(self) -> str | None:
        """None for one that is too long to be of interest."""
        length = self.number("Q")
        if length > MAX_TEXT:
            self.skip(length)
            return None
        return self.take(length).decode("utf-8", errors="replace")

    def fact(self) -> tuple[str, Any]:
        name = self.text()
        return name or "", self.value(self.number("I"))

    def value(self, kind: int) -> Any:
        if kind in _NUMBERS:
            return self.number(_NUMBERS[kind])
        if kind == _TEXT:
            return self.text()
        if kind == _ARRAY:
            return self.array()
        raise GGUFError("its header cannot be read")

    def array(self) -> list | None:
        """A short one of numbers; None for any other, which is passed over."""
        kind, count = self.number("I"), self.number("Q")
        if kind in _NUMBERS:
            if count > MAX_DIMENSIONS:
                return self.skip(count * struct.calcsize(_NUMBERS[kind]))
            return [self.number(_NUMBERS[kind]) for _ in range(count)]
        if kind != _TEXT:
            raise GGUFError("its header cannot be read")
        for _ in range(count):
            self.skip(self.number("Q"))
        return None

    def tensor(self) -> tuple[str, tuple[int, ...], int, int]:
        """(name, shape as it is stored, type, place after the header)."""
        name, dimensions = self.text(), self.number("I")
        if not name or dimensions > MAX_DIMENSIONS:
            raise GGUFError("its header cannot be read")
        shape = tuple(self.number("Q") for _ in range(dimensions))[::-1]
        return name, shape, self.number("I"), self.number("Q")


# ---------------------------------------------------------------- values


def gguf_problem() -> str | None:
    """Why block formats cannot be dequantised here, as a sentence; None where they can."""
    try:
        import gguf  # noqa: F401
    except ImportError:
        return (
            "GGUF weights need the package gguf: install this project's extra [quantized], or run `pip install gguf`."
        )
    return None


def read_gguf_tensor(file: BinaryIO, tensor: GGUFTensor) -> torch.Tensor:
    """A tensor's values: float32 for a block format, else its own type. Raises GGUFError where the file ends."""
    file.seek(tensor.offset)
    if tensor.dtype not in BLOCKS:
        out = torch.empty(math.prod(tensor.shape), dtype=getattr(torch, tensor.dtype))
        _fill(file, memoryview(out.view(torch.uint8).numpy()))
        return out.reshape(tensor.shape)
    out = torch.empty(math.prod(tensor.shape), dtype=torch.float32)
    for part, values in _pieces(file, tensor):
        out[part] = torch.from_numpy(values)
    return out.reshape(tensor.shape)


def _pieces(file: BinaryIO, tensor: GGUFTensor) -> Iterator[tuple[slice, Any]]:
    """Dequantised values a piece at a time: numpy needs several copies of what it works on."""
    import gguf
    import numpy

    number, values, nbytes = BLOCKS[tensor.dtype]
    kind, blocks = gguf.GGMLQuantizationType(number), math.prod(tensor.shape) // values
    step = READ_VALUES // values
    for start in range(0, blocks, step):
        count = min(step, blocks - start)
        raw = numpy.empty((count, nbytes), dtype=numpy.uint8)
        _fill(file, memoryview(raw.reshape(-1)))
        dequantised = gguf.quants.dequantize(raw, kind)
        yield slice(start * values, (start + count) * values), dequantised.reshape(-1)


def _fill(file: BinaryIO, view: memoryview) -> None:
    done = 0
    while done < len(view):
        count = file.readinto(view[done:])
        if not count:
            raise GGUFError("it ended within a tensor", truncated=True)
        done += count
