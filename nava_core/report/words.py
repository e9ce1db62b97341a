"""What was said against what was to be said: word and character error rates of a transcript."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

# Scripts that are written without spaces between words: Han, kana.
UNSPACED = r"\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
_UNSPACED = re.compile(f"[{UNSPACED}]")
_WORD = re.compile(f"[{UNSPACED}]|[^\\W_{UNSPACED}]+(?:['’][^\\W_{UNSPACED}]+)*")
MAX_UNITS = 5000  # of either text, which takes seconds


@dataclass(frozen=True)
class WordErrors:
    """How a transcript differs from the words: ``unit`` is "word", or "character" in Chinese and Japanese.

    ``rate`` is (wrong + missing + added) / expected, which is above 1 where much was added; ``wrong`` units were others
    than ``expected``.
    """

    unit: str
    rate: float
    expected: int
    wrong: int
    missing: int
    added: int


def text_units(text: str, unit: str) -> list[str]:
    """What is counted in ``text``: its words, or each of its characters where ``unit`` is "character".

    Case, punctuation and full-width forms do not count. A Chinese or Japanese character is a word of its own.
    Traditional and simplified characters, and numbers in figures and in words, stay different.
    """
    plain = unicodedata.normalize("NFKC", text).casefold().replace("’", "'")
    words = _WORD.findall(plain)
    return [sign for word in words for sign in word if sign != "'"] if unit == "character" else words


def unit_of(text: str) -> str:
    """ "character" for a text that is mostly Chinese or Japanese, else "word"."""
    words = text_units(text, "word")
    unspaced = sum(1 for word in words if _UNSPACED.match(word))
    return "character" if 2 * unspaced > len(words) else "word"


def word_errors(expected: str, transcript: str) -> WordErrors | None:
    """Word error rate of ``transcript`` against ``expected``, in Chinese and Japanese the character error rate.

    By the alignment with the fewest differences (Levenshtein's). None where nothing was to be said.
    """
    unit = unit_of(expected)
    wanted, heard = (text_units(text, unit) for text in (expected, transcript))
    if max(len(wanted), len(heard)) > MAX_UNITS:
        raise ValueError(f"Words are compared up to {MAX_UNITS} of them; these are {max(len(wanted), len(heard))}.")
    if not wanted:
        return None
    wrong, missing, added = _differences(wanted, heard)
    return WordErrors(unit, (wrong + missing + added) / len(wanted), len(wanted), wrong, missing, added)


def _differences(wanted: Sequence[str], heard: Sequence[str]) -> tuple[int, int, int]:
    """(wrong, missing, added) of the best alignment: each row holds (sum, wrong, missing, added) up to a place."""
    row = [(column, 0, 0, column) for column in range(len(heard) + 1)]
    for number, word in enumerate(wanted, start=1):
        above, row = row, [(number, 0, number, 0)]
        for column, other in enumerate(heard, start=1):
            same = above[column - 1]
            if word == other:
                row.append(same)
                continue
            changed, left_out, put_in = same, above[column], row[column - 1]
            row.append(
                min(
                    (changed[0] + 1, changed[1] + 1, changed[2], changed[3]),
                    (left_out[0] + 1, left_out[1], left_out[2] + 1, left_out[3]),
                    (put_in[0] + 1, put_in[1], put_in[2], put_in[3] + 1),
                )
            )
    return row[-1][1:]
