"""fp8 weights kept in fp8 by ComfyUI: equal to their dequantised twin, small in memory, LoRA, offloading, saving."""

import logging
import types

import comfy_host
import pytest
import torch
import torch.nn.functional as F
from graphs import Graph
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch._subclasses.fake_tensor import FakeTensorMode

comfy_host.import_comfyui()

import comfy.cli_args  # noqa: E402
import comfy.lora  # noqa: E402
import comfy.memory_management  # noqa: E402
import comfy.model_management  # noqa: E402
import comfy.model_patcher  # noqa: E402
import comfy.ops  # noqa: E402
import comfy.sd  # noqa: E402
import comfy.utils  # noqa: E402
import comfy_aimdo.host_buffer  # noqa: E402
import comfy_aimdo.model_vbar  # noqa: E402
import comfy_aimdo.torch  # noqa: E402
from comfy.quant_ops import QuantizedTensor  # noqa: E402

host_model = comfy_host.pack_module("nodes.host.model")
quantized = comfy_host.pack_module("nodes.host.quantized")
core_quantized = comfy_host.pack_module("nava_core.backbone.quantized")
convert = comfy_host.pack_module("nava_core.convert").convert

CPU = torch.device("cpu")
LAYER = "double_blocks.0.self_attn.q"
KEY = f"diffusion_model.{LAYER}.weight"
BLOCK_LAYERS = ("self_attn", "cross_attn", "ffn")
FP8_STEP = 2.0**-3  # largest distance of two neighbours of float8_e4m3fn, relative to the smaller


@pytest.fixture(scope="module", autouse=True)
def inference():
    """As ComfyUI runs nodes."""
    with torch.inference_mode():
        yield


@pytest.fixture(scope="module")
def files(small_models, tmp_path_factory):
    """The small backbone in fp32, as it was made, and converted to fp8."""
    target = tmp_path_factory.mktemp("fp8") / "NAVA_fp8.safetensors"
    convert(small_models["backbone"], target)
    return types.SimpleNamespace(plain=str(small_models["backbone"]), fp8=str(target))


@pytest.fixture
def patcher(files):
    return host_model.load_backbone(files.fp8)


@pytest.fixture
def twin(files):
    """The same file dequantised without rounding."""
    return host_model.load_backbone(files.fp8, "fp32")


def inputs(model, dtype=torch.float32):
    config = model.diffusion_model.config
    generator = torch.Generator().manual_seed(5)
    shapes = ((1, config.vid_in_dim, 2, 6, 8), (1, 8, 10, 16), (1, 12, config.text_dim))
    video, audio, context = (torch.randn(shape, generator=generator).to(dtype) for shape in shapes)
    return [video, audio], torch.tensor([700.0]), context


def predict(patcher, dtype=torch.float32):
    video, audio = patcher.model.diffusion_model(*inputs(patcher.model, dtype), transformer_options={})
    return torch.cat([video.flatten(), audio.flatten()]).float()


def layer(patcher, name=LAYER):
    return patcher.model.diffusion_model.get_submodule(name)


def bits(patcher, name=LAYER):
    weight = layer(patcher, name).weight
    return weight._qdata.view(torch.uint8).clone(), weight._params.scale.clone()


def same_bits(first, second):
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


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


def test_an_fp8_file_stays_fp8_in_memory(files, caplog):
    patcher = host_model.load_backbone(files.fp8)
    assert "unet" not in caplog.text  # the host's words for names that are missing or not known
    backbone = patcher.model.diffusion_model
    linears = {n: m for n, m in backbone.named_modules() if isinstance(m, comfy_linear(backbone))}
    kept = {name for name, module in linears.items() if isinstance(module.weight, QuantizedTensor)}
    assert kept == {n for n in linears if "_blocks." in n and n.split(".")[2] in BLOCK_LAYERS}
    assert all(linears[name].weight._qdata.dtype is torch.float8_e4m3fn for name in kept)
    with safe_open(files.fp8, "pt") as file:
        in_file = sum(file.get_tensor(name).nbytes for name in file.keys())  # noqa: SIM118
    assert sum(t.nbytes for t in backbone.state_dict().values()) == in_file
    held = sum(weight.nbytes for weight in backbone.parameters())
    held += sum(linears[name].weight._params.scale.nbytes for name in kept)
    assert held == in_file
    scales = comfy.model_management.module_size(patcher.model) - in_file
    assert 0 <= scales < 64 * 1024  # the sampling schedule's table, nothing else


