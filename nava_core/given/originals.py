"""What of a finished clip comes out as it was given: its own frames and samples, not their way through the VAEs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from ..geometry import PIXELS_PER_LATENT
from ..media import as_waveform, fit_length
from ..timbre.resample import resample
from .frames import kept_as
from .sound import GivenSound, Span, covers

FADE_SECONDS = 0.02  # of made sound beside given sound
FADE_PIXELS = 8  # of made picture beside a region that is given


@dataclass(frozen=True, eq=False)
class Originals:
    """The given parts of a clip as they were given.

    ``frames`` (F, H, W, 3), floats in 0..1 or uint8, and ``kept_frames`` (F,) bool, those of them that come out as they
    are; of the others ``kept_blocks`` (F, H / 16, W / 16) bool, the latents' squares of pixels that do.
    ``waveform`` (C, N), as long as the clip, at ``sample_rate``; of it ``kept_sound``, spans (begin, end) in
    seconds, comes out sample for sample. What it has beside them is only what made sound fades to and from: the
    original going on, or silence.
    """

    frames: torch.Tensor | None = None
    kept_frames: torch.Tensor | None = None
    kept_blocks: torch.Tensor | None = None
    waveform: torch.Tensor | None = None
    sample_rate: int = 0
    kept_sound: tuple[Span, ...] = ()

    @classmethod
    def of_sound(cls, sound: GivenSound) -> Originals:
        """Of a recording laid into the clip: where it is cut off, made sound fades over from its continuation."""
        heard, _ = sound.to_encode()
        return cls().with_sound(heard[:, : sound.waveform.shape[1]], sound.sample_rate, sound.spans)

    def with_sound(self, waveform: torch.Tensor, sample_rate: int, spans: Sequence[Span] | None = None) -> Originals:
        """These with a clip's sound (C, N) of which ``spans`` are kept, by default all, in place of their own."""
        samples = as_waveform(waveform)
        whole = ((0.0, samples.shape[1] / sample_rate),)
        kept = whole if spans is None else tuple(spans)
        return replace(self, waveform=samples, sample_rate=int(sample_rate), kept_sound=kept)

    def with_frames(self, frames: torch.Tensor, kept: torch.Tensor | None = None) -> Originals:
        """These with a clip's frames (F, H, W, 3) of which ``kept`` (F,) bool are kept, by default all."""
        kept = torch.ones(len(frames), dtype=torch.bool) if kept is None else torch.as_tensor(kept).bool().cpu()
        if kept.shape != (len(frames),):
            raise ValueError(f"{len(frames)} frames were given and {tuple(kept.shape)} of which to keep.")
        return replace(self, frames=kept_as(frames), kept_frames=kept, kept_blocks=None)

    # ------------------------------------------------------------ questions

    @property
    def has_all_frames(self) -> bool:
        """Whether every frame is given, so that none need be decoded."""
        return self.frames is not None and bool(self.kept_frames.all())

    @property
    def has_all_sound(self) -> bool:
        """Whether all sound is given, so that none need be decoded."""
        if self.waveform is None:
            return False
        return covers(self.kept_sound, self.waveform.shape[1] / self.sample_rate, self.sample_rate)

    # ------------------------------------------------------------ into the clip

    def put_frames(self, decoded: torch.Tensor, first: int = 0) -> torch.Tensor:
        """Decoded frames (f, H, W, 3) in 0..1, the first being the clip's frame ``first``, with kept ones and kept
        regions of others exact: written into ``decoded``.

        What is made fades into a kept region within its first 8 pixels. Raises ValueError for frames of another size
        than the given ones.
        """
        if self.frames is None:
            return decoded
        last = min(first + len(decoded), len(self.frames))
        kept, blocks = self.kept_frames[first:last], None if self.kept_blocks is None else self.kept_blocks[first:last]
        some = kept if blocks is None else kept | blocks.flatten(1).any(dim=1)
        if not bool(some.any()):
            return decoded
        if decoded.shape[1:] != self.frames.shape[1:]:
            (height, width), (tall, wide) = decoded.shape[1:3], self.frames.shape[1:3]
            raise ValueError(f"The clip is {width}x{height} and the frames given for it are {wide}x{tall}: fit them.")
        for index in some.nonzero().flatten().tolist():
            frame = _floats(self.frames[first + index]).to(decoded)
            decoded[index] = frame if kept[index] else _with_region(decoded[index], frame, blocks[index])
        return decoded

    def put_sound(self, decoded: torch.Tensor | None, rate: int) -> tuple[torch.Tensor | None, int]:
        """The clip's (waveform (C, N), rate) from its ``decoded`` sound (2, N) at ``rate``, with kept spans exact.

        Where anything is kept it is as long as the given sound and at that one's rate; all kept: the given sound, and
        ``decoded`` may be None. Made sound fades over to given sound within 20 ms outside of it. Raises ValueError
        where some sound is made but not ``decoded``.
        """
        if self.has_all_sound:
            return self.waveform, self.sample_rate
        if self.waveform is None or not self.kept_sound:
            return decoded, rate
        if decoded is None:
            raise ValueError("Only a part of the clip's sound is given: decode the rest of it, too.")
        made = _at_rate(as_waveform(decoded), rate, self.sample_rate)
        channels = max(made.shape[0], self.waveform.shape[0])
        samples = self.waveform.shape[1]
        made = fit_length(made, samples).expand(channels, -1)
        given = self.waveform.expand(channels, -1)
        share = _made_share(self._sample_spans(), samples, round(FADE_SECONDS * self.sample_rate))
        mixed = made * (share * (math.pi / 2)).sin() + given * (share * (math.pi / 2)).cos()
        mixed = torch.where(share == 1, made, mixed)
        return torch.where(share == 0, given, mixed), self.sample_rate

    def _sample_spans(self) -> list[tuple[int, int]]:
        length = self.waveform.shape[1]
        found = ((round(begin * self.sample_rate), round(end * self.sample_rate)) for begin, end in self.kept_sound)
        return sorted((max(0, begin), min(length, end)) for begin, end in found if end > begin)

    # ------------------------------------------------------------ more of them, fewer of them

    def merged(self, other: Originals) -> Originals:
        """These and ``other``'s, which come first where both keep the same.

        Raises ValueError for frames or sounds that do not go together.
        """
        return self._merged_frames(other)._merged_sound(other)

    def _merged_frames(self, other: Originals) -> Originals:
        if other.frames is None or self.frames is None:
            both = self if other.frames is None else other
            return replace(self, frames=both.frames, kept_frames=both.kept_frames, kept_blocks=both.kept_blocks)
        if self.frames.shape != other.frames.shape:
            raise ValueError(
                f"Frames {tuple(self.frames.shape)} and {tuple(other.frames.shape)} were given for one clip: "
                "they must have one size and number."
            )
        mine, theirs = self.frames, other.frames
        if mine.dtype != theirs.dtype:
            mine, theirs = _floats(mine), _floats(theirs)
        where = other.kept_frames[:, None, None]
        if other.kept_blocks is not None:
            where = where | _pixels(other.kept_blocks)
        merged = self.with_frames(torch.where(where[..., None], theirs, mine), self.kept_frames | other.kept_frames)
        blocks = [each.kept_blocks for each in (self, other) if each.kept_blocks is not None]
        return replace(merged, kept_blocks=None if not blocks else torch.stack(blocks).any(dim=0))

    def _within_blocks(self, keep: torch.Tensor) -> Originals:
        there = self.kept_frames[:, None, None]
        if self.kept_blocks is not None:
            there = there | self.kept_blocks
        blocks = there & keep
        whole = blocks.flatten(1).all(dim=1)
        is_partly = bool((blocks & ~whole[:, None, None]).any())
        return replace(self, kept_frames=whole, kept_blocks=blocks if is_partly else None)

    def _merged_sound(self, other: Originals) -> Originals:
        if other.waveform is None:
            return self
        if self.waveform is None or not self.kept_sound or other.has_all_sound:
            return self.with_sound(other.waveform, other.sample_rate, other.kept_sound)
        if (self.sample_rate, self.waveform.shape[1]) != (other.sample_rate, other.waveform.shape[1]):
            raise ValueError(
                f"Sounds of {self.sample_rate} and {other.sample_rate} Hz, {self.waveform.shape[1]} and "
                f"{other.waveform.shape[1]} samples, cannot both stay as they are in one clip: resample one of them."
            )
        channels = max(self.waveform.shape[0], other.waveform.shape[0])
        waveform = self.waveform.expand(channels, -1).clone()
        for begin, end in other._sample_spans():
            waveform[:, begin:end] = other.waveform[:, begin:end]
        return self.with_sound(waveform, self.sample_rate, _union((*self.kept_sound, *other.kept_sound)))

    def within(
        self,
        keep_video_mask: torch.Tensor | None = None,
        keep_sound_spans: Sequence[Span] | None = None,
        keep_blocks: torch.Tensor | None = None,
    ) -> Originals:
        """These where they are kept by the masks, too: (F,) bool of the frames, spans in seconds of the sound, and
        (F, H / 16, W / 16) bool of regions of the frames; None leaves them as they are."""
        found = self
        if self.frames is not None and keep_video_mask is not None:
            keep = torch.as_tensor(keep_video_mask).bool().cpu()
            blocks = None if self.kept_blocks is None else self.kept_blocks & keep[:, None, None]
            found = replace(found, kept_frames=self.kept_frames & keep, kept_blocks=blocks)
        if self.frames is not None and keep_blocks is not None:
            found = found._within_blocks(torch.as_tensor(keep_blocks).bool().cpu())
        if keep_sound_spans is not None and self.waveform is not None:
            found = replace(found, kept_sound=_intersection(self.kept_sound, keep_sound_spans))
        return found


