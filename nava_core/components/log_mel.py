"""The log-mel spectrogram that the LTX audio VAE hears with: magnitudes, Slaney's mel scale, natural logarithm."""

from __future__ import annotations

import math
from functools import lru_cache

import torch

LOWEST = 1e-5  # magnitude, before the logarithm
LINEAR_HZ, LOG_FROM_HZ, LOG_STEP = 200 / 3, 1000.0, math.log(6.4) / 27  # of a mel in Slaney's auditory toolbox


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
    bins = torch.linspace(0, rate / 2, n_fft // 2 + 1, dtype=torch.float64)[:, None]
    edges = _hertz(torch.linspace(0, _mel(rate / 2), bands + 2, dtype=torch.float64))
    low, centre, high = edges[:-2], edges[1:-1], edges[2:]
    filters = torch.minimum((bins - low) / (centre - low), (high - bins) / (high - centre)).clamp(min=0)
    return (filters * (2 / (high - low))).float()


def _mel(hertz: float) -> float:
    if hertz < LOG_FROM_HZ:
        return hertz / LINEAR_HZ
    return LOG_FROM_HZ / LINEAR_HZ + math.log(hertz / LOG_FROM_HZ) / LOG_STEP


def _hertz(mels: torch.Tensor) -> torch.Tensor:
    first = LOG_FROM_HZ / LINEAR_HZ
    return torch.where(mels < first, mels * LINEAR_HZ, LOG_FROM_HZ * ((mels - first) * LOG_STEP).exp())