def comfy_linear(backbone):
    return type(backbone.get_submodule(LAYER))


def test_equal_to_its_dequantised_twin(patcher, twin, files):
    out = predict(patcher)
    assert out.std() > 0.01
    torch.testing.assert_close(out, predict(twin), rtol=0, atol=1e-5)
    original = predict(host_model.load_backbone(files.plain))
    assert (out - original).abs().max() > 1e-3  # so the comparison says something


def test_equal_to_its_dequantised_twin_in_bf16(patcher, files):
    """As a GPU computes: every weight is rounded to bf16 once, like those of the dequantised file."""
    twin = host_model.load_backbone(files.fp8, "bf16")
    assert not any(isinstance(p, QuantizedTensor) for p in twin.model.parameters())
    assert {p.dtype for p in twin.model.diffusion_model.parameters()} == {torch.bfloat16}
    assert torch.equal(predict(patcher, torch.bfloat16), predict(twin, torch.bfloat16))


@pytest.mark.parametrize("weight_dtype", ["fp8", "fp8 fast"])
def test_quantised_on_load_is_the_converters_file(files, weight_dtype):
    loaded = host_model.load_backbone(files.plain, weight_dtype).model.diffusion_model.state_dict()
    converted = {name.removeprefix("backbone."): tensor for name, tensor in load_file(files.fp8).items()}
    assert loaded.keys() == converted.keys()
    for name, tensor in converted.items():
        assert loaded[name].dtype is tensor.dtype
        assert torch.equal(loaded[name].view(torch.uint8), tensor.view(torch.uint8)), name


def test_fp8_matrix_units_missing_is_said_and_computed_exactly(files, twin, caplog):
    with caplog.at_level(logging.WARNING):
        patcher = host_model.load_backbone(files.fp8, "fp8 fast")
    assert "float8 matmul needs an NVIDIA GPU" in caplog.text
    torch.testing.assert_close(predict(patcher), predict(twin), rtol=0, atol=1e-5)


def test_a_device_without_float8(files, twin, monkeypatch, caplog):
    monkeypatch.setattr(quantized, "storage_problem", lambda device: "this device cannot hold float8 weights")
    with pytest.raises(RuntimeError, match=r"This device cannot hold float8 weights\. Set weight_dtype to bf16"):
        host_model.load_backbone(files.fp8, "fp8")
    with caplog.at_level(logging.WARNING):
        patcher = host_model.load_backbone(files.fp8)
    assert "widened" in caplog.text
    torch.testing.assert_close(predict(patcher), predict(twin), rtol=0, atol=1e-5)


def test_memory_is_counted_for_the_dequantised_weight(patcher):
    """The host reads it off the model's cast type when it decides what fits."""
    assert patcher.model.manual_cast_dtype is torch.float32
    assert patcher.model.get_dtype_inference() is torch.float32
    entry = next(x for x in patcher._load_list() if x[-3] == f"diffusion_model.{LAYER}")
    weight = layer(patcher).weight
    assert entry[1] == weight._qdata.nbytes + weight._params.scale.nbytes + layer(patcher).bias.nbytes
    assert entry[0] >= entry[1] + weight.numel() * 4


@pytest.mark.parametrize("flag", ["fp8_e4m3fn_unet", "fp8_e5m2_unet", "fp8_e8m0fnu_unet"])
@pytest.mark.parametrize("file", ["plain", "fp8"])
def test_the_servers_fp8_flags_are_weight_dtype_fp8(files, patcher, monkeypatch, caplog, flag, file):
    monkeypatch.setattr(comfy.cli_args.args, flag, True)
    with caplog.at_level(logging.WARNING):
        loaded = host_model.load_backbone(getattr(files, file))
    assert same_bits(bits(loaded), bits(patcher))
    assert torch.equal(predict(loaded), predict(patcher))
    assert ("has too few digits" in caplog.text) == (flag != "fp8_e4m3fn_unet")
    assert loaded.cached_patcher_init[1][1] == "auto"
    chosen = host_model.load_backbone(getattr(files, file), "fp32")
    assert not isinstance(layer(chosen).weight, QuantizedTensor)


