"""What a chat model is told: how a prompt for NAVA is built, in English and in Chinese (`instructions.json`).

The parts are those of the paper's captions: the picture as a whole, what happens over time, camera and composition,
sound. The texts are this project's own.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from ..geometry import MODES

LANGUAGES = ("zh", "en")

TEXTS: dict[str, dict[str, str]] = json.loads(Path(__file__).with_suffix(".json").read_text(encoding="utf-8"))
VERSION = hashlib.sha256(json.dumps(TEXTS, sort_keys=True).encode()).hexdigest()[:12]


def rewrite_instruction(language: str, *, speech: bool, image: bool, mode: str = MODES[0]) -> str:
    """What the model is told before it gets a draft.

    ``language``: of its answer, "zh" or "en"; ``speech``: whether the draft has speech spans; ``image``: whether the
    first frame goes with it; ``mode``: of the clip. Raises ValueError for another language or mode.
    """
    text = _texts(language)
    if mode not in MODES:
        raise ValueError(f"A clip's mode is one of {', '.join(MODES)}; got '{mode}'.")
    if mode == "audio":
        lines = [text["task"], text["sound_only"]]
    else:
        lines = [text["task"], text["parts"], text["visual"], text["dynamics"], text["camera"]]
        lines.append(text["silent"] if mode == "video" else text["audio"])
    if speech:
        lines.append(text["speech"])
    elif mode != "video":
        lines.append(text["no_speech"])
    lines += [text["image"]] if image else []
    return "\n".join([*lines, text["keep"], text["short_form" if mode == "audio" else "form"]])


def caption_instruction(language: str) -> str:
    """What the model is told before it gets a first frame. Raises ValueError for another language than zh and en."""
    text = _texts(language)
    lines = ("caption_task", "parts", "visual", "camera", "caption_rules", "short_form")
    return "\n".join(text[line] for line in lines)


def draft_turn(language: str, draft: str) -> str:
    """The draft as the model is given it."""
    return f"{_texts(language)['draft']}\n{draft}"


def caption_turn(language: str) -> str:
    """The request that goes with a first frame."""
    return _texts(language)["caption"]


def objection(language: str, faults: list[str]) -> str:
    """What was wrong with an answer, and the request to write it once more."""
    return _texts(language)["again"].format(faults=" ".join(faults))


def _texts(language: str) -> dict[str, str]:
    if language not in TEXTS:
        raise ValueError(f"A prompt is written in {' or '.join(LANGUAGES)}; got '{language}'.")
    return TEXTS[language]
