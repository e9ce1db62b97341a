"""Text on a node, by the means that the canvas has without anyone's JavaScript. Run on ComfyUI 0.18.1 and 0.33.0."""

from __future__ import annotations

import sys

from comfy_api.latest import ui

_BRACKETS = str.maketrans({"<": "‹", ">": "›", "&": "＆"})  # the canvas shows the text as HTML or Markdown


def show_text(node_id: str | None, text: str):
    """Shows ``text`` on a node that is being run, below its widgets, and returns the node's ``ui``: what newer canvases
    and those who read the history take it from. Both are looked for; None where the host has no text previews."""
    plain = text.translate(_BRACKETS)
    server = getattr(getattr(sys.modules.get("server"), "PromptServer", None), "instance", None)
    send = getattr(server, "send_progress_text", None)
    if send is not None and node_id is not None:
        send(plain, node_id)
    preview = getattr(ui, "PreviewText", None)
    return None if preview is None else preview(plain)
