"""Prompt nodes: speech spans, the structured prompt, and its encoding with voices bound to spans."""

import json
import logging

from comfy_api.latest import io

from ..nava_core.prompt import (
    NONE,
    PRESETS,
    PromptCheck,
    SpanSpec,
    StructuredPrompt,
    check_prompt,
    span_voices,
    with_default_negative,
)
from .host.canvas import show_text
from .host.conditioning import encode_prompt
from .types import Span, Spans, Timbre, category

MAX_SPANS = 16
NO_TERMS = "none"
CHECK = "nava_prompt_check"  # what the canvas extension reads after a run
NEGATIVE_TERMS = {  # kind and language of the core's default negatives
    NO_TERMS: None,
    "picture and sound, English": ("video", "en"),
    "picture and sound, Chinese": ("video", "zh"),
    "sound, English": ("audio", "en"),
    "sound, Chinese": ("audio", "zh"),
}


def text_input(name: str, tooltip: str, *, lines: bool = False, placeholder: str = "") -> io.String.Input:
    return io.String.Input(name, default="", multiline=lines, placeholder=placeholder, tooltip=tooltip)


def for_the_canvas(check: PromptCheck, text=None) -> dict:
    """A node's ``ui``: the check for the canvas extension, beside the text that the host shows."""
    return {**(text.as_dict() if text else {}), CHECK: [json.dumps(check.as_dict())]}


def preset_input(name: str, kind: str, tooltip: str) -> io.Combo.Input:
    return io.Combo.Input(name, options=[NONE, *PRESETS[kind]], default=NONE, optional=True, tooltip=tooltip)


class NavaSpeechSpan(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="NavaSpeechSpan",
            display_name="NAVA Speech Span",
            category=category("prompt"),
            description="One thing that is said, by whom and how, with an optional reference voice.",
            search_aliases=["dialogue", "speech", "line"],
            inputs=[
                text_input("words", "What is said, word for word.", lines=True, placeholder="Good morning!"),
                text_input("speaker", "Who says it, as the picture shows them.", placeholder="the woman in red"),
                text_input("voice", "What the voice is like.", placeholder="a warm, low voice"),
                text_input("emotion", "The mood it is said in.", placeholder="calm, amused"),
                text_input("pace", "How fast it is said.", placeholder="slowly, with pauses"),
                text_input("position", "Where it is heard from.", placeholder="close, from the left"),
                Timbre.Input(
                    "timbre", optional=True, tooltip="A reference voice, from NAVA Encode Timbre or NAVA Load Timbre."
                ),
                preset_input(
                    "emotion_preset", "emotion", "A ready mood, in the prompt's language; your emotion is added to it."
                ),
                preset_input(
                    "pace_preset", "pace", "A ready pace, in the prompt's language; your pace is added to it."
                ),
                preset_input(
                    "place_preset", "place", "A ready place in the sound field; your position is added to it."
                ),
            ],
            outputs=[Span.Output(display_name="span")],
        )

    @classmethod
    def execute(
        cls,
        words,
        speaker,
        voice,
        emotion,
        pace,
        position,
        timbre=None,
        emotion_preset=NONE,
        pace_preset=NONE,
        place_preset=NONE,
    ) -> io.NodeOutput:
        presets = (emotion_preset, pace_preset, place_preset)
        return io.NodeOutput(SpanSpec(words, speaker, voice, emotion, pace, position, timbre, *presets))


