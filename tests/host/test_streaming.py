"""Every weight in every form can stay in RAM and come to the GPU as it is used: the same numbers as when all are there,
no more loaded than was allowed, LoRAs included; in static loading and under dynamic VRAM (stand-ins for the GPU)."""

import types

import pytest
import torch
from comfy_host import import_comfyui, pack_module

import_comfyui()

import comfy.lora  # noqa: E402
import comfy.model_management as manager  # noqa: E402
import comfy.model_patcher  # noqa: E402
import comfy.sd  # noqa: E402
import comfy.utils  # noqa: E402
import fake_dynamic_vram  # noqa: E402
from comfy.quant_ops import QuantizedTensor  # noqa: E402
from fake_gpu import CPU, GPUS, FakeGPUs, nothing_loaded  # noqa: E402
from torch._subclasses.fake_tensor import FakeTensorMode  # noqa: E402

host_model = pack_module("nodes.host.model")
raw_parameters = pack_module("nodes.host.raw_parameters").raw_parameters
quantized = pack_module("nodes.host.quantized")
convert = pack_module("nava_core.convert").convert

KINDS = ("fp32", "bf16", "fp8")
NEVER_LEAVES = 8192  # bytes that the host leaves where they are once all was loaded: noise levels, raw parameters
LAYERS = ("double_blocks.0.self_attn.q", "single_blocks.1.ffn.0", "text_embedding.0", "patch_embedding_audio.2.w1")
RAW = (
    "double_blocks.0.modulation.modulation",
    "double_blocks.1.modulation_audio.modulation",
    "single_blocks.0.modulation.modulation",
    "head.modulation",
    "head_audio.modulation",
    "speaker_embedding.null_token",
)
OTHER = ("single_blocks.0.norm3.weight", "double_blocks.0.self_attn.norm_q_audio.weight", "patch_embedding.bias")


@pytest.fixture(autouse=True)
def inference():
    with torch.inference_mode(), nothing_loaded():
        yield


@pytest.fixture
def gpu(monkeypatch):
    return FakeGPUs(monkeypatch)


@pytest.fixture(scope="module")
def files(small_models, tmp_path_factory):
    """A file of each kind: under dynamic VRAM weights are read as they are there."""
    folder = tmp_path_factory.mktemp("streaming")
    for kind in KINDS:
        convert(small_models["backbone"], folder / f"{kind}.safetensors", dtype=kind)
    return {kind: (str(folder / f"{kind}.safetensors"), kind) for kind in KINDS}


@pytest.fixture
def load(gpu, files):
    return lambda kind: host_model.load_backbone(*files[kind])


def inputs(model, device="cpu"):
    config, dtype = model.diffusion_model.config, model.get_dtype_inference()
    generator = torch.Generator().manual_seed(5)
    shapes = ((1, config.vid_in_dim, 2, 6, 8), (1, 8, 10, 16), (1, 12, config.text_dim), (1, 2, 192))
    video, audio, context, timbre = (torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes)
    timbre[:, 1] = 0  # of the learned null voice
    return ([video, audio], torch.tensor([700.0], device=device), context), {
        "timbre": timbre,
        "timbre_positions": torch.tensor([[3, 9]], device=device),
    }


def predict(patcher, **options):
    arguments, conditions = inputs(patcher.model)
    video, audio = patcher.model.diffusion_model(*arguments, transformer_options=options, **conditions)
    return torch.cat([video.flatten(), audio.flatten()]).float()


def resident(patcher):
    """Modules whose weights the host has taken to the GPU."""
    if not patcher.model.model_lowvram:
        return list(patcher.model.modules())
    return [module for module in patcher.model.modules() if getattr(module, "comfy_patched_weights", False)]


def bytes_of(modules):
    return sum(weight.nbytes for module in modules for weight in module._parameters.values() if weight is not None)


