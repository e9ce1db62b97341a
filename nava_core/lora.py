"""Rewrites a LoRA for NAVA, whichever trainer wrote it, with the names that ComfyUI's stock LoRA loaders look for."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Callable, Iterable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import save

from .backbone import BackboneConfig, NavaBackbone
from .checkpoint import FileInfo, FileKind, WrongFileError, describe_file, explain_wrong_file, open_checkpoint
from .convert import check_finite, check_space, check_target, complete_or_absent

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
PREFIX = "diffusion_model."  # before a layer's name, as the host's loader wants it
SHOWN_NAMES = 3
MAX_PARTS = 6  # of a layer's name, and one more
PEFT_PREFIX = "base_model.model."
PEFT_CONFIG = "adapter_config.json"  # what peft writes beside its weights, and where it keeps their alpha

_WRAPPERS = "base_model|model|diffusion_model|backbone|transformer|module"
_DOTTED_PREFIX = re.compile(rf"(?:(?:{_WRAPPERS})\.)*")
_FLAT_PREFIX = re.compile(rf"lora_(?:unet|transformer)_+(?:(?:{_WRAPPERS})_)*")  # names with _ for every dot
_BLOCK = re.compile(r"(double|single)_blocks([._])([0-9]{1,4})(?=[._])")
_PLAIN_NAME = re.compile(r"[\w.]+")

# What follows a layer's name, and what it is called in the result; the group is an adapter's name, as in peft's.
_FORMS = (
    (re.compile(r"lora_(A|B)(?:\.(?!weight$|bias$)\w+)?(?:\.weight)?"), r"lora_\1.weight"),
    (re.compile(r"lora_(up|down|mid)\.weight"), r"lora_\1.weight"),
    (re.compile(r"lora\.(up|down)\.weight"), r"lora_\1.weight"),
    (re.compile(r"lora_magnitude_vector(?:\.(?!weight$)\w+)?(?:\.weight)?"), "dora_scale"),
    (re.compile(r"(hada_w[12]_[ab]|hada_t[12]|lokr_w[12](?:_[ab])?|lokr_t2)"), r"\1"),
    (re.compile(r"(alpha|dora_scale|diff|diff_b|set_weight|w_norm|b_norm|reshape_weight)"), r"\1"),
)
PAIRS = (("lora_A.weight", "lora_B.weight"), ("lora_down.weight", "lora_up.weight"))
_KEPT_TYPES = ("alpha", "reshape_weight")  # numbers to compute with, not weights

# Called with (bytes read so far, bytes in all) after each tensor.
Progress = Callable[[int, int], None]


class ConvertedLora(NamedTuple):
    """A written LoRA: its file, the layers it changes, and how many of them have no alpha."""

    info: FileInfo
    layers: int
    without_alpha: int

    @property
    def summary(self) -> str:
        text = f"{self.info.summary[:-1]}, for {self.layers} layer{'s' if self.layers > 1 else ''} of NAVA."
        if self.without_alpha:
            text += f" {self.without_alpha} of them without an alpha, which then counts as the rank."
        return text


class LoraEntry(NamedTuple):
    """A tensor of the source: its name there, the layer of NAVA and the form it has in the result, "" for no known."""

    source: str
    layer: str
    form: str


def convert_lora(
    source: str | os.PathLike,
    target: str | os.PathLike,
    *,
    dtype: str | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> ConvertedLora:
    """Writes a LoRA as safetensors in names that ComfyUI's LoRA loaders map to NAVA's layers.

    Read are a safetensors or torch file with the layers named as in the checkpoint, alone or after the prefixes of
    trainers (``backbone.``, ``transformer.``, ``base_model.model.``, ``diffusion_model.`` ...), or with underscores
    after ``lora_unet_`` or ``lora_transformer_``; LoRA, DoRA, LoHa, LoKr and plain differences. The ``lora_alpha`` of
    peft is taken from the ``adapter_config.json`` beside the source. ``dtype``: "bf16", "fp16", "fp32", or None for
    the types of the source. The target appears only when it is complete.

    Raises FileNotFoundError, FileExistsError (and ``overwrite`` is not set), WrongFileError where the source is no
    LoRA, one of another model, or in a form that the host does not read, ValueError for an unknown ``dtype``, a
    target that is the source or values that the type cannot hold, OSError where the disk is too small.
    """
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"A LoRA cannot be written as {dtype}: choose one of {', '.join(DTYPES)}, or none to keep it.")
    info = describe_file(source)
    if info.kind is not FileKind.LORA:
        raise WrongFileError(explain_wrong_file(info, FileKind.LORA))
    target = Path(target)
    check_target(info, target, overwrite)
    entries = _entries(info)
    alphas = peft_alphas(info, entries)
    tensors = {**_read(info, entries, DTYPES.get(dtype), progress), **alphas}
    data = save(tensors, {"format": "pt", **info.metadata})
    check_space(target, len(data))
    with complete_or_absent(target) as file:
        file.write(data)
    return ConvertedLora(describe_file(target), len({entry.layer for entry in entries}), _count_without_alpha(tensors))


# --- names -------------------------------------------------------------------------------------------------------


@lru_cache(maxsize=1)
def _layer_names() -> dict[str, str]:
    """NAVA's layers, those of block 0 standing for every block: by their names, and by these with underscores."""
    config = BackboneConfig(dim=128, ffn_dim=128, num_heads=1, num_double_layers=1, num_single_layers=1)
    parameters = [name for name, _ in NavaBackbone(config, device="meta").named_parameters()]
    layers = [name.removesuffix(".weight") for name in parameters]
    return {**{layer.replace(".", "_"): layer for layer in layers}, **{layer: layer for layer in layers}}


