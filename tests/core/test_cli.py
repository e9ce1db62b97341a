"""The command line: options, exit codes, one-sentence errors, and every command once with small models."""

import argparse
import importlib.util
import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from nava_core.checkpoint import WrongFileError
from nava_core.cli import main
from nava_core.cli.given import make_long
from nava_core.cli.progress import Progress, format_duration
from nava_core.decoding import Decoding
from nava_core.demo import make_small_models
from nava_core.pipeline import ClipLatents, Retake

ROOT = Path(__file__).parents[2]
FAKE = Path(__file__).with_name("_fake_pipeline.py")
spec = importlib.util.spec_from_file_location("_fake_pipeline", FAKE)
fake = importlib.util.module_from_spec(spec)
spec.loader.exec_module(fake)
COMMANDS = (
    "generate",
    "batch",
    "rewrite",
    "extend",
    "retake",
    "refine",
    "decode",
    "report",
    "voice",
    "convert",
    "inspect",
    "demo",
)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A folder with one small model of each kind."""
    made = make_small_models(tmp_path_factory.mktemp("models"), preview_decoder=False)
    for role in ("text_encoder_fp8", "text_encoder_pth"):
        made[role].unlink()
    return made["backbone"].parent


@pytest.fixture
def nava(models, monkeypatch, tmp_path, capsys):
    """Runs a command in an empty folder: (exit code, stdout, stderr); ``.pipeline`` is the fake that it opened."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        def open_pipeline(files, **options):
            run.pipeline = fake.FakePipeline(files, **options)
            return run.pipeline

        code = main([str(argument) for argument in arguments], open_pipeline=open_pipeline)
        said = capsys.readouterr()
        return code, said.out, said.err

    run.pipeline = None
    return run


def sentence(text):
    lines = text.strip().splitlines()
    assert len(lines) == 1, text
    assert "Traceback" not in text
    return lines[0]


# --- help and usage ----------------------------------------------------------------------------------------------


def test_help_has_examples_and_exit_codes(nava):
    code, out, _ = nava("--help")
    assert code == 0
    assert all(command in out for command in COMMANDS)
    for command in COMMANDS:
        code, out, _ = nava(command, "--help")
        assert code == 0
        assert "examples:" in out
        assert f"nava {command}" in out.split("examples:")[1]
        assert "exit codes: 0" in out


def test_help_needs_no_torch():
    code = "import sys; from nava_core.cli import make_parser; make_parser(); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "required: COMMAND"),
        (["paint"], "invalid choice"),
        (["generate"], "Give the prompt"),
        (["generate", "a", "--prompt-file", "b"], "not both"),
        (["generate", "--prompt-file", "gone.txt"], "gone.txt: No such file"),
        (["generate", "a"], "--models FOLDER, or the single files --backbone, --text-encoder"),
        (["generate", "a", "--models", "gone"], "no folder gone"),
        (["generate", "a", "--backbone", "gone.safetensors"], "--backbone: there is no gone.safetensors"),
        (["generate", "a", "--models", "."], "There is no backbone"),
        (["generate", "a", "--size", "large"], "is no size"),
        (["generate", "a", "--size", "650x350"], "multiple of 16"),
        (["generate", "a", "--seconds", "0"], "above 0"),
        (["generate", "a", "--seconds", "nan"], "is no number"),
        (["generate", "a", "--seconds", "0.01"], "too short"),
        (["generate", "a", "--shift", "1e300"], "shift"),
        (["batch", FAKE, "--out", "x", "--seconds", "100"], "too long"),
        (["batch", FAKE, "--out", "x", "--shift", "0.001"], "shift"),
        (["convert", "x.ckpt", "y.ckpt"], "y.safetensors"),
        (["generate", "a", "--seed", "-1"], "--seed"),
        (["generate", "a", "--steps", "0"], "whole number from 1"),
        (["generate", "a", "--video-text", "-2"], "--video-text"),
        (["generate", "a", "--audio-only", "--video-only"], "not allowed with"),
        (["generate", "  "], "prompt is empty"),
        (["generate", "say <S>yes"], "span"),
        (["generate", "a", "--image", "gone.png"], "no image"),
        (["generate", "a", "--image", "https://example.org/a.png"], "address"),
        (["generate", "<S>a<E>", "--voice", "gone.wav"], "no voice"),
        (["generate", "a", "--out", "clip.wav"], "written as .mp4"),
        (["generate", "a", "--out", "."], "is a folder"),
        (["generate", "a", "--audio-only", "--out", "clip.mp4"], "written as .wav"),
        (["batch", "gone.jsonl", "--out", "x"], "no file gone.jsonl"),
        (["generate", "a", "--save-latents", "A bell rings."], "'A bell rings.' is no name of a .safetensors file"),
        (["generate", "a", "--tile-size", "32"], "whole number from 64 to 4096"),
        (["generate", "a", "--decoding", "fast"], "invalid choice"),
        (["generate", "a", "--sound", "gone.wav"], "no sound"),
        (["generate", "a", "--sound-start", "-1"], "0 or more"),
        (["generate", "a", "--sound-at", "1"], "said of no sound: give one"),
        (["generate", "a", "--sound", FAKE, "--video-only"], "A sound was given for a clip of picture alone"),
        (["generate", "a", "--video", "gone.mp4"], "no video"),
        (["generate", "a", "--video", FAKE, "--audio-only"], "A video was given for a clip of sound alone"),
        (["generate", "a", "--video", FAKE, "--last-image", FAKE], "Give a video or single pictures, and not both"),
        (["generate", "a", "--image", FAKE, "--image-at", f"0={FAKE}"], "Two pictures were given for the first frame"),
        (["generate", "a", "--image-at", "her.png"], "does not say when: give SECONDS=FILE"),
        (["generate", "a", "--image-at", "x=her.png"], "is no number"),
        (["generate", "a", "--shown", "grey"], "invalid choice"),
        (["generate", "a", "--then", "b"], "are for the segments of a longer clip"),
        (["generate", "a", "--then", "b", "--then", "c", "--seconds", "12"], "There are 3 prompts for 2 segments"),
        (["generate", "a", "--seconds", "12", "--segment", "0.1"], "A segment has from 0.17 to 60 seconds"),
        (["generate", "a", "--seconds", "12", "--segment", "0", "--then", "b"], "made in one pass"),
        (["generate", "a", "--seconds", "12", "--last-image", FAKE], "only the first frame can be given"),
        (["generate", "a", "--seconds", "12", "--save-latents"], "--save-latents: a clip of several segments"),
        (["generate", "a", "--state", "x"], "--state: this clip is made in one pass"),
        (["extend", "gone.mp4", "a"], "There is no file gone.mp4"),
        (["extend", FAKE], "Give the prompt"),
        (["extend", FAKE, "a", "--segment", "0"], "--segment: what a clip is extended by is made in segments"),
        (["extend", FAKE, "a", "--out", "x.wav"], "written as .mp4"),
        (["retake", FAKE, "a"], "required: --from, --to"),
        (["retake", FAKE, "a", "--from", "2", "--to", "1"], "from one second to a later one; got 2 to 1"),
        (["retake", FAKE, "a", "--from", "0", "--to", "1", "--region", "1,2,3"], "is no region"),
        (["retake", FAKE, "a", "--from", "0", "--to", "1", "--part", "sound", "--region", "0,0,9,9"], "has no region"),
        (["refine", FAKE, "a", "--denoise", "0"], "above 0 and up to 1"),
        (["refine", "gone.safetensors", "a"], "There is no file gone.safetensors"),
        (["decode"], "required: LATENTS"),
        (["decode", "gone.safetensors"], "There is no file gone.safetensors"),
        (["inspect", "gone"], "There is no gone"),
        (["inspect", "."], "no model file"),
        (["inspect", ".", ROOT / "nava_core"], "no model file"),
    ],
)
def test_a_wrong_command_is_one_sentence_and_code_2(nava, arguments, words):
    code, out, err = nava(*arguments)
    assert code == 2
    assert out == ""
    assert words in sentence(err)


