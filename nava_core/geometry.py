"""Clip geometry: seconds, frames, latents and tokens of a clip, its sizes in pixels, first-frame buckets.

The video VAE packs 16x16 pixels and 4 frames into a latent (the first frame alone), the audio VAE makes 25
latents a second, and the network takes 2x2 video latents or one audio latent as a token.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

FPS = 24
PIXELS_PER_LATENT = 16
FRAMES_PER_LATENT = 4
LATENTS_PER_SECOND = FPS // FRAMES_PER_LATENT
AUDIO_LATENTS_PER_SECOND = 25
VIDEO_CHANNELS = 48
AUDIO_CHANNELS, AUDIO_BINS = 8, 16
LATENTS_PER_TOKEN = 2  # along height and along width
TRAINED_SECONDS = 10.0

MODES = ("video+audio", "audio", "video")

# name: (width, height) in pixels; the first ones have the size of the final training, the others less than half of it
PRESETS: dict[str, tuple[int, int]] = {
    "landscape 1280x704": (1280, 704),
    "portrait 704x1280": (704, 1280),
    "square 960x960": (960, 960),
    "small landscape 832x480": (832, 480),
    "small portrait 480x832": (480, 832),
    "small square 640x640": (640, 640),
    "small wide 896x448": (896, 448),
    "small tall 448x896": (448, 896),
}

# The makers' sizes for first frames, by scale: the side of the square that has about as many pixels. Each has, by the
# nominal ratio of the short side to the long one, (short, long) in latents.
TRAINED_SCALE = 960
BUCKETS: dict[int, dict[float, tuple[int, int]]] = {
    960: {
        1.0: (60, 60),
        4 / 5: (54, 66),
        3 / 4: (52, 68),
        2 / 3: (46, 74),
        9 / 16: (44, 80),
        1 / 2: (42, 84),
        2 / 5: (38, 96),
    },
    640: {
        1.0: (40, 40),
        4 / 5: (36, 44),
        3 / 4: (34, 45),
        2 / 3: (31, 49),
        9 / 16: (30, 52),
        1 / 2: (28, 56),
        2 / 5: (25, 64),
    },
    512: {
        1.0: (32, 32),
        4 / 5: (28, 35),
        3 / 4: (27, 36),
        2 / 3: (25, 39),
        9 / 16: (24, 42),
        1 / 2: (22, 45),
        2 / 5: (20, 51),
    },
}


def frames_of_latents(latents: int) -> int:
    """Frames that ``latents`` latent frames decode to."""
    return FRAMES_PER_LATENT * (latents - 1) + 1


def latents_of_frames(frames: int) -> int:
    """Latent frames that ``frames`` frames encode to; frames past the last whole latent are left out."""
    return (frames - 1) // FRAMES_PER_LATENT + 1


def latents_of_seconds(seconds: float) -> int:
    """Latent frames of a clip of ``seconds``, rounded to the nearest: 6 a second and the first frame's."""
    return math.floor(LATENTS_PER_SECOND * seconds + 0.5) + 1


def seconds_of_latents(latents: int) -> float:
    """The nominal seconds of a clip of ``latents`` latent frames; the first frame is not counted."""
    return (latents - 1) / LATENTS_PER_SECOND