def _find_layer(name: str) -> str | None:
    """A layer's own name, for its name with dots or underscores; None where NAVA has no such layer."""
    block = _BLOCK.match(name)
    if block is None:
        return _layer_names().get(name)
    found = _layer_names().get(f"{block[1]}_blocks{block[2]}0{name[block.end() :]}")
    return found and found.replace("_blocks.0.", f"_blocks.{int(block[3])}.", 1)


def _split(key: str) -> tuple[str, str] | None:
    """(layer, what follows its name) of a tensor's name; None where NAVA has no such layer."""
    flat = _FLAT_PREFIX.match(key)
    if flat:
        name, _, rest = key[flat.end() :].partition(".")
        layer = _find_layer(name)
        return (layer, rest) if layer else None
    parts = key[_DOTTED_PREFIX.match(key).end() :].split(".", MAX_PARTS)
    for end in range(len(parts) - 1, 0, -1):
        layer = _find_layer(".".join(parts[:end]))
        if layer:
            return layer, ".".join(parts[end:])
    return None


def _read_form(rest: str) -> str | None:
    for pattern, form in _FORMS:
        found = pattern.fullmatch(rest)
        if found:
            return found.expand(form)
    return None


def match_layers(info: FileInfo) -> tuple[list[LoraEntry], list[str]]:
    """The tensors of a LoRA's file that are for a layer of NAVA, and the names of the others."""
    split = {key: _split(key) for key in info.tensors}
    entries = [LoraEntry(key, found[0], _read_form(found[1]) or "") for key, found in split.items() if found]
    return entries, [key for key, found in split.items() if found is None]


def _entries(info: FileInfo) -> list[LoraEntry]:
    """All tensors of the file with their new names. Raises WrongFileError where one of them has none."""
    entries, foreign = match_layers(info)
    if foreign:
        raise WrongFileError(
            f"{info.path.name} is no LoRA for NAVA: {len(foreign)} of its {len(info.tensors)} tensors belong to no "
            f"layer of the model ({some(foreign)}); choose one that was trained on NAVA."
        )
    unread = [entry.source for entry in entries if not entry.form]
    if unread:
        raise WrongFileError(
            f"{info.path.name} has {len(unread)} of its {len(entries)} tensors in a form that ComfyUI's LoRA loader "
            f"does not read ({some(unread)}): save it from its trainer as a plain LoRA."
        )
    check_whole(info, entries)
    return entries


def check_whole(info: FileInfo, entries: Iterable[LoraEntry]) -> None:
    """Each name once, and no half of a pair alone, at which the host's loader would fail."""
    seen: dict[tuple[str, str], str] = {}
    for entry in entries:
        place = (entry.layer, entry.form)
        if place in seen:
            raise WrongFileError(
                f"{info.path.name} holds more than one LoRA: {seen[place]} and {entry.source} are for the same layer; "
                "save each to a file of its own."
            )
        seen[place] = entry.source
    for pair in PAIRS:
        for one, other in (pair, pair[::-1]):
            alone = [name for (layer, form), name in seen.items() if form == one and (layer, other) not in seen]
            if alone:
                raise WrongFileError(
                    f"{info.path.name} is incomplete: the other matrix of {some(alone)} is missing; "
                    "download it again, or save it again from its trainer."
                )


