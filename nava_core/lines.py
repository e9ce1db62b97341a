"""The lines of a batch file: JSON objects, or in a ``.txt`` prompts, or in a ``.lst`` the fields of a speech benchmark.

All that the makers' own batch files hold is understood.
"""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from .geometry import MODES, check_scale
from .jobs import (
    MAX_SECONDS,
    MAX_SEED,
    MAX_STEPS,
    MAX_TAKES,
    Defaults,
    GivenFiles,
    Job,
    LineError,
    checked_name,
    existing_file,
    make_job,
)
from .media import read_audio
from .sampling import PRESETS, find_preset

MAX_LINE = 1 << 20  # bytes
BOM = b"\xef\xbb\xbf"
PROMPT_KEYS = ("prompt", "text", "txt")  # the first that a line has
KEYS = (
    *PROMPT_KEYS,
    "image_path",
    "spk_wavs",
    "seconds",
    "seed",
    "width",
    "height",
    "audio_only",
    "video_only",
    "negative",
    "steps",
    "preset",
    "image_scale",
    "gen_turn",
    "save_latents",
    "sound_path",
    "sound_start",
    "sound_at",
    "sound_rest",
    "video_path",
    "last_image_path",
    "images_at",
    "shown",
    "then",
    "segment",
    "hold",
    "id",
    "name",
)
NO_FILE = ("", "None")  # in place of a path
IMAGE_MARK = " image_path:"  # after the prompt of a plain line


def read_lines(file: BinaryIO) -> Iterator[tuple[int, bytes | LineError]]:
    """Number, from 1, and bytes of every line that is not blank; never more than one line is in memory."""
    number = 0
    while raw := file.readline(MAX_LINE + 1):
        number += 1
        if len(raw) > MAX_LINE:
            while raw and not raw.endswith(b"\n"):
                raw = file.readline(MAX_LINE)
            yield number, LineError(f"The line is longer than {MAX_LINE >> 20} MiB: a line is one clip.")
            continue
        if number == 1:
            raw = raw.removeprefix(BOM)
        if raw.strip():
            yield number, raw


def parse_line(raw: bytes, folder: Path, defaults: Defaults, suffix: str = ".jsonl") -> Job:
    """The job of one line of a batch file whose name ends in ``suffix``.

    Files that it names are sought below ``folder``, that of the batch file, then below the working directory. Raises
    ValueError with the sentence to show.
    """
    folders = (folder, Path.cwd())
    values = _values(raw, suffix.lower(), folders)
    warnings = [f"The key {key!r} is not known and was ignored{_suggestion(key)}." for key in values if key not in KEYS]
    values = {key: value for key, value in values.items() if key in KEYS and value is not None}
    read = _Reader(values)
    image = read("image_path", _file)
    width, height = read("width", _whole), read("height", _whole)
    if (width is None) != (height is None):
        raise LineError("Give width and height together, or neither.")
    name, other = read("id", _name), read("name", _name)
    if name and other and name != other:
        warnings.append(f"The file is named after id {name!r}, not after name {other!r}.")
    return make_job(
        _prompt(read, warnings),
        defaults=defaults,
        image=None if image is None else existing_file(image, "image", *folders),
        voices=[None if v is None else existing_file(v, "voice", *folders) for v in read("spk_wavs", _voices) or ()],
        seconds=read("seconds", _number),
        size=None if width is None else (width, height),
        mode=_mode(read("audio_only", _flag), read("video_only", _flag), defaults.mode),
        seed=read("seed", _seed),
        steps=read("steps", _steps),
        negative=read("negative", _text),
        preset=read("preset", _preset),
        image_scale=read("image_scale", _scale),
        takes=read("gen_turn", _takes),
        save_latents=read("save_latents", _flag),
        given=_given(read, folders),
        then=read("then", _texts) or (),
        segment=read("segment", _time),
        hold=read("hold", _hold),
        name=name or other or "",
        warnings=warnings,
    )


def _given(read: _Reader, folders: Sequence[Path]) -> GivenFiles:
    def found(key: str, what: str) -> Path | None:
        name = read(key, _file)
        return None if name is None else existing_file(name, what, *folders)

    pictures = [(time, existing_file(name, "image", *folders)) for time, name in read("images_at", _images) or ()]
    last = found("last_image_path", "image")
    plain = GivenFiles()
    return GivenFiles(
        found("sound_path", "sound"),
        _or(read("sound_start", _time), plain.sound_start),
        _or(read("sound_at", _time), plain.sound_at),
        _or(read("sound_rest", _text), plain.sound_rest),
        found("video_path", "video"),
        (*pictures, *(() if last is None else (("end", last),))),
        _or(read("shown", _shown), plain.shown),
    )


def _or(value: Any, default: Any) -> Any:
    return default if value is None else value


def _prompt(read: _Reader, warnings: list[str]) -> str:
    found = {key: text for key in PROMPT_KEYS if (text := read(key, _text)) is not None}
    if not found:
        raise LineError('The line has no prompt: add "prompt": "...".')
    (key, prompt), *others = found.items()
    warnings += [f"The prompt is {key!r}; {other!r} says another." for other, text in others if text != prompt]
    return prompt


def _values(raw: bytes, suffix: str, folders: Sequence[Path]) -> dict[str, Any]:
    """The line's values by key, whichever form it is in; a JSON object is one in every file."""
    try:
        text = raw.decode("utf-8").strip()
    except UnicodeDecodeError as error:
        raise LineError(f"The line is not UTF-8 (byte {error.start + 1}): save the file as UTF-8.") from None
    if suffix == ".txt" and not text.startswith("{"):
        prompt, _, image = text.partition(IMAGE_MARK)
        return {"prompt": prompt, "image_path": image.strip()}
    if suffix == ".lst" and not text.startswith("{"):
        return _benchmark_values(text, folders)
    return _json_object(text)


