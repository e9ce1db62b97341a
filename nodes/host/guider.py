"""NAVA's guidance as the host's GUIDER, and the one-node run of the same parts."""

from __future__ import annotations

import logging
from dataclasses import replace

import comfy.model_management
import comfy.nested_tensor
import comfy.sample
import comfy.samplers
import comfy.utils
import latent_preview
import torch

from ...nava_core.media import LATENTS_STAGE, check_finite
from ...nava_core.sampling import FlowUniPC, Guidance
from .latents import absent_parts, is_nested
from .model import CROSS_MODAL, TIMBRE, TIMBRE_POSITIONS, WHOLE_TIMESTEPS, NavaModel

# The predictions by the letters of nava_core.sampling.guidance, and the names the host keeps their conditions under.
PREDICTIONS = {"c": "positive", "u": "negative", "m": "alignment_null", "n": "timbre_null"}


class NavaGuider(comfy.samplers.CFGGuider):
    """Guidance from up to four predictions, handed to the host together so that it may batch or spread them."""

    def __init__(self, model_patcher, guidance: Guidance):
        super().__init__(model_patcher)
        self.guidance = guidance
        self.cfg = None  # the stock CFG Override node sets it for the steps that it acts in
        self._warned = False

    def set_conds(self, positive, negative=None):
        """Conditionings as ComfyUI has them; without ``negative`` the text null is the all-zero context."""
        if negative is None:
            negative = [[None, {}]]
        voiced = [extra for _, extra in positive if extra.get(TIMBRE) is not None]
        self.has_voice = bool(voiced)
        like = voiced[0] if voiced else None
        text_only = [[context, _without_voices(extra, like)] for context, extra in positive]
        self.inner_set_conds(
            {
                "positive": positive,
                "negative": [[context, _without_voices(extra, like)] for context, extra in negative],
                "alignment_null": [[context, {**extra, CROSS_MODAL: False}] for context, extra in text_only],
                "timbre_null": text_only,
            }
        )

    def _warn_of_unused_patches(self, model_options) -> None:
        found = [name for name in UNUSED_PATCHES if model_options.get(name)]
        if found and not self._warned:
            self._warned = True
            logging.warning("NAVA's guidance does not use %s of this MODEL: use a stock guider.", ", ".join(found))

    def _guidance(self, joint: bool) -> Guidance:
        """The guidance; where CFG Override acts, with text terms as those of stock CFG, u + cfg (c - u)."""
        if self.cfg is None:
            return self.guidance
        weight = max(float(self.cfg) - 1.0, 0.0)
        # A scale of 1 is no weight where the formula starts from u, 0 where it starts from c.
        video = 0.0 if self.guidance.alignment and joint else 1.0
        audio = 0.0 if self.has_voice and self.guidance.audio_timbre > 0 else video
        always = {term: span for term, span in self.guidance.intervals.items() if not term.endswith("_text")}
        return replace(self.guidance, video_text=weight + video, audio_text=weight + audio, intervals=always)

    def predict_noise(self, x, timestep, model_options=None, seed=None):
        model_options = {} if model_options is None else model_options
        model = self.inner_model
        self._warn_of_unused_patches(model_options)
        shapes = model.latent_shapes
        gone = absent_parts(shapes)
        sigma = float(timestep.flatten()[0])
        has_video, has_audio = not gone[0], len(gone) > 1 and not gone[1]
        guidance = self._guidance(has_video and has_audio).making(*model.made)
        needed = guidance.needed(sigma, self.has_voice, has_video, has_audio)
        conds = [self.conds[PREDICTIONS[name]] for name in needed]
        predictions = comfy.samplers.calc_cond_batch(model, conds, x, timestep, model_options)
        # The guidance formulas' weights add up to one, so they hold for denoised latents as for velocities.
        pairs = {
            name: _modalities(prediction, shapes, gone) for name, prediction in zip(needed, predictions, strict=True)
        }
        combined = guidance.combine(pairs, sigma, self.has_voice)
        parts = comfy.utils.unpack_latents(predictions[0], shapes)
        parts = [part if new is None else new for part, new in zip(parts, combined, strict=False)]
        denoised = comfy.utils.pack_latents(parts)[0] if len(parts) > 1 else parts[0]
        return _post_cfg(denoised, x, timestep, dict(zip(needed, predictions, strict=True)), self, model_options)


# What other nodes hang before or in place of plain CFG: there is no place for it among four predictions.
UNUSED_PATCHES = ("sampler_cfg_function", "sampler_pre_cfg_function", "sampler_calc_cond_batch_function")


