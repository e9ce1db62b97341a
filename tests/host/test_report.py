"""NAVA Report on a real server: its figures, its picture on the node, what it refuses; interrupted and gone on."""

import json

import pytest
from graphs import Graph
from server import RefusedError

SECONDS, RATE = 2.0, 48000


def write_sound(comfy, voices) -> str:
    """Silence, the first voice, a pause, the second one: a file in the server's input folder."""
    import torch

    from nava_core.media import read_audio, write_wav

    parts = []
    for path in voices:
        waveform, rate = read_audio(path, 1.5)
        parts += [torch.zeros(rate // 2), waveform[0]]
    write_wav(comfy.base / "input" / "talk.wav", torch.cat([*parts, torch.zeros(rate // 2)])[None], rate)
    return "talk.wav"


@pytest.fixture(scope="module")
def voices(comfy):
    from voices import write_voice

    return {kind: write_voice(comfy.base / "input" / f"report_{kind}.wav", kind) for kind in ("low", "high")}


def picture(graph, frames=48):
    return graph.add("EmptyImage", width=64, height=48, batch_size=frames, color=0x804020)


def report(graph, **inputs):
    """The node, its text and JSON shown by stock nodes: (node, text, JSON)."""
    node = graph.add("NavaReport", **{"fps": 24.0, **inputs})
    return node, *(graph.add("PreviewAny", source=graph.of(node, output))[0] for output in (1, 2))


def test_a_frozen_silent_clip_is_told_and_its_picture_is_on_the_node(comfy):
    graph = Graph()
    silence = graph.add("EmptyAudio", duration=SECONDS, sample_rate=RATE, channels=2)
    node, text, data = report(graph, frames=picture(graph), audio=silence)
    graph.add("SaveImage", images=node, filename_prefix="report")
    run = comfy.ok(graph)
    told = json.loads(run.text(data))
    assert {fault["measure"] for fault in told["faults"]} == {"silence", "frozen"}
    assert told["frozen"]["share"] == pytest.approx(1.0, abs=0.05)
    assert told["sound"]["silent_share"] == 1.0
    assert "FAULT (frozen)" in run.text(text)
    (shown,) = run.outputs[node[0]]["images"]
    assert shown["type"] == "temp"
    assert (comfy.base / "temp" / shown["filename"]).read_bytes().startswith(b"\x89PNG")
    assert run.file(".png").stat().st_size > 1000
    steps = [(value, most) for name, value, most in run.progress if name == node[0]]
    assert steps[-1][0] == steps[-1][1] > 6


def test_voices_and_words_against_the_prompt(comfy, voices):
    graph = Graph()
    sound = graph.add("LoadAudio", audio=write_sound(comfy, voices.values()))
    encoder = graph.add("NavaLoadSpeakerEncoder", file=comfy.names["speaker_encoder"])
    inputs = {"audio": sound, "speaker_encoder": encoder}
    for number, path in enumerate(voices.values()):
        reference = graph.add("LoadAudio", audio=path.name)
        timbre = graph.add("NavaEncodeTimbre", speaker_encoder=encoder, audio=reference, start=0.0, duration=1.5)
        inputs[f"voices.voice{number}"] = timbre
    inputs["prompt"] = graph.add("PrimitiveStringMultiline", value="He: <S>The storm has passed.<E> She: <S>It has.<E>")
    inputs["transcript"] = graph.add("PrimitiveStringMultiline", value="the form has passed it has")
    _, _, data = report(graph, **inputs)
    told = json.loads(comfy.ok(graph).text(data))
    assert [span["voice"] for span in told["speech"]["spans"]] == [1, 2]
    assert all(-1 <= value <= 1 for span in told["speech"]["spans"] for value in span["similarities"])
    assert told["words"]["rate"] == pytest.approx(1 / 6, abs=1e-3)
    assert "picture" not in told


def test_what_cannot_be_measured_is_said_in_a_sentence(comfy):
    graph = Graph()
    report(graph)
    run = comfy.run(graph)
    assert "nothing to measure" in run.error["exception_message"]

    graph = Graph()
    unclosed = graph.add("PrimitiveStringMultiline", value="She says <S>yes")
    report(graph, frames=picture(graph, 2), prompt=unclosed)
    assert "never closed" in comfy.run(graph).error["exception_message"]

    graph = Graph()
    report(graph, frames=picture(graph, 2), fps=0.0)
    with pytest.raises(RefusedError, match="smaller than min"):
        comfy.queue(graph)


def test_it_can_be_interrupted_and_the_next_run_works(comfy):
    graph = Graph()
    node, *_ = report(graph, frames=picture(graph, 600))
    asked = []

    def stop(run):
        if not asked and any(name == node[0] for name, *_ in run.progress):
            asked.append(True)
            comfy.interrupt()

    assert comfy.run(graph, on_progress=stop).status == "interrupted"
    graph = Graph()
    report(graph, frames=picture(graph, 2))
    comfy.ok(graph)
