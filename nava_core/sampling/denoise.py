"""The denoising loop without a host: from noise to the clip's video and audio latents."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from ..explain import is_out_of_memory
from ..given.masks import clean_steps, kept, made_steps
from .euler import FlowEuler
from .guidance import Guidance, Pair
from .unipc import FlowUniPC

NOTHING_TO_MAKE = (
    "All of this clip is given, so there is nothing to make: leave a part of its picture or sound out of what is given."
)


class Interrupted(RuntimeError):  # noqa: N818 - it is no error that the caller asked for
    """The caller's ``should_stop`` asked for the run to end."""


@dataclass(frozen=True)
class Condition:
    """What one prediction is conditioned on."""

    context: torch.Tensor  # (B or 1, n, text_dim)
    timbre: torch.Tensor | None = None  # (B or 1, S, 192)
    timbre_positions: torch.Tensor | None = None  # (B or 1, S)
    cross_modal: bool = True


def conditions(
    context: torch.Tensor,
    negative: torch.Tensor | None = None,
    timbre: torch.Tensor | None = None,
    timbre_positions: torch.Tensor | None = None,
) -> dict[str, Condition]:
    """The conditions of the predictions c, u, m and n; without ``negative`` u has the all-zero context."""
    if (timbre is None) != (timbre_positions is None):
        raise ValueError("Reference voices and their positions in the context must be given together.")
    if negative is None:
        # The network pads its context with zeros, so one row of them is the all-zero context.
        negative = torch.zeros_like(context[:1, :1])
    text_only = Condition(context)
    return {
        "c": replace(text_only, timbre=timbre, timbre_positions=timbre_positions),
        "u": Condition(negative),
        "m": replace(text_only, cross_modal=False),
        "n": text_only,
    }


@dataclass
class Modality:
    """One modality on its way through the loop: noise, whose frames or steps lie along ``steps_dim``.

    ``latent`` is what the clip starts from (zeros where None); ``mask``, broadcastable to it, is 1 where the clip is
    made, and CLEAN or NOISED where ``latent`` is kept: see :mod:`nava_core.given.masks`.
    """

    noise: torch.Tensor
    steps_dim: int
    latent: torch.Tensor | None = None
    mask: torch.Tensor | None = None

    def __post_init__(self) -> None:
        self.noise = self.noise.float()
        like = {"device": self.noise.device, "dtype": torch.float32}
        latent = torch.zeros((), **like) if self.latent is None else self.latent.to(**like)
        self.latent = latent.expand_as(self.noise)
        self.clean = self.made = None  # (B, steps) bool
        if self.mask is None:
            return
        mask = self.mask.to(**like)
        broadcast = mask.expand_as(self.noise)
        self.clean, self.made = clean_steps(broadcast, self.steps_dim), made_steps(broadcast, self.steps_dim)
        self.mask = kept(mask).expand_as(self.noise)

    @property
    def is_made(self) -> bool:
        """Whether anything of it is to be made."""
        return self.made is None or bool(self.made.any())

    def start(self, sigma: float) -> torch.Tensor:
        """The sample at the first noise level."""
        return sigma * self.noise + (1.0 - sigma) * self.latent

    def known(self, sample: torch.Tensor, sigma: float) -> torch.Tensor:
        """``sample`` with the given parts as the network is to see them: whole clean frames and steps as they are, all
        else at the sample's own noise level."""
        if self.mask is None:
            return sample
        given = torch.where(self._over_sample(self.clean), self.latent, self.start(sigma))
        return self.mask * sample + (1.0 - self.mask) * given

    def keep(self, sample: torch.Tensor) -> torch.Tensor:
        """``sample`` with the given parts put back, exactly where the mask keeps them."""
        if self.mask is None:
            return sample
        return self.mask * sample + (1.0 - self.mask) * self.latent

    def timesteps(self, timestep: float) -> torch.Tensor:
        """(B,), or (B, steps) where some of it is given: clean frames and audio steps are at 0."""
        if self.clean is None:
            return torch.full(self.noise.shape[:1], float(timestep), device=self.noise.device)
        return (~self.clean).float() * timestep

    def _over_sample(self, steps: torch.Tensor) -> torch.Tensor:
        """(B, steps), broadcastable to the sample."""
        shape = [1] * self.noise.ndim
        shape[0], shape[self.steps_dim] = steps.shape
        return steps.reshape(shape)


