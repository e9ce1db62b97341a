"""Sampling nodes: the one-node sampler, and the same parts for the stock SamplerCustomAdvanced."""

import math
from functools import partial

from comfy_api.latest import io

from ..nava_core.sampling import PRESETS, Guidance, find_preset, flow_sigmas, sigma_at
from .host.guider import euler_sampler, make_guider, sample, unipc_sampler
from .types import category

TERMS = {
    "text": ("video_text", "audio_text"),
    "align": ("video_align", "audio_align"),
    "timbre": ("audio_timbre",),
}


CUSTOM = "custom"  # the preset that stands for the node's own settings


def scale_input(name: str, default: float, tooltip: str) -> io.Float.Input:
    return io.Float.Input(name, default=default, min=0.0, max=30.0, step=0.1, round=0.01, tooltip=tooltip)


def guidance_inputs() -> list:
    """Scales of guidance, and the part of the run each acts in."""
    inputs = [
        io.Boolean.Input(
            "alignment",
            default=True,
            tooltip="Guides picture and sound to fit each other. Off, a step takes one prediction less.",
        ),
        scale_input("video_text", 3.0, "How closely the picture follows the prompt."),
        scale_input("video_align", 3.0, "How closely the picture follows the sound."),
        scale_input("audio_text", 2.0, "How closely the sound follows the prompt."),
        scale_input("audio_align", 2.0, "How closely the sound follows the picture."),
        scale_input("audio_timbre", 3.0, "How closely speech follows the reference voices; without any it is unused."),
    ]
    for term, scales in TERMS.items():
        names = " and ".join(scales)
        for end, default, does in (("start", 0.0, "begins"), ("end", 1.0, "ends")):
            inputs.append(
                io.Float.Input(
                    f"{term}_{end}",
                    default=default,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    advanced=True,
                    tooltip=f"Where in the run, from 0 to 1, guidance by {names} {does}.",
                )
            )
    return inputs


def denoise_input() -> io.Float.Input:
    """Optional, so that workflows saved before it was there mean what they meant."""
    return io.Float.Input(
        "denoise",
        default=1.0,
        min=0.01,
        max=1.0,
        step=0.01,
        optional=True,
        advanced=True,
        tooltip="Below 1 the clip in the latent is noised part of the way and made anew from there, as in a second "
        "pass; the steps are spent on that part.",
    )


def step_inputs() -> list:
    return [
        io.Int.Input("steps", default=50, min=1, max=1000, tooltip="Denoising steps."),
        io.Float.Input(
            "shift",
            default=5.0,
            min=0.1,
            max=100.0,
            step=0.1,
            advanced=True,
            tooltip="How much of the schedule is spent at high noise; higher is more.",
        ),
    ]


def preset_input(replaced: str) -> io.Combo.Input:
    """Last, and optional, so that workflows saved before it was there mean what they meant."""
    return io.Combo.Input(
        "preset",
        options=[CUSTOM, *(preset.label for preset in PRESETS.values())],
        default=CUSTOM,
        optional=True,
        tooltip=f"custom: as set above. 4 steps (distilled): for few-step checkpoints and LoRAs; {replaced}",
    )


def model_inputs() -> list:
    return [
        io.Model.Input("model", tooltip="From NAVA Load Backbone, with LoRAs if you like."),
        io.Conditioning.Input("positive", tooltip="From NAVA Encode Prompt."),
        io.Conditioning.Input(
            "negative",
            optional=True,
            tooltip="What to stay away from: a NAVA Encode Prompt with negative_terms. Left open it is the all-zero "
            "null of training, which the makers do not sample with.",
        ),
    ]


