"""The Wan2.2 video VAE in ComfyUI, under the host's memory.

Its latents, (B, 48, T, H, W), are in the VAE's own space. The model works on latents normalised by Wan2.2's
per-channel mean and std: ComfyUI applies those in the latent format ``Wan22`` (``process_in`` / ``process_out`` of the
model), never in the VAE; the makers' wrapper applies the same 48 + 48 numbers around their VAE.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path

import comfy.ldm.wan.vae2_2
import comfy.model_management
import comfy.sd
import comfy.utils
import torch

from ...nava_core.checkpoint import FileKind, WrongFileError, describe_file, explain_wrong_file
from ...nava_core.geometry import VIDEO_CHANNELS
from ...nava_core.media import LATENTS_STAGE, check_finite
from .component_memory import video_decode_bytes, video_encode_bytes
from .latents import video_part
from .vae import run_whole, set_reload, what_vae

RELEASED_WIDTHS = (160, 256)  # encoder and decoder of the Wan2.2 VAE, the only ones the host builds by itself


def load_video_vae(path: str | Path, device: str = "default") -> comfy.sd.VAE:
    """Load the Wan2.2 video VAE (``.safetensors`` or the makers' ``.pth``) as the host's VAE.

    ``device``: "default" (the host's choice) or "cpu". The released width goes through the host's loader
    untouched; another width (small models) gets the same class at that width. Raises ValueError with one
    sentence for another file. Its memory figures are this pack's. Run on ComfyUI 0.18.1 and 0.33.0.
    """
    info = describe_file(path)
    if info.kind is not FileKind.WAN22_VAE:
        raise WrongFileError(explain_wrong_file(info, FileKind.WAN22_VAE))
    tensors, metadata = comfy.utils.load_torch_file(str(path), safe_load=True, return_metadata=True)
    tensors = {name.removeprefix(info.prefix): tensor for name, tensor in tensors.items()}
    channels, widths = _video_dimensions(tensors, Path(path).name)
    if channels != VIDEO_CHANNELS:
        raise ValueError(
            f"{Path(path).name} is a video VAE of {channels} latent channels, but NAVA's has {VIDEO_CHANNELS}: "
            "choose wan2.2_vae.safetensors or Wan2.2_VAE.pth."
        )
    with torch.device("meta"):
        wanted = set(_video_network(widths).state_dict())
    missing = sorted(wanted - set(tensors))
    if missing:  # the host would only log them
        raise ValueError(
            f"{Path(path).name} is incomplete: {len(missing)} tensors are missing, the first is {missing[0]}; "
            "download it again."
        )
    target = torch.device("cpu") if device == "cpu" else None
    if widths == RELEASED_WIDTHS:
        vae = comfy.sd.VAE(sd=tensors, device=target, metadata=metadata)
    else:
        vae = _video_vae_of_width(tensors, widths, target)
    vae.memory_used_decode = functools.partial(video_decode_bytes, width=widths[1])
    vae.memory_used_encode = functools.partial(video_encode_bytes, width=widths[0])
    set_reload(vae, load_video_vae, str(path), device)
    return vae


def decode_video(
    vae: comfy.sd.VAE,
    latent: torch.Tensor,
    *,
    tile_size: int | None = None,
    overlap: int = 64,
    temporal_size: int | None = None,
    temporal_overlap: int = 8,
) -> torch.Tensor:
    """Video latent (B, 48, T, H, W) in the VAE's space -> IMAGE (B * (4T - 3), 16H, 16W, 3), fp32, 0..1.

    Whole by default (the host falls back to tiles when memory runs out); with ``tile_size`` in tiles of that
    many pixels, ``temporal_size`` frames at a time (None: all), overlapping as given. Run on ComfyUI 0.18.1 and 0.33.0.
    """
    _check_video(vae, latent)
    if tile_size is None:
        images = vae.decode(latent)
    else:
        images = vae.decode_tiled(latent, **_tiles(vae, tile_size, overlap, temporal_size, temporal_overlap))
    return images.reshape(-1, *images.shape[-3:]).float()


def encode_video(vae: comfy.sd.VAE, images: torch.Tensor) -> torch.Tensor:
    """IMAGE (F, H, W, 3), 0..1, the frames of one clip -> its latent (1, 48, (F + 3) // 4, H // 16, W // 16).

    One image is a clip of one frame: its latent is the first latent frame of a clip that starts with it. Sides that are
    no multiple of 16 are cropped about the centre by the host. The host's own encode but for two things, since sound
    depends on this latent: in fp32 arithmetic whatever the weights are rounded to, as the makers' code encodes, and
    always whole. Raises TooLittleMemoryError where memory is short. Run on ComfyUI 0.18.1 and 0.33.0.
    """
    _check_video(vae)
    if not isinstance(vae.first_stage_model, comfy.ldm.wan.vae2_2.WanVAE):
        raise ValueError(
            f"This VAE cannot encode a first frame ({what_vae(vae)}): connect the Wan2.2 video VAE, from "
            "NavaLoadVideoVAE or the stock VAE loader with wan2.2_vae."
        )
    if images.ndim != 4 or images.shape[-1] < 3:
        raise ValueError(f"An image of shape (frames, height, width, 3) is needed, not {tuple(images.shape)}.")
    if min(images.shape[1:3]) < 16:
        raise ValueError(f"The image is {images.shape[2]} x {images.shape[1]}: at least 16 x 16 pixels are needed.")
    pixels = vae.vae_encode_crop_pixels(images[..., :3]).movedim(-1, 0)[None]

    def encode() -> torch.Tensor:
        _cast_encoder_weights(vae.first_stage_model)
        latent = vae.first_stage_model.encode(vae.process_input(pixels).float().to(vae.device))
        return latent.to(vae.output_device).to(vae.vae_output_dtype())

    width = vae.first_stage_model.dim
    needed = video_encode_bytes(pixels.shape, torch.float32, width, weight_dtype=vae.vae_dtype)
    what = "encoding a first frame" if len(images) == 1 else f"encoding {len(images)} frames"
    task = f"{what} of {pixels.shape[4]}x{pixels.shape[3]}"
    return run_whole(vae.patcher, needed, task, encode, full_load=vae.disable_offload).float()


def _cast_encoder_weights(network: torch.nn.Module) -> None:
    """Let the encoding half's layers take inputs of another type than their weights, as the host lets those of a model
    that it keeps in part outside the GPU. What they compute for inputs of their own type is the same."""
    for half in (network.encoder, network.conv1):
        for layer in half.modules():
            if hasattr(layer, "comfy_cast_weights"):
                layer.comfy_cast_weights = True


def _check_video(vae, latent: torch.Tensor | None = None) -> None:
    channels = getattr(vae, "latent_channels", None)
    if not isinstance(vae, comfy.sd.VAE) or channels != VIDEO_CHANNELS or getattr(vae, "latent_dim", None) != 3:
        raise ValueError(
            f"This is not the Wan2.2 video VAE ({what_vae(vae)}): connect the output of NavaLoadVideoVAE, "
            "or of the stock VAE loader with wan2.2_vae."
        )
    if latent is not None and (latent.ndim != 5 or latent.shape[1] != VIDEO_CHANNELS):
        raise ValueError(
            f"This is not a NAVA video latent: its shape is {tuple(latent.shape)}, expected (batch, 48, frames, "
            "height, width); connect a latent made for NAVA."
        )


def _tiles(vae: comfy.sd.VAE, size: int, overlap: int, frames: int | None, frame_overlap: int) -> dict:
    """Pixels and frames -> the latent units of the host's tiled decode, in the way of its own tiled node."""
    space, time = vae.spacial_compression_decode(), vae.temporal_compression_decode()
    if size < 2 * space:
        raise ValueError(f"Tiles of {size} pixels are too small: at least {2 * space} are needed.")
    overlap = min(overlap, size // 4)
    tiles = {"tile_x": size // space, "tile_y": size // space, "overlap": overlap // space}
    if frames is not None:
        tiles["tile_t"] = max(2, frames // time)
        tiles["overlap_t"] = max(1, min(tiles["tile_t"] // 2, frame_overlap // time))
    return tiles


def _video_dimensions(tensors: Mapping[str, torch.Tensor], name: str) -> tuple[int, tuple[int, int]]:
    """(latent channels, (encoder width, decoder width))."""
    try:
        channels = tensors["decoder.conv1.weight"].shape[1]
        return channels, (tensors["encoder.conv1.weight"].shape[0], tensors["decoder.head.0.gamma"].shape[0])
    except KeyError as missing:
        raise ValueError(f"{name} is incomplete: the tensor {missing} is missing; download it again.") from None


def _video_network(widths: tuple[int, int]) -> torch.nn.Module:
    """The host's Wan2.2 network, untrained, with these encoder and decoder widths."""
    return comfy.ldm.wan.vae2_2.WanVAE(
        dim=widths[0],
        dec_dim=widths[1],
        z_dim=VIDEO_CHANNELS,
        dim_mult=[1, 2, 4, 4],
        num_res_blocks=2,
        temperal_downsample=[False, True, True],
    )


def _video_vae_of_width(
    tensors: Mapping[str, torch.Tensor], widths: tuple[int, int], device: torch.device | None
) -> comfy.sd.VAE:
    """The host's VAE for Wan2.2 around a network of other widths.

    The host builds the released width only, so it builds that without memory first (scaling, memory estimates
    and dtypes are then its own), and the network inside is exchanged. Run on ComfyUI 0.18.1 and 0.33.0.
    """
    with torch.device("meta"):
        released = _video_network(RELEASED_WIDTHS).state_dict()
        vae = comfy.sd.VAE(sd=released, device=device)
    network = _video_network(widths).eval().to(vae.vae_dtype)
    network.load_state_dict(tensors)
    comfy.model_management.archive_model_dtypes(network)
    vae.patcher = type(vae.patcher)(network, load_device=vae.device, offload_device=vae.patcher.offload_device)
    vae.first_stage_model, vae.size = network, None
    vae.model_size()
    return vae


def decode_video_clips(vae: comfy.sd.VAE, latent: Mapping, **tiles) -> list[torch.Tensor]:
    """A LATENT's picture as one IMAGE (T, H, W, 3) for each clip of the batch; ``tiles`` as for ``decode_video``."""
    clips = video_part(latent)
    check_finite(clips, LATENTS_STAGE)
    return [decode_video(vae, clip[None], **tiles) for clip in clips]
