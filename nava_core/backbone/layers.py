"""The backbone's parts: norms, rotary positions, modulation, attention and feed-forward.

Every layer takes ``operations`` (a namespace with Linear, LayerNorm, RMSNorm, Conv1d, Conv3d as ``torch.nn`` has them)
so that a host can put its own casting and offloading underneath. Tokens are always one tensor (B, video + audio, dim),
video first; ``split`` is the number of video tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

AUDIO_TIME_SCALE = 0.24  # ratio of the token rates: (24 fps / 4) video frames to 25 audio steps a second
# Work that looks at each token by itself runs in pieces of this many tokens, to bound its peak memory. Large for the
# feed-forward, whose weights a host may have to fetch anew for each piece.
FEED_FORWARD_TOKENS = 8192
NORM_TOKENS = 2048
NULL_TIMBRE_ENERGY = 1e-6  # a timbre whose sum of squares is not above this is "no voice"

# (q, k, v: (B, L, heads * head_dim), heads, options) -> (B, L, heads * head_dim)
AttentionFunction = Callable[[Tensor, Tensor, Tensor, int, object], Tensor]


@lru_cache(maxsize=1)
def _flash_attention():
    """flash-attn's function where the package is installed, else None."""
    try:
        from flash_attn import flash_attn_func
    except ImportError:
        return None
    return flash_attn_func


def default_attention(q: Tensor, k: Tensor, v: Tensor, heads: int, options: object = None) -> Tensor:
    """Full attention: flash-attn for half precision on CUDA where installed, else PyTorch's own.

    q, k, v: (B, L, heads * head_dim); returns the shape of q. ``options`` is not used.
    """
    q, k, v = (x.unflatten(-1, (heads, -1)) for x in (q, k, v))
    flash = _flash_attention() if q.is_cuda and q.dtype in (torch.float16, torch.bfloat16) else None
    if flash is not None:
        return flash(q, k, v).flatten(-2)
    out = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
    return out.transpose(1, 2).flatten(-2)


# ---------------------------------------------------------------- rotary positions


