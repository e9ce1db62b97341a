"""Frames and waveforms to files and back: MP4 (H.264 and AAC), 24-bit WAV, reading sound and pictures.

PyAV, Pillow and numpy are imported where they are used. What is written appears under its final name whole or not at
all.
"""

from __future__ import annotations

import json
import math
import os
import re
import secrets
import shutil
import tempfile
import wave
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import torch

from .geometry import FPS

LATENTS_STAGE = "latents (backbone and sampler)"
FRAMES_STAGE = "decoded video frames (video VAE)"
SOUND_STAGE = "decoded sound (audio VAE)"
AAC_RATES = (96000, 88200, 64000, 48000, 44100, 32000, 24000, 22050, 16000, 12000, 11025, 8000, 7350)
AAC_BITS_PER_SECOND = 256_000
BT709, LIMITED_RANGE = 1, 1  # FFmpeg's numbers for them
TRANSFERS = {"BT.709": BT709, "sRGB": 13}
KEPT_OF_NAMES = 40  # characters of a file's name in that of its temporary file
CHUNK = 8  # frames converted at a time
# x264's macroblock tree reads past the end of a row unless the width is a multiple of 128: equal frames then gave files
# that differed from run to run.
REPEATABLE = "mbtree=0"
LOUDNESS_MODES = ("as decoded", "limit peak to -1 dBFS")
PEAK_LIMIT = 10 ** (-1 / 20)

Target = str | os.PathLike | BinaryIO


class NonFiniteError(FloatingPointError):
    """NaN or infinity in what a stage made; the message names the stage."""


def check_finite(tensor: torch.Tensor, stage: str) -> None:
    """Raise NonFiniteError where ``tensor`` has NaN or infinity; ``stage`` says what it is and what made it."""
    if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
        raise NonFiniteError(
            f"There is NaN or infinity in the {stage}: check that stage's file and what it was given, and run it in "
            "fp32 if they are in order (in ComfyUI: --fp32-unet, --fp32-vae)."
        )


# ---------------------------------------------------------------- writing


def mux(
    path: Target,
    frames: torch.Tensor | Any | Iterable,
    waveform: torch.Tensor | Any | None = None,
    sample_rate: int | None = None,
    fps: float | Fraction = FPS,
    *,
    total: int | None = None,
    crf: float = 18,
    preset: str = "medium",
    transfer: str = "BT.709",
    metadata: Mapping[str, Any] | None = None,
    callback: Callable[[int, int | None], None] | None = None,
) -> int:
    """Write a clip as MP4: H.264 yuv420p in limited-range BT.709, and AAC stereo at the waveform's own rate.

    ``path`` is a path or a binary file object. ``frames`` are (T, H, W, 3) in 0..1 (what is outside is clamped), as one
    tensor or array or as an iterable of such chunks, so that a decoder can be streamed: the same file, with one chunk
    in memory at a time. ``total`` is how many frames an iterable has to give. An odd width or height gets its
    last column or row twice, since yuv420p has none. ``waveform`` is (C, N) with 1 or 2 channels within -1..1, or None
    for a clip without sound; it is cut or filled with silence to last exactly as long as the picture, T / fps seconds.
    ``crf`` and ``preset`` are x264's (quality, and speed against size); ``transfer`` is the curve that the file names,
    "BT.709" or "sRGB", for the same pixels. ``metadata`` are the container's tags; values that are not text are stored
    as JSON. ``callback(frame, frames)`` runs after every frame, ``frames`` being None for an iterable without
    ``total``; what it raises ends the writing, and no file is left.

    Returns the number of frames. Raises NonFiniteError, naming the stage, before anything that is not finite reaches an
    encoder, and ValueError for shapes, rates and channels that cannot be written, and for more or fewer frames than
    ``total``.
    """
    if transfer not in TRANSFERS:
        raise ValueError(f"The transfer curve is one of {', '.join(TRANSFERS)}; got {transfer}.")
    sound = None if waveform is None else _Sound(waveform, sample_rate)
    rate = _frame_rate(fps)
    encoding = {"crf": str(crf), "preset": preset, "x264-params": REPEATABLE}
    total = len(frames) if hasattr(frames, "ndim") else total
    tags = {str(key): value if isinstance(value, str) else json.dumps(value) for key, value in (metadata or {}).items()}
    with whole_file(path) as temporary:
        add_picture = partial(_add_picture_stream, rate=rate, options=encoding, transfer=TRANSFERS[transfer])
        return _write_mp4(temporary, _frame_chunks(frames), total, sound, rate, add_picture, tags, callback)


