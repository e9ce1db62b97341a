"""Latent nodes: the empty clip, and a picture as its first frame."""

from comfy_api.latest import io

from ..nava_core.geometry import PRESETS, ClipGeometry
from .host.first_frame import set_first_frame
from .host.latents import empty_latent
from .types import category

CUSTOM = "custom"
MODES = {"video and audio": "video+audio", "audio only": "audio", "video only": "video"}


class NavaEmptyLatent(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="NavaEmptyLatent",
            display_name="NAVA Empty Latent",
            category=category("latent"),
            description="An empty clip of the length, size and kind you want; 24 frames a second.",
            inputs=[
                io.Float.Input(
                    "seconds",
                    default=6.0,
                    min=0.2,
                    max=60.0,
                    step=0.5,
                    tooltip="Length of the clip. The model was trained up to 10 s.",
                ),
                io.Combo.Input(
                    "preset", options=[*PRESETS, CUSTOM], tooltip="Size of the picture; custom takes width and height."
                ),
                io.Int.Input(
                    "width", default=1280, min=32, max=4096, step=16, tooltip="For custom; multiples of 32 suit best."
                ),
                io.Int.Input(
                    "height", default=704, min=32, max=4096, step=16, tooltip="For custom; multiples of 32 suit best."
                ),
                io.Combo.Input(
                    "mode",
                    options=list(MODES),
                    default="video and audio",
                    tooltip="What the clip is to have: picture, sound or both.",
                ),
                io.Int.Input("batch_size", default=1, min=1, max=64, tooltip="Clips made at once."),
            ],
            outputs=[io.Latent.Output()],
        )

    @classmethod
    def execute(cls, seconds, preset, width, height, mode, batch_size) -> io.NodeOutput:
        size = PRESETS.get(preset, (width, height))
        return io.NodeOutput(empty_latent(ClipGeometry(seconds, *size, MODES[mode]), batch_size))


OWN_SIZE = "the latent's own"
SCALES = {  # of the buckets for a first frame
    "nearest bucket to the picture": 960,
    "nearest bucket of scale 640": 640,
    "nearest bucket of scale 512": 512,
    OWN_SIZE: None,
}


class NavaFirstFrame(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="NavaFirstFrame",
            display_name="NAVA First Frame",
            category=category("latent"),
            description="Lets the clip begin with a picture, which stays as it is.",
            search_aliases=["image to video", "i2v"],
            inputs=[
                io.Latent.Input("latent", tooltip="From NAVA Empty Latent."),
                io.Image.Input("image", tooltip="The first frame. It is scaled to cover the clip and centre-cropped."),
                io.Vae.Input("vae", tooltip="From NAVA Load Video VAE."),
                io.Combo.Input(
                    "size",
                    options=list(SCALES),
                    default=next(iter(SCALES)),
                    tooltip="Let the clip take the trained size nearest to the picture's proportions (about 960x960 "
                    "pixels in all, or the smaller 640x640 or 512x512), or crop the picture to the latent's size.",
                ),
            ],
            outputs=[
                io.Latent.Output(),
                io.Image.Output(display_name="fitted image", tooltip="The picture as it was scaled and cropped."),
                io.String.Output(display_name="report", tooltip="Scale, crop and the size of the clip."),
            ],
        )

    @classmethod
    def execute(cls, latent, image, vae, size) -> io.NodeOutput:
        return io.NodeOutput(*set_first_frame(latent, image, vae, SCALES[size]))


LATENT_NODES = [NavaEmptyLatent, NavaFirstFrame]
