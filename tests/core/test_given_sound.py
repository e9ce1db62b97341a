"""Recordings laid into a clip: sample for sample, and said what became of them; joins without a click."""

import math

import pytest
import torch

from nava_core.given import CLEAN, NOISED, fit_sound, join_sound
from nava_core.media import AAC_RATES
from nava_core.timbre.resample import resample

SECONDS = 25 / 24  # a clip of 25 frames
STEPS = 27


def noise(channels, samples, seed=0):
    return 0.1 * torch.randn(channels, samples, generator=torch.Generator().manual_seed(seed))


def said(given, *patterns):
    """Each pattern is in a note, and there is no note besides."""
    assert len(given.notes) == len(patterns), given.notes
    for pattern in patterns:
        assert any(pattern in note for note in given.notes), (pattern, given.notes)
    return True


# ---------------------------------------------------------------- the samples


@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize("rate", [48_000, 44_100, 24_000])
def test_a_recording_as_long_as_the_clip_is_given_sample_for_sample(rate, channels):
    recording = noise(channels, round(SECONDS * rate))
    given = fit_sound(recording, rate, SECONDS)
    assert torch.equal(given.waveform, recording)
    assert (given.sample_rate, given.notes, given.spans, given.is_whole) == (rate, (), ((0.0, SECONDS),), True)
    assert torch.equal(given.to_encode()[0], recording)
    assert given.to_encode()[1] == rate


def test_a_longer_recording_is_cut_and_goes_on_for_the_vae_alone():
    rate = 44_100
    recording = noise(2, 3 * rate)
    samples = round(SECONDS * rate)
    given = fit_sound(recording, rate, SECONDS)
    assert torch.equal(given.waveform, recording[:, :samples])
    assert said(given, f"goes on for {3 - SECONDS:.2f} s past the clip's end")
    heard, _ = given.to_encode()
    assert heard.shape[1] > samples
    assert torch.equal(heard, recording[:, : heard.shape[1]])


