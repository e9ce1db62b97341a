"""The LTX audio VAE in ComfyUI, in process, on the host's real class with small models."""

import re

import comfy_host
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

comfy_host.import_comfyui()

import comfy.model_management  # noqa: E402
import comfy.nested_tensor  # noqa: E402
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


def statistics(models):
    """(mean, std), each (8, 1, 16), of the file."""
    stats = {n: t.float() for n, t in load_file(models["audio_vae"]).items() if "per_channel_statistics" in n}
    return (stats[f"audio_vae.per_channel_statistics.{kind}-of-means"].view(8, 1, 16) for kind in ("mean", "std"))


def test_audio_latents_are_normalised_and_the_vae_undoes_it(models, audio_vae):
    """(x - mean) / std over the 128 values of a step, channel-major, by the statistics in the file."""
    latent = noise(1, 8, 26, 16)
    mean, std = statistics(models)
    module = audio.audio_module(audio_vae)
    mel = module.autoencoder.decode(latent * std + mean, target_shape=(1, 2, 4 * 26 - 3, 64))
    expected = module.run_vocoder(mel)
    sound = audio.decode_audio(audio_vae, latent)
    assert torch.allclose(sound["waveform"], expected, atol=1e-5)

    encoded = audio.encode_audio(audio_vae, sound)
    mel = module.preprocessor.waveform_to_mel(sound["waveform"], 48000, device="cpu")
    raw = module.autoencoder.encode(mel).chunk(2, dim=1)[0]
    assert torch.allclose(encoded * std + mean, raw, atol=1e-5)


def test_sound_keeps_48_khz_and_is_neither_silent_nor_clipped(audio_vae):
    sound = audio.decode_audio(audio_vae, noise(2, 8, 26, 16))
    waveform = sound["waveform"]
    assert sound["sample_rate"] == 48000
    assert waveform.shape == (2, 2, (4 * 26 - 3) * 480)
    assert waveform.dtype is torch.float32
    assert waveform.square().mean().sqrt() > 1e-2
    assert (waveform.abs() > 0.999).float().mean() < 0.01
    assert (waveform[0] - waveform[1]).abs().mean() > 1e-3
    assert (waveform[:, 0] - waveform[:, 1]).abs().mean() > 1e-3


def test_audio_of_any_channel_count_and_rate_is_encoded(audio_vae):
    mono = 0.1 * noise(1, 1, 16000)
    latent = audio.encode_audio(audio_vae, {"waveform": mono, "sample_rate": 16000})
    assert latent.shape == (1, 8, 26, 16)
    twice = audio.encode_audio(audio_vae, {"waveform": mono.expand(-1, 2, -1), "sample_rate": 16000})
    assert torch.equal(latent, twice)
    surround = audio.encode_audio(audio_vae, {"waveform": mono.expand(-1, 6, -1), "sample_rate": 16000})
    assert torch.allclose(latent, surround, atol=1e-5)
    fast = audio.encode_audio(audio_vae, {"waveform": 0.1 * noise(1, 2, 44100), "sample_rate": 44100})
    assert fast.shape == latent.shape
    with pytest.raises(ValueError, match=r"at least 0\.1 s"):
        audio.encode_audio(audio_vae, {"waveform": mono[..., :100], "sample_rate": 16000})