def read_guidance(settings: dict, to_sigma) -> Guidance:
    """Guidance from a node's widgets; ``to_sigma`` tells the noise level at a part (0..1) of the run."""
    intervals = {}
    for term, scales in TERMS.items():
        start, end = settings.pop(f"{term}_start"), settings.pop(f"{term}_end")
        if start > end:
            raise ValueError(f"{term}_start ({start:g}) is after {term}_end ({end:g}): give a start before the end.")
        highest = math.inf if start <= 0 else to_sigma(start)
        lowest = -math.inf if end >= 1 else to_sigma(end)
        intervals.update(dict.fromkeys(scales, (highest, lowest)))
    return Guidance(**settings, intervals=intervals)


class NavaGuider(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="NavaGuider",
            display_name="NAVA Guider",
            category=category("sampling"),
            description="NAVA's guidance by text, alignment and timbre, for SamplerCustomAdvanced. Starts and ends are "
            "parts of the model's own schedule (shift 5).",
            inputs=[
                *model_inputs(),
                *guidance_inputs(),
                preset_input("the conditional prediction alone, whatever is set above."),
            ],
            outputs=[io.Guider.Output()],
        )

    @classmethod
    def execute(cls, model, positive, negative=None, preset=CUSTOM, **settings) -> io.NodeOutput:
        to_sigma = model.get_model_object("model_sampling").percent_to_sigma
        guidance = read_guidance(settings, to_sigma) if preset == CUSTOM else find_preset(preset).guidance
        return io.NodeOutput(make_guider(model, positive, negative, guidance))


class NavaSigmas(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="NavaSigmas",
            display_name="NAVA Sigmas",
            category=category("sampling"),
            description="NAVA's own noise schedule, for SamplerCustomAdvanced.",
            inputs=[
                *step_inputs(),
                preset_input("its own 4 noise levels, for the stock euler sampler."),
                denoise_input(),
            ],
            outputs=[io.Sigmas.Output()],
        )

    @classmethod
    def execute(cls, steps, shift, preset=CUSTOM, denoise=1.0) -> io.NodeOutput:
        return io.NodeOutput(
            flow_sigmas(steps, shift, denoise) if preset == CUSTOM else find_preset(preset).sigmas(denoise)
        )


class NavaUniPC(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="NavaUniPC",
            display_name="NAVA UniPC",
            category=category("sampling"),
            description="The solver NAVA was released with, flow-matching UniPC of order 2, for SamplerCustomAdvanced.",
            inputs=[],
            outputs=[io.Sampler.Output()],
        )

    @classmethod
    def execute(cls) -> io.NodeOutput:
        return io.NodeOutput(unipc_sampler())


class NavaSampler(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="NavaSampler",
            display_name="NAVA Sampler",
            category=category("sampling"),
            description="Denoises a clip's picture and sound together, with NAVA's guidance, schedule and solver.",
            search_aliases=["ksampler", "sample"],
            inputs=[
                *model_inputs(),
                io.Latent.Input("latent", tooltip="From NAVA Empty Latent, with a first frame or other given parts."),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=0xFFFFFFFFFFFFFFFF,
                    control_after_generate=True,
                    tooltip="The noise that the clip is made from; another seed gives another clip.",
                ),
                *step_inputs(),
                *guidance_inputs(),
                preset_input("Euler on the conditional prediction alone, whatever is set above."),
                denoise_input(),
            ],
            outputs=[io.Latent.Output()],
        )

    @classmethod
    def execute(
        cls, model, positive, latent, seed, steps, shift, negative=None, preset=CUSTOM, denoise=1.0, **settings
    ) -> io.NodeOutput:
        if preset == CUSTOM:
            guidance = read_guidance(settings, partial(sigma_at, shift=shift))
            sampler, sigmas = unipc_sampler(), flow_sigmas(steps, shift, denoise)
        else:
            run = find_preset(preset)
            guidance, sampler, sigmas = run.guidance, euler_sampler(), run.sigmas(denoise)
        guider = make_guider(model, positive, negative, guidance)
        return io.NodeOutput(sample(guider, latent, seed, sampler, sigmas))


SAMPLING_NODES = [NavaSampler, NavaGuider, NavaSigmas, NavaUniPC]
