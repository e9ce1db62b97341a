"""Blocks that wait in RAM and come to the device for their turn, over diffusers' group offloading.

diffusers does the moving: a hook on each streamed block, a side stream, and the next block's transfer under way while
one is at work. Chosen here is which blocks are streamed, how their weights lie in RAM, and what diffusers is shown.
Streamed blocks are spread evenly between resident ones, the last of each stretch: a transfer begins with the block
streamed before it, so every resident block between the two gives it time, and those before the first one give time to
the first. A streamed tail would leave each transfer a single block's time.
"""

from __future__ import annotations

import contextlib
import gc
import weakref
from collections.abc import Callable, Iterable, Sequence
from functools import partial

import torch
from torch import nn
from torch.nn.utils import parametrize

from ..backbone import NavaBackbone
from ..components.weights import need
from ..ram import free_ram

HOOKS = ("group_offloading", "lazy_prefetch_group_offloading", "layer_execution_tracker")  # diffusers' names of them
SIDE_STREAMS = ("cuda", "xpu")  # devices that copy and compute at the same time
PAGE, ALIGNMENT = 4096, 64  # bytes
LOCKED_SHARE = 0.5  # of the RAM that is free, at most, is taken from the system's paging


def spread(blocks: int, streamed: int) -> tuple[int, ...]:
    """Which ``streamed`` of ``blocks`` blocks are streamed, by number: evenly spread, the last one among them."""
    return tuple((turn + 1) * blocks // streamed - 1 for turn in range(streamed))


def buffer_bytes(sizes: Sequence[int], streamed: Sequence[int]) -> int:
    """The most that streamed blocks, of all blocks' ``sizes`` in bytes, take on the device: one and the next."""
    own = [sizes[index] for index in streamed]
    return max((sum(own[turn : turn + 2]) for turn in range(len(own))), default=0)


def stream_blocks(
    backbone: NavaBackbone,
    device: torch.device | str,
    resident: float = 0.25,
    *,
    lock: bool = True,
    say: Callable[[str], None] | None = None,
) -> Streaming:
    """Put a backbone on ``device`` with a share ``resident`` (0..1) of its blocks; the others wait in RAM.

    Passes run as before, with the same results to the last bit. Everything but the blocks is resident. ``lock``: keep
    the waiting weights in page-locked memory, from which a GPU copies beside its work, as far as RAM allows; ``say`` is
    told where it does not. On the CPU nothing moves, which serves to try it out. Returns what ends it.

    Raises ValueError for a share outside 0..1, RuntimeError where diffusers or accelerate is missing.
    """
    if not 0 <= resident <= 1:
        raise ValueError(f"The resident share of the blocks is 0 to 1, not {resident}.")
    blocks = [*backbone.double_blocks, *backbone.single_blocks]
    streamed = spread(len(blocks), len(blocks) - round(resident * len(blocks)))
    return Streaming(backbone, blocks, streamed, torch.device(device), lock=lock, say=say)


class Streaming:
    """``model`` on ``device``, without its ``blocks`` of the numbers ``streamed``, which come there for their turn.

    Blocks are called in their order, each once, in every pass of ``model``. ``stay``: other parts of it that are left
    where they are. The streamed blocks' tensors may be of any kind, subclasses with tensors inside too. ``close`` ends
    it and leaves the streamed blocks in RAM.
    """

    def __init__(
        self,
        model: nn.Module,
        blocks: Sequence[nn.Module],
        streamed: Sequence[int],
        device: torch.device,
        *,
        stay: Sequence[nn.Module] = (),
        lock: bool = True,
        say: Callable[[str], None] | None = None,
    ) -> None:
        self.device, self.streamed = device, tuple(streamed)
        self.locked_bytes = 0
        self._model = model
        self._blocks = [blocks[index] for index in self.streamed]
        self._buffers: list[tuple[nn.Module, str]] = []
        self._subclasses: list[tuple[nn.Module, str]] = []
        self._unlock: Callable[[], object] = lambda: None
        offloading = _group_offloading() if self._blocks else None
        for block in self._blocks:
            block.to("cpu")
        move(model, device, but=[*self._blocks, *stay])
        if offloading is None:
            return
        for block in self._blocks:
            self._make_plain(block)
        if lock and device.type == "cuda":
            self._lock(say)
        self._hook(offloading)

    def close(self) -> None:
        """End the streaming: the streamed blocks are in RAM, the rest where it was; the model is as it was before."""
        if not self._blocks:
            return
        self.recall()
        for module in (*self._blocks, self._pass):
            _unhook(module)
        del self._model.forward, self._pass
        self._unlock()
        self._make_as_it_was()
        self._model, self._blocks = None, []
        gc.collect()  # diffusers' hooks refer to each other in circles, and to the weights

    def recall(self) -> None:
        """Have all streamed blocks in RAM again, where a pass that was cut short left some on the device."""
        with _at(self.device):
            for block in self._blocks:
                group = block._diffusers_hook.get_hook(HOOKS[0]).group
                if group.stream is not None:
                    group.stream.synchronize()  # a transfer may be under way
                group.offload_()

    # ------------------------------------------------------------ what diffusers is shown

    def _hook(self, apply_group_offloading: Callable[..., None]) -> None:
        self._pass = _Pass(self._model.forward, self._blocks)
        with _at(self.device):  # diffusers makes its stream on the current device
            apply_group_offloading(
                self._pass,
                onload_device=self.device,
                offload_device=torch.device("cpu"),
                num_blocks_per_group=1,
                use_stream=self.device.type in SIDE_STREAMS,
                # Else it runs ahead of the work, and blocks whose memory is not free yet pile up.
                record_stream=False,
                # Else it copies all weights into page-locked memory, at sizes rounded up to powers of two.
                low_cpu_mem_usage=True,
            )
        self._model.forward = partial(_run, self._pass, self.device)

    def _make_plain(self, block: nn.Module) -> None:
        """What diffusers' hooks would leave on the device made into parameters: they bring back nothing else, and of a
        subclass with tensors inside they move the shell alone."""
        for module in list(block.modules()):
            for name, buffer in list(module._buffers.items()):
                if buffer is not None:
                    del module._buffers[name]
                    module._parameters[name] = nn.Parameter(buffer, requires_grad=False)
                    self._buffers.append((module, name))
            for name, parameter in list(module._parameters.items()):
                if parameter is not None and hasattr(parameter, "__tensor_flatten__"):
                    parametrize.register_parametrization(module, name, _Whole(parameter), unsafe=True)
                    self._subclasses.append((module, name))

    def _make_as_it_was(self) -> None:
        for module, name in self._subclasses:
            whole = getattr(module, name)
            parametrize.remove_parametrizations(module, name, leave_parametrized=True)
            module._buffers.pop(name, None)
            module._parameters[name] = nn.Parameter(whole, requires_grad=False)
        for module, name in self._buffers:
            module._buffers[name] = module._parameters.pop(name).data
        self._subclasses, self._buffers = [], []

    # ------------------------------------------------------------ page-locked memory

    def _lock(self, say: Callable[[str], None] | None) -> None:
        """Page-locks the streamed blocks' weights, block by block, as far as the system allows and RAM is free."""
        allowed = int((free_ram() or 0) * LOCKED_SHARE)
        addresses: list[int] = []
        self._unlock = weakref.finalize(self, _unlock_all, addresses)
        self._unlock.atexit = False
        for block in self._blocks:
            size = _stretch_bytes(block)
            address = _into_locked_stretch(block) if self.locked_bytes + size <= allowed else None
            if address is None:
                break
            addresses.append(address)
            self.locked_bytes += size
        if say is not None and len(addresses) < len(self._blocks):
            say(
                f"{len(addresses)} of {len(self._blocks)} streamed blocks lie in page-locked memory; for more, RAM is "
                "short. The others are copied through a buffer, which takes longer."
            )


class _Pass(nn.Module):
    """The pass of a model, as a module whose children are its streamed blocks, which is what diffusers puts hooks on.

    It sets up prefetching only for a module that has more than blocks, therefore ``rest``.
    """

    def __init__(self, run: Callable, blocks: Iterable[nn.Module]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.register_buffer("rest", torch.empty(0))
        self.run = run

    def forward(self, *args, **kwargs):
        return self.run(*args, **kwargs)


class _Whole(nn.Module):
    """A tensor of a subclass out of the tensors inside it (``__tensor_flatten__``), and into them."""

    def __init__(self, tensor: torch.Tensor) -> None:
        super().__init__()
        self.kind = type(tensor)
        self.names, self.context = tensor.__tensor_flatten__()
        self.size, self.strides = tensor.size(), tensor.stride()

    def forward(self, *parts: torch.Tensor) -> torch.Tensor:
        inner = {name: part.data for name, part in zip(self.names, parts, strict=True)}
        return self.kind.__tensor_unflatten__(inner, self.context, self.size, self.strides)

    def right_inverse(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        return [getattr(tensor, name) for name in self.names]


def move(model: nn.Module, device: torch.device, but: Sequence[nn.Module] = ()) -> None:
    """All of ``model`` to ``device``, without the modules ``but`` below it."""
    left = {id(module) for module in but}
    if id(model) in left:
        return
    if not any(id(module) in left for module in model.modules()):
        model.to(device)
        return
    for tensor in (*model.parameters(recurse=False), *model.buffers(recurse=False)):
        tensor.data = tensor.data.to(device)
    for child in model.children():
        move(child, device, but)


def _run(wrapped: _Pass, device: torch.device, *args, **kwargs):
    with _at(device):
        return wrapped(*args, **kwargs)


def _at(device: torch.device) -> contextlib.AbstractContextManager:
    """``device`` as the current one of its kind, whose streams diffusers uses."""
    if device.type not in SIDE_STREAMS:
        return contextlib.nullcontext()
    return torch.get_device_module(device.type).device(device)


def _unhook(module: nn.Module) -> None:
    registry = module._diffusers_hook
    for name in HOOKS:
        registry.remove_hook(name, recurse=False)
    del module._diffusers_hook
    module.__dict__.pop("forward", None)


def _group_offloading() -> Callable[..., None]:
    need("accelerate", "Streaming weights")  # diffusers' hooks use it, and fail without a sentence where it is missing
    return need("diffusers.hooks", "Streaming weights").apply_group_offloading


# ---------------------------------------------------------------- page-locked memory


def _stretch_bytes(block: nn.Module) -> int:
    return sum(-(-parameter.nbytes // ALIGNMENT) * ALIGNMENT for parameter in block.parameters())


def _into_locked_stretch(block: nn.Module) -> int | None:
    """Moves a block's weights into one stretch of page-locked RAM; its address, or None where the system refuses.

    Registered, not allocated by PyTorch, whose page-locked memory is rounded up to powers of two.
    """
    size = _stretch_bytes(block)
    memory = torch.empty(size + PAGE, dtype=torch.uint8)
    start = -memory.data_ptr() % PAGE
    address = memory.data_ptr() + start
    if not _register(address, size):
        return None
    for parameter in block.parameters():
        place = memory[start : start + parameter.nbytes]
        place.copy_(parameter.data.contiguous().reshape(-1).view(torch.uint8))
        parameter.data = place.view(parameter.dtype).view(parameter.shape)
        start += -(-parameter.nbytes // ALIGNMENT) * ALIGNMENT
    return address


def _register(address: int, size: int) -> bool:
    """Page-locks a stretch of RAM; False where the system refuses."""
    if int(torch.cuda.cudart().cudaHostRegister(address, size, 0)) == 0:
        return True
    with contextlib.suppress(RuntimeError):  # CUDA reports the refusal again with what comes next, whatever it is
        torch.zeros(1, device="cuda").add_(1)
        torch.cuda.synchronize()
    return False


def _unlock_all(addresses: list[int]) -> None:
    for address in addresses:
        torch.cuda.cudart().cudaHostUnregister(address)
    addresses.clear()
