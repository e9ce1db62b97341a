"""What both VAEs in ComfyUI share: passes that are whole, or in the form that there is memory for; what was connected
instead; and reloading."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import comfy.ldm.lightricks.vae.audio_vae
import comfy.ldm.wan.vae2_2
import comfy.model_management
import comfy.model_patcher
import comfy.sd
import comfy.taesd.taehv
import torch

from ...nava_core.decoding import stream_down
from ...nava_core.explain import TooLittleMemoryError
from . import out_of_memory

ADVICE = (
    "make the clip smaller or shorter, close other programs, or let the VAE work on the CPU (device: cpu in its "
    "loader, or start ComfyUI with --cpu-vae)"
)


def run_whole(patcher, needed: float, task: str, work: Callable[[], torch.Tensor], full_load=False) -> torch.Tensor:
    """What ``work`` computes once the model of ``patcher`` is on its device, with ``needed`` bytes free beside it.

    The host's own encode and decode turn to tiles when memory runs out, and only the log says so; this takes other
    models off the device and tries again, then raises TooLittleMemoryError, in a sentence on the ``task``. Run on
    ComfyUI 0.18.1 and 0.33.0.
    """
    device = patcher.load_device
    for first in (True, False):
        try:
            with on_device(device):
                comfy.model_management.load_models_gpu([patcher], memory_required=needed, force_full_load=full_load)
                return work()
        except Exception as error:
            out_of_memory.raise_others(error)
        # Only here, out of the except block, are the tensors of the failed pass gone.
        if first:
            out_of_memory.warn(f"{task}: other models leave {device}, and it is tried again.")
        out_of_memory.make_room([patcher])
    raise TooLittleMemoryError(
        f"There is too little free memory on {device} for {task}, which needs about {needed / 2**30:.1f} GB and is not "
        f"done in tiles, for they change the result: {ADVICE}."
    )


def on_device(device: torch.device) -> contextlib.AbstractContextManager:
    """Where there are several GPUs, newer hosts make the model's own the current one for their kernels."""
    return getattr(comfy.model_management, "cuda_device_context", contextlib.nullcontext)(device)


def stream_in_forms(
    patcher,
    forms: Sequence[Any],
    stream: Callable[[Any], Iterator[torch.Tensor]],
    needed: Callable[[Any], float],
    what: str,
    *,
    full_load: bool = False,
) -> Iterator[torch.Tensor]:
    """The parts of ``stream(form)`` with the model of ``patcher`` on its device and ``needed(form)`` bytes free.

    For the first of ``forms`` that there is memory for; where it ends, all models leave the device, the log says so,
    and the next form goes on from there. Raises TooLittleMemoryError, in a sentence with ``what`` was being done, where
    the last one runs out too. Run on ComfyUI 0.18.1 and 0.33.0.
    """

    def loaded(form: Any) -> Iterator[torch.Tensor]:
        load = comfy.model_management.load_models_gpu
        load([patcher], memory_required=needed(form), force_full_load=full_load)
        yield from stream(form)

    return stream_down(
        forms, loaded, is_short=is_short_of_memory, recover=free_all, say=logging.warning, what=what, advice=ADVICE
    )


def is_short_of_memory(error: Exception) -> bool:
    """Whether an error is of a device, or the machine, that ran out of memory."""
    try:
        out_of_memory.raise_others(error)
    except Exception:
        return False
    return True


def free_all() -> None:
    """Give back what the host can: all models leave their devices, and the allocator's cache is emptied."""
    comfy.model_management.unload_all_models()
    out_of_memory.release_buffers()


def has_room(vae, needed: float) -> bool:
    """Whether the host makes room for ``needed`` bytes beside the weights of ``vae``; other models leave for that."""
    device, management = vae.device, comfy.model_management
    if device.type == "cpu":
        return management.get_free_memory(device) >= needed
    total = needed + vae.model_size() + management.extra_reserved_memory()
    management.free_memory(total, device)
    return vae.patcher.get_free_memory(device) >= total


def set_reload(vae, load: Callable, path: str, device: str) -> None:
    """Tell the host how ``vae`` is loaded again, for Select VAE Device: ``load(path, device)``.

    Run on ComfyUI 0.33.0; hosts without that node do not ask.
    """
    vae_patcher(vae).cached_patcher_init = (_reload, (load, path, device))


def _reload(load: Callable, path: str, device: str, disable_dynamic: bool = False):
    """The host's own factory for VAEs takes ``disable_dynamic`` and leaves it, too."""
    return vae_patcher(load(path, device))


def vae_patcher(vae):
    """A VAE's patcher; the LTX audio VAE of 0.18 has it in its device manager."""
    manager = getattr(vae, "device_manager", None)
    return vae.patcher if manager is None else manager.patcher


def what_vae(vae) -> str:
    """What was connected in place of the right VAE: "it is ..."."""
    network = getattr(vae, "first_stage_model", vae)
    if network is None:
        return "it is empty: the file it was loaded from has none"
    channels = f"{getattr(vae, 'latent_channels', '?')} latent channels"
    if isinstance(network, comfy.ldm.lightricks.vae.audio_vae.AudioVAE):
        return "it is the LTX audio VAE"
    if isinstance(network, comfy.ldm.wan.vae2_2.WanVAE):
        return "it is the Wan2.2 video VAE"
    if isinstance(network, comfy.taesd.taehv.TAEHV):
        return f"it is a small preview VAE of {channels}"
    if isinstance(vae, comfy.sd.VAE):
        return f"it is a {type(network).__name__} of {channels}"
    if isinstance(vae, comfy.sd.CLIP):
        return "it is a text encoder"
    if isinstance(vae, comfy.model_patcher.ModelPatcher):
        return "it is a model"
    return f"it is a {type(vae).__name__}"
