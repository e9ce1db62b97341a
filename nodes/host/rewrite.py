"""Who rewrites prompts in ComfyUI: a CLIP that can generate text, or the chat server that the host's owner configured.

The server's address is read from the environment and from ``nava_rewrite.json`` in the user folder, above the folders
that the canvas can write to; nothing in a workflow can name one.
"""

from __future__ import annotations

import hashlib
import inspect
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import comfy.model_management
import comfy.sd
import comfy.sd1_clip
import comfy.utils
import folder_paths

from ...nava_core.explain import is_out_of_memory
from ...nava_core.rewrite import (
    Answer,
    BackendMissingError,
    ChatServer,
    Draft,
    Question,
    Remembered,
    RewriteError,
    Rewritten,
    caption,
    picture_digest,
    rewrite,
    server_settings,
)
from ...nava_core.rewrite.server import FILE, URL
from .text_encoder import prompt_tokenizer, with_its_network

AUTO, HOST, SERVER = "auto", "host", "server"
SAMPLING = {"top_k": 64, "top_p": 0.95, "min_p": 0.05, "repetition_penalty": 1.05, "presence_penalty": 0.0}

_remembered = Remembered()
_failed: Counter = Counter()  # how often there was no answer, by a node's own settings


def can_generate(clip) -> bool:
    """Whether a CLIP can generate text, as the stock Generate Text node wants it: whether anything in it brings more
    than the host's plain wrappers, whose ``generate`` only hands on. Run on ComfyUI 0.18.1 and 0.33.0."""
    if not callable(getattr(clip, "generate", None)) or not callable(getattr(clip, "decode", None)):
        return False
    network = getattr(clip, "cond_stage_model", None)
    if network is None:
        return True
    wrappers = (comfy.sd1_clip.SDClipModel, comfy.sd1_clip.SD1ClipModel)
    handing_on = [getattr(wrapper, "generate", None) for wrapper in wrappers]
    found = (getattr(type(module), "generate", None) for module in network.modules())
    return any(generate is not None and generate not in handing_on for generate in found)


class HostChat:
    """A CLIP that can generate, as a backend. Progress and interruption are the host's own.

    Raises BackendMissingError for a CLIP that cannot. Run on ComfyUI 0.18.1 and 0.33.0.
    """

    name = "the connected CLIP"

    def __init__(self, clip):
        if not can_generate(clip):
            raise BackendMissingError(
                "The connected CLIP cannot generate text: connect one that Generate Text takes (Gemma 3, Qwen and "
                "others), or none."
            )
        self.clip = with_its_network(clip) if isinstance(clip, comfy.sd.CLIP) else clip

    def ask(self, question: Question, step=None) -> Answer:
        """The CLIP's answer. Raises RewriteError for what goes wrong in it; an interruption goes through."""
        try:
            return self._generate(question)
        except comfy.model_management.InterruptProcessingException:
            raise
        except Exception as error:  # any text model of any pack: none may cost the draft
            if is_out_of_memory(error):
                comfy.model_management.soft_empty_cache()
                raise RewriteError("There is too little free memory for the connected CLIP to generate.") from error
            said = " ".join(str(error).split())[:200] or type(error).__name__
            raise RewriteError(f"The connected CLIP failed to generate: {said}.") from error

    def _generate(self, question: Question) -> Answer:
        picture = None if question.image is None else question.image[None]
        form = {"skip_template": False, "min_length": 1, "thinking": False}
        tokens = self.clip.tokenize(question.as_text(), image=picture, **form)
        settings = {**SAMPLING, "temperature": max(question.temperature, 0.01), "seed": question.seed}
        known = inspect.signature(self.clip.generate).parameters
        if not any(each.kind is each.VAR_KEYWORD for each in known.values()):
            settings = {name: value for name, value in settings.items() if name in known}
        ids = self.clip.generate(tokens, do_sample=question.temperature > 0, max_length=question.max_tokens, **settings)
        text = self.clip.decode(ids)
        if not text.strip():
            raise RewriteError("The connected CLIP generated nothing.")
        return Answer(text, len(ids) >= question.max_tokens, picture is None or _holds_picture(tokens))


def _holds_picture(tokens: Any) -> bool:
    """Whether a tokenizer took the picture in: text-only ones pass over it in silence."""
    if isinstance(tokens, dict):
        return tokens.get("type") == "image" or any(_holds_picture(each) for each in tokens.values())
    return isinstance(tokens, (list, tuple)) and any(_holds_picture(each) for each in tokens)


