"""How much of the machine's memory is free."""

from __future__ import annotations

try:
    import psutil
except ImportError:  # diffusers' hooks bring it along
    psutil = None


def free_ram() -> int | None:
    """Bytes that can be taken without pushing anything out; None where nothing tells."""
    return None if psutil is None else psutil.virtual_memory().available
