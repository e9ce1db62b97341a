"""A clip as it is asked for: one line of a batch file, or one command, checked before a model is loaded."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import re
import unicodedata
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO

from .geometry import FPS, MODES, PRESETS, ClipGeometry
from .prompt import BUILT_IN, bind_voices, negative_text, parse_spans
from .sampling import Guidance

MAX_LINE = 1 << 20  # bytes
MAX_SEED = 2**64 - 1
MAX_STEPS = 1000
MIN_SECONDS, MAX_SECONDS = 1 / FPS, 60.0
MIN_SHIFT, MAX_SHIFT = 0.01, 100.0
MAX_NAME = 150  # bytes of an output's name without its ending; file systems allow 255
DEFAULT_SIZE = next(iter(PRESETS.values()))
BOM = b"\xef\xbb\xbf"
HASH_CHUNK = 1 << 20

KEYS = (
    "prompt",
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
    "id",
    "name",
)
_ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://|data:", re.IGNORECASE)
_NOT_IN_NAMES = re.compile(r'[\\/:*?"<>|]')


class LineError(ValueError):
    """What is wrong with a line or a command, in a sentence."""


@dataclass(frozen=True)
class Defaults:
    """What a line that says nothing about it gets. ``size`` None: the first frame's bucket, or 1280x704.

    ``negative``: a text, "default" for the built-in terms that suit the clip's mode, or "zero" for the trained null.
    ``scales`` are the fields of ``Guidance`` that differ from what the pipeline would choose itself. Raises LineError
    for seconds or a shift out of bounds.
    """

    seconds: float = 6.0
    size: tuple[int, int] | None = None
    mode: str = MODES[0]
    seed: int = 0
    steps: int = 50
    shift: float = 5.0
    negative: str = BUILT_IN
    scales: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _check_seconds(self.seconds)
        if not MIN_SHIFT <= self.shift <= MAX_SHIFT:
            raise LineError(f"The shift must be from {MIN_SHIFT:g} to {MAX_SHIFT:g}; got {self.shift:g}.")


@dataclass(frozen=True)
class Job:
    """One clip to make, checked: the numbers are in range, the files there, the voices bound to speech spans."""

    prompt: str
    seconds: float
    width: int
    height: int
    size_from_image: bool
    mode: str
    seed: int
    steps: int
    shift: float
    negative: str
    scales: tuple[tuple[str, Any], ...]
    image: Path | None
    voices: tuple[Path, ...]
    assignment: tuple[int | None, ...] | None
    name: str = ""
    warnings: tuple[str, ...] = ()

    @property
    def suffix(self) -> str:
        return ".wav" if self.mode == "audio" else ".mp4"

    @property
    def guidance(self) -> Guidance | None:
        """None leaves the choice to the pipeline."""
        if not self.scales:
            return None
        from .pipeline import default_guidance

        return replace(default_guidance(self.image is not None, bool(self.voices)), **dict(self.scales))

    def request(self) -> dict[str, Any]:
        """The pipeline's arguments."""
        return {
            "prompt": self.prompt,
            "seconds": self.seconds,
            "width": self.width,
            "height": self.height,
            "mode": self.mode,
            "image": self.image,
            "size_from_image": self.size_from_image,
            "voices": self.voices,
            "assignment": self.assignment,
            "negative": self.negative,
            "seed": self.seed,
            "steps": self.steps,
            "shift": self.shift,
            "guidance": self.guidance,
        }

    def key(self) -> str:
        """A hash of all that the clip follows from, the files' contents included; not of its name.

        Raises OSError where a file cannot be read.
        """
        facts = self.request()
        facts["guidance"] = None if self.guidance is None else asdict(self.guidance)
        facts["image"] = self.image and file_digest(self.image)
        facts["voices"] = [file_digest(voice) for voice in self.voices]
        if self.mode == "audio" or self.size_from_image:
            del facts["width"], facts["height"]
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def file_digest(path: Path) -> str:
    """SHA-256 of a file's content, remembered until the file changes."""
    status = path.stat()
    return _digest(path, status.st_size, status.st_mtime_ns)


