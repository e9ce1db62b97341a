"""Given parts come out of a finished clip as they went in: frames bit for bit, sound sample for sample."""

import math

import pytest
import torch

from nava_core.given import Originals, fit_sound

RATE = 48_000
SECONDS = 25 / 24
SAMPLES = round(SECONDS * RATE)
FADE = round(0.02 * RATE)


def noise(*shape, seed=0):
    return 0.1 * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def frames(count=9, seed=0):
    return torch.rand(count, 16, 24, 3, generator=torch.Generator().manual_seed(seed))


# ---------------------------------------------------------------- frames


@pytest.mark.parametrize("form", ["floats", "levels", "floats of levels"])
def test_kept_frames_are_exact_and_others_are_as_decoded(form):
    given, decoded = frames(), frames(seed=1)
    if form != "floats":
        given = (given * 255).round().to(torch.uint8)
    expected = given.float() / 255 if form != "floats" else given
    if form == "floats of levels":
        given = expected
    kept = torch.tensor([True, False, True, True, False, False, False, False, True])
    originals = Originals().with_frames(given, kept)
    put = originals.put_frames(decoded.clone())
    assert torch.equal(put[kept], expected[kept])
    assert torch.equal(put[~kept], decoded[~kept])
    assert not torch.equal(decoded, put)
    pieces = [originals.put_frames(decoded[first : first + 4].clone(), first) for first in range(0, 9, 4)]
    assert torch.equal(torch.cat(pieces), put)
    assert (originals.frames.dtype == torch.uint8) == (form != "floats")
    assert not originals.has_all_frames


def test_all_frames_and_none():
    given, decoded = frames(), frames(seed=1)
    assert Originals().with_frames(given).has_all_frames
    assert torch.equal(Originals().with_frames(given).put_frames(decoded.clone()), given)
    assert not Originals().has_all_frames
    assert Originals().put_frames(decoded) is decoded
    assert Originals().with_frames(given, torch.zeros(9)).put_frames(decoded) is decoded
    longer = Originals().with_frames(given[:3]).put_frames(decoded.clone())
    assert torch.equal(longer, torch.cat([given[:3], decoded[3:]]))


def test_a_kept_region_is_exact_and_the_made_one_fades_into_it():
    given, decoded = torch.full((5, 64, 96, 3), 0.25), torch.full((5, 64, 96, 3), 0.75)
    keep = torch.ones(5, 4, 6, dtype=torch.bool)
    keep[1:3, 1:3, 2:5] = False  # two frames with a region to make
    originals = Originals().with_frames(given).within(keep_blocks=keep)
    assert originals.kept_frames.tolist() == [True, False, False, True, True]
    put = originals.put_frames(decoded.clone())
    assert torch.equal(put[[0, 3, 4]], given[[0, 3, 4]])
    made = torch.zeros(64, 96, dtype=torch.bool)
    made[16:48, 32:80] = True
    assert torch.equal(put[1:3][:, ~made], given[1:3][:, ~made])
    assert torch.equal(put[1:3, 24:40, 40:72], decoded[1:3, 24:40, 40:72])  # 8 pixels in it is as it was made
    edge = put[1, 30, 31:41, 0]
    assert (edge.diff() > 0).sum() == 8
    assert edge.diff().max() < 0.07
    pieces = [originals.put_frames(decoded[first : first + 2].clone(), first) for first in range(0, 5, 2)]
    assert torch.equal(torch.cat(pieces), put)


def test_regions_that_are_kept_of_what_is_kept():
    given = torch.rand(3, 32, 48, 3)
    left, top = torch.ones(3, 2, 3, dtype=torch.bool), torch.ones(3, 2, 3, dtype=torch.bool)
    left[:, :, 0], top[1:, 0] = False, False
    first = Originals().with_frames(given).within(keep_blocks=left)
    both = first.within(keep_blocks=top)
    assert torch.equal(both.kept_blocks, left & top)
    assert not both.kept_frames.any()
    frames_too = both.within(keep_video_mask=torch.tensor([True, False, True]))
    assert not frames_too.kept_blocks[1].any()
    assert frames_too.kept_blocks[2].any()
    none = both.within(keep_blocks=torch.zeros_like(left))
    assert none.kept_blocks is None
    other = Originals().with_frames(torch.rand(3, 32, 48, 3)).within(keep_blocks=~left)
    merged = first.merged(other)
    made = torch.full_like(given, 0.5)
    put = merged.put_frames(made.clone())
    assert torch.equal(put[:, :, 16:], given[:, :, 16:])
    assert torch.equal(put[:, :, :16], other.frames[:, :, :16])


