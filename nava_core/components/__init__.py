"""The models around the backbone without a host: umt5, the Wan2.2 video VAE, the LTX-2.3 audio VAE with its vocoder.

They are read from the files that the nodes take, through transformers' and diffusers' classes (extra ``[standalone]``,
imported where a component is loaded), and nothing is fetched.
"""

from .audio_vae import AudioVAE, audio_vae_part, diffusers_classes, load_audio_vae
from .header_check import load_problem, memory_bytes
from .latent_space import denormalize_video, normalize_video
from .text_encoder import (
    TextEncoder,
    encode_bytes,
    load_text_encoder,
    load_tokenizer,
    text_encoder_config,
    text_encoder_weights,
)
from .video_vae import VideoVAE, empty_video_vae, load_video_vae
from .weights import holds, need

__all__ = [
    "AudioVAE",
    "TextEncoder",
    "VideoVAE",
    "audio_vae_part",
    "check_decoding_packages",
    "check_packages",
    "denormalize_video",
    "empty_video_vae",
    "encode_bytes",
    "holds",
    "load_audio_vae",
    "load_problem",
    "load_text_encoder",
    "load_tokenizer",
    "load_video_vae",
    "memory_bytes",
    "normalize_video",
    "text_encoder_config",
    "text_encoder_weights",
]


def check_packages() -> None:
    """Raise RuntimeError, in a sentence, where a package that the components are built with is missing or too old."""
    need("transformers", "The text encoder")
    check_decoding_packages()


def check_decoding_packages() -> None:
    """As :func:`check_packages`, of the packages that the VAEs are built with."""
    diffusers_classes()
