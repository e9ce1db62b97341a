"""Clips' latents in files: there and back, what ComfyUI saves, and one sentence for every file that is none."""

import json
import math
import struct

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from nava_core.checkpoint import FileKind, describe_file
from nava_core.components import load_problem
from nava_core.media import NonFiniteError
from nava_core.pipeline import ClipLatents, LatentsError

VIDEO, AUDIO = "nava_latents.video", "nava_latents.audio"
SETTINGS = {"prompt": "海 <S>x<E>", "seed": 2**63, "guidance": {"intervals": {"video_text": [1.0, 0.5]}}}


def noise(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def latents():
    """Of half a second: 13 frames, 4 latent frames, 14 steps of sound."""
    return ClipLatents(
        noise(1, 48, 4, 2, 3), noise(1, 8, 14, 16), 13 / 24, "a report\nof lines", ("quiet",), SETTINGS, "abc"
    )


def test_there_and_back(latents, tmp_path):
    path = latents.save(tmp_path / "clip.latents.safetensors")
    back = ClipLatents.load(path)
    assert torch.equal(back.video, latents.video)
    assert torch.equal(back.audio, latents.audio)
    for name in ("duration", "report", "warnings", "settings", "key", "suffix"):
        assert getattr(back, name) == getattr(latents, name)
    with safe_open(path, "pt") as file:
        assert file.metadata()["format"] == "nava_latents"
    types = {name: tensor.dtype for name, tensor in load_file(path).items()}
    assert types == {VIDEO: torch.float32, AUDIO: torch.float32}
    assert [each.name for each in tmp_path.iterdir()] == ["clip.latents.safetensors"]


@pytest.mark.parametrize(("part", "suffix"), [("video", ".mp4"), ("audio", ".wav")])
def test_of_one_modality(latents, tmp_path, part, suffix):
    alone = ClipLatents(**{"video": None, "audio": None, part: getattr(latents, part)}, duration=13 / 24)
    back = ClipLatents.load(alone.save(tmp_path / "x.safetensors"))
    assert torch.equal(getattr(back, part), getattr(latents, part))
    assert (back.video is None, back.audio is None) == (part == "audio", part == "video")
    assert back.suffix == suffix
    assert (back.report, back.warnings, dict(back.settings), back.key) == ("", (), {}, "")


def test_half_precision_and_foreign_devices_are_written_as_fp32(latents, tmp_path):
    half = ClipLatents(latents.video.half(), latents.audio.bfloat16().requires_grad_(), 13 / 24)
    back = ClipLatents.load(half.save(tmp_path / "x.safetensors"))
    assert torch.equal(back.video, latents.video.half().float())
    assert back.audio.dtype is torch.float32


def test_what_cannot_be_saved_leaves_the_file_that_was_there(latents, tmp_path):
    path = latents.save(tmp_path / "x.safetensors")
    whole = path.read_bytes()
    broken = ClipLatents(latents.video * math.nan, latents.audio, 13 / 24)
    with pytest.raises(NonFiniteError, match="backbone and sampler"):
        broken.save(path)
    assert path.read_bytes() == whole
    assert len(list(tmp_path.iterdir())) == 1
    with pytest.raises(FileNotFoundError, match="does not exist"):
        latents.save(tmp_path / "nowhere" / "x.safetensors")
    with pytest.raises(ValueError, match="neither picture nor sound"):
        ClipLatents(None, None, 1.0)
    with pytest.raises(ValueError, match=r"picture's latent is \(1, 16, 1, 2, 2\), of another model"):
        ClipLatents(noise(1, 16, 1, 2, 2), None, 1 / 24)


# --- what is no latents' file ------------------------------------------------------------------------------------


def rewritten(path, latents, tensors=None, **clip):
    """The file of ``latents`` with other tensors, and with other values of its description; None: without it."""
    latents.save(path)
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    about = {**json.loads(metadata["clip"]), **clip}
    metadata["clip"] = json.dumps({key: value for key, value in about.items() if value is not None})
    save_file({**load_file(path), **(tensors or {})}, path, metadata=metadata)
    return path


@pytest.mark.parametrize(
    ("tensors", "clip", "says"),
    [
        (
            {VIDEO: noise(1, 16, 4, 2, 3)},
            {},
            r"picture's latent in x\.safetensors is \(1, 16, 4, 2, 3\), of another mo",
        ),
        ({VIDEO: noise(48, 4, 2, 3)}, {}, r"is \(48, 4, 2, 3\), of another model: NAVA's is \(1, 48, frames"),
        ({VIDEO: noise(3, 48, 4, 2, 3)}, {}, r"There are 3 clips in x\.safetensors: give the latents of one"),
        ({VIDEO: torch.zeros(1, 48, 0, 2, 3)}, {}, "of another model"),
        ({AUDIO: noise(1, 8, 14, 32)}, {}, r"sound's latent in x\.safetensors is \(1, 8, 14, 32\), of another model"),
        ({AUDIO: noise(1, 8, 14, 16) * math.inf}, {}, r"NaN or infinity in the sound's latent in x\.safetensors"),
        ({VIDEO: noise(1, 48, 4, 2, 3) + math.nan}, {}, r"NaN or infinity in the picture's latent in x\.safetensors"),
        ({VIDEO: torch.zeros(1, 48, 4, 2, 3, dtype=torch.int64)}, {}, "of the type int64, not of floats"),
        ({VIDEO: noise(1, 48, 9, 2, 3)}, {}, "are not of one length, so not of one clip"),
        ({AUDIO: noise(1, 8, 80, 16)}, {}, "are not of one length"),
        ({}, {"duration": math.nan}, "are not of one length"),
        ({}, {"duration": "long"}, "does not say of what clip it is"),
        ({}, {"settings": None}, "does not say of what clip it is"),
        ({}, {"warnings": 3}, "does not say of what clip it is"),
    ],
)
def test_a_file_that_does_not_fit_is_one_sentence(latents, tmp_path, tensors, clip, says):
    path = rewritten(tmp_path / "x.safetensors", latents, tensors, **clip)
    with pytest.raises((LatentsError, NonFiniteError), match=says) as caught:
        ClipLatents.load(path)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 300


def test_a_later_version_is_said(latents, tmp_path):
    path = latents.save(tmp_path / "x.safetensors")
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    save_file(load_file(path), path, metadata={**metadata, "version": "2"})
    with pytest.raises(LatentsError, match=r"x\.safetensors is of version 2 of these files, .* update the pack"):
        ClipLatents.load(path)
    save_file({**load_file(path), "nava_latents.later": noise(2)}, path, metadata=metadata)  # a tensor more is none
    assert torch.equal(ClipLatents.load(path).video, latents.video)


def test_every_missing_end_is_one_sentence(latents, tmp_path):
    whole = latents.save(tmp_path / "whole.safetensors").read_bytes()
    cut = tmp_path / "cut.safetensors"
    for end in (0, 4, 100, len(whole) // 2, len(whole) - 1):
        cut.write_bytes(whole[:end])
        with pytest.raises(
            LatentsError, match=r"cut\.safetensors is .*, but a clip's latents are needed here"
        ) as caught:
            ClipLatents.load(cut)
        assert "\n" not in str(caught.value)
    cut.write_bytes(struct.pack("<Q", 2**60) + whole[8:])
    with pytest.raises(LatentsError, match="damaged"):
        ClipLatents.load(cut)


def test_other_files_are_named(tmp_path):
    save_file({"x": torch.zeros(2)}, tmp_path / "other.safetensors")
    (tmp_path / "page.safetensors").write_text("<!doctype html><p>Log in</p>")
    for name, what in (("other", "a file of an unknown kind"), ("page", "a web page")):
        with pytest.raises(LatentsError, match=rf"{name}\.safetensors is {what}.* a clip's latents are needed here"):
            ClipLatents.load(tmp_path / f"{name}.safetensors")
    with pytest.raises(FileNotFoundError, match="There is no file"):
        ClipLatents.load(tmp_path / "gone.safetensors")


def test_latents_are_told_from_models(latents, tmp_path):
    info = describe_file(latents.save(tmp_path / "x.safetensors"))
    assert info.kind is FileKind.NAVA_LATENTS
    assert load_problem(info).startswith("x.safetensors is the latents of a clip, but a file of NAVA's")
    assert load_problem(info).endswith("`nava decode` makes a clip of it.")


# --- ComfyUI's ---------------------------------------------------------------------------------------------------


def comfyui_file(path, tensor):
    save_file({"latent_tensor": tensor, "latent_format_version_0": torch.tensor([])}, path)
    return path


@pytest.mark.parametrize("version", ["0.18.1", "0.33.0"])
def test_what_comfyui_saved_is_a_clip(golden, version):
    folder = golden / "host_files" / version
    both = ClipLatents.load(folder / "video.latent", folder / "audio.latent")
    assert torch.equal(both.video, load_file(folder / "video.latent")["latent_tensor"])
    assert torch.equal(both.audio, load_file(folder / "audio.latent")["latent_tensor"])
    assert both.duration == 9 / 24
    alone = ClipLatents.load(folder / "audio.latent")
    assert (alone.video, alone.suffix, alone.duration) == (None, ".wav", both.audio.shape[2] / 25)
    swapped = ClipLatents.load(folder / "audio.latent", folder / "video.latent")
    assert torch.equal(swapped.video, both.video)
    assert describe_file(folder / "video.latent").kind is FileKind.COMFYUI_LATENT


def test_what_of_comfyui_is_no_clip_is_said(latents, tmp_path):
    video = comfyui_file(tmp_path / "video.latent", latents.video)
    audio = comfyui_file(tmp_path / "audio.latent", latents.audio)
    ours = latents.save(tmp_path / "ours.safetensors")
    image = comfyui_file(tmp_path / "image.latent", noise(1, 4, 8, 8))
    other = comfyui_file(tmp_path / "other.latent", noise(1, 16, 4, 2, 3))
    batch = comfyui_file(tmp_path / "batch.latent", noise(2, 48, 4, 2, 3))
    absent = comfyui_file(tmp_path / "absent.latent", noise(1, 48, 1, 1, 1))
    silent = comfyui_file(tmp_path / "silent.latent", noise(1, 8, 1, 16))
    long = comfyui_file(tmp_path / "long.latent", noise(1, 8, 250, 16))
    for paths, says in (
        ([video, video], "video.latent is a second picture's latent"),
        ([audio, audio], "audio.latent is a second sound's latent"),
        ([ours, audio], "Give the latents of one clip"),
        ([image], r"image\.latent is \(1, 4, 8, 8\), of another model"),
        ([other], r"other\.latent is \(1, 16, 4, 2, 3\), of another model"),
        ([batch], r"There are 2 clips in batch\.latent"),
        ([absent, silent], "neither picture nor sound in absent.latent and silent.latent"),
        ([video, long], "in video.latent and long.latent are not of one length"),
    ):
        with pytest.raises(LatentsError, match=says):
            ClipLatents.load(*paths)
    assert ClipLatents.load(absent, audio).video is None  # as the nodes stand for no picture
    assert ClipLatents.load(video, silent).audio is None


def test_a_disk_that_takes_no_more_is_said_by_the_system(tmp_path, monkeypatch):
    """By its number, by which a batch ends, and in a sentence without a class's name."""
    import errno

    import safetensors.torch

    from nava_core.explain import explain, is_fatal

    def full(*_, **__):
        raise safetensors.SafetensorError(
            f"Error while serializing: I/O error: No space left on device (os error {errno.ENOSPC})"
        )

    monkeypatch.setattr(safetensors.torch, "save_file", full)
    with pytest.raises(OSError, match="No space left") as found:
        ClipLatents(torch.zeros(1, 48, 2, 2, 2), None, 5 / 24).save(tmp_path / "clip.latents.safetensors")
    assert is_fatal(found.value)
    assert explain(found.value).endswith("No space left on device.")
    assert not list(tmp_path.iterdir())
