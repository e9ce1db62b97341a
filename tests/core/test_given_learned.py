"""Given parts with a network that has learnt: the picture follows sound, retakes and segments join, given is kept.

The figures and what they mean are in ``docs/given_parts.md``; here are margins that a fault breaks.
"""

import json

import pytest
import torch

from benchmarks import given
from benchmarks.learned import FRAMES, STEPS, Apart, World
from nava_core import load_backbone
from nava_core.given import frames_touching, steps_touching

SCENES = 20


@pytest.fixture(scope="module")
def lab(golden):
    network = load_backbone(golden / "learned_small.safetensors", dtype=torch.float32)
    return given.Lab(network, World.read(golden / "learned_world.safetensors", SCENES))


@pytest.fixture(scope="module")
def free(lab):
    return lab.free()


@pytest.fixture(scope="module")
def to_sound(lab):
    """Clips made to the true sound."""
    return lab.with_given(steps=slice(None))


def mean(values):
    return values.nanmean().item()


def test_truth_of_any_length(lab):
    world = lab.world
    assert mean(lab.out_of_time(world["video"])) < 10
    assert mean(lab.heard_out_of_time(world["audio"])) < 15
    assert mean(world.lips(*lab.truth)) > 0.9
    assert mean(lab.misplaced(world["video"])) < 0.05
    assert mean(world.grain(world["video"])) < 1e-5
    video, audio = world.rendered(5 * (FRAMES - 1) + 1, 5 * 50 + 2)
    assert torch.equal(video[:, :, :FRAMES], world["video"])
    assert torch.equal(audio[:, :STEPS], world["audio"])
    for k in range(5):
        own = slice(12 * k + 1, 12 * k + 13)
        assert mean(lab.out_of_time(video, own)) < 10
        assert mean(lab.heard_out_of_time(audio, slice(50 * k, 50 * k + STEPS))) < 15
        assert mean(world.lips_truth(video, own)) > 0.99


def test_picture_follows_given_sound(lab, to_sound):
    apart = lab.with_(network=Apart(lab.network)).with_given(steps=slice(None))
    assert torch.equal(to_sound[1], lab.world["audio"])
    assert mean(lab.out_of_time(to_sound[0])) < 45 < 100 < mean(lab.out_of_time(apart[0]))
    lips = [mean(lab.world.lips(video, lab.world["audio"])) for video, _ in (to_sound, apart)]
    assert lips[0] > 0.6 > 0.35 > lips[1]


def test_aligned_guidance_works_with_given_sound(lab):
    clip = lab.with_(guidance=given.ALIGNED).with_given(steps=slice(None))
    assert mean(lab.out_of_time(clip[0])) < 40
    assert mean(lab.world.lips(clip[0], lab.world["audio"])) > 0.7


FRAMES_AGAIN, STEPS_AGAIN = frames_touching(*given.RETAKEN, FRAMES), steps_touching(*given.RETAKEN, STEPS)


@pytest.mark.parametrize(
    ("picture", "sound", "shown", "most_ms"),
    [(True, True, "clean", 125), (True, False, "clean", 45), (True, False, "matched noise", 110)],
)
def test_a_span_made_again_joins_what_is_kept(lab, free, picture, sound, shown, most_ms):
    kept_frames = given.others(FRAMES_AGAIN, FRAMES) if picture else slice(None)
    kept_steps = given.others(STEPS_AGAIN, STEPS) if sound else slice(None)
    video, audio = lab.with_given(kept_frames, kept_steps, shown)
    assert torch.equal(video[:, :, kept_frames], lab.world["video"][:, :, kept_frames])
    assert torch.equal(audio[:, kept_steps], lab.world["audio"][:, kept_steps])
    assert not torch.equal(video[:, :, FRAMES_AGAIN], lab.world["video"][:, :, FRAMES_AGAIN])
    assert mean(lab.out_of_time(video, FRAMES_AGAIN)) < most_ms < mean(lab.out_of_time(free[0], FRAMES_AGAIN))
    assert mean(lab.misplaced(video, FRAMES_AGAIN)) < 0.5 < mean(lab.misplaced(free[0], FRAMES_AGAIN))


def test_sound_made_again_keeps_the_rest_and_the_scene(lab):
    kept = given.others(STEPS_AGAIN, STEPS)
    video, audio = lab.with_given(slice(None), kept)
    assert torch.equal(video, lab.world["video"])
    assert torch.equal(audio[:, kept], lab.world["audio"][:, kept])
    assert not torch.equal(audio[:, STEPS_AGAIN], lab.world["audio"][:, STEPS_AGAIN])
    assert mean(lab.world.material_right(audio, STEPS_AGAIN)) > 0.6
    assert mean(lab.world.rain_right(audio, STEPS_AGAIN)) > 0.8


def test_the_mouth_alone_is_made_to_the_kept_speech(lab):
    masks = torch.zeros(1, 1, FRAMES, *given.SIZE), torch.zeros(1, STEPS, 1)
    masks[0][..., 0, 0] = 1
    video = lab.with_masks(*masks)[0]
    assert torch.equal(video[..., 1:, :], lab.world["video"][..., 1:, :])
    assert torch.equal(video[..., 0, 1:], lab.world["video"][..., 0, 1:])
    assert mean(lab.world.lips(video, lab.world["audio"])) > 0.5


def test_segments_keep_a_tracks_time(lab):
    lab = lab.with_(world=lab.world.first(12))
    track = lab.world.rendered(37, 3 * STEPS)[1]
    last = slice(25, 37)
    kept, drifted = (
        mean(lab.out_of_time(given.segments(lab, track, steps_on, count=3)[0], last)) for steps_on in (50, STEPS)
    )
    assert kept < 60 < 100 < drifted  # two times 80 ms


@pytest.mark.parametrize("place", ["first frame", "a frame amid", "last frame"])
def test_a_clean_frame_alone_tells_the_colour_and_the_place(lab, place):
    """Without a text; what is noised to the level of the rest tells little."""
    lab = lab.with_(world=lab.world.without_text())
    frames = given.PLACES[place]
    made = given.others(slice(frames[0], frames[0] + 1), FRAMES)
    clean, noised = (lab.with_given(frames, shown=shown)[0] for shown in given.SHOWN)
    assert mean(lab.world.colour_right(clean, made)) > 0.9
    assert mean(lab.misplaced(clean, made)) < 0.3
    assert mean(lab.world.colour_right(noised, made)) < 0.7
    assert mean(lab.misplaced(noised, made)) > 0.5


def test_second_pass_keeps_the_clip(lab, free):
    video = lab.again(0.5, lab.truth, torch.zeros(1, STEPS, 1))[0]
    assert mean(lab.out_of_time(video)) < 45
    assert mean(lab.misplaced(video)) < 0.4 * mean(lab.misplaced(free[0]))
    assert not torch.equal(video, lab.world["video"])


def test_the_page_shows_the_measured_figures():
    sections, page = json.loads(given.RESULTS.read_text()), given.DOCS.read_text()
    assert list(sections) == list(given.SECTIONS)
    assert given.with_tables(page, sections) == page
    scenes, steps = ({section[name] for section in sections.values()} for name in ("scenes", "steps"))
    assert f"{scenes.pop()} scenes, {steps.pop()} steps" in page
    assert not scenes
    assert not steps