def test_too_much_speech_is_said_before_the_run(nava, models):
    said = f"A man says <S>{'word ' * 30}<E>"
    assert "Too much speech" in nava("generate", said, "--models", models, "--seconds", "6")[2]
    assert "Too much speech" not in nava("generate", said, "--models", models, "--seconds", "9")[2]
    assert "Too much speech" not in nava("generate", said, "--models", models, "--video-only")[2]
    assert "“<s>” at character 8 marks no speech" in nava("generate", "He says <s>Hi<e>", "--models", models)[2]


def test_a_device_that_is_not_there(nava, models):
    for device in ("cuda:99", "toaster", "meta:x"):
        code, _, err = nava("generate", "a", "--models", models, "--device", device)
        assert code == 2
        assert device in sentence(err)
        assert nava.pipeline is None
    assert nava("generate", "a", "--models", models, "--device", "cpu")[0] == 0
    assert str(nava.pipeline.options["device"]) == "cpu"


def test_parts_on_devices_of_their_own_and_a_limit_of_memory(nava, models, monkeypatch):
    generate = ("generate", "a", "--models", models)
    assert nava(*generate)[0] == 0
    assert not {"memory", "encoder_device", "vae_device"} & set(nava.pipeline.options)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda *_: (7 * 10**9, 8 * 10**9))
    code, _, err = nava(*generate, "--memory", "6GB", "--encoder-device", "cpu", "--vae-device", "cuda:1")
    assert code == 0, err
    options = nava.pipeline.options
    assert (options["memory"], str(options["encoder_device"]), str(options["vae_device"])) == ("6GB", "cpu", "cuda:1")
    for arguments, words in (
        (["--memory", "much"], "--memory: 'much' is no amount of memory: give one such as 6GB"),
        (["--memory", "9GB"], "--memory: 9GB is more memory than there is: the GPU has 8.0 GB in all"),
        (["--memory", "6GB", "--device", "cpu"], "is for a CUDA GPU, and the models work on cpu"),
        (["--encoder-device", "cuda:2"], "--encoder-device: There is no device cuda:2 here"),
        (["--vae-device", "attic"], "--vae-device: There is no device attic here"),
    ):
        code, _, err = nava(*generate, *arguments)
        assert code == 2
        assert words in sentence(err)


def test_parallel_workers_and_a_limit_of_memory_exclude_each_other(nava, models, monkeypatch):
    monkeypatch.setattr("nava_core.parallel.Parallel.check", lambda *_: None)
    arguments = ("generate", "a", "--models", models, "--parallel", "2", "--memory", "6GB", "--device", "cpu")
    code, _, err = nava(*arguments)
    assert code == 2
    assert "is for one GPU, not for parallel workers: leave out one of the two" in sentence(err)


def test_workers_of_a_batch_take_a_limit_each(nava, models, tmp_path, monkeypatch):
    (tmp_path / "b.jsonl").write_text('{"prompt": "a"}\n')
    batch = ("batch", "b.jsonl", "--out", "clips", "--models", models, "--workers", "2")
    opened = []

    def runner(opener, watcher, **settings):
        opened.append(opener.keywords)
        raise RuntimeError("far enough")

    monkeypatch.setattr("nava_core.parallel.batch.WorkersRunner", runner)
    nava(*batch, "--memory", "80%", "--encoder-device", "cpu")
    assert (opened[0]["memory"], opened[0]["encoder_device"]) == ("80%", "cpu")
    for arguments, words in (
        (["--memory", "80"], None),
        (["--memory", "80X"], "--memory: '80X' is no amount"),
        (["--memory", "6GB", "--device", "cpu"], "--memory: it is for GPUs"),
        (["--vae-device", "cuda:1"], "--vae-device cuda:1: a worker has one GPU, so say cpu"),
    ):
        code, _, err = nava(*batch, *arguments)
        assert code == (1 if words is None else 2)
        assert (words or "far enough") in err


# --- generate ----------------------------------------------------------------------------------------------------


def test_generate_hands_everything_on(nava, models, tmp_path):
    for name in ("her.png", "a.wav", "b.wav"):
        (tmp_path / name).write_bytes(name.encode())
    code, out, err = nava(
        "generate", "He: <S>One.<E> She: <S>Two.<E> He: <S>Three.<E>", "--models", models, "--image", "her.png",
        "--voice", "1,3=a.wav", "--voice", "2=b.wav", "--seconds", "2.5", "--size", "portrait", "--seed", "7",
        "--steps", "3", "--shift", "4", "--video-text", "2.5", "--negative", "blur", "--dtype", "fp8",
        "--vae-dtype", "fp32",
        "--out", "x/c.mp4",
    )  # fmt: skip
    assert code == 0, err
    assert out.strip() == str(tmp_path / "x" / "c.mp4")
    assert (tmp_path / "x" / "c.mp4").is_file()
    (request,) = nava.pipeline.requests
    assert (request["image"], request["size_from_image"]) == (tmp_path / "her.png", False)
    assert request["voices"] == (tmp_path / "a.wav", tmp_path / "b.wav")
    assert request["assignment"] == (0, 1, 0)
    assert (request["width"], request["height"], request["seconds"]) == (704, 1280, 2.5)
    assert (request["seed"], request["steps"], request["shift"], request["negative"]) == (7, 3, 4.0, "blur")
    assert (request["guidance"].video_text, request["guidance"].audio_timbre) == (2.5, 2.0)  # the makers' with both
    assert str(nava.pipeline.options["dtype"]) == "torch.float8_e4m3fn"
    assert str(nava.pipeline.options["vae_dtype"]) == "torch.float32"
    assert "step 3/3" in err
    assert "a fake clip" in err


