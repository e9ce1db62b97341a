"""Frames out of a causal video VAE as they come: whole, latent frame by latent frame, or in tiles.

The networks of diffusers and of ComfyUI are driven alike, through :class:`FrameDecoder`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import torch

from ..geometry import PIXELS_PER_LATENT, frames_of_latents
from .forms import DecodeForm, DecoderCounts, round_of, tile_places, tile_side

PATCH = 2  # pixels a side that the decoder's last layer gives as channels

Step = Callable[[int, int], None]


class FrameMemory(dict):
    """What each convolution remembers of the frames before, by its number; None where there is nothing yet.

    ``home``: where it waits between passes; None: where it was made. The networks bring it back where they work.
    """

    def __init__(self, home: torch.device | None = None) -> None:
        super().__init__()
        self.home = home

    def __missing__(self, _: int) -> None:
        return None

    def __setitem__(self, number: int, value: Any) -> None:
        if self.home is not None and torch.is_tensor(value):
            value = value.to(self.home)
        super().__setitem__(number, value)

    def move(self, device: torch.device) -> None:
        for number, value in self.items():
            if torch.is_tensor(value):
                super().__setitem__(number, value.to(device))


class FrameDecoder(Protocol):
    """A network as it is driven here."""

    device: torch.device
    counts: DecoderCounts
    width: int  # channels of the last level
    dtype: torch.dtype

    def begin(self, latent: torch.Tensor) -> torch.Tensor:
        """A latent (1, 48, T, H, W) made ready, where it was."""

    def frames(self, latent: torch.Tensor, memory: FrameMemory, *, first: bool, single: bool) -> torch.Tensor:
        """One ready latent frame (1, 48, 1, H, W) -> frames (4, 16 H, 16 W, 3) in 0..1, of the first (1, ...), fp32 in
        RAM or wherever the result is wanted."""


def in_single_frames(levels: Sequence[Callable], wide: int, latent: torch.Tensor, memory: FrameMemory) -> torch.Tensor:
    """One latent frame, not the first, through ``levels``, those from ``wide`` on one frame at a time.

    A level is called with what the one before gave, the memory and a list of the number of its first convolution, to
    which it adds those that it has. Equal to all levels at once up to the order of sums: the convolutions take what
    they need of earlier frames from the memory.
    """
    number = [0]
    for level in levels[:wide]:
        latent = level(latent, memory, number)
    begin, parts = number[0], list(latent.split(1, dim=2))
    done = []
    while parts:
        part, number = parts.pop(0), [begin]
        for level in levels[wide:]:
            part = level(part, memory, number)
        done.append(part)
    return torch.cat(done, dim=2)


def with_memory(convolution: Callable, frames: torch.Tensor, memory: FrameMemory, number: list[int]) -> torch.Tensor:
    """A causal convolution (called with its input and the frames before it) on ``frames``, which it then remembers."""
    before = memory[number[0]]
    kept = frames[:, :, -2:].clone()
    if before is not None and kept.shape[2] < 2:
        kept = torch.cat([before[:, :, -1:].to(kept.device), kept], dim=2)
    result = convolution(frames, before)
    memory[number[0]] = kept
    number[0] += 1
    return result


def wide_level(time_scaling: Sequence[bool]) -> int:
    """The first level that works on all frames of a latent frame, of a decoder whose levels double time or not."""
    return 1 + max((level for level, doubles in enumerate(time_scaling) if doubles), default=-1)


def pixels_of(channels: torch.Tensor) -> torch.Tensor:
    """The decoder's output (1, 12, f, h, w) as a picture (f, 2 h, 2 w, 3), a view where that is possible."""
    frames, rows, columns = channels.shape[2:]
    parts = channels[0].unflatten(0, (3, PATCH, PATCH))  # channel, column and row in the patch
    return parts.permute(3, 4, 2, 5, 1, 0).reshape(frames, rows * PATCH, columns * PATCH, 3)


# ---------------------------------------------------------------- streams


@torch.no_grad()
def stream_frames(
    decoder: FrameDecoder, latent: torch.Tensor, form: DecodeForm, step: Step | None = None, *, at_once: bool = False
) -> Iterator[torch.Tensor]:
    """Latent (1, 48, T, H, W) -> its frames (4 T - 3, 16 H, 16 W, 3) in 0..1, in parts as they come.

    Whole frames come latent frame by latent frame, tiles in rounds of several latent frames, or with ``at_once`` in
    one part. ``step(done, total)`` is called before the first pass of the network and after each, and may raise. The
    memory taken on the device is constant in T, and so, from some T on, is the RAM beside the parts handed out.
    """
    ready = decoder.begin(latent)
    yield from (_tiles if form.tile else _whole)(decoder, ready, form, step or _no_step, at_once)


