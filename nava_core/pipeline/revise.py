"""Finished clips worked on: opened from their latents or a video file, made again in part, refined, extended."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..geometry import TRAINED_SCALE, frames_of_latents
from ..given import Originals, fit_frames
from ..video_files import to_levels
from .given import Retake, VideoFrames, read_frames, source_geometry, video_size
from .latents import ClipLatents
from .segments import Beginning

if TYPE_CHECKING:
    from .pipeline import NavaPipeline

LATENTS_SUFFIXES = (".safetensors", ".latent")
MOST_SECONDS = 60.0  # of a video file that is extended
AT_ONCE = 8

Source = ClipLatents | str | os.PathLike


def is_latents_file(path: str | os.PathLike) -> bool:
    """Whether a file's name says that it holds a clip's latents; any other is read as a video."""
    return Path(path).suffix.lower() in LATENTS_SUFFIXES


def open_source(pipeline: NavaPipeline, source: Source, **size: Any) -> ClipLatents:
    """A finished clip's latents, of its file, or encoded anew of a video file; ``size`` as for
    :meth:`NavaPipeline.encode`, which counts for the latter alone."""
    if isinstance(source, ClipLatents):
        return source
    if is_latents_file(source):
        return ClipLatents.load(source)
    pipeline.components.say(f"{Path(source).name} is a video: its frames are encoded again.")
    return pipeline.encode(source, **size)


def retake(
    pipeline: NavaPipeline, source: Source, prompt: str, span: Retake, *, should_stop: Callable[[], bool] | None = None,
    **request: Any,
) -> ClipLatents:  # fmt: skip
    """As :meth:`NavaPipeline.retake` says."""
    size = {name: request.pop(name) for name in ("seconds", "width", "height", "size_from_image", "image_scale")
            if name in request}  # fmt: skip
    found = open_source(pipeline, source, should_stop=should_stop, **size)
    if found.originals is None or found.originals.frames is None:
        found = replace(found, originals=_decoded(pipeline, found, should_stop))
    notes = _same_noise(found, prompt, request.get("seed", 0))
    for note in notes:
        pipeline.components.say(note)
    made = pipeline.denoise(prompt, source=found, retake=span, should_stop=should_stop, **request)
    return replace(made, warnings=(*found.warnings, *notes, *made.warnings))


def _same_noise(source: ClipLatents, prompt: str, seed: int) -> tuple[str, ...]:
    """A sentence where a clip was made of the same prompt and noise."""
    if (source.settings.get("prompt"), source.settings.get("seed")) != (prompt, seed):
        return ()
    return (f"The clip was made of this prompt with the seed {seed}, too, and may come out much the same: change one.",)


def _decoded(pipeline: NavaPipeline, source: ClipLatents, should_stop: Callable[[], bool] | None) -> Originals | None:
    """A clip as it is decoded, so that what is kept of it stays the same frame by frame and sample by sample."""
    found = Originals()
    if source.audio is not None:
        found = found.with_sound(*pipeline.sound(source))
    if source.video is not None:
        found = found.with_frames(_levels(pipeline, source, should_stop))
    return found


def _levels(pipeline: NavaPipeline, source: ClipLatents, should_stop: Callable[[], bool] | None) -> torch.Tensor:
    """Decoded frames (F, H, W, 3) in 8 bits, as they go into every file."""
    with closing(pipeline.stream(source, should_stop=should_stop)) as parts:
        return torch.cat([to_levels(part) for part in parts])


def refine(
    pipeline: NavaPipeline, source: Source, prompt: str, *, denoise: float, size: tuple[int, int] | None = None,
    should_stop: Callable[[], bool] | None = None, **request: Any,
) -> ClipLatents:  # fmt: skip
    """As :meth:`NavaPipeline.refine` says."""
    bounds = {name: request.pop(name) for name in ("seconds", "image_scale") if name in request}
    wanted = {} if size is None else {"width": size[0], "height": size[1], "size_from_image": False}
    found = open_source(pipeline, source, should_stop=should_stop, **bounds, **wanted)
    if found.video is None:
        raise ValueError("A clip of sound alone has no picture that a second pass could be made over.")
    more: dict[str, Any] = {}
    geometry = source_geometry(found)
    if size is not None and size != (geometry.width, geometry.height):
        more = {"frames": fit_frames(_levels(pipeline, found, should_stop), *size), **wanted}
    made = pipeline.denoise(prompt, source=found, denoise=denoise, should_stop=should_stop, **more, **request)
    return replace(made, warnings=(*found.warnings, *made.warnings))


def beginning(
    pipeline: NavaPipeline,
    source: Source,
    *,
    width: int = 1280,
    height: int = 704,
    size_from_image: bool = True,
    image_scale: int = TRAINED_SCALE,
    should_stop: Callable[[], bool] | None = None,
) -> Beginning:
    """What an extended clip begins with. A clip's latents are decoded, without a loss; a video file is read, and its
    frames brought to 24 a second and to the size. Raises ValueError for a clip without picture."""
    if isinstance(source, ClipLatents) or is_latents_file(source):
        return _of_latents(pipeline, open_source(pipeline, source), should_stop)
    video = read_frames(source, MOST_SECONDS, video_size(size_from_image, width, height, image_scale))
    return _of_video(pipeline, Path(source), video)


def _of_latents(pipeline: NavaPipeline, latents: ClipLatents, should_stop: Callable[[], bool] | None) -> Beginning:
    if latents.video is None:
        raise ValueError("A clip of sound alone has no frame that it could go on from.")
    geometry = source_geometry(latents)
    given = None if latents.originals is None else (latents.originals.waveform, latents.originals.kept_sound)
    return Beginning(
        frames_of_latents(latents.video.shape[2]),
        geometry.width,
        geometry.height,
        lambda: pipeline.stream(latents, should_stop=should_stop),
        None if latents.audio is None else lambda: pipeline.sound(latents),
        [latents.video, latents.audio, given],
        latents.warnings,
    )


def _of_video(pipeline: NavaPipeline, path: Path, video: VideoFrames) -> Beginning:
    height, width = video.frames.shape[1:3]
    notes = list(video.notes)
    if video.size != (width, height):
        notes.append(f"The video has {video.size[0]}x{video.size[1]}: scaled to cover {width}x{height}, and cropped.")
    if len(video.frames) >= MOST_SECONDS * 24:
        notes.append(f"Of {path.name} no more than its first {MOST_SECONDS:g} s are used.")
    if video.sound is None:
        notes.append(f"{path.name} has no sound, so that the clip that it becomes has none either.")
    waveform, rate = video.sound or (None, 0)
    if waveform is not None and waveform.shape[0] > 2:  # as of a sound that is given
        notes.append(f"The {waveform.shape[0]} channels of its sound were mixed to one.")
        waveform = waveform.mean(dim=0, keepdim=True)
    for note in notes:
        pipeline.components.say(note)

    def stream() -> Iterator[torch.Tensor]:
        yield from video.frames.split(AT_ONCE)

    sound = None if waveform is None else lambda: (waveform, rate)
    return Beginning(len(video.frames), width, height, stream, sound, [path, width, height], tuple(notes))
