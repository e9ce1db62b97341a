"""What of a clip is given, as it is asked for: checked, read, and the geometry of the clip that follows from it.

A given part is a file, frames, pictures, a recording or the latents of a finished clip. What becomes of them is in
``ready.py``.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from ..geometry import (
    FPS,
    MODES,
    PIXELS_PER_LATENT,
    TRAINED_SECONDS,
    ClipGeometry,
    choose_bucket,
    latents_of_frames,
    seconds_covering,
    seconds_of_latents,
)
from ..given import SHOWN
from ..given.frames import resample_indices
from ..given.sound import LEAST_SECONDS, RESTS, GivenSound
from ..media import as_waveform, read_audio
from ..sampling.schedule import WRONG_DENOISE
from ..video_files import read_video
from .latents import ClipLatents
from .stages import clip_geometry, read_picture

Sound = str | os.PathLike | tuple[torch.Tensor, int] | GivenSound
Frames = str | os.PathLike | torch.Tensor

DEFAULT_SECONDS = 6.0
MOST_SECONDS = TRAINED_SECONDS  # of a video, where nothing is said of the clip's length
END = "end"  # the time of the last picture
PARTS = ("both", "picture", "sound")
READ_SECONDS = 600.0  # of a recording, beyond where it is to begin
NO_SOUND_TO_KEEP = "A second pass keeps the sound, but there is none: give a sound, or make a clip of picture alone."
ONE_FRAME = 1e-3  # seconds


@dataclass(frozen=True)
class Retake:
    """A span of a finished clip that is made again, ``start`` to ``end`` seconds: of ``part`` "both", "picture" or
    "sound"; of the picture only ``region`` (x, y, width, height) in pixels, where one is given.

    Raises ValueError for a span or a region that is none.
    """

    start: float
    end: float
    part: str = PARTS[0]
    region: tuple[int, int, int, int] | None = None

    def __post_init__(self) -> None:
        if self.part not in PARTS:
            raise ValueError(f"A retake is of {', '.join(PARTS)}; got {self.part!r}.")
        if not (math.isfinite(self.start) and math.isfinite(self.end) and 0 <= self.start < self.end):
            raise ValueError(
                f"A retake is of a span from one second to a later one; got {self.start:g} to {self.end:g}."
            )
        if self.region is None:
            return
        if self.part == "sound":
            raise ValueError("A retake of the sound has no region, which is one of the picture: leave it out.")
        x, y, width, height = self.region
        if min(x, y) < 0 or min(width, height) < 1:
            raise ValueError(f"A region is x, y, width and height in pixels; got {x}, {y}, {width}, {height}.")

    @property
    def of_picture(self) -> bool:
        return self.part != "sound"

    @property
    def of_sound(self) -> bool:
        return self.part != "picture"


@dataclass(frozen=True)
class Given:
    """What of a clip is given, as :meth:`NavaPipeline.denoise` takes it."""

    image: torch.Tensor | str | os.PathLike | None = None
    sound: Sound | None = None
    sound_start: float = 0.0
    sound_at: float = 0.0
    sound_rest: str = RESTS[0]
    frames: Frames | None = None
    pictures: Mapping[float | str, torch.Tensor | str | os.PathLike] = field(default_factory=dict)
    shown: str = next(iter(SHOWN))
    source: ClipLatents | None = None
    retake: Retake | None = None
    denoise: float = 1.0

    def mode(self, wanted: str) -> str:
        """The clip's mode: that of its source where there is one."""
        if self.source is None:
            return wanted
        if self.source.video is None or self.source.audio is None:
            return MODES[2] if self.source.audio is None else MODES[1]
        return MODES[0]

    def check(self, wanted: str) -> None:
        """Raise ValueError, in a sentence, for what does not go together; no file is opened for it."""
        mode = self.mode(wanted)
        named = {"first frame": self.image, "video": self.frames, "pictures": self.pictures or None}
        pictures = [what for what, value in named.items() if value is not None]
        if mode == "audio" and pictures:
            verb = "were" if pictures[0] == "pictures" else "was"
            raise ValueError(
                f"{'Pictures' if verb == 'were' else f'A {pictures[0]}'} {verb} given for a clip of sound alone: leave "
                "it out, or choose another mode."
            )
        if mode == "video" and self.sound is not None:
            raise ValueError("A sound was given for a clip of picture alone: leave it out, or choose another mode.")
        if self.frames is not None and len(pictures) > 1:
            raise ValueError("Give a video or single pictures, and not both: both would be the clip's picture.")
        if self.image is not None and any(time != END and float(time) == 0 for time in self.pictures):
            raise ValueError("Two pictures were given for the first frame: leave out one of them.")
        if self.shown not in SHOWN:
            raise ValueError(f"Given parts are shown {' or '.join(SHOWN)}; got {self.shown!r}.")
        if self.sound_rest not in RESTS:
            raise ValueError(f"The rest of a given sound is {' or '.join(RESTS)}; got {self.sound_rest!r}.")
        if not 0 < self.denoise <= 1:
            raise ValueError(WRONG_DENOISE.format(self.denoise))
        self._check_passes(mode)

    def _check_passes(self, mode: str) -> None:
        """Of a retake and a second pass."""
        if self.retake is not None and self.source is None:
            raise ValueError("A retake needs the clip that it is of: give its latents as source.")
        if self.retake is not None and self.frames is not None:
            raise ValueError("A retake keeps the picture of its source: leave out the video.")
        if self.source is not None and self.retake is None and self.denoise == 1:
            raise ValueError(
                "Of the source nothing would be left: say what of it is made again (retake), or give a denoise below 1."
            )
        if self.denoise == 1:
            return
        if self.source is None and self.frames is None:
            raise ValueError("A denoise below 1 starts from a finished clip: give it as source, or a video.")
        has_sound = self.sound is not None or (self.source is not None and self.source.audio is not None)
        has_sound = has_sound or isinstance(self.frames, (str, os.PathLike))  # it may be in the file
        if mode == MODES[0] and self.retake is None and not has_sound:
            raise ValueError(NO_SOUND_TO_KEEP)

    def settings(self) -> dict[str, Any]:
        """What was given, by name, as JSON has it; files by their names."""
        found = {}
        for name in ("sound", "frames"):
            value = getattr(self, name)
            if value is not None:
                found[name] = Path(value).name if isinstance(value, (str, os.PathLike)) else True
        if self.pictures:
            found["pictures"] = [time if time == END else float(time) for time in self.pictures]
        if self.retake is not None:
            found["retake"] = asdict(self.retake)
        if self.denoise != 1:
            found["denoise"] = self.denoise
        return {**found, "shown": self.shown} if found else {}

    def read(self) -> Given:
        """The same with what is in files read; what cannot be raises FileNotFoundError or ValueError."""
        picture = None if self.image is None else read_picture(self.image)
        pictures = {time: read_picture(image) for time, image in self.pictures.items()}
        sound = self.sound
        if isinstance(sound, (str, os.PathLike)):
            sound = read_audio(sound, max(self.sound_start, 0) + READ_SECONDS)
        return replace(self, image=picture, pictures=pictures, sound=sound)


