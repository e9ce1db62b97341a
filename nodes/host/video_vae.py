"""The Wan2.2 video VAE in ComfyUI, under the host's memory.

Its latents, (B, 48, T, H, W), are in the VAE's own space. The model works on latents normalised by Wan2.2's
per-channel mean and std: ComfyUI applies those in the latent format ``Wan22`` (``process_in`` / ``process_out`` of the
model), never in the VAE; the makers' wrapper applies the same 48 + 48 numbers around their VAE.

Decoding takes the host's network a latent frame at a time, which is what it does itself, but gives each part of the
picture away at once: the memory does not grow with the clip. (The host keeps the whole picture on the GPU, twice.)
"""

from __future__ import annotations

import functools
import inspect
import logging
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import comfy.ldm.wan.vae2_2
import comfy.model_management
import comfy.sd
import comfy.utils
import torch

from ...nava_core.checkpoint import FileKind, WrongFileError, describe_file, explain_wrong_file
from ...nava_core.decoding import (
    DecodeForm,
    DecoderCounts,
    Decoding,
    FrameMemory,
    choose_form,
    collect,
    in_single_frames,
    pixels_of,
    stream_frames,
    wide_level,
    with_memory,
)
from ...nava_core.geometry import PIXELS_PER_LATENT, VIDEO_CHANNELS, frames_of_latents
from ...nava_core.given import Originals
from ...nava_core.media import LATENTS_STAGE, check_finite
from .component_memory import video_decode_bytes, video_encode_bytes
from .latents import video_part
from .originals import originals_of, whole_picture
from .vae import has_room, on_device, run_whole, set_reload, stream_in_forms, what_vae

# Of the host's decoder, counted tensor by tensor at the released width, in either type
COUNTS = DecoderCounts(whole=15.0, single=11.5, in_ram=5.55, remembered=6.97)
COUNTS_OF_ONE = DecoderCounts(whole=4.41, single=4.41, in_ram=1.75, remembered=2.66)  # where there is one latent frame
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


def decode_video(vae: comfy.sd.VAE, latent: torch.Tensor, decoding: Decoding | None = None) -> torch.Tensor:
    """Video latent (B, 48, T, H, W) in the VAE's space -> IMAGE (B * (4T - 3), 16H, 16W, 3), fp32, 0..1.

    In the first of the forms of ``decoding`` that there is memory for: whole frames are bit for bit those of the host's
    own decode. Where memory ends, the log says so and the next form goes on; see :func:`stream_in_forms`. A VAE that is
    no Wan2.2 network, such as a preview decoder, is left to the host. Run on ComfyUI 0.18.1 and 0.33.0.
    """
    _check_video(vae, latent)
    decoding = decoding or Decoding()
    decode = _decode_clip if _is_streamable(vae.first_stage_model) else _decode_by_host
    with on_device(vae.device):
        clips = [decode(vae, clip[None], decoding) for clip in latent]
    return clips[0] if len(clips) == 1 else torch.cat(clips)


def _decode_clip(vae: comfy.sd.VAE, latent: torch.Tensor, decoding: Decoding) -> torch.Tensor:
    decoder, shape = _Decoder(vae), latent.shape
    counts = COUNTS if shape[2] > 1 else COUNTS_OF_ONE

    def needed(form: DecodeForm) -> int:
        return counts.device_bytes(form, *shape[-2:], decoder.width, decoder.dtype)

    def fits(form: DecodeForm) -> bool:
        in_ram = counts.ram_bytes(form, shape, decoder.width, decoder.dtype) if form.in_ram else 0
        free_ram = comfy.model_management.get_free_memory(torch.device("cpu"))
        return in_ram <= free_ram and has_room(vae, needed(form))

    on_gpu = decoder.device.type != "cpu"
    forms = choose_form(decoding, decoding.forms(*shape[-2:], needed, on_gpu=on_gpu), fits)
    logging.info(f"NAVA decodes {shape[-1] * PIXELS_PER_LATENT}x{shape[-2] * PIXELS_PER_LATENT} in {forms[0]}.")
    progress = comfy.utils.ProgressBar(shape[2])

    def step(done: int, total: int) -> None:
        comfy.model_management.throw_exception_if_processing_interrupted()
        progress.update_absolute(done, total)

    def stream(form: DecodeForm) -> Iterator[torch.Tensor]:
        return stream_frames(decoder, latent, form, step, at_once=True)

    parts = stream_in_forms(vae.patcher, forms, stream, needed, "decoding the picture", full_load=vae.disable_offload)
    return collect(parts, frames_of_latents(shape[2]))


