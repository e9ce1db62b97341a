"""Options of the commands that rewrite prompts, and the chat model that they name."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from .options import UsageError, number, whole_number

SERVER_FROM_ENVIRONMENT = ""


def add_chat_options(group: Any, *names: str) -> None:
    """Which chat model writes, and how; ``names``: further ones of --chat-model."""
    group.add_argument(
        "--server",
        nargs="?",
        const=SERVER_FROM_ENVIRONMENT,
        metavar="URL",
        help="an OpenAI-compatible server, http://HOST:PORT/v1 (default: NAVA_REWRITE_URL); its model, key and timeout "
        "are NAVA_REWRITE_MODEL, NAVA_REWRITE_KEY and NAVA_REWRITE_TIMEOUT",
    )
    group.add_argument("--server-model", metavar="NAME", help="the server's model (default: its first)")
    group.add_argument(
        *names,
        "--chat-model",
        dest="chat_model",
        type=Path,
        metavar="FOLDER",
        help="a chat model's folder instead of a server: safetensors, by transformers; nothing is downloaded",
    )
    group.add_argument("--chat-device", default="auto", metavar="DEVICE", help="of that model: auto, cpu, cuda:1 ...")
    group.add_argument(
        "--language",
        choices=["zh", "en", "auto"],
        default="zh",
        help="of the prompt that is written (zh: most of what NAVA was trained on; auto: the draft's)",
    )
    group.add_argument("--temperature", type=_temperature, default=0.7, metavar="T", help="0 to 2 (0.7)")
    group.add_argument(
        "--max-tokens", type=whole_number(64, 32768), default=1024, metavar="N", help="of an answer (1024)"
    )


def _temperature(text: str) -> float:
    value = number(text)
    if not 0 <= value <= 2:
        raise argparse.ArgumentTypeError(f"it must be from 0 to 2, got {text!r}")
    return value


def chat_backend(args: argparse.Namespace) -> Any:
    """The chat model that the command names, or the environment. Raises UsageError where there is none."""
    import os
    from dataclasses import replace

    from ..rewrite import BackendMissingError, ChatServer, LocalChat, server_settings
    from ..rewrite.server import URL

    if args.chat_model is not None and (args.server is not None or args.server_model is not None):
        raise UsageError("Give --server or --chat-model, not both.")
    try:
        if args.chat_model is not None:
            return LocalChat(args.chat_model, args.chat_device)
        settings = server_settings({**os.environ, URL: args.server} if args.server else os.environ)
        if settings is None:
            raise UsageError(
                "No chat model to ask: give --server URL, set NAVA_REWRITE_URL, or give --chat-model FOLDER."
            )
        return ChatServer(replace(settings, model=args.server_model) if args.server_model else settings)
    except (ValueError, BackendMissingError) as error:
        raise UsageError(str(error)) from None
