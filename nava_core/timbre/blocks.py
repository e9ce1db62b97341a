"""ReDimNet's building blocks: convolutions over (channels, bands, frames) maps, and ways for frames to see each other.

Parameter names are the published checkpoints'.
"""

import torch
from torch import nn
from torch.nn import functional as F

from .config import ATTENTION_HEADS, group_count

POSITION_KERNEL = 59
NORM_EPS = 1e-6
_CONV = {1: nn.Conv1d, 2: nn.Conv2d}
_BATCH_NORM = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d}


class ChannelNorm(nn.Module):
    """LayerNorm over dimension 1 of (B, channels, ...)."""

    def __init__(self, channels: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        normed = F.layer_norm(x.movedim(1, -1), self.weight.shape, self.weight, self.bias, NORM_EPS)
        return normed.movedim(-1, 1)


# ---- maps (B, channels, bands, frames)


class MapBlock(nn.Module):
    """One convolution block of a stage, of the kind that `block_2d_type` names."""

    def __init__(self, kind: str, channels: int, bands: int, group_divisor: int | None):
        super().__init__()
        if kind.startswith("convnext_like"):
            groups = group_count(channels, group_divisor)
            activation = nn.ReLU() if kind.endswith("relu") else nn.GELU()
            self.conv_block = ConvNeXtLike(2, channels, [3], groups, activation)
        else:
            self.conv_block = BasicResNet(channels, bands, group_divisor, reweighs=kind.endswith("fwse"))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv_block(x)


class ConvNeXtLike(nn.Module):
    """Residual: grouped convolutions of several lengths side by side, batch norm, activation, a pointwise convolution.

    `dim` 1: (B, channels, frames); 2: (B, channels, bands, frames).
    """

    def __init__(self, dim: int, channels: int, kernels: list[int], groups: int, activation: nn.Module):
        super().__init__()
        convolution = _CONV[dim]
        self.dwconvs = nn.ModuleList(
            convolution(channels, channels, size, padding=size // 2, groups=groups) for size in kernels
        )
        self.norm = _BATCH_NORM[dim](channels * len(kernels))
        self.act = activation
        self.pwconv1 = convolution(channels * len(kernels), channels, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        seen = torch.cat([convolution(x) for convolution in self.dwconvs], dim=1)
        return x + self.pwconv1(self.act(self.norm(seen)))


class BasicResNet(nn.Module):
    """Residual: two 3 x 3 convolutions, grouped ones followed by pointwise ones, with band weights where `reweighs`."""

    def __init__(self, channels: int, bands: int, group_divisor: int | None, *, reweighs: bool):
        super().__init__()
        groups = group_count(channels, group_divisor)
        for index in (1, 2):
            convolution = nn.Conv2d(channels, channels, 3, padding=1, groups=groups, bias=False)
            pointwise = nn.Identity() if group_divisor is None else nn.Conv2d(channels, channels, 1)
            self.add_module(f"conv{index}", convolution)
            self.add_module(f"conv{index}pw", pointwise)
            self.add_module(f"bn{index}", nn.BatchNorm2d(channels))
        self.se = BandWeights(bands, min(64, max(channels, 32))) if reweighs else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.bn1(F.relu(self.conv1pw(self.conv1(x))))  # the norm comes after the activation here
        hidden = self.bn2(self.conv2pw(self.conv2(hidden)))
        return F.relu(self.se(hidden) + x)


class BandWeights(nn.Module):
    """Squeeze-and-excitation over bands: each is scaled by a weight from 0 to 1, computed from all their means."""

    def __init__(self, bands: int, hidden: int):
        super().__init__()
        self.squeeze = nn.Linear(bands, hidden)
        self.exitation = nn.Linear(hidden, bands)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weights = self.exitation(F.relu(self.squeeze(x.mean(dim=(1, 3)))))
        return x * weights.sigmoid()[:, None, :, None]


def narrowing(widened: int, channels: int, group_divisor: int | None) -> nn.Sequential:
    """What brings a stage with expanded channels back to as many as its neighbours have."""
    return nn.Sequential(
        nn.Conv2d(widened, channels, 3, padding=1, groups=group_count(channels, group_divisor)),
        nn.BatchNorm2d(channels, eps=NORM_EPS),
        nn.GELU(),
        nn.Conv2d(channels, channels, 1),
    )


# ---- sequences (B, width, frames)


class TimeContext(nn.Module):
    """Residual context over frames at a reduced width, of the kind that `block_1d_type` names."""

    def __init__(self, kind: str, width: int, reduced: int):
        super().__init__()
        self.red_dim_conv = nn.Sequential(nn.Conv1d(width, reduced, 1), ChannelNorm(reduced))
        self.tcm = _context(kind, reduced)
        self.exp_dim_conv = nn.Conv1d(reduced, width, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.exp_dim_conv(self.tcm(self.red_dim_conv(x)))


def _context(kind: str, width: int) -> nn.Sequential:
    def convolutions(*kernels: list[int]) -> list[nn.Module]:
        return [ConvNeXtLike(1, width, sizes, width, nn.GELU()) for sizes in kernels]

    if kind == "fc":
        wide = 2 * width
        return nn.Sequential(nn.Conv1d(width, wide, 1), ChannelNorm(wide), nn.GELU(), nn.Conv1d(wide, width, 1))
    if kind == "conv":
        return nn.Sequential(*convolutions(*([[7, 15, 31]] * 4)))
    if kind == "conv+att":
        return nn.Sequential(*convolutions([7], [19], [31], [59]), TransformerLayer(width, width))
    return nn.Sequential(ConvPosition(width), TransformerLayer(width, 2 * width))


class ConvPosition(nn.Module):
    """Positions from a wide depthwise convolution over frames, added to (B, width, frames)."""

    def __init__(self, width: int):
        super().__init__()
        self.conv = nn.Conv1d(width, width, POSITION_KERNEL, padding=POSITION_KERNEL // 2, groups=width)
        self.norm = ChannelNorm(width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.norm(self.conv(x))


class TransformerLayer(nn.Module):
    """Post-norm self-attention and feed-forward layer on (B, width, frames)."""

    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.attention = SelfAttention(width)
        self.layer_norm = nn.LayerNorm(width, eps=NORM_EPS)
        self.feed_forward = nn.ModuleDict(
            {"intermediate_dense": nn.Linear(width, hidden), "output_dense": nn.Linear(hidden, width)}
        )
        self.final_layer_norm = nn.LayerNorm(width, eps=NORM_EPS)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.transpose(1, 2)
        x = self.layer_norm(x + self.attention(x))
        hidden = F.gelu(self.feed_forward["intermediate_dense"](x), approximate="tanh")
        return self.final_layer_norm(x + self.feed_forward["output_dense"](hidden)).transpose(1, 2)


class SelfAttention(nn.Module):
    """Multi-head self-attention over (B, frames, width)."""

    def __init__(self, width: int):
        super().__init__()
        self.q_proj = nn.Linear(width, width)
        self.k_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.out_proj = nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (
            projection(x).unflatten(-1, (ATTENTION_HEADS, -1)).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        attended = F.scaled_dot_product_attention(q, k, v)
        return self.out_proj(attended.transpose(1, 2).flatten(2))
