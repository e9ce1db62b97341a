"""A small network that has learnt a synthetic world, and what of that world can be read back from its latents.

Random weights show that code computes the right numbers; what an approximation does to picture and sound can only be
seen in a network that has learnt some. The network and its world are two files that are no part of this repository:
the backbone in NAVA's form, and the world's fixed vectors with 64 scenes (texts, voices, true latents). In the world a
ball of a colour bounces with a period; each bounce sounds in a material; it may rain; somebody may speak, with a mouth
that opens in the syllables' time and a voice that colours the sound. When the ball bounces is not in the text: sound
can only be in time by denoising picture and sound together.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor

from nava_core import Guidance, denoise, flow_sigmas

FRAME_RATE, AUDIO_RATE = 6.0, 25.0  # latents a second
PHASES = 40  # tried, of a bounce
DECAY, LENGTH = 0.06, 0.24  # of a bounce's sound, seconds
RAIN = 0.175  # of its full loudness: above it, it rains


@dataclass(frozen=True)
class World:
    """The vectors, scenes and true latents of the world's file, the first ``count`` scenes of it."""

    tensors: dict[str, Tensor]
    video_scale: float
    audio_scale: float

    @classmethod
    def read(cls, path: str | Path, count: int = 64) -> World:
        with safe_open(str(path), "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            metadata = file.metadata()
        scenes = len(tensors["video"])
        per_scene = {name for name in tensors if name.startswith("scene/") or len(tensors[name]) == scenes}
        cut = {name: tensor[:count] if name in per_scene else tensor for name, tensor in tensors.items()}
        return cls(cut, float(metadata["video_scale"]), float(metadata["audio_scale"]))

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name]

    def sample(self, network, guidance: Guidance, steps: int = 20, seed: int = 0) -> tuple[Tensor, Tensor]:
        """The network's clips of all scenes, (video, audio) latents; the same noise for the same seed."""
        generator = torch.Generator().manual_seed(seed)
        noise = [torch.randn(self[name].shape, generator=generator) for name in ("video", "audio")]
        return denoise(
            network,
            *noise,
            context=self["context"],
            timbre=self["timbre"],
            timbre_positions=self["timbre_positions"],
            sigmas=flow_sigmas(steps, 5.0),
            guidance=guidance,
        )

    def measures(self, video: Tensor, audio: Tensor) -> dict[str, float]:
        """What clips show: shares of scenes whose ``colour``, ``material`` and ``rain`` are right; ``sync_ms``, the
        mean distance of the bounces seen and heard; ``lips``, the correlation of mouth and speech; ``voice``, the
        cosine of the voice heard and the one given."""
        video, audio = video / self.video_scale, audio / self.audio_scale
        colour, material, period = (self[f"scene/{name}"] for name in ("colour", "material", "period"))
        ball = torch.einsum("bcthw,kc->bkthw", video - 0.15 * self["back"][:, None, None, None], self["colour"])
        ball[:, :, :, 0, 0] = 0  # the mouth's place
        ball = ball.clamp(min=0)
        struck = torch.einsum("blc,kc->bkl", audio, self["material"])
        falls = (audio @ self["rain"]).mean(1) / audio.shape[2] > RAIN
        seen = self._seen_phase(_own(ball, colour), period)
        heard = self._heard_phase(_own(struck, material), period)
        apart = (seen - heard).abs()
        seconds = torch.minimum(apart, 1 - apart) * self["periods"][period]
        lips, voice = self._speech(video, audio)
        return {
            "colour": _share(ball.sum((2, 3, 4)).argmax(1) == colour),
            "material": _share(struck.clamp(min=0).amax(2).argmax(1) == material),
            "rain": _share(falls == (self["scene/rain"] > 0)),
            "sync_ms": round(1000 * seconds.mean().item(), 1),
            "lips": round(lips.mean().item(), 4),
            "voice": round(voice.mean().item(), 4),
        }

    def _seen_phase(self, ball: Tensor, period: Tensor) -> Tensor:
        """The phase whose bounce is nearest to the ball's height: the centre of what has its colour, (scenes,)."""
        weight = ball.square().sum(3)
        rows = torch.arange(ball.shape[2], dtype=weight.dtype)
        height = 1 - (weight @ rows) / weight.sum(2).clamp(min=1e-6) / (ball.shape[2] - 1)
        templates = self._cycles(height.shape[1], FRAME_RATE, period)
        wanted = torch.cos(math.pi * templates).abs()
        return (wanted - height[:, None]).square().mean(2).argmin(1) / PHASES

    def _heard_phase(self, struck: Tensor, period: Tensor) -> Tensor:
        """The phase whose sounds correlate best with what is heard of the scene's material, (scenes,)."""
        templates = self._cycles(struck.shape[1], AUDIO_RATE, period)
        since = torch.remainder(templates - 0.5, 1) * self["periods"][period][:, None, None]
        sounds = torch.exp(-since / DECAY) * (since < LENGTH)
        sounds = sounds - sounds.mean(2, keepdim=True)
        centred = (struck - struck.mean(1, keepdim=True))[:, None]
        return F.cosine_similarity(sounds, centred, dim=2).argmax(1) / PHASES

    def _cycles(self, count: int, rate: float, period: Tensor) -> Tensor:
        """Cycles of the bounce at each latent for each phase, (scenes, phases, count)."""
        seconds = torch.arange(count) / rate
        return seconds / self["periods"][period][:, None, None] + torch.arange(PHASES)[:, None] / PHASES

    def _speech(self, video: Tensor, audio: Tensor) -> tuple[Tensor, Tensor]:
        """Correlation of mouth and speech of the scenes that have any, and cosine of the voices of those with one."""
        speaks = self["scene/speech"] > 0
        mouth = torch.einsum("bct,c->bt", video[:, :, :, 0, 0], self["mouth"])
        numbers = audio @ torch.linalg.pinv(self["voice"])
        loud = numbers.norm(dim=2)
        at_frames = F.interpolate(loud[:, None], mouth.shape[1], mode="linear", align_corners=True)[:, 0]
        lips = F.cosine_similarity(_centred(mouth), _centred(at_frames), dim=1)[speaks]
        heard = (numbers * loud[..., None]).sum(1)
        voice = F.cosine_similarity(heard, torch.tanh(self["scene/z"]), dim=1)
        return lips, voice[speaks & (self["scene/voiced"] > 0)]


def _own(by_kind: Tensor, kind: Tensor) -> Tensor:
    return by_kind[torch.arange(len(kind)), kind]


def _centred(values: Tensor) -> Tensor:
    return values - values.mean(1, keepdim=True)


def _share(right: Tensor) -> float:
    return round(right.float().mean().item(), 4)
