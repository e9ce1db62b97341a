"""Where each component works and how much of it stays there, decided before anything is loaded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from ..checkpoint import format_bytes
from .streaming import buffer_bytes, spread

SLACK = 2**29  # bytes beside what is counted: kernels' workspaces, and what the allocator rounds up and leaves unused
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Weights:
    """Bytes of a component's weights: of its ``blocks`` in their order, and of all the rest."""

    rest: int
    blocks: tuple[int, ...] = ()

    @property
    def total(self) -> int:
        return self.rest + sum(self.blocks)

    def on_device(self, streamed: Sequence[int]) -> int:
        """The most they take on the device when the blocks of the numbers ``streamed`` wait in RAM."""
        away = sum(self.blocks[index] for index in streamed)
        return self.total - away + buffer_bytes(self.blocks, streamed)

    def fitting(self, room: int) -> tuple[int, ...] | None:
        """The fewest streamed blocks with which they fit into ``room`` bytes; None where none do."""
        for count in range(len(self.blocks) + 1):
            streamed = spread(len(self.blocks), count) if count else ()
            if self.on_device(streamed) <= room:
                return streamed
        return None

    def all_streamed(self) -> tuple[int, ...]:
        return tuple(range(len(self.blocks)))


@dataclass(frozen=True)
class Placement:
    """The device a component works on, and which of its ``blocks`` wait in RAM for their turn there."""

    device: torch.device
    streamed: tuple[int, ...] = ()
    blocks: int = 0

    def __str__(self) -> str:
        if not self.streamed:
            return "on the CPU" if self.device.type == "cpu" else "resident"
        return f"streamed, {self.blocks - len(self.streamed)} of {self.blocks} blocks resident"


@dataclass(frozen=True)
class Demand:
    """What a stage wants: its component's weights, and the bytes its work takes beside them.

    ``batched``: of the work when all predictions that can be are made in one pass; None where that is not wished.
    """

    weights: Weights
    work: int
    batched: int | None = None


@dataclass(frozen=True)
class MemoryPlan:
    """Where the components of a clip work. ``budget``: bytes of the backbone's device, None where nothing is counted.

    ``batched``: predictions that can share a pass do. None for what the clip does not need.
    """

    budget: int | None
    backbone: Placement
    batched: bool
    text_encoder: Placement | None = None
    first_frame: Placement | None = None
    sound: Placement | None = None

    def __str__(self) -> str:
        """One sentence for people."""
        said = [f"backbone {self.backbone}"]
        named = {"text encoder": self.text_encoder, "first frame encoded": self.first_frame}
        named["sound encoded"] = self.sound
        said += [f"{what} {where}" for what, where in named.items() if where and str(where) != "resident"]
        return f"Budget {format_bytes(self.budget)}: {'; '.join(said)}."

    @property
    def is_tight(self) -> bool:
        """Whether something is not as it would be with memory enough."""
        places = (self.backbone, self.text_encoder, self.first_frame, self.sound)
        return any(place is not None and (place.streamed or place.device.type == "cpu") for place in places)


def place_backbone(device: torch.device, budget: int, demand: Demand) -> tuple[Placement, bool] | None:
    """Where a backbone works within ``budget``, and whether its predictions are batched; None where it does not fit.

    Resident goes before batched: a pass more costs less than fetching weights in each. Where weights are streamed
    anyway, a batch fetches them once for all its predictions.
    """
    blocks = len(demand.weights.blocks)
    works = [(work, batched) for work, batched in ((demand.batched, True), (demand.work, False)) if work is not None]
    for work, batched in works:
        if demand.weights.total + work + SLACK <= budget:
            return Placement(device, (), blocks), batched
    for work, batched in works:
        streamed = demand.weights.fitting(budget - work - SLACK)
        if streamed is not None:
            return Placement(device, streamed, blocks), batched
    return None


def least_budget(demand: Demand) -> int:
    """The smallest budget that :func:`place_backbone` finds a place within."""
    return demand.weights.on_device(demand.weights.all_streamed()) + demand.work + SLACK


def place(device: torch.device, room: int | None, demand: Demand) -> Placement:
    """Where another component works: on ``device`` as far as it fits into ``room`` bytes (None: without a limit), its
    blocks streamed where it has some and that is enough, else on the CPU."""
    blocks = len(demand.weights.blocks)
    if room is None or device.type == "cpu":
        return Placement(device, (), blocks)
    streamed = demand.weights.fitting(room - demand.work - SLACK)
    return Placement(CPU, (), blocks) if streamed is None else Placement(device, streamed, blocks)


def smaller(where: Placement, *, may_leave: bool) -> Placement | None:
    """The next smaller form of a placement that turned out too large: half the resident blocks where there are any,
    else the CPU where it ``may_leave`` the device; None where there is nothing left."""
    if where.device.type == "cpu":
        return None
    resident = where.blocks - len(where.streamed)
    if resident:
        return replace(where, streamed=spread(where.blocks, where.blocks - resident // 2))
    return Placement(CPU, (), where.blocks) if may_leave else None
