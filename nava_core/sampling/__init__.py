"""From noise to latents: schedule, solver, guidance and the denoising loop."""

from .denoise import Condition, Interrupted, conditions, denoise
from .guidance import Direction, Guidance
from .schedule import flow_sigmas, flow_timesteps, shift_sigma, sigma_at
from .unipc import FlowUniPC

__all__ = [
    "Condition",
    "Direction",
    "FlowUniPC",
    "Guidance",
    "Interrupted",
    "conditions",
    "denoise",
    "flow_sigmas",
    "flow_timesteps",
    "shift_sigma",
    "sigma_at",
]
