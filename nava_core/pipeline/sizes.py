"""What the models of a file take, read off its header: their weights where they work, and denoising beside them."""

from __future__ import annotations

import math

import torch

from ..backbone import activation_bytes
from ..backbone.formats import QuantisedLayer
from ..backbone.quantized import RowFp8Layer
from ..checkpoint import FileInfo, backbone_config, main_dtype, plan_tensors
from ..components import audio_vae_part, memory_bytes, text_encoder_weights
from ..components.video_vae import ENCODING_HALF
from ..geometry import ClipGeometry
from ..offload import Demand, Weights

# Of the clip's latents in fp32: the samples, given parts, predictions and the solver's state during a pass, counted
LATENT_COPIES = 16
BLOCK_LISTS = ("double_blocks", "single_blocks")


def block_names(info: FileInfo) -> list[str]:
    """The names of a backbone's blocks, in the order they run."""
    config = backbone_config(info)
    counts = (config.num_double_layers, config.num_single_layers)
    return [f"{kind}.{index}" for kind, count in zip(BLOCK_LISTS, counts, strict=True) for index in range(count)]


def component_weights(role: str, info: FileInfo, dtype: torch.dtype | None) -> Weights:
    """A component's weights on its device; ``dtype``: of the backbone, as ``load_backbone`` takes it, or of the video
    VAE. The text encoder's embedding, which is never there, does not count."""
    if role == "backbone":
        return _backbone_weights(info, dtype)
    if role == "text_encoder":
        return Weights(*text_encoder_weights(info))
    if role == "audio_vae":
        return Weights(memory_bytes(audio_vae_part(info)))
    sizes = {True: torch.float32.itemsize, False: dtype.itemsize}
    return Weights(sum(t.numel * sizes[name.startswith(ENCODING_HALF)] for name, t in info.model_tensors.items()))


def backbone_demand(
    info: FileInfo, dtype: torch.dtype | None, geometry: ClipGeometry, *, together: int, compiled: bool
) -> Demand:
    """What denoising a clip takes, ``together`` predictions being made in one pass at most."""
    config, size = backbone_config(info), main_dtype(info, dtype).itemsize
    shapes = [shape for shape in (geometry.latent_shape, geometry.audio_shape) if shape]
    latents = LATENT_COPIES * torch.float32.itemsize * sum(torch.Size(shape).numel() for shape in shapes)

    def work(count: int) -> int:
        activations = activation_bytes(config, count, geometry.tokens, size, compiled=compiled)
        return latents + _unpacked_bytes(info, dtype) + activations

    return Demand(_backbone_weights(info, dtype), work(1), work(together) if together > 1 else None)


def _backbone_weights(info: FileInfo, dtype: torch.dtype | None) -> Weights:
    blocks = dict.fromkeys(block_names(info), 0)
    rest = 0
    for tensor in plan_tensors(info, dtype):
        name = ".".join(tensor.name.split(".")[:2])
        if name in blocks:
            blocks[name] += tensor.nbytes
        else:
            rest += tensor.nbytes
    return Weights(rest, tuple(blocks.values()))


def _unpacked_bytes(info: FileInfo, dtype: torch.dtype | None) -> int:
    """The most that dequantising a weight for its product takes beside what is stored."""
    layers = (tensor.layer for tensor in plan_tensors(info, dtype) if tensor.layer is not None)
    return max((math.prod(layer.shape) * _work(layer) for layer in layers), default=0)


def _work(layer: QuantisedLayer | RowFp8Layer) -> int:
    return layer.format.work if isinstance(layer, QuantisedLayer) else torch.bfloat16.itemsize
