"""How long words take to say: a rule of thumb for English, Chinese and both together."""

from __future__ import annotations

import re

# Rates of easy, narrated speech, pauses at commas and full stops among them. English: 150 words a minute, the usual
# figure for reading aloud and for audiobooks. Chinese: 250 characters a minute, between everyday talk (200 and more)
# and the news (300 and more). A character is a syllable, so kana, Hangul syllables and single digits count as one.
WORDS_A_SECOND = 2.5
CHARACTERS_A_SECOND = 25 / 6
# Hurried speech, as in quick dialogue or the news, still understood: what takes longer than this won't fit.
HURRY = 1.4

_SYLLABLE = re.compile(r"[\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7af0-9]")
_WORD = re.compile(r"[^\W\d_\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7af]+(?:['’-][^\W\d_]+)*")


def speech_seconds(words: str) -> float:
    """About how many seconds ``words`` take to say at an easy pace, small pauses included; 0.0 for nothing to say.

    An estimate from counts alone (`WORDS_A_SECOND`, `CHARACTERS_A_SECOND`): a speaker told to hurry is up to `HURRY`
    times as quick, one told to take their time slower.
    """
    return len(_WORD.findall(words)) / WORDS_A_SECOND + len(_SYLLABLE.findall(words)) / CHARACTERS_A_SECOND


def least_speech_seconds(words: str) -> float:
    """The same for hurried speech: less time than this is too little."""
    return speech_seconds(words) / HURRY
