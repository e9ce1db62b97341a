"""Weights sharded over processes: each holds a part of every block and fetches the rest when the block's turn comes."""

from __future__ import annotations

from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard

from ..backbone.model import NavaBackbone


def shard_weights(model: NavaBackbone, mesh: DeviceMesh) -> NavaBackbone:
    """Shard ``model`` over the processes of ``mesh``, a block a unit; every one runs the same passes.

    The next block's weights are on their way while one computes. Returns the model.
    """
    for block in (*model.double_blocks, *model.single_blocks):
        fully_shard(block, mesh=mesh)
    # What is outside the blocks is let go too: by itself PyTorch keeps the outermost unit whole between passes.
    return fully_shard(model, mesh=mesh, reshard_after_forward=True)
