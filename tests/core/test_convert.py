"""The converter: the makers' fp8 layout, atomic writing, and what it refuses."""

import json
import os
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from nava_core import convert as convert_module
from nava_core.backbone.quantized import quantise_rows
from nava_core.checkpoint import FileKind, PlannedTensor, WrongFileError, describe_file, load_backbone
from nava_core.convert import convert

TINY = Path(__file__).parents[1] / "golden" / "backbone_tiny.safetensors"
FP8 = torch.float8_e4m3fn
QUANTISED = re.compile(r"backbone\.(double|single)_blocks\.\d+\.(self_attn|cross_attn|ffn)\.[a-z0-9_]+\.weight")


@pytest.fixture
def source() -> dict[str, torch.Tensor]:
    return load_file(TINY)


def leftovers(folder: Path) -> list[str]:
    return [entry.name for entry in folder.iterdir() if entry.name.endswith(".part")]


def test_fp8_has_the_makers_layout(tmp_path, source):
    info = convert(TINY, tmp_path / "NAVA_fp8.safetensors")
    assert info.kind is FileKind.NAVA_BACKBONE_FP8
    with safe_open(info.path, "pt") as file:
        made = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        assert json.loads(file.metadata()["config"]) == json.loads(describe_file(TINY).metadata["config"])
    wanted = {name for name, tensor in source.items() if QUANTISED.fullmatch(name) and tensor.ndim == 2}
    assert len(wanted) == 2 * (16 + 2) + 2 * (8 + 2)
    assert {name for name, tensor in made.items() if tensor.dtype == FP8} == wanted
    assert made.keys() == source.keys() | {name + "_scale" for name in wanted}
    for name, tensor in source.items():
        if name in wanted:
            weight, scale = quantise_rows(tensor)
            assert made[name].shape == tensor.shape
            assert made[name + "_scale"].dtype == torch.bfloat16
            assert torch.equal(made[name].view(torch.uint8), weight.view(torch.uint8))
            assert torch.equal(made[name + "_scale"], scale)
        else:
            assert torch.equal(made[name], tensor.to(torch.bfloat16))


def test_every_tensor_begins_at_a_multiple_of_its_item_size():
    plan = [
        PlannedTensor("a", (3,), FP8),
        PlannedTensor("b", (5,), torch.bfloat16),
        PlannedTensor("c", (1,), torch.float32),
    ]
    header, places = convert_module._layout(plan, {})
    assert all(places[tensor.name][0] % tensor.dtype.itemsize == 0 for tensor in plan)
    assert sorted(places.values()) == [(len(header), 4), (len(header) + 4, 10), (len(header) + 14, 3)]


@pytest.mark.parametrize(
    ("dtype", "wanted"), [("bf16", torch.bfloat16), ("fp16", torch.float16), ("fp32", torch.float32)]
)
def test_plain_types(tmp_path, source, dtype, wanted):
    made = load_file(convert(TINY, tmp_path / "a.safetensors", dtype=dtype).path)
    assert made.keys() == source.keys()
    assert all(torch.equal(made[name], source[name].to(wanted)) for name in source)


def test_fp8_converts_back(tmp_path):
    fp8 = convert(TINY, tmp_path / "fp8.safetensors").path
    back = load_file(convert(fp8, tmp_path / "bf16.safetensors", dtype="bf16").path)
    assert not [name for name in back if name.endswith("_scale")]
    expected = load_backbone(fp8, dtype=torch.bfloat16).state_dict()
    assert all(torch.equal(back["backbone." + name], tensor) for name, tensor in expected.items())


def test_fp8_to_fp8_changes_nothing(tmp_path):
    first = convert(TINY, tmp_path / "a.safetensors").path
    second = convert(first, tmp_path / "b.safetensors").path
    assert first.read_bytes() == second.read_bytes()


def test_ckpt_without_prefix_or_config_gets_both(tmp_path, source):
    # Without a config the heads would be guessed at 128 wide; one head of 64 is what this tiny width gives.
    torch.save({"state_dict": {name[9:]: tensor for name, tensor in source.items()}}, tmp_path / "a.ckpt")
    info = convert(tmp_path / "a.ckpt", tmp_path / "a.safetensors", dtype="bf16")
    assert info.prefix == "backbone."
    assert json.loads(info.metadata["config"])["num_double_layers"] == 2
    assert load_file(info.path).keys() == source.keys()


