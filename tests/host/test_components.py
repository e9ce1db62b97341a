"""The host adapters for text encoder and VAEs, in process, on ComfyUI's real classes with small models."""

import logging
import types

import comfy_host
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

comfy_host.import_comfyui()

import comfy.latent_formats  # noqa: E402
import comfy.ldm.lightricks.vae.audio_vae  # noqa: E402
import comfy.ldm.wan.vae2_2  # noqa: E402
import comfy.nested_tensor  # noqa: E402
import comfy.sd  # noqa: E402

text_encoder = comfy_host.pack_module("nodes.host.text_encoder")
vae = comfy_host.pack_module("nodes.host.vae")
demo = comfy_host.pack_module("nava_core.demo")

PROMPT = "A woman on a pier (wind:1.3). She says: <S>The storm has passed, we can go.<E> 海浪拍打岩石 🙂"


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return demo.make_small_models(tmp_path_factory.mktemp("models"))


@pytest.fixture(autouse=True)
def _as_in_a_node():
    with torch.inference_mode():  # ComfyUI runs every node in it
        yield


@pytest.fixture(scope="module")
def clip(models):
    return text_encoder.load_text_encoder(models["text_encoder"])


@pytest.fixture(scope="module")
def video_vae(models):
    return vae.load_video_vae(models["video_vae"])


@pytest.fixture(scope="module")
def audio_vae(models):
    return vae.load_audio_vae(models["audio_vae"])


def noise(*shape, seed=1):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# --- text encoder ------------------------------------------------------------------------------------------------


def reference_encoder(tensors):
    """transformers' umt5 with the same weights in fp32: an independent implementation."""
    transformers = pytest.importorskip("transformers")
    vocabulary, width = tensors["shared.weight"].shape
    config = transformers.UMT5Config(
        vocab_size=vocabulary, d_model=width, d_kv=16, d_ff=2 * width, num_layers=2, num_heads=4
    )
    model = transformers.UMT5EncoderModel(config).eval()
    missing, unexpected = model.load_state_dict({n: t.float() for n, t in tensors.items()}, strict=False)
    assert missing in ([], ["encoder.embed_tokens.weight"])  # tied to shared.weight
    assert not unexpected
    return model


def weights_of(path):
    return {name: tensor for name, tensor in load_file(path).items() if name != "spiece_model"}


def test_context_equals_transformers_umt5_also_when_that_is_padded_and_masked(models, clip):
    ids = text_encoder.prompt_tokenizer(clip)(PROMPT).ids
    context = text_encoder.encode_ids(clip, ids)
    assert context.shape == (1, len(ids), demo.TEXT_DIM)
    assert context.dtype is torch.float32
    reference = reference_encoder(weights_of(models["text_encoder"]))
    plain = reference(torch.tensor([ids])).last_hidden_state
    assert (context - plain).abs().max() < 1e-4
    padded = torch.tensor([ids + [0] * (512 - len(ids))])
    mask = (torch.arange(512) < len(ids)).long().unsqueeze(0)
    masked = reference(padded, attention_mask=mask).last_hidden_state[:, : len(ids)]
    assert (context - masked).abs().max() < 1e-4


def test_the_scaled_fp8_file_equals_its_dequantised_weights(models, clip):
    fp8 = text_encoder.load_text_encoder(models["text_encoder_fp8"])
    ids = text_encoder.prompt_tokenizer(fp8)(PROMPT).ids
    context = text_encoder.encode_ids(fp8, ids)
    tensors = weights_of(models["text_encoder_fp8"])
    dequantised = {
        name: tensor.float() * tensors.get(name.replace(".weight", ".scale_weight"), torch.ones(()))
        for name, tensor in tensors.items()
        if name.endswith(".weight")
    }
    reference = reference_encoder(dequantised)(torch.tensor([ids])).last_hidden_state
    assert (context - reference).abs().max() < 1e-4
    error = (context - text_encoder.encode_ids(clip, ids)).square().mean().sqrt()
    assert 1e-3 < error < 0.1  # it is fp8, and it is the same encoder
    assert fp8.patcher.model_size() < 0.8 * clip.patcher.model_size()  # still fp8 in memory


