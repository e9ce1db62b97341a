"""Ulysses sequence parallelism: the tokens of a pass spread over processes, heads spread during self-attention.

Each process keeps an even share of the video tokens and one of the audio tokens through the unchanged blocks. Only
self-attention needs the others: q, k and v go from "all heads of my tokens" to "all tokens of my heads" in one
exchange, and its result back in another (Jacobs et al. 2023, arXiv 2309.14509). Cross-attention to the text is local.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise

import torch
import torch.distributed as dist
from torch import Tensor

from ..backbone.blocks import PassState, Stretch

Attend = Callable[[Tensor, Tensor, Tensor, int], Tensor]


def share(count: int, ranks: int, rank: int) -> slice:
    """The part of ``count`` things that is ``rank``'s: contiguous, and even to within one."""
    return slice(count * rank // ranks, count * (rank + 1) // ranks)


def shares(count: int, ranks: int) -> list[int]:
    """How many of ``count`` things each rank has."""
    return [part.stop - part.start for part in (share(count, ranks, rank) for rank in range(ranks))]


class UlyssesSplit:
    """A ``TokenSplit`` over the processes of ``group`` (None: all); every one of them runs the same pass.

    ``passes`` counts the passes that went through it.
    """

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self.group = group
        self.rank, self.ranks = dist.get_rank(group), dist.get_world_size(group)
        self.passes = 0
        self._sizes: dict[str, list[int]] = {}  # of the pass under way: each process's tokens, by modality

    def scatter(self, tokens: Tensor, state: PassState) -> tuple[Tensor, PassState]:
        """All tokens (B, L, dim) and their state -> this process's, video first.

        Raises ValueError where a modality has fewer tokens than there are processes.
        """
        counts = (state.split, tokens.shape[1] - state.split)
        for name, count in zip(("video", "audio"), counts, strict=True):
            if 0 < count < self.ranks:
                raise ValueError(
                    f"{count} {name} tokens cannot be split over {self.ranks} workers: "
                    f"make the clip longer or larger, or use at most {count} workers for a prediction."
                )
        self.passes += 1
        self._sizes = {suffix: shares(count, self.ranks) for suffix, count in zip(("", "_audio"), counts, strict=True)}
        video, audio = (share(count, self.ranks, self.rank) for count in counts)
        places = (video, slice(state.split + audio.start, state.split + audio.stop))
        local = replace(
            state,
            split=video.stop - video.start,
            stretches=tuple(part for stretch in state.stretches for part in _local_stretches(stretch, places)),
            table=torch.cat([state.table[place] for place in places]),
            self_attention=self._over_all_tokens(state.self_attention, self._sizes[""], self._sizes["_audio"]),
        )
        return torch.cat([tokens[:, place] for place in places], dim=1), local

    def gather(self, velocities: dict[str, Tensor], state: PassState) -> dict[str, Tensor]:
        """Velocities (B, l, width) of this process's tokens, by modality -> (B, L, width) of all, on every process."""
        return {suffix: self._gather(values, self._sizes[suffix]) for suffix, values in velocities.items()}

    def _gather(self, values: Tensor, sizes: list[int]) -> Tensor:
        # One size for all, which collectives want: shares differ by one token at most.
        padded = torch.nn.functional.pad(values, (0, 0, 0, max(sizes) - values.shape[1])).contiguous()
        parts = [torch.empty_like(padded) for _ in sizes]
        dist.all_gather(parts, padded, group=self.group)
        return torch.cat([part[:, :size] for part, size in zip(parts, sizes, strict=True)], dim=1)

    def _over_all_tokens(self, attend: Attend, video: list[int], audio: list[int]) -> Attend:
        """``attend`` over all tokens of a share of the heads, given and giving all heads of a share of the tokens.

        ``video`` and ``audio``: each process's number of tokens.
        """

        def ulysses(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
            if heads % self.ranks:
                raise ValueError(heads_problem(heads, self.ranks))
            qkv = self._to_heads(torch.stack([q, k, v]), video, audio)
            return self._to_tokens(attend(*qkv, heads // self.ranks), video, audio)

        return ulysses

    def _to_heads(self, x: Tensor, video: list[int], audio: list[int]) -> Tensor:
        """(3, B, l, dim) of this process's tokens -> (3, B, L, dim / ranks), video first."""
        width = x.shape[-1] // self.ranks
        send = x.unflatten(-1, (self.ranks, width)).permute(3, 2, 0, 1, 4).flatten(0, 1).contiguous()
        sizes = [v + a for v, a in zip(video, audio, strict=True)]
        received = send.new_empty(sum(sizes), *send.shape[1:])
        dist.all_to_all_single(received, send, sizes, [x.shape[2]] * self.ranks, group=self.group)
        # (each rank's video, each rank's audio) instead of each rank's video and audio
        parts = [part.split([v, a]) for part, v, a in zip(received.split(sizes), video, audio, strict=True)]
        ordered = torch.cat([part[0] for part in parts] + [part[1] for part in parts])
        return ordered.movedim(0, 2).contiguous()

    def _to_tokens(self, x: Tensor, video: list[int], audio: list[int]) -> Tensor:
        """(B, L, dim / ranks) -> (B, l, dim) of this process's tokens, video first."""
        rows = x.movedim(1, 0)
        videos, audios = rows[: sum(video)].split(video), rows[sum(video) :].split(audio)
        send = torch.cat([part for pair in zip(videos, audios, strict=True) for part in pair])
        sizes = [v + a for v, a in zip(video, audio, strict=True)]
        local = sizes[self.rank]
        received = send.new_empty(self.ranks * local, *send.shape[1:])
        dist.all_to_all_single(received, send, [local] * self.ranks, sizes, group=self.group)
        return received.unflatten(0, (self.ranks, local)).permute(2, 1, 0, 3).flatten(2)


def heads_problem(heads: int, ranks: int) -> str:
    """Why ``ranks`` processes cannot share the heads, in a sentence."""
    fitting = ", ".join(str(n) for n in range(1, heads + 1) if heads % n == 0)
    return f"The model's {heads} attention heads cannot be shared evenly by {ranks} workers: use one of {fitting}."


def _local_stretches(stretch: Stretch, places: tuple[slice, slice]) -> list[Stretch]:
    """A stretch's share of the tokens, placed in the local order, as stretches of equal groups: what is left of a
    group that was cut, whole groups, and the beginning of the next."""
    audio = stretch.suffix == "_audio"
    place = places[audio]
    base = places[0].stop - places[0].start if audio else 0
    start, stop = place.start - stretch.start, place.stop - stretch.start
    groups = stretch.group.shape[1]
    size = (stretch.stop - stretch.start) // groups
    first_whole, last_whole = -(-start // size), stop // size
    cuts = sorted({start, stop, *(cut * size for cut in (first_whole, last_whole) if start < cut * size < stop)})
    return [
        Stretch(base + a - start, base + b - start, stretch.group[:, a // size : -(-b // size)], stretch.suffix)
        for a, b in pairwise(cuts)
    ]
