"""Long clips: their plan, killed at every stage and gone on with, seams, sound tracks, what is refused."""

import itertools
import json
import os

import pytest
import torch
from safetensors.torch import load_file, save_file

from nava_core.checkpoint import load_backbone
from nava_core.decoding import Decoding
from nava_core.demo import make_small_models
from nava_core.geometry import split_latents
from nava_core.given import hold_statistics
from nava_core.lora_merge import LoraMerge
from nava_core.media import mux, read_audio, read_image
from nava_core.pipeline import ClipLatents, ModelFiles, NavaPipeline, StateError, revise, segments
from nava_core.pipeline.given import VideoFrames
from nava_core.pipeline.segment_state import State
from nava_core.pipeline.segments import split_voices
from nava_core.sampling import Guidance, Interrupted
from nava_core.video_files import LosslessFrames, read_video

pytest.importorskip("diffusers", reason="the standalone VAEs need diffusers")
pytest.importorskip("transformers", reason="the standalone text encoder needs transformers")

ROLES = ("backbone", "text_encoder", "video_vae", "audio_vae", "speaker_encoder")
LONG = {"seconds": 1.0, "segment": 0.5, "width": 64, "height": 64, "size_from_image": False, "steps": 1, "seed": 5}
PROMPTS = ["A bell.", "A drum."]
FRAMES, RATE = 25, 32_000


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    models = make_small_models(tmp_path_factory.mktemp("models"), preview_decoder=False)
    files = ModelFiles(**{role: models[role] for role in ROLES})
    return NavaPipeline.from_files(files, device="cpu", keep_loaded=True)


@pytest.fixture(scope="module")
def whole(pipeline, tmp_path_factory):
    """A long clip made without a break: (what is said of it, its file, its state)."""
    folder = tmp_path_factory.mktemp("whole")
    made = pipeline.make_long(folder / "clip.mp4", PROMPTS, state=folder / "state", **LONG)
    return made, folder / "clip.mp4", folder / "state"


@pytest.fixture(scope="module")
def sound():
    time = torch.arange(round(1.5 * RATE)) / RATE
    return torch.stack([torch.sin(900 * time) * (1 + time) / 4, torch.sin(1400 * time) / 4]), RATE


def frames_of(path):
    return torch.cat(list(LosslessFrames.read(path)))


# --- the plan ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("seconds", "segment", "latents"),
    [(10, 10, [60]), (30, 10, [60, 60, 60]), (11, 10, [33, 33]), (25, 10, [50, 50, 50]), (1, 0.4, [2, 2, 2]),
     (1.2, 0.5, [3, 2, 2]), (0.01, 10, [1])],
)  # fmt: skip
def test_segments_are_even_and_none_is_too_long(seconds, segment, latents):
    assert split_latents(seconds, segment) == latents


def test_a_segment_has_a_latent_frame_at_least():
    with pytest.raises(ValueError, match=r"A segment is at least 0\.17 s; got 0\.1"):
        split_latents(1, 0.1)


def test_voices_are_bound_to_spans_counted_through_all_prompts():
    prompts = ["<S>a<E> and <S>b<E>", "nothing", "<S>c<E>"]
    assert split_voices(prompts, ["x", "y", "z"], None) == [(0, 1), (), (2,)]
    assert split_voices(prompts, ["x"], None) == [(0, 0), (), (0,)]
    assert split_voices(prompts, ["x", "y"], [1, None, 0]) == [(1, None), (), (0,)]
    assert split_voices(prompts, [], None) == [None, None, None]
    with pytest.raises(ValueError, match="2 voices given for 3 speech spans"):
        split_voices(prompts, ["x", "y"], None)


# --- what is made ------------------------------------------------------------------------------------------------


