"""Saved voices: their file and what is refused, the speaker encoder's fingerprint, blends, and `nava voice`."""

import json
import math
import os
import pickle
import wave
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import nava_core.voices as voices_module
from nava_core.checkpoint import VOICE_TENSOR, FileKind, WrongFileError, describe_file, load_backbone
from nava_core.cli import main
from nava_core.components import load_problem
from nava_core.pipeline import ModelFiles, NavaPipeline, stages
from nava_core.timbre import encode_timbre, load_redimnet
from nava_core.voices import (
    MAX_NAME,
    SavedVoice,
    VoiceError,
    blend_voices,
    check_one_encoder,
    encoder_fingerprint,
    make_voice,
    save_in_folder,
    voice_file_name,
    voice_of,
)

GOLDEN = Path(__file__).parents[1] / "golden"
ENCODER = GOLDEN / "redimnet_small.pt"
OTHER = "f" * 32
CLOSE = 1e-6


def angle(a, b) -> float:
    a, b = (each.timbre.double().flatten() for each in (a, b))
    a, b = a / a.norm(), b / b.norm()
    return 2 * math.atan2(float((a - b).norm()), float((a + b).norm()))


@pytest.fixture(scope="module")
def encoder():
    return load_redimnet(ENCODER)


@pytest.fixture(scope="module")
def waves():
    cases = load_file(GOLDEN / "redimnet_small_cases.safetensors")
    time = torch.arange(32000) / 16000
    buzz = sum(torch.sin(2 * math.pi * 140 * k * time) / k for k in range(1, 9)).unsqueeze(0) / 4
    return {"golden": cases["six_seconds/in"], "buzz": buzz, "noise": cases["odd_length/in"].flip(1) ** 3}


@pytest.fixture(scope="module")
def voices(encoder, waves):
    return [make_voice(encoder, wave, 16000, name=name) for name, wave in waves.items()]


@pytest.fixture
def saved(voices, tmp_path):
    return voices[0].save(tmp_path / "golden.safetensors")


# --- a voice and its file ----------------------------------------------------------------------------------------


def test_a_voice_is_the_golden_timbre_and_says_where_it_comes_from(encoder, waves):
    golden = load_file(GOLDEN / "redimnet_small_cases.safetensors")["six_seconds/out"]
    voice = make_voice(encoder, waves["golden"], 16000, name="Anna", start=0.0)
    assert torch.allclose(voice.timbre, golden, atol=1e-5)
    assert voice.seconds == pytest.approx(waves["golden"].shape[1] / 16000)
    assert voice.encoder == encoder_fingerprint(encoder)
    part = make_voice(encoder, waves["golden"], 16000, start=1.5, duration=2.0)
    assert part.seconds == 2.0
    assert torch.equal(part.timbre, encode_timbre(encoder, waves["golden"], 16000, start=1.5, duration=2.0))
    assert make_voice(encoder, torch.randn(1, 40 * 16000) / 9, 16000).seconds == 30.0


def test_saved_and_loaded_is_the_same(voices, tmp_path):
    voice = blend_voices(voices[:2], [1, 3], "Ännchen 安娜")
    path = voice.save(tmp_path / "a.safetensors")
    again = SavedVoice.load(path)
    assert again.is_like(voice)
    assert (again.name, again.seconds, again.encoder, again.blend) == (
        voice.name, voice.seconds, voice.encoder, (("golden", 0.25), ("buzz", 0.75)),
    )  # fmt: skip
    assert path.stat().st_size < 2048
    assert "25% golden, 75% buzz" in again.summary


def test_a_timbre_carries_its_voice_until_it_is_changed(voices):
    timbre = voices[0].timbre
    for same in (timbre, pickle.loads(pickle.dumps(timbre)), voice_of(timbre).timbre):
        assert voice_of(same).name == "golden"
        assert voice_of(same).is_like(voices[0])
    assert voice_of(timbre * 2) is None
    assert voice_of(torch.zeros(1, 192)) is None


