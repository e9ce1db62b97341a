"""Speech spans `<S>words<E>` in a prompt: finding them, marking their timbre token, cleaning the text."""

from __future__ import annotations

import html
import re
from dataclasses import dataclass

SPAN_START = "<S>"
SPAN_END = "<E>"
OTHER_END = "</S>"  # closes a span too: some of the makers' prompts have it
SENTINEL = "<extra_id_2>"

_MARKS = re.compile(r"<S>|<E>|</S>|<extra_id_\d+>")


class SpanError(ValueError):
    """A prompt whose speech marks do not pair up. `position` is the character index of the mark at fault."""

    def __init__(self, message: str, position: int):
        super().__init__(message)
        self.position = position


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
    spans: list[SpeechSpan] = []
    opened: int | None = None
    for mark in _MARKS.finditer(prompt):
        at = mark.start()
        where = f"character {at} (“{_excerpt(prompt, at)}”)"
        if mark.group() == SPAN_START:
            if opened is not None:
                raise SpanError(
                    f"A speech span opens at {where} inside the one opened at character {opened}: "
                    f"close that one with {SPAN_END} first.",
                    at,
                )
            opened = at
        elif mark.group() in (SPAN_END, OTHER_END):
            if opened is None:
                raise SpanError(
                    f"{mark.group()} at {where} closes a speech span that was never opened: "
                    f"write {SPAN_START} before its words.",
                    at,
                )
            words = prompt[opened + len(SPAN_START) : at].strip()
            if not words:
                raise SpanError(
                    f"The speech span opened at character {opened} has no words: "
                    f"write what is said between {SPAN_START} and {SPAN_END}, or remove both.",
                    opened,
                )
            spans.append(SpeechSpan(words, opened, mark.end(), len(spans)))
            opened = None
        else:
            raise SpanError(
                f"{mark.group()} at {where} is a reserved token: write only "
                f"{SPAN_START}words{SPAN_END}, its timbre token is put in automatically.",
                at,
            )
    if opened is not None:
        raise SpanError(
            f"The speech span opened at character {opened} (“{_excerpt(prompt, opened)}”) is never closed: "
            f"write {SPAN_END} after its words.",
            opened,
        )
    return spans


def insert_sentinels(prompt: str) -> str:
    """`prompt` as the model was trained: the timbre token's sentinel after every `<S>`, every span closed by `<E>`."""
    return prompt.replace(SPAN_START, SPAN_START + SENTINEL).replace(OTHER_END, SPAN_END)


def contains_marks(text: str) -> bool:
    """Whether `text` holds a speech mark or a reserved token, also when written with HTML entities."""
    return _MARKS.search(html.unescape(html.unescape(text))) is not None


def clean_text(text: str) -> str:
    """The cleaning that the text encoder's training used: ftfy, HTML entities resolved twice, one space
    for any run of whitespace, none at the ends. Full-width Latin signs become plain ones (ftfy)."""
    try:
        import ftfy
    except ImportError as error:
        raise RuntimeError("Cleaning a prompt needs the package ftfy: install it with `pip install ftfy`.") from error
    text = html.unescape(html.unescape(ftfy.fix_text(text)))
    return " ".join(text.split())
