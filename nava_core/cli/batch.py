"""`nava batch`: a clip for every line of a JSON-lines file."""

from __future__ import annotations

import argparse
import os
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from .decoding import add_decoding_options
from .given import add_segment_options
from .options import (
    MODEL_ROLES,
    Command,
    UsageError,
    add_clip_options,
    add_model_options,
    add_parallel_options,
    defaults_of,
    ignored_options,
    model_files,
    model_names,
    parallel_of,
    pipeline_opener,
    portable_opener,
    whole_number,
    writable_folder,
)
from .progress import Progress, format_duration
from .rewriting import add_chat_options, chat_backend

SHOWN_PROBLEMS = 10
WORKER_DEVICES = {"auto": (None, None), "cuda": (1, "cuda"), "cpu": (0, "cpu")}  # GPUs of a worker, and its device

DESCRIPTION = """A clip for every line of FILE, the models being loaded once. A line is a JSON object:

  prompt (or text, txt)       the prompt, speech written as <S>words<E> (the one key that must be there)
  image_path                  the first frame
  spk_wavs                    list of reference voices: one for all spans, or one a span, null (or "None") for none;
                              recordings, or files of `nava voice`
  seconds, width, height      as --seconds and --size
  image_scale                 as --image-scale
  seed, steps, negative       as the options of those names (negative: a text, "default" or "zero")
  gen_turn                    as --gen-turn
  save_latents                true: as --save-latents
  preset                      as --preset
  sound_path                  a sound that the clip has as it is, as long as it without seconds; with sound_start,
                              sound_at and sound_rest as the options of `nava generate`
  video_path                  a video of which the picture is kept and sound is made, as long as it without seconds
  last_image_path, images_at  the last frame; others as {"2.5": "file.png"}, by their seconds
  shown                       "clean" or "matched noise", as --shown of `nava generate`
  then                        list of the prompts of the next segments of a longer clip
  segment, hold               as --segment and --hold
  audio_only, video_only      true: a WAV of sound alone, an MP4 of picture alone
  id (or name)                the clip's file name without ending; without it, line number and a hash of the content

In a .txt a line is a prompt, with " image_path:" and the first frame behind it where there is one; in a .lst it is
id|words of the recording|recording|words to say, and a WAV of these words in the recording's voice and pace is made.

Files are sought beside FILE, then in the working directory. Options below hold for lines that say nothing else. A line
that cannot be used or fails is recorded and the rest goes on. Run the same command again to go on after an
interruption or a repair: what is finished is skipped, a changed line is made again, and a clip of which the latents
were kept is finished from them; one of several segments goes on after the last stage that was finished. A line with
the same content as an earlier one is not made twice: it refers to that clip, or gets a link to it under its own id. A
--lora holds for all lines and is part of their content. The models, --device and --dtype are not: clips of other
models belong in another folder, or --remake.

FOLDER gets the clips, report.jsonl (every line's fate as it happens) and summary.json (all lines of the last run)."""

