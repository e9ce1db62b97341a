"""What commands share that make a finished clip, or a part of it, again: their options, and how they run."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .decoding import add_decoding_options
from .generate import add_latents_option, add_voice_option, finish, prompt_job
from .given import add_source_size, source_name
from .options import (
    add_model_options,
    add_parallel_options,
    add_sampling_options,
    ignored_options,
    model_files,
    pipeline_opener,
)
from .outputs import clip_target, latents_target
from .progress import Progress


def add_again_options(parser: argparse.ArgumentParser, name: str) -> None:
    """All but SOURCE and what of it is made; ``name``: what the clip's file is called after it."""
    add_source_size(parser, "that of the latents; of a video the trained size nearest to its proportions")
    add_voice_option(parser)
    parser.add_argument("--out", type=Path, metavar="FILE", help=f"the file to write (default: SOURCE_{name}.mp4 here)")
    add_latents_option(parser)
    add_sampling_options(parser)
    add_model_options(parser)
    add_decoding_options(parser)
    add_parallel_options(parser)
    parser.set_defaults(seconds=None)


def make_again(args: argparse.Namespace, source: Path, suffix: str, name: str, make: Callable[..., Any]) -> int:
    """Runs the command: ``make(pipeline, prompt=..., callback=..., ...)`` gives the clip's latents."""
    job = prompt_job(args)
    target = clip_target(args, suffix, f"{source_name(source)}_{name}")
    kept = latents_target(args, target)
    files = model_files(args)
    progress = Progress()
    for note in ignored_options(args):
        progress.say(note)
    pipeline = pipeline_opener(args, files, progress.say)()
    return finish(pipeline, lambda **how: make(pipeline, **job.again_request(), **how), target, kept, progress)
