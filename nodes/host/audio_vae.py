"""The LTX audio VAE with its vocoder in ComfyUI, under the host's memory.

Its latents, (B, 8, T, 16), are normalised already: the VAE itself applies the per-channel statistics of its file, (x -
mean) / std over the 128 values of a time step, at the end of ``encode`` and at the start of ``decode``, in ComfyUI 0.18
and later as in the makers' code. So the model takes them as they are.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from pathlib import Path

import comfy.ldm.lightricks.vae.audio_vae
import comfy.model_patcher
import comfy.sd
import comfy.utils
import torch

from ...nava_core.checkpoint import FileKind, WrongFileError, describe_file, explain_wrong_file
from ...nava_core.decoding import IN_PIECES, ONE_PIECE, SoundForm, decode_sound
from ...nava_core.geometry import AUDIO_BINS, AUDIO_CHANNELS
from ...nava_core.media import LATENTS_STAGE, SOUND_STAGE, apply_loudness, check_finite, fit_length
from .component_memory import audio_decode_bytes, audio_encode_bytes
from .latents import audio_part, clip_length
from .originals import originals_of
from .vae import on_device, run_whole, set_reload, stream_in_forms, vae_patcher, what_vae

MEL_FRAMES_PER_SECOND = 100
HOST_RATE = 44100  # which the VAE of later hosts takes its input for


def load_audio_vae(path: str | Path, device: str = "default"):
    """Load the LTX audio VAE and its vocoder in fp32, as the stock LTX audio nodes of this host take it.

    ``device``: "default" (the host's choice) or "cpu". Raises ValueError with one sentence for another file, or
    one whose configuration or tensors are missing. Run on ComfyUI 0.18.1 (an ``AudioVAE``) and 0.33.0 (a
    ``comfy.sd.VAE``).
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
    set_reload(vae, load_audio_vae, str(path), device)
    return vae


def audio_module(audio_vae) -> torch.nn.Module:
    """The network inside: the ``AudioVAE`` itself on 0.18, ``first_stage_model`` of the VAE on later hosts.

    It tells ``output_sample_rate``, ``latents_per_second``, ``latent_channels``. Raises ValueError for another VAE.
    """
    module = getattr(audio_vae, "first_stage_model", audio_vae)
    if not isinstance(module, comfy.ldm.lightricks.vae.audio_vae.AudioVAE):
        raise ValueError(
            f"This is not the LTX audio VAE ({what_vae(audio_vae)}): connect the output of NavaLoadAudioVAE."
        )
    return module


def decode_audio(audio_vae, latent: torch.Tensor) -> dict:
    """Audio latent (B, 8, T, 16), normalised -> AUDIO ``{"waveform": (B, 2, N) fp32 on the CPU, "sample_rate"}``.

    The vocoder's own rate is kept (48 kHz for LTX-2.3): N = (4T - 3) * 480 there. In one piece; where memory ends, in
    pieces with so much around them that they are the whole up to rounding, never in the host's tiles. Raises
    TooLittleMemoryError where these do not fit either. Run on ComfyUI 0.18.1 and 0.33.0.
    """
    module, patcher = audio_module(audio_vae), vae_patcher(audio_vae)
    _check_audio_latent(latent)
    latent = latent.float()
    manages_itself = module is audio_vae

    def decode(steps: torch.Tensor) -> torch.Tensor:
        return module.decode(steps if manages_itself else steps.to(audio_vae.device))

    def stream(form: SoundForm) -> Iterator[torch.Tensor]:
        yield decode_sound(decode, latent, form)

    def needed(form: SoundForm) -> float:
        batch, channels, steps, bins = latent.shape
        return audio_decode_bytes(module, (batch, channels, form.steps(steps), bins))

    with on_device(patcher.load_device):
        forms = (ONE_PIECE, IN_PIECES)
        (waveform,) = stream_in_forms(patcher, forms, stream, needed, "decoding the sound", full_load=True)
    return {"waveform": waveform, "sample_rate": int(module.output_sample_rate)}


def encode_audio(audio_vae, audio: Mapping) -> torch.Tensor:
    """AUDIO -> its normalised latent (B, 8, T, 16) fp32: T = ceil((N // 160 + 1) / 4) of its N samples at 16 kHz.

    The sound goes through the network as it is, resampled once to the VAE's rate. (The VAE of later hosts cuts off
    both ends up to a multiple of 4096 samples, and takes what it is given for 44.1 kHz, to which the stock nodes
    resample first.) Mono serves both channels; of more than two channels both get the mean. Raises ValueError for less
    than 0.1 s, TooLittleMemoryError where memory is short. Run on ComfyUI 0.18.1 and 0.33.0.
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
        work = functools.partial(module.encode, {"waveform": waveform, "sample_rate": rate})
    else:
        work = functools.partial(module.encode, waveform.to(audio_vae.device), sample_rate=rate)
    needed = audio_encode_bytes(module, _mel_frames(waveform.shape, rate))
    return run_whole(vae_patcher(audio_vae), needed, "encoding the sound", work, full_load=True).float().cpu()


def _mel_frames(shape, rate: int) -> int:
    """Of a waveform (B, channels, N), all samples' together."""
    return shape[0] * (round(shape[2] * MEL_FRAMES_PER_SECOND / rate) + 1)


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
    vae = comfy.sd.VAE(sd=renamed, device=device, dtype=torch.float32, metadata=metadata)
    module = vae.first_stage_model
    vae.memory_used_decode = lambda shape, dtype: audio_decode_bytes(module, shape)
    vae.memory_used_encode = lambda shape, dtype: audio_encode_bytes(module, _mel_frames(shape, HOST_RATE))
    return vae


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


def decode_audio_clips(audio_vae, latent: Mapping, loudness: str) -> list[dict]:
    """A LATENT's sound as one AUDIO for each clip of the batch, exactly as long as its picture, or where it has none as
    its latents say (the vocoder gives 30 ms less, which are filled with silence). Given sound is as it was given, at
    its own rate; ``loudness`` is of what is decoded."""
    parts = audio_part(latent)
    check_finite(parts, LATENTS_STAGE)
    seconds = clip_length(latent)
    clips = []
    for number, part in enumerate(parts):
        given = originals_of(latent, number)
        decoded = None, 0
        if given is None or not given.has_all_sound:
            decoded = _decoded_sound(audio_vae, part[None], seconds, loudness)
        waveform, rate = decoded if given is None else given.put_sound(*decoded)
        clips.append({"waveform": waveform[None], "sample_rate": rate})
    return clips


def _decoded_sound(audio_vae, latent: torch.Tensor, seconds: float, loudness: str) -> tuple[torch.Tensor, int]:
    """(waveform (2, N), rate) of one clip's latent, exactly ``seconds`` long."""
    sound = decode_audio(audio_vae, latent)
    check_finite(sound["waveform"], SOUND_STAGE)
    waveform = fit_length(sound["waveform"], round(seconds * sound["sample_rate"]))
    return apply_loudness(waveform, loudness)[0], sound["sample_rate"]
