"""Merges LoRAs into the backbone's weights as these are loaded, to what ComfyUI's LoRA loader makes them."""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from .checkpoint import (
    FileInfo,
    FileKind,
    TensorSource,
    WeightChange,
    WrongFileError,
    describe_file,
    explain_wrong_file,
    open_checkpoint,
    weight_shapes,
)
from .convert import check_finite
from .lora import PAIRS, LoraEntry, check_whole, match_layers, peft_alphas, peft_config, some
from .lora import PREFIX as LAYER_PREFIX

Lora = str | os.PathLike | tuple[str | os.PathLike, float]  # a file, and its strength where that is not 1

DIFFERENCES = {"diff": ".weight", "w_norm": ".weight", "diff_b": ".bias", "b_norm": ".bias"}
MERGED_FORMS = frozenset({"alpha", *DIFFERENCES, *(form for pair in PAIRS for form in pair)})
READ_CHUNK = 1 << 20


@dataclass(frozen=True)
class _Delta:
    """What one LoRA adds to a weight: ``strength * difference``, or ``strength * alpha / rank * up @ down``.

    ``parts`` are names in the LoRA's file: the difference, or down, up and, where it has one, alpha; ``alpha`` is the
    value where peft keeps it beside the file.
    """

    info: FileInfo
    parts: tuple[str, ...]
    strength: float
    alpha: float | None = None

    def added_to(self, weight: torch.Tensor, source: TensorSource) -> torch.Tensor:
        """``weight``, float32 on any device, with the delta: a new tensor."""
        first, *rest = (self._read(source, name).to(weight.device, torch.float32) for name in self.parts)
        if not rest:
            return first.mul_(self.strength).add_(weight)
        alpha = rest[1].item() if len(rest) > 1 else self.alpha
        scale = 1.0 if alpha is None else alpha / first.shape[0]
        delta = (rest[0].flatten(1) @ first.flatten(1)).reshape(weight.shape)
        return delta.mul_(self.strength * scale).add_(weight)

    def _read(self, source: TensorSource, name: str) -> torch.Tensor:
        tensor = source.read(name)
        check_finite(self.info, name, tensor, tensor.dtype)
        return tensor


class LoraMerge:
    """``loras`` as they fit a backbone file, found from the files' headers: a path each, or (path, strength).

    LoRAs of several trainers' namings are known, see :func:`convert_lora`, and plain differences; those of one weight
    add up in the order given. The weights are those that this pack's model has in ComfyUI. A strength of 0 leaves a
    LoRA out. ``notes``: sentences on what of a file is not used.

        with LoraMerge([("few_steps.safetensors", 0.9)], path).changes() as changes:
            backbone = load_backbone(path, changes=changes)

    Raises, in a sentence, FileNotFoundError, WrongFileError where a file is no LoRA, is for no layer of the backbone,
    for layers of another size or in a form that is not merged here (DoRA, LoHa, LoKr), ValueError for a strength that
    is no finite number.
    """

    def __init__(self, loras: Sequence[Lora], backbone: str | os.PathLike | FileInfo) -> None:
        self.notes: list[str] = []
        self.merged: list[tuple[Path, float]] = []  # files and strengths, in their order
        self._deltas: dict[str, list[_Delta]] = {}  # by the weight's name
        backbone = backbone if isinstance(backbone, FileInfo) else describe_file(backbone)
        shapes = weight_shapes(backbone)
        for lora in loras:
            self._add(*(lora if isinstance(lora, tuple) else (lora, 1.0)), shapes)

    @property
    def names(self) -> list[str]:
        """Of the files that are merged."""
        return [path.name for path, _ in self.merged]

    def _add(self, path: str | os.PathLike, strength: float, shapes: Mapping[str, tuple[int, ...]]) -> None:
        info = describe_file(path)
        if info.kind is not FileKind.LORA:
            raise WrongFileError(explain_wrong_file(info, FileKind.LORA))
        if not math.isfinite(strength):
            raise ValueError(f"The strength of {info.path.name} must be a number such as 0.8; got {strength}.")
        deltas, unused = _fit(info, float(strength), shapes)
        if unused:
            self.notes.append(
                f"{info.path.name}: {len(unused)} of its {len(info.tensors)} tensors are for nothing in this backbone "
                f"and are not used ({some(unused)})."
            )
        if strength:
            self.merged.append((info.path, strength))
            for name, delta in deltas:
                self._deltas.setdefault(name, []).append(delta)

    @contextmanager
    def changes(self) -> Iterator[dict[str, WeightChange]]:
        """What :func:`load_backbone` is to change, by the weights' names; the LoRAs are open for the time of the
        block, and read as their weights come."""
        with ExitStack() as stack:
            deltas = [delta for several in self._deltas.values() for delta in several]
            infos = {delta.info.path: delta.info for delta in deltas}
            sources = {path: stack.enter_context(open_checkpoint(info)) for path, info in infos.items()}
            yield {name: partial(_with_deltas, several, sources) for name, several in self._deltas.items()}


