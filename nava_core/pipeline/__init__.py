"""The whole job without a host: model files, a prompt, a picture and voices in, a clip out.

    files = find_model_files("models")
    pipeline = NavaPipeline.from_files(files)
    pipeline("A woman on a pier says: <S>The storm has passed.<E>", seconds=6).save("clip.mp4")

Components are read from their files one by one, when their turn comes. The same files, seed and settings give the
latents that the ComfyUI nodes give.
"""

from ..components import load_problem, memory_bytes
from .clip import Clip
from .files import KINDS, NAMES, ModelFiles, find_model_files
from .memory import Components, check_memory, choose_device
from .pipeline import NavaPipeline
from .stages import Voice, clip_geometry, clip_noise, default_guidance, fit_picture

__all__ = [
    "KINDS",
    "NAMES",
    "Clip",
    "Components",
    "ModelFiles",
    "NavaPipeline",
    "Voice",
    "check_memory",
    "choose_device",
    "clip_geometry",
    "clip_noise",
    "default_guidance",
    "find_model_files",
    "fit_picture",
    "load_problem",
    "memory_bytes",
]
