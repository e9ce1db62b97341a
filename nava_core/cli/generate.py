"""`nava generate`: one clip."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .decoding import add_decoding_options
from .given import add_given_options, add_long_options, given_files, make_long
from .options import (
    Command,
    UsageError,
    add_clip_options,
    add_model_options,
    add_parallel_options,
    defaults_of,
    ignored_options,
    model_files,
    pipeline_opener,
)
from .outputs import LATENTS, clip_target, free_name, latents_target, report_lines
from .progress import Progress

DESCRIPTION = """One clip: an MP4 with picture and sound, an MP4 without sound (--video-only) or a 48 kHz WAV
(--audio-only). Speech is written into the prompt as <S>words<E>. Parts of it can be given: a sound that the picture
is made to, a video that sound is made for, pictures at its beginning, its end and in between. More than 10 seconds are
made in segments. The clip's path goes to stdout, all else to stderr."""

EXAMPLES = """examples:
  nava generate "A lighthouse at dusk, waves, gulls." --models models --out lighthouse.mp4
  nava generate "She smiles and says <S>Good morning!<E>" --models models --image her.png --voice her.wav
  nava generate "A man asks <S>Ready?<E>, a woman answers <S>Ready.<E>" --models models \\
       --voice 1=man.wav --voice 2=woman.wav --seconds 8 --size portrait --seed 7
  nava generate "A bell rings." --models models --lora few_steps.safetensors:0.9 --preset distilled
  nava generate "She sings to a guitar." --models models --image her.png --sound song.wav --sound-start 12 --seconds 8
  nava generate "Hooves on cobblestones." --models models --video silent.mp4            sound for a silent video
  nava generate "The sun goes down." --models models --image noon.png --last-image dusk.png --image-at 2.5=red.png
  nava generate "A train leaves." --then "It crosses a bridge." --models models --seconds 20 --hold colour
  nava generate "A ship's horn, far off." --models models --memory 6GB        on a small GPU, or beside other programs
  nava generate "A radio voice says <S>It is eight o'clock.<E>" --models models --audio-only --seconds 4"""

BOUND = re.compile(r"(\d+(?:,\d+)*)=(.+)", re.DOTALL)


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("prompt", nargs="?", help="the prompt; - reads it from stdin")
    parser.add_argument("--prompt-file", type=Path, metavar="FILE", help="read the prompt from a UTF-8 text file")
    parser.add_argument("--image", metavar="FILE", help="the first frame")
    add_voice_option(parser)
    parser.add_argument(
        "--out", type=Path, metavar="FILE", help="the file to write, .mp4 or .wav (default: a new nava_SEED.mp4 here)"
    )
    add_latents_option(parser)
    parser.add_argument("--overwrite", action="store_true", help="replace files that are there")
    add_clip_options(parser)
    add_given_options(parser)
    add_long_options(parser)
    add_model_options(parser)
    add_decoding_options(parser)
    add_parallel_options(parser)


def add_voice_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--voice",
        action="append",
        default=[],
        metavar="[SPAN=]FILE",
        help="a reference voice, a recording or a file of `nava voice`, as often as needed: one for all speech spans, "
        'one for each in their order, or bound to spans counted from 1 ("2=her.wav", "1,3=him.wav"); a name that '
        'begins like that is written "./1=x.wav"',
    )


def add_latents_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--save-latents",
        nargs="?",
        const="",
        metavar="FILE",
        help="keep the latents, from before they are decoded, in a .safetensors file (default: beside the clip), of "
        "which `nava decode` makes the clip again",
    )


def run(args: argparse.Namespace) -> int:
    job = _job(args)
    _check_state(args, job.segments)
    target = clip_target(args, job.suffix, f"nava_{args.seed}")
    kept = latents_target(args, target)
    files = model_files(args)
    progress = Progress()
    for note in [*ignored_options(args), *_speech_notes(job)]:
        progress.say(note)
    pipeline = pipeline_opener(args, files, progress.say)()
    if job.segments > 1:
        make_long(args, target, progress, lambda **how: pipeline.make_long(target, **job.long_request(), **how))
        print(target)
        return 0
    return finish(pipeline, lambda **how: pipeline.denoise(**job.request(), **how), target, kept, progress)


def finish(pipeline: Any, make: Callable[..., Any], target: Path, kept: Path | None, progress: Progress) -> int:
    """Has a clip's latents made by ``make(callback=...)``; writes these, where they are to be kept, and the clip."""
    progress.begin("Denoising")
    try:
        latents = make(callback=progress.step)
    finally:
        progress.end()
    target.parent.mkdir(parents=True, exist_ok=True)
    if kept is not None:
        _keep(latents, kept, progress)
    _decode(pipeline, latents, target, kept, progress)
    for line in report_lines(latents):
        progress.say(line)
    print(target)
    return 0


