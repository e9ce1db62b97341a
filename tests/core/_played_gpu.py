"""A GPU of any size, played on the CPU: which tensors are on it, how much of it they take, and copies that take time.

Tensors sent to "cuda" are copies in RAM that are known by their storage. What an operation makes of them is on the GPU
too; operations over both places are refused, as are those on a tensor whose copy by a side stream has not been waited
for. Memory that runs out raises torch.OutOfMemoryError. Numbers are the CPU's.
"""

from __future__ import annotations

import contextlib
import weakref

import diffusers.hooks  # noqa: F401 - it looks at the real torch.cuda when it is imported
import torch
from torch._utils import _get_device_index as _device_number  # which refuses "cuda" without a number
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

CUDA = torch.device("cuda")
ANYWHERE = ("aten.copy_", "aten.index.", "aten.index_put", "aten.set_", "aten.detach", "aten._has_compatible")
UNWRITTEN = 255  # a byte that makes every floating type NaN


class PlayedGpu(contextlib.ExitStack):
    """Context in which there is a GPU with ``total`` bytes. ``used``, ``peak``, ``limit`` (of the allocator) in bytes;
    ``transfers``: bytes sent to it; ``locked``: page-locked stretches of RAM, (address, size); ``pinned``: bytes in
    page-locked copies there, and ``most_pinned`` at any time."""

    def __init__(self, total: int, monkeypatch) -> None:
        super().__init__()
        self.total, self.limit = total, total
        self.used = self.peak = self.transfers = self.pinned = self.most_pinned = 0
        self.locked: list[tuple[int, int]] = []
        self.lockable = 2**62
        self.side: SideStream | None = None  # the stream that is current, where it is not the one that computes
        self.pending: set[int] = set()
        self._on_gpu: dict[int, int] = {}
        self._quiet = False
        self._patch(monkeypatch)

    def __enter__(self) -> PlayedGpu:
        super().__enter__()
        self.enter_context(_Operations(self))
        self.enter_context(_Functions(self))
        return self

    def has(self, tensor: torch.Tensor) -> bool:
        if hasattr(tensor, "__tensor_flatten__"):  # a shell around tensors
            return all(self.has(getattr(tensor, name)) for name in tensor.__tensor_flatten__()[0])
        return tensor.untyped_storage()._cdata in self._on_gpu

    def take(self, tensor: torch.Tensor) -> None:
        """Count a tensor's storage as the GPU's."""
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._on_gpu:
            return
        if self.used + size > min(self.total, self.limit):
            raise torch.OutOfMemoryError(f"CUDA out of memory. Tried to allocate {size} bytes; played.")
        self._on_gpu[key] = size
        self.used += size
        self.peak = max(self.peak, self.used)
        weakref.finalize(storage, self._give_back, key)

    def pin(self, tensor: torch.Tensor) -> torch.Tensor:
        """A page-locked copy."""
        copy = tensor.clone()
        self.pinned += copy.nbytes
        self.most_pinned = max(self.most_pinned, self.pinned)
        weakref.finalize(copy.untyped_storage(), self._unpin, copy.nbytes)
        return copy

    def _unpin(self, size: int) -> None:
        self.pinned -= size

    def _give_back(self, key: int) -> None:
        self.used -= self._on_gpu.pop(key, 0)
        self.pending.discard(key)

    def send(self, tensor: torch.Tensor, dtype: torch.dtype | None, non_blocking: bool) -> torch.Tensor:
        """A copy on the GPU; by a side stream, one that is written when somebody waits for the stream."""
        if dtype is not None:
            tensor = tensor.to(dtype)
        sent = torch.empty_like(tensor, memory_format=torch.contiguous_format)
        self.take(sent)
        self.transfers += sent.nbytes
        if self.side is None or not non_blocking:
            sent.copy_(tensor)
        else:
            sent.reshape(-1).view(torch.uint8).fill_(UNWRITTEN)
            key = sent.untyped_storage()._cdata
            self.pending.add(key)
            self.side.copies.append((weakref.ref(sent.untyped_storage()), key, sent.detach(), tensor))
        return sent

    @contextlib.contextmanager
    def quiet(self):
        """Nothing is counted."""
        before, self._quiet = self._quiet, True
        try:
            yield
        finally:
            self._quiet = before

    def _patch(self, monkeypatch) -> None:
        def put(name, value):
            monkeypatch.setattr(torch.cuda, name, value, raising=False)

        put("is_available", lambda: True)
        put("device_count", lambda: 1)
        put("mem_get_info", lambda *_: (self.total - self.used, self.total))
        put("memory_reserved", lambda *_: self.used)
        put("empty_cache", lambda: None)
        put("synchronize", lambda *_: None)
        put("get_device_name", lambda *_: "a played GPU")
        put("get_device_capability", lambda *_: (8, 0))
        put("current_device", lambda: 0)
        put("get_per_process_memory_fraction", self._share)
        put("set_per_process_memory_fraction", self._set_share)
        put("device", lambda *_: contextlib.nullcontext())
        put("Stream", type("Stream", (SideStream,), {"gpu": self}))
        put("stream", self._as_current)
        put("current_stream", lambda *_: torch.cuda.Stream())
        put("cudart", lambda: self)

    def _share(self, device=None) -> float:
        _device_number(device)
        return self.limit / self.total

    def _set_share(self, share: float, device=None) -> None:
        _device_number(device)
        self.limit = round(share * self.total)

    @contextlib.contextmanager
    def _as_current(self, stream):
        before, self.side = self.side, stream
        try:
            yield
        finally:
            self.side = before

    def cudaHostRegister(self, address: int, size: int, _: int) -> int:  # noqa: N802 - CUDA's name
        if sum(held for _, held in self.locked) + size > self.lockable:
            return 2
        assert address % 4096 == 0
        self.locked.append((address, size))
        return 0

    def cudaHostUnregister(self, address: int) -> int:  # noqa: N802 - CUDA's name
        self.locked = [stretch for stretch in self.locked if stretch[0] != address]
        return 0

    def is_locked(self, tensor: torch.Tensor) -> bool:
        begin, end = tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes
        return any(address <= begin and end <= address + size for address, size in self.locked)


