"""Small models made on the spot: the real formats and names, recognised, loadable, alive and reproducible."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from nava_core.checkpoint import FileKind, describe_file, load_backbone
from nava_core.demo import COMFY_FOLDERS, FILES, TEXT_DIM, make_small_models, place_in_comfyui
from nava_core.prompt import PromptTokenizer
from nava_core.prompt.umt5 import UMT5Config, from_makers_names, has_makers_names, to_makers_names
from nava_core.timbre import encode_timbre, load_redimnet

PROMPT = "A woman on a pier. She says: <S>The storm has passed.<E> 海浪拍打岩石。"
KINDS = {
    "backbone": FileKind.NAVA_BACKBONE,
    "video_vae": FileKind.WAN22_VAE,
    "audio_vae": FileKind.LTX_AUDIO_VAE,
    "text_encoder": FileKind.UMT5,
    "text_encoder_fp8": FileKind.UMT5,
    "text_encoder_pth": FileKind.UMT5_ORIGINAL,
    "speaker_encoder": FileKind.REDIMNET,
    "tae": FileKind.TAE,
}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return make_small_models(tmp_path_factory.mktemp("models"), seed=0)


def tensors_of(path):
    if path.suffix == ".safetensors":
        return load_file(path)
    loaded = torch.load(path, weights_only=True)
    return loaded.get("state_dict", loaded)


def test_every_role_is_written_and_recognised_by_content(models):
    assert list(models) == list(FILES)
    for role, kind in KINDS.items():
        assert describe_file(models[role]).kind is kind, role
    sizes = {role: path.stat().st_size for role, path in models.items() if path.is_file()}
    assert sum(sizes.values()) - sizes["tae"] < 15e6
    assert sizes["tae"] < 24e6


def test_names_and_shapes_are_those_of_the_real_files(models, golden):
    reference = load_file(golden / "backbone_tiny.safetensors")
    assert set(tensors_of(models["backbone"])) == set(reference)
    published = torch.load(golden / "redimnet_small.pt", weights_only=True)
    ours = tensors_of(models["speaker_encoder"])
    assert {n: t.shape for n, t in ours.items()} == {n: t.shape for n, t in published["state_dict"].items()}
    with safe_open(models["audio_vae"], "pt") as file:
        assert set(json.loads(file.metadata()["config"])) == {"audio_vae", "vocoder"}


def test_the_same_seed_gives_the_same_weights_and_another_seed_others(models, tmp_path):
    again = make_small_models(tmp_path / "again", seed=0, preview_decoder=False)
    other = make_small_models(tmp_path / "other", seed=1, preview_decoder=False)
    assert "tae" not in again
    for role in KINDS.keys() - {"tae"}:
        first, second, third = (tensors_of(paths[role]) for paths in (models, again, other))
        same = [torch.equal(first[name].float(), second[name].float()) for name in first]
        assert all(same), role
        assert any(not torch.equal(first[name].float(), third[name].float()) for name in first), role
    assert again["tokenizer"].joinpath("spiece.model").read_bytes() == (
        models["tokenizer"].joinpath("spiece.model").read_bytes()
    )


def test_the_tokenizer_inside_the_encoder_is_the_one_in_the_folder(models):
    inside = PromptTokenizer(tensors_of(models["text_encoder"])["spiece_model"])
    folder = PromptTokenizer.from_folder(models["tokenizer"])
    assert inside(PROMPT) == folder(PROMPT)
    tokens = inside(PROMPT)
    assert tokens.ids[tokens.timbre_positions[0]] == inside.sentinel_id == inside.vocab_size - 1 - 2
    rows = tensors_of(models["text_encoder"])["shared.weight"].shape[0]
    assert inside.vocab_size <= rows == 128 * -(-inside.vocab_size // 128)


def test_the_makers_names_are_a_renaming_of_transformers_names(models):
    plain = {n: t for n, t in tensors_of(models["text_encoder"]).items() if n != "spiece_model"}
    makers = tensors_of(models["text_encoder_pth"])
    assert has_makers_names(makers)
    assert not has_makers_names(plain)
    back = from_makers_names(makers)
    assert all(torch.equal(back[name], tensor.bfloat16()) for name, tensor in plain.items())
    assert len(back) == len(plain)
    assert set(to_makers_names(back)) == set(makers)
    for theirs, ours in (("gate.0", "wi_0"), ("fc1", "wi_1"), ("fc2", "wo")):
        name = f"encoder.block.1.layer.1.DenseReluDense.{ours}.weight"
        assert torch.equal(makers[f"blocks.1.ffn.{theirs}.weight"], plain[name].bfloat16())
    with pytest.raises(ValueError, match=r"blocks\.0\.attn\.bias"):
        from_makers_names({"blocks.0.attn.bias": 0})


def test_umt5_dimensions_are_read_off_the_tensors(models):
    shapes = {n: tuple(t.shape) for n, t in tensors_of(models["text_encoder"]).items()}
    config = UMT5Config.from_shapes(shapes)
    assert (config.d_model, config.d_kv, config.d_ff, config.num_layers, config.num_heads) == (TEXT_DIM, 16, 128, 2, 4)
    del shapes["encoder.block.1.layer.1.DenseReluDense.wo.weight"]
    with pytest.raises(ValueError, match=r"incomplete: encoder\.block\.1.*wo\.weight is missing"):
        UMT5Config.from_shapes(shapes)
    with pytest.raises(ValueError, match="not a umt5 text encoder"):
        UMT5Config.from_shapes({"shared.weight": (10, 4)})
    released = UMT5Config()
    assert UMT5Config.from_shapes(released.tensor_shapes()) == released


def test_the_fp8_encoder_is_the_fp16_one_within_fp8_rounding(models):
    plain, scaled = tensors_of(models["text_encoder"]), tensors_of(models["text_encoder_fp8"])
    assert scaled["scaled_fp8"].numel() == 0
    halved = [name for name, tensor in scaled.items() if tensor.dtype is torch.float8_e4m3fn and tensor.numel()]
    assert len(halved) == 2 * 7
    for name in halved:
        back = scaled[name].float() * scaled[name.replace(".weight", ".scale_weight")]
        error = (back - plain[name].float()).abs()
        assert scaled[name].float().abs().max() == 448  # the whole range of the format is used
        assert (error <= back.abs() / 16 + 2e-3 * back.abs().max()).all()


@torch.inference_mode()
def test_the_backbone_answers_to_text_voice_and_time(models):
    model = load_backbone(models["backbone"])
    generator = torch.Generator().manual_seed(3)
    video = torch.randn(1, 48, 2, 4, 4, generator=generator)
    audio = torch.randn(1, 10, 128, generator=generator)
    contexts = torch.randn(2, 1, 20, TEXT_DIM, generator=generator)
    voices = torch.nn.functional.normalize(torch.randn(2, 1, 1, 192, generator=generator), dim=-1)
    at = torch.tensor([[5]])

    def run(context, voice, t=500.0):
        return model(video, audio, torch.tensor([t]), context, timbre=voice, timbre_positions=at)

    base = run(contexts[0], voices[0])
    for other in (run(contexts[1], voices[0]), run(contexts[0], voices[1]), run(contexts[0], voices[0], 100.0)):
        for mine, theirs in zip(base, other, strict=True):
            assert (mine - theirs).abs().max() > 1e-3
    for velocity in base:
        assert torch.isfinite(velocity).all()
        assert 0.2 < velocity.std() < 5


def test_the_speaker_encoder_tells_sounds_apart(models):
    model = load_redimnet(models["speaker_encoder"])
    time = torch.arange(24000) / 16000
    low, high = (torch.sin(2 * torch.pi * f * time).unsqueeze(0) for f in (120.0, 900.0))
    one, two = (encode_timbre(model, wave, 16000) for wave in (low, high))
    assert one.shape == (1, 192)
    assert torch.isfinite(one).all()
    assert (one - two).abs().max() > 1e-2


def test_models_are_placed_where_comfyui_looks(models, tmp_path):
    placed = place_in_comfyui(models, tmp_path)
    for role, path in placed.items():
        assert path == tmp_path / COMFY_FOLDERS[role] / FILES[role]
        assert path.exists()
    placed = place_in_comfyui(models, tmp_path)  # again, over what is there
    assert placed["backbone"].read_bytes() == models["backbone"].read_bytes()
    assert (placed["tokenizer"] / "spiece.model").is_file()
