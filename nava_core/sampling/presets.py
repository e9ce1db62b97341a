"""Schedule, solver and guidance that belong together, by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from .euler import FlowEuler
from .guidance import CONDITIONAL, Guidance
from .schedule import distilled_sigmas


@dataclass(frozen=True)
class Preset:
    """How a kind of checkpoint is sampled. ``label`` is its name on the canvas; ``solver`` is made from the sigmas."""

    label: str
    sigmas: Callable[..., torch.Tensor]  # takes ``denoise``
    solver: Callable[[torch.Tensor], FlowEuler]
    guidance: Guidance


PRESETS = {
    # The makers' few-step students (DMD2) have guidance and alignment distilled in.
    "distilled": Preset(
        "4 steps (distilled)", lambda denoise=1.0: distilled_sigmas(denoise=denoise), FlowEuler, CONDITIONAL
    ),
}


def find_preset(name: str) -> Preset:
    """The preset of a name or a label. Raises ValueError, with the names there are, for another one."""
    for key, preset in PRESETS.items():
        if name in (key, preset.label):
            return preset
    raise ValueError(f"There is no preset {name!r}: choose {', '.join(PRESETS)}, or none.")