def split_latents(seconds: float, segment: float) -> list[int]:
    """Latent frames beyond the first that each segment of a clip has: as even as can be, none above ``segment``
    seconds. Raises ValueError for segments of less than a latent frame."""
    total = max(1, latents_of_seconds(seconds) - 1)
    if not (math.isfinite(segment) and segment * LATENTS_PER_SECOND >= 1):
        raise ValueError(f"A segment is at least {1 / LATENTS_PER_SECOND:.2f} s; got {segment:g}.")
    count = -(-total // math.floor(segment * LATENTS_PER_SECOND + 1e-9))
    return [total // count + (number < total % count) for number in range(count)]


def seconds_covering(seconds: float) -> float:
    """The nominal seconds of the shortest clip with picture whose frames last ``seconds`` or longer."""
    frames = math.ceil(round(seconds * FPS, 6))
    return seconds_of_latents(max(0, -(-(frames - 1) // FRAMES_PER_LATENT)) + 1)


def audio_latents_of_frames(frames: int) -> int:
    """Audio latents that cover ``frames`` frames of picture."""
    return -(-frames * AUDIO_LATENTS_PER_SECOND // FPS)


def audio_latents_of_seconds(seconds: float) -> int:
    """Audio latents that cover a clip of sound alone."""
    return math.ceil(round(AUDIO_LATENTS_PER_SECOND * seconds, 6))  # 25 * 4.36 is a hair above 109


@dataclass(frozen=True)
class ClipGeometry:
    """Everything that follows from a clip's length, size and mode.

    ``seconds`` is the nominal length: a clip with picture has 24 * seconds + 1 frames, ``seconds`` being
    rounded to whole latent frames (sixths of a second). ``width`` and ``height`` are pixels, multiples of 16
    (of 32 to avoid padding); they do not matter to mode "audio". ``mode`` is "video+audio", "audio" or
    "video". Raises ValueError for a length that is not positive, such sizes or an unknown mode.
    """

    seconds: float
    width: int = 1280
    height: int = 704
    mode: str = "video+audio"

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise ValueError(f"A clip's mode is one of {', '.join(MODES)}; got '{self.mode}'.")
        if not (math.isfinite(self.seconds) and self.seconds > 0):
            raise ValueError(f"A clip must be longer than 0 seconds; got {self.seconds}.")
        if self.has_video:
            for name, size in (("width", self.width), ("height", self.height)):
                _check_size(name, size)

    @property
    def has_video(self) -> bool:
        return self.mode != "audio"

    @property
    def has_audio(self) -> bool:
        return self.mode != "video"

    @property
    def latent_frames(self) -> int:
        """T; 0 without picture."""
        return latents_of_seconds(self.seconds) if self.has_video else 0

    @property
    def frames(self) -> int:
        """Frames of picture, 24 a second; 0 without picture."""
        return frames_of_latents(self.latent_frames) if self.has_video else 0

    @property
    def duration(self) -> float:
        """Exact length in seconds of the finished clip, picture and sound alike."""
        return self.frames / FPS if self.has_video else float(self.seconds)

    @property
    def latent_shape(self) -> tuple[int, int, int, int] | None:
        """(48, T, H, W) of the video latent without its batch; None without picture."""
        if not self.has_video:
            return None
        size = (self.height // PIXELS_PER_LATENT, self.width // PIXELS_PER_LATENT)
        return (VIDEO_CHANNELS, self.latent_frames, *size)

    @property
    def audio_shape(self) -> tuple[int, int, int] | None:
        """(8, L, 16) of the audio latent without its batch; None without sound."""
        return (AUDIO_CHANNELS, self.audio_tokens, AUDIO_BINS) if self.has_audio else None

    @property
    def audio_tokens(self) -> int:
        """L, audio latents, each of them one token; 0 without sound."""
        if not self.has_audio:
            return 0
        if self.has_video:
            return audio_latents_of_frames(self.frames)
        return audio_latents_of_seconds(self.seconds)

    @property
    def video_tokens(self) -> int:
        """Tokens of the picture; odd latent sizes are padded."""
        if not self.has_video:
            return 0
        _, frames, rows, columns = self.latent_shape
        return frames * -(-rows // LATENTS_PER_TOKEN) * -(-columns // LATENTS_PER_TOKEN)

    @property
    def tokens(self) -> int:
        """All tokens the network attends over."""
        return self.video_tokens + self.audio_tokens

    @property
    def warnings(self) -> list[str]:
        """Sentences about what will work, but not as well or not as asked."""
        found = []
        if self.seconds > TRAINED_SECONDS:
            found.append(
                f"NAVA was trained on clips of up to {TRAINED_SECONDS:g} s; "
                f"at {self.seconds:g} s picture and sound may fall apart."
            )
        if not self.has_video:
            return found
        nominal = seconds_of_latents(self.latent_frames)
        if abs(nominal - self.seconds) > 1e-3:
            found.append(f"{self.seconds:g} s is no whole number of latent frames; the clip has {nominal:.3f} s.")
        step = PIXELS_PER_LATENT * LATENTS_PER_TOKEN
        if self.width % step or self.height % step:
            found.append(f"{self.width}x{self.height} is padded inside the network; multiples of {step} avoid that.")
        return found


def _check_size(name: str, size: int) -> None:
    if isinstance(size, int) and size >= PIXELS_PER_LATENT and size % PIXELS_PER_LATENT == 0:
        return
    raise ValueError(
        f"A clip's {name} must be a multiple of {PIXELS_PER_LATENT} pixels; got {size}, "
        f"the nearest is {_round_to(size, PIXELS_PER_LATENT)}."
    )


def _round_to(size: float, multiple: int) -> int:
    return max(multiple, math.floor(size / multiple + 0.5) * multiple)


def round_size(width: float, height: float, multiple: int = PIXELS_PER_LATENT) -> tuple[int, int]:
    """The (width, height) nearest to the given one that a clip can have, in multiples of ``multiple`` pixels."""
    return _round_to(width, multiple), _round_to(height, multiple)


def choose_bucket(width: int, height: int, scale: int = TRAINED_SCALE) -> tuple[int, int]:
    """The clip size (width, height) in pixels for a first frame of ``width`` x ``height``, of its orientation.

    The bucket of ``scale`` (960, 640 or 512) whose nominal ratio is nearest to the picture's; raises ValueError for an
    empty picture and another scale.
    """
    check_scale(scale)
    if width < 1 or height < 1:
        raise ValueError(f"A first frame needs a width and a height; got {width}x{height}.")
    ratio = min(width, height) / max(width, height)
    short, long = (PIXELS_PER_LATENT * side for side in BUCKETS[scale][_nearest_ratio(ratio)])
    return (long, short) if width >= height else (short, long)


def check_scale(scale: int) -> None:
    """Raises ValueError for a scale that there are no buckets of."""
    if scale not in BUCKETS:
        raise ValueError(f"First frames come at the scales {', '.join(map(str, BUCKETS))}; got {scale}.")


def _nearest_ratio(ratio: float) -> float:
    return min(BUCKETS[TRAINED_SCALE], key=lambda nominal: abs(nominal - ratio))


def cover_crop(
    source_width: int, source_height: int, width: int, height: int
) -> tuple[tuple[int, int], tuple[int, int, int, int]]:
    """How to fill ``width`` x ``height`` with a picture: the size to scale it to, and the centred box to cut from that.

    Returns (width, height) and (left, top, right, bottom), in pixels.
    """
    if min(source_width, source_height, width, height) < 1:
        raise ValueError(f"Cannot fit a picture of {source_width}x{source_height} into {width}x{height}: a side is 0.")
    scale = max(width / source_width, height / source_height)
    scaled = max(width, round(source_width * scale)), max(height, round(source_height * scale))
    left, top = (scaled[0] - width) // 2, (scaled[1] - height) // 2
    return scaled, (left, top, left + width, top + height)


def audio_latent_to_tokens(latent: torch.Tensor) -> torch.Tensor:
    """Audio latent (B, 8, L, 16) -> tokens (B, L, 128), channel-major."""
    if latent.ndim != 4 or (latent.shape[1], latent.shape[3]) != (AUDIO_CHANNELS, AUDIO_BINS):
        raise ValueError(f"An audio latent is (B, {AUDIO_CHANNELS}, L, {AUDIO_BINS}); got {tuple(latent.shape)}.")
    return latent.transpose(1, 2).flatten(2)


def audio_tokens_to_latent(tokens: torch.Tensor) -> torch.Tensor:
    """Audio tokens (B, L, 128) -> latent (B, 8, L, 16); undoes :func:`audio_latent_to_tokens`."""
    if tokens.ndim != 3 or tokens.shape[2] != AUDIO_CHANNELS * AUDIO_BINS:
        raise ValueError(f"Audio tokens are (B, L, {AUDIO_CHANNELS * AUDIO_BINS}); got {tuple(tokens.shape)}.")
    return tokens.unflatten(2, (AUDIO_CHANNELS, AUDIO_BINS)).transpose(1, 2)
