"""Decoding that ends: frames and sound out of the VAEs in constant memory, in the form that there is memory for."""

from .fallback import collect, stream_down
from .forms import (
    BY_FRAME,
    BY_FRAME_IN_RAM,
    CHOICES,
    OVERLAP,
    TILE,
    WHOLE,
    DecodeForm,
    DecoderCounts,
    Decoding,
    choose_form,
)
from .frames import (
    PATCH,
    FrameDecoder,
    FrameMemory,
    Step,
    in_single_frames,
    pixels_of,
    stream_frames,
    wide_level,
    with_memory,
)
from .sound import IN_PIECES, ONE_PIECE, SoundForm, decode_sound

__all__ = [
    "BY_FRAME",
    "BY_FRAME_IN_RAM",
    "CHOICES",
    "IN_PIECES",
    "ONE_PIECE",
    "OVERLAP",
    "PATCH",
    "TILE",
    "WHOLE",
    "DecodeForm",
    "DecoderCounts",
    "Decoding",
    "FrameDecoder",
    "FrameMemory",
    "SoundForm",
    "Step",
    "choose_form",
    "collect",
    "decode_sound",
    "in_single_frames",
    "pixels_of",
    "stream_down",
    "stream_frames",
    "wide_level",
    "with_memory",
]
