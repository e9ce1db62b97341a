"""Weights in ComfyUI's own formats: kept by the host, equal to their dequantised twin, LoRA, offloading, saving."""

import json
import logging
import types

import comfy_host
import pytest
import torch
import torch.nn.functional as F
from graphs import Graph
from safetensors import safe_open
from safetensors.torch import load_file, save_file

comfy_host.import_comfyui()

import comfy.cli_args  # noqa: E402
import comfy.lora  # noqa: E402
import comfy.memory_management  # noqa: E402
import comfy.model_management  # noqa: E402
import comfy.model_patcher  # noqa: E402
import comfy.ops  # noqa: E402
import comfy.quant_ops  # noqa: E402
import comfy.sd  # noqa: E402
import comfy.utils  # noqa: E402
import comfy_aimdo.host_buffer  # noqa: E402
import comfy_aimdo.model_vbar  # noqa: E402
import comfy_aimdo.torch  # noqa: E402
from comfy.quant_ops import QUANT_ALGOS, QuantizedTensor  # noqa: E402

from nava_core import LoraMerge  # noqa: E402
from nava_core import load_backbone as load_core  # noqa: E402

host_model = comfy_host.pack_module("nodes.host.model")
quantized = comfy_host.pack_module("nodes.host.quantized")
formats = comfy_host.pack_module("nava_core.backbone.formats")
convert = comfy_host.pack_module("nava_core.convert").convert

CPU = torch.device("cpu")
LAYER, OTHER = "double_blocks.0.self_attn.q", "single_blocks.1.ffn.0"
KEY = f"diffusion_model.{LAYER}.weight"
PROTECTED = {"nvfp4": "mxfp8", "w4a8": "int8", "w6a8": "int8"}
KNOWN = [name for name in formats.MADE_HERE if quantized.host_problem(formats.FORMATS[name], CPU) is None]
UNKNOWN = [name for name in formats.MADE_HERE if formats.FORMATS[name].algorithm not in QUANT_ALGOS]
# Half the largest step between neighbours, relative to the largest value of a row or block that shares a scale.
STEP = {"int8": 2 / 127, "mxfp8": 1 / 8, "nvfp4": 1 / 3, "w4a8": 1 / 4, "w6a8": 1 / 16}


@pytest.fixture(scope="module", autouse=True)
def inference():
    """As ComfyUI runs nodes."""
    with torch.inference_mode():
        yield


@pytest.fixture(scope="module")
def makes(small_models, tmp_path_factory):
    """The small backbone in a format, one layer of it protected where that can be, made once."""
    folder, made = tmp_path_factory.mktemp("quantised"), {}

    def make(name):
        if name not in made:
            target = folder / f"NAVA_{name}.safetensors"
            protected = [OTHER] if name in PROTECTED else []
            made[name] = str(convert(small_models["backbone"], target, dtype=name, protected=protected).path)
        return made[name]

    return make


@pytest.fixture(params=KNOWN)
def kind(request):
    return request.param


@pytest.fixture
def file(makes, kind):
    return makes(kind)


@pytest.fixture
def patcher(file):
    return host_model.load_backbone(file)


@pytest.fixture
def twin(file):
    """The same file dequantised without rounding."""
    return host_model.load_backbone(file, "fp32")


def predict(patcher, dtype=torch.float32):
    model = patcher.model.diffusion_model
    generator = torch.Generator().manual_seed(5)
    shapes = ((1, model.config.vid_in_dim, 2, 6, 8), (1, 8, 10, 16), (1, 12, model.config.text_dim))
    video, audio, context = (torch.randn(shape, generator=generator).to(dtype) for shape in shapes)
    video, audio = model([video, audio], torch.tensor([700.0]), context, transformer_options={})
    return torch.cat([video.flatten(), audio.flatten()]).float()


def layer(patcher, name=LAYER):
    return patcher.model.diffusion_model.get_submodule(name)


def stored(patcher, name=LAYER):
    return {key: tensor.view(torch.uint8).clone() for key, tensor in raw(layer(patcher, name)).items()}


def raw(linear):
    """A weight's parts as bytes; single numbers as one."""
    return {key: part.reshape(-1) for key, part in linear.weight.state_dict("weight").items()}


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


