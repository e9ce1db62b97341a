"""What the components share: optional packages named in a sentence, and tensors put into a network one by one."""

from __future__ import annotations

import importlib
from collections.abc import Collection, Iterable
from types import ModuleType

import torch
from torch import nn

from ..checkpoint import FileInfo, FileKind, WrongFileError, assign_tensor, describe_file, explain_wrong_file


def need(module: str, what: str) -> ModuleType:
    """Import ``module`` of the extra ``[standalone]``; raises RuntimeError, in a sentence, where it is missing."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = {"PIL": "pillow"}.get(module.partition(".")[0], module.partition(".")[0])
        raise RuntimeError(
            f"{what} without ComfyUI needs the package {package}: install this project's extra [standalone], "
            f"or run `pip install {package}`."
        ) from error


def holds(info: FileInfo, kinds: Collection[FileKind]) -> bool:
    """Whether a model of ``kinds`` can be read from a file: it is one, or it is a checkpoint of several models, such as
    LTX's, with the audio VAE among them, whose names are the same there."""
    audio = FileKind.LTX_AUDIO_VAE
    return info.kind in kinds or (audio in kinds and audio in info.parts)


def recognised(path, wanted: FileKind, *others: FileKind) -> FileInfo:
    """What ``path`` is; raises WrongFileError where neither ``wanted`` nor one of ``others`` can be read from it."""
    info = path if isinstance(path, FileInfo) else describe_file(path)
    if not holds(info, (wanted, *others)):
        raise WrongFileError(explain_wrong_file(info, wanted))
    return info


def shapes_of(info: FileInfo) -> dict[str, tuple[int, ...]]:
    """Shapes by the model's own names."""
    return {name: tensor.shape for name, tensor in info.model_tensors.items()}


def fill(network: nn.Module, tensors: Iterable[tuple[str, torch.Tensor]], file_name: str) -> None:
    """Give ``network`` its weights by name, each as it comes, in the tensor's own type and place.

    Raises WrongFileError for a tensor that the network does not have or has in another shape, and for a missing one.
    """
    waiting = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    for name, tensor in tensors:
        shape = waiting.pop(name, None)
        if shape != tuple(tensor.shape):
            why = "is not part of such a model" if shape is None else f"should have the shape {shape}"
            raise WrongFileError(
                f"{file_name} does not fit together: {name} of shape {tuple(tensor.shape)} {why}; download it again."
            )
        assign_tensor(network, name, tensor)
    if waiting:
        count = "1 tensor is" if len(waiting) == 1 else f"{len(waiting)} tensors are"
        raise WrongFileError(
            f"{file_name} is incomplete: {count} missing (such as {next(iter(waiting))}); download it again."
        )
