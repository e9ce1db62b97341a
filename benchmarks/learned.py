"""A small network that has learnt a synthetic world, and what of that world can be read back from its latents.

Random weights show that code computes the right numbers; what an approximation does to picture and sound can only be
seen in a network that has learnt some. The network and its world are two files (``tests/golden``): the backbone in
NAVA's form, and the world's fixed vectors with 64 scenes (texts, voices, and what happens when). In the world a
ball of a colour bounces with a period; each bounce sounds in a material; it may rain; somebody may speak, with a mouth
that opens in the syllables' time and a voice that colours the sound. When the ball bounces is not in the text, nor
where: sound can only be in time by denoising picture and sound together. The world has no VAE: a latent frame is what
is seen at its instant.

Latents: video (scenes, 48, frames, 4, 6), audio (scenes, steps, 128). Phases are parts of a bounce's period, 0 to 1, at
the clip's beginning.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
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
FRAMES, STEPS = 13, 52  # of a scene: 2.04 s
TURN = 2.0  # seconds after which a scene that goes on speaks again
SPEECH, SPEECH_STARTS = 0.8, (0.0, 0.2, 1.0)  # seconds; none, early, late
BALL_SIZE = 0.98  # twice the square of its radius, in latents
BACKGROUND = 0.15
SIZE = (4, 6)
EVERY = slice(None)
Span = slice | list[int]
PER_SCENE = ("video", "audio", "context", "timbre", "timbre_positions")


@dataclass(frozen=True)
class World:
    """The vectors and scenes of the world's file, the first ``count`` scenes of it, with their true latents."""

    tensors: dict[str, Tensor]
    video_scale: float
    audio_scale: float

    @classmethod
    def read(cls, path: str | Path, count: int = 64) -> World:
        with safe_open(str(path), "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            metadata = file.metadata()
        world = cls(tensors, float(metadata["video_scale"]), float(metadata["audio_scale"]))
        if "video" not in tensors:
            tensors["video"], tensors["audio"] = world.rendered()
        return world.first(count)

    def first(self, count: int) -> World:
        return self._with(lambda tensor: tensor[:count])

    def repeated(self, times: int) -> World:
        """All scenes several times over: as many clips of each from noise of their own."""
        return self._with(lambda tensor: tensor.repeat(times, *[1] * (tensor.ndim - 1)))

    def without_text(self) -> World:
        """The same scenes told by nothing: the all-zero text, and no voices."""
        nothing = {"context": torch.zeros_like(self["context"])}
        nothing["timbre_positions"] = torch.full_like(self["timbre_positions"], -1)
        return replace(self, tensors=self.tensors | nothing)

    def _with(self, change) -> World:
        """The world with every scene's tensors changed."""
        changed = {
            name: change(tensor) if name in PER_SCENE or name.startswith("scene/") else tensor
            for name, tensor in self.tensors.items()
        }
        return replace(self, tensors=changed)

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name]

    def __len__(self) -> int:
        return len(self["context"])

    # --- the truth ---

    def rendered(self, frames: int = FRAMES, steps: int = STEPS) -> tuple[Tensor, Tensor]:
        """True (video, audio) latents of scenes of any length: who speaks does so again after every ``TURN``."""
        seconds, heard = frame_seconds(frames), step_seconds(steps)
        period = self["scene/period"]
        rows = (1 - self._heights(self._cycles(seconds, period, self["scene/phase"][:, None]))[:, 0]) * (SIZE[0] - 1)
        down = (torch.arange(SIZE[0])[:, None] - rows[..., None, None]).square()
        across = (torch.arange(SIZE[1]) - self["scene/x"][:, None, None, None]).square()
        ball = torch.exp(-(down + across) / BALL_SIZE)
        video = self["colour"][self["scene/colour"]][:, :, None, None, None] * ball[:, None]
        video = video + BACKGROUND * self["back"][:, None, None, None]
        video[:, :, :, 0, 0] += self["mouth"][:, None] * self.syllables(seconds)[:, None]
        struck = self._sounds(heard, period, self["scene/phase"][:, None])[:, 0, :, None]
        audio = 1.3 * struck * self["material"][self["scene/material"]][:, None]
        falls = 0.35 * (1 + 0.4 * torch.sin(9 * heard))[:, None] * self["rain"]
        audio = audio + self["scene/rain"][:, None, None] * falls
        voice = torch.tanh(self["scene/z"]) @ self["voice"]
        audio = audio + 0.63 * self.syllables(heard)[..., None] * voice[:, None]
        return video * self.video_scale, audio * self.audio_scale

    def syllables(self, seconds: Tensor) -> Tensor:
        """How far the mouth is open, 0 to 1, (scenes, times)."""
        since, speaks = self._speech(seconds)
        return torch.sin(math.pi * self["scene/rate"][:, None] * since).square() * speaks

    def _speech(self, seconds: Tensor) -> tuple[Tensor, Tensor]:
        """Seconds since the scene's speech began, and whether there is any: both (scenes, times)."""
        kind = self["scene/speech"][:, None]
        since = torch.remainder(seconds, TURN) - torch.tensor(SPEECH_STARTS)[kind]
        return since, (kind > 0) & (since >= 0) & (since < SPEECH)

    # --- the network's clips ---

    def sample(
        self, network, guidance: Guidance, steps: int = 20, seed: int = 0, *, sigmas: Tensor | None = None, **given
    ) -> tuple[Tensor, Tensor]:
        """The network's clips of all scenes, (video, audio) latents; the same noise for the same seed.

        ``given``: what else ``denoise`` takes (first frame, latents and masks); ``sigmas`` instead of ``steps``."""
        generator = torch.Generator().manual_seed(seed)
        noise = [torch.randn(self[name].shape, generator=generator) for name in ("video", "audio")]
        return denoise(
            network,
            *noise,
            context=self["context"],
            timbre=self["timbre"],
            timbre_positions=self["timbre_positions"],
            sigmas=flow_sigmas(steps, 5.0) if sigmas is None else sigmas,
            guidance=guidance,
            **given,
        )

    # --- what can be read back ---

    def measures(self, video: Tensor, audio: Tensor) -> dict[str, float]:
        """What clips show: shares of scenes whose ``colour``, ``material`` and ``rain`` are right; ``sync_ms``, the
        mean distance of the bounces seen and heard; ``lips``, the correlation of mouth and speech; ``voice``, the
        cosine of the voice heard and the one given."""
        shown = {
            "colour": self.colour_right(video).mean(),
            "material": self.material_right(audio).mean(),
            "rain": self.rain_right(audio).mean(),
        }
        shown = {name: round(value.item(), 4) for name, value in shown.items()}
        shown["sync_ms"] = round(self.apart_ms(self.seen_phase(video), self.heard_phase(audio)).mean().item(), 1)
        shown["lips"] = round(self.lips(video, audio).nanmean().item(), 4)
        shown["voice"] = round(self.voice_cosine(audio).nanmean().item(), 4)
        return shown

    # Each of the following gives (scenes,). Spans are slices or lists of latent frames or audio steps of the clip.

    def colour_right(self, video: Tensor, frames: Span = EVERY) -> Tensor:
        """1 where the ball has its scene's colour."""
        return (self._balls(video)[:, :, frames].sum((2, 3, 4)).argmax(1) == self["scene/colour"]).float()

    def material_right(self, audio: Tensor, steps: Span = EVERY) -> Tensor:
        loudest = self._struck(audio)[:, :, steps].clamp(min=0).amax(2)
        return (loudest.argmax(1) == self["scene/material"]).float()

    def rain_right(self, audio: Tensor, steps: Span = EVERY) -> Tensor:
        loud = (audio / self.audio_scale @ self["rain"])[:, steps].mean(1) / audio.shape[2]
        return ((loud > RAIN) == (self["scene/rain"] > 0)).float()

    def apart_ms(self, first: Tensor, second: Tensor) -> Tensor:
        """Time between two phases of the scenes' bounces, milliseconds: at most half a period."""
        apart = torch.remainder(first - second, 1)
        return 1000 * torch.minimum(apart, 1 - apart) * self["periods"][self["scene/period"]]

    def seen_phase(self, video: Tensor, frames: Span = EVERY) -> Tensor:
        """The phase whose bounce is nearest to the ball's height."""
        height = self.height(video)
        cycles = self._cycles(frame_seconds(height.shape[1]), self["scene/period"], _phases())[:, :, frames]
        return (self._heights(cycles) - height[:, None, frames]).square().mean(2).argmin(1) / PHASES

    def heard_phase(self, audio: Tensor, steps: Span = EVERY) -> Tensor:
        """The phase whose sounds correlate best with what is heard of the scene's material."""
        struck = _own(self._struck(audio), self["scene/material"])[:, steps]
        sounds = self._sounds(step_seconds(audio.shape[1]), self["scene/period"], _phases())[:, :, steps]
        sounds = sounds - sounds.mean(2, keepdim=True)
        return F.cosine_similarity(sounds, _centred(struck)[:, None], dim=2).argmax(1) / PHASES

    def place(self, video: Tensor, frames: Span = EVERY) -> Tensor:
        """The column where the ball bounces, in latents."""
        columns = self._ball(video)[:, frames].square().sum((1, 2))
        return columns @ torch.arange(SIZE[1], dtype=columns.dtype) / columns.sum(1).clamp(min=1e-6)

    def lips(self, video: Tensor, audio: Tensor, frames: Span = EVERY) -> Tensor:
        """Correlation of mouth and speech, NaN where nobody speaks. The sound is as long as the picture."""
        loud = self._voices(audio).norm(dim=2)[:, None]
        loud = F.interpolate(loud, video.shape[2], mode="linear", align_corners=True)[:, 0]
        mouth = self.mouth(video)
        return self._where_spoken(F.cosine_similarity(_centred(mouth[:, frames]), _centred(loud[:, frames]), dim=1))

    def lips_truth(self, video: Tensor, frames: Span = EVERY) -> Tensor:
        """Correlation of the mouth and the true syllables, NaN where nobody speaks."""
        wanted = self.syllables(frame_seconds(video.shape[2]))[:, frames]
        return self._where_spoken(F.cosine_similarity(_centred(self.mouth(video)[:, frames]), _centred(wanted), dim=1))

    def syllables_truth(self, video: Tensor) -> Tensor:
        """The same while somebody speaks and no longer: the text tells when that is, and not when the syllables are."""
        seconds = frame_seconds(video.shape[2])
        speaks = self._speech(seconds)[1].float()
        count = speaks.sum(1, keepdim=True).clamp(min=1)
        mouth, wanted = (
            (values - (values * speaks).sum(1, keepdim=True) / count) * speaks
            for values in (self.mouth(video), self.syllables(seconds))
        )
        return self._where_spoken(F.cosine_similarity(mouth, wanted, dim=1))

    def voice_cosine(self, audio: Tensor) -> Tensor:
        """Cosine of the voice heard and the one given, NaN where none is."""
        numbers = self._voices(audio)
        heard = (numbers * numbers.norm(dim=2, keepdim=True)).sum(1)
        cosine = F.cosine_similarity(heard, torch.tanh(self["scene/z"]), dim=1)
        return self._where_spoken(torch.where(self["scene/voiced"] > 0, cosine, torch.nan))

    def brightness(self, video: Tensor, frames: Span = EVERY) -> Tensor:
        """How bright the ball is, as a ratio to the truth's mean over whole bounces (a single frame's differs)."""
        true = self._ball(self["video"]).amax((2, 3)).mean(1)
        return self._ball(video)[:, frames].amax((2, 3)).mean(1) / true

    def sharpness(self, video: Tensor, frames: Span = EVERY) -> Tensor:
        """Energy of the picture's differences between neighbours, as a ratio to the truth's of whole scenes."""
        return _edges(video[:, :, frames]) / _edges(self["video"])

    def grain(self, video: Tensor, frames: Span = EVERY) -> Tensor:
        """Size of what in the picture is nothing of this world, relative to the whole picture."""
        seen = video[:, :, frames].flatten(2)
        basis = torch.cat([self["colour"], self["back"][None], self["mouth"][None]])
        return (seen - torch.linalg.pinv(basis) @ (basis @ seen)).norm(dim=(1, 2)) / seen.norm(dim=(1, 2))

    def jump(self, made: Tensor, true: Tensor, joints: list[int]) -> Tensor:
        """How far picture or sound goes from latent ``joint - 1`` to ``joint``, relative to the truth's mean."""
        dim = 2 if made.ndim == 5 else 1
        before = [joint - 1 for joint in joints]
        mine, wanted = (
            (x.movedim(dim, 1)[:, joints] - x.movedim(dim, 1)[:, before]).flatten(2).norm(dim=2).mean(1)
            for x in (made, true)
        )
        return mine / wanted.mean()

    # (scenes, frames)

    def height(self, video: Tensor) -> Tensor:
        """The ball's height, 0 to 1: the centre of what has its colour."""
        weight = self._ball(video).square().sum(3)
        rows = torch.arange(SIZE[0], dtype=weight.dtype)
        return 1 - (weight @ rows) / weight.sum(2).clamp(min=1e-6) / (SIZE[0] - 1)

    def mouth(self, video: Tensor) -> Tensor:
        """How far the mouth is open."""
        return torch.einsum("bct,c->bt", video[:, :, :, 0, 0], self["mouth"]) / self.video_scale / len(self["mouth"])

    def _balls(self, video: Tensor) -> Tensor:
        """What is seen of each colour, (scenes, colours, frames, rows, columns)."""
        video = video / self.video_scale - BACKGROUND * self["back"][:, None, None, None]
        ball = torch.einsum("bcthw,kc->bkthw", video, self["colour"])
        ball[:, :, :, 0, 0] = 0  # the mouth's place
        return ball.clamp(min=0)

    def _ball(self, video: Tensor) -> Tensor:
        return _own(self._balls(video), self["scene/colour"])

    def _struck(self, audio: Tensor) -> Tensor:
        """What is heard of each material, (scenes, materials, steps)."""
        return torch.einsum("blc,kc->bkl", audio / self.audio_scale, self["material"])

    def _voices(self, audio: Tensor) -> Tensor:
        """The voice's four numbers, (scenes, steps, 4)."""
        return audio / self.audio_scale @ torch.linalg.pinv(self["voice"])

    def _where_spoken(self, values: Tensor) -> Tensor:
        return torch.where(self["scene/speech"] > 0, values, torch.nan)

    def _cycles(self, seconds: Tensor, period: Tensor, phases: Tensor) -> Tensor:
        """Cycles of the bounce at each time for each phase, (scenes, phases, times)."""
        return seconds / self["periods"][period][:, None, None] + phases[..., None]

    @staticmethod
    def _heights(cycles: Tensor) -> Tensor:
        return torch.cos(math.pi * cycles).abs()

    def _sounds(self, seconds: Tensor, period: Tensor, phases: Tensor) -> Tensor:
        """How loud the bounces are, (scenes, phases, times)."""
        cycles = self._cycles(seconds, period, phases)
        since = torch.remainder(cycles - 0.5, 1) * self["periods"][period][:, None, None]
        return torch.exp(-since / DECAY) * (since < LENGTH)


class Apart(torch.nn.Module):
    """A network whose picture and sound do not see each other: what is in time by chance."""

    def __init__(self, network) -> None:
        super().__init__()
        self.network, self.dtype, self.config = network, network.dtype, network.config

    def forward(self, *args, cross_modal: bool = True, **more):
        return self.network(*args, cross_modal=False, **more)


def frame_seconds(count: int) -> Tensor:
    return torch.arange(count) / FRAME_RATE


def step_seconds(count: int) -> Tensor:
    return torch.arange(count) / AUDIO_RATE


def _phases() -> Tensor:
    return torch.arange(PHASES)[None] / PHASES


def _edges(video: Tensor) -> Tensor:
    """Mean energy of differences between neighbours, (scenes,)."""
    return sum(video.diff(dim=dim).square().mean((1, 2, 3, 4)) for dim in (3, 4))


def _own(by_kind: Tensor, kind: Tensor) -> Tensor:
    return by_kind[torch.arange(len(kind)), kind]


def _centred(values: Tensor) -> Tensor:
    return values - values.mean(1, keepdim=True)
