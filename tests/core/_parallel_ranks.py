"""Run by the tests of nava_core.parallel: one of several processes that talk over gloo.

    python _parallel_ranks.py JOB RANK RANKS RENDEZVOUS OUT

JOB is a file made by torch.save: {"model": (config, weights), "passes": {name: arguments}, "shard": bool}. What each
pass gives is saved in OUT.
"""

import sys
from datetime import timedelta
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from nava_core.backbone import BackboneConfig, NavaBackbone
from nava_core.parallel.sharding import shard_weights
from nava_core.parallel.ulysses import UlyssesSplit

TIMEOUT_SECONDS = 60


sent = 0  # bytes to other processes


def count_bytes():
    """Have what this process sends counted."""
    exchange, gather = dist.all_to_all_single, dist.all_gather

    def counted_exchange(output, values, output_sizes, sizes, group=None):
        global sent
        others = sum(sizes) - sizes[dist.get_rank(group)]
        sent += others * values[0].numel() * values.element_size()
        return exchange(output, values, output_sizes, sizes, group=group)

    def counted_gather(parts, values, group=None):
        global sent
        sent += values.nbytes * (len(parts) - 1)
        return gather(parts, values, group=group)

    dist.all_to_all_single, dist.all_gather = counted_exchange, counted_gather


def main(job, rank, ranks, rendezvous, out):
    torch.set_num_threads(1)
    job = torch.load(job)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{rendezvous}",
        rank=int(rank),
        world_size=int(ranks),
        timeout=timedelta(seconds=TIMEOUT_SECONDS),
    )
    config, weights = job["model"]
    model = NavaBackbone(BackboneConfig(**config))
    model.load_state_dict(weights)
    model.requires_grad_(False)
    model.token_split = UlyssesSplit()
    if job.get("shard"):
        shard_weights(model, init_device_mesh("cpu", (int(ranks),)))
    results = {}
    count_bytes()
    with torch.no_grad():
        for name, arguments in job["passes"].items():
            try:
                results[name] = model(**arguments)
            except ValueError as error:
                results[name] = str(error)
    held = sum(p.to_local().numel() if hasattr(p, "to_local") else p.numel() for p in model.parameters())
    torch.save({"results": results, "passes": model.token_split.passes, "held": held, "sent": sent}, out)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
