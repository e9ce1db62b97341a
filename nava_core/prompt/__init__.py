"""Prompts: speech spans, the structured prompt, tokens with their limits, and voices bound to spans."""

from .negatives import BUILT_IN, ZERO, default_negative, negative_text, with_default_negative
from .spans import SPAN_END, SPAN_START, SpanError, SpeechSpan, clean_text, insert_sentinels, parse_spans
from .structured import SpanSpec, StructuredPrompt
from .tokenizer import PromptTokenizer, TokenizedPrompt
from .voices import bind_voices, span_voices, timbre_inputs

__all__ = [
    "BUILT_IN",
    "SPAN_END",
    "SPAN_START",
    "ZERO",
    "PromptTokenizer",
    "SpanError",
    "SpanSpec",
    "SpeechSpan",
    "StructuredPrompt",
    "TokenizedPrompt",
    "bind_voices",
    "clean_text",
    "default_negative",
    "insert_sentinels",
    "negative_text",
    "parse_spans",
    "span_voices",
    "timbre_inputs",
    "with_default_negative",
]
