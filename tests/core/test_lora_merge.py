"""LoRAs merged into the backbone as it is loaded: the sum written by hand, float8, and files that do not fit."""

import json
import zlib

import pytest
import torch
from safetensors.torch import save_file

from nava_core import LoraMerge, load_backbone
from nava_core.backbone.quantized import dequantise_rows, quantise_rows_stochastically
from nava_core.checkpoint import WrongFileError
from nava_core.demo import make_small_models
from nava_core.lora_merge import lora_fingerprint

ATTENTION, FFN, NORM = "double_blocks.0.self_attn.q", "single_blocks.1.ffn.2", "single_blocks.0.norm3"
PATCHES = "patch_embedding"  # a convolution
NAMES = ("lora_up.weight", "lora_down.weight")


@pytest.fixture(scope="module")
def backbone(tmp_path_factory):
    return make_small_models(tmp_path_factory.mktemp("models"), preview_decoder=False)["backbone"]


@pytest.fixture(scope="module")
def weights(backbone):
    return load_backbone(backbone, dtype=torch.float32).state_dict()


def matrices(weight, rank=4, seed=1):
    """(up, down) of a delta of a weight's shape."""
    generator = torch.Generator().manual_seed(seed)
    up = torch.randn(len(weight), rank, generator=generator) * 0.1
    return up, torch.randn(rank, *weight.shape[1:], generator=generator)


def pair(layer, weight, *names, alpha=None, **options):
    up, down = matrices(weight, **options)
    if weight.ndim > 2:
        up = up.reshape(*up.shape, *[1] * (weight.ndim - 2))
    tensors = {f"{layer}.{names[0]}": up, f"{layer}.{names[1]}": down}
    return tensors if alpha is None else {**tensors, f"{layer}.alpha": torch.tensor(alpha)}


def written(tmp_path, tensors, name="lora.safetensors"):
    save_file(tensors, tmp_path / name)
    return tmp_path / name


def merged(backbone, *loras, **options):
    with LoraMerge(loras, backbone).changes() as changes:
        return load_backbone(backbone, changes=changes, **options).state_dict()


def delta(weight, **options):
    up, down = matrices(weight, **options)
    return (up @ down.flatten(1)).reshape(weight.shape)


def changed(state, reference):
    return {name for name, weight in state.items() if not torch.equal(weight, reference[name].to(weight.dtype))}


def test_the_sum_by_hand_for_every_form(backbone, weights, tmp_path):
    q, ffn, patch = (weights[f"{layer}.weight"] for layer in (ATTENTION, FFN, PATCHES))
    norm, bias = weights[f"{NORM}.weight"], weights[f"{FFN}.bias"]
    lora = written(
        tmp_path,
        {
            **pair(f"backbone.{ATTENTION}", q, "lora_B.default.weight", "lora_A.default.weight"),
            **pair(f"lora_unet_{FFN.replace('.', '_')}", ffn, *NAMES, alpha=2.0),
            **pair(f"diffusion_model.{PATCHES}", patch, *NAMES, alpha=8.0),
            f"diffusion_model.{NORM}.diff": norm * 0.5,
            f"diffusion_model.{FFN}.diff_b": bias + 1,
        },
    )
    state = merged(backbone, (lora, 0.7), dtype=torch.float32)
    wanted = {
        f"{ATTENTION}.weight": q + 0.7 * delta(q),
        f"{FFN}.weight": ffn + 0.7 * 2 / 4 * delta(ffn),
        f"{PATCHES}.weight": patch + 0.7 * 8 / 4 * delta(patch),
        f"{NORM}.weight": norm * 1.35,
        f"{FFN}.bias": bias + 0.7 * (bias + 1),
    }
    assert changed(state, weights) == wanted.keys()
    for name, weight in wanted.items():
        torch.testing.assert_close(state[name], weight, rtol=0, atol=1e-6)
    half = merged(backbone, (lora, 0.7), dtype=torch.bfloat16)[f"{FFN}.weight"]
    rounded = ffn.bfloat16().float() + 0.7 * 2 / 4 * delta(ffn)
    assert torch.equal(half, rounded.bfloat16())


def test_loras_add_up_and_none_or_strength_0_changes_nothing(backbone, weights, tmp_path):
    q = weights[f"{ATTENTION}.weight"]
    first = written(tmp_path, pair(ATTENTION, q, *NAMES, seed=1), "first.safetensors")
    second = written(tmp_path, pair(ATTENTION, q, *NAMES, seed=2, rank=6), "second.safetensors")
    state = merged(backbone, first, (second, -0.5), dtype=torch.float32)
    wanted = q + delta(q, seed=1) - 0.5 * delta(q, seed=2, rank=6)
    torch.testing.assert_close(state[f"{ATTENTION}.weight"], wanted, rtol=0, atol=1e-6)
    for loras in ([], [(first, 0.0)], [(first, 0), (second, 0.0)]):
        for dtype in (torch.float32, torch.float8_e4m3fn):
            plain = load_backbone(backbone, dtype=dtype).state_dict()
            state = merged(backbone, *loras, dtype=dtype)
            assert all(torch.equal(state[name].float(), plain[name].float()) for name in plain)
    assert LoraMerge([(first, 0.0), second], backbone).names == ["second.safetensors"]


