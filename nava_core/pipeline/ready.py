"""What is given of a clip, made ready: which latents it fills, what is encoded for them, and what comes out as it is.

Masks say which latents are given and how the network sees them: see :mod:`nava_core.given.masks`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from ..geometry import (
    AUDIO_LATENTS_PER_SECOND,
    FPS,
    FRAMES_PER_LATENT,
    PIXELS_PER_LATENT,
    ClipGeometry,
    frames_of_latents,
)
from ..given import (
    CLEAN,
    SHOWN,
    GivenSound,
    Originals,
    fit_frames,
    fit_sound,
    frames_touching,
    is_given,
    steps_touching,
)
from ..given.stretch import place_pictures
from ..sampling.denoise import NOTHING_TO_MAKE
from . import stages
from .given import (
    END,
    MOST_SECONDS,
    NO_SOUND_TO_KEEP,
    Given,
    Retake,
    VideoFrames,
    given_geometry,
    read_frames,
    video_size,
)
from .latents import ClipLatents
from .memory import Components
from .stages import fit_picture

END_MARGIN = 0.1  # seconds that a retake may say more than the clip has


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