def test_the_makers_file_takes_its_tokenizer_from_a_folder(models, clip, tmp_path):
    makers = text_encoder.load_text_encoder(models["text_encoder_pth"], tokenizer_folder=models["tokenizer"])
    tokens = text_encoder.prompt_tokenizer(makers)(PROMPT)
    assert tokens.ids == text_encoder.prompt_tokenizer(clip)(PROMPT).ids
    context = text_encoder.encode_ids(makers, tokens.ids)
    tensors = {n: t.bfloat16() for n, t in weights_of(models["text_encoder"]).items()}
    reference = reference_encoder(tensors)(torch.tensor([tokens.ids])).last_hidden_state
    assert (context - reference).abs().max() < 1e-4

    alone = tmp_path / "encoder.pth"
    alone.write_bytes(models["text_encoder_pth"].read_bytes())
    with pytest.raises(FileNotFoundError, match=r"encoder\.pth needs a tokenizer, and it has none inside"):
        text_encoder.load_text_encoder(alone)
    with pytest.raises(FileNotFoundError, match="there is none in"):
        text_encoder.load_text_encoder(alone, tokenizer_folder=tmp_path)
    beside = tmp_path / "google" / "umt5-xxl"
    beside.mkdir(parents=True)
    (beside / "spiece.model").write_bytes((models["tokenizer"] / "spiece.model").read_bytes())
    found = text_encoder.load_text_encoder(alone)
    assert text_encoder.prompt_tokenizer(found)(PROMPT).ids == tokens.ids
    assert torch.equal(found.get_sd()["spiece_model"], load_file(models["text_encoder"])["spiece_model"])
    # In a models folder, where the tokenizer lies beside the file in a folder of its own:
    placed = demo.place_in_comfyui(models, tmp_path / "models")
    found = text_encoder.load_text_encoder(placed["text_encoder_pth"])
    assert text_encoder.prompt_tokenizer(found)(PROMPT).ids == tokens.ids


def test_stock_nodes_encode_without_weighting_and_with_sentinels(clip):
    tokens = clip.tokenize(PROMPT)
    ours = text_encoder.prompt_tokenizer(clip)(PROMPT)
    assert tokens == text_encoder.host_tokens(ours.ids)
    assert ours.timbre_positions[0] > 0
    stock = clip.encode_from_tokens_scheduled(tokens)
    mine = text_encoder.encode_conditioning(clip, ours.ids, {"nava_timbre": "kept"})
    assert torch.equal(stock[0][0], mine[0][0])
    assert torch.equal(mine[0][0], text_encoder.encode_ids(clip, ours.ids))
    assert mine[0][1]["nava_timbre"] == "kept"
    assert clip.clone().tokenize("(x:1.2)", return_word_ids=True)["umt5xxl"][0][0][1:] == (1.0, 1)


def test_the_clip_is_the_hosts_own_and_can_be_loaded_again(models, clip):
    assert isinstance(clip, comfy.sd.CLIP)
    load, arguments = clip.patcher.cached_patcher_init
    again = load(*arguments, disable_dynamic=True)
    assert set(again.model_state_dict()) == set(clip.patcher.model_state_dict())
    on_cpu = text_encoder.load_text_encoder(models["text_encoder"], device="cpu")
    assert on_cpu.patcher.load_device == on_cpu.patcher.offload_device == torch.device("cpu")


def test_a_stock_clip_gets_the_cores_tokenizer_and_a_foreign_one_is_refused(models, clip):
    spiece = load_file(models["text_encoder"])["spiece_model"]
    stock = comfy.sd.CLIP(no_init=True)
    stock.cond_stage_model = clip.cond_stage_model
    stock.tokenizer = types.SimpleNamespace(clip_umt5xxl=object(), state_dict=lambda: {"spiece_model": spiece})
    assert text_encoder.prompt_tokenizer(stock)(PROMPT) == text_encoder.prompt_tokenizer(clip)(PROMPT)
    stock.tokenizer = types.SimpleNamespace(clip_l=object())
    with pytest.raises(ValueError, match="not a umt5 text encoder"):
        text_encoder.prompt_tokenizer(stock)