def test_generate_hands_on_what_is_given(nava, models, tmp_path):
    for name in ("song.wav", "a.png", "b.png"):
        (tmp_path / name).write_bytes(name.encode())
    code, _, err = nava(
        "generate", "a", "--models", models, "--sound", "song.wav", "--sound-start", "12.5", "--sound-at", "1",
        "--sound-rest", "generated", "--last-image", "b.png", "--image-at", "2.5=a.png", "--shown", "matched-noise",
        "--seconds", "6",
    )  # fmt: skip
    assert code == 0, err
    request = nava.pipeline.requests[0]
    assert (request["sound"], request["sound_start"], request["sound_at"]) == (tmp_path / "song.wav", 12.5, 1.0)
    assert (request["sound_rest"], request["shown"]) == ("generated", "matched noise")
    assert request["pictures"] == {2.5: tmp_path / "a.png", "end": tmp_path / "b.png"}
    assert "frames" not in request


def test_a_clip_is_as_long_as_its_given_sound_unless_seconds_are_given(nava, models, tmp_path):
    from nava_core.media import write_wav

    write_wav(tmp_path / "short.wav", 0.1 * torch.ones(1, 26_400), 8_000)  # 3.3 s
    write_wav(tmp_path / "song.wav", 0.1 * torch.ones(1, 8_000 * 25), 8_000)
    command = ("generate", "a", "--models", models, "--sound")
    assert nava(*command, "short.wav")[0] == 0
    assert nava.pipeline.requests[0]["seconds"] == pytest.approx(20 / 6)  # 81 frames, 3.375 s
    assert nava(*command, "short.wav", "--audio-only")[0] == 0
    assert nava.pipeline.requests[0]["seconds"] == 3.3
    assert nava(*command, "short.wav", "--seconds", "2")[0] == 0
    assert nava.pipeline.requests[0]["seconds"] == 2
    assert nava(*command, "song.wav", "--sound-start", "1", "--sound-at", "0.5")[0] == 0
    (request,) = nava.pipeline.requests
    assert request["prompts"] == ["a"]  # in segments
    assert request["seconds"] == pytest.approx(24.5)
    (tmp_path / "broken.wav").touch()
    code, _, err = nava(*command, "broken.wav")
    assert code == 2
    assert "broken.wav" in err


def test_a_moment_has_one_picture(nava, models, tmp_path):
    (tmp_path / "a.png").touch()
    pictures = ("--image-at", "1=a.png", "--image-at", "1.0=a.png")
    code, _, err = nava("generate", "a", "--models", models, *pictures)
    assert (code, "at the same second" in err) == (2, True)


def test_sound_for_a_video_is_as_long_as_it_unless_seconds_are_given(nava, models, tmp_path):
    (tmp_path / "a.mp4").touch()
    command = ("generate", "a", "--models", models, "--video", "a.mp4")
    assert nava(*command)[0] == 0
    request = nava.pipeline.requests[0]
    assert (request["frames"], request["seconds"], request["size_from_image"]) == (tmp_path / "a.mp4", None, True)
    assert nava(*command, "--seconds", "30", "--size", "640x352")[0] == 0  # in one pass, whatever the length
    request = nava.pipeline.requests[0]
    assert (request["seconds"], request["size_from_image"], request["width"]) == (30, False, 640)


def test_longer_clips_are_made_in_segments(nava, models, tmp_path):
    (tmp_path / "a.wav").touch()
    speech = ("<S>One.<E>", "--then", "Nothing.", "--then", "<S>Two.<E>", "--voice", "2=a.wav")
    command = ("generate", *speech, "--models", models, "--seconds", "24", "--hold", "colour+sharpness")
    code, out, err = nava(*command)
    assert code == 0, err
    assert Path(out.strip()).read_text() == "<S>One.<E> | Nothing. | <S>Two.<E>"
    (request,) = nava.pipeline.requests
    assert (request["prompts"], request["seconds"], request["segment"]) == (
        ["<S>One.<E>", "Nothing.", "<S>Two.<E>"], 24, 10,
    )  # fmt: skip
    assert (request["hold"], request["anew"]) == ("colour and sharpness", False)
    assert (request["voices"], request["assignment"]) == ((tmp_path / "a.wav",), (None, 0))
    assert request["guidance"] is None
    assert nava(*command, "--audio-text", "1.5")[0] == 0
    assert nava.pipeline.requests[0]["guidance"] == {"audio_text": 1.5}  # the rest is each segment's own
    assert nava("generate", "a", "--models", models, "--seconds", "10")[0] == 0
    assert nava("generate", "a", "--models", models, "--seconds", "24", "--segment", "0")[0] == 0
    assert nava("generate", "a", "--models", models, "--seconds", "24", "--audio-only")[0] == 0
    assert "prompts" not in nava.pipeline.requests[0]
    assert nava("generate", "a", "--models", models, "--seconds", "9", "--segment", "3", "--state", "kept")[0] == 0
    assert nava.pipeline.requests[0]["state"] == tmp_path / "kept"


def test_a_long_clip_goes_on_after_an_interruption(nava, models, tmp_path):
    command = ("generate", "a", "--then", "b BOOM", "--models", models, "--seconds", "20", "--out", "x/long.mp4")
    code, _, err = nava(*command)
    assert code == 1
    assert "NaN" in err
    assert not (tmp_path / "x" / "long.mp4").exists()
    (tmp_path / "x" / ".long.segments" / "1.txt").write_text("b")
    assert nava(*command)[0] == 0
    assert nava.pipeline.made == []
    assert (tmp_path / "x" / "long.mp4").read_text() == "a | b"


