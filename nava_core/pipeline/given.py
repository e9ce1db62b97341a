"""What of a clip is given: as it is asked for, checked, and made ready to be encoded and put where denoising finds it.

A given part is a file, frames, pictures, a recording or the latents of a finished clip. Masks say which latents are
given and how the network sees them: see :mod:`nava_core.given.masks`.
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
    AUDIO_LATENTS_PER_SECOND,
    FPS,
    FRAMES_PER_LATENT,
    MODES,
    PIXELS_PER_LATENT,
    TRAINED_SECONDS,
    ClipGeometry,
    choose_bucket,
    frames_of_latents,
    latents_of_frames,
    seconds_of_latents,
)
from ..given import CLEAN, SHOWN, frames_touching, is_given, steps_touching
from ..given.frames import fit_frames, resample_indices
from ..given.originals import Originals
from ..given.sound import LEAST_SECONDS, RESTS, GivenSound, fit_sound
from ..given.stretch import place_pictures
from ..media import read_audio
from ..sampling.denoise import NOTHING_TO_MAKE
from ..sampling.schedule import WRONG_DENOISE
from ..video_files import read_video
from . import stages
from .latents import ClipLatents
from .memory import Components
from .stages import clip_geometry, fit_picture, read_picture

Sound = str | os.PathLike | tuple[torch.Tensor, int] | GivenSound
Frames = str | os.PathLike | torch.Tensor

DEFAULT_SECONDS = 6.0
MOST_SECONDS = TRAINED_SECONDS  # of a video, where nothing is said of the clip's length
END = "end"  # the time of the last picture
PARTS = ("both", "picture", "sound")
READ_SECONDS = 600.0  # of a recording, beyond where it is to begin
NO_SOUND_TO_KEEP = "A second pass keeps the sound, but there is none: give a sound, or make a clip of picture alone."
ONE_FRAME = 1e-3  # seconds
END_MARGIN = 0.1  # seconds that a retake may say more than the clip has


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
class Encoding:
    """Frames (f, H, W, 3), in 0..1 or of 8 bits, that the video VAE encodes: what comes out beyond its first ``skip``
    latents are the clip's latent frames ``latents``."""

    frames: torch.Tensor
    latents: slice
    skip: int = 0


@dataclass(frozen=True)
class ReadyParts:
    """What of a clip is given, ready to be encoded. Masks (1, 1, T, H, W) and (1, L, 1) as :func:`denoise` takes them,
    None without that part of a clip; ``source``: latents it starts from; ``originals``: what comes out as it was
    given; ``notes``: sentences on what was changed of what was given."""

    video_mask: torch.Tensor | None
    audio_mask: torch.Tensor | None
    encodings: tuple[Encoding, ...] = ()
    sound: GivenSound | None = None
    source: ClipLatents | None = None
    originals: Originals | None = None
    notes: tuple[str, ...] = ()

    @property
    def makes(self) -> tuple[bool, bool]:
        """Whether anything of the picture, and of the sound, is made."""
        return tuple(mask is not None and not bool(is_given(mask).all()) for mask in (self.video_mask, self.audio_mask))

    @property
    def is_empty(self) -> bool:
        return not self.encodings and self.sound is None and self.source is None

    @property
    def most_frames(self) -> int:
        """The most frames that are encoded at a time."""
        return max((len(encoding.frames) for encoding in self.encodings), default=0)

    @property
    def sound_steps(self) -> int:
        """Audio latents that are encoded."""
        return 0 if self.sound is None else self.audio_mask.shape[1]


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
    notes, name = [*getattr(video, "notes", ())], Path(frames).name
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
        seconds = DEFAULT_SECONDS if seconds is None else seconds
        return clip_geometry(seconds, width, height, mode, given.image, size_from_image, image_scale)
    if given.source is not None:
        seconds = source_geometry(given.source).seconds
    elif seconds is None:
        seconds = min(MOST_SECONDS, _seconds_of_frames(len(video.frames)))
    return ClipGeometry(seconds, *video_size(size_from_image, width, height, image_scale)(*video.size), mode)


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


# ---------------------------------------------------------------- made ready


