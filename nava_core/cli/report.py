"""`nava report`: what came out of clips, in numbers and pictures."""

from __future__ import annotations

import argparse
import os
import shlex
import subprocess
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from .options import MODEL_ROLES, Command, UsageError, model_files, positive
from .progress import Progress

CLIPS = (".mp4", ".mkv", ".mov", ".webm", ".wav")
ENCODER = "speaker_encoder"
FILE = "{file}"
VOICE_SECONDS = 600.0  # read of a recording; the speaker encoder takes 30 s of it
ASR_SECONDS = 900

DESCRIPTION = """Measures clips and says what is wrong with them: loudness (LUFS) and true peak, whether sounds fall on
what moves, frozen and flickering pictures, silence, clipping, NaN; with --prompt and --voice whether each span is
spoken in its voice and the voices come in order; with --asr or --transcript whether the words are the prompt's.

A CLIP is a video, a .wav, or a folder of which all clips are measured. The report goes to stdout. --json and --picture
write it beside each clip as CLIP.report.json and CLIP.report.png, or to the FILE that is named for a single clip.

The command of --asr is any speech recogniser that you have: {file} in it becomes a .wav of the clip's sound, and what
it prints to stdout is the transcript. It is run as it is, without a shell. None is bundled.

Similarities of voices are cosines of the speaker encoder's embeddings: compare them with each other, and with what two
recordings of the same speaker give."""

