"""Whether a rewritten prompt can take its draft's place: speech word for word and in order, language, length."""

from __future__ import annotations

import html
import re
import unicodedata
import zlib
from bisect import bisect_left
from collections import Counter
from dataclasses import dataclass

from ..prompt import SPAN_END, SPAN_START, PromptTokenizer, SpanError, parse_spans

TOKEN_LIMIT = 512  # of the text encoder, end token included
TOKENS_A_LETTER, TOKENS_A_HAN = 0.27, 0.75  # of umt5, on the safe side
REPETITIVE = 0.16  # compressed to less than this share, a text says the same again and again
SHORTEST = 0.6  # of the draft's length

_HAN = re.compile(r"[\u3400-\u9fff]")
_SAYS = (
    r"(?:\b(?:(?:say|ask|shout|whisper|answer|call|exclaim|sing|speak|tell|announce|murmur|yell|mutter|add)(?:s|ed|ing)?|"
    r"said|sang|told|spoke|repl(?:y|ies|ied|ying)|cr(?:y|ies|ied|ying))\b[^\"“”「」<>.!?。！？]{0,60})"
)
# A colon or comma leads to the words, or nothing: streets, novels and names have the characters of these verbs too
_SAYS_IN_CHINESE = (
    r"(?:(?:(?<![小传])[说喊问答唱讲叫]|(?<![纪观概信])念)[^\"“”「」<>.!?。！？，,：:]{0,12}[：:，,]\s*|"
    r"(?<![街知大通隧轨管频河航跑车])道[：:，,]\s*|"
    r"(?:(?<![小传])[说喊问答唱]|(?<![纪观概信])念|叫(?=道|着|了?一声))(?:道|着|出|了)?(?:一[声句])?)"
)
_WRITTEN = re.compile(
    r"\b(?:reads?|reading|written|printed|painted|named|titled|label(?:s|led|ed)?)\b|[写刻印题]着|名[叫为]",
    re.IGNORECASE,
)
_BEARER = re.compile(
    r"\b(?:sign|signboard|label|banner|poster|plate|plaque|board|screen|sticker|card|note|shirt|book)s?"
    r"(?:\s+(?:that|which))?\s+$",
    re.IGNORECASE,
)
_IN_QUOTES = r"(?:\"([^\"<>]+)\"|“([^“”<>]+)”|「([^「」<>]+)」)"
_QUOTED = re.compile(f"({_SAYS}|{_SAYS_IN_CHINESE})" + _IN_QUOTES, re.IGNORECASE)
_REFUSAL = re.compile(
    r"^(?:i['’]?m sorry|sorry\b|i can(?:no|['’])t|i am (?:unable|sorry)|as an ai\b|抱歉|对不起|我无法|很遗憾)", re.I
)
_SENTENCE_END = re.compile(r"[.!?](?=\s|$)|[。！？](?![”」])|[.!?。！？][\"”」]|<E>(?=\s*(?:$|[A-Z\u3400-\u9fff]))")


@dataclass(frozen=True)
class Length:
    """Tokens of a prompt; ``exact``: counted by the text encoder's tokenizer, else estimated."""

    tokens: int
    exact: bool
    limit: int = TOKEN_LIMIT

    @property
    def fits(self) -> bool:
        return self.tokens <= self.limit

    def __str__(self) -> str:
        return f"{'' if self.exact else 'about '}{self.tokens} of {self.limit} tokens"


def measure(prompt: str, tokenizer: PromptTokenizer | None = None) -> Length:
    """The length of a prompt whose speech marks pair up, exactly where there is a tokenizer."""
    if tokenizer is not None:
        return Length(tokenizer(prompt).total_tokens, True, tokenizer.max_length)
    han = len(_HAN.findall(prompt))
    return Length(round(TOKENS_A_HAN * han + TOKENS_A_LETTER * (len(prompt) - han)) + 1, False)


def mark_quoted_speech(draft: str) -> str:
    """A draft without speech spans, with what somebody in it says in quotation marks made into spans.

    Only after a verb of saying in the same sentence: a sign that says “OPEN” is left as it is, and a shop called
    “Dawn” too.
    """
    if parse_spans(draft):
        return draft

    def span(found: re.Match) -> str:
        words = _spoken(found)
        return f"{found[1]}{SPAN_START}{words}{SPAN_END}" if words else found[0]

    return _QUOTED.sub(span, draft)


def _spoken(found: re.Match) -> str:
    """What is said in a match of _QUOTED; "" where it is but a name or stands written somewhere."""
    named = found[1].casefold().rstrip() == "called"
    if named or _WRITTEN.search(found[1]) or _BEARER.search(found.string[: found.start()]):
        return ""
    return next(group for group in found.groups()[1:] if group is not None).strip()


