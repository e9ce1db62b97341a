"""How much of a GPU's memory may be taken: what is free, or what the user allows."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

import torch

UNITS = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}
AMOUNT = re.compile(r"\s*(\d+(?:\.\d+)?)\s*(%|[kmg]?i?b?)\s*", re.IGNORECASE)


def check_amount(wanted: int | str) -> tuple[float, str]:
    """A number and its unit ("%" or one of bytes, in small letters) of what a user gives as an amount of memory.

    "6GB" (10^9 bytes), "6GiB" (2^30), "6000MB", "80%" of the device's memory, or a number of bytes. Raises ValueError.
    """
    found = AMOUNT.fullmatch(str(wanted))
    unit = found[2].lower() if found else None
    if found and unit not in UNITS and unit != "%":
        unit = f"{unit}b" if f"{unit}b" in UNITS else None
    if unit is None or float(found[1]) <= 0:
        raise ValueError(f"{str(wanted)!r} is no amount of memory: give one such as 6GB, 6000MB or 80%.")
    return float(found[1]), unit


def amount_of_memory(wanted: int | str, total: int) -> int:
    """The bytes that ``wanted``, as :func:`check_amount` takes it, means on a device of ``total`` bytes.

    Raises ValueError for nonsense and for more than the device has.
    """
    number, unit = check_amount(wanted)
    amount = int(total * number / 100 if unit == "%" else number * UNITS[unit])
    if amount > total:
        raise ValueError(f"{wanted} is more memory than there is: the GPU has {total / 1e9:.1f} GB in all.")
    return amount


def total_bytes(device: torch.device) -> int:
    """All memory of a GPU."""
    return torch.cuda.mem_get_info(device)[1]


def free_bytes(device: torch.device) -> int:
    """Memory of a GPU that no program has taken, this one's unused cache given back."""
    torch.cuda.empty_cache()
    return torch.cuda.mem_get_info(device)[0]


def reserved_bytes(device: torch.device) -> int:
    """Memory of a GPU that this process's tensors and their allocator have taken."""
    return torch.cuda.memory_reserved(device)


@contextmanager
def memory_limit(device: torch.device, limit: int | None) -> Iterator[None]:
    """Hold PyTorch to ``limit`` bytes of a GPU for the time of the block: its allocator takes no more, and raises
    ``torch.OutOfMemoryError`` instead. None: no limit. The limit is the process's, so it ends with the block."""
    if limit is None:
        yield
        return
    number = torch.cuda.current_device() if device.index is None else device.index  # "cuda" alone is refused below
    before = getattr(torch.cuda, "get_per_process_memory_fraction", lambda _: 1.0)(number)
    torch.cuda.set_per_process_memory_fraction(min(limit / total_bytes(device), 1.0), number)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(before, number)