def test_nothing_is_overwritten_unasked(voices, saved):
    before = saved.read_bytes()
    with pytest.raises(FileExistsError, match=r"golden\.safetensors is already there"):
        voices[1].save(saved)
    assert saved.read_bytes() == before
    voices[1].save(saved, overwrite=True)
    assert SavedVoice.load(saved).is_like(voices[1])
    dangling = saved.with_name("link.safetensors")
    dangling.symlink_to(saved.with_name("elsewhere"))
    with pytest.raises(FileExistsError):
        voices[0].save(dangling)
    with pytest.raises(VoiceError, match=r"name its file a\.safetensors"):
        voices[0].save(saved.with_name("a.pt"))


def test_an_interrupted_writing_leaves_nothing_and_keeps_what_was_there(voices, saved, monkeypatch):
    def half(tensors, path, metadata):
        Path(path).write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr("safetensors.torch.save_file", half)
    before = saved.read_bytes()
    for target in (saved, saved.with_name("new.safetensors")):
        with pytest.raises(KeyboardInterrupt):
            voices[1].save(target, overwrite=True)
    assert saved.read_bytes() == before
    assert [path.name for path in saved.parent.iterdir()] == [saved.name]


# --- what is refused ---------------------------------------------------------------------------------------------


def write(path, timbre=None, names=(VOICE_TENSOR,), facts=(), **metadata):
    """A voice's file with some of it changed."""
    about = {"name": "A", "seconds": 3.0, "encoder": OTHER, "blend": []} | dict(facts)
    metadata = {"format": "nava_voice", "version": "1", "voice": json.dumps(about)} | metadata
    timbre = torch.ones(1, 192) if timbre is None else timbre
    save_file({name: timbre.clone() for name in names}, path, {k: v for k, v in metadata.items() if v is not None})
    return path


REFUSED = {
    "version": ({"version": "2"}, "of version 2 of voices' files.*update the pack"),
    "no version": ({"version": None}, "of version unknown"),
    "format": ({"format": "pt"}, "was not written as a voice's file"),
    "no format": ({"format": None}, "was not written as a voice's file"),
    "no facts": ({"voice": None}, "does not say whose voice it is"),
    "no JSON": ({"voice": "{"}, "does not say whose voice it is"),
    "deep JSON": ({"voice": "[" * 100_000}, "does not say whose voice it is|holds more"),
    "a list": ({"voice": "[]"}, "does not say whose voice it is"),
    "wider": ({"timbre": torch.ones(1, 256)}, r"is \(1, 256\) of float32"),
    "two": ({"timbre": torch.ones(2, 192)}, r"is \(2, 192\)"),
    "fp16": ({"timbre": torch.ones(1, 192).half()}, "of float16"),
    "more": ({"names": (VOICE_TENSOR, "weights")}, "holds more than a voice"),
    "large": ({"padding": "x" * 70_000}, "holds more than a voice"),
    "nan": ({"timbre": torch.full((1, 192), math.nan)}, "not of finite numbers"),
    "zeros": ({"timbre": torch.zeros(1, 192)}, "nothing but zeros"),
    "no encoder": ({"facts": {"encoder": ""}}, "does not say which speaker encoder"),
    "seconds": ({"facts": {"seconds": -1}}, "how long its recording was"),
    "infinite": ({"facts": {"seconds": math.inf}}, "how long its recording was"),
    "escape": ({"facts": {"name": "\x1b[31mred"}}, "signs in it that cannot be shown"),
    "surrogate": ({"facts": {"name": "\ud800"}}, "signs in it that cannot be shown"),
    "long name": ({"facts": {"name": "n" * 1000}}, "its name is too long"),
    "blend": ({"facts": {"blend": [["A", 7]]}}, "shares"),
    "blend names": ({"facts": {"blend": [["\n", 0.5]]}}, "cannot be shown"),
    "blend form": ({"facts": {"blend": {"A": 1}}}, "does not say whose voice it is"),
}


