"""LoRAs of all trainers' namings rewritten for the host's loader, and those that cannot be."""

import json
import os

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from nava_core.backbone import BackboneConfig, NavaBackbone
from nava_core.checkpoint import FileKind, WrongFileError
from nava_core.cli import main
from nava_core.lora import _find_layer, convert_lora

LAYER = "double_blocks.3.self_attn.q_audio"
RANK = 4


def pair(down, up, layer=LAYER, **more):
    """A LoRA's tensors: ``down`` and ``up`` are what follows the layer's name."""
    generator = torch.Generator().manual_seed(len(layer))
    tensors = {
        f"{layer}.{down}": torch.randn(RANK, 8, generator=generator),
        f"{layer}.{up}": torch.randn(8, RANK, generator=generator),
    }
    return {**tensors, **{f"{layer}.{form}": tensor for form, tensor in more.items()}}


def kohya(layer=LAYER, **more):
    return pair("lora_down.weight", "lora_up.weight", layer, **more)


def converted(tmp_path, tensors, name="in.safetensors", **options):
    if name.endswith(".safetensors"):
        save_file(tensors, tmp_path / name)
    else:
        torch.save(tensors, tmp_path / name)
    made = convert_lora(tmp_path / name, tmp_path / "out.safetensors", **options)
    return load_file(made.info.path), made


def refusal(tmp_path, tensors, kind=WrongFileError):
    with pytest.raises(kind) as caught:
        converted(tmp_path, tensors)
    text = str(caught.value)
    assert not (tmp_path / "out.safetensors").exists()
    assert "\n" not in text
    return text


# --- names -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "prefix",
    [
        "", "diffusion_model.", "backbone.", "model.diffusion_model.", "transformer.", "base_model.model.",
        "base_model.model.backbone.", "module.backbone.",
    ],
)  # fmt: skip
@pytest.mark.parametrize(
    "layer",
    [
        LAYER, "single_blocks.17.ffn.2", "double_blocks.0.cross_attn.norm_k_audio", "single_blocks.0.norm3",
        "patch_embedding", "patch_embedding_audio.2.w1", "speaker_embedding.net.1", "head.head", "head_audio.head",
        "time_projection.1",
    ],
)  # fmt: skip
def test_dotted_prefixes(tmp_path, prefix, layer):
    source = kohya(prefix + layer, alpha=torch.tensor(2.0))
    made, result = converted(tmp_path, source)
    assert made.keys() == kohya(f"diffusion_model.{layer}", alpha=0).keys()
    for name, tensor in source.items():
        assert torch.equal(made["diffusion_model." + name.removeprefix(prefix)], tensor)
    assert (result.layers, result.without_alpha) == (1, 0)
    assert result.info.kind is FileKind.LORA


@pytest.mark.parametrize("prefix", ["lora_unet_", "lora_unet__", "lora_transformer_", "lora_unet_backbone_"])
@pytest.mark.parametrize(
    "layer",
    [LAYER, "single_blocks.17.cross_attn.o", "patch_embedding_audio.2.w3", "double_blocks.12.ffn.0", "head_audio.head"],
)
def test_underscored_names_get_their_dots_back(tmp_path, prefix, layer):
    source = kohya(prefix + layer.replace(".", "_"), alpha=torch.tensor(2.0))
    made, _ = converted(tmp_path, source)
    assert made.keys() == kohya(f"diffusion_model.{layer}", alpha=0).keys()


def test_every_layer_of_the_model_is_found_by_both_its_names():
    config = BackboneConfig(dim=64, ffn_dim=64, num_heads=1, num_double_layers=11, num_single_layers=12)
    for parameter, _ in NavaBackbone(config, device="meta").named_parameters():
        layer = parameter.removesuffix(".weight")
        assert _find_layer(layer) == layer
        assert _find_layer(layer.replace(".", "_")) == layer


