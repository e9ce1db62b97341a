"""Parts of a clip that are given and not made: which they are, and how the network sees them."""

from .masks import (
    CLEAN,
    NOISED,
    SHOWN,
    clean_steps,
    frames_touching,
    frames_within,
    is_given,
    kept,
    made_steps,
    steps_touching,
    steps_within,
)

__all__ = [
    "CLEAN",
    "NOISED",
    "SHOWN",
    "clean_steps",
    "frames_touching",
    "frames_within",
    "is_given",
    "kept",
    "made_steps",
    "steps_touching",
    "steps_within",
]
