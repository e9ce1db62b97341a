"""Previews on hosts that hand the sampling callback the packed latent (ComfyUI 0.18 to 0.29)."""

from __future__ import annotations

from functools import cache

import comfy.model_patcher
import comfy.nested_tensor
import comfy.samplers
import comfy.utils
import torch

from .latents import is_nested


@cache
def host_unpacks() -> bool:
    """Whether the host hands sampling callbacks the nested latent (ComfyUI from 0.30 on), by what arrives at one.

    By the time that a wrapper sees a callback it cannot be told from outside whether the host has put its own around
    it, so the host's guider runs once here, over an empty model and a sampler that does nothing but call back.
    """
    arrived = []

    class CallsBack(comfy.samplers.CFGGuider):
        def outer_sample(self, noise, latent_image, sampler, sigmas, denoise_mask=None, callback=None, *_, **__):
            callback(0, latent_image, latent_image, 1)
            return latent_image

    cpu = torch.device("cpu")
    guider = CallsBack(comfy.model_patcher.ModelPatcher(torch.nn.Module(), cpu, cpu))
    guider.set_conds([], [])
    latent = comfy.nested_tensor.NestedTensor([torch.zeros(1, 1, 2, 1, 1), torch.zeros(1, 1, 2, 1)])
    sigmas = torch.tensor([1.0, 0.0])
    guider.sample(latent, latent, None, sigmas, callback=lambda step, x0, x, steps: arrived.append(x0))
    return is_nested(arrived[0])


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
