"""GGUF backbones: files that the gguf package wrote, read by our own header reader; and headers that lie."""

import struct

import pytest
import torch
from safetensors.torch import load_file

from nava_core import load_backbone
from nava_core.checkpoint import FileKind, WrongFileError, backbone_problem, describe_file, estimate_memory
from nava_core.convert import convert
from nava_core.demo import make_small_models

gguf = pytest.importorskip("gguf", reason="GGUF needs the package gguf (extra [quantized])")
np = pytest.importorskip("numpy")

Q = gguf.GGMLQuantizationType
LAYER = "single_blocks.1.ffn.0.weight"  # (128, 64)
PATCHES = "patch_embedding.weight"  # of five dimensions, which ggml has not


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    path = make_small_models(tmp_path_factory.mktemp("models"), preview_decoder=False)["backbone"]
    return {name.removeprefix("backbone."): tensor for name, tensor in load_file(path).items()}


def write(path, tensors, kinds, prefix="", alignment=None, note_shapes=True):
    """As the makers of GGUF diffusion models write them: ``kinds`` by name, all else F32, five dimensions as two."""
    writer = gguf.GGUFWriter(path, "nava")
    writer.add_quantization_version(2)
    if alignment:
        writer.add_custom_alignment(alignment)
    writer.add_array("general.tags", ["video", "sound"])
    writer.add_string("config", '{"num_heads": 2}')
    for name, tensor in tensors.items():
        kind, data = kinds.get(name, Q.F32), tensor.numpy()
        if tensor.ndim > 4:
            if note_shapes:
                writer.add_array(f"comfy.gguf.orig_shape.{prefix}{name}", [int(n) for n in tensor.shape])
            data = data.reshape(len(data), -1)
        stored = data if kind is Q.F32 else made(data, kind)
        writer.add_tensor(prefix + name, stored, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def made(data, kind):
    """Blocks of a format; where the package cannot make them, any that are sound, of other values."""
    try:
        return gguf.quants.quantize(data, kind)
    except NotImplementedError:
        values, nbytes = gguf.GGML_QUANT_SIZES[kind]
        raw = np.random.default_rng(3).integers(0, 256, (data.size // values, nbytes), dtype=np.uint8)
        scale = np.frombuffer(np.float16(1e-3).tobytes(), dtype=np.uint8)
        for at in {Q.Q6_K: (208,), Q.Q5_K: (0, 2), Q.Q4_K: (0, 2)}[kind]:
            raw[:, at : at + 2] = scale
        return raw.reshape(data.shape[0], -1)


def test_q8_0_is_what_it_was_within_its_rounding(tmp_path, source):
    names = [name for name, tensor in source.items() if tensor.ndim == 2 and tensor.shape[1] % 32 == 0]
    path = write(tmp_path / "NAVA_Q8_0.gguf", source, dict.fromkeys(names, Q.Q8_0), "model.diffusion_model.")
    info = describe_file(path)
    assert info.kind is FileKind.NAVA_BACKBONE
    assert (info.format, info.prefix) == ("gguf", "model.diffusion_model.")
    assert "Q8_0" in info.summary
    assert estimate_memory(info) == 2 * sum(tensor.numel() for tensor in source.values())
    model = load_backbone(path, dtype=torch.float32)
    assert model.config.num_heads == 2
    for name, tensor in model.state_dict().items():
        wanted = source[name]
        assert tensor.shape == wanted.shape
        if name not in names:
            assert torch.equal(tensor, wanted), name
            continue
        blocks = wanted.reshape(-1, 32)
        step = blocks.abs().amax(1, keepdim=True) / 127
        assert ((tensor.reshape(-1, 32) - blocks).abs() <= 0.6 * step + 1e-7).all(), name
    default = load_backbone(path)
    assert {weight.dtype for weight in default.parameters()} == {torch.bfloat16}
    assert torch.equal(default.get_parameter(PATCHES), source[PATCHES].bfloat16())


@pytest.mark.parametrize("kind", [Q.Q6_K, Q.Q5_K, Q.Q4_K, Q.Q5_1, Q.Q4_0, Q.F16, Q.BF16])
def test_every_kind_is_what_the_package_makes_of_it(tmp_path, source, kind, monkeypatch):
    # A row has to hold whole blocks of 256: the small network's is read as longer rows.
    monkeypatch.setattr("nava_core.checkpoint.gguf.READ_VALUES", 512)
    flat = {**source, LAYER: source[LAYER].reshape(-1, 256)} if kind in (Q.Q6_K, Q.Q5_K, Q.Q4_K) else source
    stored = made(flat[LAYER].numpy(), kind)
    wanted = torch.from_numpy(gguf.quants.dequantize(stored, kind).reshape(source[LAYER].shape))
    path = tmp_path / "NAVA.gguf"
    writer_kinds = {LAYER: kind}
    if flat is source:
        write(path, source, writer_kinds)
    else:
        write_with_shape(path, flat, writer_kinds, source)
    got = load_backbone(path, dtype=torch.float32).get_parameter(LAYER)
    assert torch.equal(got, wanted)
    assert wanted.std() > 0


def write_with_shape(path, tensors, kinds, source):
    writer = gguf.GGUFWriter(path, "nava")
    for name, tensor in tensors.items():
        data = tensor.numpy()
        if tensor.shape != source[name].shape or tensor.ndim > 4:
            writer.add_array(f"comfy.gguf.orig_shape.{name}", [int(n) for n in source[name].shape])
            data = data.reshape(len(data), -1)
        kind = kinds.get(name, Q.F32)
        writer.add_tensor(name, data if kind is Q.F32 else made(data, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_q8_0_by_hand(tmp_path, source):
    """The package is not asked: a block is a float16 scale and 32 whole numbers."""
    path = write(tmp_path / "a.gguf", source, {LAYER: Q.Q8_0})
    info = describe_file(path)
    tensor = info.tensors[LAYER]
    raw = path.read_bytes()[tensor.offset : tensor.offset + tensor.nbytes]
    blocks = np.frombuffer(raw, dtype=[("scale", "<f2"), ("values", "i1", 32)])
    wanted = blocks["scale"].astype(np.float32)[:, None] * blocks["values"]
    got = load_backbone(path, dtype=torch.float32).get_parameter(LAYER)
    assert torch.equal(got, torch.from_numpy(wanted).reshape(got.shape))


def test_an_alignment_of_its_own(tmp_path, source):
    path = write(tmp_path / "a.gguf", source, {LAYER: Q.Q8_0}, alignment=128)
    assert torch.equal(load_backbone(path, dtype=torch.float32).get_parameter(PATCHES), source[PATCHES])


def test_into_other_types(tmp_path, source):
    path = write(tmp_path / "a.gguf", source, {LAYER: Q.Q8_0})
    made_file = convert(path, tmp_path / "a.safetensors", dtype="bf16").path
    expected = load_backbone(path, dtype=torch.bfloat16).state_dict()
    assert all(torch.equal(tensor, expected[name[9:]]) for name, tensor in load_file(made_file).items())
    said = []
    convert(path, tmp_path / "b.safetensors", dtype="fp8", say=said.append)
    assert "has weights in Q8_0 already" in said[0]
    fours = write(tmp_path / "c.gguf", source, {LAYER: Q.Q4_0})
    with pytest.raises(ValueError, match=r"weights in Q4_0, 4 bits each: in fp8 they would take more room"):
        convert(fours, tmp_path / "d.safetensors", dtype="fp8")


def test_five_dimensions_need_their_shape(tmp_path, source):
    path = write(tmp_path / "a.gguf", source, {}, note_shapes=False)
    with pytest.raises(ValueError, match=r"incomplete NAVA backbone|does not fit"):
        load_backbone(path)


def test_another_model_is_named(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "a.gguf", "wan")
    for name in ("blocks.0.self_attn.q.weight", "patch_embedding.weight", "head.modulation"):
        writer.add_tensor(name, np.zeros((4, 4), dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    info = describe_file(tmp_path / "a.gguf")
    assert info.kind is FileKind.GGUF
    assert "(a Wan video model)" in info.summary
    with pytest.raises(WrongFileError, match="a GGUF file of a model that is not read here"):
        load_backbone(tmp_path / "a.gguf")


def test_without_the_package_it_is_a_sentence(tmp_path, source, monkeypatch):
    path = write(tmp_path / "a.gguf", source, {LAYER: Q.Q8_0})
    monkeypatch.setitem(__import__("sys").modules, "gguf", None)
    problem = backbone_problem(path)
    assert problem.endswith("install this project's extra [quantized], or run `pip install gguf`.")
    assert describe_file(path).kind is FileKind.NAVA_BACKBONE


# --- headers that lie --------------------------------------------------------------------------------------------


def text(value):
    return struct.pack("<Q", len(value)) + value


def header(tensors=b"", facts=b"", counts=(0, 0)):
    return b"GGUF" + struct.pack("<IQQ", 3, *counts) + facts + tensors


def entry(name=b"x", shape=(4,), kind=0, offset=0):
    dims = struct.pack("<I", len(shape)) + b"".join(struct.pack("<Q", n) for n in shape)
    return text(name) + dims + struct.pack("<IQ", kind, offset)


LIES = {
    "version": b"GGUF" + struct.pack("<IQQ", 99, 0, 0),
    "many tensors": header(counts=(2**60, 0)),
    "many facts": header(counts=(0, 2**40)),
    "many small facts": header(counts=(0, 2**18), facts=(text(b"") + struct.pack("<IB", 0, 1)) * 2**18),
    "a name without end": header(counts=(1, 0), tensors=struct.pack("<Q", 2**63)),
    "a long text": header(counts=(0, 1), facts=struct.pack("<Q", 2**40) + b"abc"),
    "an endless list": header(counts=(0, 1), facts=text(b"a") + struct.pack("<IIQ", 9, 8, 2**62)),
    "a list of lists": header(counts=(0, 1), facts=text(b"a") + struct.pack("<IIQ", 9, 9, 1)),
    "an unknown kind of fact": header(counts=(0, 1), facts=text(b"a") + struct.pack("<I", 77)),
    "a huge tensor": header(counts=(1, 0), tensors=entry(shape=(2**40, 2**20))),
    "a negative size": header(counts=(1, 0), tensors=entry(shape=(2**64 - 1,))),
    "a far tensor": header(counts=(1, 0), tensors=entry(offset=2**62)),
    "many dimensions": header(counts=(1, 0), tensors=text(b"x") + struct.pack("<I", 2**31)),
    "an unknown type": header(counts=(1, 0), tensors=entry(kind=4000)),
    "half a block": header(counts=(1, 0), tensors=entry(shape=(33,), kind=8)),
    "no alignment": header(counts=(1, 1), facts=text(b"general.alignment") + struct.pack("<II", 4, 0), tensors=entry()),
    "another shape": header(
        counts=(1, 1),
        facts=text(b"comfy.gguf.orig_shape.x") + struct.pack("<IIQ", 9, 5, 2) + struct.pack("<ii", 2**30, 2**30),
        tensors=entry(),
    ),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_lie_is_one_sentence_and_takes_no_memory(tmp_path, lie):
    import tracemalloc

    path = tmp_path / "a.gguf"
    path.write_bytes(LIES[lie] + bytes(256))
    tracemalloc.start()
    info = describe_file(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert info.kind in (FileKind.CORRUPT, FileKind.TRUNCATED)
    assert peak < 2**21
    with pytest.raises(WrongFileError) as caught:
        load_backbone(path)
    assert "\n" not in str(caught.value)


def test_cut_anywhere(tmp_path, source):
    whole = write(tmp_path / "whole.gguf", source, {LAYER: Q.Q8_0}).read_bytes()
    generator = torch.Generator().manual_seed(1)
    for end in torch.randint(4, len(whole), (60,), generator=generator).tolist():
        (tmp_path / "a.gguf").write_bytes(whole[:end])
        assert describe_file(tmp_path / "a.gguf").kind in (FileKind.TRUNCATED, FileKind.TEXT), end
