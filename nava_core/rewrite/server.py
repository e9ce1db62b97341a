"""A chat model behind an OpenAI-compatible server (vLLM, Ollama, llama.cpp and others), over the standard library.

Its address comes from the environment, from a file in the host's user folder or from the command line, never from a
workflow. Redirections are not followed and proxies not used.
"""

from __future__ import annotations

import base64
import contextlib
import http.client
import io
import json
import math
import os
import queue
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from .backends import Answer, BackendMissingError, Question, RewriteError, Step

URL, MODEL, KEY, TIMEOUT = "NAVA_REWRITE_URL", "NAVA_REWRITE_MODEL", "NAVA_REWRITE_KEY", "NAVA_REWRITE_TIMEOUT"
FILE = "nava_rewrite.json"  # in the host's user folder
CONNECT_SECONDS = 5.0
ANSWER_SECONDS = 120.0  # without a word; the first one may have to wait until the model is loaded
PATIENCE = 5  # times that long, an answer may take in all
TICK = 0.1  # seconds between two looks at whether to go on
LARGEST = 4 << 20  # bytes of an answer
LARGEST_SIDE = 1024  # of a picture that is sent
LETTERS_A_TOKEN = 16  # more than that, and the server does not keep to max_tokens
SEEDS = 2**31  # llama.cpp and others take 32 bits


@dataclass(frozen=True)
class ServerSettings:
    """Where a server is and what it is asked for.

    ``url``: "http://127.0.0.1:8000/v1"; ``model``: its name there, "" for the server's first; ``key``: sent as bearer
    token; ``timeout``: seconds without a word; ``extra``: further fields of every request, for settings of a certain
    server. Raises ValueError, in a sentence, for an address that is none.
    """

    url: str
    model: str = ""
    key: str = field(default="", repr=False)
    timeout: float = ANSWER_SECONDS
    extra: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        parts = _parts(self.url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"The chat server's address {self.url!r} is none: write http://HOST:PORT/v1.")
        if parts.username or parts.query or parts.fragment:
            raise ValueError("The chat server's address holds a name, a password or a query: give a key apart from it.")
        if not (isinstance(self.timeout, (int, float)) and 0 < self.timeout < math.inf):
            raise ValueError(f"The chat server's timeout is {self.timeout!r}: give seconds, more than 0.")
        if not all(ord(" ") < ord(letter) < 127 for letter in self.key):
            raise ValueError("The chat server's key holds spaces or signs that no key has: copy it again.")


def _parts(url: str):
    try:
        parts = urlsplit(url.strip())
        _ = parts.port  # read here, where a wrong one is an error
        return parts
    except ValueError:
        raise ValueError(f"The chat server's address {url!r} is none: write http://HOST:PORT/v1.") from None


def server_settings(
    environment: Mapping[str, str] = os.environ, file: str | os.PathLike | None = None
) -> ServerSettings | None:
    """The server that is configured; None where none is.

    The environment comes before ``file``, a JSON object with "url" and, where wanted, "model", "key", "timeout" and
    "extra". Raises ValueError, in a sentence, for a file or an address that cannot be used.
    """
    values: dict[str, Any] = {} if file is None else _read_file(Path(file))
    for name, variable in (("url", URL), ("model", MODEL), ("key", KEY), ("timeout", TIMEOUT)):
        if environment.get(variable):
            values[name] = environment[variable].strip()
    if not values.get("url"):
        return None
    if isinstance(values.get("timeout"), str):
        try:
            values["timeout"] = float(values["timeout"])
        except ValueError:
            raise ValueError(f"{TIMEOUT} is {values['timeout']!r}: give seconds, more than 0.") from None
    return ServerSettings(**values)


def _read_file(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        values = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path.name} in the user folder can't be read as JSON: {error}.") from None
    kinds = {"url": str, "model": str, "key": str, "timeout": (int, float), "extra": dict}
    if not isinstance(values, dict):
        raise ValueError(
            f'{path.name} in the user folder is not a JSON object: write {{"url": "http://HOST:PORT/v1"}}.'
        )
    for name, value in values.items():
        if name not in kinds or not isinstance(value, kinds[name]) or isinstance(value, bool):
            raise ValueError(f"{path.name} in the user folder has a {name!r} that cannot be used: see the help page.")
    return values


