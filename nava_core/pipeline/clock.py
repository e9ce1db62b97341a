"""What the time of a clip goes into, until its first step."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager


class Clock:
    """Seconds of a clip by what they went into, and until its first step."""

    def __init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        self.began = time.monotonic()
        self.seconds: dict[str, float] = {}

    @contextmanager
    def measure(self, what: str) -> Iterator[None]:
        begin = time.monotonic()
        try:
            yield
        finally:
            self.seconds[what] = self.seconds.get(what, 0.0) + time.monotonic() - begin

    def first_step(self, since: float) -> str:
        """Notes that the first step, begun at ``since``, is done; a sentence on it."""
        now = time.monotonic()
        self.seconds["step"], self.seconds["first_step"] = now - since, now - self.began
        parts = [f"{self.seconds[what]:.1f} s {what}" for what in ("loading", "encoding") if what in self.seconds]
        parts.append(f"{now - since:.1f} s for the step itself")
        return f"First step after {now - self.began:.1f} s: {', '.join(parts)}."