@dataclass(frozen=True)
class VideoFrames:
    """Frames (F, H, W, 3) at 24 a second and, of a file, its sound; ``size``: the video's own (width, height);
    ``notes`` say what was changed of them."""

    frames: torch.Tensor
    size: tuple[int, int]
    sound: tuple[torch.Tensor, int] | None = None
    notes: tuple[str, ...] = ()


def read_frames(
    frames: Frames, seconds: float, choose_size: Callable[[int, int], tuple[int, int]] | None = None
) -> VideoFrames:
    """A video file, of which no more than ``seconds`` are read, at 24 frames a second; or frames (F, H, W, 3) as they
    are. ``choose_size`` says from a file's (width, height) to which one its frames are to be brought as they are read.

    Raises ValueError, in a sentence, for what is neither.
    """
    if torch.is_tensor(frames):
        if frames.ndim != 4 or frames.shape[-1] != 3 or 0 in frames.shape:
            raise ValueError(f"Frames are (frames, height, width, 3); got {tuple(frames.shape)}.")
        if not frames.is_floating_point() and frames.dtype is not torch.uint8:
            raise ValueError(f"Frames are floats in 0..1 or of 8 bits; got {frames.dtype}.")
        return VideoFrames(frames, (frames.shape[2], frames.shape[1]))
    size = None if choose_size is None else choose_size(*read_video(frames, ONE_FRAME).size)
    video = read_video(frames, seconds, size)
    notes, name = [*video.notes], Path(frames).name
    taken = video.frames
    if video.fps != FPS:
        taken = taken[resample_indices(len(taken), video.fps)]
        notes.append(f"{name} has {float(video.fps):g} frames a second: resampled to {FPS}.")
    sound = None if video.waveform is None else (video.waveform, video.sample_rate)
    if sound is not None and not bool(video.waveform.any()):
        sound = None
        notes.append(f"The sound track of {name} is silent: it counts as none.")
    if sound is not None and sound[0].shape[1] < sound[1] * min(LEAST_SECONDS, video.seconds):
        sound = None
        notes.append(f"The sound track of {name} is shorter than {LEAST_SECONDS:g} s: it counts as none.")
    return VideoFrames(taken, video.size, sound, tuple(notes))


