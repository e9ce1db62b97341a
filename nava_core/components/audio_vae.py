"""The LTX-2.3 audio VAE and its vocoder through diffusers, in fp32: audio latents to 48 kHz stereo, sound to latents.

The configuration is the JSON in the file's metadata. diffusers' VAE leaves latents as they are; the file's statistics
for each of the 128 values of a time step are applied here.
"""

from __future__ import annotations

import importlib
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import nn

from ..checkpoint import FileInfo, FileKind, TensorSource, WrongFileError, open_checkpoint
from ..decoding import ONE_PIECE, SoundForm, decode_sound
from ..geometry import AUDIO_BINS, AUDIO_CHANNELS
from ..timbre.resample import resample
from .log_mel import log_mel
from .weights import fill, need, recognised

VAE_PREFIX, VOCODER_PREFIX = "audio_vae.", "vocoder."
MEAN, STD = (f"per_channel_statistics.{kind}-of-means" for kind in ("mean", "std"))
MEL_BANDS = 64
FIRST_DIFFUSERS = "0.38"  # the first with the vocoder's bandwidth extension
DECODE_BYTES = 31_000 * 4  # for each latent bin: 15 % over what is counted at the released width, for workspaces
ENCODE_BYTES = 55_700 * 4  # for each mel frame, likewise
MELS_PER_STEP = 4
LEAST_SECONDS = 0.1  # of sound to encode


@dataclass(frozen=True)
class Hearing:
    """What the VAE hears: mel bands of sound at ``rate``, every ``hop`` samples, through windows of ``n_fft``."""

    rate: int = 16_000
    n_fft: int = 1024
    hop: int = 160
    bands: int = MEL_BANDS


