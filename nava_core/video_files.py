"""Videos as they are read in, frames kept without loss between the segments of a long clip, and single pictures.

PyAV, Pillow and numpy are imported where they are used. What is written appears under its final name whole or not at
all.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import torch

from .geometry import FPS
from .given.frames import fit_frames
from .media import CHUNK, FRAMES_STAGE, Target, check_finite, existing_file, read_audio, whole_file

# FFmpeg's numbers of matrices: what is not in here, or not said, is BT.709 in HD and BT.601 below.
MATRICES = {1: 1, 4: 4, 5: 5, 6: 5, 7: 7, 9: 9, 10: 9}  # to swscale's
HD_HEIGHT = 720
FULL_RANGE = 2
HDR_TRANSFERS = (16, 18)  # PQ and HLG


@dataclass(frozen=True, eq=False)
class VideoFile:
    """A video as it was read.

    ``frames`` (F, H, W, 3) uint8 are upright and at a constant ``fps``; ``waveform`` (C, N) fp32 at ``sample_rate``
    begins with the first frame, and is None for a silent video; ``size`` is the video's own (width, height); ``notes``
    are sentences on what is unusual about the file.
    """

    frames: torch.Tensor
    fps: Fraction
    waveform: torch.Tensor | None
    sample_rate: int
    size: tuple[int, int]
    notes: tuple[str, ...] = ()

    @property
    def seconds(self) -> float:
        """How long its picture is."""
        return float(len(self.frames) / self.fps)


def read_video(
    path: str | os.PathLike, max_seconds: float | None = None, size: tuple[int, int] | None = None
) -> VideoFile:
    """The first picture and sound track of a video, no more than ``max_seconds`` of them.

    Turned as the file says. A file whose frames come at an uneven rate is read at its mean rate, each frame being the
    one on screen. ``size`` (width, height) has each frame scaled and cropped to it as it is read, which takes less
    memory. Raises FileNotFoundError, and ValueError for a file that has no picture or cannot be decoded.
    """
    import av

    path = existing_file(path)
    try:
        with av.open(str(path)) as container:
            stream = _picture_stream(container, path)
            fps = stream.average_rate or stream.guessed_rate or Fraction(FPS)
            frames, times, own, is_all = _decoded_frames(container, stream, fps, max_seconds, size)
            sound_start = _start(container.streams.audio[0]) if container.streams.audio else None
            aspect = stream.sample_aspect_ratio
            told, is_hdr = stream.frames, stream.codec_context.color_trc in HDR_TRANSFERS
    except av.FFmpegError as error:
        raise ValueError(f"Cannot read {path.name} as video: {error.strerror or error}.") from error
    if not frames:
        raise ValueError(f"The picture track of {path.name} is empty or broken: no frame of it can be read.")
    notes = []
    if is_all and len(frames) < told:
        notes.append(f"Only {len(frames)} of the {told} frames that {path.name} tells of are in it: it may be cut off.")
    if is_hdr:
        notes.append(f"{path.name} is HDR and was read as it is, so that it looks pale: make an SDR copy of it first.")
    if aspect and aspect != 1:
        notes.append(f"{path.name} has pixels that are not square: it was scaled to {own[0]}x{own[1]}, as it is shown.")
    order = _even_order(times, fps)
    if order is not None:
        notes.append(f"The frames of {path.name} come unevenly: they were read at {float(fps):.4g} a second.")
    frames = _stacked(frames, order)
    waveform, rate = None, 0
    if sound_start is not None:
        limit = float(len(frames) / fps) if max_seconds is None else max_seconds
        waveform, rate = _sound_of(path, limit, sound_start - times[0])
    return VideoFile(frames, Fraction(fps), waveform, rate, own, tuple(notes))


def _picture_stream(container, path: Path):
    import av

    if not (container.streams.video or container.streams.audio):
        raise ValueError(f"Cannot read {path.name} as video: it is broken or cut off, or something else.")
    cover = av.stream.Disposition.attached_pic
    streams = [stream for stream in container.streams.video if not stream.disposition & cover]
    if not streams:
        raise ValueError(f"There is no picture in {path.name}: choose a video.")
    streams[0].thread_type = "AUTO"
    return streams[0]


def _decoded_frames(container, stream, fps: Fraction, max_seconds, size):
    """(frames (H, W, 3) uint8, their times in seconds, the video's own (width, height), whether these are all)."""
    frames, times, own, is_all = [], [], (0, 0), True
    for frame in container.decode(stream):
        time = frame.time if frame.time is not None else float(len(frames) / fps)
        if max_seconds is not None and frames and time - times[0] >= max_seconds - 1e-6:
            is_all = False
            break
        pixels = _upright(_rgb(frame, stream.sample_aspect_ratio), frame.rotation)
        own = (pixels.shape[1], pixels.shape[0])
        if frames and size is None and pixels.shape != frames[0].shape:
            pixels = fit_frames(pixels[None], frames[0].shape[1], frames[0].shape[0])[0]
        frames.append(pixels if size is None else fit_frames(pixels[None], *size)[0])
        times.append(time)
    return frames, times, own, is_all


def _rgb(frame, aspect: Fraction | None = None) -> torch.Tensor:
    """(H, W, 3) uint8 of a decoded frame, by the matrix and range that it says it has, and as wide as it is to be
    shown where its pixels, of this ``aspect``, are not square."""
    from av.video.reformatter import ColorRange, Colorspace, Interpolation

    scaled = {}
    if aspect and aspect != 1:
        scaled = {"width": max(1, round(frame.width * aspect)), "interpolation": Interpolation.LANCZOS}
    if frame.format.is_rgb:
        return torch.from_numpy(frame.reformat(format="rgb24", **scaled).to_ndarray().copy())
    usual = Colorspace.ITU709 if frame.height >= HD_HEIGHT else Colorspace.ITU601
    known = {int(matrix): matrix for matrix in Colorspace}  # of older PyAV without BT.2020
    matrix = known.get(MATRICES.get(int(frame.colorspace)), usual)
    is_full = int(frame.color_range) == FULL_RANGE or frame.format.name.startswith("yuvj")
    rgb = frame.reformat(
        format="rgb24",
        src_colorspace=matrix,
        dst_colorspace=matrix,
        src_color_range=ColorRange.JPEG if is_full else ColorRange.MPEG,
        dst_color_range=ColorRange.JPEG,
        **scaled,
    )
    return torch.from_numpy(rgb.to_ndarray().copy())


def _upright(pixels: torch.Tensor, degrees: int) -> torch.Tensor:
    """Turned counter-clockwise by ``degrees``, as players turn it."""
    turns = round((degrees or 0) / 90) % 4
    return pixels.rot90(turns).contiguous() if turns else pixels


def _even_order(times: list[float], fps: Fraction) -> list[int] | None:
    """Which frame is on screen at each time of a constant ``fps``; None where they come evenly."""
    length = float(1 / fps)
    if all(abs(time - times[0] - index * length) < 0.75 * length for index, time in enumerate(times)):
        return None
    count = round((times[-1] - times[0]) / length) + 1
    order, at = [], 0
    for index in range(count):
        while at + 1 < len(times) and times[at + 1] - times[0] <= (index + 0.01) * length:
            at += 1
        order.append(at)
    return order


def _stacked(frames: list[torch.Tensor], order: list[int] | None) -> torch.Tensor:
    """(F, H, W, 3) of a list's frames, which it is emptied of: a long video is never in memory twice."""
    if order is not None:
        return torch.stack([frames[index] for index in order])
    stacked = torch.empty(len(frames), *frames[0].shape, dtype=frames[0].dtype)
    for index in range(len(frames)):
        stacked[index], frames[index] = frames[index], None
    return stacked


def _start(stream) -> float:
    return float((stream.start_time or 0) * stream.time_base)


def _sound_of(path: Path, seconds: float, late: float) -> tuple[torch.Tensor | None, int]:
    """The sound track, beginning with the picture: ``late`` seconds of silence before it, or so much of it left out."""
    waveform, rate = read_audio(path, seconds + max(0.0, -late))
    shift = round(late * rate)
    waveform = torch.nn.functional.pad(waveform, (shift, 0)) if shift > 0 else waveform[:, -shift:]
    waveform = waveform[:, : round(seconds * rate)]
    return (waveform, rate) if waveform.shape[1] else (None, 0)


# ---------------------------------------------------------------- without loss


class LosslessFrames:
    """Frames in a file, bit for bit (H.264 of RGB at quantiser 0): what one segment of a long clip leaves the next."""

    @staticmethod
    def write(path: Target, chunks: torch.Tensor | Iterable[torch.Tensor], fps: float | Fraction = FPS) -> int:
        """Write frames (F, H, W, 3), or an iterable of chunks of them: uint8, or floats in 0..1 to the nearest level.

        Returns how many. Raises ValueError for other shapes and for none, NonFiniteError for NaN or infinity.
        """
        import av

        rate, count, stream = Fraction(fps).limit_denominator(1001), 0, None
        with whole_file(path) as temporary, av.open(str(temporary), "w", format="matroska") as container:
            for chunk in _levels(chunks):
                if stream is None:
                    options = {"qp": "0", "preset": "ultrafast"}
                    stream = container.add_stream("libx264rgb", rate=rate, options=options)
                    stream.width, stream.height, stream.pix_fmt = chunk.shape[2], chunk.shape[1], "rgb24"
                elif (chunk.shape[2], chunk.shape[1]) != (stream.width, stream.height):
                    raise ValueError(
                        f"All frames must have one size; got {chunk.shape[2]}x{chunk.shape[1]} after "
                        f"{stream.width}x{stream.height}."
                    )
                for pixels in chunk.numpy():
                    frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
                    frame.pts, frame.time_base = count, 1 / rate
                    container.mux(stream.encode(frame))
                    count += 1
            if stream is None:
                raise ValueError("There are no frames to write.")
            container.mux(stream.encode(None))
        return count

    @staticmethod
    def read(path: str | os.PathLike, chunk: int = CHUNK) -> Iterator[torch.Tensor]:
        """The frames in chunks (f <= ``chunk``, H, W, 3) uint8.

        Raises FileNotFoundError, and ValueError for a file that is not such frames or is broken.
        """
        import av

        path = existing_file(path)
        pending: list[torch.Tensor] = []
        try:
            with av.open(str(path)) as container:
                if not container.streams.video or not container.streams.video[0].format.is_rgb:
                    raise ValueError(f"{path.name} holds no frames without loss: make it again.")
                for frame in container.decode(container.streams.video[0]):
                    pending.append(torch.from_numpy(frame.to_ndarray(format="rgb24").copy()))
                    if len(pending) == chunk:
                        yield torch.stack(pending)
                        pending = []
        except av.FFmpegError as error:
            raise ValueError(f"Cannot read {path.name} as frames: {error.strerror or error}.") from error
        if pending:
            yield torch.stack(pending)


def _levels(chunks) -> Iterator[torch.Tensor]:
    """Chunks (f, H, W, 3) uint8 on the CPU, each checked before it is passed on."""
    for whole in [chunks] if torch.is_tensor(chunks) else chunks:
        if whole.ndim != 4 or whole.shape[-1] != 3 or 0 in whole.shape:
            raise ValueError(f"Frames must be (F, H, W, 3); got {tuple(whole.shape)}.")
        check_finite(whole, FRAMES_STAGE)
        for part in whole.split(CHUNK):
            yield to_levels(part)


def to_levels(frames: torch.Tensor) -> torch.Tensor:
    """Floats in 0..1 as uint8, to the nearest level as in every file that is written; uint8 stays. On the CPU."""
    if frames.dtype == torch.uint8:
        return frames.cpu()
    return (frames.float().clamp(0, 1) * 255).round().to(torch.uint8).cpu()


def write_picture(path: Target, frame: torch.Tensor) -> None:
    """Write a frame (H, W, 3), uint8 or floats in 0..1, as PNG."""
    from PIL import Image

    if frame.ndim != 3 or frame.shape[-1] != 3 or 0 in frame.shape:
        raise ValueError(f"A picture is (height, width, 3); got {tuple(frame.shape)}.")
    check_finite(frame, FRAMES_STAGE)
    with whole_file(path) as temporary:
        Image.fromarray(to_levels(frame).numpy()).save(temporary, format="PNG")