def rotary_table(head_dim: int, video_grid: tuple[int, int, int], audio_steps: int, audio_start: float = 0.0) -> Tensor:
    """Cosine and sine of each pair's rotation (video tokens + audio steps, head_dim / 2, 2), fp32, on the CPU.

    Video: 3D rotary on (frame, row, column). Audio: the temporal part only, its frequencies scaled by 0.24, the rest
    of the head left as it is. ``audio_start``: where its first step lies, in video frames. Computed in float64.
    """
    spatial = 2 * (head_dim // 6)
    temporal = head_dim - 2 * spatial

    def angles(positions: int, width: int, scale: float = 1.0, start: float = 0.0) -> Tensor:
        exponent = torch.arange(0, width, 2, dtype=torch.float64) / width
        return torch.outer(start + scale * torch.arange(positions, dtype=torch.float64), 1 / 10000**exponent)

    frames, rows, columns = video_grid
    video = torch.cat(
        [
            angles(frames, temporal)[:, None, None].expand(-1, rows, columns, -1),
            angles(rows, spatial)[None, :, None].expand(frames, -1, columns, -1),
            angles(columns, spatial)[None, None].expand(frames, rows, -1, -1),
        ],
        dim=-1,
    ).flatten(0, 2)
    audio = F.pad(angles(audio_steps, temporal, AUDIO_TIME_SCALE, audio_start), (0, spatial))
    angle = torch.cat([video, audio])
    return torch.stack([angle.cos(), angle.sin()], dim=-1).float()


def rotated(x: Tensor, table: Tensor, heads: int) -> Tensor:
    """``x`` (B, L, heads * head_dim) rotated by ``table`` (L, head_dim / 2, 2), in fp32; returns fp32."""
    pairs = x.float().unflatten(-1, (heads, -1, 2))
    if torch.compiler.is_compiling():  # it fuses real arithmetic over both halves of a pair, and has no complex
        cos, sin = table[:, None].unbind(-1)
        return (pairs * cos[..., None] + pairs.flip(-1) * torch.stack([-sin, sin], dim=-1)).flatten(2)
    turned = torch.view_as_complex(pairs) * torch.view_as_complex(table)[:, None]
    return torch.view_as_real(turned).flatten(2)


# ---------------------------------------------------------------- timesteps and modulation


def sinusoid(timesteps: Tensor, width: int) -> Tensor:
    """Sinusoidal embedding of timesteps (n,) on 0..1000 -> (n, width), cosines first, fp32."""
    half = width // 2
    precise = torch.float64 if timesteps.device.type in ("cpu", "cuda") else torch.float32  # not all GPUs have it
    frequencies = 10000.0 ** (-torch.arange(half, dtype=torch.float64) / half)
    angle = timesteps.to(precise)[:, None] * frequencies.to(timesteps.device, precise)
    return torch.cat([angle.cos(), angle.sin()], dim=-1).float()


class Modulation(nn.Module):
    """A learned offset (1, parts, dim) added to a timestep's vectors."""

    def __init__(self, parts: int, dim: int, dtype=None, device=None):
        super().__init__()
        self.modulation = nn.Parameter(torch.empty(1, parts, dim, dtype=dtype, device=device), requires_grad=False)

    def forward(self, vectors: Tensor) -> Tensor:
        return modulation_vectors(self.modulation, vectors)


def modulation_vectors(offset: Tensor, vectors: Tensor) -> Tensor:
    """(1, parts, dim) + (n, parts or 1, dim), in fp32: there are few, and their rounding reaches every token."""
    return offset.to(device=vectors.device, dtype=torch.float32) + vectors.float()


def grouped(vectors: Tensor, group: Tensor, like: Tensor) -> Tensor:
    """Pick each group's vectors: (n, parts, dim) by ``group`` (B, G) -> (parts, B, G, 1, dim) in ``like``'s type."""
    return vectors.to(like.dtype)[group].permute(2, 0, 1, 3)[:, :, :, None]


def per_stretch(tokens: Tensor, change_: Callable[..., None], stretches: list[tuple], *others: Tensor) -> Tensor:
    """``change_(tokens, *others, *vectors)``, in place, over each (slice of the tokens, vectors); returns the tokens.

    Each slice is seen as (B, G, tokens of a group, dim) for vectors (B, G, 1, dim).
    """
    compiling = torch.compiler.is_compiling()  # it fuses copies away, and fails at writing to slices of its inputs
    changed = []
    for part, vectors in stretches:
        views = []
        for x in (tokens, *others):  # a comprehension's own scope makes the compiler take slices for constants
            views.append(x[:, part].unflatten(1, (vectors[0].shape[1], -1)))
        if compiling:
            views[0] = views[0].clone()
        change_(*views, *vectors)
        changed.append(views[0].flatten(1, 2))
    return torch.cat(changed, dim=1) if compiling else tokens


def modulate_(tokens: Tensor, shift: Tensor, scale: Tensor) -> None:
    """tokens * scale + shift, in place."""
    tokens.mul_(scale).add_(shift)


def add_gated_(tokens: Tensor, update: Tensor, gate: Tensor) -> None:
    """tokens + gate * update, in place."""
    tokens.addcmul_(update, gate)


def modulated_norm(norm: nn.Module, tokens: Tensor, stretches: list[tuple]) -> Tensor:
    """``norm`` of the tokens, times scale plus shift over each (slice of the tokens, (shift, scale)); a new tensor."""
    return per_stretch(norm(tokens), modulate_, stretches)


@dataclass(frozen=True)
class Kernels:
    """Steps that a host may have fused kernels for; by default this module's own. Both leave their inputs alone.

    rotate(x, table, heads): :func:`rotated`, in fp32 or in x's type.
    modulated_norm(norm, tokens, stretches): :func:`modulated_norm`, ``norm`` being a LayerNorm without weights.
    """

    rotate: Callable[[Tensor, Tensor, int], Tensor] = rotated
    modulated_norm: Callable[[nn.Module, Tensor, list[tuple]], Tensor] = modulated_norm


OWN_KERNELS = Kernels()

# ---------------------------------------------------------------- attention and feed-forward

MODALITY_SUFFIXES = ("", "_audio")


class Projections(nn.Module):
    """q, k, v, o and the full-width RMS norms of q and k: one set, or one for video and one for audio."""

    def __init__(self, dim, num_heads, eps, per_modality: bool, operations, dtype=None, device=None):
        super().__init__()
        self.num_heads = num_heads
        self.per_modality = per_modality
        factory = {"dtype": dtype, "device": device}
        for suffix in MODALITY_SUFFIXES if per_modality else ("",):
            for name in "qkvo":
                setattr(self, name + suffix, operations.Linear(dim, dim, **factory))
            for name in ("norm_q", "norm_k"):
                setattr(self, name + suffix, operations.RMSNorm(dim, eps=eps, **factory))

    def per_part(self, x: Tensor, split: int, function: Callable[[str, Tensor], Tensor]) -> Tensor:
        """``function(suffix, tokens)`` over each stretch of ``x`` (B, L, dim) that has weights of its own."""
        if not self.per_modality:
            return function("", x)
        video, audio = MODALITY_SUFFIXES
        if split == 0:
            return function(audio, x)
        if split == x.shape[1]:
            return function(video, x)
        if torch.compiler.is_compiling():  # writing to slices would keep both
            return torch.cat([function(video, x[:, :split]), function(audio, x[:, split:])], dim=1)
        out = torch.empty_like(x)
        out[:, :split] = function(video, x[:, :split])
        out[:, split:] = function(audio, x[:, split:])
        return out

    def project(self, name: str, suffix: str, x: Tensor) -> Tensor:
        """One of q, k, v, o."""
        return getattr(self, name + suffix)(x)

    def normalise_(
        self, name: str, suffix: str, x: Tensor, table: Tensor | None = None, kernels: Kernels = OWN_KERNELS
    ) -> Tensor:
        """RMS norm of q or k, and its rotation by ``table``, in place and in pieces: both need fp32 copies."""
        norm = getattr(self, f"norm_{name}{suffix}")
        if torch.compiler.is_compiling():  # it fuses the copies away, and the number of pieces would be part of a graph
            piece = norm(x)
            return x.copy_(piece if table is None else kernels.rotate(piece, table, self.num_heads))
        for start in range(0, x.shape[1], NORM_TOKENS):
            part = slice(start, start + NORM_TOKENS)
            piece = norm(x[:, part])
            x[:, part] = piece if table is None else kernels.rotate(piece, table[part], self.num_heads)
        return x


def self_attention(
    q: Tensor, k: Tensor, v: Tensor, heads: int, *, split: int, cross_modal: bool, attention, options
) -> Tensor:
    """Attention over [video; audio], the first ``split`` tokens being video: joint, or each modality to itself.

    q, k, v: (B, L, heads * head_dim); returns the shape of q, written over q where the modalities are apart.
    """
    if cross_modal or split in (0, q.shape[1]):
        return attention(q, k, v, heads, options)
    for part in (slice(0, split), slice(split, None)):
        q[:, part] = attention(q[:, part], k[:, part], v[:, part], heads, options)
    return q


class SelfAttention(Projections):
    """Self-attention over [video; audio]; ``attend`` is ``self_attention`` with the pass's settings filled in."""

    def forward(
        self,
        x: Tensor,
        split: int,
        table: Tensor,
        attend: Callable[[Tensor, Tensor, Tensor, int], Tensor],
        kernels: Kernels,
    ) -> Tensor:
        q, k = (self._positioned(name, x, split, table, kernels) for name in "qk")
        v = self.per_part(x, split, partial(self.project, "v"))
        out = attend(q, k, v, self.num_heads)
        del q, k, v
        return self.per_part(out, split, partial(self.project, "o"))

    def _positioned(self, name: str, x: Tensor, split: int, table: Tensor, kernels: Kernels) -> Tensor:
        """q or k of all tokens, normalised and rotated."""
        tables = {"": table} if not self.per_modality else {"": table[:split], "_audio": table[split:]}

        def positioned(suffix: str, tokens: Tensor) -> Tensor:
            return self.normalise_(name, suffix, self.project(name, suffix, tokens), tables[suffix], kernels)

        return self.per_part(x, split, positioned)


class CrossAttention(Projections):
    """Attention from the tokens to the text context."""

    def forward(self, x: Tensor, split: int, context: Tensor, attention, options) -> Tensor:
        def attend(suffix: str, tokens: Tensor) -> Tensor:
            k, v = (self.project(name, suffix, context) for name in "kv")
            q = self.normalise_("q", suffix, self.project("q", suffix, tokens))
            out = attention(q, self.normalise_("k", suffix, k), v, self.num_heads, options)
            del q
            return self.project("o", suffix, out)

        return self.per_part(x, split, attend)


class FeedForward(nn.Sequential):
    """Linear, GELU(tanh), Linear over pieces of the tokens, written over its input."""

    def __init__(self, dim, hidden, operations, dtype=None, device=None):
        super().__init__(
            operations.Linear(dim, hidden, dtype=dtype, device=device),
            nn.GELU(approximate="tanh"),
            operations.Linear(hidden, dim, dtype=dtype, device=device),
        )

    def forward(self, x: Tensor) -> Tensor:
        for part in x.split(FEED_FORWARD_TOKENS, dim=1):
            part.copy_(super().forward(part))
        return x


# ---------------------------------------------------------------- embeddings


def conv1d_channels_last(conv: nn.Module, x: Tensor) -> Tensor:
    """A Conv1d over time on (B, L, channels)."""
    return conv(x.transpose(1, 2)).transpose(1, 2)


class ConvMLP(nn.Module):
    """Gated feed-forward of convolutions over time: w2(silu(w1(x)) * w3(x)), without biases."""

    def __init__(self, dim, hidden, kernel, operations, dtype=None, device=None):
        super().__init__()

        def conv(inputs, outputs):
            return operations.Conv1d(
                inputs, outputs, kernel, padding=kernel // 2, bias=False, dtype=dtype, device=device
            )

        self.w1 = conv(dim, hidden)
        self.w2 = conv(hidden, dim)
        self.w3 = conv(dim, hidden)

    def forward(self, x: Tensor) -> Tensor:
        x = x.transpose(1, 2)
        return self.w2(F.silu(self.w1(x)) * self.w3(x)).transpose(1, 2)


class AudioPatchEmbedding(nn.ModuleDict):
    """Audio latents (B, L, channels) -> tokens (B, L, dim): convolution, SiLU, gated convolutions."""

    def __init__(self, channels, dim, hidden, operations, dtype=None, device=None):
        factory = {"dtype": dtype, "device": device}
        super().__init__(
            {
                "0": operations.Conv1d(channels, dim, 7, padding=3, **factory),
                "2": ConvMLP(dim, hidden, 7, operations, **factory),
            }
        )

    def forward(self, x: Tensor) -> Tensor:
        return self["2"](F.silu(conv1d_channels_last(self["0"], x)))


class SpeakerEmbedding(nn.Module):
    """A voice's embedding (B, S, 192) -> one context token each (B, S, dim); silence gives the learned null token."""

    def __init__(self, speaker_dim, dim, operations, dtype=None, device=None):
        super().__init__()
        factory = {"dtype": dtype, "device": device}
        self.net = nn.Sequential(
            operations.LayerNorm(speaker_dim, eps=1e-5, **factory),
            operations.Linear(speaker_dim, dim, **factory),
            nn.SiLU(),
            operations.Linear(dim, dim, **factory),
        )
        self.out_norm = operations.LayerNorm(dim, eps=1e-5, **factory)
        self.null_token = nn.Parameter(torch.empty(1, dim, **factory), requires_grad=False)

    def forward(self, timbre: Tensor) -> Tensor:
        absent = timbre.float().square().sum(-1, keepdim=True) <= NULL_TIMBRE_ENERGY
        token = self.out_norm(self.net(timbre))
        return torch.where(absent, self.null_token.to(token), token)


class Head(nn.Module):
    """Norm, two-way modulation by the timestep's embedding, and the projection to velocities."""

    def __init__(self, dim, outputs, eps, operations, dtype=None, device=None):
        super().__init__()
        factory = {"dtype": dtype, "device": device}
        self.norm = operations.LayerNorm(dim, eps=eps, elementwise_affine=False, **factory)
        self.head = operations.Linear(dim, outputs, **factory)
        self.modulation = nn.Parameter(torch.empty(1, 2, dim, **factory), requires_grad=False)

    def forward(self, tokens: Tensor, embedding: Tensor, group: Tensor, kernels: Kernels) -> Tensor:
        vectors = modulation_vectors(self.modulation, embedding[:, None])
        vectors[:, 1] += 1
        shift, scale = grouped(vectors, group, tokens)
        return self.head(kernels.modulated_norm(self.norm, tokens, [(slice(None), (shift, scale))]))