def _benchmark_values(text: str, folders: Sequence[Path]) -> dict[str, Any]:
    """A line of a zero-shot speech benchmark: the words are said in the recording's voice and at its pace."""
    fields = [field.strip() for field in text.split("|")]
    if len(fields) != 4 or not all(fields):
        raise LineError("The line is not id|words of the recording|recording|words to say: give all four.")
    name, spoken, recording, words = fields
    waveform, rate = read_audio(existing_file(recording, "voice", *folders), MAX_SECONDS)
    return {
        "id": name,
        "prompt": f"<S>{words}<E>",
        "spk_wavs": [recording],
        "audio_only": True,
        "seconds": round(waveform.shape[-1] / rate * len(words) / len(spoken), 2),
    }


def _json_object(text: str) -> dict[str, Any]:
    try:
        values = json.loads(text, parse_constant=_no_constant)
    except json.JSONDecodeError as error:
        hint = "it seems cut off" if error.pos >= len(text) or "Unterminated" in error.msg else error.msg
        raise LineError(f"The line is not JSON: {hint} (character {error.pos + 1}).") from None
    except (RecursionError, ValueError) as error:
        raise LineError(f"The line is not usable JSON: {' '.join(str(error).split())[:100]}.") from None
    if not isinstance(values, dict):
        raise LineError('The line is not a JSON object: write {"prompt": "..."}.')
    return values


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no number in JSON")


def _suggestion(key: str) -> str:
    import difflib

    near = difflib.get_close_matches(key.lower(), KEYS, 1, 0.7)
    return f" (did you mean {near[0]!r}?)" if near else ""


class _Reader:
    """Values of a line by key, each through the check of its type; None where the key is absent."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        self.values = values

    def __call__(self, key: str, check: Callable[[Any], Any]) -> Any:
        if key not in self.values:
            return None
        value = self.values[key]
        try:
            return check(value)
        except LineError:
            raise
        except ValueError as error:
            raise LineError(f"{key} must be {error}; got {json.dumps(value)[:60]}.") from None


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError("text")
    if any("\ud800" <= character <= "\udfff" for character in value):
        raise LineError("A text holds half a character (a lone surrogate): write the character itself.")
    return value


def _number(value: Any) -> float:
    if not isinstance(value, bool) and isinstance(value, (int, float)):
        with contextlib.suppress(OverflowError):  # a whole number of hundreds of digits
            number = float(value)
            if math.isfinite(number) and number > 0:
                return number
    raise ValueError("a number above 0")


def _time(value: Any) -> float:
    return 0.0 if value == 0 and not isinstance(value, bool) else _number(value)


def _whole(value: Any, lowest: int = 1, highest: int = 1 << 16) -> int:
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int) or not lowest <= value <= highest:
        raise ValueError(f"a whole number from {lowest} to {highest}")
    return value


def _seed(value: Any) -> int:
    return _whole(value, 0, MAX_SEED)


def _steps(value: Any) -> int:
    return _whole(value, 1, MAX_STEPS)


def _preset(value: Any) -> str:
    name = _text(value)
    try:
        wanted = find_preset(name)
    except ValueError as error:
        raise LineError(str(error)) from None
    return next(key for key, preset in PRESETS.items() if preset is wanted)  # one content, however it is called


def _scale(value: Any) -> int:
    scale = _whole(value)
    check_scale(scale)
    return scale


def _takes(value: Any) -> int:
    return _whole(value, 1, MAX_TAKES)


def _file(value: Any) -> str | None:
    return None if value in NO_FILE else _text(value)


def _flag(value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError("true or false")
    return value


def _voices(value: Any) -> list[str | None]:
    entries = [value] if isinstance(value, str) else value
    if not isinstance(entries, list) or not all(entry is None or isinstance(entry, str) for entry in entries):
        raise ValueError("a list of files, null for a span without a voice")
    return [None if entry is None else _file(entry) for entry in entries]


def _texts(value: Any) -> list[str]:
    entries = [value] if isinstance(value, str) else value
    if not isinstance(entries, list) or not all(isinstance(entry, str) for entry in entries):
        raise ValueError("a list of prompts")
    return [_text(entry) for entry in entries]


def _images(value: Any) -> list[tuple[float, str]]:
    if not isinstance(value, dict):
        raise ValueError('files by the second they stand at, as {"2.5": "file.png"}')
    times = []
    for key, name in value.items():
        try:
            times.append((_time(float(key)), _text(name)))
        except ValueError:
            raise ValueError('files by the second they stand at, as {"2.5": "file.png"}') from None
    return times


def _hold(value: Any) -> str:
    return _text(value).replace("+", " and ")


def _shown(value: Any) -> str:
    return _text(value).replace("-", " ")


def _name(value: Any) -> str:
    if isinstance(value, int) and not isinstance(value, bool):
        value = str(value)
    return checked_name(_text(value))


def _mode(audio_only: bool | None, video_only: bool | None, default: str) -> str:
    """The clip's mode; a flag that is false turns off the default of its own name only."""
    if audio_only and video_only:
        raise LineError("audio_only and video_only exclude each other: set one of them.")
    if audio_only or video_only:
        return "audio" if audio_only else "video"
    turned_off = {"audio": audio_only, "video": video_only}.get(default) is False
    return MODES[0] if turned_off else default