def _pixels(blocks: torch.Tensor) -> torch.Tensor:
    """(..., H / 16, W / 16) -> (..., H, W)."""
    return blocks.repeat_interleave(PIXELS_PER_LATENT, -2).repeat_interleave(PIXELS_PER_LATENT, -1)


def _with_region(made: torch.Tensor, given: torch.Tensor, blocks: torch.Tensor) -> torch.Tensor:
    """A made frame (H, W, 3) with the given one where ``blocks`` (H / 16, W / 16) says so, and fading around that."""
    kept = _pixels(blocks)
    reach = share = kept[None, None].float()
    for _ in range(FADE_PIXELS - 1):
        reach = torch.nn.functional.max_pool2d(reach, 3, stride=1, padding=1)
        share = share + reach
    share = (share[0, 0] / FADE_PIXELS)[..., None].to(made)
    return torch.where(kept[..., None].to(made.device), given, share * given + (1 - share) * made)


def _floats(frames: torch.Tensor) -> torch.Tensor:
    return frames.float() / 255 if frames.dtype == torch.uint8 else frames


def _at_rate(waveform: torch.Tensor, rate: int, wanted: int) -> torch.Tensor:
    return waveform if rate == wanted else torch.stack([resample(channel, rate, wanted) for channel in waveform])


def _made_share(spans: Sequence[tuple[int, int]], samples: int, fade: int) -> torch.Tensor:
    """(samples,): 0 within the spans, 1 more than ``fade`` samples away from them, straight between."""
    place = torch.arange(samples)
    away = torch.full((samples,), fade + 1, dtype=torch.long)
    for begin, end in spans:
        away = torch.minimum(away, torch.maximum(begin - place, place - end + 1).clamp(min=0))
    return away.float() / (fade + 1)


def _union(spans: Sequence[Span]) -> tuple[Span, ...]:
    found: list[Span] = []
    for begin, end in sorted(spans):
        if found and begin <= found[-1][1]:
            found[-1] = (found[-1][0], max(end, found[-1][1]))
        else:
            found.append((begin, end))
    return tuple(found)


def _intersection(spans: Sequence[Span], others: Sequence[Span]) -> tuple[Span, ...]:
    pairs = ((max(a, c), min(b, d)) for a, b in spans for c, d in others)
    return _union([(begin, end) for begin, end in pairs if end > begin])
