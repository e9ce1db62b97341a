"""Negative prompts: which text a clip gets, and the built-in ones, in Chinese and English (`negatives.json`)."""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path

BUILT_IN, ZERO = "default", "zero"  # in place of a negative text


@lru_cache(maxsize=1)
def _table() -> dict[str, dict[str, str]]:
    return json.loads(Path(__file__).with_name("negatives.json").read_text(encoding="utf-8"))


def negative_text(negative: str | None, mode: str) -> str:
    """The negative text of a clip of ``mode``; empty stands for the all-zero context.

    None or "default": the built-in Chinese terms for the mode, as the released model is sampled with an encoded
    Chinese text of that kind. "zero", or an empty text: the all-zero context, the null of training. Else the text.
    """
    if negative is None or negative == BUILT_IN:
        return default_negative("audio" if mode == "audio" else "video")
    return "" if negative == ZERO else negative.strip()


def with_default_negative(text: str, kind: str, language: str = "zh") -> str:
    """``text`` followed by the default negative terms, or these alone where it is empty."""
    terms = default_negative(kind, language)
    separator = "，" if language == "zh" else ", "
    return separator.join([text.strip().rstrip(",，. 。"), terms]) if text.strip() else terms


def default_negative(kind: str, language: str = "zh") -> str:
    """The built-in negative text for "video" (clips with a picture: faults of picture and of sound) or "audio" (sound
    alone), in "zh" or "en". Raises `ValueError` for another kind or language."""
    table = _table()
    if kind not in table:
        raise ValueError(f"No default negative for “{kind}”: choose one of {', '.join(table)}.")
    if language not in table[kind]:
        raise ValueError(f"No default negative in language “{language}”: choose one of {', '.join(table[kind])}.")
    return table[kind][language]
