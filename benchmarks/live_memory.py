"""Peak memory of live tensors while code runs, counted operation by operation; works on the meta device too.

What an allocator would add (rounding, fragments) and kernels' own workspaces are not in it.
"""

from __future__ import annotations

import weakref

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveMemory(TorchDispatchMode):
    """Context that follows every storage made inside it: ``current`` and ``peak`` in bytes.

    ``device``: only those of a device of this type, such as "cuda"; None: all.
    """

    def __init__(self, device: str | None = None):
        super().__init__()
        self.device = device
        self.current = self.peak = 0
        self._seen: set[int] = set()

    def ignore(self, *tensors: torch.Tensor) -> None:
        """Leave storages that were there before out of the count."""
        self._seen.update(t.untyped_storage()._cdata for t in tensors)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if torch.is_tensor(leaf) and self.device in (None, leaf.device.type):
                self._follow(leaf)
        return out

    def _follow(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._seen:
            return
        self._seen.add(key)
        size = storage.nbytes()
        self.current += size
        self.peak = max(self.peak, self.current)
        weakref.finalize(storage, self._release, key, size)

    def _release(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self.current -= size


def peak_of_pass(backbone, *args, **kwargs) -> int:
    """Peak bytes of one forward pass beside its weights and inputs."""
    weights = [*backbone.parameters(), *backbone.buffers()]
    inputs = [x for x in tree_leaves((args, kwargs)) if torch.is_tensor(x)]
    with torch.no_grad(), LiveMemory() as memory:
        memory.ignore(*weights, *inputs)
        backbone(*args, **kwargs)
    return memory.peak