def test_a_shorter_recording_is_filled_with_silence_that_is_given():
    rate = 48_000
    recording = noise(1, rate // 2)
    given = fit_sound(recording, rate, SECONDS)
    assert torch.equal(given.waveform[:, : rate // 2], recording)
    assert not given.waveform[:, rate // 2 :].any()
    assert given.waveform.shape[1] == round(SECONDS * rate)
    assert given.is_whole
    assert torch.equal(given.steps(STEPS), torch.zeros(STEPS))
    assert said(given, f"ends {SECONDS - 0.5:.2f} s before the clip does; what follows is silence")


def test_what_is_not_filled_can_be_left_to_be_made():
    rate = 48_000
    recording = noise(2, rate // 2)
    given = fit_sound(recording, rate, SECONDS, at=0.3, rest="generated")
    begin = round(0.3 * rate)
    assert torch.equal(given.waveform[:, begin : begin + rate // 2], recording)
    assert not given.waveform[:, :begin].any()
    assert not given.is_whole
    assert given.spans == ((pytest.approx(0.3), pytest.approx(0.8)),)
    assert said(given, "begins 0.30 s into the clip; what comes before is generated", "what follows is generated")
    expected = torch.ones(STEPS)
    expected[8:20] = CLEAN  # 0.32 to 0.8 s: steps that are given from beginning to end
    assert torch.equal(given.steps(STEPS), expected)
    expected[8:20] = NOISED
    assert torch.equal(given.steps(STEPS, "matched noise"), expected)


def test_a_recording_given_to_the_clips_end_gives_the_last_step_too():
    given = fit_sound(noise(1, 48_000), 48_000, SECONDS, at=0.4, rest="generated")
    assert given.steps(STEPS).tolist() == [1.0] * 10 + [0.0] * (STEPS - 10)


def test_start_position_and_duration():
    rate = 48_000
    recording = noise(1, 4 * rate)
    given = fit_sound(recording, rate, SECONDS, start=1.25, at=0.125, duration=0.5)
    assert torch.equal(
        given.waveform[:, rate // 8 : rate // 8 + rate // 2], recording[:, 5 * rate // 4 : 7 * rate // 4]
    )
    assert given.waveform.count_nonzero() <= rate // 2
    assert said(given, "begins 0.12 s into the clip; what comes before is silence", "what follows is silence")
    assert torch.equal(given.to_encode()[0], given.waveform)  # silence is given, and heard
    for everything in (None, 0.0):
        assert fit_sound(recording, rate, SECONDS, duration=everything).is_whole


def test_the_vae_hears_a_cut_recording_go_on_where_the_rest_is_made():
    rate = 48_000
    recording = noise(1, 4 * rate)
    given = fit_sound(recording, rate, SECONDS, start=1.0, at=0.25, duration=0.5, rest="generated")
    heard, _ = given.to_encode()
    begin, end = rate // 4, 3 * rate // 4
    around = rate // 20
    assert torch.equal(heard[:, begin - around : end + around], recording[:, rate - around : 3 * rate // 2 + around])
    assert not given.waveform[:, :begin].any()
    assert not given.waveform[:, end:].any()


# ---------------------------------------------------------------- rates and channels


@pytest.mark.parametrize(("rate", "start"), [(22_000, 0.0), (50_000, 0.0), (192_000, 2.5), (11_111, 2.5)])
def test_rates_that_aac_does_not_have_are_resampled(rate, start):
    assert rate not in AAC_RATES
    hertz = 500.3  # no whole number of periods in a second
    recording = 0.5 * torch.sin(2 * math.pi * hertz * torch.arange(5 * rate, dtype=torch.float64) / rate).float()[None]
    given = fit_sound(recording, rate, SECONDS, start=start)
    assert given.sample_rate == 48_000
    assert any(f"resampled from {rate} Hz" in note for note in given.notes)
    assert any(f"goes on for {5 - start - SECONDS:.2f} s" in note for note in given.notes)
    place = start + torch.arange(given.waveform.shape[1], dtype=torch.float64) / 48_000
    expected = 0.5 * torch.sin(2 * math.pi * hertz * place).float()
    inner = slice(200, -200)
    # half a sample of 48 kHz may be lost where ``start`` lies between two samples
    assert (given.waveform[0, inner] - expected[inner]).abs().max() < 0.5 * 2 * math.pi * hertz * 0.51 / 48_000 + 1e-3
    whole = fit_sound(recording, rate, 5.0)
    assert torch.allclose(whole.waveform[0], resample(recording[0], rate, 48_000)[: 5 * 48_000], atol=1e-6)


def test_low_rates_and_many_channels_are_said():
    given = fit_sound(noise(1, 8000 * 2), 8000, SECONDS)
    assert given.sample_rate == 8000
    assert any("8000 Hz: there is nothing above 4 kHz" in note for note in given.notes)
    surround = noise(6, 96_000)
    given = fit_sound(surround, 48_000, SECONDS)
    assert torch.allclose(given.waveform, surround.mean(dim=0, keepdim=True)[:, :50_000])
    assert any("6 channels were mixed to one" in note for note in given.notes)


# ---------------------------------------------------------------- errors


RECORDING = noise(1, 48_000)
WRONG = [
    ({"waveform": torch.zeros(2, 0)}, "given sound is empty"),
    ({"waveform": RECORDING.clone().index_fill_(1, torch.tensor([7]), float("nan"))}, "NaN or infinity in the given"),
    ({"waveform": RECORDING.clone().index_fill_(1, torch.tensor([7]), float("inf"))}, "NaN or infinity in the given"),
    ({"waveform": torch.zeros(1, 48_000)}, "digital silence, every sample is 0"),
    ({"waveform": torch.cat([RECORDING, torch.zeros(1, 48_000)], dim=1), "start": 1.0}, "digital silence"),
    ({"waveform": torch.zeros(2, 2, 100)}, r"Sound must be \(channels, samples\)"),
    ({"start": 1.0}, r"1\.00 s long and cannot start 1\.00 s into itself"),
    ({"at": SECONDS}, r"clip is 1\.04 s long, so that no sound can begin at 1\.04 s"),
    ({"start": 0.95}, r"Only 0\.050 s of the given sound fall into the clip, at least 0\.1 s are needed"),
    ({"at": 1.0}, r"Only 0\.042 s of the given sound fall into the clip"),
    ({"duration": 0.01}, r"Only 0\.010 s of the given sound"),
    ({"start": -1.0}, r"start of given sound is in seconds, 0 or more; got -1\.0"),
    ({"at": float("nan")}, "position of given sound is in seconds, 0 or more; got nan"),
    ({"duration": -1.0}, r"duration of given sound is in seconds, 0 or more; got -1\.0"),
    ({"rest": "noise"}, "one of silence, generated; got 'noise'"),
    ({"sample_rate": 0}, "sample rate of given sound is above 0 Hz; got 0"),
    ({"seconds": 0.0}, r"longer than 0 seconds; got 0\.0"),
]


@pytest.mark.parametrize(("changes", "message"), WRONG, ids=[message[:30] for _, message in WRONG])
def test_what_cannot_be_given_is_refused_in_a_sentence(changes, message):
    arguments = {"waveform": RECORDING, "sample_rate": 48_000, "seconds": SECONDS, **changes}
    with pytest.raises(ValueError, match=message) as caught:
        fit_sound(**arguments)
    assert "\n" not in str(caught.value)


def test_an_unknown_way_to_show_it_is_refused():
    with pytest.raises(ValueError, match="shown as one of clean, matched noise; got 'loud'"):
        fit_sound(RECORDING, 48_000, SECONDS).steps(STEPS, "loud")


# ---------------------------------------------------------------- joins


def test_a_join_lies_where_the_overlap_is_quietest():
    rate, overlap = 48_000, 2000
    first, second = noise(2, 10_000, 1), noise(2, 12_000, 2)
    first[:, 9400:9900] *= 0.01  # within the last 2000 samples: 8000..10000
    second[:, 1400:1900] *= 0.01
    joined, seam = join_sound(first, second, rate, overlap)
    assert joined.shape == (2, 20_000)
    assert 9400 < seam < 9900
    assert torch.equal(joined[:, :9390], first[:, :9390])
    assert torch.equal(joined[:, 9910:], second[:, 1910:])


def test_a_join_has_constant_power():
    rate, overlap, length = 48_000, 2000, 480
    for seed in range(3):
        many = [join_sound(noise(1, 4000, 100 * seed + i), noise(1, 4000, 9000 + 100 * seed + i), rate, overlap)
                for i in range(60)]  # fmt: skip
        around = torch.stack([joined[0, seam - length // 2 : seam + length // 2] for joined, seam in many])
        power = around.square().reshape(60, 6, -1).mean(dim=(0, 2)) / 0.01
        assert (power > 0.8).all(), power
        assert (power < 1.2).all(), power


def test_a_join_of_a_sound_with_itself_is_the_sound():
    whole = noise(2, 20_000)
    joined, _ = join_sound(whole[:, :11_000], whole[:, 9000:], 48_000, 2000)
    assert torch.allclose(joined, whole, atol=1e-6)


def test_a_join_does_not_click():
    """Two low tones of other phase: no step from sample to sample is larger than in a fade of them."""
    place = torch.arange(10_000) / 48_000 * 2 * math.pi
    first, second = (0.5 * torch.sin(100 * place + phase)[None] for phase in (0.3, 2.1))
    joined, seam = join_sound(first, second, 48_000, 2000)
    steps = joined.diff().abs()
    assert 8000 <= seam <= 10_000
    assert steps.max() < 0.01  # 0.5 * 2 pi 100 / 48000 is 0.0065
    hard = torch.cat([first[:, :seam], second[:, seam - 8000 :]], dim=1).diff().abs()
    assert hard.max() > 5 * steps.max()


def test_joins_of_mono_and_stereo_and_without_overlap():
    mono, stereo = noise(1, 5000), noise(2, 5000, 1)
    joined, seam = join_sound(mono, stereo, 48_000, 0)
    assert torch.equal(joined, torch.cat([mono.expand(2, -1), stereo], dim=1))
    assert seam == 5000
    silent, _ = join_sound(torch.zeros(1, 3000), torch.zeros(1, 3000), 48_000, 1000)
    assert not silent.any()
    for overlap in (5001, -1):
        with pytest.raises(ValueError, match=f"cannot overlap by {overlap}"):
            join_sound(mono, stereo, 48_000, overlap)
    with pytest.raises(ValueError, match="of 2 and of 6 channels cannot be joined"):
        join_sound(stereo, noise(6, 5000), 48_000, 100)


def test_a_track_through_several_clips_may_be_silent_in_one_of_them():
    track = torch.cat([noise(1, 48_000), torch.zeros(1, 48_000), noise(1, 1000)], dim=1)
    silent = fit_sound(track, 48_000, 0.5, start=1.2, is_track=True)
    assert silent.is_whole
    assert not silent.waveform.any()
    rest = fit_sound(track, 48_000, 0.5, start=2.0, rest="generated", is_track=True)
    assert torch.equal(rest.waveform[:, :1000], track[:, 96_000:])
    assert rest.spans == ((0.0, 1000 / 48_000),)
    with pytest.raises(ValueError, match="digital silence"):
        fit_sound(torch.zeros(1, 48_000), 48_000, 0.5, is_track=True)
