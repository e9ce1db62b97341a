"""The same seed gives the same latents as ever, in the loop without a host; the hosts' test holds them to the same."""

import json
from pathlib import Path

import pytest
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from nava_core.checkpoint import load_backbone
from nava_core.components.latent_space import denormalize_video
from nava_core.geometry import ClipGeometry, audio_latent_to_tokens, audio_tokens_to_latent
from nava_core.pipeline import clip_noise
from nava_core.sampling import Guidance, denoise, find_preset, flow_sigmas

GOLDEN = Path(__file__).parents[1] / "golden"


@pytest.mark.parametrize("name", ["makers", "distilled"])
def test_a_seed_gives_the_kept_latents(tmp_path, name):
    kept = load_file(GOLDEN / "latent_cases.safetensors")
    with safe_open(GOLDEN / "latent_cases.safetensors", "pt") as file:
        case = json.loads(file.metadata()["case"])
    weights = load_file(GOLDEN / "backbone_tiny.safetensors")
    for head in ("head", "head_audio"):
        weights[f"backbone.{head}.head.weight"] *= case["damping"]
    with safe_open(GOLDEN / "backbone_tiny.safetensors", "pt") as file:
        save_file(weights, tmp_path / "backbone.safetensors", metadata=file.metadata())
    settings = {"sigmas": flow_sigmas(case["steps"]), "guidance": Guidance()}
    if name == "distilled":
        preset = find_preset(name)
        settings = {"sigmas": preset.sigmas(), "guidance": preset.guidance, "sampler": preset.solver}
    video, audio = clip_noise(ClipGeometry(case["seconds"], case["width"], case["height"]), case["seed"])
    video, audio = denoise(
        load_backbone(tmp_path / "backbone.safetensors"),
        video,
        audio_latent_to_tokens(audio),
        kept["context"],
        negative=kept["negative"],
        timbre=kept["timbre"],
        timbre_positions=kept["timbre_positions"],
        **settings,
    )
    assert (denormalize_video(video) - kept[f"{name}/video"]).abs().max() < 1e-4
    assert (audio_tokens_to_latent(audio) - kept[f"{name}/audio"]).abs().max() < 1e-4
