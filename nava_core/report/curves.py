"""A clip's picture as curves: read once, some frames at a time, and made small; no more is kept of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from .faults import not_finite
from .sync import accent_strength, block_flow

LONG_SIDE = 192  # pixels of the small picture that everything is measured in
BLOCK = 16  # of its pixels
CHUNK = 8  # frames at a time
THUMBNAILS = 10
LUMA = (0.2126, 0.7152, 0.0722)  # BT.709


@dataclass(frozen=True, eq=False)
class PictureCurves:
    """What is kept of F frames.

    ``brightness`` (F,) mean luma in 0..1; ``differences`` and ``changes`` (F - 1,): mean change of luma from each frame
    to the next, and that of the block that changed most; ``motion`` (F - 1,): mean length of the flow, in percent of
    the picture's longer side a frame; ``accents`` (F,): see :func:`accent_strength`; ``thumbnails`` (n, h, w, 3) uint8,
    evenly from the first frame to the last; ``not_finite``: how many values were NaN or infinite.
    """

    brightness: torch.Tensor
    differences: torch.Tensor
    changes: torch.Tensor
    motion: torch.Tensor
    accents: torch.Tensor
    thumbnails: torch.Tensor
    not_finite: int


def picture_curves(frames: torch.Tensor, step: Callable[[], None] = lambda: None) -> PictureCurves:
    """The curves of ``frames`` (F, H, W, 3), uint8 or floats in 0..1; ``step()`` runs before every 8 frames.

    Memory does not grow with the size of the frames. Values that are not finite count as black.
    """
    wanted = set(torch.linspace(0, len(frames) - 1, min(THUMBNAILS, len(frames))).round().int().tolist())
    brightness, differences, changes, flows, thumbnails = [], [], [], [], []
    broken, last, done = 0, None, 0
    shrink = _Shrinker(*frames.shape[1:3])
    for chunk in frames.split(CHUNK):
        step()
        broken += sum(not_finite(frame) for frame in chunk)
        small = shrink(chunk)
        thumbnails += [small[index].clone() for index in range(len(small)) if done + index in wanted]
        grey = (small * torch.tensor(LUMA)).sum(dim=-1)
        brightness.append(grey.mean(dim=(1, 2)))
        run = grey if last is None else torch.cat([last, grey])
        last, done = grey[-1:], done + len(chunk)
        if len(run) < 2:
            continue
        change = (run[1:] - run[:-1]).abs()
        differences.append(change.mean(dim=(1, 2)))
        changes.append(torch.nn.functional.avg_pool2d(change[:, None], BLOCK, ceil_mode=True).flatten(1).amax(dim=1))
        flows.append(block_flow(run[:-1], run[1:]))
    nothing = torch.zeros(0)
    flow, difference = torch.cat(flows or [torch.zeros(0, 1, 2)]), torch.cat(differences or [nothing])
    return PictureCurves(
        brightness=torch.cat(brightness),
        differences=difference,
        changes=torch.cat(changes or [nothing]),
        motion=100 * flow.norm(dim=-1).mean(dim=1) / max(last.shape[1:]),
        accents=accent_strength(flow, difference) if len(flow) > 1 else torch.zeros(done),
        thumbnails=(torch.stack(thumbnails) * 255).round().to(torch.uint8),
        not_finite=broken,
    )


class _Shrinker:
    """Makes frames small one by one, in one buffer: memory for many large ones would be left in pieces."""

    def __init__(self, height: int, width: int) -> None:
        self.size = small_size(height, width)
        self.buffer = torch.empty(1, 3, height, width)

    def __call__(self, frames: torch.Tensor) -> torch.Tensor:
        """Frames (f, H, W, 3) in 0..1 as (f, h, w, 3) fp32, each pixel the mean of those it stands for."""
        return torch.stack([self._small(frame) for frame in frames])

    def _small(self, frame: torch.Tensor) -> torch.Tensor:
        self.buffer.copy_(frame[..., :3].detach().movedim(-1, 0))
        if frame.is_floating_point():
            self.buffer.nan_to_num_(0.0, 0.0, 0.0).clamp_(0, 1)
        else:
            self.buffer.div_(255)
        return torch.nn.functional.interpolate(self.buffer, self.size, mode="area")[0].movedim(0, -1).contiguous()


def small_size(height: int, width: int) -> tuple[int, int]:
    """(height, width) of the picture that is measured: at most 192 pixels long, never larger than it is."""
    scale = min(1.0, LONG_SIDE / max(height, width))
    return max(1, round(height * scale)), max(1, round(width * scale))