def test_a_long_clip_is_its_segments_put_together(pipeline, whole, monkeypatch):
    made, path, state = whole
    first, second = (frames_of(state / f"00{number}.frames.mkv") for number in (0, 1))
    assert (len(first), len(second)) == (13, 13)
    plain = pipeline.denoise("A bell.", **{k: v for k, v in LONG.items() if k != "segment"} | {"seconds": 0.5})
    clip = pipeline.decode(plain)
    assert torch.equal((clip.frames * 255).round().to(torch.uint8), first)
    last = read_image(state / "000.last.png")
    assert torch.equal((last * 255).round().to(torch.uint8), first[-1])
    settings = {"width": 64, "height": 64, "size_from_image": False, "steps": 1}
    goes_on = pipeline.denoise("A drum.", image=last, seed=6, seconds=0.5, **settings)
    next_clip = pipeline.decode(goes_on)
    assert torch.equal((next_clip.frames * 255).round().to(torch.uint8), second)
    assert len(read_video(path).frames) == FRAMES == round(made.seconds * 24)
    shown = []
    monkeypatch.setattr(segments, "mux", lambda path, frames, *_, **__: shown.extend(frames))
    pipeline.make_long(path, PROMPTS, state=state, **LONG)
    assert max(len(part) for part in shown) < FRAMES
    assert torch.equal((torch.cat(shown) * 255).round().to(torch.uint8), torch.cat([first, second[1:]]))
    waveform, rate = read_audio(path)
    assert rate == clip.sample_rate
    assert abs(waveform.shape[1] - FRAMES / 24 * rate) < 3000  # AAC's padding


