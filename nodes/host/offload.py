"""Where each model of the pack works and how much of the backbone stays there: what NAVA Offload asks of the host.

The host goes on loading, streaming and freeing; it is given other devices, a smaller budget, or blocks as models of
their own. Run on ComfyUI 0.18.1 and 0.33.0, on CPUs under several names.
"""

from __future__ import annotations

import copy
import logging
import uuid
from dataclasses import dataclass

import comfy.model_management
import comfy.patcher_extension
import torch

from ...nava_core.geometry import ClipGeometry
from .devices import (
    CPU,
    all_gpus,
    device_names,
    find_device,
    leave_device,
    moved_clip,
    moved_vae,
    name_of,
    reloaded,
    with_shared_weights,
)
from .model import BLOCKS_ELSEWHERE, WRAPPER_KEY, NavaModel
from .parallel import DistantModel
from .raw_parameters import patch_raw_parameters
from .resident import BlocksOf, Elsewhere, PartlyResident
from .vae import vae_patcher

AUTO = "auto"
ALL_THAT_FITS = -1
GB = 2**30
EXAMPLE = ("a clip of 5 s at 1280x704", (5.0, 1280, 704, "video+audio"))
KINDS = ("double_blocks", "single_blocks")


@dataclass(frozen=True)
class Placement:
    """What the user asks for: names of ``device_names`` or "auto", percents, and "device percent, ..." or nothing."""

    encoder_device: str = AUTO
    vae_device: str = AUTO
    resident: int = ALL_THAT_FITS
    blocks: str = ""


def placed(model, clip, vae, audio_vae, wanted: Placement):
    """(MODEL, CLIP, VAE, audio VAE, a text that says what was chosen): clones where something is changed, and None for
    what is None. Raises ValueError and RuntimeError, in a sentence, for what cannot be done."""
    _check(model)
    spread = parse_shares(wanted.blocks)
    said = []
    if clip is not None:
        device, why = _device(wanted.encoder_device, clip.patcher, model, spread)
        clip = clip if device == clip.patcher.load_device else moved_clip(clip, device)
        said.append(_line("Text encoder", clip.patcher, why))
    vaes = {"Video VAE": vae, "Audio VAE": audio_vae}
    for name, each in vaes.items():
        if each is not None:
            device, why = _device(wanted.vae_device, vae_patcher(each), model, spread)
            vaes[name] = each = each if device == vae_patcher(each).load_device else moved_vae(each, device)
            said.append(_line(name, vae_patcher(each), why))
    if spread:
        model = spread_blocks(model, spread)
    model = with_share(model, wanted.resident)
    text = "\n".join([*_backbone_lines(model, wanted.resident), *said])
    logging.info("NAVA Offload:\n%s", text)
    return model, clip, vaes["Video VAE"], vaes["Audio VAE"], text


def choices() -> list[str]:
    return [AUTO, *device_names()]


def _check(patcher) -> None:
    if not isinstance(patcher.model, NavaModel):
        raise ValueError(
            f"This MODEL is a {type(patcher.model).__name__}, not NAVA: connect the one from the NAVA Load Backbone "
            "node."
        )
    if isinstance(patcher.model, DistantModel):
        raise ValueError(
            "This MODEL is computed by the workers of NAVA Parallel, which hold its weights: connect the MODEL before "
            "that node, or take one of the two off."
        )


# ---------------------------------------------------------------- devices


def _device(wanted: str, patcher, model, spread) -> tuple[torch.device, str]:
    """Where a model works, and why."""
    if wanted != AUTO:
        device = find_device(wanted)
        return (patcher.load_device, "as loaded") if device is None else (device, "as asked for")
    if patcher.load_device == CPU:
        return CPU, "as loaded"
    busy = {model.load_device, *(device for device, _ in spread)}
    spare = [gpu for gpu in all_gpus() if gpu not in busy and _total(gpu) > 1.2 * patcher.model_size()]
    if spare:
        return max(spare, key=_total), "a GPU that the backbone leaves free"
    return patcher.load_device, "it leaves when sampling needs the room"


def _total(device: torch.device) -> float:
    return comfy.model_management.get_total_memory(device)


# ---------------------------------------------------------------- a share of the weights


def with_share(patcher, percent: int):
    """A clone of which ``percent`` of the weights stays on its device at most."""
    if percent == ALL_THAT_FITS or patcher.is_dynamic():
        return patcher.clone()
    other = patcher.clone()
    for part in (other, *other.get_additional_models_with_key(BLOCKS_ELSEWHERE)):
        if not isinstance(part, PartlyResident):
            raise RuntimeError(
                f"This MODEL comes in a {type(part).__name__}, whose share cannot be set: connect NAVA Load Backbone, "
                "or set resident to -1."
            )
        part.share = None if percent >= 100 else percent / 100
    return other


# ---------------------------------------------------------------- blocks on several devices


def parse_shares(text: str) -> list[tuple[torch.device, float]]:
    """ "gpu:0 60, gpu:1 40" -> devices and their shares of the blocks, in order. ValueError, in a sentence."""
    shares = []
    for part in filter(None, (each.strip() for each in text.replace("%", "").split(","))):
        name, *number = part.replace("cuda:", "gpu:").split()
        try:
            (share,) = map(float, number)
        except ValueError:
            share = 0.0
        if not 0 < share <= 100:
            raise ValueError(f'blocks: "{part}" is not a device and its percents, such as "gpu:0 60, gpu:1 40".')
        device = find_device(name)
        if device is None or device in (known for known, _ in shares):
            raise ValueError(f'blocks: "{part}" names a device a second time, or none: name each once, as in "gpu:0".')
        shares.append((device, share))
    if shares and abs(sum(share for _, share in shares) - 100) > 0.5:
        raise ValueError(f"blocks: the percents add up to {sum(share for _, share in shares):g}, not to 100.")
    return shares