def given_geometry(
    given: Given,
    video: VideoFrames | None,
    seconds: float | None,
    width: int,
    height: int,
    mode: str,
    size_from_image: bool,
    image_scale: int,
) -> ClipGeometry:
    """The geometry of a clip with given parts: its source's; else as long as its video where nothing else is said,
    and of the trained size nearest to the video's or the first frame's proportions where that is wished."""
    if given.source is not None and video is None:
        return source_geometry(given.source)
    if video is None:
        seconds = _default_seconds(given, mode) if seconds is None else seconds
        return clip_geometry(seconds, width, height, mode, given.image, size_from_image, image_scale)
    if given.source is not None:
        seconds = source_geometry(given.source).seconds
    elif seconds is None:
        seconds = min(MOST_SECONDS, _seconds_of_frames(len(video.frames)))
    return ClipGeometry(seconds, *video_size(size_from_image, width, height, image_scale)(*video.size), mode)


def _default_seconds(given: Given, mode: str) -> float:
    """As long as the given sound, up to what is made in one pass, else 6."""
    if given.sound is None:
        return DEFAULT_SECONDS
    if isinstance(given.sound, GivenSound):
        return seconds_covering(given.sound.seconds)
    waveform, rate = given.sound
    reach = given.sound_at + max(1 / FPS, as_waveform(waveform).shape[1] / rate - given.sound_start)
    return min(MOST_SECONDS, reach if mode == "audio" else max(1 / FPS, seconds_covering(reach)))


def video_size(
    size_from_image: bool, width: int, height: int, image_scale: int
) -> Callable[[int, int], tuple[int, int]]:
    """What says the clip's (width, height) from a video's."""
    return lambda wide, tall: choose_bucket(wide, tall, image_scale) if size_from_image else (width, height)


def source_geometry(source: ClipLatents) -> ClipGeometry:
    """The geometry of a finished clip. Raises ValueError where its picture and its sound are not of one length."""
    mode = Given(source=source).mode("")
    if source.video is None:
        geometry = ClipGeometry(source.duration, mode=mode)
    else:
        latents, rows, columns = source.video.shape[2:]
        size = (columns * PIXELS_PER_LATENT, rows * PIXELS_PER_LATENT)
        geometry = ClipGeometry(max(seconds_of_latents(latents), 1 / FPS), *size, mode)
    if source.audio is not None and source.audio.shape[2] != geometry.audio_tokens:
        raise ValueError(
            f"The source's sound has {source.audio.shape[2]} latents where a clip of its length has "
            f"{geometry.audio_tokens}: give the latents of one clip."
        )
    return geometry


def _seconds_of_frames(count: int) -> float:
    return max(seconds_of_latents(latents_of_frames(count)), 1 / FPS)
