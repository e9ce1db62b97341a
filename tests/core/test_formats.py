"""ComfyUI's quantised formats without a host: files equal to their dequantised twins, LoRA, and what is refused."""

import json
import os
import signal
import subprocess
import sys
import time
import zlib
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from nava_core import LoraMerge, load_backbone
from nava_core.backbone import BackboneConfig, NavaBackbone
from nava_core.backbone import formats as module
from nava_core.backbone.formats import FORMATS, MADE_HERE, PROTECTING, QuantisedLayer, nvfp4_by_chance
from nava_core.backbone.quant_linear import QuantLinear
from nava_core.checkpoint import (
    FileKind,
    WrongFileError,
    backbone_config,
    backbone_problem,
    block_linears,
    describe_file,
    estimate_memory,
)
from nava_core.checkpoint.loading import BLOCK_LINEAR
from nava_core.convert import convert
from nava_core.demo import make_small_models

pytest.importorskip("comfy_kitchen", reason="the formats need comfy-kitchen (extra [quantized])")

LAYER, OTHER = "double_blocks.0.self_attn.q", "single_blocks.1.ffn.0"
# Relative error of a rounded Gaussian weight; measured where the format is right, so a wrong scale shows.
ERROR = {
    "int8": (0.004, 0.011),
    "mxfp8": (0.02, 0.03),
    "nvfp4": (0.08, 0.11),
    "w4a8": (0.06, 0.085),
    "w6a8": (0.015, 0.025),
}
NAMES = [name for name in MADE_HERE if module.format_problem(name) is None]


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return make_small_models(tmp_path_factory.mktemp("models"), preview_decoder=False)["backbone"]


@pytest.fixture(scope="module")
def makes(source, tmp_path_factory):
    folder, made = tmp_path_factory.mktemp("quantised"), {}

    def make(name):
        if name not in made:
            protected = [OTHER] if name in PROTECTING else []
            made[name] = convert(source, folder / f"{name}.safetensors", dtype=name, protected=protected).path
        return made[name]

    return make


@pytest.fixture(params=NAMES)
def kind(request):
    return request.param


@pytest.fixture
def file(makes, kind):
    return makes(kind)


def passes(config, dtype=torch.float32):
    generator = torch.Generator().manual_seed(5)
    shapes = ((1, config.vid_in_dim, 2, 6, 8), (1, 9, config.audio_in_dim), (1, 12, config.text_dim))
    video, audio, context = (torch.randn(shape, generator=generator).to(dtype) for shape in shapes)
    return video, audio, torch.tensor([700.0]), context


def predict(model, dtype=torch.float32):
    with torch.no_grad():
        video, audio = model(*passes(model.config, dtype))
    return torch.cat([video.flatten(), audio.flatten()]).float()


def in_fp32(model):
    """Everything but the quantised weights widened."""
    for module_ in model.modules():
        for parameter in module_.parameters(recurse=False):
            if parameter.dtype is torch.bfloat16:
                parameter.data = parameter.data.float()
    return model


# --- files -------------------------------------------------------------------------------------------------------


def test_the_file_is_comfyuis_form(file, kind, source):
    tensors = load_file(file)
    linears = block_linears(describe_file(source))
    for name, shape in linears.items():
        expected = PROTECTING[kind] if kind in PROTECTING and name == OTHER else kind
        said = json.loads(bytes(tensors.pop(f"backbone.{name}.comfy_quant").tolist()))
        assert said["format"] == FORMATS[expected].algorithm
        for suffix, (size, dtype) in QuantisedLayer.made(FORMATS[expected], shape).parts.items():
            part = tensors.pop(f"backbone.{name}.weight{suffix}")
            assert (tuple(part.shape), part.dtype) == (size, dtype), (name, suffix)
    original = load_file(source)
    assert {f"backbone.{name}.weight" for name in linears} == original.keys() - tensors.keys()
    assert all(torch.equal(tensor, original[name].to(torch.bfloat16)) for name, tensor in tensors.items())
    with safe_open(file, "pt") as opened:
        assert json.loads(opened.metadata()["config"])["num_heads"] == 2


