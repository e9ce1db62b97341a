"""The host adapter of the text encoder, in process, on ComfyUI's real classes with small models."""

import types

import comfy_host
import pytest
import torch
from safetensors.torch import load_file, save_file

comfy_host.import_comfyui()

import comfy.sd  # noqa: E402

text_encoder = comfy_host.pack_module("nodes.host.text_encoder")
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