def dequantised(patcher, name=LAYER):
    return layer(patcher, name).weight.to(dtype=torch.float32).dequantize()


def lora(patcher, name=LAYER, size=0.2, seed=1):
    """Low-rank matrices of a LoRA file for one layer, its delta ``size`` times the weight's own size: (file, delta)."""
    weight = dequantised(patcher, name)
    generator = torch.Generator().manual_seed(seed)
    up = torch.randn(weight.shape[0], 4, generator=generator)
    down = torch.randn(4, weight.shape[1], generator=generator)
    up *= size * weight.std() / (up @ down).std()
    file = {f"diffusion_model.{name}.lora_A.weight": down, f"diffusion_model.{name}.lora_B.weight": up}
    return file, up @ down


def with_lora(patcher, file, strength=1.0):
    """A clone with the LoRA, as the stock loader makes it."""
    return comfy.sd.load_lora_for_models(patcher, None, file, strength, 0)[0]


# --- loading -----------------------------------------------------------------------------------------------------


def test_the_files_formats_layer_by_layer_and_its_size(file, kind, patcher, caplog):
    assert "unet" not in caplog.text  # the host's words for names that are missing or not known
    kept = {}
    for name, module in patcher.model.diffusion_model.named_modules():
        if isinstance(getattr(module, "weight", None), QuantizedTensor):
            kept[name] = module.quant_format
            assert module.weight.dtype is torch.bfloat16
            assert module._full_precision_mm  # no units for it here
    protecting = formats.FORMATS[PROTECTED.get(kind, kind)].algorithm
    assert kept.pop(OTHER) == protecting
    assert set(kept.values()) == {formats.FORMATS[kind].algorithm}
    assert len(kept) == 2 * 18 + 2 * 10 - 1
    with safe_open(file, "pt") as opened:
        in_file = sum(opened.get_tensor(name).nbytes for name in opened.keys())  # noqa: SIM118
    assert sum(t.nbytes for t in patcher.model.diffusion_model.state_dict().values()) == in_file


def test_equal_to_its_dequantised_twin(patcher, twin, small_models):
    out = predict(patcher)
    assert out.std() > 0.01
    torch.testing.assert_close(out, predict(twin), rtol=0, atol=1e-5)
    original = predict(host_model.load_backbone(str(small_models["backbone"])))
    assert (out - original).abs().max() > 1e-4  # so the comparison says something


def test_equal_to_its_dequantised_twin_in_bf16(patcher, file):
    twin = host_model.load_backbone(file, "bf16")
    assert not any(isinstance(p, QuantizedTensor) for p in twin.model.parameters())
    assert torch.equal(predict(patcher, torch.bfloat16), predict(twin, torch.bfloat16))


def test_equal_to_the_core(patcher, file):
    model = load_core(file)
    state = patcher.model.diffusion_model.state_dict()
    for name, tensor in model.state_dict().items():
        assert torch.equal(state[name].view(tensor.dtype), tensor), name
    generator = torch.Generator().manual_seed(5)
    linear = model.get_submodule(LAYER)
    x = torch.randn(3, linear.in_features, generator=generator)
    torch.testing.assert_close(layer(patcher)(x), linear(x), rtol=0, atol=1e-5)


def test_formats_told_in_the_metadata(file, patcher, tmp_path):
    """The other of ComfyUI's two ways to say what a layer is in."""
    tensors, layers = load_file(file), {}
    for name in [name for name in tensors if name.endswith(".comfy_quant")]:
        layers[name.removesuffix(".comfy_quant")] = json.loads(bytes(tensors.pop(name).tolist()))
    with safe_open(file, "pt") as opened:
        config = opened.metadata()["config"]
    quantization = json.dumps({"format_version": "1.0", "layers": layers})
    metadata = {"config": config, "_quantization_metadata": quantization}
    save_file(tensors, tmp_path / "told.safetensors", metadata)
    assert torch.equal(predict(host_model.load_backbone(str(tmp_path / "told.safetensors"))), predict(patcher))