@pytest.mark.parametrize(
    ("forms", "wanted"),
    [
        (("lora_down.weight", "lora_up.weight"), ("lora_down.weight", "lora_up.weight")),
        (("lora.down.weight", "lora.up.weight"), ("lora_down.weight", "lora_up.weight")),
        (("lora_A.weight", "lora_B.weight"), ("lora_A.weight", "lora_B.weight")),
        (("lora_A", "lora_B"), ("lora_A.weight", "lora_B.weight")),
        (("lora_A.default.weight", "lora_B.default.weight"), ("lora_A.weight", "lora_B.weight")),
        (("lora_A.my_style.weight", "lora_B.my_style.weight"), ("lora_A.weight", "lora_B.weight")),
    ],
)
def test_matrices(tmp_path, forms, wanted):
    source = pair(*forms, layer=f"base_model.model.{LAYER}")
    made, result = converted(tmp_path, source)
    assert made.keys() == {f"diffusion_model.{LAYER}.{form}" for form in wanted}
    for form, new in zip(forms, wanted, strict=True):
        assert torch.equal(made[f"diffusion_model.{LAYER}.{new}"], source[f"base_model.model.{LAYER}.{form}"])
    assert result.without_alpha == 1
    assert "1 of them without an alpha" in result.summary


def test_forms_that_stay(tmp_path):
    other = "single_blocks.1.ffn.0"
    forms = ["diff", "diff_b", "set_weight", "dora_scale"]
    loha = [f"hada_w{n}_{half}" for n in (1, 2) for half in "ab"]
    lokr = ["lokr_w1", "lokr_w2_a", "lokr_w2_b", "alpha"]
    source = {f"backbone.{LAYER}.{form}": torch.randn(3, 2) for form in [*forms, *loha]}
    source.update({f"backbone.{other}.{form}": torch.randn(3, 2) for form in lokr})
    source["backbone.double_blocks.0.modulation.modulation.diff"] = torch.randn(1, 6, 8)
    source["backbone.double_blocks.0.self_attn.q.bias.diff"] = torch.randn(8)
    made, result = converted(tmp_path, source)
    assert made.keys() == {name.replace("backbone.", "diffusion_model.") for name in source}
    assert result.layers == 4


def test_peft_dora_lengths_stand_before_the_rows(tmp_path):
    lengths = torch.rand(8)
    source = pair("lora_A.default.weight", "lora_B.default.weight")
    source[f"{LAYER}.lora_magnitude_vector.default.weight"] = lengths
    made, _ = converted(tmp_path, source)
    assert torch.equal(made[f"diffusion_model.{LAYER}.dora_scale"], lengths[:, None])


# --- types and files ---------------------------------------------------------------------------------------------


def test_types_are_kept_unless_one_is_given(tmp_path):
    source = kohya(alpha=torch.tensor(181.02))
    source[f"{LAYER}.lora_up.weight"] = source[f"{LAYER}.lora_up.weight"].half()
    up, down, alpha = (f"diffusion_model.{LAYER}.{form}" for form in ("lora_up.weight", "lora_down.weight", "alpha"))
    made, _ = converted(tmp_path, source)
    assert (made[up].dtype, made[down].dtype) == (torch.float16, torch.float32)
    for name, dtype in {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}.items():
        made, _ = converted(tmp_path, source, dtype=name, overwrite=True)
        assert made[up].dtype == made[down].dtype == dtype
        assert made[alpha] == source[f"{LAYER}.alpha"]
    with pytest.raises(ValueError, match="cannot be written as fp8: choose one of bf16, fp16, fp32"):
        converted(tmp_path, source, dtype="fp8", overwrite=True)


@pytest.mark.parametrize("wrapped", [True, False])
def test_torch_files(tmp_path, wrapped):
    source = kohya(f"backbone.{LAYER}")
    made, _ = converted(tmp_path, {"state_dict": source} if wrapped else source, "in.pt")
    assert made.keys() == kohya(f"diffusion_model.{LAYER}").keys()


