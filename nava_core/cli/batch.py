"""`nava batch`: a clip for every line of a JSON-lines file."""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from .options import (
    MODEL_ROLES,
    Command,
    UsageError,
    add_clip_options,
    add_model_options,
    defaults_of,
    model_files,
    model_names,
    pipeline_opener,
    whole_number,
    writable_folder,
)
from .progress import Progress, format_duration

SHOWN_PROBLEMS = 10

DESCRIPTION = """A clip for every line of FILE, the models being loaded once. A line is a JSON object:

  prompt (or text, txt)       the prompt, speech written as <S>words<E> (the one key that must be there)
  image_path                  the first frame
  spk_wavs                    list of reference voices: one for all spans, or one a span, null (or "None") for none
  seconds, width, height      as --seconds and --size
  image_scale                 as --image-scale
  seed, steps, negative       as the options of those names (negative: a text, "default" or "zero")
  gen_turn                    as --gen-turn
  preset                      as --preset
  audio_only, video_only      true: a WAV of sound alone, an MP4 of picture alone
  id (or name)                the clip's file name without ending; without it, line number and a hash of the content

In a .txt a line is a prompt, with " image_path:" and the first frame behind it where there is one; in a .lst it is
id|words of the recording|recording|words to say, and a WAV of these words in the recording's voice and pace is made.

Files are sought beside FILE, then in the working directory. Options below hold for lines that say nothing else. A line
that cannot be used or fails is recorded and the rest goes on. Run the same command again to go on after an
interruption or a repair: what is finished is skipped, a changed line is made again. A line with the same content as an
earlier one is not made twice: it refers to that clip, or gets a link to it under its own id. The models, --device and
--dtype are not part of a line's content: clips of other models belong in another folder, or --remake.

FOLDER gets the clips, report.jsonl (every line's fate as it happens) and summary.json (all lines of the last run)."""

EXAMPLES = """examples:
  nava batch clips.jsonl --out clips --models models
  nava batch clips.jsonl --check                      only say which lines cannot be used
  nava batch clips.jsonl --out drafts --models models --steps 20 --size small

  {"id": "harbour", "prompt": "A harbour at dawn, gulls cry.", "seconds": 6, "seed": 7}
  {"prompt": "She says <S>Come in!<E>", "image_path": "her.png", "spk_wavs": ["her.wav"]}"""


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", type=Path, metavar="FILE", help="JSON lines, UTF-8")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="folder for the clips and the report")
    parser.add_argument("--check", action="store_true", help="look through FILE and make nothing")
    parser.add_argument(
        "--keep-loaded",
        action=argparse.BooleanOptionalAction,
        help="keep all models in RAM between clips instead of reading them again (default: where they fit)",
    )
    parser.add_argument(
        "--gen-turn",
        type=whole_number(1, 1000),
        default=1,
        metavar="N",
        help="takes of every line: ID-0, ID-1 ..., with the line's seed, the next one ... (1)",
    )
    parser.add_argument("--remake", action="store_true", help="make all clips, finished ones too")
    add_clip_options(parser)
    add_model_options(parser)


def run(args: argparse.Namespace) -> int:
    from ..batch import check_batch, run_batch

    if not args.file.is_file():
        raise UsageError(f"There is no file {args.file}: give a file of JSON lines.")
    if args.out is None and not args.check:
        raise UsageError("Say where the clips go: --out FOLDER.")
    defaults = replace(defaults_of(args), gen_turn=args.gen_turn)
    check = check_batch(args.file, defaults)
    if not check.lines:
        raise UsageError(f"{args.file} has no lines: a line is one clip.")
    progress = Progress()
    _show_problems(check, progress, check.lines if args.check else SHOWN_PROBLEMS)
    if args.check:
        for number, note in check.notes:
            progress.say(f"  line {number}: note: {note}")
        print(f"{check.lines - len(check.problems)} of {_lines(check.lines)} can be used.")
        return 1 if check.problems else 0
    folder = writable_folder(args.out)
    files = None if len(check.problems) == check.lines else model_files(args)
    watcher = _Watcher(progress)
    result = None
    try:
        result = run_batch(
            args.file,
            folder,
            pipeline_opener(args, files, progress.status, keep_loaded=_keep_loaded(args, files)),
            defaults,
            models=model_names(files) if files else None,
            remake=args.remake,
            watcher=watcher,
            debug=args.debug,
        )
    finally:
        progress.end()
        if result is None and watcher.counts:
            print(f"Not finished: {watcher.summary(check.lines)}. Run the same command again to go on.", flush=True)
    _print_summary(result, watcher, check.lines, folder)
    return 1 if result.failures else 0


