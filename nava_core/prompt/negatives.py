"""Default negative prompts, for picture and for sound, in English and Chinese (`negatives.json`)."""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path


@lru_cache(maxsize=1)
def _table() -> dict[str, dict[str, str]]:
    return json.loads(Path(__file__).with_name("negatives.json").read_text(encoding="utf-8"))


def with_default_negative(text: str, kind: str, language: str = "en") -> str:
    """``text`` followed by the default negative terms, or these alone where it is empty."""
    terms = default_negative(kind, language)
    separator = "，" if language == "zh" else ", "
    return separator.join([text.strip().rstrip(",，. 。"), terms]) if text.strip() else terms


def default_negative(kind: str, language: str = "en") -> str:
    """The default negative text for "video" (joint clips: picture and sound) or "audio" (sound alone), in "en"
    or "zh". Raises `ValueError` for another kind or language."""
    table = _table()
    if kind not in table:
        raise ValueError(f"No default negative for “{kind}”: choose one of {', '.join(table)}.")
    if language not in table[kind]:
        raise ValueError(f"No default negative in language “{language}”: choose one of {', '.join(table[kind])}.")
    return table[kind][language]