@pytest.mark.parametrize(("rate", "samples"), [(16000, 16000), (48000, 50000), (44100, 30001), (24000, 4095)])
def test_sound_is_encoded_from_its_first_sample_to_its_last(models, audio_vae, rate, samples):
    """A click 4 ms from either end is in the latent, which has a step for every four mel bands of all samples."""
    mean, std = statistics(models)
    module = audio.audio_module(audio_vae)
    steps = -(-(-(-samples * 16000 // rate) // 160 + 1) // 4)
    silent = audio.encode_audio(audio_vae, {"waveform": torch.zeros(1, 2, samples), "sample_rate": rate})
    assert silent.shape == (1, 8, steps, 16)
    for at in (rate // 250, samples - 1 - rate // 250):
        waveform = torch.zeros(1, 2, samples)
        waveform[..., at] = 1
        latent = audio.encode_audio(audio_vae, {"waveform": waveform, "sample_rate": rate})
        moved = (latent - silent).abs().amax(dim=(0, 1, 3))
        assert moved[0 if at < samples // 2 else -1] > 1e-2
        mel = module.preprocessor.waveform_to_mel(waveform, rate, device="cpu")  # resampled there, once
        raw = module.autoencoder.encode(mel).chunk(2, dim=1)[0]
        assert torch.allclose(latent * std + mean, raw, atol=1e-5)


def test_sound_is_never_encoded_or_decoded_in_the_hosts_tiles(audio_vae, monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.00 GiB.")

    for name in ("encode_tiled_1d", "decode_tiled_1d"):
        monkeypatch.setattr(comfy.sd.VAE, name, lambda *_, **__: pytest.fail("in tiles"))
    network = audio.audio_module(audio_vae).autoencoder
    hooks = [part.register_forward_pre_hook(full) for part in (network.encoder, network.decoder)]
    try:
        with pytest.raises(shared.TooLittleMemoryError, match=r"encoding the sound, .* not done in tiles"):
            audio.encode_audio(audio_vae, {"waveform": noise(1, 2, 16000), "sample_rate": 16000})
        with pytest.raises(shared.TooLittleMemoryError, match=r"decoding the sound, even in pieces of 1\.3 s: make"):
            audio.decode_audio(audio_vae, noise(1, 8, 26, 16))
    finally:
        for hook in hooks:
            hook.remove()


def test_every_tensor_of_the_audio_vae_is_used_and_a_missing_one_is_an_error(models, audio_vae, tmp_path):
    given = load_file(models["audio_vae"])
    loaded = audio.audio_module(audio_vae).state_dict()
    assert set(loaded) == {name.replace("audio_vae.", "autoencoder.", 1) for name in given}
    assert {tensor.dtype for tensor in loaded.values()} == {torch.float32}
    with safe_open(models["audio_vae"], "pt") as file:
        metadata = file.metadata()
    del given["audio_vae.per_channel_statistics.std-of-means"]
    save_file(given, tmp_path / "cut.safetensors", metadata=metadata)
    with pytest.raises(ValueError, match=r"cut\.safetensors is incomplete: 1 tensors .*std-of-means"):
        audio.load_audio_vae(tmp_path / "cut.safetensors")
    save_file(given, tmp_path / "plain.safetensors")
    with pytest.raises(ValueError, match="no configuration in its metadata"):
        audio.load_audio_vae(tmp_path / "plain.safetensors")


def test_wrong_audio_vaes_and_latents_are_refused_in_a_sentence(models, video_vae, audio_vae):
    with pytest.raises(ValueError, match=r"is the Wan2[.]2 video VAE .* the LTX audio VAE with its vocoder is needed"):
        audio.load_audio_vae(models["video_vae"])
    wrong = [
        (video_vae, "it is the Wan2.2 video VAE"),
        (comfy.sd.VAE(load_file(models["tae"])), "it is a small preview VAE of 48 latent channels"),
        (comfy.sd.VAE({"pixel_space_vae": torch.tensor(1.0)}), "it is a PixelspaceConversionVAE of 3 latent channels"),
        (comfy.sd.CLIP(no_init=True), "it is a text encoder"),
        (None, "it is empty: the file it was loaded from has none"),
    ]
    for vae, name in wrong:
        with pytest.raises(ValueError, match=f"not the LTX audio VAE .{re.escape(name)}.: connect the output of NavaL"):
            audio.decode_audio(vae, noise(1, 8, 4, 16))
        with pytest.raises(ValueError, match=re.escape(name)):
            audio.encode_audio(vae, {"waveform": noise(1, 2, 16000), "sample_rate": 16000})
    with pytest.raises(ValueError, match="not a NAVA audio latent"):
        audio.decode_audio(audio_vae, noise(1, 4, 128))


def test_stock_ltx_audio_nodes_take_it(audio_vae):
    nodes = pytest.importorskip("comfy_extras.nodes_lt_audio")
    latent = comfy.nested_tensor.NestedTensor((noise(1, 48, 1, 2, 2), noise(1, 8, 6, 16)))
    (stock,) = nodes.LTXVAudioVAEDecode.execute({"samples": latent}, audio_vae).result
    assert torch.equal(stock["waveform"], audio.decode_audio(audio_vae, noise(1, 8, 6, 16))["waveform"])
    assert stock["sample_rate"] == 48000


def test_the_audio_vae_stays_on_the_cpu_when_asked(models):
    on_cpu = audio.load_audio_vae(models["audio_vae"], device="cpu")
    assert shared.vae_patcher(on_cpu).load_device == torch.device("cpu")
    assert audio.decode_audio(on_cpu, noise(1, 8, 2, 16))["waveform"].shape == (1, 2, 2400)


def test_channels_last_changes_nothing(models, audio_vae, monkeypatch):
    monkeypatch.setattr(comfy.model_management.args, "force_channels_last", True)
    vae = audio.load_audio_vae(models["audio_vae"])
    latent = noise(1, 8, 10, 16)
    sound = audio.decode_audio(vae, latent)
    assert torch.equal(sound["waveform"], audio.decode_audio(audio_vae, latent)["waveform"])
    assert torch.equal(audio.encode_audio(vae, sound), audio.encode_audio(audio_vae, sound))