def test_progress_ends_at_the_size_of_the_file(tmp_path):
    seen = []
    info = convert(TINY, tmp_path / "a.safetensors", progress=lambda done, total: seen.append((done, total)))
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert seen[-1][1] == info.size
    header = int.from_bytes(info.path.read_bytes()[:8], "little") + 8
    assert seen[-1][0] == info.size - header
    assert header % 8 == 0


def test_what_is_refused(tmp_path):
    with pytest.raises(ValueError, match="choose one of fp8, int8, mxfp8, nvfp4, w4a8, w6a8, bf16, fp16, fp32"):
        convert(TINY, tmp_path / "a.safetensors", dtype="int4")
    with pytest.raises(FileNotFoundError, match="There is no file"):
        convert(tmp_path / "none", tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match="is a folder"):
        convert(TINY, tmp_path)
    with pytest.raises(FileNotFoundError, match="There is no folder"):
        convert(TINY, tmp_path / "none" / "a.safetensors")
    save_file({"x.lora_A.weight": torch.zeros(1)}, tmp_path / "lora.safetensors")
    with pytest.raises(WrongFileError, match="is a LoRA, but a NAVA backbone is needed here"):
        convert(tmp_path / "lora.safetensors", tmp_path / "a.safetensors")
    assert [entry.name for entry in tmp_path.iterdir()] == ["lora.safetensors"]


def test_an_incomplete_backbone_is_refused(tmp_path, source):
    del source["backbone.head.head.bias"]
    save_file(source, tmp_path / "a.safetensors")
    with pytest.raises(WrongFileError, match=r"1 tensor is missing \(head\.head\.bias\)"):
        convert(tmp_path / "a.safetensors", tmp_path / "b.safetensors")


def test_the_source_is_never_the_target(tmp_path):
    shutil.copy(TINY, tmp_path / "a.safetensors")
    names = ["a.safetensors", "link.safetensors"]
    os.symlink(tmp_path / "a.safetensors", tmp_path / "link.safetensors")
    for name in names:
        with pytest.raises(ValueError, match="is the file to convert itself"):
            convert(tmp_path / "a.safetensors", tmp_path / name, overwrite=True)
    assert (tmp_path / "a.safetensors").read_bytes() == TINY.read_bytes()


def test_existing_files_are_kept_unless_told(tmp_path):
    target = tmp_path / "a.safetensors"
    target.write_text("precious")
    with pytest.raises(FileExistsError, match="is already there"):
        convert(TINY, target)
    assert target.read_text() == "precious"
    assert convert(TINY, target, overwrite=True).kind is FileKind.NAVA_BACKBONE_FP8


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_interrupted_conversion_leaves_nothing(tmp_path, error):
    target = tmp_path / "a.safetensors"
    target.write_text("precious")

    def stop(done, total):
        assert leftovers(tmp_path)  # so it was being written beside the target
        raise error

    with pytest.raises(error):
        convert(TINY, target, overwrite=True, progress=stop)
    assert target.read_text() == "precious"
    assert not leftovers(tmp_path)


def test_a_full_disk_is_noticed_before_writing(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(convert_module.shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(OSError, match=r"needs 1\.\d+ MB, the disk of .* has 1\.00 kB free"):
        convert(TINY, tmp_path / "a.safetensors")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "value"), [("backbone.head.head.bias", float("nan")), ("backbone.head.head.bias", 1e30)]
)
def test_values_the_type_cannot_hold(tmp_path, source, name, value):
    source[name][3] = value
    save_file(source, tmp_path / "a.safetensors", {"config": describe_file(TINY).metadata["config"]})
    with pytest.raises(ValueError, match=r"head\.head\.bias holds values that are NaN or infinite"):
        convert(tmp_path / "a.safetensors", tmp_path / "b.safetensors", dtype="fp16")
    assert not (tmp_path / "b.safetensors").exists()


def test_a_damaged_weight_is_named(tmp_path, source):
    source["backbone.single_blocks.1.ffn.2.weight"][0, 0] = float("inf")
    save_file(source, tmp_path / "a.safetensors", {"config": describe_file(TINY).metadata["config"]})
    with pytest.raises(ValueError, match=r"single_blocks\.1\.ffn\.2\.weight cannot be turned into fp8"):
        convert(tmp_path / "a.safetensors", tmp_path / "b.safetensors")
    assert not leftovers(tmp_path)
