"""What a noise mask says: 1 where the clip is made, less where it is given, and how a given part shows itself.

A given part is kept whatever its value; the value is the switch for what the network is shown. ``CLEAN`` frames and
audio steps are shown as they are, at timestep 0, as the first frame was in training; ``NOISED`` ones are noised to the
level of the rest, at its timestep. Both are small enough to mean "keep" to everything else that reads masks, so that
the switch goes wherever a mask goes. A frame or step of which only a part is given is at the level of the rest always.
"""

from __future__ import annotations

import math

import torch

from ..geometry import AUDIO_LATENTS_PER_SECOND, FPS, FRAMES_PER_LATENT

CLEAN = 0.0
NOISED = 2.0**-10
SHOWN = {"clean": CLEAN, "matched noise": NOISED}
HIGHEST_GIVEN = 2.0**-9  # below the lowest level of a mask of 8 bits, 1/255

_MARGIN = 1e-6  # of a frame or step: times are decimal numbers, and a third of a second is none


def is_given(mask: torch.Tensor) -> torch.Tensor:
    """Where a noise mask, of any shape, keeps what is given, bool."""
    return mask <= HIGHEST_GIVEN


def kept(mask: torch.Tensor) -> torch.Tensor:
    """The mask as weights: 0 where the clip is given, however it is shown."""
    return torch.where(is_given(mask), torch.zeros_like(mask), mask)


def made_steps(mask: torch.Tensor, steps_dim: int) -> torch.Tensor:
    """(B, steps) bool: where anything of a frame or audio step is made, from a mask with these along ``steps_dim``."""
    return ~is_given(_highest(mask, steps_dim))


def clean_steps(mask: torch.Tensor, steps_dim: int) -> torch.Tensor:
    """(B, steps) bool: where a whole frame or audio step is given and shown clean."""
    return _highest(mask, steps_dim) <= CLEAN


def _highest(mask: torch.Tensor, steps_dim: int) -> torch.Tensor:
    return mask.movedim(steps_dim, 1).flatten(2).amax(dim=-1)


# ---------------------------------------------------------------- seconds to latents


def frames_touching(start: float, end: float, latents: int) -> slice:
    """The latent frames, of ``latents``, with any frame that is on screen between ``start`` and ``end`` seconds."""
    first = _whole(start * FPS, math.floor)
    last = _whole(end * FPS, math.ceil) - 1
    return _cut(_latent_of(first), _latent_of(last) + 1, latents)


def frames_within(start: float, end: float, latents: int) -> slice:
    """The latent frames, of ``latents``, whose frames are all on screen between ``start`` and ``end`` seconds."""
    first = _whole(start * FPS, math.ceil)
    stop = _whole(end * FPS, math.floor)
    begin = 0 if first <= 0 else -(-(first - 1) // FRAMES_PER_LATENT) + 1
    until = 0 if stop < 1 else (stop - 1) // FRAMES_PER_LATENT + 1
    return _cut(begin, until, latents)


def steps_touching(start: float, end: float, steps: int) -> slice:
    """The audio steps, of ``steps``, with any time between ``start`` and ``end`` seconds."""
    first = _whole(start * AUDIO_LATENTS_PER_SECOND, math.floor)
    return _cut(first, _whole(end * AUDIO_LATENTS_PER_SECOND, math.ceil), steps)


def steps_within(start: float, end: float, steps: int) -> slice:
    """The audio steps, of ``steps``, whose time is all between ``start`` and ``end`` seconds."""
    first = _whole(start * AUDIO_LATENTS_PER_SECOND, math.ceil)
    return _cut(first, _whole(end * AUDIO_LATENTS_PER_SECOND, math.floor), steps)


def _latent_of(frame: int) -> int:
    """The latent frame that holds ``frame``: 0 has the first alone, each later one four."""
    return 0 if frame <= 0 else (frame - 1) // FRAMES_PER_LATENT + 1


def _whole(value: float, rounding) -> int:
    nearest = round(value)
    return nearest if abs(value - nearest) < _MARGIN else rounding(value)


def _cut(begin: int, end: int, count: int) -> slice:
    begin = min(max(begin, 0), count)
    return slice(begin, min(max(end, begin), count))