def weight_of(patcher, name):
    weight = comfy.utils.get_attr(patcher.model.diffusion_model, name)
    return weight.to(dtype=torch.float32).dequantize() if isinstance(weight, QuantizedTensor) else weight.float()


def with_changes(patcher, names, size=0.2):
    """A clone with a LoRA file of full differences for ``names``, as the stock loader makes it."""
    generator, file = torch.Generator().manual_seed(1), {}
    for name in names:
        weight = weight_of(patcher, name)
        key = name.removesuffix(".weight") + (".diff_b" if name.endswith(".bias") else ".diff")
        key = key.replace(".bias.diff_b", ".diff_b")
        file[f"diffusion_model.{key}"] = torch.randn(weight.shape, generator=generator) * weight.std() * size
    changed = comfy.sd.load_lora_for_models(patcher, None, file, 1.0, 0)[0]
    assert len(changed.patches) == len(names)
    return changed


def everything(patcher):
    return with_changes(patcher, [*(f"{name}.weight" for name in LAYERS), *RAW, *OTHER])


def budgets(patcher):
    """Of nothing, of steps between, and of all."""
    return [0.1, *(int(share * patcher.model_size()) for share in (0.05, 0.2, 0.5, 0.8, 0.99)), 2**40]


# ---------------------------------------------------------------- static loading


@pytest.mark.parametrize("kind", KINDS)
def test_no_more_is_loaded_than_was_allowed_and_the_numbers_are_the_same(load, kind):
    patcher = load(kind)
    whole = predict(patcher)
    sizes = []
    for budget in budgets(patcher):
        patcher.partially_load(GPUS[0], budget)
        loaded = bytes_of(resident(patcher))
        assert loaded <= budget
        if patcher.model.model_lowvram:
            assert loaded <= patcher.loaded_size() <= budget
        sizes.append(loaded)
        assert torch.equal(predict(patcher), whole)
        patcher.detach()
    assert sizes == sorted(sizes)
    assert sizes[0] == 0 < sizes[4] < sizes[-1]


@pytest.mark.parametrize("kind", KINDS)
def test_more_and_less_while_it_is_loaded(load, kind):
    patcher = load(kind)
    whole, size = predict(patcher), patcher.model_size()
    for share in (0.2, 0.6, 0.3, 1.5, 0.4, 0.0):
        before = patcher.loaded_size()
        patcher.partially_load(GPUS[0], share * size - before)
        assert share >= 1 or patcher.loaded_size() <= share * size + NEVER_LEAVES
        assert torch.equal(predict(patcher), whole)
    assert patcher.loaded_size() <= NEVER_LEAVES


