"""The two kinds of transformer block; they differ in what video and audio share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn

from .layers import CrossAttention, FeedForward, Kernels, Modulation, SelfAttention, add_gated_, grouped, per_stretch


@dataclass(frozen=True)
class Stretch:
    """Tokens of one modality: where they stand, and which timestep each equal group of them has."""

    start: int
    stop: int
    group: Tensor  # (B, G) index into the distinct timesteps' vectors
    suffix: str  # "" for video, "_audio" for audio

    @property
    def tokens(self) -> slice:
        return slice(self.start, self.stop)


@dataclass(frozen=True)
class PassState:
    """What all blocks of one pass share."""

    split: int  # number of video tokens; audio follows
    stretches: tuple[Stretch, ...]  # video's, then audio's
    vectors: Tensor  # (n, 6, dim) of the n distinct timesteps
    table: Tensor  # rotary table (L, head_dim / 2, 2)
    context: Tensor  # (B, text_len, dim)
    self_attention: Callable[[Tensor, Tensor, Tensor, int], Tensor]  # (q, k, v, heads) of all tokens of the pass
    attention: object
    kernels: Kernels
    options: object
    feed_forward: Callable[[nn.Module, Tensor], Tensor] = nn.Module.__call__
    work: Callable[[nn.Module, Tensor, PassState], Tensor] | None = None  # what does a block's work in its place


class Block(nn.Module):
    """Modulated self-attention, cross-attention to the text, modulated feed-forward; each added to its input.

    ``forward(tokens (B, L, dim), state)`` changes ``tokens`` in place and returns them. ``work`` is what it does
    itself: hooks are around it, and around what the state has in its place.
    """

    per_modality = False

    def __init__(self, config, operations, dtype=None, device=None):
        super().__init__()
        factory = {"dtype": dtype, "device": device}
        dim, eps = config.dim, config.eps

        def norm(affine: bool):
            return operations.LayerNorm(dim, eps=eps, elementwise_affine=affine, **factory)

        def attention(kind):
            return kind(dim, config.num_heads, eps, self.per_modality, operations, **factory)

        self.norm1, self.norm2, self.norm3 = norm(False), norm(False), norm(True)
        self.self_attn = attention(SelfAttention)
        self.cross_attn = attention(CrossAttention)
        self.ffn = FeedForward(dim, config.ffn_dim, operations, **factory)
        self.modulation = Modulation(6, dim, **factory)
        if self.per_modality:
            self.modulation_audio = Modulation(6, dim, **factory)

    def _vectors(self, tokens: Tensor, state: PassState) -> list[tuple[slice, tuple[Tensor, ...]]]:
        """Per stretch of the tokens: shift1, 1 + scale1, gate1, shift2, 1 + scale2, gate2."""
        out = []
        for stretch in state.stretches:
            modulation = getattr(self, "modulation" + stretch.suffix) if self.per_modality else self.modulation
            vectors = modulation(state.vectors)
            vectors[:, [1, 4]] += 1
            out.append((stretch.tokens, tuple(grouped(vectors, stretch.group, tokens))))
        return out

    def forward(self, tokens: Tensor, state: PassState) -> Tensor:
        return self.work(tokens, state) if state.work is None else state.work(self, tokens, state)

    def work(self, tokens: Tensor, state: PassState) -> Tensor:
        vectors = self._vectors(tokens, state)
        split, attention, kernels, options = state.split, state.attention, state.kernels, state.options

        h = kernels.modulated_norm(self.norm1, tokens, _pick(vectors, 0, 1))
        h = self.self_attn(h, split, state.table, state.self_attention, kernels)
        tokens = per_stretch(tokens, add_gated_, _pick(vectors, 2), h)

        tokens += self.cross_attn(self.norm3(tokens), split, state.context, attention, options)

        h = kernels.modulated_norm(self.norm2, tokens, _pick(vectors, 3, 4))
        return per_stretch(tokens, add_gated_, _pick(vectors, 5), state.feed_forward(self.ffn, h))


def _pick(vectors: list[tuple[slice, tuple[Tensor, ...]]], *indices: int) -> list[tuple]:
    """Some of each stretch's six vectors."""
    return [(part, [of_part[index] for index in indices]) for part, of_part in vectors]


class AlignmentBlock(Block):
    """Hierarchical alignment layer: video and audio have their own projections and modulation, one joint attention."""

    per_modality = True


class FusionBlock(Block):
    """Unified fusion layer: everything shared between video and audio."""