def test_loaded_again_for_another_device(patcher):
    """As the host's nodes that select a device, or spread a model over several, do."""
    load, arguments = patcher.cached_patcher_init
    again = load(*arguments, disable_dynamic=True)
    assert again.model is not patcher.model
    assert same(stored(again), stored(patcher))
    assert torch.equal(predict(again), predict(patcher))


@pytest.mark.parametrize("kind", UNKNOWN)
def test_a_host_that_does_not_know_the_format(kind, makes, caplog):
    with caplog.at_level(logging.WARNING):
        patcher = host_model.load_backbone(makes(kind))
    name = formats.FORMATS[kind].name
    assert f"this ComfyUI knows no {name} weights; update ComfyUI" in caplog.text
    assert "widened to bf16" in caplog.text
    assert not any(isinstance(p, QuantizedTensor) for p in patcher.model.parameters())
    torch.testing.assert_close(
        predict(patcher), predict(host_model.load_backbone(makes(kind), "fp32")), rtol=0, atol=0.05
    )
    with pytest.raises(RuntimeError, match=rf"This ComfyUI knows no {name} weights.* Set weight_dtype to bf16\."):
        host_model.load_backbone(makes(kind), "auto fast")


def test_a_format_that_the_host_has_lost(file, kind, monkeypatch, twin, caplog):
    """What 0.18 does with int8, on every host."""
    monkeypatch.delitem(QUANT_ALGOS, formats.FORMATS[kind].algorithm)
    with caplog.at_level(logging.WARNING):
        patcher = host_model.load_backbone(file)
    assert f"knows no {kind} weights" in caplog.text
    torch.testing.assert_close(predict(patcher), predict(twin), rtol=0, atol=0.05)
    with pytest.raises(RuntimeError, match=f"This ComfyUI knows no {kind} weights"):
        host_model.load_backbone(file, "auto fast")


@pytest.mark.skipif(formats.format_problem("w6a8") is None, reason="this comfy-kitchen has 6 bits")
def test_a_kitchen_without_6_bits_is_told_to_be_updated(tmp_path, makes):
    """What a w6a8 file looks like to comfy-kitchen up to about 0.2.31."""
    tensors = load_file(makes("w4a8"))
    for name in [name for name in tensors if name.endswith(".weight_s_rel")]:
        layer = name.removesuffix(".weight_s_rel")
        rows, groups = tensors[name].shape
        tensors[f"{layer}.weight"] = torch.zeros(rows, groups * 12, dtype=torch.int8)
        del tensors[f"{layer}.weight_codebook"]
    save_file(tensors, tmp_path / "NAVA_w6a8.safetensors")
    with pytest.raises(ValueError, match="installed comfy-kitchen is too old for w6a8 weights: run `pip install -U"):
        host_model.load_backbone(str(tmp_path / "NAVA_w6a8.safetensors"))


@pytest.mark.parametrize("weight_dtype", ["fp8", "fp8 fast"])
def test_smaller_weights_are_not_rounded_to_fp8(file, kind, weight_dtype):
    with pytest.raises(ValueError, match=f"is in {kind}.*: another rounding, to fp8, would only lose"):
        host_model.load_backbone(file, weight_dtype)


def test_the_servers_fp8_flag_leaves_them(file, patcher, monkeypatch):
    monkeypatch.setattr(comfy.cli_args.args, "fp8_e4m3fn_unet", True)
    assert same(stored(host_model.load_backbone(file)), stored(patcher))


def test_a_damaged_file_is_one_sentence(file, kind, tmp_path):
    tensors = load_file(file)
    first = next(name for name in tensors if name.startswith(f"backbone.{LAYER}.weight_s"))
    del tensors[first]
    save_file(tensors, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match=rf"its layer {LAYER} is {kind} and has no weight_") as caught:
        host_model.load_backbone(str(tmp_path / "a.safetensors"))
    assert "\n" not in str(caught.value)


