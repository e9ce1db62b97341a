"""The noise levels a clip is denoised through, and the timesteps the network knows them by."""

from __future__ import annotations

import torch

TRAIN_STEPS = 1000
TRAIN_START = 0.999  # of the unshifted training schedule
TIMESTEP_SCALE = 1000.0


def shift_sigma(sigma, shift: float):
    """Timestep shift of flow matching, ``shift * s / (1 + (shift - 1) * s)``; takes tensors and floats."""
    return shift * sigma / (1 + (shift - 1) * sigma)


def flow_sigmas(steps: int, shift: float = 5.0) -> torch.Tensor:
    """Noise levels of ``steps`` sampling steps, (steps + 1,) fp32, falling, the last one 0.

    The training schedule is already shifted; sampling takes even steps over it and shifts once more.
    Raises ValueError for fewer than one step or a shift that is not positive.
    """
    if steps < 1:
        raise ValueError(f"A schedule needs at least 1 step; got {steps}.")
    if not shift > 0:
        raise ValueError(f"The schedule's shift must be above 0; got {shift}.")
    highest = shift_sigma(torch.tensor(TRAIN_START), shift).item()  # the training schedule is in fp32
    even = torch.linspace(highest, 0.0, steps + 1, dtype=torch.float64)
    return shift_sigma(even, shift).float()


def sigma_at(part: float, shift: float = 5.0) -> float:
    """The noise level of ``flow_sigmas`` at a part of the run, 0 (its start) to 1 (its end)."""
    highest = shift_sigma(TRAIN_START, shift)
    return shift_sigma(highest * (1.0 - part), shift)


def flow_timesteps(sigmas: torch.Tensor) -> torch.Tensor:
    """What the network is given for each noise level: floor(1000 * sigma), int64, same shape."""
    return (sigmas.float() * TIMESTEP_SCALE).floor().long()
