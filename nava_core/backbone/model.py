"""The NAVA backbone: one transformer that predicts the velocity of video and audio latents together."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .blocks import AlignmentBlock, FusionBlock, PassState, Stretch
from .compiled import CompiledBlocks
from .config import BackboneConfig
from .layers import (
    OWN_KERNELS,
    AttentionFunction,
    AudioPatchEmbedding,
    Head,
    Kernels,
    SpeakerEmbedding,
    default_attention,
    rotary_table,
    self_attention,
    sinusoid,
)

DEFAULT_OPERATIONS = SimpleNamespace(
    Linear=nn.Linear, LayerNorm=nn.LayerNorm, RMSNorm=nn.RMSNorm, Conv1d=nn.Conv1d, Conv3d=nn.Conv3d
)
PATCH = (1, 2, 2)
CACHED_TABLES = 2  # rotary tables kept: the shape in use and the one before


class TokenSplit(Protocol):
    """How the tokens of a pass are spread over several processes; see ``nava_core.parallel.ulysses``."""

    def scatter(self, tokens: Tensor, state: PassState) -> tuple[Tensor, PassState]:
        """All tokens and their state -> this process's share of both."""

    def gather(self, velocities: dict[str, Tensor], state: PassState) -> dict[str, Tensor]:
        """Velocities of this process's share, by modality -> those of all tokens."""


