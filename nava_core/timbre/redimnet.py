"""ReDimNet, the speaker encoder whose embedding is NAVA's timbre.

The network follows "Reshape Dimensions Network for Speaker Recognition" (arXiv 2407.18223): features travel as
(batch, channels * bands, frames); every stage folds a learned mix of all earlier outputs into a 2-D map, refines it
with convolutions, unfolds it and lets frames see each other. Parameter names are the published checkpoints'.
"""

from collections.abc import Sequence

import torch
from torch import nn

from .blocks import ChannelNorm, MapBlock, TimeContext, narrowing
from .config import EMBEDDING_SIZE, ReDimNetConfig, Stage
from .features import FrontEnd
from .pooling import make_pooling


class ReDimNet(nn.Module):
    """(B, samples) at 16 kHz, float32, at least one second -> speaker embeddings (B, 192)."""

    def __init__(self, config: ReDimNetConfig, *, use_torchaudio: bool | None = None):
        super().__init__()
        self.config = config
        with torch.device("cpu"):  # constants, real even where the rest is laid out on the meta device
            self.spec = FrontEnd(config.front_end, config.bands, use_torchaudio=use_torchaudio)
        self.backbone = Backbone(config)
        self.pool, pooled = make_pooling(config.pooling, config.pooled, config.global_context)
        self.bn = nn.BatchNorm1d(pooled)
        self.linear = nn.Linear(pooled, EMBEDDING_SIZE)
        self.bn2 = nn.BatchNorm1d(EMBEDDING_SIZE) if config.embedding_norm else nn.Identity()

    def forward(self, waveform: torch.Tensor) -> torch.Tensor:
        frames = self.backbone(self.spec(waveform).unsqueeze(1))
        return self.bn2(self.linear(self.bn(self.pool(frames))))


class Backbone(nn.Module):
    """Features (B, 1, bands, frames) -> frame features (B, config.pooled, frames)."""

    def __init__(self, config: ReDimNetConfig):
        super().__init__()
        channels, bands = config.channels, config.bands
        self.stem = nn.Sequential(nn.Conv2d(1, channels, 3, padding=1), ChannelNorm(channels), Unfold2d())
        self.stage_names = []
        for index, stage in enumerate(config.stages):
            self.stage_names.append(f"stage{index}")
            self.add_module(self.stage_names[-1], _stage(config, stage, index, channels, bands))
            channels, bands = channels * stage.stride, bands // stage.stride
        self.fin_wght1d = FeatureMix(len(config.stages) + 1, config.width)
        self.mfa = nn.Identity()
        if config.out_channels is not None:
            self.mfa = nn.Sequential(nn.Conv1d(config.width, config.pooled, 1), nn.BatchNorm1d(config.pooled))

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        outputs = [self.stem(features)]
        for name in self.stage_names:
            outputs.append(self.get_submodule(name)(outputs))
        return self.mfa(self.fin_wght1d(outputs))


def _stage(config: ReDimNetConfig, stage: Stage, index: int, channels: int, bands: int) -> nn.Sequential:
    """All earlier outputs (B, width, frames) -> the next; `channels` and `bands` are those before the stage."""
    merged, left = channels * stage.stride, bands // stage.stride
    widened = int(merged * stage.expansion)
    layers = [
        FeatureMix(index + 1, config.width if index else 1),
        Fold2d(channels, bands),
        nn.Conv2d(channels, widened, (stage.stride, 1), stride=(stage.stride, 1)),
    ]
    layers += [MapBlock(config.map_block, widened, left, config.group_divisor) for _ in range(stage.blocks)]
    if stage.expansion != 1:
        layers.append(narrowing(widened, merged, config.group_divisor))
    layers.append(Unfold2d())
    if stage.reduction is not None:
        layers.append(TimeContext(config.time_block, config.width, config.width // stage.reduction))
    return nn.Sequential(*layers)


class FeatureMix(nn.Module):
    """Convex combination of `count` feature sequences (B, width, frames), weighted per feature."""

    def __init__(self, count: int, width: int):
        super().__init__()
        self.w = nn.Parameter(torch.zeros(1, count, width, 1))

    def forward(self, features: Sequence[torch.Tensor]) -> torch.Tensor:
        weights = self.w.softmax(dim=1)
        return sum(weights[:, i] * feature for i, feature in enumerate(features))


class Fold2d(nn.Module):
    """(B, bands * channels, frames) -> (B, channels, bands, frames); bands are the slow index."""

    def __init__(self, channels: int, bands: int):
        super().__init__()
        self.channels, self.bands = channels, bands

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.unflatten(1, (self.bands, self.channels)).transpose(1, 2)


class Unfold2d(nn.Module):
    """The inverse: (B, channels, bands, frames) -> (B, bands * channels, frames)."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.transpose(1, 2).flatten(1, 2)