@torch.no_grad()
def denoise(
    backbone: Callable[..., Pair],
    video_noise: torch.Tensor | None,
    audio_noise: torch.Tensor | None,
    context: torch.Tensor,
    *,
    sigmas: torch.Tensor,
    guidance: Guidance | None = None,
    negative: torch.Tensor | None = None,
    timbre: torch.Tensor | None = None,
    timbre_positions: torch.Tensor | None = None,
    first_frame: torch.Tensor | None = None,
    video_latent: torch.Tensor | None = None,
    video_mask: torch.Tensor | None = None,
    audio_latent: torch.Tensor | None = None,
    audio_mask: torch.Tensor | None = None,
    sampler: Callable[[torch.Tensor], FlowUniPC | FlowEuler] = FlowUniPC,
    batch_predictions: bool = False,
    callback: Callable[[int, int, torch.Tensor | None, torch.Tensor | None], None] | None = None,
    should_stop: Callable[[], bool] | None = None,
    on_out_of_memory: Callable[[], bool] | None = None,
) -> Pair:
    """Denoise a clip to its (video, audio) latents in the network's space, fp32, None for an absent one.

    video_noise (B, 48, T, H, W) and audio_noise (B, L, 128), one of them may be None; context (B or 1, n,
    text_dim), in the dtype that the network is to be run in; ``negative`` likewise, None for the all-zero
    context the model was trained with; ``timbre`` (B or 1, S, 192) goes into the context at
    ``timbre_positions`` (B or 1, S). ``sigmas`` (steps + 1,) as ``flow_sigmas`` makes them; the sample starts
    as sigma_0 * noise + (1 - sigma_0) * latent.

    ``video_latent``/``audio_latent`` are what the clip starts from, of the noise's shapes; where
    ``video_mask`` (B, 1 or 48, T, H, W) or ``audio_mask`` (B, L, 1 or 128) is CLEAN (0) or NOISED they are kept
    unchanged. The network sees whole CLEAN frames and audio steps as they are, at timestep 0; NOISED ones, and a given
    part of one, at the noise level of the rest. ``first_frame`` (B or 1, 48, 1, H, W) is short for a CLEAN frame 0.
    Of a modality that is given whole no guidance is computed.

    ``sampler`` makes a solver with ``timesteps`` (steps,) and ``step_denoised(x0, sample)`` from the sigmas.
    ``batch_predictions`` runs predictions that differ in the text only as one batch: faster for short clips, and more
    memory. After each step ``callback(step, steps, x0_video, x0_audio)`` is called, step from 1; ``should_stop`` is
    asked before every pass. Where a step's passes run out of memory, ``on_out_of_memory()`` is to free some, and says
    whether it could; the step is then made once more, with each prediction apart from there on.

    Raises Interrupted when ``should_stop`` says so, ValueError for inputs that do not fit together and where all is
    given, FloatingPointError when the network returns NaN or infinity.
    """
    guidance = Guidance() if guidance is None else guidance
    if video_noise is None and audio_noise is None:
        raise ValueError("There is nothing to denoise: give noise for the video, the audio or both.")
    if first_frame is not None:
        video_latent, video_mask = _with_first_frame(video_noise, first_frame, video_latent, video_mask)
    video = _modality("video", video_noise, 2, video_latent, video_mask)
    audio = _modality("audio", audio_noise, 1, audio_latent, audio_mask)
    network = _Network(
        backbone,
        conditions(context, negative, timbre, timbre_positions),
        video,
        audio,
        batch_predictions,
        should_stop,
    )
    present = [modality for modality in (video, audio) if modality is not None]
    makes = [modality is not None and modality.is_made for modality in (video, audio)]
    if not any(makes):
        raise ValueError(NOTHING_TO_MAKE)
    guidance = guidance.making(*makes)
    solvers = [sampler(sigmas) for _ in present]
    levels = [float(sigma) for sigma in sigmas]
    steps = len(levels) - 1
    timesteps = solvers[0].timesteps.tolist()
    samples = [modality.start(levels[0]) for modality in present]
    for step, (sigma, timestep) in enumerate(zip(levels, timesteps, strict=False), start=1):
        known = [modality.known(sample, sigma) for modality, sample in zip(present, samples, strict=True)]
        names = guidance.needed(sigma, timbre is not None, video is not None, audio is not None)
        predictions, network = _predictions(network, names, _as_pair(known, video, audio), timestep, on_out_of_memory)
        velocities = _present(guidance.combine(predictions, sigma, timbre is not None))
        denoised = [
            modality.keep(sample - sigma * velocity)
            for modality, sample, velocity in zip(present, known, velocities, strict=True)
        ]
        _check_finite(denoised, step, steps)
        samples = [
            solver.step_denoised(x0, sample) for solver, x0, sample in zip(solvers, denoised, samples, strict=True)
        ]
        if callback is not None:
            callback(step, steps, *_as_pair(denoised, video, audio))
    result = [modality.keep(sample) for modality, sample in zip(present, samples, strict=True)]
    return _as_pair(result, video, audio)


