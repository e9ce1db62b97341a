"""The devices that models work on, as users name them, and the memory that may be taken of one."""

from __future__ import annotations

import torch

from ..offload import amount_of_memory, check_amount, total_bytes
from ..parallel import Parallel


def choose_device(name: torch.device | str | None = None) -> torch.device:
    """Where the models work: "cpu", "cuda", "cuda:1", "mps" or "xpu"; None for a GPU of CUDA, or else the CPU.

    Raises ValueError, in a sentence, for a device that is not there, or that the models do not run on.
    """
    counts = {
        "cpu": 1,
        "cuda": torch.cuda.device_count() if torch.cuda.is_available() else 0,
        "mps": int(torch.backends.mps.is_available()),
        "xpu": torch.xpu.device_count() if hasattr(torch, "xpu") and torch.xpu.is_available() else 0,
    }
    if name is None:
        return torch.device("cuda" if counts["cuda"] else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or (device.index or 0) >= counts.get(device.type, 0):
        there = [f"{kind}:0 to {kind}:{count - 1}" if count > 1 else kind for kind, count in counts.items() if count]
        raise ValueError(
            f"There is no device {name} here that the models could work on: use {' or '.join(there)}, or a torch build "
            "that knows your GPU."
        )
    return device


def check_memory(wanted: int | str | None, device: torch.device, parallel: Parallel | None = None) -> None:
    """Raise ValueError, in a sentence, for an amount of memory that makes no sense, on this device or at all."""
    if wanted is None:
        return
    check_amount(wanted)
    if parallel is not None:
        raise ValueError("A limit of memory is for one GPU, not for parallel workers: leave out one of the two.")
    if device.type != "cuda":
        raise ValueError(
            f"A limit of memory is for a CUDA GPU, and the models work on {device}, where nothing would hold to it: "
            "leave it out, or choose a GPU."
        )
    amount_of_memory(wanted, total_bytes(device))


def is_same_device(one: torch.device | None, other: torch.device) -> bool:
    """Whether two names are of one device: "cuda" is the first GPU."""
    return one is not None and (one.type, one.index or 0) == (other.type, other.index or 0)