class ChatServer:
    """The backend of :class:`ServerSettings`."""

    def __init__(self, settings: ServerSettings):
        self.settings = settings
        self.name = f"the chat server's {settings.model or 'model'}"
        parts = _parts(settings.url)
        self._secure, self._host = parts.scheme == "https", parts.hostname
        self._port = parts.port or (443 if self._secure else 80)
        self._path = parts.path.rstrip("/") or "/v1"
        self._where = f"{self._host}:{self._port}"
        self._model = settings.model

    def ask(self, question: Question, step: Step | None = None) -> Answer:
        """The model's answer, streamed. Raises RewriteError; BackendMissingError where none answers or it refuses."""
        exchange = _Exchange(self, question)
        pieces: list[str] = []
        begun = heard = time.monotonic()
        tokens, letters = 0, 0
        try:
            exchange.start()
            while True:
                if step is not None:
                    step(min(tokens, question.max_tokens), question.max_tokens)
                event = exchange.next()
                now = time.monotonic()
                limit = self.settings.timeout
                if now - heard > limit or now - begun > PATIENCE * limit:
                    raise RewriteError(
                        f"The chat server at {self._where} was too slow: no answer within "
                        f"{round(now - begun, 1):g} s. Take a smaller model, or set {TIMEOUT} higher."
                    )
                if event is None:
                    continue
                heard = now
                if isinstance(event, Exception):
                    raise event
                if isinstance(event, bool):
                    return self._answer("".join(pieces), event)
                pieces.append(event)
                letters += len(event)
                tokens += 1
                if letters > LETTERS_A_TOKEN * question.max_tokens:
                    return self._answer("".join(pieces), True)
        finally:
            exchange.stop()

    def _answer(self, text: str, truncated: bool) -> Answer:
        if not text.strip():
            hint = ": it spent all its tokens on thinking, so allow more" if truncated else ""
            raise RewriteError(f"The chat server at {self._where} answered nothing{hint}.")
        return Answer(text, truncated, model=_short(self._model))

    # --- on the thread of an exchange ---------------------------------------------------------------------------

    def connection(self) -> http.client.HTTPConnection:
        kind = http.client.HTTPSConnection if self._secure else http.client.HTTPConnection
        return kind(self._host, self._port, timeout=CONNECT_SECONDS)

    def body(self, question: Question, model: str) -> bytes:
        request = {
            "model": model,
            "messages": _messages(question),
            "temperature": question.temperature,
            "seed": question.seed % SEEDS,
            "max_tokens": question.max_tokens,
            "stream": True,
            **self.settings.extra,
        }
        return json.dumps(request).encode()

    def headers(self) -> dict[str, str]:
        headers = {"Content-Type": "application/json", "Accept": "text/event-stream, application/json"}
        if self.settings.key:
            headers["Authorization"] = f"Bearer {self.settings.key}"
        return headers


class _Exchange(threading.Thread):
    """One request and its answer, on a thread of its own: whoever waits for it can look up and go away.

    Its events are pieces of text ("" for what is thought and not said), at the end whether the answer was broken off
    (True or False), or an error.
    """

    def __init__(self, server: ChatServer, question: Question):
        super().__init__(daemon=True, name="nava-chat-server")
        self.server, self.question = server, question
        self.events: queue.Queue = queue.Queue()
        self.socket: socket.socket | None = None
        self.stopped = False

    def next(self) -> str | bool | Exception | None:
        """The next event; None where there is none yet."""
        try:
            return self.events.get(timeout=TICK)
        except queue.Empty:
            return None

    def stop(self) -> None:
        """Hangs up."""
        self.stopped = True
        if self.socket is not None:
            with contextlib.suppress(OSError):  # it has ended already
                self.socket.shutdown(socket.SHUT_RDWR)

    def run(self) -> None:
        where = self.server._where
        try:
            truncated = self._stream()
        except RewriteError as error:
            self.events.put(error)
        except (ConnectionRefusedError, socket.gaierror):
            self.events.put(
                BackendMissingError(f"No chat server answers at {where}: start it, or correct its address ({URL}).")
            )
        except TimeoutError:
            self.events.put(BackendMissingError(f"The chat server at {where} cannot be reached within the time."))
        except (OSError, http.client.HTTPException) as error:
            self.events.put(RewriteError(f"The connection to the chat server at {where} broke: {_said(error)}."))
        except Exception as error:  # whatever it is, the one who waits must hear of it
            self.events.put(RewriteError(f"The chat server at {where} answered what cannot be read: {_said(error)}."))
        else:
            self.events.put(truncated)

    def _stream(self) -> bool:
        server = self.server
        model = server._model or self._first_model()
        response = self._send("POST", "/chat/completions", server.body(self.question, model))
        kind = response.headers.get_content_type()
        if kind == "application/json":
            return self._whole(_json(response.read(LARGEST + 1), server._where))
        if kind != "text/event-stream":
            raise RewriteError(
                f"What answers at {server._where} is no chat server (it sent {kind}): correct its address ({URL})."
            )
        return self._pieces(response)

    def _pieces(self, response: http.client.HTTPResponse) -> bool:
        truncated = ended = False
        for data in _server_sent(response):
            if data == "[DONE]":
                ended = True
                break
            piece = _json(data.encode(), self.server._where)
            if "error" in piece:
                raise RewriteError(f"The chat server at {self.server._where} failed: {_message(piece)}")
            for choice in piece.get("choices") or []:
                self.events.put(_content(choice.get("delta")))
                ended = ended or bool(choice.get("finish_reason"))
                truncated = truncated or choice.get("finish_reason") == "length"
        if not ended:
            raise RewriteError(f"The chat server at {self.server._where} broke off in the middle of its answer.")
        return truncated

    def _whole(self, body: dict) -> bool:
        choices = body.get("choices")
        if not choices:
            raise RewriteError(f"The chat server at {self.server._where} sent no answer: {_message(body)}")
        self.events.put(_content(choices[0].get("message")))
        return choices[0].get("finish_reason") == "length"

    def _first_model(self) -> str:
        """The server's first model, where none is configured."""
        server = self.server
        body = _json(self._send("GET", "/models", None).read(LARGEST + 1), server._where)
        names = [entry.get("id") for entry in body.get("data") or [] if isinstance(entry, dict)]
        if not names or not names[0]:
            raise BackendMissingError(f"The chat server at {server._where} has no model: load one there.")
        server._model = str(names[0])
        return server._model

    def _send(self, method: str, path: str, body: bytes | None) -> http.client.HTTPResponse:
        server = self.server
        connection = server.connection()
        connection.connect()
        self.socket = connection.sock
        self.socket.settimeout(server.settings.timeout + CONNECT_SECONDS)
        if self.stopped:
            raise RewriteError("Stopped.")
        connection.request(method, server._path + path, body, server.headers())
        response = connection.getresponse()
        if response.status != 200:
            self._refuse(response)
        return response

    def _refuse(self, response: http.client.HTTPResponse) -> None:
        where, status = self.server._where, response.status
        detail = _detail(response)
        if status in (401, 403):
            raise BackendMissingError(f"The chat server at {where} refuses the key (HTTP {status}): set {KEY}.")
        if status == 404:
            model = f" has no model {self.server._model!r}, or" if self.server._model else ""
            raise BackendMissingError(
                f"The chat server at {where}{model} has no {self.server._path}/chat/completions (HTTP 404): correct "
                f"{MODEL} or {URL}. {detail}".rstrip()
            )
        if 300 <= status < 400:
            raise BackendMissingError(f"The chat server at {where} sends elsewhere (HTTP {status}): correct {URL}.")
        picture = " It may not take pictures." if self.question.image is not None and status < 500 else ""
        raise RewriteError(f"The chat server at {where} failed (HTTP {status}). {detail}{picture}".rstrip())


