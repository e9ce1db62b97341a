"""Batches: good, bad, double, foreign and half-written lines, kills and second runs."""

import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import time
import wave
from dataclasses import replace
from pathlib import Path

import pytest

from nava_core.batch import Watcher, check_batch, run_batch
from nava_core.checkpoint import WrongFileError
from nava_core.jobs import Defaults, LineError
from nava_core.lines import MAX_LINE, parse_line
from nava_core.pipeline import ClipLatents
from nava_core.prompt import default_negative
from nava_core.sampling import CONDITIONAL

FAKE = Path(__file__).with_name("_fake_pipeline.py")
spec = importlib.util.spec_from_file_location("_fake_pipeline", FAKE)
fake = importlib.util.module_from_spec(spec)
spec.loader.exec_module(fake)
FAST = Defaults(steps=2)
SPEECH = "He says <S>Yes.<E> She says <S>No.<E>"


@pytest.fixture
def pipeline():
    return fake.FakePipeline()


def write(folder, *lines, name="clips.jsonl", encoding="utf-8"):
    text = "\n".join(line if isinstance(line, str) else json.dumps(line, ensure_ascii=False) for line in lines)
    path = folder / name
    path.write_bytes((text + "\n").encode(encoding))
    return path


def run(source, out, pipeline, **options):
    return run_batch(source, out, lambda: pipeline, FAST, **options)


def statuses(result):
    return [outcome.status for outcome in result.outcomes]


def records(out):
    return [json.loads(line) for line in (out / "report.jsonl").read_text().splitlines()]


def clips(out):
    return sorted(path.name for path in out.iterdir() if path.suffix in (".mp4", ".wav"))


def parse(tmp_path, **line):
    return parse_line(json.dumps(line).encode(), tmp_path, FAST)


# --- lines -------------------------------------------------------------------------------------------------------


def test_a_line_says_everything(tmp_path):
    for name in ("a.png", "one.wav", "two.wav"):
        (tmp_path / name).write_bytes(name.encode())
    job = parse(
        tmp_path, prompt=SPEECH, image_path="a.png", spk_wavs=["one.wav", str(tmp_path / "two.wav")],
        seconds=2.5, seed=2**63, width=320, height=192, negative="blur", steps=7, id="Szene 1 é",
    )  # fmt: skip
    request = job.request()
    assert request["prompt"] == SPEECH
    assert request["image"] == tmp_path / "a.png"
    assert request["voices"] == (tmp_path / "one.wav", tmp_path / "two.wav")
    assert request["assignment"] is None
    assert (request["seconds"], request["seed"], request["steps"]) == (2.5, 2**63, 7)
    assert (request["width"], request["height"], request["size_from_image"]) == (320, 192, False)
    assert (request["mode"], request["negative"], job.name, job.suffix) == ("video+audio", "blur", "Szene 1 é", ".mp4")
    assert job.warnings == ()


def test_what_a_line_leaves_out_comes_from_the_defaults(tmp_path):
    (tmp_path / "a.png").touch()
    defaults = Defaults(seconds=3, seed=5, steps=9, scales={"video_text": 4.0})
    job = parse_line(b'{"prompt": "A bell.", "audio_only": true, "seed": null}', tmp_path, defaults)
    assert (job.seconds, job.seed, job.steps, job.mode, job.suffix) == (3, 5, 9, "audio", ".wav")
    assert job.negative == default_negative("audio", "zh")
    assert job.guidance.video_text == 4.0
    with_image = parse(tmp_path, prompt="A bell.", image_path="a.png")
    assert with_image.size_from_image
    assert with_image.guidance is None
    assert with_image.negative == default_negative("video", "zh")
    assert parse(tmp_path, prompt="a", negative="zero").request()["negative"] == ""
    assert parse_line(b'{"prompt": "a", "negative": "default"}', tmp_path, Defaults(negative="x")).negative == (
        default_negative("video", "zh")
    )


def test_the_scale_of_a_first_frame_is_part_of_the_content_where_it_decides(tmp_path):
    (tmp_path / "a.png").touch()
    keys = {
        scale: parse(tmp_path, prompt="A bell.", image_path="a.png", image_scale=scale).key() for scale in (960, 640)
    }
    assert keys[960] == parse(tmp_path, prompt="A bell.", image_path="a.png").key()
    assert keys[640] != keys[960]
    sized = {"prompt": "A bell.", "image_path": "a.png", "width": 320, "height": 192}
    assert parse(tmp_path, **sized, image_scale=640).key() == parse(tmp_path, **sized).key()
    job = parse_line(b'{"prompt": "A bell."}', tmp_path, Defaults(image_scale=512))
    assert job.request()["image_scale"] == 512
    with pytest.raises(ValueError, match="scales 960, 640, 512; got 700"):
        parse(tmp_path, prompt="A bell.", image_scale=700)


def test_a_preset_brings_its_own_guidance_and_is_part_of_the_content(tmp_path):
    plain = parse(tmp_path, prompt="A bell.")
    preset = parse(tmp_path, prompt="A bell.", preset="distilled")
    assert (plain.request()["preset"], preset.request()["preset"], preset.guidance) == (None, "distilled", None)
    assert preset.key() != plain.key()
    assert preset.key() == parse(tmp_path, prompt="A bell.", preset="distilled", steps=9).key()  # its own steps
    assert preset.key() == parse(tmp_path, prompt="A bell.", preset="4 steps (distilled)").key()
    defaults = Defaults(preset="distilled", scales={"video_text": 1.5})
    job = parse_line(b'{"prompt": "A bell."}', tmp_path, defaults)
    assert job.guidance == replace(CONDITIONAL, video_text=1.5)


def test_a_negative_counts_only_where_the_preset_uses_it(tmp_path):
    def key(negative, **defaults):
        line = json.dumps({"prompt": "A bell.", "negative": negative}).encode()
        return parse_line(line, tmp_path, Defaults(**defaults)).key()

    assert key("a", preset="distilled") == key("b", preset="distilled")
    assert key("a", preset="distilled", scales={"video_text": 2}) != key(
        "b", preset="distilled", scales={"video_text": 2}
    )
    assert key("a") != key("b")


def test_loras_are_part_of_the_content_where_there_are_any(tmp_path, pipeline):
    source, out = write(tmp_path, {"prompt": "one"}, {"prompt": "two", "id": "b"}), tmp_path / "out"

    def made_with(*loras):
        return statuses(run_batch(source, out, lambda: pipeline, replace(FAST, loras=loras)))

    plain = parse(tmp_path, prompt="one")
    assert replace(plain, loras=()).key() == plain.key()
    assert "loras" not in plain.request()
    assert made_with() == ["made", "made"]
    for loras in ([("abc", 1.0)], [("abc", 0.5)], [("abd", 0.5)], [("abc", 1.0), ("abd", 0.5)]):
        assert made_with(*loras) == ["made", "made"]
        assert made_with(*loras) == ["skipped", "skipped"]