def test_wrong_and_incomplete_text_encoders_are_refused_in_a_sentence(models, tmp_path):
    with pytest.raises(ValueError, match=r"is the Wan2[.]2 video VAE .* a umt5 text encoder is needed"):
        text_encoder.load_text_encoder(models["video_vae"])
    tensors = load_file(models["text_encoder"])
    del tensors["encoder.final_layer_norm.weight"]
    save_file(tensors, tmp_path / "cut.safetensors")
    with pytest.raises(ValueError, match=r"cut\.safetensors: .*incomplete: encoder\.final_layer_norm\.weight"):
        text_encoder.load_text_encoder(tmp_path / "cut.safetensors")
    tensors = load_file(models["text_encoder"])
    tensors["shared.weight"] = tensors["shared.weight"][:640].contiguous()
    save_file(tensors, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="they belong to different models"):
        text_encoder.load_text_encoder(tmp_path / "other.safetensors")


# --- video VAE ---------------------------------------------------------------------------------------------------


def test_every_tensor_of_the_video_vae_is_used_and_none_is_missing(models, video_vae, caplog):
    assert set(video_vae.first_stage_model.state_dict()) == set(load_file(models["video_vae"]))
    with caplog.at_level(logging.WARNING):
        vae.load_video_vae(models["video_vae"], device="cpu")
    assert not [record for record in caplog.records if "Missing" in record.message]


def test_video_latents_are_in_the_vaes_own_space(video_vae):
    """The VAE applies no statistics: they are in the latent format, and undone there before decoding."""
    latent = comfy.latent_formats.Wan22().process_out(noise(1, 48, 3, 4, 6))
    images = vae.decode_video(video_vae, latent)
    raw = video_vae.first_stage_model.decode(latent.to(video_vae.vae_dtype))
    expected = ((raw + 1) / 2).clamp(0, 1).movedim(1, -1)[0].float()
    assert images.shape == (9, 64, 96, 3)
    assert torch.equal(images, expected)
    assert images.std() > 0.02
    assert (images[0] - images[4]).abs().mean() > 0.02


def test_a_batch_of_video_latents_becomes_one_row_of_frames(video_vae):
    latent = noise(2, 48, 2, 2, 3)
    images = vae.decode_video(video_vae, latent)
    assert images.shape == (10, 32, 48, 3)
    assert torch.allclose(images[5:], vae.decode_video(video_vae, latent[1:]), atol=1e-5)


def test_tiled_decoding(video_vae):
    latent = noise(1, 48, 3, 8, 8)
    whole = vae.decode_video(video_vae, latent)
    one_tile = vae.decode_video(video_vae, latent, tile_size=512)
    assert torch.allclose(one_tile, whole, atol=1e-5)
    tiles = vae.decode_video(video_vae, latent, tile_size=64, overlap=16, temporal_size=8)
    assert tiles.shape == whole.shape
    assert torch.isfinite(tiles).all()
    with pytest.raises(ValueError, match="Tiles of 16 pixels are too small"):
        vae.decode_video(video_vae, latent, tile_size=16)


def test_frames_are_encoded_to_latents_and_one_image_to_one_latent_frame(video_vae):
    clip_of_five = torch.rand(5, 48, 64, 3, generator=torch.Generator().manual_seed(2))
    latent = vae.encode_video(video_vae, clip_of_five)
    assert latent.shape == (1, 48, 2, 3, 4)
    first = vae.encode_video(video_vae, clip_of_five[:1])
    assert torch.allclose(first, latent[:, :, :1], atol=1e-5)  # causal: what follows changes nothing
    with_alpha = torch.cat([clip_of_five, torch.ones(5, 48, 64, 1)], dim=-1)
    assert torch.equal(vae.encode_video(video_vae, with_alpha), latent)
    with pytest.raises(ValueError, match=r"shape \(frames, height, width, 3\)"):
        vae.encode_video(video_vae, clip_of_five[0])
    with pytest.raises(ValueError, match="at least 16 x 16"):
        vae.encode_video(video_vae, clip_of_five[:, :8])


def test_the_released_width_goes_through_the_hosts_loader(models, monkeypatch):
    """Its 2.8 GB are not made here: the tensors are laid out without memory and the call is caught."""
    with torch.device("meta"):
        released = comfy.ldm.wan.vae2_2.WanVAE(
            dim=160, dec_dim=256, z_dim=48, num_res_blocks=2, temperal_downsample=[False, True, True]
        ).state_dict()
    calls = []
    monkeypatch.setattr(vae.comfy.utils, "load_torch_file", lambda *_, **__: (dict(released), {"k": "v"}))
    monkeypatch.setattr(vae.comfy.sd, "VAE", lambda **given: calls.append(given))
    vae.load_video_vae(models["video_vae"], device="cpu")
    assert set(calls[0]["sd"]) == set(released)
    assert calls[0]["device"] == torch.device("cpu")


