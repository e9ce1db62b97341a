"""What a noise mask keeps, what the network is shown of it token by token, and which latents a span of time is."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nava_core.given import (
    CLEAN,
    NOISED,
    SHOWN,
    frames_touching,
    frames_within,
    is_given,
    kept,
    steps_touching,
    steps_within,
)
from nava_core.sampling import Guidance, denoise, find_preset, flow_sigmas

PLAIN = Guidance(alignment=False, video_text=1.0, audio_text=1.0, audio_timbre=0.0)
FULL = Guidance()


class Network:
    """A simple velocity, and what it was shown."""

    def __init__(self):
        self.calls = []

    def __call__(self, video, audio, timestep, context, **conditions):
        self.calls.append({"video": video, "audio": audio, "timestep": timestep, **conditions})
        return tuple(None if x is None else 0.1 * x + context.mean() for x in (video, audio))


def clip(seed, batch=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, 48, 4, 2, 2, generator=generator), torch.randn(batch, 9, 128, generator=generator)


def run(video_mask, audio_mask, guidance=PLAIN, steps=2, **settings):
    network, (video, audio), (frames, sound) = Network(), clip(0), clip(1)
    parts = {"video_latent": frames, "video_mask": video_mask, "audio_latent": sound, "audio_mask": audio_mask}
    parts = {name: part for name, part in parts.items() if part is not None}
    if video_mask is None:
        parts.pop("video_latent")
    if audio_mask is None:
        parts.pop("audio_latent")
    context = torch.ones(1, 3, 8)
    result = denoise(
        network, video, audio, context, sigmas=flow_sigmas(steps), guidance=guidance, **{**parts, **settings}
    )
    return network, result


@pytest.mark.parametrize("shown", SHOWN.values(), ids=SHOWN)
def test_each_given_frame_and_step_is_shown_as_its_mask_says(shown):
    video_mask, audio_mask = torch.ones(1, 1, 4, 2, 2), torch.ones(1, 9, 1)
    video_mask[:, :, 1], audio_mask[:, 2:5] = shown, shown
    network, result = run(video_mask, audio_mask)
    (noise, sound_noise), (frames, sound) = clip(0), clip(1)
    for call, sigma in zip(network.calls, flow_sigmas(2).tolist(), strict=False):
        at = float(int(1000 * sigma))
        given = 0.0 if shown == CLEAN else at
        assert call["timestep"][0].tolist() == [[at, given, at, at]]
        assert call["timestep"][1].tolist() == [[at, at, given, given, given, at, at, at, at]]
        level = 0.0 if shown == CLEAN else sigma
        for seen, latent, drawn in (
            (call["video"][:, :, 1], frames[:, :, 1], noise[:, :, 1]),
            (call["audio"][:, 2:5], sound[:, 2:5], sound_noise[:, 2:5]),
        ):
            torch.testing.assert_close(seen, level * drawn + (1 - level) * latent)
    assert torch.equal(result[0][:, :, 1], frames[:, :, 1])
    assert torch.equal(result[1][:, 2:5], sound[:, 2:5])
    assert not torch.isclose(result[0][:, :, 2], frames[:, :, 2]).any()


def test_clean_and_noised_parts_side_by_side():
    video_mask = torch.ones(1, 1, 4, 2, 2)
    video_mask[:, :, 0], video_mask[:, :, 3] = CLEAN, NOISED
    video_mask[:, :, 2, 0] = CLEAN  # a part of a frame is at the level of the rest, however it is marked
    network, result = run(video_mask, None)
    assert network.calls[0]["timestep"][0].tolist() == [[0.0, 999.0, 999.0, 999.0]]
    given = (video_mask < 1).expand_as(result[0])
    assert torch.equal(result[0][given], clip(1)[0][given])


def test_a_mark_is_kept_whole_and_a_soft_mask_stays_soft():
    levels = torch.tensor([CLEAN, NOISED, 1 / 255, 0.5, 1.0])
    assert is_given(levels).tolist() == [True, True, False, False, False]
    assert torch.equal(kept(levels), torch.tensor([0.0, 0.0, 1 / 255, 0.5, 1.0]))
    assert is_given(levels.bfloat16()).tolist() == is_given(levels).tolist()  # in the types that masks are stored in
    assert is_given(levels.half()).tolist() == is_given(levels).tolist()
    assert (levels[1].half() > 0).item()


@pytest.mark.parametrize(
    ("made", "voiced", "names"),
    [("video", True, ["c", "u", "m"]), ("audio", True, ["c", "u", "m", "n"]), ("audio", False, ["c", "u", "m"])],
)
def test_only_what_is_made_is_guided(made, voiced, names):
    """With the sound given no timbre is pushed; a text term that only the given modality has costs no pass."""
    masks = {"video": torch.ones(1, 1, 4, 2, 2), "audio": torch.ones(1, 9, 1)}
    masks["audio" if made == "video" else "video"][:] = CLEAN
    voice = {"timbre": torch.ones(1, 1, 192), "timbre_positions": torch.tensor([[1]])} if voiced else {}
    network, result = run(masks["video"], masks["audio"], FULL, steps=1, **voice)
    assert len(network.calls) == len(names)
    other = Guidance(video_text=0, video_align=0) if made == "video" else Guidance(audio_text=0, audio_align=0)
    other = Guidance(**{**vars(other), "audio_timbre": 0.0})
    network, _ = run(masks["video"], masks["audio"], other, steps=1, **voice)
    assert len(network.calls) == 1  # all scales left belong to what is given
    given = {"video": 1, "audio": 0}[made]
    assert torch.equal(result[given], clip(1)[given])


def test_dropping_the_given_ones_terms_changes_nothing_that_is_made():
    mask = torch.zeros(1, 9, 1)
    _, dropped = run(None, mask, FULL)
    partly = mask.clone()
    partly[:, -1] = 1e-2  # hardly made, but made
    _, whole = run(None, partly, FULL)
    torch.testing.assert_close(dropped[0], whole[0], atol=2e-2, rtol=2e-2)
    making = FULL.making(video=True, audio=False)
    assert making.needed(0.5, True) == ("c", "u", "m")
    assert FULL.making(video=True, audio=True) is FULL


def test_nothing_to_make_is_refused():
    with pytest.raises(ValueError, match="nothing to make"):
        run(torch.zeros(1, 1, 4, 2, 2), torch.full((1, 9, 1), NOISED))


# ---------------------------------------------------------------- part of the way


def test_a_second_passs_levels_are_the_last_of_a_longer_run():
    assert torch.equal(flow_sigmas(4, 5.0, 0.4), flow_sigmas(10, 5.0)[-5:])
    assert torch.equal(flow_sigmas(7), flow_sigmas(7, denoise=1.0))
    distilled = find_preset("distilled").sigmas
    assert torch.equal(distilled(denoise=0.5), distilled()[-3:])
    assert len(distilled(denoise=0.01)) == 2
    for schedule in (lambda d: flow_sigmas(4, 5.0, d), lambda d: distilled(denoise=d)):
        for wrong in (0.0, 1.1, -1.0):
            with pytest.raises(ValueError, match="denoise is the part"):
                schedule(wrong)


def test_a_second_pass_begins_at_the_noised_clip():
    network, (noise, _), (frames, _) = Network(), clip(0), clip(1)
    sigmas = flow_sigmas(3, 5.0, 0.3)
    denoise(network, noise, None, torch.ones(1, 3, 8), sigmas=sigmas, guidance=PLAIN, video_latent=frames)
    assert 0 < sigmas[0] < 0.99
    torch.testing.assert_close(network.calls[0]["video"], sigmas[0] * noise + (1 - sigmas[0]) * frames)


# ---------------------------------------------------------------- spans


def times_of(latent):
    """Seconds that a latent frame is on screen."""
    return (0, 1 / 24) if latent == 0 else ((4 * latent - 3) / 24, (4 * latent + 1) / 24)


seconds = st.integers(0, 400).map(lambda n: n / 100) | st.floats(0, 4)


@given(start=seconds, length=seconds, latents=st.integers(1, 20))
def test_latent_frames_of_a_span(start, length, latents):
    end, near = start + length, 1e-6
    touching = [k for k in range(latents) if times_of(k)[0] < end - near and times_of(k)[1] > start + near]
    within = [k for k in range(latents) if times_of(k)[0] >= start - near and times_of(k)[1] <= end + near]
    if length > near:
        assert list(range(latents))[frames_touching(start, end, latents)] == touching
    assert list(range(latents))[frames_within(start, end, latents)] == within


@given(start=seconds, length=seconds, steps=st.integers(1, 90))
def test_audio_steps_of_a_span(start, length, steps):
    end, near = start + length, 1e-7
    touching = [k for k in range(steps) if k / 25 < end - near and (k + 1) / 25 > start + near]
    within = [k for k in range(steps) if k / 25 >= start - near and (k + 1) / 25 <= end + near]
    if length > 1e-6:
        assert list(range(steps))[steps_touching(start, end, steps)] == touching
    assert list(range(steps))[steps_within(start, end, steps)] == within
