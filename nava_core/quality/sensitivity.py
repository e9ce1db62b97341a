"""Which Linears a smaller format costs most: the error at the output that rounding one of them alone causes.

One forward pass for each of 380 Linears would take hours, so the error is put together from two measured things. Inside
a block, every Linear is rounded by itself and the block computed again: the difference at the block's output is exact.
From there to the output, what all of a block's Linears together have changed is carried on twice, once in the picture's
tokens and once in the sound's: how much of either arrives in picture and sound is taken to be the same for all Linears
of the block. ``exact=True`` carries each Linear's own difference on instead: the yardstick that the estimate is tested
against, for small networks or a GPU.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..backbone.formats import FORMATS, QuantisedLayer
from ..checkpoint import FileInfo, backbone_config, block_linears, readable_backbone
from ..geometry import ClipGeometry
from ..sampling.guidance import PREDICTIONS
from .probes import PROBE_CLIP, SIGMAS, Conditions, Probe, make_probes, null_conditions
from .streamed import Running, StreamedBackbone, streamed_bytes

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Sensitivity:
    """Squared relative errors of the guided (video, audio) that each Linear of the blocks, rounded alone, causes, and
    the shapes of their weights, by name."""

    errors: Mapping[str, tuple[float, float]]
    shapes: Mapping[str, tuple[int, int]]

    def scores(self) -> dict[str, float]:
        """One number a Linear: the sum of both errors, the sound's raised where all of it is the smaller, so that
        sound counts at least as much as picture."""
        video, audio = (sum(each[part] for each in self.errors.values()) for part in (0, 1))
        weight = max(1.0, video / audio) if audio > 0 else 1.0
        return {name: v + weight * a for name, (v, a) in self.errors.items()}


def most_sensitive(sensitivity: Sensitivity, share: float) -> list[str]:
    """The Linears to protect: those with most error a weight, until they hold ``share`` (0 to 1) of all the blocks'
    weights. By weights and not by number, so that the file's size is known. Raises ValueError for another share."""
    if not 0 <= share <= 1:
        raise ValueError(f"The share of weights to protect lies between 0 and 1; got {share}.")
    scores, sizes = sensitivity.scores(), {name: rows * columns for name, (rows, columns) in sensitivity.shapes.items()}
    room, chosen = share * sum(sizes.values()), []
    for name in sorted(scores, key=lambda each: -scores[each] / sizes[each]):
        if sizes[name] <= room:
            chosen.append(name)
            room -= sizes[name]
    return chosen


@torch.no_grad()
def measure_sensitivity(
    path: str | os.PathLike | FileInfo,
    format: str,
    *,
    conditions: Conditions | None = None,
    clip: ClipGeometry = PROBE_CLIP,
    sigmas: Sequence[float] = SIGMAS,
    device: torch.device | str = "cpu",
    exact: bool = False,
    seed: int = 0,
    progress: Progress | None = None,
) -> Sensitivity:
    """Errors that rounding to ``format`` ("nvfp4", "w4a8", "w6a8" ...) causes, Linear by Linear of a backbone file.

    ``conditions``: None for the text null of training. ``progress(done, of)`` is called after each block. Takes
    :func:`sensitivity_bytes` of memory (``exact``: more). Raises as ``load_backbone`` does.
    """
    info = readable_backbone(path)
    shapes = {name: shape for name, shape in block_linears(info).items() if FORMATS[format].fits(shape)}
    with StreamedBackbone(info, device) as backbone:
        step = _counter(backbone.steps * len(sigmas), progress)
        conditions = conditions or null_conditions(backbone.config)
        probes = make_probes(backbone, conditions, clip, sigmas=sigmas, seed=seed, progress=step)
        measure = _Measurement(backbone, probes, format, exact)
        for name, block in backbone.blocks():
            measure.take(name, block, [each for each in shapes if each.startswith(f"{name}.")])
            step()
        errors = measure.errors()
    return Sensitivity(errors, shapes)


def sensitivity_bytes(path: str | os.PathLike | FileInfo, clip: ClipGeometry = PROBE_CLIP) -> int:
    """Memory that measuring a file's Linears takes: :func:`streamed_bytes`, and all that is carried to the output."""
    info = readable_backbone(path)
    config = backbone_config(info)
    carried = 2 * (config.num_double_layers + config.num_single_layers)
    passes = len(SIGMAS) * len(PREDICTIONS)
    return streamed_bytes(info) + carried * passes * clip.tokens * config.dim * 4


def _counter(total: int, progress: Progress | None) -> Callable[[], None]:
    done = 0

    def step() -> None:
        nonlocal done
        done += 1
        if progress is not None:
            progress(done, total)

    return step


Tokens = list[dict[str, Tensor]]  # by probe and prediction


@dataclass
class _Carried:
    """Tokens that differ from the exact ones, on their way to the output: whose they are, and how large the combined
    difference was that they began with, a number a probe."""

    tokens: Tokens
    shares: dict[str, list[float]]  # by Linear and probe: its own combined difference over that of all