def speech_faults(prompt: str, expected: list[str]) -> list[str]:
    """What is wrong with the speech of a prompt that should say ``expected``, in sentences; none where all is well.

    Letters and figures count, case and punctuation do not: see :func:`restored`.
    """
    try:
        said = [span.words for span in parse_spans(prompt)]
    except SpanError as error:
        return [f"The speech marks do not pair up. {error}"]
    wanted, found = [_folded(words) for words in expected], [_folded(words) for words in said]
    if wanted == found:
        return []
    if not expected:
        return [f"The draft has no speech, but {_quoted(said)} was added."]
    if Counter(wanted) == Counter(found):
        return [f"The speech came back in another order; in the draft it is {_quoted(expected)}."]
    missing = [words for words, key in zip(expected, wanted, strict=True) if key not in found]
    added = [words for words, key in zip(said, found, strict=True) if key not in wanted]
    if missing and added:
        return [f"The speech was changed: {_quoted(missing)} became {_quoted(added)}; copy it word for word."]
    if missing:
        return [f"The speech {_quoted(missing)} was left out; it must stand between {SPAN_START} and {SPAN_END}."]
    if added:
        return [f"The speech {_quoted(added)} is not in the draft; leave it out."]
    return [f"Every passage of speech must come once, in this order: {_quoted(expected)}."]


def unmarked_faults(prompt: str, draft: str) -> list[str]:
    """That a prompt lets somebody speak in quotation marks what the draft does not, in a sentence; none where it
    doesn't: the model may speak that too."""
    unmarked = filter(None, map(_spoken, _QUOTED.finditer(described(prompt, "."))))
    added = [words for words in unmarked if words not in described(draft)]
    return [f"Speech was added in quotation marks: {_quoted(added)}; leave it out."] if added else []


def restored(prompt: str, expected: list[str]) -> str:
    """A prompt without speech faults, its speech letter by letter as expected: case, quotes, punctuation too."""
    for span, words in reversed(list(zip(parse_spans(prompt), expected, strict=True))):
        prompt = f"{prompt[: span.start]}{SPAN_START}{words}{SPAN_END}{prompt[span.end :]}"
    return prompt


def text_faults(prompt: str, draft: str, language: str) -> list[str]:
    """What else is wrong with a rewritten prompt, in sentences: empty, refused, another language, too short, a loop."""
    text = described(prompt)
    if not text:
        return ["There was no prompt in the answer."]
    if _REFUSAL.match(text):
        return [f"The answer was a refusal (“{text[:60]}”)."]
    han = len(_HAN.findall(text))
    if language == "zh" and han < 0.2 * len(text):
        return ["It is not in Chinese."]
    if language == "en" and han > 0.1 * len(text):
        return ["It is not in English."]
    if _weight(text) < min(SHORTEST * _weight(described(draft)), 600):
        return ["It is shorter than the draft and cannot hold all that the draft says."]
    data = text.encode("utf-8", "ignore")
    if len(data) > 500 and len(zlib.compress(data)) < REPETITIVE * len(data):
        return ["It says the same again and again."]
    return []


def length_faults(length: Length, language: str) -> list[str]:
    """That a prompt is too long, and how long it may be; none where it fits."""
    if length.fits:
        return []
    share = 0.85 * length.limit
    most = f"{round(share / TOKENS_A_HAN)} characters" if language == "zh" else f"{round(share / 1.5)} words"
    return [f"It is too long ({length}): write at most {most}, speech included."]


def shortened(prompt: str, expected: list[str], tokenizer: PromptTokenizer | None = None) -> str | None:
    """A prompt that is too long, or was broken off, without its last sentences; None if speech would go with them."""

    def too_long(end: int) -> bool:
        return not speech_faults(prompt[:end], expected) and not measure(prompt[:end], tokenizer).fits

    ends = [found.end() for found in _SENTENCE_END.finditer(prompt)]
    fitting = bisect_left(ends, True, key=too_long)
    kept = prompt[: ends[fitting - 1]] if fitting else ""
    return kept if kept and not speech_faults(kept, expected) else None


def described(prompt: str, instead: str = " ") -> str:
    """A prompt without its speech and speech marks."""
    return re.sub(r"<S>.*?(?:<E>|</S>)|<S>|<E>|</S>", instead, prompt, flags=re.DOTALL).strip()


def is_chinese(text: str) -> bool:
    """Whether a draft's description is mostly Chinese."""
    described_text = described(text) or text
    return len(_HAN.findall(described_text)) > len(re.findall(r"[A-Za-z]+", described_text))


def _weight(text: str) -> int:
    """Length in letters, a Chinese character being worth three."""
    return len(text) + 2 * len(_HAN.findall(text))


def _folded(words: str) -> str:
    """What must be the same for two passages to be the same words."""
    plain = unicodedata.normalize("NFKC", html.unescape(html.unescape(words))).casefold()
    return "".join(c for c in plain if c.isalnum()) or "".join(plain.split())


def _quoted(passages: list[str]) -> str:
    shown = [words if len(words) <= 80 else f"{words[:79]}…" for words in passages]
    return ", ".join(f"“{words}”" for words in shown)
