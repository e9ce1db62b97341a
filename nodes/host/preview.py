"""Previews on hosts that hand the sampling callback the packed latent (ComfyUI 0.18)."""

from __future__ import annotations

import comfy.utils
import torch


class VideoOfPacked(torch.Tensor):
    """The video part (B, 48, T, H, W) of a packed latent, which comes back whole from ``cpu()``.

    The host's callback does two things with its tensor: it looks into it for the preview, whatever previewer there is,
    which expects video; and it keeps it for the denoised output, of which the host takes ``cpu()`` and unpacks it.
    """

    __torch_function__ = torch._C._disabled_torch_function_impl
    packed: torch.Tensor

    def cpu(self, *args, **kwargs) -> torch.Tensor:
        return self.packed.cpu(*args, **kwargs)


def video_first(callback, shapes):
    """``callback(step, x0, x, steps)`` with x0 as a :class:`VideoOfPacked` of a latent of these shapes."""

    def wrapped(step, x0, x, total_steps):
        video = comfy.utils.unpack_latents(x0, shapes)[0].as_subclass(VideoOfPacked)
        video.packed = x0
        return callback(step, video, x, total_steps)

    return wrapped
