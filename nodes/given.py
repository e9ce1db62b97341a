"""Nodes for given parts of a clip: its sound, its pictures, all but a span of it, and the segment before it."""

from comfy_api.latest import io

from ..nava_core.given import HOLDS, RESTS, SHOWN
from .host.given import give_frames, give_sound, retake
from .host.segments import continue_clip, join_clips
from .types import category

PLACES = ["from seconds", "at the end"]
USES = ["keep", "start from them"]
PARTS = ["picture and sound", "picture", "sound"]


def seconds_input(name: str, tooltip: str, default: float = 0.0, **options) -> io.Float.Input:
    return io.Float.Input(
        name, default=default, min=0.0, max=36000.0, step=0.1, round=0.0001, tooltip=tooltip, **options
    )


def rest_input(**options) -> io.Combo.Input:
    return io.Combo.Input(
        "rest",
        options=list(RESTS),
        default=RESTS[0],
        tooltip="Where the recording does not reach: silence, which is given too, or sound that the model makes.",
        **options,
    )


def shown_input(**options) -> io.Combo.Input:
    return io.Combo.Input(
        "shown",
        options=list(SHOWN),
        default=next(iter(SHOWN)),
        advanced=True,
        tooltip="How the network sees the given part: clean, as first frames were in training, or as noisy as the "
        "rest of the clip. It comes out as it was given in both cases.",
        **options,
    )


def soundtrack_inputs(of: str) -> list:
    return [
        io.Audio.Input("soundtrack", optional=True, tooltip=f"The given sound of the whole clip, {of}"),
        seconds_input(
            "soundtrack_start",
            "Where in the soundtrack the whole clip begins, in seconds.",
            optional=True,
            advanced=True,
        ),
    ]


class NavaGivenAudio(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="NavaGivenAudio",
            display_name="NAVA Given Audio",
            category=category("latent"),
            description="Gives the clip its sound: speech or music that the picture is made to. It stays sample for "
            "sample as it is.",
            search_aliases=["audio to video", "a2v", "lip sync", "talking", "music video"],
            inputs=[
                io.Latent.Input("latent", tooltip="From NAVA Empty Latent or another node that gives parts of a clip."),
                io.Audio.Input("audio", tooltip="The recording."),
                io.Vae.Input("audio_vae", tooltip="From NAVA Load Audio VAE."),
                seconds_input("start", "Where in the recording to begin, in seconds."),
                seconds_input("position", "Where in the clip the recording begins, in seconds."),
                seconds_input("duration", "How many seconds of the recording to take at most; 0: all."),
                rest_input(),
                shown_input(),
            ],
            outputs=[
                io.Latent.Output(),
                io.Audio.Output(
                    display_name="sound", tooltip="The recording as it is in the clip, exactly as long as the clip."
                ),
                io.String.Output(display_name="report", tooltip="What is given, and what was cut or filled."),
            ],
        )

    @classmethod
    def execute(cls, latent, audio, audio_vae, start, position, duration, rest, shown) -> io.NodeOutput:
        part = {"start": start, "at": position, "duration": duration or None, "rest": rest}
        return io.NodeOutput(*give_sound(latent, audio, audio_vae, shown, **part))


class NavaGivenFrames(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="NavaGivenFrames",
            display_name="NAVA Given Frames",
            category=category("latent"),
            description="Gives the clip pictures: a whole silent video to make sound for, a last frame, one at any "
            "time, or a clip to start from.",
            search_aliases=["video to audio", "v2a", "foley", "last frame", "keyframe", "video to video"],
            inputs=[
                io.Latent.Input("latent", tooltip="From NAVA Empty Latent or another node that gives parts of a clip."),
                io.Image.Input(
                    "images",
                    tooltip="One picture, or frames that follow one another; scaled to cover the clip and "
                    "centre-cropped. All clips of a batch get the same.",
                ),
                io.Vae.Input("vae", tooltip="From NAVA Load Video VAE."),
                io.Combo.Input(
                    "place",
                    options=PLACES,
                    default=PLACES[0],
                    tooltip="from seconds: the first of them is at that time. at the end: the last of them is the "
                    "clip's last frame.",
                ),
                seconds_input("seconds", "Where in the clip the pictures begin, unless they are at the end."),
                io.Float.Input(
                    "fps",
                    default=24.0,
                    min=1.0,
                    max=240.0,
                    step=0.001,
                    round=0.001,
                    tooltip="Frames a second of the images; they are brought to the clip's 24.",
                ),
                io.Combo.Input(
                    "use",
                    options=USES,
                    default=USES[0],
                    tooltip="keep: they stay as they are. start from them: the clip is made from them, as far as NAVA "
                    "Sampler's denoise below 1 lets it.",
                ),
                shown_input(),
            ],
            outputs=[
                io.Latent.Output(),
                io.Image.Output(display_name="fitted", tooltip="The pictures as they are in the clip."),
                io.String.Output(display_name="report", tooltip="What is given, and what was scaled or cut."),
            ],
        )

    @classmethod
    def execute(cls, latent, images, vae, place, seconds, fps, use, shown) -> io.NodeOutput:
        at = None if place == PLACES[1] else seconds
        return io.NodeOutput(*give_frames(latent, images, vae, at, fps, shown, keep=use == USES[0]))


