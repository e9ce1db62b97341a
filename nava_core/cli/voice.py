"""`nava voice`: voices that stay, made of recordings, listed and blended."""

from __future__ import annotations

import argparse
import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .options import MODEL_ROLES, Command, UsageError, model_files, positive, writable_folder
from .outputs import free_name
from .progress import Progress

SUFFIX = ".safetensors"
ENCODER = "speaker_encoder"

DESCRIPTION = """Keeps the voice of a recording in a file of about a kilobyte, which takes the recording's place where
a voice is given: `nava generate --voice`, spk_wavs of `nava batch`, NAVA Load Timbre in ComfyUI. The speaker encoder is
then no longer needed. A voice is what a speaker sounds like: neither the words nor the sound of the recording come into
a clip.

  make RECORDING      the voice of a recording: 3 to 30 seconds of one clear speaker
  list FILE|FOLDER    what saved voices are; with the speaker encoder, whether they were made with it
  blend FILE:WEIGHT   a voice between two or more others, made with the same speaker encoder"""

EXAMPLES = """examples:
  nava voice make anna.wav --models models --name Anna --start 2 --duration 8
  nava voice list voices --models models
  nava voice blend Anna.safetensors:0.7 Bo.safetensors:0.3 --name "Anna and Bo"
  nava generate "She says <S>Good morning!<E>" --models models --voice Anna.safetensors"""


