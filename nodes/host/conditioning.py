"""A prompt with its voices as the host's CONDITIONING."""

from __future__ import annotations

import torch

from ...nava_core.prompt import PromptCheck, bind_voices, check_prompt, clean_text, span_voices, timbre_inputs
from ...nava_core.voices import check_one_encoder
from .model import TIMBRE, TIMBRE_POSITIONS
from .text_encoder import encode_conditioning, encode_ids, prompt_tokenizer


def encode_prompt(
    clip, prompt: str, voices=(), spans=None, seconds: float = 0.0
) -> tuple[list, str, list[str], PromptCheck]:
    """(CONDITIONING, report, warnings, check) of a prompt; an empty one gives the all-zero context.

    ``voices``: timbres (1, 192), bound to the spans by order, or ``spans`` (SpanSpec with their own timbres), bound
    by object. ``seconds``: the clip's length, 0 where it is not known. Raises ValueError where voices and spans do not
    fit, or spans are not the prompt's, and where the voices were made with different speaker encoders.
    """
    if not prompt.strip():
        if voices or any(span.timbre is not None for span in spans or []):
            raise ValueError("Voices were given but the prompt is empty: write the words to be said as <S>words<E>.")
        context = encode_ids(clip, [1])
        return (
            [[torch.zeros_like(context), {}]],
            "Empty: the null the model was trained with.",
            [],
            check_prompt(prompt),
        )
    tokenizer = prompt_tokenizer(clip)
    tokenized = tokenizer(prompt)
    voices, assignment = _voices(tokenized, list(voices), spans)
    check_one_encoder(voices)
    binding = bind_voices(tokenized.spans, voices, assignment)
    timbre, positions = timbre_inputs(tokenized, voices, assignment)
    extras = {} if timbre is None else {TIMBRE: timbre, TIMBRE_POSITIONS: positions}
    check = check_prompt(
        prompt, tokenizer=tokenizer, voices=len(voices), assignment=assignment, clip_seconds=seconds or None
    )
    misspelt = check.mark_warnings()
    report = "\n".join(filter(None, [tokenized.report(binding), check.speech_line(), *misspelt]))
    said = misspelt + ([] if check.clip_assumed else check.speech_warnings())
    warnings = [report] if tokenized.is_cut else said
    return encode_conditioning(clip, tokenized.ids, extras), report, warnings, check


def _shortened(words: str, length: int = 40) -> str:
    return words if len(words) <= length else words[: length - 1] + "…"


def _voices(tokenized, voices, spans):
    if not spans:
        return voices, None
    if len(spans) != len(tokenized.spans):
        raise ValueError(
            f"{len(spans)} speech spans are connected but the prompt has {len(tokenized.spans)}: connect prompt and "
            "spans of the same NAVA Structured Prompt, or disconnect the spans."
        )
    for number, (said, meant) in enumerate(zip(tokenized.spans, spans, strict=True), start=1):
        if clean_text(said.words) != clean_text(meant.words):
            raise ValueError(
                f"Span {number} says “{_shortened(said.words)}” in the prompt but “{_shortened(meant.words)}” in the "
                "connected spans: connect prompt and spans of the same NAVA Structured Prompt, or disconnect the spans."
            )
    own, assignment = span_voices(spans)
    if not voices:
        return own, assignment if own else None
    if own:
        raise ValueError("Voices come both with the spans and by themselves: connect one or the other.")
    return voices, None
