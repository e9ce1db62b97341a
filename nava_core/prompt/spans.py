"""Speech spans `<S>words<E>` in a prompt: finding them, marking their timbre token, cleaning the text."""

from __future__ import annotations

import html
import re
import unicodedata
from dataclasses import dataclass

SPAN_START = "<S>"
SPAN_END = "<E>"
OTHER_END = "</S>"  # closes a span too: some of the makers' prompts have it
SENTINEL = "<extra_id_2>"

_MARKS = re.compile(r"<S>|<E>|</S>|<extra_id_\d+>")


class SpanError(ValueError):
    """A prompt whose speech marks do not pair up. `position` is the character index of the mark at fault, `kind` one of
    "nested", "unopened", "empty", "reserved", "unclosed"."""

    def __init__(self, message: str, position: int, kind: str = ""):
        super().__init__(message)
        self.position = position
        self.kind = kind


@dataclass(frozen=True)
class SpeechSpan:
    """One spoken passage of a prompt.

    `words` is what is said, without surrounding space; `prompt[start:end]` is the whole `<S>words<E>`, closed by
    `<E>` or `</S>`;
    `index` counts the spans of the prompt from 0.
    """

    words: str
    start: int
    end: int
    index: int = 0


def _excerpt(prompt: str, position: int, width: int = 24) -> str:
    return " ".join(prompt[position : position + width].split())


def parse_spans(prompt: str) -> list[SpeechSpan]:
    """The speech spans of `prompt`, in order; positions are character indices into it.

    Raises `SpanError` for a `<S>` without `<E>`, an `<E>` without `<S>`, a `<S>` inside a span, a span
    without words, and a typed `<extra_id_n>` (the timbre token is put in for each span, never by hand).
    """
    spans, faults = scan_spans(prompt)
    if faults:
        raise faults[0]
    return spans


def scan_spans(prompt: str) -> tuple[list[SpeechSpan], list[SpanError]]:
    """The speech spans of `prompt` that are whole, and what is wrong with the rest, each in order: what
    `parse_spans` would raise, all of it. A `<S>` inside a span begins another one."""
    spans: list[SpeechSpan] = []
    faults: list[SpanError] = []
    opened: int | None = None
    for mark in _MARKS.finditer(prompt):
        at = mark.start()
        if mark.group() == SPAN_START:
            if opened is not None:
                faults.append(_nested(prompt, at, opened))
            opened = at
        elif mark.group() not in (SPAN_END, OTHER_END):
            faults.append(_reserved(prompt, at, mark.group()))
        elif opened is None:
            faults.append(_unopened(prompt, at, mark.group()))
        else:
            words = prompt[opened + len(SPAN_START) : at].strip()
            if words:
                spans.append(SpeechSpan(words, opened, mark.end(), len(spans)))
            else:
                faults.append(_empty(opened))
            opened = None
    if opened is not None:
        faults.append(_unclosed(prompt, opened))
    return spans, faults


def _where(prompt: str, at: int) -> str:
    return f"character {at} (“{_excerpt(prompt, at)}”)"


def _nested(prompt: str, at: int, opened: int) -> SpanError:
    return SpanError(
        f"A speech span opens at {_where(prompt, at)} inside the one opened at character {opened}: "
        f"close that one with {SPAN_END} first.",
        at,
        "nested",
    )


def _unopened(prompt: str, at: int, mark: str) -> SpanError:
    return SpanError(
        f"{mark} at {_where(prompt, at)} closes a speech span that was never opened: "
        f"write {SPAN_START} before its words.",
        at,
        "unopened",
    )


def _empty(opened: int) -> SpanError:
    return SpanError(
        f"The speech span opened at character {opened} has no words: "
        f"write what is said between {SPAN_START} and {SPAN_END}, or remove both.",
        opened,
        "empty",
    )


def _reserved(prompt: str, at: int, token: str) -> SpanError:
    return SpanError(
        f"{token} at {_where(prompt, at)} is a reserved token: write only "
        f"{SPAN_START}words{SPAN_END}, its timbre token is put in automatically.",
        at,
        "reserved",
    )


def _unclosed(prompt: str, opened: int) -> SpanError:
    return SpanError(
        f"The speech span opened at {_where(prompt, opened)} is never closed: write {SPAN_END} after its words.",
        opened,
        "unclosed",
    )


def insert_sentinels(prompt: str) -> str:
    """`prompt` as the model was trained: the timbre token's sentinel after every `<S>`, every span closed by `<E>`."""
    return prompt.replace(SPAN_START, SPAN_START + SENTINEL).replace(OTHER_END, SPAN_END)


def contains_marks(text: str) -> bool:
    """Whether `text` holds a speech mark or a reserved token, also when written with HTML entities or full-width
    signs: the text encoder reads these as the plain ones."""
    return _MARKS.search(unicodedata.normalize("NFKC", html.unescape(html.unescape(text)))) is not None


def clean_text(text: str) -> str:
    """The cleaning that the text encoder's training used: ftfy, HTML entities resolved twice, one space
    for any run of whitespace, none at the ends. Full-width Latin signs become plain ones (ftfy)."""
    try:
        import ftfy
    except ImportError as error:
        raise RuntimeError("Cleaning a prompt needs the package ftfy: install it with `pip install ftfy`.") from error
    text = html.unescape(html.unescape(ftfy.fix_text(text)))
    return " ".join(text.split())
