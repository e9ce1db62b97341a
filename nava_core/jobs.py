"""A clip as it is asked for, by one line of a batch file or one command, checked before a model is loaded."""

from __future__ import annotations

import hashlib
import json
import os
import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from .digests import file_digest
from .geometry import (
    FPS,
    MODES,
    PRESETS,
    TRAINED_SCALE,
    TRAINED_SECONDS,
    ClipGeometry,
    check_scale,
    seconds_covering,
    seconds_of_latents,
    split_latents,
)
from .given.frames import HOLDS
from .given.masks import SHOWN
from .given.sound import RESTS
from .media import read_audio
from .prompt import BUILT_IN, bind_voices, negative_text, parse_spans
from .sampling import Guidance, find_preset

MAX_SEED = 2**64 - 1
MAX_STEPS = 1000
MAX_TAKES = 1000
MIN_SECONDS, MAX_SECONDS = 1 / FPS, 60.0
MIN_SHIFT, MAX_SHIFT = 0.01, 100.0
MAX_NAME = 150  # bytes of an output's name without its ending; file systems allow 255
DEFAULT_SIZE = next(iter(PRESETS.values()))
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
    ``save_latents``: whether a clip's latents are kept beside it. ``segment``: seconds of a segment of longer clips at
    most, 0 for clips in one pass; ``hold``: what segments have of the first. Raises LineError for seconds or a shift
    out of bounds.
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
    segment: float = TRAINED_SECONDS
    hold: str = HOLDS[0]

    def __post_init__(self) -> None:
        check_scale(self.image_scale)
        check_segment(self.segment)
        _check_seconds(self.seconds)
        if not MIN_SHIFT <= self.shift <= MAX_SHIFT:
            raise LineError(f"The shift must be from {MIN_SHIFT:g} to {MAX_SHIFT:g}; got {self.shift:g}.")


@dataclass(frozen=True)
class GivenFiles:
    """What of a clip is given beside its first frame, in files: see :meth:`NavaPipeline.denoise`.

    ``pictures``: (second or "end", file).
    """

    sound: Path | None = None
    sound_start: float = 0.0
    sound_at: float = 0.0
    sound_rest: str = RESTS[0]
    video: Path | None = None
    pictures: tuple[tuple[float | str, Path], ...] = ()
    shown: str = next(iter(SHOWN))

    @property
    def files(self) -> tuple[Path, ...]:
        return tuple(path for path in (self.sound, self.video, *(path for _, path in self.pictures)) if path)

    def request(self) -> dict[str, Any]:
        """The pipeline's arguments, as far as something is given."""
        found: dict[str, Any] = {}
        if self.sound is not None:
            found |= {"sound": self.sound, "sound_start": self.sound_start, "sound_at": self.sound_at}
            found["sound_rest"] = self.sound_rest
        if self.video is not None:
            found["frames"] = self.video
        if self.pictures:
            found["pictures"] = dict(self.pictures)
        return {**found, "shown": self.shown} if found else {}

    def check(self, mode: str, image: Path | None) -> None:
        """Raise ValueError, in a sentence, for what does not go together, or with a clip of this mode."""
        from .pipeline.given import Given

        if self.sound is None and (self.sound_start, self.sound_at, self.sound_rest) != (0.0, 0.0, RESTS[0]):
            raise LineError("Where a sound begins, and what its rest is, was said of no sound: give one, too.")
        if self.files or self.shown not in SHOWN:
            request = self.request() or {"shown": self.shown}
            Given(image=image, **request).check(mode)

    def sound_seconds(self, mode: str) -> float:
        """Nominal seconds of a clip in which the given sound has room, as far as clips go."""
        waveform, rate = read_audio(self.sound, self.sound_start + MAX_SECONDS)
        seconds = min(MAX_SECONDS, self.sound_at + max(0.0, waveform.shape[1] / rate - self.sound_start))
        seconds = max(MIN_SECONDS, seconds)
        return seconds if mode == "audio" else max(MIN_SECONDS, min(MAX_SECONDS, seconds_covering(seconds)))

    def moved(self, places: Mapping[Path, Path]) -> GivenFiles:
        """The same with its files elsewhere."""
        pictures = tuple((time, places[path]) for time, path in self.pictures)
        sound, video = (None if path is None else places[path] for path in (self.sound, self.video))
        return replace(self, sound=sound, video=video, pictures=pictures)


