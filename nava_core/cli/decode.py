"""`nava decode`: a clip from its latents."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from .decoding import add_decoding_options
from .options import (
    DTYPES,
    MODEL_ROLES,
    Command,
    UsageError,
    add_memory_option,
    device_of,
    model_files,
    placement_of,
    types_of,
)
from .outputs import LATENTS, clip_target, report_lines
from .progress import Progress

VAES = {"video": "video_vae", "audio": "audio_vae"}  # what a part of the latents is decoded by

DESCRIPTION = """Makes a clip of latents: of a file that --save-latents of `nava generate` or `nava batch` kept, or of
those that ComfyUI's Save Latent wrote, one for the picture, one for the sound, or both. Only the VAEs are needed. The
clip's path goes to stdout, all else to stderr."""

EXAMPLES = """examples:
  nava decode pier.latents.safetensors --models models --out pier.mp4
  nava decode pier.latents.safetensors --models models --decoding tiled --vae-dtype fp32
  nava decode video_00001_.latent audio_00001_.latent --models models --out clip.mp4"""


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("latents", nargs="+", type=Path, metavar="LATENTS", help="the latents of one clip")
    parser.add_argument(
        "--out", type=Path, metavar="FILE", help="the file to write, .mp4 or .wav (default: named after LATENTS, here)"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace --out where it is there")
    group = parser.add_argument_group("models")
    group.add_argument(
        "--models", type=Path, metavar="FOLDER", help="folder with the VAEs' files, told apart by content"
    )
    for role in VAES.values():
        group.add_argument(f"--{role.replace('_', '-')}", type=Path, metavar="FILE", help=MODEL_ROLES[role])
    group.add_argument(
        "--device", "--vae-device", default="auto", help="auto, cpu, cuda, cuda:1, mps ... (default: auto)"
    )
    group.add_argument(
        "--vae-dtype",
        default="auto",
        choices=["auto", *(name for name in DTYPES if name != "fp8")],
        help="type that the video VAE decodes in; auto: bf16 on a GPU, fp32 on a CPU",
    )
    add_memory_option(group)
    add_decoding_options(parser)
    parser.set_defaults(dtype="auto")


def run(args: argparse.Namespace) -> int:
    from ..pipeline import ClipDecoder, ClipLatents

    missing = [path for path in args.latents if not path.is_file()]
    if missing:
        raise UsageError(f"There is no file {missing[0]}: give the latents of a clip.")
    latents = ClipLatents.load(*args.latents)
    target = clip_target(args, latents.suffix, _name(args.latents[0]))
    files = model_files(args, _needed(latents))
    progress = Progress()
    open_decoder: Any = args.open_pipeline or ClipDecoder.from_files
    device = device_of(args)
    decoder = open_decoder(files, device=device, say=progress.say, **types_of(args), **placement_of(args, device))
    progress.begin("Decoding", "pass")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        decoder.save(latents, target, callback=progress.step)
    finally:
        progress.end()
    for line in report_lines(latents):
        progress.say(line)
    print(target)
    return 0


def _needed(latents: Any) -> list[str]:
    """The VAEs that a clip is decoded by; a sound that was given in full needs none."""
    parts = [part for part in VAES if getattr(latents, part) is not None]
    if latents.originals is not None and latents.originals.has_all_sound:
        parts.remove("audio")
    return [VAES[part] for part in parts]


def _name(path: Path) -> str:
    """What a clip of these latents is called: as the file is, without what follows a clip's name there."""
    name = path.name.removesuffix(LATENTS) if path.name.endswith(LATENTS) else path.stem
    return name.removesuffix(".mp4").removesuffix(".wav")


COMMANDS = [Command("decode", "make a clip of its latents", DESCRIPTION, EXAMPLES, add_options, run)]