# --- LoRA --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [LAYER, OTHER])
def test_lora_is_that_of_the_dequantised_weight_within_the_rounding(patcher, kind, name):
    before = dequantised(patcher, name)
    file, delta = lora(patcher, name)
    comfy.model_management.load_models_gpu([with_lora(patcher, file)], force_full_load=True)
    after, exact = dequantised(patcher, name), before + delta
    format = PROTECTED.get(kind, kind) if name == OTHER else kind
    assert (after - exact).abs().max() <= 1.3 * STEP[format] * exact.abs().max()
    assert (after - exact).norm() < 2.5 * STEP[format] / 3**0.5 * exact.abs().max() / 2 * exact.numel() ** 0.5
    assert layer(patcher, name).weight.dtype is torch.bfloat16


def test_a_weak_lora_is_kept_on_average(patcher):
    before = dequantised(patcher, OTHER)
    file, delta = lora(patcher, OTHER, size=0.02)
    comfy.model_management.load_models_gpu([with_lora(patcher, file)], force_full_load=True)
    change = dequantised(patcher, OTHER) - before
    assert (change * delta).sum() / (delta * delta).sum() == pytest.approx(1, abs=0.25)


def test_nvfp4_keeps_what_a_lora_leaves(makes):
    """A LoRA of a hundredth: the host's own rounding would move the weight by 17 %."""
    patcher = host_model.load_backbone(makes("nvfp4"))
    before = dequantised(patcher)
    comfy.model_management.load_models_gpu([with_lora(patcher, lora(patcher, size=0.01)[0])], force_full_load=True)
    assert (dequantised(patcher) - before).norm() < 0.08 * before.norm()
    host = comfy.quant_ops.TensorCoreNVFP4Layout.quantize(before.clone(), scale="recalculate", stochastic_rounding=7)
    theirs = comfy.quant_ops.TensorCoreNVFP4Layout.dequantize(*host)
    assert (theirs - before).norm() > 0.1 * before.norm()  # else this pack's own rounding is not needed any more


def test_merged_by_the_core_bit_by_bit(patcher, file, kind, tmp_path):
    """The core's LoRA merge gives the weights that the host's loader makes."""
    tensors = {}
    for seed, name in enumerate((LAYER, OTHER, "single_blocks.0.cross_attn.v")):
        tensors |= lora(patcher, name, seed=seed)[0]
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, tmp_path / "lora.safetensors")
    comfy.model_management.load_models_gpu([with_lora(patcher, tensors, 0.7)], force_full_load=True)
    with LoraMerge([(tmp_path / "lora.safetensors", 0.7)], file).changes() as changes:
        merged = load_core(file, changes=changes).state_dict()
    old = not hasattr(QuantizedTensor, "requantize_from_float") or not hasattr(
        comfy.float, "_ck_stochastic_rounding_fp8"
    )
    for name, tensor in patcher.model.diffusion_model.state_dict().items():
        if name.endswith(".comfy_quant"):
            continue
        mxfp8 = (
            layer(patcher, name.rpartition(".")[0]).__dict__.get("quant_format") == "mxfp8" if "weight" in name else 0
        )
        if old and mxfp8 and name.endswith(".weight"):  # ComfyUI 0.18 draws the same rounding otherwise
            wanted, got = (t.view(torch.float8_e4m3fn).float() for t in (tensor, merged[name]))
            assert ((wanted - got).abs() <= 0.126 * wanted.abs().maximum(got.abs()) + 2.0**-9).all()
            continue
        assert torch.equal(tensor.reshape(-1).view(torch.uint8), merged[name].reshape(-1).view(torch.uint8)), name


def test_original_bits_come_back_without_the_lora(patcher):
    original, out = stored(patcher), predict(patcher)
    patched = with_lora(patcher, lora(patcher)[0])
    comfy.model_management.load_models_gpu([patched], force_full_load=True)
    assert not same(stored(patcher), original)
    comfy.model_management.load_models_gpu([patcher], force_full_load=True)
    assert same(stored(patcher), original)
    assert torch.equal(predict(patcher), out)


def test_lora_of_a_layer_left_behind_is_exact(patcher, twin):
    """Low VRAM: the LoRA is added to the dequantised weight as it is used, so nothing is rounded again."""
    file, _ = lora(patcher)
    outs = []
    for model in (patcher, twin):
        patched = with_lora(model, file)
        patched.patch_model(device_to=CPU, lowvram_model_memory=1)
        assert len(layer(patched).weight_function) == 1
        outs.append(predict(patched))
        patched.detach()
    torch.testing.assert_close(outs[0], outs[1], rtol=0, atol=1e-5)


