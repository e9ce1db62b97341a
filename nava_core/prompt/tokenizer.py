"""Prompt to token ids for the umt5 encoder: sentencepiece between sentinels, the end token, the cut at the limit.

The ids are those of the Hugging Face fast tokenizer that the model was trained with, from a bare sentencepiece
model (ComfyUI's umt5 files carry one), from a tokenizer folder, or from a `tokenizer.json` alone.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

from .spans import SENTINEL, SPAN_END, SpeechSpan, clean_text, insert_sentinels, parse_spans

SENTINEL_COUNT = 300  # umt5's <extra_id_0> .. <extra_id_299>, after the pieces, in falling order
_WORD_MARK = "▁"
_WHOLE, _PART, _LOST = "whole", "part", "lost"

Piece = tuple[int, str]  # token id, its text with "▁" for a space


@dataclass(frozen=True)
class TokenizedPrompt:
    """A prompt as the text encoder takes it, and what of it did not fit.

    `ids`: token ids with the end token last, at most `max_length`. `timbre_positions`: index into `ids` of each
    span's timbre token, -1 for a span that was cut off. `spans`: the spans of the prompt as written.
    `span_fate`: per span "whole", "part" (its words or its end mark were cut) or "lost". `total_tokens`:
    tokens before the cut, end token included. `cut_text`: roughly the text that was cut, "" if nothing was.
    """

    ids: list[int]
    timbre_positions: list[int]
    spans: list[SpeechSpan]
    total_tokens: int
    cut_text: str
    max_length: int
    span_fate: list[str] = field(default_factory=list)

    @property
    def is_cut(self) -> bool:
        """Whether the prompt was longer than the encoder takes."""
        return self.total_tokens > self.max_length

    @property
    def lost_spans(self) -> list[SpeechSpan]:
        """Spans that will not be spoken at all, or only in part."""
        return [s for s, fate in zip(self.spans, self.span_fate, strict=True) if fate != _WHOLE]

    def report(self, binding: Sequence[int | None] | None = None) -> str:
        """A few lines for people: tokens used, each span with its timbre token, what was cut.

        `binding` is the result of `bind_voices`; with it each line also names the voice of its span.
        """
        lines = [self._token_line()]
        if not self.spans:
            lines.append("No speech span.")
        voiced = binding is not None and any(v is not None for v in binding)
        for i, span in enumerate(self.spans):
            line = f"Span {i + 1}: “{_shorten(span.words)}”, {self._fate_line(i)}"
            if voiced:
                line += ", no voice given" if binding[i] is None else f", voice {binding[i] + 1}"
            lines.append(line + ".")
        if self.is_cut:
            lines.append(f"Cut: “{_shorten(self.cut_text, 400)}”")
        return "\n".join(lines)

    def _token_line(self) -> str:
        if not self.is_cut:
            return f"{self.total_tokens} of {self.max_length} tokens used."
        over = self.total_tokens - self.max_length
        return f"{self.total_tokens} tokens, {self.max_length} fit: the last {over} were cut. Shorten the prompt."

    def _fate_line(self, i: int) -> str:
        if self.span_fate[i] == _LOST:
            return "CUT OFF, it will not be spoken"
        at = f"timbre token at {self.timbre_positions[i]}"
        return f"{at}, its end was CUT OFF" if self.span_fate[i] == _PART else at


class PromptTokenizer:
    """Text to umt5 token ids.

    `sp_model_bytes`: a serialised sentencepiece model (bytes, or a uint8 tensor as ComfyUI's umt5 files hold it
    under `spiece_model`). `max_length`: the most ids of a prompt, end token included. `added_tokens`: ids of
    tokens outside the sentencepiece model by their text, as a tokenizer folder lists them; without it the
    300 sentinels follow the pieces in falling order.

    Call it with a prompt for a `TokenizedPrompt`. An empty prompt gives just the end token; an empty *negative*
    means the all-zero context the model was trained with, which is for the caller to make, not the encoder.
    Prompts are not weighted: "(x:1.2)" is text.

    Raises `ValueError` for bytes that are not a sentencepiece model with an end token, `RuntimeError` where a
    needed package is missing.
    """

    def __init__(self, sp_model_bytes, max_length: int = 512, *, added_tokens: dict[str, int] | None = None):
        self._set_up(_SentencePieceBackend(_as_bytes(sp_model_bytes), added_tokens), max_length)

    @classmethod
    def from_folder(cls, path, max_length: int = 512) -> PromptTokenizer:
        """From a tokenizer folder with `spiece.model`, `tokenizer.json` or both (also the folder above
        `google/umt5-xxl`, as the makers' download has it). Raises `FileNotFoundError` if neither is there."""
        folder = Path(path)
        if (folder / "google" / "umt5-xxl").is_dir():
            folder = folder / "google" / "umt5-xxl"
        if (folder / "spiece.model").is_file():
            model = (folder / "spiece.model").read_bytes()
            return cls(model, max_length, added_tokens=_listed_tokens(folder))
        if (folder / "tokenizer.json").is_file():
            tokenizer = cls.__new__(cls)
            tokenizer._set_up(_FastBackend(folder / "tokenizer.json"), max_length)
            return tokenizer
        raise FileNotFoundError(
            f"No tokenizer in {folder}: expected spiece.model or tokenizer.json, as in google/umt5-xxl."
        )

    def _set_up(self, backend: _SentencePieceBackend | _FastBackend, max_length: int) -> None:
        if max_length < 1:
            raise ValueError(f"max_length is {max_length}: at least 1 is needed for the end token.")
        self._backend = backend
        self.max_length = max_length
        self.end_id: int = backend.end_id
        self.sentinel_id: int = backend.sentinel_id
        self.vocab_size: int = backend.vocab_size

    def encode(self, text: str) -> list[int]:
        """Ids of `text` as it is: no cleaning, no sentinels put in, no end token, no cut."""
        return [token for token, _ in self._backend.pieces(text)]

    def __call__(self, prompt: str) -> TokenizedPrompt:
        """Ids, timbre positions and losses of `prompt`. Raises `SpanError` for speech marks that do not pair
        up, `ValueError` for a timbre token hidden behind HTML entities."""
        spans = parse_spans(prompt)
        pieces = self._backend.pieces(clean_text(insert_sentinels(prompt)))
        found = [i for i, (token, _) in enumerate(pieces) if token == self.sentinel_id]
        if len(found) != len(spans):
            raise ValueError(
                f"The prompt has {len(spans)} speech spans but {len(found)} timbre tokens once its HTML entities "
                f"are resolved: remove what becomes {SENTINEL}."
            )
        keep = self.max_length - 1
        return TokenizedPrompt(
            ids=[token for token, _ in pieces[:keep]] + [self.end_id],
            timbre_positions=[i if i < keep else -1 for i in found],
            spans=spans,
            total_tokens=len(pieces) + 1,
            cut_text=self._text(pieces[keep:]),
            max_length=self.max_length,
            span_fate=self._fates(pieces, found, keep),
        )

    def _text(self, pieces: list[Piece]) -> str:
        # The word mark after a timbre token stands for no space that anyone wrote.
        text = "".join(SENTINEL if token == self.sentinel_id else piece for token, piece in pieces)
        return text.replace(SENTINEL + _WORD_MARK, "").replace(SENTINEL, "").replace(_WORD_MARK, " ").strip()

    def _fates(self, pieces: list[Piece], found: list[int], keep: int) -> list[str]:
        """Per span: whole if its end mark is among the kept tokens, lost if its timbre token is not."""
        fates = []
        for at, following in pairwise([*found, len(pieces)]):
            kept = self._text(pieces[at : min(following, keep)])
            fates.append(_LOST if at >= keep else _WHOLE if SPAN_END in kept else _PART)
        return fates


class _SentencePieceBackend:
    """Sentencepiece per segment between added tokens, each segment with the word mark in front, which is what
    the fast tokenizer does around its added tokens."""

    def __init__(self, model: bytes, added_tokens: dict[str, int] | None):
        self._sp = _load_sentencepiece(model)
        self.end_id = self._sp.eos_id()
        if self.end_id < 0:
            raise ValueError("The sentencepiece model has no end token: expected umt5's (spiece.model).")
        added = {**self._control_tokens(), **(added_tokens or self._counted_sentinels())}
        if SENTINEL not in added:
            raise ValueError(f"The tokenizer's added tokens lack {SENTINEL}: expected umt5's tokenizer.")
        self._added = added
        self._split = re.compile("(" + "|".join(re.escape(t) for t in sorted(added, key=len, reverse=True)) + ")")
        self.sentinel_id = added[SENTINEL]
        self.vocab_size = max(self._sp.get_piece_size(), *(i + 1 for i in added.values()))

    def _control_tokens(self) -> dict[str, int]:
        ids = (self._sp.pad_id(), self._sp.eos_id(), self._sp.bos_id(), self._sp.unk_id())
        return {self._sp.id_to_piece(i): i for i in ids if i >= 0}

    def _counted_sentinels(self) -> dict[str, int]:
        last = self._sp.get_piece_size() + SENTINEL_COUNT - 1
        counted = {f"<extra_id_{n}>": last - n for n in range(SENTINEL_COUNT)}
        # A model that has the sentinels among its own pieces knows better than counting.
        own = {text: self._sp.piece_to_id(text) for text in counted}
        own = {text: i for text, i in own.items() if i != self._sp.unk_id()}
        return own if SENTINEL in own else counted

    def pieces(self, text: str) -> list[Piece]:
        out: list[Piece] = []
        for segment in self._split.split(text):
            if segment in self._added:
                out.append((self._added[segment], segment))
            elif segment:
                out += self._segment(segment)
        return out

    def _segment(self, segment: str) -> list[Piece]:
        """A run of byte pieces becomes one unknown token: the fast tokenizer has no byte fallback."""
        out: list[Piece] = []
        run = bytearray()
        ids, texts = self._sp.encode(segment, out_type=int), self._sp.encode(segment, out_type=str)
        for token, text in zip(ids, texts, strict=True):
            if self._sp.is_byte(token):
                run.append(int(text[3:5], 16))
                continue
            self._close_run(run, out)
            out.append((token, text))
        self._close_run(run, out)
        return out

    def _close_run(self, run: bytearray, out: list[Piece]) -> None:
        if run:
            out.append((self._sp.unk_id(), run.decode("utf-8", errors="replace")))
            run.clear()


class _FastBackend:
    """A `tokenizer.json` through the `tokenizers` library."""

    def __init__(self, path: Path):
        try:
            from tokenizers import Tokenizer
        except ImportError as error:
            raise RuntimeError(
                f"Reading {path} needs the package tokenizers: install it, or put spiece.model beside the file."
            ) from error
        try:
            self._tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises bare Exception
            raise ValueError(f"{path} is not a tokenizer file: {error}.") from error
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        end, sentinel = self._tokenizer.token_to_id("</s>"), self._tokenizer.token_to_id(SENTINEL)
        if end is None or sentinel is None:
            raise ValueError(f"{path} has no </s> or no {SENTINEL}: expected umt5's tokenizer.")
        self.end_id: int = end
        self.sentinel_id: int = sentinel
        self.vocab_size: int = max(self._tokenizer.get_vocab(with_added_tokens=True).values()) + 1

    def pieces(self, text: str) -> list[Piece]:
        encoding = self._tokenizer.encode(text, add_special_tokens=False)
        return list(zip(encoding.ids, encoding.tokens, strict=True))


def _as_bytes(model) -> bytes:
    if hasattr(model, "numpy"):  # a uint8 tensor
        model = model.cpu().contiguous().numpy().tobytes()
    if not isinstance(model, bytes | bytearray | memoryview):
        raise ValueError(
            f"The sentencepiece model is a {type(model).__name__}: expected its serialised bytes or a uint8 tensor."
        )
    if not len(model):
        raise ValueError("The sentencepiece model is empty: expected umt5's (spiece.model).")
    return bytes(model)


def _load_sentencepiece(model: bytes):
    try:
        import sentencepiece
    except ImportError as error:
        raise RuntimeError(
            "Tokenising a prompt needs the package sentencepiece: install it with `pip install sentencepiece`."
        ) from error
    try:
        return sentencepiece.SentencePieceProcessor(model_proto=model)
    except Exception as error:  # several types, by version
        raise ValueError(
            f"The {len(model)} bytes given as tokenizer are not a sentencepiece model: expected umt5's (spiece.model)."
        ) from error


def _listed_tokens(folder: Path) -> dict[str, int] | None:
    """The added tokens that the folder's files list, by text; None if none of them lists the sentinel."""
    for name, read in (
        ("tokenizer_config.json", lambda d: {t["content"]: int(i) for i, t in d["added_tokens_decoder"].items()}),
        ("added_tokens.json", lambda d: {text: int(i) for text, i in d.items()}),
        ("tokenizer.json", lambda d: {t["content"]: int(t["id"]) for t in d["added_tokens"]}),
    ):
        if not (folder / name).is_file():
            continue
        try:
            tokens = read(json.loads((folder / name).read_text(encoding="utf-8")))
        except (KeyError, AttributeError):  # an older layout of the same file: the next one may tell
            continue
        except (ValueError, TypeError) as error:
            raise ValueError(f"{folder / name} can't be read as JSON: {error}.") from error
        if SENTINEL in tokens:
            return tokens
    return None


def _shorten(text: str, width: int = 60) -> str:
    return text if len(text) <= width else text[: width - 1].rstrip() + "…"
