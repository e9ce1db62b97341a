"""`nava refine`: a second pass over a finished clip's picture."""

from __future__ import annotations

import argparse
from pathlib import Path

from .decoding import add_decoding_options
from .generate import add_latents_option, add_voice_option, finish, prompt_job
from .given import add_source_options, add_source_size, checked_source, share, source_name
from .options import (
    Command,
    add_model_options,
    add_parallel_options,
    add_sampling_options,
    ignored_options,
    model_files,
    pipeline_opener,
)
from .outputs import clip_target, latents_target
from .progress import Progress

DESCRIPTION = """Makes the picture of a finished clip a second time, from a noise level part of the way, at its own or
another size; its sound is kept as it is. SOURCE is a clip's latents, or a video file of up to 10 s, which is brought to
24 frames a second. The clip's path goes to stdout, all else to stderr."""

EXAMPLES = """examples:
  nava refine draft.latents.safetensors "A lighthouse at dusk." --denoise 0.4 --models models --out final.mp4
  nava refine draft.mp4 "A lighthouse at dusk." --denoise 0.4 --size landscape --models models"""


def add_options(parser: argparse.ArgumentParser) -> None:
    add_source_options(parser)
    parser.add_argument(
        "--denoise",
        type=share,
        default=0.4,
        metavar="PART",
        help="the part of the run that is made anew: less stays closer to the clip (default: 0.4)",
    )
    add_source_size(parser, "that of the latents; of a video the trained size nearest to its proportions")
    add_voice_option(parser)
    parser.add_argument("--out", type=Path, metavar="FILE", help="the file to write (default: SOURCE_refined.mp4 here)")
    add_latents_option(parser)
    add_sampling_options(parser)
    add_model_options(parser)
    add_decoding_options(parser)
    add_parallel_options(parser)
    parser.set_defaults(seconds=None)


def run(args: argparse.Namespace) -> int:
    source = checked_source(args)
    job = prompt_job(args)
    target = clip_target(args, ".mp4", f"{source_name(source)}_refined")
    kept = latents_target(args, target)
    files = model_files(args)
    progress = Progress()
    for note in ignored_options(args):
        progress.say(note)
    pipeline = pipeline_opener(args, files, progress.say)()
    return finish(
        pipeline,
        lambda **how: pipeline.refine(source, denoise=args.denoise, size=args.size, **job.again_request(), **how),
        target,
        kept,
        progress,
    )


COMMANDS = [Command("refine", "a second pass over a clip's picture", DESCRIPTION, EXAMPLES, add_options, run)]
