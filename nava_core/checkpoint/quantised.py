"""Which layers of a backbone file are in a quantised format of ComfyUI's, read off its header and ``comfy_quant``."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

from ..backbone.formats import FormatError, QuantisedLayer

MARK = ".comfy_quant"  # after a layer's name: JSON as bytes, which says how its weight is kept
METADATA = "_quantization_metadata"  # the same of all layers in a file's metadata, which ComfyUI reads too
MAX_MARK = 4096  # bytes
WEIGHT = ".weight"


class _Tensor(Protocol):
    shape: tuple[int, ...]
    dtype: str
    nbytes: int
    offset: int | None


def read_layers(
    path: Path, tensors: Mapping[str, _Tensor], metadata: Mapping[str, str], prefix: str
) -> tuple[dict[str, QuantisedLayer], str]:
    """The quantised layers by the model's own names, and what is wrong with the first that cannot be read (or "").

    ``tensors`` are a safetensors file's, by the names in it; no weight is read.
    """
    layers: dict[str, QuantisedLayer] = {}
    parts: dict[str, dict[str, tuple[tuple[int, ...], str]]] = {}
    for name, tensor in tensors.items():
        layer, mark, suffix = name.rpartition(WEIGHT)
        if mark and name.startswith(prefix):
            parts.setdefault(layer[len(prefix) :], {})[suffix] = (tensor.shape, tensor.dtype)
    try:
        for layer, said in _said(path, tensors, metadata, prefix):
            try:
                layers[layer] = QuantisedLayer.read(said, parts.get(layer, {}))
            except FormatError as error:
                return {}, f"its layer {_shown(layer)} {error}"
    except _UnreadableError as error:
        return {}, str(error)
    return layers, ""


class _UnreadableError(ValueError):
    pass


def _said(
    path: Path, tensors: Mapping[str, _Tensor], metadata: Mapping[str, str], prefix: str
) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """(layer, what is said of it) from the metadata or from the tensors beside the weights."""
    if METADATA in metadata:
        layers = _json(metadata[METADATA], "its metadata").get("layers")
        for layer, said in layers.items() if isinstance(layers, dict) else ():
            said = {"format": said} if isinstance(said, str) else said
            if layer.startswith(prefix) and isinstance(said, dict):
                yield layer[len(prefix) :], said
        return
    with path.open("rb") as file:
        for name, tensor in tensors.items():
            if not (name.startswith(prefix) and name.endswith(MARK)):
                continue
            layer = name[len(prefix) : -len(MARK)]
            what = f"the comfy_quant of its layer {_shown(layer)}"
            if tensor.dtype not in ("uint8", "int8") or tensor.nbytes > MAX_MARK or tensor.offset is None:
                raise _UnreadableError(f"{what} cannot be read")
            file.seek(tensor.offset)
            yield layer, _json(file.read(tensor.nbytes), what)


def _json(text: str | bytes, what: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise _UnreadableError(f"{what} cannot be read") from error
    if not isinstance(found, dict):
        raise _UnreadableError(f"{what} cannot be read")
    return found


def _shown(name: str) -> str:
    return "".join(c if c.isprintable() else "?" for c in name)[:80]


def layers_phrase(layers: Mapping[str, QuantisedLayer]) -> str:
    """The formats in words: "nvfp4", "nvfp4, 38 of its 380 layers in mxfp8"."""
    counts = Counter(layer.format.name for layer in layers.values())
    (first, _), *others = counts.most_common() or [("", 0)]
    rest = " and ".join(f"{count} of its {len(layers)} layers in {name}" for name, count in others)
    return f"{first}, {rest}" if rest else first
