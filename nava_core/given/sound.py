"""A recording as the sound of a clip: laid where it belongs, sample for sample, and one sound joined to the next."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch

from ..geometry import AUDIO_LATENTS_PER_SECOND
from ..media import AAC_RATES, as_waveform, fit_length
from ..timbre.resample import resample
from .masks import SHOWN, steps_within

RESTS = ("silence", "generated")
FALLBACK_RATE = 48_000  # for recordings of a rate that AAC does not have
LEAST_SECONDS = 0.1
CONTEXT_SECONDS = 0.1  # of the recording around what is given, for the VAE to hear it as it goes on
LOW_RATE = 22_050  # below it speech sounds dull
FADE_SECONDS = 0.01

Span = tuple[float, float]


@dataclass(frozen=True, eq=False)
class GivenSound:
    """A recording laid into a clip by :func:`fit_sound`.

    ``waveform`` (C, N) fp32 is exactly as long as the clip, ``seconds``, at ``sample_rate``, with silence where nothing
    is given. ``spans`` are the (begin, end) in seconds of the clip that are given; the rest is to be made. ``notes``
    are sentences on what was cut, filled or resampled. ``heard`` is the waveform with a little more of the recording
    around what is given, where it goes on.
    """

    waveform: torch.Tensor
    sample_rate: int
    spans: tuple[Span, ...]
    seconds: float
    notes: tuple[str, ...] = ()
    heard: torch.Tensor | None = field(default=None, repr=False)

    @property
    def is_whole(self) -> bool:
        """Whether the clip's sound is given from beginning to end."""
        return covers(self.spans, self.seconds, self.sample_rate)

    def steps(self, steps: int, shown: str = "clean") -> torch.Tensor:
        """Mask (steps,) fp32 for the clip's audio latents: 1 where they are made, else the value of ``shown``.

        A step that is given only in part is made. Raises ValueError for an unknown ``shown``.
        """
        if shown not in SHOWN:
            raise ValueError(f"A given part is shown as one of {', '.join(SHOWN)}; got '{shown}'.")
        mask = torch.ones(steps)
        for begin, end in self.spans:
            if _is_end(end, self.seconds, self.sample_rate):
                end = steps / AUDIO_LATENTS_PER_SECOND  # the last step ends a little later than the clip
            mask[steps_within(begin, end, steps)] = SHOWN[shown]
        return mask

    def to_encode(self) -> tuple[torch.Tensor, int]:
        """(waveform (C, N'), rate) for the audio VAE: N' >= N, with the recording's own continuation if it has one."""
        return self.waveform if self.heard is None else self.heard, self.sample_rate


def fit_sound(
    waveform: torch.Tensor | Any,
    sample_rate: int,
    seconds: float,
    *,
    start: float = 0.0,
    at: float = 0.0,
    duration: float | None = None,
    rest: str = RESTS[0],
    is_track: bool = False,
) -> GivenSound:
    """Lay a recording (C, N) into a clip of ``seconds``: it begins ``start`` s into itself and ``at`` s into the clip.

    ``duration`` is how much of it is given at most, in seconds (None or 0: all). What is too long is cut; what the
    recording does not fill is silence, which is then given, too (``rest`` "silence"), or left to be made ("generated").
    The samples are the recording's own, at its own rate, unless AAC has no such rate: then they are resampled to 48
    kHz. More than two channels are mixed to one. ``is_track``: the recording goes through several clips, so that what
    falls into this one may be silent, or next to nothing. Raises ValueError, in one sentence, for a recording that is
    empty, silent or not finite, and for times that leave nothing to give.
    """
    recording = _checked(waveform, sample_rate, rest)
    for name, value in (("start", start), ("position", at), ("duration", duration or 0.0)):
        if not (math.isfinite(value) and value >= 0):
            raise ValueError(f"The {name} of given sound is in seconds, 0 or more; got {value}.")
    if not (math.isfinite(seconds) and seconds > 0):
        raise ValueError(f"Sound is given to a clip longer than 0 seconds; got {seconds}.")
    length = recording.shape[1] / sample_rate
    if start >= length:
        raise ValueError(
            f"The given sound is {length:.2f} s long and cannot start {start:.2f} s into itself: "
            "choose an earlier start."
        )
    if at >= seconds:
        raise ValueError(
            f"The clip is {seconds:.2f} s long, so that no sound can begin at {at:.2f} s: choose an earlier position."
        )
    notes = []
    if recording.shape[0] > 2:
        notes.append(f"Its {recording.shape[0]} channels were mixed to one.")
        recording = recording.mean(dim=0, keepdim=True)
    if sample_rate < LOW_RATE:
        notes.append(f"It has {sample_rate} Hz: there is nothing above {sample_rate / 2000:g} kHz in it.")
    recording, first, available, rate = _from_start(recording, int(sample_rate), start, seconds, notes)
    is_checked = not (is_track and bool(recording.any()))
    return _lay(recording, first, available, rate, seconds, at, duration, rest, notes, is_checked)