class AudioVAE(nn.Module):
    """Normalised audio latents to sound: statistics undone, latents to mel bands, mel bands to a waveform; and back.

    ``read_encoder`` reads the encoder, which ``encode`` needs and ``decode`` does not, when it is first used.
    """

    def __init__(
        self,
        decoder: nn.Module,
        vocoder: nn.Module,
        mean: torch.Tensor,
        std: torch.Tensor,
        read_encoder: Callable[[], nn.Module] | None = None,
        hearing: Hearing | None = None,
    ) -> None:
        super().__init__()
        self.decoder = decoder
        self.encoder: nn.Module | None = None
        self.read_encoder = read_encoder
        self.hearing = hearing or Hearing()
        self.vocoder = vocoder
        self.register_buffer("mean", mean)
        self.register_buffer("std", std)
        self.sample_rate = int(vocoder.config.output_sampling_rate)

    @torch.no_grad()
    def decode(self, latent: torch.Tensor, form: SoundForm = ONE_PIECE) -> torch.Tensor:
        """Latent (B, 8, T, 16), normalised -> waveform (B, 2, N) within -1..1, fp32 on the CPU, at ``sample_rate``.

        N is (4 T - 3) * 480 at 48 kHz. In pieces it is the same up to rounding, in memory constant in T. Raises
        ValueError for another shape.
        """
        if latent.ndim != 4 or (latent.shape[1], latent.shape[3]) != (AUDIO_CHANNELS, AUDIO_BINS):
            raise ValueError(
                f"An audio latent is (batch, {AUDIO_CHANNELS}, time, {AUDIO_BINS}); got {tuple(latent.shape)}."
            )
        return decode_sound(self._decode, latent, form)

    def _decode(self, latent: torch.Tensor) -> torch.Tensor:
        return self.vocoder(self.decoder(latent.to(self.mean) * self.std + self.mean))

    @torch.no_grad()
    def encode(self, waveform: torch.Tensor, rate: int, steps: int) -> torch.Tensor:
        """Waveform (C, N) within -1..1 at ``rate`` -> latent (1, 8, steps, 16), normalised, fp32 on the CPU.

        Resampled once to the VAE's rate. What is missing of ``steps`` is heard as silence, what is too much is left
        out. Mono serves both channels; of more than two both get the mean. Raises ValueError for less than 0.1 s.
        """
        if waveform.ndim != 2 or waveform.shape[1] < LEAST_SECONDS * rate or steps < 1:
            raise ValueError(
                f"Sound of at least {LEAST_SECONDS} s and shape (channels, samples) is needed for one audio latent or "
                f"more; got {tuple(waveform.shape)} at {rate} Hz for {steps}."
            )
        if self.encoder is None:
            if self.read_encoder is None:
                raise RuntimeError("This audio VAE has no encoder: load it with load_audio_vae.")
            self.encoder = self.read_encoder().to(self.mean.device)
        mel = log_mel(self._heard(waveform, rate, steps), **vars(self.hearing))
        parts = self.encoder(mel[None].to(self.mean))  # mean and log variance; the mean is the latent
        latent = (parts[:, :AUDIO_CHANNELS, :steps] - self.mean) / self.std
        return latent.float().cpu()

    def _heard(self, waveform: torch.Tensor, rate: int, steps: int) -> torch.Tensor:
        """(2, N) at the VAE's rate, of samples enough for ``steps`` and not many more."""
        hearing = self.hearing
        step = MELS_PER_STEP * hearing.hop
        needed = steps * step
        past = math.ceil((needed + hearing.n_fft) * rate / hearing.rate) + rate // 10  # the window's, the filter's
        waveform = waveform[:, :past].detach().float().cpu()
        if waveform.shape[0] != 2:
            waveform = waveform.mean(dim=0, keepdim=True)
        heard = torch.stack([resample(channel, rate, hearing.rate) for channel in waveform]).expand(2, -1)
        is_short = heard.shape[1] < needed - step  # no frame for the last step
        return nn.functional.pad(heard, (0, needed - heard.shape[1])) if is_short else heard

    @staticmethod
    def encode_bytes(steps: int) -> int:
        """An estimate of the memory that encoding ``steps`` audio latents takes beside the weights."""
        return (MELS_PER_STEP * steps + 16) * ENCODE_BYTES

    @staticmethod
    def decode_bytes(shape: tuple[int, ...], form: SoundForm = ONE_PIECE) -> int:
        """An estimate of the memory that decoding a latent of ``shape`` takes beside the weights."""
        return shape[0] * form.steps(shape[2]) * AUDIO_BINS * DECODE_BYTES


def load_audio_vae(path: str | os.PathLike | FileInfo, *, device: torch.device | str = "cpu") -> AudioVAE:
    """The LTX-2.3 audio VAE with its vocoder, in fp32 as the vocoder needs; its encoder is read when it is first used.

    Read from its own file, or out of a checkpoint that holds it beside other models. Raises FileNotFoundError,
    WrongFileError for another file, one without configuration or an incomplete one, RuntimeError where diffusers is not
    installed or too old.
    """
    info = audio_vae_part(recognised(path, FileKind.LTX_AUDIO_VAE))
    vae, arguments = audio_vae_config(info)
    decoder, vocoder = _build(vae, arguments)
    with open_checkpoint(info) as source:
        fill(decoder, _tensors(source, f"{VAE_PREFIX}decoder."), info.path.name)
        fill(vocoder, ((vocoder_name(n), t) for n, t in _tensors(source, VOCODER_PREFIX)), info.path.name)
        mean, std = (_statistics(source, name) for name in (MEAN, STD))
    read_encoder = partial(_load_encoder, info, vae)
    loaded = AudioVAE(decoder, vocoder, mean, std, read_encoder, _hearing(info, vae))
    return loaded.eval().requires_grad_(False).to(device)


def _load_encoder(info: FileInfo, arguments: dict) -> nn.Module:
    build, _ = diffusers_classes()
    with torch.device("meta"):
        encoder = build(**arguments).encoder
    with open_checkpoint(info) as source:
        fill(encoder, _tensors(source, f"{VAE_PREFIX}encoder."), info.path.name)
    return encoder.eval().requires_grad_(False)