def test_frames_that_do_not_fit_are_refused():
    originals = Originals().with_frames(frames())
    with pytest.raises(ValueError, match="The clip is 24x32 and the frames given for it are 24x16"):
        originals.put_frames(torch.rand(9, 32, 24, 3))
    with pytest.raises(ValueError, match="9 frames were given"):
        Originals().with_frames(frames(), torch.ones(4))


# ---------------------------------------------------------------- sound


@pytest.mark.parametrize(("rate", "channels"), [(44_100, 1), (48_000, 2), (8000, 1)])
def test_sound_given_whole_comes_out_at_its_own_rate(rate, channels):
    recording = noise(channels, round(SECONDS * rate))
    originals = Originals.of_sound(fit_sound(recording, rate, SECONDS))
    assert originals.has_all_sound
    for decoded in (None, noise(2, SAMPLES, seed=1)):
        waveform, put_rate = originals.put_sound(decoded, RATE)
        assert torch.equal(waveform, recording)
        assert put_rate == rate


def test_a_given_span_is_exact_and_made_sound_fades_beside_it():
    recording = noise(2, RATE // 2)
    given = fit_sound(recording, RATE, SECONDS, at=0.25, rest="generated")
    originals = Originals.of_sound(given)
    assert not originals.has_all_sound
    decoded = noise(2, SAMPLES, seed=1)
    waveform, rate = originals.put_sound(decoded, RATE)
    begin, end = RATE // 4, 3 * RATE // 4
    assert rate == RATE
    assert torch.equal(waveform[:, begin:end], recording)
    assert torch.equal(waveform[:, : begin - FADE - 1], decoded[:, : begin - FADE - 1])
    assert torch.equal(waveform[:, end + FADE + 1 :], decoded[:, end + FADE + 1 :])
    share = (waveform / decoded)[:, begin - FADE : begin]  # nothing of the recording lies before its beginning
    assert (share.diff() <= 1e-5).all()
    assert share[:, 0].min() > 0.99
    assert share[:, -1].max() < 0.01
    assert torch.allclose(share.flip(1), (waveform / decoded)[:, end : end + FADE], atol=1e-4)


def test_the_made_part_of_a_retake_fades_over_from_what_was_there():
    """No dip and no jump: the clip's own sound goes on beyond what is kept of it."""
    place = torch.arange(SAMPLES) / RATE * 2 * math.pi
    old, new = (0.5 * torch.sin(100 * place + phase).expand(2, -1) for phase in (0.0, 1.0))
    originals = Originals().with_sound(old, RATE, [(0.0, 0.4025), (0.7025, SECONDS)])
    waveform, _ = originals.put_sound(new, RATE)
    first, last = round(0.4025 * RATE), round(0.7025 * RATE)
    assert torch.equal(waveform[:, :first], old[:, :first])
    assert torch.equal(waveform[:, last:], old[:, last:])
    assert torch.equal(waveform[:, first + FADE + 1 : last - FADE - 1], new[:, first + FADE + 1 : last - FADE - 1])
    assert waveform.diff().abs().max() < 0.012
    assert torch.cat([old[:, :first], new[:, first:]], dim=1).diff().abs().max() > 0.05


def test_a_recording_that_is_cut_goes_on_into_the_fade():
    place = torch.arange(2 * RATE) / RATE * 2 * math.pi
    recording = 0.5 * torch.cos(100 * place)[None]
    given = fit_sound(recording, RATE, SECONDS, start=0.5, at=0.25, duration=0.5, rest="generated")
    waveform, _ = Originals.of_sound(given).put_sound(torch.zeros(2, SAMPLES), RATE)
    begin, end = RATE // 4, 3 * RATE // 4
    assert torch.equal(waveform[:, begin:end], recording[:, RATE // 2 : RATE].expand(2, -1))
    assert waveform.diff().abs().max() < 0.01  # no jump of 0.5 where it begins and ends
    assert not waveform[:, : begin - FADE - 1].any()


def test_a_given_span_keeps_its_own_rate_and_mono_becomes_stereo():
    rate = 44_100
    recording = noise(1, rate // 2)
    originals = Originals.of_sound(fit_sound(recording, rate, SECONDS, rest="generated"))
    hertz = 440.0
    decoded = 0.5 * torch.sin(2 * math.pi * hertz * torch.arange(SAMPLES) / RATE).expand(2, -1)
    waveform, put_rate = originals.put_sound(decoded, RATE)
    assert (put_rate, waveform.shape) == (rate, (2, round(SECONDS * rate)))
    assert torch.equal(waveform[:, : rate // 2], recording.expand(2, -1))
    place = torch.arange(waveform.shape[1]) / rate
    expected = 0.5 * torch.sin(2 * math.pi * hertz * place)
    inner = slice(rate // 2 + FADE + 1, -100)
    assert (waveform[:, inner] - expected[inner]).abs().max() < 1e-3


def test_shorter_decoded_sound_is_filled():
    recording = noise(1, RATE // 2)
    originals = Originals.of_sound(fit_sound(recording, RATE, SECONDS, rest="generated"))
    assert originals.put_sound(noise(2, SAMPLES - 500, seed=2), RATE)[0].shape == (2, SAMPLES)


def test_no_sound_given_and_sound_that_is_missing():
    decoded = noise(2, SAMPLES)
    assert Originals().put_sound(decoded, RATE) == (decoded, RATE)
    assert Originals().put_sound(None, 0) == (None, 0)
    assert not Originals().has_all_sound
    part = Originals().with_sound(noise(2, SAMPLES), RATE, [(0.0, 0.5)])
    with pytest.raises(ValueError, match="Only a part of the clip's sound is given"):
        part.put_sound(None, 0)


# ---------------------------------------------------------------- more and fewer


def test_merged():
    picture, sound = Originals().with_frames(frames()), Originals().with_sound(noise(2, SAMPLES), RATE)
    for both in (picture.merged(sound), sound.merged(picture)):
        assert both.has_all_frames
        assert both.has_all_sound
    first = torch.arange(9) < 3
    last = torch.arange(9) >= 2
    one, other = frames(), frames(seed=1)
    merged = Originals().with_frames(one, first).merged(Originals().with_frames(other, last))
    assert merged.has_all_frames
    assert torch.equal(merged.put_frames(frames(seed=2)), torch.cat([one[:2], other[2:]]))
    with pytest.raises(ValueError, match="must have one size and number"):
        merged.merged(Originals().with_frames(frames(4)))


def test_merged_sounds():
    early, late, decoded = noise(1, SAMPLES), noise(2, SAMPLES, seed=1), noise(2, SAMPLES, seed=2)
    merged = Originals().with_sound(early, RATE, [(0.0, 0.5)]).merged(Originals().with_sound(late, RATE, [(0.4, 0.6)]))
    assert merged.kept_sound == ((0.0, 0.6),)
    waveform, _ = merged.put_sound(decoded, RATE)
    a, b, c = (round(second * RATE) for second in (0.4, 0.5, 0.6))
    assert torch.equal(waveform[:, :a], early[:, :a].expand(2, -1))
    assert torch.equal(waveform[:, a:c], late[:, a:c])
    assert torch.equal(waveform[:, c + FADE + 1 :], decoded[:, c + FADE + 1 :])
    assert b < c
    other_rate = Originals().with_sound(noise(1, 44_100), 44_100, [(0.0, 0.5)])
    with pytest.raises(ValueError, match="Sounds of 48000 and 44100 Hz"):
        merged.merged(other_rate)
    whole = Originals().with_sound(noise(1, 44_100), 44_100)
    assert merged.merged(whole).has_all_sound
    assert merged.merged(whole).sample_rate == 44_100


def test_within():
    originals = Originals().with_frames(frames()).with_sound(noise(2, SAMPLES), RATE)
    assert originals.within().has_all_frames
    assert originals.within().has_all_sound
    kept = torch.arange(9) != 4
    less = originals.within(kept, [(0.0, 0.25), (0.5, 2.0)])
    assert less.kept_frames.tolist() == kept.tolist()
    assert less.kept_sound == ((0.0, 0.25), (0.5, SAMPLES / RATE))
    assert not less.has_all_frames
    assert not less.has_all_sound
    assert less.within(~kept, []).kept_frames.sum() == 0
    nothing = less.within(None, [])
    decoded = noise(2, SAMPLES, seed=3)
    assert nothing.put_sound(decoded, RATE) == (decoded, RATE)
