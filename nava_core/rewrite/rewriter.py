"""A draft becomes the dense prompt that the model was trained on, or stays as it is; a picture becomes words."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, replace
from typing import Any

from ..geometry import MODES
from ..prompt import PromptTokenizer, parse_spans
from . import instructions
from .answers import clean_answer
from .backends import Answer, Backend, BackendMissingError, Question, RewriteError, Step
from .checks import (
    Length,
    is_chinese,
    length_faults,
    mark_quoted_speech,
    measure,
    restored,
    shortened,
    speech_faults,
    text_faults,
    unmarked_faults,
)

AUTO = "auto"
ATTEMPTS = 2


@dataclass(frozen=True)
class Draft:
    """What is to be rewritten, and how.

    ``text``: speech as <S>words<E>; without any, what somebody in it says in quotation marks is taken as speech.
    ``language``: of the prompt, "zh", "en", or "auto" for the draft's own; speech keeps its own. ``image``: the first
    frame (H, W, 3) fp32 in 0..1, or None; ``image_key``: what it is remembered under (default: a hash of it).
    ``temperature`` 0 is greedy; ``max_tokens``: of one answer, thinking included.
    """

    text: str
    language: str = "zh"
    mode: str = MODES[0]
    image: Any = None
    image_key: str = ""
    seed: int = 0
    temperature: float = 0.7
    max_tokens: int = 1024

    def key(self, backend: str) -> str:
        """A hash of all that the result follows from, the instructions included."""
        picture = self.image_key or ("" if self.image is None else picture_digest(self.image))
        facts = [self.text.strip(), self.language, self.mode, picture, self.seed, self.temperature, self.max_tokens]
        return hashlib.sha256(json.dumps([instructions.VERSION, backend, *facts]).encode()).hexdigest()


@dataclass(frozen=True)
class Rewritten:
    """The result: ``prompt`` is the rewritten one or, with the reason in ``warning``, the draft itself.

    ``notes``: what else one should know; ``asked``: how often the model was; ``unavailable``: there was no answer to
    judge, so asking again another time may help; ``missing``: there was nobody to ask at all.
    """

    prompt: str
    draft: str
    backend: str
    length: Length
    asked: int = 0
    warning: str = ""
    notes: tuple[str, ...] = ()
    unavailable: bool = False
    missing: bool = False

    @property
    def changed(self) -> bool:
        return not self.warning

    def report(self) -> str:
        """A few lines for people."""
        if self.warning:
            return "\n".join([f"The draft is used as it is. {self.warning}", *self.notes])
        spans = len(parse_spans(self.prompt))
        speech = f", {spans} speech span{'' if spans == 1 else 's'} word for word" if spans else ""
        twice = " at the second attempt" if self.asked > 1 else ""
        return "\n".join([f"Rewritten by {self.backend}{twice}: {self.length}{speech}.", *self.notes])


def rewrite(
    backend: Backend, draft: Draft, *, tokenizer: PromptTokenizer | None = None, step: Step | None = None
) -> Rewritten:
    """Have ``backend`` write the dense prompt of a draft; what comes back holds the draft's speech word for word and in
    order, and fits the text encoder, or it is not used.

    A prompt that will not do is asked for once more, with the reason; then the draft itself comes back with a warning,
    as it does where there is no answer. ``tokenizer``: the text encoder's, for the exact length; without it the length
    is estimated. ``step(tokens so far, at most)`` is called while the model writes; what it raises goes through.

    Raises SpanError for a draft whose speech marks do not pair up, ValueError for an empty one or another language or
    mode than there is.
    """
    text = draft.text.strip()
    if not text:
        raise ValueError("The draft is empty: say in a line what the clip shows and how it sounds.")
    job = _Rewriting(backend, draft, tokenizer, step)
    try:
        return job.run()
    except RewriteError as error:
        missing = isinstance(error, BackendMissingError)
        result = job.kept(str(error))
        return replace(result, unavailable=True, missing=missing)


class _Rewriting:
    """One draft at work."""

    def __init__(self, backend: Backend, draft: Draft, tokenizer: PromptTokenizer | None, step: Step | None):
        self.backend, self.draft, self.tokenizer, self.step = backend, draft, tokenizer, step
        self.text = draft.text.strip()
        self.marked = self.text if draft.mode == "video" else mark_quoted_speech(self.text)
        self.expected = [span.words for span in parse_spans(self.marked)]
        language = draft.language
        self.language = ("zh" if is_chinese(self.text) else "en") if language == AUTO else language
        self.notes: list[str] = []
        self.asked = 0
        if self.marked != self.text:
            self.notes.append("What is said in quotation marks was taken as speech.")

    def run(self) -> Rewritten:
        question = self._question()
        for _ in range(ATTEMPTS):
            self.asked += 1
            answer = self.backend.ask(question, self.step)
            prompt = clean_answer(answer.text)
            faults, cut = self._faults(prompt, answer)
            if not faults:
                return self._done(prompt, answer)
            question = question.again(answer.text, instructions.objection(self.language, faults))
        if cut is not None:
            self.notes.append("It was too long, so its last sentences were left out.")
            return self._done(cut, answer)
        return self.kept(f"What {self.backend.name} wrote will not do, twice: {' '.join(faults)}")

    def kept(self, why: str) -> Rewritten:
        """The draft as it is."""
        length = measure(self.text, self.tokenizer)
        draft = self.draft.text
        why = why if why.endswith((".", "?", "!", "…")) else f"{why}."
        return Rewritten(draft, draft, self.backend.name, length, self.asked, " ".join(why.split()))

    def _question(self) -> Question:
        draft = self.draft
        picture = draft.image is not None
        speech = bool(self.expected)
        system = instructions.rewrite_instruction(self.language, speech=speech, image=picture, mode=draft.mode)
        turn = instructions.draft_turn(self.language, self.marked)
        return Question(system, (turn,), draft.image, draft.seed, draft.temperature, draft.max_tokens)

    def _faults(self, prompt: str, answer: Answer) -> tuple[list[str], str | None]:
        """What is wrong with a prompt, and, where it is but too long, what of it fits."""
        faults = speech_faults(prompt, self.expected)
        if faults and not answer.truncated:
            return faults, None
        faults += text_faults(prompt, self.marked, self.language) or unmarked_faults(prompt, self.marked)
        if answer.truncated:
            faults.append("It was broken off because it became too long: write less, and do not think aloud.")
        if not speech_faults(prompt, self.expected):
            prompt = restored(prompt, self.expected)
            too_long = length_faults(measure(prompt, self.tokenizer), self.language)
            if (too_long or answer.truncated) and len(faults) <= answer.truncated:
                return faults + too_long, shortened(prompt, self.expected, self.tokenizer)
        return faults, None

    def _done(self, prompt: str, answer: Answer) -> Rewritten:
        prompt = restored(prompt, self.expected)
        if self.draft.image is not None and not answer.saw_image:
            self.notes.append("The model takes no pictures: the first frame was not looked at.")
        length = measure(prompt, self.tokenizer)
        who = self.backend.name
        if answer.model and answer.model not in who:
            who = f"{who} {answer.model}"
        return Rewritten(prompt, self.draft.text, who, length, self.asked, notes=tuple(self.notes))


def caption(
    backend: Backend,
    image: Any,
    *,
    language: str = "zh",
    seed: int = 0,
    temperature: float = 0.7,
    max_tokens: int = 1024,
    step: Step | None = None,
) -> str:
    """The picture and the framing of a first frame (H, W, 3) fp32 in 0..1 in words, one paragraph.

    One that will not do is asked for once more, with the reason. Raises RewriteError where there is none then,
    ValueError for another language than "zh" and "en".
    """
    system = instructions.caption_instruction(language)
    question = Question(system, (instructions.caption_turn(language),), image, seed, temperature, max_tokens)
    for _ in range(ATTEMPTS):
        answer = backend.ask(question, step)
        if not answer.saw_image:
            raise RewriteError(f"{backend.name} takes no pictures: use a model that does.")
        text = clean_answer(answer.text)
        faults = speech_faults(text, []) or text_faults(text, "", language)
        if answer.truncated and not faults:
            text = shortened(text, []) or ""
            faults = [] if text else ["It was broken off because it became too long."]
        if not faults:
            return text
        question = question.again(answer.text, instructions.objection(language, faults))
    raise RewriteError(f"What {backend.name} wrote will not do, twice: {' '.join(faults)}")


def picture_digest(image: Any) -> str:
    """A hash of a picture's values and shape."""
    data = image.detach().cpu().contiguous().float().numpy()
    return hashlib.sha256(repr(data.shape).encode() + data.tobytes()).hexdigest()
