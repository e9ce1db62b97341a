"""The Wan2.2 video VAE through diffusers: the original file's names mapped to diffusers', dimensions from its tensors.

Frames are decoded as they come, in the forms of :mod:`nava_core.decoding`.

diffusers' own converter for single files knows only Wan2.1's and looks its configuration up online; this one reads the
file alone, at any width.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import nn

from ..checkpoint import FileInfo, FileKind, TensorSource, WrongFileError, open_checkpoint
from ..decoding import (
    PATCH,
    WHOLE,
    DecodeForm,
    DecoderCounts,
    FrameMemory,
    Step,
    collect,
    in_single_frames,
    pixels_of,
    stream_frames,
    wide_level,
    with_memory,
)
from ..explain import TooLittleMemoryError
from ..geometry import PIXELS_PER_LATENT, VIDEO_CHANNELS, frames_of_latents
from .weights import fill, need, recognised, shapes_of

# Of diffusers' decoder, counted tensor by tensor at the released width, in either type
COUNTS = DecoderCounts(whole=21.1, single=13.8, in_ram=7.85, remembered=6.97)
# Values that an encode of one frame, and of more, is given room for: for each pixel of a frame and each channel of the
# first layer. Counted are 3 and 11; the rest is for workspaces.
ENCODE_VALUES, ENCODE_CLIP_VALUES = 6, 21
ENCODING_HALF = ("encoder.", "conv1.")  # of the file's tensors


class VideoVAE(nn.Module):
    """Frames to latents and back, one clip at a time, in the VAE's own latent space (not normalised)."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    @torch.no_grad()
    def encode(self, frames: torch.Tensor) -> torch.Tensor:
        """Frames (F, H, W, 3) in 0..1 of one clip -> its latent (1, 48, (F + 3) // 4, H / 16, W / 16), fp32 on the CPU.

        One frame makes the first latent frame of a clip that begins with it. Sound depends on that latent, so it is
        computed in fp32 whatever the weights are rounded to, as in the makers' code, and always whole. Raises
        ValueError for other shapes and for sides that are no multiple of 16, TooLittleMemoryError where the device's
        memory is short.
        """
        if frames.ndim != 4 or frames.shape[-1] != 3 or any(side % PIXELS_PER_LATENT for side in frames.shape[1:3]):
            raise ValueError(
                f"Frames to encode are (frames, height, width, 3), their sides multiples of {PIXELS_PER_LATENT}; "
                f"got {tuple(frames.shape)}."
            )
        pixels = frames.movedim(-1, 0)[None].to(self._device, torch.float32) * 2 - 1
        self.network.use_tiling = False  # a tiled decode may have left it on
        try:
            return self.network.encode(pixels).latent_dist.mode().float().cpu()
        except torch.OutOfMemoryError:
            pass  # raised below, where the failed pass no longer holds its tensors
        finally:
            self.network.clear_cache()  # which holds frames on the device, and is left full where a pass fails
        what = "a first frame" if len(frames) == 1 else f"{len(frames)} frames"
        raise TooLittleMemoryError(
            f"There is too little free memory on {self._device} for encoding {what} of {frames.shape[2]}x"
            f"{frames.shape[1]}, which needs about {self.encode_bytes(frames.shape) / 2**30:.1f} GB and is not done in "
            "tiles, for they change the result: make the clip smaller, free the memory other programs hold, or work on "
            "the CPU."
        )

    def decode(self, latent: torch.Tensor, form: DecodeForm = WHOLE, step: Step | None = None) -> torch.Tensor:
        """Latent (1, 48, T, H, W) -> frames (4 T - 3, 16 H, 16 W, 3) in 0..1, fp32 on the CPU.

        Whole frames by default, bit for bit what diffusers decodes. ``form`` and ``step`` as for :meth:`stream`.
        """
        return collect(self.stream(latent, form, step), frames_of_latents(latent.shape[2]))

    def stream(
        self, latent: torch.Tensor, form: DecodeForm = WHOLE, step: Step | None = None
    ) -> Iterator[torch.Tensor]:
        """Latent (1, 48, T, H, W) -> its frames in 0..1, fp32 on the CPU, in parts (f, 16 H, 16 W, 3) as they come.

        Memory is constant in T: see :func:`stream_frames`. Raises ValueError for another shape.
        """
        if latent.ndim != 5 or latent.shape[:2] != (1, VIDEO_CHANNELS):
            raise ValueError(
                f"A video latent is (1, {VIDEO_CHANNELS}, frames, height, width); got {tuple(latent.shape)}."
            )
        return stream_frames(_Decoder(self.network), latent, form, step)

    @contextmanager
    def on_cpu(self) -> Iterator[None]:
        """Has the VAE on the CPU for the time of the block, decoding in fp32, and leaves it there in its own type."""
        dtype = self._dtype
        self.to("cpu")
        self.network.decoder.float()
        self.network.post_quant_conv.float()
        try:
            yield
        finally:
            self.network.decoder.to(dtype)
            self.network.post_quant_conv.to(dtype)

    def encode_bytes(self, shape: tuple[int, ...]) -> int:
        """An estimate of the memory that encoding frames of ``shape`` (F, H, W, 3) takes beside the weights."""
        values = ENCODE_VALUES if shape[0] == 1 else ENCODE_CLIP_VALUES
        return values * shape[1] * shape[2] * self.network.config.base_dim * torch.float32.itemsize

    def decode_bytes(self, shape: tuple[int, ...], form: DecodeForm = WHOLE) -> int:
        """An estimate of the memory that decoding a latent of ``shape`` takes on the device beside the weights."""
        return COUNTS.device_bytes(form, *shape[-2:], self._width, torch.float32 if form.on_cpu else self._dtype)

    def decode_ram(self, shape: tuple[int, ...], form: DecodeForm) -> int:
        """An estimate of the RAM that decoding on a GPU takes beside the frames that are handed out."""
        return COUNTS.ram_bytes(form, shape, self._width, self._dtype)

    @property
    def _width(self) -> int:
        return self.network.config.decoder_base_dim

    @property
    def _device(self) -> torch.device:
        return next(self.parameters()).device

    @property
    def _dtype(self) -> torch.dtype:
        return next(self.network.decoder.parameters()).dtype


