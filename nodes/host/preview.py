"""Previews on hosts that hand the sampling callback the packed latent (ComfyUI 0.18)."""

from __future__ import annotations

import math

import torch


class PackedVideo(torch.Tensor):
    """A packed latent (B, 1, values) that shows whoever looks into it its video part.

    The host's callback both keeps the tensor (for the denoised output, which it unpacks itself) and indexes it for the
    preview, which expects video: indexing and ``ndim`` are the video's, all else is the packed tensor's.
    """

    __torch_function__ = torch._C._disabled_torch_function_impl
    video_shape: tuple[int, ...]

    @property
    def video(self) -> torch.Tensor:
        packed = self.as_subclass(torch.Tensor)
        values = packed.flatten(1)[:, : math.prod(self.video_shape[1:])]
        return values.reshape(values.shape[0], *self.video_shape[1:])

    @property
    def ndim(self) -> int:
        return len(self.video_shape)

    def __getitem__(self, index):
        return self.video[index]

    def cpu(self, *args, **kwargs) -> torch.Tensor:
        return self.as_subclass(torch.Tensor).cpu(*args, **kwargs)


def video_first(callback, shapes):
    """``callback(step, x0, x, steps)`` with x0 as a :class:`PackedVideo` of a latent of these shapes."""

    def wrapped(step, x0, x, total_steps):
        x0 = x0.as_subclass(PackedVideo)
        x0.video_shape = tuple(shapes[0])
        return callback(step, x0, x, total_steps)

    return wrapped
