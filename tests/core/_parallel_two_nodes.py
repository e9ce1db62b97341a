"""Run by tests: a Ray cluster of two nodes on this machine, and a clip's passes over both.

python _parallel_two_nodes.py BACKBONE PASSES OUT
"""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch

from nava_core.parallel.cluster import require_ray
from nava_core.parallel.layout import Layout
from nava_core.parallel.workers import ParallelBackbone

NODE = {"num_cpus": 1, "object_store_memory": 100 * 2**20, "include_dashboard": False}


def main(path, passes, out):
    require_ray()
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args=NODE)
    try:
        cluster.add_node(num_cpus=1, object_store_memory=100 * 2**20)
        os.environ["NAVA_RAY_ADDRESS"] = cluster.address
        backbone = ParallelBackbone(path, workers=2, layout=Layout(1, 2))
        outputs = backbone.run_together(torch.load(passes))
        torch.save({"outputs": outputs, "nodes": backbone.workers.ask("node")}, out)
        backbone.close()
    finally:
        cluster.shutdown()


if __name__ == "__main__":
    main(*sys.argv[1:])
