"""The command line: `python -m nava_core`, or `nava` where the package is installed.

Exit codes: 0 all went well; 1 the run failed, or some lines of a batch or files of an inspection did; 2 the command
itself is wrong; 130 interrupted (Ctrl-C, or a request to end).
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NoReturn

from ..explain import explain
from . import batch, decode, demo, extend, files, generate, refine, report, retake, rewrite, voice
from .options import UsageError

OK, FAILED, USAGE, INTERRUPTED = 0, 1, 2, 130

DESCRIPTION = """NAVA without a host: video and its sound from one prompt, from files alone.

  nava demo                                   does it run here? A clip of noise from small models made on the spot
  nava inspect models/*                       what is a file, would it load, how much memory does it take
  nava generate "..." --models models         one clip
  nava rewrite "..." --server URL             a draft becomes the dense prompt that NAVA wants
  nava batch clips.jsonl --out clips --models models      many clips
  nava extend clip.mp4 "..." --seconds 8 --models models  a finished clip that goes on
  nava retake clip.mp4 "..." --from 2 --to 3 --models models      a span of it made again
  nava refine clip.mp4 "..." --denoise 0.4 --models models        a second pass over its picture
  nava decode clip.latents.safetensors --models models    a clip from latents that were kept
  nava report clip.mp4                        how loud, in time, in the right voice; what is broken
  nava voice make anna.wav --models models    a voice that stays: kept in a small file, listed, blended with others
  nava convert NAVA.safetensors NAVA_fp8.safetensors      a backbone in another type

`nava COMMAND --help` has the options and examples of each."""

EXIT_CODES = """exit codes: 0 all went well; 1 the run failed, or some lines or files did; 2 the command is wrong;
130 interrupted"""


class Parser(argparse.ArgumentParser):
    """Complains in one sentence instead of a page of usage."""

    def error(self, message: str) -> NoReturn:
        self.exit(USAGE, f"{self.prog}: {message[:1].upper()}{message[1:]}. See {self.prog} --help.\n")


def make_parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="nava",
        description=DESCRIPTION,
        epilog=EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for module in (generate, batch, rewrite, extend, retake, refine, decode, report, voice, files, demo):
        for command in module.COMMANDS:
            added = commands.add_parser(
                command.name,
                help=command.help,
                description=command.description,
                epilog=f"{command.examples}\n\n{EXIT_CODES}",
                formatter_class=argparse.RawDescriptionHelpFormatter,
            )
            command.options(added)
            added.add_argument("--debug", action="store_true", help="show the whole traceback of an error")
            added.set_defaults(run=command.run)
    return parser


def main(argv: Sequence[str] | None = None, *, open_pipeline: Callable[..., Any] | None = None) -> int:
    """Run a command; returns the exit code. ``open_pipeline`` takes the place of ``NavaPipeline.from_files``."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(AttributeError, ValueError):
            stream.reconfigure(errors="backslashreplace")
    try:
        args = make_parser().parse_args(argv)
    except SystemExit as stop:
        return int(stop.code or 0)
    args.open_pipeline = open_pipeline
    try:
        with _ending_like_an_interrupt():
            return args.run(args)
    except KeyboardInterrupt:
        print("Interrupted: nothing half-written was left.", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # the reader of our output left
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    except Exception as error:
        if args.debug:
            traceback.print_exc()
        print(f"nava {args.command}: {explain(error)}", file=sys.stderr)
        return USAGE if isinstance(error, UsageError) else FAILED


@contextlib.contextmanager
def _ending_like_an_interrupt() -> Iterator[None]:
    """SIGTERM as Ctrl-C: what is open is cleaned up, where else the process would just be gone."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def end(*_: Any) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