def _without_voices(extra: dict, like: dict | None) -> dict:
    """A conditioning's extras with no voice in use; in the form of ``like``'s, so that both can share a batch."""
    extra = {key: value for key, value in extra.items() if key not in (TIMBRE, TIMBRE_POSITIONS)}
    if like is None:
        return extra
    unused = torch.full_like(like[TIMBRE_POSITIONS], -1)
    return {**extra, TIMBRE: torch.zeros_like(like[TIMBRE]), TIMBRE_POSITIONS: unused}


def _modalities(prediction, shapes, gone):
    """A packed prediction as (video | None, audio | None)."""
    parts = comfy.utils.unpack_latents(prediction, shapes)
    parts = [None if missing else part for part, missing in zip(parts, gone, strict=True)]
    return tuple([*parts, None][:2])


def _post_cfg(denoised, x, timestep, predictions, guider, model_options):
    """What other nodes hang behind guidance (``sampler_post_cfg_function``)."""
    conds = guider.conds
    for function in model_options.get("sampler_post_cfg_function", []):
        denoised = function(
            {
                "denoised": denoised,
                "cond": conds["positive"],
                "uncond": conds["negative"],
                "cond_scale": guider.guidance.video_text,
                "model": guider.inner_model,
                "uncond_denoised": predictions.get("u"),
                "cond_denoised": predictions["c"],
                "sigma": timestep,
                "model_options": model_options,
                "input": x,
            }
        )
    return denoised


def unipc_sampler():
    """The makers' solver as the host's SAMPLER."""
    return comfy.samplers.KSAMPLER(_sample_unipc)


def _sample_unipc(model, x, sigmas, extra_args=None, callback=None, disable=None):
    solver = FlowUniPC(sigmas)
    ones = x.new_ones([x.shape[0]])
    extra_args = _with_whole_timesteps(extra_args or {})
    for index in range(len(sigmas) - 1):
        denoised = model(x, sigmas[index] * ones, **extra_args)
        if callback is not None:
            callback({"x": x, "i": index, "sigma": sigmas[index], "sigma_hat": sigmas[index], "denoised": denoised})
        x = solver.step_denoised(denoised, x)
    return x


def _with_whole_timesteps(extra_args: dict) -> dict:
    options = extra_args.get("model_options", {})
    whole = {**options.get("transformer_options", {}), WHOLE_TIMESTEPS: True}
    return {**extra_args, "model_options": {**options, "transformer_options": whole}}


def euler_sampler():
    """The host's own Euler, which few-step checkpoints are sampled with, as a SAMPLER."""
    return comfy.samplers.sampler_object("euler")


def make_guider(model, positive, negative, guidance: Guidance) -> NavaGuider:
    """A guider over a NAVA MODEL; raises ValueError in a sentence for a MODEL of another kind."""
    if not isinstance(model.model, NavaModel):
        raise ValueError(
            f"This MODEL is a {type(model.model).__name__}, not NAVA: connect the one from the NAVA Load Backbone node."
        )
    guider = NavaGuider(model, guidance)
    guider.set_conds(positive, negative)
    return guider


def _callback(patcher, samples, steps: int):
    """The host's progress and previews; for a clip of sound alone, progress: its picture is one pixel."""
    if not is_nested(samples) or not absent_parts([part.shape for part in samples.unbind()])[0]:
        return latent_preview.prepare_callback(patcher, steps)
    bar = comfy.utils.ProgressBar(steps)
    return lambda step, x0, x, total_steps: bar.update_absolute(step + 1, total_steps)


def sample(guider, latent: dict, seed: int, sampler, sigmas) -> dict:
    """One run, with the host's noise, previews, progress and interruption: LATENT in, LATENT out."""
    samples = latent["samples"]
    noise = comfy.sample.prepare_noise(samples, seed, latent.get("batch_index"))
    callback = _callback(guider.model_patcher, samples, sigmas.shape[-1] - 1)
    result = guider.sample(
        noise,
        samples,
        sampler,
        sigmas,
        denoise_mask=latent.get("noise_mask"),
        callback=callback,
        disable_pbar=not comfy.utils.PROGRESS_BAR_ENABLED,
        seed=seed,
    )
    for part in result.unbind() if is_nested(result) else [result]:
        check_finite(part, LATENTS_STAGE)
    return {**latent, "samples": result.to(comfy.model_management.intermediate_device())}