class _Decoder:
    """diffusers' decoder, a latent frame at a time."""

    counts = COUNTS

    def __init__(self, network: nn.Module) -> None:
        self.network, self.width = network, network.config.decoder_base_dim
        parameter = next(network.decoder.parameters())
        self.device, self.dtype = parameter.device, parameter.dtype

    def begin(self, latent: torch.Tensor) -> torch.Tensor:
        return self.network.post_quant_conv(latent.to(self.device, self.dtype)).to(latent.device)

    def frames(self, latent: torch.Tensor, memory: FrameMemory, *, first: bool, single: bool) -> torch.Tensor:
        latent, decoder = latent.to(self.device), self.network.decoder
        if single and not first:
            channels = in_single_frames(self._levels(), wide_level(decoder.temperal_upsample), latent, memory)
        else:
            channels = decoder(latent, feat_cache=memory, feat_idx=[0], first_chunk=first)
        part = pixels_of(channels.clamp_(-1, 1))
        return torch.empty(part.shape).copy_(part).add_(1).div_(2).clamp_(0, 1)

    def _levels(self) -> list:
        """in_single_frames' levels: what comes before time is doubled is with the first of them."""
        decoder = self.network.decoder
        first, *others = decoder.up_blocks

        def begin(latent, memory, number):
            middle = decoder.mid_block(with_memory(decoder.conv_in, latent, memory, number), memory, number)
            return first(middle, memory, number)

        *blocks, last = others

        def end(latent, memory, number):
            normed = decoder.nonlinearity(decoder.norm_out(last(latent, memory, number)))
            return with_memory(decoder.conv_out, normed, memory, number)

        return [begin, *blocks, end]


