"""Pictures as frames of a clip: their size and rate, and how far a clip drifts from one segment to the next."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import torch

from ..geometry import FPS, cover_crop

HOLDS = ("nothing", "colour", "colour and sharpness")
LUMA = (0.2126, 0.7152, 0.0722)
LEAST_SPREAD = 1e-3  # of a channel, below which there is no contrast to speak of
MOST_GAIN = 2.0  # by which contrast is changed
SAME_LEVEL, SAME_RATIO = 0.1 / 255, 2e-3  # what counts as no difference
BLURS = 8


def fit_frames(frames: torch.Tensor, width: int, height: int) -> torch.Tensor:
    """Frames (F, h, w, 3) scaled to cover ``width`` x ``height`` (Lanczos) and cropped to it from the middle.

    Floats in 0..1 give fp32, uint8 gives uint8. Frames of the right size are returned as they are, bit for bit.
    """
    if frames.ndim != 4 or frames.shape[-1] != 3 or 0 in frames.shape:
        raise ValueError(f"Frames are (frames, height, width, 3); got {tuple(frames.shape)}.")
    if tuple(frames.shape[1:3]) == (height, width):
        return frames
    import numpy
    from PIL import Image

    scaled, box = cover_crop(frames.shape[2], frames.shape[1], width, height)
    fitted = torch.empty(frames.shape[0], height, width, 3, dtype=torch.uint8)
    for index, frame in enumerate(frames):
        levels = frame if frame.dtype == torch.uint8 else (frame.float() * 255).clamp(0, 255).to(torch.uint8)
        picture = Image.fromarray(levels.cpu().numpy()).resize(scaled, Image.Resampling.LANCZOS).crop(box)
        fitted[index] = torch.from_numpy(numpy.array(picture))
    return fitted if frames.dtype == torch.uint8 else fitted.float() / 255


def resample_indices(count: int, fps: float | Fraction, target: float | Fraction = FPS) -> list[int]:
    """Of ``count`` frames at ``fps``, the one on screen at the time of each frame of a clip at ``target`` a second."""
    fps, target = (Fraction(rate).limit_denominator(100_000) for rate in (fps, target))
    if fps <= 0 or target <= 0:
        raise ValueError(f"Frame rates are above 0; got {float(fps):g} and {float(target):g}.")
    return [math.floor(index * fps / target) for index in range(math.ceil(count * target / fps))]


# ---------------------------------------------------------------- statistics


@dataclass(frozen=True, eq=False)
class Statistics:
    """Of frames in 0..1: ``mean`` and ``spread`` (standard deviation) of each channel, (3,), and ``sharpness``, the
    mean square of the luma's Laplacian; averages over the frames."""

    mean: torch.Tensor
    spread: torch.Tensor
    sharpness: float

    @classmethod
    def of(cls, frames: torch.Tensor) -> Statistics:
        """Of frames (F, H, W, 3) or of one, (H, W, 3): floats in 0..1 or uint8."""
        frames = frames if frames.ndim == 4 else frames[None]
        each = [_statistics(_floats(frame)) for frame in frames]
        mean, spread = (torch.stack([one[index] for one in each]).mean(dim=0) for index in (0, 1))
        return cls(mean, spread, sum(one[2] for one in each) / len(each))


def _statistics(frame: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, float]:
    pixels = frame.flatten(0, 1).double()
    return pixels.mean(dim=0), pixels.std(dim=0, unbiased=False), float(_laplacian(frame).square().mean())


def _floats(frame: torch.Tensor) -> torch.Tensor:
    return frame.float() / 255 if frame.dtype == torch.uint8 else frame.float()


def _laplacian(frame: torch.Tensor) -> torch.Tensor:
    """Of the luma (H, W, 3) -> (H - 2, W - 2), in float64."""
    luma = (frame.double() * frame.new_tensor(LUMA).double()).sum(dim=-1)
    around = luma[:-2, 1:-1] + luma[2:, 1:-1] + luma[1:-1, :-2] + luma[1:-1, 2:]
    return around - 4 * luma[1:-1, 1:-1]


# ---------------------------------------------------------------- drift


@dataclass(frozen=True)
class Drift:
    """How one picture differs from another: ``colour``, the mean absolute difference of the channels' means in levels
    of 8 bits; ``contrast`` and ``sharpness``, the ratios of spread and of the Laplacian's energy, 1 for the same."""

    colour: float
    contrast: float
    sharpness: float

    @classmethod
    def between(cls, later: Statistics, earlier: Statistics) -> Drift:
        return cls(
            float((later.mean - earlier.mean).abs().mean()) * 255,
            _ratio(float(later.spread.mean()), float(earlier.spread.mean())),
            _ratio(later.sharpness, earlier.sharpness),
        )

    def __str__(self) -> str:
        return f"colour off by {self.colour:.1f} levels, contrast x{self.contrast:.2f}, sharpness x{self.sharpness:.2f}"


