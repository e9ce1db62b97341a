"""The two VAEs in ComfyUI: the Wan2.2 video VAE and the LTX audio VAE with its vocoder, under the host's memory.

What their latents are (the host's and the makers' code agree where they can be compared):

* Video, (B, 48, T, H, W): the VAE's own space. The model works on latents normalised by Wan2.2's per-channel mean
  and std. ComfyUI applies those in the latent format ``Wan22`` (``process_in`` / ``process_out`` of the model),
  never in the VAE; the makers' wrapper applies the same 48 + 48 numbers around their VAE.
* Audio, (B, 8, T, 16): normalised already. The audio VAE itself applies the per-channel statistics of its file, (x -
  mean) / std over the 128 values of a time step: at the end of ``encode`` and at the start of ``decode``, in ComfyUI
  0.18 and later as in the makers' code. So the model takes these latents as they are.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import comfy.ldm.lightricks.vae.audio_vae
import comfy.ldm.wan.vae2_2
import comfy.model_management
import comfy.model_patcher
import comfy.sd
import comfy.utils
import torch

from ...nava_core.checkpoint import FileKind, WrongFileError, describe_file, explain_wrong_file
from ...nava_core.geometry import AUDIO_LATENTS_PER_SECOND
from ...nava_core.media import LATENTS_STAGE, SOUND_STAGE, apply_loudness, check_finite, fit_length
from .latents import audio_part, clip_seconds, video_part

VIDEO_CHANNELS = 48
AUDIO_CHANNELS, AUDIO_BINS = 8, 16
RELEASED_WIDTHS = (160, 256)  # encoder and decoder of the Wan2.2 VAE, the only ones the host builds by itself
AUDIO_BYTES_PER_LATENT = 87000 * 4  # the host's own estimate in later versions, a latent value in fp32


# --- video -------------------------------------------------------------------------------------------------------


def load_video_vae(path: str | Path, device: str = "default") -> comfy.sd.VAE:
    """Load the Wan2.2 video VAE (``.safetensors`` or the makers' ``.pth``) as the host's VAE.

    ``device``: "default" (the host's choice) or "cpu". The released width goes through the host's loader
    untouched; another width (small models) gets the same class at that width. Raises ValueError with one
    sentence for another file. Run on ComfyUI 0.18.1.
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
        return comfy.sd.VAE(sd=tensors, device=target, metadata=metadata)
    return _video_vae_of_width(tensors, widths, target)


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
    many pixels, ``temporal_size`` frames at a time (None: all), overlapping as given. Run on ComfyUI 0.18.1.
    """
    _check_video(vae, latent)
    if tile_size is None:
        images = vae.decode(latent)
    else:
        images = vae.decode_tiled(latent, **_tiles(vae, tile_size, overlap, temporal_size, temporal_overlap))
    return images.reshape(-1, *images.shape[-3:]).float()


def encode_video(vae: comfy.sd.VAE, images: torch.Tensor) -> torch.Tensor:
    """IMAGE (F, H, W, 3), 0..1, the frames of one clip -> its latent (1, 48, (F + 3) // 4, H // 16, W // 16).

    One image is a clip of one frame: its latent is the first latent frame of a clip that starts with it. Sides
    that are no multiple of 16 are cropped about the centre by the host. Run on ComfyUI 0.18.1.
    """
    _check_video(vae)
    if images.ndim != 4 or images.shape[-1] < 3:
        raise ValueError(f"An image of shape (frames, height, width, 3) is needed, not {tuple(images.shape)}.")
    if min(images.shape[1:3]) < 16:
        raise ValueError(f"The image is {images.shape[2]} x {images.shape[1]}: at least 16 x 16 pixels are needed.")
    return vae.encode(images[..., :3]).float()


def _check_video(vae, latent: torch.Tensor | None = None) -> None:
    channels = getattr(vae, "latent_channels", None)
    if not isinstance(vae, comfy.sd.VAE) or channels != VIDEO_CHANNELS or getattr(vae, "latent_dim", None) != 3:
        raise ValueError(
            f"This is not the Wan2.2 video VAE ({_what_vae(vae)}): connect the output of NavaLoadVideoVAE, "
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
    and dtypes are then its own), and the network inside is exchanged. Run on ComfyUI 0.18.1.
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


# --- audio -------------------------------------------------------------------------------------------------------


def load_audio_vae(path: str | Path, device: str = "default"):
    """Load the LTX audio VAE and its vocoder in fp32, as the stock LTX audio nodes of this host take it.

    ``device``: "default" (the host's choice) or "cpu". Raises ValueError with one sentence for another file, or
    one whose configuration or tensors are missing. Run on ComfyUI 0.18.1 (an ``AudioVAE``); written for later hosts
    (a ``comfy.sd.VAE``) from their source.
    """
    info = describe_file(path)
    if FileKind.LTX_AUDIO_VAE not in {info.kind, *info.parts}:
        raise WrongFileError(explain_wrong_file(info, FileKind.LTX_AUDIO_VAE))
    if "config" not in info.metadata:
        raise ValueError(
            f"{Path(path).name} has no configuration in its metadata, which says how its audio VAE is built: "
            "choose ltx-2.3-22b-dev_audio_vae.safetensors as released."
        )
    tensors, metadata = comfy.utils.load_torch_file(str(path), safe_load=True, return_metadata=True)
    wanted = {name: tensor for name, tensor in tensors.items() if name.startswith(("audio_vae.", "vocoder."))}
    build = _build_audio_vae_0_18 if _audio_vae_manages_itself() else _build_audio_vae_later
    vae = build(dict(wanted), metadata, torch.device("cpu") if device == "cpu" else None)  # the host empties it
    _check_audio_tensors(audio_module(vae), wanted, Path(path).name)
    return vae


def audio_module(audio_vae) -> torch.nn.Module:
    """The network inside: the ``AudioVAE`` itself on 0.18, ``first_stage_model`` of the VAE on later hosts.

    It tells ``output_sample_rate``, ``latents_per_second``, ``latent_channels``. Raises ValueError for another VAE.
    """
    module = getattr(audio_vae, "first_stage_model", audio_vae)
    if not isinstance(module, comfy.ldm.lightricks.vae.audio_vae.AudioVAE):
        raise ValueError(
            f"This is not the LTX audio VAE ({_what_vae(audio_vae)}): connect the output of NavaLoadAudioVAE."
        )
    return module


def decode_audio(audio_vae, latent: torch.Tensor) -> dict:
    """Audio latent (B, 8, T, 16), normalised -> AUDIO ``{"waveform": (B, 2, N) fp32 on the CPU, "sample_rate"}``.

    The vocoder's own rate is kept (48 kHz for LTX-2.3): N = (4T - 3) * 480 there. Run on ComfyUI 0.18.1; written
    for later hosts from their source (there the VAE's decode puts channels last).
    """
    module = audio_module(audio_vae)
    _check_audio_latent(latent)
    if module is audio_vae:
        _make_room(module, latent.shape[0] * latent.shape[2] * AUDIO_BINS * AUDIO_BYTES_PER_LATENT)
        waveform = audio_vae.decode(latent.float())
    else:
        waveform = audio_vae.decode(latent.float()).movedim(-1, 1)
    return {"waveform": waveform.float().cpu(), "sample_rate": int(module.output_sample_rate)}


def encode_audio(audio_vae, audio: Mapping) -> torch.Tensor:
    """AUDIO -> its normalised latent (B, 8, T, 16) fp32, 25 time steps a second, at the VAE's 16 kHz.

    Mono serves both channels; of more than two channels both get the mean. Run on ComfyUI 0.18.1; written for later
    hosts from their source.
    """
    module = audio_module(audio_vae)
    waveform, rate = audio["waveform"].float(), int(audio["sample_rate"])
    if waveform.ndim != 3 or waveform.shape[-1] < rate // 10:
        raise ValueError(
            f"Audio of at least 0.1 s and shape (batch, channels, samples) is needed, not {tuple(waveform.shape)}."
        )
    if waveform.shape[1] != 2:
        waveform = waveform.mean(dim=1, keepdim=True).expand(-1, 2, -1)
    if module is audio_vae:
        seconds = waveform[:, 0].numel() / rate
        _make_room(module, int(seconds * module.latents_per_second * AUDIO_BINS * AUDIO_BYTES_PER_LATENT))
        latent = audio_vae.encode({"waveform": waveform, "sample_rate": rate})
    else:  # the later VAE hands its network the samples only, which then takes them for audio_sample_rate
        taken_for = int(audio_vae.audio_sample_rate)
        latent = audio_vae.encode(_resample(waveform, rate, taken_for).movedim(1, -1))
    return latent.float()


def _audio_vae_manages_itself() -> bool:
    """Whether the host's AudioVAE takes the tensors and moves itself about (0.18), or sits in a VAE (later)."""
    return hasattr(comfy.ldm.lightricks.vae.audio_vae, "ModelDeviceManager")


def _build_audio_vae_0_18(tensors: dict, metadata: dict, device: torch.device | None):
    vae = comfy.ldm.lightricks.vae.audio_vae.AudioVAE(tensors, metadata).eval().requires_grad_(False)
    if device is not None:
        vae.device_manager.patcher = comfy.model_patcher.ModelPatcher(vae, device, device)
    return vae


def _build_audio_vae_later(tensors: dict, metadata: dict, device: torch.device | None):
    renamed = comfy.utils.state_dict_prefix_replace(tensors, {"audio_vae.": "autoencoder."})
    return comfy.sd.VAE(sd=renamed, device=device, dtype=torch.float32, metadata=metadata)


def _check_audio_tensors(module: torch.nn.Module, tensors: Mapping[str, torch.Tensor], name: str) -> None:
    """The host loads these files leniently, and what is missing stays uninitialised memory: make it an error."""
    given = {key.replace("audio_vae.", "autoencoder.", 1) for key in tensors}
    missing = sorted(key for key in module.state_dict() if key not in given and not key.endswith(".filter"))
    if missing:
        raise ValueError(
            f"{name} is incomplete: {len(missing)} tensors of the audio VAE are missing, the first is {missing[0]}; "
            "download ltx-2.3-22b-dev_audio_vae.safetensors again."
        )


def _check_audio_latent(latent: torch.Tensor) -> None:
    if latent.ndim != 4 or (latent.shape[1], latent.shape[3]) != (AUDIO_CHANNELS, AUDIO_BINS):
        raise ValueError(
            f"This is not a NAVA audio latent: its shape is {tuple(latent.shape)}, expected (batch, "
            f"{AUDIO_CHANNELS}, time, {AUDIO_BINS}); connect a latent made for NAVA."
        )


def _make_room(module: torch.nn.Module, activations: int) -> None:
    """Load the audio VAE with room for its activations, of which the host's 0.18 takes no account."""
    comfy.model_management.load_models_gpu([module.device_manager.patcher], memory_required=activations)


def _resample(waveform: torch.Tensor, rate: int, target: int) -> torch.Tensor:
    if rate == target:
        return waveform
    try:
        from comfy.audio import resample  # hosts without torchaudio
    except ImportError:
        from torchaudio.functional import resample
    return resample(waveform, rate, target)


def _what_vae(vae) -> str:
    if isinstance(vae, comfy.ldm.lightricks.vae.audio_vae.AudioVAE):
        return "it is the LTX audio VAE"
    network = getattr(vae, "first_stage_model", vae)
    channels = getattr(vae, "latent_channels", None)
    return f"it is a {type(network).__name__}" + (f" of {channels} latent channels" if channels else "")


# --- clips -------------------------------------------------------------------------------------------------------


def decode_video_clips(vae: comfy.sd.VAE, latent: Mapping, **tiles) -> list[torch.Tensor]:
    """A LATENT's picture as one IMAGE (T, H, W, 3) for each clip of the batch; ``tiles`` as for ``decode_video``."""
    clips = video_part(latent)
    check_finite(clips, LATENTS_STAGE)
    return [decode_video(vae, clip[None], **tiles) for clip in clips]


def decode_audio_clips(audio_vae, latent: Mapping, loudness: str) -> list[dict]:
    """A LATENT's sound as one AUDIO for each clip of the batch, exactly as long as its picture, or where it has none as
    its latents say (the vocoder gives 30 ms less, which are filled with silence)."""
    parts = audio_part(latent)
    check_finite(parts, LATENTS_STAGE)
    seconds = clip_seconds(latent) or parts.shape[2] / AUDIO_LATENTS_PER_SECOND
    clips = []
    for part in parts:
        sound = decode_audio(audio_vae, part[None])
        check_finite(sound["waveform"], SOUND_STAGE)
        waveform = fit_length(sound["waveform"], round(seconds * sound["sample_rate"]))
        clips.append({**sound, "waveform": apply_loudness(waveform, loudness)})
    return clips