def write_wav(
    path: Target, waveform: torch.Tensor | Any, sample_rate: int, bits: int = 24, duration: float | None = None
) -> int:
    """Write ``waveform`` (C, N) within -1..1 as PCM WAV of 16, 24 or 32 bits; returns the number of samples.

    ``duration`` in seconds cuts it, or fills it with silence, to that exact length. What is outside -1..1 is clamped.
    """
    if bits not in (16, 24, 32):
        raise ValueError(f"A WAV file is written with 16, 24 or 32 bits; got {bits}.")
    samples = as_waveform(waveform)
    check_finite(samples, SOUND_STAGE)
    if duration is not None:
        samples = fit_length(samples, round(duration * sample_rate))
    full_scale = 2 ** (bits - 1) - 1
    levels = (samples.double().clamp(-1, 1) * full_scale).round().to(torch.int32)
    width = bits // 8
    # little-endian: of each 4 bytes the first ``width`` are the value
    data = levels.T.flatten().contiguous().view(torch.uint8).reshape(-1, 4)[:, :width].contiguous().numpy().tobytes()
    with whole_file(path) as temporary, wave.open(str(temporary), "wb") as file:
        file.setnchannels(samples.shape[0])
        file.setsampwidth(width)
        file.setframerate(int(sample_rate))
        file.writeframes(data)
    return samples.shape[1]


@contextmanager
def whole_file(target: Target) -> Iterator[Path]:
    """A temporary path beside ``target`` that takes its place if the block ends well, and vanishes if it does not."""
    if hasattr(target, "write"):
        with tempfile.TemporaryDirectory(prefix="nava-") as folder:
            temporary = Path(folder) / "clip"
            yield temporary
            with temporary.open("rb") as file:
                shutil.copyfileobj(file, target)
        return
    path = Path(target)
    if not path.parent.is_dir():
        raise FileNotFoundError(f"Cannot write {path.name}: the folder {path.parent} does not exist.")
    temporary = path.with_name(f".{path.stem[:KEPT_OF_NAMES]}-{secrets.token_hex(4)}.part")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def clear_leftovers(target: str | os.PathLike) -> None:
    """Take away what a killed process left of ``target`` under temporary names. For a file that one process alone
    writes; long names, which such names have only the beginning of, are left alone."""
    path = Path(target)
    if len(path.stem) > KEPT_OF_NAMES:
        return
    ours = re.compile(rf"\.{re.escape(path.stem)}-[0-9a-f]{{8}}\.part")
    for each in path.parent.iterdir():
        if ours.fullmatch(each.name):
            each.unlink(missing_ok=True)


def _frame_rate(fps: float | Fraction) -> Fraction:
    rate = Fraction(fps).limit_denominator(1001)
    if rate <= 0:
        raise ValueError(f"The frame rate must be above 0; got {fps}.")
    return rate


def _frame_chunks(frames) -> Iterator[torch.Tensor]:
    """Chunks (t, H, W, 3) uint8 with even sides, each checked before it is passed on."""
    chunks = [frames] if hasattr(frames, "ndim") else frames
    for chunk in chunks:
        chunk = torch.as_tensor(chunk)
        if chunk.ndim != 4 or chunk.shape[-1] != 3 or not chunk.is_floating_point() or 0 in chunk.shape:
            raise ValueError(f"Frames must be (T, H, W, 3) floats in 0..1; got {tuple(chunk.shape)} of {chunk.dtype}.")
        parts = chunk.split(CHUNK)
        for part in parts:
            check_finite(part, FRAMES_STAGE)
        for part in parts:
            yield pad_to_even((part.float().clamp(0, 1) * 255).round().to(torch.uint8).cpu())


def pad_to_even(frames: torch.Tensor) -> torch.Tensor:
    """Frames (T, H, W, C) with the last row or column twice where there is an odd number of them."""
    for dim in (1, 2):
        if frames.shape[dim] % 2:
            frames = torch.cat([frames, frames.narrow(dim, frames.shape[dim] - 1, 1)], dim=dim)
    return frames