def test_sound_is_joined_within_the_time_of_the_frame_that_two_segments_share(pipeline, whole, monkeypatch):
    _, _, state = whole
    heard = {}
    monkeypatch.setattr(segments, "mux", lambda path, frames, waveform, rate, *a, **k: heard.update(w=waveform, r=rate))
    pipeline.make_long(state.parent / "clip.mp4", PROMPTS, state=state, **LONG)
    waveform, rate = heard["w"], heard["r"]
    assert waveform.shape == (2, FRAMES / 24 * rate)
    parts = [pipeline.sound(segments.ClipLatents.load(state / f"00{n}.latents.safetensors"))[0] for n in (0, 1)]
    seam = round(12 / 24 * rate)
    assert torch.equal(waveform[:, :seam], parts[0][:, :seam])
    assert torch.equal(waveform[:, seam + rate // 24 :], parts[1][:, rate // 24 :])


def test_drift_is_measured_said_and_kept(pipeline, whole, monkeypatch):
    made, _, state = whole
    assert len(made.seams) == 1
    (sentence,) = made.drift()
    assert sentence.startswith("Seam 1: ")
    said = []
    monkeypatch.setattr(pipeline.components, "say", said.append)
    pipeline.make_long(state.parent / "clip.mp4", PROMPTS, state=state, **LONG)
    assert said[0].startswith("2 of 2 segments are there already")
    assert said[-1] == sentence
    kept = json.loads((state / "001.json").read_text())["seam"]
    assert kept["colour"] == made.seams[0].colour
    assert kept["drift"]["colour"] == made.seams[0].drift.colour
    first, second = (frames_of(state / f"00{number}.frames.mkv") for number in (0, 1))
    means = [frame.float().mean(dim=(0, 1)) for frame in (first[-1], second[1], first[0])]
    assert made.seams[0].colour == pytest.approx(float((means[1] - means[0]).abs().mean()), abs=1e-2)
    assert made.seams[0].drift.colour == pytest.approx(float((means[1] - means[2]).abs().mean()), abs=1e-2)
    assert "Segment 2: " in made.report


def test_a_clip_without_a_folder_of_its_own_leaves_nothing_beside_it(pipeline, whole, tmp_path):
    pipeline.make_long(tmp_path / "clip.mp4", PROMPTS, **LONG)
    assert [path.name for path in tmp_path.iterdir()] == ["clip.mp4"]
    assert (tmp_path / "clip.mp4").read_bytes() == whole[1].read_bytes()


def test_what_is_held_is_the_frame_that_the_next_segment_begins_with(pipeline, tmp_path, monkeypatch):
    images = []
    denoise = NavaPipeline.denoise
    monkeypatch.setattr(
        NavaPipeline, "denoise", lambda self, *a, **k: (images.append(k["image"]), denoise(self, *a, **k))[1]
    )
    state = tmp_path / "state"
    pipeline.make_long(tmp_path / "clip.mp4", ["A bell."], state=state, hold="colour", **LONG)
    first = frames_of(state / "000.frames.mkv")
    reference = segments.Statistics.of(first[::24])
    held = hold_statistics(first[-1], reference, "colour")
    assert images[0] is None
    assert torch.equal(images[1], (held * 255).round() / 255)
    assert not torch.equal(images[1], first[-1].float() / 255)


# --- killed and gone on with -------------------------------------------------------------------------------------


class KilledError(BaseException):
    """As a kill: nothing in between may swallow it."""


def content_of(folder):
    """What a state says, by file; containers have identifiers of their own that are drawn anew each time."""
    readers = {
        ".mkv": lambda path: frames_of(path).numpy().tobytes(),
        ".safetensors": lambda path: {name: tensor.numpy().tobytes() for name, tensor in load_file(path).items()},
    }
    return {path.name: readers.get(path.suffix, type(path).read_bytes)(path) for path in folder.iterdir()}


def test_killed_after_any_stage_it_goes_on_to_the_same_clip(pipeline, whole, tmp_path, monkeypatch):
    """After each file that the state gets; the clip itself is the next."""
    kill_at, count = None, itertools.count()
    replace = os.replace

    def replacing(source, target):
        replace(source, target)  # here a file appears whole
        if next(count) == kill_at:
            raise KilledError

    monkeypatch.setattr("nava_core.media.os.replace", replacing)
    _, path, state = whole
    expected = content_of(state)
    stages = 1 + 2 * 5  # the plan, and of each segment latents, sound, frames, the last frame and what was measured
    for number in range(stages):
        folder = tmp_path / str(number)
        folder.mkdir()
        kill_at, count = number, itertools.count()
        with pytest.raises(KilledError):
            pipeline.make_long(folder / "clip.mp4", PROMPTS, state=folder / "state", **LONG)
        assert not (folder / "clip.mp4").exists()
        kill_at = None
        pipeline.make_long(folder / "clip.mp4", PROMPTS, state=folder / "state", **LONG)
        assert content_of(folder / "state") == expected
        assert (folder / "clip.mp4").read_bytes() == path.read_bytes()


def test_what_is_finished_is_not_made_again(pipeline, whole, monkeypatch):
    made, path, state = whole

    def refuse(*_, **__):
        raise AssertionError("this was made already")

    for name in ("denoise", "sound", "stream"):
        monkeypatch.setattr(NavaPipeline, name, refuse)
    again = pipeline.make_long(path, PROMPTS, state=state, **LONG)
    assert again == made


def test_voices_and_pictures_are_part_of_what_a_state_is_for(pipeline, tmp_path):
    """A state of one pass is not made: what is asked for is what its key follows from."""
    embedding, other = (torch.randn(1, 192, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2))
    words = {"prompts": ["He says <S>so<E>.", "A drum."]}
    asked = [
        {"voices": [embedding], **words}, {"voices": [other], **words}, {"voices": [], **words},
        {"image": torch.zeros(64, 64, 3)}, {"image": torch.ones(64, 64, 3)}, {"guidance": Guidance()},
        {"guidance": Guidance(video_text=2.0)}, {"segment": 0.4}, {},
    ]  # fmt: skip
    keys = set()
    for number, change in enumerate(asked):
        request = {**LONG, "prompts": PROMPTS, **change}
        with pytest.raises(Interrupted):
            pipeline.make_long(tmp_path / "a.mp4", state=tmp_path / str(number), should_stop=lambda: True, **request)
        keys.add(json.loads((tmp_path / str(number) / "plan.json").read_text())["key"])
    assert len(keys) == len(asked)


def test_a_length_that_no_latents_make_is_rounded_and_said(pipeline, tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr(pipeline.components, "say", said.append)
    for seconds in (1.0, 1.1):
        with pytest.raises(Interrupted):
            pipeline.make_long(tmp_path / "a.mp4", PROMPTS, should_stop=lambda: True, **{**LONG, "seconds": seconds})
    assert said[-1] == "1.1 s is no whole number of latent frames; 1.167 s are made."
    assert sum("latent frames" in sentence for sentence in said) == 1


def test_an_interruption_between_stages_keeps_what_is_finished(pipeline, whole, tmp_path):
    state = tmp_path / "state"
    with pytest.raises(Interrupted, match="what is finished of the clip is kept"):
        pipeline.make_long(
            tmp_path / "clip.mp4", PROMPTS, state=state,
            should_stop=lambda: (state / "000.frames.mkv").exists(), **LONG,
        )  # fmt: skip
    assert (state / "000.latents.safetensors").exists()
    pipeline.make_long(tmp_path / "clip.mp4", PROMPTS, state=state, **LONG)
    assert (tmp_path / "clip.mp4").read_bytes() == whole[1].read_bytes()


def test_a_lora_at_another_strength_makes_another_clip(pipeline, whole, tmp_path, monkeypatch):
    backbone = load_backbone(pipeline.components.files.backbone)
    rows, columns = backbone.get_parameter("single_blocks.0.ffn.0.weight").shape
    lora = tmp_path / "lora.safetensors"
    down, up = torch.ones(4, columns), torch.ones(rows, 4)
    save_file({"single_blocks.0.ffn.0.lora_up.weight": up, "single_blocks.0.ffn.0.lora_down.weight": down}, lora)

    def merged(strength):
        return LoraMerge([(lora, strength)], pipeline.components.files.backbone)

    def begin(loras):
        with monkeypatch.context() as changed:
            changed.setattr(pipeline.components, "loras", loras)
            pipeline.make_long(
                tmp_path / "clip.mp4", PROMPTS, state=tmp_path / "state", should_stop=lambda: True, **LONG
            )

    for strength, error in ((0.5, Interrupted), (0.5, Interrupted), (0.6, StateError)):
        with pytest.raises(error):
            begin(merged(strength))
    with pytest.raises(StateError):
        begin(merged(0.0))  # none


def test_scales_that_are_said_leave_each_segment_the_others(pipeline, tmp_path):
    """The first has no first frame, the second has one: with a voice the makers then use gentler scales."""
    prompts, state = ["He says <S>one<E>.", "He says <S>two<E>."], tmp_path / "state"
    voices = [torch.ones(1, 192)]
    pipeline.make_long(tmp_path / "clip.mp4", prompts, voices=voices, guidance={"audio_text": 1.5}, state=state, **LONG)
    used = [ClipLatents.load(state / f"00{number}.latents.safetensors").settings["guidance"] for number in (0, 1)]
    assert [each["audio_text"] for each in used] == [1.5, 1.5]
    assert [each["video_text"] for each in used] == [3.0, 2.0]
    assert [each["audio_timbre"] for each in used] == [3.0, 2.0]


def test_the_state_of_another_clip_is_refused_or_goes(pipeline, whole, tmp_path, monkeypatch):
    _, _, state = whole
    for change in ({"seed": 6}, {"hold": "colour"}, {"steps": 2}, {"seconds": 1.5}):
        with pytest.raises(StateError, match="holds the state of another clip"):
            pipeline.make_long(tmp_path / "clip.mp4", PROMPTS, state=state, **{**LONG, **change})
    with pytest.raises(StateError, match="another clip"):
        pipeline.make_long(tmp_path / "clip.mp4", ["A bell.", "A horn."], state=state, **LONG)
    for owner, name, value in (
        (pipeline.components, "wanted_vae_dtype", torch.bfloat16),
        (pipeline.components, "dtype", torch.bfloat16),
        (pipeline, "decoding", Decoding("tiled")),
    ):
        with monkeypatch.context() as changed:
            changed.setattr(owner, name, value)
            with pytest.raises(StateError, match="another clip"):
                pipeline.make_long(tmp_path / "clip.mp4", PROMPTS, state=state, **LONG)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("mine")
    with pytest.raises(StateError, match="is not empty and holds no state"):
        pipeline.make_long(tmp_path / "clip.mp4", PROMPTS, state=tmp_path / "other", **LONG)
    mine = State(tmp_path / "mine")
    said = []
    assert not mine.open("one", {})
    (mine.folder / "000.last.png").write_bytes(b"")
    (mine.folder / "notes.txt").write_text("mine")
    assert mine.open("one", {}, anew=True)
    assert not mine.open("two", {}, anew=True, say=said.append)
    assert sorted(path.name for path in mine.folder.iterdir()) == ["notes.txt", "plan.json"]
    assert "begun anew" in said[0]


# --- sound tracks and other sources ------------------------------------------------------------------------------


def test_a_sound_track_goes_through_all_segments_sample_for_sample(pipeline, sound, tmp_path, monkeypatch):
    heard, given = {}, []
    monkeypatch.setattr(segments, "mux", lambda path, frames, waveform, rate, *a, **k: heard.update(w=waveform, r=rate))
    denoise = NavaPipeline.denoise
    monkeypatch.setattr(
        NavaPipeline, "denoise", lambda self, *a, **k: (given.append(k["sound"]), denoise(self, *a, **k))[1]
    )
    made = pipeline.make_long(tmp_path / "clip.mp4", ["A bell."], sound=sound, state=tmp_path / "s", **LONG)
    assert heard["r"] == RATE
    assert torch.equal(heard["w"], sound[0][:, : round(FRAMES / 24 * RATE)])
    second = given[1].waveform
    assert torch.equal(second, sound[0][:, RATE // 2 : RATE // 2 + second.shape[1]])  # 12 frames later
    assert not list((tmp_path / "s").glob("*.sound.safetensors"))
    assert any(warning.startswith("The given sound: it goes on") for warning in made.warnings)


def test_a_sound_track_that_ends_early_is_followed_by_sound_that_is_made(pipeline, sound, tmp_path, monkeypatch):
    heard = {}
    monkeypatch.setattr(segments, "mux", lambda path, frames, waveform, rate, *a, **k: heard.update(w=waveform, r=rate))
    end = round(0.6 * RATE)
    short = (sound[0][:, :end], RATE)
    pipeline.make_long(tmp_path / "clip.mp4", ["A bell."], sound=short, sound_rest="generated", **LONG)
    assert torch.equal(heard["w"][:, :end], short[0])
    assert heard["w"].shape == (2, round(FRAMES / 24 * RATE))
    assert bool(heard["w"][:, end + RATE // 10 :].any())


def test_a_clip_is_extended_from_its_latents_without_a_loss(pipeline, tmp_path):
    source = pipeline.denoise("A bell.", **{k: v for k, v in LONG.items() if k != "segment"} | {"seconds": 0.5})
    clip = pipeline.decode(source)
    latents = source.save(tmp_path / "a.latents.safetensors")
    made = pipeline.extend(
        tmp_path / "b.mp4", latents, ["A drum."], seconds=0.5, state=tmp_path / "state", steps=1, seed=7
    )
    kept = frames_of(tmp_path / "state" / "000.frames.mkv")
    assert torch.equal((clip.frames * 255).round().to(torch.uint8), kept)
    assert (made.segments, round(made.seconds * 24)) == (2, FRAMES)
    goes_on = pipeline.denoise(
        "A drum.",
        image=kept[-1].float() / 255,
        seconds=0.5,
        width=64,
        height=64,
        size_from_image=False,
        steps=1,
        seed=8,
    )
    assert torch.equal(goes_on.video, segments.ClipLatents.load(tmp_path / "state" / "001.latents.safetensors").video)
    blind = segments.ClipLatents(None, source.audio, source.audio.shape[2] / 25)
    with pytest.raises(ValueError, match="sound alone has no frame"):
        pipeline.extend(tmp_path / "c.mp4", blind, ["A drum."], seconds=0.5)


def test_a_video_file_is_extended_with_its_own_sound_or_without_any(pipeline, sound, tmp_path, monkeypatch):
    size = {"width": 64, "height": 64, "size_from_image": False, "steps": 1}
    frames = torch.linspace(0, 1, 10 * 48 * 64 * 3).reshape(10, 48, 64, 3)
    mux(tmp_path / "loud.mp4", frames, *sound, fps=12)
    made = pipeline.extend(tmp_path / "b.mp4", tmp_path / "loud.mp4", ["A drum."], seconds=0.2, **size)
    assert round(made.seconds * 24) == 20 + 4
    text = " ".join(made.warnings)
    assert "resampled to 24" in text
    assert "The video has 64x48: scaled to cover 64x64" in text
    waveform, rate = read_audio(tmp_path / "b.mp4")
    assert rate == 48000
    assert waveform[:, :30000].abs().mean() > 0.05
    mux(tmp_path / "silent.mp4", frames)
    made = pipeline.extend(tmp_path / "c.mp4", tmp_path / "silent.mp4", ["A drum."], seconds=0.2, **size)
    assert "silent.mp4 has no sound" in " ".join(made.warnings)
    with pytest.raises(ValueError, match="no sound in"):
        read_audio(tmp_path / "c.mp4")


def test_a_video_with_sound_of_six_channels_is_extended(pipeline, tmp_path, monkeypatch):
    loud = torch.rand(6, 4800, generator=torch.Generator().manual_seed(1))
    frames = VideoFrames(torch.rand(3, 64, 64, 3), (64, 64), (loud, 48000))
    monkeypatch.setattr(revise, "read_frames", lambda *_: frames)
    (tmp_path / "a.mp4").write_bytes(b"a")
    size = {"width": 64, "height": 64, "size_from_image": False, "steps": 1}
    heard = {}
    monkeypatch.setattr(segments, "mux", lambda path, frames, waveform, *a, **k: heard.update(w=waveform))
    made = pipeline.extend(tmp_path / "b.mp4", tmp_path / "a.mp4", ["A drum."], seconds=0.2, **size)
    assert torch.allclose(heard["w"][:, :3000], loud.mean(dim=0)[:3000].expand(2, -1), atol=1e-6)
    assert "The 6 channels of its sound were mixed to one." in made.warnings


def test_a_recording_of_low_rate_leaves_the_sound_before_it_as_it_is(pipeline, tmp_path, monkeypatch):
    source = pipeline.denoise("A bell.", **{k: v for k, v in LONG.items() if k != "segment"} | {"seconds": 0.5})
    own, rate = pipeline.sound(source)
    heard = {}
    monkeypatch.setattr(segments, "mux", lambda path, frames, waveform, rate, *a, **k: heard.update(w=waveform, r=rate))
    speech = torch.sin(torch.arange(8000) / 9)[None] / 2, 8000
    made = pipeline.extend(tmp_path / "b.mp4", source, ["A drum."], seconds=0.5, sound=speech, steps=1)
    assert heard["r"] == rate == 48000
    seam = round(12 / 24 * rate)
    assert torch.equal(heard["w"][:, : seam - 1000], own[:, : seam - 1000])
    assert made.warnings[0] == (
        "The given sound: it was resampled from 8000 to 48000 Hz, so that the sound before it loses nothing."
    )
    assert "silence" not in " ".join(made.warnings)  # before it there is the clip's own sound


def test_sound_for_what_goes_on_from_a_silent_clip_is_refused(pipeline, tmp_path):
    silent = segments.ClipLatents(torch.zeros(1, 48, 2, 4, 4), None, 5 / 24)
    with pytest.raises(ValueError, match="has no sound, so the longer one has none either"):
        pipeline.extend(tmp_path / "b.mp4", silent, ["A drum."], seconds=0.5, sound=(torch.ones(1, 9000), 9000))


def test_what_a_killed_process_left_half_written_goes(pipeline, whole, tmp_path):
    _, path, state = whole
    left = [path.parent / ".clip-0123abcd.part", state / ".000-0123abcd.part"]
    others = [path.parent / ".clip-2-0123abcd.part", path.parent / ".clip.part"]
    for each in (*left, *others):
        each.write_bytes(b"half")
    pipeline.make_long(path, PROMPTS, state=state, **LONG)
    assert [each.exists() for each in (*left, *others)] == [False, False, True, True]


# --- what is refused ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("request_", "sentence"),
    [
        ({"mode": "audio"}, "A clip of sound alone has no frame that a segment could go on from"),
        ({"mode": "video", "sound": (torch.ones(1, 9000), 9000)}, "A sound was given for a clip of picture alone"),
        ({"hold": "brightness"}, "one of nothing, colour, colour and sharpness; got 'brightness'"),
        ({"prompts": []}, "at least one prompt"),
        ({"prompts": ["a", "b", "c"]}, "There are 3 prompts for 2 segments of up to 0.5 s"),
        ({"segment": 0.1}, "A segment is at least"),
        ({"sound": (torch.ones(1, 9000), 9000), "sound_start": 3.0}, "cannot start 3.00 s into itself"),
        ({"voices": [torch.zeros(1, 192)]}, "the prompt has no speech span"),
        ({"path": "clip.wav"}, "written as .mp4"),
    ],
)
def test_what_does_not_go_together_is_a_sentence_and_leaves_no_state(pipeline, tmp_path, request_, sentence):
    path, prompts = tmp_path / request_.pop("path", "clip.mp4"), request_.pop("prompts", PROMPTS)
    with pytest.raises(ValueError, match=r".") as caught:
        pipeline.make_long(path, prompts, state=tmp_path / "state", **{**LONG, **request_})
    assert sentence in str(caught.value)
    assert list(tmp_path.iterdir()) == []
