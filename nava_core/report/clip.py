"""All measures of one clip: figures, what is wrong by which figure, and what its picture is drawn from."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch

from ..geometry import FPS
from ..media import as_waveform, existing_file, read_audio
from ..prompt import bind_voices, parse_spans
from ..video_files import read_video
from .curves import CHUNK, PictureCurves, picture_curves, small_size
from .faults import (
    clipped_share,
    flicker,
    frozen_spans,
    not_finite,
    silent_share,
    silent_spans,
    sound_levels,
)
from .loudness import integrated_loudness, true_peak
from .speech import Encode, Span, came_in_order, compare_voices, speech_segments, split_speech
from .sync import EARLY, LATE, Sync, measure_sync, onset_strength
from .words import text_units, word_errors

FORMAT, VERSION = "nava_report", 1
Asr = Callable[[torch.Tensor, int], str]

# Figures from which on a measure is called a fault
SILENT_SHARE = 0.95  # of the sound below -60 dBFS
CLIPPED_SHARE = 1e-3  # of the samples
FLICKERS = 3  # jumps of brightness that come back
WORD_RATE = 0.25  # word or character error rate
SURE = 0.01  # share of shuffled sounds that may fit as well where sound out of time is a fault, not a note
LENGTH_SECONDS = 0.1  # between the lengths of picture and sound
# Figures from which on something is worth a note
QUIET = -40.0  # LUFS
HOT = -1.0  # dBTP
CLEARLY = 0.02  # cosine by which a voice must be nearer to one reference than to another

UNSPACED_WEIGHT = 3  # a Chinese character takes about as long to say as three letters
SOUND_STEPS = 6
COLUMNS = 1160  # of the waveform in the picture


@dataclass(frozen=True)
class Fault:
    """Something wrong: the ``measure`` that says so, and a sentence with its figure."""

    measure: str
    text: str


@dataclass(frozen=True, eq=False)
class Drawing:
    """What a report's picture is drawn from; curves as in :class:`PictureCurves`, spans in seconds."""

    curves: PictureCurves | None
    envelope: torch.Tensor | None  # (2, columns): lowest and highest sample
    onsets: torch.Tensor | None
    silent: Sequence[Span] = ()
    frozen: Sequence[Span] = ()
    flickers: Sequence[float] = ()
    speech: Sequence[Span] = ()


@dataclass(eq=False)
class ClipReport:
    """What came out: ``values`` by measure, ready for JSON; ``faults``, and ``notes`` worth knowing.

    ``seconds`` of the longer one of picture and sound. ``values`` has ``picture``, ``frozen`` and ``flicker`` of a clip
    with a picture, ``sound`` and ``speech`` of one with sound, ``sync`` of one with both (None where it cannot be
    said), ``words`` where there is a transcript; times are in seconds, but ``lag_ms`` is in milliseconds.
    """

    name: str
    seconds: float
    fps: float
    values: dict[str, Any] = field(default_factory=dict)
    faults: list[Fault] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    drawing: Drawing | None = None

    def as_dict(self) -> dict[str, Any]:
        """All but the picture; numbers have four digits after the point, None is what could not be measured."""
        head = {"format": FORMAT, "version": VERSION, "clip": self.name, "seconds": self.seconds}
        faults = [asdict(fault) for fault in self.faults]
        return _rounded({**head, **self.values, "faults": faults, "notes": list(self.notes)})

    def to_json(self) -> str:
        """The report as JSON text."""
        return json.dumps(self.as_dict(), ensure_ascii=False, indent=2, allow_nan=False)

    @property
    def text(self) -> str:
        """The report in lines: faults first."""
        from .text import report_text

        return report_text(self)

    def picture(self) -> torch.Tensor:
        """Thumbnails, waveform, onsets and accents above each other, as (H, W, 3) uint8."""
        from .picture import draw_report

        return draw_report(self)