@pytest.mark.parametrize("change", REFUSED)
def test_what_is_no_voice_is_refused_in_a_sentence(tmp_path, change):
    made, words = REFUSED[change]
    path = write(tmp_path / "v.safetensors", **made)
    with pytest.raises(ValueError, match=words) as caught:
        SavedVoice.load(path)
    sentence = str(caught.value)
    assert "v.safetensors" in sentence
    assert sentence.isprintable()
    assert len(sentence) < 300


def test_other_files_are_named_and_nothing_large_is_read(tmp_path, saved, monkeypatch):
    (tmp_path / "cut.safetensors").write_bytes(saved.read_bytes()[:-100])
    (tmp_path / "page.safetensors").write_bytes(b"<!DOCTYPE html><html></html>")
    (tmp_path / "empty.safetensors").write_bytes(b"")
    header = json.dumps({VOICE_TENSOR: {"dtype": "F32", "shape": [1, 2**40], "data_offsets": [0, 2**42]}}).encode()
    (tmp_path / "liar.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    monkeypatch.setattr(voices_module, "open_checkpoint", None)
    for path, words in (
        (tmp_path / "cut.safetensors", "an incomplete download"),
        (tmp_path / "page.safetensors", "a web page"),
        (tmp_path / "empty.safetensors", "an empty file"),
        (tmp_path / "liar.safetensors", "an incomplete download"),
        (ENCODER, "a ReDimNet speaker encoder, but a saved voice is needed here"),
        (GOLDEN / "backbone_tiny.safetensors", "a NAVA backbone, but a saved voice is needed here"),
    ):
        with pytest.raises(WrongFileError, match=words):
            SavedVoice.load(path)
    with pytest.raises(FileNotFoundError):
        SavedVoice.load(tmp_path / "nowhere.safetensors")


@settings(max_examples=60)
@given(st.data())
def test_a_garbled_voice_is_refused_or_whole(tmp_path_factory, data):
    folder = tmp_path_factory.getbasetemp()
    raw = bytearray(write(folder / "whole.safetensors").read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    (folder / "garbled.safetensors").write_bytes(raw)
    try:
        voice = SavedVoice.load(folder / "garbled.safetensors")
    except ValueError:
        return
    assert voice.timbre.shape == (1, 192)
    assert voice.summary.isprintable()


def test_the_kind_is_told_and_loading_it_as_something_else_says_what_it_is(saved):
    info = describe_file(saved)
    assert info.kind is FileKind.NAVA_VOICE
    assert info.summary.startswith("golden.safetensors is a saved voice: 192 parameters in 1 tensor, fp32")
    assert load_problem(info) is None
    with pytest.raises(
        WrongFileError, match="is a saved voice, but a NAVA backbone is needed here: it is used by NAVA"
    ):
        load_backbone(saved)
    with pytest.raises(WrongFileError, match="is a saved voice, but a ReDimNet speaker encoder is needed here"):
        load_redimnet(saved)
    write(saved, version="2")
    assert "update the pack" in load_problem(describe_file(saved))


# --- the speaker encoder -----------------------------------------------------------------------------------------


def test_the_fingerprint_is_of_the_weights_not_of_their_file(encoder, tmp_path):
    published = torch.load(ENCODER, weights_only=True)
    config = {"model_config": json.dumps(published["model_config"])}
    state = {name: tensor.contiguous() for name, tensor in published["state_dict"].items()}
    halves = {name: t.half() if t.is_floating_point() else t for name, t in state.items()}
    with_head = {**state, "cls_head.weight": torch.randn(4, 192)}
    without_constants = {k: t for k, t in state.items() if not k.startswith("spec.") or k.startswith("spec.spec_norm.")}
    expected = encoder_fingerprint(encoder)
    assert voices_module.FINGERPRINT.fullmatch(expected)
    for number, tensors in enumerate((state, halves, with_head, without_constants)):
        path = tmp_path / f"{number}.safetensors"
        save_file(tensors, path, config)
        assert encoder_fingerprint(load_redimnet(path)) == expected, number
    assert encoder_fingerprint(load_redimnet(ENCODER, use_torchaudio=False)) == expected


def test_another_encoder_has_another_fingerprint(encoder):
    other = load_redimnet(ENCODER)
    found = {encoder_fingerprint(encoder)}
    with torch.no_grad():
        for change in (other.linear.bias, other.bn.running_mean, other.backbone.stem[0].weight):
            change.view(-1)[0] += 0.01
            found.add(encoder_fingerprint(other))
    assert len(found) == 4


def test_voices_of_another_encoder_are_refused(encoder, voices):
    voices[0].check_encoder(encoder)
    stranger = SavedVoice(voices[1].timbre, OTHER, 3.0, "Bo")
    with pytest.raises(VoiceError, match=r"The voice 'Bo' was made with another speaker encoder \(ffffffff\)"):
        stranger.check_encoder(encoder)
    check_one_encoder([*voices, torch.zeros(1, 192)])
    with pytest.raises(VoiceError, match="Voices 2 and 3 were made with different speaker encoders"):
        check_one_encoder([torch.zeros(1, 192), voices[0].timbre, stranger.timbre])
    with pytest.raises(VoiceError, match="different speaker encoders"):
        blend_voices([voices[0], stranger], [1, 1])


# --- blends ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.0, 0.1, 0.25, 0.5, 0.9, 1.0])
def test_a_blend_of_two_lies_on_the_arc_between_them(voices, share):
    a, b = voices[0], voices[1]
    between = angle(a, b)
    assert between > 0.02, "the voices are too alike for this test to fail"
    blend = blend_voices([a, b], [1 - share, share])
    assert angle(a, blend) == pytest.approx(share * between, abs=CLOSE)
    assert angle(blend, b) == pytest.approx((1 - share) * between, abs=CLOSE)
    lengths = [float(each.timbre.norm()) for each in (a, b)]
    assert float(blend.timbre.norm()) == pytest.approx((1 - share) * lengths[0] + share * lengths[1], rel=1e-5)


def test_all_the_weight_gives_that_voice_exactly(voices):
    for number, voice in enumerate(voices):
        weights = [5.0 if each == number else 0.0 for each in range(len(voices))]
        blend = blend_voices(voices, weights)
        assert torch.equal(blend.timbre, voice.timbre)
        assert (blend.name, blend.seconds, blend.blend) == (voice.name, voice.seconds, ())


def test_a_blend_knows_no_order_and_only_proportions(voices):
    blend = blend_voices(voices, [1, 2, 5])
    assert angle(blend, blend_voices(voices[::-1], [50, 20, 10])) < CLOSE
    assert angle(blend, blend_voices(voices, [1, 2, 6])) > 100 * CLOSE
    assert [share for _, share in blend.blend] == [0.125, 0.25, 0.625]
    assert blend.seconds == pytest.approx(sum(voice.seconds for voice in voices))
    assert angle(blend_voices([voices[0]] * 3, [1, 1, 1]), voices[0]) < CLOSE


def test_a_blend_of_three_is_the_point_where_their_arcs_cancel_out():
    axes = torch.eye(192)[:3] * torch.tensor([[1.0], [2.0], [3.0]])
    parts = [SavedVoice(axis[None], OTHER, 1.0) for axis in axes]
    blend = blend_voices(parts, [1, 1, 1])
    assert torch.allclose(blend.timbre[0, :3] / blend.timbre.norm(), torch.full((3,), 3**-0.5), atol=1e-6)
    assert float(blend.timbre.norm()) == pytest.approx(2.0)
    for weights in ([1, 1, 4], [3, 1, 2]):
        point = blend_voices(parts, weights).timbre.double()[0]
        point /= point.norm()
        pull = torch.zeros(192, dtype=torch.float64)
        for axis, weight in zip(torch.eye(192, dtype=torch.float64), weights, strict=False):
            cosine = point @ axis
            away = axis - cosine * point
            pull += weight * torch.acos(cosine) * away / away.norm()
        assert float(pull.norm()) < 1e-5


@pytest.mark.parametrize(
    ("count", "weights", "words"),
    [
        (1, [1], "of 2 to 16 voices; got 1"),
        (2, [1], "2 voices are to be blended by 1 weights"),
        (2, [0, 0], "not all of them 0"),
        (2, [2, -1], "numbers from 0"),
        (2, [math.nan, 1], "numbers from 0"),
        (2, [math.inf, 1], "numbers from 0"),
        (17, [1] * 17, "of 2 to 16 voices; got 17"),
    ],
)
def test_weights_that_are_no_shares_are_refused(voices, count, weights, words):
    with pytest.raises(VoiceError, match=words):
        blend_voices((voices * 6)[:count], weights)


def test_opposite_voices_are_refused(voices):
    opposite = SavedVoice(-voices[0].timbre, voices[0].encoder, 1.0)
    for weights in ([1, 1], [3, 1]):
        with pytest.raises(VoiceError, match="opposite to each other"):
            blend_voices([voices[0], opposite], weights)
    assert torch.equal(blend_voices([voices[0], opposite], [0, 1]).timbre, opposite.timbre)


# --- names -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["Anna", "安娜", "Mr. X", "a-b_c (2)", "x" * MAX_NAME])
def test_names_that_are_fine(name):
    assert voice_file_name(name) == f"{name}.safetensors"


@pytest.mark.parametrize(
    "name",
    ["", ".", "..", "../up", "a/b", "a\\b", "C:x", "/etc/passwd", ".hidden", "end.", " a", "a\nb", "a\0b", "nul",
     "COM1", "con.txt", "x" * (MAX_NAME + 1), "安" * MAX_NAME, "a*", "\u202ename"],
)  # fmt: skip
def test_names_that_could_lead_elsewhere_are_refused(voices, tmp_path, name):
    with pytest.raises(VoiceError, match="cannot be a file's") as caught:
        save_in_folder(voices[0], tmp_path / "voices", name)
    assert str(caught.value).isprintable()
    assert not list(tmp_path.rglob("*"))


def test_a_folder_keeps_both_unless_told_to_replace(voices, tmp_path):
    folder = tmp_path / "new" / "voices"
    first, named = save_in_folder(voices[0], folder, "Anna")
    assert (first.name, named.name, SavedVoice.load(first).name) == ("Anna.safetensors", "Anna", "Anna")
    before = first.stat().st_mtime_ns
    assert save_in_folder(voices[0], folder, "Anna")[0] == first
    assert first.stat().st_mtime_ns == before
    second, named = save_in_folder(voices[1], folder, "Anna")
    assert (second.name, named.name) == ("Anna_2.safetensors", "Anna_2")
    assert save_in_folder(voices[1], folder, "Anna")[0] == second
    save_in_folder(voices[2], folder, "Anna", replace=True)
    assert SavedVoice.load(first).is_like(voices[2])
    second.write_bytes(b"not ours")
    assert save_in_folder(voices[1], folder, "Anna")[0].name == "Anna_3.safetensors"
    assert second.read_bytes() == b"not ours"
    assert len(list(folder.iterdir())) == 3


# --- in a clip ---------------------------------------------------------------------------------------------------


def test_the_pipeline_takes_saved_voices_as_files_and_objects(voices, waves, saved):
    recording = (waves["buzz"], 16000)
    for given_voices in ([saved, recording], [voices[0], recording], [str(saved), voices[1].timbre]):
        found = stages.encode_voices(ENCODER, given_voices, [])
        assert [torch.equal(timbre, voice.timbre) for timbre, voice in zip(found, voices, strict=False)] == [True] * 2
    stages.check_speaker_encoder(None, [saved, voices[0], voices[1].timbre])
    assert torch.equal(stages.encode_voices(None, [saved], [])[0], voices[0].timbre)
    with pytest.raises(ValueError, match="needs the speaker encoder"):
        stages.check_speaker_encoder(None, [saved, recording])


def test_the_pipeline_refuses_voices_of_another_encoder(voices, saved, tmp_path):
    stranger = SavedVoice(voices[1].timbre, OTHER, 3.0, "Bo")
    path = stranger.save(tmp_path / "bo.safetensors")
    for voice in (path, stranger, stranger.timbre):
        with pytest.raises(VoiceError, match="The voice 'Bo' was made with another speaker encoder"):
            stages.encode_voices(ENCODER, [voice], [])
        with pytest.raises(VoiceError, match="Voices 1 and 2 were made with different speaker encoders"):
            stages.encode_voices(None, [saved, voice], [])
    with pytest.raises(WrongFileError, match="a NAVA backbone, but a saved voice is needed here"):
        stages.encode_voices(ENCODER, [GOLDEN / "backbone_tiny.safetensors"], [])


PROMPT = "A radio voice says <S>it is eight o'clock<E>."


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    from nava_core.demo import make_small_models

    pytest.importorskip("diffusers", reason="the standalone VAEs need diffusers")
    pytest.importorskip("transformers", reason="the standalone text encoder needs transformers")
    return make_small_models(tmp_path_factory.mktemp("models"), preview_decoder=False)


def test_a_saved_voice_sounds_as_its_recording_and_needs_no_encoder(models, waves, tmp_path):
    roles = ("backbone", "text_encoder", "video_vae", "audio_vae")
    files = {role: models[role] for role in roles}
    clip = {"mode": "audio", "seconds": 0.5, "steps": 2}
    recording = (waves["golden"], 16000)
    with_encoder = ModelFiles(**files, speaker_encoder=models["speaker_encoder"])
    expected = NavaPipeline.from_files(with_encoder, device="cpu").denoise(PROMPT, voices=[recording], **clip)
    voice = make_voice(load_redimnet(models["speaker_encoder"]), *recording)
    path = voice.save(tmp_path / "v.safetensors")
    alone = NavaPipeline.from_files(ModelFiles(**files), device="cpu")
    assert torch.equal(alone.denoise(PROMPT, voices=[path], **clip).audio, expected.audio)
    assert not torch.equal(alone.denoise(PROMPT, **clip).audio, expected.audio)


def test_batches_and_generate_take_saved_voices(models, waves, nava, tmp_path):
    voice = make_voice(load_redimnet(models["speaker_encoder"]), waves["golden"], 16000, name="Anna")
    voice.save(tmp_path / "anna.safetensors")
    SavedVoice(voice.timbre, OTHER, 3.0, "Bo").save(tmp_path / "bo.safetensors")
    options = [f"--{role.replace('_', '-')}={models[role]}" for role in
               ("backbone", "text_encoder", "video_vae", "audio_vae", "speaker_encoder")]  # fmt: skip
    options += ["--device=cpu", "--seconds=0.5", "--steps=1", "--audio-only"]
    lines = [{"id": name, "prompt": PROMPT, "spk_wavs": [f"{name}.safetensors"]} for name in ("anna", "bo")]
    (tmp_path / "clips.jsonl").write_text("\n".join(map(json.dumps, lines)))
    code, _, err = nava("batch", "clips.jsonl", "--out", "clips", *options)
    assert code == 1
    assert (tmp_path / "clips" / "anna.wav").is_file()
    assert not (tmp_path / "clips" / "bo.wav").exists()
    assert "The voice 'Bo' was made with another speaker encoder" in err
    code, _, err = nava("generate", PROMPT, "--voice", "bo.safetensors", *options)
    assert (code, "another speaker encoder" in err) == (1, True)


# --- nava voice --------------------------------------------------------------------------------------------------


@pytest.fixture
def nava(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        code = main([str(argument) for argument in arguments])
        said = capsys.readouterr()
        return code, said.out, said.err

    return run


@pytest.fixture
def recordings(waves, tmp_path):
    for name in ("golden", "buzz"):
        samples = (waves[name][0] / waves[name].abs().max() * 20000).to(torch.int16)
        with wave.open(str(tmp_path / f"{name}.wav"), "wb") as file:
            file.setparams((1, 2, 16000, 0, "NONE", ""))
            file.writeframes(samples.numpy().astype("<i2").tobytes())


@pytest.mark.usefixtures("recordings")
def test_voices_from_recording_to_blend_by_command(nava, tmp_path):
    pytest.importorskip("av")
    code, out, err = nava("voice", "make", "golden.wav", "--speaker-encoder", ENCODER, "--name", "Anna", "--start", 1)
    assert (code, Path(out.strip()).name) == (0, "Anna.safetensors"), err
    assert "Anna: " in err
    assert nava("voice", "make", "buzz.wav", "--models", GOLDEN)[0] == 0
    code, out, err = nava("voice", "blend", "Anna.safetensors:3", "buzz.safetensors")
    assert (code, Path(out.strip()).name) == (0, "Anna and buzz.safetensors"), err
    code, out, _ = nava("voice", "list", tmp_path, "--speaker-encoder", ENCODER, "--json")
    findings = {finding["name"]: finding for finding in map(json.loads, out.splitlines())}
    assert (code, sorted(findings)) == (0, ["Anna", "Anna and buzz", "buzz"])
    assert findings["Anna and buzz"]["blend"] == [["Anna", 0.75], ["buzz", 0.25]]
    assert findings["buzz"]["seconds"] == 2.0
    again = nava("voice", "make", "golden.wav", "--speaker-encoder", ENCODER, "--name", "Anna")
    assert Path(again[1].strip()).name == "Anna_2.safetensors"
    assert nava("inspect", "Anna.safetensors")[1].startswith("Anna.safetensors is a saved voice")


@pytest.mark.usefixtures("recordings")
def test_what_is_wrong_with_a_command_is_said_in_a_sentence(nava, saved, tmp_path):
    write(tmp_path / "bo.safetensors")
    make = ("voice", "make", "golden.wav", "--speaker-encoder", ENCODER)
    for arguments, code, words in (
        (("voice",), 2, "make|list|blend"),
        (("voice", "make", "none.wav", "--speaker-encoder", ENCODER), 2, "There is no recording"),
        (("voice", "make", "golden.wav"), 2, "--speaker-encoder"),
        ((*make, "--out", "golden.safetensors"), 2, "already there"),
        ((*make, "--out", "x.pt"), 2, "name it x.safetensors"),
        ((*make, "--name", "../up"), 2, "cannot be a file's"),
        ((*make, "--start", "-1"), 2, "number of seconds from 0"),
        ((*make, "--start", "99"), 1, "but the recording lasts"),
        (("voice", "make", "golden.wav", "--speaker-encoder", saved), 1, "is a saved voice"),
        (("voice", "blend", saved, "bo.safetensors"), 2, "different speaker encoders"),
        (("voice", "blend", saved), 2, "2 to 16 voices"),
        (("voice", "blend", saved, "gone.safetensors:2"), 2, "There is no voice gone.safetensors"),
        (("voice", "blend", saved, f"{saved}:-1"), 2, "numbers from 0"),
        (("voice", "blend", saved, "golden.wav"), 1, "but a saved voice is needed here"),
        (("voice", "list", "nowhere"), 2, "There is no nowhere"),
    ):
        found, out, err = nava(*arguments)
        assert (found, out) == (code, ""), (arguments, err)
        assert words in err, err
        assert len(err.strip().splitlines()) == 1, err
    code, out, _ = nava("voice", "list", ".", "--speaker-encoder", ENCODER)
    assert code == 1
    assert "golden.safetensors: golden: " in out
    assert "was made with another speaker encoder" in out
    assert sorted(os.listdir()) == ["bo.safetensors", "buzz.wav", "golden.safetensors", "golden.wav"]
