"""What came out of a clip, in numbers and a picture: loudness, timing, voices, words, and what is plainly broken."""

from .clip import ClipReport, Fault, report_clip, report_file
from .faults import clipped_share, flicker, frozen_spans, not_finite, silent_share, silent_spans, sound_levels
from .loudness import integrated_loudness, true_peak
from .speech import came_in_order, compare_voices, speech_segments, split_speech
from .sync import Sync, accent_strength, block_flow, measure_sync, onset_strength
from .words import WordErrors, word_errors

__all__ = [
    "ClipReport",
    "Fault",
    "Sync",
    "WordErrors",
    "accent_strength",
    "block_flow",
    "came_in_order",
    "clipped_share",
    "compare_voices",
    "flicker",
    "frozen_spans",
    "integrated_loudness",
    "measure_sync",
    "not_finite",
    "onset_strength",
    "report_clip",
    "report_file",
    "silent_share",
    "silent_spans",
    "sound_levels",
    "speech_segments",
    "split_speech",
    "true_peak",
    "word_errors",
]