def test_it_is_recognised_and_told(file, kind, source):
    info = describe_file(file)
    assert info.kind is FileKind.NAVA_BACKBONE_QUANTISED
    assert info.is_backbone
    assert info.parameters == describe_file(source).parameters
    assert f"a quantised NAVA backbone ({kind}" in info.summary
    if kind in PROTECTING:
        assert f"1 of its {len(info.layers)} layers in {PROTECTING[kind]}" in info.summary
    assert backbone_config(info) == backbone_config(describe_file(source))
    held = sum(parameter.nbytes for parameter in load_backbone(file).parameters())
    marks = sum(t.nbytes for name, t in info.tensors.items() if name.endswith(".comfy_quant"))
    assert held == estimate_memory(info) == sum(t.nbytes for t in info.tensors.values()) - marks
    wide = 2 * info.parameters
    assert estimate_memory(info, torch.bfloat16) == wide


def test_equal_to_its_dequantised_twin(file):
    model, twin = in_fp32(load_backbone(file)), load_backbone(file, dtype=torch.float32)
    assert sum(isinstance(each, QuantLinear) for each in model.modules()) == 56
    assert not any(isinstance(each, QuantLinear) for each in twin.modules())
    torch.testing.assert_close(predict(model), predict(twin), rtol=0, atol=1e-5)


def test_its_twin_in_bf16_through_the_converter(file, tmp_path):
    twin = convert(file, tmp_path / "twin.safetensors", dtype="bf16")
    assert twin.kind is FileKind.NAVA_BACKBONE
    assert not twin.layers
    assert torch.equal(predict(load_backbone(file), torch.bfloat16), predict(load_backbone(twin.path), torch.bfloat16))


def test_the_error_is_the_formats(file, kind, source):
    original, found = load_backbone(source, dtype=torch.float32), load_backbone(file, dtype=torch.float32)
    low, high = ERROR[kind]
    for name in block_linears(describe_file(source)):
        if name == OTHER and kind in PROTECTING:
            continue
        weight, rounded = (model.get_submodule(name).weight for model in (original, found))
        assert low < (rounded - weight).norm() / weight.norm() < high, name


def test_converted_again_it_is_the_same_file(file, kind, tmp_path):
    protected = [OTHER] if kind in PROTECTING else []
    assert (
        convert(file, tmp_path / "again.safetensors", dtype=kind, protected=protected).path.read_bytes()
        == file.read_bytes()
    )


def test_a_layer_that_has_no_whole_blocks_stays_bf16(tmp_path):
    config = BackboneConfig(
        dim=48, ffn_dim=72, freq_dim=32, text_dim=40, text_len=24, num_heads=6, num_double_layers=1, num_single_layers=1
    )
    weights = NavaBackbone(config).init_weights(3).state_dict()
    save_file(
        {f"backbone.{k}": v for k, v in weights.items()},
        tmp_path / "a.safetensors",
        {"config": json.dumps(config.to_dict())},
    )
    info = convert(tmp_path / "a.safetensors", tmp_path / "b.safetensors", dtype="nvfp4")
    assert info.layers.keys() == {name for name, shape in block_linears(info).items() if shape == (48, 48)}
    in_fp32(load_backbone(info.path))
    torch.testing.assert_close(
        predict(in_fp32(load_backbone(info.path))),
        predict(load_backbone(info.path, dtype=torch.float32)),
        rtol=0,
        atol=1e-5,
    )


def test_sizes_at_the_real_size_are_those_of_the_readme():
    """Bytes of the released model's weights, counted from its shapes."""
    with torch.device("meta"):
        state = NavaBackbone(BackboneConfig()).state_dict()
    blocks = {name: tuple(t.shape) for name, t in state.items() if BLOCK_LINEAR.fullmatch(name) and t.ndim == 2}
    rest = sum(t.numel() * 2 for name, t in state.items() if name not in blocks)
    readme = (Path(__file__).parents[2] / "README.md").read_text()
    for name in MADE_HERE:
        size = rest
        for shape in blocks.values():
            parts = QuantisedLayer.made(FORMATS[name], shape).parts.values()
            size += sum(torch.Size(s).numel() * dtype.itemsize for s, dtype in parts)
        assert f"| {name} | {size / 1e9:.2f} GB |" in readme, (name, size)


