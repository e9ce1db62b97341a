"""The server route that the canvas asks about a prompt while it is typed."""

from __future__ import annotations

import asyncio
import json
import sys

import folder_paths

from ...nava_core.prompt import PromptCheck, check_prompt
from .text_encoder import any_tokenizer

ROUTE = "/nava/prompt_check"
MAX_BYTES = 64 * 1024  # of a request: some 20 times the longest prompt that fits
MAX_VOICES = 64
MAX_SECONDS = 3600


def add_prompt_route() -> bool:
    """Let the running server answer POST /nava/prompt_check; False where there is no server to add it to.

    The request is JSON: ``prompt``, and if known ``voices`` (how many) and ``seconds`` (of the clip). The answer is
    `PromptCheck.as_dict`. It names no file, and nothing is written or loaded but a tokenizer. Run on ComfyUI 0.18.1
    and 0.33.0.
    """
    server = getattr(sys.modules.get("server"), "PromptServer", None)
    routes = getattr(getattr(server, "instance", None), "routes", None)
    if routes is None:
        return False
    routes.post(ROUTE)(answer)
    return True


async def answer(request):
    """The answer to one request: 200 with the check, or 400 or 413 with one sentence."""
    from aiohttp import web

    body = bytearray()
    async for chunk in request.content.iter_chunked(8192):
        body += chunk
        if len(body) > MAX_BYTES:
            return web.json_response({"error": f"The request is over {MAX_BYTES} bytes."}, status=413)
    try:
        asked = _asked(bytes(body))
    except ValueError as error:
        return web.json_response({"error": str(error)}, status=400)
    check = await asyncio.to_thread(_check, *asked)
    return web.json_response(check.as_dict())


def _asked(body: bytes) -> tuple[str, int, float | None]:
    """Prompt, voices and seconds of a request. Raises ValueError for anything else."""
    try:
        given = json.loads(body)
    except (ValueError, RecursionError):
        raise ValueError("The request is not JSON.") from None
    if not isinstance(given, dict) or not isinstance(given.get("prompt"), str):
        raise ValueError("The request needs a text “prompt”.")
    voices, seconds = given.get("voices", 0), given.get("seconds")
    if type(voices) is not int or not 0 <= voices <= MAX_VOICES:
        raise ValueError(f"“voices” must be a whole number from 0 to {MAX_VOICES}.")
    if seconds is not None and (type(seconds) not in (int, float) or not 0 <= seconds <= MAX_SECONDS):
        raise ValueError(f"“seconds” must be a number from 0 to {MAX_SECONDS}.")
    return given["prompt"], voices, seconds or None


def _check(prompt: str, voices: int, seconds: float | None) -> PromptCheck:
    try:
        return check_prompt(prompt, tokenizer=_tokenizer(), voices=voices, clip_seconds=seconds)
    except RuntimeError:  # a package that the tokenizer needs is missing
        return check_prompt(prompt, voices=voices, clip_seconds=seconds)


def _tokenizer():
    names = sorted(folder_paths.get_filename_list("text_encoders"), key=lambda name: "umt5" not in name.lower())
    paths = (folder_paths.get_full_path("text_encoders", name) for name in names)
    return any_tokenizer(path for path in paths if path)
