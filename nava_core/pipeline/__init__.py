"""The whole job without a host: model files, a prompt, a picture and voices in, a clip out.

    files = find_model_files("models")
    pipeline = NavaPipeline.from_files(files)
    pipeline("A woman on a pier says: <S>The storm has passed.<E>", seconds=6).save("clip.mp4")

    latents = pipeline.denoise("A woman on a pier ...")
    latents.save("clip.latents.safetensors")
    pipeline.save(latents, "clip.mp4")          # each frame as soon as it is decoded

:class:`ClipDecoder` does the last with the VAEs alone, at any time, from ``ClipLatents.load(...)``.

Components are read from their files one by one, when their turn comes. The same files, seed and settings give the
latents that the ComfyUI nodes give.
"""

from ..components import load_problem, memory_bytes
from ..decoding import Decoding
from .clip import Clip
from .devices import check_memory, choose_device
from .files import KINDS, NAMES, VAES, ModelFiles, find_model_files
from .given import Retake
from .latents import ClipLatents, LatentsError
from .memory import Components
from .pipeline import ClipDecoder, NavaPipeline
from .revise import is_latents_file
from .segment_state import StateError
from .segments import SEGMENT_SECONDS, LongClip
from .stages import Voice, clip_geometry, clip_noise, default_guidance, fit_picture

__all__ = [
    "KINDS",
    "NAMES",
    "SEGMENT_SECONDS",
    "VAES",
    "Clip",
    "ClipDecoder",
    "ClipLatents",
    "Components",
    "Decoding",
    "LatentsError",
    "LongClip",
    "ModelFiles",
    "NavaPipeline",
    "Retake",
    "StateError",
    "Voice",
    "check_memory",
    "choose_device",
    "clip_geometry",
    "clip_noise",
    "default_guidance",
    "find_model_files",
    "fit_picture",
    "is_latents_file",
    "load_problem",
    "memory_bytes",
]
