"""The standalone components on small files of the real formats: what they compute and refuse, with nothing fetched."""

import gc
import json
import math
import socket
import weakref

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from benchmarks.live_memory import LiveMemory
from nava_core.checkpoint import FileKind, WrongFileError, describe_file, estimate_memory
from nava_core.components import (
    denormalize_video,
    load_audio_vae,
    load_problem,
    load_text_encoder,
    load_tokenizer,
    load_video_vae,
    memory_bytes,
    normalize_video,
)
from nava_core.components.audio_vae import vocoder_config
from nava_core.components.log_mel import log_mel, mel_filters
from nava_core.components.video_vae import diffusers_name, video_vae_config
from nava_core.decoding import DecodeForm
from nava_core.demo import AUDIO_CONFIG, TEXT_DIM, make_small_models
from nava_core.explain import TooLittleMemoryError, explain
from nava_core.timbre import resample as resampling
from nava_core.timbre.resample import find_torchaudio

diffusers = pytest.importorskip("diffusers", reason="the standalone VAEs need diffusers")
transformers = pytest.importorskip("transformers", reason="the standalone text encoder needs transformers")

PROMPT = "A woman on a pier says: <S>The storm has passed, we can go.<E> 海浪拍打岩石"


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return make_small_models(tmp_path_factory.mktemp("models"), preview_decoder=False)


