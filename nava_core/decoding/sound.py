"""Sound out of the audio VAE and its vocoder, in one piece or in several, which are equal up to rounding."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

# Latent steps (40 ms) that a piece has, and around them those that are decoded with it and thrown away: a sample
# follows from less than 43 steps before it and 10 after it, so that no seam is left.
PIECE, BEFORE, AFTER = 32, 48, 16
STEP_SECONDS, MELS_PER_STEP = 0.04, 4
FIRST_MISSING = 3  # mel frames, of the first step: the VAE is causal


@dataclass(frozen=True)
class SoundForm:
    """How sound is decoded: in one piece, or ``piece`` latent steps at a time."""

    piece: int | None = None
    on_cpu: bool = False

    def __str__(self) -> str:
        name = "one piece" if self.piece is None else f"pieces of {self.piece * STEP_SECONDS:.1f} s"
        return f"{name}, on the CPU" if self.on_cpu else name

    def steps(self, total: int) -> int:
        """Of ``total`` latent steps, those that are decoded at a time."""
        return total if self.piece is None else min(total, self.piece + BEFORE + AFTER)


ONE_PIECE, IN_PIECES = SoundForm(), SoundForm(PIECE)


def decode_sound(
    decode: Callable[[torch.Tensor], torch.Tensor], latent: torch.Tensor, form: SoundForm = ONE_PIECE
) -> torch.Tensor:
    """Latent (B, 8, T, 16) -> waveform (B, 2, N), fp32 in RAM, by ``decode``, which makes 4 T - 3 mel frames of it and
    sound of these. In pieces the memory taken beside the waveform is constant in T."""
    total = latent.shape[2]
    if form.steps(total) == total:
        return decode(latent).float().cpu()
    waveform = None
    for begin in range(0, total, form.piece):
        end = min(begin + form.piece, total)
        first, last = max(0, begin - BEFORE), min(total, end + AFTER)
        part = decode(latent[:, :, first:last]).float().cpu()
        samples = part.shape[-1] // _mels(last - first)  # of a mel frame
        if waveform is None:
            waveform = part.new_empty(*part.shape[:-1], _mels(total) * samples)
        since, until = _mels(begin) * samples, _mels(end) * samples
        skipped = first * MELS_PER_STEP * samples
        waveform[..., since:until] = part[..., since - skipped : until - skipped]
    return waveform


def _mels(steps: int) -> int:
    """Mel frames of the first ``steps`` steps."""
    return max(0, steps * MELS_PER_STEP - FIRST_MISSING)
