"""`nava retake`: a span of a finished clip made again."""

from __future__ import annotations

import argparse
from pathlib import Path

from .decoding import add_decoding_options
from .generate import add_latents_option, add_voice_option, finish, prompt_job
from .given import (
    SHOWN,
    add_shown_option,
    add_source_options,
    add_source_size,
    checked_source,
    region,
    seconds,
    source_name,
)
from .options import (
    Command,
    UsageError,
    add_model_options,
    add_parallel_options,
    add_sampling_options,
    ignored_options,
    model_files,
    pipeline_opener,
)
from .outputs import clip_target, latents_target
from .progress import Progress

DESCRIPTION = """Makes a span of a finished clip again, of the picture, the sound or both, or a region of the picture.
All frames and samples that are kept come out as they are in SOURCE; a span is widened to whole latents, of four frames
and of 1/25 s of sound, a region to squares of 16 pixels, into which it fades within 8. SOURCE is a clip's latents, or a
video file of up to 10 s, which is brought to 24 frames a second and to a size that the model knows. The clip's path
goes to stdout, all else to stderr."""

EXAMPLES = """examples:
  nava retake pier.latents.safetensors "She laughs." --from 2 --to 3.5 --models models --out pier_2.mp4
  nava retake pier.mp4 "A gull cries." --from 1 --to 2 --part sound --models models --seed 8
  nava retake pier.mp4 "A red boat." --from 0 --to 6 --part picture --region 640,352,320,160 --models models"""


def add_options(parser: argparse.ArgumentParser) -> None:
    add_source_options(parser)
    group = parser.add_argument_group("what is made again")
    group.add_argument("--from", dest="start", type=seconds, required=True, metavar="S", help="where the span begins")
    group.add_argument("--to", dest="end", type=seconds, required=True, metavar="S", help="where it ends")
    group.add_argument("--part", choices=["both", "picture", "sound"], default="both", help="(default: both)")
    group.add_argument("--region", type=region, metavar="X,Y,W,H", help="of the picture only this, in pixels")
    add_shown_option(group)
    add_source_size(parser, "that of the latents; of a video the trained size nearest to its proportions")
    add_voice_option(parser)
    parser.add_argument("--out", type=Path, metavar="FILE", help="the file to write (default: SOURCE_retake.mp4 here)")
    add_latents_option(parser)
    add_sampling_options(parser)
    add_model_options(parser)
    add_decoding_options(parser)
    add_parallel_options(parser)
    parser.set_defaults(seconds=None)


def run(args: argparse.Namespace) -> int:
    from ..pipeline import ClipLatents, Retake, is_latents_file

    source = checked_source(args)
    try:
        span = Retake(args.start, args.end, args.part, args.region)
    except ValueError as error:
        raise UsageError(str(error)) from None
    job = prompt_job(args)
    suffix = ClipLatents.load(source).suffix if is_latents_file(source) else ".mp4"
    target = clip_target(args, suffix, f"{source_name(source)}_retake")
    kept = latents_target(args, target)
    files = model_files(args)
    progress = Progress()
    for note in ignored_options(args):
        progress.say(note)
    request = job.again_request()
    if args.size is not None:
        request |= {"width": args.size[0], "height": args.size[1], "size_from_image": False}
    pipeline = pipeline_opener(args, files, progress.say)()
    shown = SHOWN[args.shown]
    return finish(
        pipeline,
        lambda **how: pipeline.retake(source, span=span, shown=shown, **request, **how),
        target,
        kept,
        progress,
    )


COMMANDS = [Command("retake", "make a span of a clip again", DESCRIPTION, EXAMPLES, add_options, run)]
