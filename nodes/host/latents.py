"""The host's latents of a clip: nested [video, audio], or packed to (B, 1, values) inside its samplers."""

from __future__ import annotations

import math

import comfy.model_management
import comfy.nested_tensor
import comfy.utils
import torch

from ...nava_core.geometry import (
    AUDIO_BINS,
    AUDIO_CHANNELS,
    AUDIO_LATENTS_PER_SECOND,
    FPS,
    LATENTS_PER_SECOND,
    VIDEO_CHANNELS,
    ClipGeometry,
    frames_of_latents,
)


def is_nested(latent) -> bool:
    return getattr(latent, "is_nested", False) and hasattr(latent, "unbind") and hasattr(latent, "tensors")


def shapes_of(latent_shapes, latent) -> list[tuple[int, ...]]:
    """Shapes of a latent's parts, as the host's sampler gave them or as the latent has them."""
    return [tuple(shape) for shape in (latent_shapes or [latent.shape])]


def absent_parts(shapes) -> list[bool]:
    """Which parts stand for a modality that the clip does not have: video of one value a channel, audio of one step."""
    video = tuple(shapes[0][2:]) == (1, 1, 1)
    return [video] + [shape[2] == 1 for shape in shapes[1:2]]


def check_shapes(shapes, config) -> None:
    """Raise ValueError, in a sentence, for a latent that is not this model's."""
    hint = "make one with the NAVA Empty Latent node"
    video = shapes[0]
    if len(video) != 5 or video[1] != config.vid_in_dim:
        raise ValueError(
            f"This latent is of another model: its picture part is {video}, NAVA's is "
            f"(batch, {config.vid_in_dim}, frames, height, width); {hint}."
        )
    if len(shapes) == 1:
        return
    audio = shapes[1]
    if len(shapes) > 2 or len(audio) != 4 or audio[1] * audio[3] != config.audio_in_dim:
        raise ValueError(
            f"This latent is of another model: its sound part is {audio}, NAVA's is "
            f"(batch, 8, steps, {config.audio_in_dim // 8}); {hint}."
        )
    if all(absent_parts(shapes)):
        raise ValueError(f"This latent has neither picture nor sound: {hint}.")


def audio_steps_of(frames, video_frames: int, audio_steps: int) -> list[int]:
    """The audio steps of the same time as these latent ``frames`` of a clip of ``video_frames``, in their order.

    A latent frame lasts 25/6 steps; the last one takes all that are left. Where there are none, the last step.
    """
    bounds = [round(frame * AUDIO_LATENTS_PER_SECOND / LATENTS_PER_SECOND) for frame in range(video_frames)]
    bounds = [min(bound, audio_steps) for bound in bounds] + [audio_steps]
    steps = [step for frame in frames for step in range(bounds[frame], bounds[frame + 1])]
    return steps or [audio_steps - 1]


def map_video(latent, function, latent_shapes):
    """``function`` on the video part of a latent: nested, packed (``latent_shapes`` then tell its parts), or alone."""
    if is_nested(latent):
        video, *rest = latent.unbind()
        return comfy.nested_tensor.NestedTensor([function(video), *rest])
    if latent.ndim == 5:
        return function(latent)
    if latent.ndim != 3:
        return latent  # the audio part alone
    values = sum(math.prod(shape[1:]) for shape in latent_shapes or [])
    if values != latent.shape[2]:
        raise ValueError(
            f"A packed latent of {latent.shape[2]} values came without the shapes of its parts "
            f"(the last run's had {values}): sample it with this model first."
        )
    video, *rest = comfy.utils.unpack_latents(latent, latent_shapes)
    return comfy.utils.pack_latents([function(video), *rest])[0]


def empty_latent(geometry: ClipGeometry, batch: int = 1) -> dict:
    """LATENT of zeros for a clip; an absent modality is one value a channel, or one step."""
    device = comfy.model_management.intermediate_device()
    video = torch.zeros(batch, *(geometry.latent_shape or (VIDEO_CHANNELS, 1, 1, 1)), device=device)
    audio = torch.zeros(batch, *(geometry.audio_shape or (AUDIO_CHANNELS, 1, AUDIO_BINS)), device=device)
    return {"samples": comfy.nested_tensor.NestedTensor([video, audio])}


def video_part(latent: dict) -> torch.Tensor:
    """The video latent (B, 48, T, H, W) of a LATENT; ValueError where it has none."""
    samples = latent["samples"]
    video = samples.unbind()[0] if is_nested(samples) else samples
    if video.ndim != 5 or absent_parts([video.shape])[0]:
        raise ValueError("This latent has no picture: it is of an audio-only clip, so leave the picture nodes out.")
    return video


def audio_part(latent: dict) -> torch.Tensor:
    """The audio latent (B, 8, L, 16) of a LATENT; ValueError where it has none."""
    samples = latent["samples"]
    audio = samples.unbind()[-1] if is_nested(samples) else samples
    if audio.ndim != 4 or audio.shape[2] == 1:
        raise ValueError("This latent has no sound: it is of a picture-only clip, so leave the sound nodes out.")
    return audio


def clip_parts(latent: dict) -> list[torch.Tensor | None]:
    """[video latent, audio latent] of a LATENT, None for one that it does not have."""
    parts = all_parts(latent)
    video = next((part for part in parts if part.ndim == 5 and not absent_parts([part.shape])[0]), None)
    audio = next((part for part in parts if part.ndim == 4 and part.shape[2] != 1), None)
    return [video, audio]


def clip_masks(latent: dict) -> list[torch.Tensor]:
    """The noise mask of each part of a LATENT's samples, fp32: (B, 1, T, H, W), (B, 1, L, 16); 1 where it has none."""
    parts, mask = all_parts(latent), latent.get("noise_mask")
    masks = [] if mask is None else (mask.unbind() if is_nested(mask) else [mask])
    masks = [*masks, *[None] * (len(parts) - len(masks))]
    return [_mask_of(part, mask) for part, mask in zip(parts, masks, strict=False)]


def _mask_of(part: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    shape = (part.shape[0], 1, *part.shape[2:])
    if mask is None:
        return torch.ones(shape)
    if mask.shape[2:] != shape[2:]:
        mask = comfy.utils.reshape_mask(mask, shape)
    return mask[:, :1].float().cpu().expand(shape).clone()


def with_parts(latent: dict, parts: list[torch.Tensor], masks: list[torch.Tensor] | None) -> dict:
    """The LATENT with these samples, a part each, and noise masks likewise; None leaves its mask alone."""
    nested = is_nested(latent["samples"])
    new = {"samples": comfy.nested_tensor.NestedTensor(parts) if nested else parts[0]}
    if masks is not None:
        new["noise_mask"] = comfy.nested_tensor.NestedTensor(masks) if nested else masks[0]
    return {**latent, **new}


def all_parts(latent: dict) -> list[torch.Tensor]:
    """A LATENT's samples, a part each, those that stand for an absent modality too."""
    samples = latent["samples"]
    return list(samples.unbind()) if is_nested(samples) else [samples]


def clip_length(latent: dict) -> float:
    """Exact seconds of a LATENT's clip: of its picture, or where it has none of its sound."""
    video, audio = clip_parts(latent)
    if video is not None:
        return frames_of_latents(video.shape[2]) / FPS
    return audio.shape[2] / AUDIO_LATENTS_PER_SECOND