def test_wrong_video_vaes_and_latents_are_refused_in_a_sentence(models, video_vae, audio_vae, tmp_path):
    with pytest.raises(ValueError, match=r"is the LTX audio VAE .* the Wan2[.]2 video VAE is needed"):
        vae.load_video_vae(models["audio_vae"])
    tensors = load_file(models["video_vae"])
    del tensors["encoder.conv1.weight"]
    save_file(tensors, tmp_path / "cut.safetensors")
    with pytest.raises(ValueError, match=r"cut\.safetensors is incomplete"):
        vae.load_video_vae(tmp_path / "cut.safetensors")
    with pytest.raises(ValueError, match=r"not the Wan2[.]2 video VAE .it is the LTX audio VAE"):
        vae.decode_video(audio_vae, noise(1, 48, 1, 2, 2))
    with pytest.raises(ValueError, match="not a NAVA video latent"):
        vae.decode_video(video_vae, noise(1, 16, 1, 2, 2))


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


# --- audio VAE ---------------------------------------------------------------------------------------------------


def test_audio_latents_are_normalised_and_the_vae_undoes_it(models, audio_vae):
    """(x - mean) / std over the 128 values of a step, channel-major, by the statistics in the file."""
    latent = noise(1, 8, 26, 16)
    stats = {n: t.float() for n, t in load_file(models["audio_vae"]).items() if "per_channel_statistics" in n}
    mean, std = (stats[f"audio_vae.per_channel_statistics.{kind}-of-means"].view(8, 1, 16) for kind in ("mean", "std"))
    network = audio_vae.autoencoder
    mel = network.decode(latent * std + mean, target_shape=(1, 2, 4 * 26 - 3, 64))
    expected = audio_vae.run_vocoder(mel)
    audio = vae.decode_audio(audio_vae, latent)
    assert torch.allclose(audio["waveform"], expected, atol=1e-5)

    encoded = vae.encode_audio(audio_vae, audio)
    mel = audio_vae.preprocessor.waveform_to_mel(audio["waveform"], 48000, device="cpu")
    raw = network.encode(mel).chunk(2, dim=1)[0]
    assert torch.allclose(encoded * std + mean, raw, atol=1e-5)


def test_sound_keeps_48_khz_and_is_neither_silent_nor_clipped(audio_vae):
    audio = vae.decode_audio(audio_vae, noise(2, 8, 26, 16))
    waveform = audio["waveform"]
    assert audio["sample_rate"] == 48000
    assert waveform.shape == (2, 2, (4 * 26 - 3) * 480)
    assert waveform.dtype is torch.float32
    assert waveform.square().mean().sqrt() > 1e-2
    assert (waveform.abs() > 0.999).float().mean() < 0.01
    assert (waveform[0] - waveform[1]).abs().mean() > 1e-3
    assert (waveform[:, 0] - waveform[:, 1]).abs().mean() > 1e-3


def test_audio_of_any_channel_count_and_rate_is_encoded(audio_vae):
    mono = 0.1 * noise(1, 1, 16000)
    latent = vae.encode_audio(audio_vae, {"waveform": mono, "sample_rate": 16000})
    assert latent.shape == (1, 8, 26, 16)
    twice = vae.encode_audio(audio_vae, {"waveform": mono.expand(-1, 2, -1), "sample_rate": 16000})
    assert torch.equal(latent, twice)
    surround = vae.encode_audio(audio_vae, {"waveform": mono.expand(-1, 6, -1), "sample_rate": 16000})
    assert torch.allclose(latent, surround, atol=1e-5)
    fast = vae.encode_audio(audio_vae, {"waveform": 0.1 * noise(1, 2, 44100), "sample_rate": 44100})
    assert fast.shape == latent.shape
    with pytest.raises(ValueError, match=r"at least 0\.1 s"):
        vae.encode_audio(audio_vae, {"waveform": mono[..., :100], "sample_rate": 16000})


