"""`nava refine`: a second pass over a finished clip's picture."""

from __future__ import annotations

import argparse
from typing import Any

from .again import add_again_options, make_again
from .given import add_source_options, checked_source, share
from .options import Command

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
    add_again_options(parser, "refined")


def run(args: argparse.Namespace) -> int:
    source = checked_source(args)

    def make(pipeline: Any, **request: Any) -> Any:
        return pipeline.refine(source, denoise=args.denoise, size=args.size, **request)

    return make_again(args, source, ".mp4", "refined", make)


COMMANDS = [Command("refine", "a second pass over a clip's picture", DESCRIPTION, EXAMPLES, add_options, run)]
