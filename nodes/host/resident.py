"""How much of a model's weights stays on its device, and blocks of a network that live on another device.

The host loads in part, streams the rest and frees by itself; here it is given a smaller budget, or several models in
place of one. Run on ComfyUI 0.18.1 and 0.33.0.
"""

from __future__ import annotations

from dataclasses import replace

import comfy.model_patcher
import torch
from torch import nn

from .devices import current

NOTHING = 0.1  # bytes: to the host 0 is no budget, but none


class PartlyResident(comfy.model_patcher.ModelPatcher):
    """The host's patcher of static loading; ``share`` (0..1) of the weights stays loaded at most, None: what fits."""

    share: float | None = None

    def clone(self, *args, **kwargs):
        other = super().clone(*args, **kwargs)
        other.share = self.share
        return other

    def partially_load(self, device_to, extra_memory=0, force_patch_weights=False):
        if self.share is not None:
            room = self.share * self.model_size() - self.loaded_size()  # below 0 the host unloads so much
            extra_memory = min(extra_memory, room) or NOTHING
        return super().partially_load(device_to, extra_memory, force_patch_weights=force_patch_weights)


# ---------------------------------------------------------------- blocks on another device


class Elsewhere(nn.Module):
    """In a network in place of a block that another model holds, on ``device``."""

    def __init__(self, block: nn.Module, device: torch.device) -> None:
        super().__init__()
        self._held = (block,)  # in a tuple, so that it is no part of this network
        self.device = device

    @property
    def block(self) -> nn.Module:
        return self._held[0]


def block_of(place: nn.Module) -> nn.Module:
    """The block itself, wherever it lives."""
    return place.block if isinstance(place, Elsewhere) else place


class Itinerary:
    """The tokens' way through the devices of one pass, whose state is brought to each device once."""

    def __init__(self, home: torch.device, state) -> None:
        self.home, self.states = home, {home: state}

    def run(self, place: nn.Module, tokens: torch.Tensor, state, work):
        """``work(block, tokens, state)`` where the block lives."""
        device = place.device if isinstance(place, Elsewhere) else self.home
        if device not in self.states:
            self.states[device] = _state_on(device, state)
        with current(device):
            return work(block_of(place), tokens.to(device), self.states[device])


def _state_on(device: torch.device, state):
    stretches = tuple(replace(each, group=each.group.to(device)) for each in state.stretches)
    tensors = {name: getattr(state, name).to(device) for name in ("vectors", "table", "context")}
    return replace(state, stretches=stretches, **tensors)


class BlocksOf(nn.Module):
    """The model that holds blocks of a network, under the names that they have there: LoRAs find them."""

    def __init__(self, network: nn.Module, places: list[tuple[str, int]]) -> None:
        super().__init__()
        self.diffusion_model = nn.Module()
        for name in dict.fromkeys(name for name, _ in places):
            held = {str(index): getattr(network, name)[index] for kind, index in places if kind == name}
            setattr(self.diffusion_model, name, nn.ModuleDict(held))