def _speech_notes(job: Any) -> list[str]:
    """What there is to say where the speech is too long for the clip, or its marks are misspelt."""
    from ..prompt import check_prompt

    check = check_prompt(" ".join([job.prompt, *job.then]), clip_seconds=job.seconds)
    if job.mode == "video" or not job.seconds:  # nothing is said, or the clip is as long as a file that is given
        return check.mark_warnings()
    return check.mark_warnings() + check.speech_warnings()


def _keep(latents: Any, path: Path, progress: Progress) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    latents.save(path)
    progress.say(f"The latents are in {path}.")
    if latents.not_kept:
        progress.say(latents.not_kept)


def _decode(pipeline: Any, latents: Any, target: Path, kept: Path | None, progress: Progress) -> None:
    """Writes the clip; where that fails, its latents are kept, unless they are already."""
    progress.begin("Decoding", "pass")
    try:
        pipeline.save(latents, target, callback=progress.step)
    except Exception:
        progress.end()
        if kept is None:
            kept = latents.save(free_name(target.parent, target.stem, LATENTS))
        progress.say(f"The clip was not decoded, but its latents are in {kept}: `nava decode` makes the clip of them.")
        raise
    finally:
        progress.end()


def _check_state(args: argparse.Namespace, segments: int) -> None:
    if args.state is not None and segments == 1:
        raise UsageError("--state: this clip is made in one pass, which keeps nothing in between: leave it out.")


def _job(args: argparse.Namespace) -> Any:
    from ..jobs import existing_file

    image = None if args.image is None else lambda: existing_file(args.image, "image", Path.cwd())
    job = prompt_job(args, image=image, given=lambda: given_files(args), then=args.then, seconds=lambda: _seconds(args))
    if args.save_latents is not None and job.segments > 1:
        raise UsageError(
            "--save-latents: a clip of several segments has no latents of its own: leave it out, or give --segment 0."
        )
    return job


def _seconds(args: argparse.Namespace) -> float | None:
    """As was said; else as long as the given sound. None leaves it to the job."""
    if args.seconds is not None or args.sound is None or args.video is not None or args.mode == "video":
        return args.seconds
    from ..geometry import MODES

    return given_files(args).sound_seconds(args.mode or MODES[0])


def prompt_job(args: argparse.Namespace, **found: Any) -> Any:
    """A job of the command's prompt, voices and sampling; of ``found`` what can be called is called, and may complain.
    Raises UsageError."""
    from ..jobs import existing_file, make_job

    defaults = defaults_of(args)
    prompt = _prompt(args)
    try:
        voices, bindings = bound_voices(args.voice)
        return make_job(
            prompt,
            defaults=defaults,
            voices=[existing_file(voice, "voice", Path.cwd()) for voice in voices],
            bindings=bindings,
            **{
                name: value() if callable(value) else value
                for name, value in {"seconds": args.seconds, **found}.items()
            },
        )
    except ValueError as error:
        raise UsageError(str(error)) from None


def _prompt(args: argparse.Namespace) -> str:
    if (args.prompt is None) == (args.prompt_file is None):
        raise UsageError("Give the prompt, or --prompt-file FILE, and not both.")
    try:
        if args.prompt_file is not None:
            return args.prompt_file.read_text(encoding="utf-8-sig").strip()
        return sys.stdin.read().strip() if args.prompt == "-" else args.prompt
    except UnicodeDecodeError:
        raise UsageError(f"{args.prompt_file or 'stdin'} is not UTF-8 text: save it as UTF-8.") from None
    except OSError as error:
        raise UsageError(f"--prompt-file: {args.prompt_file}: {error.strerror}.") from None


def bound_voices(given: list[str]) -> tuple[list[str], dict[int, int] | None]:
    """The voices' paths and, where they are bound, {span: voice}, both counted from 0."""
    found = [BOUND.fullmatch(text) for text in given]
    if not any(found):
        return given, None
    if not all(found):
        raise UsageError("--voice: bind every voice to its spans (1=FILE), or none.")
    bindings: dict[int, int] = {}
    for index, match in enumerate(found):
        for number in match[1].split(","):
            if int(number) - 1 in bindings:
                raise UsageError(f"--voice: span {number} has two voices; a span has one.")
            bindings[int(number) - 1] = index
    return [match[2] for match in found], bindings


COMMANDS = [Command("generate", "make one clip", DESCRIPTION, EXAMPLES, add_options, run)]
