"""What can be said of a prompt before it is encoded: its spans, what is wrong with it, how long it is, who speaks."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field

from .spans import SpanError, SpeechSpan, clean_text, insert_sentinels, scan_spans
from .speech_time import least_speech_seconds, speech_seconds
from .tokenizer import PromptTokenizer
from .voices import BindingError, bind_voices

MAX_TOKENS = 512
USUAL_CLIP_SECONDS = 6.0  # taken where a clip's length is not known
ERROR, WARNING, NOTE = "error", "warning", "note"
TOO_MUCH, HURRIED, MISSPELT = "too_much_speech", "hurried_speech", "misspelt"
MAX_FAULTS = 20  # of the marks, that are told of: more help nobody

# Tokens of umt5 as a rule of thumb, for where there is no tokenizer: assumed, not measured, and rather too many.
TOKENS_A_WORD = 1.35
TOKENS_A_CHARACTER = 0.75  # Chinese
TOKENS_A_SIGN = 1.0  # punctuation
TOKENS_A_SPAN = 7  # its two marks in three pieces each, and the timbre token

_HAN = re.compile(r"[\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7af]")
_WORD = re.compile(r"[^\W_\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7af]+")
_SIGN = re.compile(r"[^\w\s]|_")
_MARKS = re.compile(r"<S>|<E>|</S>")
_LIKE_MARKS = re.compile(r"(?!<S>|<E>|</S>)[<＜] ?[/／]?[sSeEｓＳｅＥ] ?[>＞]")


@dataclass(frozen=True)
class Problem:
    """One thing to say of a prompt. `code`: what, in a word, for those who say it in another language; `severity`:
    "error" (it can't be encoded so), "warning" or "note"; `position`: character index, or None; `values`: the figures
    in the message."""

    code: str
    message: str
    severity: str = ERROR
    position: int | None = None
    values: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class CheckedSpan:
    """A speech span: `number` from 1, its words, where it is in the prompt, about how many seconds it takes to say, the
    number of its voice from 1 (None: no voice), and whether it fits: "whole", "part", "lost", or "" if unknown."""

    number: int
    words: str
    start: int
    end: int
    seconds: float
    voice: int | None = None
    fate: str = ""


@dataclass(frozen=True)
class PromptCheck:
    """What `check_prompt` found. `tokens` is exact or an estimate, as `exact` says, of `max_tokens`; `clip_seconds` is
    the usual length where `clip_assumed`."""

    spans: list[CheckedSpan]
    problems: list[Problem]
    tokens: int
    max_tokens: int
    exact: bool
    speech_seconds: float
    clip_seconds: float
    clip_assumed: bool

    def as_dict(self) -> dict:
        """The same as plain data, fit for JSON."""
        return asdict(self)

    def speech_warnings(self) -> list[str]:
        """What is to be said where the speech is too long for the clip."""
        return [problem.message for problem in self.problems if problem.code == TOO_MUCH]

    def mark_warnings(self) -> list[str]:
        """What is to be said where a speech mark is misspelt, so that its words are no speech."""
        return [problem.message for problem in self.problems if problem.code == MISSPELT]

    def speech_line(self) -> str:
        """A line on the speech's length; "" where nobody speaks."""
        if not self.spans:
            return ""
        said = [problem.message for problem in self.problems if problem.code in (TOO_MUCH, HURRIED)]
        clip = "" if self.clip_assumed else f" of {self.clip_seconds:g} s"
        return said[0] if said else f"Speech: about {self.speech_seconds:.1f} s{clip}."


def check_prompt(
    prompt: str,
    *,
    tokenizer: PromptTokenizer | None = None,
    voices: int = 0,
    assignment: Sequence[int | None] | None = None,
    clip_seconds: float | None = None,
) -> PromptCheck:
    """Check a prompt without encoding it; what is wrong with it is told, not raised.

    `tokenizer`: for the exact number of tokens, estimated without. `voices`: how many reference voices there are,
    bound as `bind_voices` does with `assignment`. `clip_seconds`: the clip's length, None where it is not known: then
    the usual 6 s are assumed, and said to be. Raises what the tokenizer raises where a package is missing
    (`RuntimeError`).
    """
    found, faults = scan_spans(prompt)
    problems = [Problem(fault.kind, str(fault), ERROR, fault.position) for fault in faults[:MAX_FAULTS]]
    problems += _misspelt(prompt)
    binding = _binding(found, voices, assignment, problems) if not faults else [None] * len(found)
    tokens, fates = _tokens(prompt, found, faults, tokenizer, problems)
    most = tokenizer.max_length if tokenizer else MAX_TOKENS
    if tokens > most:
        problems.append(_too_long(tokens, most, tokenizer is not None))
    spans = [
        CheckedSpan(span.index + 1, span.words, span.start, span.end, speech_seconds(span.words),
                    None if voice is None else voice + 1, fate)
        for span, voice, fate in zip(found, binding, fates, strict=True)
    ]  # fmt: skip
    problems += [_cut(span) for span in spans if span.fate in ("part", "lost")]
    words = " ".join(span.words for span in found)
    clip = clip_seconds or USUAL_CLIP_SECONDS
    problems += _too_much(words, clip, not clip_seconds)
    return PromptCheck(
        spans, problems, tokens, most, tokenizer is not None, speech_seconds(words), clip, not clip_seconds
    )


def estimate_tokens(prompt: str) -> int:
    """About how many tokens `prompt` has for umt5, end token included; 0 for an empty one."""
    if not prompt.strip():
        return 0
    marks = len(_MARKS.findall(prompt))
    text = _MARKS.sub(" ", prompt)
    return 1 + int(
        0.5
        + len(_WORD.findall(text)) * TOKENS_A_WORD
        + len(_HAN.findall(text)) * TOKENS_A_CHARACTER
        + len(_SIGN.findall(text)) * TOKENS_A_SIGN
        + marks * TOKENS_A_SPAN / 2
    )


def _misspelt(prompt: str) -> list[Problem]:
    """The first mark in small letters or full-width signs, as Chinese keyboards write them: it marks no speech."""
    found = _LIKE_MARKS.search(prompt)
    if not found:
        return []
    message = (
        f"“{found[0]}” at character {found.start()} marks no speech: write <S>words<E>, in capitals and plain signs."
    )
    return [Problem(MISSPELT, message, WARNING, found.start())]


def _binding(found: list[SpeechSpan], voices: int, assignment, problems: list[Problem]) -> list[int | None]:
    try:
        return bind_voices(found, range(voices), assignment)
    except BindingError as error:
        problems.append(Problem(error.kind, str(error), values={"voices": voices, "spans": len(found)}))
        return [None] * len(found)


def _tokens(
    prompt: str, found: list[SpeechSpan], faults: list[SpanError], tokenizer: PromptTokenizer | None, problems: list
) -> tuple[int, list[str]]:
    """The number of tokens, and what becomes of each span."""
    unknown = [""] * len(found)
    if tokenizer is None or not prompt.strip():
        return estimate_tokens(prompt), unknown
    if not faults:
        try:
            tokenized = tokenizer(prompt)
            return tokenized.total_tokens, tokenized.span_fate
        except ValueError as error:  # a timbre token behind HTML entities
            problems.append(Problem("reserved", str(error)))
    return len(tokenizer.encode(clean_text(insert_sentinels(prompt)))) + 1, unknown


def _too_long(tokens: int, most: int, exact: bool) -> Problem:
    said = f"The prompt has {'' if exact else 'about '}{tokens} tokens, of which {most} fit: the end will be cut."
    return Problem("too_long", f"{said} Shorten it.", WARNING, values={"tokens": tokens, "most": most})


def _cut(span: CheckedSpan) -> Problem:
    what = "will not be spoken" if span.fate == "lost" else "loses its end"
    message = f"Speech span {span.number} {what}: it lies beyond the last token that fits."
    return Problem(f"span_{span.fate}", message, WARNING, span.start, {"span": span.number})


def _too_much(words: str, clip: float, assumed: bool) -> list[Problem]:
    easy, least = speech_seconds(words), least_speech_seconds(words)
    if easy <= clip:
        return []
    long = f"the usual {clip:g} s" if assumed else f"{clip:g} s"
    values = {"speech": round(easy, 1), "least": round(least, 1), "clip": clip}
    if least > clip:
        message = f"Too much speech: about {easy:.1f} s, {least:.1f} s in a hurry, for a clip of {long}. Shorten the "
        return [Problem(TOO_MUCH, message + "words, or make the clip longer.", WARNING, values=values)]
    message = f"The speech takes about {easy:.1f} s at an easy pace: in a clip of {long} it will be hurried."
    return [Problem(HURRIED, message, NOTE, values=values)]
