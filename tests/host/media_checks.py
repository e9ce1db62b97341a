"""What a file really holds, read with PyAV."""

from dataclasses import dataclass
from fractions import Fraction

import av
import numpy


@dataclass
class Media:
    video_codec: str | None = None
    audio_codec: str | None = None
    size: tuple[int, int] = (0, 0)
    rate: Fraction = Fraction(0)
    frames: numpy.ndarray | None = None
    samples: numpy.ndarray | None = None
    sample_rate: int = 0
    channels: int = 0
    video_seconds: float = 0.0
    audio_seconds: float = 0.0


def read_media(path) -> Media:
    media = Media()
    with av.open(str(path)) as container:
        if container.streams.video:
            stream = container.streams.video[0]
            media.video_codec, media.size = stream.codec_context.name, (stream.width, stream.height)
            media.rate = stream.average_rate
            media.video_seconds = float(stream.duration * stream.time_base)
            media.frames = numpy.stack([f.to_ndarray(format="rgb24") for f in container.decode(video=0)])
    with av.open(str(path)) as container:
        if container.streams.audio:
            stream = container.streams.audio[0]
            media.audio_codec, media.sample_rate = stream.codec_context.name, stream.rate
            media.channels = stream.codec_context.channels
            if stream.duration:
                media.audio_seconds = float(stream.duration * stream.time_base)
            resampler = av.AudioResampler(format="fltp")
            parts = [p.to_ndarray() for f in container.decode(audio=0) for p in resampler.resample(f)]
            media.samples = numpy.concatenate(parts, axis=1)
    return media


def assert_alive(media: Media) -> None:
    """Neither silent nor constant."""
    if media.frames is not None:
        assert media.frames.std() > 4
        assert numpy.abs(media.frames[1:].astype(int) - media.frames[:-1]).max() > 4
    if media.samples is not None:
        assert numpy.sqrt((media.samples**2).mean()) > 1e-3
        assert media.samples.std() > 1e-3
