"""Given parts of a LATENT: sound, pictures, and all but a span of a finished clip."""

from __future__ import annotations


def give_sound(latent, audio, audio_vae, shown, **part):
    raise NotImplementedError


def give_frames(latent, images, vae, at, fps, shown, keep):
    raise NotImplementedError


def retake(latent, span, parts, shown, mask=None, frames=None, audio=None):
    raise NotImplementedError