class SideStream:
    """A stream whose copies are made when it is waited for."""

    gpu: PlayedGpu

    def __init__(self, *_, **__) -> None:
        self.copies = []

    def synchronize(self) -> None:
        copies, self.copies = self.copies, []
        for _, key, target, source in copies:
            with self.gpu.quiet():
                target.copy_(source)
            self.gpu.pending.discard(key)


class _Operations(TorchDispatchMode):
    """What operations make of the GPU's tensors is the GPU's."""

    def __init__(self, gpu: PlayedGpu) -> None:
        super().__init__()
        self.gpu = gpu

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        gpu = self.gpu
        if gpu._quiet:
            return func(*args, **(kwargs or {}))
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if torch.is_tensor(leaf)]
        there = [leaf for leaf in inputs if gpu.has(leaf)]
        if there and not str(func).startswith(ANYWHERE) and "view" not in str(func):
            elsewhere = [leaf for leaf in inputs if not gpu.has(leaf) and leaf.ndim > 0]
            if elsewhere:
                raise RuntimeError(f"{func}: expected all tensors to be on the same device; played.")
            if any(leaf.untyped_storage()._cdata in gpu.pending for leaf in there):
                raise AssertionError(f"{func} uses a weight whose copy has not been waited for.")
        out = func(*args, **(kwargs or {}))
        if there:
            for leaf in tree_leaves(out):
                if torch.is_tensor(leaf):
                    gpu.take(leaf)
        return out


class _Functions(TorchFunctionMode):
    """Sends tensors to and fro, and makes those that are asked for on the GPU."""

    def __init__(self, gpu: PlayedGpu) -> None:
        super().__init__()
        self.gpu = gpu

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        gpu = self.gpu
        if func == torch.Tensor.device.__get__:
            return CUDA if gpu.has(args[0]) else func(*args)
        if func is torch.Tensor.pin_memory:
            return args[0] if gpu.is_locked(args[0]) else gpu.pin(args[0])
        if func is torch.Tensor.is_pinned:
            return gpu.is_locked(args[0])
        if func is torch.Tensor.cpu:
            return self._to(args[0], torch.device("cpu"), None, False)
        if func is torch.Tensor.to:
            return self._to(args[0], *_parse(gpu, args[1:], kwargs))
        if func is torch.Tensor.new_tensor and gpu.has(args[0]):
            kwargs.setdefault("device", CUDA)
        device = kwargs.get("device")
        if device is not None and torch.device(device).type == "cuda":
            made = func(*args, **{**kwargs, "device": "cpu"})
            gpu.take(made)
            return made
        return func(*args, **kwargs)

    def _to(self, tensor, device, dtype, non_blocking):
        gpu, is_there = self.gpu, self.gpu.has(tensor)
        if device is None or (device.type == "cuda") == is_there:
            return tensor if dtype is None else tensor.to(dtype)
        if device.type == "cuda":
            with gpu.quiet():
                return gpu.send(tensor, dtype, non_blocking)
        if device.type != "cpu":
            return tensor.to(device, dtype)
        with gpu.quiet():
            return tensor.detach().to(dtype or tensor.dtype).clone()


def _parse(gpu, args, kwargs) -> tuple[torch.device | None, torch.dtype | None, bool]:
    device, dtype = kwargs.get("device"), kwargs.get("dtype")
    for each in args:
        if isinstance(each, torch.dtype):
            dtype = each
        elif isinstance(each, (str, torch.device)):
            device = each
        elif torch.is_tensor(each):
            device, dtype = CUDA if gpu.has(each) else torch.device("cpu"), each.dtype
    return None if device is None else torch.device(device), dtype, bool(kwargs.get("non_blocking"))
