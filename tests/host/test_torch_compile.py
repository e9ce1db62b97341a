"""The stock TorchCompileModel node on a NAVA model gives what the model gives without it."""

import json
import shutil

import pytest
import torch
from comfy_host import import_comfyui, pack_module

import_comfyui()

from comfy_extras.nodes_torch_compile import TorchCompileModel  # noqa: E402
from safetensors.torch import save_file  # noqa: E402

host_model = pack_module("nodes.host.model")
guiders = pack_module("nodes.host.guider")
host_latents = pack_module("nodes.host.latents")
backbone = pack_module("nava_core.backbone")
geometry = pack_module("nava_core.geometry")
sampling = pack_module("nava_core.sampling")

CONFIG = backbone.BackboneConfig(
    dim=64, ffn_dim=128, freq_dim=32, text_dim=32, num_heads=2, num_double_layers=1, num_single_layers=1
)
ONE_PREDICTION = sampling.Guidance(video_text=0.0, video_align=0.0, audio_text=0.0, audio_align=0.0)


@pytest.fixture(scope="module")
def patcher(tmp_path_factory):
    """One block of each kind: the compiler takes its time."""
    weights = backbone.NavaBackbone(CONFIG).init_weights(seed=1).state_dict()
    path = tmp_path_factory.mktemp("backbone") / "tiny.safetensors"
    named = {f"backbone.{name}": weight for name, weight in weights.items()}
    save_file(named, path, metadata={"config": json.dumps(CONFIG.to_dict())})
    return host_model.load_backbone(str(path), "fp32")


def one_step(patcher, batch):
    clip = geometry.ClipGeometry(0.5, 96, 80, "video+audio")
    context = torch.randn(1, 20, CONFIG.text_dim, generator=torch.Generator().manual_seed(3))
    guider = guiders.make_guider(patcher, [[context, {}]], None, ONE_PREDICTION)
    sigmas = torch.tensor([1.0, 0.5])
    latent = host_latents.empty_latent(clip, batch)
    return guiders.sample(guider, latent, 11, guiders.unipc_sampler(), sigmas)["samples"].unbind()


@pytest.mark.skipif(shutil.which("g++") is None, reason="the compiler needs g++")
@pytest.mark.parametrize("batch", [1, 2])
def test_compiled_equals_eager(patcher, batch):
    with torch.inference_mode():
        eager = one_step(patcher, batch)
        compiled = TorchCompileModel.execute(patcher, "inductor").result[0]
        for got, wanted in zip(one_step(compiled, batch), eager, strict=True):
            torch.testing.assert_close(got, wanted, rtol=0, atol=1e-4)