def test_metadata_and_progress(tmp_path):
    seen = []
    save_file(kohya(), tmp_path / "a.safetensors", {"ss_network_dim": "4"})
    convert_lora(tmp_path / "a.safetensors", tmp_path / "b.safetensors", progress=lambda *now: seen.append(now))
    assert seen == [(128, 256), (256, 256)]
    with safe_open(tmp_path / "b.safetensors", "pt") as file:
        assert file.metadata() == {"ss_network_dim": "4", "format": "pt"}


def test_converting_twice_changes_nothing(tmp_path):
    converted(tmp_path, kohya("lora_unet_" + LAYER.replace(".", "_")))
    convert_lora(tmp_path / "out.safetensors", tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == (tmp_path / "out.safetensors").read_bytes()


def test_no_file_is_lost(tmp_path):
    converted(tmp_path, kohya())
    before = (tmp_path / "out.safetensors").read_bytes()
    with pytest.raises(FileExistsError, match="already there"):
        converted(tmp_path, kohya())
    os.symlink(tmp_path / "in.safetensors", tmp_path / "link.safetensors")
    for name in ("in.safetensors", "link.safetensors"):
        with pytest.raises(ValueError, match="is the file to convert itself"):
            convert_lora(tmp_path / "in.safetensors", tmp_path / name, overwrite=True)

    def stop(*_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        converted(tmp_path, kohya(), overwrite=True, progress=stop)
    assert (tmp_path / "out.safetensors").read_bytes() == before
    assert not list(tmp_path.glob(".*"))
    assert load_file(tmp_path / "in.safetensors").keys() == kohya().keys()


# --- peft's own file ---------------------------------------------------------------------------------------------


def peft_alpha(tmp_path, **config):
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    made, _ = converted(tmp_path, pair("lora_A.weight", "lora_B.weight", f"base_model.model.backbone.{LAYER}"))
    return made[f"diffusion_model.{LAYER}.alpha"].item()


def test_peft_alpha(tmp_path):
    assert peft_alpha(tmp_path, r=RANK, lora_alpha=32) == 32


def test_peft_alpha_by_the_root_of_the_rank(tmp_path):
    alpha = peft_alpha(tmp_path, lora_alpha=32, use_rslora=True)
    assert alpha / RANK == pytest.approx(32 / RANK**0.5)


@pytest.mark.parametrize(("name", "wanted"), [("q_audio", 7), (f"backbone.{LAYER}", 7), ("audio", 32), ("k", 32)])
def test_peft_alpha_of_a_layer(tmp_path, name, wanted):
    assert peft_alpha(tmp_path, lora_alpha=32, alpha_pattern={name: 7}) == wanted


def test_peft_config_without_use(tmp_path):
    for config in ({}, {"lora_alpha": "x"}, {"lora_alpha": 1, "alpha_pattern": [1]}, []):
        (tmp_path / "adapter_config.json").write_text(json.dumps(config))
        text = refusal(tmp_path, pair("lora_A.weight", "lora_B.weight", f"base_model.model.{LAYER}"))
        assert "says no lora_alpha" in text
    (tmp_path / "adapter_config.json").write_text(json.dumps({"lora_alpha": 1, "alpha_pattern": {".*q": 2}}))
    text = refusal(tmp_path, pair("lora_A.weight", "lora_B.weight", f"base_model.model.{LAYER}"))
    assert "holds expressions (.*q)" in text
    _, result = converted(tmp_path, pair("lora_A.weight", "lora_B.weight"))  # not peft's: the file is another's
    assert result.without_alpha == 1


# --- what is refused ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "layer",
    [
        "diffusion_model.blocks.0.self_attn.q",  # Wan
        "lora_unet_blocks_0_cross_attn_k",
        "transformer.double_blocks.0.img_attn.qkv",  # Hunyuan, FLUX
        "lora_te_text_model_encoder_layers_0_mlp_fc1",
        "double_blocks.x.self_attn.q",
        "double_blocks.0.self_attn",
        "double_blocks." + "9" * 5000 + ".self_attn.q",
        "." * 1000,
    ],
)
def test_loras_of_other_models(tmp_path, layer):
    text = refusal(tmp_path, kohya(layer, alpha=torch.tensor(1.0)))
    assert "in.safetensors is no LoRA for NAVA: 3 of its 3 tensors belong to no layer of the model" in text
    assert text.count("lora_") >= 2
    assert text.endswith("choose one that was trained on NAVA.")


def test_only_some_names_of_many_are_shown(tmp_path):
    tensors = {}
    for block in range(5):
        tensors.update(kohya(f"blocks.{block}.self_attn.q"))
    text = refusal(tmp_path, {**tensors, **kohya()})
    assert "10 of its 12 tensors" in text
    assert text.count("blocks.") == 3
    assert ", ...)" in text


def test_forms_the_host_does_not_read(tmp_path):
    for form in ("lora_B.bias", "lora_B.default.bias", "base_layer.weight", "gate"):
        text = refusal(tmp_path, kohya(**{form: torch.zeros(8)}))
        assert f"has 1 of its 3 tensors in a form that ComfyUI's LoRA loader does not read ({LAYER}.{form})" in text


def test_two_loras_in_a_file(tmp_path):
    one, two = (pair(f"lora_A.{name}.weight", f"lora_B.{name}.weight") for name in ("one", "two"))
    assert "holds more than one LoRA" in refusal(tmp_path, {**one, **two})
    assert "holds more than one LoRA" in refusal(tmp_path, {**kohya(), **kohya(f"backbone.{LAYER}")})


@pytest.mark.parametrize("missing", ["lora_up.weight", "lora_down.weight"])
def test_half_a_pair(tmp_path, missing):
    tensors = kohya()
    del tensors[f"{LAYER}.{missing}"]
    assert "is incomplete: the other matrix of double_blocks.3" in refusal(tmp_path, tensors)


def test_what_is_no_lora(tmp_path):
    assert "but a LoRA is needed here" in refusal(tmp_path, {f"{LAYER}.weight": torch.zeros(2, 2)})
    source = kohya()
    source[f"{LAYER}.lora_up.weight"][0, 0] = 1e30
    save_file(source, tmp_path / "in.safetensors")
    with pytest.raises(ValueError, match="holds values that are NaN or infinite"):
        convert_lora(tmp_path / "in.safetensors", tmp_path / "out.safetensors", dtype="fp16")
    with pytest.raises(FileNotFoundError):
        convert_lora(tmp_path / "none", tmp_path / "out.safetensors")
    assert not (tmp_path / "out.safetensors").exists()


# --- the command -------------------------------------------------------------------------------------------------


def test_command(tmp_path, capsys):
    source, target = tmp_path / "in.safetensors", tmp_path / "out.safetensors"
    save_file(kohya(f"backbone.{LAYER}", alpha=torch.tensor(1.0)), source)
    assert main(["convert", str(source), str(target)]) == 0
    said = capsys.readouterr()
    assert said.out.strip() == str(target)
    assert "is a LoRA for NAVA" in said.err
    assert "for 1 layer of NAVA" in said.err
    assert load_file(target)[f"diffusion_model.{LAYER}.lora_up.weight"].dtype == torch.float32
    assert main(["convert", str(source), str(target), "--dtype", "bf16", "--overwrite"]) == 0
    assert load_file(target)[f"diffusion_model.{LAYER}.lora_up.weight"].dtype == torch.bfloat16
    capsys.readouterr()
    save_file(kohya("blocks.0.self_attn.q"), source)
    assert main(["convert", str(source), str(tmp_path / "wan.safetensors")]) == 1
    assert "is no LoRA for NAVA" in capsys.readouterr().err
    assert not (tmp_path / "wan.safetensors").exists()
