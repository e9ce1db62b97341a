"""How well sounds fall on what moves: onsets in the sound against accents in the picture. No weights are needed."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch

RATE = 100  # values a second of the curves that are compared
MAX_LAG = 0.5  # seconds that the sound is moved by, at most
SHUFFLES = 199
PIECE = 0.15  # seconds of the pieces that the sound's onsets are shuffled in
SEED = 0
CLEAR = 0.1  # of the strongest onset: what is shuffled lies between the first and the last one above it

# Where viewers notice (ITU-R BT.1359-1), in seconds: sound that is early by 45 ms or late by 125 ms.
EARLY, LATE = 0.045, 0.125
CHANCE = 0.05  # share of shuffled sounds that may fit as well before a fit is taken for chance

WINDOW = 0.023  # seconds of a spectrum
BANDS, LOWEST, HIGHEST = 24, 60.0, 12_000.0  # Hz
FLOOR = 1e-4  # of the loudest band energy: what is 40 dB below it makes no onset
LOCAL = 0.5  # seconds that a curve's mean is taken over, which is no onset
SPECTRA = 1024  # computed at a time

CELL = 32  # pixels a side of what is followed from frame to frame
MAX_SHIFT = 12  # pixels a frame that it is followed by
MOVED = 1.5 / 255  # mean change of a cell below which it stood still
BLUR = 0.03  # seconds: standard deviation of the bell that each onset and accent is widened to
NEAR_BEST = 0.95  # of the highest correlation: of such peaks the one nearest to 0 is the lag


@dataclass(frozen=True)
class Sync:
    """How the sound of a clip lies on its picture.

    ``lag`` in seconds at which both fit best, above 0: the sound comes late; ``correlation`` there and ``at_zero``,
    -1..1; ``chance``: the share of shuffled sounds that fit at least as well, their best lag being sought too;
    ``chance_correlation``: what they reach on average.
    """

    lag: float
    correlation: float
    at_zero: float
    chance: float
    chance_correlation: float

    @property
    def is_linked(self) -> bool:
        """Whether sound and picture have more to do with each other than by chance: only then the lag says anything."""
        return self.chance < CHANCE


# ---------------------------------------------------------------- sound


def onset_strength(waveform: torch.Tensor, sample_rate: int) -> torch.Tensor:
    """How much begins in the sound: spectral flux, (M,) from 0, 100 values a second, the first at 0 s.

    ``waveform`` (C, N). The sum over 24 mel bands of what each rises by in 10 ms, in powers of ten of its energy, less
    the mean of half a second around.
    """
    count = int(waveform.shape[1] / sample_rate * RATE) + 1
    energies = torch.cat(list(_band_energies(waveform, sample_rate, count)))
    loudest = float(energies.max())
    if loudest <= 0 or count < 3:
        return torch.zeros(count)
    levels = torch.log10(energies / loudest + FLOOR)
    rises = (levels[1:] - levels[:-1]).clamp(min=0).sum(dim=1)
    # A window meets a sound before its centre does: the rise to a value belongs half to that one, half to the next.
    flux = (torch.nn.functional.pad(rises, (1, 0)) + torch.nn.functional.pad(rises, (2, -1))) / 2
    return (flux - _local_mean(flux)).clamp(min=0)


def _band_energies(waveform: torch.Tensor, sample_rate: int, count: int) -> Iterator[torch.Tensor]:
    """Energies (n, BANDS) around each hundredth of a second, some at a time."""
    size = round(WINDOW * sample_rate)
    padded = torch.nn.functional.pad(waveform.float().mean(dim=0), (size // 2, size))
    window, bands = torch.hann_window(size), _bands(sample_rate, size)
    starts = (torch.arange(count, dtype=torch.float64) * sample_rate / RATE).round().long()
    for part in starts.split(SPECTRA):
        spectra = torch.fft.rfft(padded[part[:, None] + torch.arange(size)] * window)
        yield spectra.abs().square() @ bands


def _bands(sample_rate: int, size: int) -> torch.Tensor:
    """Triangles (size / 2 + 1, BANDS) of equal width in mel."""

    def mel(hertz: float) -> float:
        return 2595 * math.log10(1 + hertz / 700)

    places = torch.linspace(mel(LOWEST), mel(min(HIGHEST, sample_rate / 2)), BANDS + 2)
    edges = 700 * (10 ** (places / 2595) - 1)
    bins = torch.linspace(0, sample_rate / 2, size // 2 + 1)[:, None]
    low, centre, high = edges[:-2], edges[1:-1], edges[2:]
    return torch.minimum((bins - low) / (centre - low), (high - bins) / (high - centre)).clamp(min=0)


def _local_mean(curve: torch.Tensor) -> torch.Tensor:
    half = round(LOCAL * RATE / 2)
    return torch.nn.functional.avg_pool1d(
        curve[None, None], 2 * half + 1, stride=1, padding=half, count_include_pad=False
    )[0, 0]


# ---------------------------------------------------------------- picture


def block_flow(before: torch.Tensor, after: torch.Tensor) -> torch.Tensor:
    """Where each cell of a frame went: optical flow by phase correlation, (F, cells, 2) in pixels right and down.

    ``before`` and ``after`` (F, H, W) grey in 0..1. Cells are 32 pixels a side, half of them shared with the next, and
    followed by up to 12 pixels; one that did not change has gone nowhere.
    """
    first, second = _cells(before), _cells(after)
    window = torch.hann_window(CELL, periodic=False)
    window = window[:, None] * window
    spectra = [torch.fft.rfft2((cells - cells.mean(dim=(-2, -1), keepdim=True)) * window) for cells in (first, second)]
    cross = spectra[0].conj() * spectra[1]
    size = cross.abs()
    surface = torch.fft.irfft2(cross / (size + 0.01 * size.mean(dim=(-2, -1), keepdim=True) + 1e-12), s=(CELL, CELL))
    surface = surface.roll((CELL // 2, CELL // 2), dims=(-2, -1))
    reach = slice(CELL // 2 - MAX_SHIFT, CELL // 2 + MAX_SHIFT + 1)
    best = surface[..., reach, reach].flatten(-2).argmax(dim=-1)
    side = 2 * MAX_SHIFT + 1
    flow = torch.stack([best % side - MAX_SHIFT, best // side - MAX_SHIFT], dim=-1).float()
    moved = (second - first).abs().mean(dim=(-2, -1)) > MOVED
    return flow * moved[..., None]


def _cells(frames: torch.Tensor) -> torch.Tensor:
    """(F, cells, CELL, CELL), the frames' last rows and columns repeated where they are too small for one."""
    missing = [max(0, CELL - side) for side in frames.shape[1:]]
    if any(missing):
        frames = torch.nn.functional.pad(frames[:, None], (0, missing[1], 0, missing[0]), mode="replicate")[:, 0]
    return frames.unfold(1, CELL, CELL // 2).unfold(2, CELL, CELL // 2).flatten(1, 2)


def accent_strength(flow: torch.Tensor, difference: torch.Tensor) -> torch.Tensor:
    """How much happens at each frame of the picture: (F,) from 0.

    ``flow`` (F - 1, cells, 2) and ``difference`` (F - 1,), the mean change of brightness, from each frame to the next.
    What counts is where motion starts, stops or turns (the flow's change from one pair of frames to the next), and
    where the picture begins to change more than before (a light that goes on); both count alike.
    """
    turns = (flow[1:] - flow[:-1]).norm(dim=-1).mean(dim=1)
    accents = torch.nn.functional.pad(turns, (1, 1))
    begins = torch.nn.functional.pad((difference - torch.nn.functional.pad(difference, (1, 0))[:-1]), (1, 0))
    begins[:2] = 0  # a clip that begins in motion
    return _salient(accents) + _salient(begins)


def _salient(curve: torch.Tensor) -> torch.Tensor:
    """What stands out of a curve from 0, of length 1; compressed, lest one great jump hides everything else."""
    curve = (curve - curve.median()).clamp(min=0)
    if float(curve.max()) < 1e-6:
        return torch.zeros_like(curve)
    curve = torch.log1p(curve / curve.mean())
    return curve / curve.norm()


# ---------------------------------------------------------------- both


def measure_sync(onsets: torch.Tensor, accents: torch.Tensor, fps: float) -> Sync | None:
    """How ``onsets`` (M,), 100 a second, lie on ``accents`` (F,), one a frame. None where there are none of either.

    The sound is moved by up to half a second both ways. The same is done with 199 sounds whose onsets, between the
    first and the last, are shuffled in pieces of 0.15 s, which says what chance would reach.
    """
    picture = _widened(_at_rate(accents, fps, len(onsets)))
    if float(onsets.max()) <= 0 or float(picture.abs().max()) <= 0 or len(onsets) < 2 * MAX_LAG * RATE:
        return None
    reach = round(MAX_LAG * RATE)
    generator = torch.Generator().manual_seed(SEED)
    sounds = torch.stack([onsets, *(_shuffled(onsets, generator) for _ in range(SHUFFLES))])
    found = _correlations(_widened(sounds), picture, reach)
    best = found.max(dim=1).values
    lag = _nearest_peak(found[0]) - reach
    return Sync(
        lag=lag / RATE,
        correlation=float(found[0, lag + reach]),
        at_zero=float(found[0, reach]),
        chance=float(1 + (best[1:] >= best[0]).sum()) / (1 + SHUFFLES),
        chance_correlation=float(best[1:].mean()),
    )


def _at_rate(accents: torch.Tensor, fps: float, count: int) -> torch.Tensor:
    """Accents, one a frame, as a curve of RATE values a second, each shared by the two values around its time."""
    places = torch.arange(len(accents), dtype=torch.float64) * RATE / fps
    below = places.long()
    share = (places - below).float()
    curve = torch.zeros(max(count, int(below[-1]) + 2))
    curve.index_add_(0, below, accents * (1 - share))
    curve.index_add_(0, below + 1, accents * share)
    return curve[:count]


def _widened(curves: torch.Tensor) -> torch.Tensor:
    """Curves (..., M) under a bell, their mean taken away, of length 1."""
    half = round(4 * BLUR * RATE)
    bell = torch.exp(-0.5 * (torch.arange(-half, half + 1) / (BLUR * RATE)).square())
    flat = curves.reshape(-1, 1, curves.shape[-1])
    wide = torch.nn.functional.conv1d(flat, bell[None, None], padding=half).reshape(curves.shape)
    wide = wide - wide.mean(dim=-1, keepdim=True)
    return wide / wide.norm(dim=-1, keepdim=True).clamp(min=1e-9)


def _shuffled(onsets: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """The onsets in another order, between the first one and the last: silence at the ends of a clip stays there."""
    clear = (onsets > CLEAR * onsets.max()).nonzero()
    first, last = int(clear[0]), int(clear[-1]) + 1
    pieces = list(onsets[first:last].split(round(PIECE * RATE)))
    inside = [pieces[index] for index in torch.randperm(len(pieces), generator=generator)]
    return torch.cat([onsets[:first], *inside, onsets[last:]])


def _correlations(sounds: torch.Tensor, picture: torch.Tensor, reach: int) -> torch.Tensor:
    """(sounds, 2 reach + 1): how each sound fits when it is brought forward by -reach .. reach values."""
    padded = torch.nn.functional.pad(sounds, (reach, reach))
    return torch.stack([padded[:, k : k + len(picture)] @ picture for k in range(2 * reach + 1)], dim=1)


def _nearest_peak(found: torch.Tensor) -> int:
    """Of the peaks that are as good as the highest one, the nearest to the middle: beats come again and again."""
    edges = torch.nn.functional.pad(found, (1, 1), value=-math.inf)
    peaks = (found >= edges[:-2]) & (found >= edges[2:]) & (found >= NEAR_BEST * found.max())
    places = peaks.nonzero().flatten()
    return int(places[(places - len(found) // 2).abs().argmin()])
