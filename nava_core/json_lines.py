"""Files of JSON lines that are only ever added to, and that a kill may have cut off in the last line."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any


def read_records(path: Path, take: Callable[[Any], None]) -> None:
    """Hands every record to ``take``; a line that is no JSON, or that ``take`` cannot use (ValueError, KeyError,
    TypeError, AttributeError), is passed over. A last line without an end is taken out of the file."""
    with path.open("r+b") as file:
        end = 0
        for raw in file:
            if raw.endswith(b"\n"):
                end += len(raw)
                with contextlib.suppress(ValueError, KeyError, TypeError, AttributeError):
                    take(json.loads(raw))
        file.truncate(end)


def append_record(path: Path, record: Mapping[str, Any]) -> None:
    """Adds a record; it is on the disk when this returns."""
    with path.open("ab", buffering=0) as file:
        file.write(json.dumps(record, ensure_ascii=False).encode("utf-8", "backslashreplace") + b"\n")
        os.fsync(file.fileno())
