"""What a model file's header tells before anything is loaded: whether NAVA would load it, and the memory it takes."""

from __future__ import annotations

import torch

from ..checkpoint import BACKBONES, FileInfo, FileKind, backbone_problem, estimate_memory, explain_wrong_file
from ..voices import voice_problem
from .audio_vae import audio_vae_config, audio_vae_part
from .text_encoder import text_encoder_config
from .video_vae import video_vae_config
from .weights import holds, shapes_of

WHOLE = BACKBONES | {FileKind.UMT5, FileKind.UMT5_ORIGINAL, FileKind.WAN22_VAE, FileKind.REDIMNET, FileKind.TAE}


def load_problem(info: FileInfo) -> str | None:
    """The sentence that loading a file would fail with, found without reading a tensor; None where it would load.

    A checkpoint of several models that NAVA has no other use for is looked at for its audio VAE. Of a speaker encoder
    and a preview decoder only the kind is known, and that an encoder or VAE has all its tensors is seen in loading.
    """
    if info.is_backbone:
        return backbone_problem(info)
    try:
        if _is_for_audio(info):
            audio_vae_config(audio_vae_part(info))
        elif info.kind in (FileKind.UMT5, FileKind.UMT5_ORIGINAL):
            text_encoder_config(info)
        elif info.kind is FileKind.WAN22_VAE:
            video_vae_config(shapes_of(info), info.path.name)
        elif info.kind is FileKind.NAVA_VOICE:
            return voice_problem(info)
        elif info.kind not in WHOLE:
            return explain_wrong_file(info, "a file of NAVA's (backbone, umt5, Wan2.2 VAE, LTX audio VAE, ReDimNet)")
    except ValueError as error:
        return str(error)
    return None


def memory_bytes(info: FileInfo) -> int:
    """Bytes a file's weights take when loaded as they are by default; 0 where it is no model.

    The audio VAE is fp32 in memory, whatever its file has, and alone what is read of a checkpoint that holds it.
    """
    return estimate_memory(audio_vae_part(info), torch.float32) if _is_for_audio(info) else estimate_memory(info)


def _is_for_audio(info: FileInfo) -> bool:
    return info.kind not in WHOLE and holds(info, (FileKind.LTX_AUDIO_VAE,))