def add_options(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", metavar="make|list|blend", required=True)
    make = _action(actions, "make", "keep the voice of a recording", _make)
    make.add_argument("recording", metavar="RECORDING", help="one speaker, without music or other voices")
    make.add_argument("--start", type=_from_zero, default=0.0, metavar="SECONDS", help="where to begin (default: 0)")
    make.add_argument(
        "--duration", type=positive, metavar="SECONDS", help="how much to take (default: to the end, at most 30)"
    )
    _add_encoder_options(make, "the speaker encoder is sought in it")
    _add_output_options(make, "the recording's")
    listing = _action(actions, "list", "say what saved voices are", _list)
    listing.add_argument("paths", nargs="+", type=Path, metavar="FILE|FOLDER", help="voices, or folders with some")
    listing.add_argument("--json", action="store_true", help="one JSON object a voice")
    _add_encoder_options(listing, "with its speaker encoder the voices are compared")
    blend = _action(actions, "blend", "make a voice between others", _blend)
    blend.add_argument(
        "voices", nargs="+", type=_weighted, metavar="FILE[:WEIGHT]", help="voices and how much of each (default: 1)"
    )
    _add_output_options(blend, "those of the voices")


def _action(actions: Any, name: str, text: str, run: Callable[[argparse.Namespace], int]) -> argparse.ArgumentParser:
    added = actions.add_parser(name, help=text, description=f"{text[:1].upper()}{text[1:]}.")
    # Of the command itself, which would forget it if it had a default here.
    added.add_argument("--debug", action="store_true", default=argparse.SUPPRESS, help="show the whole traceback")
    added.set_defaults(run_action=run)
    return added


def _add_encoder_options(parser: argparse.ArgumentParser, use: str) -> None:
    parser.add_argument("--models", type=Path, metavar="FOLDER", help=f"folder with the models: {use}")
    parser.add_argument("--speaker-encoder", type=Path, metavar="FILE", help=MODEL_ROLES[ENCODER])


def _add_output_options(parser: argparse.ArgumentParser, names: str) -> None:
    parser.add_argument("--name", help=f"whose voice it is (default: as {names})")
    parser.add_argument("--out", type=Path, metavar="FILE", help="the .safetensors to write (default: NAME, here)")
    parser.add_argument("--overwrite", action="store_true", help="replace --out where it is there")


def _from_zero(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"it must be a number of seconds from 0, got {text!r}")
    return value


def _weighted(text: str) -> tuple[Path, float]:
    """FILE or FILE:WEIGHT; a file whose name ends like a weight is taken as it is."""
    name, colon, weight = text.rpartition(":")
    if not colon or Path(text).is_file():
        return Path(text), 1.0
    try:
        return Path(name), float(weight)
    except ValueError:
        return Path(text), 1.0


def run(args: argparse.Namespace) -> int:
    return args.run_action(args)


def _make(args: argparse.Namespace) -> int:
    from ..jobs import existing_file
    from ..media import read_audio
    from ..timbre import check_voice, load_redimnet
    from ..voices import MAX_READ, make_voice

    try:
        recording = existing_file(args.recording, "recording", Path.cwd())
    except ValueError as error:
        raise UsageError(str(error)) from None
    name = recording.stem if args.name is None else args.name
    target = _target(args, name)
    encoder = load_redimnet(_encoder_file(args))
    part = {"start": args.start, "duration": args.duration}
    sound = read_audio(recording, args.start + MAX_READ)
    voice = make_voice(encoder, *sound, name=name, **part)
    return _written(args, voice, target, check_voice(*sound, **part))


def _list(args: argparse.Namespace) -> int:
    from ..timbre import load_redimnet
    from ..voices import encoder_fingerprint

    encoder = None
    if args.models is not None or args.speaker_encoder is not None:
        encoder = encoder_fingerprint(load_redimnet(_encoder_file(args)))
    findings = [_finding(path, encoder) for given in args.paths for path in _voice_files(given)]
    if not findings:
        Progress().say(f"There is no saved voice in {', '.join(map(str, args.paths))}.")
    for finding in findings:
        text = finding["summary"] + (f"\n  {finding['problem']}" if finding["problem"] else "")
        print(json.dumps(finding, ensure_ascii=False) if args.json else f"{finding['file']}: {text}")
    return 1 if any(finding["problem"] for finding in findings) else 0


def _encoder_file(args: argparse.Namespace) -> Path:
    path = getattr(model_files(args, [ENCODER]), ENCODER)
    if path is None:
        raise UsageError(f"--models: there is no speaker encoder in {args.models}: give --speaker-encoder FILE.")
    return path


def _voice_files(path: Path) -> list[Path]:
    """A file itself, or the saved voices in a folder and below it; what else is there is left out."""
    from ..checkpoint import FileKind, describe_file

    if not path.exists():
        raise UsageError(f"There is no {path}: give a saved voice or a folder with some.")
    if not path.is_dir():
        return [path]
    files = sorted(file for file in path.rglob(f"*{SUFFIX}") if file.is_file())
    return [file for file in files if describe_file(file).kind is FileKind.NAVA_VOICE]


def _finding(path: Path, encoder: str | None) -> dict[str, Any]:
    from ..voices import SavedVoice

    finding: dict[str, Any] = {"file": str(path), "summary": "not used", "problem": None}
    try:
        voice = SavedVoice.load(path)
        finding |= {"name": voice.name, "seconds": voice.seconds, "encoder": voice.encoder}
        finding |= {"blend": [list(part) for part in voice.blend], "summary": voice.summary}
        if encoder is not None:
            voice.check_encoder(encoder)
    except ValueError as error:
        finding["problem"] = str(error)
    return finding


def _blend(args: argparse.Namespace) -> int:
    from ..voices import SavedVoice, blend_voices

    missing = [path for path, _ in args.voices if not path.is_file()]
    if missing:
        raise UsageError(f"There is no voice {missing[0]}: check the path; a weight follows it after a colon.")
    voices = [SavedVoice.load(path) for path, _ in args.voices]
    try:
        voice = blend_voices(voices, [weight for _, weight in args.voices], args.name or _joined(voices))
    except ValueError as error:
        raise UsageError(str(error)) from None
    return _written(args, voice, _target(args, voice.name))


def _joined(voices: list[Any]) -> str:
    return " and ".join(dict.fromkeys(voice.name or "a voice" for voice in voices))


def _target(args: argparse.Namespace, name: str) -> Path:
    """The file of --out, or one named after the voice here that is not there yet. Raises UsageError."""
    from ..voices import voice_file_name

    if args.out is None:
        try:
            voice_file_name(name)
        except ValueError as error:
            raise UsageError(f"{error} Or give --out FILE.") from None
        return free_name(writable_folder(Path.cwd()), name, SUFFIX)
    target = Path(os.path.abspath(args.out))
    if target.suffix != SUFFIX:
        raise UsageError(f"--out: a voice is kept as safetensors: name it {target.stem}{SUFFIX}.")
    if target.is_dir() or (target.exists() and not args.overwrite):
        raise UsageError(f"--out: {target} is already there: give another name, or --overwrite.")
    writable_folder(target.parent)
    return target


def _written(args: argparse.Namespace, voice: Any, target: Path, warnings: list[str] | None = None) -> int:
    progress = Progress()
    target.parent.mkdir(parents=True, exist_ok=True)
    voice.save(target, overwrite=args.overwrite)
    for line in [*(warnings or []), voice.summary]:
        progress.say(line)
    print(target)
    return 0


COMMANDS = [Command("voice", "keep, list and blend voices", DESCRIPTION, EXAMPLES, add_options, run)]
