"""Text on a node, by the means that the canvas has without anyone's JavaScript.

Run on ComfyUI 0.18.1 (canvas 1.42.8) and 0.33.0 (canvas 1.49.6), with nodes drawn on the canvas and as elements.
"""

from __future__ import annotations

import struct
import sys

from comfy_api.latest import ui

_BRACKETS = str.maketrans({"<": "‹", ">": "›", "&": "＆"})  # the canvas shows the text as HTML or Markdown


def show_text(node_id: str | None, text: str):
    """Shows ``text`` on a node that is being run, below its widgets, and returns the node's ``ui``, from which those
    who read the history take it. Both are looked for; None where the host has no text previews."""
    plain = text.translate(_BRACKETS)
    server = getattr(getattr(sys.modules.get("server"), "PromptServer", None), "instance", None)
    if node_id is not None and hasattr(server, "send_progress_text"):
        server.send_progress_text(plain, node_id)
        _send_with_empty_prompt_id(server, plain, node_id)
    preview = getattr(ui, "PreviewText", None)
    return None if preview is None else preview(plain)


def _send_with_empty_prompt_id(server, text: str, node_id: str) -> None:
    """The same once more for canvases, 1.42 among them, that look for a prompt id before the node's, which their server
    does not send. Canvases that look for none find a node without an id here, and pass over it."""
    kind = getattr(getattr(sys.modules.get("protocol"), "BinaryEventTypes", None), "TEXT", None)
    if kind is None or not hasattr(server, "send_sync"):
        return
    node = str(node_id).encode()
    server.send_sync(kind, struct.pack(">II", 0, len(node)) + node + text.encode())