def test_voices_are_bound_to_spans(tmp_path):
    for name in ("a.wav", "b.wav"):
        (tmp_path / name).write_bytes(name.encode())
    one = parse(tmp_path, prompt=SPEECH, spk_wavs="a.wav")
    assert (len(one.voices), one.assignment) == (1, None)
    second = parse(tmp_path, prompt=SPEECH, spk_wavs=[None, "b.wav"])
    assert (second.voices, second.assignment) == ((tmp_path / "b.wav",), (None, 0))
    twice = parse(tmp_path, prompt=SPEECH + "<S>Why?<E>", spk_wavs=["a.wav", "b.wav", "a.wav"])
    assert (len(twice.voices), twice.assignment) == (2, (0, 1, 0))


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ({}, "no prompt"),
        ({"prompt": "  "}, "empty"),
        ({"prompt": 7}, "prompt must be text"),
        ({"prompt": "half \ud800"}, "surrogate"),
        ({"prompt": "a <S>b"}, "span"),
        ({"prompt": "a", "seconds": "6"}, "seconds must be a number"),
        ({"prompt": "a", "seconds": -1}, "seconds must be a number above 0"),
        ({"prompt": "a", "seconds": 600}, "too long"),
        ({"prompt": "a", "seconds": 10**400}, "seconds must be a number above 0"),
        ({"prompt": "a", "seconds": 0.04}, "too short"),
        ({"prompt": "a", "seed": 1.5}, "seed must be a whole number"),
        ({"prompt": "a", "seed": True}, "seed must be a whole number"),
        ({"prompt": "a", "steps": 0}, "steps must be a whole number from 1"),
        ({"prompt": "a", "preset": "fast"}, "no preset 'fast': choose distilled"),
        ({"prompt": "a", "preset": ["distilled"]}, "preset must be text"),
        ({"prompt": "a", "width": 640}, "width and height together"),
        ({"prompt": "a", "width": 641, "height": 352}, "multiple of 16"),
        ({"prompt": "a", "audio_only": "yes"}, "audio_only must be true or false"),
        ({"prompt": "a", "audio_only": True, "video_only": True}, "exclude"),
        ({"prompt": "a", "image_path": "gone.png"}, "no image"),
        ({"prompt": "a", "image_path": "https://example.org/a.png"}, "address"),
        ({"prompt": "a", "image_path": "file:///etc/hosts"}, "address"),
        ({"prompt": "a", "image_path": "data:image/png;base64,iVBORw0KGgo="}, "address"),
        ({"prompt": "a", "image_path": "~nosuchuser/x.png"}, "no image"),
        ({"prompt": "a", "image_path": "."}, "folder"),
        ({"prompt": "a", "image_path": "/dev/zero"}, "no image"),
        ({"prompt": "a", "image_path": "here.png", "audio_only": True}, "first frame"),
        ({"prompt": "a", "spk_wavs": ["here.png"]}, "no speech span"),
        ({"prompt": "<S>a<E>", "spk_wavs": ["here.png", "also.png"]}, "2 voices"),
        ({"prompt": SPEECH, "spk_wavs": [None, "here.png", "also.png"]}, "3 voices"),
        ({"prompt": "<S>a<E>", "spk_wavs": [1]}, "spk_wavs must be a list"),
        ({"prompt": "<S>a<E>", "spk_wavs": ["here.png"], "video_only": True}, "no voices"),
        ({"prompt": "a", "gen_turn": 0}, "gen_turn must be a whole number from 1"),
        ({"text": 7}, "text must be text"),
        ({"prompt": "a</S>"}, "never opened"),
        ({"prompt": "a", "id": "../../etc/x"}, "cannot be a file's name"),
        ({"prompt": "a", "id": ".hidden"}, "cannot be a file's name"),
        ({"prompt": "a", "id": "x" * 151}, "cannot be a file's name"),
        ({"prompt": "a", "id": ""}, "cannot be a file's name"),
    ],
)
def test_a_bad_line_is_one_sentence(tmp_path, line, words):
    for name in ("here.png", "also.png"):
        (tmp_path / name).touch()
    with pytest.raises(ValueError, match=re.escape(words)) as error:
        parse(tmp_path, **line)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        (b'{"prompt": "cut o', "cut off"),
        (b'{"prompt": "a"', "cut off"),
        (b"prompt: a", "not JSON"),
        (b'["a"]', "not a JSON object"),
        (b'{"prompt": "\xff"}', "not UTF-8"),
        (b'{"prompt": "a", "seconds": NaN}', "NaN"),
        (b'{"prompt": "a", "seconds": 1e999}', "above 0"),
        (b"[" * 100_000, "not usable JSON"),
        (b'{"prompt": "a", "seed": ' + b"9" * 5000 + b"}", "JSON"),
    ],
)
def test_bad_bytes_are_one_sentence(tmp_path, raw, words):
    with pytest.raises(LineError) as error:
        parse_line(raw, tmp_path, FAST)
    assert words in str(error.value)
    assert len(str(error.value)) < 300


def test_a_colon_makes_no_address(tmp_path):
    (tmp_path / "ep1:in.png").touch()
    assert parse(tmp_path, prompt="a", image_path="ep1:in.png").image == tmp_path / "ep1:in.png"


@pytest.mark.parametrize(
    ("default", "line", "mode"),
    [
        ("audio", {"video_only": False}, "audio"),
        ("audio", {"audio_only": False}, "video+audio"),
        ("video", {"audio_only": False}, "video"),
        ("video", {"video_only": False}, "video+audio"),
        ("audio", {"video_only": True}, "video"),
        ("audio", {"audio_only": False, "video_only": False}, "video+audio"),
        ("video+audio", {"audio_only": False}, "video+audio"),
    ],
)
def test_only_its_own_flag_turns_a_mode_off(tmp_path, default, line, mode):
    raw = json.dumps({"prompt": "a", **line}).encode()
    assert parse_line(raw, tmp_path, Defaults(mode=default)).mode == mode


@pytest.mark.parametrize("wrong", [{"shift": 1e300}, {"shift": 0.001}, {"seconds": 100}, {"seconds": 0.01}])
def test_defaults_out_of_bounds(wrong):
    with pytest.raises(LineError, match=r"shift|too long|too short"):
        Defaults(**wrong)
    assert Defaults(seconds=1 / 24, shift=100).seconds == 1 / 24