def test_what_is_wrong_with_a_long_clip_is_no_interruption(tmp_path, capsys):
    args = argparse.Namespace(state=None, overwrite=False)

    def refuse(**_):
        raise ValueError("There is no sound in it.")

    with pytest.raises(ValueError, match="no sound"):
        make_long(args, tmp_path / "x" / "long.mp4", Progress(), refuse)
    assert "goes on with" not in capsys.readouterr().err
    (tmp_path / "x" / ".long.segments").mkdir()
    (tmp_path / "x" / ".long.segments" / "plan.json").write_text("{}")
    with pytest.raises(ValueError, match="no sound"):
        make_long(args, tmp_path / "x" / "long.mp4", Progress(), refuse)
    assert "goes on with" in capsys.readouterr().err


def test_finished_clips_are_extended_retaken_and_refined(nava, models, tmp_path):
    for name in ("a.latents.safetensors", "b.mp4", "her.wav"):
        (tmp_path / name).write_bytes(name.encode())
    common = ("--models", models, "--seed", "7", "--steps", "3")
    more = ("--then", "Say <S>so<E>", "--voice", "her.wav", "--seconds", "15", "--size", "640x352")
    code, out, err = nava("extend", "a.latents.safetensors", "She goes.", *more, *common)
    assert code == 0, err
    assert out.strip() == str(tmp_path / "a_longer.mp4")
    request = nava.pipeline.requests[0]
    assert (request["source"], request["seconds"]) == (tmp_path / "a.latents.safetensors", 15)
    assert (request["prompts"], request["voices"]) == (["She goes.", "Say <S>so<E>"], (tmp_path / "her.wav",))
    assert (request["width"], request["height"], request["size_from_image"]) == (640, 352, False)
    assert not {"mode", "image", "image_scale"} & set(request)
    assert nava("extend", "b.mp4", "a", "--seconds", "2", *common)[0] == 0  # a single segment, too
    assert not {"width", "size_from_image"} & set(nava.pipeline.requests[0])

    span = ("--from", "0.5", "--to", "2", "--part", "picture", "--region", "0,16,320,64", "--shown", "matched-noise")
    code, out, err = nava("retake", "b.mp4", "A boat.", *span, "--save-latents", *common)
    assert code == 0, err
    assert out.strip() == str(tmp_path / "b_retake.mp4")
    assert (tmp_path / "b_retake.latents.safetensors").is_file()
    request = nava.pipeline.requests[0]
    assert request["retake"] == Retake(0.5, 2, "picture", (0, 16, 320, 64))
    assert (request["source"], request["shown"], request["seed"]) == (tmp_path / "b.mp4", "matched noise", 7)
    assert not {"seconds", "width", "image"} & set(request)

    code, out, err = nava("refine", "b.mp4", "A boat.", "--denoise", "0.3", "--size", "landscape", *common)
    assert code == 0, err
    assert out.strip() == str(tmp_path / "b_refined.mp4")
    request = nava.pipeline.requests[0]
    assert (request["denoise"], request["size"], request["steps"]) == (0.3, (1280, 704), 3)


def test_what_a_latents_file_leaves_out_is_said(nava, models, monkeypatch):
    monkeypatch.setattr(ClipLatents, "not_kept", "The frames are not in it.")
    code, _, err = nava("generate", "a", "--models", models, "--save-latents")
    assert code == 0
    assert "The frames are not in it." in err


def test_generate_with_a_preset(nava, models):
    assert nava("generate", "a", "--models", models, "--preset", "distilled")[0] == 0
    assert (nava.pipeline.requests[0]["preset"], nava.pipeline.requests[0]["guidance"]) == ("distilled", None)
    assert (nava.pipeline.requests[0]["steps"], nava.pipeline.requests[0]["shift"]) == (50, 5.0)
    assert nava("generate", "a", "--models", models, "--preset", "fast")[0] == 2


def small_lora(path, size=64):
    up, down = torch.ones(size, 2) / 10, torch.ones(2, size)
    layer = "diffusion_model.double_blocks.0.self_attn.q"
    save_file({f"{layer}.lora_up.weight": up, f"{layer}.lora_down.weight": down}, path)


def test_loras_are_handed_on_with_their_strengths(nava, models, tmp_path):
    small_lora(tmp_path / "a.safetensors")
    small_lora(tmp_path / "b:0.5")
    names = ("a.safetensors", "a.safetensors:-0.25", "b:0.5", "b:0.5:2")
    arguments = [argument for name in names for argument in ("--lora", name)]
    assert nava("generate", "a", "--models", models, *arguments)[0] == 0
    a, b = tmp_path / "a.safetensors", tmp_path / "b:0.5"
    assert nava.pipeline.options["loras"] == [(a, 1.0), (a, -0.25), (b, 1.0), (b, 2.0)]
    assert nava("generate", "a", "--models", models)[0] == 0
    assert nava.pipeline.options["loras"] == []
    for wrong, words in (("gone:0.5", "there is no file gone"), ("a.safetensors:nan", "a strength is a number")):
        code, _, err = nava("generate", "a", "--models", models, "--lora", wrong)
        assert code == 2
        assert words in err


def test_compilation_is_asked_for_by_a_flag(nava, models):
    assert nava("generate", "a", "--models", models)[0] == 0
    assert nava.pipeline.options["compile"] is False
    assert nava("generate", "a", "--models", models, "--compile", "--seed", "1")[0] == 0
    assert nava.pipeline.options["compile"] is True
    options = ("--compile", "--device", "cpu", "--parallel", "2", "--weights", "sharded")
    code, _, err = nava("generate", "a", "--models", models, *options)
    assert code == 2
    assert "cannot be compiled" in err


