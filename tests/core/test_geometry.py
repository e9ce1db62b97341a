"""Lengths, sizes, buckets and the order of audio tokens."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nava_core.geometry import (
    BUCKETS,
    PRESETS,
    ClipGeometry,
    audio_latent_to_tokens,
    audio_latents_of_seconds,
    audio_tokens_to_latent,
    choose_bucket,
    cover_crop,
    frames_of_latents,
    latents_of_frames,
    latents_of_seconds,
    round_size,
    seconds_of_latents,
)


def test_the_papers_clip():
    clip = ClipGeometry(6, 1280, 704)
    assert clip.frames == 145
    assert clip.latent_shape == (48, 37, 44, 80)
    assert clip.audio_tokens == 152
    assert clip.audio_shape == (8, 152, 16)
    assert clip.video_tokens == 32_560
    assert clip.tokens == 32_560 + 152
    assert clip.duration == 145 / 24
    assert clip.warnings == []


@pytest.mark.parametrize(("seconds", "audio"), [(1, 27), (2, 52), (4, 102), (5, 127), (8, 202), (10, 252)])
def test_audio_covers_the_picture(seconds, audio):
    clip = ClipGeometry(seconds, 960, 960)
    assert clip.frames == 24 * seconds + 1
    assert clip.audio_tokens == audio
    assert clip.audio_tokens / 25 >= clip.duration > (clip.audio_tokens - 1) / 25


def test_audio_only():
    clip = ClipGeometry(4.3, mode="audio")
    assert (clip.frames, clip.latent_shape, clip.video_tokens) == (0, None, 0)
    assert clip.audio_tokens == 108
    assert clip.duration == 4.3
    assert audio_latents_of_seconds(4.36) == 109  # 109.00000000000001 in floating point


def test_picture_only():
    clip = ClipGeometry(2, 704, 1280, mode="video")
    assert clip.latent_shape == (48, 13, 80, 44)
    assert (clip.audio_tokens, clip.audio_shape) == (0, None)


def test_fractions_of_a_second_become_whole_latents():
    assert ClipGeometry(2.5, 64, 64).latent_frames == 16
    assert ClipGeometry(2.5, 64, 64).warnings == []
    clip = ClipGeometry(2.4, 64, 64)
    assert clip.frames == 4 * 14 + 1
    assert "2.333 s" in clip.warnings[0]


def test_warnings():
    assert "10 s" in ClipGeometry(10.5, 64, 64).warnings[0]
    assert "12 s" in ClipGeometry(12, mode="audio").warnings[0]
    assert "multiples of 32" in ClipGeometry(1, 1280, 720).warnings[0]
    assert ClipGeometry(1, 1280, 720).video_tokens == 7 * 23 * 40


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"seconds": 0}, "longer than 0"),
        ({"seconds": float("nan")}, "longer than 0"),
        ({"seconds": 1, "width": 1270}, "width must be a multiple of 16 pixels; got 1270, the nearest is 1264"),
        ({"seconds": 1, "height": 0}, "height .* nearest is 16"),
        ({"seconds": 1, "mode": "both"}, "mode"),
    ],
)
def test_impossible_clips_are_refused(arguments, says):
    with pytest.raises(ValueError, match=says):
        ClipGeometry(**arguments)


@given(st.integers(1, 2000))
def test_conversions_undo_each_other(latents):
    assert latents_of_frames(frames_of_latents(latents)) == latents
    assert latents_of_seconds(seconds_of_latents(latents)) == latents


@pytest.mark.parametrize(("name", "size"), PRESETS.items(), ids=list(PRESETS))
def test_presets_need_no_padding_and_are_buckets(name, size):
    assert ClipGeometry(1, *size).warnings == []
    assert choose_bucket(*size, 640 if name.startswith("small") else 960) == size
    assert name.endswith(f" {size[0]}x{size[1]}")


# midpoints between the nominal ratios: 0.9, 0.775, 0.7083, 0.6146, 0.53125, 0.45
@pytest.mark.parametrize(
    ("ratio", "short", "long"),
    [
        (1.0, 60, 60),
        (0.901, 60, 60),
        (0.899, 54, 66),
        (0.776, 54, 66),
        (0.774, 52, 68),
        (0.709, 52, 68),
        (0.708, 46, 74),
        (0.615, 46, 74),
        (0.614, 44, 80),
        (0.60, 44, 80),
        (0.532, 44, 80),
        (0.531, 42, 84),
        (0.451, 42, 84),
        (0.449, 38, 96),
        (0.1, 38, 96),
    ],
)
def test_buckets(ratio, short, long):
    assert (short, long) in BUCKETS[960].values()
    side = round(10_000 * ratio)
    assert choose_bucket(side, 10_000) == (16 * short, 16 * long)
    assert choose_bucket(10_000, side) == (16 * long, 16 * short)


@pytest.mark.parametrize(
    ("scale", "sides"),
    [
        (640, [(640, 640), (576, 704), (544, 720), (496, 784), (480, 832), (448, 896), (400, 1024)]),
        (512, [(512, 512), (448, 560), (432, 576), (400, 624), (384, 672), (352, 720), (320, 816)]),
    ],
)
def test_smaller_buckets(scale, sides):
    """At every nominal ratio; the ratio that a bucket is chosen by is that of the large scale."""
    for nominal, (short, long) in zip((1, 4 / 5, 3 / 4, 2 / 3, 9 / 16, 1 / 2, 2 / 5), sides, strict=True):
        assert choose_bucket(10_000, round(10_000 * nominal), scale) == (long, short)
        assert choose_bucket(round(10_000 * nominal), 10_000, scale) == (short, long)
    with pytest.raises(ValueError, match="scales 960, 640, 512; got 700"):
        choose_bucket(640, 640, 700)


def test_cover_crop():
    assert cover_crop(4000, 3000, 1280, 704) == ((1280, 960), (0, 128, 1280, 832))
    assert cover_crop(100, 400, 960, 960) == ((960, 3840), (0, 1440, 960, 2400))
    assert cover_crop(1280, 704, 1280, 704) == ((1280, 704), (0, 0, 1280, 704))


@given(*[st.integers(1, 5000)] * 4)
def test_the_crop_lies_inside_and_keeps_the_shape(source_width, source_height, width, height):
    scaled, (left, top, right, bottom) = cover_crop(source_width, source_height, width, height)
    assert (right - left, bottom - top) == (width, height)
    assert 0 <= left <= right <= scaled[0]
    assert 0 <= top <= bottom <= scaled[1]
    assert scaled[0] == width or scaled[1] == height
    assert abs(left - (scaled[0] - right)) <= 1
    assert abs(top - (scaled[1] - bottom)) <= 1


def test_round_size():
    assert round_size(1270, 719) == (1264, 720)
    assert round_size(1270, 719, 32) == (1280, 704)
    assert round_size(3, 8) == (16, 16)


def test_audio_tokens_are_channel_major():
    latent = torch.arange(2 * 8 * 3 * 16).reshape(2, 8, 3, 16)
    tokens = audio_latent_to_tokens(latent)
    assert tokens.shape == (2, 3, 128)
    assert tokens[1, 2, 5 * 16 + 7] == latent[1, 5, 2, 7]
    assert torch.equal(audio_tokens_to_latent(tokens), latent)


def test_other_latents_are_refused():
    with pytest.raises(ValueError, match="audio latent"):
        audio_latent_to_tokens(torch.zeros(1, 8, 3, 15))
    with pytest.raises(ValueError, match="tokens"):
        audio_tokens_to_latent(torch.zeros(1, 3, 64))
    with pytest.raises(ValueError, match="0x5"):
        choose_bucket(0, 5)
    with pytest.raises(ValueError, match="side is 0"):
        cover_crop(0, 5, 16, 16)


@pytest.mark.parametrize("frames", range(1, 60))
def test_the_shortest_clip_that_covers_a_time(frames):
    from nava_core.geometry import seconds_covering

    for seconds in (frames / 24, (frames - 0.5) / 24):
        covering = seconds_covering(seconds)
        clip = ClipGeometry(max(covering, 1 / 24), 64, 64)
        assert clip.frames >= frames
        assert clip.frames - 4 < frames
