"""Devices by the names that ComfyUI's own nodes give them, and models taken to another one.

Run on ComfyUI 0.18.1 and 0.33.0, on a CPU under several names; the branches for dynamic VRAM need a GPU.
"""

from __future__ import annotations

import contextlib
import copy

import comfy.model_management
import comfy.model_patcher
import comfy.sd
import torch
from torch import nn

CPU = torch.device("cpu")
DEFAULT = "default"


def all_gpus() -> list[torch.device]:
    """Every GPU of this server; the device it computes on where it has none."""
    manager = comfy.model_management
    if hasattr(manager, "get_all_torch_devices"):
        return list(manager.get_all_torch_devices())
    current = manager.get_torch_device()
    return [torch.device("cuda", i) for i in range(torch.cuda.device_count())] if current.type == "cuda" else [current]


def device_names() -> list[str]:
    """ "default", "cpu" and, where there are several GPUs, "gpu:0" and on, as the host's own nodes list them."""
    gpus = all_gpus()
    return [DEFAULT, "cpu", *(f"gpu:{index}" for index in range(len(gpus)) if len(gpus) > 1)]


def find_device(name: str) -> torch.device | None:
    """The device of a name of :func:`device_names`, None for "default". ValueError, in a sentence, for no such one."""
    gpus, name = all_gpus(), name.strip().lower()
    if name == DEFAULT:
        return None
    if name == "cpu":
        return CPU
    if name.startswith("gpu:") and name[4:].isdecimal() and int(name[4:]) < len(gpus):
        return gpus[int(name[4:])]
    here = ", ".join(["cpu", *(f"gpu:{index}" for index in range(len(gpus)))])
    raise ValueError(f"This server has no device {name!r}: choose one of {here}.")


def name_of(device: torch.device) -> str:
    """What people call a device here: "cpu", or "gpu:1" by its place among the GPUs."""
    gpus = all_gpus()
    return "cpu" if device == CPU else f"gpu:{gpus.index(device)}" if device in gpus else str(device)


def current(device: torch.device):
    """Context in which ``device`` is the one that kernels are started on."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


# ---------------------------------------------------------------- leaving a device


def is_of(loaded, patchers: list) -> bool:
    """Whether a model that the host has loaded is one of ``patchers`` or a clone of one."""
    return loaded.model is not None and any(loaded.model.is_clone(patcher) for patcher in patchers)


def leave_device(patcher) -> None:
    """Take the model of ``patcher`` and its clones off their device: the weights are in RAM then, without LoRAs."""
    manager = comfy.model_management
    ours = [loaded for loaded in manager.current_loaded_models if is_of(loaded, [patcher])]
    others = [loaded for loaded in manager.current_loaded_models if not is_of(loaded, [patcher])]
    for device in dict.fromkeys(loaded.device for loaded in ours):
        manager.free_memory(1e30, device, keep_loaded=others)
    if patcher.loaded_size() > 0:  # loaded, and forgotten by the host as it turned to a clone
        patcher.detach()


# ---------------------------------------------------------------- a model of its own on another device


def moved(patcher, device: torch.device):
    """``patcher`` with everything that hangs on it, for a network of its own on ``device``.

    The network is another one, for the host takes two patchers of one network on two devices for loaded where the first
    one is. Its weights in RAM are the same memory until one of the two is loaded; under dynamic VRAM they are the file.
    Raises RuntimeError, in a sentence, where the host cannot load such a model again.
    """
    leave_device(patcher)
    if patcher.is_dynamic() and device == CPU:  # which dynamic VRAM is not for
        _check_reload(patcher)
        other = patcher.clone(disable_dynamic=True)
    else:
        network = reloaded(patcher) if patcher.is_dynamic() else with_shared_weights(patcher.model)
        other = patcher.clone(model_override=(network, ({}, {}, {}, set())))
    other.parent, other.hook_backup = None, {}
    other.load_device = device
    if device == CPU:
        other.offload_device = CPU
    if hasattr(other, "register_load_device"):
        other.register_load_device(device)
    return other


def reloaded(patcher) -> nn.Module:
    """The network of ``patcher``, loaded again from its file by the loader it came from."""
    _check_reload(patcher)
    load, arguments, *index = patcher.cached_patcher_init
    again = load(*arguments)
    return (again[index[0]] if index else again).model


def _check_reload(patcher) -> None:
    if patcher.cached_patcher_init is None:
        raise RuntimeError(
            f"ComfyUI cannot load this {type(patcher.model).__name__} again for another device: take one of this "
            "pack's loaders, or leave the device on default."
        )


def with_shared_weights(network: nn.Module) -> nn.Module:
    """A network of its own over the very weights of ``network``, which must be in RAM and unpatched."""
    memo = {id(weight): nn.Parameter(weight.detach(), requires_grad=False) for weight in network.parameters()}
    memo.update((id(buffer), buffer.detach()) for buffer in network.buffers())
    if hasattr(network, "model_config"):  # of a backbone; the host's cannot be copied, and is not changed
        memo[id(network.model_config)] = network.model_config
        memo[id(network.current_patcher)] = None  # of a run that was cut off
    return copy.deepcopy(network, memo)


def moved_clip(clip, device: torch.device):
    """A CLIP on ``device``, with its LoRAs."""
    other = clip.clone()
    other.patcher = moved(clip.patcher, device)
    other.cond_stage_model = other.patcher.model
    return other


def moved_vae(vae, device: torch.device):
    """A VAE on ``device``, the LTX audio VAE of 0.18 too; in fp32 on the CPU, as the loaders have it there."""
    if not isinstance(vae, comfy.sd.VAE):
        again = vae.device_manager.patcher.cached_patcher_init[1]
        other = again[0](*again[1:])
        other.device_manager.patcher = comfy.model_patcher.ModelPatcher(other, device, CPU)
        other.device_manager.patcher.cached_patcher_init = vae.device_manager.patcher.cached_patcher_init
        return other
    other = copy.copy(vae)
    other.patcher = moved(vae.patcher, device)
    other.first_stage_model, other.device = other.patcher.model, device
    if device == CPU and vae.vae_dtype != torch.float32:
        other.first_stage_model.float()
        other.vae_dtype, other.patcher.size, other.size = torch.float32, 0, None
    return other