# --- another's files ---------------------------------------------------------------------------------------------


def changed(file, path, change, metadata=None):
    tensors = load_file(file)
    change(tensors)
    with safe_open(file, "pt") as opened:
        config = opened.metadata()["config"]
    save_file(tensors, path, {"config": config, **(metadata or {})})
    return path


def test_formats_told_in_the_metadata(file, tmp_path):
    layers = {}

    def take(tensors):
        for name in [name for name in tensors if name.endswith(".comfy_quant")]:
            layers[name.removesuffix(".comfy_quant")] = json.loads(bytes(tensors.pop(name).tolist()))

    tensors = load_file(file)
    take(tensors)
    told = changed(file, tmp_path / "a.safetensors", take, {"_quantization_metadata": json.dumps({"layers": layers})})
    assert describe_file(told).layers == describe_file(file).layers
    assert torch.equal(predict(load_backbone(told), torch.bfloat16), predict(load_backbone(file), torch.bfloat16))
    again = convert(told, tmp_path / "b.safetensors", dtype="bf16")
    assert "_quantization_metadata" not in again.metadata


def test_powers_of_two_in_a_type_of_their_own(makes, tmp_path):
    """As ComfyUI saves mxfp8."""
    if not hasattr(torch, "float8_e8m0fnu"):
        pytest.skip("this PyTorch has no such type")

    def widen(tensors):
        for name in [name for name in tensors if name.endswith(".weight_scale")]:
            tensors[name] = tensors[name].view(torch.float8_e8m0fnu)

    saved = changed(makes("mxfp8"), tmp_path / "a.safetensors", widen)
    assert torch.equal(
        predict(load_backbone(saved), torch.bfloat16), predict(load_backbone(makes("mxfp8")), torch.bfloat16)
    )


def test_int8_with_one_scale_and_without_rotation(makes, source, tmp_path):
    """The simplest int8 of other tools."""
    weights = load_backbone(source).state_dict()
    exact = {}

    def plain(tensors):
        for name in block_linears(describe_file(source)):
            weight = weights[f"{name}.weight"]
            scale = weight.abs().max() / 127
            tensors[f"backbone.{name}.weight"] = (weight / scale).round().to(torch.int8)
            tensors[f"backbone.{name}.weight_scale"] = scale
            mark = json.dumps({"format": "int8_tensorwise"}).encode()
            tensors[f"backbone.{name}.comfy_quant"] = torch.tensor(list(mark), dtype=torch.uint8)
            exact[f"{name}.weight"] = (weight / scale).round() * scale

    path = changed(makes("int8"), tmp_path / "a.safetensors", plain)
    state = load_backbone(path, dtype=torch.float32).state_dict()
    for name, weight in exact.items():
        torch.testing.assert_close(state[name], weight, rtol=0, atol=1e-6)
    again = load_backbone(
        convert(path, tmp_path / "b.safetensors", dtype="int8").path, dtype=torch.float32
    ).state_dict()
    assert all(torch.equal(again[name], state[name]) for name in state)


def test_fp8_with_one_scale_a_weight(makes, source, tmp_path):
    """ComfyUI's own scaled fp8."""
    weights = load_backbone(source).state_dict()

    def plain(tensors):
        for name in [name for name in tensors if ".weight_" in name or name.endswith(".comfy_quant")]:
            del tensors[name]
        for name in block_linears(describe_file(source)):
            weight = weights[f"{name}.weight"]
            scale = weight.abs().max() / 448
            tensors[f"backbone.{name}.weight"] = (weight / scale).to(torch.float8_e4m3fn)
            tensors[f"backbone.{name}.weight_scale"] = scale
            mark = json.dumps({"format": "float8_e4m3fn"}).encode()
            tensors[f"backbone.{name}.comfy_quant"] = torch.tensor(list(mark), dtype=torch.uint8)

    path = changed(makes("int8"), tmp_path / "a.safetensors", plain)
    assert "fp8 with one scale" in describe_file(path).summary
    state = load_backbone(path, dtype=torch.float32).state_dict()
    for name in block_linears(describe_file(source)):
        weight = weights[f"{name}.weight"]
        assert (state[f"{name}.weight"] - weight).norm() < 0.04 * weight.norm()


