"""Run by tests: an owner of two workers, which it keeps busy until it is killed.

    python _parallel_owner.py BACKBONE

Prints the workers' process numbers once they have made their first pass.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch

from nava_core.parallel.layout import Layout
from nava_core.parallel.workers import ParallelBackbone


def main(path):
    backbone = ParallelBackbone(path, workers=2, layout=Layout(1, 2))
    width = backbone.config.text_dim
    passes = [
        {
            "video": torch.zeros(1, 48, 3, 8, 8),
            "audio": torch.zeros(1, 20, 128),
            "timestep": torch.tensor([500.0]),
            "context": torch.zeros(1, 4, width),
        }
    ]
    backbone.run_together(passes)
    print(*[each["pid"] for each in backbone.workers.about], flush=True)
    while True:
        backbone.run_together(passes)


if __name__ == "__main__":
    main(sys.argv[1])
