"""The VAEs and the text encoder loaded again for another device, by the host's own node where it has one."""

import comfy_host
import pytest
import torch

comfy_host.import_comfyui()

import comfy.model_management  # noqa: E402

video = comfy_host.pack_module("nodes.host.video_vae")
audio = comfy_host.pack_module("nodes.host.audio_vae")
shared = comfy_host.pack_module("nodes.host.vae")
text = comfy_host.pack_module("nodes.host.text_encoder")

CPU, OTHER = torch.device("cpu"), torch.device("meta")  # nothing is computed on the second


@pytest.fixture(autouse=True)
def _as_in_a_node():
    with torch.inference_mode():
        yield


@pytest.fixture
def nodes(monkeypatch):
    """The host's nodes that select a device, with a second one to select."""
    nodes = pytest.importorskip("comfy_extras.nodes_multigpu", reason="this ComfyUI has no nodes that select a device")
    if not hasattr(nodes, "SelectVAEDeviceNode"):
        pytest.skip("this ComfyUI has no node that selects a VAE's device")
    monkeypatch.setattr(comfy.model_management, "resolve_gpu_device_option", lambda _: OTHER)
    return nodes


def use_video(vae):
    frames = torch.rand(5, 32, 48, 3, generator=torch.Generator().manual_seed(1))
    latent = video.encode_video(vae, frames)
    return latent, video.decode_video(vae, latent)


def use_audio(vae):
    sound = audio.decode_audio(vae, torch.randn(1, 8, 10, 16, generator=torch.Generator().manual_seed(1)))
    return sound["waveform"], audio.encode_audio(vae, sound)


LOADERS = {"video_vae": (video.load_video_vae, use_video), "audio_vae": (audio.load_audio_vae, use_audio)}


@pytest.mark.parametrize("role", LOADERS)
def test_a_vae_is_selected_onto_another_device(nodes, small_models, role):
    load, use = LOADERS[role]
    vae = load(small_models[role])
    before = use(vae)
    (clone,) = nodes.SelectVAEDeviceNode.execute(vae, "gpu:1").result
    assert clone is not vae
    assert clone.device == clone.patcher.load_device == OTHER
    assert vae.device == vae.patcher.load_device == CPU
    assert clone.first_stage_model is clone.patcher.model is not vae.first_stage_model
    clone.device = clone.patcher.load_device = CPU  # as if the other device could compute
    for first, second in zip(before, use(clone), strict=True):
        assert torch.equal(first, second)


def test_a_text_encoder_is_selected_onto_another_device(nodes, small_models):
    clip = text.load_text_encoder(small_models["text_encoder"])
    (clone,) = nodes.SelectCLIPDeviceNode.execute(clip, "gpu:1").result
    assert clone.patcher.load_device == OTHER
    assert clip.patcher.load_device == CPU
    assert clone.patcher.model is not clip.patcher.model
    ours, theirs = clip.patcher.model.state_dict(), clone.patcher.model.state_dict()
    assert set(ours) == set(theirs)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("device", ["default", "cpu"])
@pytest.mark.parametrize("role", LOADERS)
def test_a_vaes_patcher_can_be_made_again(small_models, role, device):
    patcher = shared.vae_patcher(LOADERS[role][0](small_models[role], device))
    load, arguments = patcher.cached_patcher_init
    again = load(*arguments, disable_dynamic=True)
    assert again.model is not patcher.model
    assert again.load_device == patcher.load_device
    ours, theirs = patcher.model.state_dict(), again.model.state_dict()
    assert set(ours) == set(theirs)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