class NavaStructuredPrompt(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="NavaStructuredPrompt",
            display_name="NAVA Structured Prompt",
            category=category("prompt"),
            description="Joins what is seen, how it moves, the camera, the speech and the sound into one paragraph.",
            inputs=[
                text_input("visual", "What is seen: people, things, place, light, style.", lines=True),
                text_input("dynamics", "What happens, in order.", lines=True),
                text_input("camera", "Framing, lens and movement of the camera.", lines=True),
                text_input("audio", "What is heard beside the speech: actions, objects, ambience, music.", lines=True),
                io.Combo.Input(
                    "language",
                    options=["auto", "en", "zh"],
                    default="auto",
                    tooltip="Language of the words between your texts; auto: Chinese if most of the text is.",
                ),
                io.Boolean.Input(
                    "no_speech",
                    default=False,
                    optional=True,
                    tooltip="Says that nobody speaks; without it the model may let someone speak.",
                ),
                preset_input("shot", "shot", "A ready framing, in the prompt's language; camera is added to it."),
                preset_input("movement", "movement", "A ready movement of the camera; camera is added to it."),
                preset_input("sound_field", "sound_field", "A ready room or width of the sound; audio is added to it."),
                io.Autogrow.Input(
                    "spans",
                    template=io.Autogrow.TemplatePrefix(
                        Span.Input("span", tooltip="Speech, in the order it is said."), "span", min=0, max=MAX_SPANS
                    ),
                    tooltip="Speech spans, in the order they are said.",
                ),
            ],
            outputs=[
                io.String.Output(display_name="prompt"),
                Spans.Output(display_name="spans", tooltip="The spans with their voices, for NAVA Encode Prompt."),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(
        cls,
        visual,
        dynamics,
        camera,
        audio,
        language,
        no_speech=False,
        shot=NONE,
        movement=NONE,
        sound_field=NONE,
        spans=None,
    ) -> io.NodeOutput:
        ordered = [span for span in (spans or {}).values() if span is not None]
        presets = (shot, movement, sound_field)
        prompt = StructuredPrompt(visual, dynamics, camera, audio, ordered, language, no_speech, *presets).render()
        voices, assignment = span_voices(ordered)
        check = check_prompt(prompt, voices=len(voices), assignment=assignment)
        text = show_text(cls.hidden.unique_id, prompt)
        return io.NodeOutput(prompt, ordered, ui=for_the_canvas(check, text))


class NavaEncodePrompt(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="NavaEncodePrompt",
            display_name="NAVA Encode Prompt",
            category=category("prompt"),
            description="Encodes a prompt and binds reference voices to its speech spans, written <S>words<E>.",
            search_aliases=["text encode", "prompt", "clip text encode"],
            inputs=[
                io.Clip.Input("clip", tooltip="umt5, from NAVA Load Text Encoder."),
                io.String.Input(
                    "prompt",
                    default="",
                    multiline=True,
                    tooltip="One dense paragraph; speech as <S>words<E>. At most 512 tokens. For a negative leave it "
                    "empty and choose negative_terms; empty without them is the all-zero null of training.",
                ),
                io.Combo.Input(
                    "negative_terms",
                    options=list(NEGATIVE_TERMS),
                    default=NO_TERMS,
                    optional=True,
                    tooltip="For a negative: adds this pack's terms for common faults to your text. For clips with "
                    "a picture choose picture and sound, Chinese; for audio-only clips sound, Chinese.",
                ),
                io.Float.Input(
                    "seconds",
                    default=0.0,
                    min=0.0,
                    max=60.0,
                    step=0.5,
                    optional=True,
                    tooltip="Length of the clip, as in NAVA Empty Latent, to check that the speech fits. 0: 6 s are "
                    "assumed. It changes only the report.",
                ),
                Spans.Input(
                    "spans",
                    optional=True,
                    tooltip="From NAVA Structured Prompt: binds each span to its own voice.",
                ),
                io.Autogrow.Input(
                    "voices",
                    template=io.Autogrow.TemplatePrefix(
                        Timbre.Input(
                            "voice", tooltip="A reference voice, from NAVA Encode Timbre or NAVA Load Timbre."
                        ),
                        "voice",
                        min=0,
                        max=MAX_SPANS,
                    ),
                    tooltip="Reference voices: the first speaks the first span, and so on; one alone speaks them all.",
                ),
            ],
            outputs=[
                io.Conditioning.Output(),
                io.String.Output(
                    display_name="report",
                    tooltip="Tokens used, spans and voices, what was cut, how long the speech is.",
                ),
            ],
        )

    @classmethod
    def execute(cls, clip, prompt, negative_terms=NO_TERMS, seconds=0.0, spans=None, voices=None) -> io.NodeOutput:
        terms = NEGATIVE_TERMS[negative_terms]
        if terms:
            prompt = with_default_negative(prompt, *terms)
        given = [voice for voice in (voices or {}).values() if voice is not None]
        conditioning, report, warnings, check = encode_prompt(clip, prompt, given, spans, seconds)
        for warning in warnings:
            logging.warning("NAVA prompt: %s", warning)
        return io.NodeOutput(conditioning, report, ui=for_the_canvas(check))


PROMPT_NODES = [NavaSpeechSpan, NavaStructuredPrompt, NavaEncodePrompt]
