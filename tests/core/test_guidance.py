"""The guidance table, and what its intervals and absent modalities leave of it."""

import copy
import json
import pickle
from pathlib import Path

import pytest
import torch

from nava_core.sampling import Guidance

TABLE = json.loads((Path(__file__).parents[1] / "golden" / "guidance_cases.json").read_text())
PREDICTIONS = {name: (pair["video"], pair["audio"]) for name, pair in TABLE["predictions"].items()}
SCALES = ("alignment", "video_text", "video_align", "audio_text", "audio_align", "audio_timbre")


def guidance_of(case):
    return Guidance(**{name: case[name] for name in SCALES})


def label(case):
    return "-".join(str(case[name]) for name in ("voice", *SCALES))


@pytest.mark.parametrize("case", TABLE["cases"], ids=label)
def test_table(case):
    guidance = guidance_of(case)
    needed = guidance.needed(0.5, case["voice"])
    assert list(needed) == case["needed"]
    video, audio = guidance.combine({name: PREDICTIONS[name] for name in needed}, 0.5, case["voice"])
    assert video == pytest.approx(case["video"], abs=1e-9)
    assert audio == pytest.approx(case["audio"], abs=1e-9)


def test_tensors():
    predictions = {
        name: tuple(None if x is None else torch.full((2, 3), x) for x in pair) for name, pair in PREDICTIONS.items()
    }
    video, audio = Guidance().combine(predictions, 1.0, True)
    assert torch.equal(video, torch.full((2, 3), 4.75))
    assert torch.equal(audio, torch.full((2, 3), 8.0))


def test_a_term_acts_inside_its_interval_only():
    guidance = Guidance(intervals={"video_align": (0.9, 0.5), "audio_align": (0.9, 0.5)})
    for sigma in (0.9, 0.7, 0.5):
        assert guidance.needed(sigma, False) == ("c", "u", "m")
        assert guidance.combine(PREDICTIONS, sigma, False) == Guidance().combine(PREDICTIONS, sigma, False)
    for sigma in (0.95, 0.49):
        assert guidance.needed(sigma, False) == ("c", "u")
        assert guidance.combine(PREDICTIONS, sigma, False) == (3.25, 5.0)


def test_one_modality_outside_leaves_the_other():
    guidance = Guidance(intervals={"video_text": (0.2, 0.0)})
    assert guidance.needed(0.5, False) == ("c", "u", "m")
    assert guidance.combine(PREDICTIONS, 0.5, False) == (2.5, 6.5)


@pytest.mark.parametrize("alignment", [True, False])
def test_outside_every_interval_is_the_conditional(alignment):
    names = ("video_text", "video_align", "audio_text", "audio_align", "audio_timbre")
    guidance = Guidance(alignment=alignment, intervals=dict.fromkeys(names, (0.5, 0.0)))
    assert guidance.needed(0.8, True) == ("c",)
    assert guidance.combine(PREDICTIONS, 0.8, True) == PREDICTIONS["c"]


def test_without_alignment_the_base_of_a_dropped_timbre_term_stays_c():
    guidance = Guidance(alignment=False, intervals={"audio_timbre": (0.5, 0.0)})
    assert guidance.needed(0.8, True) == ("c", "u")
    assert guidance.combine(PREDICTIONS, 0.8, True)[1] == 2.0 + 2.0 * (2.0 - 0.5)


def test_audio_only_runs_without_alignment():
    predictions = {name: (None, audio) for name, (_, audio) in PREDICTIONS.items()}
    on, off = Guidance(), Guidance(alignment=False)
    assert on.needed(0.5, False, has_video=False) == ("c", "u")
    assert on.needed(0.5, True, has_video=False) == ("c", "u", "n")
    assert on.combine(predictions, 0.5, False) == (None, off.combine(PREDICTIONS, 0.5, False)[1])
    assert on.combine(predictions, 0.5, True) == (None, off.combine(PREDICTIONS, 0.5, True)[1])


def test_picture_only_asks_for_nothing_that_only_sound_needs():
    guidance = Guidance(video_text=1.0, audio_text=4.0)
    assert guidance.needed(0.5, True, has_audio=False) == ("c",)
    predictions = {"c": (1.0, None), "u": (0.25, None)}
    assert Guidance().needed(0.5, True, has_audio=False) == ("c", "u")
    assert Guidance().combine(predictions, 0.5, True) == (2.5, None)


def test_a_missing_prediction_is_an_error():
    with pytest.raises(KeyError, match="u"):
        Guidance().combine({"c": PREDICTIONS["c"]}, 0.5, False)


def test_can_be_copied_sent_and_hashed():
    guidance = Guidance(intervals={"audio_text": (0.9, 0.1)})
    assert copy.deepcopy(guidance) == guidance
    assert pickle.loads(pickle.dumps(guidance)) == guidance
    assert hash(copy.deepcopy(guidance)) == hash(guidance)


@pytest.mark.parametrize(
    ("bad", "says"),
    [
        ({"audio_timbre": -1.0}, "audio_timbre"),
        ({"video_text": float("nan")}, "video_text"),
        ({"intervals": {"text": (1.0, 0.0)}}, "no guidance term 'text'"),
        ({"intervals": {"video_text": (0.0, 1.0)}}, "highest, lowest"),
    ],
)
def test_bad_settings_are_refused(bad, says):
    with pytest.raises(ValueError, match=says):
        Guidance(**bad)
