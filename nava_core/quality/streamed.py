"""A backbone file run block by block: no more than one block is in memory, whatever the model's size, for any number of
passes side by side."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..backbone.blocks import PassState
from ..backbone.model import NavaBackbone
from ..checkpoint import (
    FileInfo,
    assign_tensor,
    backbone_config,
    open_checkpoint,
    readable_backbone,
    stream_tensors,
    weight_shapes,
)

Pass = Mapping[str, Any]  # the backbone's arguments by name
BLOCKS = ("double_blocks", "single_blocks")
SOUND = "patch_embedding_audio"  # more than any block, and needed before the first one only


@dataclass
class Running:
    """A pass under way: its tokens (B, L, dim) so far, and what they need on the way."""

    tokens: Tensor
    state: PassState
    embedding: Tensor
    grid: tuple[int, int, int]
    video: Tensor | None

    @property
    def split(self) -> int:
        """Number of video tokens; audio follows."""
        return self.state.split

    def through(self, block: nn.Module, tokens: Tensor | None = None) -> Tensor:
        """Tokens (its own where none are given) after a block: a new tensor."""
        return block((self.tokens if tokens is None else tokens).clone(), self.state)


class _Steps(NavaBackbone):
    """The backbone's forward pass in its steps."""

    def start(self, video, audio, timestep, context, *, timbre=None, timbre_positions=None, cross_modal=True):
        self._check(video, audio, context, timbre, timbre_positions)
        tokens, grid, split = self._embed(video, audio)
        state, embedding = self._prepare(
            tokens, grid, split, timestep, context, timbre, timbre_positions, cross_modal, 0.0, None
        )
        return Running(tokens, state, embedding, grid, video)

    def finish(self, running: Running, tokens: Tensor) -> tuple[Tensor | None, Tensor | None]:
        velocities = self._head_outputs(tokens, running.state, running.embedding)
        return self._unpatchify(velocities, running.grid, running.video), velocities.get("_audio")


class StreamedBackbone:
    """The network of a backbone file, computing in float32 with the values that its weights stand for.

    Use it in a ``with`` statement. ``start`` passes, take them through ``blocks``, which are in memory only for their
    turn, and ``finish`` them; or ``run`` them all. Raises as ``load_backbone`` does.
    """

    def __init__(self, path: str | os.PathLike | FileInfo, device: torch.device | str = "cpu") -> None:
        self.info = readable_backbone(path)
        self.config = backbone_config(self.info)
        self.device = torch.device(device)
        self._network = _Steps(self.config, dtype=torch.float32, device="meta").requires_grad_(False).eval()

    def __enter__(self) -> StreamedBackbone:
        self._source = open_checkpoint(self.info)
        try:
            self._fill(lambda name: not name.startswith((*BLOCKS, SOUND)))
        except BaseException:
            self._source.close()
            raise
        return self

    def __exit__(self, *_) -> None:
        self._source.close()
        self._network.to("meta")

    def _fill(self, chosen: Callable[[str], bool]) -> None:
        only = frozenset(filter(chosen, weight_shapes(self.info)))
        for name, tensor in stream_tensors(self._source, torch.float32, device=self.device, only=only):
            assign_tensor(self._network, name, tensor.to(self.device))

    @property
    def steps(self) -> int:
        """How many blocks there are."""
        return self.config.num_double_layers + self.config.num_single_layers

    def start(self, passes: Sequence[Pass]) -> list[Running]:
        """The passes' tokens before the first block."""
        self._fill(lambda name: name.startswith(SOUND))
        here = [{name: self._here(value) for name, value in each.items()} for each in passes]
        started = [self._network.start(**each) for each in here]
        getattr(self._network, SOUND).to("meta")
        return started

    def blocks(self) -> Iterator[tuple[str, nn.Module]]:
        """(name, block) one after another, each read from the file for its turn."""
        for kind in BLOCKS:
            for index, block in enumerate(getattr(self._network, kind)):
                name = f"{kind}.{index}"
                self._fill(lambda each, start=f"{name}.": each.startswith(start))
                yield name, block
                block.to("meta")

    def finish(self, running: Running, tokens: Tensor | None = None) -> tuple[Tensor | None, Tensor | None]:
        """(video, audio) velocities from the tokens (its own where none are given) after the last block."""
        return self._network.finish(running, running.tokens if tokens is None else tokens)

    @torch.no_grad()
    def run(self, passes: Sequence[Pass], progress=None) -> list[tuple[Tensor | None, Tensor | None]]:
        """Velocities of passes, made side by side. ``progress`` is called after each block."""
        running = self.start(passes)
        for _, block in self.blocks():
            for each in running:
                each.tokens = each.through(block)
            if progress is not None:
                progress()
        return [self.finish(each) for each in running]

    def _here(self, value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(self._here(each) for each in value)
        if not torch.is_tensor(value):
            return value
        return value.to(self.device, torch.float32 if value.is_floating_point() else value.dtype)


def streamed_bytes(path: str | os.PathLike | FileInfo) -> int:
    """Memory that running a file block by block takes, its passes not counted."""
    info = readable_backbone(path)
    sizes: dict[str, int] = {}
    network = _Steps(backbone_config(info), dtype=torch.float32, device="meta")
    for name, weight in network.state_dict().items():
        unit = ".".join(name.split(".")[:2]) if name.startswith(BLOCKS) else SOUND if name.startswith(SOUND) else ""
        sizes[unit] = sizes.get(unit, 0) + weight.nbytes
    return sizes.pop("") + max(sizes.values())
