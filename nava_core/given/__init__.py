"""Parts of a clip that are given and not made: which they are, and how the network sees them."""

from .frames import (
    HOLDS,
    Drift,
    Seam,
    Statistics,
    fit_frames,
    hold_statistics,
    resample_indices,
    seam,
)
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
from .originals import Originals
from .sound import RESTS, GivenSound, fit_sound, join_sound
from .stretch import Stretch, chosen, place_pictures

__all__ = [
    "CLEAN",
    "HOLDS",
    "NOISED",
    "RESTS",
    "SHOWN",
    "Drift",
    "GivenSound",
    "Originals",
    "Seam",
    "Statistics",
    "Stretch",
    "chosen",
    "clean_steps",
    "fit_frames",
    "fit_sound",
    "frames_touching",
    "frames_within",
    "hold_statistics",
    "is_given",
    "join_sound",
    "kept",
    "made_steps",
    "place_pictures",
    "resample_indices",
    "seam",
    "steps_touching",
    "steps_within",
]
