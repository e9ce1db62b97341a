"""Long clips: segments made one after another, each of which begins with the last frame of the one before.

What is finished lies in a folder, the state, stage by stage: a segment's latents, its sound, its frames without loss,
its last frame, and what was measured. A clip that was killed goes on from there, and is the same as one that was not.
The whole is put together at the end, frame by frame, in memory that does not grow with the number of segments beside
the sound.

A segment of F frames adds F - 1, for its first frame is the last of the one before; its sound overlaps by that frame's
time, within which one sound fades over to the next. A sound track that is given goes on through all segments and comes
out as it is.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..digests import content
from ..geometry import FPS, MODES, TRAINED_SECONDS, frames_of_latents, split_latents
from ..given import (
    HOLDS,
    RESTS,
    Drift,
    GivenSound,
    Originals,
    Seam,
    Statistics,
    fit_sound,
    hold_statistics,
    join_sound,
    seam,
)
from ..lora_merge import lora_fingerprint
from ..media import clear_leftovers, fit_length, mux, read_audio, read_image, whole_file
from ..prompt import bind_voices, parse_spans
from ..sampling import Guidance, Interrupted
from ..timbre.resample import resample
from ..video_files import LosslessFrames, to_levels, write_picture
from ..voices import SavedVoice
from .clip import checked_path
from .given import READ_SECONDS
from .latents import ClipLatents, write_tensors
from .segment_state import DONE, FRAMES, LAST, LATENTS, SOUND, State, read_json, write_json
from .stages import Voice, check_speaker_encoder, clip_geometry, read_picture

if TYPE_CHECKING:
    from .pipeline import NavaPipeline

SEGMENT_SECONDS = TRAINED_SECONDS
MADE_RATE = 48_000  # Hz of sound that is made
MEASURED_EVERY = 24  # frames of the first segment, for what is held in the others


@dataclass(frozen=True)
class LongClip:
    """A finished long clip. ``seams``: what changes at each; ``warnings``: sentences on what was changed or will have
    made it worse; ``report``: how each prompt's tokens were used."""

    path: Path
    seconds: float
    segments: int
    seams: tuple[Seam, ...] = ()
    warnings: tuple[str, ...] = ()
    report: str = ""

    def drift(self) -> list[str]:
        """A sentence on each seam."""
        return [f"Seam {number}: {each.sentence()}" for number, each in enumerate(self.seams, start=1)]


@dataclass(frozen=True)
class Segment:
    """One segment: ``begin`` is the clip's frame that its frame 0 is. ``voices`` None: none of the prompt's spans has
    one; else the voice of each span, by number."""

    number: int
    begin: int
    frames: int
    prompt: str = ""
    seed: int = 0
    assignment: tuple[int | None, ...] | None = None
    is_source: bool = False

    @property
    def seconds(self) -> float:
        """The nominal length, as :class:`ClipGeometry` takes it."""
        return (self.frames - 1) / FPS

    @property
    def span(self) -> tuple[float, float]:
        """Seconds of the clip, until its last frame is over."""
        return self.begin / FPS, (self.begin + self.frames) / FPS


@dataclass(frozen=True)
class Beginning:
    """What a clip that is extended begins with: its frames, and its sound, each made when it is asked for."""

    frames: int
    width: int
    height: int
    stream: Callable[[], Iterator[torch.Tensor]]
    sound: Callable[[], tuple[torch.Tensor, int]] | None
    identity: Any  # for the state's key
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Request:
    """A long clip as it is asked for: see :func:`make_long`."""

    prompts: tuple[str, ...]
    seconds: float
    segment: float = SEGMENT_SECONDS
    hold: str = HOLDS[0]
    width: int = 1280
    height: int = 704
    mode: str = MODES[0]
    seed: int = 0
    image: torch.Tensor | None = None
    sound: GivenSound | None = None
    voices: tuple[Voice, ...] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)  # of every segment, as NavaPipeline.denoise takes them


# ---------------------------------------------------------------- the plan


def split_voices(
    prompts: Sequence[str], voices: Sequence[Any], assignment: Sequence[int | None] | None
) -> list[tuple[int | None, ...] | None]:
    """Which voice speaks each span of each prompt, spans being counted through all of them; None where there are no
    voices. Raises ValueError as :func:`bind_voices` does."""
    spans = [parse_spans(prompt) for prompt in prompts]
    if not voices and assignment is None:
        return [None] * len(prompts)
    bound = bind_voices([span for each in spans for span in each], voices, assignment)
    ends = [sum(len(each) for each in spans[: number + 1]) for number in range(len(spans))]
    return [tuple(bound[end - len(each) : end]) for each, end in zip(spans, ends, strict=True)]


