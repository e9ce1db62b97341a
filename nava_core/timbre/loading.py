"""The safe reading of a published ReDimNet file: no code of its own is run, and nothing is read before it fits."""

import json
import os
from collections.abc import Mapping

import torch

from ..checkpoint import (
    FileInfo,
    FileKind,
    TensorInfo,
    WrongFileError,
    describe_file,
    explain_wrong_file,
    open_checkpoint,
)
from .config import ReDimNetConfig
from .redimnet import ReDimNet

SHOWN_NAMES = 3
TRAINING_HEAD = "cls_head."


def load_redimnet(
    path: str | os.PathLike, device: str | torch.device = "cpu", *, use_torchaudio: bool | None = None
) -> ReDimNet:
    """Load a published ReDimNet file of any kind and size (`{"model_config", "state_dict"}`, or the same tensors as
    safetensors with `model_config` as JSON in the metadata) without running any code from it.

    Returns the network in float32 and eval mode, its parameters frozen, on `device`. use_torchaudio: see
    `mel_spectrogram`. FileNotFoundError if there is no file; ValueError in one sentence for a file that is no
    ReDimNet checkpoint, is damaged, has a setting that is not known, or does not fit its own settings.
    """
    info = describe_file(path)
    if info.kind is not FileKind.REDIMNET:
        raise WrongFileError(explain_wrong_file(info, FileKind.REDIMNET))
    try:
        config = ReDimNetConfig.from_published(_settings(info))
    except ValueError as error:
        raise WrongFileError(f"{info.path.name} is no ReDimNet that NAVA can use: {error}") from None
    # Laid out without memory first, so that a configuration that lies about its size costs nothing.
    with torch.device("meta"):
        model = ReDimNet(config, use_torchaudio=use_torchaudio)
    model.load_state_dict(_read_state(info, model.state_dict()), assign=True)
    return model.eval().requires_grad_(False).to(device)


def _settings(info: FileInfo) -> Mapping:
    try:
        settings = json.loads(info.metadata.get("model_config", "{}"))
    except (ValueError, RecursionError):
        raise ValueError("its model_config is not JSON.") from None
    if not isinstance(settings, Mapping):
        raise ValueError("its model_config is not a table of settings.")
    return settings


def _read_state(info: FileInfo, wanted: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The file's tensors in the network's types, every name and shape checked before one is read; a training head is
    left out, a front end's constants that the file lacks are computed."""
    tensors = {name: tensor for name, tensor in info.model_tensors.items() if not name.startswith(TRAINING_HEAD)}
    problem = _mismatch(tensors, wanted)
    if problem:
        raise WrongFileError(f"{info.path.name} does not fit its own model_config: {problem}; download it again.")
    with open_checkpoint(info) as source:
        return {
            name: _as_wanted(source.read(name), default) if name in tensors else default
            for name, default in wanted.items()
        }


def _mismatch(tensors: Mapping[str, TensorInfo], wanted: Mapping[str, torch.Tensor]) -> str:
    """What is missing, too much, or of another shape or type, as a phrase; empty where all fits."""
    # What is laid out without memory cannot be computed; the front end's constants can.
    missing = [name for name, tensor in wanted.items() if name not in tensors and _is_learned(name, tensor)]
    unknown = [name for name in tensors if name not in wanted]
    if missing or unknown:
        said = [f"it lacks {_listed(missing)}"] if missing else []
        said += [f"it has the unknown {_listed(unknown)}"] if unknown else []
        return " and ".join(said)
    for name, tensor in tensors.items():
        shape = tuple(wanted[name].shape)
        if tensor.shape != shape:
            return f"{name} has the shape {tensor.shape} where {shape} was expected"
        if wanted[name].is_floating_point() and not (tensor.torch_dtype and tensor.torch_dtype.is_floating_point):
            return f"{name} is of the type {tensor.dtype}, not of a floating-point one"
    return ""


def _is_learned(name: str, tensor: torch.Tensor) -> bool:
    return tensor.is_meta or name.startswith("spec.spec_norm.")


def _listed(names: list[str]) -> str:
    shown = ", ".join(names[:SHOWN_NAMES])
    return f"{'tensor' if len(names) == 1 else f'{len(names)} tensors'} {shown}{', ...' * (len(names) > SHOWN_NAMES)}"


def _as_wanted(tensor: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    tensor = tensor.to(wanted.dtype)
    if not tensor.is_floating_point():
        return tensor
    # Channels that died in training have weights below the smallest normal number. They add nothing to the result, but
    # a CPU is many times slower with them than with zeros.
    return tensor.masked_fill(tensor.abs() < torch.finfo(tensor.dtype).tiny, 0)
