"""A clip as the host's VIDEO, written by the core's mux."""

from __future__ import annotations

from fractions import Fraction

import comfy.model_management
import comfy.utils
from comfy_api.latest import Input, Types

from ...nava_core.media import FRAMES_STAGE, SOUND_STAGE, check_finite, mux


class MuxedVideo(Input.Video):
    """Frames (T, H, W, 3) and an optional AUDIO; ``save_to`` writes H.264 and AAC of exactly one length, atomically.

    Raises NonFiniteError, naming the stage that made it, for NaN or infinity. Run on ComfyUI 0.18.1.
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

    def save_to(self, path, format=Types.VideoContainer.AUTO, codec=Types.VideoCodec.AUTO, metadata=None, **_):
        if format not in (Types.VideoContainer.AUTO, Types.VideoContainer.MP4):
            raise ValueError(f"NAVA clips are written as mp4, not {format}: choose auto or mp4 in Save Video.")
        if codec not in (Types.VideoCodec.AUTO, Types.VideoCodec.H264):
            raise ValueError(f"NAVA clips are written as h264, not {codec}: choose auto or h264 in Save Video.")
        progress = comfy.utils.ProgressBar(self.get_frame_count())

        def each_frame(count, total):
            comfy.model_management.throw_exception_if_processing_interrupted()
            progress.update_absolute(count, total)

        sound = (None, None) if self.audio is None else (self.audio["waveform"], int(self.audio["sample_rate"]))
        mux(path, self.frames, *sound, self.rate, crf=self.crf, metadata=metadata, callback=each_frame)

    def as_trimmed(self, start_time=None, duration=None, strict_duration=False):
        first = max(0, round((start_time or 0) * self.rate))
        count = self.frames.shape[0] - first
        wanted = round(duration * self.rate) if duration else count
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
