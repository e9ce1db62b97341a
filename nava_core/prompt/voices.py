"""Which reference voice speaks which span, and the tensors that tell the backbone."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

from .tokenizer import TokenizedPrompt

TIMBRE_WIDTH = 192


class BindingError(ValueError):
    """Voices and spans that do not fit. `kind`: "no_span", "too_many_voices", "too_few_voices" or "assignment"."""

    def __init__(self, message: str, kind: str):
        super().__init__(message)
        self.kind = kind


def bind_voices(spans: Sequence, voices: Sequence, assignment: Sequence[int | None] | None = None) -> list[int | None]:
    """The index into `voices` for each span, None for a span without a voice.

    Without `assignment` the i-th voice goes to the i-th span and a single voice serves all spans. `assignment`
    says it outright: per span an index into `voices` counted from 0, or None, which gives the span the learned null
    voice (an all-zero embedding), as in training.

    Raises `BindingError` (a ValueError) for voices without a span to speak, more voices than spans, several voices but
    fewer than spans without `assignment`, and an assignment of the wrong length or out of range.
    """
    if assignment is not None:
        return _checked(list(assignment), len(spans), len(voices))
    if not voices:
        return [None] * len(spans)
    if not spans:
        raise BindingError(
            f"{_count(len(voices), 'voice')} given but the prompt has no speech span: "
            "write the words to be said as <S>words<E>, or disconnect the voice.",
            "no_span",
        )
    if len(voices) == 1:
        return [0] * len(spans)
    if len(voices) > len(spans):
        raise BindingError(
            f"{len(voices)} voices given but the prompt has {_count(len(spans), 'speech span')}: "
            f"add <S>words<E> for the others, or give at most {_count(len(spans), 'voice')}.",
            "too_many_voices",
        )
    if len(voices) < len(spans):
        raise BindingError(
            f"{len(voices)} voices given for {len(spans)} speech spans: say which span each voice speaks, "
            "give one voice for all spans, or one for every span.",
            "too_few_voices",
        )
    return list(range(len(spans)))


def _checked(assignment: list[int | None], spans: int, voices: int) -> list[int | None]:
    if len(assignment) != spans:
        raise BindingError(
            f"The voice assignment has {len(assignment)} entries but the prompt has {_count(spans, 'speech span')}: "
            "give one entry for each span, None where it has no voice.",
            "assignment",
        )
    for i, voice in enumerate(assignment):
        if voice is not None and not 0 <= voice < voices:
            raise BindingError(
                f"Span {i + 1} is assigned voice number {voice + 1}, but {_count(voices, 'voice')} given: "
                "assign an existing voice or None.",
                "assignment",
            )
    return assignment


def _count(n: int, noun: str) -> str:
    return f"{n} {noun}" if n == 1 else f"{n} {noun}s"


def span_voices(spans: Iterable) -> tuple[list[torch.Tensor], list[int | None]]:
    """The distinct voices of span objects (their `timbre`, a tensor or None) and the assignment that binds them:
    ready for `bind_voices` and `timbre_inputs`. The same tensor on two spans is one voice."""
    voices: list[torch.Tensor] = []
    known: dict[int, int] = {}
    assignment: list[int | None] = []
    for span in spans:
        if span.timbre is None:
            assignment.append(None)
            continue
        if id(span.timbre) not in known:
            known[id(span.timbre)] = len(voices)
            voices.append(span.timbre)
        assignment.append(known[id(span.timbre)])
    return voices, assignment


def timbre_inputs(
    tokenized: TokenizedPrompt, voices: Sequence[torch.Tensor], assignment: Sequence[int | None] | None = None
) -> tuple[torch.Tensor, torch.Tensor] | tuple[None, None]:
    """The backbone's timbre inputs for a tokenised prompt and its reference voices.

    `voices`: embeddings (1, 192) or (192,). Returns timbre (1, S, 192) in fp32 and positions (1, S) int64, one
    entry a span: zeros where a span has no voice, position -1 where a span was cut off. Without voices and an
    `assignment` that says so for every span: (None, None), the timbre tokens stay as the text encoder made them.

    Raises `ValueError` as `bind_voices` does, and for a voice that is not a finite (1, 192) embedding.
    """
    binding = bind_voices(tokenized.spans, voices, assignment)
    if not binding or (not voices and assignment is None):
        return None, None
    rows = [_embedding(voice, i) for i, voice in enumerate(voices)]
    silent = torch.zeros_like(rows[0]) if rows else torch.zeros(TIMBRE_WIDTH)
    timbre = torch.stack([silent if i is None else rows[i] for i in binding]).unsqueeze(0)
    positions = torch.tensor([tokenized.timbre_positions], dtype=torch.int64, device=timbre.device)
    return timbre, positions


def _embedding(voice: torch.Tensor, index: int) -> torch.Tensor:
    if tuple(voice.shape) not in {(1, TIMBRE_WIDTH), (TIMBRE_WIDTH,)}:
        raise ValueError(
            f"Voice {index + 1} has shape {tuple(voice.shape)}: expected a (1, {TIMBRE_WIDTH}) speaker embedding."
        )
    voice = voice.reshape(TIMBRE_WIDTH).float()
    if not torch.isfinite(voice).all():
        raise ValueError(f"Voice {index + 1} holds NaN or infinity: encode it again from a clean recording.")
    return voice
