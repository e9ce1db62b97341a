"""The transformer: configuration, layers, blocks and the model itself."""

from .compiled import CompiledBlocks
from .config import BackboneConfig
from .layers import Kernels, default_attention
from .memory import activation_bytes, no_workspace
from .model import DEFAULT_OPERATIONS, NavaBackbone

__all__ = [
    "DEFAULT_OPERATIONS",
    "BackboneConfig",
    "CompiledBlocks",
    "Kernels",
    "NavaBackbone",
    "activation_bytes",
    "default_attention",
    "no_workspace",
]