def report_clip(
    frames: torch.Tensor | None,
    waveform: torch.Tensor | None = None,
    sample_rate: int | None = None,
    fps: float | Fraction = FPS,
    *,
    name: str = "clip",
    prompt: str | None = None,
    voices: Sequence[torch.Tensor] = (),
    assignment: Sequence[int | None] | None = None,
    encode: Encode | None = None,
    transcript: str | None = None,
    asr: Asr | None = None,
    callback: Callable[[int, int], None] | None = None,
) -> ClipReport:
    """Measure a clip.

    ``frames`` (F, H, W, 3), uint8 or floats in 0..1, at ``fps``; ``waveform`` (C, N), (N,) or (1, C, N) in -1..1 at
    ``sample_rate`` Hz; either may be None. ``prompt`` with ``<S>words<E>`` says what was to be said. ``voices`` are
    reference embeddings (1, n), bound to the prompt's spans as :func:`nava_core.prompt.bind_voices` does with
    ``assignment``, without a prompt each to a span of its own; ``encode(waveform (C, N), sample_rate)`` gives such an
    embedding of a sound (``partial(encode_timbre, encoder)``). ``transcript`` is what was heard, or
    ``asr(waveform (C, N), sample_rate)`` says it: any speech recogniser. ``callback(step, steps)`` runs along the way;
    what it raises ends the measuring.

    Nothing is kept of the clip but curves. Raises ValueError for no frames and no sound, for wrong shapes, for voices
    without ``encode`` or that do not fit the spans, and SpanError for a prompt whose spans are not closed.
    """
    frames, waveform = _checked(frames, waveform, sample_rate, fps)
    spans = parse_spans(prompt or "")
    binding = bind_voices(spans, voices, assignment) if spans else list(range(len(voices)))
    if voices and encode is None:
        raise ValueError("Reference voices are compared by a speaker encoder: give it too.")
    steps = _Steps(callback, (0 if frames is None else -(-len(frames) // CHUNK)) + SOUND_STEPS + len(binding))
    rate = float(Fraction(fps).limit_denominator(1001))
    picture_seconds = 0.0 if frames is None else len(frames) / rate
    sound_seconds = 0.0 if waveform is None else waveform.shape[1] / sample_rate
    report = ClipReport(name, max(picture_seconds, sound_seconds), rate)
    curves = None if frames is None else _measure_picture(report, frames, steps)
    onsets = levels = None
    speech: list[Span] = []
    if waveform is not None:
        waveform, levels = _measure_sound(report, waveform, sample_rate, steps)
        onsets = onset_strength(waveform, sample_rate)
        steps()
        speech = speech_segments(waveform, sample_rate)
    _compare_lengths(report, picture_seconds, sound_seconds)
    if curves is not None and onsets is not None:
        _measure_sync(report, onsets, curves)
    steps()
    if waveform is not None:
        shares = [_speaking_length(span.words) for span in spans] or [1.0] * len(binding)
        groups = split_speech(speech, shares) if shares else []
        _measure_speech(report, waveform, sample_rate, speech, groups, binding, voices, encode, steps)
        steps()
        if transcript is None and asr is not None:
            transcript = asr(waveform, sample_rate)
    if transcript is not None:
        _measure_words(report, " ".join(span.words for span in spans), transcript)
    report.drawing = Drawing(
        curves,
        None if waveform is None else _envelope(waveform, report.seconds * sample_rate),
        onsets,
        [] if levels is None else silent_spans(levels),
        report.values.get("frozen", {}).get("spans", ()),
        report.values.get("flicker", {}).get("times", ()),
        speech,
    )
    steps.end()
    return report


def report_file(path: str | os.PathLike, max_seconds: float | None = None, **options: Any) -> ClipReport:
    """Measure a video, or a file of sound alone; ``options`` as of :func:`report_clip`.

    The picture is read at a width of 192 pixels, so that a long clip needs little memory. ``max_seconds``: no more than
    that is looked at. Raises FileNotFoundError, and ValueError for what cannot be read.
    """
    path = existing_file(path)
    options = {"name": path.name, **options}
    if not _has_picture(path):
        return report_clip(None, *read_audio(path, max_seconds), **options)
    width, height = read_video(path, max_seconds=1e-3).size
    small = small_size(height, width)
    video = read_video(path, max_seconds, size=(small[1], small[0]))
    report = report_clip(video.frames, video.waveform, video.sample_rate or None, video.fps, **options)
    report.values["picture"]["size"] = [width, height]
    report.notes += video.notes
    return report


def _has_picture(path: Path) -> bool:
    import av

    try:
        with av.open(str(path)) as container:
            cover = av.stream.Disposition.attached_pic
            return any(not stream.disposition & cover for stream in container.streams.video)
    except av.FFmpegError as error:
        raise ValueError(f"Cannot read {path.name} as video or sound: {error.strerror or error}.") from error


def _checked(frames, waveform, sample_rate, fps) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    if frames is None and waveform is None:
        raise ValueError("There is nothing to measure: give frames, sound, or both.")
    if frames is not None and (frames.ndim != 4 or frames.shape[-1] not in (3, 4) or 0 in frames.shape):
        raise ValueError(f"Frames are (frames, height, width, 3); got {tuple(frames.shape)}.")
    if not float(fps) > 0:
        raise ValueError(f"The frame rate must be above 0; got {fps}.")
    if waveform is not None and not (sample_rate and sample_rate >= 1000):
        raise ValueError(f"The sound's sample rate is 1000 Hz or more; got {sample_rate}.")
    return frames, None if waveform is None else as_waveform(waveform)


class _Steps:
    def __init__(self, callback: Callable[[int, int], None] | None, total: int) -> None:
        self.callback, self.total, self.done = callback, total, 0

    def __call__(self) -> None:
        self.done = min(self.done + 1, self.total)
        if self.callback is not None:
            self.callback(self.done, self.total)

    def end(self) -> None:
        self.done = self.total - 1
        self()


# ---------------------------------------------------------------- measures


def _measure_picture(report: ClipReport, frames: torch.Tensor, steps: _Steps) -> PictureCurves:
    curves = picture_curves(frames, steps)
    report.values["picture"] = {
        "frames": len(frames),
        "fps": report.fps,
        "size": [frames.shape[2], frames.shape[1]],
        "not_finite": curves.not_finite,
        "brightness": float(curves.brightness.mean()),
        "motion": float(curves.motion.mean()) if len(curves.motion) else 0.0,
    }
    if curves.not_finite:
        _fault(report, "not finite", f"NaN or infinity in the picture, {curves.not_finite} value(s)")
    frozen = frozen_spans(curves.changes, report.fps)
    share = sum(end - begin for begin, end in frozen) * report.fps / len(frames)
    report.values["frozen"] = {"share": min(share, 1.0), "spans": frozen}
    for begin, end in frozen:
        _fault(report, "frozen", f"The picture stands still for {end - begin:.2f} s from {begin:.2f} s on")
    found = flicker(curves.brightness, report.fps)
    report.values["flicker"] = {"count": len(found.times), "largest": found.largest, "times": list(found.times)}
    said = f"jumps in brightness by up to {100 * found.largest:.0f} % and back, {len(found.times)} times"
    if len(found.times) >= FLICKERS:
        _fault(report, "flicker", f"The picture {said}")
    elif found.times:
        report.notes.append(f"The picture {said}: a flash, or flicker.")
    return curves


def _measure_sound(report: ClipReport, waveform: torch.Tensor, rate: int, steps: _Steps):
    """(waveform without what is not finite, its levels)."""
    broken = not_finite(waveform)
    waveform = waveform.nan_to_num(0.0, 0.0, 0.0) if broken else waveform
    levels = sound_levels(waveform, rate)
    steps()
    loudness = integrated_loudness(waveform, rate)
    steps()
    peak, clipped, silent = true_peak(waveform, rate), clipped_share(waveform), silent_share(levels)
    report.values["sound"] = {
        "seconds": waveform.shape[1] / rate,
        "sample_rate": rate,
        "channels": waveform.shape[0],
        "not_finite": broken,
        "loudness_lufs": loudness,
        "true_peak_dbtp": peak,
        "clipped_share": clipped,
        "silent_share": silent,
        "silent_spans": silent_spans(levels),
    }
    if broken:
        _fault(report, "not finite", f"NaN or infinity in the sound, {broken} value(s)")
    if silent >= SILENT_SHARE:
        _fault(report, "silence", f"{100 * silent:.0f} % of the sound is silent (below -60 dBFS)")
    else:
        for begin, end in silent_spans(levels):
            report.notes.append(f"The sound is silent from {begin:.2f} to {end:.2f} s.")
    if clipped >= CLIPPED_SHARE:
        _fault(report, "clipping", f"{100 * clipped:.2f} % of the samples are clipped")
    elif peak is not None and peak > HOT:
        report.notes.append(f"The true peak is {peak:.1f} dBTP: above -1 a lossy codec or a player may clip it.")
    if loudness is not None and loudness < QUIET:
        report.notes.append(f"The sound is quiet, {loudness:.1f} LUFS; clips on the web are near -14, films near -27.")
    return waveform, levels


def _compare_lengths(report: ClipReport, picture: float, sound: float) -> None:
    if picture and sound and abs(picture - sound) > LENGTH_SECONDS:
        _fault(report, "length", f"The picture lasts {picture:.2f} s and the sound {sound:.2f} s")


def _measure_sync(report: ClipReport, onsets: torch.Tensor, curves: PictureCurves) -> None:
    sync = measure_sync(onsets, curves.accents, report.fps)
    if sync is None:
        report.values["sync"] = None
        report.notes.append(
            "Whether sounds fall on motion cannot be said: the clip is shorter than a second, or nothing begins in its "
            "sound or its picture."
        )
        return
    report.values["sync"] = {
        "lag_ms": 1000 * sync.lag,
        "correlation": sync.correlation,
        "correlation_at_zero": sync.at_zero,
        "chance": sync.chance,
        "chance_correlation": sync.chance_correlation,
        "linked": sync.is_linked,
    }
    if not sync.is_linked:
        report.notes.append(
            f"Sounds do not fall on motion more than by chance ({100 * sync.chance:.0f} % of shuffled sounds fit as "
            "well): right for talk and music over a calm picture, wrong where things are seen to strike."
        )
    elif not _is_in_time(sync, report.fps):
        when = "late" if sync.lag > 0 else "early"
        said = f"{1000 * abs(sync.lag):.0f} ms {when}"
        if sync.chance <= SURE:
            _fault(report, "sync", f"The sound comes {said}")
        else:
            report.notes.append(f"The sound may come {said}; {100 * sync.chance:.1f} % of shuffled sounds fit as well.")


def _is_in_time(sync: Sync, fps: float) -> bool:
    """Within what viewers notice, and half a frame, which is what a picture can tell."""
    return -EARLY - 0.5 / fps <= sync.lag <= LATE + 0.5 / fps


def _speaking_length(words: str) -> float:
    """How long words take to say, beside others: in letters."""
    weight = {True: 1, False: UNSPACED_WEIGHT}
    return max(1.0, float(sum(weight[sign < "\u2e80"] for sign in text_units(words, "character"))))


def _measure_speech(report, waveform, rate, speech, groups, binding, voices, encode, steps) -> None:
    values: dict[str, Any] = {"segments": speech, "seconds": sum(end - begin for begin, end in speech)}
    report.values["speech"] = values
    if binding and not speech:
        _fault(report, "speech", "Nothing was found in the sound that could be speech")
    if not voices or not speech:
        return
    spans = compare_voices(waveform, rate, groups, binding, voices, encode, steps)
    values["spans"] = [
        None
        if span is None
        else {
            "begin": span.begin,
            "end": span.end,
            "voice": None if span.voice is None else span.voice + 1,
            "similarity": span.similarity,
            "similarities": list(span.similarities),
            "resembles": span.resembles + 1,
        }
        for span in spans
    ]
    values["in_order"] = came_in_order(spans)
    if values["in_order"] is False:
        wrong = [
            f"span {number} sounds like voice {span.resembles + 1}, not {span.voice + 1}"
            for number, span in enumerate(spans, start=1)
            if span is not None and span.voice is not None and span.resembles != span.voice
        ]
        _fault(report, "voices", f"The voices did not come in order: {', '.join(wrong)}")
    if values["in_order"] is not None and any(_is_close(span) for span in spans):
        report.notes.append(
            f"Some spans are about as near to one reference as to another, within {CLEARLY}: take the order of the "
            "voices with caution."
        )


def _is_close(span) -> bool:
    if span is None or span.voice is None or len(span.similarities) < 2:
        return False
    others = [value for index, value in enumerate(span.similarities) if index != span.voice]
    return abs(span.similarity - max(others)) < CLEARLY


def _measure_words(report: ClipReport, expected: str, transcript: str) -> None:
    try:
        errors = word_errors(expected, transcript)
    except ValueError as error:  # a recogniser that goes on and on must not cost the other figures
        report.values["words"] = {"transcript": transcript.strip()}
        _fault(report, "words", str(error).rstrip("."))
        return
    report.values["words"] = {"transcript": transcript.strip(), **({} if errors is None else asdict(errors))}
    if errors is None:
        if text_units(transcript, "word"):
            report.notes.append("Words were heard, but the prompt has none that were to be said.")
        return
    if errors.rate >= WORD_RATE:
        rate = f"{errors.unit} error rate {100 * errors.rate:.0f} %"
        _fault(report, "words", f"Other words were said than asked for ({rate})")


def _fault(report: ClipReport, measure: str, text: str) -> None:
    report.faults.append(Fault(measure, f"{text}."))


def _envelope(waveform: torch.Tensor, samples: float) -> torch.Tensor:
    """Lowest and highest sample of each column of a drawing that ``samples`` samples fill: (2, columns)."""
    edges = torch.linspace(0, samples, COLUMNS + 1).long().tolist()
    columns = torch.zeros(2, COLUMNS)
    for column in range(COLUMNS):
        part = waveform[:, edges[column] : max(edges[column + 1], edges[column] + 1)]
        if part.numel():
            columns[0, column], columns[1, column] = part.min(), part.max()
    return columns


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return round(value, 4)
    if isinstance(value, Mapping):
        return {key: _rounded(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_rounded(each) for each in value]
    return value
