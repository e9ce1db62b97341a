"""Help with writing: a draft becomes a dense prompt, a first frame is described."""

import logging

from comfy_api.latest import io

from ..nava_core.rewrite import Draft
from .host.canvas import show_text
from .host.rewrite import AUTO, HOST, SERVER, caption_image, note_failure, rewrite_prompt, state_of
from .latents import MODES
from .types import category

BOTH = "video and audio"


def language_input(tooltip: str, *more: str) -> io.Combo.Input:
    return io.Combo.Input("language", options=["zh", "en", *more], default="zh", tooltip=tooltip)


def chat_inputs() -> list:
    return [
        io.Combo.Input(
            "backend",
            options=[AUTO, HOST, SERVER],
            default=AUTO,
            tooltip="Who writes. host: the connected CLIP; server: the chat server that ComfyUI's owner configured; "
            "auto: the CLIP if it can generate, else the server.",
        ),
        io.Int.Input(
            "seed",
            default=0,
            min=0,
            max=2**64 - 1,
            control_after_generate=False,
            tooltip="Another seed gives another text.",
        ),
        io.Float.Input(
            "temperature",
            default=0.7,
            min=0.0,
            max=2.0,
            step=0.05,
            tooltip="How freely it is written; 0 always takes the likeliest word.",
        ),
        io.Int.Input(
            "max_tokens",
            default=1024,
            min=64,
            max=32768,
            tooltip="Most tokens of one answer; models that think aloud need more.",
        ),
    ]


class NavaRewritePrompt(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="NavaRewritePrompt",
            display_name="NAVA Rewrite Prompt",
            category=category("prompt"),
            description="Turns a line or two into the dense prompt that NAVA was trained on. Speech stays word for "
            "word; where nothing usable comes back, your draft is passed on.",
            search_aliases=["enhance prompt", "prompt enhancer", "llm", "generate text"],
            is_output_node=True,
            hidden=[io.Hidden.unique_id],
            inputs=[
                io.String.Input(
                    "draft",
                    default="",
                    multiline=True,
                    placeholder="An old man opens the door and says <S>Come in!<E>",
                    tooltip="What happens, in a line or two; speech as <S>words<E> or in quotation marks.",
                ),
                language_input(
                    "Language of the prompt. zh: Chinese, most of what NAVA was trained on; en: English; auto: the "
                    "draft's. Speech stays in its own.",
                    "auto",
                ),
                *chat_inputs(),
                io.Combo.Input(
                    "mode",
                    options=list(MODES),
                    default=BOTH,
                    optional=True,
                    tooltip="What the clip is to have, as in NAVA Empty Latent.",
                ),
                io.Clip.Input(
                    "clip",
                    optional=True,
                    tooltip="A CLIP that can generate text, as Generate Text takes it; not NAVA's umt5.",
                ),
                io.Image.Input(
                    "image",
                    optional=True,
                    tooltip="The first frame, for a model that can see.",
                ),
                io.Clip.Input(
                    "text_encoder",
                    optional=True,
                    tooltip="umt5, from NAVA Load Text Encoder: counts the prompt's tokens exactly.",
                ),
            ],
            outputs=[
                io.String.Output(display_name="prompt", tooltip="The dense prompt, or the draft."),
                io.String.Output(display_name="report", tooltip="Who wrote it and how long it is, or what went wrong."),
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, draft=None, language=None, backend=None, seed=None, **_):
        return state_of(draft, language, backend, seed)

    @classmethod
    def execute(cls, draft, language, backend, seed, temperature, max_tokens, mode=BOTH, **links) -> io.NodeOutput:
        job = Draft(draft, language, MODES[mode], seed=seed, temperature=temperature, max_tokens=max_tokens)
        result = rewrite_prompt(job, backend, **links)
        report = result.report()
        if result.warning:
            logging.warning("NAVA rewrite: %s", report)
        if result.unavailable:
            note_failure(draft, language, backend, seed)
        shown = [report, result.prompt] if result.changed else [report]
        return io.NodeOutput(
            result.prompt,
            report,
            ui=show_text(cls.hidden.unique_id, "\n\n".join([*shown, f"Draft: {result.draft}"])),
        )


class NavaCaptionImage(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="NavaCaptionImage",
            display_name="NAVA Caption Image",
            category=category("prompt"),
            description="Describes a first frame for NAVA, with a model that can see: picture, light and framing.",
            search_aliases=["describe image", "image to text", "vlm"],
            is_output_node=True,
            hidden=[io.Hidden.unique_id],
            inputs=[
                io.Image.Input("image", tooltip="The first frame; of several pictures the first."),
                language_input("Language of the description. zh: Chinese; en: English."),
                *chat_inputs(),
                io.Clip.Input(
                    "clip",
                    optional=True,
                    tooltip="A CLIP that can generate text and takes pictures, as Generate Text takes it.",
                ),
            ],
            outputs=[
                io.String.Output(
                    display_name="caption", tooltip="One paragraph, for visual in NAVA Structured Prompt or a draft."
                )
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, **_):
        return state_of()

    @classmethod
    def execute(cls, image, language, backend, seed, temperature, max_tokens, clip=None) -> io.NodeOutput:
        settings = {"language": language, "seed": seed, "temperature": temperature, "max_tokens": max_tokens}
        text = caption_image(image, backend, clip, **settings)
        return io.NodeOutput(text, ui=show_text(cls.hidden.unique_id, text))


ASSIST_NODES = [NavaRewritePrompt, NavaCaptionImage]
