"""What of a clip comes out as it was given and not through a VAE, carried by its LATENT.

A LATENT is a dict, and other nodes copy what they do not know of it. They may also have cut, joined or sampled its
latents anew. So the latents that stand for the given parts are carried too, and an original is put in only where the
clip's latent still is the one that was made of it.
"""

from __future__ import annotations

import torch

from ...nava_core.geometry import PIXELS_PER_LATENT
from ...nava_core.given import Originals, steps_within
from .latents import clip_parts

ORIGINALS = "nava_originals"
STANDS_FOR = "nava_originals_of"  # [video latent, audio latent] of one clip


def with_originals(latent: dict, originals: Originals | None) -> dict:
    """The LATENT with ``originals`` of what its latents are now; the same for all clips of a batch."""
    if originals is None:
        return {name: value for name, value in latent.items() if name not in (ORIGINALS, STANDS_FOR)}
    parts = [None if part is None else part[:1].cpu() for part in clip_parts(latent)]
    return {**latent, ORIGINALS: originals, STANDS_FOR: parts}


def originals_of(latent: dict, clip: int = 0) -> Originals | None:
    """What of a LATENT's clip of this number is to come out as it was given; None where there is nothing."""
    originals = latent.get(ORIGINALS)
    if originals is None:
        return None
    video, audio = (None if part is None else part[clip : clip + 1].cpu() for part in clip_parts(latent))
    video_then, audio_then = latent.get(STANDS_FOR, (None, None))
    blocks = None if originals.frames is None else _same_blocks(video, video_then, originals.frames)
    spans = [span for span in originals.kept_sound if _is_same_sound(audio, audio_then, span)]
    return originals.within(None, spans, blocks)


def whole_picture(originals: Originals) -> torch.Tensor:
    """All frames (F, H, W, 3), fp32 in 0..1, of originals that have them all."""
    frames = originals.frames
    return frames.to(torch.float32).div_(255) if frames.dtype == torch.uint8 else frames.float()


def _same_blocks(video: torch.Tensor | None, then: torch.Tensor | None, frames: torch.Tensor) -> torch.Tensor:
    """(F, H / 16, W / 16) bool: where the clip's latent is the one that was given; nowhere if it has another size."""
    if video is None or then is None or video.shape != then.shape:
        count, height, width = frames.shape[:3]
        return torch.zeros(count, height // PIXELS_PER_LATENT, width // PIXELS_PER_LATENT, dtype=torch.bool)
    return frames_of((video == then).all(dim=1)[0])


def frames_of(latents: torch.Tensor) -> torch.Tensor:
    """(T, ...) of latent frames -> (F, ...) of the frames that they decode to."""
    return torch.cat([latents[:1], latents[1:].repeat_interleave(4, dim=0)])


def _is_same_sound(audio: torch.Tensor | None, then: torch.Tensor | None, span: tuple[float, float]) -> bool:
    if audio is None or then is None or audio.shape != then.shape:
        return False
    begin, end = span
    steps = steps_within(begin, end, audio.shape[2])
    return torch.equal(audio[:, :, steps], then[:, :, steps])