def plan_segments(
    request: Request, assignment: Sequence[int | None] | None, first: Beginning | None = None
) -> list[Segment]:
    """The segments of a clip, the one that it begins with among them. Raises ValueError, in a sentence, for more
    prompts than there are segments to make, and for voices that do not fit the spans."""
    bindings = split_voices(request.prompts, request.voices, assignment)
    parts = split_latents(request.seconds, request.segment)
    if len(request.prompts) > len(parts):
        raise ValueError(
            f"There are {len(request.prompts)} prompts for {len(parts)} segments of up to {request.segment:g} s: give "
            "fewer, or shorter segments."
        )
    found = [] if first is None else [Segment(0, 0, first.frames, is_source=True)]
    begin = 0 if first is None else first.frames - 1
    for index, latents in enumerate(parts):
        which = min(index, len(request.prompts) - 1)
        frames = frames_of_latents(latents + 1)
        seed = (request.seed + len(found)) % 2**64  # other noise than that of the clip that it goes on from
        found.append(Segment(len(found), begin, frames, request.prompts[which], seed, bindings[which]))
        begin += frames - 1
    return found


# ---------------------------------------------------------------- making


def make_long(
    pipeline: NavaPipeline,
    path: str | os.PathLike,
    prompts: Sequence[str],
    *,
    seconds: float,
    segment: float = SEGMENT_SECONDS,
    hold: str = HOLDS[0],
    state: str | os.PathLike | None = None,
    anew: bool = False,
    first: Beginning | None = None,
    width: int = 1280,
    height: int = 704,
    mode: str = MODES[0],
    image: torch.Tensor | str | os.PathLike | None = None,
    size_from_image: bool = True,
    image_scale: int = 960,
    voices: Sequence[Voice] = (),
    assignment: Sequence[int | None] | None = None,
    sound: str | os.PathLike | tuple[torch.Tensor, int] | None = None,
    sound_start: float = 0.0,
    sound_at: float = 0.0,
    sound_rest: str = RESTS[0],
    seed: int = 0,
    callback: Callable[..., None] | None = None,
    should_stop: Callable[[], bool] | None = None,
    **settings: Any,
) -> LongClip:
    """As :meth:`NavaPipeline.make_long` says; ``first``: what the clip begins with, ``seconds`` being added to it."""
    path = checked_path(path, True)
    if mode == "audio":
        raise ValueError("A clip of sound alone has no frame that a segment could go on from: make it in one pass.")
    if mode == "video" and sound is not None:
        raise ValueError("A sound was given for a clip of picture alone: leave it out, or choose another mode.")
    if hold not in HOLDS:
        raise ValueError(f"What is held from segment to segment is one of {', '.join(HOLDS)}; got '{hold}'.")
    if not prompts:
        raise ValueError("A clip has at least one prompt.")
    check_speaker_encoder(pipeline.components.files.speaker_encoder, voices)
    picture = None if image is None else read_picture(image)
    if first is not None:
        width, height, size_from_image = first.width, first.height, False
    geometry = clip_geometry(segment, width, height, mode, picture, size_from_image, image_scale)
    request = Request(
        tuple(prompts), seconds, segment, hold, geometry.width, geometry.height, mode, seed, picture, None,
        tuple(voices), settings,
    )  # fmt: skip
    segments = plan_segments(request, assignment, first)
    if sound is not None:
        given = _soundtrack(segments, sound, sound_start, sound_at, sound_rest)
        request = replace(request, sound=given)
    work = _Work(pipeline, request, segments, first, State(state or default_state(path)), callback, should_stop)
    work.open(anew or state is None)
    made = work.make(path)
    if state is None:
        work.state.clear()
    return made


def default_state(path: Path) -> Path:
    """Where the state of a clip lies for which no folder was given, until the clip is whole."""
    return path.with_name(f".{path.stem}.segments")


