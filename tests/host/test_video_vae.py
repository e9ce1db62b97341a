"""The video VAE in ComfyUI, in process, on its real classes with small models."""

import copy
import logging
import re
import types

import comfy_host
import pytest
import torch
from safetensors.torch import load_file, save_file

comfy_host.import_comfyui()

import comfy.latent_formats  # noqa: E402
import comfy.ldm.wan.vae2_2  # noqa: E402
import comfy.model_management  # noqa: E402
import comfy.model_patcher  # noqa: E402
import comfy.sd  # noqa: E402

video = comfy_host.pack_module("nodes.host.video_vae")
audio = comfy_host.pack_module("nodes.host.audio_vae")
shared = comfy_host.pack_module("nodes.host.vae")
demo = comfy_host.pack_module("nava_core.demo")


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return demo.make_small_models(tmp_path_factory.mktemp("models"))


@pytest.fixture(autouse=True)
def _as_in_a_node():
    with torch.inference_mode():  # ComfyUI runs every node in it
        yield


@pytest.fixture(scope="module")
def video_vae(models):
    return video.load_video_vae(models["video_vae"])


@pytest.fixture(scope="module")
def audio_vae(models):
    return audio.load_audio_vae(models["audio_vae"])


def noise(*shape, seed=1):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_every_tensor_of_the_video_vae_is_used_and_none_is_missing(models, video_vae, caplog):
    assert set(video_vae.first_stage_model.state_dict()) == set(load_file(models["video_vae"]))
    with caplog.at_level(logging.WARNING):
        video.load_video_vae(models["video_vae"], device="cpu")
    assert not [record for record in caplog.records if "Missing" in record.message]


def test_video_latents_are_in_the_vaes_own_space(video_vae):
    """The VAE applies no statistics: they are in the latent format, and undone there before decoding."""
    latent = comfy.latent_formats.Wan22().process_out(noise(1, 48, 3, 4, 6))
    images = video.decode_video(video_vae, latent)
    raw = video_vae.first_stage_model.decode(latent.to(video_vae.vae_dtype))
    expected = ((raw + 1) / 2).clamp(0, 1).movedim(1, -1)[0].float()
    assert images.shape == (9, 64, 96, 3)
    assert torch.equal(images, expected)
    assert images.std() > 0.02
    assert (images[0] - images[4]).abs().mean() > 0.02


def test_a_batch_of_video_latents_becomes_one_row_of_frames(video_vae):
    latent = noise(2, 48, 2, 2, 3)
    images = video.decode_video(video_vae, latent)
    assert images.shape == (10, 32, 48, 3)
    assert torch.allclose(images[5:], video.decode_video(video_vae, latent[1:]), atol=1e-5)


def test_frames_are_encoded_to_latents_and_one_image_to_one_latent_frame(video_vae):
    clip_of_five = torch.rand(5, 48, 64, 3, generator=torch.Generator().manual_seed(2))
    latent = video.encode_video(video_vae, clip_of_five)
    assert latent.shape == (1, 48, 2, 3, 4)
    first = video.encode_video(video_vae, clip_of_five[:1])
    assert torch.allclose(first, latent[:, :, :1], atol=1e-5)  # causal: what follows changes nothing
    with_alpha = torch.cat([clip_of_five, torch.ones(5, 48, 64, 1)], dim=-1)
    assert torch.equal(video.encode_video(video_vae, with_alpha), latent)
    with pytest.raises(ValueError, match=r"shape \(frames, height, width, 3\)"):
        video.encode_video(video_vae, clip_of_five[0])
    with pytest.raises(ValueError, match="at least 16 x 16"):
        video.encode_video(video_vae, clip_of_five[:, :8])


def test_frames_are_encoded_as_the_host_encodes_them(video_vae):
    """Bit for bit, with sides that the host crops."""
    frames = torch.rand(5, 71, 90, 3, generator=torch.Generator().manual_seed(3))
    latent = video.encode_video(video_vae, frames)
    assert latent.dtype is torch.float32
    assert torch.equal(latent, video_vae.encode(frames))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_frames_are_encoded_in_fp32_arithmetic(video_vae, dtype):
    """The weights are rounded as the host rounds them on a GPU, the arithmetic is not, as in the makers' code."""
    frames = torch.rand(5, 32, 48, 3, generator=torch.Generator().manual_seed(3))
    vae = in_dtype(video_vae, dtype)
    before = vae.encode(frames)
    latent = video.encode_video(vae, frames)
    assert torch.equal(latent, in_dtype(vae, torch.float32).encode(frames))
    assert not torch.equal(latent, before.float())
    assert torch.equal(vae.encode(frames), before)  # stock nodes get from it what they got
    assert torch.equal(video.decode_video(vae, latent), vae.decode(latent).float()[0])


def in_dtype(vae, dtype):
    vae = copy.copy(vae)
    vae.first_stage_model = copy.deepcopy(vae.first_stage_model).to(dtype)
    vae.patcher = type(vae.patcher)(vae.first_stage_model, vae.device, vae.patcher.offload_device)
    vae.vae_dtype = dtype
    return vae


@pytest.fixture
def short_of_memory(video_vae):
    """A VAE in whose network a pass on more than 32 x 32 pixels ends as on a GPU that is full."""

    def allocate(_module, inputs):
        if inputs[0].shape[-1] > 16:  # two pixels a side are folded into one before
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 5.91 GiB.")

    hook = video_vae.first_stage_model.encoder.middle[0].register_forward_pre_hook(allocate)
    yield video_vae
    hook.remove()


