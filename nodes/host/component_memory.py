"""What the VAEs and the text encoder take on this host beside their weights, from the sizes of what goes in.

Figures of the host's own networks, counted tensor by tensor (tests/host/test_memory.py does); the same on ComfyUI
0.18.1 and 0.33.0. Each includes what PyTorch's allocator holds beside live tensors.
"""

from __future__ import annotations

import comfy.model_management
import torch

from ...nava_core.geometry import PIXELS_PER_LATENT
from .memory import ALLOCATOR_SLACK

FP32 = 4
# Of the Wan2.2 video VAE, values for each of a latent's pixels: by the network's width, and beside it. The first latent
# frame is one frame, the second finds no caches yet, from the third on all is the same.
DECODE_ONE, DECODE_TWO, DECODE_MORE = (1128, 96), (3576, 960), (3832, 144)
ENCODE_ONE, ENCODE_TWO, ENCODE_MORE = (512, 1536), (2200, 5472), (2340, 8736)
FRAMES_PER_LATENT = 4
PIXEL_VALUES = 3 * PIXELS_PER_LATENT**2  # of a frame
JOINED = FRAMES_PER_LATENT * PIXEL_VALUES + 48  # of a latent frame: its frames, and its own values
CONV_TAPS = 27  # of the largest convolution
WIDEST = 4  # times the network's width


def video_decode_bytes(shape, dtype: torch.dtype, width: int = 256) -> float:
    """Of the host's own decode of a latent ``shape`` (B, 48, T, H, W), one sample at a time: its frames grow on the
    device. (This pack streams them: see ``video_vae.COUNTS``.) ``width``: of the decoder."""
    frames, area = shape[2], shape[3] * shape[4]
    if frames > 2:
        # The first latent frame is one frame; two are not yet there.
        fixed, earlier = DECODE_MORE, JOINED * frames - 2352
    else:
        fixed, earlier = (DECODE_ONE, DECODE_TWO)[frames - 1], 0
    return _slack(area * (fixed[0] * width + fixed[1] + earlier), dtype)


def video_encode_bytes(shape, dtype: torch.dtype, width: int = 160, weight_dtype: torch.dtype | None = None) -> float:
    """Of encoding pixels ``shape`` (B, 3, F, H, W), one sample at a time. ``dtype``: of the arithmetic;
    ``weight_dtype``: of weights that are cast to it as they are used. ``width``: of the encoder."""
    latents = (shape[2] + FRAMES_PER_LATENT - 1) // FRAMES_PER_LATENT
    area = shape[3] * shape[4] / PIXELS_PER_LATENT**2
    fixed = (ENCODE_ONE, ENCODE_TWO, ENCODE_MORE)[min(latents, 3) - 1]
    growing = max(0, latents - 3) * (FRAMES_PER_LATENT * PIXEL_VALUES + 96)
    values = area * (fixed[0] * width + fixed[1] + growing)
    if weight_dtype not in (None, dtype):  # the largest weights are used where the pictures are small already
        small = min(2, latents) * (ENCODE_ONE[0] * width + ENCODE_ONE[1])
        values = max(values, area * small + (WIDEST * width) ** 2 * CONV_TAPS)
    return _slack(values + area * shape[2] * PIXEL_VALUES, dtype)


def _slack(values: float, dtype: torch.dtype) -> float:
    return values * comfy.model_management.dtype_size(dtype) * ALLOCATOR_SLACK


# ---------------------------------------------------------------- the audio VAE and its vocoder, in fp32


def audio_decode_bytes(module, shape) -> float:
    """Of decoding a latent ``shape`` (B, 8, T, 16) by the host's ``AudioVAE`` to sound."""
    mel_frames = shape[0] * (4 * shape[2] - 3)
    vae = 7.1 * module.autoencoder.mel_bins * module.autoencoder.decoder.ch
    return mel_frames * max(vae, _vocoder_values(module.vocoder)) * FP32 * ALLOCATOR_SLACK


def audio_encode_bytes(module, mel_frames: int) -> float:
    """Of encoding so many mel frames, all samples' together: 100 for each second."""
    values = 5.91 * module.autoencoder.mel_bins * module.autoencoder.encoder.ch
    return mel_frames * values * FP32 * ALLOCATOR_SLACK


def _vocoder_values(vocoder) -> float:
    """For each mel frame: the widest stage's output with the steps of its activations, and the sound itself."""
    if not hasattr(vocoder, "bwe_generator"):
        return _stage_values(vocoder)
    frames = float(vocoder.vocoder.upsample_factor) / vocoder.hop_length  # of the second generator, for each of these
    low, high = (_stage_values(each) for each in (vocoder.vocoder, vocoder.bwe_generator))
    return max(low, frames * high + 640)


def _stage_values(generator) -> float:
    rate, widest = 1, 0
    for layer in generator.ups:
        rate *= layer.stride[0]
        widest = max(widest, rate * layer.out_channels)
    return (10.05 if generator.resblock == "AMP1" else 5.05) * widest


# ---------------------------------------------------------------- the text encoder, which computes in fp32


def text_encode_bytes(config, tokens: int, sections: int, weight_dtype: torch.dtype) -> float:
    """Of encoding ``sections`` of so many tokens by the host's umt5 of these dimensions (``UMT5Config``)."""
    width, hidden = sections * config.d_model * tokens, sections * config.d_ff * tokens
    bias = config.num_heads * tokens**2  # of positions, which sections share until masks are added
    weight = 0 if weight_dtype is torch.float32 else config.d_model * config.d_ff
    feed_forward = 2 * width + 3 * hidden + 2 * bias + weight
    attention = 6 * width + (2 + sections) * bias
    return max(feed_forward, attention) * FP32 * ALLOCATOR_SLACK
