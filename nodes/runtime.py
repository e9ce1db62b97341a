"""Nodes that say where the work is done."""

from comfy_api.latest import io

from .host.offload import ALL_THAT_FITS, Placement, choices, placed
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


class NavaOffload(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="NavaOffload",
            display_name="NAVA Offload",
            category=category("runtime"),
            description="Says where each model works and how much of the backbone stays on the GPU. Left as it "
            "is, it chooses by itself and says what.",
            search_aliases=["nava", "low vram", "block swap", "memory", "device", "multi gpu", "cpu"],
            inputs=[
                io.Model.Input("model", tooltip="From NAVA Load Backbone; LoRAs go between that node and this one."),
                io.Clip.Input("clip", optional=True, tooltip="From NAVA Load Text Encoder."),
                io.Vae.Input("video_vae", optional=True, tooltip="From NAVA Load Video VAE."),
                io.Vae.Input("audio_vae", optional=True, tooltip="From NAVA Load Audio VAE."),
                io.Combo.Input(
                    "encoder_device",
                    options=choices(),
                    default="auto",
                    tooltip="Where the text encoder works. auto: a GPU that the backbone leaves free, else where it "
                    "was loaded for. default: where it was loaded for.",
                ),
                io.Combo.Input(
                    "vae_device",
                    options=choices(),
                    default="auto",
                    tooltip="Where both VAEs work, chosen likewise. On the CPU they take minutes.",
                ),
                io.Int.Input(
                    "resident",
                    default=ALL_THAT_FITS,
                    min=ALL_THAT_FITS,
                    max=100,
                    advanced=True,
                    tooltip="Percent of the backbone's weights that stay on the GPU at most; the rest is streamed from "
                    "RAM as it is used. -1: what fits beside the clip. Under dynamic VRAM ComfyUI decides by itself.",
                ),
                io.String.Input(
                    "blocks",
                    default="",
                    advanced=True,
                    tooltip="Percent of the blocks for each of several devices, in order, such as gpu:0 60, gpu:1 40: "
                    "each computes the blocks that it holds. Empty: all on one.",
                ),
            ],
            outputs=[
                io.Model.Output(),
                io.Clip.Output(),
                io.Vae.Output(display_name="video VAE"),
                io.Vae.Output(display_name="audio VAE"),
                io.String.Output(display_name="choices", tooltip="What works where, with figures."),
            ],
        )

    @classmethod
    def execute(
        cls, model, encoder_device, vae_device, resident, blocks, clip=None, video_vae=None, audio_vae=None
    ) -> io.NodeOutput:
        wanted = Placement(encoder_device, vae_device, resident, blocks)
        *models, text = placed(model, clip, video_vae, audio_vae, wanted)
        return io.NodeOutput(*models, text)


RUNTIME_NODES = [NavaParallel, NavaOffload]
