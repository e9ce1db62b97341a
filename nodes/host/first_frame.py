"""A picture as the given first frame of a clip."""

from __future__ import annotations

import comfy.nested_tensor
import comfy.utils
import torch

from ...nava_core.geometry import PIXELS_PER_LATENT, choose_bucket, cover_crop
from .latents import is_nested, video_part
from .video_vae import encode_video


def set_first_frame(latent: dict, image: torch.Tensor, vae, scale: int | None) -> tuple[dict, torch.Tensor, str]:
    """(LATENT with frame 0 given, the picture as it was used (1, H, W, 3), a sentence on scale and crop).

    ``image``: IMAGE (1 or batch, H, W, C). ``scale`` gives the clip the size of that scale's bucket nearest to the
    picture's proportions instead of the latent's own (None); its latent must then be empty. Raises ValueError for an
    audio-only latent, several pictures for fewer clips, and a latent that would lose given parts.
    Run on ComfyUI 0.18.1 and 0.33.0.
    """
    video = video_part(latent)
    if image.shape[0] not in (1, video.shape[0]):
        raise ValueError(
            f"{image.shape[0]} pictures were given for {video.shape[0]} clip(s): give one, or one for each clip."
        )
    height, width = image.shape[1:3]
    if scale is not None:
        video = _resized(latent, video, choose_bucket(width, height, scale))
    size = (video.shape[4] * PIXELS_PER_LATENT, video.shape[3] * PIXELS_PER_LATENT)
    scaled, box = cover_crop(width, height, *size)
    fitted = _fit(image, scaled, box)
    frames = torch.cat([encode_video(vae, picture[None]) for picture in fitted]).to(video)
    video = video.clone()
    video[:, :, :1] = frames
    result = {**latent, "samples": _with_video(latent["samples"], video), "noise_mask": _mask(latent, video)}
    return result, fitted, _report((width, height), scaled, size)


def _resized(latent: dict, video: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """An empty video latent of ``size`` in place of an empty one."""
    shape = (*video.shape[:3], size[1] // PIXELS_PER_LATENT, size[0] // PIXELS_PER_LATENT)
    if tuple(video.shape) == shape:
        return video
    if latent.get("noise_mask") is not None or torch.count_nonzero(video):
        raise ValueError(
            "The size of this latent cannot follow the picture, for parts of it are given already: "
            "set the size to the latent's own."
        )
    return video.new_zeros(shape)


def _fit(image: torch.Tensor, scaled: tuple[int, int], box: tuple[int, int, int, int]) -> torch.Tensor:
    left, top, right, bottom = box
    pixels = comfy.utils.common_upscale(image[..., :3].movedim(-1, 1), *scaled, "lanczos", "disabled")
    return pixels[:, :, top:bottom, left:right].movedim(1, -1)


def _with_video(samples, video: torch.Tensor):
    if not is_nested(samples):
        return video
    return comfy.nested_tensor.NestedTensor([video, *samples.unbind()[1:]])


def _mask(latent: dict, video: torch.Tensor):
    """The latent's noise mask with frame 0 given: 0 where given, 1 where generated."""
    batch, _, frames, height, width = video.shape
    old = latent.get("noise_mask")
    parts = [] if old is None else (old.unbind() if is_nested(old) else [old])
    shape = (batch, 1, frames, height, width)
    mask = torch.ones(shape)
    if parts:
        mask *= comfy.utils.reshape_mask(parts[0], video.shape)[:, :1].to(mask)
    mask[:, :, 0] = 0
    samples = latent["samples"]
    if not is_nested(samples):
        return mask
    audio = samples.unbind()[1]
    rest = parts[1] if len(parts) > 1 else torch.ones(audio.shape[0], 1, *audio.shape[2:])
    return comfy.nested_tensor.NestedTensor([mask, rest])


def _report(source, scaled, size) -> str:
    cut = [f"{(a - b)} px of {name}" for a, b, name in zip(scaled, size, ("width", "height"), strict=True) if a > b]
    cropped = f", cropped by {' and '.join(cut)}" if cut else ", nothing cropped"
    return (
        f"{source[0]}x{source[1]} scaled to {scaled[0]}x{scaled[1]}"
        f" ({scaled[0] / source[0]:.2f}x){cropped}: the clip is {size[0]}x{size[1]}."
    )
