"""A clip as it is asked for, by one line of a batch file or one command, checked before a model is loaded."""

from __future__ import annotations

import hashlib
import json
import os
import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from .geometry import FPS, MODES, PRESETS, TRAINED_SCALE, ClipGeometry, check_scale
from .prompt import BUILT_IN, bind_voices, negative_text, parse_spans
from .sampling import Guidance, find_preset

MAX_SEED = 2**64 - 1
MAX_STEPS = 1000
MAX_TAKES = 1000
MIN_SECONDS, MAX_SECONDS = 1 / FPS, 60.0
MIN_SHIFT, MAX_SHIFT = 0.01, 100.0
MAX_NAME = 150  # bytes of an output's name without its ending; file systems allow 255
DEFAULT_SIZE = next(iter(PRESETS.values()))
HASH_CHUNK = 1 << 20

_ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://|data:", re.IGNORECASE)
_NOT_IN_NAMES = re.compile(r'[\\/:*?"<>|]')


class LineError(ValueError):
    """What is wrong with a line or a command, in a sentence."""


@dataclass(frozen=True)
class Defaults:
    """What a line that says nothing about it gets. ``size`` None: the first frame's bucket of ``image_scale``,
    or 1280x704.

    ``negative``: a text, "default" for the built-in terms that suit the clip's mode, or "zero" for the trained null.
    ``scales`` are the fields of ``Guidance`` that differ from what the pipeline would choose itself. ``gen_turn``: how
    many takes are made of a line. ``loras``: (fingerprint, strength) of those in the backbone, for a clip's key.
    ``save_latents``: whether a clip's latents are kept beside it. Raises LineError for seconds or a shift out of
    bounds.
    """

    seconds: float = 6.0
    size: tuple[int, int] | None = None
    mode: str = MODES[0]
    seed: int = 0
    steps: int = 50
    shift: float = 5.0
    negative: str = BUILT_IN
    scales: Mapping[str, Any] = field(default_factory=dict)
    gen_turn: int = 1
    preset: str | None = None
    image_scale: int = TRAINED_SCALE
    loras: tuple[tuple[str, float], ...] = ()
    save_latents: bool = False

    def __post_init__(self) -> None:
        check_scale(self.image_scale)
        _check_seconds(self.seconds)
        if not MIN_SHIFT <= self.shift <= MAX_SHIFT:
            raise LineError(f"The shift must be from {MIN_SHIFT:g} to {MAX_SHIFT:g}; got {self.shift:g}.")


@dataclass(frozen=True)
class Job:
    """One clip to make, checked: the numbers are in range, the files there, the voices bound to speech spans.

    Of a job of several ``takes`` each is a job of its own: see :meth:`split`.
    """

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
    preset: str | None = None
    image_scale: int = TRAINED_SCALE
    loras: tuple[tuple[str, float], ...] = ()
    name: str = ""
    warnings: tuple[str, ...] = ()
    takes: int = 1
    take: int | None = None  # which of several, from 0
    save_latents: bool = False
    draft: str | None = None  # what the prompt was rewritten from, where it was

    def split(self) -> list[Job]:
        """A job for every take, with the next seed and the take's number, from 0, after its name."""
        if self.takes == 1:
            return [self]
        return [
            replace(
                self,
                takes=1,
                take=take,
                seed=(self.seed + take) % (MAX_SEED + 1),
                name=self.name and f"{self.name}-{take}",
                warnings=() if take else self.warnings,
            )
            for take in range(self.takes)
        ]

    @property
    def suffix(self) -> str:
        return ".wav" if self.mode == "audio" else ".mp4"

    @property
    def guidance(self) -> Guidance | None:
        """None leaves the choice to the pipeline."""
        if not self.scales:
            return None
        from .pipeline import default_guidance

        has_voice = bool(self.voices) or self.assignment is not None
        usual = default_guidance(self.image is not None, has_voice)
        return replace(usual if self.preset is None else find_preset(self.preset).guidance, **dict(self.scales))

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
            "image_scale": self.image_scale,
            "voices": self.voices,
            "assignment": self.assignment,
            "negative": self.negative,
            "seed": self.seed,
            "steps": self.steps,
            "shift": self.shift,
            "preset": self.preset,
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
        if not self.size_from_image or self.image_scale == TRAINED_SCALE:
            del facts["image_scale"]
        if self.loras:
            facts["loras"] = self.loras
        for unused in ("preset",) if self.preset is None else ("steps", "shift"):
            del facts[unused]
        if self.preset is not None and not self.scales:
            del facts["negative"]
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
    takes: int | None = None,
    preset: str | None = None,
    image_scale: int | None = None,
    save_latents: bool | None = None,
    name: str = "",
    warnings: Sequence[str] = (),
) -> Job:
    """A checked job; what is None comes from ``defaults``.

    ``voices``: one for all spans, or one a span, None where a span gets the learned null voice; with ``bindings``
    {span: voice}, both counted from 0, in any number. Raises LineError or another ValueError with the sentence to show.
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
    given, assignment = _bound(() if mode == "video" else voices, bindings, prompt)
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
        preset=_or(preset, defaults.preset),
        image_scale=_or(image_scale, defaults.image_scale),
        loras=defaults.loras,
        name=name,
        warnings=tuple(warnings),
        takes=_or(takes, defaults.gen_turn),
        save_latents=_or(save_latents, defaults.save_latents),
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
    spans, voices = parse_spans(prompt), list(voices)
    while len(voices) > len(spans) and voices[-1] is None:
        voices.pop()
    given = tuple(dict.fromkeys(voice for voice in voices if voice is not None))
    if not voices:
        return (), None
    if bindings is not None:
        for span in bindings:
            if not 0 <= span < len(spans):
                count = f"{len(spans)} speech span{'' if len(spans) == 1 else 's'}"
                raise LineError(f"A voice is bound to span {span + 1}, but the prompt has {count}.")
        places = [given.index(voices[bindings[i]]) if i in bindings else None for i in range(len(spans))]
        return given, tuple(places)
    if None in voices or len(given) < len(voices):
        binding = bind_voices(spans, voices)  # one for all spans, or as many as spans
        return given, tuple(None if voices[i] is None else given.index(voices[i]) for i in binding)
    bind_voices(spans, given)
    return given, None


def existing_file(text: str, what: str, *folders: Path) -> Path:
    """The absolute path of a regular file named in a batch file or a command; relative names are sought below
    ``folders``, one after another. Raises LineError."""
    if _ADDRESS.match(text):
        raise LineError(f"The {what} {text!r} is an address: download it and give the file's path.")
    if not text or "\0" in text:
        raise LineError(f"The {what} is no path: give a file, or leave it out.")
    name = os.path.expanduser(text)  # "~nobody" stays as it is
    places = [Path(os.path.abspath(folder / name)) for folder in folders]
    path = next((place for place in places if place.is_file()), places[0])
    if path.is_dir():
        raise LineError(f"The {what} {path} is a folder: give the file in it.")
    if not path.is_file():
        sought = " or ".join(dict.fromkeys(str(folder) for folder in folders))
        raise LineError(f"There is no {what} {path}: check the path, which is relative to {sought}.")
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
