"""How much of the machine's memory is free."""

from __future__ import annotations

from pathlib import Path


def free_ram() -> int | None:
    """Bytes that can be taken without pushing anything out; None where the system does not say."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration, ValueError):
        return None
