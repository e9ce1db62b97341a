"""What one backbone file loses against another: errors of velocities and of their guided combination, by modality."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..checkpoint import (
    FileInfo,
    WrongFileError,
    block_linears,
    open_checkpoint,
    readable_backbone,
    stream_tensors,
    weight_shapes,
)
from ..geometry import ClipGeometry
from .probes import PROBE_CLIP, Conditions, make_probes, null_conditions
from .streamed import StreamedBackbone

COMPARED_SIGMAS = (0.9999, 0.9, 0.7, 0.4)
# Of the guided sound's relative error, see docs/quantised_weights.md: on a small network that has learnt, weights of 6
# and 8 bits stay below 3.5 %, those of 4 bits are at 8 to 11 %, and with the released ones others heard that.
SOUND_ERROR = 0.05
OUTSIDE = "outside the blocks"


@dataclass(frozen=True)
class Errors:
    """Of one thing at one noise level: relative L2 error and cosine, picture and sound."""

    sigma: float
    video_error: float
    audio_error: float
    video_cosine: float
    audio_cosine: float


@dataclass(frozen=True)
class Comparison:
    """``predictions`` are of the conditional prediction, ``guided`` of the makers' combination of all four; ``weights``
    the relative L2 errors of the weights, by what kind of layer they belong to. ``real``: with a text encoder's
    contexts."""

    predictions: tuple[Errors, ...]
    guided: tuple[Errors, ...]
    weights: Mapping[str, float]
    real: bool

    @property
    def warning(self) -> str | None:
        """A sentence where the sound will suffer; None where it need not."""
        worst = max(each.audio_error for each in self.guided)
        if worst <= SOUND_ERROR:
            return None
        return (
            f"The sound will suffer: guided, it is {100 * worst:.1f} % off. Weights of 6 and 8 bits were measured "
            "below 3.5 %, those of 4 bits at 8 to 11 %, which is heard: use 6 or 8 bits, or protect more (--protect)."
        )

    def to_dict(self) -> dict:
        """Plain numbers, for JSON."""
        return {**asdict(self), "weights": dict(self.weights), "warning": self.warning}


@torch.no_grad()
def compare_files(
    reference: str | os.PathLike | FileInfo,
    other: str | os.PathLike | FileInfo,
    *,
    conditions: Conditions | None = None,
    clip: ClipGeometry = PROBE_CLIP,
    sigmas: Sequence[float] = COMPARED_SIGMAS,
    device: torch.device | str = "cpu",
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> Comparison:
    """Errors of the backbone file ``other`` against ``reference``, of whatever forms the two are, on a small clip.

    Latents are those that ``reference`` itself makes of noise. ``conditions``: None for the text null of training. Both
    are run block by block. ``progress(done, of)``. Raises as ``load_backbone`` does, and WrongFileError where the two
    are not the same network.
    """
    first, second = readable_backbone(reference), readable_backbone(other)
    done = 0

    def step() -> None:
        nonlocal done
        done += 1
        if progress is not None:
            progress(done, backbone.steps * (len(sigmas) + 1))

    with StreamedBackbone(first, device) as backbone:
        conditions = conditions or null_conditions(backbone.config)
        probes = make_probes(backbone, conditions, clip, sigmas=sigmas, seed=seed, progress=step)
        passes = [each for probe in probes for each in probe.passes.values()]
        wanted = backbone.run(passes, step)
        config = backbone.config
    with StreamedBackbone(second, device) as backbone:
        if backbone.config != config:
            raise WrongFileError(f"{first.path.name} and {second.path.name} are networks of different sizes.")
        found = backbone.run(passes, step)
    predictions, guided = [], []
    for index, probe in enumerate(probes):
        part = slice(index * len(probe.passes), (index + 1) * len(probe.passes))
        pair = [dict(zip(probe.passes, each[part], strict=True)) for each in (wanted, found)]
        predictions.append(_errors(probe.sigma, pair[0]["c"], pair[1]["c"]))
        guided.append(_errors(probe.sigma, *(probe.combine(each) for each in pair)))
    return Comparison(tuple(predictions), tuple(guided), weight_errors(first, second), conditions.real)


def _errors(sigma: float, wanted: tuple[Tensor, Tensor], found: tuple[Tensor, Tensor]) -> Errors:
    errors = [((x - y).norm() / y.norm()).item() for x, y in zip(found, wanted, strict=True)]
    cosines = [F.cosine_similarity(x.flatten(), y.flatten(), dim=0).item() for x, y in zip(found, wanted, strict=True)]
    return Errors(sigma, *errors, *cosines)


def weight_errors(reference: FileInfo, other: FileInfo) -> dict[str, float]:
    """Relative L2 error of the weights, by kind of layer: attention, feed-forward, and what is outside the blocks."""
    linears, names = block_linears(reference), list(weight_shapes(reference))
    sums: dict[str, list[float]] = {}
    with open_checkpoint(reference) as first, open_checkpoint(other) as second:
        for path in dict.fromkeys(name.rpartition(".")[0] for name in names):
            only = {name for name in names if name.rpartition(".")[0] == path}
            pair = [dict(stream_tensors(each, torch.float32, only=only)) for each in (first, second)]
            kind = path.split(".")[2] if path in linears else OUTSIDE
            for name, mine in pair[0].items():
                if mine.ndim > 1:
                    total = sums.setdefault(kind, [0.0, 0.0])
                    total[0] += (pair[1][name] - mine).square_().sum().item()
                    total[1] += mine.square().sum().item()
    return {kind: (error / size) ** 0.5 if size else 0.0 for kind, (error, size) in sums.items()}