def test_unknown_keys_are_a_warning(tmp_path):
    job = parse(tmp_path, prompt="a", second=3, id="x", name="y")
    assert job.warnings[0] == "The key 'second' is not known and was ignored (did you mean 'seconds'?)."
    assert "'x'" in job.warnings[1]


def test_the_key_follows_the_content(tmp_path):
    image = tmp_path / "a.png"
    image.write_bytes(b"one")
    base = parse(tmp_path, prompt="a", image_path="a.png")
    assert parse(tmp_path, prompt="a", image_path="./a.png", id="other", typo=1).key() == base.key()
    others = [
        {"prompt": "b"},
        {"seed": 1},
        {"seconds": 3},
        {"steps": 3},
        {"negative": "zero"},
        {"negative": "a"},
        {"width": 640, "height": 352},
    ]
    keys = {parse(tmp_path, **{"prompt": "a", "image_path": "a.png", **other}).key() for other in others}
    assert len(keys | {base.key()}) == len(others) + 1
    before = base.key()
    image.write_bytes(b"two, another picture of the same name")
    assert base.key() not in {*keys, before}


def test_a_line_says_what_is_given(tmp_path):
    for name in ("a.wav", "a.mp4", "one.png", "two.png"):
        (tmp_path / name).write_bytes(name.encode())
    job = parse(
        tmp_path, prompt="a", sound_path="a.wav", sound_start=2, sound_at=0.5, sound_rest="generated",
        last_image_path="two.png", images_at={"1.5": "one.png"}, shown="matched-noise",
    )  # fmt: skip
    request = job.request()
    assert (request["sound"], request["sound_start"], request["sound_at"]) == (tmp_path / "a.wav", 2, 0.5)
    assert (request["sound_rest"], request["shown"]) == ("generated", "matched noise")
    assert request["pictures"] == {1.5: tmp_path / "one.png", "end": tmp_path / "two.png"}
    assert job.files == (tmp_path / "a.wav", tmp_path / "one.png", tmp_path / "two.png")
    silent = parse(tmp_path, prompt="a", video_path="a.mp4")
    assert (silent.seconds, silent.request()["frames"], silent.segments) == (None, tmp_path / "a.mp4", 1)
    assert parse(tmp_path, prompt="a", video_path="a.mp4", seconds=20).segments == 1
    places = {path: tmp_path / "x" / path.name for path in (*job.files, *silent.files)}
    assert job.moved(places).files == tuple(places[path] for path in job.files)
    assert silent.moved(places).request()["frames"] == tmp_path / "x" / "a.mp4"


def test_a_line_of_more_seconds_than_a_segment_is_a_long_clip(tmp_path):
    (tmp_path / "a.wav").touch()
    job = parse(
        tmp_path, prompt="<S>a<E>", then=["b", "<S>c<E>"], seconds=24, hold="colour+sharpness", spk_wavs=[None, "a.wav"]
    )
    assert job.segments == 3
    request = job.long_request()
    assert (request["prompts"], request["segment"]) == (["<S>a<E>", "b", "<S>c<E>"], 10)
    assert (request["hold"], request["assignment"]) == ("colour and sharpness", (None, 0))
    assert parse(tmp_path, prompt="a", seconds=24, segment=4).segments == 6
    assert parse(tmp_path, prompt="a", seconds=24, segment=0).segments == 1
    assert parse(tmp_path, prompt="a", seconds=24, audio_only=True).segments == 1
    assert parse(tmp_path, prompt="a", seconds=10).segments == 1


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ({"sound_path": "gone.wav"}, "There is no sound"),
        ({"sound_start": 1}, "was said of no sound"),
        ({"sound_path": "a", "sound_start": -1}, "sound_start must be a number above 0"),
        ({"sound_path": "a", "sound_rest": "noise"}, "silence or generated; got 'noise'"),
        ({"sound_path": "a", "video_only": True}, "for a clip of picture alone"),
        ({"video_path": "a", "audio_only": True}, "for a clip of sound alone"),
        ({"video_path": "a", "image_path": "a"}, "Give a video or single pictures"),
        ({"images_at": ["a"]}, 'images_at must be files by the second they stand at, as {"2.5": "file.png"}'),
        ({"images_at": {"soon": "a"}}, "images_at must be files by the second"),
        ({"images_at": {"1": 5}}, "images_at must be files by the second"),
        ({"shown": "grey"}, "shown clean or matched noise; got 'grey'"),
        ({"then": [1]}, "then must be a list of prompts"),
        ({"then": ["b"]}, "for the segments of a longer clip"),
        ({"then": ["b", "c"], "seconds": 12}, "There are 3 prompts for 2 segments"),
        ({"then": [" "], "seconds": 12}, "The prompt is empty"),
        ({"segment": 0.1}, "A segment has from 0.17 to 60 seconds"),
        ({"hold": "light"}, "one of nothing, colour, colour and sharpness; got 'light'"),
        ({"seconds": 12, "last_image_path": "a"}, "only the first frame can be given"),
        ({"seconds": 12, "save_latents": True}, "has no latents of its own"),
    ],
)
def test_given_parts_of_a_line_that_do_not_go_together_are_a_sentence(tmp_path, line, sentence):
    (tmp_path / "a").touch()
    with pytest.raises(ValueError, match=re.escape(sentence)):
        parse(tmp_path, prompt="a", **line)


def test_what_is_given_is_part_of_the_content(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).write_bytes(name.encode())
    base = parse(tmp_path, prompt="x")
    assert replace(base, hold="colour", segment=7.0).key() == base.key()  # of no meaning for a clip in one pass
    others = [
        {"sound_path": "a"}, {"sound_path": "b"}, {"sound_path": "a", "sound_at": 1}, {"last_image_path": "a"},
        {"last_image_path": "b"}, {"images_at": {"1": "a"}}, {"images_at": {"2": "a"}}, {"video_path": "a"},
        {"video_path": "a", "shown": "matched noise"}, {"seconds": 12}, {"seconds": 12, "segment": 0},
        {"seconds": 12, "segment": 5}, {"seconds": 12, "then": ["y"]}, {"seconds": 12, "hold": "colour"},
    ]  # fmt: skip
    keys = {parse(tmp_path, prompt="x", **other).key() for other in others}
    assert len(keys | {base.key()}) == len(others) + 1
    before = parse(tmp_path, prompt="x", sound_path="a").key()
    (tmp_path / "a").write_bytes(b"another recording of the same name")
    assert parse(tmp_path, prompt="x", sound_path="a").key() not in {*keys, before}


# --- runs --------------------------------------------------------------------------------------------------------