@dataclass(frozen=True)
class Seam(Drift):
    """What changes from the frame before a seam to the one after it; ``drift``: from the clip's first frame to that."""

    drift: Drift | None = None

    def sentence(self) -> str:
        """The seam in a sentence."""
        since = "" if self.drift is None else f"; since the first frame {self.drift}"
        return f"Across the seam {self}{since}."


def seam(before_frame: torch.Tensor, after_frame: torch.Tensor, first_reference: torch.Tensor | None = None) -> Seam:
    """Measure a seam between two frames (H, W, 3), and the drift since ``first_reference``, a clip's first frame."""
    before, after = Statistics.of(before_frame), Statistics.of(after_frame)
    drift = None if first_reference is None else Drift.between(after, Statistics.of(first_reference))
    across = Drift.between(after, before)
    return Seam(across.colour, across.contrast, across.sharpness, drift)


def _ratio(later: float, earlier: float) -> float:
    """1 for two pictures without any; bounded where only the earlier one has none."""
    least = 1e-9
    return max(later, least) / max(earlier, least)


def hold_statistics(frame: torch.Tensor, reference: Statistics, what: str) -> torch.Tensor:
    """A frame (H, W, 3) with the colour, or the colour and the sharpness, of ``reference``.

    "colour": each channel gets the mean and the spread of the reference. "colour and sharpness": besides, a frame that
    is sharper is softened to the reference's; a softer one stays. "nothing", and a frame that does not differ: the
    frame itself, bit for bit. Others are fp32 in 0..1. Raises ValueError for another ``what``.
    """
    if what not in HOLDS:
        raise ValueError(f"What is held from segment to segment is one of {', '.join(HOLDS)}; got '{what}'.")
    if what == HOLDS[0]:
        return frame
    held = _hold_colour(frame, reference)
    return held if what == HOLDS[1] else _hold_sharpness(held, reference.sharpness)


def _hold_colour(frame: torch.Tensor, reference: Statistics) -> torch.Tensor:
    mean, spread, _ = _statistics(_floats(frame))
    gain = (reference.spread / spread.clamp(min=LEAST_SPREAD)).clamp(1 / MOST_GAIN, MOST_GAIN)
    flat = (spread < LEAST_SPREAD) | (reference.spread < LEAST_SPREAD)
    gain = torch.where(flat, torch.ones_like(gain), gain)
    if bool(((mean - reference.mean).abs() < SAME_LEVEL).all() and ((gain - 1).abs() < SAME_RATIO).all()):
        return frame
    return ((_floats(frame).double() - mean) * gain + reference.mean).clamp(0, 1).float()


def _hold_sharpness(frame: torch.Tensor, wanted: float) -> torch.Tensor:
    """Blended with its blurred self until the Laplacian's energy is ``wanted``: a quadratic equation, for both are
    linear. A frame sharper than one blur can take is blurred several times."""
    pixels = _floats(frame)
    for _ in range(BLURS):
        sharp = _laplacian(pixels)
        energy = float(sharp.square().mean())
        if energy <= wanted * (1 + SAME_RATIO):
            return frame if pixels is frame or torch.equal(pixels, _floats(frame)) else pixels
        blurred = _blur(pixels)
        soft = _laplacian(blurred)
        share = _share(energy, float((sharp * soft).mean()), float(soft.square().mean()), wanted)
        pixels = pixels + share * (blurred - pixels)
    return pixels


def _share(sharp: float, both: float, soft: float, wanted: float) -> float:
    """The least x in 0..1 with (1 - x)^2 sharp + 2 x (1 - x) both + x^2 soft = wanted; 1 where there is none."""
    a, b, c = sharp - 2 * both + soft, 2 * (both - sharp), sharp - wanted
    root = b * b - 4 * a * c
    if a <= 0 or root < 0:
        return 1.0
    return min(1.0, (-b - math.sqrt(root)) / (2 * a))


def _blur(pixels: torch.Tensor) -> torch.Tensor:
    """(H, W, 3) under a binomial window of 3 x 3."""
    planes = torch.nn.functional.pad(pixels.movedim(-1, 0)[:, None], (1, 1, 1, 1), mode="replicate")
    window = pixels.new_tensor([1.0, 2.0, 1.0]) / 4
    kernel = (window[:, None] * window)[None, None]
    return torch.nn.functional.conv2d(planes, kernel)[:, 0].movedim(0, -1)


def kept_as(frames: Sequence[torch.Tensor] | torch.Tensor) -> torch.Tensor:
    """Frames as uint8 where these say all of it, bit for bit (x / 255), else as they are: a quarter of the memory."""
    if not torch.is_tensor(frames):
        frames = torch.stack(list(frames))
    if frames.dtype != torch.float32:
        return frames
    levels = torch.empty(frames.shape, dtype=torch.uint8)
    for index, frame in enumerate(frames):
        levels[index] = (frame * 255).round().clamp(0, 255).to(torch.uint8)
        if not torch.equal(levels[index].float() / 255, frame.cpu()):
            return frames
    return levels