def _soundtrack(
    segments: Sequence[Segment],
    sound: str | os.PathLike | tuple[torch.Tensor, int],
    start: float,
    at: float,
    rest: str,
) -> GivenSound:
    """A recording over the whole clip; what the clip begins with keeps its own sound."""
    waveform, rate = sound if isinstance(sound, tuple) else read_audio(sound, max(start, 0) + READ_SECONDS)
    offset = segments[1].begin / FPS if segments[0].is_source else 0.0
    seconds = segments[-1].span[1]
    notes: tuple[str, ...] = ()
    if segments[0].is_source and rate < MADE_RATE:  # the whole is written at the recording's rate
        notes = (f"It was resampled from {rate} to {MADE_RATE} Hz, so that the sound before it loses nothing.",)
        waveform, rate = torch.stack([resample(channel, rate, MADE_RATE) for channel in waveform]), MADE_RATE
    given = fit_sound(waveform, rate, seconds, start=start, at=offset + at, rest=rest)
    if segments[0].is_source:
        notes = (*notes, *(note for note in given.notes if not note.startswith("It begins")))
        if at:
            between = "silence" if rest == RESTS[0] else "generated"
            notes = (*notes, f"It begins {at:.2f} s after the clip that goes on; what comes in between is {between}.")
        given = replace(given, notes=notes)
    spans = tuple((max(begin, offset), end) for begin, end in given.spans if end > offset)
    return replace(given, spans=spans)


