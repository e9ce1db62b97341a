"""Blocks under ``torch.compile``: one graph for each kind of block, whatever a clip's size, first frame and guidance.

What differs from pass to pass and from block to block is kept out of the graph or made a tensor of it. Attention
(joint or each modality to itself, the host's kernels), Linears (quantised, fetched for each use, with a LoRA added at
it) and the feed-forward, which runs in pieces, are operators that the compiler does not look into: there a block is
what it is without a compiler. So are the weights of norms, which are fused. A timestep is looked up token by token,
which the compiler fuses away; the sizes that vary are symbols.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Mapping
from dataclasses import replace
from itertools import count
from types import FunctionType

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .blocks import PassState, Stretch
from .layers import Kernels, modulated_norm

MAKERS = {"backend": ("cudagraphs",), "mode": ("reduce-overhead", "max-autotune")}  # of CUDA graphs
# A CUDA graph would repeat what an operator did when it was recorded, whatever the block and the pass.
TAGS = (torch.Tag.cudagraph_unsafe,) if hasattr(torch.Tag, "cudagraph_unsafe") else ()

_now = threading.local()  # the block and the pass under way in this thread


def _own_namespace() -> str:
    """Of this import's operators: a process can have this package twice (a node pack's and an installed one), and
    operators of one name would take each other's place. The same in each process, as compiled code is kept by it."""
    name = re.sub(r"[^0-9A-Za-z]", "_", __package__)
    names = (name if number == 1 else f"{name}_{number}" for number in count(1))
    return next(each for each in names if not hasattr(getattr(torch.ops, each), "linear"))


NAMESPACE = _own_namespace()


def _operator(name: str, mutates: tuple[str, ...] = ()) -> Callable:
    return torch.library.custom_op(f"{NAMESPACE}::{name}", mutates_args=mutates, tags=TAGS)


