"""Frames fitted to a clip and its rate; what changes across a seam, measured, and held."""

from fractions import Fraction

import pytest
import torch

from nava_core.geometry import ClipGeometry
from nava_core.given import Statistics, fit_frames, hold_statistics, resample_indices, seam
from nava_core.pipeline.stages import fit_picture


def picture(height=48, width=64, seed=0):
    """Soft shapes with noise on them, (H, W, 3) in 0..1 with room above and below."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(1, 3, 6, 8, generator=generator)
    soft = torch.nn.functional.interpolate(coarse, size=(height, width), mode="bicubic", align_corners=False)
    return (0.3 + 0.3 * soft[0].movedim(0, -1) + 0.02 * torch.randn(height, width, 3, generator=generator)).clamp(0, 1)


def laplacian_energy(frame):
    """The measure written out anew: of the luma, by convolution."""
    luma = frame.double() @ torch.tensor([0.2126, 0.7152, 0.0722], dtype=torch.float64)
    kernel = torch.tensor([[0, 1, 0], [1, -4, 1], [0, 1, 0]], dtype=torch.float64)
    return float(torch.nn.functional.conv2d(luma[None, None], kernel[None, None]).square().mean())


# ---------------------------------------------------------------- size and rate


def test_frames_of_the_right_size_stay_bit_for_bit():
    for frames in (torch.rand(3, 48, 64, 3), torch.randint(0, 256, (3, 48, 64, 3), dtype=torch.uint8)):
        assert fit_frames(frames, 64, 48) is frames


@pytest.mark.parametrize("size", [(100, 60), (40, 90), (33, 31)])
def test_other_sizes_are_fitted_as_a_first_frame_is(size):
    frames = torch.stack([picture(*size, seed=seed) for seed in range(2)])
    fitted = fit_frames(frames, 64, 48)
    for frame, whole in zip(fitted, frames, strict=True):
        assert torch.equal(frame, fit_picture(whole, ClipGeometry(1, 64, 48))[0])
    levels = (frames * 255).to(torch.uint8)
    assert torch.equal(fit_frames(levels, 64, 48).float() / 255, fitted)


def test_frames_of_another_form_are_refused():
    for wrong in (torch.rand(48, 64, 3), torch.rand(0, 48, 64, 3), torch.rand(1, 48, 64, 4)):
        with pytest.raises(ValueError, match=r"Frames are \(frames, height, width, 3\); got"):
            fit_frames(wrong, 64, 48)


@pytest.mark.parametrize("fps", [24, 25, 30, 60, 12, 10, Fraction(30000, 1001), 23.976, 29.97])
def test_each_frame_is_the_one_on_screen_at_its_time(fps):
    count = 50
    indices = resample_indices(count, fps)
    assert len(indices) == pytest.approx(count * 24 / float(fps), abs=1)
    for place, index in enumerate(indices):
        assert 0 <= index < count
        assert index / float(fps) <= place / 24 + 1e-4
        assert (index + 1) / float(fps) > place / 24 - 1e-4
    if fps == 24:
        assert indices == list(range(count))
    if fps == 12:
        assert indices == [index // 2 for index in range(2 * count)]


def test_rates_of_nothing_are_refused():
    with pytest.raises(ValueError, match="above 0; got 0 and 24"):
        resample_indices(5, 0)


# ---------------------------------------------------------------- seams


def test_a_seam_without_a_change_measures_none():
    frame = picture()
    found = seam(frame, frame, frame)
    assert (found.colour, found.contrast, found.sharpness) == (0, 1, 1)
    assert (found.drift.colour, found.drift.contrast, found.drift.sharpness) == (0, 1, 1)


def test_a_seam_measures_colour_contrast_and_sharpness():
    before = picture()
    cast = torch.tensor([6, 0, -3]) / 255
    found = seam(before, before + cast, before)
    assert found.colour == pytest.approx(3, abs=1e-3)
    assert (found.contrast, found.sharpness) == (pytest.approx(1, abs=1e-4), pytest.approx(1, abs=1e-4))
    stronger = (before - before.mean()) * 1.25 + before.mean()
    found = seam(before, stronger)
    assert found.contrast == pytest.approx(1.25, abs=0.01)
    assert found.sharpness == pytest.approx(1.25**2, abs=0.01)
    assert found.drift is None
    found = seam(stronger, stronger, before)
    assert found.sharpness == 1
    assert found.drift.sharpness == pytest.approx(laplacian_energy(stronger) / laplacian_energy(before))
    assert found.sentence() == (
        "Across the seam colour off by 0.0 levels, contrast x1.00, sharpness x1.00; since the first frame "
        f"{found.drift}."
    )


def test_a_seam_of_frames_in_8_bits_is_the_same():
    levels = [(picture(seed=seed) * 255).round().to(torch.uint8) for seed in range(2)]
    ours, floats = seam(*levels), seam(*(each.float() / 255 for each in levels))
    assert (ours.colour, ours.contrast, ours.sharpness) == (floats.colour, floats.contrast, floats.sharpness)
    assert seam(levels[0], torch.zeros_like(levels[0])).contrast < 1e-3


# ---------------------------------------------------------------- held


def test_nothing_is_changed_where_nothing_differs():
    frame = picture()
    reference = Statistics.of(frame)
    for what in ("nothing", "colour", "colour and sharpness"):
        assert hold_statistics(frame, reference, what) is frame
    assert hold_statistics(frame, Statistics.of(picture(seed=5)), "nothing") is frame
    levels = (frame * 255).round().to(torch.uint8)
    assert hold_statistics(levels, Statistics.of(levels), "colour and sharpness") is levels


def test_a_colour_cast_and_lost_contrast_are_taken_back():
    frame = picture()
    reference = Statistics.of(frame)
    cast = (frame - 0.45) * torch.tensor([0.8, 1.1, 0.9]) + 0.45 + torch.tensor([0.05, -0.03, 0.02])
    held = hold_statistics(cast, reference, "colour")
    assert (held - frame).abs().max() < 1e-4
    assert seam(frame, cast).colour > 5
    assert seam(frame, held).colour < 0.01


@pytest.mark.parametrize("grain", [0.01, 0.05])
def test_sharpness_that_grew_is_taken_back_to_the_references(grain):
    frame = picture()
    sharper = (frame + grain * torch.randn(frame.shape, generator=torch.Generator().manual_seed(9))).clamp(0, 1)
    reference = Statistics.of(frame)
    assert laplacian_energy(sharper) > 1.1 * laplacian_energy(frame)
    colour_alone = hold_statistics(sharper, reference, "colour")
    assert laplacian_energy(colour_alone) > 1.05 * laplacian_energy(frame)
    held = hold_statistics(sharper, reference, "colour and sharpness")
    assert laplacian_energy(held) == pytest.approx(laplacian_energy(frame), rel=5e-3)
    assert seam(frame, held).colour < 0.1
    assert held.dtype == torch.float32


def test_a_softer_frame_is_not_sharpened():
    frame, reference = picture(), picture(seed=0)
    reference = (reference + 0.05 * torch.randn(frame.shape, generator=torch.Generator().manual_seed(3))).clamp(0, 1)
    held = hold_statistics(frame, Statistics.of(reference), "colour and sharpness")
    assert torch.equal(held, hold_statistics(frame, Statistics.of(reference), "colour"))


def test_flat_and_black_frames_are_held_without_harm():
    flat = torch.full((48, 64, 3), 0.25)
    held = hold_statistics(flat, Statistics.of(picture()), "colour and sharpness")
    assert held.isfinite().all()
    assert (held.mean(dim=(0, 1)) - picture().mean(dim=(0, 1))).abs().max() < 1e-4
    towards = hold_statistics(picture(), Statistics.of(torch.zeros(48, 64, 3)), "colour and sharpness")
    assert towards.isfinite().all()
    assert 0 <= towards.min() <= towards.max() <= 1


def test_statistics_of_several_frames_are_their_average():
    frames = torch.stack([picture(seed=seed) for seed in range(3)])
    several = Statistics.of(frames)
    each = [Statistics.of(frame) for frame in frames]
    assert torch.allclose(several.mean, torch.stack([one.mean for one in each]).mean(dim=0))
    assert several.sharpness == pytest.approx(sum(one.sharpness for one in each) / 3)
    assert each[0].sharpness == pytest.approx(laplacian_energy(frames[0]), rel=1e-5)


def test_what_is_held_has_a_name():
    with pytest.raises(ValueError, match="one of nothing, colour, colour and sharpness; got 'hue'"):
        hold_statistics(picture(), Statistics.of(picture()), "hue")
