"""Decoding nodes: from latents to frames, sound and a clip. Batches come out as lists, a clip each."""

from comfy_api.latest import io

from ..nava_core.decoding import CHOICES, OVERLAP, TILE, Decoding
from ..nava_core.geometry import FPS
from ..nava_core.media import LOUDNESS_MODES
from .host.audio_vae import decode_audio_clips
from .host.video import MuxedVideo
from .host.video_vae import decode_video_clips
from .types import category


class NavaDecodeVideo(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="NavaDecodeVideo",
            display_name="NAVA Decode Video",
            category=category("decode"),
            description="Turns a clip's latent into frames, in memory that does not grow with its length. Given frames "
            "come out as they were given.",
            inputs=[
                io.Latent.Input("latent", tooltip="From NAVA Sampler."),
                io.Vae.Input("vae", tooltip="From NAVA Load Video VAE."),
                io.Combo.Input(
                    "decoding",
                    options=list(CHOICES),
                    default=CHOICES[0],
                    tooltip="auto: whole frames where memory allows, else tiles. whole, tiled: begin with that.",
                ),
                io.Int.Input(
                    "tile_size",
                    default=TILE,
                    min=64,
                    max=4096,
                    step=32,
                    advanced=True,
                    tooltip="Tiles of so many pixels a side; smaller ones take less memory.",
                ),
                io.Int.Input(
                    "overlap",
                    default=OVERLAP,
                    min=0,
                    max=2048,
                    step=16,
                    advanced=True,
                    tooltip="Pixels that tiles share, at most half a tile; more of them hide seams better.",
                ),
            ],
            outputs=[io.Image.Output(display_name="frames", is_output_list=True)],
        )

    @classmethod
    def execute(cls, latent, vae, decoding, tile_size, overlap) -> io.NodeOutput:
        return io.NodeOutput(decode_video_clips(vae, latent, Decoding(decoding, tile_size, overlap)))


class NavaDecodeAudio(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="NavaDecodeAudio",
            display_name="NAVA Decode Audio",
            category=category("decode"),
            description="Turns a clip's latent into 48 kHz stereo sound, exactly as long as its picture. Given sound "
            "comes out as it was given, at its own rate.",
            inputs=[
                io.Latent.Input("latent", tooltip="From NAVA Sampler."),
                io.Vae.Input("audio_vae", tooltip="From NAVA Load Audio VAE."),
                io.Combo.Input(
                    "loudness",
                    options=list(LOUDNESS_MODES),
                    default=LOUDNESS_MODES[0],
                    advanced=True,
                    tooltip="Leave the sound as it comes, or turn it down where it would clip.",
                ),
            ],
            outputs=[io.Audio.Output(is_output_list=True)],
        )

    @classmethod
    def execute(cls, latent, audio_vae, loudness) -> io.NodeOutput:
        return io.NodeOutput(decode_audio_clips(audio_vae, latent, loudness))


class NavaMux(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="NavaMux",
            display_name="NAVA Mux",
            category=category("decode"),
            description="Joins frames and sound into a clip for Save Video: equal lengths, right colours, whole files.",
            search_aliases=["create video", "combine"],
            inputs=[
                io.Image.Input("frames", tooltip="From NAVA Decode Video."),
                io.Audio.Input("audio", optional=True, tooltip="From NAVA Decode Audio; none for a silent clip."),
                io.Float.Input(
                    "fps", default=float(FPS), min=1.0, max=120.0, step=1.0, tooltip="NAVA makes 24 frames a second."
                ),
                io.Int.Input(
                    "crf",
                    default=18,
                    min=0,
                    max=51,
                    optional=True,
                    advanced=True,
                    tooltip="Quality of the picture in the file: lower is better and larger; 18 looks like the frames.",
                ),
            ],
            outputs=[io.Video.Output()],
        )

    @classmethod
    def execute(cls, frames, fps, audio=None, crf=18) -> io.NodeOutput:
        return io.NodeOutput(MuxedVideo(frames, audio, fps, crf))


DECODE_NODES = [NavaDecodeVideo, NavaDecodeAudio, NavaMux]