@lru_cache(maxsize=4096)
def _digest(path: Path, size: int, modified: int) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(HASH_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


# --- from plain values to a job ----------------------------------------------------------------------------------


def make_job(
    prompt: str,
    *,
    defaults: Defaults,
    image: Path | None = None,
    voices: Sequence[Path | None] = (),
    bindings: Mapping[int, int] | None = None,
    seconds: float | None = None,
    size: tuple[int, int] | None = None,
    mode: str | None = None,
    seed: int | None = None,
    steps: int | None = None,
    negative: str | None = None,
    name: str = "",
    warnings: Sequence[str] = (),
) -> Job:
    """A checked job; what is None comes from ``defaults``.

    ``voices``: one for all spans, or one a span, None where a span has none; with ``bindings`` {span: voice}, both
    counted from 0, in any number. Raises LineError or another ValueError with the sentence to show.
    """
    mode, size = mode or defaults.mode, size or defaults.size
    seconds = float(_or(seconds, defaults.seconds))
    if not prompt.strip():
        raise LineError("The prompt is empty: describe the clip.")
    if mode == "audio" and image is not None:
        raise LineError("An audio-only clip has no first frame: leave out the image, or make a clip with picture.")
    if mode == "video" and any(voices):
        raise LineError("A picture-only clip has no voices: leave them out, or make a clip with sound.")
    _check_seconds(seconds)
    geometry = ClipGeometry(seconds, *(size or DEFAULT_SIZE), mode)
    given, assignment = _bound(voices, bindings, prompt)
    return Job(
        prompt=prompt,
        seconds=seconds,
        width=geometry.width,
        height=geometry.height,
        size_from_image=image is not None and size is None,
        mode=mode,
        seed=_or(seed, defaults.seed),
        steps=_or(steps, defaults.steps),
        shift=defaults.shift,
        negative=negative_text(_or(negative, defaults.negative), mode),
        scales=tuple(sorted(defaults.scales.items())),
        image=image,
        voices=given,
        assignment=assignment,
        name=name,
        warnings=tuple(warnings),
    )


def _check_seconds(seconds: float) -> None:
    if seconds > MAX_SECONDS:
        raise LineError(f"{seconds:g} seconds is too long: a clip has at most {MAX_SECONDS:g}, and 10 suit the model.")
    if not seconds >= MIN_SECONDS:
        raise LineError(f"{seconds:g} seconds is too short: a clip has at least one frame, 1/{FPS} of a second.")


def _or(value: Any, default: Any) -> Any:
    return default if value is None else value


def _bound(
    voices: Sequence[Path | None], bindings: Mapping[int, int] | None, prompt: str
) -> tuple[tuple[Path, ...], tuple[int | None, ...] | None]:
    """The distinct voices and, where the order of the spans does not say it, which voice speaks each span."""
    spans = parse_spans(prompt)
    given = tuple(dict.fromkeys(voice for voice in voices if voice is not None))
    if not given:
        return (), None
    if bindings is not None:
        for span in bindings:
            if not 0 <= span < len(spans):
                count = f"{len(spans)} speech span{'' if len(spans) == 1 else 's'}"
                raise LineError(f"A voice is bound to span {span + 1}, but the prompt has {count}.")
        places = [given.index(voices[bindings[i]]) if i in bindings else None for i in range(len(spans))]
        return given, tuple(places)
    if None in voices or len(given) < len(voices):
        bind_voices(spans, list(voices))  # as many as spans
        return given, tuple(None if voice is None else given.index(voice) for voice in voices)
    bind_voices(spans, given)
    return given, None


def existing_file(text: str, folder: Path, what: str) -> Path:
    """The absolute path of a regular file named in a batch file or a command; relative names are below ``folder``."""
    if _ADDRESS.match(text):
        raise LineError(f"The {what} {text!r} is an address: download it and give the file's path.")
    if not text or "\0" in text:
        raise LineError(f"The {what} is no path: give a file, or leave it out.")
    path = Path(os.path.abspath(folder / os.path.expanduser(text)))  # "~nobody" stays as it is
    if path.is_dir():
        raise LineError(f"The {what} {path} is a folder: give the file in it.")
    if not path.is_file():
        raise LineError(f"There is no {what} {path}: check the path, which is relative to {folder}.")
    if not os.access(path, os.R_OK):
        raise LineError(f"The {what} {path} cannot be read: check its permissions.")
    return path


def checked_name(value: str) -> str:
    """An output's name without ending, safe in every file system. Raises LineError."""
    name = unicodedata.normalize("NFC", value)
    plain = name.isprintable() and not _NOT_IN_NAMES.search(name) and name == name.strip(" .")
    if not name or not plain or len(name.encode()) > MAX_NAME:
        raise LineError(
            f"The id {value[:60]!r} cannot be a file's name: use letters, digits, spaces, '-', '_' and '.', "
            f"at most {MAX_NAME} bytes, not beginning or ending with a dot or space."
        )
    return name


# --- from lines to jobs ------------------------------------------------------------------------------------------


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


def parse_line(raw: bytes, folder: Path, defaults: Defaults) -> Job:
    """The job of one JSON line; its files are below ``folder``. Raises ValueError with the sentence to show."""
    values = _json_object(raw)
    warnings = [f"The key {key!r} is not known and was ignored{_suggestion(key)}." for key in values if key not in KEYS]
    values = {key: value for key, value in values.items() if key in KEYS and value is not None}
    read = _Reader(values)
    image = read("image_path", _text)
    width, height = read("width", _whole), read("height", _whole)
    if (width is None) != (height is None):
        raise LineError("Give width and height together, or neither.")
    name, other = read("id", _name), read("name", _name)
    if name and other and name != other:
        warnings.append(f"The file is named after id {name!r}, not after name {other!r}.")
    prompt = read("prompt", _text)
    if prompt is None:
        raise LineError('The line has no prompt: add "prompt": "...".')
    return make_job(
        prompt,
        defaults=defaults,
        image=None if image is None else existing_file(image, folder, "image"),
        voices=[None if v is None else existing_file(v, folder, "voice") for v in read("spk_wavs", _voices) or ()],
        seconds=read("seconds", _number),
        size=None if width is None else (width, height),
        mode=_mode(read("audio_only", _flag), read("video_only", _flag), defaults.mode),
        seed=read("seed", _seed),
        steps=read("steps", _steps),
        negative=read("negative", _text),
        name=name or other or "",
        warnings=warnings,
    )


def _json_object(raw: bytes) -> dict[str, Any]:
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise LineError(f"The line is not UTF-8 (byte {error.start + 1}): save the file as UTF-8.") from None
    try:
        values = json.loads(text, parse_constant=_no_constant)
    except json.JSONDecodeError as error:
        hint = "it seems cut off" if error.pos >= len(text.rstrip()) or "Unterminated" in error.msg else error.msg
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


def _flag(value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError("true or false")
    return value


def _voices(value: Any) -> list[str | None]:
    entries = [value] if isinstance(value, str) else value
    if not isinstance(entries, list) or not all(entry is None or isinstance(entry, str) for entry in entries):
        raise ValueError("a list of files, null for a span without a voice")
    return [None if entry is None else _text(entry) for entry in entries]


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
