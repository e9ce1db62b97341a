"""The noise levels a clip is denoised through, and the timesteps the network knows them by."""

from __future__ import annotations

import torch

TRAIN_STEPS = 1000
TRAIN_START = 0.999  # of the unshifted training schedule
TIMESTEP_SCALE = 1000.0
WRONG_DENOISE = "denoise is the part of the run that is made anew, above 0 and up to 1; got {:g}."
DISTILLED_LEVELS = (1.0, 0.75, 0.5, 0.25)  # what few-step students are trained at, before the shift


def shift_sigma(sigma, shift: float):
    """Timestep shift of flow matching, ``shift * s / (1 + (shift - 1) * s)``; takes tensors and floats."""
    return shift * sigma / (1 + (shift - 1) * sigma)


def flow_sigmas(steps: int, shift: float = 5.0, denoise: float = 1.0) -> torch.Tensor:
    """Noise levels of ``steps`` sampling steps, (steps + 1,) fp32, falling, the last one 0.

    The training schedule is already shifted; sampling takes even steps over it and shifts once more. With ``denoise``
    below 1 they are the last of a schedule of steps / denoise, which starts part of the way, as for a second pass.
    Raises ValueError for fewer than one step, a shift that is not positive, and ``denoise`` outside 0..1.
    """
    if steps < 1:
        raise ValueError(f"A schedule needs at least 1 step; got {steps}.")
    if not shift > 0:
        raise ValueError(f"The schedule's shift must be above 0; got {shift}.")
    if not 0 < denoise <= 1:
        raise ValueError(WRONG_DENOISE.format(denoise))
    return _all_sigmas(max(steps, int(steps / denoise)), shift)[-(steps + 1) :]


def _all_sigmas(steps: int, shift: float) -> torch.Tensor:
    highest = shift_sigma(torch.tensor(TRAIN_START), shift).item()  # the training schedule is in fp32
    even = torch.linspace(highest, 0.0, steps + 1, dtype=torch.float64)
    return shift_sigma(even, shift).float()


def distilled_sigmas(shift: float = 5.0, denoise: float = 1.0) -> torch.Tensor:
    """Noise levels of few-step (distilled) checkpoints, (5,) fp32: four, shifted once, from pure noise, and 0.

    With ``denoise`` below 1 as many of the last of them as make up that part of the run, at least one: there are no
    others that such a checkpoint was trained at.
    """
    if not 0 < denoise <= 1:
        raise ValueError(WRONG_DENOISE.format(denoise))
    levels = torch.tensor([*DISTILLED_LEVELS, 0.0], dtype=torch.float64)
    left = max(1, round(denoise * len(DISTILLED_LEVELS)))
    return shift_sigma(levels, shift).float()[-(left + 1) :]


def sigma_at(part: float, shift: float = 5.0) -> float:
    """The noise level of ``flow_sigmas`` at a part of the run, 0 (its start) to 1 (its end)."""
    highest = shift_sigma(TRAIN_START, shift)
    return shift_sigma(highest * (1.0 - part), shift)


def flow_timesteps(sigmas: torch.Tensor) -> torch.Tensor:
    """What the network is given for each noise level: floor(1000 * sigma), int64, same shape."""
    return (sigmas.float() * TIMESTEP_SCALE).floor().long()


def falling_sigmas(sigmas: torch.Tensor, solver: str) -> torch.Tensor:
    """Noise levels (n + 1,) as fp32 on the CPU. Raises ValueError, naming the ``solver``, for what is none."""
    sigmas = torch.as_tensor(sigmas, dtype=torch.float32).detach().cpu()
    if sigmas.ndim != 1 or len(sigmas) < 2:
        raise ValueError(f"{solver} needs at least 2 noise levels in one row; got shape {tuple(sigmas.shape)}.")
    if not bool(((sigmas >= 0) & (sigmas <= 1)).all()):
        raise ValueError(f"{solver} needs noise levels (sigmas) within 0..1; got {sigmas.tolist()}.")
    if bool((sigmas.diff() > 0).any()):
        raise ValueError(f"{solver} needs falling noise levels (sigmas); got {sigmas.tolist()}.")
    return sigmas


def at_least_fp32(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
