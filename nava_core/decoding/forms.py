"""The forms in which a picture is decoded, the memory that each takes, and the first of them that there is memory for.

The Wan2.2 decoder takes a latent frame at a time and remembers, for each convolution, two frames of what came before:
its memory does not grow with the clip. Whole frames come in three forms of the same numbers: as the network runs them,
with its wide half on one frame at a time, and with what it remembers kept in RAM. Tiles need least and leave seams.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from ..geometry import FRAMES_PER_LATENT, PIXELS_PER_LATENT, frames_of_latents

TILE, OVERLAP = 256, 64  # pixels
SMALLEST_TILE = 128  # below it most of a tile is overlap
ROUND = 16  # latent frames that tiles are decoded for at a time where the clip is too long for one round
MARGIN = 1.15  # of free memory over what is counted: for the allocator's gaps and the kernels' workspaces
CHOICES = ("auto", "whole", "tiled")


@dataclass(frozen=True)
class DecodeForm:
    """How a picture is decoded.

    ``tile``: side in pixels of the squares that are decoded by themselves, ``overlap`` what they share at least; 0:
    whole frames. ``single``: the wide half of the decoder works on one frame at a time instead of four, which gives the
    same numbers up to rounding. ``in_ram``: what the convolutions remember waits in RAM. ``on_cpu``: away from the GPU.
    """

    tile: int = 0
    overlap: int = 0
    single: bool = False
    in_ram: bool = False
    on_cpu: bool = False

    def __str__(self) -> str:
        name = f"tiles of {self.tile} pixels" if self.tile else "whole frames"
        if self.single:
            name += ", one at a time"
        if self.in_ram:
            name += ", what is remembered between them in RAM"
        return f"{name}, on the CPU" if self.on_cpu else name


WHOLE = DecodeForm()
BY_FRAME = DecodeForm(single=True)
BY_FRAME_IN_RAM = DecodeForm(single=True, in_ram=True)


@dataclass(frozen=True)
class Decoding:
    """How the user wants pictures decoded.

    ``choice``: "auto" takes the first form that there is memory for: whole frames in the three forms of equal numbers,
    then tiles. "whole" takes whole frames in one of the three, "tiled" tiles; where memory ends while they work, these
    too fall to a smaller form. ``tile`` and ``overlap`` in pixels are of the tiles, rounded to latents of 16. Raises
    ValueError for another choice, for tiles below 64 pixels and an overlap of more than half a tile.
    """

    choice: str = CHOICES[0]
    tile: int = TILE
    overlap: int = OVERLAP

    def __post_init__(self) -> None:
        if self.choice not in CHOICES:
            raise ValueError(f"Decoding is one of {', '.join(CHOICES)}; got {self.choice!r}.")
        if self.tile < 4 * PIXELS_PER_LATENT:
            raise ValueError(f"Tiles of {self.tile} pixels are too small: at least {4 * PIXELS_PER_LATENT} are needed.")
        if not 0 <= self.overlap <= self.tile // 2:
            raise ValueError(
                f"Tiles of {self.tile} pixels can overlap by 0 to {self.tile // 2} pixels, not {self.overlap}."
            )

    def forms(
        self, rows: int, columns: int, needed: Callable[[DecodeForm], int], *, on_gpu: bool
    ) -> tuple[DecodeForm, ...]:
        """The forms for a latent frame of ``rows`` x ``columns``, in the order in which they are tried.

        ``needed`` tells the bytes that a form takes on the device: each takes less than the one before. On a GPU whole
        frames may leave it in part for RAM; what does not fit in the smallest tiles is for the caller to refuse, or to
        do elsewhere.
        """
        whole = (WHOLE, BY_FRAME, BY_FRAME_IN_RAM) if on_gpu else (WHOLE, BY_FRAME)
        sizes = [self.tile]
        while sizes[-1] // 2 >= SMALLEST_TILE:
            sizes.append(sizes[-1] // 2)
        tiles = [DecodeForm(size, min(self.overlap, size // 2)) for size in sizes]
        if self.choice == "tiled":
            return tuple(tiles)
        found = list(whole)
        for form in tiles:  # of a small picture, a tile can be more than the last of the whole forms
            if needed(form) < needed(found[-1]):
                found.append(form)
        return tuple(found)


def choose_form(
    decoding: Decoding, forms: Sequence[DecodeForm], fits: Callable[[DecodeForm], bool]
) -> tuple[DecodeForm, ...]:
    """``forms`` from the first on that ``fits``; where whole frames were asked for, one of whole frames comes first."""
    for index, form in enumerate(forms):
        following = forms[index + 1] if index + 1 < len(forms) else None
        last_whole = decoding.choice == "whole" and not form.tile and (following is None or following.tile)
        if following is None or last_whole or fits(form):
            return tuple(forms[index:])
    raise ValueError("There is no form to decode in.")


# ---------------------------------------------------------------- tiles


def tile_side(form: DecodeForm, length: int) -> int:
    """A tile's side along one of ``length`` latents, in latents."""
    return min(form.tile // PIXELS_PER_LATENT, length) if form.tile else length


def tile_places(length: int, form: DecodeForm) -> list[int]:
    """Where tiles begin along a side of ``length`` latents: as few as cover it with their overlap, spread evenly."""
    side = tile_side(form, length)
    stride = max(1, side - form.overlap // PIXELS_PER_LATENT)
    count = math.ceil((length - side) / stride) + 1
    return [round(index * (length - side) / max(count - 1, 1)) for index in range(count)]


# ---------------------------------------------------------------- memory


@dataclass(frozen=True)
class DecoderCounts:
    """Values that a decoder holds at its peak, for each pixel of a frame and channel of its last level, beside weights:
    ``whole``, ``single``, ``in_ram`` in the forms of these names, and ``remembered`` of them from frame to frame."""

    whole: float
    single: float
    in_ram: float
    remembered: float

    def device_bytes(self, form: DecodeForm, rows: int, columns: int, width: int, dtype: torch.dtype) -> int:
        """Bytes that latent frames of ``rows`` x ``columns`` take on the device in ``form``, for a decoder whose last
        level has ``width`` channels of ``dtype``; constant in the clip's length."""
        values = self.in_ram if form.in_ram else self.single if form.single else self.whole
        rows, columns = tile_side(form, rows), tile_side(form, columns)
        return math.ceil(MARGIN * values * pixels(rows, columns) * width * dtype.itemsize)

    def ram_bytes(self, form: DecodeForm, shape: Sequence[int], width: int, dtype: torch.dtype) -> int:
        """Bytes of RAM that a latent of ``shape`` (..., frames, rows, columns) takes in ``form``, beside the
        frames that are handed out; constant from some length on."""
        rows, columns = shape[-2:]
        if form.tile:
            return round_of(form, shape, self.remembered_bytes(form, rows, columns, width, dtype))[1]
        return self.remembered_bytes(form, rows, columns, width, dtype) if form.in_ram else 0

    def remembered_bytes(self, form: DecodeForm, rows: int, columns: int, width: int, dtype: torch.dtype) -> int:
        """Bytes that all tiles, or whole frames, leave to be remembered between latent frames."""
        places = tile_places(rows, form), tile_places(columns, form)
        one = pixels(tile_side(form, rows), tile_side(form, columns)) * self.remembered * width * dtype.itemsize
        return math.ceil(len(places[0]) * len(places[1]) * one)


def pixels(rows: int, columns: int) -> int:
    return rows * columns * PIXELS_PER_LATENT**2


def round_of(form: DecodeForm, shape: Sequence[int], remembered: int) -> tuple[int, int]:
    """Latent frames that tiles are decoded for at a time, and the RAM that this takes.

    All of them, so that a tile is done with when the next begins, while the frames of the clip take no more RAM than
    what all tiles remember and the frames of a round; else rounds, between which the tiles' memories wait in RAM.
    """
    latents, rows, columns = shape[-3:]
    frame = pixels(rows, columns) * 3 * torch.float32.itemsize
    whole, rounds = frames_of_latents(latents) * frame, remembered + ROUND * FRAMES_PER_LATENT * frame
    return (latents, whole) if whole <= rounds else (ROUND, rounds)
