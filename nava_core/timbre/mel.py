"""The mel power spectrogram that published speaker encoders hear with, with or without torchaudio."""

import math
import warnings

import torch
from torch import nn

from .config import SAMPLE_RATE, FrontEndConfig
from .resample import find_torchaudio


def mel_spectrogram(config: FrontEndConfig, bands: int, *, use_torchaudio: bool | None = None) -> nn.Module:
    """The module that turns (B, samples) into mel power (B, bands, frames): torchaudio's where it can be had.

    use_torchaudio: None takes torchaudio where it can be imported, False never, True insists on it. Both have the
    buffers `spectrogram.window` and `mel_scale.fb`.
    """
    torchaudio = None if use_torchaudio is False else find_torchaudio()
    if torchaudio is None:
        if use_torchaudio:
            raise RuntimeError("torchaudio was asked for but cannot be imported; install it or leave the choice open.")
        return MelSpectrogram(config, bands)
    with warnings.catch_warnings():
        # The lowest bands are narrower than an FFT bin; that is how the models were trained.
        warnings.filterwarnings("ignore", message=".*mel filterbank has all zero values.*")
        return torchaudio.transforms.MelSpectrogram(
            sample_rate=SAMPLE_RATE,
            n_fft=config.n_fft,
            win_length=config.win_length,
            hop_length=config.hop_length,
            f_min=config.f_min,
            f_max=config.f_max,
            n_mels=bands,
            window_fn=torch.hamming_window,
        )


class MelSpectrogram(nn.Module):
    """The fallback without torchaudio: torch.stft power under a Hamming window, summed by a mel filter bank."""

    def __init__(self, config: FrontEndConfig, bands: int):
        super().__init__()
        self.config = config
        self.spectrogram = _Buffer("window", torch.hamming_window(config.win_length))
        self.mel_scale = _Buffer("fb", mel_filter_bank(config, bands))

    def forward(self, waveform: torch.Tensor) -> torch.Tensor:
        spectrum = torch.stft(
            waveform,
            self.config.n_fft,
            hop_length=self.config.hop_length,
            win_length=self.config.win_length,
            window=self.spectrogram.window,
            center=True,
            pad_mode="reflect",
            return_complex=True,
        )
        power = spectrum.abs().square()
        return torch.matmul(power.transpose(-1, -2), self.mel_scale.fb).transpose(-1, -2)


class _Buffer(nn.Module):
    """Holds one buffer, so that it gets the dotted name it has in the published file."""

    def __init__(self, name: str, value: torch.Tensor):
        super().__init__()
        self.register_buffer(name, value)


def mel_filter_bank(config: FrontEndConfig, bands: int) -> torch.Tensor:
    """Triangular filters of height 1, equally spaced on the mel scale: (n_fft / 2 + 1, bands)."""
    # In float32 throughout, as the published models' filter bank was made: its rounding is part of the model.
    bins = torch.linspace(0, SAMPLE_RATE / 2, config.n_fft // 2 + 1)[:, None]
    mels = torch.linspace(mel_of_hz(config.f_min), mel_of_hz(config.f_max), bands + 2)
    edges = 700 * (10 ** (mels / 2595) - 1)
    low, centre, high = edges[:-2], edges[1:-1], edges[2:]
    rising = (bins - low) / (centre - low)
    falling = (high - bins) / (high - centre)
    return torch.minimum(rising, falling).clamp(min=0)


def mel_of_hz(hz: float) -> float:
    return 2595 * math.log10(1 + hz / 700)
