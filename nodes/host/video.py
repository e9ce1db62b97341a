"""A clip as the host's VIDEO: MP4 of H.264 by the core's mux, whatever else the host can write by the host's writer."""

from __future__ import annotations

import os
from contextlib import contextmanager
from fractions import Fraction

import comfy.model_management
import comfy.utils
from comfy_api.latest import Input, InputImpl, Types

from ...nava_core.media import FRAMES_STAGE, SOUND_STAGE, check_finite, fit_length, mux, pad_to_even, whole_file

Container, Codec = Types.VideoContainer, Types.VideoCodec


class MuxedVideo(Input.Video):
    """Frames (T, H, W, 3) in 0..1, SDR, and an optional AUDIO of exactly their length in every file.

    ``crf`` is the quality of H.264 where Save Video asks for none. Raises NonFiniteError, naming the stage that made
    it, for NaN or infinity. Run on ComfyUI 0.18.1 and 0.33.0.
    """

    def __init__(self, frames, audio=None, fps: float = 24.0, crf: int = 18):
        if audio is not None and audio["waveform"].shape[0] != 1:
            raise ValueError(
                f"This sound is a batch of {audio['waveform'].shape[0]} for one clip: pick one with a stock batch node."
            )
        check_finite(frames, FRAMES_STAGE)
        if audio is not None:
            check_finite(audio["waveform"], SOUND_STAGE)
        self.frames, self.audio = frames, audio
        self.rate = Fraction(fps).limit_denominator(1001)
        self.crf = crf

    def get_components(self):
        return Types.VideoComponents(images=self.frames, audio=self.audio, frame_rate=self.rate)

    def get_dimensions(self) -> tuple[int, int]:
        return self.frames.shape[2], self.frames.shape[1]

    def get_frame_count(self) -> int:
        return self.frames.shape[0]

    def get_frame_rate(self) -> Fraction:
        return self.rate

    def get_duration(self) -> float:
        return float(self.frames.shape[0] / self.rate)

    def get_container_format(self) -> str:
        return "mov,mp4,m4a,3gp,3g2,mj2"  # FFmpeg's name for an MP4 that is read

    def get_bit_depth(self) -> int:
        return 8

    def get_color_space(self) -> str:
        return "sRGB"

    def save_to(
        self,
        path,
        format=Container.AUTO,
        codec=Codec.AUTO,
        metadata=None,
        bit_depth=None,
        crf=None,
        color_space=None,
        preset=None,
        **others,
    ):
        """Write the clip as Save Video's settings ask, None being a setting left alone; whole, or not at all.

        Raises ValueError, in a sentence, for HDR, more than 8 bits, what this host cannot write, and settings of a
        later host that are not known here.
        """
        unknown = sorted(name for name, value in others.items() if value is not None)
        if unknown:
            raise ValueError(f"NAVA Mux does not know Save Video's setting {unknown[0]}: leave it at its default.")
        if bit_depth not in (None, 8):
            raise ValueError(f"NAVA clips are written with 8 bits, not {bit_depth}: choose 8 bits in Save Video.")
        if color_space not in (None, "auto", "sRGB"):
            raise ValueError(
                f"NAVA's frames are SDR, which {color_space} is not: choose auto or sRGB as color space in Save Video."
            )
        container, codec = _container(path, format), _codec(codec)
        if codec is Codec.AUTO:
            codec = Codec.H264 if container.value != "webm" else Codec("av1")
        wanted = {"crf": self.crf if crf is None and codec is Codec.H264 else crf, "preset": preset}
        wanted = {name: value for name, value in wanted.items() if value is not None}
        if (container, codec) != (Container.MP4, Codec.H264):
            if color_space is not None:
                wanted["color_space"] = "sRGB"
            return self._write_by_host(path, format=container, codec=codec, metadata=metadata, **wanted)
        progress = comfy.utils.ProgressBar(self.get_frame_count())

        def each_frame(count, total):
            comfy.model_management.throw_exception_if_processing_interrupted()
            progress.update_absolute(count, total)

        sound = (None, None) if self.audio is None else (self.audio["waveform"], int(self.audio["sample_rate"]))
        transfer = "sRGB" if color_space == "sRGB" else "BT.709"
        mux(path, self.frames, *sound, self.rate, transfer=transfer, metadata=metadata, callback=each_frame, **wanted)

    def _write_by_host(self, path, **settings) -> None:
        """MKV, WebM and AV1, which newer hosts write."""
        audio = self.audio
        if audio is not None:
            samples = round(self.get_duration() * int(audio["sample_rate"]))
            audio = {**audio, "waveform": fit_length(audio["waveform"], samples)}
        clip = Types.VideoComponents(images=pad_to_even(self.frames), audio=audio, frame_rate=self.rate)
        with whole_file(path) as temporary, _own_priority():
            InputImpl.VideoFromComponents(clip).save_to(str(temporary), **settings)

    def as_trimmed(self, start_time=None, duration=None, strict_duration=False):
        """The part from ``start_time`` s, counted from the end where it is negative, to the nearest frame; ``duration``
        s of it, 0 or None: to the end. None where nothing is left, or with ``strict_duration`` less than asked for."""
        total = self.frames.shape[0]
        first = round((start_time or 0) * self.rate)
        first = max(0, first + total) if first < 0 else first
        count = total - first
        wanted = max(1, round(duration * self.rate)) if duration else count
        if count <= 0 or (strict_duration and wanted > count):
            return None
        frames = self.frames[first : first + wanted]
        audio = self.audio
        if audio is not None:
            rate = int(audio["sample_rate"])
            begin = round(first / self.rate * rate)
            length = round(frames.shape[0] / self.rate * rate)
            audio = {**audio, "waveform": audio["waveform"][..., begin : begin + length]}
        return MuxedVideo(frames, audio, self.rate, self.crf)


@contextmanager
def _own_priority():
    """Gives the thread its scheduling back: run by root, the AV1 encoder takes the highest real-time priority for the
    thread that opens it and leaves it so, which starves everything else on the machine from then on."""
    if not hasattr(os, "sched_getscheduler"):
        yield
        return
    policy, priority = os.sched_getscheduler(0), os.sched_getparam(0)
    try:
        yield
    finally:
        if os.sched_getscheduler(0) != policy:
            os.sched_setscheduler(0, policy, priority)


def _container(path, wanted) -> Container:
    """The container asked for, or where that is auto the one of the path's ending, else MP4."""
    try:
        wanted = Container(wanted)
    except ValueError:
        names = ", ".join(Container.as_input())
        raise ValueError(f"This ComfyUI cannot write {wanted} files: choose one of {names} in Save Video.") from None
    if wanted is not Container.AUTO:
        return wanted
    ending = os.path.splitext(path)[1].lower() if isinstance(path, (str, os.PathLike)) else ""
    return {f".{each.value}": each for each in Container}.get(ending, Container.MP4)


def _codec(wanted) -> Codec:
    try:
        return Codec(wanted)
    except ValueError:
        names = ", ".join(Codec.as_input())
        raise ValueError(f"This ComfyUI cannot write {wanted}: choose one of {names} in Save Video.") from None