def test_a_batch_with_loras_goes_on_by_their_content(nava, models, tmp_path):
    lora = tmp_path / "a.safetensors"
    small_lora(lora)
    (tmp_path / "b.jsonl").write_text('{"prompt": "a"}\n')
    batch = ("batch", "b.jsonl", "--out", "clips", "--models", models, "--steps", "1")

    def result(*arguments):
        code, out, _ = nava(*batch, *arguments)
        assert code == 0
        return out.split(",")[0]

    assert [result(), result("--lora", "a.safetensors:0")] == ["1 line: 1 made", "1 line: 1 finished before"]
    assert result("--lora", lora) == "1 line: 1 made"
    assert nava.pipeline.options["loras"] == [(lora, 1.0)]
    lora.rename(tmp_path / "renamed.safetensors")
    assert result("--lora", "renamed.safetensors") == "1 line: 1 finished before"
    assert result("--lora", "renamed.safetensors:0.5") == "1 line: 1 made"
    small_lora(lora)
    save_file({name: 2 * tensor for name, tensor in load_file(lora).items()}, lora)
    assert result("--lora", lora) == "1 line: 1 made"
    tensors = {**load_file(lora), "text_encoder.shared.lora_up.weight": torch.zeros(2, 2)}
    save_file(tensors, lora)
    code, _, err = nava(*batch, "--lora", lora)
    assert code == 0
    assert "a.safetensors: 1 of its 3 tensors are for nothing in this backbone" in err
    small_lora(lora, size=65)
    code, _, err = nava(*batch, "--lora", lora)
    assert code == 1
    assert "for a model of another size" in sentence(err)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--steps", "8"], "--steps"),
        (["--shift", "5", "--steps", "50", "--negative", "zero"], "--steps, --shift, --negative"),
        (["--negative", "blur", "--video-text", "2"], None),
        (["--seed", "3"], None),
    ],
)
def test_options_that_a_preset_makes_void_are_said(nava, models, given, said):
    _, _, err = nava("generate", "a", "--models", models, "--preset", "distilled", *given)
    assert ("Not used" in err) is (said is not None)
    assert said is None or f"Not used, because --preset distilled brings its own: {said}." in err
    assert "Not used" not in nava("generate", "a", "--models", models, *given)[2]


def test_generate_at_a_smaller_scale(nava, models, tmp_path):
    from nava_core.cli.options import SIZES
    from nava_core.geometry import PRESETS

    assert list(SIZES.values()) == list(PRESETS.values())
    (tmp_path / "a.png").touch()
    assert nava("generate", "a", "--models", models, "--size", "small-wide")[0] == 0
    assert nava("generate", "a", "--models", models, "--image", "a.png", "--image-scale", "640")[0] == 0
    assert nava("generate", "a", "--models", models, "--image", "a.png", "--image-scale", "700")[0] == 2
    request = nava.pipeline.requests[-1]
    assert (request["size_from_image"], request["image_scale"]) == (True, 640)


def test_generate_by_default(nava, models, tmp_path):
    (tmp_path / "a.png").touch()
    assert nava("generate", "a", "--models", models, "--image", "a.png")[0] == 0
    request = nava.pipeline.requests[0]
    assert request["size_from_image"]
    assert request["guidance"] is None
    assert (request["steps"], request["seconds"], request["mode"]) == (50, 6.0, "video+audio")
    assert "口型" in request["negative"]  # the built-in Chinese terms
    again = [nava("generate", "a", "--models", models)[1].strip() for _ in range(2)]
    assert [Path(path).name for path in again] == ["nava_0_2.mp4", "nava_0_3.mp4"]  # nothing is overwritten


def test_generate_makes_folders_when_there_is_a_clip(nava, models, tmp_path):
    assert nava("generate", "a", "--models", ".", "--out", "x/y/c.mp4")[0] == 2
    assert nava("generate", "BOOM", "--models", models, "--out", "x/y/c.mp4")[0] == 1
    assert list(tmp_path.iterdir()) == []
    assert nava("generate", "a", "--models", models, "--out", "x/y/c.mp4")[0] == 0
    assert (tmp_path / "x" / "y" / "c.mp4").is_file()


def test_a_cut_prompt_is_said_once(nava, models):
    for prompt in ("CUT", "whole"):
        assert nava("generate", prompt, "--models", models)[2].count("a fake clip") == 1


def test_generate_reads_the_prompt_from_elsewhere(nava, models, tmp_path, monkeypatch):
    (tmp_path / "prompt.txt").write_text("\ufeffEin größer Wald\n", encoding="utf-8")
    assert nava("generate", "--prompt-file", "prompt.txt", "--models", models)[0] == 0
    assert nava.pipeline.requests[0]["prompt"] == "Ein größer Wald"
    monkeypatch.setattr("sys.stdin", io.StringIO("from a pipe\n"))
    assert nava("generate", "-", "--models", models, "--audio-only")[0] == 0
    assert nava.pipeline.requests[0]["prompt"] == "from a pipe"
    (tmp_path / "latin.txt").write_bytes("größer".encode("latin-1"))
    assert "not UTF-8" in sentence(nava("generate", "--prompt-file", "latin.txt")[2])


def test_an_existing_file_is_kept(nava, models, tmp_path):
    (tmp_path / "c.mp4").write_text("mine")
    code, _, err = nava("generate", "a", "--models", models, "--out", "c.mp4")
    assert code == 2
    assert "already there" in sentence(err)
    assert (tmp_path / "c.mp4").read_text() == "mine"
    assert nava.pipeline is None  # said before anything is loaded
    assert nava("generate", "a", "--models", models, "--out", "c.mp4", "--overwrite")[0] == 0


# --- latents and decoding ----------------------------------------------------------------------------------------


def test_latents_are_kept_beside_the_clip_or_where_one_says(nava, models, tmp_path):
    command = ("generate", "a", "--models", models, "--out", "x/clip.mp4")
    assert nava(*command)[0] == 0
    assert [path.name for path in (tmp_path / "x").iterdir()] == ["clip.mp4"]
    code, out, err = nava(*command, "--overwrite", "--save-latents")
    assert code == 0
    assert out.strip() == str(tmp_path / "x" / "clip.mp4")
    assert f"The latents are in {tmp_path / 'x' / 'clip.latents.safetensors'}." in err
    kept = ClipLatents.load(tmp_path / "x" / "clip.latents.safetensors")
    assert kept.settings["prompt"] == "a"
    code, _, err = nava(
        "generate", "a", "--models", models, "--out", "x/clip2.mp4", "--save-latents", "y/z.safetensors"
    )
    assert code == 0
    assert (tmp_path / "y" / "z.safetensors").is_file()
    code, _, err = nava("generate", "a", "--models", models, "--save-latents", "y/z.safetensors")
    assert code == 2
    assert "z.safetensors is already there: give another name, or --overwrite" in sentence(err)


