"""`nava rewrite`: a draft becomes the dense prompt that NAVA wants."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from .options import Command, UsageError, whole_number
from .progress import Progress
from .rewriting import add_chat_options, chat_backend

MAX_SEED = 2**64 - 1

DESCRIPTION = """A draft of a line or two becomes the dense paragraph that NAVA was trained on: the picture, what
happens, the camera, the sound. A chat model writes it: one behind an OpenAI-compatible server (vLLM, Ollama,
llama.cpp), or one in a folder. Speech, written <S>words<E>, given by --speech or said in quotation marks, comes back
word for word and in order, or the model is asked once more, with the reason; then the draft itself is the answer, with
a warning and exit code 1. The prompt goes to stdout, all else to stderr."""

EXAMPLES = """examples:
  nava rewrite "A fisherman hums while mending a net." --server http://127.0.0.1:11434/v1
  nava rewrite 'An old man at the door says <S>Come in!<E>' --language en
  nava rewrite "A teacher at the blackboard" --speech "Good morning." --speech "Please sit down."
  nava rewrite "She turns round and laughs." --image her.png --model models/a-vision-chat-model
  nava rewrite --image her.png                          only describe the picture
  nava rewrite "A bell rings twice." | nava generate - --models models"""


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("draft", nargs="?", help="the draft; - reads it from stdin")
    parser.add_argument(
        "--speech",
        action="append",
        default=[],
        metavar="WORDS",
        help="what is said, as often as needed, in the order it is said; put behind the draft as speech spans",
    )
    parser.add_argument("--image", metavar="FILE", help="the first frame, for a model that takes pictures")
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--audio-only", action="store_true", help="the clip is sound alone")
    mode.add_argument("--video-only", action="store_true", help="the clip has no sound")
    parser.add_argument("--seed", type=whole_number(0, MAX_SEED), default=0, help="of the answer (0)")
    add_chat_options(parser.add_argument_group("the chat model"), "--model")
    parser.add_argument(
        "--tokenizer",
        type=Path,
        metavar="PATH",
        help="the text encoder's tokenizer folder, or its file, to count tokens exactly; without it they are estimated",
    )


def run(args: argparse.Namespace) -> int:
    from ..rewrite import rewrite

    backend = chat_backend(args)
    draft = _draft(args)
    if draft is None:
        return _caption(args, backend)
    progress = Progress()
    progress.begin("Rewriting", "token")
    try:
        result = rewrite(backend, draft, tokenizer=_tokenizer(args), step=_moving(progress))
    except ValueError as error:
        raise UsageError(str(error)) from None
    finally:
        progress.end()
    progress.say(result.report())
    print(result.prompt)
    return 0 if result.changed else 1


def _caption(args: argparse.Namespace, backend: Any) -> int:
    from ..rewrite import caption

    progress = Progress()
    progress.begin("Looking", "token")
    language = "en" if args.language == "en" else "zh"
    settings = {"seed": args.seed, "temperature": args.temperature, "max_tokens": args.max_tokens}
    try:
        text = caption(backend, _image(args), language=language, step=_moving(progress), **settings)
    finally:
        progress.end()
    print(text)
    return 0


def _draft(args: argparse.Namespace) -> Any:
    """What is to be rewritten; None where there is only a picture."""
    from ..rewrite import Draft

    text = sys.stdin.read() if args.draft == "-" else args.draft
    if text is None and not args.speech:
        if args.image is None:
            raise UsageError("Give a draft, or an --image to describe.")
        return None
    marks = [word for words in args.speech for word in ("<S>", "<E>", "</S>") if word in words]
    if marks or not all(words.strip() for words in args.speech):
        raise UsageError("--speech: give the words alone, without <S> and <E>.")
    whole = " ".join([(text or "").strip(), *(f"<S>{words.strip()}<E>" for words in args.speech)])
    mode = "audio" if args.audio_only else "video" if args.video_only else "video+audio"
    if mode == "audio" and args.image is not None:
        raise UsageError("--audio-only: a clip without a picture has no first frame; leave out --image.")
    settings = {"seed": args.seed, "temperature": args.temperature, "max_tokens": args.max_tokens}
    return Draft(whole.strip(), args.language, mode, None if args.image is None else _image(args), **settings)


def _image(args: argparse.Namespace) -> Any:
    from ..jobs import existing_file
    from ..media import read_image

    try:
        return read_image(existing_file(args.image, "image", Path.cwd()))
    except ValueError as error:
        raise UsageError(str(error)) from None


def _tokenizer(args: argparse.Namespace) -> Any:
    if args.tokenizer is None:
        return None
    from ..components.text_encoder import load_tokenizer
    from ..prompt import PromptTokenizer

    read = load_tokenizer if args.tokenizer.is_file() else PromptTokenizer.from_folder
    try:
        return read(args.tokenizer)
    except (ValueError, FileNotFoundError) as error:
        raise UsageError(str(error)) from None


def _moving(progress: Progress) -> Any:
    """Shows a model at work, once it has begun to write."""
    return lambda tokens, most: progress.step(tokens, most) if tokens else progress.status("the model is at work")


COMMANDS = [Command("rewrite", "turn a draft into a dense prompt", DESCRIPTION, EXAMPLES, add_options, run)]