def _hearing(info: FileInfo, arguments: Mapping) -> Hearing:
    stft = _configuration(info)["audio_vae"].get("preprocessing", {}).get("stft", {})
    return Hearing(
        arguments["sample_rate"],
        stft.get("filter_length", Hearing.n_fft),
        arguments["mel_hop_length"],
        arguments["mel_bins"],
    )


def audio_vae_part(info: FileInfo) -> FileInfo:
    """``info`` as of a file with nothing but its audio VAE and vocoder, which have no prefix wherever they are."""
    tensors = {n: tensor for n, tensor in info.tensors.items() if n.startswith((VAE_PREFIX, VOCODER_PREFIX))}
    return replace(info, kind=FileKind.LTX_AUDIO_VAE, prefix="", detail="", tensors=tensors)


def audio_vae_config(info: FileInfo) -> tuple[dict, dict]:
    """The arguments of diffusers' classes for the VAE and for the vocoder of a file, read off its header.

    Raises WrongFileError for one without configuration or statistics, or of another build.
    """
    missing = [VAE_PREFIX + name for name in (MEAN, STD) if VAE_PREFIX + name not in info.tensors]
    if missing:
        raise WrongFileError(f"{info.path.name} is incomplete: the tensor {missing[0]} is missing; download it again.")
    config = _configuration(info)
    try:
        return vae_config(config["audio_vae"]), vocoder_config(config["vocoder"], info.path.name)
    except (KeyError, TypeError, AttributeError) as error:
        raise WrongFileError(
            f"{info.path.name} has a configuration of another form in its metadata ({error}): "
            "choose ltx-2.3-22b-dev_audio_vae.safetensors as released."
        ) from error


def vae_config(config: Mapping) -> dict:
    """The arguments of diffusers' ``AutoencoderKLLTX2Audio`` for the ``audio_vae`` part of a file's configuration."""
    params = config.get("model", {}).get("params", {})
    network = params.get("decoder") or params.get("encoder") or params.get("ddconfig") or {}
    return {
        "base_channels": network.get("ch", 128),
        "output_channels": network.get("out_ch", 2),
        "ch_mult": tuple(network.get("ch_mult", (1, 2, 4))),
        "num_res_blocks": network.get("num_res_blocks", 2),
        "attn_resolutions": tuple(network.get("attn_resolutions") or ()) or None,
        "in_channels": network.get("in_channels", 2),
        "resolution": network.get("resolution", 256),
        "latent_channels": network.get("z_channels", AUDIO_CHANNELS),
        "norm_type": network.get("norm_type", "pixel"),
        "causality_axis": network.get("causality_axis", "height") or "none",
        "mid_block_add_attention": network.get("mid_block_add_attention", False),
        "sample_rate": params.get("sampling_rate", 16000),
        "mel_hop_length": config.get("preprocessing", {}).get("stft", {}).get("hop_length", 160),
        "mel_bins": network.get("mel_bins", MEL_BANDS),
    }


def vocoder_config(config: Mapping, file_name: str) -> dict:
    """The arguments of diffusers' ``LTX2VocoderWithBWE`` for the ``vocoder`` part of a file's configuration.

    Raises WrongFileError for a vocoder of another build, such as LTX-2.0's, which has no bandwidth extension.
    """
    low, high = config.get("vocoder"), config.get("bwe")
    if not isinstance(low, Mapping) or not isinstance(high, Mapping):
        raise WrongFileError(
            f"{file_name} has a vocoder without bandwidth extension, which is LTX-2.0's: "
            "choose ltx-2.3-22b-dev_audio_vae.safetensors."
        )
    arguments = {**_generator(low, file_name), **{f"bwe_{k}": v for k, v in _generator(high, file_name).items()}}
    final = "tanh" if low.get("use_tanh_at_final", True) else "clamp"
    return {
        **arguments,
        "final_act_fn": final if low.get("apply_final_activation", True) else None,
        "bwe_final_act_fn": None,  # its output is a correction, added before the sum is clamped
        "filter_length": high["n_fft"],
        "window_length": high["n_fft"],
        "hop_length": high["hop_length"],
        "num_mel_channels": high["num_mels"],
        "input_sampling_rate": high["input_sampling_rate"],
        "output_sampling_rate": high["output_sampling_rate"],
    }