def test_every_tensor_of_the_audio_vae_is_used_and_a_missing_one_is_an_error(models, audio_vae, tmp_path):
    given = load_file(models["audio_vae"])
    loaded = audio_vae.state_dict()
    assert set(loaded) == {name.replace("audio_vae.", "autoencoder.", 1) for name in given}
    assert {tensor.dtype for tensor in loaded.values()} == {torch.float32}
    with safe_open(models["audio_vae"], "pt") as file:
        metadata = file.metadata()
    del given["audio_vae.per_channel_statistics.std-of-means"]
    save_file(given, tmp_path / "cut.safetensors", metadata=metadata)
    with pytest.raises(ValueError, match=r"cut\.safetensors is incomplete: 1 tensors .*std-of-means"):
        vae.load_audio_vae(tmp_path / "cut.safetensors")
    save_file(given, tmp_path / "plain.safetensors")
    with pytest.raises(ValueError, match="no configuration in its metadata"):
        vae.load_audio_vae(tmp_path / "plain.safetensors")


def test_wrong_audio_vaes_and_latents_are_refused_in_a_sentence(models, video_vae, audio_vae):
    with pytest.raises(ValueError, match=r"is the Wan2[.]2 video VAE .* the LTX audio VAE with its vocoder is needed"):
        vae.load_audio_vae(models["video_vae"])
    with pytest.raises(ValueError, match=r"not the LTX audio VAE .it is a WanVAE of 48 latent channels"):
        vae.decode_audio(video_vae, noise(1, 8, 4, 16))
    with pytest.raises(ValueError, match="not a NAVA audio latent"):
        vae.decode_audio(audio_vae, noise(1, 4, 128))


def test_stock_ltx_audio_nodes_take_it(audio_vae):
    nodes = pytest.importorskip("comfy_extras.nodes_lt_audio")
    latent = comfy.nested_tensor.NestedTensor((noise(1, 48, 1, 2, 2), noise(1, 8, 6, 16)))
    (stock,) = nodes.LTXVAudioVAEDecode.execute({"samples": latent}, audio_vae).result
    assert torch.equal(stock["waveform"], vae.decode_audio(audio_vae, noise(1, 8, 6, 16))["waveform"])
    assert stock["sample_rate"] == 48000


def test_the_audio_vae_stays_on_the_cpu_when_asked(models):
    on_cpu = vae.load_audio_vae(models["audio_vae"], device="cpu")
    assert on_cpu.device_manager.load_device == torch.device("cpu")
    assert vae.decode_audio(on_cpu, noise(1, 8, 2, 16))["waveform"].shape == (1, 2, 2400)


class LaterVAE:
    """A stand-in for later hosts' VAE around the audio network: channels last, fixed rate in, fp32 asked for."""

    audio_sample_rate = 44100
    made_with: dict

    def __init__(self, network):
        self.first_stage_model = network

    def decode(self, latent):
        return self.first_stage_model.decode(latent).movedim(1, -1)

    def encode(self, waveform):
        return self.first_stage_model.encode({"waveform": waveform.movedim(-1, 1), "sample_rate": 44100})


def test_later_hosts_vae_channels_last(audio_vae):
    later = LaterVAE(audio_vae)
    latent = noise(1, 8, 10, 16)
    expected = vae.decode_audio(audio_vae, latent)
    audio = vae.decode_audio(later, latent)
    assert torch.equal(audio["waveform"], expected["waveform"])
    assert audio["sample_rate"] == 48000
    encoded, direct = (vae.encode_audio(each, audio) for each in (later, audio_vae))
    assert encoded.shape == direct.shape
    assert (encoded - direct).abs().mean() < 0.05  # resampled twice instead of once


def test_later_hosts_get_renamed_tensors_in_fp32(models, audio_vae, monkeypatch):
    made = {}

    def build(**given):
        made.update(given)
        return LaterVAE(audio_vae)

    monkeypatch.delattr(comfy.ldm.lightricks.vae.audio_vae, "ModelDeviceManager")
    monkeypatch.setattr(vae.comfy.sd, "VAE", build)
    vae.load_audio_vae(models["audio_vae"])
    assert made["dtype"] is torch.float32
    assert "config" in made["metadata"]
    assert set(made["sd"]) == set(audio_vae.state_dict())
