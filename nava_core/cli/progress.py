"""Progress on the terminal: one line that moves, or plain lines now and then where the output is no terminal."""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Callable
from typing import Any, TextIO

PLAIN_SECONDS = 5.0  # between two plain lines


def format_duration(seconds: float) -> str:
    """ "8 s", "2 min 05 s", "3 h 20 min"."""
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02} min"


class Progress:
    """Steps of something, with the time left; on stderr, so that results on stdout can be piped."""

    def __init__(self, stream: TextIO | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self.stream = stream or sys.stderr
        self.live = self.stream.isatty()
        self.clock = clock
        self.label, self.drawn, self.shown = "", False, -PLAIN_SECONDS
        self.begin("")

    def begin(self, label: str, unit: str = "step") -> None:
        """A new thing is begun; ``unit`` is what its steps are called, or "%" for a share of the whole."""
        self._clear()
        self.label, self.unit = label, unit
        self.first: tuple[int, float] | None = None

    def step(self, step: int, steps: int, *_: Any) -> None:
        """``step`` of ``steps`` are done, counted from 1."""
        now = self.clock()
        self.first = self.first or (step, now)
        if not self.live and step < steps and now - self.shown < PLAIN_SECONDS:
            return
        self.shown = now
        self._draw(self._text(step, steps, now))

    def status(self, text: str) -> None:
        """What is going on, until something else does; now and then where the output is no terminal."""
        now = self.clock()
        if self.live or now - self.shown >= PLAIN_SECONDS:
            self.shown = now
            self._draw(f"{self.label}: {text}" if self.label else text)

    def say(self, text: str) -> None:
        """A line that stays."""
        self._clear()
        print(text, file=self.stream, flush=True)

    def end(self) -> None:
        self._clear()

    def _text(self, step: int, steps: int, now: float) -> str:
        share = f"{100 * step // max(steps, 1)} %"
        where = share if self.unit == "%" else f"{self.unit} {step}/{steps}, {share}"
        text = f"{self.label}: {where}" if self.label else where
        since, start = self.first
        if step > since:  # the first step's own time has loading and encoding in it
            each = (now - start) / (step - since)
            pace = "" if self.unit == "%" else f", {each:.2f} s/{self.unit}"
            text += f"{pace}, {format_duration(each * (steps - step))} left"
        return text

    def _draw(self, text: str) -> None:
        if not self.live:
            print(text, file=self.stream, flush=True)
            return
        columns = shutil.get_terminal_size().columns
        self.stream.write(f"\r\x1b[K{text[: max(columns - 1, 20)]}")
        self.stream.flush()
        self.drawn = True

    def _clear(self) -> None:
        if self.drawn:
            self.stream.write("\r\x1b[K")
            self.stream.flush()
            self.drawn = False
