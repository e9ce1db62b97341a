"""Model files: recognised by content, read safely, loaded within the memory promised."""

import json
import os
import pickle
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from nava_core.backbone import quantized
from nava_core.backbone.model import NavaBackbone
from nava_core.backbone.quantized import (
    Fp8Linear,
    dequantise_rows,
    fp8_matmul_problem,
    quantise_activations,
    quantise_rows,
    set_fp8_matmul,
)
from nava_core.checkpoint import (
    FileKind,
    WrongFileError,
    backbone_config,
    backbone_problem,
    describe_file,
    estimate_memory,
    explain_wrong_file,
    load_backbone,
    open_checkpoint,
)
from nava_core.components import load_problem
from nava_core.convert import convert

ROOT = Path(__file__).resolve().parents[2]
GOLDEN = Path(__file__).parents[1] / "golden"
TINY = GOLDEN / "backbone_tiny.safetensors"
FP8 = torch.float8_e4m3fn


@pytest.fixture(scope="module")
def tiny() -> dict[str, torch.Tensor]:
    """The golden backbone by its own names, without prefix."""
    return {name.removeprefix("backbone."): tensor for name, tensor in load_file(TINY).items()}


@pytest.fixture(scope="module")
def config_text() -> str:
    return describe_file(TINY).metadata["config"]


@pytest.fixture(scope="module")
def fp8_file(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("fp8") / "NAVA_fp8.safetensors"
    convert(TINY, path)
    return path


def write_header(path: Path, entries: dict, data: bytes = b"", length: int | None = None) -> Path:
    text = json.dumps(entries).encode()
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)
    return path


def write_names(path: Path, shapes: dict[str, tuple[int, ...]]) -> Path:
    save_file({name: torch.zeros(shape) for name, shape in shapes.items()}, path)
    return path


def run_case(model: NavaBackbone) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    dtype = model.dtype
    video = torch.randn(1, 48, 2, 4, 4, generator=generator).to(dtype)
    audio = torch.randn(1, 5, 128, generator=generator).to(dtype)
    context = torch.randn(1, 6, 40, generator=generator).to(dtype)
    with torch.no_grad():
        return model(video, audio, torch.tensor([500.0]), context)


# ---------------------------------------------------------------- recognising