@dataclass(frozen=True)
class Job:
    """One clip to make, checked: the numbers are in range, the files there, the voices bound to speech spans.

    ``seconds`` None: as long as the video or sound that is given. ``then``: the prompts of the segments after the
    first, of a clip that is made in several. Of a job of several ``takes`` each is a job of its own: see
    :meth:`split`.
    """

    prompt: str
    seconds: float | None
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
    given: GivenFiles = GivenFiles()
    then: tuple[str, ...] = ()
    segment: float = TRAINED_SECONDS
    hold: str = HOLDS[0]
    draft: str | None = None  # what the prompt was rewritten from, where it was

    @property
    def files(self) -> tuple[Path, ...]:
        """All files that it names, in an order that is always the same."""
        return tuple(path for path in (self.image, *self.voices, *self.given.files) if path is not None)

    @property
    def segments(self) -> int:
        """How many segments it is made in."""
        if self.mode == "audio" or not self.segment or self.seconds is None or self.given.video is not None:
            return 1
        return len(split_latents(self.seconds, self.segment))

    def moved(self, places: Mapping[Path, Path]) -> Job:
        """The same with its files elsewhere."""
        image = None if self.image is None else places[self.image]
        voices = tuple(places[voice] for voice in self.voices)
        return replace(self, image=image, voices=voices, given=self.given.moved(places))

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
            **self.given.request(),
        }

    def long_request(self) -> dict[str, Any]:
        """The arguments of the pipeline's ``make_long``, of a job of several segments."""
        # Segments after the first have a first frame, so that each chooses what the scales that were said leave open.
        request = {**self.request(), "guidance": dict(self.scales) or None}
        prompts = [request.pop("prompt"), *self.then]
        return {"prompts": prompts, "segment": self.segment, "hold": self.hold, **request}

    def again_request(self) -> dict[str, Any]:
        """Those arguments that say how a finished clip is made again, whatever its length and size."""
        names = ("prompt", "voices", "assignment", "negative", "seed", "steps", "shift", "preset", "guidance")
        return {name: value for name, value in self.request().items() if name in names}

    def key(self) -> str:
        """A hash of all that the clip follows from, the files' contents included; not of its name.

        Raises OSError where a file cannot be read.
        """
        facts = self.request()
        facts["guidance"] = None if self.guidance is None else asdict(self.guidance)
        facts["image"] = self.image and file_digest(self.image)
        facts["voices"] = [file_digest(voice) for voice in self.voices]
        facts |= {name: file_digest(facts[name]) for name in ("sound", "frames") if name in facts}
        if "pictures" in facts:
            facts["pictures"] = {str(time): file_digest(path) for time, path in facts["pictures"].items()}
        if self.segments > 1:
            facts["segments"] = {"then": self.then, "segment": self.segment, "hold": self.hold}
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
    given: GivenFiles | None = None,
    then: Sequence[str] = (),
    segment: float | None = None,
    hold: str | None = None,
    name: str = "",
    warnings: Sequence[str] = (),
) -> Job:
    """A checked job; what is None comes from ``defaults``.

    ``voices``: one for all spans, or one a span, None where a span gets the learned null voice; with ``bindings``
    {span: voice}, both counted from 0, in any number; spans are counted through ``prompt`` and ``then``. A clip with
    a given video, or else a given sound, is as long as that where ``seconds`` is None. Raises LineError or another
    ValueError with the sentence to show.
    """
    mode, size = mode or defaults.mode, size or defaults.size
    given = given or GivenFiles()
    if seconds is None and given.video is None and given.sound is None:
        seconds = defaults.seconds
    seconds = None if seconds is None else float(seconds)
    if not all(each.strip() for each in (prompt, *then)):
        raise LineError("The prompt is empty: describe the clip.")
    if mode == "audio" and image is not None:
        raise LineError("An audio-only clip has no first frame: leave out the image, or make a clip with picture.")
    if mode == "video" and any(voices):
        raise LineError("A picture-only clip has no voices: leave them out, or make a clip with sound.")
    if seconds is not None:
        _check_seconds(seconds)
    given.check(mode, image)
    geometry = ClipGeometry(defaults.seconds if seconds is None else seconds, *(size or DEFAULT_SIZE), mode)
    spoken, assignment = _bound(() if mode == "video" else voices, bindings, (prompt, *then))
    job = Job(
        prompt=prompt,
        seconds=seconds,
        width=geometry.width,
        height=geometry.height,
        size_from_image=(image is not None or given.video is not None) and size is None,
        mode=mode,
        seed=_or(seed, defaults.seed),
        steps=_or(steps, defaults.steps),
        shift=defaults.shift,
        negative=negative_text(_or(negative, defaults.negative), mode),
        scales=tuple(sorted(defaults.scales.items())),
        image=image,
        voices=spoken,
        assignment=assignment,
        preset=_or(preset, defaults.preset),
        image_scale=_or(image_scale, defaults.image_scale),
        loras=defaults.loras,
        name=name,
        warnings=tuple(warnings),
        takes=_or(takes, defaults.gen_turn),
        save_latents=_or(save_latents, defaults.save_latents),
        given=given,
        then=tuple(then),
        segment=_or(segment, defaults.segment),
        hold=_or(hold, defaults.hold),
    )
    check_segment(job.segment)
    _check_segments(job)
    return job