DAMAGE = {
    "no scale": (lambda t, n: t.pop(_scale(t, n)), "has no weight_"),
    "another scale": (lambda t, n: t.update({_scale(t, n): t[_scale(t, n)][:1].clone()}), r"its weight_s\w+ is"),
    "no weight": (lambda t, n: t.pop(f"{n}.weight"), "has no weight of two dimensions|incomplete NAVA backbone"),
    "a weight of one dimension": (
        lambda t, n: t.update({f"{n}.weight": t[f"{n}.weight"].flatten()}),
        "has no weight of two dimensions",
    ),
    "broken JSON": (
        lambda t, n: t.update({f"{n}.comfy_quant": t[f"{n}.comfy_quant"][:-3]}),
        "comfy_quant of its layer",
    ),
    "a list": (lambda t, n: t.update({f"{n}.comfy_quant": _mark([1])}), "comfy_quant of its layer"),
    "no format": (lambda t, n: t.update({f"{n}.comfy_quant": _mark({})}), "in the format 'None', which is not known"),
    "an unknown format": (
        lambda t, n: t.update({f"{n}.comfy_quant": _mark({"format": "int3_of_tomorrow"})}),
        "in the format 'int3_of_tomorrow', which is not known here",
    ),
    "a long mark": (
        lambda t, n: t.update({f"{n}.comfy_quant": torch.zeros(1 << 16, dtype=torch.uint8)}),
        "comfy_quant of its layer",
    ),
}


def _scale(tensors, name):
    return sorted(key for key in tensors if key.startswith(f"{name}.weight_s"))[0]


def _mark(value):
    return torch.tensor(list(json.dumps(value).encode()), dtype=torch.uint8)


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_or_unknown_layer_is_one_sentence(file, tmp_path, damage):
    change, words = DAMAGE[damage]
    path = changed(file, tmp_path / "a.safetensors", lambda tensors: change(tensors, f"backbone.{LAYER}"))
    with pytest.raises(WrongFileError, match=words) as caught:
        load_backbone(path)
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith("a.safetensors")
    assert backbone_problem(path) == str(caught.value)


@pytest.mark.parametrize("options", [{"convrot_groupsize": 0}, {"convrot_groupsize": 48}, {"convrot_groupsize": 4096}])
def test_a_rotation_that_cannot_be(makes, tmp_path, options):
    said = {"format": "int8_tensorwise", "convrot": True, **options}
    path = changed(
        makes("int8"), tmp_path / "a.safetensors", lambda t: t.update({f"backbone.{LAYER}.comfy_quant": _mark(said)})
    )
    with pytest.raises(WrongFileError, match=f"its layer {LAYER} "):
        load_backbone(path)


def test_damaged_values_are_named(source, tmp_path):
    weights = load_file(source)
    weights[f"backbone.{LAYER}.weight"][0, 0] = float("nan")
    save_file(weights, tmp_path / "a.safetensors", {"config": describe_file(source).metadata["config"]})
    with pytest.raises(ValueError, match=rf"{LAYER}.weight cannot be turned into nvfp4\. The weight holds NaN"):
        convert(tmp_path / "a.safetensors", tmp_path / "b.safetensors", dtype="nvfp4")
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.safetensors"]


def test_without_the_kitchen_it_is_a_sentence(makes, source, tmp_path, monkeypatch):
    path = makes("nvfp4")
    module.kitchen.cache_clear()
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "comfy_kitchen.tensor", None)
        with pytest.raises(
            WrongFileError, match=r"install this project's extra \[quantized\], or run `pip install comfy"
        ):
            load_backbone(path)
        with pytest.raises(RuntimeError, match="need the package comfy-kitchen"):
            convert(source, tmp_path / "a.safetensors", dtype="int8")
        assert describe_file(path).kind is FileKind.NAVA_BACKBONE_QUANTISED
        load_backbone(source)
    module.kitchen.cache_clear()
    assert not list(tmp_path.iterdir())


