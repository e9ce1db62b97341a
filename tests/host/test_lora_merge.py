"""The core's merged LoRAs against ComfyUI's own LoRA loading, weight by weight, in fp32, bf16 and fp8."""

import comfy_host
import pytest
import torch
from safetensors.torch import load_file, save_file

comfy_host.import_comfyui()

import comfy.model_management  # noqa: E402
import comfy.sd  # noqa: E402
from comfy.quant_ops import QuantizedTensor  # noqa: E402

from nava_core import LoraMerge, load_backbone  # noqa: E402
from nava_core.convert import convert  # noqa: E402

host_model = comfy_host.pack_module("nodes.host.model")

EXACT = 1e-5


@pytest.fixture(scope="module", autouse=True)
def inference():
    """As ComfyUI runs nodes."""
    with torch.inference_mode():
        yield


@pytest.fixture(scope="module")
def loras(small_models, tmp_path_factory):
    """Two LoRAs: one on every matrix and convolution, in two ranks, with and without alpha, and differences of the
    rest; one more on the first block alone. And the names of what they change."""
    folder = tmp_path_factory.mktemp("loras")
    generator = torch.Generator().manual_seed(3)
    first, second, names = {}, {}, set()
    for number, (name, weight) in enumerate(load_backbone(small_models["backbone"]).state_dict().items()):
        layer = f"diffusion_model.{name.removesuffix('.weight')}"
        noise = torch.randn(weight.shape, generator=generator) * 0.05
        names.add(name)
        if name.endswith(".bias"):
            first[f"{layer.removesuffix('.bias')}.diff_b"] = noise
            continue
        if weight.ndim < 2 or not name.endswith(".weight"):
            first[f"{layer}.diff"] = noise
            continue
        for lora in (first, second) if "blocks.0." in name else (first,):
            rank = 2 + number % 3
            ones = [1] * (weight.ndim - 2)
            lora[f"{layer}.lora_up.weight"] = torch.randn(len(weight), rank, *ones, generator=generator) * 0.1
            lora[f"{layer}.lora_down.weight"] = torch.randn(rank, *weight.shape[1:], generator=generator)
            if number % 2:
                lora[f"{layer}.alpha"] = torch.tensor(3.0)
    paths = folder / "first.safetensors", folder / "second.safetensors"
    for path, lora in zip(paths, (first, second), strict=True):
        save_file(lora, path)
    return [(paths[0], 0.8), (paths[1], -0.3)], names


@pytest.fixture(scope="module")
def fp8_file(small_models, tmp_path_factory):
    target = tmp_path_factory.mktemp("fp8") / "NAVA_fp8.safetensors"
    convert(small_models["backbone"], target)
    return target


def hosts(path, dtype, loras):
    """The weights of ComfyUI's model with the LoRAs loaded by its own loader; float8 ones as (values, scales)."""
    patcher = host_model.load_backbone(str(path), dtype)
    for lora, strength in loras:
        patcher = comfy.sd.load_lora_for_models(patcher, None, load_file(lora), strength, 0)[0]
    comfy.model_management.load_models_gpu([patcher], force_full_load=True)
    parameters = patcher.model.diffusion_model.named_parameters()
    weights = {name: (p._qdata, p._params.scale) if isinstance(p, QuantizedTensor) else p for name, p in parameters}
    return weights, patcher


def ours(path, loras, dtype):
    with LoraMerge(loras, path).changes() as changes:
        return load_backbone(path, dtype=dtype, changes=changes).state_dict()


@pytest.mark.parametrize(("name", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_every_weight_is_the_hosts(small_models, loras, name, dtype, caplog):
    theirs, _keep = hosts(small_models["backbone"], name, loras[0])
    assert "not loaded" not in caplog.text
    state = ours(small_models["backbone"], loras[0], dtype)
    plain = load_backbone(small_models["backbone"], dtype=dtype).state_dict()
    assert {key for key in state if not torch.equal(state[key], plain[key])} == loras[1] == theirs.keys()
    for key, weight in theirs.items():
        assert weight.dtype is state[key].dtype is dtype
        torch.testing.assert_close(state[key], weight.data, rtol=0, atol=EXACT if dtype is torch.float32 else 0)


@pytest.mark.parametrize("in_file", [True, False])
def test_every_fp8_weight_is_the_hosts_bit_by_bit(small_models, fp8_file, loras, in_file):
    """Of an fp8 file, and of a file that is made fp8 as it is loaded: the same values with the same rounding."""
    path = fp8_file if in_file else small_models["backbone"]
    theirs, _keep = hosts(path, "auto" if in_file else "fp8", loras[0])
    state = ours(path, loras[0], None if in_file else torch.float8_e4m3fn)
    kept = [key for key, weight in theirs.items() if isinstance(weight, tuple)]
    assert len(kept) > 20
    for key in kept:
        assert torch.equal(state[key].view(torch.uint8), theirs[key][0].view(torch.uint8)), key
        assert torch.equal(state[f"{key}_scale"], theirs[key][1]), key
    for key in theirs.keys() - kept:
        assert torch.equal(state[key], theirs[key].data), key