def make_parts(
    given: Given,
    seconds: float | None,
    width: int,
    height: int,
    mode: str,
    size_from_image: bool,
    image_scale: int,
) -> tuple[Given, ClipGeometry, ReadyParts]:
    """What is given, with what was in files read, the geometry of its clip, and the parts ready to be encoded."""
    read = given.read()
    most = MOST_SECONDS if seconds is None else seconds
    size = video_size(size_from_image, width, height, image_scale)
    video = None if given.frames is None else read_frames(given.frames, most + 1, size)
    geometry = given_geometry(read, video, seconds, width, height, mode, size_from_image, image_scale)
    if given.denoise < 1 and given.sound is None and given.source is None and video is not None:
        read = replace(read, sound=video.sound)
    return read, geometry, make_ready(read, video, geometry)


def ready_source(video: VideoFrames, geometry: ClipGeometry) -> ReadyParts:
    """A video as a finished clip: all of it is given. Raises ValueError where it is shorter than ``geometry``."""
    parts = _Collected(*_masks(geometry), CLEAN, geometry)
    parts.put_video(video, is_kept=True)
    given = Given(sound=video.sound)
    if geometry.has_audio:
        parts.put_sound(given, is_noted=False)  # it is the video's own, as long as that
    ready = parts.ready(given)
    if ready.makes[0]:
        raise ValueError(
            f"The video has {len(video.frames)} frames where {geometry.frames} are asked for: ask for fewer seconds."
        )
    return ready


def _masks(geometry: ClipGeometry) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    video = torch.ones(1, 1, *geometry.latent_shape[1:]) if geometry.has_video else None
    return video, torch.ones(1, geometry.audio_tokens, 1) if geometry.has_audio else None


def make_ready(given: Given, video: VideoFrames | None, geometry: ClipGeometry) -> ReadyParts:
    """The given parts of a clip of ``geometry``, ready to be encoded; ``given`` as :meth:`Given.read` leaves it.

    Raises ValueError, in a sentence, for parts that lie outside the clip, and where nothing is left to be made.
    """
    parts = _Collected(*_masks(geometry), SHOWN[given.shown], geometry)
    if given.source is not None:
        parts.put_source(given)
    if video is not None:
        parts.put_video(video, is_kept=given.denoise == 1)
        if video.sound is not None and given.sound is None:
            parts.notes.append("The video's own sound is left out: sound is made for its picture.")
    if given.image is not None:
        parts.put_first_frame(given.image)
    for time, picture in given.pictures.items():
        parts.put_picture(time, picture)
    if given.sound is not None:
        parts.put_sound(given)
    ready = parts.ready(given)
    if not any(ready.makes):
        raise ValueError(NOTHING_TO_MAKE)
    if given.denoise < 1 and given.retake is None and ready.makes[1]:
        if given.sound is None and (given.source is None or given.source.audio is None):
            raise ValueError(NO_SOUND_TO_KEEP)
        raise ValueError("A second pass keeps the sound, so it has to be given whole: give one as long as the clip.")
    return ready