# --- the converter's choices -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("first", "second"), [("nvfp4", "int8"), ("w4a8", "mxfp8"), ("nvfp4", "fp8"), ("w4a8", "w6a8")]
)
def test_more_bits_than_there_were_are_refused(makes, tmp_path, first, second):
    with pytest.raises(ValueError, match=rf"weights in {first}, 4 bits each: in {second} they would take more room"):
        convert(makes(first), tmp_path / "a.safetensors", dtype=second)
    assert not list(tmp_path.iterdir())


def test_a_second_rounding_is_said(makes, source, tmp_path):
    said = []
    convert(makes("int8"), tmp_path / "a.safetensors", dtype="nvfp4", say=said.append)
    fp8 = convert(source, tmp_path / "fp8.safetensors").path
    convert(fp8, tmp_path / "b.safetensors", dtype="int8", say=said.append)
    assert [sentence.split(" has weights in ")[1][:5] for sentence in said] == ["int8 ", "fp8 a"]
    convert(source, tmp_path / "c.safetensors", dtype="int8", say=said.append)
    assert len(said) == 2
    assert describe_file(tmp_path / "b.safetensors").layers.keys() == block_linears(describe_file(source)).keys()


def test_what_cannot_be_protected(source, tmp_path):
    for dtype in ("int8", "mxfp8", "fp8", "bf16"):
        with pytest.raises(ValueError, match="Layers can be protected beside nvfp4, w4a8, w6a8"):
            convert(source, tmp_path / "a.safetensors", dtype=dtype, protected=[LAYER])
    with pytest.raises(ValueError, match=r"has no Linear head\.head in its blocks to protect"):
        convert(source, tmp_path / "a.safetensors", dtype="nvfp4", protected=["head.head"])
    assert not list(tmp_path.iterdir())


def test_killed_in_the_middle_it_leaves_no_file_under_its_name(source, tmp_path):
    """SIGKILL, which no handler sees: what is left is marked as a part."""
    target = tmp_path / "small.safetensors"
    code = (
        "import sys, time\nfrom nava_core.convert import convert\n"
        "def slow(done, total):\n    print(done, flush=True)\n    time.sleep(0.2)\n"
        "convert(sys.argv[1], sys.argv[2], dtype='nvfp4', progress=slow)\n"
    )
    root = Path(__file__).parents[2]
    process = subprocess.Popen(
        [sys.executable, "-c", code, source, target],
        cwd=root,
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(root)},
    )
    process.stdout.readline()
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not target.exists()
    assert all(entry.name.startswith(".") and entry.name.endswith(".part") for entry in tmp_path.iterdir())
    start = time.monotonic()
    convert(source, target, dtype="nvfp4")
    assert time.monotonic() - start < 120
    assert describe_file(target).layers


def test_fp8_is_refused_before_any_work(makes, source, tmp_path):
    from nava_core import ModelFiles, NavaPipeline

    pytest.importorskip("diffusers", reason="the pipeline needs diffusers (extra [standalone])")
    models = make_small_models(tmp_path, preview_decoder=False)
    roles = ("text_encoder", "video_vae", "audio_vae")
    files = ModelFiles(backbone=makes("nvfp4"), **{role: models[role] for role in roles})
    with pytest.raises(ValueError, match=r"is in nvfp4.*: another rounding, to fp8, would only lose"):
        NavaPipeline.from_files(files, dtype=torch.float8_e4m3fn)
    NavaPipeline.from_files(files)


# --- LoRA --------------------------------------------------------------------------------------------------------


def lora_file(path, weights, size=0.2):
    tensors = {}
    generator = torch.Generator().manual_seed(1)
    for name in (LAYER, OTHER):
        weight = weights[f"{name}.weight"]
        up, down = (
            torch.randn(len(weight), 4, generator=generator),
            torch.randn(4, weight.shape[1], generator=generator),
        )
        up *= size * weight.std() / (up @ down).std()
        tensors |= {f"{name}.lora_up.weight": up, f"{name}.lora_down.weight": down}
    tensors["head.head.diff_b"] = torch.ones(192)
    save_file(tensors, path)
    return path, {
        f"{n}.weight": tensors[f"{n}.lora_up.weight"] @ tensors[f"{n}.lora_down.weight"] for n in (LAYER, OTHER)
    }