U = "encoder.block.0.layer.0.SelfAttention.q.weight"
BIAS = "encoder.block.1.layer.0.SelfAttention.relative_attention_bias.weight"
Q1 = "encoder.block.1.layer.0.SelfAttention.q.weight"
MODELS = {
    "wan": (
        FileKind.WAN,
        {
            "blocks.0.self_attn.q.weight": (4, 4),
            "patch_embedding.weight": (4, 16, 1, 2, 2),
            "head.modulation": (1, 2, 4),
        },
    ),
    "wan in a checkpoint": (
        FileKind.WAN,
        {
            "model.diffusion_model.blocks.0.self_attn.q.weight": (4, 4),
            "model.diffusion_model.patch_embedding.weight": (4, 48, 1, 2, 2),
            "model.diffusion_model.head.modulation": (1, 2, 4),
        },
    ),
    "wan of diffusers": (
        FileKind.WAN,
        {"blocks.0.attn1.to_q.weight": (4, 4), "condition_embedder.time_embedder.linear_1.weight": (4, 4)},
    ),
    "ltx": (
        FileKind.LTX,
        {"adaln_single.emb.timestep_embedder.linear_1.bias": (4,), "scale_shift_table": (2, 4)},
    ),
    "ltx av": (
        FileKind.LTX_AV,
        {
            "model.diffusion_model.adaln_single.emb.timestep_embedder.linear_1.bias": (4,),
            "model.diffusion_model.audio_adaln_single.linear.weight": (4, 4),
            "model.diffusion_model.scale_shift_table": (2, 4),
        },
    ),
    "flux": (FileKind.FLUX_FAMILY, {"double_blocks.0.img_attn.qkv.weight": (12, 4)}),
    "lora": (FileKind.LORA, {"diffusion_model.double_blocks.0.self_attn.q_audio.lora_A.weight": (1, 4)}),
    "kohya lora": (FileKind.LORA, {"lora_unet_single_blocks_0_ffn_0.lora_down.weight": (1, 4)}),
    "wan2.2 vae": (
        FileKind.WAN22_VAE,
        {
            "decoder.middle.0.residual.0.gamma": (8, 1, 1, 1),
            "decoder.upsamples.0.upsamples.0.residual.2.weight": (8, 8, 3, 3, 3),
            "decoder.conv1.weight": (8, 48, 3, 3, 3),
        },
    ),
    "wan2.1 vae": (
        FileKind.WAN21_VAE,
        {"decoder.middle.0.residual.0.gamma": (8, 1, 1, 1), "decoder.conv1.weight": (8, 16, 3, 3, 3)},
    ),
    "wan vae of diffusers": (
        FileKind.WAN_VAE_DIFFUSERS,
        {"decoder.mid_block.resnets.0.norm1.gamma": (8,), "post_quant_conv.weight": (16, 16, 1, 1, 1)},
    ),
    "ltx audio vae": (
        FileKind.LTX_AUDIO_VAE,
        {"audio_vae.per_channel_statistics.mean-of-means": (8,), "vocoder.conv_pre.weight": (4, 4, 7)},
    ),
    "ltx video vae": (FileKind.LTX_VIDEO_VAE, {"decoder.up_blocks.0.res_blocks.0.conv1.conv.weight": (8, 8, 3, 3, 3)}),
    "umt5": (FileKind.UMT5, {U: (4, 4), Q1: (4, 4), BIAS: (32, 4), "shared.weight": (9, 4), "spiece_model": (5,)}),
    "umt5 of one layer": (FileKind.UMT5, {U: (4, 4), "shared.weight": (9, 4)}),
    "makers' umt5": (
        FileKind.UMT5_ORIGINAL,
        {"blocks.0.pos_embedding.embedding.weight": (32, 4), "blocks.0.ffn.gate.0.weight": (4, 4)},
    ),
    "t5": (FileKind.T5, {U: (4, 4), Q1: (4, 4), "shared.weight": (9, 4)}),
    "tae": (FileKind.TAE, {"decoder.1.weight": (256, 48, 3, 3), "decoder.22.bias": (12,)}),
    "something": (FileKind.UNKNOWN, {"a.weight": (2, 2), "my_double_blocks": (2,)}),
    "names that only end alike": (
        FileKind.UNKNOWN,
        {"my_blocks.0.self_attn.q.weight": (2,), "my_patch_embedding.weight": (2,), "my_head.modulation": (2,)},
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_models_are_recognised_by_their_tensors(tmp_path, name):
    kind, shapes = MODELS[name]
    info = describe_file(write_names(tmp_path / "NAVA.safetensors", shapes))
    assert info.kind is kind
    assert "NAVA.safetensors is " in info.summary
    sentence = explain_wrong_file(info, FileKind.NAVA_BACKBONE)
    assert "a NAVA backbone is needed here" in sentence
    assert "NAVA_fp8.safetensors" in sentence
    with pytest.raises(WrongFileError, match="a NAVA backbone is needed here"):
        load_backbone(info.path)


def test_a_merged_file_names_its_parts(tmp_path):
    shapes = MODELS["ltx av"][1] | MODELS["ltx audio vae"][1]
    info = describe_file(write_names(tmp_path / "ltx.safetensors", shapes))
    assert info.kind is FileKind.LTX_AV
    assert info.parts == {FileKind.LTX_AV, FileKind.LTX_AUDIO_VAE}


def test_speaker_encoder_is_recognised_inside_its_wrapper():
    info = describe_file(GOLDEN / "redimnet_small.pt")
    assert (info.kind, info.format, info.wrapper) == (FileKind.REDIMNET, "torch", "state_dict")
    assert json.loads(info.metadata["model_config"])["embed_dim"] == 192


def test_the_sentence_names_what_is_expected(tmp_path):
    info = describe_file(write_names(tmp_path / "a.safetensors", MODELS["wan2.1 vae"][1]))
    assert explain_wrong_file(info, "wan22_vae") == (
        "a.safetensors is the Wan2.1 video VAE (16 latent channels), but the Wan2.2 video VAE is needed here: "
        "choose wan2.2_vae.safetensors or Wan2.2_VAE.pth."
    )
    assert "but a clock is needed here" in explain_wrong_file(info, "a clock")


@pytest.mark.parametrize(
    ("content", "kind", "said"),
    [
        (b"", FileKind.EMPTY, "an empty file"),
        (b"<!DOCTYPE html>\n<html><body>Sign in</body></html>", FileKind.HTML, "a web page"),
        (b"\xef\xbb\xbf \n<html>", FileKind.HTML, "a web page"),
        (b"Access to this model is restricted.", FileKind.TEXT, "Access to this model is restricted."),
        (b'{"error": "Repository not found"}', FileKind.TEXT, "Repository not found"),
        (
            b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 25190000000\n",
            FileKind.LFS_POINTER,
            "25.19 GB",
        ),
        (b"GGUF\x03\x00\x00\x00" + bytes(50), FileKind.GGUF, "GGUF"),
        (bytes(4096), FileKind.TRUNCATED, "begins with zeros"),
        (b"\x93NUMPY" + bytes(range(200)) * 3, FileKind.UNKNOWN, "neither safetensors nor a torch file"),
        (b"PK\x03\x04" + bytes(300), FileKind.TRUNCATED, "end of its zip archive"),
        (b"\x80\x02garbage", FileKind.CORRUPT, "cannot be read"),
        (pickle.dumps({"weights": [1.0, 2.0]}), FileKind.UNSAFE, "a Python pickle"),
    ],
)
def test_files_that_are_no_models(tmp_path, content, kind, said):
    path = tmp_path / "NAVA.safetensors"
    path.write_bytes(content)
    info = describe_file(path)
    assert info.kind is kind
    assert said in info.summary
    sentence = explain_wrong_file(info, FileKind.NAVA_BACKBONE)
    assert sentence.endswith(".")
    assert "\n" not in sentence
    with pytest.raises(WrongFileError, match="no tensors can be read"):
        open_checkpoint(path)
    assert backbone_problem(path) == sentence


def test_missing_files_and_folders(tmp_path):
    with pytest.raises(FileNotFoundError, match="There is no file"):
        describe_file(tmp_path / "none.safetensors")
    with pytest.raises(ValueError, match="is a folder"):
        describe_file(tmp_path)


# ---------------------------------------------------------------- headers that lie


@pytest.mark.parametrize("kept", [0.999, 0.5, 0.002])
def test_truncated_safetensors(tmp_path, kept):
    whole = TINY.read_bytes()
    path = tmp_path / "NAVA.safetensors"
    path.write_bytes(whole[: int(len(whole) * kept)])
    info = describe_file(path)
    assert info.kind is FileKind.TRUNCATED
    assert "download it again" in explain_wrong_file(info, FileKind.NAVA_BACKBONE)


def test_truncation_is_told_in_bytes(tmp_path):
    path = tmp_path / "NAVA.safetensors"
    path.write_bytes(TINY.read_bytes()[:-7])
    assert "7 bytes are missing" in describe_file(path).summary


@pytest.mark.parametrize("length", [100 * 2**30, 2**63, 2**25 + 1])
def test_a_huge_header_is_not_read(tmp_path, length):
    path = write_header(tmp_path / "a.safetensors", {}, length=length)
    with path.open("r+b") as file:
        file.truncate(2**26)  # sparse: the header would fit into the file
    assert describe_file(path).kind is FileKind.CORRUPT


F32 = {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]}


@pytest.mark.parametrize(
    ("entries", "kind"),
    [
        ({"a": {**F32, "data_offsets": [0, 10**12]}, "b": F32}, FileKind.CORRUPT),
        ({"a": {**F32, "shape": [10**9, 1000], "data_offsets": [0, 4 * 10**12]}}, FileKind.TRUNCATED),
        ({"a": {**F32, "data_offsets": [16, 0]}}, FileKind.CORRUPT),
        ({"a": {**F32, "shape": [-2, -2]}}, FileKind.CORRUPT),
        ({"a": {**F32, "shape": [True, 4]}}, FileKind.CORRUPT),
        ({"a": {**F32, "shape": "22"}}, FileKind.CORRUPT),
        ({"a": F32, "b": {**F32, "data_offsets": [8, 24]}}, FileKind.CORRUPT),
        ({"a": {"dtype": "F32"}}, FileKind.CORRUPT),
        ({"a": 3}, FileKind.CORRUPT),
    ],
)
def test_impossible_safetensors_headers(tmp_path, entries, kind):
    assert describe_file(write_header(tmp_path / "a.safetensors", entries, bytes(32))).kind is kind


def test_deeply_nested_header(tmp_path):
    text = b'{"a":' + b"[" * 200_000
    path = tmp_path / "a.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text)
    assert describe_file(path).kind is FileKind.CORRUPT


def test_metadata_is_checked(tmp_path, tiny):
    path = tmp_path / "a.safetensors"
    for given, said in (
        ('{"num_heads": "2"}', "num_heads = 2, which cannot be"),
        ('{"text_len": 1000000000}', "text_len = 1000000000, which cannot be"),
        ('{"eps": -1.0}', "eps"),
        ("{", "not JSON"),
    ):
        save_file(tiny, path, {"config": given})
        with pytest.raises(WrongFileError, match=said):
            load_backbone(path)


# ---------------------------------------------------------------- torch files


class Payload:
    """Unpickles into a call: what a hostile checkpoint does."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_with_code_is_refused_and_not_run(tmp_path, tiny, zipped):
    path, mark = tmp_path / "NAVA.ckpt", tmp_path / "was_here"
    content = {"state_dict": tiny, "callbacks": Payload(mark)}
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    info = describe_file(path)
    assert info.kind is FileKind.UNSAFE
    assert "mkdir" in info.summary
    with pytest.raises(WrongFileError, match="it could run code"):
        load_backbone(path)
    assert not mark.exists()


def test_truncated_torch_files(tmp_path, tiny):
    for zipped in (True, False):
        path = tmp_path / f"{zipped}.ckpt"
        torch.save({"state_dict": tiny}, path, _use_new_zipfile_serialization=zipped)
        path.write_bytes(path.read_bytes()[:-100_000])
        info = describe_file(path)
        assert info.kind is FileKind.TRUNCATED or not zipped, info.summary
        with pytest.raises(WrongFileError):
            load_backbone(path)


def test_a_torch_file_with_more_tensors_than_bytes_is_refused(tmp_path):
    path = tmp_path / "bomb.ckpt"
    torch.save({"state_dict": {"a": torch.zeros(1).expand(10**6, 10**6)}}, path)
    assert describe_file(path).kind is FileKind.CORRUPT


def test_a_compressed_torch_file_is_refused(tmp_path):
    plain, packed = tmp_path / "a.ckpt", tmp_path / "b.ckpt"
    torch.save({"a": torch.zeros(1000)}, plain)
    with zipfile.ZipFile(plain) as source, zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as target:
        for entry in source.namelist():
            target.writestr(entry, source.read(entry))
    assert describe_file(packed).kind is FileKind.CORRUPT


def test_a_zip_archive_of_other_things(tmp_path):
    path = tmp_path / "a.ckpt"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("readme.txt", "hello")
    assert describe_file(path).kind is FileKind.UNKNOWN


# ---------------------------------------------------------------- loading


def save_as(path: Path, tensors: dict[str, torch.Tensor], config: str, form: str) -> Path:
    if form == "safetensors":
        save_file(tensors, path, {"config": config})
    else:
        torch.save({form: tensors, "config": json.loads(config), "step": 7} if form != "plain" else tensors, path)
    return path


@pytest.mark.parametrize(
    ("prefix", "dtype"),
    [
        ("backbone.", torch.float32),
        ("", torch.bfloat16),
        ("model.diffusion_model.", torch.float16),
        ("diffusion_model.", torch.float32),
        ("module.backbone.", torch.bfloat16),
    ],
)
def test_forms_and_prefixes(tmp_path, tiny, config_text, prefix, dtype):
    tensors = {prefix + name: tensor.to(dtype) for name, tensor in tiny.items()}
    for form in ("safetensors", "state_dict", "model", "module"):
        path = save_as(tmp_path / "a.ckpt", tensors, config_text, form)
        info = describe_file(path)
        assert (info.kind, info.prefix) == (FileKind.NAVA_BACKBONE, prefix)
        model = load_backbone(path)
        assert model.dtype == dtype
        assert model.config.num_heads == 2
        loaded = model.state_dict()
        assert loaded.keys() == tiny.keys()
        assert all(torch.equal(loaded[name], tiny[name].to(dtype)) for name in tiny)


@pytest.mark.parametrize("start", [b"\x80", b"PK", b"\x80\x02"])
def test_a_header_length_that_looks_like_another_format(tmp_path, tiny, start):
    text = json.dumps({"double_blocks.0.x": {**F32}}).encode()
    length = next(n for n in range(len(text), 2**17) if n.to_bytes(8, "little").startswith(start))
    path = tmp_path / "a.safetensors"
    path.write_bytes(length.to_bytes(8, "little") + text.ljust(length) + bytes(16))
    assert describe_file(path).format == "safetensors"


def test_legacy_torch_file(tmp_path, tiny, config_text):
    path = tmp_path / "old.ckpt"
    torch.save({"state_dict": tiny}, path, _use_new_zipfile_serialization=False)
    assert describe_file(path).kind is FileKind.NAVA_BACKBONE
    assert torch.equal(load_backbone(path).state_dict()["head.head.bias"], tiny["head.head.bias"])


def test_tensors_of_another_model_in_the_file_are_left_alone(tmp_path, tiny, config_text):
    tensors = {"backbone." + name: tensor for name, tensor in tiny.items()} | {"vae.weight": torch.zeros(3)}
    assert load_backbone(save_as(tmp_path / "a.safetensors", tensors, config_text, "safetensors")) is not None


@pytest.mark.parametrize("dtype", [None, torch.float32, torch.bfloat16])
def test_streamed_equals_direct(tiny, dtype):
    direct = NavaBackbone(backbone_config(describe_file(TINY)), dtype=dtype)
    direct.load_state_dict({name: tensor.to(direct.dtype) for name, tensor in tiny.items()})
    streamed = load_backbone(TINY, dtype=dtype)
    assert streamed.dtype == direct.dtype
    assert not streamed.training
    assert not any(parameter.requires_grad for parameter in streamed.parameters())
    for ours, theirs in zip(run_case(streamed), run_case(direct), strict=True):
        assert torch.equal(ours, theirs)


def test_a_mixed_file_gets_one_type(tmp_path, tiny, config_text):
    tensors = {name: t if "norm" in name else t.to(torch.bfloat16) for name, t in tiny.items()}
    model = load_backbone(save_as(tmp_path / "a.safetensors", tensors, config_text, "safetensors"))
    assert {tensor.dtype for tensor in model.state_dict().values()} == {torch.bfloat16}
    assert torch.isfinite(run_case(model)[0]).all()


def test_missing_unexpected_and_misshaped_tensors(tmp_path, tiny, config_text):
    tensors = dict(tiny)
    del tensors["head.head.bias"]
    tensors["head.extra"] = torch.zeros(1)
    tensors["single_blocks.1.ffn.0.bias"] = torch.zeros(5)
    path = save_as(tmp_path / "a.safetensors", tensors, config_text, "safetensors")
    with pytest.raises(WrongFileError) as caught:
        load_backbone(path)
    said = str(caught.value)
    assert "1 tensor is missing (head.head.bias)" in said
    assert "1 tensor is not known (head.extra)" in said
    assert "single_blocks.1.ffn.0.bias (5,) instead of (128,)" in said
    assert backbone_problem(path) == said


def test_a_backbone_without_a_tensor_its_size_is_read_from(tmp_path, tiny, config_text):
    tensors = {name: t for name, t in tiny.items() if name != "text_embedding.0.weight"}
    path = save_as(tmp_path / "a.safetensors", tensors, config_text, "safetensors")
    with pytest.raises(WrongFileError, match=r"text_embedding\.0\.weight is missing"):
        load_backbone(path)


@pytest.mark.parametrize("code", ["I8", "U8", "I32", "F8_E8M0"])
def test_a_backbone_of_a_type_that_is_not_read(tmp_path, tiny, config_text, code):
    """Quantised in a way of its own: taken as it is, it would make noise."""
    entries, end = {"__metadata__": {"config": config_text}}, 0
    for name, tensor in tiny.items():
        own = code if name == "single_blocks.0.ffn.0.weight" else "F32"
        size = tensor.numel() * {"F32": 4, "I32": 4}.get(own, 1)
        entries[name] = {"dtype": own, "shape": list(tensor.shape), "data_offsets": [end, end + size]}
        end += size
    path = write_header(tmp_path / "a.safetensors", entries, bytes(end))
    problem = backbone_problem(path)
    assert "a.safetensors has 1 of " in problem
    assert problem.endswith("get the backbone in fp32, bf16, fp16 or fp8.")
    assert load_problem(describe_file(path)) == problem
    with pytest.raises(WrongFileError) as caught:
        load_backbone(path)
    assert str(caught.value) == problem


def test_many_missing_tensors_are_counted(tmp_path, tiny, config_text):
    tensors = {name: t for name, t in tiny.items() if not name.endswith("norm_k.weight")}
    path = save_as(tmp_path / "a.safetensors", tensors, config_text, "safetensors")
    with pytest.raises(WrongFileError, match=r"8 tensors are missing \(.*, \.\.\.\)"):
        load_backbone(path)


def test_source_reads_tensor_by_tensor(tiny):
    with open_checkpoint(TINY) as source:
        assert set(source) == set(tiny)
        assert len(source) == len(tiny)
        assert torch.equal(source.read("head.modulation"), tiny["head.modulation"])
        with pytest.raises(KeyError):
            source.read("nothing")
        offsets = [source.tensors[name].offset for name in source]
    assert offsets == sorted(offsets)


def test_empty_tensors_are_read(tmp_path):
    save_file({"a": torch.zeros(0, 3), "b": torch.ones(2)}, tmp_path / "a.safetensors")
    with open_checkpoint(tmp_path / "a.safetensors") as source:
        assert source.read("a").shape == (0, 3)
        assert source.read("b").tolist() == [1, 1]


@pytest.mark.parametrize("dtype", [None, torch.float32, torch.bfloat16, FP8])
def test_memory_estimate_is_what_the_weights_take(fp8_file, dtype):
    for path in (TINY, fp8_file):
        model = load_backbone(path, dtype=dtype)
        taken = sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values())
        assert estimate_memory(describe_file(path), dtype) == taken


# ---------------------------------------------------------------- float8


def test_quantised_rows_are_as_close_as_float8_can_be():
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(1500, 96, generator=generator) * torch.logspace(-6, 3, 1500)[:, None]
    weight[7] = 0
    quantised, scale = quantise_rows(weight)
    assert (quantised.dtype, scale.dtype) == (FP8, torch.bfloat16)
    assert (quantised.shape, scale.shape) == ((1500, 96), (1500,))
    expected = (weight.abs().amax(1) / 448).to(torch.bfloat16)
    assert torch.equal(scale[weight.any(1)], expected[weight.any(1)])
    assert not dequantise_rows(quantised, scale)[7].any()
    restored = dequantise_rows(quantised, scale, torch.float32)
    # Three mantissa bits: half a step is 1/16 of the value, or 2**-10 of the scale below the smallest normal. The
    # row's largest value may be clamped where its scale was rounded down, by less than bf16's half step.
    bound = torch.maximum(weight.abs() / 16, scale.float()[:, None] * 2**-10) * 1.001
    assert ((restored - weight).abs() <= bound).all()
    assert quantise_rows(weight.to(torch.bfloat16))[0].float().abs().max() <= 448


def test_rounded_scale_is_used_for_quantising():
    # 449.5 / 448 rounds to a bfloat16 scale of 1. Float8 here has steps of 32: 272.5 is above the middle of
    # 256 and 288, but 272.5 divided by the exact scale would be below it.
    quantised, scale = quantise_rows(torch.tensor([[449.5, 272.5]]))
    assert scale.item() == 1.0
    assert quantised.float().tolist() == [[448.0, 288.0]]


def test_dequantising_in_bf16_equals_rounding_the_float32_product():
    weight, scale = quantise_rows(torch.randn(64, 64, generator=torch.Generator().manual_seed(1)))
    exact = (weight.to(torch.float64) * scale.to(torch.float64)[:, None]).to(torch.bfloat16)
    assert torch.equal(dequantise_rows(weight, scale, torch.bfloat16), exact)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_non_finite_weights_are_not_quantised(bad):
    weight = torch.ones(4, 4)
    weight[2, 1] = bad
    with pytest.raises(ValueError, match="NaN or infinity"):
        quantise_rows(weight)
    with pytest.raises(ValueError, match="two dimensions"):
        quantise_rows(torch.ones(3))


def test_fp8_file_stays_fp8_and_equals_its_dequantised_twin(fp8_file):
    resident = load_backbone(fp8_file)
    assert isinstance(resident.single_blocks[0].ffn[0], Fp8Linear)
    assert isinstance(resident.double_blocks[1].cross_attn.k_audio, Fp8Linear)
    assert not isinstance(resident.text_embedding[0], Fp8Linear)
    twin = load_backbone(fp8_file, dtype=torch.bfloat16)
    assert {t.dtype for t in twin.state_dict().values()} == {torch.bfloat16}
    for ours, theirs in zip(run_case(resident), run_case(twin), strict=True):
        assert torch.equal(ours, theirs)
    on_disk = load_file(fp8_file)
    state = resident.state_dict()
    assert {"backbone." + name for name in state} == on_disk.keys()
    assert all(torch.equal(state[name[9:]].float(), tensor.float()) for name, tensor in on_disk.items())


def test_quantising_while_loading_equals_the_converted_file(fp8_file):
    ours, theirs = load_backbone(TINY, dtype=FP8).state_dict(), load_backbone(fp8_file).state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name].float(), theirs[name].float()) for name in ours)


def test_fp8_without_scales_is_taken_at_its_value(tmp_path, tiny, config_text):
    tensors = {n: t.to(FP8) if n.endswith("ffn.0.weight") else t.to(torch.bfloat16) for n, t in tiny.items()}
    model = load_backbone(save_as(tmp_path / "a.safetensors", tensors, config_text, "safetensors"))
    name = "single_blocks.0.ffn.0.weight"
    assert torch.equal(model.state_dict()[name], tiny[name].to(FP8).to(torch.bfloat16))


def test_fp8_error_is_small(fp8_file):
    exact = run_case(load_backbone(TINY))
    for dtype in (torch.float32, None):
        for a, b in zip(run_case(load_backbone(fp8_file, dtype=dtype)), exact, strict=True):
            assert (a.float() - b).norm() < 0.08 * b.norm()  # 6 % at this width of 64


def test_fp8_linear_keeps_the_shape_and_type_of_its_input():
    linear = torch.nn.Linear(32, 48)
    fp8 = Fp8Linear.from_linear(linear)
    x = torch.randn(2, 3, 32, generator=torch.Generator().manual_seed(2))
    expected = torch.nn.functional.linear(x, dequantise_rows(fp8.weight, fp8.weight_scale, torch.float32), linear.bias)
    assert torch.equal(fp8(x), expected)
    assert fp8(x.to(torch.bfloat16)).dtype == torch.bfloat16
    assert (fp8(x) - linear(x)).norm() < 0.04 * linear(x).norm()


def test_fp8_matmul_is_refused_where_there_is_no_hardware_for_it():
    layers = torch.nn.Sequential(Fp8Linear.from_linear(torch.nn.Linear(16, 16)))
    assert "NVIDIA GPU" in fp8_matmul_problem("cpu")
    with pytest.raises(RuntimeError, match="leave fp8_matmul off"):
        set_fp8_matmul(layers, True)
    assert set_fp8_matmul(layers, False) == 1
    layers[0].fp8_matmul = True
    with pytest.raises(RuntimeError, match="turn fp8_matmul off"):
        layers(torch.ones(1, 16))


def test_fp8_matmul_hands_rows_and_scales_over_rightly(monkeypatch):
    def scaled_mm(a, b, *, scale_a, scale_b, out_dtype):
        assert (a.dtype, b.dtype, b.stride()) == (FP8, FP8, (1, 64))  # the kernel wants the weight by columns
        assert (scale_a.shape, scale_b.shape) == ((6, 1), (1, 32))
        assert scale_a.dtype == scale_b.dtype == torch.float32
        return ((a.float() * scale_a) @ (b.float() * scale_b)).to(out_dtype)

    monkeypatch.setattr(torch, "_scaled_mm", scaled_mm)
    monkeypatch.setattr(quantized, "fp8_matmul_problem", lambda device: None)
    layer = Fp8Linear.from_linear(torch.nn.Linear(64, 32))
    x = torch.randn(2, 3, 64, generator=torch.Generator().manual_seed(6))
    exact = layer(x)
    layer.fp8_matmul = True
    assert layer(x).shape == (2, 3, 32)
    assert layer(x).dtype == torch.float32
    assert (layer(x) - exact).norm() < 0.05 * exact.norm()


def test_activation_rows_have_their_own_scale():
    x = torch.randn(6, 64, generator=torch.Generator().manual_seed(4)) * torch.logspace(-4, 4, 6)[:, None]
    x[3] = 0
    rows, scale = quantise_activations(x)
    restored = rows.float() * scale
    assert not restored[3].any()
    assert ((restored - x).abs() <= torch.maximum(x.abs() / 16, scale * 2**-10) * 1.001).all()


@pytest.mark.skipif(
    not torch.cuda.is_available() or fp8_matmul_problem("cuda") is not None, reason="no GPU with float8 matrix units"
)
def test_fp8_matmul_error_on_a_gpu():
    generator = torch.Generator().manual_seed(5)
    linear = torch.nn.Linear(512, 1024)
    fp8 = Fp8Linear.from_linear(linear).cuda()
    x = torch.randn(300, 512, generator=generator).to("cuda", torch.bfloat16)
    exact = fp8(x)
    fp8.fp8_matmul = True
    assert (fp8(x) - exact).norm() < 0.05 * exact.norm()


# ---------------------------------------------------------------- memory

needs_proc = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is measured through /proc")
PEAK = """
import sys
sys.path[:0] = [sys.argv[1], sys.argv[1] + "/tests/core"]
import torch
torch.set_num_threads(1)
from nava_core.checkpoint import load_backbone
from nava_core.convert import convert
from _ram import measure

def warm():
    load_backbone(sys.argv[4], dtype=torch.bfloat16)

warm()
for path in sys.argv[2:4]:
    print(measure(lambda: load_backbone(path, dtype=torch.bfloat16))[0])
print(measure(lambda: convert(sys.argv[2], sys.argv[2] + ".fp8"))[0])
"""


@pytest.fixture(scope="module")
def scaled(tmp_path_factory, config_text) -> dict[str, Path]:
    """An fp32 backbone of about 240 MB whose largest tensor is a small part of it, as in the released one."""
    config = json.loads(config_text) | {
        "dim": 512, "ffn_dim": 3072, "text_dim": 512, "num_heads": 4, "num_double_layers": 2, "num_single_layers": 5
    }  # fmt: skip
    info_config = {key: value for key, value in config.items() if key != "num_layers"}
    from nava_core.backbone.config import BackboneConfig

    model = NavaBackbone(BackboneConfig(**info_config)).init_weights()
    state = {"backbone." + name: tensor for name, tensor in model.state_dict().items()}
    folder = tmp_path_factory.mktemp("scaled")
    save_file(state, folder / "scaled.safetensors", {"config": json.dumps(config)})
    torch.save({"state_dict": state, "config": config}, folder / "scaled.ckpt")
    return {"safetensors": folder / "scaled.safetensors", "ckpt": folder / "scaled.ckpt"}


@pytest.fixture(scope="module")
def peaks(scaled) -> dict[str, int]:
    """Bytes taken at the highest by loading each form as bf16 and by converting to fp8, in one fresh process."""
    command = [sys.executable, "-c", PEAK, str(ROOT), str(scaled["safetensors"]), str(scaled["ckpt"]), str(TINY)]
    # The real file's tensors are so large that glibc maps each by itself and gives it back at once. Without the fixed
    # threshold it would come to keep these smaller ones in its heap, in gaps that vary from run to run.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(2**17)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    return dict(zip(("safetensors", "ckpt", "convert"), map(int, done.stdout.split()), strict=True))


@needs_proc
@pytest.mark.parametrize("form", ["safetensors", "ckpt"])
def test_loading_needs_the_target_and_one_tensor(scaled, peaks, form):
    info = describe_file(scaled[form])
    assert info.size > 200e6
    largest = max(tensor.nbytes for tensor in info.tensors.values())
    target = estimate_memory(info, torch.bfloat16)
    sizes = {"file": info.size, "bf16": target, "largest tensor": largest, "peak": peaks[form]}
    print(form, {what: f"{count / 1e6:.1f} MB" for what, count in sizes.items()})
    assert target < peaks[form] < target + 1.5 * largest + 8e6


@needs_proc
def test_converting_needs_a_tensor_or_two(scaled, peaks):
    largest = max(tensor.nbytes for tensor in describe_file(scaled["safetensors"]).tensors.values())
    print(f"convert: largest tensor {largest / 1e6:.1f} MB, peak {peaks['convert'] / 1e6:.1f} MB")
    assert peaks["convert"] < 3 * largest + 8e6