def test_a_clip_that_cannot_be_decoded_leaves_its_latents(nava, models, tmp_path, monkeypatch):
    monkeypatch.setattr(fake.FakePipeline, "faults", {"DECODE": RuntimeError("The GPU is gone.")})
    for name in ("clip.latents.safetensors", "clip_2.latents.safetensors"):
        code, out, err = nava("generate", "DECODE", "--models", models, "--out", "clip.mp4")
        assert (code, out) == (1, "")
        assert f"its latents are in {tmp_path / name}: `nava decode`" in err
        assert err.strip().endswith("nava generate: The GPU is gone.")
        assert ClipLatents.load(tmp_path / name).settings["prompt"] == "DECODE"
    assert not (tmp_path / "clip.mp4").exists()


def test_how_pictures_are_decoded_is_handed_on(nava, models, tmp_path):
    nava("generate", "a", "--models", models, "--decoding", "tiled", "--tile-size", "128")
    assert nava.pipeline.options["decoding"] == Decoding("tiled", 128, 64)
    (tmp_path / "b.jsonl").write_text('{"prompt": "a"}\n')
    nava("batch", "b.jsonl", "--out", "clips", "--models", models, "--decoding", "whole")
    assert nava.pipeline.options["decoding"] == Decoding("whole")
    nava("generate", "a", "--models", models, "--tile-size", "64")
    assert nava.pipeline.options["decoding"] == Decoding("auto", 64, 32)


def test_decode_needs_the_vaes_alone(nava, models, tmp_path):
    """A clip named after its latents; the VAEs are sought in a folder that has nothing else."""
    (tmp_path / "vaes").mkdir()
    for vae in ("wan2.2_vae_tiny.safetensors", "ltx-2.3_audio_vae_tiny.safetensors"):
        os.link(models / vae, tmp_path / "vaes" / vae)
    video = ClipLatents(torch.zeros(1, 48, 1, 2, 2), torch.zeros(1, 8, 2, 16), 1 / 24, "the report", settings={"x": 1})
    video.save(tmp_path / "pier.mp4.latents.safetensors")
    code, out, err = nava("decode", "pier.mp4.latents.safetensors", "--models", "vaes", "--vae-dtype", "bf16")
    assert code == 0, err
    assert out.strip() == str(tmp_path / "pier.mp4")
    assert json.loads((tmp_path / "pier.mp4").read_text()) == {"x": 1}
    assert "the report" in err
    assert str(nava.pipeline.options["vae_dtype"]) == "torch.bfloat16"
    assert nava.pipeline.options["decoding"] == Decoding()
    assert nava("decode", "pier.mp4.latents.safetensors", "--models", "vaes")[1].strip().endswith("pier_2.mp4")
    code, _, err = nava("decode", "pier.mp4.latents.safetensors", "--models", "vaes", "--out", "pier.mp4")
    assert (code, "already there" in sentence(err)) == (2, True)
    sound = ClipLatents(None, torch.zeros(1, 8, 2, 16), 0.08).save(tmp_path / "sound.safetensors")
    (tmp_path / "vaes" / "wan2.2_vae_tiny.safetensors").unlink()
    assert nava("decode", sound, "--models", "vaes")[1].strip() == str(tmp_path / "sound.wav")
    code, _, err = nava("decode", "pier.mp4.latents.safetensors", "--models", "vaes")
    assert (code, "no video VAE in vaes" in sentence(err)) == (2, True)
    code, _, err = nava("decode", sound)
    assert (code, "or the single files --audio-vae" in sentence(err)) == (2, True)
    assert nava("decode", sound, "--audio-vae", models / "ltx-2.3_audio_vae_tiny.safetensors")[0] == 0


def test_decode_says_what_is_wrong_with_latents(nava, models, tmp_path):
    (tmp_path / "cut.safetensors").write_bytes(b"\x10\x27\0\0\0\0\0\0{")
    code, _, err = nava("decode", "cut.safetensors", "--models", models)
    assert code == 1
    assert "cut.safetensors is an incomplete download" in sentence(err)
    code, _, err = nava("decode", models / "NAVA_tiny.safetensors", "--models", models)
    assert code == 1
    assert "is a NAVA backbone, but a clip's latents are needed here" in sentence(err)
    assert nava.pipeline is None