def _predictions(
    network: _Network, names: tuple[str, ...], samples: Pair, timestep: float, free_some: Callable[[], bool] | None
) -> tuple[dict[str, Pair], _Network]:
    """A step's predictions, and the network for the next step: with them apart once memory ran out."""
    try:
        return network.predict(names, samples, timestep), network
    except RuntimeError as error:
        if free_some is None or not is_out_of_memory(error):
            raise
        shortage = error.with_traceback(None)
    # Only here are the tensors of the failed pass gone. The samples and the solvers have not changed.
    if not free_some() and not network.batched:
        raise shortage
    network = replace(network, batched=False)
    return network.predict(names, samples, timestep), network


@dataclass(frozen=True)
class _Network:
    """The backbone with a clip's conditions: one velocity pair for each prediction asked for."""

    backbone: Callable[..., Pair]
    conditions: dict[str, Condition]
    video: Modality | None
    audio: Modality | None
    batched: bool
    should_stop: Callable[[], bool] | None

    def predict(self, names: tuple[str, ...], samples: Pair, timestep: float) -> dict[str, Pair]:
        """Velocities (fp32) of the predictions ``names`` at ``samples``."""
        times = self._timesteps(timestep)
        together = getattr(self.backbone, "run_together", None)
        if together is not None:  # the predictions are spread over workers
            passes = [self._arguments([name], samples, times) for name in names]
            outputs = together(passes, self._check_stop)
            return {name: _as_floats(pair) for name, pair in zip(names, outputs, strict=True)}
        velocities = {}
        for group in self._groups(names):
            self._check_stop()
            outputs = _as_floats(self.backbone(**self._arguments(group, samples, times)))
            parts = [[None] * len(group) if out is None else out.chunk(len(group)) for out in outputs]
            velocities.update({name: (parts[0][i], parts[1][i]) for i, name in enumerate(group)})
        return velocities

    def _check_stop(self) -> None:
        if self.should_stop is not None and self.should_stop():
            raise Interrupted("The run was interrupted.")

    def _timesteps(self, timestep: float) -> tuple[torch.Tensor, torch.Tensor] | torch.Tensor:
        video, audio = (None if m is None else m.timesteps(timestep) for m in (self.video, self.audio))
        if video is None or audio is None:
            only = video if audio is None else audio
            return only if only.ndim == 1 else (only, only[:, 0])
        return video if video.ndim == audio.ndim == 1 else (video, audio)

    def _groups(self, names: tuple[str, ...]) -> list[list[str]]:
        if not self.batched:
            return [[name] for name in names]
        groups: dict[bool, list[str]] = {}
        for name in names:
            groups.setdefault(self.conditions[name].cross_modal, []).append(name)
        return list(groups.values())

    def _arguments(self, names: list[str], samples: Pair, times) -> dict:
        """The backbone's arguments for one pass that makes the predictions ``names``."""
        batch, count = len(_present(samples)[0]), len(names)
        merged = _merge([self.conditions[name] for name in names], batch)
        dtype = merged.context.dtype
        video, audio = (None if s is None else _repeat(s.to(dtype), count) for s in samples)
        return {
            "video": video,
            "audio": audio,
            "timestep": _repeat(times, count) if torch.is_tensor(times) else tuple(_repeat(t, count) for t in times),
            "context": merged.context,
            "timbre": merged.timbre,
            "timbre_positions": merged.timbre_positions,
            "cross_modal": merged.cross_modal,
        }