def test_a_first_frame_is_never_encoded_in_tiles(short_of_memory, monkeypatch):
    frame = torch.rand(1, 512, 512, 3, generator=torch.Generator().manual_seed(4))
    monkeypatch.setattr(video, "video_encode_bytes", lambda *_, **__: 3.2 * 2**30)
    tiles = []
    stock = comfy.sd.VAE.encode_tiled_3d
    monkeypatch.setattr(comfy.sd.VAE, "encode_tiled_3d", lambda *a, **b: tiles.append(1) or stock(*a, **b))
    with pytest.raises(shared.TooLittleMemoryError) as caught:
        video.encode_video(short_of_memory, frame)
    assert tiles == []
    sentence = str(caught.value)
    for words in ("encoding a first frame of 512x512", "about 3.2 GB", "not done in tiles", "smaller", "--cpu-vae"):
        assert words in sentence
    assert "\n" not in sentence
    assert len(sentence) < 400
    assert caught.value.__context__ is None  # which would keep the failed pass's tensors
    small = video.encode_video(short_of_memory, frame[:, :128, :128])  # the VAE is whole after it
    assert small.shape == (1, 48, 1, 8, 8)


def test_another_error_is_passed_on(video_vae, monkeypatch):
    monkeypatch.setattr(video_vae.first_stage_model, "encode", lambda _: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        video.encode_video(video_vae, torch.rand(1, 32, 32, 3))


def test_channels_last_changes_nothing(models, video_vae, monkeypatch):
    """--force-channels-last is about the diffusion model; the VAEs load and compute under it as without."""
    frames = torch.rand(5, 32, 48, 3, generator=torch.Generator().manual_seed(5))
    monkeypatch.setattr(comfy.model_management.args, "force_channels_last", True)
    vae = video.load_video_vae(models["video_vae"])
    latent = video.encode_video(vae, frames)
    assert torch.equal(latent, video.encode_video(video_vae, frames))
    assert torch.equal(video.decode_video(vae, latent), video.decode_video(video_vae, latent))


def test_the_released_width_goes_through_the_hosts_loader(models, monkeypatch):
    """Its 2.8 GB are not made here: the tensors are laid out without memory and the call is caught."""
    with torch.device("meta"):
        released = comfy.ldm.wan.vae2_2.WanVAE(
            dim=160, dec_dim=256, z_dim=48, num_res_blocks=2, temperal_downsample=[False, True, True]
        ).state_dict()
    calls = []

    def build(**given):
        calls.append(given)
        return types.SimpleNamespace(patcher=types.SimpleNamespace())

    monkeypatch.setattr(video.comfy.utils, "load_torch_file", lambda *_, **__: (dict(released), {"k": "v"}))
    monkeypatch.setattr(video.comfy.sd, "VAE", build)
    video.load_video_vae(models["video_vae"], device="cpu")
    assert set(calls[0]["sd"]) == set(released)
    assert calls[0]["device"] == torch.device("cpu")


def test_wrong_files_and_latents_are_refused_in_a_sentence(models, video_vae, tmp_path):
    with pytest.raises(ValueError, match=r"is the LTX audio VAE .* the Wan2[.]2 video VAE is needed"):
        video.load_video_vae(models["audio_vae"])
    tensors = load_file(models["video_vae"])
    del tensors["encoder.conv1.weight"]
    save_file(tensors, tmp_path / "cut.safetensors")
    with pytest.raises(ValueError, match=r"cut\.safetensors is incomplete"):
        video.load_video_vae(tmp_path / "cut.safetensors")
    with pytest.raises(ValueError, match="not a NAVA video latent"):
        video.decode_video(video_vae, noise(1, 16, 1, 2, 2))


def test_a_wrong_vae_is_named(models, audio_vae):
    for wrong, name in [*wrong_vaes(), (audio_vae, "it is the LTX audio VAE")]:
        with pytest.raises(ValueError, match=f"not the Wan2[.]2 video VAE .{re.escape(name)}.: connect the output of"):
            video.decode_video(wrong, noise(1, 48, 1, 2, 2))
    preview = comfy.sd.VAE(load_file(models["tae"]))
    with pytest.raises(ValueError, match=r"cannot encode a first frame .it is a small preview VAE of 48 latent chan"):
        video.encode_video(preview, torch.rand(1, 32, 32, 3))


def wrong_vaes():
    pixels = comfy.sd.VAE({"pixel_space_vae": torch.tensor(1.0)})
    empty = comfy.sd.VAE({"nothing": torch.zeros(1)})
    clip = comfy.sd.CLIP(no_init=True)
    model = comfy.model_patcher.ModelPatcher(torch.nn.Linear(1, 1), torch.device("cpu"), torch.device("cpu"))
    yield pixels, "it is a PixelspaceConversionVAE of 3 latent channels"
    yield empty, "it is empty: the file it was loaded from has none"
    yield clip, "it is a text encoder"
    yield model, "it is a model"
    yield None, "it is empty: the file it was loaded from has none"
    yield "wan2.2_vae", "it is a str"


def test_the_preview_decoder_is_the_hosts_and_shows_something(models):
    """As the host's own previewer loads and calls it: one latent frame of the model's space, no scaling after."""
    assert models["tae"].name.startswith(comfy.latent_formats.Wan22().taesd_decoder_name)
    tae = comfy.sd.VAE(load_file(models["tae"]))
    assert set(tae.first_stage_model.state_dict()) == set(load_file(models["tae"]))
    tae.first_stage_model.show_progress_bar = False
    preview = tae.decode(noise(1, 48, 1, 4, 6))
    assert preview.shape == (1, 1, 64, 96, 3)
    assert preview.clamp(0, 1).std() > 0.05
    assert 0.2 < preview.clamp(0, 1).mean() < 0.8
