"""From noise to latents: schedule, solver, guidance and the denoising loop."""

from .denoise import Condition, Interrupted, conditions, denoise
from .euler import FlowEuler
from .guidance import CONDITIONAL, Direction, Guidance
from .presets import PRESETS, Preset, find_preset
from .schedule import distilled_sigmas, flow_sigmas, flow_timesteps, shift_sigma, sigma_at
from .unipc import FlowUniPC

__all__ = [
    "CONDITIONAL",
    "PRESETS",
    "Condition",
    "Direction",
    "FlowEuler",
    "FlowUniPC",
    "Guidance",
    "Interrupted",
    "Preset",
    "conditions",
    "denoise",
    "distilled_sigmas",
    "find_preset",
    "flow_sigmas",
    "flow_timesteps",
    "shift_sigma",
    "sigma_at",
]
