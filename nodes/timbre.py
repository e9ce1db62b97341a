"""Reference voices: from a recording to the timbre that a speech span is spoken with, kept, loaded and blended."""

import logging

from comfy_api.latest import io, ui

from ..nava_core.timbre import check_voice
from ..nava_core.voices import make_voice
from .host.voices import KEEP_BOTH, REPLACE, blend_timbres, load_voice, save_voice, voice_files, voice_state
from .types import SpeakerEncoder, Timbre, category


class NavaEncodeTimbre(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="NavaEncodeTimbre",
            display_name="NAVA Encode Timbre",
            category=category("voice"),
            description="Takes a speaker's timbre from a recording: 3 to 30 seconds of one clear voice serve best.",
            search_aliases=["reference voice", "voice clone", "speaker"],
            inputs=[
                SpeakerEncoder.Input("speaker_encoder", tooltip="From NAVA Load Speaker Encoder."),
                io.Audio.Input("audio", tooltip="A recording of one speaker, without music or other voices."),
                io.Float.Input(
                    "start", default=0.0, min=0.0, max=36000.0, step=0.1, tooltip="Where to begin, in seconds."
                ),
                io.Float.Input(
                    "duration",
                    default=0.0,
                    min=0.0,
                    max=30.0,
                    step=0.1,
                    tooltip="How many seconds to take; 0: to the end, at most 30.",
                ),
            ],
            outputs=[
                Timbre.Output(display_name="timbre"),
                io.String.Output(display_name="report", tooltip="What will weaken the voice; empty if nothing."),
            ],
        )

    @classmethod
    def execute(cls, speaker_encoder, audio, start, duration) -> io.NodeOutput:
        sound = (audio["waveform"], audio["sample_rate"])
        part = {"start": start, "duration": duration or None}
        timbre = make_voice(speaker_encoder, *sound, **part).timbre
        warnings = check_voice(*sound, **part)
        for warning in warnings:
            logging.warning("NAVA reference voice: %s", warning)
        return io.NodeOutput(timbre, "\n".join(warnings))


class NavaSaveTimbre(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="NavaSaveTimbre",
            display_name="NAVA Save Timbre",
            category=category("voice"),
            description="Keeps a voice under a name, for NAVA Load Timbre in any workflow.",
            search_aliases=["keep voice", "store voice", "voice library"],
            inputs=[
                Timbre.Input("timbre", tooltip="The voice, from NAVA Encode Timbre or NAVA Blend Timbre."),
                io.String.Input("name", default="my voice", tooltip="Whose voice it is; its file gets this name."),
                io.Combo.Input(
                    "existing",
                    options=[KEEP_BOTH, REPLACE],
                    default=KEEP_BOTH,
                    tooltip="What to do if another voice has that name. keep both: the new one gets a number; "
                    "replace: the old one is lost.",
                ),
            ],
            outputs=[io.String.Output(display_name="report", tooltip="What was saved, and where.")],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, timbre, name, existing) -> io.NodeOutput:
        report = save_voice(timbre, name, existing)
        return io.NodeOutput(report, ui=ui.PreviewText(report))


class NavaLoadTimbre(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="NavaLoadTimbre",
            display_name="NAVA Load Timbre",
            category=category("voice"),
            description="Loads a voice that NAVA Save Timbre or nava voice kept; no recording is needed.",
            search_aliases=["saved voice", "voice library", "speaker"],
            inputs=[
                io.Combo.Input(
                    "file", options=voice_files(), tooltip="A saved voice. From ComfyUI's models/nava_voices folder."
                ),
                SpeakerEncoder.Input(
                    "speaker_encoder",
                    optional=True,
                    tooltip="Connect NAVA Load Speaker Encoder to refuse a voice that another encoder made; "
                    "otherwise not needed.",
                ),
            ],
            outputs=[
                Timbre.Output(display_name="timbre"),
                io.String.Output(display_name="report", tooltip="Whose voice it is, and from how long a recording."),
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, file, speaker_encoder=None) -> str:
        return voice_state(file)

    @classmethod
    def execute(cls, file, speaker_encoder=None) -> io.NodeOutput:
        return io.NodeOutput(*load_voice(file, speaker_encoder))


def weight_input(name: str, which: str, default: float = 1.0) -> io.Float.Input:
    tooltip = f"How much of the {which} voice; only the proportion to the others counts."
    return io.Float.Input(name, default=default, min=0.0, max=100.0, step=0.05, tooltip=tooltip)


class NavaBlendTimbre(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="NavaBlendTimbre",
            display_name="NAVA Blend Timbre",
            category=category("voice"),
            description="Makes a new voice that lies between two to four others.",
            search_aliases=["mix voices", "voice morph", "average voice"],
            inputs=[
                Timbre.Input("timbre_1", tooltip="The first voice, from NAVA Encode Timbre or NAVA Load Timbre."),
                weight_input("weight_1", "first"),
                Timbre.Input("timbre_2", tooltip="The second voice, made with the same speaker encoder."),
                weight_input("weight_2", "second"),
                Timbre.Input("timbre_3", optional=True, tooltip="A third voice, if you like."),
                weight_input("weight_3", "third"),
                Timbre.Input("timbre_4", optional=True, tooltip="A fourth voice, if you like."),
                weight_input("weight_4", "fourth"),
            ],
            outputs=[
                Timbre.Output(display_name="timbre"),
                io.String.Output(display_name="report", tooltip="Which voices it is made of, and how much of each."),
            ],
        )

    @classmethod
    def execute(
        cls, timbre_1, weight_1, timbre_2, weight_2, weight_3, weight_4, timbre_3=None, timbre_4=None
    ) -> io.NodeOutput:
        timbres = [timbre_1, timbre_2, timbre_3, timbre_4]
        return io.NodeOutput(*blend_timbres(timbres, [weight_1, weight_2, weight_3, weight_4]))


TIMBRE_NODES = [NavaEncodeTimbre, NavaSaveTimbre, NavaLoadTimbre, NavaBlendTimbre]
