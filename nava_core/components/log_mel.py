"""The log-mel spectrogram that the LTX audio VAE hears with: magnitudes, Slaney's mel scale, natural logarithm."""

from __future__ import annotations

from functools import lru_cache

import torch

from .weights import need

LOWEST = 1e-5  # magnitude, before the logarithm


def log_mel(waveform: torch.Tensor, rate: int, n_fft: int, hop: int, bands: int) -> torch.Tensor:
    """Waveform (..., N) -> (..., N // hop + 1, bands): frames about every hop-th sample, mirrored at both ends."""
    spectrum = torch.stft(
        waveform.flatten(0, -2),
        n_fft,
        hop_length=hop,
        window=torch.hann_window(n_fft, device=waveform.device),
        center=True,
        pad_mode="reflect",
        return_complex=True,
    )
    mel = spectrum.abs().transpose(-1, -2) @ mel_filters(rate, n_fft, bands).to(waveform)
    return mel.clamp(min=LOWEST).log().unflatten(0, waveform.shape[:-1])


@lru_cache(maxsize=4)
def mel_filters(rate: int, n_fft: int, bands: int) -> torch.Tensor:
    """Triangular filters (n_fft / 2 + 1, bands) from 0 Hz to half the rate, each of the area that Slaney gave it."""
    audio_utils = need("transformers.audio_utils", "Encoding sound")
    filters = audio_utils.mel_filter_bank(n_fft // 2 + 1, bands, 0.0, rate / 2, rate, norm="slaney", mel_scale="slaney")
    return torch.from_numpy(filters).float()
