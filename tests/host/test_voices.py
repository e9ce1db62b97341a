"""Saved voices on the real server: kept, listed, loaded and blended there; names and files that are refused."""

import json
import shutil

import comfy_host
import pytest
import torch
from graphs import PROMPT, Graph
from safetensors.torch import save_file
from server import RefusedError
from voices import write_voice

from nava_core.media import read_audio
from nava_core.timbre import load_redimnet
from nava_core.voices import SavedVoice, blend_voices, make_voice


@pytest.fixture(scope="module")
def recordings(comfy):
    return {kind: write_voice(comfy.base / "input" / f"{kind}.wav", kind) for kind in ("low", "high")}


@pytest.fixture
def folder(comfy):
    """The saved voices' folder, empty: it is not there before the first voice."""
    path = comfy.base / "models" / "nava_voices"
    shutil.rmtree(path, ignore_errors=True)
    return path


@pytest.fixture(scope="module")
def expected(small_models, recordings):
    encoder = load_redimnet(small_models["speaker_encoder"])
    return {kind: make_voice(encoder, *read_audio(path), name=kind) for kind, path in recordings.items()}


def encoder(graph, comfy):
    return graph.add("NavaLoadSpeakerEncoder", file=comfy.names["speaker_encoder"])


def encoded(graph, comfy, kind, **part):
    audio = graph.add("LoadAudio", audio=f"{kind}.wav")
    part = {"start": 0.0, "duration": 0.0, **part}
    return graph.add("NavaEncodeTimbre", speaker_encoder=encoder(graph, comfy), audio=audio, **part)


def save_graph(comfy, kind, name, existing="keep both", **part):
    graph = Graph()
    graph.add("NavaSaveTimbre", timbre=encoded(graph, comfy, kind, **part), name=name, existing=existing)
    return graph


def shown(graph, link):
    return graph.add("PreviewAny", source=link)[0]


def listed(comfy):
    spec = comfy.get("/object_info/NavaLoadTimbre")["NavaLoadTimbre"]["input"]["required"]["file"]
    return spec[1]["options"] if len(spec) > 1 and "options" in spec[1] else spec[0]


def load_graph(name, **inputs):
    graph = Graph()
    timbre = graph.add("NavaLoadTimbre", file=name, **inputs)
    return graph, timbre


# --- from a recording to a file and back -------------------------------------------------------------------------


def test_a_voice_is_kept_listed_and_loaded(comfy, folder, expected):
    assert "anna.safetensors" not in listed(comfy)
    run = comfy.ok(save_graph(comfy, "low", "anna"))
    (node,) = run.outputs
    assert run.text(node).startswith("anna: ")
    assert "anna.safetensors in the folder nava_voices" in run.text(node)
    assert str(comfy.base) not in run.text(node)
    assert listed(comfy) == ["anna.safetensors"]
    kept = SavedVoice.load(folder / "anna.safetensors")
    assert kept.name == "anna"
    assert kept.encoder == expected["low"].encoder
    assert kept.seconds == pytest.approx(expected["low"].seconds, abs=0.01)
    assert torch.allclose(kept.timbre, expected["low"].timbre, atol=1e-4)

    graph, timbre = load_graph("anna.safetensors")
    report = shown(graph, graph.of(timbre, 1))
    assert "not compared: connect a speaker encoder" in comfy.ok(graph).text(report)
    graph, timbre = load_graph("anna.safetensors")
    graph[timbre[0]]["inputs"]["speaker_encoder"] = encoder(graph, comfy)
    report = shown(graph, graph.of(timbre, 1))
    assert comfy.ok(graph).text(report).endswith("the one that is connected")


def test_a_loaded_voice_makes_the_clip_that_its_recording_makes(comfy, folder):
    def sound(make, prefix):
        graph = Graph()
        clip, timbre = graph.clip(comfy.names), make(graph)
        voices = {} if timbre is None else {"voices.voice0": timbre}
        positive = graph.prompt(clip, PROMPT, **voices)
        latent = graph.latent(seconds=0.5, mode="audio only")
        graph.save_latents(graph.sampler(graph.model(comfy.names), positive, latent, steps=2), prefix)
        path = next(path for path in comfy.ok(graph).files if "audio" in path.name)
        return path.read_bytes()[-4096:]

    comfy.ok(save_graph(comfy, "high", "bea"))
    from_recording = sound(lambda graph: encoded(graph, comfy, "high"), "recording")
    from_file = sound(lambda graph: graph.add("NavaLoadTimbre", file="bea.safetensors"), "file")
    without = sound(lambda graph: None, "without")
    assert from_file == from_recording
    assert from_file != without