def test_good_bad_and_double_lines(tmp_path, pipeline):
    (tmp_path / "v.wav").touch()
    source = write(
        tmp_path,
        {"prompt": "one", "id": "Größe 漢字"},
        "{broken",
        {"prompt": "two", "typo": 1},
        {"prompt": "one"},
        "",
        {"prompt": "one", "id": "again"},
        {"prompt": "BOOM"},
        {"prompt": "three", "id": "Größe 漢字"},
        {"prompt": "Say <S>so<E>", "spk_wavs": ["v.wav"], "audio_only": True},
    )
    out = tmp_path / "out"
    result = run(source, out, pipeline)
    assert statuses(result) == [
        "made", "failed", "made", "duplicate", "duplicate", "failed", "failed", "made",
    ]  # fmt: skip
    assert [outcome.line for outcome in result.outcomes] == [1, 2, 3, 4, 6, 7, 8, 9]
    assert [request["prompt"] for request in pipeline.requests] == ["one", "two", "BOOM", "Say <S>so<E>"]
    one, double, again = (result.outcomes[i] for i in (0, 3, 4))
    assert (one.file, double.file, again.file) == ("Größe 漢字.mp4", "Größe 漢字.mp4", "again.mp4")
    assert double.duplicate_of == again.duplicate_of == 1
    assert (out / "again.mp4").read_bytes() == (out / "Größe 漢字.mp4").read_bytes()
    assert [failure.error for failure in result.failures] == [
        "The line is not JSON: Expecting property name enclosed in double quotes (character 2).",
        "The network returned NaN at step 3.",
        "The id 'Größe 漢字' is already that of line 1: give every clip its own.",
    ]
    assert len(clips(out)) == 4
    assert clips(out)[0].startswith("00003-")
    assert not list(out.glob(".unfinished*"))

    by_line = {record["line"]: record for record in records(out) if "line" in record}
    assert by_line[7]["status"] == "failed"
    assert by_line[3]["warnings"] == ["The key 'typo' is not known and was ignored."]
    assert by_line[9]["warnings"] == ["the voice is quiet"]
    summary = json.loads((out / "summary.json").read_text(encoding="utf-8"))
    assert summary["counts"] == {"made": 3, "failed": 3, "duplicate": 2}
    assert (summary["lines"], summary["interrupted"], len(summary["clips"])) == (8, False, 8)


def test_a_second_run_makes_what_is_new(tmp_path, pipeline):
    out = tmp_path / "out"
    lines = [{"prompt": "one"}, {"prompt": "two", "id": "b"}, {"prompt": "BOOM"}]
    run(write(tmp_path, *lines), out, pipeline)
    before = {name: (out / name).stat().st_mtime_ns for name in clips(out)}
    second = fake.FakePipeline()
    lines = [{"prompt": "new"}, {"prompt": "one"}, {"prompt": "changed", "id": "b"}, {"prompt": "two", "id": "c"}]
    result = run(write(tmp_path, *lines), out, second)
    assert statuses(result) == ["made", "skipped", "made", "made"]
    assert [request["prompt"] for request in second.requests] == ["new", "changed", "two"]
    assert result.outcomes[1].file.startswith("00001-")  # where it stood when it was made
    assert (out / result.outcomes[1].file).stat().st_mtime_ns == before[result.outcomes[1].file]
    assert "changed" in (out / "b.mp4").read_text()


def test_a_clip_of_another_default_negative_is_not_taken_for_the_same(tmp_path, pipeline):
    source, out = write(tmp_path, {"prompt": "one"}, {"prompt": "two", "id": "b"}), tmp_path / "out"

    def made_with(negative):
        defaults = Defaults(steps=2, negative=negative)
        return statuses(run_batch(source, out, lambda: pipeline, defaults))

    assert made_with("zero") == ["made", "made"]
    assert made_with("") == ["skipped", "skipped"]
    assert made_with("default") == ["made", "made"]
    assert "口型" in (out / "b.mp4").read_text().encode().decode("unicode_escape")
    assert made_with(default_negative("video", "zh")) == [
        "skipped",
        "skipped",
    ]  # the text counts, not how it was chosen
    assert [request["negative"] for request in pipeline.requests] == ["", "", *[default_negative("video", "zh")] * 2]


def test_nothing_is_loaded_where_nothing_is_to_be_made(tmp_path, pipeline):
    source, out = write(tmp_path, {"prompt": "one"}, {"prompt": "two", "id": "b"}), tmp_path / "out"
    run(source, out, pipeline)

    def refuse():
        raise AssertionError("loaded")

    result = run_batch(source, out, refuse, FAST)
    assert statuses(result) == ["skipped", "skipped"]
    assert len([record for record in records(out) if "line" in record]) == 2  # not told again


def test_remake_makes_all_again(tmp_path, pipeline):
    source, out = write(tmp_path, {"prompt": "one"}, {"prompt": "one"}), tmp_path / "out"
    run(source, out, pipeline)
    assert statuses(run(source, out, pipeline, remake=True)) == ["made", "duplicate"]
    assert len(pipeline.requests) == 2


class Takes(fake.FakePipeline):
    """Clips with the run's number in them."""

    def __init__(self, take):
        super().__init__()
        self.take = take

    def denoise(self, prompt, **request):
        latents = super().denoise(prompt, **request)
        return replace(latents, settings={**latents.settings, "take": self.take})


def test_remake_leaves_no_earlier_clip(tmp_path):
    lines = [
        {"prompt": "one", "id": "a"},
        {"prompt": "one", "id": "b"},
        {"prompt": "one"},
        {"prompt": "one", "id": "a"},
    ]
    source, out = write(tmp_path, *lines), tmp_path / "out"
    for take in (1, 2):
        result = run(source, out, Takes(take), remake=take == 2)
        assert statuses(result) == ["made", "duplicate", "duplicate", "duplicate"]
        assert clips(out) == ["a.mp4", "b.mp4"]
        assert [json.loads((out / clip).read_text())["take"] for clip in clips(out)] == [take, take]
    swapped = write(tmp_path, *reversed(lines[:2]))  # what was a link is made, what was made becomes the link
    assert statuses(run(swapped, out, Takes(3), remake=True)) == ["made", "duplicate"]
    assert [json.loads((out / clip).read_text())["take"] for clip in clips(out)] == [3, 3]


@pytest.mark.parametrize("damage", ["gone", "cut"])
def test_a_lost_or_damaged_clip_is_made_again(tmp_path, pipeline, damage):
    source, out = write(tmp_path, {"prompt": "one", "id": "a"}), tmp_path / "out"
    run(source, out, pipeline)
    whole = (out / "a.mp4").read_bytes()
    (out / "a.mp4").unlink() if damage == "gone" else (out / "a.mp4").write_bytes(whole[:5])
    assert statuses(run(source, out, pipeline)) == ["made"]
    assert (out / "a.mp4").read_bytes() == whole