@pytest.mark.parametrize("size", [0.2, 0.02])
def test_a_lora_is_that_of_the_dequantised_weight_within_the_rounding(file, kind, tmp_path, size):
    before = load_backbone(file, dtype=torch.float32).state_dict()
    lora, deltas = lora_file(tmp_path / "lora.safetensors", before, size)
    with LoraMerge([lora], file).changes() as changes:
        model = load_backbone(file, changes=changes)
    plain = load_backbone(file).state_dict()
    for name, delta in deltas.items():
        linear = model.get_submodule(name.removesuffix(".weight"))
        assert isinstance(linear, QuantLinear)
        after = linear.layer.dequantise(linear.parts(), torch.float32)
        exact = before[name] + delta
        high = ERROR[PROTECTING.get(kind, kind) if name.startswith(OTHER) else kind][1]
        assert (after - exact).norm() < 1.6 * high * exact.norm()
        kept = ((after - before[name]) * delta).sum() / delta.square().sum()
        assert kept == pytest.approx(1, abs=0.1 if size > 0.1 else 0.35)
    state = model.state_dict()
    touched = {name for name, tensor in state.items() if not torch.equal(_bytes(tensor), _bytes(plain[name]))}
    assert {name.rpartition(".")[0] for name in touched} == {LAYER, OTHER, "head.head"}


def _bytes(tensor):
    return tensor.reshape(-1).view(torch.uint8)


def test_a_lora_of_nothing_changes_no_bit(file, tmp_path):
    plain = load_backbone(file)
    lora, _ = lora_file(tmp_path / "lora.safetensors", load_backbone(file, dtype=torch.float32).state_dict(), 0.0)
    with LoraMerge([lora], file).changes() as changes:
        state = load_backbone(file, changes=changes).state_dict()
    for name, tensor in plain.state_dict().items():
        assert torch.equal(_bytes(state[name]), _bytes(tensor)) or name == "head.head.bias"


def test_nvfp4_goes_up_and_down_by_chance_and_keeps_what_it_has():
    generator = torch.Generator().manual_seed(0)
    layer = QuantisedLayer.made(FORMATS["nvfp4"], (32, 64))
    weight = torch.randn(32, 64, generator=generator)
    parts = layer.quantise(weight)
    exact = layer.dequantise(parts, torch.float32)
    again = nvfp4_by_chance(exact, parts["_scale_2"], zlib.crc32(b"x"))
    assert torch.equal(_bytes(again["_scale"]), _bytes(parts["_scale"]))
    assert torch.equal(layer.dequantise(again, torch.float32), exact)
    # A quarter of the way to the next value: there on a quarter of the draws.
    step = torch.zeros(32, 64)
    step[:, 1::16] = 0.01 * exact[:, 1::16].sign()
    rounded = (nvfp4_by_chance(exact + step, parts["_scale_2"], seed) for seed in range(1, 400))
    draws = torch.stack([layer.dequantise(each, torch.float32) for each in rounded])
    moved = draws.mean(0) - exact
    assert moved[:, 1::16].mean() == pytest.approx(step[:, 1::16].mean().item(), abs=5e-4)
    assert (moved[:, 1::16] * exact[:, 1::16].sign()).mean() == pytest.approx(0.01, rel=0.25)


def test_products_on_the_int8_units_in_their_reference_form(makes, kind):
    """What a GPU with int8 units computes: near the exact product, and not it."""
    if not FORMATS[kind].on_int8_units:
        pytest.skip("no format of the int8 units")
    linear = load_backbone(makes(kind)).get_submodule(LAYER)
    x = torch.randn(2, 50, linear.in_features, generator=torch.Generator().manual_seed(2))
    exact = linear(x)
    linear.on_units = True
    error = (linear(x) - exact).norm() / exact.norm()
    assert 0.002 < error < 0.02