def _no_step(*_: int) -> None:
    pass


def _whole(decoder, ready, form, step, _) -> Iterator[torch.Tensor]:
    total = ready.shape[2]
    memory = FrameMemory(torch.device("cpu") if form.in_ram else None)
    step(0, total)
    for index in range(total):
        part = decoder.frames(ready[:, :, index : index + 1], memory, first=index == 0, single=form.single)
        step(index + 1, total)
        yield part


def _tiles(decoder, ready, form, step, at_once) -> Iterator[torch.Tensor]:
    """Tile by tile within a round: a tile's memory is on the device while it works, and waits in RAM for the next."""
    latents, rows, columns = ready.shape[2:]
    remembered = decoder.counts.remembered_bytes(form, rows, columns, decoder.width, decoder.dtype)
    span = latents if at_once else round_of(form, ready.shape, remembered)[0]
    tiles = [(top, left) for top in tile_places(rows, form) for left in tile_places(columns, form)]
    weights = _weights(rows, form), _weights(columns, form)
    memories: dict[tuple[int, int], FrameMemory] = {}
    done, total = 0, latents * len(tiles)
    step(0, total)
    for begin in range(0, latents, span):
        end = min(begin + span, latents)
        picture = None
        for place in tiles:
            memory = memories.pop(place, None) or FrameMemory()
            memory.move(decoder.device)
            weight = (weights[0][place[0]][:, None] * weights[1][place[1]])[..., None]
            for index in range(begin, end):
                part = decoder.frames(_cut(ready, index, place, form), memory, first=index == 0, single=form.single)
                if picture is None:
                    picture = part.new_zeros(_frames_between(begin, end), *_sides(rows, columns), 3)
                    weight = weight.to(part)
                _add(picture, part * weight, _frames_between(begin, index), place)
                done += 1
                step(done, total)
            if end < latents:
                memory.move(torch.device("cpu"))
                memories[place] = memory
        yield picture


def _frames_between(begin: int, end: int) -> int:
    """Frames of the latent frames from ``begin`` up to ``end``."""
    return (frames_of_latents(end) if end else 0) - (frames_of_latents(begin) if begin else 0)


def _sides(rows: int, columns: int) -> tuple[int, int]:
    return rows * PIXELS_PER_LATENT, columns * PIXELS_PER_LATENT


def _cut(ready: torch.Tensor, index: int, place: tuple[int, int], form: DecodeForm) -> torch.Tensor:
    (top, left), (rows, columns) = place, ready.shape[3:]
    height, width = tile_side(form, rows), tile_side(form, columns)
    return ready[:, :, index : index + 1, top : top + height, left : left + width]


def _add(picture: torch.Tensor, part: torch.Tensor, frame: int, place: tuple[int, int]) -> None:
    top, left = _sides(*place)
    picture[frame : frame + len(part), top : top + part.shape[1], left : left + part.shape[2]] += part


def _weights(length: int, form: DecodeForm) -> dict[int, torch.Tensor]:
    """By a tile's begin along a side, the share of each of its pixels: a ramp over what it has in common with its
    neighbours, such that the shares of all tiles at a pixel are 1."""
    places, side = tile_places(length, form), tile_side(form, length)
    shares = {}
    total = torch.zeros(length * PIXELS_PER_LATENT, dtype=torch.float64)
    for index, begin in enumerate(places):
        share = torch.ones(side * PIXELS_PER_LATENT, dtype=torch.float64)
        if index > 0:
            share = torch.minimum(share, _ramp(places[index - 1] + side - begin, side))
        if index + 1 < len(places):
            share = torch.minimum(share, _ramp(begin + side - places[index + 1], side).flip(0))
        shares[begin] = share
        total[begin * PIXELS_PER_LATENT :][: len(share)] += share
    return {
        begin: (share / total[begin * PIXELS_PER_LATENT :][: len(share)]).float() for begin, share in shares.items()
    }


def _ramp(common: int, side: int) -> torch.Tensor:
    """From 0 to 1 over the first ``common`` latents of ``side``, in pixels."""
    positions = torch.arange(side * PIXELS_PER_LATENT, dtype=torch.float64) + 0.5
    return (positions / (common * PIXELS_PER_LATENT)).clamp(max=1) if common > 0 else torch.ones_like(positions)