@_operator("self_attention", mutates=("q",))
def _self_attention(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    out = _now.state.self_attention(q, k, v, heads)
    return out.clone() if out is q else out  # an operator may not return what it was given


@_operator("attention")
def _attention(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    return _now.state.attention(q, k, v, heads, _now.state.options)


@_operator("linear")
def _linear(x: Tensor, place: str) -> Tensor:
    return _now.block.get_submodule(place)(x)


@_operator("norm_weights")
def _norm_weights(like: Tensor, place: str, parts: int) -> Tensor:
    """The weight, and the bias where there are two parts, (parts, dim); copied, as the compiler may write to them."""
    weights = _now.state.kernels.norm_weights(_now.block.get_submodule(place), like)
    return torch.stack([part for part in weights if part is not None])


@_operator("feed_forward", mutates=("x",))
def _feed_forward(x: Tensor) -> None:
    _now.block.ffn(x)


@_self_attention.register_fake
@_attention.register_fake
def _like_q(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    return torch.empty_like(q)


@_linear.register_fake
def _like_x(x: Tensor, place: str) -> Tensor:
    return x.new_empty(x.shape)  # as wide: q, k, v and o are square


@_norm_weights.register_fake
def _of_parts(like: Tensor, place: str, parts: int) -> Tensor:
    return like.new_empty(parts, like.shape[-1])


@_feed_forward.register_fake
def _nothing(x: Tensor) -> None:
    return None


def _run_self_attention(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    return _self_attention(q, k, v, heads)


def _run_attention(q: Tensor, k: Tensor, v: Tensor, heads: int, options: object) -> Tensor:
    return _attention(q, k, v, heads)


def _place(owner: nn.Module, name: str) -> str:
    return f"{owner.place}.{name}" if owner.place else name


def _run_linear(owner: nn.Module, name: str, x: Tensor) -> Tensor:
    return _linear(x, _place(owner, name))


def _run_norm(owner: nn.Module, name: str, x: Tensor) -> Tensor:
    norm = getattr(owner, name)
    if isinstance(norm, nn.LayerNorm):
        weight, bias = _norm_weights(x, _place(owner, name), 2).unbind()
        return F.layer_norm(x, x.shape[-1:], weight, bias, norm.eps)
    (weight,) = _norm_weights(x, _place(owner, name), 1).unbind()
    return F.rms_norm(x, x.shape[-1:], weight, norm.eps)


def _run_modulated_norm(norm: nn.Module, tokens: Tensor, stretches: list[tuple]) -> Tensor:
    def normalise(x: Tensor) -> Tensor:  # not the host's module, which says of each whether it is fetched
        return F.layer_norm(x, x.shape[-1:], eps=norm.eps)

    return modulated_norm(normalise, tokens, stretches)


def _run_feed_forward(layer: nn.Module, x: Tensor) -> Tensor:
    _feed_forward(x)
    return x


KERNELS = Kernels(modulated_norm=_run_modulated_norm, linear=_run_linear, norm=_run_norm)


def _block(
    block: nn.Module, tokens: Tensor, table: Tensor, context: Tensor, vectors: Tensor, video: Tensor, audio: Tensor
) -> Tensor:
    """What is compiled: a block over a pass described by tensors alone; ``video`` and ``audio`` (B, tokens) say which
    of the timesteps' ``vectors`` each token has."""
    split = video.shape[1]
    stretches = []
    if split:
        stretches.append(Stretch(0, split, video, ""))
    if audio.shape[1]:
        stretches.append(Stretch(split, split + audio.shape[1], audio, "_audio"))
    state = PassState(
        split=split,
        stretches=tuple(stretches),
        vectors=vectors,
        table=table,
        context=context,
        self_attention=_run_self_attention,
        attention=_run_attention,
        kernels=KERNELS,
        options=None,
        feed_forward=_run_feed_forward,
    )
    return block.work(tokens, state)


class CompiledBlocks:
    """Runs blocks compiled: ``blocks(block, tokens, state)`` as ``block(tokens, state)``, with a prepared state.

    ``options``: as ``torch.compile`` takes them (backend, mode, options). A block is compiled at its first use, once
    for each kind; anew where a clip has no picture or no sound, or another number of samples. Raises ValueError for
    what would make CUDA graphs, RuntimeError, in a sentence, where nothing can be compiled.
    """

    def __init__(self, **options) -> None:
        problem = cuda_graphs_problem(**options)
        if problem:
            raise ValueError(problem)
        self._options = options
        self._compiled: dict[tuple, Callable[..., Tensor]] = {}  # by case

    def prepare(self, state: PassState) -> PassState:
        """The state of a pass as compiled blocks take it: with each token's timestep instead of each group's, and at
        least two timesteps, as sizes of one are a case of their own to the compiler."""
        parts: dict[str, list[Stretch]] = {}
        for stretch in state.stretches:
            parts.setdefault(stretch.suffix, []).append(stretch)
        stretches = tuple(_merged(several) for several in parts.values())
        vectors = state.vectors if len(state.vectors) > 1 else state.vectors.repeat(2, 1, 1)
        context = state.context.clone(memory_format=torch.contiguous_format)  # strides are looked at, too
        return replace(state, context=context, vectors=vectors, stretches=stretches)

    def __call__(self, block: nn.Module, tokens: Tensor, state: PassState) -> Tensor:
        return block(tokens, replace(state, work=self._work))  # a block's hooks, streaming's, stay out of the graph

    def _work(self, block: nn.Module, tokens: Tensor, state: PassState) -> Tensor:
        groups = {stretch.suffix: stretch.group for stretch in state.stretches}
        none = torch.zeros(tokens.shape[0], 0, dtype=torch.long, device=tokens.device)
        vectors, video, audio = state.vectors, groups.get("", none), groups.get("_audio", none)
        for tensor, dim in ((tokens, 1), (state.table, 0), (vectors, 0), (video, 1), (audio, 1)):
            torch._dynamo.maybe_mark_dynamic(tensor, dim)
        compiled = self._of_case(type(block), tokens.dtype, tokens.device.type, len(tokens) > 1, *groups)
        _now.block, _now.state = block, state
        try:
            return compiled(block, tokens, state.table, state.context, vectors, video, audio)
        except Exception as error:
            if not isinstance(error, torch._dynamo.exc.BackendCompilerFailed):
                raise
            raise RuntimeError(
                f"The blocks could not be compiled ({_said(error)}): leave compilation out, or install what it needs "
                "(for the CPU a C++ compiler, for a GPU triton)."
            ) from error
        finally:
            _now.block = _now.state = None

    def _of_case(self, *case: object) -> Callable[..., Tensor]:
        """A function of its own for what needs a graph of its own: PyTorch compiles a function no more than 8 times,
        which a server with several models would soon need, and then runs it uncompiled."""
        if case not in self._compiled:
            own = FunctionType(_block.__code__.replace(), _block.__globals__)
            self._compiled[case] = torch.compile(own, **self._options)
        return self._compiled[case]


def cuda_graphs_problem(
    backend: object = None, mode: str | None = None, options: Mapping[str, object] | None = None, **_
) -> str | None:
    """Why blocks are not compiled so, in a sentence, where CUDA graphs would be made; else None."""
    makers = [f"the {name} {value}" for name, value in (("backend", backend), ("mode", mode)) if value in MAKERS[name]]
    if (options or {}).get("triton.cudagraphs"):
        makers.append("the option triton.cudagraphs")
    if not makers:
        return None
    return (
        f"NAVA's blocks cannot be compiled into CUDA graphs, which {makers[0]} makes: choose the backend inductor in "
        "its default mode."
    )


def _merged(stretches: list[Stretch]) -> Stretch:
    """Neighbouring stretches of one modality as one, with a group for each token."""
    groups = [each.group.repeat_interleave((each.stop - each.start) // each.group.shape[1], 1) for each in stretches]
    return Stretch(stretches[0].start, stretches[-1].stop, torch.cat(groups, dim=1), stretches[0].suffix)


def _said(error: Exception) -> str:
    inner = getattr(error, "inner_exception", error)
    return (
        f"{type(inner).__name__}: {str(inner).strip().splitlines()[0][:200]}"
        if str(inner).strip()
        else str(type(inner))
    )
