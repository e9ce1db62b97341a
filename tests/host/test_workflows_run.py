"""Every bundled workflow on the real server, with small models, a real photograph and spoken voices."""

import copy
import hashlib
import json
from pathlib import Path

import numpy
import pytest
from comfy_host import ROOT
from media_checks import assert_alive, read_media
from PIL import Image
from voices import write_photo, write_video, write_voice

API = ROOT / "workflows" / "api"
NAMES = sorted(path.stem for path in API.glob("*.json"))
EXPECTED = {
    "text_to_clip", "first_frame_to_clip", "first_frame_and_voice", "two_speakers", "audio_only", "sampler_parts",
    "low_memory", "two_gpus", "voice_drives_picture", "sound_for_video", "long_clip", "retake",
}  # fmt: skip
FRAMES = 25
SEGMENTS = 3  # of long_clip
FILES = {
    "NavaLoadBackbone": "backbone",
    "NavaLoadTextEncoder": "text_encoder",
    "NavaLoadVideoVAE": "video_vae",
    "NavaLoadAudioVAE": "audio_vae",
    "NavaLoadSpeakerEncoder": "speaker_encoder",
}


@pytest.fixture(scope="module")
def inputs(comfy):
    """Names of a photograph, a silent video and two voices in the server's input folder."""
    folder = comfy.base / "input"
    write_photo(folder / "photo.png")
    video = write_video(folder / "silent.mp4", FRAMES, (96, 64)).name
    voices = [write_voice(folder / f"{k}.wav", k).name for k in ("low", "high")]
    return {"photo": "photo.png", "video": video, "voices": voices}


def nodes_of(graph, *kinds):
    return [node["inputs"] for node in graph.values() if node["class_type"] in kinds]


def small(name, comfy, inputs, seed=5, voices=None):
    """A bundled workflow as it is, but for files, size, length and steps."""
    graph = json.loads((API / f"{name}.json").read_text())
    for node in graph.values():
        role = FILES.get(node["class_type"])
        if role:
            node["inputs"]["file"] = comfy.names[role]
    if name == "low_memory":
        for node in nodes_of(graph, "NavaLoadTextEncoder"):
            node["file"] = comfy.names["text_encoder_fp8"]
    for node in nodes_of(graph, "NavaEmptyLatent"):
        node.update(seconds=1.0, preset="custom", width=96, height=64)
    for node in nodes_of(graph, "NavaFirstFrame"):
        node["size"] = "the latent's own"
    for node in nodes_of(graph, "NavaSampler", "NavaSigmas"):
        node["steps"] = 2
    for node in nodes_of(graph, "NavaSampler"):
        node["seed"] = seed
    for node in nodes_of(graph, "RandomNoise"):
        node["noise_seed"] = seed
    for node in nodes_of(graph, "NavaDecodeVideo"):
        node.update(tile_size=64, overlap=32)
    for node in nodes_of(graph, "LoadImage"):
        node["image"] = inputs["photo"]
    for node in nodes_of(graph, "LoadVideo"):
        node["file"] = inputs["video"]
    for node in nodes_of(graph, "NavaRetake"):
        node.update(start=0.4, end=0.6)
    for node, voice in zip(nodes_of(graph, "LoadAudio"), voices or inputs["voices"], strict=False):
        node["audio"] = voice
    return graph


def test_all_workflows_are_there():
    assert set(NAMES) == EXPECTED
    assert {path.stem for path in (ROOT / "workflows").glob("*.json")} == EXPECTED


@pytest.mark.parametrize("name", NAMES)
def test_workflow_gives_the_clip_it_promises(comfy, inputs, name):
    run = comfy.ok(small(name, comfy, inputs))
    saved = [path for path in run.files if path.suffix in (".mp4", ".flac", ".mp3", ".wav")]
    if name == "audio_only":
        assert [path.suffix for path in saved] == [".flac"]
    else:
        assert [path.suffix for path in saved] == [".mp4"]
    media = read_media(saved[0])
    assert_alive(media)
    if name != "voice_drives_picture":  # whose sound is the recording's own
        assert (media.channels, media.sample_rate) == (2, 48000)
    if name == "audio_only":
        assert media.frames is None
        assert media.samples.shape[1] == 48000
        return
    assert (media.video_codec, media.audio_codec) == ("h264", "aac")
    frames = SEGMENTS * (FRAMES - 1) + 1 if name == "long_clip" else FRAMES
    assert (media.size, media.rate, len(media.frames)) == ((96, 64), 24, frames)
    assert media.video_seconds == pytest.approx(frames / 24, abs=1e-3)
    assert media.audio_seconds == pytest.approx(media.video_seconds, abs=1e-3)


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize("name", ["text_to_clip", "audio_only"])
def test_same_seed_same_file_another_seed_another(comfy, inputs, name):
    suffix = ".flac" if name == "audio_only" else ".mp4"
    first, again, other = (comfy.ok(small(name, comfy, inputs, seed=seed)).file(suffix) for seed in (5, 5, 6))
    assert first != again
    assert digest(first) == digest(again)
    media, different = read_media(first), read_media(other)
    assert numpy.abs(media.samples - different.samples).max() > 0.01
    if suffix == ".mp4":
        assert numpy.abs(media.frames.astype(int) - different.frames).max() > 8


