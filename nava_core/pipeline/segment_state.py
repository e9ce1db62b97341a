"""The folder in which a long clip under way lies, stage by stage, so that it can be gone on with."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ..media import whole_file

PLAN, VERSION = "plan.json", 1
LATENTS, SOUND, FRAMES, LAST, DONE = "latents.safetensors", "sound.safetensors", "frames.mkv", "last.png", "json"
OURS = re.compile(
    rf"{re.escape(PLAN)}|\d{{3,}}\.({'|'.join(map(re.escape, (LATENTS, SOUND, FRAMES, LAST, DONE)))})|\..*\.part"
)


class StateError(ValueError):
    """A folder holds the state of another clip, or of none; the message is the sentence to show."""


def holds_state(folder: str | os.PathLike) -> bool:
    """Whether there is anything of a clip under way in a folder."""
    return Path(folder).is_dir() and any(Path(folder).iterdir())


class State:
    """The folder of a clip under way. What is in it is whole: files appear under their names when they are."""

    def __init__(self, folder: str | os.PathLike) -> None:
        self.folder = Path(folder)

    def open(
        self, key: str, plan: Mapping[str, Any], *, anew: bool = False, say: Callable[[str], None] = print
    ) -> bool:
        """Begin, or go on where the folder holds the state of this very clip: whether it does.

        ``anew``: the state of another clip goes. Raises StateError for a folder with something else in it.
        """
        path = self.folder / PLAN
        if path.is_file():
            if _key_of(path) == key:
                self._clear_leftovers()
                return True
            if not anew:
                raise StateError(
                    f"{self.folder} holds the state of another clip, or of this one with other settings: give another "
                    "folder, or have it begun anew (--overwrite, or anew=True)."
                )
            say(f"{self.folder} holds the state of another clip, which goes: this one is begun anew.")
            self.clear()
        elif self.folder.is_dir() and any(self.folder.iterdir()):
            raise StateError(f"{self.folder} is not empty and holds no state of a long clip: give another folder.")
        self.folder.mkdir(parents=True, exist_ok=True)
        write_json(path, {"version": VERSION, "key": key, **plan})
        return False

    def _clear_leftovers(self) -> None:
        """What a killed process left under temporary names."""
        for path in self.folder.glob(".*.part"):
            path.unlink(missing_ok=True)

    def path(self, number: int, what: str) -> Path:
        return self.folder / f"{number:03d}.{what}"

    def has(self, number: int, what: str) -> bool:
        return self.path(number, what).is_file()

    def clear(self) -> None:
        """Takes away what belongs to it, the plan last, and the folder where nothing else is in it."""
        if not self.folder.is_dir():
            return
        for path in sorted(self.folder.iterdir(), key=lambda path: path.name == PLAN):
            if OURS.fullmatch(path.name):
                path.unlink(missing_ok=True)
        if not any(self.folder.iterdir()):
            self.folder.rmdir()


def _key_of(plan: Path) -> str:
    try:
        return str(read_json(plan).get("key"))
    except StateError:
        return ""


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. Raises StateError for a file that holds none."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise StateError(f"{path} is damaged: have the clip begun anew.")
    return found


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Write a JSON object, whole or not at all."""
    with whole_file(path) as temporary:
        temporary.write_text(json.dumps(values, ensure_ascii=False, indent=1), encoding="utf-8", errors="replace")
