"""Where given pictures stand in a clip: whole latents, a lead-in that is no first frame, and what is said."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nava_core.geometry import frames_of_latents
from nava_core.given import place_pictures


@given(st.integers(1, 60), st.integers(0, 48))
def test_latents_and_frames_belong_together(count, first):
    stretch = place_pictures(count, first, 49)
    latents, frames = stretch.latents, stretch.frames
    assert 0 <= latents.start < latents.stop <= 13
    assert frames.start == (0 if latents.start == 0 else 4 * latents.start - 3)
    assert frames.stop == frames_of_latents(latents.stop)
    assert (len(stretch.to_encode) - 1) % 4 == 0
    count_of_latents = (len(stretch.to_encode) - 1) // 4 + 1
    assert count_of_latents - stretch.skip == latents.stop - latents.start
    assert stretch.to_encode[len(stretch.to_encode) - len(stretch.pictures) :] == stretch.pictures
    assert stretch.skip == (0 if latents.start == 0 else 4)


@given(st.integers(8, 60), st.integers(0, 41))
def test_a_moving_stretch_stands_where_it_was_asked_for(count, first):
    stretch = place_pictures(count, first, 49)
    for frame, number in zip(range(49)[stretch.frames], stretch.pictures, strict=True):
        assert number == frame - first


@pytest.mark.parametrize(("first", "latent"), [(1, 1), (4, 1), (5, 2), (48, 12)])
def test_one_picture_is_held_for_its_latent(first, latent):
    stretch = place_pictures(1, first, 49)
    assert stretch.latents == slice(latent, latent + 1)
    assert stretch.pictures == (0,) * 4
    assert stretch.to_encode == (0,) * 17
    assert "Held" in stretch.notes[0]


def test_what_is_not_given_is_said():
    assert place_pictures(49, 0, 49).notes == ()
    assert place_pictures(52, 0, 49).notes == ("3 pictures are cut: the clip ends before.",)
    late = place_pictures(12, 6, 49)
    assert late.latents == slice(3, 5)
    assert late.pictures == tuple(range(3, 11))
    assert "3 pictures are not given but lead in" in late.notes[0]
    assert "1 picture is left out" in late.notes[1]


@pytest.mark.parametrize("first", [-1, 49, 400])
def test_a_place_outside_the_clip_is_refused(first):
    with pytest.raises(ValueError, match="within it"):
        place_pictures(3, first, 49)
