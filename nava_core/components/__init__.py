"""The models around the backbone without a host: umt5, the Wan2.2 video VAE, the LTX-2.3 audio VAE with its vocoder.

They are read from the files that the nodes take, through transformers' and diffusers' classes (extra ``[standalone]``,
imported where a component is loaded), and nothing is fetched.
"""

from .audio_vae import AudioVAE, load_audio_vae
from .latent_space import denormalize_video, normalize_video
from .text_encoder import TextEncoder, load_text_encoder, load_tokenizer
from .video_vae import VideoVAE, load_video_vae

__all__ = [
    "AudioVAE",
    "TextEncoder",
    "VideoVAE",
    "denormalize_video",
    "load_audio_vae",
    "load_text_encoder",
    "load_tokenizer",
    "load_video_vae",
    "normalize_video",
]
