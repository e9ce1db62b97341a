"""The options on given parts of a clip, and on long clips and finished ones, which several commands share."""

from __future__ import annotations

import argparse
import os
import re
from pathlib import Path
from typing import Any

from .options import UsageError, number, size, writable_folder

RESTS = ("silence", "generated")
SHOWN = {"clean": "clean", "matched-noise": "matched noise"}
HOLDS = {"nothing": "nothing", "colour": "colour", "colour+sharpness": "colour and sharpness"}
AT = re.compile(r"([^=]+)=(.+)", re.DOTALL)
REGION = re.compile(r"(\d{1,5}),(\d{1,5}),(\d{1,5}),(\d{1,5})")


def seconds(text: str) -> float:
    """Seconds from 0 on."""
    value = number(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"it must be 0 or more, got {text}")
    return value


def share(text: str) -> float:
    value = number(text)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"it must be above 0 and up to 1, got {text}")
    return value


def region(text: str) -> tuple[int, int, int, int]:
    found = REGION.fullmatch(text)
    if not found:
        raise argparse.ArgumentTypeError(f"{text!r} is no region: give X,Y,WIDTH,HEIGHT in pixels")
    return tuple(int(each) for each in found.groups())


def picture_at(text: str) -> tuple[float, str]:
    """SECONDS=FILE"""
    found = AT.fullmatch(text)
    if not found:
        raise argparse.ArgumentTypeError(f"{text!r} does not say when: give SECONDS=FILE")
    return seconds(found[1]), found[2]


# --- sound and pictures ------------------------------------------------------------------------------------------


def add_given_options(parser: argparse.ArgumentParser) -> None:
    """What of a new clip is given."""
    add_sound_options(parser)
    group = parser.add_argument_group("given picture")
    group.add_argument(
        "--video", metavar="FILE", help="a video of which the picture is kept: sound is made for it (as long as that)"
    )
    group.add_argument("--last-image", metavar="FILE", help="the last frame")
    group.add_argument(
        "--image-at",
        type=picture_at,
        action="append",
        default=[],
        metavar="SECONDS=FILE",
        help="a picture at a time in between, as often as needed; it is held for four frames",
    )
    add_shown_option(group)


def add_sound_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("given sound")
    group.add_argument(
        "--sound", metavar="FILE", help="speech or music that the clip has as it is; the picture is made to it"
    )
    group.add_argument("--sound-start", type=seconds, default=0.0, metavar="S", help="where in the recording to begin")
    group.add_argument("--sound-at", type=seconds, default=0.0, metavar="S", help="where in the clip it begins")
    group.add_argument(
        "--sound-rest",
        choices=RESTS,
        default=RESTS[0],
        help="what the clip has where the recording is over (default: silence)",
    )


def add_shown_option(group: Any) -> None:
    group.add_argument(
        "--shown",
        choices=list(SHOWN),
        default="clean",
        help="how the network sees given parts other than the first frame: as they are, or noised to the level of the "
        "rest (default: clean)",
    )


def given_files(args: argparse.Namespace) -> Any:
    """``GivenFiles`` of the options. Raises ValueError for a file that is not there."""
    from ..jobs import GivenFiles, existing_file

    here = Path.cwd()

    def found(name: str, what: str) -> Path | None:
        value = getattr(args, name, None)
        return None if value is None else existing_file(value, what, here)

    pictures = [(time, existing_file(name, "image", here)) for time, name in getattr(args, "image_at", ())]
    last = found("last_image", "image")
    return GivenFiles(
        found("sound", "sound"),
        args.sound_start,
        args.sound_at,
        args.sound_rest,
        found("video", "video"),
        (*pictures, *(() if last is None else (("end", last),))),
        SHOWN[getattr(args, "shown", "clean")],
    )


# --- long clips --------------------------------------------------------------------------------------------------


def add_segment_options(parser: argparse.ArgumentParser) -> None:
    """How long clips are made, which a batch takes for all its lines."""
    group = parser.add_argument_group("longer clips")
    group.add_argument(
        "--segment",
        type=seconds,
        default=10.0,
        metavar="S",
        help="clips that are longer are made in segments of at most so many seconds, each going on from the last frame "
        "of the one before; 0: all in one pass (default: 10)",
    )
    group.add_argument(
        "--hold",
        choices=list(HOLDS),
        default="nothing",
        help="what the frame that a segment begins with is given of the first one, against drift (default: nothing)",
    )


def add_long_options(parser: argparse.ArgumentParser) -> None:
    """As :func:`add_segment_options`, and what belongs to one clip."""
    add_segment_options(parser)
    parser.add_argument(
        "--then",
        action="append",
        default=[],
        metavar="PROMPT",
        help="the prompt of the next segment, as often as needed; the last one holds for the rest",
    )
    parser.add_argument(
        "--state",
        type=Path,
        metavar="FOLDER",
        help="keep what is finished of a long clip in this folder: the same command goes on with it after an "
        "interruption (default: a hidden folder beside the clip until it is whole)",
    )


def make_long(args: argparse.Namespace, target: Path, progress: Any, make: Any) -> None:
    """Have a long clip made by ``make(state=..., anew=..., callback=...)``, and say how its prompts were used."""
    from ..pipeline.segment_state import StateError, holds_state
    from ..pipeline.segments import default_state

    state = None if args.state is None else writable_folder(args.state, "--state")
    target.parent.mkdir(parents=True, exist_ok=True)
    progress.begin("Denoising")
    try:
        made = make(state=state, anew=args.overwrite, callback=progress.step)
    except (Exception, KeyboardInterrupt) as error:
        progress.end()
        if not isinstance(error, StateError) and holds_state(state or default_state(target)):
            progress.say("The clip is not whole yet. The same command goes on with what is finished of it.")
        raise
    finally:
        progress.end()
    for line in made.report.splitlines():
        progress.say(line)


# --- finished clips ----------------------------------------------------------------------------------------------

SOURCE_HELP = (
    "the clip: the latents that --save-latents kept (a .safetensors file), without a loss; or a video file, of which "
    "the frames are encoded again"
)


def add_source_options(parser: argparse.ArgumentParser) -> None:
    """SOURCE, PROMPT and what becomes of them."""
    parser.add_argument("source", type=Path, metavar="SOURCE", help=SOURCE_HELP)
    parser.add_argument("prompt", nargs="?", help="the prompt; - reads it from stdin")
    parser.add_argument("--prompt-file", type=Path, metavar="FILE", help="read the prompt from a UTF-8 text file")
    parser.add_argument("--overwrite", action="store_true", help="replace files that are there")


def add_source_size(parser: argparse.ArgumentParser, default: str) -> None:
    parser.add_argument("--size", type=size, metavar="WxH", help=f"WIDTHxHEIGHT of the clip (default: {default})")


def checked_source(args: argparse.Namespace) -> Path:
    """SOURCE, absolute. Raises UsageError where it is not there."""
    path = Path(os.path.abspath(args.source))
    if not path.is_file():
        raise UsageError(f"There is no file {args.source}: give a clip's latents or a video.")
    return path


def source_name(path: Path) -> str:
    """What a source is called, without what follows a clip's name in that of its latents."""
    from .outputs import LATENTS

    name = path.name.removesuffix(LATENTS) if path.name.endswith(LATENTS) else path.stem
    return name.removesuffix(".mp4").removesuffix(".wav")
