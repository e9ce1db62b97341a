"""Streaming and placement, where no host manages memory: what lives on which device, and how much of it.

    streaming = stream_blocks(backbone, "cuda", resident=0.25)    # a quarter of the blocks stays on the GPU
    ...                                                           # run it as before
    streaming.close()

:class:`NavaPipeline` plans its components with the same parts.
"""

from .budget import amount_of_memory, check_amount, free_bytes, memory_limit, reserved_bytes, total_bytes
from .plan import CPU, SLACK, Demand, MemoryPlan, Placement, Weights, least_budget, place, place_backbone, smaller
from .streaming import Streaming, buffer_bytes, move, spread, stream_blocks

__all__ = [
    "CPU",
    "SLACK",
    "Demand",
    "MemoryPlan",
    "Placement",
    "Streaming",
    "Weights",
    "amount_of_memory",
    "buffer_bytes",
    "check_amount",
    "free_bytes",
    "least_budget",
    "memory_limit",
    "move",
    "place",
    "place_backbone",
    "reserved_bytes",
    "smaller",
    "spread",
    "stream_blocks",
    "total_bytes",
]