class _Work:
    """A long clip at work."""

    def __init__(
        self,
        pipeline: NavaPipeline,
        request: Request,
        segments: list[Segment],
        first: Beginning | None,
        state: State,
        callback: Callable[..., None] | None,
        should_stop: Callable[[], bool] | None,
    ) -> None:
        self.pipeline, self.request, self.segments, self.first = pipeline, request, segments, first
        self.state, self.callback, self.should_stop = state, callback, should_stop
        self.say = pipeline.components.say

    def open(self, anew: bool) -> None:
        plan = {"segments": [asdict(segment) for segment in self.segments]}
        goes_on = self.state.open(self._key(), plan, anew=anew, say=self.say)
        done = sum(self.state.has(segment.number, DONE) for segment in self.segments)
        if goes_on and done:
            self.say(f"{done} of {len(self.segments)} segments are there already, in {self.state.folder}.")
        for note in (*self._length_notes(), *self._sound_notes()):
            self.say(note)

    def _length_notes(self) -> list[str]:
        made = sum(segment.seconds for segment in self.segments if not segment.is_source)
        if abs(made - self.request.seconds) <= 1e-3:
            return []
        return [f"{self.request.seconds:g} s is no whole number of latent frames; {made:.3f} s are made."]

    def _sound_notes(self) -> list[str]:
        notes = () if self.request.sound is None else self.request.sound.notes
        return [f"The given sound: {note[:1].lower()}{note[1:]}" for note in notes]

    def _key(self) -> str:
        """A hash of all that the clip follows from: of files and LoRAs by their content, of models by name and size."""
        facts = {name: getattr(self.request, name) for name in self.request.__dataclass_fields__ if name != "sound"}
        settings = dict(facts.pop("settings"))
        if isinstance(settings.get("guidance"), Guidance):
            settings["guidance"] = asdict(settings["guidance"])
        sound = self.request.sound
        facts |= {
            "settings": settings,
            "voices": [_voice_content(voice) for voice in self.request.voices],
            "segments": [asdict(segment) for segment in self.segments],
            "sound": None if sound is None else (sound.to_encode()[0], sound.sample_rate, sound.spans),
            "first": None if self.first is None else self.first.identity,
            "models": self._models(),
        }
        return hashlib.sha256(json.dumps(content(facts), sort_keys=True).encode()).hexdigest()

    def _models(self) -> dict[str, Any]:
        parts = self.pipeline.components
        paths = {role: path for role, path in vars(parts.files).items() if path is not None and Path(path).is_file()}
        named = {role: (Path(path).name, Path(path).stat().st_size) for role, path in paths.items()}
        types = {"dtype": str(parts.dtype), "vae_dtype": str(parts.wanted_vae_dtype)}
        loras = [(lora_fingerprint(lora), strength) for lora, strength in parts.loras.merged] if parts.loras else []
        return {**named, **types, "loras": loras, "decoding": str(self.pipeline.decoding)}

    def make(self, path: Path) -> LongClip:
        for segment in self.segments:
            self._check_stop()
            if not self.state.has(segment.number, DONE):
                self._segment(segment)
        self._check_stop()
        self._put_together(path)
        made = self._result(path)
        for sentence in made.drift():
            self.say(sentence)
        return made

    def _segment(self, segment: Segment) -> None:
        begin, end = segment.span
        what = "what the clip begins with" if segment.is_source else f"{begin:.1f} to {end:.1f} s"
        self.say(f"Segment {segment.number + 1} of {len(self.segments)}: {what}.")
        latents = None if segment.is_source else self._latents(segment)
        self._check_stop()
        if not self.state.has(segment.number, SOUND):
            self._sound(segment, latents)
        self._check_stop()
        if not self.state.has(segment.number, FRAMES):
            frames = self.first.stream() if latents is None else self.pipeline.stream(
                latents, should_stop=self.should_stop
            )  # fmt: skip
            LosslessFrames.write(self.state.path(segment.number, FRAMES), frames)
        self._check_stop()
        self._measure(segment, latents)

    # ------------------------------------------------------------ a segment's stages

    def _latents(self, segment: Segment) -> ClipLatents:
        path = self.state.path(segment.number, LATENTS)
        if path.is_file():
            return ClipLatents.load(path)
        request = self.request
        image = request.image if segment.number == 0 else self._handed_over(segment.number - 1)
        latents = self.pipeline.denoise(
            segment.prompt,
            seconds=segment.seconds,
            width=request.width,
            height=request.height,
            mode=request.mode,
            image=image,
            size_from_image=False,
            voices=() if segment.assignment is None else request.voices,
            assignment=segment.assignment,
            sound=self._sound_within(segment),
            seed=segment.seed,
            callback=self.callback,
            should_stop=self.should_stop,
            **request.settings,
        )
        # The sound that was given is put in at the end, in one piece.
        latents = replace(latents, originals=None)
        latents.save(path)
        return latents

    def _handed_over(self, number: int) -> torch.Tensor:
        """The frame (H, W, 3) that the segment after ``number`` begins with: the last one, held to the first segment's
        statistics where that is wished, in 8 bits."""
        last = read_image(self.state.path(number, LAST))
        if self.request.hold == HOLDS[0]:
            return last
        about = read_json(self.state.path(0, DONE))["statistics"]
        reference = Statistics(
            torch.tensor(about["mean"], dtype=torch.float64),
            torch.tensor(about["spread"], dtype=torch.float64),
            about["sharpness"],
        )
        held = hold_statistics(to_levels(last), reference, self.request.hold)
        return to_levels(held).float() / 255

    def _sound_within(self, segment: Segment) -> GivenSound | None:
        """What is given of the sound in a segment's time; None where nothing is."""
        given = self.request.sound
        if given is None:
            return None
        (begin, end), rate = segment.span, given.sample_rate
        spans = [(max(since, begin) - begin, min(until, end) - begin) for since, until in given.spans]
        spans = tuple((since, until) for since, until in spans if until > since)
        if not spans:
            return None
        heard, first, last = given.to_encode()[0], round(begin * rate), round(end * rate)
        return GivenSound(
            fit_length(given.waveform[:, first:last], last - first), rate, spans, end - begin,
            heard=heard[:, first : last + rate // 10],
        )  # fmt: skip

    def _sound(self, segment: Segment, latents: ClipLatents | None) -> None:
        """Decodes a segment's sound, unless all of it is given or the clip has none."""
        if self.request.mode == "video":
            return
        if latents is None:
            waveform, rate = self.first.sound()
        else:
            given = self._sound_within(segment)
            if given is not None and given.is_whole:
                return
            waveform, rate = self.pipeline.sound(latents)
        with whole_file(self.state.path(segment.number, SOUND)) as temporary:
            write_tensors({"waveform": waveform.contiguous()}, temporary, {"sample_rate": str(rate)})

    def _measure(self, segment: Segment, latents: ClipLatents | None) -> None:
        """Keeps the last frame, and what the segment's frames and the seam before it are like."""
        number = segment.number
        second, last, seen = None, None, []
        for index, frame in enumerate(_frames(self.state.path(number, FRAMES))):
            second = frame if index == 1 else second
            last = frame
            if number == 0 and index % MEASURED_EVERY == 0:
                seen.append(frame)
        write_picture(self.state.path(number, LAST), last)
        about: dict[str, Any] = {"frames": segment.frames}
        if latents is not None:
            about |= {"report": latents.report, "warnings": list(latents.warnings)}
        if number == 0:
            found = Statistics.of(torch.stack(seen))
            about["statistics"] = {
                "mean": found.mean.tolist(), "spread": found.spread.tolist(), "sharpness": found.sharpness,
            }  # fmt: skip
        else:
            before = to_levels(read_image(self.state.path(number - 1, LAST)))
            start = next(_frames(self.state.path(0, FRAMES)))
            found = seam(before, last if second is None else second, start)
            about["seam"] = asdict(found)
        write_json(self.state.path(number, DONE), about)

    # ------------------------------------------------------------ the whole

    def _put_together(self, path: Path) -> None:
        waveform, rate = self._whole_sound()
        total = self.segments[-1].begin + self.segments[-1].frames
        self.say(f"Putting {len(self.segments)} segments together: {total} frames, {total / FPS:.2f} s.")
        clear_leftovers(path)  # of a run that was killed here
        mux(path, self._whole_picture(), waveform, rate, FPS, total=total, callback=lambda *_: self._check_stop())

    def _whole_picture(self) -> Iterator[torch.Tensor]:
        for segment in self.segments:
            skip = 0 if segment.number == 0 else 1  # it is the last frame of the segment before
            for chunk in LosslessFrames.read(self.state.path(segment.number, FRAMES)):
                part, skip = chunk[skip:], max(0, skip - len(chunk))
                if len(part):
                    yield part.float() / 255

    def _whole_sound(self) -> tuple[torch.Tensor | None, int | None]:
        if self.request.mode == "video":
            return None, None
        given = self.request.sound
        originals = None if given is None else Originals.of_sound(given)
        if originals is not None and originals.has_all_sound:
            return originals.put_sound(None, originals.sample_rate)
        joined, rate = self._joined()
        return (joined, rate) if originals is None else originals.put_sound(joined, rate)

    def _joined(self) -> tuple[torch.Tensor, int]:
        """The sound that was made, or that the clip begins with, faded over from segment to segment; silence where a
        given one comes."""
        found = [self._made_sound(segment) for segment in self.segments]
        rate = next(rate for made, rate in reversed(found) if made is not None)
        joined = None
        for segment, (made, own) in zip(self.segments, found, strict=True):
            samples = round(segment.frames / FPS * rate)
            if made is None:
                made = torch.zeros(2, samples)
            elif own != rate:
                made = torch.stack([resample(channel, own, rate) for channel in made])
            made = fit_length(made, samples)
            if joined is None:
                joined = made
            else:
                overlap = joined.shape[1] - round(segment.begin / FPS * rate)
                joined, _ = join_sound(joined, made, rate, overlap)
        return joined, rate

    def _made_sound(self, segment: Segment) -> tuple[torch.Tensor | None, int]:
        from safetensors import safe_open

        if not self.state.has(segment.number, SOUND):
            return None, 0
        with safe_open(str(self.state.path(segment.number, SOUND)), "pt") as file:
            return file.get_tensor("waveform"), int(file.metadata()["sample_rate"])

    def _result(self, path: Path) -> LongClip:
        done = [read_json(self.state.path(segment.number, DONE)) for segment in self.segments]
        warnings = [*(() if self.first is None else self.first.notes), *self._length_notes(), *self._sound_notes()]
        warnings += [warning for about in done for warning in about.get("warnings", ())]
        reports = [f"Segment {n}: {about['report']}" for n, about in enumerate(done, start=1) if about.get("report")]
        seams = tuple(_seam(about["seam"]) for about in done if "seam" in about)
        seconds = self.segments[-1].span[1]
        return LongClip(path, seconds, len(done), seams, tuple(dict.fromkeys(warnings)), "\n".join(reports))

    def _check_stop(self) -> None:
        if self.should_stop is not None and self.should_stop():
            raise Interrupted("The run was interrupted: what is finished of the clip is kept.")


def _voice_content(voice: Voice) -> Any:
    """What a voice is known by: its file, its recording, or its embedding."""
    if isinstance(voice, str):
        return Path(voice)
    return voice.timbre if isinstance(voice, SavedVoice) else voice


def _seam(about: Mapping[str, Any]) -> Seam:
    drift = about["drift"]
    return Seam(**{**about, "drift": None if drift is None else Drift(**drift)})


def _frames(path: Path) -> Iterator[torch.Tensor]:
    """The frames (H, W, 3) uint8 of a file one by one."""
    for chunk in LosslessFrames.read(path):
        yield from chunk
