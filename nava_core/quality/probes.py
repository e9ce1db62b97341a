"""Inputs that a backbone's errors are measured on: noise, and the latents that the network itself makes of it."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..backbone import BackboneConfig
from ..geometry import ClipGeometry
from ..sampling import Guidance
from .streamed import Pass, StreamedBackbone

PROBE_CLIP = ClipGeometry(1.0, 160, 96)  # 105 video and 25 audio tokens: enough to measure on, and quick
SIGMAS = (0.9999, 0.7)  # pure noise, and where the picture is being decided
GUIDANCE = Guidance()  # the makers': errors of single predictions grow in their combination
PROMPT = (
    "A woman in a red coat stands on a pier at dusk while gulls circle above the water. She turns to the camera and "
    "says, calm and low: <S>The storm has passed.<E> Slow push in. Waves lap at the posts, gulls cry, a rope creaks."
)


@dataclass(frozen=True)
class Conditions:
    """What a clip is made from: text contexts (1, n, text_dim) of the prompt and the negative, and a voice
    (1, 1, speaker_dim) with its place in the context (1, 1)."""

    context: Tensor
    negative: Tensor
    timbre: Tensor
    timbre_positions: Tensor
    real: bool = True  # whether a text encoder made them


def encode_conditions(
    text_encoder: str | os.PathLike, config: BackboneConfig, tokenizer: str | os.PathLike | None = None
) -> Conditions:
    """Conditions of a prompt with speech and of the built-in negative, from a text encoder's file (see
    ``load_text_encoder`` for it, its ``tokenizer`` and what is raised)."""
    from ..components import load_text_encoder, load_tokenizer
    from ..prompt import default_negative

    tokenize = load_tokenizer(text_encoder, tokenizer)
    encoder = load_text_encoder(text_encoder)
    tokens = tokenize(PROMPT)
    context, negative = (encoder.encode(each.ids) for each in (tokens, tokenize(default_negative("video"))))
    positions = torch.tensor([[tokens.timbre_positions[0]]])
    return Conditions(context, negative, _voice(config), positions)


def null_conditions(config: BackboneConfig) -> Conditions:
    """The text null of training for prompt and negative, where there is no text encoder. Measured with it, layers come
    out in a rougher order; with random contexts, which no network has seen, in a useless one."""
    nothing = torch.zeros(1, 1, config.text_dim)
    return Conditions(nothing, nothing, _voice(config), torch.tensor([[config.text_len // 2]]), real=False)


def _voice(config: BackboneConfig) -> Tensor:
    return torch.randn(1, 1, config.speaker_dim, generator=torch.Generator().manual_seed(1))


@dataclass(frozen=True)
class Probe:
    """A noise level, and the passes of the predictions that guidance combines there, by their letters."""

    sigma: float
    passes: dict[str, Pass]

    def combine(self, predictions: dict[str, tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        """The guided (video, audio); linear, so that it combines differences as well."""
        return GUIDANCE.combine(predictions, self.sigma, has_voice=True)


@torch.no_grad()
def make_probes(
    backbone: StreamedBackbone,
    conditions: Conditions,
    clip: ClipGeometry = PROBE_CLIP,
    *,
    sigmas: Sequence[float] = SIGMAS,
    seed: int = 0,
    progress: Callable[[], None] | None = None,
) -> list[Probe]:
    """A probe a noise level, on the way that the network's own conditional prediction leads from noise; the file is
    read once for each level but the last. ``progress`` is called after each block."""
    generator = torch.Generator().manual_seed(seed)
    video = torch.randn(1, *clip.latent_shape, generator=generator)
    audio = torch.randn(1, clip.audio_tokens, backbone.config.audio_in_dim, generator=generator)
    probes = []
    for index, sigma in enumerate(sigmas):
        probes.append(Probe(sigma, _passes(video, audio, sigma, conditions)))
        if index + 1 < len(sigmas):
            velocities = backbone.run([probes[-1].passes["c"]], progress)[0]
            step = sigmas[index + 1] - sigma
            video, audio = (x + step * v.cpu() for x, v in zip((video, audio), velocities, strict=True))
    return probes


def _passes(video: Tensor, audio: Tensor, sigma: float, conditions: Conditions) -> dict[str, Pass]:
    common = {"video": video, "audio": audio, "timestep": torch.tensor([float(int(1000 * sigma))])}
    voice = {"timbre": conditions.timbre, "timbre_positions": conditions.timbre_positions}
    return {
        "c": {**common, "context": conditions.context, **voice},
        "u": {**common, "context": conditions.negative},
        "m": {**common, "context": conditions.context, "cross_modal": False},
        "n": {**common, "context": conditions.context},
    }
