"""The transformer as one would write it straight from its description: the yardstick for ``nava_core.backbone``.

Nothing here is clever: six modulation vectors for every token, q and k rotated in complex128 at every layer, whole
tensors kept, one line a step. It takes the checkpoint's tensors by their own names, and the arguments of
``NavaBackbone.forward``.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nava_core.backbone import BackboneConfig

ROTARY_BASE = 10000.0
AUDIO_RATE = (24 / 4) / 25  # video latents per audio latent
NULL_ENERGY = 1e-6  # a voice whose sum of squares is no larger is no voice


# ---------------------------------------------------------------- positions


def axis_angles(positions: Tensor, width: int, rate: float = 1.0) -> Tensor:
    """(tokens, width / 2) rotary angles of one axis at positions (tokens,) float64."""
    pairs = torch.arange(0, width, 2, dtype=torch.float64, device=positions.device)
    return torch.outer(positions, rate * ROTARY_BASE ** (-pairs / width))


def rotations(head_dim: int, grid: tuple[int, int, int], steps: int, device: torch.device) -> Tensor:
    """(tokens, head_dim / 2) unit complex numbers, complex128: video tokens (t, h, w), then audio tokens."""
    temporal, spatial = head_dim - 4 * (head_dim // 6), 2 * (head_dim // 6)
    frame, row, column = torch.meshgrid(
        *(torch.arange(n, dtype=torch.float64, device=device) for n in grid), indexing="ij"
    )
    video = torch.cat(
        [
            axis_angles(frame.flatten(), temporal),
            axis_angles(row.flatten(), spatial),
            axis_angles(column.flatten(), spatial),
        ],
        dim=1,
    )
    step = torch.arange(steps, dtype=torch.float64, device=device)
    audio = F.pad(axis_angles(step, temporal, AUDIO_RATE), (0, spatial))  # two spatial axes of spatial / 2 pairs
    angles = torch.cat([video, audio])
    return torch.polar(torch.ones_like(angles), angles)


def rotate(x: Tensor, rotation: Tensor) -> Tensor:
    """x (B, L, heads, head_dim) with its pairs (2i, 2i + 1) turned by rotation (L, head_dim / 2)."""
    pairs = torch.view_as_complex(x.to(torch.float64).unflatten(-1, (-1, 2)))
    turned = pairs * rotation[:, None]
    return torch.view_as_real(turned).flatten(-2).to(x.dtype)


def sinusoid(timestep: Tensor, width: int) -> Tensor:
    """(..., width) of timesteps (...) on 0..1000: cosines first, then sines, float64."""
    half = width // 2
    frequency = ROTARY_BASE ** (-torch.arange(half, dtype=torch.float64, device=timestep.device) / half)
    angle = timestep.to(torch.float64)[..., None] * frequency
    return torch.cat([angle.cos(), angle.sin()], dim=-1)


# ---------------------------------------------------------------- layers


class ConvMLP(nn.Module):
    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.w1 = nn.Conv1d(dim, hidden, 7, padding=3, bias=False)
        self.w2 = nn.Conv1d(hidden, dim, 7, padding=3, bias=False)
        self.w3 = nn.Conv1d(dim, hidden, 7, padding=3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class SpeakerEmbedding(nn.Module):
    def __init__(self, speaker_dim: int, dim: int):
        super().__init__()
        self.net = nn.Sequential(
            nn.LayerNorm(speaker_dim, eps=1e-5), nn.Linear(speaker_dim, dim), nn.SiLU(), nn.Linear(dim, dim)
        )
        self.out_norm = nn.LayerNorm(dim, eps=1e-5)
        self.null_token = nn.Parameter(torch.zeros(1, dim))

    def forward(self, voice: Tensor) -> Tensor:
        """(B, S, speaker_dim) -> (B, S, dim)"""
        silent = voice.float().square().sum(-1, keepdim=True) <= NULL_ENERGY
        return torch.where(silent, self.null_token, self.out_norm(self.net(voice)))


class Modulation(nn.Module):
    def __init__(self, parts: int, dim: int):
        super().__init__()
        self.modulation = nn.Parameter(torch.zeros(1, parts, dim))


class Head(nn.Module):
    def __init__(self, dim: int, out: int, eps: float):
        super().__init__()
        self.norm = nn.LayerNorm(dim, eps=eps, elementwise_affine=False)
        self.head = nn.Linear(dim, out)
        self.modulation = nn.Parameter(torch.zeros(1, 2, dim))

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        shift, scale = (self.modulation + embedding[:, :, None]).unbind(2)
        return self.head(self.norm(x) * (1 + scale) + shift)


class Attention(nn.Module):
    """The projections of one attention; ``own`` gives audio a set of its own."""

    def __init__(self, config: BackboneConfig, own: bool, attention):
        super().__init__()
        self.heads, self.own, self.attention = config.num_heads, own, attention
        for suffix in ("", "_audio") if own else ("",):
            for name in "qkvo":
                setattr(self, name + suffix, nn.Linear(config.dim, config.dim))
            for name in ("norm_q", "norm_k"):
                setattr(self, name + suffix, nn.RMSNorm(config.dim, eps=config.eps))

    def query(self, x: Tensor, suffix: str) -> Tensor:
        return self.split(getattr(self, "norm_q" + suffix)(getattr(self, "q" + suffix)(x)))

    def key(self, x: Tensor, suffix: str) -> Tensor:
        return self.split(getattr(self, "norm_k" + suffix)(getattr(self, "k" + suffix)(x)))

    def value(self, x: Tensor, suffix: str) -> Tensor:
        return self.split(getattr(self, "v" + suffix)(x))

    def out(self, x: Tensor, suffix: str) -> Tensor:
        return getattr(self, "o" + suffix)(x)

    def split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1))

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = self.attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
        return out.transpose(1, 2).flatten(-2)

    def per_modality(self, x: Tensor, videos: int, function) -> Tensor:
        """function(tokens, suffix) on all tokens, or on video's and on audio's where audio has its own set."""
        if not self.own:
            return function(x, "")
        return torch.cat([function(x[:, :videos], ""), function(x[:, videos:], "_audio")], dim=1)


class SelfAttention(Attention):
    def forward(self, x: Tensor, videos: int, rotation: Tensor, cross_modal: bool) -> Tensor:
        q = rotate(self.per_modality(x, videos, self.query), rotation)
        k = rotate(self.per_modality(x, videos, self.key), rotation)
        v = self.per_modality(x, videos, self.value)
        if cross_modal or videos in (0, x.shape[1]):
            out = self.attend(q, k, v)
        else:
            video = self.attend(q[:, :videos], k[:, :videos], v[:, :videos])
            audio = self.attend(q[:, videos:], k[:, videos:], v[:, videos:])
            out = torch.cat([video, audio], dim=1)
        return self.per_modality(out, videos, self.out)


class CrossAttention(Attention):
    def forward(self, x: Tensor, videos: int, context: Tensor) -> Tensor:
        def attend(tokens: Tensor, suffix: str) -> Tensor:
            if tokens.shape[1] == 0:
                return tokens
            q, k, v = self.query(tokens, suffix), self.key(context, suffix), self.value(context, suffix)
            return self.out(self.attend(q, k, v), suffix)

        return self.per_modality(x, videos, attend)


class Block(nn.Module):
    """An alignment layer where audio has projections and modulation of its own, else a fusion layer."""

    def __init__(self, config: BackboneConfig, own: bool, attention):
        super().__init__()
        self.norm1 = nn.LayerNorm(config.dim, eps=config.eps, elementwise_affine=False)
        self.self_attn = SelfAttention(config, own, attention)
        self.norm3 = nn.LayerNorm(config.dim, eps=config.eps)
        self.cross_attn = CrossAttention(config, own, attention)
        self.norm2 = nn.LayerNorm(config.dim, eps=config.eps, elementwise_affine=False)
        self.ffn = nn.Sequential(
            nn.Linear(config.dim, config.ffn_dim), nn.GELU(approximate="tanh"), nn.Linear(config.ffn_dim, config.dim)
        )
        self.modulation = Modulation(6, config.dim)
        if own:
            self.modulation_audio = Modulation(6, config.dim)

    def modulations(self, projection: Tensor, videos: int) -> tuple[Tensor, ...]:
        """Six (B, tokens, dim) of the time projection (B, tokens, 6, dim)."""
        if not hasattr(self, "modulation_audio"):
            return (self.modulation.modulation + projection).unbind(2)
        video = self.modulation.modulation + projection[:, :videos]
        audio = self.modulation_audio.modulation + projection[:, videos:]
        return torch.cat([video, audio], dim=1).unbind(2)

    def forward(self, x, videos: int, projection: Tensor, rotation: Tensor, context: Tensor, cross_modal: bool):
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulations(projection, videos)
        h = self.norm1(x) * (1 + scale1) + shift1
        x = x + gate1 * self.self_attn(h, videos, rotation, cross_modal)
        x = x + self.cross_attn(self.norm3(x), videos, context)
        return x + gate2 * self.ffn(self.norm2(x) * (1 + scale2) + shift2)


# ---------------------------------------------------------------- the model


class PlainBackbone(nn.Module):
    """The whole network; arguments and results of ``forward`` are those of ``NavaBackbone.forward``.

    ``attention(q, k, v)`` on (B, heads, L, head_dim) can be replaced where only shapes matter.
    """

    def __init__(self, config: BackboneConfig, attention=F.scaled_dot_product_attention):
        super().__init__()
        self.config = config
        dim = config.dim
        hidden = -(-int(2 * 4 * dim / 3) // 256) * 256
        self.patch_embedding = nn.Conv3d(config.vid_in_dim, dim, (1, 2, 2), stride=(1, 2, 2))
        self.patch_embedding_audio = nn.Sequential(
            nn.Conv1d(config.audio_in_dim, dim, 7, padding=3), nn.SiLU(), ConvMLP(dim, hidden)
        )
        self.text_embedding = nn.Sequential(
            nn.Linear(config.text_dim, dim), nn.GELU(approximate="tanh"), nn.Linear(dim, dim)
        )
        self.speaker_embedding = SpeakerEmbedding(config.speaker_dim, dim)
        self.time_embedding = nn.Sequential(nn.Linear(config.freq_dim, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.time_projection = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))
        self.double_blocks = nn.ModuleList(Block(config, True, attention) for _ in range(config.num_double_layers))
        self.single_blocks = nn.ModuleList(Block(config, False, attention) for _ in range(config.num_single_layers))
        self.head = Head(dim, 4 * config.vid_out_dim, config.eps)
        self.head_audio = Head(dim, config.audio_out_dim, config.eps)

    def forward(
        self,
        video: Tensor | None,
        audio: Tensor | None,
        timestep: Tensor | tuple[Tensor, Tensor],
        context: Tensor,
        *,
        timbre: Tensor | None = None,
        timbre_positions: Tensor | None = None,
        cross_modal: bool = True,
        options: object = None,
    ) -> tuple[Tensor | None, Tensor | None]:
        tokens, timesteps = [], []
        video_time, audio_time = timestep if isinstance(timestep, tuple) else (timestep, timestep)
        grid, videos, steps = (0, 0, 0), 0, 0
        if video is not None:
            padded = F.pad(video, (0, video.shape[-1] % 2, 0, video.shape[-2] % 2))
            patches = self.patch_embedding(padded)
            grid = tuple(patches.shape[2:])
            tokens.append(patches.flatten(2).transpose(1, 2))
            videos = tokens[0].shape[1]
            timesteps.append(self.per_token(video_time, grid[0], videos))
        if audio is not None:
            steps = audio.shape[1]
            tokens.append(self.patch_embedding_audio(audio.transpose(1, 2)).transpose(1, 2))
            timesteps.append(self.per_token(audio_time, steps, steps))
        x = torch.cat(tokens, dim=1)

        embedding = self.time_embedding(sinusoid(torch.cat(timesteps, dim=1), self.config.freq_dim).to(x.dtype))
        projection = self.time_projection(embedding).unflatten(-1, (6, -1))
        rotation = rotations(self.config.dim // self.config.num_heads, grid, steps, x.device)
        context = self.embed_context(context, timbre, timbre_positions)

        for block in [*self.double_blocks, *self.single_blocks]:
            x = block(x, videos, projection, rotation, context, cross_modal)

        video_out = audio_out = None
        if video is not None:
            patches = self.head(x[:, :videos], embedding[:, :videos])
            video_out = self.unpatchify(patches, grid)[..., : video.shape[-2], : video.shape[-1]]
        if audio is not None:
            audio_out = self.head_audio(x[:, videos:], embedding[:, videos:])
        return video_out, audio_out

    @staticmethod
    def per_token(timestep: Tensor, own: int, tokens: int) -> Tensor:
        """(B, tokens) timesteps of (B,), or of (B, own) with own frames or steps."""
        if timestep.ndim == 1:
            timestep = timestep[:, None].expand(-1, own)
        return timestep.repeat_interleave(tokens // own, dim=1)

    def embed_context(self, context: Tensor, timbre: Tensor | None, positions: Tensor | None) -> Tensor:
        """(B, text_len, dim): the zero-padded text, projected, with the voices at their positions."""
        context = F.pad(context, (0, 0, 0, self.config.text_len - context.shape[1]))
        context = self.text_embedding(context)
        if timbre is None:
            return context
        voices = self.speaker_embedding(timbre)
        for sample in range(context.shape[0]):
            for span, position in enumerate(positions[sample].tolist()):
                if position >= 0:
                    context[sample, position] = voices[sample, span]
        return context

    def unpatchify(self, patches: Tensor, grid: tuple[int, int, int]) -> Tensor:
        """(B, t h w, 2 2 c) -> (B, c, t, 2 h, 2 w)"""
        frames, rows, columns = grid
        x = patches.reshape(-1, frames, rows, columns, 1, 2, 2, self.config.vid_out_dim)
        x = torch.einsum("bthwpqrc->bctphqwr", x)
        return x.reshape(-1, self.config.vid_out_dim, frames, 2 * rows, 2 * columns)
