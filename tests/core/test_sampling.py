"""The schedule and the solver, against golden numbers and against what any such solver must do."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from nava_core.sampling import (
    FlowEuler,
    FlowUniPC,
    distilled_sigmas,
    find_preset,
    flow_sigmas,
    flow_timesteps,
    sigma_at,
)

GOLDEN = Path(__file__).parents[1] / "golden" / "unipc_cases.safetensors"
with safe_open(GOLDEN, "pt") as file:
    CASES = json.loads(file.metadata()["cases"])


@pytest.fixture(scope="module")
def cases():
    return load_file(GOLDEN)


def field(cases, sample, timestep):
    """The velocity field of the golden trajectories."""
    w, b = cases["field/W"].to(sample.dtype), cases["field/b"].to(sample.dtype)
    return torch.tanh(sample @ w) + timestep / 1000 * b


def integrate(cases, sigmas, sample=None):
    """End of the trajectory over ``sigmas`` of the golden field with its timestep left whole."""
    solver = FlowUniPC(sigmas)
    sample = cases["x_init"] if sample is None else sample
    for sigma in solver.sigmas[:-1]:
        sample = solver.step(field(cases, sample, 1000 * sigma), sample)
    return sample


@pytest.mark.parametrize("name", CASES)
def test_schedule_is_the_golden_one(cases, name):
    sigmas = flow_sigmas(CASES[name]["steps"], CASES[name]["shift"])
    assert sigmas.dtype == torch.float32
    assert torch.equal(sigmas, cases[f"{name}/sigmas"])
    assert torch.equal(flow_timesteps(sigmas[:-1]), cases[f"{name}/timesteps"])


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("form", ["velocity", "denoised"])
def test_trajectory_is_the_golden_one(cases, name, form):
    solver = FlowUniPC(flow_sigmas(CASES[name]["steps"], CASES[name]["shift"]))
    assert torch.equal(solver.timesteps, cases[f"{name}/timesteps"])
    sample = cases["x_init"]
    for i, timestep in enumerate(solver.timesteps):
        velocity = field(cases, sample, timestep)
        if form == "velocity":
            sample = solver.step(velocity, sample)
        else:
            sample = solver.step_denoised(sample - solver.sigmas[i] * velocity, sample)
        torch.testing.assert_close(sample, cases[f"{name}/trajectory"][i], atol=1e-5, rtol=0)


def test_reset_runs_the_same_again(cases):
    solver = FlowUniPC(flow_sigmas(6))
    ends = []
    for _ in range(2):
        sample = cases["x_init"]
        for timestep in solver.timesteps:
            sample = solver.step(field(cases, sample, timestep), sample)
        ends.append(sample)
        solver.reset()
    assert torch.equal(*ends)


def test_error_falls_with_the_square_of_the_step(cases):
    start = cases["x_init"].double()
    ends = {n: integrate(cases, torch.linspace(0.9, 0.1, n + 1), start) for n in (20, 40, 1600)}
    errors = [(ends[n] - ends[1600]).abs().max().item() for n in (20, 40)]
    assert 3.0 < errors[0] / errors[1] < 6.0


def test_pure_noise_at_the_start_is_the_limit_of_almost_pure_noise(cases):
    almost = flow_sigmas(20)
    pure = almost.clone()
    pure[0] = 1.0
    end = integrate(cases, pure)
    torch.testing.assert_close(end, integrate(cases, almost), atol=1e-3, rtol=0)
    assert integrate(cases, torch.tensor([1.0, 0.0])).isfinite().all()


@pytest.mark.parametrize("at", [0, 1, 4, 10])
def test_a_repeated_level_changes_nothing(cases, at):
    sigmas = flow_sigmas(10)
    repeated = torch.cat([sigmas[: at + 1], sigmas[at:]])
    torch.testing.assert_close(integrate(cases, repeated), integrate(cases, sigmas), atol=1e-6, rtol=0)


def test_a_schedule_that_stops_early_is_followed(cases):
    """Any constant x0 makes every step exact, wherever the schedule starts and ends."""
    x0, noise = cases["x_init"], cases["x_init"].flip(0)
    for sigmas in (flow_sigmas(12)[:7], flow_sigmas(12)[5:], flow_sigmas(12)[4:9]):
        solver = FlowUniPC(sigmas)
        sample = sigmas[0] * noise + (1 - sigmas[0]) * x0
        for _ in solver.timesteps:
            sample = solver.step_denoised(x0, sample)
        torch.testing.assert_close(sample, sigmas[-1] * noise + (1 - sigmas[-1]) * x0, atol=1e-5, rtol=0)


def test_half_precision_is_solved_in_fp32(cases):
    solver = FlowUniPC(flow_sigmas(3))
    sample = solver.step(cases["x_init"].bfloat16(), cases["x_init"].bfloat16())
    assert sample.dtype == torch.float32


def test_more_steps_than_levels_are_refused(cases):
    solver = FlowUniPC(flow_sigmas(1))
    solver.step(cases["x_init"], cases["x_init"])
    with pytest.raises(RuntimeError, match="reset"):
        solver.step(cases["x_init"], cases["x_init"])


@pytest.mark.parametrize(
    ("sigmas", "says"),
    [
        ([1.0], "at least 2"),
        ([[1.0, 0.5, 0.0]], "one row"),
        ([0.2, 0.5, 0.0], "falling"),
        ([14.6, 3.0, 0.0], "within 0..1"),
        ([float("nan"), 0.0], "within 0..1"),
    ],
)
def test_impossible_levels_are_refused(sigmas, says):
    with pytest.raises(ValueError, match=says):
        FlowUniPC(torch.tensor(sigmas))


@pytest.mark.parametrize(("steps", "shift"), [(0, 5.0), (10, 0.0), (10, float("nan"))])
def test_impossible_schedules_are_refused(steps, shift):
    with pytest.raises(ValueError, match="schedule"):
        flow_sigmas(steps, shift)


@pytest.mark.parametrize("shift", [1.0, 5.0, 10.0])
@pytest.mark.parametrize("steps", [1, 10, 50])
def test_sigma_at_is_the_schedules(steps, shift):
    sigmas = flow_sigmas(steps, shift)
    for step in range(steps + 1):
        assert sigma_at(step / steps, shift) == pytest.approx(float(sigmas[step]), abs=1e-6)


# --- few-step checkpoints ----------------------------------------------------------------------------------------


def test_the_distilled_schedule_is_the_students():
    """1, 0.75, 0.5, 0.25 shifted once, then 0; the network is told them as they are, not whole."""
    sigmas = distilled_sigmas()
    torch.testing.assert_close(sigmas, torch.tensor([1, 15 / 16, 5 / 6, 5 / 8, 0]))
    torch.testing.assert_close(FlowEuler(sigmas).timesteps, torch.tensor([1000, 937.5, 2500 / 3, 625]))


@pytest.mark.parametrize("form", ["velocity", "denoised"])
def test_euler_goes_along_the_velocity(cases, form):
    solver = FlowEuler(distilled_sigmas())
    sample = expected = cases["x_init"].double()
    levels = solver.sigmas.double()
    for sigma, target, timestep in zip(levels, levels[1:], solver.timesteps, strict=False):
        velocity = field(cases, sample, timestep)
        expected = expected + (target - sigma) * field(cases, expected, timestep)
        if form == "velocity":
            sample = solver.step(velocity, sample)
        else:
            sample = solver.step_denoised(sample - sigma * velocity, sample)
    torch.testing.assert_close(sample, expected, atol=1e-12, rtol=0)
    with pytest.raises(RuntimeError, match="reset"):
        solver.step_denoised(sample, sample)


def test_euler_leaves_the_sample_alone_where_a_step_has_no_length(cases):
    solver = FlowEuler(torch.tensor([0.5, 0.5, 0.0, 0.0]))
    x0, start = cases["x_init"], cases["x_init"].flip(0)
    assert torch.equal(solver.step_denoised(x0, start), start)
    torch.testing.assert_close(solver.step_denoised(x0, start), x0)
    assert torch.equal(solver.step_denoised(start, x0), x0)


def test_a_preset_goes_by_its_name_or_label():
    assert find_preset("4 steps (distilled)") is find_preset("distilled")
    with pytest.raises(ValueError, match="no preset 'fast': choose distilled"):
        find_preset("fast")
