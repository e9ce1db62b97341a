"""What runs in a worker process: a backbone, or a part of one, and its share of every pass."""

from __future__ import annotations

import hashlib
import os
import socket
from collections.abc import Iterable, Mapping
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import load
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, distribute_tensor

from ..backbone.config import BackboneConfig
from ..checkpoint import describe_file, open_checkpoint, stream_tensors
from ..checkpoint.loading import PlannedTensor, assign_tensor, empty_backbone
from .cluster import UNWANTED, code_version
from .layout import Layout
from .sharding import shard_weights
from .ulysses import UlyssesSplit

MODELS_VARIABLE = "NAVA_MODELS"  # folders on this machine that weights are looked for in
SAMPLE_BYTES, SAMPLES = 2**16, 32
JOIN_SECONDS = 300


def file_digest(path: Path) -> str:
    """A hash of a file's size and of samples all through it: tells one model from another, quickly."""
    size = path.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with path.open("rb") as file:
        for index in range(SAMPLES):
            file.seek(index * max(0, size - SAMPLE_BYTES) // (SAMPLES - 1))
            digest.update(file.read(SAMPLE_BYTES))
    return digest.hexdigest()


class Worker:
    """One of the processes that make a clip together; its methods are called by :class:`workers.Workers`."""

    def __init__(self, device: str) -> None:
        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 1)))
        self.device = torch.device(device)
        self.model = None
        self.passes = 0
        self._splits: dict[Layout, UlyssesSplit | None] = {}

    # ------------------------------------------------------------ coming together

    def about(self) -> dict[str, object]:
        """What has to agree between workers and their owner, and the process itself."""
        return {
            "code": code_version(),
            "torch": ".".join(torch.__version__.split(".")[:2]),
            "pid": os.getpid(),
            "host": socket.gethostname(),
            "inherited": [name for name in UNWANTED if os.environ.get(name)],
        }

    def free_port(self, address: str) -> int:
        with socket.socket() as found:
            found.bind((address, 0))
            return found.getsockname()[1]

    def join(self, rank: int, ranks: int, address: str, port: int, sequence: int) -> None:
        """Meet the other workers. ``sequence``: how many share sharded weights; 0 where every one has all."""
        cuda = self.device.type == "cuda"
        if address.startswith("127."):
            os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        dist.init_process_group(
            "nccl" if cuda else "gloo",
            init_method=f"tcp://{address}:{port}",
            rank=rank,
            world_size=ranks,
            timeout=timedelta(seconds=JOIN_SECONDS),
            device_id=self.device if cuda else None,
        )
        self.rank, self.ranks = rank, ranks
        self.shards = sequence

    # ------------------------------------------------------------ weights

    def prepare(self, config: Mapping, plan: Iterable[tuple], dtype: torch.dtype, compile: bool = False) -> None:
        """Make the network, without its weights. ``plan``: what ``PlannedTensor.plain`` gives of those to come."""
        tensors = {tensor.name: tensor for tensor in map(PlannedTensor.from_plain, plan)}
        self.model = empty_backbone(BackboneConfig(**config), tensors, dtype).eval()
        if compile:
            self.model.compile_blocks()
        if self.shards:
            layout = Layout(self.ranks // self.shards, self.shards)
            mesh = DeviceMesh.from_group(self._groups(layout), self.device.type)
            shard_weights(self.model, mesh).to_empty(device=self.device)

    def read(self, path: str, digest: str, dtype: torch.dtype | None) -> bool:
        """Fill the weights from this machine's own copy of the file; False where it has none."""
        found = next((each for each in _places(Path(path)) if each.is_file() and file_digest(each) == digest), None)
        if found is None:
            return False
        with open_checkpoint(describe_file(found)) as source:
            for name, tensor in stream_tensors(source, dtype):
                self._fill(name, tensor)
        return True

    def fill(self, weights: bytes) -> list[str]:
        """Take weights in the form they are kept in, as a safetensors file has them: Ray cannot send float8 tensors.
        Returns their names."""
        tensors = load(weights)
        for name, tensor in tensors.items():
            self._fill(name, tensor)
        return sorted(tensors)

    def _fill(self, name: str, tensor: Tensor) -> None:
        parameter = self.model.get_parameter(name)
        if tensor.dtype.itemsize == 1:  # sent, or sharded, as another type of a byte
            tensor = tensor.view(parameter.dtype)
        if isinstance(parameter, DTensor):
            mine = distribute_tensor(
                tensor.to(self.device), parameter.device_mesh, parameter.placements, src_data_rank=None
            )
            parameter.to_local().copy_(mine.to_local())
        else:
            assign_tensor(self.model, name, tensor.to(self.device, parameter.dtype))

    # ------------------------------------------------------------ passes

    @torch.no_grad()
    def run(self, layout: tuple[int, int], passes: list[dict]) -> dict[str, object]:
        """This worker's part of ``passes`` (arguments of the backbone): how many it took part in, and, where it speaks
        for its branch, their velocities by number, on the CPU."""
        layout = Layout(*layout)
        self.model.token_split = self._split(layout)
        done, velocities = 0, {}
        branch, place = divmod(self.rank, layout.sequence)
        if self.rank < layout.workers:
            for index in layout.predictions_of(branch, len(passes)):
                pair = self.model(**{name: self._here(value) for name, value in passes[index].items()})
                done += 1
                if place == 0:
                    velocities[index] = tuple(None if part is None else part.cpu() for part in pair)
        self.passes += done
        return {"passes": done, "velocities": velocities}

    def total_passes(self) -> int:
        """Passes that this worker took part in since it started."""
        return self.passes

    def node(self) -> str:
        """The Ray node it runs on."""
        import ray

        return ray.get_runtime_context().get_node_id()

    def _here(self, value):
        if isinstance(value, tuple):
            return tuple(self._here(each) for each in value)
        return value.to(self.device) if torch.is_tensor(value) else value

    def _split(self, layout: Layout) -> UlyssesSplit | None:
        if layout not in self._splits:
            group = self._groups(layout)
            self._splits[layout] = UlyssesSplit(group) if group is not None and layout.sequence > 1 else None
        return self._splits[layout]

    def _groups(self, layout: Layout) -> dist.ProcessGroup | None:
        """The workers that share predictions with this one; every worker has to ask for the same layouts in turn."""
        mine = None
        for branch in range(layout.branches):
            members = range(branch * layout.sequence, (branch + 1) * layout.sequence)
            group = dist.new_group(list(members))
            if self.rank in members:
                mine = group
        return mine


def _places(path: Path) -> Iterable[Path]:
    """Where the file may be on this machine: under its own path, or by its name in the folders of ``NAVA_MODELS``."""
    yield path
    for folder in filter(None, os.environ.get(MODELS_VARIABLE, "").split(os.pathsep)):
        yield from sorted(Path(folder).rglob(path.name))
