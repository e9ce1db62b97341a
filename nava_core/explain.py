"""Any error as one sentence for the person at the terminal."""

from __future__ import annotations

import errno

MAX_LENGTH = 600
OWN_WORDS = (ValueError, RuntimeError, ArithmeticError, FileNotFoundError, FileExistsError)
NO_MEMORY = ("can't allocate memory", "cannot allocate memory", "not enough memory: you tried to allocate")  # of a CPU
# Of a GPU's libraries, which raise a RuntimeError where PyTorch itself raises OutOfMemoryError
NO_DEVICE_MEMORY = ("out of memory", "cudnn_status_alloc_failed", "cublas_status_alloc_failed")
FATAL_ERRNOS = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EROFS})


class TooLittleMemoryError(RuntimeError):
    """A device has too little memory for what cannot be done in parts; the message says what can be done about it."""


def explain(error: BaseException) -> str:
    """One line that says what was wrong: the error's own sentence where it has one, else its type and what it says."""
    if "OutOfMemory" in type(error).__name__:
        return (
            "The GPU has too little free memory for this clip: make it smaller or shorter, use fp8 weights "
            "(--dtype fp8), or free the memory other programs hold."
        )
    text = " ".join(str(error).split())
    if isinstance(error, MemoryError) or any(words in text.lower() for words in NO_MEMORY):
        return "The machine has too little free memory for this clip: make it smaller or shorter, or use --dtype bf16."
    if isinstance(error, ModuleNotFoundError) and error.name:
        package = error.name.partition(".")[0]
        return f"The Python package {package} is not installed: run `pip install .[standalone]` in the pack's folder."
    if isinstance(error, OSError) and error.errno is not None and error.strerror:
        text = f"{error.filename}: {error.strerror}." if error.filename else f"{error.strerror}."
    elif not text or not isinstance(error, (*OWN_WORDS, OSError, ImportError)):
        text = f"{type(error).__name__}: {text}" if text else f"{type(error).__name__} without a message."
    return text if len(text) <= MAX_LENGTH else f"{text[: MAX_LENGTH - 3]}..."


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a device, or the machine, had too little free memory for what was asked of it."""
    if "OutOfMemory" in type(error).__name__ or isinstance(error, MemoryError):
        return True
    text = str(error).lower()
    of_torch = type(error).__module__ in ("builtins", "torch")  # sentences of ours that mention memory are none
    words = (*NO_MEMORY, *NO_DEVICE_MEMORY)
    return isinstance(error, RuntimeError) and of_torch and any(each in text for each in words)


def is_fatal(error: BaseException) -> bool:
    """Whether no later clip could be written either: a full or read-only disk."""
    return isinstance(error, OSError) and error.errno in FATAL_ERRNOS
