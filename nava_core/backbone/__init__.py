"""The transformer: configuration, layers, blocks and the model itself."""

from .config import BackboneConfig
from .layers import Kernels, default_attention
from .model import DEFAULT_OPERATIONS, NavaBackbone, activation_bytes

__all__ = ["DEFAULT_OPERATIONS", "BackboneConfig", "Kernels", "NavaBackbone", "activation_bytes", "default_attention"]
