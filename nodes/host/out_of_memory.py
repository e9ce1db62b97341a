"""When a GPU's memory runs out: room is made, the work is tried once more in a smaller form, else one sentence.

Interruptions and other errors pass. Run on ComfyUI 0.18.1 and 0.33.0 with errors provoked on the CPU.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TypeVar

import comfy.memory_management
import comfy.model_management
import torch

from ...nava_core.explain import TooLittleMemoryError, is_out_of_memory
from .devices import CPU, is_of

try:
    from comfy.model_prefetch import cleanup_prefetch_queues
except ImportError:  # older hosts fetch nothing ahead

    def cleanup_prefetch_queues() -> None:
        pass


Result = TypeVar("Result")


def twice(work: Callable[[], Result], again: Callable[[], Result], sentence: Callable[[], str]) -> Result:
    """What ``work`` gives; where it runs out of memory what ``again`` gives, which begins by making room; where that
    does too, TooLittleMemoryError with the ``sentence``."""
    for attempt in (work, again):
        try:
            return attempt()
        except Exception as error:
            raise_others(error)
        # Only here, out of the except block, are the tensors of the failed attempt gone.
    release_buffers()
    raise TooLittleMemoryError(sentence())


def raise_others(error: Exception) -> None:
    """Raise ``error`` unless it says that memory ran out, of a device or of the machine."""
    if not (comfy.model_management.is_oom(error) or is_out_of_memory(error)):
        raise error


def make_room(patchers: list) -> None:
    """Leave no other model than these on their devices, and no memory that only PyTorch holds."""
    release_buffers()
    manager = comfy.model_management
    kept = [loaded for loaded in manager.current_loaded_models if is_of(loaded, patchers)]
    for device in dict.fromkeys(patcher.load_device for patcher in patchers):
        if device != CPU:
            manager.free_memory(1e30, device, keep_loaded=kept)
    manager.soft_empty_cache()


def release_buffers() -> None:
    """Blocks fetched ahead and transfer buffers, as the host lets go of them after each node."""
    cleanup_prefetch_queues()
    if not comfy.memory_management.aimdo_enabled:  # dynamic VRAM takes them back by itself
        comfy.model_management.reset_cast_buffers()
    comfy.model_management.soft_empty_cache()


def keep_less(patchers: list, amount: float) -> None:
    """Move about ``amount`` bytes of these models' weights back to RAM, from where they are streamed; in proportion to
    what each has loaded."""
    loaded = {patcher: patcher.loaded_size() for patcher in patchers if patcher.load_device != CPU}
    for patcher, size in loaded.items():
        if size:
            patcher.partially_unload(patcher.offload_device, amount * size / sum(loaded.values()))


def free_gigabytes(device: torch.device) -> float:
    return comfy.model_management.get_free_memory(device) / 2**30


def warn(text: str) -> None:
    logging.warning("NAVA: out of memory %s", text)