def test_a_half_written_report_is_read_as_far_as_it_goes(tmp_path, pipeline):
    source, out = write(tmp_path, {"prompt": "one", "id": "a"}, {"prompt": "two", "id": "b"}), tmp_path / "out"
    run(source, out, pipeline)
    report = out / "report.jsonl"
    report.write_bytes(report.read_bytes()[:-40])  # a kill in the middle of the last record
    assert statuses(run(source, out, pipeline)) == ["skipped", "made"]
    assert records(out)[-1]["file"] == "b.mp4"
    assert statuses(run(source, out, pipeline)) == ["skipped", "skipped"]


def test_unnamed_clips_are_known_without_the_report(tmp_path, pipeline):
    source, out = write(tmp_path, {"prompt": "one"}), tmp_path / "out"
    run(source, out, pipeline)
    (out / "report.jsonl").unlink()
    assert statuses(run(source, out, pipeline)) == ["skipped"]


def test_a_report_names_no_file_elsewhere(tmp_path, pipeline):
    source, out = write(tmp_path, {"prompt": "one"}), tmp_path / "out"
    run(source, out, pipeline)
    (tmp_path / "stray.mp4").write_text("x")
    key = next(record["key"] for record in records(out) if "key" in record)
    lie = {"status": "made", "file": "../stray.mp4", "key": key, "size": 1}
    (out / "report.jsonl").write_text(json.dumps(lie) + "\n")
    for clip in clips(out):
        (out / clip).unlink()
    assert statuses(run(source, out, pipeline)) == ["made"]


def test_encodings(tmp_path, pipeline):
    with_mark = write(tmp_path, {"prompt": "größer 漢字 🎬"}, encoding="utf-8-sig")
    assert statuses(run(with_mark, tmp_path / "a", pipeline)) == ["made"]
    assert pipeline.requests[0]["prompt"] == "größer 漢字 🎬"
    windows = tmp_path / "windows.jsonl"
    windows.write_bytes(b'{"prompt": "one"}\r\n\r\n{"prompt": "two"}')
    assert statuses(run(windows, tmp_path / "b", pipeline)) == ["made", "made"]
    latin = write(tmp_path, {"prompt": "ok"}, {"prompt": "größer"}, encoding="latin-1")
    assert statuses(run(latin, tmp_path / "c", pipeline)) == ["made", "failed"]


def test_a_line_too_long_is_skipped_whole(tmp_path, pipeline):
    source = write(tmp_path, {"prompt": "x" * (MAX_LINE * 2)}, {"prompt": "one"})
    result = run(source, tmp_path / "out", pipeline)
    assert statuses(result) == ["failed", "made"]
    assert [outcome.line for outcome in result.outcomes] == [1, 2]
    assert "longer than 1 MiB" in result.failures[0].error


def test_a_thousand_lines(tmp_path, pipeline, monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda _: None)
    lines = [{"prompt": f"clip {n % 900}", "seed": n % 900} if n % 100 else "{bad" for n in range(1, 1001)]
    source = write(tmp_path, *lines)
    start = time.monotonic()
    check = check_batch(source, FAST)
    assert time.monotonic() - start < 30
    assert (check.lines, len(check.problems)) == (1000, 10)
    result = run(source, tmp_path / "out", pipeline)
    assert dict(result.counts) == {"made": 891, "failed": 10, "duplicate": 99}
    assert len(clips(tmp_path / "out")) == 891


def test_a_full_disk_ends_the_batch(tmp_path, pipeline):
    source = write(tmp_path, {"prompt": "one"}, {"prompt": "DISK"}, {"prompt": "two"})
    with pytest.raises(OSError, match="No space left"):
        run(source, tmp_path / "out", pipeline)
    assert [request["prompt"] for request in pipeline.requests] == ["one", "DISK"]
    assert json.loads((tmp_path / "out" / "summary.json").read_text())["counts"] == {"made": 1, "failed": 1}


def test_models_that_do_not_load_are_no_line_s_fault(tmp_path):
    source = write(tmp_path, {"prompt": "one"}, {"prompt": "two"})

    def broken():
        raise ValueError("NAVA.safetensors is a web page.")

    with pytest.raises(ValueError, match="web page"):
        run_batch(source, tmp_path / "out", broken, FAST)
    assert not [record for record in records(tmp_path / "out") if "line" in record]


def missing_package():
    error = RuntimeError("The text encoder needs the package transformers.")
    error.__cause__ = ModuleNotFoundError("No module named 'transformers'", name="transformers")
    return error


@pytest.mark.parametrize(
    "fault",
    [
        WrongFileError("The VAE is incomplete."),
        ModuleNotFoundError("No module named 'ftfy'", name="ftfy"),
        missing_package(),
        FileNotFoundError("umt5.safetensors needs a tokenizer."),
    ],
    ids=["file", "import", "package", "tokenizer"],
)
def test_models_found_unusable_in_a_clip_end_the_batch(tmp_path, pipeline, fault):
    (tmp_path / "a.png").touch()
    source = write(tmp_path, {"prompt": "one"}, {"prompt": "FAULT", "image_path": "a.png"}, {"prompt": "two"})
    out = tmp_path / "out"
    pipeline.faults = {"FAULT": fault}
    with pytest.raises(type(fault)) as raised:
        run(source, out, pipeline)
    assert raised.value is fault
    assert len(pipeline.requests) == 2
    assert [record["status"] for record in records(out) if "line" in record] == ["made"]
    pipeline.faults = {}
    assert statuses(run(source, out, pipeline)) == ["skipped", "made", "made"]


def test_a_package_missed_in_saving_ends_the_batch(tmp_path, pipeline):
    pipeline.faults = {"DECODE": ModuleNotFoundError("No module named 'av'", name="av")}
    with pytest.raises(ModuleNotFoundError):
        run(write(tmp_path, {"prompt": "DECODE"}, {"prompt": "two"}), tmp_path / "out", pipeline)
    assert len(pipeline.requests) == 1


def test_a_picture_that_is_gone_is_its_line_s_fault(tmp_path, pipeline):
    (tmp_path / "a.png").touch()
    source = write(tmp_path, {"prompt": "FAULT", "image_path": "a.png"}, {"prompt": "two"})

    class Late(Watcher):
        def clip(self, line, *_):
            (tmp_path / "a.png").unlink(missing_ok=True)

    pipeline.faults = {"FAULT": FileNotFoundError("There is no file a.png.")}
    assert statuses(run(source, tmp_path / "out", pipeline, watcher=Late())) == ["failed", "made"]


