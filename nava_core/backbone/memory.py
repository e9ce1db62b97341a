"""What one pass of the backbone holds beside its weights, from its sizes alone: the figure a host plans with."""

from __future__ import annotations

from collections.abc import Callable

from .config import BackboneConfig
from .layers import FEED_FORWARD_TOKENS, NORM_TOKENS

COMPILED_MORE = {2: 3, 4: 4}  # tensors of all tokens' size that a compiled block holds beside those of a plain one
AUDIO_KERNEL = 7  # of the sound's convolutions over time

# Bytes that attention holds beside q, k, v and its output, for (batch, queries, keys, heads, head_dim, dtype_size).
AttentionBytes = Callable[[int, int, int, int, int, int], int]


def no_workspace(*_sizes: int) -> int:
    """Of attention that makes nothing but its output, as flash-attn and PyTorch's own kernels on GPUs."""
    return 0


def activation_bytes(
    config: BackboneConfig,
    batch: int,
    tokens: int,
    dtype_size: int,
    *,
    audio_tokens: int = 0,
    timesteps: int = 1,
    timestep_groups: int = 2,
    weight_copy_size: int = 0,
    embedding_copy_size: int = 0,
    attention_workspace: AttentionBytes = no_workspace,
    compiled: bool = False,
) -> int:
    """Peak bytes of the live tensors of one pass beside its weights, for ``batch`` samples of ``tokens`` each.

    audio_tokens: how many of the tokens are sound. timesteps: how many distinct ones there are; timestep_groups: into
    how many groups with a timestep of their own a sample's tokens fall (2: one a modality; with parts given, the
    frames and the audio steps). weight_copy_size: bytes of each value of a block's linear weight that is made anew as
    it is used (dequantised, or cast to another type), 0 where weights are used as they are; embedding_copy_size: the
    same of the weights outside the blocks, of which the sound's convolutions are the largest. attention_workspace:
    what attention holds beside its inputs and output. compiled: whether the blocks run through torch.compile, whose
    graphs hold more of the tokens' tensors at once (counted with inductor). Kernels' own workspaces and the
    allocator's rounding are not in it.
    """
    copies = weight_copy_size, embedding_copy_size
    phases = _Phases(config, batch, tokens, audio_tokens, dtype_size, copies, attention_workspace)
    more = tokens * phases.token * COMPILED_MORE[dtype_size] if compiled else 0
    before = max(phases.embedding(), phases.times(timesteps), phases.text())
    vectors = 6 * config.dim * dtype_size * timesteps
    picked = 6 * config.dim * dtype_size * batch * timestep_groups
    table = tokens * config.head_dim // 2 * 8
    blocks = max(phases.picking(timesteps) + picked // 2, picked + phases.blocks() + more, picked + phases.output())
    return max(before, table + vectors + blocks)


class _Phases:
    """Bytes at the fullest moment of each part of a pass; ``token`` of one value a channel for all samples' tokens."""

    def __init__(self, config, batch, tokens, audio, size, copies, workspace):
        self.config, self.batch, self.size, self.workspace = config, batch, size, workspace
        self.token = batch * config.dim * size
        self.tokens, self.audio, self.video = tokens, audio, tokens - audio
        self.joint = self.audio > 0 and self.video > 0  # two stretches with weights of their own
        self.part = max(self.audio, self.video)
        self.copied_weight = config.dim * config.dim * copies[0]
        self.copied_ffn = config.dim * config.ffn_dim * copies[0]
        self.embedding_copy_size = copies[1]
        self.context = config.text_len * self.token

    def normalised(self, tokens: int) -> int:
        """A piece of q or k in RMS norm: its fp32 forms."""
        copies = 2 if self.size == 4 else 3
        return copies * 4 * min(tokens, NORM_TOKENS) * self.batch * self.config.dim

    def embedding(self) -> int:
        """Both modalities' tokens, and both in one tensor; the sound's gated convolutions before that."""
        hidden = self.audio * self.config.audio_mlp_dim * self.batch * self.size
        latents = self.video * 4 * self.config.vid_in_dim * self.batch * self.size
        weight = self.config.dim * self.config.audio_mlp_dim * AUDIO_KERNEL * self.embedding_copy_size
        gated = max(3 * hidden, 2 * hidden + weight) if self.audio else 0
        return latents + max(2 * self.tokens * self.token, (self.tokens + self.audio) * self.token + gated)

    def times(self, timesteps: int) -> int:
        """The embedded timesteps' six vectors."""
        weight = 6 * self.config.dim * self.config.dim * self.embedding_copy_size
        return self.tokens * self.token + 8 * timesteps * self.config.dim * self.size + weight

    def picking(self, timesteps: int) -> int:
        """A block's vectors of all timesteps, in fp32, and one modality's before the other's."""
        copies = 3 if self.joint else 2
        return self.context + self.tokens * self.token + copies * timesteps * 6 * self.config.dim * 4

    def output(self) -> int:
        """The tokens, their norm or the velocities in order, and the velocities token by token."""
        velocities = (
            self.batch * self.size * (self.video * 4 * self.config.vid_out_dim + self.audio * self.config.audio_out_dim)
        )
        return self.context + self.tokens * self.token + velocities + max(self.part * self.token, velocities)

    def text(self) -> int:
        """The padded raw context and two layers' outputs."""
        raw = self.config.text_len * self.config.text_dim * self.batch * self.size
        weight = self.config.text_dim * self.config.dim * self.embedding_copy_size
        return self.tokens * self.token + raw + max(2 * self.context, self.context + weight)

    def blocks(self) -> int:
        attention = max(self.projections(), self.self_attention(), self.cross_attention())
        return self.context + max(attention, self.feed_forward())

    def projections(self) -> int:
        """v, the last of three: the tokens, the normed ones, q and k, and what one stretch's layer makes and reads."""
        if not self.joint:
            return max(5 * self.tokens * self.token + self.copied_weight, self.qk_norm())
        read = self.part if self.batch > 1 else 0  # a part of several samples is not in one piece
        made = (5 * self.tokens + self.part + read) * self.token
        return max(made + self.copied_weight, self.qk_norm())

    def qk_norm(self) -> int:
        return 4 * self.tokens * self.token + self.normalised(self.part if self.joint else self.tokens)

    def self_attention(self) -> int:
        heads, width = self.config.num_heads, self.config.head_dim
        work = self.workspace(self.batch, self.tokens, self.tokens, heads, width, self.size)
        return 6 * self.tokens * self.token + work

    def cross_attention(self) -> int:
        """The tokens, their norm, what is filled part by part, one stretch's q and attention to the text's k and v."""
        heads, width = self.config.num_heads, self.config.head_dim
        held = (3 if self.joint else 2) * self.tokens * self.token + 2 * self.context
        queries = self.part * self.token
        work = self.workspace(self.batch, self.part, self.config.text_len, heads, width, self.size)
        attention = queries + work
        norm = self.normalised(max(self.part, self.config.text_len))
        return held + queries + max(attention, norm, self.copied_weight)

    def feed_forward(self) -> int:
        """The tokens twice, and one piece's hidden layer twice."""
        piece = min(self.tokens, FEED_FORWARD_TOKENS) * self.batch * self.size
        hidden = piece * self.config.ffn_dim
        held = 2 * self.tokens * self.token
        return held + max(2 * hidden, hidden + piece * self.config.dim + self.copied_ffn)