def _checked(waveform, sample_rate: int, rest: str) -> torch.Tensor:
    if rest not in RESTS:
        raise ValueError(f"The rest of a clip with given sound is one of {', '.join(RESTS)}; got '{rest}'.")
    if not (math.isfinite(sample_rate) and sample_rate >= 1):
        raise ValueError(f"The sample rate of given sound is above 0 Hz; got {sample_rate}.")
    if 0 in tuple(torch.as_tensor(waveform).shape):
        raise ValueError("The given sound is empty: choose a recording with sound in it.")
    recording = as_waveform(waveform)
    if not bool(recording.isfinite().all()):
        raise ValueError("There is NaN or infinity in the given sound: check what made it.")
    return recording


def _from_start(
    recording: torch.Tensor, rate: int, start: float, seconds: float, notes: list[str]
) -> tuple[torch.Tensor, int, int, int]:
    """(recording, the sample of it that is ``start``, how many there are from it on, its rate): resampled where AAC has
    no such rate, and then without what a clip of ``seconds`` does not hear."""
    if rate in AAC_RATES:
        first = round(start * rate)
        return recording, first, recording.shape[1] - first, rate
    notes.append(f"It was resampled from {rate} Hz, which AAC sound cannot have, to {FALLBACK_RATE} Hz.")
    skipped = max(0, math.floor(start) - 1)  # whole seconds, so that it is a whole number of samples at both rates
    part = recording[:, skipped * rate : (math.ceil(start + seconds) + 2) * rate]
    part = torch.stack([resample(channel, rate, FALLBACK_RATE) for channel in part])
    available = round((recording.shape[1] / rate - start) * FALLBACK_RATE)
    return part, round((start - skipped) * FALLBACK_RATE), available, FALLBACK_RATE


def _lay(
    recording: torch.Tensor,
    first: int,
    available: int,
    rate: int,
    seconds: float,
    at: float,
    duration: float | None,
    rest: str,
    notes: list[str],
    is_checked: bool,
) -> GivenSound:
    total, begin = round(seconds * rate), round(at * rate)
    wanted = min(available, round(duration * rate)) if duration else available
    taken = min(wanted, total - begin, recording.shape[1] - first)
    if taken < (min(LEAST_SECONDS * rate, total) if is_checked else 1):
        raise ValueError(
            f"Only {max(taken, 0) / rate:.3f} s of the given sound fall into the clip, at least {LEAST_SECONDS} s are "
            "needed: choose an earlier start or position, or a longer duration."
        )
    part = recording[:, first : first + taken]
    if is_checked and not bool(part.any()):
        raise ValueError(
            "What is given of the sound is digital silence, every sample is 0: choose another start or recording."
        )
    end = begin + taken
    span = (0, total) if rest == "silence" else (begin, end)
    notes += _length_notes(begin / rate, (total - end) / rate, (wanted - taken) / rate, rest)
    placed = torch.nn.functional.pad(part, (begin, total - end))
    heard = placed
    if rest == "generated" or end == total:
        heard = _with_context(placed, recording, first, begin, end, rate, before=rest == "generated")
    spans = ((span[0] / rate, seconds if span[1] == total else span[1] / rate),)
    return GivenSound(placed, rate, spans, seconds, tuple(notes), heard)


def _with_context(placed, recording, first: int, begin: int, end: int, rate: int, *, before: bool) -> torch.Tensor:
    """``placed``, with the recording going on for a little before ``begin`` and after ``end``."""
    context = round(CONTEXT_SECONDS * rate)
    earlier = min(context, first, begin) if before else 0
    later = min(context, recording.shape[1] - first - (end - begin))
    heard = fit_length(placed, max(placed.shape[1], end + later)).clone()
    heard[:, begin - earlier : end + later] = recording[:, first - earlier : first + (end - begin) + later]
    return heard


