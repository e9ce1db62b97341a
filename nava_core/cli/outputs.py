"""What commands write: the clip's file and its latents', named and checked before anything is loaded."""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from .options import UsageError, writable_folder

LATENTS = ".latents.safetensors"


def clip_target(args: argparse.Namespace, suffix: str, name: str) -> Path:
    """The file of --out, or one here that is not there yet, NAME, NAME_2 ... Raises UsageError."""
    if args.out is None:
        return free_name(writable_folder(Path.cwd()), name, suffix)
    target = Path(os.path.abspath(args.out))
    if target.is_dir():
        raise UsageError(f"--out: {target} is a folder: give the file to write in it.")
    if target.suffix.lower() != suffix:
        raise UsageError(f"--out: this clip is written as {suffix}: name it {target.stem}{suffix}.")
    if target.exists() and not args.overwrite:
        raise UsageError(f"--out: {target} is already there: give another name, or --overwrite.")
    writable_folder(target.parent)
    return target


def latents_target(args: argparse.Namespace, clip: Path) -> Path | None:
    """The file of --save-latents, beside the clip where none is named; None without. Raises UsageError."""
    if args.save_latents is None:
        return None
    if args.save_latents == "":
        target = clip.with_name(f"{clip.stem}{LATENTS}")
    else:
        target = Path(os.path.abspath(args.save_latents))
        if target.suffix != ".safetensors":
            raise UsageError(
                f"--save-latents: {args.save_latents[:60]!r} is no name of a .safetensors file; where none is to be "
                "given, write the option behind the prompt."
            )
        writable_folder(target.parent)
    if target.exists() and not args.overwrite:
        raise UsageError(f"--save-latents: {target} is already there: give another name, or --overwrite.")
    return target


def free_name(folder: Path, name: str, suffix: str) -> Path:
    """The first of NAME, NAME_2 ... that is not there."""
    names: Iterable[str] = (f"{name}{count}{suffix}" for count in ("", *(f"_{n}" for n in range(2, 100_000))))
    return next(folder / each for each in names if not (folder / each).exists())


def report_lines(clip: Any) -> list[str]:
    """What the pipeline reports of a clip, a line each; none where it was a warning, which has been said."""
    if clip.report in clip.warnings:
        return []
    return [line for line in clip.report.splitlines() if line.strip()]