def _as_floats(pair: Pair) -> Pair:
    return tuple(None if part is None else part.float() for part in pair)


def _merge(group: list[Condition], batch: int) -> Condition:
    """The conditions of one pass, stacked along the batch: contexts zero-padded, absent voices unused."""
    length = max(condition.context.shape[1] for condition in group)
    contexts = [
        torch.nn.functional.pad(condition.context, (0, 0, 0, length - condition.context.shape[1]))
        for condition in group
    ]
    context = torch.cat([_fill(each, batch) for each in contexts])
    voiced = next((condition for condition in group if condition.timbre is not None), None)
    if voiced is None:
        return Condition(context, cross_modal=group[0].cross_modal)
    timbre = torch.cat([_fill(voiced.timbre, batch)] * len(group))
    positions = torch.cat(
        [
            _fill(
                voiced.timbre_positions if each is voiced else torch.full_like(voiced.timbre_positions, -1),
                batch,
            )
            for each in group
        ]
    )
    return Condition(context, timbre, positions, group[0].cross_modal)


def _fill(tensor: torch.Tensor, batch: int) -> torch.Tensor:
    """``tensor`` (batch or 1, ...) as (batch, ...)."""
    if tensor.shape[0] not in (1, batch):
        raise ValueError(f"A condition is for a batch of {tensor.shape[0]}, the noise for one of {batch}.")
    return tensor.expand(batch, *tensor.shape[1:])


def _repeat(tensor: torch.Tensor, count: int) -> torch.Tensor:
    return tensor if count == 1 else tensor.repeat(count, *[1] * (tensor.ndim - 1))


def _present(values) -> list:
    return [value for value in values if value is not None]


def _as_pair(values: list, video: Modality | None, audio: Modality | None) -> Pair:
    values = iter(values)
    return (None if video is None else next(values)), (None if audio is None else next(values))


def _modality(
    name: str,
    noise: torch.Tensor | None,
    steps_dim: int,
    latent: torch.Tensor | None,
    mask: torch.Tensor | None,
) -> Modality | None:
    if noise is None:
        if latent is not None or mask is not None:
            raise ValueError(f"There is a given {name} part, but no {name} noise: the clip has no {name}.")
        return None
    if mask is not None and latent is None:
        raise ValueError(f"A mask says which {name} parts are given: give {name}_latent too.")
    for what, tensor in (("latent", latent), ("mask", mask)):
        if tensor is None:
            continue
        try:
            fits = torch.broadcast_shapes(tensor.shape, noise.shape) == noise.shape
        except RuntimeError:
            fits = False
        if not fits:
            raise ValueError(
                f"The {name} {what} of shape {tuple(tensor.shape)} does not fit "
                f"{name} noise of shape {tuple(noise.shape)}."
            )
    return Modality(noise, steps_dim, latent, mask)


def _with_first_frame(
    noise: torch.Tensor | None,
    frame: torch.Tensor,
    latent: torch.Tensor | None,
    mask: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The video latent and mask with ``frame`` as the given frame 0."""
    if noise is None:
        raise ValueError("A first frame needs a clip with video: give video_noise.")
    size = noise[:, :, :1].shape
    if frame.ndim != 5 or frame.shape[0] not in (1, size[0]) or frame.shape[1:] != size[1:]:
        raise ValueError(f"The first frame's latent must be {tuple(size)}; got {tuple(frame.shape)}.")
    latent = torch.zeros_like(noise) if latent is None else latent.expand_as(noise).clone()
    mask = torch.ones_like(noise[:, :1]) if mask is None else mask.expand_as(noise).clone()
    latent[:, :, :1] = frame.to(latent)
    mask[:, :, :1] = 0
    return latent, mask


def _check_finite(latents: list[torch.Tensor], step: int, steps: int) -> None:
    if not all(bool(latent.isfinite().all()) for latent in latents):
        raise FloatingPointError(
            f"The network returned NaN or infinity at step {step} of {steps}: "
            "its weights are damaged, or its dtype is too narrow; try bf16 or fp32."
        )
