"""Weights sharded over processes: each holds a part of every block and fetches the rest when the block's turn comes."""

from __future__ import annotations

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard

from ..backbone.formats import QuantLinear
from ..backbone.model import NavaBackbone

BYTES = torch.float8_e4m3fn


def shard_weights(model: NavaBackbone, mesh: DeviceMesh) -> NavaBackbone:
    """Shard ``model`` over the processes of ``mesh``, a block a unit; every one runs the same passes.

    The next block's weights are on their way while one computes. Returns the model.
    """
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False) if isinstance(module, QuantLinear) else ():
            if not parameter.is_floating_point():  # PyTorch shards no whole numbers: their bytes as float8's
                module.register_parameter(name, nn.Parameter(parameter.view(BYTES), requires_grad=False))
    # Single numbers, such as the scale of a whole weight, have nothing to share.
    numbers = {parameter for parameter in model.parameters() if parameter.ndim == 0}
    for block in (*model.double_blocks, *model.single_blocks):
        fully_shard(block, mesh=mesh, ignored_params=numbers)
    # What is outside the blocks is let go too: by itself PyTorch keeps the outermost unit whole between passes.
    return fully_shard(model, mesh=mesh, reshard_after_forward=True, ignored_params=numbers)
