"""The stock TorchCompileModel node on a NAVA model gives what the model gives without it."""

import json
import shutil

import pytest
import torch
from comfy_host import import_comfyui, pack_module
from torch._dynamo.utils import counters

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


def one_step(patcher, seconds=0.5, size=(96, 80), batch=1, given_frame=False, guidance=ONE_PREDICTION):
    clip = geometry.ClipGeometry(seconds, *size, "video+audio")
    context = torch.randn(1, 20, CONFIG.text_dim, generator=torch.Generator().manual_seed(3))
    guider = guiders.make_guider(patcher, [[context, {}]], None, guidance)
    sigmas = torch.tensor([1.0, 0.5])
    latent = host_latents.empty_latent(clip, batch)
    if given_frame:
        video, audio = latent["samples"].unbind()
        masks = [torch.ones_like(video[:, :1]), torch.ones_like(audio[:, :1])]
        masks[0][:, :, 0] = 0
        latent["noise_mask"] = type(latent["samples"])(masks)
    return guiders.sample(guider, latent, 11, guiders.unipc_sampler(), sigmas)["samples"].unbind()


KINDS = (
    {},
    {"seconds": 1.0, "size": (64, 128)},
    {"given_frame": True},
    {"seconds": 0.75, "guidance": sampling.Guidance()},  # alignment on
    *({"seconds": 0.5 + number / 4} for number in range(3, 10)),  # the ninth size used to fail
)


@pytest.mark.skipif(shutil.which("g++") is None, reason="the compiler needs g++")
def test_compiled_equals_eager_and_two_graphs_serve_every_clip(patcher):
    torch._dynamo.reset()
    counters.clear()
    with torch.inference_mode():
        compiled = TorchCompileModel.execute(patcher, "inductor").result[0]
        for kind in KINDS:
            eager = one_step(patcher, **kind)
            for got, wanted in zip(one_step(compiled, **kind), eager, strict=True):
                torch.testing.assert_close(got, wanted, rtol=0, atol=1e-4)
    assert counters["stats"]["unique_graphs"] == 2
    assert all("HostBackbone.__call__" in reason for reason in counters["graph_break"])  # the network as a whole
    assert patcher.model.diffusion_model.compiled is None  # the plain MODEL stays plain


def test_each_prediction_goes_by_itself_so_that_no_batch_is_compiled_for(patcher, monkeypatch):
    """Small clips' predictions are otherwise batched."""
    sizes = []

    class Counts:
        def __call__(self, block, tokens, state):
            sizes.append(tokens.shape[0])
            return block(tokens, state)

        def prepare(self, state):
            return state

    monkeypatch.setattr(host_model, "compiled_blocks", lambda options: Counts())
    with torch.inference_mode():
        one_step(patcher, guidance=sampling.Guidance())
    assert set(sizes) == {1}
    assert len(sizes) == 3 * 2  # predictions and blocks


def test_what_a_node_puts_in_a_blocks_place_is_given_the_compiled_block(patcher, monkeypatch):
    seen = []

    class Marks:
        def __call__(self, block, tokens, state):
            seen.append(block)
            return block(tokens, state)

        def prepare(self, state):
            return state

    monkeypatch.setattr(host_model, "compiled_blocks", lambda options: Marks())
    replaced = patcher.clone()
    replaced.set_model_patch_replace(lambda args, extra: extra["original_block"](args), "dit", "double_block", 0)
    with torch.inference_mode():
        one_step(replaced)
    assert len(seen) == 2