EXAMPLES = """examples:
  nava batch clips.jsonl --out clips --models models
  nava batch clips.jsonl --check                      only say which lines cannot be used
  nava batch clips.jsonl --out drafts --models models --steps 20 --size small
  nava batch clips.jsonl --out clips --models models --workers 4            on four GPUs of this machine
  nava batch clips.jsonl --out clips --models models --workers 2 --parallel 4   two clips at a time, on four GPUs each
  nava batch clips.jsonl --out clips --models models --cluster 10.0.0.1:6379    on all GPUs of a Ray cluster

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
    parser.add_argument(
        "--save-latents",
        action="store_true",
        help="keep every clip's latents beside it, from before they are decoded; `nava decode` makes clips of them",
    )
    parser.add_argument("--remake", action="store_true", help="make all clips, finished ones too")
    workers = parser.add_argument_group("several GPUs or machines (needs the package ray)")
    workers.add_argument(
        "--workers",
        type=whole_number(1, 4096),
        metavar="N",
        help="make N clips at a time: a GPU each (with --parallel so many each), or with --device cpu a process",
    )
    workers.add_argument(
        "--cluster",
        nargs="?",
        const="",
        metavar="HOST:PORT",
        help="of a Ray cluster that this machine is a node of (default: NAVA_RAY_ADDRESS or RAY_ADDRESS); without "
        "--workers on all its GPUs. Every machine needs this pack, and the models under the same path",
    )
    rewriting = parser.add_argument_group("rewriting (see nava rewrite --help)")
    rewriting.add_argument(
        "--rewrite",
        action="store_true",
        help="have a chat model rewrite every line's prompt before the first clip is made; rewrites.jsonl in FOLDER "
        "remembers what it wrote, so that a rerun does not ask again (remove it to have all written anew)",
    )
    add_chat_options(rewriting)
    add_clip_options(parser)
    add_segment_options(parser)
    add_model_options(parser)
    add_decoding_options(parser)
    add_parallel_options(parser)


def run(args: argparse.Namespace) -> int:
    from ..batch import check_batch, run_batch
    from ..lora_merge import LoraMerge, lora_fingerprint

    if not args.file.is_file():
        raise UsageError(f"There is no file {args.file}: give a file of JSON lines.")
    if args.out is None and not args.check:
        raise UsageError("Say where the clips go: --out FOLDER.")
    defaults = replace(defaults_of(args), gen_turn=args.gen_turn, save_latents=args.save_latents)
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
    loras = LoraMerge(args.lora, files.backbone) if files else None
    for note in [*ignored_options(args), *(loras.notes if loras else ())]:
        progress.say(note)
    defaults = replace(defaults, loras=tuple((lora_fingerprint(path), value) for path, value in args.lora if value))
    makers = {**_makers(args, files, progress), "rewriter": _rewriter(args, files)}
    watcher = _Watcher(progress, several="make_runner" in makers)
    result = None
    try:
        result = run_batch(
            args.file,
            folder,
            defaults=defaults,
            models=model_names(files) if files else None,
            remake=args.remake,
            watcher=watcher,
            debug=args.debug,
            **makers,
        )
    finally:
        progress.end()
        if result is None and watcher.counts:
            print(f"Not finished: {watcher.summary(check.lines)}. Run the same command again to go on.", flush=True)
    _print_summary(result, watcher, check.lines, folder)
    return 1 if result.failures else 0


def _rewriter(args: argparse.Namespace, files: Any) -> Any:
    """What rewrites the lines' prompts; None where they stay as they are. Raises UsageError."""
    if not args.rewrite:
        if args.server is not None or args.server_model is not None or args.chat_model is not None:
            raise UsageError("--server, --server-model and --chat-model are for --rewrite: add it, or leave them out.")
        return None
    from ..components.text_encoder import load_tokenizer
    from ..rewrite.batch import BatchRewriter

    settings = {"language": args.language, "temperature": args.temperature, "max_tokens": args.max_tokens}
    if files is not None:
        settings["tokenizer"] = load_tokenizer(files.text_encoder, files.tokenizer)
    return BatchRewriter(chat_backend(args), **settings)


def _show_problems(check: Any, progress: Progress, most: int) -> None:
    if not check.problems:
        return
    progress.say(f"{len(check.problems)} of {_lines(check.lines)} cannot be used:")
    for number, problem in check.problems[:most]:
        progress.say(f"  line {number}: {problem}")
    if len(check.problems) > most:
        progress.say(f"  and {len(check.problems) - most} more, see the report")


