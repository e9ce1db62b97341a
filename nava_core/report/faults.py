"""What is plainly broken in a clip: NaN, silence, clipping, a frozen or flickering picture."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch

Span = tuple[float, float]  # begin and end in seconds

WINDOW = 0.05  # seconds of one level
SILENT = -60.0  # dBFS of a window, RMS over time and channels, below which it is silent
LONG_SILENCE = 1.0  # seconds

FULL_SCALE = 0.999  # of what samples can hold
FLAT_TOP = 0.98  # of the highest sample: equal neighbours up there are cut tops that were turned down since
FLAT_SAMPLES = 3
# What a lossy codec made of flat tops: many samples in the last tenth below the ceiling, few in the tenth before it. A
# sine has 2.3 times as many there, noise and speech fewer.
CEILING = 0.999  # quantile of the samples' size
CROWDED = 3.0
CROWD = 2e-3  # of all samples
SAMPLES = 1 << 20  # that the ceiling is found from
QUIET = 1e-3  # a sound below -60 dBFS is not clipped

UNCHANGED = 0.8 / 255  # mean change of every block of a frame, below which it is the same picture
FROZEN_SECONDS = 0.5

JUMP = 0.02  # of full scale: mean brightness from a frame to the next
RETURN = 0.5  # of a jump that the next one takes back
RETURN_SECONDS = 0.25


def not_finite(tensor: torch.Tensor) -> int:
    """How many values of ``tensor`` are NaN or infinite; 0 for whole numbers."""
    if not tensor.is_floating_point() or bool(tensor.float().sum().isfinite()):
        return 0
    return int((~tensor.isfinite()).sum())


# ---------------------------------------------------------------- sound


def sound_levels(waveform: torch.Tensor, sample_rate: int) -> torch.Tensor:
    """RMS of each whole 50 ms of ``waveform`` (C, N) over its channels, (M,) in dBFS (a full-scale sine is -3), -200
    for digital silence."""
    size = max(1, round(WINDOW * sample_rate))
    whole = waveform[:, : waveform.shape[1] // size * size]
    power = whole.float().square().mean(dim=0).reshape(-1, size).mean(dim=1)
    return 10 * torch.log10(power.clamp(min=1e-20))


def silent_spans(levels: torch.Tensor, shortest: float = LONG_SILENCE) -> list[Span]:
    """Where ``levels`` of :func:`sound_levels` stay below -60 dBFS for at least ``shortest`` seconds."""
    return list(_runs(levels < SILENT, 1 / WINDOW, shortest))


def silent_share(levels: torch.Tensor) -> float:
    """Share of a sound below -60 dBFS, 0..1; 1 for a sound too short to have a level."""
    return float((levels < SILENT).float().mean()) if len(levels) else 1.0


def clipped_share(waveform: torch.Tensor) -> float:
    """Share of the samples (C, N) that are clipped, 0..1.

    They are at full scale (0.999 or more), or one of three equal ones in a row within 2 % of the highest: tops that
    were cut and turned down later, or near a ceiling where they crowd: tops that were cut and went through a codec.
    """
    magnitude = waveform.abs()
    peak = float(magnitude.max())
    if peak < QUIET:
        return 0.0
    full = int((magnitude >= FULL_SCALE).sum())
    same = waveform[:, 1:] == waveform[:, :-1]
    flat = int((same[:, 1:] & same[:, :-1] & (magnitude[:, FLAT_SAMPLES - 1 :] >= FLAT_TOP * peak)).sum())
    return max(full, flat, _crowd(magnitude)) / magnitude.numel()


def _crowd(magnitude: torch.Tensor) -> int:
    """How many samples lie in the last tenth below the ceiling, or above it; 0 unless they crowd there."""
    some = magnitude.flatten()[:: max(1, magnitude.numel() // SAMPLES)]
    ceiling = float(some.kthvalue(max(1, round(CEILING * len(some)))).values)
    above, below = (int((magnitude >= share * ceiling).sum()) for share in (0.9, 0.8))
    return above if above > CROWD * magnitude.numel() and above > CROWDED * (below - above) else 0


# ---------------------------------------------------------------- picture


def frozen_spans(changes: torch.Tensor, fps: float, shortest: float = FROZEN_SECONDS) -> list[Span]:
    """Where the picture stands still for at least ``shortest`` seconds.

    ``changes`` (F - 1,): from each frame to the next, the largest mean change of any block of 16 pixels a side of a
    picture 192 pixels long, 0..1. Below 0.8 of 255 levels it is the same picture; a still one under fresh noise is not.
    """
    spans = _runs(changes < UNCHANGED, fps, shortest - 1 / fps)
    return [(begin, end + 1 / fps) for begin, end in spans]


@dataclass(frozen=True)
class Flicker:
    """Jumps of brightness that come back: at ``times`` in seconds; the ``largest`` in parts of full scale."""

    times: tuple[float, ...]
    largest: float


def flicker(brightness: torch.Tensor, fps: float) -> Flicker:
    """Flashes and flicker in the mean ``brightness`` (F,) of the frames, 0..1.

    A jump of 2 % of full scale from a frame to the next, of which at least half is taken back by a jump within a
    quarter of a second. A cut to a brighter scene stays bright and is none.
    """
    steps = brightness.diff()
    reach = max(1, round(RETURN_SECONDS * fps))
    times, largest, index = [], 0.0, 0
    while index < len(steps):
        jump = float(steps[index])
        back = steps[index + 1 : index + 1 + reach] * -math.copysign(1.0, jump)
        returns = (back >= RETURN * abs(jump)).nonzero() if abs(jump) >= JUMP else ()
        if len(returns):
            times.append((index + 1) / fps)
            largest = max(largest, abs(jump))
            index += 1 + int(returns[0])
        index += 1
    return Flicker(tuple(times), largest)


def _runs(holds: torch.Tensor, rate: float, shortest: float) -> Iterator[Span]:
    """Where ``holds`` (M,), ``rate`` a second, is true for ``shortest`` seconds or more."""
    edges = torch.nn.functional.pad(holds.int(), (1, 1)).diff()
    begins, ends = (edges == 1).nonzero().flatten().tolist(), (edges == -1).nonzero().flatten().tolist()
    for begin, end in zip(begins, ends, strict=True):
        if (end - begin) / rate >= shortest - 1e-6:
            yield begin / rate, end / rate
