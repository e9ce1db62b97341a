"""Longer clips in segments: the next one's beginning, and both joined."""

from __future__ import annotations


def continue_clip(frames, latent, vae, hold, **sound):
    raise NotImplementedError


def join_clips(frames, next_frames, audio=None, next_audio=None, **sound):
    raise NotImplementedError