def placed(patcher, mode, gpu):
    """The weights as tensors without data, on ``gpu`` where the host has loaded them, else on the CPU."""
    there = set(resident(patcher))
    for module in patcher.model.modules():
        device = gpu if module in there else CPU

        def put(weight, device=device):
            return mode.from_tensor(torch.empty_like(weight, device="cpu")).to(device)

        for name, weight in module._parameters.items():
            if isinstance(weight, QuantizedTensor):
                params = quantized.NavaRowFP8Layout.Params(
                    put(weight._params.scale), orig_dtype=weight.dtype, orig_shape=tuple(weight.shape)
                )
                fake = QuantizedTensor(put(weight._qdata), quantized.LAYOUT, params)
                module._parameters[name] = torch.nn.Parameter(fake, requires_grad=False)
            elif weight is not None:
                module._parameters[name] = torch.nn.Parameter(put(weight), requires_grad=False)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = put(buffer).to(gpu)


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("share", [0, 0.5, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_every_weight_comes_to_the_gpu(load, kind, share, lora):
    """PyTorch refuses any operation between tensors of two devices; the GPU need not be there."""
    gpu = torch.device("cuda", 0)
    patcher = everything(load(kind)) if lora else load(kind)
    patcher.partially_load(GPUS[0], max(0.1, share * patcher.model_size()))
    weights = {module for module in patcher.model.modules() if len(module._parameters)}
    there = weights & set(resident(patcher))
    assert (there == weights) if share == 2 else len(there) <= 6 if share == 0 else len(there) < len(weights)
    with torch.inference_mode(False), torch.no_grad(), FakeTensorMode(allow_non_fake_inputs=True) as mode:
        placed(patcher, mode, gpu)
        for module in patcher.model.modules():  # LoRAs whose weights the host casts as it computes
            comfy.model_patcher.move_weight_functions(module, gpu)
        arguments, conditions = inputs(patcher.model, gpu)
        out = patcher.model.diffusion_model(*arguments, transformer_options={}, **conditions)
    assert [part.device for part in out] == [gpu] * 2


def test_that_test_sees_a_weight_left_behind(load, monkeypatch):
    layers = pack_module("nava_core.backbone.layers")
    monkeypatch.setattr(layers, "modulation_vectors", lambda offset, vectors: offset.float() + vectors.float())
    with pytest.raises(RuntimeError, match=r"device.*cuda"):
        test_every_weight_comes_to_the_gpu(load, "fp32", 0, False)


# ---------------------------------------------------------------- LoRAs


def test_a_lora_streamed_is_the_lora_loaded(load):
    """Bit for bit in fp32; in bf16 the host rounds the changed weight once, by chance where it is loaded."""
    patcher = everything(load("fp32"))
    without = predict(patcher)
    patcher.partially_load(GPUS[0], 2**40)
    whole = predict(patcher)
    assert (whole - without).abs().max() > 0.1
    for budget in budgets(patcher)[:-1]:
        patcher.detach()
        patcher.partially_load(GPUS[0], budget)
        assert torch.equal(predict(patcher), whole)


@pytest.mark.parametrize("kind", ["bf16", "fp8"])
def test_a_lora_streamed_is_no_further_from_the_exact_one(load, kind):
    patcher = everything(load(kind))
    for module in (exact := load(kind)).model.modules():  # of the same weights, changed without rounding
        for name, weight in module._parameters.items():
            if weight is not None:
                value = weight.to(dtype=torch.float32)
                value = value.dequantize() if isinstance(value, QuantizedTensor) else value
                module._parameters[name] = torch.nn.Parameter(value, requires_grad=False)
    for key, patches in patcher.patches.items():
        weight = comfy.utils.get_attr(exact.model, key)
        comfy.utils.set_attr_param(exact.model, key, comfy.lora.calculate_weight(patches, weight.clone(), key))
    dtype = patcher.model.get_dtype_inference()
    exact.model.diffusion_model.dtype = torch.float32
    arguments, conditions = inputs(types.SimpleNamespace(
        diffusion_model=exact.model.diffusion_model, get_dtype_inference=lambda: torch.float32
    ))  # fmt: skip
    arguments[0][:] = [part.to(dtype).float() for part in arguments[0]]
    exact_out = exact.model.diffusion_model(*arguments, transformer_options={}, **conditions)
    exact_out = torch.cat([part.flatten() for part in exact_out])
    errors = []
    for budget in (2**40, 0.1, patcher.model_size() // 2):
        patcher.partially_load(GPUS[0], budget)
        errors.append((predict(patcher) - exact_out).norm() / exact_out.norm())
        patcher.detach()
    assert max(errors) <= 1.1 * errors[0]
    assert errors[0] < 0.1


@pytest.mark.parametrize("kind", KINDS)
def test_raw_parameters_get_their_lora_however_much_is_loaded(load, kind):
    patcher = load(kind)
    before = {name: weight_of(patcher, name) for name in RAW}
    changed = with_changes(patcher, RAW)
    expected = {}
    for share in (2, 0, 0.3, 0.7, 2):
        changed.partially_load(GPUS[0], max(0.1, share * patcher.model_size() - changed.loaded_size()))
        for name in RAW:
            now = weight_of(changed, name)
            assert (now - before[name]).abs().max() > 0.05 * before[name].std()
            assert torch.equal(now, expected.setdefault(name, now))
    changed.detach()
    assert all(torch.equal(weight_of(patcher, name), before[name]) for name in RAW)
    for share in (0, 1):
        changed.partially_load(GPUS[0], max(0.1, share * patcher.model_size()))
        patcher.partially_load(GPUS[0], max(0.1, share * patcher.model_size()))  # the LoRA is not its own
        assert all(torch.equal(weight_of(patcher, name), before[name]) for name in RAW)
        patcher.detach()


def test_which_parameters_are_raw(load):
    names = {name.removeprefix("diffusion_model.") for name, _ in raw_parameters(load("fp32").model)}
    assert set(RAW) <= names
    assert all(name.endswith((".modulation", ".null_token")) for name in names)


# ---------------------------------------------------------------- dynamic VRAM


@pytest.fixture
def dynamic(monkeypatch, files):
    gpus = FakeGPUs(monkeypatch)

    def load(kind, room=2**60):
        fake_dynamic_vram.install(monkeypatch, gpus)
        monkeypatch.setattr(fake_dynamic_vram.VBar, "room", room)
        patcher = fake_dynamic_vram.as_mapped(host_model.load_backbone(*files[kind]))
        assert patcher.is_dynamic()
        return patcher

    return load


@pytest.mark.parametrize("kind", KINDS)
def test_dynamic_vram(dynamic, load, kind):
    whole = predict(load(kind))
    size = load(kind).model_size()
    for room, low, high in ((0, 0, 0), (size // 2, 0.2, 0.5), (2**60, 0.7, 1.15)):
        patcher = dynamic(kind, room)
        patcher.partially_load(GPUS[0], 0)
        for _ in range(2):  # fetched, and used from where it is
            assert torch.equal(predict(patcher), whole)
        vbar = fake_dynamic_vram.vbar_of(patcher)
        assert low * size <= vbar.loaded_size() <= high * size
        assert torch.equal(predict(patcher, prefetch_dynamic_vbars=True), whole)


@pytest.mark.parametrize("room", [0, 2**60])
def test_dynamic_vram_with_a_lora(dynamic, load, room):
    loaded = everything(load("fp32"))
    loaded.partially_load(GPUS[0], 2**40)
    whole = predict(loaded)
    patcher = dynamic("fp32", room)
    without = predict(load("fp32"))
    changed = everything(patcher)
    for _ in range(2):
        changed.partially_load(GPUS[0], 0)
        assert torch.equal(predict(changed), whole)
        patcher.partially_load(GPUS[0], 0)
        assert torch.equal(predict(patcher), without)


@pytest.mark.parametrize("kind", KINDS)
def test_raw_parameters_get_their_lora_under_dynamic_vram(dynamic, load, kind):
    static = with_changes(load(kind), RAW)
    static.partially_load(GPUS[0], 2**40)
    expected = {name: weight_of(static, name) for name in RAW}
    patcher = dynamic(kind)
    before = {name: weight_of(patcher, name) for name in RAW}
    changed = with_changes(patcher, RAW)
    for _ in range(2):
        for _ in range(2):
            changed.partially_load(GPUS[0], 0)
            assert all(torch.equal(weight_of(changed, name), expected[name]) for name in RAW)
        patcher.partially_load(GPUS[0], 0)
        assert all(torch.equal(weight_of(patcher, name), before[name]) for name in RAW)


def test_dynamic_vram_loses_such_loras_by_itself(dynamic, monkeypatch):
    """If the host begins to patch them, this pack's part in it can go."""
    monkeypatch.setattr(host_model, "patch_raw_parameters", lambda *_: None)
    patcher = dynamic("fp32")
    before = {name: weight_of(patcher, name) for name in RAW}
    changed = with_changes(patcher, RAW)
    changed.partially_load(GPUS[0], 0)
    assert all(torch.equal(weight_of(changed, name), before[name]) for name in RAW)
    assert manager.loaded_models() == []
