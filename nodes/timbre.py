"""Reference voices: from a recording to the timbre that a speech span is spoken with."""

import logging

from comfy_api.latest import io

from ..nava_core.timbre import check_voice, encode_timbre
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
        timbre = encode_timbre(speaker_encoder, *sound, **part)
        warnings = check_voice(*sound, **part)
        for warning in warnings:
            logging.warning("NAVA reference voice: %s", warning)
        return io.NodeOutput(timbre, "\n".join(warnings))


TIMBRE_NODES = [NavaEncodeTimbre]
