"""One form after another, where memory ends in the one before."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import Any

import torch

from ..explain import TooLittleMemoryError


def stream_down(
    forms: Sequence[Any],
    stream: Callable[[Any], Iterator[torch.Tensor]],
    *,
    is_short: Callable[[Exception], bool],
    recover: Callable[[], None],
    say: Callable[[str], None],
    what: str,
    advice: str,
) -> Iterator[torch.Tensor]:
    """The parts, tensors with frames first, of ``stream(form)`` for the first of ``forms`` that there is memory for.

    Where ``is_short`` says of an error that memory ended, ``recover`` is called once the failed pass's tensors are
    gone, ``say`` is told, and the next form goes on with the frame that the last came to. Raises TooLittleMemoryError,
    with ``what`` was being done and the ``advice`` in it, where the last one runs out too.
    """
    given = 0
    for form, following in pairwise((*forms, None)):
        try:
            for part in _from(stream(form), given):
                given += len(part)
                yield part
            return
        except Exception as error:
            if not is_short(error):
                raise
        # Only here, out of the except block, are the tensors of the failed pass gone.
        recover()
        if following is not None:
            since = f" from frame {given + 1}" if given else ""
            say(f"Out of memory while {what} in {form}: going on{since} in {following}.")
    raise TooLittleMemoryError(f"There is too little free memory for {what}, even in {forms[-1]}: {advice}.")


def _from(parts: Iterator[torch.Tensor], first: int) -> Iterator[torch.Tensor]:
    """``parts`` without the first ``first`` frames."""
    passed = 0
    for part in parts:
        rest = part[max(0, first - passed) :]
        passed += len(part)
        del part
        if len(rest):
            yield rest
        del rest


def collect(parts: Iterator[torch.Tensor], frames: int) -> torch.Tensor:
    """``parts`` as one tensor of ``frames`` frames, of which there is one copy at any time."""
    whole, filled = None, 0
    for part in parts:
        if whole is None and len(part) == frames:
            return part
        if whole is None:
            whole = part.new_empty(frames, *part.shape[1:])
        whole[filled : filled + len(part)] = part
        filled += len(part)
    if whole is None or filled != frames:
        raise RuntimeError(f"{filled} frames were decoded where there should be {frames}.")
    return whole
