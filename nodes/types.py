"""The pack's own link types, and what its node schemas share."""

from comfy_api.latest import io

SpeakerEncoder = io.Custom("NAVA_SPEAKER_ENCODER")
Timbre = io.Custom("NAVA_TIMBRE")  # a (1, 192) embedding, which carries its origin: nava_core.voices.voice_of
Span = io.Custom("NAVA_SPAN")
Spans = io.Custom("NAVA_SPANS")


def category(family: str) -> str:
    return f"NAVA/{family}"
