"""What a chat model is asked, what it answers, and how it says that it cannot."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Protocol

Step = Callable[[int, int], None]  # tokens so far, at most; called often while waiting too, may raise to interrupt


class RewriteError(RuntimeError):
    """A chat model gave nothing to work with; the message is the sentence to show."""


class BackendMissingError(RewriteError):
    """There is no chat model to ask: none is configured, none answers, or it may not be used."""


@dataclass(frozen=True)
class Question:
    """A conversation that waits for the model's turn.

    ``system``: what the model is to do; ``turns``: what was said, the person first, then by turns; ``image``: a
    picture (H, W, 3) fp32 in 0..1 that belongs to the first turn, or None. ``temperature`` 0 is greedy.
    """

    system: str
    turns: tuple[str, ...]
    image: Any = None
    seed: int = 0
    temperature: float = 0.7
    max_tokens: int = 1024

    def again(self, answer: str, objection: str) -> Question:
        """The same, after an answer that will not do; with the next seed."""
        return replace(self, turns=(*self.turns, answer, objection), seed=self.seed + 1)

    def as_text(self) -> str:
        """All of it as one message, for models that are given only one."""
        return "\n\n".join([self.system, *self.turns])


@dataclass(frozen=True)
class Answer:
    """What a model said; ``truncated``: it stopped for want of tokens; ``saw_image``: whether it took the picture;
    ``model``: its name, where only the answer tells."""

    text: str
    truncated: bool = False
    saw_image: bool = True
    model: str = ""


class Backend(Protocol):
    """A chat model. ``name`` says which, for people and as part of what a result is remembered under."""

    name: str

    def ask(self, question: Question, step: Step | None = None) -> Answer:
        """The model's answer. Raises RewriteError; what ``step`` raises goes through."""
