"""Plain numpy numbers in a torch file's settings, read without running anything of numpy's.

`torch.load(weights_only=True)` refuses them, because their pickle names functions of numpy's. Here those names mean
stand-ins that understand numbers and nothing else.
"""

from __future__ import annotations

import contextlib
import pickle
import struct

import torch

_FORMATS = {"b1": "?", "i1": "b", "i2": "h", "i4": "i", "i8": "q", "u1": "B", "u2": "H", "u4": "I", "u8": "Q"}
_FORMATS |= {"f2": "e", "f4": "f", "f8": "d"}
NAMES_FOR_FUNCTIONS = (2, 6)  # the first torch whose safe list takes a name other than the function's own


class _NumberType:
    """Stands in for numpy.dtype."""

    def __init__(self, code: str, *_: object) -> None:
        if code not in _FORMATS:
            raise pickle.UnpicklingError("a numpy value that is no number")
        self.format, self.order = _FORMATS[code], "<"

    def __setstate__(self, state: tuple) -> None:
        self.order = ">" if state[1] == ">" else "<"


def _number(kind: _NumberType, data: bytes) -> float | int | bool:
    """Stands in for numpy's function that makes a number of its bytes."""
    return struct.unpack(kind.order + kind.format, data)[0]


def numpy_numbers(version: tuple[int, ...]) -> contextlib.AbstractContextManager:
    """While it is open, torch.load(weights_only=True) of a torch of that version takes numpy's numbers."""
    if version < NAMES_FOR_FUNCTIONS:
        return contextlib.nullcontext()
    scalars = [(_number, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")]
    return torch.serialization.safe_globals([*scalars, (_NumberType, "numpy.dtype")])
