"""`nava extend`: a finished clip that goes on."""

from __future__ import annotations

import argparse
from pathlib import Path

from .decoding import add_decoding_options
from .generate import add_voice_option, prompt_job
from .given import (
    add_long_options,
    add_sound_options,
    add_source_options,
    add_source_size,
    checked_source,
    given_files,
    make_long,
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
    positive,
)
from .outputs import clip_target
from .progress import Progress

DESCRIPTION = """Lets a finished clip go on: what is made begins with its last frame, in segments as of `nava generate`,
and both together are written. SOURCE is a clip's latents, which come out without a loss, or a video file, which is
brought to 24 frames a second and to a size that the model knows. The clip's path goes to stdout, all else to stderr."""

EXAMPLES = """examples:
  nava extend pier.latents.safetensors "She turns and walks away." --seconds 8 --models models --out pier_long.mp4
  nava extend holiday.mp4 "The waves roll on." --then "Night falls." --seconds 18 --models models --hold colour
  nava extend her.mp4 "She says <S>Goodbye.<E>" --seconds 5 --models models --voice her.wav"""


def add_options(parser: argparse.ArgumentParser) -> None:
    add_source_options(parser)
    parser.add_argument("--seconds", type=positive, default=6.0, help="how much is added (default: 6)")
    add_source_size(parser, "that of the latents; of a video the trained size nearest to its proportions")
    add_voice_option(parser)
    parser.add_argument("--out", type=Path, metavar="FILE", help="the .mp4 to write (default: SOURCE_longer.mp4 here)")
    add_long_options(parser)
    add_sound_options(parser)
    add_sampling_options(parser)
    add_model_options(parser)
    add_decoding_options(parser)
    add_parallel_options(parser)


def run(args: argparse.Namespace) -> int:
    if not args.segment:
        raise UsageError("--segment: what a clip is extended by is made in segments: give their seconds, up to 60.")
    source = checked_source(args)
    job = prompt_job(args, given=lambda: given_files(args), then=args.then)
    target = clip_target(args, ".mp4", f"{source_name(source)}_longer")
    files = model_files(args)
    progress = Progress()
    for note in ignored_options(args):
        progress.say(note)
    request = job.long_request()
    for name in ("mode", "image", "size_from_image", "width", "height", "image_scale"):
        request.pop(name, None)
    if args.size is not None:
        request |= {"width": args.size[0], "height": args.size[1], "size_from_image": False}
    pipeline = pipeline_opener(args, files, progress.say)()
    make_long(args, target, progress, lambda **how: pipeline.extend(target, source, **request, **how))
    print(target)
    return 0


COMMANDS = [Command("extend", "let a finished clip go on", DESCRIPTION, EXAMPLES, add_options, run)]
