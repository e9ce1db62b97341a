"""Weights sharded over processes: each holds a part of every block and fetches the rest when the block's turn comes."""

from __future__ import annotations

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard

from ..backbone.model import NavaBackbone
from ..backbone.quant_linear import QuantLinear

BYTES = torch.float8_e4m3fn


def shard_weights(model: NavaBackbone, mesh: DeviceMesh) -> NavaBackbone:
    """Shard ``model`` over the processes of ``mesh``, a block a unit; every one runs the same passes.

    The next block's weights are on their way while one computes. Returns the model.
    """
    for module in model.modules():
        if isinstance(module, QuantLinear):
            _as_bytes(module)
    # Single numbers, such as the scale of a whole weight, have nothing to share.
    numbers = {parameter for parameter in model.parameters() if parameter.ndim == 0}
    for block in (*model.double_blocks, *model.single_blocks):
        fully_shard(block, mesh=mesh, ignored_params=numbers)
    # What is outside the blocks is let go too: by itself PyTorch keeps the outermost unit whole between passes.
    return fully_shard(model, mesh=mesh, reshard_after_forward=True, ignored_params=numbers)


def _as_bytes(module: QuantLinear) -> None:
    """PyTorch shards no whole numbers, nor do its libraries know every type of a byte: all are seen as float8's."""
    for name, parameter in list(module.named_parameters(recurse=False)):
        if parameter.dtype.itemsize == 1:
            module.register_parameter(name, nn.Parameter(parameter.view(BYTES), requires_grad=False))