class NavaRetake(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="NavaRetake",
            display_name="NAVA Retake",
            category=category("latent"),
            description="Makes a span of a finished clip again, its picture, its sound or both; the rest stays.",
            search_aliases=["inpaint", "redo", "edit"],
            inputs=[
                io.Latent.Input("latent", tooltip="Of a finished clip, from NAVA Sampler."),
                seconds_input("start", "Where the span begins, in seconds.", default=1.0),
                seconds_input("end", "Where it ends; the latents that it touches are made again whole.", default=2.0),
                io.Combo.Input("part", options=PARTS, default=PARTS[0], tooltip="What is made again there."),
                shown_input(),
                io.Mask.Input(
                    "mask",
                    optional=True,
                    tooltip="White where the picture is made again, for a region of it; fitted to the clip's size. "
                    "One mask, or one for each frame.",
                ),
                io.Image.Input(
                    "frames",
                    optional=True,
                    tooltip="The finished clip's decoded frames: those that stay then come out exactly as they are, "
                    "without the VAE.",
                ),
                io.Audio.Input(
                    "audio", optional=True, tooltip="The finished clip's sound; it stays likewise, sample for sample."
                ),
            ],
            outputs=[
                io.Latent.Output(),
                io.String.Output(display_name="report", tooltip="Which frames and seconds are made again."),
            ],
        )

    @classmethod
    def execute(cls, latent, start, end, part, shown, mask=None, frames=None, audio=None) -> io.NodeOutput:
        parts = (part != PARTS[2], part != PARTS[1])
        return io.NodeOutput(*retake(latent, (start, end), parts, shown, mask, frames, audio))


class NavaContinue(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="NavaContinue",
            display_name="NAVA Continue",
            category=category("latent"),
            description="Lets a clip go on where another one ends: its last frame becomes the first of the next "
            "segment.",
            search_aliases=["extend", "longer", "long video", "next segment"],
            inputs=[
                io.Image.Input("frames", tooltip="The whole clip so far, from NAVA Decode Video or NAVA Join."),
                io.Latent.Input("latent", tooltip="The next segment, still empty: from NAVA Empty Latent."),
                io.Vae.Input("vae", tooltip="From NAVA Load Video VAE."),
                io.Combo.Input(
                    "hold",
                    options=list(HOLDS),
                    default=HOLDS[0],
                    tooltip="Brings the last frame's colours, or colours and sharpness, back to those of the clip's "
                    "beginning, against drift over many segments.",
                ),
                *soundtrack_inputs("of which this segment gets its part. None: the sound is made."),
                io.Vae.Input("audio_vae", optional=True, tooltip="From NAVA Load Audio VAE; for a soundtrack."),
                rest_input(optional=True, advanced=True),
            ],
            outputs=[
                io.Latent.Output(),
                io.Image.Output(display_name="last frame", tooltip="The frame that the segment begins with."),
                io.String.Output(display_name="report", tooltip="What the segment begins with."),
            ],
        )

    @classmethod
    def execute(
        cls, frames, latent, vae, hold, soundtrack=None, soundtrack_start=0.0, audio_vae=None, rest=RESTS[0]
    ) -> io.NodeOutput:
        sound = {"soundtrack": soundtrack, "start": soundtrack_start, "audio_vae": audio_vae, "rest": rest}
        return io.NodeOutput(*continue_clip(frames, latent, vae, hold, **sound))


class NavaJoin(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="NavaJoin",
            display_name="NAVA Join",
            category=category("decode"),
            description="Joins a clip and the segment that NAVA Continue made after it: the frame that both have is "
            "there once, the sound goes on without a click.",
            search_aliases=["concatenate", "append", "extend"],
            inputs=[
                io.Image.Input("frames", tooltip="The clip so far, as it went into NAVA Continue."),
                io.Image.Input("next_frames", tooltip="The next segment's frames, from NAVA Decode Video."),
                io.Audio.Input("audio", optional=True, tooltip="The sound of the clip so far."),
                io.Audio.Input("next_audio", optional=True, tooltip="The next segment's sound."),
                *soundtrack_inputs("which the joined clip gets sample for sample in place of the two sounds."),
            ],
            outputs=[
                io.Image.Output(display_name="frames"),
                io.Audio.Output(display_name="audio"),
                io.String.Output(
                    display_name="report", tooltip="The joined clip's length, and how far the picture drifted."
                ),
            ],
        )

    @classmethod
    def execute(
        cls, frames, next_frames, audio=None, next_audio=None, soundtrack=None, soundtrack_start=0.0
    ) -> io.NodeOutput:
        sound = {"soundtrack": soundtrack, "start": soundtrack_start}
        return io.NodeOutput(*join_clips(frames, next_frames, audio, next_audio, **sound))


GIVEN_NODES = [NavaGivenAudio, NavaGivenFrames, NavaRetake, NavaContinue, NavaJoin]
