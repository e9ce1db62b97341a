"""The host's prefetch queue, where it has one: the next block's weights come to the GPU while one block computes."""

from __future__ import annotations

from ...nava_core.backbone.layers import FEED_FORWARD_TOKENS

try:
    import comfy.model_prefetch as host_prefetch
except ImportError:
    host_prefetch = None

PREFETCH = "nava_prefetch"  # of a pass, among the host's options


def prefetch_queue(blocks: list, tokens, options: dict):
    """A queue over ``blocks`` for one pass over ``tokens`` (B, L, dim); None where the host would not fetch ahead."""
    if not hasattr(host_prefetch, "make_prefetch_queue"):
        return None
    pieces = -(-tokens.shape[1] // FEED_FORWARD_TOKENS)
    return host_prefetch.make_prefetch_queue([_fetchable(block, pieces) for block in blocks], tokens.device, options)


def fetch_next(queue, device, block) -> None:
    """Before each block, and with None after the last: let go of what is done, fetch the one after."""
    if queue is not None:
        host_prefetch.prefetch_queue_pop(queue, device, block)


def _fetchable(block, pieces: int) -> list:
    """What of a block is fetched ahead: all but layers that run once a piece and to which the host adds a LoRA at
    each use. It adds it in place, so that on weights fetched once it would be added once a piece."""
    if pieces == 1:
        return [block]
    again = [layer for layer in block.ffn if getattr(layer, "weight_lowvram_function", None) is not None]
    if not again:
        return [block]
    return [part for part in block.children() if part is not block.ffn] + [x for x in block.ffn if x not in again]