def test_a_check_finds_what_a_run_would(tmp_path, pipeline):
    source = write(
        tmp_path,
        {"prompt": "one", "id": "a"},
        {"prompt": "two", "id": "A", "second": 3},
        {"prompt": "one", "id": "a", "sed": 1},
        {"prompt": "three", "seconds": 10**400},
        {"prompt": "three", "image_path": "~nosuchuser/x.png"},
    )
    check = check_batch(source, FAST)
    result = run(source, tmp_path / "out", pipeline)
    assert check.lines == len(result.outcomes) == 5
    assert [number for number, _ in check.problems] == [2, 4, 5]
    assert list(check.problems) == [(failure.line, failure.error) for failure in result.failures]
    assert check.notes == (
        (2, "The key 'second' is not known and was ignored (did you mean 'seconds'?)."),
        (3, "The key 'sed' is not known and was ignored (did you mean 'seed'?)."),
    )


def test_other_models_are_noted(tmp_path, pipeline):
    said = []

    class Notes(Watcher):
        def note(self, text):
            said.append(text)

    source, out = write(tmp_path, {"prompt": "one"}), tmp_path / "out"
    run(source, out, pipeline, models={"backbone": "a"}, watcher=Notes())
    run(source, out, pipeline, models={"backbone": "a"}, watcher=Notes())
    assert not said
    run(source, out, pipeline, models={"backbone": "b"}, watcher=Notes())
    assert "a -> b" in said[0]


def test_one_batch_a_folder(tmp_path, pipeline):
    source = write(tmp_path, {"prompt": "one"})

    def second():
        run(source, tmp_path / "out", pipeline)

    with pytest.raises(BlockingIOError, match="Another batch"):
        run_batch(source, tmp_path / "out", second, FAST)


# --- the makers' own files ---------------------------------------------------------------------------------------


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """The working directory, which has a picture and two voices; the batch file lies in another folder."""
    place = tmp_path / "work"
    for name in ("cases/pier.png", "cases/anna.wav", "cases/ben.wav"):
        path = place / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(name.encode())
    (tmp_path / "lists").mkdir()
    monkeypatch.chdir(place)
    return place / "cases"


MAKERS_LINES = [
    {"prompt": "码头的清晨，海鸥鸣叫。"},
    {"text": "山路上的单车，轮胎摩擦声。"},
    {"txt": "雨夜的车站，雨声。"},
    {"prompt": "男子说道：<S>The kettle is on.<E>。他放下杯子。"},
    {"prompt": "她说 <S>It is late, but not too late !</S>。背景是风声。"},
    {"prompt": "一只猫望向窗外。", "image_path": "cases/pier.png"},
    {"prompt": "他说：<S>Stay here.<E>", "image_path": "cases/pier.png", "spk_wavs": ["cases/anna.wav"]},
    {"prompt": "甲：<S>Ready?<E> 乙：<S>Ready.<E>", "spk_wavs": ["cases/anna.wav", "cases/ben.wav"]},
    {"prompt": "甲：<S>Ready?<E> 乙：<S>Ready.<E>", "spk_wavs": ["None", "cases/ben.wav"]},
    {"prompt": "甲：<S>One.<E> 乙：<S>Two.<E>", "spk_wavs": ["None", ""]},
    {"prompt": "溪水声，没有人物对白。", "spk_wavs": []},
    {"prompt": "溪水声，没有旁白。", "spk_wavs": ["None"], "image_path": None},
    {"prompt": "森林的鸟鸣声。", "image_path": "", "spk_wavs": None},
]


def test_every_form_of_the_makers_lines_runs(tmp_path, elsewhere, pipeline):
    source = write(tmp_path / "lists", *MAKERS_LINES)
    result = run(source, tmp_path / "out", pipeline)
    assert statuses(result) == ["made"] * len(MAKERS_LINES), result.failures
    assert all(not outcome.warnings or outcome.warnings == ("the voice is quiet",) for outcome in result.outcomes)
    asked = pipeline.requests
    assert [request["prompt"] for request in asked] == [next(iter(line.values())) for line in MAKERS_LINES]
    assert [request["image"] for request in asked] == [
        elsewhere / "pier.png" if line.get("image_path") else None for line in MAKERS_LINES
    ]
    anna, ben = elsewhere / "anna.wav", elsewhere / "ben.wav"
    assert [(request["voices"], request["assignment"]) for request in asked[6:]] == [
        ((anna,), None),
        ((anna, ben), None),
        ((ben,), (None, 0)),
        ((), (None, None)),  # the null voice in both spans
        ((), None),
        ((), None),
        ((), None),
    ]


def test_files_are_sought_beside_the_batch_file_first(tmp_path, elsewhere):
    beside = tmp_path / "lists" / "cases" / "pier.png"
    beside.parent.mkdir()
    beside.write_bytes(b"beside")
    assert parse(tmp_path / "lists", prompt="a", image_path="cases/pier.png").image == beside
    beside.unlink()
    assert parse(tmp_path / "lists", prompt="a", image_path="cases/pier.png").image == elsewhere / "pier.png"
    with pytest.raises(LineError, match=rf"no image {tmp_path}/lists/x.png: .* {tmp_path}/lists or {tmp_path}/work"):
        parse(tmp_path / "lists", prompt="a", image_path="x.png")


def test_a_text_file_has_a_prompt_a_line(tmp_path, elsewhere, pipeline):
    lines = [
        "清晨的港口，汽笛声。",
        "A cat looks up. image_path:cases/pier.png",
        '{"text": "<S>Hi.</S>", "id": "j"}',
        "a <S>b",
    ]
    source = write(tmp_path / "lists", *lines, name="prompts.txt")
    result = run(source, tmp_path / "out", pipeline)
    assert statuses(result) == ["made", "made", "made", "failed"]
    assert [(request["prompt"], request["image"]) for request in pipeline.requests] == [
        (lines[0], None),
        ("A cat looks up.", elsewhere / "pier.png"),
        ("<S>Hi.</S>", None),
    ]
    assert "never closed" in result.failures[0].error
    as_json = run(write(tmp_path / "lists", lines[0], name="prompts.jsonl"), tmp_path / "out", pipeline)
    assert "not JSON" in as_json.failures[0].error