def test_nothing_is_lost_unasked(comfy, folder):
    comfy.ok(save_graph(comfy, "low", "anna"))
    first = (folder / "anna.safetensors").read_bytes()
    comfy.ok(save_graph(comfy, "low", "anna"))
    assert listed(comfy) == ["anna.safetensors"]
    run = comfy.ok(save_graph(comfy, "high", "anna"))
    assert "anna_2.safetensors" in run.text(next(iter(run.outputs)))
    assert (folder / "anna.safetensors").read_bytes() == first
    assert listed(comfy) == ["anna.safetensors", "anna_2.safetensors"]
    comfy.ok(save_graph(comfy, "high", "anna", "replace"))
    assert (folder / "anna.safetensors").read_bytes() != first
    assert sorted(path.name for path in folder.iterdir()) == ["anna.safetensors", "anna_2.safetensors"]


def test_blends_lie_between_and_all_the_weight_gives_the_voice_itself(comfy, folder, expected):
    graph = Graph()
    low, high = (encoded(graph, comfy, kind) for kind in ("low", "high"))
    unused = {"weight_3": 1.0, "weight_4": 1.0}
    inputs = {"timbre_1": low, "timbre_2": high, **unused}
    between = graph.add("NavaBlendTimbre", weight_1=1.0, weight_2=3.0, **inputs)
    alone = graph.add("NavaBlendTimbre", weight_1=0.0, weight_2=1.0, **inputs)
    for name, timbre in (("between", between), ("alone", alone), ("high", high)):
        graph.add("NavaSaveTimbre", timbre=timbre, name=name, existing="keep both")
    report = shown(graph, graph.of(between, 1))
    assert "blend of 25% a voice, 75% a voice" in comfy.ok(graph).text(report)
    kept = {name: SavedVoice.load(folder / f"{name}.safetensors") for name in ("between", "alone", "high")}
    assert kept["alone"].is_like(kept["high"])
    wanted = blend_voices([expected["low"], expected["high"]], [1, 3])
    assert torch.allclose(kept["between"].timbre, wanted.timbre, atol=1e-4)
    assert not torch.allclose(kept["between"].timbre, kept["high"].timbre, atol=1e-3)


def test_a_saved_voice_is_read_again_once_it_changed(comfy, folder, expected):
    folder.mkdir()
    expected["low"].save(folder / "v.safetensors")
    graph, timbre = load_graph("v.safetensors")
    report = shown(graph, graph.of(timbre, 1))
    assert comfy.ok(graph).text(report).startswith("low: ")
    expected["high"].save(folder / "v.safetensors", overwrite=True)
    assert comfy.ok(graph).text(report).startswith("high: ")


def test_folders_of_the_users_own_come_first(monkeypatch, tmp_path, expected):
    """As extra_model_paths.yaml names them, before the pack is loaded."""
    comfy_host.import_comfyui()
    folder_paths = pytest.importorskip("folder_paths")
    monkeypatch.setattr(folder_paths, "folder_names_and_paths", dict(folder_paths.folder_names_and_paths))
    monkeypatch.setattr(folder_paths, "models_dir", str(tmp_path / "models"))
    folder_paths.folder_names_and_paths.pop("nava_voices", None)
    folder_paths.add_model_folder_path("nava_voices", str(tmp_path / "own"))
    voices = comfy_host.pack_module("nodes.host.voices")
    voices.save_voice(expected["low"].timbre, "anna", voices.KEEP_BOTH)
    (tmp_path / "own" / "notes.txt").write_text("no voice")
    assert voices.voice_files() == ["anna.safetensors"]
    assert voices.voice_path("anna.safetensors") == str(tmp_path / "own" / "anna.safetensors")
    assert not (tmp_path / "models").exists()
    both = [tmp_path / "own", tmp_path / "models" / "nava_voices"]
    assert folder_paths.get_folder_paths("nava_voices") == [str(each) for each in both]
    with pytest.raises(ValueError, match="does not say which speaker encoder made it: make it with NAVA Encode Timbre"):
        voices.save_voice(torch.ones(1, 192), "bo", voices.KEEP_BOTH)


