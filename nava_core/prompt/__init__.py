"""Prompts: speech spans, the structured prompt, tokens with their limits, and voices bound to spans."""

from .check import PromptCheck, check_prompt
from .negatives import BUILT_IN, ZERO, default_negative, negative_text, with_default_negative
from .presets import NONE, PRESETS
from .spans import SPAN_END, SPAN_START, SpanError, SpeechSpan, clean_text, insert_sentinels, parse_spans, scan_spans
from .speech_time import speech_seconds
from .structured import SpanSpec, StructuredPrompt
from .tokenizer import PromptTokenizer, TokenizedPrompt
from .voices import BindingError, bind_voices, span_voices, timbre_inputs

__all__ = [
    "BUILT_IN",
    "NONE",
    "PRESETS",
    "SPAN_END",
    "SPAN_START",
    "ZERO",
    "BindingError",
    "PromptCheck",
    "PromptTokenizer",
    "SpanError",
    "SpanSpec",
    "SpeechSpan",
    "StructuredPrompt",
    "TokenizedPrompt",
    "bind_voices",
    "check_prompt",
    "clean_text",
    "default_negative",
    "insert_sentinels",
    "negative_text",
    "parse_spans",
    "scan_spans",
    "span_voices",
    "speech_seconds",
    "timbre_inputs",
    "with_default_negative",
]