def test_a_speech_benchmarks_lines(tmp_path, pipeline):
    with wave.open(str(tmp_path / "ref.wav"), "wb") as file:
        file.setparams((1, 2, 16000, 0, "NONE", ""))
        file.writeframes(bytes(16000 * 2 * 4))  # 4 s
    lines = [
        "utt-1|twelve signs|ref.wav|six sg",
        "utt-2|a|ref.wav",
        "utt-3|one|gone.wav|two",
        "utt-4|a|ref.wav|" + "b" * 99,
    ]
    result = run(write(tmp_path, *lines, name="meta.lst"), tmp_path / "out", pipeline)
    assert statuses(result) == ["made", "failed", "failed", "failed"]
    (request,) = pipeline.requests
    assert (request["prompt"], request["voices"], request["mode"]) == ("<S>six sg<E>", (tmp_path / "ref.wav",), "audio")
    assert request["seconds"] == 2.0  # half the words of a recording of 4 s
    assert clips(tmp_path / "out") == ["utt-1.wav"]
    words = ("id|words of the recording|recording|words to say", "no voice", "too long")
    for failure, expected in zip(result.failures, words, strict=True):
        assert expected in failure.error


def test_takes_have_seeds_and_files_of_their_own_and_go_on(tmp_path, pipeline):
    lines = [
        {"prompt": "one", "id": "a", "seed": 5, "gen_turn": 3},
        {"prompt": "two"},
        {"prompt": "BOOM", "gen_turn": 2},
    ]
    source, out = write(tmp_path, *lines), tmp_path / "out"
    result = run(source, out, pipeline)
    assert statuses(result) == ["made", "made", "made", "made", "failed", "failed"]
    assert [(outcome.line, outcome.take) for outcome in result.outcomes] == [
        (1, 0), (1, 1), (1, 2), (2, None), (3, 0), (3, 1),
    ]  # fmt: skip
    assert [request["seed"] for request in pipeline.requests] == [5, 6, 7, 0, 0, 1]
    assert clips(out)[1:] == ["a-0.mp4", "a-1.mp4", "a-2.mp4"]
    assert [record["take"] for record in records(out) if record.get("line") == 1] == [0, 1, 2]
    assert json.loads((out / "summary.json").read_text())["lines"] == 3

    (out / "a-1.mp4").unlink()
    second = fake.FakePipeline()
    result = run(write(tmp_path, {**lines[0], "gen_turn": 4}, lines[1]), out, second)
    assert statuses(result) == ["skipped", "made", "skipped", "made", "skipped"]
    assert [request["seed"] for request in second.requests] == [6, 8]
    assert clips(out)[1:] == ["a-0.mp4", "a-1.mp4", "a-2.mp4", "a-3.mp4"]


def test_takes_come_from_the_defaults_too(tmp_path, pipeline):
    source = write(tmp_path, {"prompt": "one", "seed": 2**64 - 1}, {"prompt": "two", "gen_turn": 1})
    result = run_batch(source, tmp_path / "out", lambda: pipeline, Defaults(steps=2, gen_turn=2))
    assert statuses(result) == ["made"] * 3
    assert [request["seed"] for request in pipeline.requests] == [2**64 - 1, 0, 0]
    assert [clip[:6] for clip in clips(tmp_path / "out")] == ["00001-", "00001-", "00002-"]
    check = check_batch(
        write(tmp_path, {"prompt": "a", "id": "x", "gen_turn": 9, "typo": 1}, {"prompt": "b", "id": "x-8"})
    )
    assert (check.lines, len(check.notes)) == (2, 1)
    assert check.problems == ((2, "The id 'x-8' is already that of line 1: give every clip its own."),)


def test_of_two_prompts_in_a_line_the_first_key_counts(tmp_path):
    job = parse(tmp_path, text="b", prompt="a", txt="a")
    assert (job.prompt, job.warnings) == ("a", ("The prompt is 'prompt'; 'text' says another.",))


# --- latents -----------------------------------------------------------------------------------------------------


def kept(out):
    return sorted(path.name for path in out.iterdir() if path.name.endswith(".latents.safetensors"))


@pytest.fixture
def undecoded(tmp_path, pipeline):
    """A batch of which one clip's latents were kept and its decoding failed."""
    lines = [{"prompt": "DECODE", "id": "a", "save_latents": True, "seed": 4}, {"prompt": "two", "id": "b"}]
    source, out = write(tmp_path, *lines), tmp_path / "out"
    pipeline.faults = {"DECODE": RuntimeError("The GPU is gone.")}
    assert statuses(run(source, out, pipeline)) == ["failed", "made"]
    assert (clips(out), kept(out)) == (["b.mp4"], ["a.mp4.latents.safetensors"])
    pipeline.faults, pipeline.requests = {}, []
    return source, out


def test_a_clip_is_finished_from_its_latents(undecoded, pipeline):
    source, out = undecoded
    finished, _ = run(source, out, pipeline).outcomes
    assert pipeline.requests == []  # nothing was denoised
    assert (finished.status, finished.from_latents, finished.latents) == ("made", True, "a.mp4.latents.safetensors")
    assert json.loads((out / "a.mp4").read_text())["seed"] == 4
    record = next(record for record in records(out) if record.get("file") == "a.mp4")
    assert (record["from_latents"], record["latents"]) == (True, "a.mp4.latents.safetensors")
    assert statuses(run(source, out, pipeline)) == ["skipped", "skipped"]
    assert kept(out) == ["a.mp4.latents.safetensors"]


def test_latents_of_another_content_are_not_used(undecoded, pipeline, tmp_path):
    _, out = undecoded
    before = (out / "a.mp4.latents.safetensors").read_bytes()
    source = write(tmp_path, {"prompt": "DECODE", "id": "a", "seed": 5})
    (outcome,) = run(source, out, pipeline).outcomes
    assert (outcome.status, outcome.from_latents, outcome.latents) == ("made", None, None)
    assert [request["seed"] for request in pipeline.requests] == [5]
    assert (out / "a.mp4.latents.safetensors").read_bytes() == before  # asked for by nobody, and touched by nobody


@pytest.mark.parametrize("damage", ["cut", "NaN", "another file", "remake"])
def test_latents_that_cannot_be_used_are_made_again(undecoded, pipeline, damage):
    source, out = undecoded
    path = out / "a.mp4.latents.safetensors"
    whole = path.read_bytes()
    if damage == "cut":
        path.write_bytes(whole[:-9])
    elif damage == "NaN":
        path.write_bytes(whole[:-4] + b"\x00\x00\xc0\x7f")
    elif damage == "another file":
        path.write_text("mine")
    (outcome, _) = run(source, out, pipeline, remake=damage == "remake").outcomes
    assert (outcome.status, outcome.from_latents, outcome.latents) == ("made", None, path.name)
    assert pipeline.requests[0]["seed"] == 4
    assert ClipLatents.load(path).key == outcome.key