def _makers(args: argparse.Namespace, files: Any, progress: Progress) -> dict[str, Any]:
    """What makes the clips, as ``run_batch`` takes it: this process, or workers. Raises UsageError."""
    if args.workers is None and args.cluster is None:
        keep_loaded = _keep_loaded(args, files)
        return {"open_pipeline": pipeline_opener(args, files, progress.status, keep_loaded=keep_loaded)}
    from ..parallel.batch import WorkersRunner
    from ..parallel.cluster import configured_address

    address = None if args.cluster is None else args.cluster or configured_address()
    if args.cluster is not None and not address:
        raise UsageError("--cluster: give the address, HOST:PORT, or set NAVA_RAY_ADDRESS.")
    if args.device not in WORKER_DEVICES:
        raise UsageError(
            f"--device {args.device}: workers take a GPU each, so say auto, cuda or cpu, and which GPUs by "
            "CUDA_VISIBLE_DEVICES."
        )
    gpus, device = WORKER_DEVICES[args.device]
    paths = {role: getattr(files, role, None) for role in MODEL_ROLES}
    paths = {role: Path(os.path.abspath(path)) for role, path in paths.items() if path is not None}
    if files is not None:
        files = replace(files, **paths)
    parallel = None if files is None else parallel_of(args, files, None)
    opener = portable_opener(args, files, device, parallel, keep_loaded=_keep_loaded(args, files, args.workers or 1))
    models = (*paths.values(), *(path for path, _ in args.lora))
    sharing = None if parallel is None else parallel.workers
    runner = partial(WorkersRunner, count=args.workers, address=address, gpus=gpus, sharing=sharing, models=models)
    return {"open_pipeline": opener, "make_runner": runner}


def _keep_loaded(args: argparse.Namespace, files: Any, processes: int = 1) -> bool:
    """As asked for; else whether all models, in every process, take no more than half of the memory that is free."""
    from ..ram import free_ram

    if args.keep_loaded is not None or files is None:
        return bool(args.keep_loaded)
    free = free_ram()
    if free is None:
        return False
    paths = [getattr(files, role) for role in MODEL_ROLES if role != "tokenizer"]
    return sum(path.stat().st_size for path in paths if path is not None) * processes <= free / 2


class _Watcher:
    """Shows a batch on the terminal; has the methods of the core's Watcher."""

    def __init__(self, progress: Progress, *, several: bool = False) -> None:
        self.progress, self.several = progress, several
        self.start = time.monotonic()
        self.counts: dict[str, int] = {}
        self.first: float | None = None  # when the first clip was begun
        self.total = 0
        self.at_work: set[tuple[int, int | None]] = set()  # line and take

    def clip(self, line: int, done: int, total: int, job: Any) -> None:
        self.first = self.first or time.monotonic()
        self.total = total
        self.at_work.add((line, job.take))
        if self.several:
            self._show_all()
        else:
            self.progress.begin(f"Line {line} ({done + 1} of {total}{self._pace(total - done)})")

    def _show_all(self) -> None:
        """Of several clips at a time: how far the whole is."""
        done = sum(self.counts.values())
        pace = self._pace(self.total - done)
        self.progress.status(f"{done} of {self.total} done, {len(self.at_work)} at work{pace}")

    def _pace(self, left: int) -> str:
        """Throughput and the time left, once a clip is made; lines that need no clip only shorten it."""
        made = self.counts.get("made", 0)
        if not made:
            return ""
        each = (time.monotonic() - self.first) / made
        rate = f"{60 / each:.1f} clips a minute" if each < 60 else f"{3600 / each:.1f} clips an hour"
        return f", {rate}, about {format_duration(each * left)} left"

    def step(self, step: int, steps: int, *rest: Any) -> None:
        self.progress.step(step, steps, *rest)

    def outcome(self, outcome: Any) -> None:
        self.counts[outcome.status] = self.counts.get(outcome.status, 0) + 1
        self.at_work.discard((outcome.line, outcome.take))
        for warning in outcome.warnings if outcome.status in ("made", "failed") else ():
            self.progress.say(f"{_place(outcome)}: note: {warning}")
        if outcome.status == "made":
            how = ", from the latents that were kept" if outcome.from_latents else ""
            self.progress.say(f"{_place(outcome)}: {outcome.file} in {format_duration(outcome.seconds)}{how}")
        elif outcome.status == "failed":
            self.progress.say(f"{_place(outcome)}: failed: {outcome.error}")
        if self.several and self.total:
            self._show_all()

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