EXAMPLES = """examples:
  nava report clip.mp4
  nava report clips --json --picture                 a whole folder, CLIP.report.json and .png beside each clip
  nava report clip.mp4 --prompt "She says <S>Come in!<E>" --voice her.wav --speaker-encoder M-vb2+vox2+cnc-ft_mix.pt
  nava report clip.mp4 --prompt-file clip.txt --asr "my-recogniser --language en {file}"
  nava report clips --strict                         exit code 1 where a clip has a fault"""


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("clips", nargs="+", type=Path, metavar="CLIP", help="videos, .wav files, or folders of them")
    parser.add_argument(
        "--json", nargs="?", const="", metavar="FILE", help="write the report as JSON (default: CLIP.report.json)"
    )
    parser.add_argument(
        "--picture", nargs="?", const="", metavar="FILE", help="write its picture as PNG (default: CLIP.report.png)"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace reports that are there")
    parser.add_argument("--strict", action="store_true", help="exit with 1 where a clip has a fault")
    parser.add_argument("--max-seconds", type=positive, metavar="SECONDS", help="look at no more than that of a clip")
    words = parser.add_argument_group("what was to be said")
    words.add_argument("--prompt", metavar="TEXT", help="what the clips were made from, speech as <S>words<E>")
    words.add_argument("--prompt-file", type=Path, metavar="FILE", help="the same in a UTF-8 file")
    words.add_argument("--transcript", metavar="TEXT", help="what is heard in the clip")
    words.add_argument(
        "--asr", metavar="COMMAND", help='speech recogniser whose stdout is the transcript: "command {file}"'
    )
    voices = parser.add_argument_group("voices")
    voices.add_argument(
        "--voice",
        action="append",
        default=[],
        metavar="[N=]FILE",
        help="a reference recording or saved voice, as often as needed, as for `nava generate`: one for all spans, one "
        "for each in their order, or bound to spans by number (1=FILE)",
    )
    voices.add_argument("--models", type=Path, metavar="FOLDER", help="the speaker encoder is sought in it")
    voices.add_argument("--speaker-encoder", type=Path, metavar="FILE", help=MODEL_ROLES[ENCODER])


def run(args: argparse.Namespace) -> int:
    from ..explain import explain

    clips = _clips(args.clips)
    targets = _targets(args, clips)
    options = _options(args)
    progress = Progress()
    failed = faulty = 0
    for clip in clips:
        progress.begin(clip.name)
        try:
            report = _measured(clip, options, progress)
        except (ValueError, OSError, RuntimeError) as error:
            if len(clips) == 1 or args.debug:
                raise
            progress.say(f"{clip}: {explain(error)}")
            failed += 1
            continue
        finally:
            progress.end()
        _write(report, *targets[clip])
        faulty += bool(report.faults)
        print(report.text, flush=True)
    if len(clips) > 1:
        progress.say(f"{len(clips) - failed} of {len(clips)} clips were measured, {faulty} of them have faults.")
    return 1 if failed or (args.strict and faulty) else 0


def _measured(clip: Path, options: dict[str, Any], progress: Progress) -> Any:
    from ..report import report_file

    return report_file(clip, callback=progress.step, **options)


def _write(report: Any, json_file: Path | None, picture: Path | None) -> None:
    from ..media import whole_file
    from ..video_files import write_picture

    if json_file is not None:
        with whole_file(json_file) as temporary:
            temporary.write_text(report.to_json() + "\n", encoding="utf-8")
    if picture is not None:
        write_picture(picture, report.picture())


# ---------------------------------------------------------------- files


def _clips(given: list[Path]) -> list[Path]:
    """The clips themselves, and those in folders, each once."""
    found: dict[Path, None] = {}
    for path in given:
        if not path.exists():
            raise UsageError(f"There is no {path}: give a clip, or a folder with some.")
        if not path.is_dir():
            found[path] = None
            continue
        inside = sorted(file for file in path.iterdir() if file.suffix.lower() in CLIPS and file.is_file())
        inside = [file for file in inside if not file.name.startswith(".")]
        if not inside:
            raise UsageError(f"There is no clip in {path} ({', '.join(CLIPS)}).")
        found.update(dict.fromkeys(inside))
    return list(found)


def _targets(args: argparse.Namespace, clips: list[Path]) -> dict[Path, tuple[Path | None, Path | None]]:
    """The JSON file and the picture of each clip, None for what is not asked for. Raises UsageError."""
    bases = [clip.with_suffix("") for clip in clips]
    twice = {base for base in bases if bases.count(base) > 1}  # a .mp4 and a .wav of one name
    names = {clip: clip if base in twice else base for clip, base in zip(clips, bases, strict=True)}
    return {
        clip: (
            _target(args, "json", ".json", name, len(clips)),
            _target(args, "picture", ".png", name, len(clips)),
        )
        for clip, name in names.items()
    }


def _target(args: argparse.Namespace, option: str, suffix: str, name: Path, clips: int) -> Path | None:
    given = getattr(args, option)
    if given is None:
        return None
    if given and clips > 1:
        raise UsageError(f"--{option}: {given} is one file for {clips} clips: leave it out to write beside each clip.")
    if given and Path(given).suffix.lower() != suffix:
        raise UsageError(
            f"--{option}: {given[:60]!r} is no name of a {suffix} file; where none is to be given, write the option "
            "behind the clips."
        )
    target = Path(os.path.abspath(given or f"{name}.report{suffix}"))
    if target.is_dir() or (target.exists() and not args.overwrite):
        raise UsageError(f"--{option}: {target} is already there: give another name, or --overwrite.")
    if not target.parent.is_dir():
        raise UsageError(f"--{option}: there is no folder {target.parent}.")
    if not os.access(target.parent, os.W_OK | os.X_OK):
        raise UsageError(f"--{option}: {target.parent} cannot be written to.")
    return target


# ---------------------------------------------------------------- what is compared


def _options(args: argparse.Namespace) -> dict[str, Any]:
    """Of ``report_file``. Raises UsageError for a prompt, voices or a recogniser that cannot be used."""
    from ..prompt import bind_voices, parse_spans

    if args.transcript is not None and args.asr is not None:
        raise UsageError("Give --transcript or --asr, and not both.")
    options: dict[str, Any] = {"prompt": _prompt(args), "transcript": args.transcript, "max_seconds": args.max_seconds}
    if args.asr is not None:
        options["asr"] = partial(_transcribe, _command(args.asr))
    paths, bindings = _voices(args)
    try:
        spans = parse_spans(options["prompt"] or "")
        if bindings is not None:
            options["assignment"] = _assignment(bindings, len(spans))
        if spans or bindings is not None:
            bind_voices(spans, paths, options.get("assignment"))
    except ValueError as error:
        raise UsageError(str(error)) from None
    if paths:
        options |= _encoded(args, paths)
    return options


def _prompt(args: argparse.Namespace) -> str | None:
    if args.prompt is not None and args.prompt_file is not None:
        raise UsageError("Give --prompt or --prompt-file, and not both.")
    if args.prompt_file is None:
        return args.prompt
    try:
        return args.prompt_file.read_text(encoding="utf-8-sig").strip()
    except UnicodeDecodeError:
        raise UsageError(f"--prompt-file: {args.prompt_file} is not UTF-8 text: save it as UTF-8.") from None
    except OSError as error:
        raise UsageError(f"--prompt-file: {args.prompt_file}: {error.strerror}.") from None


def _voices(args: argparse.Namespace) -> tuple[list[Path], dict[int, int] | None]:
    from ..jobs import existing_file
    from .generate import bound_voices

    names, bindings = bound_voices(args.voice)
    try:
        return [existing_file(name, "voice", Path.cwd()) for name in names], bindings
    except ValueError as error:
        raise UsageError(str(error)) from None


def _assignment(bindings: dict[int, int], spans: int) -> list[int | None]:
    beyond = [number for number in bindings if not 0 <= number < spans]
    if beyond:
        raise UsageError(f"--voice: there is no span {beyond[0] + 1}: the prompt has {spans}.")
    return [bindings.get(number) for number in range(spans)]


def _encoded(args: argparse.Namespace, paths: list[Path]) -> dict[str, Any]:
    """The reference voices' embeddings, and what makes one of a sound. Raises ValueError for a saved voice of another
    speaker encoder."""
    from ..media import read_audio
    from ..timbre import encode_timbre, load_redimnet
    from ..voices import open_voice

    if args.models is None and args.speaker_encoder is None:
        raise UsageError("--voice: voices are compared by the speaker encoder: give --speaker-encoder FILE.")
    file = getattr(model_files(args, [ENCODER]), ENCODER)
    if file is None:
        raise UsageError(f"--models: there is no speaker encoder in {args.models}: give --speaker-encoder FILE.")
    encoder = load_redimnet(file)
    encode: Callable[..., Any] = partial(encode_timbre, encoder)
    voices = []
    for path in paths:
        saved = open_voice(path)
        if saved is not None:
            saved.check_encoder(encoder)
        voices.append(encode(*read_audio(path, VOICE_SECONDS)) if saved is None else saved.timbre)
    return {"voices": voices, "encode": encode}


def _command(text: str) -> list[str]:
    try:
        words = shlex.split(text, posix=os.name != "nt")
    except ValueError as error:
        raise UsageError(f"--asr: the command cannot be read: {error}.") from None
    if not any(FILE in word for word in words):
        raise UsageError(f'--asr: say where the file goes, as in "command {FILE}".')
    return words


def _transcribe(command: list[str], waveform: Any, sample_rate: int) -> str:
    """What ``command`` prints of a file with this sound. Raises RuntimeError where it cannot be run or fails."""
    from ..media import write_wav

    with tempfile.TemporaryDirectory(prefix="nava-") as folder:
        file = Path(folder) / "sound.wav"
        write_wav(file, waveform, sample_rate, bits=16)
        words = [word.replace(FILE, str(file)) for word in command]
        try:
            done = subprocess.run(words, stdout=subprocess.PIPE, stdin=subprocess.DEVNULL, timeout=ASR_SECONDS)
        except subprocess.TimeoutExpired:
            raise RuntimeError(f"--asr: {words[0]} did not end within {ASR_SECONDS // 60} minutes.") from None
        except OSError as error:
            raise RuntimeError(f"--asr: {words[0]} cannot be run: {error.strerror}.") from None
    if done.returncode:
        raise RuntimeError(f"--asr: {words[0]} failed with exit code {done.returncode}.")
    return done.stdout.decode("utf-8", "replace").strip()


COMMANDS = [Command("report", "measure clips, and say what is wrong", DESCRIPTION, EXAMPLES, add_options, run)]