def _length_notes(before: float, after: float, cut: float, rest: str) -> list[str]:
    what = "is silence" if rest == "silence" else "is generated"
    notes = []
    if before > 0:
        notes.append(f"It begins {before:.2f} s into the clip; what comes before {what}.")
    if after > 0:
        notes.append(f"It ends {after:.2f} s before the clip does; what follows {what}.")
    if cut > 0:
        notes.append(f"It goes on for {cut:.2f} s past the clip's end, which were cut.")
    return notes


def covers(spans: tuple[Span, ...], seconds: float, rate: int) -> bool:
    """Whether ``spans``, in seconds, leave out no sample of a clip of ``seconds``."""
    reached = 0.0
    for begin, end in sorted(spans):
        if begin > reached + 0.5 / rate:
            return False
        reached = max(reached, end)
    return _is_end(reached, seconds, rate)


def _is_end(end: float, seconds: float, rate: int) -> bool:
    return end >= seconds - 1 / rate  # lengths are rounded to whole samples, up or down


# ---------------------------------------------------------------- two sounds in a row


def join_sound(first: torch.Tensor, second: torch.Tensor, rate: int, overlap: int) -> tuple[torch.Tensor, int]:
    """(waveform (C, N1 + N2 - overlap), seam): ``second`` after ``first``, whose last ``overlap`` samples it has anew.

    They are faded over where the overlap is quietest, about the sample ``seam`` of the result, at constant power: as
    two sounds that have nothing in common need it, or the same one, or anything between. Mono serves both channels.
    Raises ValueError for an overlap longer than either.
    """
    first, second = as_waveform(first), as_waveform(second)
    channels = max(first.shape[0], second.shape[0])
    if min(first.shape[0], second.shape[0]) not in (1, channels):
        raise ValueError(f"Sound of {first.shape[0]} and of {second.shape[0]} channels cannot be joined: mix it first.")
    first, second = first.expand(channels, -1), second.expand(channels, -1)
    if not 0 <= overlap <= min(first.shape[1], second.shape[1]):
        raise ValueError(
            f"Sounds of {first.shape[1]} and {second.shape[1]} samples cannot overlap by {overlap}: give fewer."
        )
    before = first.shape[1] - overlap
    if overlap == 0:
        return torch.cat([first, second], dim=1), before
    old, new = first[:, before:], second[:, :overlap]
    fade = min(overlap, max(2, round(FADE_SECONDS * rate)))
    begin = _quietest(old, new, fade)
    window = slice(begin, begin + fade)
    mixed = crossfade(old[:, window], new[:, window])
    joined = [first[:, : before + begin], mixed, second[:, begin + fade :]]
    return torch.cat(joined, dim=1), before + begin + fade // 2


def crossfade(old: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
    """From ``old`` to ``new``, both (C, n), at constant power whatever they have in common."""
    angle = (torch.arange(old.shape[1], dtype=torch.float64) + 0.5) * (math.pi / 2 / old.shape[1])
    out, into = angle.cos(), angle.sin()
    alike = _correlation(old, new)
    weight = (1 + 2 * alike * out * into).rsqrt()
    return (old * (out * weight) + new * (into * weight)).float()


def _correlation(old: torch.Tensor, new: torch.Tensor) -> float:
    """0 for two sounds that have nothing in common, 1 for the same. Opposite ones count as the former: no fade of them
    keeps the power without a blast."""
    power = float(old.double().square().sum() * new.double().square().sum()) ** 0.5
    return 0.0 if power == 0 else min(1.0, max(0.0, float((old.double() * new.double()).sum()) / power))


def _quietest(old: torch.Tensor, new: torch.Tensor, length: int) -> int:
    """Where the ``length`` samples begin in which both together have the least energy; of equals the middle one."""
    energy = (old.double().square() + new.double().square()).sum(dim=0)
    sums = torch.nn.functional.pad(energy.cumsum(0), (1, 0))
    windows = sums[length:] - sums[:-length]
    least = windows.min()
    quiet = (windows <= least + 1e-12 * float(sums[-1])).nonzero().flatten()
    return int(quiet[len(quiet) // 2])