# --- LoRA --------------------------------------------------------------------------------------------------------


def test_lora_is_that_of_the_dequantised_weight_within_fp8_rounding(patcher):
    before = dequantised(patcher)
    file, delta = lora(patcher)
    patched = with_lora(patcher, file)
    comfy.model_management.load_models_gpu([patched], force_full_load=True)
    after = dequantised(patched)
    scale = layer(patched).weight._params.scale.float()[:, None]
    allowed = (FP8_STEP * (before + delta).abs()).maximum(2.0**-9 * scale) * 1.01
    assert ((after - before - delta).abs() <= allowed).all()
    assert (after - before).std() == pytest.approx(delta.std().item(), rel=0.2)
    assert layer(patched).weight._qdata.dtype is torch.float8_e4m3fn
    assert layer(patched).weight.dtype is torch.bfloat16


def test_a_weak_lora_is_kept_on_average(patcher):
    """2 % of the weight is far below half a step: rounding to nearest would leave nothing of it."""
    before = dequantised(patcher)
    file, delta = lora(patcher, size=0.02)
    comfy.model_management.load_models_gpu([with_lora(patcher, file)], force_full_load=True)
    change = dequantised(patcher) - before
    assert (change * delta).sum() / (delta * delta).sum() == pytest.approx(1, abs=0.25)


def test_rounding_by_chance_keeps_what_float8_has_and_is_unbiased():
    grid = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).to(torch.float32)
    grid = grid[torch.isfinite(grid)]
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        assert torch.equal(core_quantized._round_by_chance(grid, generator), grid)
    positive = grid[grid >= 0].sort().values.unique()
    low, high = positive[:-1], positive[1:]
    between = (0.7 * low + 0.3 * high).repeat(4000, 1)
    rounded = core_quantized._round_by_chance(between, generator)
    assert torch.logical_or(rounded == low, rounded == high).all()
    ups = (rounded == high).float().mean(0)
    assert (ups - 0.3).abs().max() < 0.05


def test_original_bits_come_back_without_the_lora(patcher):
    original, out = bits(patcher), predict(patcher)
    patched = with_lora(patcher, lora(patcher)[0])
    comfy.model_management.load_models_gpu([patched], force_full_load=True)
    assert not same_bits(bits(patcher), original)
    assert (predict(patched) - out).abs().max() > 1e-3
    comfy.model_management.load_models_gpu([patcher], force_full_load=True)
    assert same_bits(bits(patcher), original)
    assert torch.equal(predict(patcher), out)
    comfy.model_management.load_models_gpu([patched], force_full_load=True)
    patched.detach()
    assert same_bits(bits(patcher), original)


def test_lora_of_a_layer_left_behind_is_exact(patcher, twin):
    """Low VRAM: the LoRA is added to the dequantised weight as it is used, so nothing is rounded again."""
    original = bits(patcher)
    file, _ = lora(patcher)
    outs = []
    for model in (patcher, twin):
        patched = with_lora(model, file)
        patched.patch_model(device_to=CPU, lowvram_model_memory=1)
        assert len(layer(patched).weight_function) == 1
        outs.append(predict(patched))
        patched.detach()
    torch.testing.assert_close(outs[0], outs[1], rtol=0, atol=1e-5)
    assert same_bits(bits(patcher), original)


