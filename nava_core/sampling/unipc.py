"""UniPC for flow matching: a second-order predictor and corrector that share one network call a step.

Zhao et al., "UniPC: A Unified Predictor-Corrector Framework for Fast Sampling of Diffusion Models" (arXiv
2302.04867), in its x0-prediction form with B(h) = e^h - 1 ("bh2"). With x_s = alpha_s x0 + sigma_s noise,
alpha = 1 - sigma and lambda = log(alpha / sigma), the exact solution over a step s -> t, h = lambda_t -
lambda_s, is sigma_t / sigma_s * x_s plus an integral of the predicted x0 over lambda, which both halves
approximate.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from .schedule import at_least_fp32, falling_sigmas, flow_timesteps

ORDER = 2


def _log_snr(sigma: float) -> float:
    """lambda = log((1 - sigma) / sigma); infinite where there is only signal or only noise."""
    if sigma <= 0.0:
        return math.inf
    if sigma >= 1.0:
        return -math.inf
    return math.log((1.0 - sigma) / sigma)


def _corrector_weights(h: float, older: float) -> tuple[float, float]:
    """Weights of the two x0 differences of the second-order corrector.

    They make the rule exact for x0 linear and quadratic in lambda; ``older`` is where the older prediction
    lies, in units of h before the step's start (negative).
    """
    z = -h
    phi1 = math.expm1(z)
    phi2 = phi1 / z - 1.0
    phi3 = phi2 / z - 0.5
    first, second = phi2 / phi1, 2.0 * phi3 / phi1
    old = (first - second) / (1.0 - older)
    return old, first - old


@dataclass(frozen=True)
class _Prediction:
    denoised: torch.Tensor
    log_snr: float


class FlowUniPC:
    """Integrates a flow-matching network from noise to data over given noise levels.

    ``sigmas`` (n + 1,) are noise levels within 0..1, none above the one before it, such as ``flow_sigmas``
    makes; the first may be 1 (pure noise) or less (a schedule cut short), the last need not be 0. A level
    that repeats the one before it is a step of no length: it leaves the sample alone. n calls of ``step`` or
    ``step_denoised``, one per level but the last, make a run; ``reset`` begins another. Tensors of any shape
    and device; the solver's own state is fp32 (float64 for float64 samples) and so is what it returns.
    """

    def __init__(self, sigmas: torch.Tensor) -> None:
        self.sigmas = falling_sigmas(sigmas, "UniPC")
        self.timesteps = flow_timesteps(self.sigmas[:-1])  # (n,) int64, what the network is given at each step
        self._levels = self.sigmas.tolist()
        self.reset()

    def reset(self) -> None:
        """Forget the run so far and stand before the first step again."""
        self.index = 0
        self._history: list[_Prediction] = []  # newest last, at most ORDER of them
        self._start: torch.Tensor | None = None  # the corrected sample that the latest step set out from
        self._start_sigma = math.nan
        self._order = 1

    def step(self, velocity: torch.Tensor, sample: torch.Tensor) -> torch.Tensor:
        """The next sample from the network's velocity (noise - x0) at ``sample``; both of one shape."""
        sample = at_least_fp32(sample)
        return self.step_denoised(sample - self._sigma() * at_least_fp32(velocity), sample)

    def step_denoised(self, denoised: torch.Tensor, sample: torch.Tensor) -> torch.Tensor:
        """The next sample from the network's estimate of x0 at ``sample``; both of one shape.

        Raises RuntimeError once the schedule is used up.
        """
        sigma = self._sigma()
        target = self._levels[self.index + 1]
        sample, denoised = at_least_fp32(sample), at_least_fp32(denoised)
        self.index += 1
        if target == sigma:
            return sample
        if self._start is not None:
            sample = self._correct(denoised, sigma)
        self._history = [*self._history[1 - ORDER :], _Prediction(denoised, _log_snr(sigma))]
        # The last step is taken with one order less; a level that ends the schedule may be repeated there.
        self._order = 1 if target == self._levels[-1] else min(ORDER, len(self._history))
        self._start, self._start_sigma = sample, sigma
        return self._predict(sample, sigma, target)

    def _sigma(self) -> float:
        if self.index >= len(self._levels) - 1:
            raise RuntimeError(f"This solver has taken all of its {self.index} steps: call reset() for another run.")
        return self._levels[self.index]

    def _first_order(
        self, sample: torch.Tensor, newest: _Prediction, sigma: float, target: float
    ) -> tuple[torch.Tensor, float, float]:
        """The step with x0 held at ``newest``; the weight of what is added to that x0; and h."""
        h = _log_snr(target) - newest.log_snr
        weight = -(1.0 - target) * math.expm1(-h)
        return target / sigma * sample + weight * newest.denoised, weight, h

    def _predict(self, sample: torch.Tensor, sigma: float, target: float) -> torch.Tensor:
        newest = self._history[-1]
        result, weight, h = self._first_order(sample, newest, sigma, target)
        if self._order == 1:
            return result
        older = self._history[-2]
        ratio = (older.log_snr - newest.log_snr) / h  # -inf where the older one was made at sigma 1
        return result + (0.5 * weight / ratio) * (older.denoised - newest.denoised)

    def _correct(self, denoised: torch.Tensor, sigma: float) -> torch.Tensor:
        """Redo the latest step, knowing what the network says where it ended."""
        newest = self._history[-1]
        result, weight, h = self._first_order(self._start, newest, self._start_sigma, sigma)
        change = denoised - newest.denoised
        ratio = (self._history[-2].log_snr - newest.log_snr) / h if self._order == ORDER else -math.inf
        if math.isinf(ratio):
            return result + 0.5 * weight * change
        old, new = _corrector_weights(h, ratio)
        slope = (self._history[-2].denoised - newest.denoised) / ratio
        return result + weight * (old * slope + new * change)