def check_segment(seconds: float) -> None:
    """Raises LineError for a segment's length that is none; 0 stands for clips in one pass."""
    least = seconds_of_latents(2)
    if not (seconds == 0 or least <= seconds <= MAX_SECONDS):
        raise LineError(
            f"A segment has from {least:.2f} to {MAX_SECONDS:g} seconds, or 0 for a clip in one pass; got {seconds:g}."
        )


def _check_segments(job: Job) -> None:
    """What goes with clips of one segment, or of several, alone."""
    if job.hold not in HOLDS:
        raise LineError(f"What is held from segment to segment is one of {', '.join(HOLDS)}; got {job.hold!r}.")
    prompts = 1 + len(job.then)
    if prompts > job.segments:
        if job.segments == 1:
            raise LineError(
                "The prompts that follow are for the segments of a longer clip, and this one is made in one pass: give "
                "more seconds or shorter segments, and a picture that is not given."
            )
        raise LineError(
            f"There are {prompts} prompts for {job.segments} segments: give fewer, more seconds or shorter segments."
        )
    if job.segments == 1:
        return
    if job.given.pictures:
        raise LineError(
            "Of a clip of several segments only the first frame can be given: leave out the other pictures, or make it "
            "in one pass (segment 0)."
        )
    if job.save_latents:
        raise LineError(
            "A clip of several segments has no latents of its own to be kept: leave that out, or make it in one pass "
            "(segment 0)."
        )


def _check_seconds(seconds: float) -> None:
    if seconds > MAX_SECONDS:
        raise LineError(f"{seconds:g} seconds is too long: a clip has at most {MAX_SECONDS:g}, and 10 suit the model.")
    if not seconds >= MIN_SECONDS:
        raise LineError(f"{seconds:g} seconds is too short: a clip has at least one frame, 1/{FPS} of a second.")


def _or(value: Any, default: Any) -> Any:
    return default if value is None else value


def _bound(
    voices: Sequence[Path | None], bindings: Mapping[int, int] | None, prompts: Sequence[str]
) -> tuple[tuple[Path, ...], tuple[int | None, ...] | None]:
    """The distinct voices and, where the order of the spans does not say it, which voice speaks each span."""
    spans, voices = [span for prompt in prompts for span in parse_spans(prompt)], list(voices)
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