def test_partly_loaded_and_unloaded(patcher, twin):
    """Some layers loaded with their LoRA in fp8, others not; then less and less room."""
    original, total = bits(patcher), patcher.model_size()
    file = {}
    for name in (LAYER, "single_blocks.1.ffn.0", "double_blocks.1.cross_attn.k"):
        file |= lora(patcher, name, size=0.05)[0]
    patched, exact = with_lora(patcher, file), with_lora(twin, file)
    comfy.model_management.load_models_gpu([exact], force_full_load=True)
    reference = predict(exact)
    patched.partially_load(CPU, extra_memory=total * 99 // 100)
    assert 0 < patched.loaded_size() < total
    seen = []
    for _ in range(3):
        seen.append((predict(patched) - reference).abs().max().item())
        patched.partially_unload(CPU, total // 5)
    assert max(seen) < 0.1 * reference.abs().max()
    patched.detach()
    assert same_bits(bits(patcher), original)


def test_clones_share_weights_and_keep_their_own_lora(patcher):
    out = predict(patcher)
    first = with_lora(patcher, lora(patcher, seed=1)[0])
    second = with_lora(patcher, lora(patcher, seed=2)[0])
    outs = []
    for model in (first, second, first, patcher):
        comfy.model_management.load_models_gpu([model], force_full_load=True)
        assert model.model is patcher.model
        outs.append(predict(model))
    assert torch.equal(outs[0], outs[2])
    assert (outs[0] - outs[1]).abs().max() > 1e-3
    assert torch.equal(outs[3], out)


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
    again = saved(patcher, tmp_path / "saved.safetensors")
    state = again.model.diffusion_model.state_dict()
    for name, tensor in patcher.model.diffusion_model.state_dict().items():
        assert torch.equal(state[name].view(torch.uint8), tensor.view(torch.uint8)), name


def test_saved_with_a_lora_the_same_whether_loaded_or_not(patcher, tmp_path):
    patched = with_lora(patcher, lora(patcher)[0])
    original = bits(patcher)
    comfy.model_management.load_models_gpu([patched], force_full_load=True)
    whole = saved(patched, tmp_path / "whole.safetensors")
    patched.detach()
    patched.patch_model(device_to=CPU, lowvram_model_memory=1)
    part = saved(patched, tmp_path / "part.safetensors")
    patched.detach()
    assert same_bits(bits(whole), bits(part))
    assert not same_bits(bits(whole), original)


# --- dynamic VRAM, with stand-ins for the GPU's side -------------------------------------------------------------


def load_under_dynamic_vram(monkeypatch, *arguments):
    """What a GPU under dynamic VRAM takes: weights stay mapped from the file. (model, paths that were mapped)"""
    mapped, load = [], comfy.utils.load_torch_file
    with monkeypatch.context() as patch:
        patch.setattr(comfy.model_patcher.ModelPatcher, "is_dynamic", lambda self: True)
        patch.setattr(comfy.utils, "load_torch_file", lambda path, **k: mapped.append(path) or load(path, **k))
        return host_model.load_backbone(*arguments), mapped


def test_mapped_file_is_taken_as_it_is(files, patcher, monkeypatch, caplog):
    loaded, mapped = load_under_dynamic_vram(monkeypatch, files.fp8)
    assert mapped == [files.fp8]
    assert "unet" not in caplog.text  # the host's words for names that are missing or not known
    assert same_bits(bits(loaded), bits(patcher))
    assert torch.equal(predict(loaded), predict(patcher))


@pytest.mark.parametrize(("file", "weight_dtype"), [("fp8", "bf16"), ("fp8", "fp32"), ("plain", "fp8")])
def test_what_the_file_is_not_is_converted(files, monkeypatch, file, weight_dtype):
    loaded, mapped = load_under_dynamic_vram(monkeypatch, getattr(files, file), weight_dtype)
    assert mapped == []
    assert torch.equal(predict(loaded), predict(host_model.load_backbone(files.fp8, weight_dtype)))


def test_weight_through_the_hosts_transfer_buffer(patcher):
    """Gathered as bytes and taken out as views, scale included: how pinned and offloaded weights travel."""
    linear = layer(patcher)
    tensors = [linear.weight, linear.bias]
    buffer = torch.zeros(comfy.memory_management.vram_aligned_size(tensors), dtype=torch.uint8)
    comfy.model_management.cast_to_gathered(tensors, buffer)
    weight, bias = comfy.memory_management.interpret_gathered_like(tensors, buffer)
    start = buffer.untyped_storage().data_ptr()
    assert weight._params.scale.untyped_storage().data_ptr() == start
    assert same_bits((weight._qdata.view(torch.uint8), weight._params.scale), bits(patcher))
    assert torch.equal(bias, linear.bias)
    assert torch.equal(weight.dequantize(), linear.weight.dequantize())


def odd_scales(patcher):
    """Another file's quantising: the scale of no row is its largest value / 448. Returns the bits."""
    generator = torch.Generator().manual_seed(4)
    for module in patcher.model.modules():
        if isinstance(getattr(module, "weight", None), QuantizedTensor):
            scale = module.weight._params.scale
            scale.mul_(1 + torch.rand(scale.shape, generator=generator).to(scale.dtype))
            keep = module.weight._qdata.to(torch.float32).abs() < 300
            module.weight._qdata.copy_((module.weight._qdata.to(torch.float32) * keep).to(torch.float8_e4m3fn))
    return bits(patcher)


def test_small_layers_are_not_quantised_anew(files, monkeypatch):
    """Dynamic VRAM copies layers below 16 KB whole, through the calls that otherwise add a LoRA."""
    monkeypatch.setattr(comfy.model_patcher, "CoreModelPatcher", comfy.model_patcher.ModelPatcherDynamic)
    monkeypatch.setattr(comfy.model_management, "is_device_cpu", lambda device: False)
    monkeypatch.setattr(comfy_aimdo.host_buffer, "HostBuffer", lambda *_: types.SimpleNamespace(size=0))
    patcher = host_model.load_backbone(files.fp8)
    assert isinstance(patcher, comfy.model_patcher.ModelPatcherDynamic)
    original = odd_scales(patcher)
    patcher.load(CPU)
    assert same_bits(bits(patcher), original)


def test_a_weight_set_to_its_own_values_keeps_its_bits(patcher):
    original, linear = odd_scales(patcher), layer(patcher)
    values = linear.convert_weight(linear.weight, inplace=True)
    assert values.dtype is torch.float32
    assert same_bits(
        bits(patcher), (linear.set_weight(values, seed=1, return_weight=True)._qdata.view(torch.uint8), original[1])
    )
    linear.set_weight(values, seed=1)
    assert same_bits(bits(patcher), original)
    values[0, 0] += linear.weight._params.scale[0].float() * 400
    linear.set_weight(values, seed=1)
    assert not same_bits(bits(patcher), original)


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


def test_dynamic_vram_layer_with_a_lora(patcher, monkeypatch):
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
    first = fetched(linear, x)  # the LoRA is added to the dequantised weight
    torch.testing.assert_close(first, x @ (before + delta).T + linear.bias.float(), rtol=0, atol=1e-4)
    second = fetched(linear, x)  # from the memory it was put back to in fp8
    kept = linear._v_weight.to(dtype=torch.float32).dequantize()
    torch.testing.assert_close(second, x @ kept.T + linear.bias.float(), rtol=0, atol=1e-4)
    allowed = (FP8_STEP * (before + delta).abs()).maximum(2.0**-9 * linear._v_weight._params.scale.float()[:, None])
    assert ((kept - before - delta).abs() <= 1.01 * allowed).all()
    assert torch.equal(dequantised(patcher), before)


# --- the fast product --------------------------------------------------------------------------------------------


def scaled_mm_in_float32(a, b, *, scale_a, scale_b, out_dtype):
    """PyTorch's row-wise product, which only GPUs have, with its demands on shapes, types and strides."""
    assert a.dtype is b.dtype is torch.float8_e4m3fn
    assert a.is_contiguous()
    assert b.t().is_contiguous()
    assert scale_a.dtype is scale_b.dtype is torch.float32
    assert scale_a.shape == (a.shape[0], 1)
    assert scale_b.shape == (1, b.shape[1])
    assert scale_a.is_contiguous()
    assert scale_b.is_contiguous()
    assert all(size % 16 == 0 for size in b.shape)
    assert out_dtype is torch.bfloat16
    return ((a.float() @ b.float()) * scale_a * scale_b).to(out_dtype)


@pytest.fixture
def float8_units(monkeypatch):
    calls = []

    def product(a, b, **scales):
        calls.append(b.shape)
        return scaled_mm_in_float32(a, b, **scales)

    monkeypatch.setattr(quantized, "matmul_problem", lambda device: None)
    monkeypatch.setattr(torch, "_scaled_mm", product)
    return calls


def test_fast_layer_is_near_the_exact_one(files, float8_units):
    fast = layer(host_model.load_backbone(files.fp8, "fp8 fast"))
    exact = layer(host_model.load_backbone(files.fp8))
    x = torch.randn(2, 300, exact.in_features, generator=torch.Generator().manual_seed(2))
    x = (x * torch.logspace(-3, 3, 300)[:, None]).to(torch.bfloat16)  # tokens of very different size
    wanted, got = exact(x).float(), fast(x).float()
    assert not [shape for shape in float8_units if shape != (64, 64)]
    assert len(float8_units) == 1
    error = (got - wanted).norm(dim=-1) / wanted.norm(dim=-1)
    assert error.max() < 0.08  # of each token by itself: its scale is its own
    assert error.mean() < 0.04
    assert error.mean() > 0.005


def test_fast_model_uses_the_units_for_all_fp8_layers_and_no_other(files, float8_units):
    patcher = host_model.load_backbone(files.fp8, "fp8 fast")
    out = predict(patcher, torch.bfloat16)
    assert torch.isfinite(out).all()
    modules = patcher.model.modules()
    weights = [m for m in modules if isinstance(getattr(m, "weight", None), QuantizedTensor)]
    assert len(float8_units) >= len(weights)
    float8_units.clear()
    predict(host_model.load_backbone(files.fp8), torch.bfloat16)
    assert float8_units == []


def test_fast_layer_with_a_lora_added_as_it_is_used_is_exact(files, float8_units):
    patcher = host_model.load_backbone(files.fp8, "fp8 fast")
    file, delta = lora(patcher)
    before = dequantised(patcher)
    patched = with_lora(patcher, file)
    patched.patch_model(device_to=CPU, lowvram_model_memory=1)
    x = torch.randn(1, 5, before.shape[1], generator=torch.Generator().manual_seed(3))
    linear = layer(patched)
    torch.testing.assert_close(linear(x), x @ (before + delta).T + linear.bias.float(), rtol=0, atol=1e-4)
    assert float8_units == []
    patched.detach()


# --- on the server -----------------------------------------------------------------------------------------------


def test_fp8_file_on_the_server(comfy, files, tmp_path):
    folder = comfy.base / "models" / "diffusion_models"
    save_file(load_file(files.fp8), folder / "NAVA_fp8.safetensors", metadata=metadata(files.fp8))

    def latents(prefix, weight_dtype):
        graph = Graph()
        model = graph.model(comfy.names, file="NAVA_fp8.safetensors", weight_dtype=weight_dtype)
        latent = graph.sampler(model, graph.prompt(graph.clip(comfy.names)), graph.latent(), steps=3)
        graph.save_latents(latent, prefix)
        run = comfy.ok(graph)
        names = [f"{prefix}_{part}" for part in ("video", "audio")]
        paths = [next(p for p in run.files if p.name.startswith(name)) for name in names]
        return [load_file(path)["latent_tensor"] for path in paths]

    for kept, wide in zip(latents("fp8", "auto"), latents("wide", "fp32"), strict=True):
        assert kept.std() > 0.05
        torch.testing.assert_close(kept, wide, rtol=0, atol=1e-3)


def metadata(path):
    with safe_open(path, "pt") as file:
        return file.metadata()


def test_float8_units_are_probed_as_pytorch_wants_it(monkeypatch):
    """PyTorch's own checks of shapes, types and strides for a GPU, without one."""
    monkeypatch.setattr(quantized, "fp8_matmul_problem", lambda device: None)
    with torch.inference_mode(), FakeTensorMode():
        assert quantized.matmul_problem.__wrapped__(torch.device("cuda")) is None