def test_partly_loaded_and_unloaded(patcher):
    original, out, total = stored(patcher), predict(patcher), patcher.model_size()
    patcher.partially_load(CPU, extra_memory=total * 99 // 100)
    for _ in range(3):
        torch.testing.assert_close(predict(patcher), out, rtol=0, atol=1e-5)
        patcher.partially_unload(CPU, total // 5)
    patcher.detach()
    assert same(stored(patcher), original)


def test_merging_with_a_dequantised_model(patcher, twin):
    """What stock merge nodes do: half of each of two equal models is the model again."""
    merged = twin.clone()
    for key, value in patcher.get_key_patches("diffusion_model.").items():
        merged.add_patches({key: value}, 0.5, 0.5)
    before = layer(twin).weight.clone()
    comfy.model_management.load_models_gpu([merged], force_full_load=True)
    torch.testing.assert_close(layer(merged).weight, before, rtol=0, atol=1e-6)
    merged.detach()


def test_a_lora_hook_is_refused_in_a_sentence(patcher):
    with pytest.raises(RuntimeError, match="set weight_dtype to bf16"):
        layer(patcher).set_weight(dequantised(patcher), inplace_update=True, seed=1)


# --- saving ------------------------------------------------------------------------------------------------------


def saved(patcher, path):
    comfy.utils.save_torch_file(
        {k: v if v.is_contiguous() else v.contiguous() for k, v in patcher.state_dict_for_saving().items()}, str(path)
    )
    return host_model.load_backbone(str(path))


def test_saved_by_the_host_and_loaded_again(patcher, tmp_path):
    comfy.model_management.load_models_gpu([patcher], force_full_load=True)
    state = saved(patcher, tmp_path / "saved.safetensors").model.diffusion_model.state_dict()
    mine = patcher.model.diffusion_model.state_dict()
    assert state.keys() == mine.keys()
    for name, tensor in mine.items():
        assert torch.equal(state[name].reshape(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8)), name


def test_saved_with_a_lora_the_same_whether_loaded_or_not(patcher, tmp_path):
    patched = with_lora(patcher, lora(patcher)[0])
    original = stored(patcher)
    comfy.model_management.load_models_gpu([patched], force_full_load=True)
    whole = saved(patched, tmp_path / "whole.safetensors")
    patched.detach()
    patched.patch_model(device_to=CPU, lowvram_model_memory=1)
    part = saved(patched, tmp_path / "part.safetensors")
    patched.detach()
    assert same(stored(whole), stored(part))
    assert not same(stored(whole), original)
    assert same(stored(whole, OTHER), stored(patcher, OTHER))


# --- dynamic VRAM, with stand-ins for the GPU's side -------------------------------------------------------------


def load_under_dynamic_vram(monkeypatch, *arguments):
    """What a GPU under dynamic VRAM takes: weights stay mapped from the file. (model, paths that were mapped)"""
    mapped, load = [], comfy.utils.load_torch_file
    with monkeypatch.context() as patch:
        patch.setattr(comfy.model_patcher.ModelPatcher, "is_dynamic", lambda self: True)
        patch.setattr(comfy.utils, "load_torch_file", lambda path, **k: mapped.append(path) or load(path, **k))
        return host_model.load_backbone(*arguments), mapped


def test_mapped_file_is_taken_as_it_is(file, patcher, monkeypatch, caplog):
    loaded, mapped = load_under_dynamic_vram(monkeypatch, file)
    assert mapped == [file]
    assert "unet" not in caplog.text
    assert same(stored(loaded), stored(patcher))
    assert torch.equal(predict(loaded), predict(patcher))


def test_widened_weights_are_not_mapped(file, twin, monkeypatch):
    loaded, mapped = load_under_dynamic_vram(monkeypatch, file, "fp32")
    assert mapped == []
    assert torch.equal(predict(loaded), predict(twin))


def test_weight_through_the_hosts_transfer_buffer(patcher):
    """Gathered as bytes and taken out as views, scales included: how pinned and offloaded weights travel."""
    linear = layer(patcher)
    tensors = [linear.weight, linear.bias]
    buffer = torch.zeros(comfy.memory_management.vram_aligned_size(tensors), dtype=torch.uint8)
    comfy.model_management.cast_to_gathered(tensors, buffer)
    weight, bias = comfy.memory_management.interpret_gathered_like(tensors, buffer)
    assert same(raw(types.SimpleNamespace(weight=weight)), raw(linear))
    assert torch.equal(bias, linear.bias)
    assert torch.equal(weight.dequantize(), linear.weight.dequantize())


def test_small_layers_are_not_quantised_anew(file, monkeypatch):
    """Dynamic VRAM copies layers below 16 KB whole, through the calls that otherwise add a LoRA."""
    monkeypatch.setattr(comfy.model_patcher, "CoreModelPatcher", comfy.model_patcher.ModelPatcherDynamic)
    monkeypatch.setattr(comfy.model_management, "is_device_cpu", lambda device: False)
    monkeypatch.setattr(comfy_aimdo.host_buffer, "HostBuffer", lambda *_: types.SimpleNamespace(size=0))
    patcher = host_model.load_backbone(file)
    assert isinstance(patcher, comfy.model_patcher.ModelPatcherDynamic)
    original = stored(patcher)
    patcher.load(CPU)
    assert same(stored(patcher), original)


def fetched(linear, x):
    """The layer's product as dynamic VRAM computes it on a GPU: there the weight is on another device than ``x``."""
    if not hasattr(comfy.ops, "resolve_cast_module_with_vbar"):
        return linear(x)
    arguments = (x.dtype, CPU, x.dtype)
    comfy.ops.cast_modules_with_vbar([linear], *arguments, False)
    weight, bias = comfy.ops.resolve_cast_module_with_vbar(linear, *arguments, x.dtype, False)
    linear.weight_lowvram_function.clear_prepared()
    del linear._prefetch
    return F.linear(x, weight, bias)


def test_dynamic_vram_layer_with_a_lora(patcher, kind, monkeypatch):
    """Fetched, patched and kept quantised in GPU memory at first use, then used from there."""
    linear = layer(patcher)
    file, delta = lora(patcher)
    patched = with_lora(patcher, file)
    before = dequantised(patcher)
    size = comfy.memory_management.vram_aligned_size([linear.weight, linear.bias])
    memory = torch.zeros(size, dtype=torch.uint8)
    monkeypatch.setattr(comfy_aimdo.model_vbar, "vbar_fault", lambda allocation: 1)
    monkeypatch.setattr(comfy_aimdo.model_vbar, "vbar_signature_compare", lambda a, b: a == b)
    monkeypatch.setattr(comfy_aimdo.model_vbar, "vbar_unpin", lambda allocation: None)
    monkeypatch.setattr(comfy_aimdo.torch, "aimdo_to_tensor", lambda allocation, device: memory)
    monkeypatch.setattr(comfy.model_management, "is_device_cpu", lambda device: False)
    monkeypatch.setattr(comfy.cli_args.args, "disable_pinned_memory", True)
    linear._v, linear._v_signature, linear.pin_failed, linear.seed_key = object(), None, True, LAYER
    patch = comfy.model_patcher.LowVramPatch(KEY, patched.patches)
    linear.weight_lowvram_function, linear._pin_state, patch._pin_state = patch, {}, {}
    x = torch.randn(3, linear.in_features, generator=torch.Generator().manual_seed(0))
    exact = before + delta
    first = fetched(linear, x)  # the LoRA is added to the dequantised weight
    torch.testing.assert_close(first, x @ exact.T + linear.bias.float(), rtol=0, atol=1e-4)
    second = fetched(linear, x)  # from the memory it was put back to in its format
    kept = linear._v_weight.to(dtype=torch.float32).dequantize()
    torch.testing.assert_close(second, x @ kept.T + linear.bias.float(), rtol=0, atol=1e-4)
    assert (kept - exact).abs().max() <= 1.3 * STEP[kind] * exact.abs().max()
    assert torch.equal(dequantised(patcher), before)


# --- the fast product, on the host's reference kernels -----------------------------------------------------------


@pytest.fixture
def units(monkeypatch):
    monkeypatch.setattr(quantized, "multiplies", lambda algorithm, device, fast: True)


def test_products_of_quantised_inputs(file, kind, patcher, units):
    """The host's own kernels, in their reference form: near the exact product, and not it."""
    if kind in ("mxfp8", "nvfp4"):
        pytest.skip("the reference kernel needs a GPU's matrix units")
    fast, exact = layer(host_model.load_backbone(file, "auto fast")), layer(patcher)
    assert not fast._full_precision_mm
    x = torch.randn(2, 50, exact.in_features, generator=torch.Generator().manual_seed(2)).to(torch.bfloat16)
    wanted, got = exact(x).float(), fast(x).float()
    error = (got - wanted).norm() / wanted.norm()
    assert 0.002 < error < 0.02


def test_a_fast_layer_with_a_lora_is_exact(file, patcher, units):
    """While the LoRA is added as the layer is used."""
    fast = host_model.load_backbone(file, "auto fast")
    tensors, delta = lora(fast)
    before = dequantised(fast)
    patched = with_lora(fast, tensors)
    patched.patch_model(device_to=CPU, lowvram_model_memory=1)
    x = torch.randn(1, 5, before.shape[1], generator=torch.Generator().manual_seed(3))
    linear = layer(patched)
    torch.testing.assert_close(linear(x), x @ (before + delta).T + linear.bias.float(), rtol=0, atol=1e-4)
    patched.detach()


def test_what_is_multiplied_where(monkeypatch):
    """The int8 units always, those of the other formats where it is asked for, on devices that have them."""
    for capability, units in (((7, 5), {"int8_tensorwise"}), ((10, 0), {"nvfp4", "mxfp8", "int8_tensorwise"})):
        for algorithm in QUANT_ALGOS.keys() & {"nvfp4", "mxfp8", "int8_tensorwise"}:
            layout = quantized.get_layout_class(QUANT_ALGOS[algorithm]["comfy_tensor_layout"])
            monkeypatch.setattr(
                layout, "supports_fast_matmul", classmethod(lambda c, x=capability: x >= c.MIN_SM_VERSION)
            )
            for name in ("nvfp4", "mxfp8"):
                monkeypatch.setattr(comfy.model_management, f"supports_{name}_compute", lambda device: True)
            assert quantized.multiplies(algorithm, CPU, True) == (algorithm in units)
            assert quantized.multiplies(algorithm, CPU, False) == (algorithm == "int8_tensorwise")


def test_no_units_is_said(file, twin, caplog):
    with caplog.at_level(logging.WARNING):
        patcher = host_model.load_backbone(file, "auto fast")
    assert "cpu has no units for" in caplog.text
    torch.testing.assert_close(predict(patcher), predict(twin), rtol=0, atol=1e-5)


# --- on the server -----------------------------------------------------------------------------------------------


def test_a_quantised_file_on_the_server(comfy, makes):
    folder = comfy.base / "models" / "diffusion_models"
    with safe_open(makes("nvfp4"), "pt") as opened:
        save_file(load_file(makes("nvfp4")), folder / "NAVA_nvfp4.safetensors", metadata=opened.metadata())

    def latents(prefix, weight_dtype):
        graph = Graph()
        model = graph.model(comfy.names, file="NAVA_nvfp4.safetensors", weight_dtype=weight_dtype)
        latent = graph.sampler(model, graph.prompt(graph.clip(comfy.names)), graph.latent(), steps=3)
        graph.save_latents(latent, prefix)
        run = comfy.ok(graph)
        names = [f"{prefix}_{part}" for part in ("video", "audio")]
        paths = [next(p for p in run.files if p.name.startswith(name)) for name in names]
        return [load_file(path)["latent_tensor"] for path in paths]

    for kept, wide in zip(latents("nvfp4", "auto"), latents("wide_nvfp4", "fp32"), strict=True):
        assert kept.std() > 0.05
        torch.testing.assert_close(kept, wide, rtol=0, atol=1e-3)