def _show_problems(check: Any, progress: Progress, most: int) -> None:
    if not check.problems:
        return
    progress.say(f"{len(check.problems)} of {_lines(check.lines)} cannot be used:")
    for number, problem in check.problems[:most]:
        progress.say(f"  line {number}: {problem}")
    if len(check.problems) > most:
        progress.say(f"  and {len(check.problems) - most} more, see the report")


def _keep_loaded(args: argparse.Namespace, files: Any) -> bool:
    """As asked for; else whether all models take no more than half of the memory that is free."""
    if args.keep_loaded is not None or files is None:
        return bool(args.keep_loaded)
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration, ValueError):
        return False
    paths = [getattr(files, role) for role in MODEL_ROLES if role != "tokenizer"]
    return sum(path.stat().st_size for path in paths if path is not None) <= free / 2


class _Watcher:
    """Shows a batch on the terminal; has the methods of the core's Watcher."""

    def __init__(self, progress: Progress) -> None:
        self.progress = progress
        self.start = time.monotonic()
        self.counts: dict[str, int] = {}
        self.making = 0.0  # seconds

    def clip(self, line: int, done: int, total: int, job: Any) -> None:
        label = f"Line {line} ({done + 1} of {total}"
        if self.counts.get("made"):
            each = self.making / self.counts["made"]
            label += f", about {format_duration(each * (total - done))} in all"
        self.progress.begin(f"{label})")

    def step(self, step: int, steps: int, *rest: Any) -> None:
        self.progress.step(step, steps, *rest)

    def outcome(self, outcome: Any) -> None:
        self.counts[outcome.status] = self.counts.get(outcome.status, 0) + 1
        for warning in outcome.warnings if outcome.status in ("made", "failed") else ():
            self.progress.say(f"{_place(outcome)}: note: {warning}")
        if outcome.status == "made":
            self.making += outcome.seconds
            self.progress.say(f"{_place(outcome)}: {outcome.file} in {format_duration(outcome.seconds)}")
        elif outcome.status == "failed":
            self.progress.say(f"{_place(outcome)}: failed: {outcome.error}")

    def note(self, text: str) -> None:
        self.progress.say(text.rstrip())

    def summary(self, total: int) -> str:
        said = {"made": "made", "skipped": "finished before", "duplicate": "duplicates", "failed": "failed"}
        parts = [f"{self.counts[status]} {text}" for status, text in said.items() if status in self.counts]
        return f"{_lines(total)}: {', '.join(parts)}"


def _print_summary(result: Any, watcher: _Watcher, total: int, folder: Path) -> None:
    took = format_duration(time.monotonic() - watcher.start)
    print(f"{watcher.summary(total)}, in {took}.")
    for failure in result.failures[:SHOWN_PROBLEMS]:
        print(f"  {_place(failure).lower()}: {failure.error}")
    if len(result.failures) > SHOWN_PROBLEMS:
        print(f"  and {len(result.failures) - SHOWN_PROBLEMS} more")
    print(f"Clips, report.jsonl and summary.json: {folder}")
    sys.stdout.flush()


def _place(outcome: Any) -> str:
    return f"Line {outcome.line}" + ("" if outcome.take is None else f", take {outcome.take}")


def _lines(count: int) -> str:
    return f"{count:,} line{'' if count == 1 else 's'}"


COMMANDS = [Command("batch", "make a clip for every line of a file", DESCRIPTION, EXAMPLES, add_options, run)]
