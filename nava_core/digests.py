"""Hashes of what clips follow from: files by their content, tensors by their values."""

from __future__ import annotations

import hashlib
import os
from functools import lru_cache
from pathlib import Path
from typing import Any

HASH_CHUNK = 1 << 20


def file_digest(path: Path) -> str:
    """SHA-256 of a file's content, remembered until the file changes."""
    status = path.stat()
    return _digest(path, status.st_size, status.st_mtime_ns)


@lru_cache(maxsize=4096)
def _digest(path: Path, size: int, modified: int) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(HASH_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def content(value: Any) -> Any:
    """``value`` as JSON has it, with files (path objects) and tensors in their place by a hash of what they hold."""
    if isinstance(value, os.PathLike):
        return file_digest(Path(value))
    if hasattr(value, "detach"):
        return _tensor_digest(value)
    if isinstance(value, dict):
        return {str(key): content(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [content(each) for each in value]
    return value


def _tensor_digest(tensor: Any) -> str:
    import torch

    values = tensor.detach().cpu().contiguous()
    digest = hashlib.sha256(f"{values.dtype} {tuple(values.shape)}".encode())
    digest.update(values.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