# --- what is refused ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["../up", "sub/name", "/etc/name", "..", "", "a\\b", "nul", "n" * 300])
def test_names_that_lead_elsewhere_are_refused(comfy, folder, name):
    before = {path for path in comfy.base.rglob("*.safetensors")}
    graph = Graph()
    graph.add("NavaSaveTimbre", timbre=encoded(graph, comfy, "low"), name=name, existing="replace")
    node, message = comfy.fails(graph)
    assert node == "NavaSaveTimbre"
    assert "cannot be a file's" in message
    assert "\n" not in message
    assert {path for path in comfy.base.rglob("*.safetensors")} == before


def test_files_outside_the_folder_cannot_be_loaded(comfy, folder, expected):
    folder.mkdir()
    expected["low"].save(folder / "v.safetensors")
    expected["low"].save(comfy.base / "models" / "outside.safetensors", overwrite=True)
    for name in ("../outside.safetensors", str(comfy.base / "models" / "outside.safetensors"), "v.pt", ""):
        graph, timbre = load_graph(name)
        shown(graph, timbre)
        with pytest.raises(RefusedError, match="value_not_in_list"):
            comfy.queue(graph)


def test_other_files_and_voices_of_other_encoders_are_refused(comfy, folder, small_models, expected):
    folder.mkdir()
    stranger = SavedVoice(expected["low"].timbre, "f" * 32, 3.0, "Bo")
    stranger.save(folder / "bo.safetensors")
    expected["high"].save(folder / "bea.safetensors")
    shutil.copy(small_models["video_vae"], folder / "vae.safetensors")
    whole = (folder / "bea.safetensors").read_bytes()
    (folder / "cut.safetensors").write_bytes(whole[:-50])
    facts = {"format": "nava_voice", "version": "9", "voice": json.dumps({})}
    save_file({"nava_voice.timbre": torch.ones(1, 192)}, folder / "later.safetensors", facts)

    def failure(graph, node):
        received, message = comfy.fails(graph)
        assert received == node
        assert "\n" not in message
        assert len(message) < 400
        return message

    for name, words in (
        ("vae", "but a saved voice is needed here"),
        ("cut", "an incomplete download"),
        ("later", "of version 9 of voices' files, which this pack does not know"),
    ):
        graph, timbre = load_graph(f"{name}.safetensors")
        shown(graph, timbre)
        assert words in failure(graph, "NavaLoadTimbre")

    graph, timbre = load_graph("bo.safetensors")
    graph[timbre[0]]["inputs"]["speaker_encoder"] = encoder(graph, comfy)
    shown(graph, timbre)
    assert "The voice 'Bo' was made with another speaker encoder" in failure(graph, "NavaLoadTimbre")

    graph = Graph()
    bo, bea = (graph.add("NavaLoadTimbre", file=f"{name}.safetensors") for name in ("bo", "bea"))
    prompt = "One says <S>good morning<E>, the other <S>hello there<E>."
    shown(
        graph, graph.of(graph.prompt(graph.clip(comfy.names), prompt, **{"voices.voice0": bo, "voices.voice1": bea}), 1)
    )
    assert "were made with different speaker encoders" in failure(graph, "NavaEncodePrompt")

    graph = Graph()
    bo, bea = (graph.add("NavaLoadTimbre", file=f"{name}.safetensors") for name in ("bo", "bea"))
    weights = {f"weight_{n}": 1.0 for n in (1, 2, 3, 4)}
    shown(graph, graph.add("NavaBlendTimbre", timbre_1=bo, timbre_2=bea, **weights))
    assert "were made with different speaker encoders" in failure(graph, "NavaBlendTimbre")

    graph = Graph()
    bo = graph.add("NavaLoadTimbre", file="bo.safetensors")
    shown(graph, graph.add("NavaBlendTimbre", timbre_1=bo, timbre_2=bo, **{name: 0.0 for name in weights}))
    assert "not all of them 0" in failure(graph, "NavaBlendTimbre")