def lora_fingerprint(path: str | os.PathLike) -> str:
    """SHA-256 of what a LoRA does: of its file, and of the alphas that peft keeps beside it."""
    info = describe_file(path)
    digest = hashlib.sha256()
    for each in (info.path, peft_config(info)):
        if each is not None:
            with each.open("rb") as file:
                while chunk := file.read(READ_CHUNK):
                    digest.update(chunk)
    return digest.hexdigest()


def _with_deltas(deltas: Sequence[_Delta], sources: Mapping, weight: torch.Tensor) -> torch.Tensor:
    for delta in deltas:
        weight = delta.added_to(weight, sources[delta.info.path])
    return weight


def _fit(
    info: FileInfo, strength: float, shapes: Mapping[str, tuple[int, ...]]
) -> tuple[list[tuple[str, _Delta]], list[str]]:
    """The deltas of a LoRA with the weights' names, and the names of tensors that no weight uses."""
    entries, unused = match_layers(info)
    other = [entry.source for entry in entries if entry.form not in MERGED_FORMS]
    if other:
        raise WrongFileError(
            f"{info.path.name} has {len(other)} of its {len(info.tensors)} tensors in a form that is not merged here "
            f"({some(other)}), as DoRA, LoHa and LoKr have: save it from its trainer as a plain LoRA."
        )
    placed = [(entry, _weight_of(entry, shapes)) for entry in entries]
    unused += [entry.source for entry, name in placed if name is None]
    used = [entry for entry, name in placed if name is not None]
    if not used:
        raise WrongFileError(
            f"{info.path.name} is no LoRA for this backbone: none of its {len(info.tensors)} tensors belongs to one of "
            f"its layers ({some(unused)}); choose one that was trained on NAVA."
        )
    check_whole(info, used)
    deltas = list(_deltas(info, used, strength, shapes))
    taken = {part for _, delta in deltas for part in delta.parts}
    unused += [entry.source for entry in used if entry.source not in taken]
    misshaped = [problem for name, delta in deltas if (problem := _misshape(delta, name, shapes[name]))]
    if misshaped:
        raise WrongFileError(
            f"{info.path.name} is for a model of another size: {len(misshaped)} of its {len(deltas)} changes do not "
            f"fit this backbone ({misshaped[0]}); choose one that was trained on NAVA."
        )
    return deltas, unused


def _weight_of(entry: LoraEntry, shapes: Mapping[str, tuple[int, ...]]) -> str | None:
    """The tensor of the backbone that an entry is for; a few, such as biases, are themselves what is called a layer."""
    names = (entry.layer + DIFFERENCES.get(entry.form, ".weight"), entry.layer)
    return next((name for name in names if name in shapes), None)


def _deltas(
    info: FileInfo, entries: Sequence[LoraEntry], strength: float, shapes: Mapping[str, tuple[int, ...]]
) -> Iterator[tuple[str, _Delta]]:
    at = {(entry.layer, entry.form): entry.source for entry in entries}
    beside = {name.removesuffix(".alpha"): value.item() for name, value in peft_alphas(info, entries).items()}
    for entry in entries:
        name = _weight_of(entry, shapes)
        if entry.form in DIFFERENCES:
            yield name, _Delta(info, (entry.source,), strength)
        for down, up in PAIRS:
            if entry.form == down:
                alpha = at.get((entry.layer, "alpha"))
                parts = (entry.source, at[entry.layer, up], *([alpha] if alpha else []))
                yield name, _Delta(info, parts, strength, beside.get(LAYER_PREFIX + entry.layer))


def _misshape(delta: _Delta, name: str, shape: tuple[int, ...]) -> str:
    """Why a delta cannot be added to a weight of ``shape``, as a phrase; empty where it can."""
    first, *rest = (tuple(delta.info.tensors[part].shape) for part in delta.parts)
    if not rest:
        return "" if first == shape else f"{name} is {shape}, its difference {first}"
    up, alpha = rest[0], rest[1] if len(rest) > 1 else ()
    rank = first[0] if first else 0
    low = len(first) > 1 and len(up) > 1 and math.prod(up[1:]) == rank > 0 and math.prod(alpha) == 1
    fits = low and len(shape) > 1 and (up[0], math.prod(first[1:])) == (shape[0], math.prod(shape[1:]))
    return "" if fits else f"{name} is {shape}, its matrices {up} and {first}"