def _decode_by_host(vae: comfy.sd.VAE, latent: torch.Tensor, decoding: Decoding) -> torch.Tensor:
    if decoding.choice == "tiled":
        tile, overlap = (size // vae.spacial_compression_decode() for size in (decoding.tile, decoding.overlap))
        images = vae.decode_tiled(latent, tile_x=tile, tile_y=tile, overlap=overlap)
    else:
        images = vae.decode(latent)
    return images.reshape(-1, *images.shape[-3:]).float()


def _is_streamable(network: torch.nn.Module) -> bool:
    """Whether a network decodes as the host's Wan2.2 one: a latent frame at a time, with a memory that is handed in."""
    stock = comfy.ldm.wan.vae2_2.WanVAE
    if getattr(network.decode, "__func__", None) is not stock.decode:
        return False
    taken = inspect.signature(network.decoder.forward).parameters
    return all(name in taken for name in ("feat_cache", "feat_idx", "first_chunk"))


class _Decoder:
    """The host's decoder, a latent frame at a time."""

    counts = COUNTS

    def __init__(self, vae: comfy.sd.VAE) -> None:
        self.vae, self.network = vae, vae.first_stage_model
        self.device, self.dtype = vae.device, vae.vae_dtype
        self.width = self.network.decoder.head[0].gamma.shape[0]

    def begin(self, latent: torch.Tensor) -> torch.Tensor:
        return self.network.conv2(latent.to(self.device, self.dtype)).to(latent.device)

    def frames(self, latent: torch.Tensor, memory: FrameMemory, *, first: bool, single: bool) -> torch.Tensor:
        latent, decoder = latent.to(self.device), self.network.decoder
        if single and not first:
            channels = in_single_frames(self._levels(), wide_level(decoder.temperal_upsample), latent, memory)
        else:
            channels = decoder(latent, feat_cache=memory, feat_idx=[0], first_chunk=first)
        picture = pixels_of(channels)
        picture = picture.to(device=self.vae.output_device, dtype=self.vae.vae_output_dtype(), copy=True)
        return self.vae.process_output(picture).float()

    def _levels(self) -> list[Callable]:
        """in_single_frames' levels: what comes before time is doubled is with the first of them."""
        decoder = self.network.decoder
        *_, remembering = decoder.head
        first, *others = decoder.upsamples
        *blocks, last = others

        def begin(latent, memory, number):
            latent = with_memory(decoder.conv1, latent, memory, number)
            for layer in decoder.middle:
                has_memory = isinstance(layer, comfy.ldm.wan.vae2_2.ResidualBlock)
                latent = layer(latent, memory, number) if has_memory else layer(latent)
            return first(latent, memory, number)

        def end(latent, memory, number):
            return with_memory(remembering, decoder.head[:-1](last(latent, memory, number)), memory, number)

        return [begin, *blocks, end]


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


def decode_video_clips(vae: comfy.sd.VAE, latent: Mapping, decoding: Decoding) -> list[torch.Tensor]:
    """A LATENT's picture as one IMAGE (T, H, W, 3) for each clip of the batch, given frames as they were given."""
    clips = video_part(latent)
    check_finite(clips, LATENTS_STAGE)
    return [_with_given(vae, clip[None], decoding, originals_of(latent, number)) for number, clip in enumerate(clips)]


def _with_given(vae, clip: torch.Tensor, decoding: Decoding, given: Originals | None) -> torch.Tensor:
    if given is None:
        return decode_video(vae, clip, decoding)
    if given.has_all_frames:
        return whole_picture(given)
    return given.put_frames(decode_video(vae, clip, decoding))
