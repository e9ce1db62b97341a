"""Who does what when several workers make one clip, and what a layout costs: counted, and modelled in time."""

from __future__ import annotations

import re
from dataclasses import dataclass

from ..backbone.config import BackboneConfig
from .ulysses import heads_problem

VIDEO_WIDTH, AUDIO_WIDTH = 192, 128  # of a token's velocity


@dataclass(frozen=True)
class Layout:
    """``branches`` predictions side by side, each over ``sequence`` workers that share its tokens."""

    branches: int = 1
    sequence: int = 1

    @classmethod
    def parse(cls, text: str) -> Layout | None:
        """ "2x4" (branches x sequence), or None for "auto". Raises ValueError for anything else."""
        if text == "auto":
            return None
        found = re.fullmatch(r"([1-9]\d?)\s*[x×]\s*([1-9]\d?)", text.strip())
        if found is None:
            raise ValueError(
                f"{text!r} is no layout: give auto, or predictions side by side x workers for each, as in 2x4."
            )
        return cls(int(found[1]), int(found[2]))

    @property
    def workers(self) -> int:
        return self.branches * self.sequence

    def predictions_of(self, branch: int, count: int) -> range:
        """Which of ``count`` predictions a branch runs, one after another."""
        return range(branch, count, self.branches)

    def rounds(self, predictions: int) -> int:
        """How many predictions the busiest branch runs."""
        return -(-predictions // self.branches)

    def __str__(self) -> str:
        return f"{self.branches}x{self.sequence}"

    def sentence(self, workers: int, predictions: int) -> str:
        """What the workers do, for people."""
        side = f"{self.branches} predictions side by side" if self.branches > 1 else "one prediction at a time"
        each = f"{self.sequence} workers sharing the tokens of each" if self.sequence > 1 else "a worker for each"
        idle = workers - self.workers
        rest = f"; {idle} of {workers} workers idle" if idle else ""
        return f"Layout {self} for {predictions} prediction{'s' * (predictions > 1)}: {side}, {each}{rest}."


def layout_problem(layout: Layout | None, workers: int, config: BackboneConfig) -> str | None:
    """Why a layout does not fit ``workers`` workers or the model, in a sentence; None where it does, or is auto."""
    if workers < 1:
        return f"{workers} workers cannot make a clip: use 1 or more."
    if layout is None:
        return None
    if layout.workers != workers:
        return (
            f"The layout {layout} is for {layout.workers} workers, and there are {workers}: "
            "choose another one, or auto."
        )
    if config.num_heads % layout.sequence:
        return heads_problem(config.num_heads, layout.sequence)
    return None


# ---------------------------------------------------------------- what it costs


@dataclass(frozen=True)
class Machine:
    """The figures that the time model takes: of one GPU, and of its link to the others."""

    flops: float  # floating-point operations a second, reached, not peak
    bytes_per_second: float  # one way, for each GPU
    latency: float  # seconds an exchange takes however small


TYPICAL = Machine(flops=2.5e14, bytes_per_second=2e10, latency=5e-5)


def pass_operations(config: BackboneConfig, tokens: int) -> float:
    """Floating-point operations of one prediction of one sample (a multiply-add counts as two)."""
    dim, blocks = config.dim, config.num_double_layers + config.num_single_layers
    linear = tokens * (6 * dim * dim + 2 * dim * config.ffn_dim) + 2 * config.text_len * dim * dim
    attention = 2 * tokens * tokens * dim + 2 * tokens * config.text_len * dim
    return 2.0 * blocks * (linear + attention)


def exchanged_bytes(config: BackboneConfig, video: int, audio: int, sequence: int, element: int = 2) -> float:
    """Bytes a worker sends in one prediction whose tokens ``sequence`` workers share.

    In each block q, k and v to the others' heads and the result back; at the end velocities, not tokens.
    """
    others = (sequence - 1) / sequence
    blocks = config.num_double_layers + config.num_single_layers
    attention = blocks * 4 * (video + audio) / sequence * config.dim * others
    velocities = (video * VIDEO_WIDTH + audio * AUDIO_WIDTH) / sequence * (sequence - 1)
    return element * (attention + velocities)


def step_seconds(
    config: BackboneConfig, layout: Layout, predictions: int, video: int, audio: int, machine: Machine = TYPICAL
) -> float:
    """A model, not a measurement, of one step's time: the busiest branch's operations and exchanges, not overlapped."""
    compute = pass_operations(config, video + audio) / layout.sequence / machine.flops
    exchange = 0.0
    if layout.sequence > 1:
        blocks = config.num_double_layers + config.num_single_layers
        sent = exchanged_bytes(config, video, audio, layout.sequence)
        exchange = sent / machine.bytes_per_second + (2 * blocks + 2) * machine.latency
    return layout.rounds(predictions) * (compute + exchange)


def fitting_layouts(config: BackboneConfig, workers: int, predictions: int, video: int, audio: int) -> list[Layout]:
    """Layouts of at most ``workers`` workers that leave no branch without a prediction or a worker without tokens."""
    fewest = min(count for count in (video, audio) if count)
    return [
        Layout(branches, sequence)
        for branches in range(1, min(workers, predictions) + 1)
        for sequence in range(1, workers // branches + 1)
        if config.num_heads % sequence == 0 and sequence <= fewest
    ]


def choose_layout(
    config: BackboneConfig,
    workers: int,
    predictions: int,
    video: int,
    audio: int,
    machine: Machine = TYPICAL,
    neighbours: int | None = None,
) -> Layout:
    """The quickest layout by the time model for clips of ``video`` and ``audio`` tokens; of equals the smallest.

    ``neighbours``: how many workers a machine has, where there are several: tokens are not shared over a network.
    """
    layouts = [
        each
        for each in fitting_layouts(config, workers, predictions, video, audio)
        if neighbours is None or each.sequence <= neighbours
    ]
    return min(layouts, key=lambda each: (step_seconds(config, each, predictions, video, audio, machine), each.workers))