class _Sound:
    """A clip's sound, handed out frame by frame of the picture: both streams are interleaved and equally long."""

    def __init__(self, waveform, sample_rate: int | None) -> None:
        if sample_rate not in AAC_RATES:
            raise ValueError(
                f"AAC sound cannot have {sample_rate} Hz: resample it to 48000 Hz, "
                f"or one of {', '.join(map(str, AAC_RATES))}."
            )
        samples = as_waveform(waveform)
        if samples.shape[0] > 2:
            raise ValueError(f"Sound must have 1 or 2 channels; got {samples.shape[0]}: mix it down.")
        check_finite(samples, SOUND_STAGE)
        self.rate = int(sample_rate)
        self.samples = samples.clamp(-1, 1).expand(2, -1)
        self.given = 0

    def until(self, seconds: Fraction) -> torch.Tensor:
        """The samples (2, n) from where the last call ended up to ``seconds``, silence past the end."""
        end = round(seconds * self.rate)
        part = fit_length(self.samples[:, self.given : end], end - self.given)
        self.given = end
        return part


def _write_mp4(path: Path, chunks, total, sound, rate: Fraction, add_picture, tags, callback) -> int:
    import av

    count = 0
    # In the default timescale of 1/1000 s the container would round the length of both streams.
    ticks = math.lcm(rate.numerator, sound.rate if sound else 1)
    flags = {"movflags": "use_metadata_tags+faststart", "movie_timescale": str(ticks)}
    with av.open(str(path), "w", format="mp4", options=flags) as container:
        container.metadata.update(tags)
        picture_stream = sound_stream = None
        for chunk in chunks:
            if picture_stream is None:
                picture_stream = add_picture(container, chunk.shape[2], chunk.shape[1])
                if sound is not None:
                    sound_stream = container.add_stream("aac", rate=sound.rate, layout="stereo")
                    sound_stream.bit_rate = AAC_BITS_PER_SECOND
            elif (chunk.shape[2], chunk.shape[1]) != (picture_stream.width, picture_stream.height):
                raise ValueError(
                    f"All frames must have one size; got {chunk.shape[2]}x{chunk.shape[1]} after "
                    f"{picture_stream.width}x{picture_stream.height}."
                )
            if total is not None and count + len(chunk) > total:
                raise ValueError(f"There are more frames than the {total} that the clip should have.")
            for frame in chunk.numpy():
                container.mux(picture_stream.encode(_picture_frame(frame, count, rate)))
                count += 1
                if sound_stream is not None:
                    start = sound.given
                    container.mux(sound_stream.encode(_sound_frame(sound.until(count / rate), start, sound.rate)))
                if callback is not None:
                    callback(count, total)
        if picture_stream is None:
            raise ValueError("There are no frames to write.")
        if total is not None and count < total:
            raise ValueError(f"There are {count} frames where the clip should have {total}.")
        for stream in (picture_stream, sound_stream):
            if stream is not None:
                container.mux(stream.encode(None))
    return count


def _add_picture_stream(container, width: int, height: int, *, rate: Fraction, options: dict, transfer: int):
    stream = container.add_stream("libx264", rate=rate, options=options)
    stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
    context = stream.codec_context
    context.time_base = 1 / rate
    context.colorspace = context.color_primaries = BT709
    context.color_trc = transfer
    context.color_range = LIMITED_RANGE
    return stream


def _picture_frame(pixels, index: int, rate: Fraction):
    """An encoder's frame from full-range RGB (H, W, 3) uint8."""
    import av
    from av.video.reformatter import ColorRange, Colorspace, Interpolation

    frame = av.VideoFrame.from_ndarray(pixels, format="rgb24").reformat(
        format="yuv420p",
        src_colorspace=Colorspace.ITU709,
        dst_colorspace=Colorspace.ITU709,
        src_color_range=ColorRange.JPEG,
        dst_color_range=ColorRange.MPEG,
        interpolation=Interpolation.AREA,  # of all, the one that leaves flat chroma exact
    )
    frame.pts, frame.time_base = index, 1 / rate
    return frame


def _sound_frame(samples: torch.Tensor, start: int, rate: int):
    import av

    frame = av.AudioFrame.from_ndarray(samples.contiguous().numpy(), format="fltp", layout="stereo")
    frame.sample_rate, frame.pts, frame.time_base = rate, start, Fraction(1, rate)
    return frame


