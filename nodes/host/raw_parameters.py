"""LoRAs on parameters that are no layer's weight or bias: modulations and the null voice, a few kilobytes each.

The host patches such parameters only where they belong to a module of their own that is wholly loaded: in a head, in a
model that is loaded in part and under dynamic VRAM a LoRA's change of them would be lost without a word. They are
patched here as the host would, after each loading, and put back by it with the rest. Run on ComfyUI 0.18.1 and 0.33.0.
"""

from __future__ import annotations

from collections.abc import Iterator

import comfy.utils
from torch import nn


def raw_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """(full name, the module it belongs to) of each parameter that the host's operations do not cast."""
    for name, module in model.named_modules():
        if not hasattr(module, "comfy_cast_weights"):
            for parameter in module._parameters:
                yield f"{name}.{parameter}", module


def patch_raw_parameters(patcher, device, *_) -> None:
    """After loading (the host's ON_LOAD callback): what the host has left unpatched."""
    for key, module in raw_parameters(patcher.model):
        if patcher.is_dynamic():
            _take_original(patcher, key, device)
        elif key in patcher.backup:  # patched already
            continue
        if key in patcher.patches:
            patcher.patch_weight_to_device(key, device_to=device)
            module.comfy_patched_weights = True  # or the host would patch it again as it loads more


def _take_original(patcher, key: str, device) -> None:
    """The parameter as it was before any LoRA; older hosts leave the last one's in it as they load again."""
    if key in patcher.backup:
        comfy.utils.set_attr_param(patcher.model, key, patcher.backup[key].weight.to(device))
