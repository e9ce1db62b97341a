"""A LoRA with foreign names on a real ComfyUI server: unread as it is, and the same as one in stock names converted."""

import pytest
import torch
from comfy_host import require_comfyui
from graphs import text_to_latent
from safetensors.torch import load_file, save_file
from server import Comfy

from nava_core.demo import place_in_comfyui
from nava_core.lora import convert_lora

BLOCKS = ("double_blocks.1", "single_blocks.0")
UNREAD = "lora key not loaded"


@pytest.fixture(scope="module")
def server(tmp_path_factory, small_models):
    """One of its own: what it says of names that it does not know would be found in the log of the others' server."""
    require_comfyui()
    base = tmp_path_factory.mktemp("comfy_lora")
    names = place_in_comfyui(small_models, base / "models")
    (base / "models" / "loras").mkdir(exist_ok=True)
    with Comfy(base, "--cache-none") as comfy:
        comfy.names = {key: path.name for key, path in names.items()}
        yield comfy


def lora(prefix, down="lora_down.weight", up="lora_up.weight", flat=False):
    """A LoRA of rank 4 on two layers, strong enough to be seen; the same numbers under every name."""
    generator = torch.Generator().manual_seed(1)
    tensors = {}
    for block in BLOCKS:
        name = f"{block}.self_attn.o"
        name = prefix + (name.replace(".", "_") if flat else name)
        tensors[f"{name}.{down}"] = torch.randn(4, 64, generator=generator)
        tensors[f"{name}.{up}"] = torch.randn(64, 4, generator=generator) * 0.1
        tensors[f"{name}.alpha"] = torch.tensor(2.0)
    return tensors


def sampled(server, prefix, lora_name=None):
    """(video, audio) latents, and what the server said meanwhile."""
    said = len(server.said())
    graph, latent = text_to_latent(server.names, steps=2)
    if lora_name:
        sampler = graph[latent[0]]["inputs"]
        sampler["model"] = graph.add(
            "LoraLoaderModelOnly", model=sampler["model"], lora_name=lora_name, strength_model=1.0
        )
    graph.save_latents(latent, prefix)
    run = server.ok(graph)
    files = [next(p for p in run.files if p.name.startswith(f"{prefix}_{part}")) for part in ("video", "audio")]
    return [load_file(path)["latent_tensor"] for path in files], server.said()[said:]


@pytest.fixture(scope="module")
def plain(server):
    return sampled(server, "plain")[0]


@pytest.fixture(scope="module")
def stock(server):
    """What the LoRA does in names that the stock loader knows."""
    save_file(lora("diffusion_model."), server.base / "models" / "loras" / "stock.safetensors")
    latents, said = sampled(server, "stock", "stock.safetensors")
    assert UNREAD not in said
    return latents


@pytest.mark.parametrize(
    "naming",
    [
        {"prefix": "backbone."},
        {"prefix": "base_model.model.", "down": "lora_A.default.weight", "up": "lora_B.default.weight"},
        {"prefix": "lora_transformer_", "flat": True},
    ],
    ids=lambda naming: naming["prefix"].strip("._"),
)
def test_a_foreign_lora_works_once_converted(server, plain, stock, naming):
    folder, tag = server.base / "models" / "loras", naming["prefix"].strip("._")
    save_file(lora(**naming), folder / f"{tag}.safetensors")
    before, said = sampled(server, f"{tag}_before", f"{tag}.safetensors")
    assert said.count(UNREAD) == 6
    assert all(torch.equal(a, b) for a, b in zip(before, plain, strict=True))

    convert_lora(folder / f"{tag}.safetensors", folder / f"{tag}_converted.safetensors")
    after, said = sampled(server, f"{tag}_after", f"{tag}_converted.safetensors")
    assert UNREAD not in said
    assert all((a - b).abs().max() > 1e-3 for a, b in zip(after, plain, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(after, stock, strict=True))
