"""The report node: what came out of a clip, in numbers and a picture."""

from comfy_api.latest import io, ui

from ..nava_core.geometry import FPS
from .host.report import report_on
from .prompt import MAX_SPANS
from .types import SpeakerEncoder, Timbre, category


class NavaReport(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="NavaReport",
            display_name="NAVA Report",
            category=category("report"),
            description="Measures a clip: loudness, timing of sound and picture, voices, words, and what is broken.",
            search_aliases=["quality", "loudness", "sync", "check clip"],
            inputs=[
                io.Image.Input("frames", optional=True, tooltip="From NAVA Decode Video; none for sound alone."),
                io.Audio.Input("audio", optional=True, tooltip="From NAVA Decode Audio; none for a silent clip."),
                io.Float.Input(
                    "fps", default=float(FPS), min=1.0, max=120.0, step=1.0, tooltip="NAVA makes 24 frames a second."
                ),
                io.String.Input(
                    "prompt",
                    optional=True,
                    force_input=True,
                    tooltip="The clip's prompt: its speech spans are compared with what is heard.",
                ),
                io.String.Input(
                    "transcript",
                    optional=True,
                    force_input=True,
                    tooltip="What is heard in the clip, from any speech recogniser: compared with the prompt's words.",
                ),
                SpeakerEncoder.Input(
                    "speaker_encoder",
                    optional=True,
                    tooltip="From NAVA Load Speaker Encoder: with it, speech is compared with the voices.",
                ),
                io.Autogrow.Input(
                    "voices",
                    template=io.Autogrow.TemplatePrefix(
                        Timbre.Input("voice", tooltip="A reference voice that the clip was made with."),
                        "voice",
                        min=0,
                        max=MAX_SPANS,
                    ),
                    tooltip="Reference voices as for NAVA Encode Prompt: the first speaks the first span, and so on.",
                ),
            ],
            outputs=[
                io.Image.Output(display_name="picture", tooltip="Thumbnails, waveform, onsets and motion."),
                io.String.Output(display_name="report", tooltip="Faults first, then every figure."),
                io.String.Output(display_name="json", tooltip="The same for programs, as nava report writes it."),
            ],
            is_output_node=True,
        )

    @classmethod
    def execute(
        cls, fps, frames=None, audio=None, prompt=None, transcript=None, speaker_encoder=None, voices=None
    ) -> io.NodeOutput:
        timbres = [voice for voice in (voices or {}).values() if voice is not None]
        picture, text, data = report_on(frames, audio, fps, prompt, transcript, speaker_encoder, timbres)
        return io.NodeOutput(picture, text, data, ui=ui.PreviewImage(picture, cls=cls))


REPORT_NODES = [NavaReport]
