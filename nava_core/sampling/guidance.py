"""How the network's predictions under different conditions are combined into the velocity to follow.

The predictions go by one letter each:

    c   conditional: the text and the voices
    u   text-null: the negative text, no voices
    m   alignment-null: the text, no voices, cross-modal interaction off
    n   timbre-null: the text, no voices
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch

PREDICTIONS = ("c", "u", "m", "n")
TERMS = ("video_text", "video_align", "audio_text", "audio_align", "audio_timbre")

NEVER = (-1.0, -1.0)  # an interval with no noise level in it

Pair = tuple[torch.Tensor | None, torch.Tensor | None]


@dataclass(frozen=True)
class Direction:
    """One way to push a prediction: further from what the network says without something."""

    null: str  # the prediction that lacks it
    weight: float

    def delta(self, conditional, null):
        """``weight * (conditional - null)``"""
        return self.weight * (conditional - null)


@dataclass(frozen=True)
class Guidance:
    """Guidance scales of a clip and the noise levels they act at.

    Per modality, with alignment guidance on and off:

        on:   c + s_text (c - u) + s_align (c - m)
        off:  u + s_text (c - u)

    Audio with a voice and ``audio_timbre`` > 0 gets ``+ audio_timbre (c - n)``, and with alignment off its
    base is c + s_text (c - u). So with alignment on a scale of 0 switches a text term off, with alignment off
    it is 1. Alignment guidance sets picture and sound against each other: a clip of only one of them runs as
    if it were off.

    ``intervals`` gives a term, by the name of its scale, the noise levels it acts at, (highest, lowest)
    sigma, both included; a term without an entry acts at all of them. Outside its interval a term is dropped
    and the base stays c. Raises ValueError for scales that are negative or not finite, and for intervals that
    are not such.
    """

    alignment: bool = True
    video_text: float = 3.0
    video_align: float = 3.0
    audio_text: float = 2.0
    audio_align: float = 2.0
    audio_timbre: float = 3.0
    intervals: Mapping[str, tuple[float, float]] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        for term in TERMS:
            scale = getattr(self, term)
            if not math.isfinite(scale) or scale < 0:
                raise ValueError(f"The guidance scale {term} must be 0 or more; got {scale}.")
        object.__setattr__(self, "intervals", dict(self.intervals))
        for term, (highest, lowest) in self.intervals.items():
            if term not in TERMS:
                raise ValueError(f"There is no guidance term '{term}'; intervals can name {', '.join(TERMS)}.")
            if not highest >= lowest:
                raise ValueError(f"The interval of {term} must be (highest, lowest) sigma; got ({highest}, {lowest}).")

    def needed(self, sigma: float, has_voice: bool, has_video: bool = True, has_audio: bool = True) -> tuple[str, ...]:
        """The predictions that the terms acting at ``sigma`` use, in the order c, u, m, n; c always."""
        directions = []
        if has_video:
            directions += self.video_directions(sigma, has_audio)
        if has_audio:
            directions += self.audio_directions(sigma, has_voice, has_video)
        nulls = {direction.null for direction in directions}
        return tuple(name for name in PREDICTIONS if name == "c" or name in nulls)

    def making(self, video: bool, audio: bool) -> Guidance:
        """The same for a clip of which only these modalities are made: what pushes a given one is dropped, for it would
        be computed and thrown away. The given one is still there for the other's terms."""
        given = [name for name, made in (("video", video), ("audio", audio)) if not made]
        never = {term: NEVER for term in TERMS if term.partition("_")[0] in given}
        return replace(self, intervals={**self.intervals, **never}) if never else self

    def uses_text_null(
        self, sigmas: Sequence[float], has_voice: bool, has_video: bool = True, has_audio: bool = True
    ) -> bool:
        """Whether the negative text matters at any of these noise levels."""
        return any("u" in self.needed(sigma, has_voice, has_video, has_audio) for sigma in sigmas)

    def combine(self, predictions: Mapping[str, Pair], sigma: float, has_voice: bool) -> Pair:
        """The guided (video, audio) from the needed predictions, each a (video, audio) of its own.

        Any kind of number or tensor, velocity or x0. A modality that is None in ``predictions["c"]`` is
        absent and stays None. Raises KeyError where a needed prediction is missing.
        """
        video, audio = predictions["c"]
        has_video, has_audio = video is not None, audio is not None
        if has_video:
            video = _push(predictions, 0, self.video_directions(sigma, has_audio))
        if has_audio:
            audio = _push(predictions, 1, self.audio_directions(sigma, has_voice, has_video))
        return video, audio

    def video_directions(self, sigma: float, has_audio: bool = True) -> tuple[Direction, ...]:
        """What the picture's prediction c is pushed by at ``sigma``."""
        alignment = self.alignment and has_audio
        # u + s (c - u) is c + (s - 1) (c - u): the base is c either way.
        text = self.video_text if alignment else self.video_text - 1.0
        align = self.video_align if alignment else 0.0
        return self._acting(sigma, ("video_text", "u", text), ("video_align", "m", align))

    def audio_directions(self, sigma: float, has_voice: bool, has_video: bool = True) -> tuple[Direction, ...]:
        """What the sound's prediction c is pushed by at ``sigma``."""
        alignment = self.alignment and has_video
        timbre = self.audio_timbre if has_voice else 0.0
        text = self.audio_text if alignment or timbre > 0 else self.audio_text - 1.0
        align = self.audio_align if alignment else 0.0
        return self._acting(
            sigma, ("audio_text", "u", text), ("audio_align", "m", align), ("audio_timbre", "n", timbre)
        )

    def _acting(self, sigma: float, *terms: tuple[str, str, float]) -> tuple[Direction, ...]:
        return tuple(Direction(null, weight) for term, null, weight in terms if weight != 0 and self._open(term, sigma))

    def _open(self, term: str, sigma: float) -> bool:
        highest, lowest = self.intervals.get(term, (math.inf, -math.inf))
        return lowest <= sigma <= highest


# The conditional prediction c and no other, whatever the clip has: every term vanishes.
CONDITIONAL = Guidance(
    alignment=False, video_text=1.0, video_align=0.0, audio_text=1.0, audio_align=0.0, audio_timbre=0.0
)


def _push(predictions: Mapping[str, Pair], modality: int, directions: tuple[Direction, ...]):
    conditional = predictions["c"][modality]
    result = conditional
    for direction in directions:
        result = result + direction.delta(conditional, predictions[direction.null][modality])
    return result