def some(names: list[str]) -> str:
    return ", ".join(names[:SHOWN_NAMES]) + (", ..." if len(names) > SHOWN_NAMES else "")


# --- tensors -----------------------------------------------------------------------------------------------------


def _read(
    info: FileInfo, entries: Iterable[LoraEntry], dtype: torch.dtype | None, progress: Progress | None
) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = {}
    done, total = 0, sum(tensor.nbytes for tensor in info.tensors.values())
    with open_checkpoint(info) as source:
        for entry in entries:
            tensor = source.read(entry.source)
            if dtype is not None and tensor.is_floating_point() and entry.form not in _KEPT_TYPES:
                tensor = tensor.to(dtype)
            check_finite(info, entry.source, tensor, tensor.dtype)
            if entry.form == "dora_scale" and not entry.source.endswith("dora_scale"):
                # peft has the lengths of a matrix's rows flat, the host needs them to stand before each row.
                tensor = tensor.reshape(-1, *[1] * max(tensor.ndim - 1, 1))
            tensors[f"{PREFIX}{entry.layer}.{entry.form}"] = tensor
            done += info.tensors[entry.source].nbytes
            if progress is not None:
                progress(done, total)
    return tensors


def _count_without_alpha(tensors: Mapping[str, torch.Tensor]) -> int:
    pairs = [name.removesuffix(f".{form}") for name in tensors for form, _ in PAIRS if name.endswith(f".{form}")]
    return sum(f"{layer}.alpha" not in tensors for layer in pairs)


def peft_config(info: FileInfo) -> Path | None:
    """The file beside a LoRA of peft that holds its alpha; None for one of another trainer, or where it is missing."""
    path = info.path.with_name(PEFT_CONFIG)
    return path if any(name.startswith(PEFT_PREFIX) for name in info.tensors) and path.is_file() else None


def peft_alphas(info: FileInfo, entries: Iterable[LoraEntry]) -> dict[str, torch.Tensor]:
    """Alphas of a LoRA that peft saved, which are not in its weights' file; none where peft's own file is not there.

    The host scales by alpha / rank, and peft with ``use_rslora`` by alpha / sqrt(rank).
    """
    path = peft_config(info)
    if path is None:
        return {}
    config = _read_peft_config(path)
    has_own = {entry.layer for entry in entries if entry.form == "alpha"}
    alphas = {}
    for entry in entries:
        if entry.form == "lora_A.weight" and entry.layer not in has_own:
            alpha = _alpha_of(entry.layer, config)
            if config.get("use_rslora"):
                alpha *= math.sqrt(math.prod(info.tensors[entry.source].shape[:1]))
            alphas[f"{PREFIX}{entry.layer}.alpha"] = torch.tensor(alpha, dtype=torch.float32)
    return alphas


def _alpha_of(layer: str, config: Mapping) -> float:
    for name, alpha in config["alpha_pattern"].items():
        own = name[_DOTTED_PREFIX.match(name).end() :]
        if f".{layer}".endswith(f".{own}"):
            return float(alpha)
    return float(config["lora_alpha"])


def _read_peft_config(path: Path) -> dict:
    """``adapter_config.json`` with a usable ``lora_alpha`` and ``alpha_pattern``; raises WrongFileError otherwise."""
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        config["alpha_pattern"] = dict(config.get("alpha_pattern") or {})
        alphas = [config["lora_alpha"], *config["alpha_pattern"].values()]
        sound = all(type(alpha) in (int, float) and math.isfinite(alpha) for alpha in alphas)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        sound = False
    if not sound:
        raise WrongFileError(f"{path} says no lora_alpha to scale the LoRA by: correct it, or move it away.")
    patterns = [name for name in config["alpha_pattern"] if not _PLAIN_NAME.fullmatch(name)]
    if patterns:
        raise WrongFileError(
            f"The alpha_pattern in {path} holds expressions ({some(patterns)}): write the layers' names out."
        )
    return config
