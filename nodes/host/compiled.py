"""What the stock TorchCompileModel node asks for, done block by block.

That node has the whole network compiled, which would be done anew for every size of clip. Run on ComfyUI 0.18.1 and
0.33.0.
"""

from __future__ import annotations

from functools import lru_cache

from ...nava_core.backbone import CompiledBlocks

try:
    from comfy_api.torch_helpers.torch_compile import TORCH_COMPILE_KWARGS
except ImportError:
    TORCH_COMPILE_KWARGS = None
TAKEN = ("backend", "mode")  # of the node's settings; its filter of guards is for what no block's graph looks at


def compiled_blocks(model_options: dict) -> CompiledBlocks | None:
    """What runs the blocks of a MODEL with these options, where a node has asked for compilation; else None."""
    settings = model_options.get(TORCH_COMPILE_KWARGS)
    return None if settings is None else _blocks(*(settings.get(name) for name in TAKEN))


@lru_cache
def _blocks(*settings) -> CompiledBlocks:
    return CompiledBlocks(**{name: value for name, value in zip(TAKEN, settings, strict=True) if value is not None})
