"""Euler's method for flow matching: along the velocity from one noise level to the next."""

from __future__ import annotations

import torch

from .schedule import TIMESTEP_SCALE, at_least_fp32, falling_sigmas


class FlowEuler:
    """First-order steps over given noise levels, what few-step (distilled) checkpoints are made for.

    Used as :class:`FlowUniPC` is, over the same kind of ``sigmas`` (n + 1,). The network is given 1000 * sigma as it
    is: not all of the four noise levels that students are trained at are whole timesteps.
    """

    def __init__(self, sigmas: torch.Tensor) -> None:
        self.sigmas = falling_sigmas(sigmas, "Euler")
        self.timesteps = self.sigmas[:-1] * TIMESTEP_SCALE  # (n,) fp32, what the network is given at each step
        self._levels = self.sigmas.tolist()
        self.reset()

    def reset(self) -> None:
        """Stand before the first step again."""
        self.index = 0

    def step(self, velocity: torch.Tensor, sample: torch.Tensor) -> torch.Tensor:
        """The next sample from the network's velocity (noise - x0) at ``sample``; both of one shape, fp32 at least.

        Raises RuntimeError once the schedule is used up.
        """
        if self.index >= len(self._levels) - 1:
            raise RuntimeError(f"This solver has taken all of its {self.index} steps: call reset() for another run.")
        sigma, target = self._levels[self.index : self.index + 2]
        self.index += 1
        return at_least_fp32(sample) + (target - sigma) * at_least_fp32(velocity)

    def step_denoised(self, denoised: torch.Tensor, sample: torch.Tensor) -> torch.Tensor:
        """The next sample from the network's estimate of x0 at ``sample``; both of one shape, fp32 at least."""
        sample, sigma = at_least_fp32(sample), self._levels[self.index]
        velocity = sample - at_least_fp32(denoised)
        return self.step(velocity / sigma if sigma > 0 else velocity, sample)  # from 0 on no step has a length
