"""Which files a pipeline is made of, and finding them in a folder by what they hold."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

from ..checkpoint import FileInfo, FileKind, WrongFileError, describe_file, explain_wrong_file
from ..components import audio_vae_part, holds, load_problem

KINDS = {
    "backbone": (FileKind.NAVA_BACKBONE, FileKind.NAVA_BACKBONE_FP8),
    "text_encoder": (FileKind.UMT5, FileKind.UMT5_ORIGINAL),
    "video_vae": (FileKind.WAN22_VAE,),
    "audio_vae": (FileKind.LTX_AUDIO_VAE,),
    "speaker_encoder": (FileKind.REDIMNET,),
}
NAMES = {role: role.replace("_", " ").replace("vae", "VAE") for role in KINDS}
OPTIONAL = ("speaker_encoder",)
VAES = ("video_vae", "audio_vae")
MODEL_SUFFIXES = (".safetensors", ".pth", ".pt", ".ckpt", ".bin")
TOKENIZER_FILES = ("spiece.model", "tokenizer.json")


@dataclass(frozen=True)
class ModelFiles:
    """The files a pipeline is made of. ``speaker_encoder`` is for reference voices; ``tokenizer`` is the folder that a
    text encoder without a tokenizer inside came with. Decoding needs the VAEs alone."""

    backbone: Path | None = None
    text_encoder: Path | None = None
    video_vae: Path | None = None
    audio_vae: Path | None = None
    speaker_encoder: Path | None = None
    tokenizer: Path | None = None

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if value is not None:
                object.__setattr__(self, field.name, Path(value))

    def check(self, needed: Sequence[str] = ()) -> None:
        """Raise FileNotFoundError or WrongFileError, in a sentence, for the first file that is not what it should be,
        and FileNotFoundError for one of the roles ``needed`` that has none.

        Reads the files' headers only.
        """
        for role in needed:
            if getattr(self, role) is None:
                raise FileNotFoundError(f"There is no {NAMES[role]} among the model files: give one as {role}.")
        for role, kinds in KINDS.items():
            path = getattr(self, role)
            if path is None:
                continue
            info = describe_file(path)
            if not holds(info, kinds):
                raise WrongFileError(explain_wrong_file(info, kinds[0]))
            problem = load_problem(audio_vae_part(info) if role == "audio_vae" else info)
            if problem:
                raise WrongFileError(problem)
        if self.tokenizer is not None and not self.tokenizer.is_dir():
            raise FileNotFoundError(f"There is no tokenizer folder {self.tokenizer}: check the name.")


def find_model_files(
    folder: str | os.PathLike, *, roles: Sequence[str] = tuple(KINDS), **chosen: str | os.PathLike
) -> ModelFiles:
    """The model files in a folder and the folders below it, recognised by what they hold, not by their names.

    ``chosen`` names files by their role (``text_encoder=...``), which are then not looked for; of the others those of
    ``roles`` are. Raises FileNotFoundError where a folder or a needed file is not there, ValueError where several files
    could be meant.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"There is no folder {folder}: give the one with the model files.")
    unknown = set(chosen) - {field.name for field in fields(ModelFiles)}
    if unknown:
        raise ValueError(f"There is no model file called {', '.join(sorted(unknown))}; roles are {', '.join(KINDS)}.")
    infos = [describe_file(path) for path in _model_paths(folder)]
    found = {role: chosen.get(role) or _only(role, infos, folder) for role in KINDS if role in roles}
    tokenizer = chosen.get("tokenizer")
    if tokenizer is None and "text_encoder" in found:
        tokenizer = _find_tokenizer(Path(found["text_encoder"]), folder)
    return ModelFiles(**found, tokenizer=tokenizer)


def _model_paths(folder: Path) -> Iterator[Path]:
    """Files that could be models, each once, links followed."""
    seen_folders, seen_files = set(), set()
    for here, folders, names in os.walk(folder, followlinks=True):
        real = os.path.realpath(here)
        if real in seen_folders:
            folders.clear()
            continue
        seen_folders.add(real)
        folders.sort()
        for name in sorted(names):
            path = Path(here, name)
            if not name.lower().endswith(MODEL_SUFFIXES) or not path.is_file():
                continue
            status = path.stat()
            if (status.st_dev, status.st_ino) not in seen_files:
                seen_files.add((status.st_dev, status.st_ino))
                yield path


def _only(role: str, infos: Sequence[FileInfo], folder: Path) -> Path | None:
    """The one file for a role; a file that is this kind goes before a larger one that holds it as a part."""
    kinds = KINDS[role]
    fitting = [i for i in infos if i.kind in kinds] or [i for i in infos if holds(i, kinds)]
    if len(fitting) == 1 or (not fitting and role in OPTIONAL):
        return fitting[0].path if fitting else None
    if fitting:
        raise _ambiguous([info.path for info in fitting], role, folder)
    broken = [info.summary.rstrip(".") for info in infos if not info.is_readable]
    also = f" ({'; '.join(broken[:2])})" if broken else ""
    raise FileNotFoundError(f"There is no {NAMES[role]} in {folder}{also}: download it there, or say where it is.")


def _ambiguous(paths: Sequence[Path], role: str, folder: Path) -> ValueError:
    names = ", ".join(str(path.relative_to(folder)) for path in paths)
    return ValueError(
        f"In {folder} are {len(paths)} that could be the {NAMES.get(role, role)}: {names}; say which one ({role})."
    )


def _find_tokenizer(text_encoder: Path, folder: Path) -> Path | None:
    """A tokenizer folder for a text encoder that has none inside; None where it has, or none is found."""
    info = describe_file(text_encoder)
    if "spiece_model" in info.model_tensors:
        return None
    found = sorted({path.parent for name in TOKENIZER_FILES for path in folder.rglob(name)})
    if len(found) > 1:
        raise _ambiguous(found, "tokenizer", folder)
    return found[0] if found else None