def _content(message: dict | None) -> str:
    """What a message says; some servers give it in parts. Raises TypeError for what is no text."""
    content = (message or {}).get("content")
    parts = [part.get("text") for part in content] if isinstance(content, list) else [content]
    if not all(part is None or isinstance(part, str) for part in parts):
        raise TypeError("its content is no text")
    return "".join(part or "" for part in parts)


def _server_sent(response: http.client.HTTPResponse) -> Iterator[str]:
    """The data of server-sent events."""
    read = 0
    while line := response.readline(LARGEST):
        read += len(line)
        if read > LARGEST:
            raise RewriteError(f"The chat server sent more than {LARGEST >> 20} MiB: that is no prompt.")
        if line.startswith(b"data:"):
            yield line[5:].decode("utf-8", "replace").strip()


def _json(data: bytes, where: str) -> dict:
    try:
        value = json.loads(data)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise RewriteError(f"The chat server at {where} answered what is no JSON: is it an OpenAI-compatible one?")
    return value


def _detail(response: http.client.HTTPResponse) -> str:
    try:
        text = response.read(10_000).decode("utf-8", "replace")
        return _message(json.loads(text))
    except (ValueError, AttributeError, OSError, http.client.HTTPException):
        return ""


def _message(body: dict) -> str:
    """What an error's body says, on one line."""
    error = body.get("error", body.get("message", ""))
    text = error.get("message", "") if isinstance(error, dict) else error
    return f"It says: {_short(str(text))}" if text else ""


def _said(error: Exception) -> str:
    return _short(str(error) or type(error).__name__).rstrip(".")


def _short(text: str) -> str:
    text = "".join(letter for letter in " ".join(text.split()) if letter.isprintable())
    return text if len(text) <= 200 else f"{text[:199]}…"


def _messages(question: Question) -> list[dict[str, Any]]:
    messages: list[dict[str, Any]] = [{"role": "system", "content": question.system}]
    for i, turn in enumerate(question.turns):
        content: Any = turn
        if i == 0 and question.image is not None:
            picture = {"type": "image_url", "image_url": {"url": data_url(question.image)}}
            content = [picture, {"type": "text", "text": turn}]
        messages.append({"role": "assistant" if i % 2 else "user", "content": content})
    return messages


def data_url(image: Any) -> str:
    """A picture (H, W, 3) in 0..1 as a JPEG in a data URL, no side above 1024. Raises RewriteError without Pillow."""
    stream = io.BytesIO()
    small_picture(image).save(stream, "JPEG", quality=90)
    return f"data:image/jpeg;base64,{base64.b64encode(stream.getvalue()).decode()}"


def small_picture(image: Any) -> Any:
    """A picture (H, W, 3) in 0..1 as a PIL image, no side above 1024. Raises RewriteError without Pillow."""
    try:
        from PIL import Image
    except ImportError as error:
        raise RewriteError("Showing a picture to a chat model needs the package pillow: install it.") from error
    pixels = (image[..., :3].detach().cpu().float().clamp(0, 1) * 255).round().byte().numpy()
    picture = Image.fromarray(pixels)
    picture.thumbnail((LARGEST_SIDE, LARGEST_SIDE))
    return picture
