"""Text on a node as soon as it has run, by the host's own means."""

from __future__ import annotations

import sys


def show_text(text: str, node_id: str | None) -> bool:
    """Show ``text`` on the node in the canvas; False where the host has no text for nodes, or nobody is looking.

    ``node_id``: the node's own hidden ``unique_id``. Run on ComfyUI 0.18.1 and 0.33.0.
    """
    server = getattr(sys.modules.get("server"), "PromptServer", None)
    send = getattr(getattr(server, "instance", None), "send_progress_text", None)
    if send is None or not node_id:
        return False
    send(text, node_id)
    return True