def test_voice_alone_changes_sound_and_picture(comfy, inputs):
    """Through joint attention the voice reaches the picture too."""
    low, high = inputs["voices"]
    clips = [
        read_media(comfy.ok(small("first_frame_and_voice", comfy, inputs, voices=[voice])).file(".mp4"))
        for voice in (low, high)
    ]
    assert numpy.abs(clips[0].samples - clips[1].samples).max() > 0.01
    assert numpy.abs(clips[0].frames.astype(int) - clips[1].frames)[1:].max() > 8
    assert numpy.abs(clips[0].frames.astype(int) - clips[1].frames)[0].mean() < 3  # the given frame, but for the codec


def test_two_voices_are_not_interchangeable(comfy, inputs):
    low, high = inputs["voices"]
    clips = [
        read_media(comfy.ok(small("two_speakers", comfy, inputs, voices=voices)).file(".mp4"))
        for voices in ([low, high], [high, low])
    ]
    # Equal inputs give equal samples, to the last bit (see below), and random weights hardly listen to a voice.
    assert numpy.abs(clips[0].samples - clips[1].samples).max() > 0.001


def test_sampler_parts_is_the_sampler(comfy, inputs):
    """The same prompt, seed and scales through both workflows give the same clip."""
    one, parts = (small(name, comfy, inputs) for name in ("text_to_clip", "sampler_parts"))
    prompts = [nodes_of(graph, "NavaEncodePrompt") for graph in (one, parts)]
    for ours, theirs in zip(*prompts, strict=True):
        theirs["prompt"] = ours["prompt"]
    sampler, guider = nodes_of(one, "NavaSampler")[0], nodes_of(parts, "NavaGuider")[0]
    guider.update({key: value for key, value in sampler.items() if key in guider and not isinstance(value, list)})
    first, second = (read_media(comfy.ok(copy.deepcopy(graph)).file(".mp4")) for graph in (one, parts))
    assert numpy.array_equal(first.frames, second.frames)
    assert numpy.array_equal(first.samples, second.samples)


def test_the_recording_is_heard_and_changes_the_picture(comfy, inputs):
    low, high = inputs["voices"]
    clips = [
        read_media(comfy.ok(small("voice_drives_picture", comfy, inputs, voices=[voice])).file(".mp4"))
        for voice in (low, high)
    ]
    for media, name in zip(clips, (low, high), strict=True):
        recording = read_media(comfy.base / "input" / name)
        assert media.sample_rate == recording.sample_rate
        assert left_over(media, recording) < 0.1  # as far as AAC can keep it
    assert numpy.abs(clips[0].frames.astype(int) - clips[1].frames)[1:].max() > 8
    assert numpy.abs(clips[0].frames.astype(int) - clips[1].frames)[0].mean() < 3  # the given frame, but for the codec


def left_over(media, recording) -> float:
    """How far a clip's sound is from the beginning of a recording, as a share of its loudness."""
    count = round(media.audio_seconds * media.sample_rate)
    sound, expected = (each.samples.mean(axis=0)[:count] for each in (media, recording))
    return float(numpy.sqrt(((sound - expected) ** 2).mean() / (expected**2).mean()))


def test_the_video_comes_out_with_a_sound_of_its_own_making(comfy, inputs):
    graph = small("sound_for_video", comfy, inputs)
    media = read_media(comfy.ok(graph).file(".mp4"))
    given = read_media(comfy.base / "input" / inputs["video"])
    assert numpy.abs(media.frames.astype(int) - given.frames).mean() < 3  # twice through the codec
    other = read_media(comfy.ok(small("sound_for_video", comfy, inputs, seed=6)).file(".mp4"))
    assert numpy.array_equal(media.frames, other.frames)
    assert numpy.abs(media.samples - other.samples).max() > 0.01


def test_a_long_clip_goes_on_without_a_cut(comfy, inputs):
    """The seams are no greater steps than others: of random weights they are all large, so each is looked up."""
    frames = read_media(comfy.ok(small("long_clip", comfy, inputs)).file(".mp4")).frames.astype(int)
    steps = numpy.abs(numpy.diff(frames, axis=0)).mean(axis=(1, 2, 3))
    assert steps.min() > 0.01  # the frame that two segments share is there once


def test_a_retake_leaves_the_rest_as_it_was(comfy, inputs):
    graph = small("retake", comfy, inputs)
    decoders = [number for number, node in graph.items() if node["class_type"] == "NavaDecodeVideo"]
    for number in decoders:
        pictures = {"images": [number, 0], "filename_prefix": f"frames_{number}"}
        graph[f"frames of {number}"] = {"class_type": "SaveImage", "inputs": pictures}
    run = comfy.ok(graph)
    first, retaken = (frames_saved(run, f"frames_{number}") for number in decoders)
    same = (first == retaken).all(axis=(1, 2, 3))
    assert list(numpy.flatnonzero(~same)) == list(range(9, 17))  # the latents that 0.4 to 0.6 s touch


def frames_saved(run, prefix):
    return numpy.stack([numpy.asarray(Image.open(path)) for path in run.files if path.name.startswith(prefix)])