def load_video_vae(
    path: str | os.PathLike | FileInfo,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> VideoVAE:
    """The Wan2.2 VAE from its original file (``.safetensors`` or the makers' ``.pth``), of any width.

    Weights are rounded to ``dtype`` and moved to ``device`` one by one; the encoding half keeps them as fp32, in which
    it computes. Raises FileNotFoundError, WrongFileError for
    another file or an incomplete one, RuntimeError where diffusers is not installed.
    """
    info = recognised(path, FileKind.WAN22_VAE)
    vae = empty_video_vae(info)
    with open_checkpoint(info) as source:
        fill(vae.network, _tensors(source, device, dtype), info.path.name)
    return vae.eval().requires_grad_(False)


def empty_video_vae(info: FileInfo, dtype: torch.dtype = torch.float32) -> VideoVAE:
    """The VAE of a file without memory for its weights: to be filled, or asked what its work takes."""
    config = video_vae_config(shapes_of(info), info.path.name)
    diffusers = need("diffusers", "The video VAE")
    with torch.device("meta"):
        return VideoVAE(diffusers.AutoencoderKLWan(**config)).to(dtype)


def _tensors(
    source: TensorSource, device: torch.device | str, dtype: torch.dtype
) -> Iterator[tuple[str, torch.Tensor]]:
    for name in source:
        tensor = source.read(name).to(device, dtype)
        yield diffusers_name(name), tensor.float() if name.startswith(ENCODING_HALF) else tensor


def video_vae_config(shapes: Mapping[str, tuple[int, ...]], file_name: str) -> dict:
    """The arguments of diffusers' ``AutoencoderKLWan`` for an original Wan2.2 VAE with tensors of these shapes.

    Raises WrongFileError where a tensor they are read from is missing, or the VAE's latents are not NAVA's.
    """
    levels = 1 + max((int(n.split(".")[2]) for n in shapes if n.startswith("encoder.downsamples.")), default=-1)
    blocks = {n.split(".")[4] for n in shapes if re.match(r"encoder\.downsamples\.0\.downsamples\.\d+\.residual\.", n)}
    try:
        width = shapes["encoder.conv1.weight"][0]
        stage = "encoder.downsamples.{}.downsamples"
        widths = [shapes[f"{stage.format(level)}.0.residual.6.weight"][0] for level in range(levels)]
        channels = shapes["decoder.conv1.weight"][1]
        config = {
            "base_dim": width,
            "decoder_base_dim": shapes["decoder.head.0.gamma"][0],
            "z_dim": channels,
            "dim_mult": [each // width for each in widths],
            "num_res_blocks": len(blocks),
            "temperal_downsample": [
                f"{stage.format(level)}.{len(blocks)}.time_conv.weight" in shapes for level in range(levels - 1)
            ],
            "in_channels": shapes["encoder.conv1.weight"][1],
            "out_channels": shapes["decoder.head.2.weight"][0],
        }
    except KeyError as missing:
        raise WrongFileError(
            f"{file_name} is incomplete: the tensor {missing.args[0]} is missing; download it again."
        ) from None
    if channels != VIDEO_CHANNELS:
        raise WrongFileError(
            f"{file_name} is a video VAE of {channels} latent channels, but NAVA's has {VIDEO_CHANNELS}: "
            "choose wan2.2_vae.safetensors or Wan2.2_VAE.pth."
        )
    return {**config, "is_residual": True, "patch_size": PATCH, "scale_factor_spatial": PIXELS_PER_LATENT}


_RULES = tuple(
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"^conv1\.", "quant_conv."),
        (r"^conv2\.", "post_quant_conv."),
        (r"^(encoder|decoder)\.conv1\.", r"\1.conv_in."),
        (r"\.head\.0\.", ".norm_out."),
        (r"\.head\.2\.", ".conv_out."),
        (r"\.middle\.0\.", ".mid_block.resnets.0."),
        (r"\.middle\.1\.", ".mid_block.attentions.0."),
        (r"\.middle\.2\.", ".mid_block.resnets.1."),
        (r"\.downsamples\.(\d+)\.downsamples\.\d+\.(?=resample|time_conv)", r".down_blocks.\1.downsampler."),
        (r"\.downsamples\.(\d+)\.downsamples\.(\d+)\.", r".down_blocks.\1.resnets.\2."),
        (r"\.upsamples\.(\d+)\.upsamples\.\d+\.(?=resample|time_conv)", r".up_blocks.\1.upsampler."),
        (r"\.upsamples\.(\d+)\.upsamples\.(\d+)\.", r".up_blocks.\1.resnets.\2."),
        (r"\.residual\.0\.", ".norm1."),
        (r"\.residual\.2\.", ".conv1."),
        (r"\.residual\.3\.", ".norm2."),
        (r"\.residual\.6\.", ".conv2."),
        (r"\.shortcut\.", ".conv_shortcut."),
    )
)


def diffusers_name(name: str) -> str:
    """diffusers' name for a tensor of the original Wan2.2 VAE."""
    for pattern, replacement in _RULES:
        name = pattern.sub(replacement, name)
    return name