class NavaBackbone(nn.Module):
    """The transformer of NAVA (arXiv 2605.30073, section 3); parameter names are the released checkpoint's.

    ``operations`` gives the layers' classes (as ``torch.nn`` names them), ``attention`` the attention function
    ``(q, k, v, heads, options)`` on (B, L, heads * head_dim) and ``kernels`` the rotation and the modulated norm, so
    that a host can put its own casting, offloading and kernels underneath; ``token_split`` spreads the tokens over
    processes. Weights are uninitialised: load them, or call :meth:`init_weights`. For inference only: tokens are
    worked on in place, under ``torch.no_grad``.
    """

    def __init__(
        self,
        config: BackboneConfig | None = None,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        operations=DEFAULT_OPERATIONS,
        attention: AttentionFunction = default_attention,
        kernels: Kernels = OWN_KERNELS,
    ):
        super().__init__()
        self.config = config = config or BackboneConfig()
        self.dtype = dtype or torch.get_default_dtype()
        self.attention = attention
        self.kernels = kernels
        factory = {"dtype": self.dtype, "device": device}
        dim = config.dim

        self.patch_embedding = operations.Conv3d(config.vid_in_dim, dim, PATCH, stride=PATCH, **factory)
        self.patch_embedding_audio = AudioPatchEmbedding(
            config.audio_in_dim, dim, config.audio_mlp_dim, operations, **factory
        )
        self.text_embedding = nn.Sequential(
            operations.Linear(config.text_dim, dim, **factory),
            nn.GELU(approximate="tanh"),
            operations.Linear(dim, dim, **factory),
        )
        self.speaker_embedding = SpeakerEmbedding(config.speaker_dim, dim, operations, **factory)
        self.time_embedding = nn.Sequential(
            operations.Linear(config.freq_dim, dim, **factory),
            nn.SiLU(),
            operations.Linear(dim, dim, **factory),
        )
        self.time_projection = nn.Sequential(nn.SiLU(), operations.Linear(dim, 6 * dim, **factory))
        self.double_blocks = nn.ModuleList(
            AlignmentBlock(config, operations, **factory) for _ in range(config.num_double_layers)
        )
        self.single_blocks = nn.ModuleList(
            FusionBlock(config, operations, **factory) for _ in range(config.num_single_layers)
        )
        patch_size = PATCH[0] * PATCH[1] * PATCH[2]
        self.head = Head(dim, patch_size * config.vid_out_dim, config.eps, operations, **factory)
        self.head_audio = Head(dim, config.audio_out_dim, config.eps, operations, **factory)
        self._tables: dict[tuple, Tensor] = {}
        self.token_split: TokenSplit | None = None
        self.compiled: CompiledBlocks | None = None

    def compile_blocks(self, **options) -> NavaBackbone:
        """Run the blocks through ``torch.compile``, which ``options`` are for; see :class:`CompiledBlocks`."""
        self.compiled = CompiledBlocks(**options)
        return self

    @torch.no_grad()
    def init_weights(self, seed: int = 0) -> NavaBackbone:
        """Fill every weight with small random numbers (tests, demos, benchmarks); norms near one. Returns self."""
        device = next(self.parameters()).device
        generator = torch.Generator(device).manual_seed(seed)
        for name, weight in self.named_parameters():
            weight.normal_(generator=generator)
            if ("norm" in name and name.endswith("weight")) or name.endswith("net.0.weight"):
                weight.mul_(0.1).add_(1)
            elif weight.ndim > 1 and "modulation" not in name:
                weight.mul_((weight[0].numel()) ** -0.5)
            else:
                weight.mul_(0.1)
        return self

    # ------------------------------------------------------------ the pass

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
        audio_start: float = 0.0,
        options: object = None,
    ) -> tuple[Tensor | None, Tensor | None]:
        """Velocities (noise - x0) of video and audio latents, in one pass.

        video: (B, 48, T, H, W), or None (odd H and W are padded inside); audio: (B, L, 128), or None; both in the
        model's (normalised) latent space and in the type the weights compute in.
        timestep: (B,) on 0..1000, or a pair (video (B,) or (B, T), audio (B,) or (B, L)); a clean frame or step has 0.
        context: (B, n <= text_len, text_dim), the text encoder's output; zero-padded to text_len, none of it masked.
        timbre: (B, S, 192) voices, with timbre_positions (B, S) int, the place in the context of each (-1: unused).
        cross_modal: False lets each modality attend to itself only. audio_start: where the sound begins, in latent
        frames after the picture's first. options: handed to every attention call.

        Returns (video velocity or None, audio velocity or None) in the shapes given.
        Raises ValueError where shapes do not fit together.
        """
        self._check(video, audio, context, timbre, timbre_positions)
        tokens, grid, split = self._embed(video, audio)
        state, embedding = self._prepare(
            tokens, grid, split, timestep, context, timbre, timbre_positions, cross_modal, audio_start, options
        )
        if self.token_split is not None:
            tokens, state = self.token_split.scatter(tokens, state)
        tokens = self._run_blocks(tokens, state)
        velocities = self._head_outputs(tokens, state, embedding)
        if self.token_split is not None:
            velocities = self.token_split.gather(velocities, state)
        return self._unpatchify(velocities, grid, video), velocities.get("_audio")

    def _check(self, video, audio, context, timbre, timbre_positions) -> None:
        config = self.config
        if video is None and audio is None:
            raise ValueError("The backbone was given neither video nor audio latents; pass at least one of them.")
        if video is not None and (video.ndim != 5 or video.shape[1] != config.vid_in_dim):
            raise ValueError(
                f"Video latents must be (batch, {config.vid_in_dim}, frames, height, width), not {tuple(video.shape)}."
            )
        if audio is not None and (audio.ndim != 3 or audio.shape[2] != config.audio_in_dim):
            raise ValueError(f"Audio latents must be (batch, steps, {config.audio_in_dim}), not {tuple(audio.shape)}.")
        batch = (video if video is not None else audio).shape[0]
        if audio is not None and audio.shape[0] != batch:
            raise ValueError(f"Video has a batch of {batch}, audio one of {audio.shape[0]}; they must be equal.")
        if context.ndim != 3 or context.shape[0] != batch or context.shape[2] != config.text_dim:
            raise ValueError(
                f"The text context must be ({batch}, tokens, {config.text_dim}), not {tuple(context.shape)}."
            )
        if context.shape[1] > config.text_len:
            raise ValueError(
                f"The text context has {context.shape[1]} tokens, the model takes at most {config.text_len}; cut it."
            )
        if (timbre is None) != (timbre_positions is None):
            raise ValueError("Voices and their positions in the context come together; one of them is missing.")
        if timbre is not None and (timbre.shape[:2] != timbre_positions.shape or timbre.shape[2] != config.speaker_dim):
            raise ValueError(
                f"Voices must be (batch, spans, {config.speaker_dim}) with positions (batch, spans), "
                f"not {tuple(timbre.shape)} with {tuple(timbre_positions.shape)}."
            )

    def _embed(self, video, audio) -> tuple[Tensor, tuple[int, int, int], int]:
        """Tokens of both modalities, the video's token grid (frames, rows, columns) and the number of video tokens."""
        parts, grid = [], (0, 0, 0)
        if video is not None:
            height, width = video.shape[-2:]
            patches = self.patch_embedding(F.pad(video, (0, width % 2, 0, height % 2)))
            grid = tuple(patches.shape[2:])
            parts.append(patches.flatten(2).transpose(1, 2))
        if audio is not None:
            parts.append(self.patch_embedding_audio(audio))
        split = grid[0] * grid[1] * grid[2]
        return torch.cat(parts, dim=1), grid, split

    def _prepare(
        self, tokens, grid, split, timestep, context, timbre, timbre_positions, cross_modal, audio_start, options
    ) -> tuple[PassState, Tensor]:
        length = tokens.shape[1]
        distinct, groups = self._distinct_timesteps(timestep, tokens.shape[0], grid[0], length - split)
        embedding = self.time_embedding(sinusoid(distinct, self.config.freq_dim).to(tokens))
        vectors = self.time_projection(embedding).unflatten(-1, (6, -1))
        stretches = []
        if split:
            stretches.append(Stretch(0, split, groups[0], ""))
        if split < length:
            stretches.append(Stretch(split, length, groups[1], "_audio"))
        state = PassState(
            split=split,
            stretches=tuple(stretches),
            vectors=vectors,
            table=self._rotary_table(grid, length - split, tokens.device, audio_start),
            context=self._embed_context(context, timbre, timbre_positions),
            self_attention=partial(
                self_attention, split=split, cross_modal=cross_modal, attention=self.attention, options=options
            ),
            attention=self.attention,
            kernels=self.kernels,
            options=options,
        )
        return state, embedding

    @staticmethod
    def _distinct_timesteps(timestep, batch, frames, steps) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """The distinct timesteps (n,), and for video and audio which one each group of tokens has, (B, G)."""
        if torch.is_tensor(timestep):
            index = torch.arange(batch, device=timestep.device)[:, None]
            return timestep.expand(batch), (index, index)
        columns = []
        for name, t, count in zip(("video", "audio"), timestep, (frames, steps), strict=True):
            t = t.reshape(-1, 1) if t.ndim < 2 else t
            if count and t.shape[1] not in (1, count):
                raise ValueError(
                    f"There are {t.shape[1]} {name} timesteps for {count} "
                    f"{'frames' if name == 'video' else 'steps'}; give one for all or one for each."
                )
            columns.append(t.expand(batch, -1))
        distinct, index = torch.unique(torch.cat(columns, dim=1), return_inverse=True)
        return distinct, tuple(index.split([c.shape[1] for c in columns], dim=1))

    def _rotary_table(self, grid, steps, device, audio_start=0.0) -> Tensor:
        key = (grid, steps, device, audio_start)
        table = self._tables.pop(key, None)
        if table is None:
            table = rotary_table(self.config.head_dim, grid, steps, audio_start).to(device)
        self._tables[key] = table  # newest last
        while len(self._tables) > CACHED_TABLES:
            self._tables.pop(next(iter(self._tables)))
        return table

    def _embed_context(self, context, timbre, timbre_positions) -> Tensor:
        context = F.pad(context, (0, 0, 0, self.config.text_len - context.shape[1]))
        context = self.text_embedding(context)
        if timbre is None:
            return context
        voices = self.speaker_embedding(timbre.to(context))
        # Unused voices (-1) go to one row past the end, which is then dropped.
        positions = timbre_positions.to(context.device, torch.long)
        place = torch.where(positions < 0, context.shape[1], positions)
        place = place[..., None].expand_as(voices)
        return F.pad(context, (0, 0, 0, 1)).scatter(1, place, voices)[:, :-1]

    def _run_blocks(self, tokens: Tensor, state: PassState) -> Tensor:
        if self.compiled is not None:
            state = self.compiled.prepare(state)
        for kind, blocks in (("double", self.double_blocks), ("single", self.single_blocks)):
            for index, block in enumerate(blocks):
                tokens = self.run_block(kind, index, block, tokens, state)
        return tokens

    def run_block(self, kind: str, index: int, block: nn.Module, tokens: Tensor, state: PassState) -> Tensor:
        """One block; a host or a streaming wrapper overrides this to work around it."""
        return block(tokens, state) if self.compiled is None else self.compiled(block, tokens, state)

    def _head_outputs(self, tokens: Tensor, state: PassState, embedding: Tensor) -> dict[str, Tensor]:
        """Velocities token by token, (B, tokens, width) of each modality there is, by its suffix."""
        parts: dict[str, list[Tensor]] = {}
        for stretch in state.stretches:
            head = getattr(self, "head" + stretch.suffix)
            out = head(tokens[:, stretch.tokens], embedding, stretch.group, state.kernels)
            parts.setdefault(stretch.suffix, []).append(out)
        return {suffix: outs[0] if len(outs) == 1 else torch.cat(outs, dim=1) for suffix, outs in parts.items()}

    @staticmethod
    def _unpatchify(velocities: dict[str, Tensor], grid: tuple[int, int, int], video: Tensor | None) -> Tensor | None:
        """The video's velocity in the shape of ``video``."""
        if video is None:
            return None
        rows, columns = PATCH[1:]
        patches = velocities[""].unflatten(1, grid).unflatten(-1, (rows, columns, -1))
        # (B, t, h, w, p, q, c) -> (B, c, t, h p, w q), without the padding of odd sizes
        frames = patches.permute(0, 6, 1, 2, 4, 3, 5).flatten(5, 6).flatten(3, 4)
        return frames[..., : video.shape[-2], : video.shape[-1]].contiguous()
