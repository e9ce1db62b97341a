"""Where given pictures stand in a clip: which of its latents they fill, and what is encoded to get these."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..geometry import FPS, FRAMES_PER_LATENT, latents_of_frames

LEAD_IN = 1 + 3 * FRAMES_PER_LATENT  # frames before pictures that do not begin the clip: four latents


@dataclass(frozen=True)
class Stretch:
    """``pictures[i]`` is the number of the picture that is given at frame ``first_frame + i`` of the clip.

    These frames are the latent frames ``latents`` of the clip. To get them, encode the pictures numbered ``to_encode``
    as a clip of their own and leave out its first ``skip`` latents: see :meth:`taken`. ``is_held``: there was no whole
    latent to give, and a picture stands still in one.
    """

    latents: slice
    first_frame: int
    pictures: tuple[int, ...]
    to_encode: tuple[int, ...]
    skip: int
    notes: tuple[str, ...] = ()
    is_held: bool = False

    @property
    def frames(self) -> slice:
        return slice(self.first_frame, self.first_frame + len(self.pictures))

    def taken(self, latent: torch.Tensor) -> torch.Tensor:
        """The clip's latents from the latent (1, 48, t, H, W) of the pictures ``to_encode``."""
        return latent[:, :, self.skip :]


def place_pictures(count: int, first_frame: int, clip_frames: int) -> Stretch:
    """``count`` pictures that follow one another, the first of them at ``first_frame`` of a clip of ``clip_frames``.

    Only whole latents are given: frame 0, or four frames each, 4k - 3 to 4k. Pictures before the first whole one lead
    in to it, those after the last are left out, and what goes beyond the clip is cut; each of these is said in
    ``notes``. Where there is no whole latent, as with one picture in the middle of a clip, the latent that the picture
    is in is given, and it is held for its four frames. Away from the beginning a still lead-in goes before what is
    encoded, for the VAE packs the first frame of what it encodes alone, and such a latent means something else at
    another place. Raises ValueError for a place outside the clip.
    """
    if count < 1:
        raise ValueError("No picture was given: give one or more.")
    if not 0 <= first_frame < clip_frames:
        raise ValueError(
            f"The pictures would begin at {first_frame / FPS:.2f} s, but the clip has {clip_frames} frames, "
            f"{clip_frames / FPS:.2f} s: let them begin within it."
        )
    notes = []
    left = clip_frames - first_frame
    if count > left:
        notes.append(f"{_pictures(count - left)} cut: the clip ends before.")
        count = left
    if first_frame == 0:
        latents = latents_of_frames(count)
        used = range(FRAMES_PER_LATENT * (latents - 1) + 1)
        return Stretch(slice(0, latents), 0, tuple(used), tuple(used), 0, (*notes, *_left_out(count - len(used))))
    last_frame = first_frame + count - 1
    begin, end = -(-(first_frame + 3) // FRAMES_PER_LATENT), last_frame // FRAMES_PER_LATENT + 1
    held = begin >= end
    if held:
        begin, end = _latent_at(first_frame), _latent_at(last_frame) + 1
    start, stop = FRAMES_PER_LATENT * begin - 3, FRAMES_PER_LATENT * (end - 1) + 1
    numbers = [min(max(frame - first_frame, 0), count - 1) for frame in range(start - LEAD_IN, stop)]
    if held:
        span = f"{start / FPS:.2f} to {stop / FPS:.2f} s"
        notes.append(f"Held for the frames {start} to {stop - 1}, {span}: the latent knows no shorter time there.")
    else:
        notes += [*_lead_in(start - first_frame), *_left_out(last_frame + 1 - stop)]
    pictures = tuple(numbers[LEAD_IN:])
    return Stretch(slice(begin, end), start, pictures, tuple(numbers), latents_of_frames(LEAD_IN), tuple(notes), held)


def chosen(pictures: torch.Tensor, numbers: Sequence[int]) -> torch.Tensor:
    """The pictures (N, H, W, 3) of these numbers, without a copy where they are all of them."""
    if list(numbers) == list(range(len(pictures))):
        return pictures
    return pictures[list(numbers)]


def _latent_at(frame: int) -> int:
    return -(-frame // FRAMES_PER_LATENT)


def _left_out(count: int) -> list[str]:
    return [f"At the end {_pictures(count)} left out, for four make a latent."] if count else []


def _lead_in(count: int) -> list[str]:
    return [f"At the beginning {_pictures(count)} not given but lead in, for four make a latent."] if count else []


def _pictures(count: int) -> str:
    return "1 picture is" if count == 1 else f"{count} pictures are"
