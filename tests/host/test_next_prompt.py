"""A decode that runs out of memory on the real server: one sentence, and the next prompt decodes the latents that are
still in the graph, without sampling them again."""

import json

import pytest
from comfy_host import require_comfyui
from graphs import Graph
from media_checks import read_media
from server import Comfy

from nava_core.demo import place_in_comfyui

SHORT_OF_MEMORY = '''
"""Test nodes: a VAE whose decoder runs out of memory while a file is there."""
from pathlib import Path

import torch


class ShortOfMemory:
    RETURN_TYPES, FUNCTION, CATEGORY = ("VAE",), "watch", "test"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"vae": ("VAE",), "mark": ("STRING", {})}}

    def watch(self, vae, mark):
        mark = Path(__file__).with_name(mark)
        network = getattr(vae, "first_stage_model", vae)
        decoder = getattr(network, "autoencoder", network).decoder

        def allocate(*_):
            if mark.exists():
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 5.91 GiB.")

        getattr(decoder, "conv1", decoder).register_forward_pre_hook(allocate)
        return (vae,)


NODE_CLASS_MAPPINGS = {"TestShortOfMemory": ShortOfMemory}
'''


@pytest.fixture(scope="module")
def server(tmp_path_factory, small_models):
    """A server that keeps results, as it does by default, with the test node."""
    require_comfyui()
    base = tmp_path_factory.mktemp("next")
    nodes = base / "custom_nodes" / "short_of_memory"
    nodes.mkdir(parents=True)
    (nodes / "__init__.py").write_text(SHORT_OF_MEMORY)
    names = place_in_comfyui(small_models, base / "models")
    with Comfy(base) as server:
        server.names = {key: path.name for key, path in names.items()}
        server.marks = nodes
        yield server


def graph_of(names, seed, decoding="auto"):
    graph = Graph()
    latent = graph.sampler(
        graph.model(names), graph.prompt(graph.clip(names)), graph.latent(seconds=0.5), seed=seed, steps=3
    )
    vae = graph.add("TestShortOfMemory", vae=graph.video_vae(names), mark="picture")
    audio_vae = graph.add("TestShortOfMemory", vae=graph.audio_vae(names), mark="sound")
    graph.save_clip(graph.frames(latent, vae, decoding, tile_size=128), graph.sound(latent, audio_vae), prefix="next")
    return graph, latent[0]


@pytest.mark.parametrize(
    ("what", "node", "smallest"),
    [
        ("picture", "NavaDecodeVideo", "whole frames, one at a time"),  # of 96x64 pixels, which no tile makes smaller
        ("sound", "NavaDecodeAudio", "pieces of 1.3 s"),
    ],
)
def test_the_next_prompt_decodes_the_latents_that_are_there(server, what, node, smallest):
    graph, sampler = graph_of(server.names, seed=len(what))
    (server.marks / what).touch()
    failed = server.run(graph)
    (server.marks / what).unlink()
    assert failed.status == "error"
    assert failed.error["node_type"] == node
    sentence = failed.error["exception_message"].strip()
    assert sentence.startswith(f"There is too little free memory for decoding the {what}, even in {smallest}: make the")
    assert "\n" not in sentence
    assert f"Out of memory while decoding the {what} in " in server.said()
    assert any(node == sampler for node, *_ in failed.progress)

    run = server.run(graph)
    assert run.status == "success", run.error
    assert not any(node == sampler for node, *_ in run.progress)  # its latents were there
    clip = read_media(run.file(".mp4"))
    assert len(clip.frames) == 13
    assert clip.samples is not None

    other, sampler = graph_of(server.names, seed=4)  # and another prompt runs as ever
    run = server.run(other)
    assert run.status == "success", run.error
    assert any(node == sampler for node, *_ in run.progress)


def test_another_way_of_decoding_needs_no_sampling_either(server):
    graph, sampler = graph_of(server.names, seed=5)
    assert server.run(graph).status == "success"
    graph = json.loads(json.dumps(graph))
    node = next(name for name, node in graph.items() if node["class_type"] == "NavaDecodeVideo")
    graph[node]["inputs"]["decoding"] = "tiled"
    run = server.run(graph)
    assert run.status == "success", run.error
    assert not any(name == sampler for name, *_ in run.progress)
    assert [value for name, value, _ in run.progress if name == node][-1] == 4  # passes of one tile
