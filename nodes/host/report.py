"""A clip on the canvas measured, with the host's progress bar and its stop button.

Run on ComfyUI 0.18.1 and 0.33.0.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import comfy.model_management
import comfy.utils
import torch

from ...nava_core.report import report_clip
from ...nava_core.timbre import encode_timbre
from ...nava_core.voices import encoder_fingerprint, voice_of


def report_on(
    frames: torch.Tensor | None,
    audio: dict | None,
    fps: float,
    prompt: str | None = None,
    transcript: str | None = None,
    speaker_encoder=None,
    voices: Sequence[torch.Tensor] = (),
) -> tuple[torch.Tensor, str, str]:
    """(IMAGE of the report (1, H, W, 3), its text, its JSON) of one clip.

    ``frames`` (F, H, W, 3) and ``audio``, an AUDIO of one clip; either may be None. Raises ValueError, in a sentence,
    for what cannot be measured, and for voices that another speaker encoder made.
    """
    if frames is None and audio is None:
        raise ValueError("There is nothing to measure: connect frames, audio, or both.")
    if audio is not None and audio["waveform"].shape[0] != 1:
        raise ValueError(
            f"This sound is a batch of {audio['waveform'].shape[0]} for one clip: pick one with a stock batch node."
        )
    if voices and speaker_encoder is None:
        raise ValueError("Voices are compared by a speaker encoder: connect NAVA Load Speaker Encoder too.")
    _check_encoder(voices, speaker_encoder)
    progress = comfy.utils.ProgressBar(1)

    def each_step(step: int, steps: int) -> None:
        comfy.model_management.throw_exception_if_processing_interrupted()
        progress.update_absolute(step, steps)

    report = report_clip(
        frames,
        None if audio is None else audio["waveform"],
        None if audio is None else int(audio["sample_rate"]),
        fps,
        prompt=prompt,
        voices=voices,
        encode=None if speaker_encoder is None else partial(encode_timbre, speaker_encoder),
        transcript=transcript,
        callback=each_step,
    )
    return report.picture()[None].float() / 255, report.text, report.to_json()


def _check_encoder(voices: Sequence[torch.Tensor], speaker_encoder) -> None:
    known = [voice for voice in map(voice_of, voices) if voice is not None]
    fingerprint = encoder_fingerprint(speaker_encoder) if known else ""
    for voice in known:
        voice.check_encoder(fingerprint)
