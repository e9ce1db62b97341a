"""A finished clip, and its saving."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from ..geometry import FPS
from ..media import mux, write_wav


@dataclass(frozen=True)
class Clip:
    """A finished clip.

    ``frames`` (T, H, W, 3) fp32 in 0..1, 24 a second, None without picture; ``waveform`` (2, N) fp32 within -1..1, None
    without sound, and ``sample_rate`` 0 then; ``video_latent`` (1, 48, T', H / 16, W / 16) and ``audio_latent``
    (1, 8, L, 16) fp32 in the VAEs' own spaces; all on the CPU. ``report`` says how the prompt's tokens were used;
    ``warnings`` are sentences on what will have made the clip worse, or other than asked for.
    """

    frames: torch.Tensor | None
    waveform: torch.Tensor | None
    sample_rate: int
    video_latent: torch.Tensor | None
    audio_latent: torch.Tensor | None
    report: str = ""
    warnings: tuple[str, ...] = ()

    @property
    def suffix(self) -> str:
        """What its file ends in: ".wav" for sound alone, else ".mp4"."""
        return ".wav" if self.frames is None else ".mp4"

    def save(self, path: str | os.PathLike, *, callback: Callable[[int, int | None], None] | None = None) -> Path:
        """Write MP4 (H.264, with AAC where there is sound), or for sound alone 24-bit WAV; whole or not at all.

        ``callback(frame, frames)`` follows the encoding of a picture, and ends it by raising. Returns the path. Raises
        ValueError for another suffix, FileNotFoundError for a folder that is not there, NonFiniteError, naming the
        stage, for NaN or infinity.
        """
        path = checked_path(path, self.frames is not None)
        if self.frames is None:
            write_wav(path, self.waveform, self.sample_rate, bits=24)
        else:
            rate = None if self.waveform is None else self.sample_rate
            mux(path, self.frames, self.waveform, rate, FPS, callback=callback)
        return path


def checked_path(path: str | os.PathLike, has_picture: bool) -> Path:
    """The path that a clip is to be written to. Raises ValueError for a suffix that is not its format's, and
    FileNotFoundError for a folder that is not there."""
    path, suffix = Path(path), ".mp4" if has_picture else ".wav"
    if path.suffix.lower() != suffix:
        what = "a clip with a picture" if has_picture else "sound alone"
        raise ValueError(f"Cannot write {path.name}: {what} is written as {suffix}, so let the name end so.")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"Cannot write {path.name}: the folder {path.parent} does not exist.")
    return path