class _Nobody:
    """In place of a backend where there is none: says so when it is asked."""

    name = "no chat model"

    def __init__(self, error: Exception):
        self.error = error

    def ask(self, question: Question, step=None) -> Answer:
        raise BackendMissingError(str(self.error))


def configured_server() -> ChatServer | None:
    """The chat server of the environment or of the user folder's ``nava_rewrite.json``; None where none is configured.
    Raises ValueError, in a sentence, for a configuration that cannot be used."""
    settings = server_settings(file=Path(folder_paths.get_user_directory()) / FILE)
    return None if settings is None else ChatServer(settings)


def choose_backend(choice: str, clip=None):
    """The backend of a node: "host" the CLIP, "server" the configured server, "auto" the first of them that is there.
    One that says why where there is none."""
    try:
        if choice == HOST or (choice == AUTO and clip is not None and can_generate(clip)):
            if clip is None:
                raise BackendMissingError("No CLIP is connected: connect one that can generate text.")
            return HostChat(clip)
        server = configured_server()
        if server is not None:
            return server
        if choice == AUTO and clip is not None:
            return HostChat(clip)  # which says that it cannot
        raise BackendMissingError(
            f"There is nobody to ask: connect a CLIP that can generate text, or give the address of a chat server in "
            f"{URL}, or as url in {FILE} in ComfyUI's user folder."
            if choice == AUTO
            else f"No chat server is configured: give its address in {URL}, or as url in {FILE} in the user folder."
        )
    except (BackendMissingError, ValueError) as error:
        return _Nobody(error)


def rewrite_prompt(draft: Draft, choice: str, clip=None, image=None, text_encoder=None) -> Rewritten:
    """The dense prompt of a draft, or the draft itself with a warning. ``image``: IMAGE (B, H, W, C), of which the
    first is the clip's first frame; ``text_encoder``: umt5, for the exact length.

    What a server answered is remembered for as long as the host runs. Raises ValueError for a draft that is empty or
    whose speech marks do not pair up, and for a text encoder that is not umt5.
    """
    if image is not None:
        draft = replace(draft, image=image[0, ..., :3])
    tokenizer = None if text_encoder is None else prompt_tokenizer(text_encoder)
    backend = choose_backend(choice, clip)

    def make() -> Rewritten:
        return rewrite(backend, draft, tokenizer=tokenizer, step=_progress())

    if isinstance(backend, ChatServer):
        key = ("prompt", draft.key(_identity(backend)), None if tokenizer is None else tokenizer.max_length)
        return _remembered.get(key, make, keep=lambda result: not result.unavailable)
    return make()


def caption_image(image, choice: str, clip=None, **settings) -> str:
    """The first picture of an IMAGE in words; ``settings`` are those of the core's ``caption``. Raises RewriteError."""
    backend, picture = choose_backend(choice, clip), image[0, ..., :3]

    def make() -> str:
        return caption(backend, picture, step=_progress(), **settings)

    if not isinstance(backend, ChatServer):
        return make()
    return _remembered.get(("caption", _identity(backend), picture_digest(picture), *sorted(settings.items())), make)


def _identity(server: ChatServer) -> str:
    """What makes one server's answers another's."""
    settings = server.settings
    return repr((settings.url, settings.model, sorted(settings.extra.items())))


def _progress():
    """Shows how far the model is, and ends it where the person interrupts."""
    bar = comfy.utils.ProgressBar(1)

    def step(tokens: int, most: int) -> None:
        comfy.model_management.throw_exception_if_processing_interrupted()
        bar.update_absolute(tokens, most)

    return step


def note_failure(*own: Any) -> None:
    """Remembers that a node with these settings of its own got no answer, so that the host runs it anew the next
    time."""
    _failed[own] += 1


def state_of(*own: Any) -> str:
    """What the host is to compare, besides a node's inputs, to know whether its result still stands: the configured
    server, and how often there was no answer; None stands for a setting that comes over a link, which the host does not
    know yet. Nothing of it can be read back."""
    try:
        server = configured_server()
        configured = "" if server is None else _identity(server)
    except ValueError as error:
        configured = str(error)
    failed = sum(times for settings, times in _failed.items() if _may_be(own, settings))
    return hashlib.sha256(repr((configured, failed)).encode()).hexdigest()


def _may_be(own: tuple, settings: tuple) -> bool:
    return len(own) == len(settings) and all(a is None or a == b for a, b in zip(own, settings, strict=True))
