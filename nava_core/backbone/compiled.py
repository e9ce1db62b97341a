"""Blocks under ``torch.compile``: one graph for each kind of block, whatever a clip's size, first frame and guidance.

What differs from pass to pass is kept out of the graph or made a tensor of it: attention (joint or each modality to
itself, the host's kernels) and the feed-forward, which runs in pieces, are operators that the compiler does not look
into; a timestep is looked up token by token, which the compiler fuses away; the sizes that vary are symbols.
"""

from __future__ import annotations

import threading
from dataclasses import replace

import torch
from torch import Tensor, nn

from .blocks import PassState, Stretch
from .layers import OWN_KERNELS

_now = threading.local()  # the block and the pass under way in this thread


@torch.library.custom_op("nava::self_attention", mutates_args=("q",))
def _self_attention(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    out = _now.state.self_attention(q, k, v, heads)
    return out.clone() if out is q else out  # an operator may not return what it was given


@torch.library.custom_op("nava::attention", mutates_args=())
def _attention(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    return _now.state.attention(q, k, v, heads, _now.state.options)


@torch.library.custom_op("nava::feed_forward", mutates_args=("x",))
def _feed_forward(x: Tensor) -> None:
    _now.block.ffn(x)


@_self_attention.register_fake
@_attention.register_fake
def _like_q(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    return torch.empty_like(q)


@_feed_forward.register_fake
def _nothing(x: Tensor) -> None:
    return None


def _run_self_attention(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    return _self_attention(q, k, v, heads)


def _run_attention(q: Tensor, k: Tensor, v: Tensor, heads: int, options: object) -> Tensor:
    return _attention(q, k, v, heads)


def _run_feed_forward(layer: nn.Module, x: Tensor) -> Tensor:
    _feed_forward(x)
    return x


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
        kernels=OWN_KERNELS,
        options=None,
        feed_forward=_run_feed_forward,
    )
    return block.work(tokens, state)


class CompiledBlocks:
    """Runs blocks compiled: ``blocks(block, tokens, state)`` as ``block(tokens, state)``, with a prepared state.

    ``options``: as ``torch.compile`` takes them (backend, mode, options). A block is compiled at its first use, once
    for each kind; anew where a clip has no picture or no sound, or another number of samples. Raises RuntimeError, in a
    sentence, where nothing can be compiled.
    """

    def __init__(self, **options) -> None:
        self._compiled = torch.compile(_block, **options)

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
        _now.block, _now.state = block, state
        try:
            return self._compiled(block, tokens, state.table, state.context, vectors, video, audio)
        except Exception as error:
            if not isinstance(error, torch._dynamo.exc.BackendCompilerFailed):
                raise
            raise RuntimeError(
                f"The blocks could not be compiled ({_said(error)}): leave compilation out, or install what it needs "
                "(for the CPU a C++ compiler, for a GPU triton)."
            ) from error
        finally:
            _now.block = _now.state = None


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