def spread_blocks(patcher, shares: list[tuple[torch.device, float]]):
    """A MODEL whose blocks live on several devices, in their order; all else is where it was.

    Blocks of a device are a model of their own to the host (``additional_models``), which loads, counts and frees
    them. RuntimeError, in a sentence, for what does not go together.
    """
    _refuse(patcher)
    leave_device(patcher)
    network = reloaded(patcher) if patcher.is_dynamic() else with_shared_weights(patcher.model)
    backbone = network.diffusion_model
    other = patcher.clone(model_override=(network, ({}, {}, {}, set())))
    other.parent, other.hook_backup, other.cached_patcher_init = None, {}, None
    holders = []
    for device, places in _by_device(backbone, shares).items():
        if device != patcher.load_device:
            holders.append(_holder(other, BlocksOf(backbone, places), device))
            for name, index in places:
                getattr(backbone, name)[index] = Elsewhere(getattr(backbone, name)[index], device)
    if not holders:
        return patcher.clone()
    backbone.blocks_elsewhere, other.size = True, 0
    _divide_patches(other, holders)
    other.set_additional_models(BLOCKS_ELSEWHERE, holders)
    return other


def _refuse(patcher) -> None:
    if patcher.get_additional_models_with_key("multigpu"):
        raise RuntimeError(
            "MultiGPU CFG Split holds all blocks on every GPU: take that node off, or leave blocks empty in NAVA "
            "Offload."
        )
    if patcher.get_additional_models_with_key(BLOCKS_ELSEWHERE):
        raise RuntimeError("The blocks of this MODEL are on several devices already: use one NAVA Offload node.")
    if patcher.hook_patches or patcher.forced_hooks:
        raise RuntimeError(
            "LoRAs that change over the steps (hooks) do not reach blocks on other devices: leave blocks empty in "
            "NAVA Offload."
        )


def _by_device(backbone, shares) -> dict[torch.device, list[tuple[str, int]]]:
    places = [(name, index) for name in KINDS for index in range(len(getattr(backbone, name)))]
    found, begin, reached = {}, 0, 0.0
    for device, share in shares:
        reached += share
        end = len(places) if device == shares[-1][0] else round(len(places) * reached / 100)
        found[device] = places[begin:end]
        begin = end
    return {device: mine for device, mine in found.items() if mine}


def _holder(other, blocks: BlocksOf, device: torch.device):
    kind = PartlyResident if device == CPU else type(other)
    holder = kind(blocks, load_device=device, offload_device=other.offload_device)
    holder.weight_inplace_update, holder.force_cast_weights = other.weight_inplace_update, other.force_cast_weights
    holder.add_callback_with_key(comfy.patcher_extension.CallbacksMP.ON_LOAD, WRAPPER_KEY, patch_raw_parameters)
    return holder


def _divide_patches(other, holders: list) -> None:
    """Each LoRA's changes to the model that holds the weight."""
    patches = other.patches
    for part in (other, *holders):
        names = {name for name, _ in part.model.named_parameters()}
        part.patches = {key: copy.copy(each) for key, each in patches.items() if key in names}
        part.patches_uuid = uuid.uuid4()


# ---------------------------------------------------------------- what is said


def _line(name: str, patcher, why: str) -> str:
    return f"{name}: {patcher.model_size() / GB:.1f} GB on {name_of(patcher.load_device)} ({why})."


def _backbone_lines(patcher, percent: int) -> list[str]:
    model = patcher.model
    what, clip = EXAMPLE
    geometry = ClipGeometry(*clip)
    needed = model.clip_bytes(geometry.video_tokens, geometry.audio_tokens)
    parts = [patcher, *patcher.get_additional_models_with_key(BLOCKS_ELSEWHERE)]
    lines = [_backbone_line(part, percent, needed) for part in parts]
    return [*lines, f"One prediction of {what} takes {needed / GB:.1f} GB beside the weights."]


def _backbone_line(patcher, percent: int, needed: float) -> str:
    device, size = patcher.load_device, patcher.model_size()
    count = _count(patcher.model.diffusion_model)
    start = f"Backbone: {count} blocks, {size / GB:.1f} GB on {name_of(device)}"
    if device == CPU:
        return f"{start}, in RAM."
    if patcher.is_dynamic():
        note = ", which the share that was asked for does not change" if percent != ALL_THAT_FITS else ""
        return f"{start}; ComfyUI's dynamic VRAM keeps what fits and streams the rest, weight by weight{note}."
    room = _total(device) - needed - comfy.model_management.extra_reserved_memory()
    share = min(1.0, max(0.0, room / size), 1.0 if percent == ALL_THAT_FITS else percent / 100)
    if share == 1:
        return f"{start}; all of it stays there for such a clip."
    return f"{start}; {share:.0%} of it stays there for such a clip, the rest is streamed from RAM."


def _count(backbone) -> int:
    """Of the blocks that it holds itself."""
    lists = (getattr(backbone, name) for name in KINDS if hasattr(backbone, name))
    return sum(not isinstance(block, Elsewhere) for each in lists for block in each.children())
