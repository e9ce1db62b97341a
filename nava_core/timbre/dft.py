"""The spectrogram of speaker encoders whose features came from TensorFlow: a discrete Fourier transform as convolutions
with cosines and sines, without the highest bin, summed by a mel filter bank over bins placed a little differently."""

import math

import torch
from torch import nn
from torch.nn import functional as F

from .config import SAMPLE_RATE, FrontEndConfig
from .mel import mel_of_hz


class DftSpectrogram(nn.Module):
    """(B, samples) -> power (B, n_fft / 2, frames), or mel power (B, bands, frames), held to eps .. 1 / eps."""

    def __init__(self, config: FrontEndConfig, bands: int):
        super().__init__()
        self.hop_length, self.eps = config.hop_length, config.eps
        cosines, sines = dft_kernels(config)
        self.register_buffer("real_kernel_pt", cosines)
        self.register_buffer("image_kernel_pt", sines)
        if config.kind == "tf_mel":
            self.register_buffer("melbanks_pt", dft_filter_bank(config, bands))

    def forward(self, waveform: torch.Tensor) -> torch.Tensor:
        samples = waveform.unsqueeze(1)
        power = sum(
            F.conv1d(samples, kernel, stride=self.hop_length, padding=self.hop_length // 2).square()
            for kernel in (self.real_kernel_pt, self.image_kernel_pt)
        )
        power = power.clamp(self.eps, 1 / self.eps)
        if not hasattr(self, "melbanks_pt"):
            return power
        return F.conv1d(power, self.melbanks_pt).clamp(self.eps, 1 / self.eps)


def dft_kernels(config: FrontEndConfig) -> tuple[torch.Tensor, torch.Tensor]:
    """Windowed cosines and sines, one a bin: (n_fft / 2, 1, win_length) each."""
    window = _window(config.window, config.win_length).float()
    sample = torch.arange(config.win_length, dtype=torch.float64)
    angles = 2 * math.pi * torch.arange(config.n_fft // 2, dtype=torch.float64)[:, None] * sample / config.n_fft
    return tuple((wave.float() * window).unsqueeze(1) for wave in (angles.cos(), angles.sin()))


def _window(name: str, length: int) -> torch.Tensor:
    """Symmetric windows, float64."""
    offset = 0.54 if name == "hamming" else 0.5
    turn = 2 * math.pi * torch.arange(length, dtype=torch.float64) / max(1, length - 1)
    window = offset - (1 - offset) * turn.cos()
    return window.clamp(min=0).sqrt() if name == "sqrt_hann" else window


def dft_filter_bank(config: FrontEndConfig, bands: int) -> torch.Tensor:
    """Triangular filters, straight on the mel scale itself: (bands, n_fft / 2, 1)."""
    bins = torch.linspace(0, SAMPLE_RATE // 2, config.n_fft // 2, dtype=torch.float64)
    bins = 2595 * torch.log10(1 + bins / 700)
    edges = torch.linspace(mel_of_hz(config.f_min), mel_of_hz(config.f_max), bands + 2, dtype=torch.float64)[:, None]
    low, centre, high = edges[:-2], edges[1:-1], edges[2:]
    filters = torch.minimum((bins - low) / (centre - low), (high - bins) / (high - centre)).clamp(min=0)
    return filters.float().unsqueeze(-1)