def run_until(condition, *arguments):
    """A command in a process of its own, and what of it is there once ``condition()`` holds."""
    process = subprocess.Popen(
        [sys.executable, "-m", "nava_core", *map(str, arguments)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    deadline = time.monotonic() + 300
    while not condition() and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return process


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGTERM])
def test_a_kill_while_decoding_leaves_the_latents_and_no_half_file(models, tmp_path, monkeypatch, end):
    """And `nava decode` makes of them the file that the command would have made."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    clip, kept = tmp_path / "clip.mp4", tmp_path / "clip.latents.safetensors"
    command = ["generate", "A bell.", "--models", models, "--device", "cpu", "--steps", "1", "--seconds", "2",
               "--size", "128x96", "--negative", "zero"]  # fmt: skip

    def decoding():
        return any(path.name.endswith(".part") and path.stat().st_size for path in tmp_path.glob(".clip-*"))

    process = run_until(decoding, *command, "--out", clip, "--save-latents")
    assert process.poll() is None, process.communicate()
    process.send_signal(end)
    process.communicate(timeout=60)
    assert process.returncode in (-signal.SIGKILL, 130)
    assert kept.is_file()
    assert not clip.exists()
    if end is signal.SIGTERM:
        assert [path.name for path in tmp_path.iterdir()] == [kept.name]
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    for arguments in (("decode", kept, "--models", models, "--device", "cpu"), (*command, "--out", "whole.mp4")):
        subprocess.run([sys.executable, "-m", "nava_core", *map(str, arguments)], check=True, capture_output=True)
    assert clip.read_bytes() == (tmp_path / "whole.mp4").read_bytes()


@pytest.mark.parametrize(
    ("voices", "words"),
    [
        (["1=a.wav", "a.wav"], "bind every voice"),
        (["1=a.wav", "1=a.wav"], "span 1 has two voices"),
        (["3=a.wav"], "bound to span 3"),
        (["0=a.wav"], "bound to span 0"),
        (["a.wav", "./b.wav", "c.wav"], "3 voices"),
    ],
)
def test_voices_that_cannot_be_bound(nava, models, tmp_path, voices, words):
    for name in ("a.wav", "b.wav", "c.wav"):
        (tmp_path / name).touch()
    given = [part for voice in voices for part in ("--voice", voice)]
    code, _, err = nava("generate", "<S>a<E> <S>b<E>", "--models", models, *given)
    assert code == 2
    assert words in sentence(err)


def test_a_failed_run_is_code_1_and_a_traceback_only_with_debug(nava, models, tmp_path):
    code, out, err = nava("generate", "BOOM", "--models", models)
    assert (code, out) == (1, "")
    assert sentence(err) == "nava generate: The network returned NaN at step 3."
    code, _, err = nava("generate", "BOOM", "--models", models, "--debug")
    assert code == 1
    assert "Traceback" in err
    assert list(tmp_path.iterdir()) == []


def test_an_interrupted_run_is_code_130(nava, models, tmp_path):
    code, out, err = nava("generate", "INTERRUPT", "--models", models)
    assert (code, out) == (130, "")
    assert "Interrupted" in sentence(err)
    assert list(tmp_path.iterdir()) == []


def test_a_missing_package_is_named(nava, models, monkeypatch):
    monkeypatch.setitem(sys.modules, "nava_core.pipeline", None)
    code, _, err = nava("generate", "a", "--models", models)
    assert code == 1
    assert "package" in sentence(err)


# --- batch -------------------------------------------------------------------------------------------------------


def test_batch_makes_takes(nava, models, tmp_path):
    (tmp_path / "b.jsonl").write_text('{"prompt": "one", "id": "a"}\n{"prompt": "BOOM", "id": "b"}')
    code, out, err = nava("batch", "b.jsonl", "--out", "out", "--models", models, "--steps", "1", "--gen-turn", "2")
    assert code == 1
    assert out.splitlines()[0].startswith("2 lines: 2 made, 2 failed, in ")
    assert "  line 2, take 1: The network returned NaN at step 3." in out
    assert "Line 1, take 0: a-0.mp4 in" in err
    assert [request["seed"] for request in nava.pipeline.requests] == [0, 1, 0, 1]
    assert nava("batch", "b.jsonl", "--out", "out", "--models", models, "--gen-turn", "0")[0] == 2


def test_batch_prints_a_summary(nava, models, tmp_path):
    lines = ['{"prompt": "one"}', '{"prompt": "BOOM"}', "{bad", '{"prompt": "one"}', '{"prompt": "two", "steps": 2}']
    (tmp_path / "b.jsonl").write_text("\n".join(lines))
    code, out, err = nava("batch", "b.jsonl", "--out", "out", "--models", models, "--steps", "1")
    assert code == 1
    assert out.splitlines()[0].startswith("5 lines: 2 made, 1 duplicates, 2 failed, in ")
    assert "  line 2: The network returned NaN at step 3." in out
    assert "1 of 5 lines cannot be used:" in err
    assert "line 3: The line is not JSON" in err
    assert "step 1/1" in err
    assert "Traceback" not in err
    assert [request["steps"] for request in nava.pipeline.requests] == [1, 1, 2]
    assert nava.pipeline.options["keep_loaded"] is True  # small models fit
    report = [json.loads(line) for line in (tmp_path / "out" / "report.jsonl").read_text().splitlines()]
    assert report[0]["models"]["backbone"].startswith("NAVA_tiny.safetensors (")
    (tmp_path / "b.jsonl").write_text('{"prompt": "one"}')
    assert nava("batch", "b.jsonl", "--out", "out", "--models", models, "--steps", "1")[0] == 0


def test_batch_check_makes_nothing(nava, tmp_path):
    (tmp_path / "b.jsonl").write_text('{"prompt": "one"}\n{"prompt": ""}\n')
    code, out, err = nava("batch", "b.jsonl", "--check")
    assert code == 1
    assert out.strip() == "1 of 2 lines can be used."
    assert "line 2: The prompt is empty" in err
    (tmp_path / "empty.jsonl").write_text("\n\n")
    code, _, err = nava("batch", "empty.jsonl", "--check")
    assert code == 2
    assert "has no lines" in sentence(err)
    code, _, err = nava("batch", "b.jsonl")
    assert code == 2
    assert "--out FOLDER" in sentence(err)


def test_batch_check_shows_notes_and_every_problem(nava, tmp_path):
    lines = ['{"prompt": "one", "id": "a", "second": 3}', '{"prompt": "two", "id": "a"}', *["{bad"] * 20]
    (tmp_path / "b.jsonl").write_text("\n".join(lines))
    code, out, err = nava("batch", "b.jsonl", "--check")
    assert code == 1
    assert out.strip() == "1 of 22 lines can be used."
    assert "line 1: note: The key 'second' is not known and was ignored (did you mean 'seconds'?)." in err
    assert "line 2: The id 'a' is already that of line 1" in err
    assert "line 22: The line is not JSON" in err  # no report is written that could hold the rest


def test_models_found_unusable_end_a_batch_in_a_sentence(nava, models, tmp_path, monkeypatch):
    monkeypatch.setattr(fake.FakePipeline, "faults", {"one": WrongFileError("The VAE is incomplete.")})
    (tmp_path / "b.jsonl").write_text('{"prompt": "one"}\n{"prompt": "two"}\n')
    code, out, err = nava("batch", "b.jsonl", "--out", "out", "--models", models)
    assert (code, out) == (1, "")
    assert sentence(err) == "nava batch: The VAE is incomplete."


def test_batch_of_bad_lines_alone_loads_nothing(nava, tmp_path):
    (tmp_path / "b.jsonl").write_text("{bad\n{worse\n")
    code, out, _ = nava("batch", "b.jsonl", "--out", "out")  # no models are asked for
    assert code == 1
    assert "2 lines: 2 failed" in out
    assert nava.pipeline is None


def test_an_interrupted_batch_says_what_is_done(nava, models, tmp_path):
    (tmp_path / "b.jsonl").write_text('{"prompt": "one"}\n{"prompt": "INTERRUPT"}\n{"prompt": "two"}\n')
    code, out, err = nava("batch", "b.jsonl", "--out", "out", "--models", models)
    assert code == 130
    assert "Not finished: 3 lines: 1 made." in out
    assert "Interrupted" in err
    assert len(list((tmp_path / "out").glob("*.mp4"))) == 1


# --- inspect, convert --------------------------------------------------------------------------------------------


def test_inspect_says_what_files_are(nava, models, tmp_path):
    code, out, _ = nava("inspect", models)
    assert code == 0
    assert "NAVA_tiny.safetensors is a NAVA backbone" in out
    assert "would load, its weights in" in out
    assert "fp8" in out
    assert "is the Wan2.2 video VAE" in out
    page = tmp_path / "NAVA.safetensors"
    page.write_text("<!DOCTYPE html><title>Login</title>")
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes((models / "NAVA_tiny.safetensors").read_bytes()[:100_000])
    code, out, _ = nava("inspect", page, cut, models / "NAVA_tiny.safetensors", "--json")
    assert code == 1
    found = [json.loads(line) for line in out.splitlines()]
    assert [f["loads"] for f in found] == [False, False, True]
    assert "web page" in found[0]["problem"]
    assert "incomplete" in found[1]["problem"]
    assert found[2]["memory_bytes"] > found[2]["memory_bytes_bf16"] > found[2]["memory_bytes_fp8"] > 0
    assert found[2]["memory_bytes"] == pytest.approx(found[2]["size_bytes"], rel=0.05)  # fp32 as in the file


def test_inspect_of_all_in_a_folder(nava, models, tmp_path):
    folder = tmp_path / "all"
    (folder / "google").mkdir(parents=True)
    (folder / "google" / "spiece.model").touch()
    (folder / "linked").symlink_to(models)
    (folder / "linked again").symlink_to(folder)  # a ring
    code, out, _ = nava("inspect", *sorted(folder.iterdir()), "--json")
    assert code == 0
    names = [Path(json.loads(line)["file"]).name for line in out.splitlines()]
    assert "NAVA_tiny.safetensors" in names
    one = nava("inspect", folder, "--json")[1].splitlines()
    assert len(one) == len({json.loads(line)["file"] for line in one}) == len(list(models.glob("*.*")))


def test_inspect_says_what_the_pipeline_says(nava, models):
    from nava_core.checkpoint import describe_file
    from nava_core.pipeline import load_problem, memory_bytes

    for line in nava("inspect", models, "--json")[1].splitlines():
        finding = json.loads(line)
        info = describe_file(finding["file"])
        assert (finding["problem"], finding["memory_bytes"]) == (load_problem(info), memory_bytes(info))


def test_convert(nava, models, tmp_path):
    source = models / "NAVA_tiny.safetensors"
    code, out, err = nava("convert", source, "fp8.safetensors")
    assert (code, out.strip()) == (0, "fp8.safetensors")
    assert "a NAVA backbone in fp8" in err
    assert (tmp_path / "fp8.safetensors").stat().st_size < source.stat().st_size
    code, _, err = nava("convert", source, "fp8.safetensors", "--dtype", "bf16")
    assert code == 1
    assert "already there" in err.splitlines()[-1]
    assert nava("convert", source, "fp8.safetensors", "--dtype", "bf16", "--overwrite")[0] == 0
    code, _, err = nava("convert", models / "wan2.2_vae_tiny.safetensors", "x.safetensors")
    assert code == 1
    assert "is the Wan2.2 video VAE" in err
    assert not (tmp_path / "x.safetensors").exists()


# --- progress ----------------------------------------------------------------------------------------------------


def test_durations():
    assert [format_duration(s) for s in (0.4, 59.4, 125, 12_000)] == ["0 s", "59 s", "2 min 05 s", "3 h 20 min"]


def test_progress_without_a_terminal_is_a_line_now_and_then():
    stream, now = io.StringIO(), iter(range(0, 1000, 2))
    progress = Progress(stream, clock=lambda: next(now))
    progress.begin("Denoising")
    for step in range(1, 11):
        progress.step(step, 10, None, None)
    lines = stream.getvalue().splitlines()
    assert lines[0] == "Denoising: step 1/10, 10 %"
    assert lines[1] == "Denoising: step 4/10, 40 %, 2.00 s/step, 12 s left"
    assert lines[-1].startswith("Denoising: step 10/10, 100 %")
    assert len(lines) == 4
    assert "\r" not in stream.getvalue()


def test_progress_on_a_terminal_is_one_line():
    stream = io.StringIO()
    stream.isatty = lambda: True
    progress = Progress(stream, clock=iter(range(100)).__next__)
    for step in (1, 2):
        progress.step(step, 2)
    progress.say("done")
    assert stream.getvalue().count("\r\x1b[K") == 3
    assert stream.getvalue().endswith("\r\x1b[Kdone\n")


# --- for real ----------------------------------------------------------------------------------------------------


def test_demo_and_batch_for_real(tmp_path):
    """The real pipeline with small models, as a person starts it."""
    pytest.importorskip("diffusers")
    av = pytest.importorskip("av")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}

    def nava(*arguments):
        command = [sys.executable, "-m", "nava_core", *arguments]
        return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)

    done = nava("demo", "--device", "cpu")
    assert done.returncode == 0, done.stderr
    clip = Path(done.stdout.strip())
    assert clip == tmp_path / "nava-demo" / "clip.mp4"
    with av.open(str(clip)) as container:
        assert container.streams.video[0].frames == 25
        assert container.streams.audio[0].rate == 48000
    assert "nava_core generate" in done.stderr

    lines = [
        {"prompt": "A bell.", "audio_only": True, "id": "bell"},
        {"prompt": "A bell.", "image_path": "gone.png"},
        {"prompt": "Waves.", "width": 64, "height": 64, "video_only": True},
    ]
    (tmp_path / "b.jsonl").write_text("\n".join(map(json.dumps, lines)))
    options = ("--models", "nava-demo/models", "--seconds", "0.5", "--steps", "2", "--device", "cpu")
    done = nava("batch", "b.jsonl", "--out", "clips", *options)
    assert done.returncode == 1, done.stderr
    assert "3 lines: 2 made, 1 failed" in done.stdout
    assert (tmp_path / "clips" / "bell.wav").stat().st_size == 44 + 24_000 * 2 * 3
    (picture,) = (tmp_path / "clips").glob("00003-*.mp4")
    with av.open(str(picture)) as container:
        assert [stream.type for stream in container.streams] == ["video"]

    small_lora(tmp_path / "few.safetensors")
    options = (*options[:4], "--preset", "distilled", "--device", "cpu", "--video-only", "--size", "64x64")
    clips = {}
    for name, loras in {"without": [], "with": ["few.safetensors"], "none": ["few.safetensors:0"]}.items():
        given = [argument for lora in loras for argument in ("--lora", lora)]
        done = nava("generate", "Waves.", "--out", f"{name}.mp4", *options, *given)
        assert done.returncode == 0, done.stderr
        assert ("with few.safetensors" in done.stderr) is (name == "with")
        assert "in 4 steps" in done.stderr
        with av.open(str(tmp_path / f"{name}.mp4")) as container:
            clips[name] = [frame.to_ndarray(format="rgb24").tobytes() for frame in container.decode(video=0)]
    assert clips["none"] == clips["without"] != clips["with"]
