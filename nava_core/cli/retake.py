"""`nava retake`: a span of a finished clip made again."""

from __future__ import annotations

import argparse
from typing import Any

from .again import add_again_options, make_again
from .given import SHOWN, add_shown_option, add_source_options, checked_source, region, seconds
from .options import Command, UsageError

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
    add_again_options(parser, "retake")


def run(args: argparse.Namespace) -> int:
    from ..pipeline import ClipLatents, Retake, is_latents_file

    source = checked_source(args)
    try:
        span = Retake(args.start, args.end, args.part, args.region)
    except ValueError as error:
        raise UsageError(str(error)) from None
    size = {}
    if args.size is not None:
        size = {"width": args.size[0], "height": args.size[1], "size_from_image": False}

    def make(pipeline: Any, **request: Any) -> Any:
        return pipeline.retake(source, span=span, shown=SHOWN[args.shown], **size, **request)

    suffix = ClipLatents.load(source).suffix if is_latents_file(source) else ".mp4"
    return make_again(args, source, suffix, "retake", make)


COMMANDS = [Command("retake", "make a span of a clip again", DESCRIPTION, EXAMPLES, add_options, run)]