# ---------------------------------------------------------------- waveforms


def as_waveform(waveform: torch.Tensor | Any) -> torch.Tensor:
    """``waveform`` as (C, N) fp32 on the CPU, from (N,), (C, N) or (1, C, N); raises ValueError for other shapes."""
    samples = torch.as_tensor(waveform).detach().to("cpu", torch.float32)
    if samples.ndim == 3 and samples.shape[0] == 1:
        samples = samples[0]
    if samples.ndim == 1:
        samples = samples[None]
    if samples.ndim != 2 or 0 in samples.shape:
        raise ValueError(f"Sound must be (channels, samples); got {tuple(torch.as_tensor(waveform).shape)}.")
    return samples


def fit_length(waveform: torch.Tensor, samples: int) -> torch.Tensor:
    """``waveform`` (..., N) cut, or filled with silence, to ``samples`` samples."""
    missing = samples - waveform.shape[-1]
    return waveform[..., :samples] if missing <= 0 else torch.nn.functional.pad(waveform, (0, missing))


def apply_loudness(waveform: torch.Tensor, mode: str = LOUDNESS_MODES[0]) -> torch.Tensor:
    """``waveform`` (..., C, N) as it is, or turned down as a whole, clip by clip, where its peak is above -1 dBFS."""
    if mode not in LOUDNESS_MODES:
        raise ValueError(f"Loudness is one of {', '.join(LOUDNESS_MODES)}; got '{mode}'.")
    if mode == LOUDNESS_MODES[0]:
        return waveform
    peak = waveform.abs().amax(dim=(-2, -1), keepdim=True)
    return waveform * (PEAK_LIMIT / peak).clamp(max=1.0)


# ---------------------------------------------------------------- reading


def existing_file(path: str | os.PathLike) -> Path:
    """``path``, if there is such a file; raises FileNotFoundError."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"There is no file {path}.")
    return path


def read_audio(path: str | os.PathLike, max_seconds: float | None = None) -> tuple[torch.Tensor, int]:
    """The first sound track of a sound or video file: (C, N) fp32 and its sample rate, no more than ``max_seconds``.

    Raises FileNotFoundError, and ValueError for a file that has no sound or cannot be decoded.
    """
    import av

    path = existing_file(path)
    try:
        with av.open(str(path)) as container:
            if not container.streams.audio:
                raise ValueError(f"There is no sound in {path.name}.")
            stream = container.streams.audio[0]
            rate = stream.rate
            limit = None if max_seconds is None else round(max_seconds * rate)
            parts = list(_decoded_samples(container, stream, limit))
    except av.FFmpegError as error:
        raise ValueError(f"Cannot read {path.name} as sound: {error.strerror or error}.") from error
    if not parts:
        raise ValueError(f"The sound track of {path.name} is empty.")
    return torch.cat(parts, dim=1)[:, :limit], rate


def _decoded_samples(container, stream, limit: int | None) -> Iterator[torch.Tensor]:
    import av

    resampler = av.AudioResampler(format="fltp")  # the sample format only
    read = 0
    for frame in container.decode(stream):
        for part in resampler.resample(frame):
            yield torch.from_numpy(part.to_ndarray().copy())
            read += part.samples
        if limit is not None and read >= limit:
            return
    for part in resampler.resample(None):
        yield torch.from_numpy(part.to_ndarray().copy())


def read_image(path: str | os.PathLike) -> torch.Tensor:
    """A picture as (H, W, 3) fp32 in 0..1, upright as its EXIF orientation says; the first one of an animation.

    Raises FileNotFoundError, and ValueError for a file that is no picture.
    """
    import numpy
    from PIL import Image, ImageOps

    path = existing_file(path)
    try:
        with Image.open(path) as image:
            upright = ImageOps.exif_transpose(image)
            if upright.mode.startswith("I"):  # 16-bit grey; Pillow's own conversion to RGB would clip it
                grey = torch.from_numpy(numpy.array(upright).astype("float32")) / 65535
                return grey.clamp(0, 1)[..., None].repeat(1, 1, 3)
            pixels = numpy.array(upright.convert("RGB"))
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"Cannot read {path.name} as a picture: {error}") from error
    return torch.from_numpy(pixels).float() / 255