class _Measurement:
    """Goes through the blocks with the exact passes and everything carried beside them."""

    def __init__(self, backbone: StreamedBackbone, probes: list[Probe], format: str, exact: bool) -> None:
        self.backbone, self.probes, self.format, self.exact = backbone, probes, FORMATS[format], exact
        self.running: list[dict[str, Running]] = [
            dict(zip(probe.passes, backbone.start(list(probe.passes.values())), strict=True)) for probe in probes
        ]
        self.carried: list[_Carried] = []

    def take(self, name: str, block: nn.Module, linears: list[str]) -> None:
        """Everything through one block; the differences that its ``linears`` make are carried on from here."""
        for each in self.carried:
            each.tokens = self._through(block, each.tokens)
        exact = self._through(block)
        total: Tokens = [{letter: torch.zeros_like(x) for letter, x in each.items()} for each in exact]
        sizes: dict[str, list[tuple[float, float]]] = {}
        for linear in linears:
            with _rounded(block.get_submodule(linear.removeprefix(f"{name}.")), self.format):
                difference = _minus(self._through(block), exact)
            sizes[linear] = self._sizes(difference)
            if self.exact:
                self.carried.append(_Carried(_plus(exact, difference), {linear: [1.0] * len(self.probes)}))
            else:
                total = _plus(total, difference)
        if not self.exact:
            self._carry_together(exact, total, sizes)
        for running, tokens in zip(self.running, exact, strict=True):
            for letter, each in running.items():
                each.tokens = tokens[letter]

    def _carry_together(self, exact: Tokens, total: Tokens, sizes: Mapping[str, list[tuple[float, float]]]) -> None:
        whole = self._sizes(total)
        for part in (0, 1):
            shares = {
                linear: [mine[part] / all_[part] if all_[part] else 0.0 for mine, all_ in zip(own, whole, strict=True)]
                for linear, own in sizes.items()
            }
            self.carried.append(_Carried(_plus(exact, self._only(total, part)), shares))

    def _through(self, block: nn.Module, tokens: Tokens | None = None) -> Tokens:
        return [
            {
                letter: each.through(block, None if tokens is None else tokens[index][letter])
                for letter, each in running.items()
            }
            for index, running in enumerate(self.running)
        ]

    def _stretches(self, index: int) -> tuple[slice, slice]:
        split = self.running[index]["c"].split
        return slice(0, split), slice(split, None)

    def _only(self, difference: Tokens, part: int) -> Tokens:
        """The difference in the tokens of one modality."""
        out = []
        for index, each in enumerate(difference):
            stretch = self._stretches(index)[part]
            out.append({letter: torch.zeros_like(x) for letter, x in each.items()})
            for letter, x in each.items():
                out[-1][letter][:, stretch] = x[:, stretch]
        return out

    def _sizes(self, difference: Tokens) -> list[tuple[float, float]]:
        """Squared size of the guided combination of a difference, in the (video, audio) tokens, a pair a probe."""
        sizes = []
        for index, (probe, each) in enumerate(zip(self.probes, difference, strict=True)):
            video, audio = self._stretches(index)
            combined = probe.combine({letter: (x[:, video], x[:, audio]) for letter, x in each.items()})
            sizes.append(tuple(x.square().sum().item() for x in combined))
        return sizes

    def errors(self) -> dict[str, tuple[float, float]]:
        """Squared relative errors of (video, audio), the mean over the probes, by Linear."""
        exact = self._guided([{letter: each.tokens for letter, each in running.items()} for running in self.running])
        errors: dict[str, list[float]] = {}
        for each in self.carried:
            arrived = self._guided(each.tokens)
            for linear, shares in each.shares.items():
                sums = errors.setdefault(linear, [0.0, 0.0])
                for share, changed, reference in zip(shares, arrived, exact, strict=True):
                    for part, (x, y) in enumerate(zip(changed, reference, strict=True)):
                        error = ((x - y).square().sum() / y.square().sum()).item()
                        sums[part] += share * error / len(self.probes)
        return {linear: (video, audio) for linear, (video, audio) in errors.items()}

    def _guided(self, tokens: Tokens) -> list[tuple[Tensor, Tensor]]:
        return [
            probe.combine({letter: self.backbone.finish(running[letter], x) for letter, x in each.items()})
            for probe, running, each in zip(self.probes, self.running, tokens, strict=True)
        ]


@contextmanager
def _rounded(linear: nn.Linear, format) -> Iterator[None]:
    """The layer with its weight rounded to a format and back, for the time of the block."""
    weight = linear.weight.data
    layer = QuantisedLayer.made(format, tuple(weight.shape))
    linear.weight.data = layer.dequantise(layer.quantise(weight), torch.float32)
    try:
        yield
    finally:
        linear.weight.data = weight


def _minus(first: Tokens, second: Tokens) -> Tokens:
    return [{k: x - b[k] for k, x in a.items()} for a, b in zip(first, second, strict=True)]


def _plus(first: Tokens, second: Tokens) -> Tokens:
    return [{k: x + b[k] for k, x in a.items()} for a, b in zip(first, second, strict=True)]
