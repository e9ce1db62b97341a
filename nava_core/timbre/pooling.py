"""What turns frames into one vector: (B, features, frames) -> (B, size). The names are `pooling_func`'s."""

import torch
from torch import nn

from .config import POOLING_HEADS

BOTTLENECK = 128
HEAD_BOTTLENECK = 64
QUERIES = 2
VARIANCE_FLOOR = 1e-7


def make_pooling(name: str, features: int, global_context: bool) -> tuple[nn.Module, int]:
    """The module of that name and the size of what it gives."""
    if name == "ASTP":
        return AttentiveStatistics(features, global_context), 2 * features
    if name == "MHASTP":
        return HeadedStatistics(features, POOLING_HEADS[name], whole_heads=False), 2 * features
    if name == "MQMHASTP":
        return QueriedStatistics(features, POOLING_HEADS[name]), 2 * features * QUERIES
    return Statistics(name), 2 * features if name == "TSTP" else features


class Statistics(nn.Module):
    """Mean (TAP), maximum plus mean (TMAP), deviation (TSDP), or mean and deviation (TSTP) over frames."""

    def __init__(self, name: str):
        super().__init__()
        self.name = name

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.name == "TAP":
            return x.mean(dim=-1)
        if self.name == "TMAP":
            return x.amax(dim=-1) + x.mean(dim=-1)
        deviation = _deviation(x).squeeze(-1)
        return deviation if self.name == "TSDP" else torch.cat([x.mean(dim=-1), deviation], dim=1)


class AttentiveStatistics(nn.Module):
    """Attention-weighted mean and deviation over frames; with `global_context` every frame's weight is computed in
    sight of the whole recording's mean and deviation."""

    def __init__(self, features: int, global_context: bool):
        super().__init__()
        self.global_context = global_context
        self.linear1 = nn.Conv1d(3 * features if global_context else features, BOTTLENECK, 1)
        self.linear2 = nn.Conv1d(BOTTLENECK, features, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        seen = x
        if self.global_context:
            mean = x.mean(dim=-1, keepdim=True)
            seen = torch.cat([x, mean.expand_as(x), _deviation(x).expand_as(x)], dim=1)
        weights = self.linear2(torch.tanh(self.linear1(seen))).softmax(dim=-1)
        return _weighted(x, weights)


class HeadedStatistics(nn.Module):
    """As AttentiveStatistics without context, by heads: each weighs its share of the features, either all of them by
    one weight a frame, or, with `whole_heads`, each by its own."""

    def __init__(self, features: int, heads: int, *, whole_heads: bool):
        super().__init__()
        share = features // heads
        self.heads_att_trans = nn.ModuleList(
            nn.ModuleDict(
                {
                    "att_0": nn.Conv1d(share, HEAD_BOTTLENECK, 1),
                    "att_1": nn.Conv1d(HEAD_BOTTLENECK, share if whole_heads else 1, 1),
                }
            )
            for _ in range(heads)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        pooled = []
        shares = x.chunk(len(self.heads_att_trans), dim=1)
        for head, share in zip(self.heads_att_trans, shares, strict=True):
            weights = head["att_1"](torch.tanh(head["att_0"](share))).softmax(dim=-1)
            pooled.append(_weighted(share, weights))
        return torch.cat(pooled, dim=1)


class QueriedStatistics(nn.Module):
    """Several HeadedStatistics of the same frames side by side."""

    def __init__(self, features: int, heads: int):
        super().__init__()
        self.n_query = nn.ModuleList(HeadedStatistics(features, heads, whole_heads=True) for _ in range(QUERIES))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([query(x) for query in self.n_query], dim=-1)


def _deviation(x: torch.Tensor) -> torch.Tensor:
    return (x.var(dim=-1, keepdim=True) + VARIANCE_FLOOR).sqrt()


def _weighted(x: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Mean and deviation over frames, weights (B, features or 1, frames) adding up to 1."""
    mean = (weights * x).sum(dim=-1)
    variance = (weights * x.square()).sum(dim=-1) - mean.square()
    return torch.cat([mean, variance.clamp(min=VARIANCE_FLOOR).sqrt()], dim=1)
