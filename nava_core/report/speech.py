"""Who speaks when: speech found by its energy, and how much each part sounds like each reference voice."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch

Span = tuple[float, float]  # begin and end in seconds
Encode = Callable[[torch.Tensor, int], torch.Tensor]

STEP, WINDOW = 0.01, 0.03  # seconds from one level to the next, and of each
LOWEST, HIGHEST = 100.0, 4000.0  # Hz: where the energy of speech lies
FAINTEST = -50.0  # dBFS
BELOW_LOUD, ABOVE_FLOOR, SURELY = 25.0, 6.0, 12.0  # dB
LONGEST_GAP = 0.25  # seconds between syllables of one passage
SHORTEST = 0.2  # seconds
PAUSE_WEIGHT = 0.5  # how much a long pause counts, against the place where a cut is expected
LEVELS_AT_ONCE = 4096


@dataclass(frozen=True)
class SpokenSpan:
    """A speech span as it was found in the sound.

    ``begin`` and ``end`` in seconds; ``voice``: index of the reference that it was to be spoken with, None: without
    one; ``similarities``: cosine with each reference, -1..1.
    """

    begin: float
    end: float
    voice: int | None
    similarities: tuple[float, ...]

    @property
    def similarity(self) -> float | None:
        """With its own reference."""
        return None if self.voice is None else self.similarities[self.voice]

    @property
    def resembles(self) -> int:
        """The reference that it is nearest to."""
        return max(range(len(self.similarities)), key=self.similarities.__getitem__)


def speech_segments(waveform: torch.Tensor, sample_rate: int) -> list[Span]:
    """Where there is speech, or whatever else is loud between 100 Hz and 4 kHz: [(begin, end)] in seconds.

    ``waveform`` (C, N). A passage's level is within 25 dB of the loud parts (the 95th percentile) and 6 dB above the
    quiet ones (the 10th), gaps below 250 ms are filled, what is shorter than 200 ms is left out. Music and loud
    surroundings cannot be told from speech this way.
    """
    levels = _levels(waveform, sample_rate)
    loud, floor = (float(levels.quantile(part)) for part in (0.95, 0.1))
    threshold = max(FAINTEST, loud - BELOW_LOUD, min(floor + ABOVE_FLOOR, loud - SURELY))
    edges = torch.nn.functional.pad((levels > threshold).int(), (1, 1)).diff()
    begins, ends = (edges == 1).nonzero().flatten().tolist(), (edges == -1).nonzero().flatten().tolist()
    segments: list[list[float]] = []
    for begin, end in zip(begins, ends, strict=True):
        if segments and (begin * STEP - segments[-1][1]) < LONGEST_GAP:
            segments[-1][1] = end * STEP
        else:
            segments.append([begin * STEP, end * STEP])
    seconds = waveform.shape[1] / sample_rate
    return [(begin, min(end, seconds)) for begin, end in segments if end - begin >= SHORTEST]


def _levels(waveform: torch.Tensor, sample_rate: int) -> torch.Tensor:
    """dBFS every 10 ms of the part of the sound where speech lies."""
    size = round(WINDOW * sample_rate)
    count = max(1, int(waveform.shape[1] / sample_rate / STEP))
    padded = torch.nn.functional.pad(waveform.float().mean(dim=0), (size // 2, size + round(STEP * sample_rate)))
    window = torch.hann_window(size)
    frequencies = torch.fft.rfftfreq(size, 1 / sample_rate)
    inside = ((frequencies >= LOWEST) & (frequencies <= HIGHEST)).float()
    starts = (torch.arange(count, dtype=torch.float64) * STEP * sample_rate).round().long()
    powers = []
    for part in starts.split(LEVELS_AT_ONCE):
        spectra = torch.fft.rfft(padded[part[:, None] + torch.arange(size)] * window).abs().square()
        powers.append(2 * (spectra * inside).sum(dim=1) / (size * float(window.square().sum())))
    return 10 * torch.log10(torch.cat(powers).clamp(min=1e-20))


def split_speech(segments: Sequence[Span], shares: Sequence[float]) -> list[list[Span]]:
    """The segments of each of ``len(shares)`` speech spans, in order: where it was said, by how long each should take.

    ``shares`` above 0, in any unit, such as the numbers of letters. Cuts are made in pauses, near where they are
    expected and rather in long ones; with too few pauses, within a segment at the expected place.
    """
    total = sum(end - begin for begin, end in segments)
    if not segments or len(shares) == 1:
        return [list(segments)] + [[] for _ in shares[1:]]
    wanted = [total * sum(shares[:count]) / sum(shares) for count in range(1, len(shares))]
    if len(segments) < len(shares):
        return _cut_at(segments, wanted)
    spoken, pauses, done = [], [], 0.0
    for (begin, end), (after, _) in pairwise(segments):
        done += end - begin
        spoken.append(done)
        pauses.append(after - end)
    cuts = _best_cuts(spoken, pauses, wanted, total)
    bounds = [0, *(cut + 1 for cut in cuts), len(segments)]
    return [list(segments[begin:end]) for begin, end in pairwise(bounds)]


def _best_cuts(spoken: list[float], pauses: list[float], wanted: list[float], total: float) -> list[int]:
    """A pause for each place that is wanted, in order, at the least cost."""
    longest = max(pauses)

    def cost(place: int, cut: int) -> float:
        return abs(spoken[cut] - wanted[place]) / total - PAUSE_WEIGHT * pauses[cut] / longest

    # best[cut]: (cost, cuts) of the places so far where the last one is that cut
    best = {cut: (cost(0, cut), [cut]) for cut in range(len(pauses))}
    for place in range(1, len(wanted)):
        best = {
            cut: (before[0] + cost(place, cut), [*before[1], cut])
            for cut in range(place, len(pauses))
            for before in [min(best[last] for last in best if last < cut)]
        }
    return min(best.values())[1]


def _cut_at(segments: Sequence[Span], wanted: list[float]) -> list[list[Span]]:
    """Segments cut after so many seconds of speech."""
    groups, done = [[] for _ in range(len(wanted) + 1)], 0.0
    limits = [0.0, *wanted, math.inf]
    for begin, end in segments:
        for index in range(len(groups)):
            low, high = max(0.0, limits[index] - done), min(end - begin, limits[index + 1] - done)
            if high > low:
                groups[index].append((begin + low, begin + high))
        done += end - begin
    return groups


def compare_voices(
    waveform: torch.Tensor,
    sample_rate: int,
    groups: Sequence[Sequence[Span]],
    binding: Sequence[int | None],
    voices: Sequence[torch.Tensor],
    encode: Encode,
    step: Callable[[], None] = lambda: None,
) -> list[SpokenSpan | None]:
    """How each speech span sounds beside each reference; None for a span that was not found.

    ``groups``: the segments of each span in ``waveform`` (C, N); ``binding``: the reference of each, None for none;
    ``voices``: embeddings (1, n); ``encode(waveform (C, N), sample_rate)`` gives such an embedding of the sound, as
    ``partial(encode_timbre, encoder)``. ``step()`` runs before each span.
    """
    found: list[SpokenSpan | None] = []
    for segments, voice in zip(groups, binding, strict=True):
        step()
        if not segments:
            found.append(None)
            continue
        places = [(round(begin * sample_rate), round(end * sample_rate)) for begin, end in segments]
        spoken = encode(torch.cat([waveform[:, begin:end] for begin, end in places], dim=1), sample_rate)
        similarities = tuple(_cosine(spoken, each) for each in voices)
        found.append(SpokenSpan(segments[0][0], segments[-1][1], voice, similarities))
    return found


def came_in_order(spans: Sequence[SpokenSpan | None]) -> bool | None:
    """Whether each span with a reference resembles its own most. None where there is nothing to mix up: fewer than two
    spans with different references were found."""
    bound = [span for span in spans if span is not None and span.voice is not None]
    if len({span.voice for span in bound}) < 2:
        return None
    return all(span.resembles == span.voice for span in bound)


def _cosine(first: torch.Tensor, second: torch.Tensor) -> float:
    return float(torch.nn.functional.cosine_similarity(first.flatten().float(), second.flatten().float(), dim=0))
