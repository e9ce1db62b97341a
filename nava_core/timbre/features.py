"""ReDimNet's front ends: 16 kHz waveform -> normalised log features, (B, samples) -> (B, bands, frames), float32.

The buffers carry the published files' names (`spec.torchfbank.*`), so that a file's own window and filter bank are the
ones used, whichever way the spectrogram is computed.
"""

import torch
from torch import nn
from torch.nn import functional as F

from .config import FrontEndConfig
from .dft import DftSpectrogram
from .mel import mel_spectrogram

PRE_EMPHASIS = 0.97
LOG_OFFSET = 1e-6
NORM_OFFSET = 1e-8
SIGNAL_OFFSETS = {"mel": 1e-6, "tf_spectrogram": 1e-10}


class FrontEnd(nn.Module):
    """Signal normalised and its treble raised (both as the configuration says), a spectrogram, its log, every band
    normalised over time, and bands averaged where that is asked for. Needs more than n_fft / 2 samples.

    use_torchaudio: see `mel_spectrogram`.
    """

    def __init__(self, config: FrontEndConfig, bands: int, *, use_torchaudio: bool | None = None):
        super().__init__()
        of_mel = config.kind == "mel"
        steps = nn.Sequential(
            NormaliseSignal(SIGNAL_OFFSETS.get(config.kind, config.eps)) if config.norm_signal else nn.Identity(),
            PreEmphasis() if config.do_preemph else nn.Identity(),
            mel_spectrogram(config, bands, use_torchaudio=use_torchaudio) if of_mel else DftSpectrogram(config, bands),
        )
        self.steps_name = "spectrogram" if config.kind == "tf_spectrogram" else "torchfbank"
        self.add_module(self.steps_name, steps)
        self.log_offset = LOG_OFFSET if of_mel else config.eps
        self.spec_norm = nn.BatchNorm1d(bands) if config.spec_norm == "bn" else BandNorm(config.spec_norm == "mvn")
        pool = config.pool_freqs if config.kind == "tf_spectrogram" else None
        self.pool_freq = nn.Identity() if pool is None else nn.AvgPool2d(pool)

    def forward(self, waveform: torch.Tensor) -> torch.Tensor:
        power = self.get_submodule(self.steps_name)(waveform.float())
        features = self.spec_norm((power + self.log_offset).log())
        return self.pool_freq(features.unsqueeze(1)).squeeze(1)


class NormaliseSignal(nn.Module):
    """(B, samples) to mean 0 and deviation 1 each."""

    def __init__(self, offset: float):
        super().__init__()
        self.offset = offset

    def forward(self, waveform: torch.Tensor) -> torch.Tensor:
        deviation = waveform.std(dim=-1, keepdim=True, unbiased=False)
        return (waveform - waveform.mean(dim=-1, keepdim=True)) / (deviation + self.offset)


class PreEmphasis(nn.Module):
    """y[i] = x[i] - 0.97 x[i - 1], with x[-1] mirrored to x[1]. (B, samples) -> (B, samples)."""

    def __init__(self):
        super().__init__()
        self.register_buffer("flipped_filter", torch.tensor([[[-PRE_EMPHASIS, 1.0]]]))

    def forward(self, waveform: torch.Tensor) -> torch.Tensor:
        mirrored = F.pad(waveform.unsqueeze(1), (1, 0), mode="reflect")
        return F.conv1d(mirrored, self.flipped_filter).squeeze(1)


class BandNorm(nn.Module):
    """Takes every band's mean over time off, and divides by its deviation where `scales`."""

    def __init__(self, scales: bool):
        super().__init__()
        self.scales = scales

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        centred = features - features.mean(dim=-1, keepdim=True)
        return centred / (features.std(dim=-1, keepdim=True) + NORM_OFFSET) if self.scales else centred