def test_keeping_latents_is_no_part_of_the_content(tmp_path, pipeline):
    source, out = write(tmp_path, {"prompt": "one"}, {"prompt": "two", "save_latents": False}), tmp_path / "out"
    kept_by_default = replace(FAST, save_latents=True)
    first = run_batch(source, out, lambda: pipeline, kept_by_default)
    assert len(kept(out)) == 1
    assert kept(out)[0] == f"{first.outcomes[0].file}.latents.safetensors"
    assert statuses(run(source, out, pipeline)) == ["skipped", "skipped"]
    key = first.outcomes[0].key
    assert parse_line(b'{"prompt": "one", "save_latents": true}', tmp_path, FAST).key() == key
    assert ClipLatents.load(out / kept(out)[0]).key == key
    wrong = run(write(tmp_path, {"prompt": "one", "save_latents": "yes"}), out, pipeline)
    assert "save_latents must be true or false" in wrong.failures[0].error


def test_a_disk_that_is_full_for_the_latents_ends_the_batch(tmp_path, pipeline, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(ClipLatents, "save", full)
    source = write(tmp_path, {"prompt": "one", "save_latents": True}, {"prompt": "two"})
    with pytest.raises(OSError, match="No space left"):
        run(source, tmp_path / "out", pipeline)
    assert clips(tmp_path / "out") == []


# --- kills -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    from nava_core.demo import make_small_models

    made = make_small_models(tmp_path_factory.mktemp("models"), preview_decoder=False)
    made["text_encoder_fp8"].unlink()
    made["text_encoder_pth"].unlink()
    return made["backbone"].parent


def start(source, out, models, seconds, *options):
    environment = {**os.environ, "FAKE_SECONDS_A_CLIP": str(seconds), "PYTHONPATH": str(FAKE.parents[2])}
    command = [sys.executable, str(FAKE), "batch", str(source), "--out", str(out), "--steps", "2"]
    return subprocess.Popen(
        [*command, "--models", str(models), *options],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        # a shell's background job, as these tests may be one, hands down an ignored Ctrl-C
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def wait_for(condition, process, seconds=60):
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.stdout.read()
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize(("kind", "code"), [(signal.SIGKILL, -9), (signal.SIGINT, 130), (signal.SIGTERM, 130)])
def test_killed_in_the_middle_and_resumed(tmp_path, models, kind, code):
    source = write(tmp_path, *({"prompt": f"clip {n}", **({"id": f"c{n}"} if n % 2 else {})} for n in range(12)))
    out = tmp_path / "out"
    process = start(source, out, models, 0.15)
    wait_for(lambda: out.is_dir() and len(clips(out)) >= 3 and list(out.glob(".unfinished/*")), process)
    process.send_signal(kind)
    said = process.communicate(timeout=30)[0]
    assert process.returncode == code, said
    first = {name: (out / name).stat().st_mtime_ns for name in clips(out)}
    assert 3 <= len(first) < 12
    for name in first:
        assert json.loads((out / name).read_text())["steps"] == 2  # whole
    if kind != signal.SIGKILL:
        assert "Interrupted" in said
        assert "Traceback" not in said
        assert json.loads((out / "summary.json").read_text())["interrupted"]
        assert not (out / ".unfinished").exists()

    process = start(source, out, models, 0)
    said = process.communicate(timeout=60)[0]
    assert process.returncode == 0, said
    assert len(clips(out)) == 12
    assert not (out / ".unfinished").exists()
    kept = [name for name in first if (out / name).stat().st_mtime_ns == first[name]]
    assert len(kept) >= len(first) - 1  # a kill between the clip's place and its record costs that clip
    summary = json.loads((out / "summary.json").read_text())
    assert summary["counts"]["made"] + summary["counts"]["skipped"] == 12


def test_killed_while_decoding_and_finished_from_the_latents(tmp_path, models):
    source, out = write(tmp_path, {"prompt": "one", "id": "a"}, {"prompt": "two", "id": "b"}), tmp_path / "out"
    process = start(source, out, models, 20, "--save-latents")
    wait_for(lambda: out.is_dir() and kept(out) and list(out.glob(".unfinished/*.mp4")), process)
    process.kill()
    process.communicate(timeout=30)
    assert (clips(out), kept(out)) == ([], ["a.mp4.latents.safetensors"])
    made = (out / "a.mp4.latents.safetensors").stat().st_mtime_ns
    process = start(source, out, models, 0)
    said = process.communicate(timeout=60)[0]
    assert process.returncode == 0, said
    assert "Line 1: a.mp4 in " in said
    assert ", from the latents that were kept" in said
    assert said.count("from the latents") == 1
    assert clips(out) == ["a.mp4", "b.mp4"]
    assert (out / "a.mp4.latents.safetensors").stat().st_mtime_ns == made
    assert not (out / ".unfinished").exists()


# --- long clips --------------------------------------------------------------------------------------------------


def test_a_long_clip_that_failed_goes_on_from_what_is_there(tmp_path, pipeline):
    line = {"id": "long", "prompt": "one", "then": ["two BOOM"], "seconds": 20}
    source, out = write(tmp_path, line, {"id": "short", "prompt": "three"}), tmp_path / "out"
    result = run(source, out, pipeline)
    assert statuses(result) == ["failed", "made"]
    (state,) = (out / ".segments").iterdir()
    assert [path.name for path in state.iterdir()] == ["0.txt"]
    (state / "1.txt").write_text("two")
    result = run(source, out, pipeline)
    assert statuses(result) == ["made", "skipped"]
    assert pipeline.made == []
    assert (out / "long.mp4").read_text() == "one | two"
    assert not (out / ".segments").exists()
    assert result.outcomes[0].warnings == ("the segments differ",)
    assert statuses(run(source, out, pipeline)) == ["skipped", "skipped"]


def test_a_long_clip_is_begun_anew_where_all_is_remade_or_its_line_changed(tmp_path, pipeline):
    line = {"id": "long", "prompt": "one", "then": ["two BOOM"], "seconds": 20}
    out = tmp_path / "out"
    run(write(tmp_path, line), out, pipeline)
    (state,) = (out / ".segments").iterdir()
    (state / "1.txt").write_text("two")
    run(write(tmp_path, line), out, pipeline, remake=True)
    assert pipeline.made == [0]
    assert statuses(run(write(tmp_path, {**line, "then": ["two"]}), out, pipeline)) == ["made"]
    assert pipeline.made == [0, 1]
    assert (out / "long.mp4").read_text() == "one | two"
    assert [path.name for path in (out / ".segments").iterdir()] == [state.name]  # of the line as it was