def vocoder_name(name: str) -> str:
    """diffusers' name for a tensor of the original vocoder."""
    parts = name.split(".")
    renamed = {
        "conv_pre": "conv_in",
        "ups": "upsamplers",
        "resblocks": "resnets",
        "act_post": "act_out",
        "conv_post": "conv_out",
    }
    return ".".join(renamed.get(part, part) for part in parts if part != "lowpass")


def _configuration(info: FileInfo) -> dict:
    try:
        config = json.loads(info.metadata["config"])
        parts = config["audio_vae"], config["vocoder"]
    except (KeyError, TypeError, ValueError, RecursionError):
        parts = ()
    if not parts or not all(isinstance(part, dict) for part in parts):
        raise WrongFileError(
            f"{info.path.name} has no configuration in its metadata, which says how its audio VAE is built: "
            "choose ltx-2.3-22b-dev_audio_vae.safetensors as released."
        )
    return config


def _generator(config: Mapping, file_name: str) -> dict:
    if (config.get("resblock"), config.get("activation")) != ("AMP1", "snakebeta"):
        raise WrongFileError(
            f"{file_name} has a vocoder of another build ({config.get('resblock')}, {config.get('activation')}): "
            "choose ltx-2.3-22b-dev_audio_vae.safetensors."
        )
    channels = 2 if config.get("stereo", True) else 1
    return {
        "in_channels": channels * MEL_BANDS,
        "hidden_channels": config["upsample_initial_channel"],
        "out_channels": channels,
        "upsample_kernel_sizes": config["upsample_kernel_sizes"],
        "upsample_factors": config["upsample_rates"],
        "resnet_kernel_sizes": config["resblock_kernel_sizes"],
        "resnet_dilations": config["resblock_dilation_sizes"],
        "act_fn": "snakebeta",
        "antialias": True,
        "final_bias": config.get("use_bias_at_final", True),
    }


def diffusers_classes() -> tuple[type, type]:
    """diffusers' classes of the audio VAE and its vocoder; raises RuntimeError where it is missing or too old."""
    diffusers = need("diffusers", "The audio VAE")
    try:
        pipelines = importlib.import_module("diffusers.pipelines.ltx2")
    except ImportError:
        pipelines = None
    vae = getattr(diffusers, "AutoencoderKLLTX2Audio", None)
    vocoder = getattr(pipelines, "LTX2VocoderWithBWE", None)
    if vae is None or vocoder is None:
        raise RuntimeError(
            f"The audio VAE needs diffusers {FIRST_DIFFUSERS} or later, {diffusers.__version__} is installed: "
            "run `pip install --upgrade diffusers`."
        )
    return vae, vocoder


def _build(vae: dict, vocoder: dict) -> tuple[nn.Module, nn.Module]:
    """The VAE's decoder, without memory yet, and the vocoder, whose resampling filter is made, not loaded."""
    build_vae, build_vocoder = diffusers_classes()
    with torch.device("meta"):
        decoder = build_vae(**vae).decoder
    return decoder, build_vocoder(**vocoder)


def _tensors(source: TensorSource, prefix: str) -> Iterator[tuple[str, torch.Tensor]]:
    for name in source:
        if name.startswith(prefix):
            yield name.removeprefix(prefix), source.read(name).float()


def _statistics(source: TensorSource, name: str) -> torch.Tensor:
    """(8, 1, 16): the file has one row, channel-major."""
    return source.read(VAE_PREFIX + name).float().view(AUDIO_CHANNELS, 1, AUDIO_BINS)