def test_float8_weights_are_dequantised_changed_and_rounded_by_chance(backbone, weights, tmp_path):
    ffn = weights[f"{FFN}.weight"]
    lora = written(tmp_path, pair(FFN, ffn, *NAMES))
    plain = load_backbone(backbone, dtype=torch.float8_e4m3fn).state_dict()
    state = merged(backbone, lora, dtype=torch.float8_e4m3fn)
    value, scale = (plain[f"{FFN}.{name}"] for name in ("weight", "weight_scale"))
    exact = dequantise_rows(value, scale, torch.float32) + delta(ffn)
    seed = zlib.crc32(f"diffusion_model.{FFN}.weight".encode())
    wanted = quantise_rows_stochastically(exact, seed)
    assert torch.equal(state[f"{FFN}.weight"].float(), wanted[0].float())
    assert torch.equal(state[f"{FFN}.weight_scale"], wanted[1])
    other = [name for name in plain if not name.startswith(f"{FFN}.weight")]
    assert all(torch.equal(state[name].float(), plain[name].float()) for name in other)


def test_the_alpha_that_peft_keeps_beside_its_file(backbone, weights, tmp_path):
    q = weights[f"{ATTENTION}.weight"]
    lora = written(tmp_path, pair(f"base_model.model.{ATTENTION}", q, "lora_B.weight", "lora_A.weight"))
    alone = lora_fingerprint(lora)
    (tmp_path / "adapter_config.json").write_text(json.dumps({"lora_alpha": 12}))
    state = merged(backbone, lora, dtype=torch.float32)
    torch.testing.assert_close(state[f"{ATTENTION}.weight"], q + 12 / 4 * delta(q), rtol=0, atol=1e-6)
    assert lora_fingerprint(lora) != alone
    copy = tmp_path / "elsewhere.safetensors"
    copy.write_bytes(lora.read_bytes())
    assert lora_fingerprint(copy) == lora_fingerprint(lora)


def test_what_is_not_used_is_said(backbone, weights, tmp_path):
    q = weights[f"{ATTENTION}.weight"]
    tensors = {
        **pair(ATTENTION, q, *NAMES),
        **pair("double_blocks.99.self_attn.q", q, *NAMES),
        **pair("text_encoder.shared", q, *NAMES),
    }
    merge = LoraMerge([written(tmp_path, tensors)], backbone)
    (note,) = merge.notes
    assert "4 of its 6 tensors" in note
    assert "text_encoder.shared" in note
    with merge.changes() as changes:
        assert set(changes) == {f"{ATTENTION}.weight"}


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda q: {"some.weight": q}, "but a LoRA is needed here"),
        (lambda q: pair("blocks.0.self_attn.q", q, *NAMES), "no LoRA for this backbone: none of its 2 tensors"),
        (lambda q: pair("double_blocks.99.self_attn.q", q, *NAMES), "no LoRA for this backbone"),
        (lambda q: pair(ATTENTION, torch.zeros(8, 8), *NAMES), "for a model of another size: 1 of its 1"),
        (lambda q: pair(ATTENTION, q[:, :-1], *NAMES), "for a model of another size"),
        (lambda q: {**pair(ATTENTION, q, *NAMES), f"{ATTENTION}.diff_b": torch.zeros(3)}, "1 of its 2 changes"),
        (lambda q: {**pair(ATTENTION, q, *NAMES), f"{ATTENTION}.alpha": torch.zeros(3)}, "of another size"),
        (lambda q: {**pair(ATTENTION, q, *NAMES), f"{ATTENTION}.dora_scale": q[:, :1].clone()}, "plain LoRA"),
        (lambda q: {f"{ATTENTION}.lokr_w1": q, f"{ATTENTION}.lokr_w2": q[:1].clone()}, "not merged here"),
        (lambda q: dict([*pair(ATTENTION, q, *NAMES).items()][:1]), "the other matrix"),
    ],
)
def test_files_that_do_not_fit_are_one_sentence_from_the_header(backbone, weights, tmp_path, monkeypatch, make, words):
    lora = written(tmp_path, {name: t.contiguous() for name, t in make(weights[f"{ATTENTION}.weight"]).items()})
    monkeypatch.setattr("nava_core.lora_merge.open_checkpoint", None)
    with pytest.raises(WrongFileError, match=words) as caught:
        LoraMerge([lora], backbone)
    assert "\n" not in str(caught.value)
    assert "lora.safetensors" in str(caught.value)


def test_a_missing_file_a_bad_strength_and_damaged_values(backbone, weights, tmp_path):
    q = weights[f"{ATTENTION}.weight"]
    with pytest.raises(FileNotFoundError, match=r"gone\.safetensors"):
        LoraMerge([tmp_path / "gone.safetensors"], backbone)
    tensors = pair(ATTENTION, q, *NAMES)
    with pytest.raises(ValueError, match="strength of lora"):
        LoraMerge([(written(tmp_path, tensors), float("nan"))], backbone)
    tensors[f"{ATTENTION}.lora_up.weight"][0, 0] = torch.nan
    with pytest.raises(ValueError, match="NaN"):
        merged(backbone, written(tmp_path, tensors))
