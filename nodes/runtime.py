"""Nodes that say where the work is done."""

from comfy_api.latest import io

from .host.parallel import over_workers
from .types import category

LAYOUTS = ["auto", *(f"{a}x{b}" for a in (1, 2, 3, 4) for b in (1, 2, 3, 4, 6, 8) if a * b > 1)]


class NavaParallel(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="NavaParallel",
            display_name="NAVA Parallel",
            category=category("runtime"),
            description="Several GPUs make one clip together: predictions side by side, tokens shared, or both.",
            search_aliases=["nava", "multi gpu", "sequence parallel", "ulysses", "ray", "cluster", "distributed"],
            inputs=[
                io.Model.Input("model", tooltip="From NAVA Load Backbone. LoRAs go between that node and this one."),
                io.Int.Input(
                    "workers",
                    default=2,
                    min=1,
                    max=64,
                    tooltip="How many work together, a GPU each (on a server without a GPU, a process each).",
                ),
                io.Combo.Input(
                    "layout",
                    options=LAYOUTS,
                    default="auto",
                    tooltip="Predictions side by side x workers that share the tokens of each. auto: the quickest for "
                    "each step; the server's log says which.",
                ),
                io.Combo.Input(
                    "weights",
                    options=["replicated", "sharded"],
                    default="replicated",
                    tooltip="replicated: every GPU holds all weights. sharded: a part each, for GPUs that cannot hold "
                    "them; slower, more so over PCIe.",
                ),
            ],
            outputs=[io.Model.Output()],
        )

    @classmethod
    def execute(cls, model, workers, layout, weights) -> io.NodeOutput:
        return io.NodeOutput(over_workers(model, workers, layout, weights))


RUNTIME_NODES = [NavaParallel]
