"""Linears that ``torch.compile`` does not look into: it cannot read their weights' types and classes on every GPU.

In a graph such a Linear is an operator that names it within the block that runs (see ``compiled``): nothing of the
weight is in the graph, and one graph serves blocks whose layers are quantised in different formats.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable
from functools import wraps

import torch
from torch import Tensor, nn

running = threading.local()  # block: the one under way in this thread


def operator(name: str, mutates: tuple[str, ...] = ()) -> Callable:
    """``torch.library.custom_op`` under a name that is this import's own: a process can have this package twice (a node
    pack's and an installed one), and operators of one name would take each other's place."""
    return torch.library.custom_op(f"{re.sub(r'[^0-9A-Za-z]', '_', __package__)}::{name}", mutates_args=mutates)


@operator("linear")
def _linear(x: Tensor, place: str, width: int) -> Tensor:
    return running.block.get_submodule(place)(x)


@_linear.register_fake
def _of_width(x: Tensor, place: str, width: int) -> Tensor:
    return x.new_empty(*x.shape[:-1], width)


def opaque(forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """For the ``forward`` of a Linear's class, which needs ``place = ""``: an operator where blocks are compiled."""

    @wraps(forward)
    def run(self, x: Tensor, *more, **named) -> Tensor:
        if self.place and torch.compiler.is_compiling():
            return _linear(x, self.place, self.out_features)
        return forward(self, x, *more, **named)

    return run


def place_linears(block: nn.Module) -> None:
    """Tells a block's opaque Linears their names in it."""
    for name, module in block.named_modules():
        if hasattr(module, "place"):
            module.place = name
