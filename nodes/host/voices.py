"""Saved voices in the host: their model folder, and timbres on the canvas that know where they come from.

Run on ComfyUI 0.18.1 and 0.33.0.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

import folder_paths
import torch

from ...nava_core.voices import SUFFIX, SavedVoice, VoiceError, blend_voices, save_in_folder, voice_of

FOLDER = "nava_voices"
KEEP_BOTH, REPLACE = "keep both", "replace"


def voice_files() -> list[str]:
    """The saved voices' names, as the host's model folders list them; the folder is made known first."""
    _register()
    return folder_paths.get_filename_list(FOLDER)


def voice_path(file: str) -> str:
    """Where a listed voice is. Raises FileNotFoundError."""
    _register()
    return folder_paths.get_full_path_or_raise(FOLDER, file)


def voice_state(file: str) -> str:
    """What changes where another voice is saved under a name; empty where there is none."""
    _register()
    path = folder_paths.get_full_path(FOLDER, file)
    if path is None:
        return ""
    status = os.stat(path)
    return f"{status.st_size} {status.st_mtime_ns}"


def save_voice(timbre: torch.Tensor, name: str, existing: str) -> str:
    """Save a timbre's voice in the first of the folders; returns what was done, in a sentence."""
    _register()
    folder = folder_paths.get_folder_paths(FOLDER)[0]
    replace = existing == REPLACE
    path, voice = save_in_folder(known_voice(timbre), folder, name, replace=replace)
    return f"{voice.summary}. It is {path.name} in the folder {FOLDER}, for NAVA Load Timbre."


def load_voice(file: str, encoder=None) -> tuple[torch.Tensor, str]:
    """(timbre (1, 192), report) of a saved voice. Raises VoiceError for one that another speaker encoder than
    ``encoder`` made, and ValueError for a file that is no voice."""
    voice = SavedVoice.load(voice_path(file))
    if encoder is None:
        return voice.timbre, f"{voice.summary} (not compared: connect a speaker encoder for that)"
    voice.check_encoder(encoder)
    return voice.timbre, f"{voice.summary}, the one that is connected"


def blend_timbres(timbres: Sequence[torch.Tensor | None], weights: Sequence[float]) -> tuple[torch.Tensor, str]:
    """(timbre (1, 192), report) between the timbres that are there."""
    given = [pair for pair in zip(timbres, weights, strict=True) if pair[0] is not None]
    blend = blend_voices([known_voice(timbre) for timbre, _ in given], [weight for _, weight in given])
    return blend.timbre, blend.summary


def known_voice(timbre: torch.Tensor) -> SavedVoice:
    """The voice of a timbre. Raises VoiceError for an embedding of unknown origin."""
    voice = voice_of(timbre)
    if voice is None:
        raise VoiceError(
            "This timbre does not say which speaker encoder made it: make it with NAVA Encode Timbre, or load it with "
            "NAVA Load Timbre."
        )
    return voice


def _register() -> None:
    """Make models/nava_voices a model folder, last of those that the user's own paths name."""
    known = folder_paths.folder_names_and_paths
    if FOLDER not in known or known[FOLDER][1] != {SUFFIX}:
        folder_paths.add_model_folder_path(FOLDER, os.path.join(folder_paths.models_dir, FOLDER))
        known[FOLDER] = (known[FOLDER][0], {SUFFIX})
