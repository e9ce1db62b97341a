"""One seed, one result, whatever the host: against latents kept in the repository; and each host opens others' files.

The kept files were written by the ComfyUI that their folder is named after, from :func:`files_graph`.
"""

import json
import shutil
from pathlib import Path

import av
import pytest
import torch
from comfy_host import import_comfyui, pack_module
from graphs import Graph
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import_comfyui()

GOLDEN = Path(__file__).parents[1] / "golden"
WRITERS = sorted(path.name for path in (GOLDEN / "host_files").iterdir()) if (GOLDEN / "host_files").is_dir() else []
PARTS = ("video", "audio")

host_model = pack_module("nodes.host.model")
guiders = pack_module("nodes.host.guider")
host_latents = pack_module("nodes.host.latents")
sampling = pack_module("nava_core.sampling")
geometry = pack_module("nava_core.geometry")


@pytest.fixture(scope="module")
def kept():
    with safe_open(GOLDEN / "latent_cases.safetensors", "pt") as file:
        return json.loads(file.metadata()["case"]), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


@pytest.fixture(scope="module")
def backbone(kept, tmp_path_factory):
    """The golden backbone, its velocities damped so that rounding errors do not grow."""
    weights = load_file(GOLDEN / "backbone_tiny.safetensors")
    with safe_open(GOLDEN / "backbone_tiny.safetensors", "pt") as file:
        metadata = file.metadata()
    for head in ("head", "head_audio"):
        weights[f"backbone.{head}.head.weight"] *= kept[0]["damping"]
    path = tmp_path_factory.mktemp("tiny") / "backbone.safetensors"
    save_file(weights, path, metadata=metadata)
    return str(path)


@pytest.mark.parametrize("name", ["makers", "distilled"])
def test_a_seed_gives_the_kept_latents(kept, backbone, name):
    case, tensors = kept
    voices = {host_model.TIMBRE: tensors["timbre"], host_model.TIMBRE_POSITIONS: tensors["timbre_positions"]}
    sampler, sigmas, guidance = guiders.unipc_sampler(), sampling.flow_sigmas(case["steps"]), sampling.Guidance()
    if name == "distilled":
        preset = sampling.find_preset(name)
        sampler, sigmas, guidance = guiders.euler_sampler(), preset.sigmas(), preset.guidance
    with torch.inference_mode():
        clip = host_latents.empty_latent(geometry.ClipGeometry(case["seconds"], case["width"], case["height"]))
        model = host_model.load_backbone(backbone)
        positive, negative = [[tensors["context"], voices]], [[tensors["negative"], {}]]
        guider = guiders.make_guider(model, positive, negative, guidance)
        result = guiders.sample(guider, clip, case["seed"], sampler, sigmas)["samples"].unbind()
    for part, values in zip(PARTS, result, strict=True):
        assert (values - tensors[f"{name}/{part}"]).abs().max() < 1e-4


# ---------------------------------------------------------------- files


def files_graph(names) -> Graph:
    """A clip of picture and sound, one prediction from one step: its latents and its MP4, small."""
    graph = Graph()
    positive = graph.prompt(graph.clip(names), "A bell rings.")
    latent = graph.latent(seconds=0.25, width=64, height=32)
    latent = graph.sampler(graph.model(names), positive, latent, preset="4 steps (distilled)")
    graph.save_latents(latent, "kept")
    graph.save_clip(
        graph.frames(latent, graph.video_vae(names)), graph.sound(latent, graph.audio_vae(names)), prefix="kept"
    )
    return graph


@pytest.fixture(params=WRITERS)
def written(request):
    return GOLDEN / "host_files" / request.param


def saved(run, part):
    return load_file(next(path for path in run.files if path.name.startswith(f"kept_{part}")))["latent_tensor"]


def test_latents_that_another_host_saved_are_loaded(comfy, written):
    graph = Graph()
    for part in PARTS:
        shutil.copy(written / f"{part}.latent", comfy.base / "input" / f"{written.name}_{part}.latent")
    parts = [graph.add("LoadLatent", latent=f"{written.name}_{part}.latent") for part in PARTS]
    latent = graph.add("LTXVConcatAVLatent", video_latent=parts[0], audio_latent=parts[1])
    graph.save_latents(latent, "kept")
    graph.save_clip(
        graph.frames(latent, graph.video_vae(comfy.names)), graph.sound(latent, graph.audio_vae(comfy.names))
    )
    run = comfy.ok(graph)
    for part in PARTS:
        assert torch.equal(saved(run, part), load_file(written / f"{part}.latent")["latent_tensor"])
    with av.open(str(run.file(".mp4"))) as clip, av.open(str(written / "clip.mp4")) as other:
        assert clip.streams.video[0].frames == other.streams.video[0].frames == 9


def test_the_clip_that_another_host_saved_is_made_again_from_its_metadata(comfy, written):
    with av.open(str(written / "clip.mp4")) as clip:
        prompt = json.loads(clip.metadata["prompt"])
    run = comfy.ok(Graph(prompt))
    for part in PARTS:
        assert (saved(run, part) - load_file(written / f"{part}.latent")["latent_tensor"]).abs().max() < 1e-4