class _Collected:
    """The parts of one clip, as they are put in one after another; later ones go before earlier ones."""

    def __init__(
        self, video_mask: torch.Tensor | None, audio_mask: torch.Tensor | None, shown: float, geometry: ClipGeometry
    ) -> None:
        self.video_mask, self.audio_mask, self.shown, self.geometry = video_mask, audio_mask, shown, geometry
        self.encodings: list[Encoding] = []
        self.sound: GivenSound | None = None
        self.frames: torch.Tensor | None = None
        self.kept_frames: torch.Tensor | None = None
        self.notes: list[str] = []

    def put_source(self, given: Given) -> None:
        retake = given.retake
        if self.audio_mask is not None:
            self.audio_mask[:] = self.shown
        if retake is None:
            return  # a second pass: the picture starts from the source
        self._check_span(retake)
        if self.video_mask is not None:
            self.video_mask[:] = self.shown
            if retake.of_picture:
                span = frames_touching(retake.start, retake.end, self.geometry.latent_frames)
                rows, columns = self._region(retake.region)
                self.video_mask[:, :, span, rows, columns] = 1
            self._clean_first_frame()
        if self.audio_mask is not None and retake.of_sound:
            self.audio_mask[:, steps_touching(retake.start, retake.end, self.geometry.audio_tokens)] = 1

    def _check_span(self, retake: Retake) -> None:
        duration = self.geometry.duration
        if retake.end > duration + END_MARGIN or retake.start >= duration:
            raise ValueError(
                f"The clip ends at {duration:.2f} s: a retake from {retake.start:g} to {retake.end:g} s is not in it."
            )
        for wanted, there, what in (
            (retake.part == "picture", self.video_mask, "picture"),
            (retake.part == "sound", self.audio_mask, "sound"),
        ):
            if wanted and there is None:
                raise ValueError(f"The clip has no {what} that could be made again.")
        if retake.region is not None and self.video_mask is None:
            raise ValueError("The clip has no picture, and so no region of it: leave out the region.")

    def _region(self, region: tuple[int, int, int, int] | None) -> tuple[slice, slice]:
        """The rows and columns of latents with anything of a region in pixels."""
        if region is None:
            return slice(None), slice(None)
        x, y, width, height = region
        if x + width > self.geometry.width or y + height > self.geometry.height:
            raise ValueError(
                f"The region {x},{y},{width},{height} reaches beyond the picture of {self.geometry.width}x"
                f"{self.geometry.height}."
            )
        size = PIXELS_PER_LATENT
        return slice(y // size, -(-(y + height) // size)), slice(x // size, -(-(x + width) // size))

    def _clean_first_frame(self) -> None:
        """A first frame that is given is always shown as it is, as in training."""
        if bool(is_given(self.video_mask[:, :, 0]).all()):
            self.video_mask[:, :, 0] = CLEAN

    def put_video(self, video: VideoFrames, is_kept: bool) -> None:
        geometry, count = self.geometry, min(len(video.frames), self.geometry.frames)
        self.notes += video.notes
        if len(video.frames) > count:
            self.notes.append(f"The video goes on past the clip's end at {geometry.duration:.2f} s: that is left out.")
        if is_kept:
            stretch = place_pictures(count, 0, geometry.frames)
            self.notes += [f"The video: {note[:1].lower()}{note[1:]}" for note in stretch.notes]
            latents, frames = stretch.latents, video.frames[: len(stretch.to_encode)]
        else:
            latents = slice(0, geometry.latent_frames)
            frames = video.frames[: geometry.frames]
            if len(frames) < geometry.frames:
                raise ValueError(
                    f"The video has {count} frames, but a second pass over a clip of {geometry.frames} needs as many."
                )
        size = (geometry.width, geometry.height)
        if video.size != size:
            self.notes.append(
                f"The video has {video.size[0]}x{video.size[1]}: scaled to cover {size[0]}x{size[1]}, and cropped."
            )
        frames = fit_frames(frames, *size)
        self.encodings.append(Encoding(frames, latents))
        if is_kept:
            self.video_mask[:, :, latents] = self.shown
            self._clean_first_frame()
            self.frames = frames

    def put_first_frame(self, picture: torch.Tensor) -> None:
        self.encodings.append(Encoding(fit_picture(picture, self.geometry), slice(0, 1)))
        self.video_mask[:, :, 0] = CLEAN

    def put_picture(self, time: float | str, picture: torch.Tensor) -> None:
        frame = self.geometry.frames - 1 if time == END else round(float(time) * FPS)
        if not 0 <= frame < self.geometry.frames:
            raise ValueError(
                f"The clip ends at {self.geometry.duration:.2f} s: a picture at {float(time):g} s is not in it."
            )
        if frame == 0:
            self.put_first_frame(picture)
            return
        stretch = place_pictures(1, frame, self.geometry.frames)
        if bool(is_given(self.video_mask[:, :, stretch.latents]).any()):
            self.notes.append(f"Two given parts meet at {frame / FPS:.2f} s: the picture there counts.")
        frames = fit_picture(picture, self.geometry)[[0] * len(stretch.to_encode)]
        self.encodings.append(Encoding(frames, stretch.latents, stretch.skip))
        self.video_mask[:, :, stretch.latents] = self.shown

    def put_sound(self, given: Given, is_noted: bool = True) -> None:
        self.sound = given.sound
        if not isinstance(given.sound, GivenSound):
            waveform, rate = given.sound
            self.sound = fit_sound(
                waveform,
                rate,
                self.geometry.duration,
                start=given.sound_start,
                at=given.sound_at,
                rest=given.sound_rest,
            )
        if is_noted:
            self.notes += [f"The given sound: {note[:1].lower()}{note[1:]}" for note in self.sound.notes]
        self.audio_mask = self.sound.steps(self.geometry.audio_tokens, given.shown)[None, :, None]

    def ready(self, given: Given) -> ReadyParts:
        return ReadyParts(
            self.video_mask,
            self.audio_mask,
            tuple(self.encodings),
            self.sound,
            given.source,
            self._originals(given),
            tuple(self.notes),
        )

    def _originals(self, given: Given) -> Originals | None:
        """What of the clip comes out as it was given: of a source what it had itself, as far as it is kept."""
        found = Originals() if given.source is None or given.source.originals is None else given.source.originals
        if given.retake is None:
            found = replace(found, frames=None, kept_frames=None, kept_blocks=None)
        kept_blocks = None if self.video_mask is None else blocks_kept(self.video_mask)
        kept_sound = () if self.audio_mask is None else spans_kept(self.audio_mask, self.geometry.duration)
        found = found.within(None, kept_sound, kept_blocks)
        if self.frames is not None:
            found = _with_frames(found, self.frames, self.geometry.frames)
        if self.sound is not None:
            sound = Originals.of_sound(self.sound)
            found = found.with_sound(sound.waveform, sound.sample_rate, sound.kept_sound)
        if found.frames is not None and not bool(found.kept_frames.any()) and found.kept_blocks is None:
            found = replace(found, frames=None, kept_frames=None)
        if not found.kept_sound:
            found = replace(found, waveform=None, sample_rate=0, kept_sound=())
        return None if found.frames is None and found.waveform is None else found


def _with_frames(found: Originals, frames: torch.Tensor, total: int) -> Originals:
    """With the clip's first frames as given; those that follow are only there to be as many as the clip has."""
    kept = torch.arange(total) < len(frames)
    if len(frames) < total:
        frames = torch.cat([frames, frames[-1:].expand(total - len(frames), -1, -1, -1)])
    return found.with_frames(frames, kept)


def blocks_kept(mask: torch.Tensor) -> torch.Tensor:
    """(F, H / 16, W / 16) bool: what a video mask (1, 1, T, H / 16, W / 16) keeps of the frames of its latents."""
    given = is_given(mask[0, 0])
    return given[[-(-frame // FRAMES_PER_LATENT) for frame in range(frames_of_latents(len(given)))]]


def spans_kept(mask: torch.Tensor, duration: float) -> tuple[tuple[float, float], ...]:
    """The spans, in seconds, of audio latents that an audio mask (1, L, 1) keeps."""
    given = is_given(mask[0, :, 0]).tolist()
    edges = [step for step in range(len(given) + 1) if [False, *given][step] != [*given, False][step]]
    seconds = [duration if step == len(given) else step / AUDIO_LATENTS_PER_SECOND for step in edges]
    return tuple(zip(seconds[::2], seconds[1::2], strict=True))


# ---------------------------------------------------------------- encoded


def encode_parts(
    components: Components, ready: ReadyParts, geometry: ClipGeometry, check_stop: Callable[[], None]
) -> stages.Start:
    """What denoising starts from: given parts encoded, each VAE being loaded once, and put where they belong."""
    video = audio = None
    if ready.source is not None:
        video, audio = ready.source.video, ready.source.audio
    if ready.encodings:
        shape = (1, *geometry.latent_shape)
        video = video.clone() if video is not None and video.shape == shape else torch.zeros(shape)
        clips = [encoding.frames for encoding in ready.encodings]
        for encoding, latent in zip(ready.encodings, stages.encode_frames(components, clips, check_stop), strict=True):
            video[:, :, encoding.latents] = latent[:, :, encoding.skip :]
    if ready.sound is not None:
        check_stop()
        audio = stages.encode_sound(components, *ready.sound.to_encode(), geometry.audio_tokens)
    return stages.Start(video, ready.video_mask, audio, ready.audio_mask)
