"""ReDimNet's mel front end: 16 kHz waveform -> mean-normalised log mel features, with or without torchaudio.

The buffers carry the published file's names (`spec.torchfbank.*`), so that the file's own window and filter bank
are the ones used, whichever way the spectrogram is computed.
"""

import math
import warnings

import torch
from torch import nn
from torch.nn import functional as F

from .resample import find_torchaudio

SAMPLE_RATE = 16000
FFT_SIZE = 512
WINDOW_SIZE = 400
LOWEST_HZ = 20.0
HIGHEST_HZ = 7600.0
PRE_EMPHASIS = 0.97
LOG_OFFSET = 1e-6


class MelFrontEnd(nn.Module):
    """Pre-emphasis, mel power spectrogram, log, and subtraction of every band's mean over time.

    (B, samples) at 16 kHz -> (B, n_mels, samples // hop_length + 1), float32. Needs more than 256 samples.
    """

    def __init__(self, n_mels: int, hop_length: int = 160, *, use_torchaudio: bool | None = None):
        super().__init__()
        self.torchfbank = nn.Sequential(
            nn.Identity(), PreEmphasis(), mel_spectrogram(n_mels, hop_length, use_torchaudio=use_torchaudio)
        )

    def forward(self, waveform: torch.Tensor) -> torch.Tensor:
        features = (self.torchfbank(waveform.float()) + LOG_OFFSET).log()
        return features - features.mean(dim=-1, keepdim=True)


class PreEmphasis(nn.Module):
    """y[i] = x[i] - 0.97 x[i - 1], with x[-1] mirrored to x[1]. (B, samples) -> (B, samples)."""

    def __init__(self):
        super().__init__()
        self.register_buffer("flipped_filter", torch.tensor([[[-PRE_EMPHASIS, 1.0]]]))

    def forward(self, waveform: torch.Tensor) -> torch.Tensor:
        mirrored = F.pad(waveform.unsqueeze(1), (1, 0), mode="reflect")
        return F.conv1d(mirrored, self.flipped_filter).squeeze(1)


def mel_spectrogram(n_mels: int, hop_length: int, *, use_torchaudio: bool | None = None) -> nn.Module:
    """The module that turns (B, samples) into mel power (B, n_mels, frames): torchaudio's where it can be had.

    use_torchaudio: None takes torchaudio where it can be imported, False never, True insists on it. Both have the
    buffers `spectrogram.window` and `mel_scale.fb`.
    """
    torchaudio = None if use_torchaudio is False else find_torchaudio()
    if torchaudio is None:
        if use_torchaudio:
            raise RuntimeError("torchaudio was asked for but cannot be imported; install it or leave the choice open.")
        return MelSpectrogram(n_mels, hop_length)
    with warnings.catch_warnings():
        # The lowest bands are narrower than an FFT bin; that is how the model was trained.
        warnings.filterwarnings("ignore", message=".*mel filterbank has all zero values.*")
        return torchaudio.transforms.MelSpectrogram(
            sample_rate=SAMPLE_RATE,
            n_fft=FFT_SIZE,
            win_length=WINDOW_SIZE,
            hop_length=hop_length,
            f_min=LOWEST_HZ,
            f_max=HIGHEST_HZ,
            n_mels=n_mels,
            window_fn=torch.hamming_window,
        )


class MelSpectrogram(nn.Module):
    """The fallback without torchaudio: torch.stft power under a Hamming window, summed by a mel filter bank."""

    def __init__(self, n_mels: int, hop_length: int):
        super().__init__()
        self.hop_length = hop_length
        self.spectrogram = _Buffer("window", torch.hamming_window(WINDOW_SIZE))
        self.mel_scale = _Buffer("fb", mel_filter_bank(n_mels))

    def forward(self, waveform: torch.Tensor) -> torch.Tensor:
        spectrum = torch.stft(
            waveform,
            FFT_SIZE,
            hop_length=self.hop_length,
            win_length=WINDOW_SIZE,
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


def mel_filter_bank(n_mels: int) -> torch.Tensor:
    """Triangular filters of height 1, equally spaced on the mel scale 2595 log10(1 + f / 700): (257, n_mels)."""
    # In float32 throughout, as the published model's filter bank was made: its rounding is part of the model.
    bins = torch.linspace(0, SAMPLE_RATE / 2, FFT_SIZE // 2 + 1)[:, None]
    lowest, highest = (2595 * math.log10(1 + hz / 700) for hz in (LOWEST_HZ, HIGHEST_HZ))
    mels = torch.linspace(lowest, highest, n_mels + 2)
    edges = 700 * (10 ** (mels / 2595) - 1)
    low, centre, high = edges[:-2], edges[1:-1], edges[2:]
    rising = (bins - low) / (centre - low)
    falling = (high - bins) / (high - centre)
    return torch.minimum(rising, falling).clamp(min=0)