@pytest.fixture(autouse=True)
def _offline(monkeypatch):
    def refuse(*_):
        raise AssertionError("a component asked for the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def noise(*shape, seed=1):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def metadata_of(path):
    with safe_open(path, "pt") as file:
        return file.metadata()


# --- latent space ------------------------------------------------------------------------------------------------


def test_the_video_latent_space_is_undone_and_has_a_number_for_each_channel():
    latent = noise(2, 48, 2, 3, 4)
    normalized = normalize_video(latent)
    assert torch.allclose(denormalize_video(normalized), latent, atol=1e-5)
    assert normalized[0, 0, 0, 0, 0] == pytest.approx((latent[0, 0, 0, 0, 0].item() + 0.2289) / 0.4765, abs=1e-5)
    assert normalized[1, 47, 1, 2, 3] == pytest.approx((latent[1, 47, 1, 2, 3].item() + 0.0667) / 0.7744, abs=1e-5)


# --- video VAE ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def video_vae(models):
    return load_video_vae(models["video_vae"])


def test_frames_to_latents_and_back(video_vae):
    frames = torch.rand(5, 32, 48, 3, generator=torch.Generator().manual_seed(2))
    latent = video_vae.encode(frames)
    assert latent.shape == (1, 48, 2, 2, 3)
    assert torch.allclose(video_vae.encode(frames[:1]), latent[:, :, :1], atol=1e-5)  # causal
    decoded = video_vae.decode(latent)
    assert decoded.shape == (5, 32, 48, 3)
    assert decoded.dtype is torch.float32
    assert 0 <= decoded.min() < decoded.max() <= 1
    assert decoded.std() > 0.02


def test_frames_are_encoded_in_fp32_arithmetic_and_decoded_in_the_type_asked_for(models, video_vae, tmp_path):
    """At bf16 the encoder's weights are rounded and its arithmetic is not, as in the makers' code."""
    frame = torch.rand(1, 32, 48, 3, generator=torch.Generator().manual_seed(2))
    half = load_video_vae(models["video_vae"], dtype=torch.bfloat16)
    rounded = {name: tensor.bfloat16().float() for name, tensor in load_file(models["video_vae"]).items()}
    save_file(rounded, tmp_path / "rounded.safetensors")
    latent = half.encode(frame)
    assert torch.equal(latent, load_video_vae(tmp_path / "rounded.safetensors").encode(frame))
    assert not torch.equal(latent, video_vae.encode(frame))
    assert {p.dtype for p in half.network.decoder.parameters()} == {torch.bfloat16}
    levels = (half.decode(latent) - video_vae.decode(latent)).abs().max() * 255
    assert 0.1 < levels < 12


def test_the_makers_pth_is_the_same_vae(models, video_vae, tmp_path):
    torch.save(load_file(models["video_vae"]), tmp_path / "Wan2.2_VAE.pth")
    latent = noise(1, 48, 2, 2, 3)
    assert torch.equal(load_video_vae(tmp_path / "Wan2.2_VAE.pth").decode(latent), video_vae.decode(latent))


def test_a_first_frame_after_a_tiled_decode_is_encoded_whole(video_vae):
    frame = torch.rand(1, 32, 1088, 3, generator=torch.Generator().manual_seed(3))  # wide enough for tiles
    before = video_vae.encode(frame)
    video_vae.decode(noise(1, 48, 1, 2, 36), DecodeForm(tile=256, overlap=64))
    assert torch.equal(video_vae.encode(frame), before)


def test_a_first_frame_without_enough_memory_is_refused_and_not_tiled(video_vae, monkeypatch):
    frame = torch.rand(1, 512, 512, 3, generator=torch.Generator().manual_seed(3))
    before = video_vae.encode(frame)

    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 5.91 GiB.")

    monkeypatch.setattr(video_vae.network, "tiled_encode", lambda *_, **__: pytest.fail("in tiles"))
    hook = video_vae.network.encoder.mid_block.register_forward_pre_hook(full)
    try:
        with pytest.raises(TooLittleMemoryError, match=r"encoding a first frame of 512x512, .* 0\.0 GB") as caught:
            video_vae.encode(frame)
    finally:
        hook.remove()
    assert "not done in tiles" in explain(caught.value)  # its own sentence, not the general one
    assert caught.value.__context__ is None  # which would keep the failed pass's tensors
    assert torch.equal(video_vae.encode(frame), before)


@pytest.mark.parametrize("side", ["encoder", "decoder"])
def test_a_pass_that_fails_leaves_no_frames_in_the_vae(video_vae, monkeypatch, side):
    remembered = []

    def fail(frames, *_):
        remembered.append(weakref.ref(frames.untyped_storage()))
        raise RuntimeError("out of memory")

    layer = getattr(video_vae.network, side).conv_out
    monkeypatch.setattr(layer, "forward", fail)  # the last layer: what is remembered is there
    run, data = (
        (video_vae.encode, torch.rand(5, 32, 32, 3)) if side == "encoder" else (video_vae.decode, noise(1, 48, 2, 2, 2))
    )
    with LiveMemory() as memory:
        memory.ignore(data)
        with pytest.raises(RuntimeError, match="out of memory"):
            run(data)
        gc.collect()
        assert memory.peak > 10_000
        assert memory.current == 0
    assert remembered[0]() is None


def test_dimensions_come_from_the_tensors(models):
    shapes = {name: tuple(tensor.shape) for name, tensor in load_file(models["video_vae"]).items()}
    config = video_vae_config(shapes, "file")
    assert (config["base_dim"], config["decoder_base_dim"], config["z_dim"]) == (8, 8, 48)
    assert config["dim_mult"] == [1, 2, 4, 4]
    assert (config["num_res_blocks"], config["temperal_downsample"]) == (2, [False, True, True])
    assert len({diffusers_name(name) for name in shapes}) == len(shapes)
    with pytest.raises(WrongFileError, match="a video VAE of 16 latent channels, but NAVA's has 48"):
        video_vae_config({**shapes, "decoder.conv1.weight": (32, 16, 3, 3, 3)}, "file")


def test_wrong_and_incomplete_video_vaes_are_refused_in_a_sentence(models, video_vae, tmp_path):
    with pytest.raises(WrongFileError, match=r"is the LTX audio VAE .* the Wan2[.]2 video VAE is needed"):
        load_video_vae(models["audio_vae"])
    tensors = load_file(models["video_vae"])
    save_file({n: t for n, t in tensors.items() if n != "conv2.bias"}, tmp_path / "cut.safetensors")
    with pytest.raises(WrongFileError, match=r"cut\.safetensors is incomplete: 1 tensor is missing .*post_quant"):
        load_video_vae(tmp_path / "cut.safetensors")
    save_file({**tensors, "conv2.bias": torch.zeros(47)}, tmp_path / "odd.safetensors")
    with pytest.raises(WrongFileError, match=r"post_quant_conv\.bias of shape \(47,\) should have the shape \(48,\)"):
        load_video_vae(tmp_path / "odd.safetensors")
    save_file({**tensors, "extra.weight": torch.zeros(1)}, tmp_path / "more.safetensors")
    with pytest.raises(WrongFileError, match="is not part of such a model"):
        load_video_vae(tmp_path / "more.safetensors")
    with pytest.raises(ValueError, match="multiples of 16"):
        video_vae.encode(torch.rand(1, 30, 32, 3))
    with pytest.raises(ValueError, match="A video latent is"):
        video_vae.decode(noise(1, 16, 1, 2, 2))


# --- audio VAE ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def audio_vae(models):
    return load_audio_vae(models["audio_vae"])


def test_audio_latents_are_denormalised_before_decoding(models, audio_vae):
    latent = noise(2, 8, 9, 16)
    stats = load_file(models["audio_vae"])
    mean, std = (stats[f"audio_vae.per_channel_statistics.{kind}-of-means"].float() for kind in ("mean", "std"))
    steps = latent.transpose(1, 2).flatten(2) * std + mean  # of 128 values, channel-major
    mel = audio_vae.decoder(steps.unflatten(2, (8, 16)).transpose(1, 2))
    waveform = audio_vae.decode(latent)
    assert torch.allclose(waveform, audio_vae.vocoder(mel), atol=1e-6)
    assert waveform.shape == (2, 2, (4 * 9 - 3) * 480)
    assert audio_vae.sample_rate == 48000
    assert waveform.abs().max() <= 1
    assert waveform.square().mean().sqrt() > 1e-2
    with pytest.raises(ValueError, match="An audio latent is"):
        audio_vae.decode(noise(1, 16, 9, 8))


def test_the_audio_vae_reads_its_encoder_only_when_it_is_to_encode(models):
    vae = load_audio_vae(models["audio_vae"])
    assert not any(name.startswith("encoder.") for name in vae.state_dict())
    vae.decode(noise(1, 8, 2, 16))
    assert vae.encoder is None
    latent = vae.encode(0.1 * noise(2, 16_000), 16_000, 26)
    assert latent.shape == (1, 8, 26, 16)
    assert {name for name in vae.state_dict() if name.startswith("encoder.")} == {
        name.removeprefix("audio_vae.") for name in load_file(models["audio_vae"]) if ".encoder." in name
    }
    assert not any(parameter.requires_grad for parameter in vae.parameters())


def test_encoding_hears_what_is_missing_as_silence_and_leaves_out_what_is_too_much(audio_vae):
    slow = 0.1 * noise(2, 16_000)
    filled = torch.cat([slow, 0 * slow], dim=1)
    assert torch.allclose(audio_vae.encode(slow, 16_000, 40), audio_vae.encode(filled, 16_000, 40), atol=1e-5)
    sound = 0.1 * noise(2, 48_000)
    latent = audio_vae.encode(sound, 48_000, 26)
    filled = torch.cat([sound, sound], dim=1)
    assert torch.allclose(audio_vae.encode(filled, 48_000, 10), latent[:, :, :10], atol=1e-5)
    assert torch.equal(audio_vae.encode(sound[:1], 48_000, 5), audio_vae.encode(sound[:1].expand(2, -1), 48_000, 5))
    louder = sound.clone()
    louder[:, 24_000:] *= 3  # 0.5 s: nothing before step 12 hears it, 32 ms of window apart
    changed = (audio_vae.encode(louder, 48_000, 26) - latent).abs().amax(dim=(0, 1, 3))
    assert changed[:12].max() < 1e-5
    assert changed[14:].min() > 1e-3
    for wrong in (sound[None], sound[:, :1000]):
        with pytest.raises(ValueError, match=r"Sound of at least 0[.]1 s"):
            audio_vae.encode(wrong, 48_000, 5)


def test_encoding_needs_no_torchaudio(audio_vae, monkeypatch):
    sound = 0.1 * noise(2, 44_100)
    latent = audio_vae.encode(sound, 44_100, 26)
    monkeypatch.setattr(resampling, "find_torchaudio", lambda: None)
    assert torch.allclose(audio_vae.encode(sound, 44_100, 26), latent, atol=1e-4)


def test_sound_goes_through_the_encoder_as_its_statistics_say(models, audio_vae):
    """Written out anew: mean of the encoder's Gaussian, (x - mean) / std over the 128 values of a step."""
    sound = 0.1 * noise(2, 16_000)
    latent = audio_vae.encode(sound, 16_000, 26)
    stats = load_file(models["audio_vae"])
    mean, std = (stats[f"audio_vae.per_channel_statistics.{kind}-of-means"].float() for kind in ("mean", "std"))
    mel = log_mel(sound, 16_000, 1024, 160, 64)
    assert mel.shape == (2, 101, 64)
    raw = audio_vae.encoder(mel[None])[:, :8].transpose(1, 2).flatten(2)
    assert torch.allclose(latent.transpose(1, 2).flatten(2), (raw - mean) / std, atol=1e-5)


def test_the_log_mel_spectrogram_is_slaneys():
    torchaudio = find_torchaudio()
    sound = 0.1 * noise(2, 8000)
    mel = log_mel(sound, 16_000, 1024, 160, 64)
    filters = mel_filters(16_000, 1024, 64)
    edges = (filters > 0).float()
    assert torch.allclose(filters.sum(dim=0)[20:] * 15.625, torch.ones(44), atol=0.03)  # of area 1
    assert (edges.sum(dim=1) <= 2).all()
    assert log_mel(0 * sound, 16_000, 1024, 160, 64).unique().tolist() == [pytest.approx(math.log(1e-5))]
    if torchaudio is not None:
        theirs = torchaudio.transforms.MelSpectrogram(
            16_000, 1024, hop_length=160, n_mels=64, power=1.0, mel_scale="slaney", norm="slaney"
        )
        assert torch.allclose(mel, theirs(sound).clamp(min=1e-5).log().transpose(-1, -2), atol=1e-4)


def test_the_vocoder_ends_in_a_clamp_where_its_configuration_says_no_tanh(audio_vae):
    low = AUDIO_CONFIG["vocoder"]["vocoder"]
    assert audio_vae.vocoder.vocoder.final_act_fn == "clamp"
    assert audio_vae.vocoder.bwe_generator.final_act_fn is None
    for change, final in (({"use_tanh_at_final": True}, "tanh"), ({"apply_final_activation": False}, None)):
        changed = {**AUDIO_CONFIG["vocoder"], "vocoder": {**low, **change}}
        assert vocoder_config(changed, "file")["final_act_fn"] == final
    with pytest.raises(WrongFileError, match=r"without bandwidth extension, which is LTX-2\.0's"):
        vocoder_config(low, "file")
    with pytest.raises(WrongFileError, match="a vocoder of another build"):
        vocoder_config({**AUDIO_CONFIG["vocoder"], "vocoder": {**low, "resblock": "1"}}, "file")


def test_audio_vaes_without_configuration_or_tensors_are_refused_in_a_sentence(models, tmp_path):
    tensors, config = load_file(models["audio_vae"]), metadata_of(models["audio_vae"])
    save_file(tensors, tmp_path / "bare.safetensors")
    with pytest.raises(WrongFileError, match=r"bare\.safetensors has no configuration in its metadata"):
        load_audio_vae(tmp_path / "bare.safetensors")
    save_file(tensors, tmp_path / "half.safetensors", metadata={"config": json.dumps({"vocoder": {}})})
    with pytest.raises(WrongFileError, match=r"half\.safetensors has no configuration"):
        load_audio_vae(tmp_path / "half.safetensors")
    for name in ("audio_vae.per_channel_statistics.mean-of-means", "vocoder.vocoder.conv_pre.bias"):
        save_file({n: t for n, t in tensors.items() if n != name}, tmp_path / "cut.safetensors", metadata=config)
        with pytest.raises(WrongFileError, match=r"cut\.safetensors is incomplete"):
            load_audio_vae(tmp_path / "cut.safetensors")
    with pytest.raises(WrongFileError, match=r"is the Wan2[.]2 video VAE .* the LTX audio VAE"):
        load_audio_vae(models["video_vae"])


@pytest.fixture
def merged(models, tmp_path):
    """A checkpoint as LTX's are released: a video-and-audio model with the audio VAE and other models beside it."""
    others = {
        "model.diffusion_model.adaln_single.emb.timestep_embedder.linear_1.bias": torch.zeros(4),
        "model.diffusion_model.audio_adaln_single.linear.weight": torch.zeros(4, 4),
        "vae.decoder.up_blocks.0.res_blocks.0.conv1.conv.weight": torch.zeros(4, 4, 1, 1, 1),
    }
    path = tmp_path / "ltx-2.3-22b-dev.safetensors"
    save_file({**others, **load_file(models["audio_vae"])}, path, metadata=metadata_of(models["audio_vae"]))
    return path


def test_the_audio_vae_is_read_out_of_a_checkpoint_of_several_models(models, audio_vae, merged):
    assert describe_file(merged).kind is FileKind.LTX_AV
    latent = noise(1, 8, 5, 16)
    assert torch.equal(load_audio_vae(merged).decode(latent), audio_vae.decode(latent))


def test_the_audio_vaes_memory_is_that_of_its_own_tensors_in_fp32(models, merged):
    for path in (models["audio_vae"], merged):
        assert memory_bytes(describe_file(path)) == 4 * sum(t.numel() for t in load_file(models["audio_vae"]).values())
    info = describe_file(models["text_encoder"])
    assert memory_bytes(info) == estimate_memory(info)


# --- headers -----------------------------------------------------------------------------------------------------


def test_every_small_model_and_a_checkpoint_with_the_audio_vae_would_load(models, merged):
    paths = [path for path in models.values() if path.is_file()]
    assert len(paths) >= 6
    assert {
        path.name: load_problem(describe_file(path)) for path in [*paths, merged] if load_problem(describe_file(path))
    } == {}


def rewritten(path, source, drop=(), config=None):
    """A copy of a safetensors file without some tensors, and with another configuration, a JSON value."""
    tensors = {name: tensor for name, tensor in load_file(source).items() if name not in drop}
    save_file(tensors, path, metadata=None if config is None else {"config": json.dumps(config)})
    return describe_file(path)


def test_what_the_header_shows_is_said_as_loading_says_it(models, merged, tmp_path):
    vocoder = AUDIO_CONFIG["vocoder"]
    cut_bwe = {key: value for key, value in vocoder["bwe"].items() if key != "n_fft"}
    cases = (
        (load_audio_vae, "audio_vae", {}, r"has no configuration in its metadata"),
        (
            load_audio_vae,
            "audio_vae",
            {"config": {**AUDIO_CONFIG, "vocoder": vocoder["vocoder"]}},
            r"which is LTX-2\.0's",
        ),
        (load_audio_vae, "audio_vae", {"config": {**AUDIO_CONFIG, "vocoder": {**vocoder, "bwe": cut_bwe}}}, "'n_fft'"),
        (load_audio_vae, "audio_vae", {"config": {**AUDIO_CONFIG, "audio_vae": {"model": []}}}, "of another form"),
        (
            load_video_vae,
            "video_vae",
            {"drop": ["decoder.head.0.gamma"]},
            "incomplete: the tensor decoder.head.0.gamma",
        ),
        (load_text_encoder, "text_encoder", {"drop": ["encoder.final_layer_norm.weight"]}, "incomplete: encoder.final"),
    )
    for load, role, change, sentence in cases:
        info = rewritten(tmp_path / f"{role}.safetensors", models[role], **change)
        with pytest.raises(WrongFileError, match=sentence) as refusal:
            load(info)
        assert load_problem(info) == str(refusal.value)
    bare = rewritten(tmp_path / "bare.safetensors", merged)
    assert "has no configuration in its metadata" in load_problem(bare)
    bias = next(name for name in load_file(models["backbone"]) if name.endswith("text_embedding.0.bias"))
    backbone = rewritten(tmp_path / "backbone.safetensors", models["backbone"], drop=[bias])
    assert "1 tensor is missing (text_embedding.0.bias)" in load_problem(backbone)
    save_file({"a.weight": torch.zeros(2)}, tmp_path / "other.safetensors")
    other = load_problem(describe_file(tmp_path / "other.safetensors"))
    assert "is a file of an unknown kind" in other
    assert "but a file of NAVA's" in other


# --- text encoder ------------------------------------------------------------------------------------------------


def plain_context(tensors, ids):
    """transformers' encoder in fp32 as it is."""
    vocabulary, width = tensors["shared.weight"].shape
    config = transformers.UMT5Config(
        vocab_size=vocabulary, d_model=width, d_kv=16, d_ff=2 * width, num_layers=2, num_heads=4
    )
    network = transformers.UMT5EncoderModel(config).eval()
    weights = {name: tensor.float() for name, tensor in tensors.items()}
    network.load_state_dict({**weights, "encoder.embed_tokens.weight": weights["shared.weight"]})
    with torch.no_grad():
        return network(torch.tensor([ids])).last_hidden_state


def test_contexts_equal_plain_transformers_with_the_weights_in_fp32(models):
    tensors = load_file(models["text_encoder"])
    tensors.pop("spiece_model")
    ids = load_tokenizer(models["text_encoder"])(PROMPT).ids
    encoder = load_text_encoder(models["text_encoder"])
    context = encoder.encode(ids)
    assert context.shape == (1, len(ids), TEXT_DIM)
    assert context.dtype is torch.float32
    assert (context - plain_context(tensors, ids)).abs().max() < 1e-5
    assert sum(p.nbytes for p in encoder.parameters()) < 1.05 * sum(t.nbytes for t in tensors.values())  # still fp16


@pytest.mark.parametrize("suffix", ["scale_weight", "weight_scale"])
def test_scaled_fp8_equals_its_dequantised_weights_and_stays_fp8_in_memory(models, tmp_path, suffix):
    tensors = load_file(models["text_encoder_fp8"])
    path = tmp_path / "fp8.safetensors"
    save_file({n.replace("scale_weight", suffix): t for n, t in tensors.items()}, path)
    ids = load_tokenizer(path)(PROMPT).ids
    encoder = load_text_encoder(path)
    dequantised = {
        name: tensor.float() * tensors.get(name.replace(".weight", ".scale_weight"), torch.ones(()))
        for name, tensor in tensors.items()
        if name.endswith(".weight")
    }
    assert (encoder.encode(ids) - plain_context(dequantised, ids)).abs().max() < 1e-5
    assert any(p.dtype is torch.float8_e4m3fn for p in encoder.parameters())


def test_the_makers_file_takes_its_tokenizer_from_a_folder_or_beside_it(models, tmp_path):
    makers = models["text_encoder_pth"]
    ids = load_tokenizer(models["text_encoder"])(PROMPT).ids
    assert load_tokenizer(makers, models["tokenizer"])(PROMPT).ids == ids
    assert load_tokenizer(makers)(PROMPT).ids == ids  # "umt5-tiny" lies beside it
    tensors = {n: t.bfloat16() for n, t in load_file(models["text_encoder"]).items() if n != "spiece_model"}
    assert (load_text_encoder(makers).encode(ids) - plain_context(tensors, ids)).abs().max() < 1e-5
    alone = tmp_path / "encoder.pth"
    alone.write_bytes(makers.read_bytes())
    with pytest.raises(FileNotFoundError, match=r"encoder\.pth needs a tokenizer"):
        load_tokenizer(alone)


def test_wrong_and_incomplete_text_encoders_are_refused_in_a_sentence(models, tmp_path):
    with pytest.raises(WrongFileError, match="a umt5 text encoder is needed here"):
        load_text_encoder(models["video_vae"])
    tensors = load_file(models["text_encoder"])
    del tensors["encoder.final_layer_norm.weight"]
    save_file(tensors, tmp_path / "cut.safetensors")
    with pytest.raises(WrongFileError, match=r"cut\.safetensors: .*incomplete: encoder\.final_layer_norm\.weight"):
        load_text_encoder(tmp_path / "cut.safetensors")
    with pytest.raises(ValueError, match="the tokenizer does not fit"):
        load_text_encoder(models["text_encoder"]).encode([1, 10**6])


# --- packages ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("load", "role", "package"),
    [
        (load_video_vae, "video_vae", "diffusers"),
        (load_audio_vae, "audio_vae", "diffusers"),
        (load_text_encoder, "text_encoder", "transformers"),
    ],
)
def test_a_missing_package_is_one_sentence_that_names_the_extra(models, monkeypatch, load, role, package):
    monkeypatch.setitem(__import__("sys").modules, package, None)
    with pytest.raises(RuntimeError, match=rf"needs the package {package}: install .* extra \[standalone\]"):
        load(models[role])


def test_diffusers_too_old_for_the_vocoder_is_one_sentence(models, monkeypatch):
    import diffusers.pipelines.ltx2 as ltx2

    class Old:
        __name__ = ltx2.__name__

    for old in (Old(), None):  # without the class, and without the pipeline
        monkeypatch.setitem(__import__("sys").modules, "diffusers.pipelines.ltx2", old)
        with pytest.raises(RuntimeError, match=r"needs diffusers 0\.38 or later"):
            load_audio_vae(models["audio_vae"])
