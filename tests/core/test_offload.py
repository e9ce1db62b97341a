"""Streaming of blocks from RAM: the same results to the last bit, the memory promised, and nothing left behind.

A GPU is played on the CPU (``_played_gpu``); what a real one does is in test_streaming_gpu.
"""

import gc
import importlib.util
import json
import os
import subprocess
import sys
import weakref
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch._dynamo.utils import counters

from benchmarks.backbone import case_inputs, clip_of
from nava_core.backbone import BackboneConfig, NavaBackbone
from nava_core.backbone.formats import MADE_HERE, PROTECTING, format_problem
from nava_core.backbone.quantized import Fp8Linear
from nava_core.checkpoint import describe_file, estimate_memory, load_backbone, open_checkpoint
from nava_core.checkpoint.source import SafetensorsSource
from nava_core.components import load_text_encoder
from nava_core.convert import convert
from nava_core.demo import make_small_models
from nava_core.offload import (
    Demand,
    Placement,
    Streaming,
    Weights,
    amount_of_memory,
    buffer_bytes,
    check_amount,
    least_budget,
    place,
    place_backbone,
    plan,
    smaller,
    spread,
    stream_blocks,
    streaming,
)

pytest.importorskip("diffusers")
pytest.importorskip("accelerate")
spec = importlib.util.spec_from_file_location("_played_gpu", Path(__file__).with_name("_played_gpu.py"))
played = importlib.util.module_from_spec(spec)
spec.loader.exec_module(played)

ROOT = Path(__file__).resolve().parents[2]
CONFIG = BackboneConfig(
    dim=128, ffn_dim=512, freq_dim=32, text_dim=64, num_heads=2, num_double_layers=3, num_single_layers=6
)
CLIP = clip_of(64, 64, 3)
CUDA, CPU = torch.device("cuda"), torch.device("cpu")
GB = 10**9


@pytest.fixture(autouse=True)
def _one_thread():
    """Small matrices: more threads only wait for one another."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def gpu(monkeypatch):
    with played.PlayedGpu(GB, monkeypatch) as gpu:
        yield gpu


def backbone(dtype=torch.float32, fp8=False):
    model = NavaBackbone(CONFIG, dtype=dtype).init_weights().eval().requires_grad_(False)
    if fp8:
        for block in (*model.double_blocks, *model.single_blocks):
            for name, module in list(block.named_modules()):
                if isinstance(module, torch.nn.Linear):
                    block.set_submodule(name, Fp8Linear.from_linear(module))
    return model


def run(model, case="one timestep", device="cpu", dtype=torch.float32):
    inputs = case_inputs(case, CONFIG, CLIP, dtype, "cpu")

    def there(value):
        if isinstance(value, tuple):
            return tuple(map(there, value))
        return value.to(device) if torch.is_tensor(value) else value

    with torch.no_grad():
        return [None if out is None else out.cpu() for out in model(**{k: there(v) for k, v in inputs.items()})]


def same(one, other):
    return all((a is b is None) or torch.equal(a, b) for a, b in zip(one, other, strict=True))


class Scaled(torch.Tensor):
    """A quantised tensor as libraries make them: int8 codes and their scale behind a tensor that holds nothing."""

    @staticmethod
    def __new__(cls, codes, scale):
        return torch.Tensor._make_wrapper_subclass(cls, codes.shape, dtype=scale.dtype, device=codes.device)

    def __init__(self, codes, scale):
        self.codes, self.scale = codes, scale

    def __tensor_flatten__(self):
        return ["codes", "scale"], None

    @classmethod
    def __tensor_unflatten__(cls, inner, context, size, strides):
        return cls(inner["codes"], inner["scale"])

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.detach.default:
            return cls(args[0].codes, args[0].scale)
        raise NotImplementedError(func)


# ---------------------------------------------------------------- amounts


@pytest.mark.parametrize(
    ("wanted", "amount"),
    [("6GB", 6 * GB), ("6 gb", 6 * GB), ("1.5g", 1.5 * GB), ("6GiB", 6 * 2**30), ("700M", 700 * 10**6),
     ("512MiB", 2**29), ("80%", 6.4 * GB), (123456789, 123456789), ("123456789", 123456789), ("100 %", 8 * GB)],
)  # fmt: skip
def test_amounts_of_memory(wanted, amount):
    assert amount_of_memory(wanted, 8 * GB) == amount


@pytest.mark.parametrize("wanted", ["", "lots", "GB", "-6GB", "0", "0%", "6XB", "6GBs", "1e9", "nan", "6,5GB"])
def test_nonsense_is_no_amount_of_memory(wanted):
    with pytest.raises(ValueError, match="is no amount of memory: give one such as 6GB"):
        check_amount(wanted)


@pytest.mark.parametrize("wanted", ["8.1GB", "101%", 8 * GB + 1])
def test_more_than_there_is_cannot_be_given(wanted):
    with pytest.raises(ValueError, match=r"is more memory than there is: the GPU has 8\.0 GB"):
        amount_of_memory(wanted, 8 * GB)


# ---------------------------------------------------------------- which blocks, and where


@given(st.integers(1, 60).flatmap(lambda blocks: st.tuples(st.just(blocks), st.integers(1, blocks))))
def test_streamed_blocks_are_spread_evenly(numbers):
    blocks, count = numbers
    streamed = spread(blocks, count)
    assert len(set(streamed)) == count
    assert streamed[-1] == blocks - 1
    gaps = [b - a for a, b in zip((-1, *streamed), streamed, strict=False)]
    assert max(gaps) - min(gaps) <= 1


def test_buffers_are_of_two_blocks_that_follow_each_other():
    assert buffer_bytes([5, 1, 2, 9, 3], (0, 2, 4)) == 7
    assert buffer_bytes([5, 1, 2, 9, 3], (3,)) == 9
    assert buffer_bytes([5], ()) == buffer_bytes([], ()) == 0


@given(st.lists(st.integers(1, 50), max_size=12), st.integers(0, 20), st.integers(0, 400))
def test_the_fewest_blocks_that_fit_are_streamed(blocks, rest, room):
    weights = Weights(rest, tuple(blocks))
    streamed = weights.fitting(room)
    if streamed is None:
        assert all(weights.on_device(spread(len(blocks), n)) > room for n in range(1, len(blocks) + 1))
        assert weights.total > room
        return
    assert weights.on_device(streamed) <= room
    resident = rest + sum(size for index, size in enumerate(blocks) if index not in streamed)
    assert weights.on_device(streamed) == resident + buffer_bytes(blocks, streamed)
    if streamed:
        fewer = spread(len(blocks), len(streamed) - 1) if len(streamed) > 1 else ()
        assert weights.on_device(fewer) > room


def test_resident_goes_before_batched_and_batched_before_apart():
    demand = Demand(Weights(100, (50,) * 10), work=40, batched=120)
    slack = plan.SLACK
    cases = {
        600 + 120: ((), True),
        600 + 119: ((), False),
        600 + 40: ((), False),
        600 + 39: (spread(10, 4), True),  # 100, six of 50 and two as buffers, beside 120
        320: (spread(10, 10), True),
        319: (spread(10, 9), False),
        240: (spread(10, 10), False),
    }
    for budget, (streamed, batched) in cases.items():
        where, together = place_backbone(CUDA, budget + slack, demand)
        assert (where.streamed, together) == (streamed, batched), budget
    assert place_backbone(CUDA, 239 + slack, demand) is None
    assert least_budget(demand) == 240 + slack


def test_other_components_are_resident_streamed_or_on_the_cpu():
    slack = plan.SLACK
    layers, whole = Demand(Weights(10, (20,) * 4), 5), Demand(Weights(90), 5)
    assert place(CUDA, 95 + slack, layers) == Placement(CUDA, (), 4)
    assert place(CUDA, 75 + slack, layers) == Placement(CUDA, (0, 1, 3), 4)
    assert place(CUDA, 55 + slack, layers).streamed == (0, 1, 2, 3)
    assert place(CUDA, 54 + slack, layers) == Placement(CPU, (), 4)
    assert place(CUDA, 94 + slack, whole) == Placement(CPU)
    assert place(CUDA, None, whole) == Placement(CUDA)
    assert place(CPU, 0, whole) == Placement(CPU)


def test_smaller_forms_end():
    where, seen = Placement(CUDA, (), 30), []
    while where is not None:
        seen.append("cpu" if where.device.type == "cpu" else 30 - len(where.streamed))
        where = smaller(where, may_leave=True)
    assert seen == [30, 15, 7, 3, 1, 0, "cpu"]
    assert smaller(Placement(CUDA, spread(30, 30), 30), may_leave=False) is None
    assert smaller(Placement(CUDA), may_leave=True) == Placement(CPU)


# ---------------------------------------------------------------- the same results


@pytest.mark.parametrize("kind", ["fp32", "bf16", "fp8"])
def test_streamed_equals_resident_bit_for_bit(gpu, kind):
    dtype = torch.float32 if kind == "fp32" else torch.bfloat16
    model = backbone(dtype, kind == "fp8")
    cases = ("one timestep", "first frame clean", "interaction off", "audio only")
    resident = {case: run(model, case, dtype=dtype) for case in cases}
    for share in (0, 0.25, 0.5, 1):
        stream = stream_blocks(model, "cuda", share)
        assert len(stream.streamed) == 9 - round(9 * share)
        for case in (
            *cases,
            *cases,
        ):  # the first pass is another than later ones, where blocks come ahead of their turn
            assert same(run(model, case, "cuda", dtype), resident[case]), (share, case)
        stream.close()


@pytest.mark.parametrize(("dtype", "compiled"), [*((dtype, False) for dtype in MADE_HERE), ("nvfp4", True)])
def test_streamed_equals_resident_bit_for_bit_with_quantised_weights(gpu, tmp_path, monkeypatch, dtype, compiled):
    """Mapped from their file, of two formats where some are protected, their blocks compiled or not."""
    if format_problem(dtype):
        pytest.skip(format_problem(dtype))
    save_file({f"backbone.{name}": weight for name, weight in backbone().state_dict().items()}, tmp_path / "plain")
    protected = ["double_blocks.1.self_attn.q", "single_blocks.0.ffn.2"] if dtype in PROTECTING else []
    file = convert(tmp_path / "plain", tmp_path / "small.safetensors", dtype=dtype, protected=protected).path
    model = load_backbone(file)
    cases = ("one timestep", "first frame clean", "interaction off", "audio only")
    if compiled:
        counters.clear()
        model.compile_blocks(backend="eager")
    resident = {case: run(model, case, dtype=torch.bfloat16) for case in cases}
    names = [*(f"double_blocks.{n}." for n in range(3)), *(f"single_blocks.{n}." for n in range(6))]
    copied, read = [], SafetensorsSource.read
    monkeypatch.setattr(SafetensorsSource, "read", lambda self, name: copied.append(name) or read(self, name))
    for streamed in (range(9), spread(9, 4)):
        in_ram = tuple(names[index] for index in streamed)
        model = load_backbone(file, in_ram=in_ram, mapped=True, device="cuda")
        assert copied
        assert not [name for name in copied if name.startswith(in_ram)]
        copied.clear()
        if compiled:
            model.compile_blocks(backend="eager")
        stored = {name: (type(p), p.dtype) for name, p in model.named_parameters()}
        stream = Streaming(model, [*model.double_blocks, *model.single_blocks], streamed, CUDA)
        for case in (*cases, *cases):
            assert same(run(model, case, "cuda", torch.bfloat16), resident[case]), (streamed, case)
        stream.close()
        assert {name: (type(p), p.dtype) for name, p in model.named_parameters()} == stored
    assert not counters["graph_break"]


def test_a_pass_takes_the_streamed_bytes_and_holds_two_blocks(gpu):
    model = backbone()
    sizes = [sum(p.nbytes for p in block.parameters()) for block in (*model.double_blocks, *model.single_blocks)]
    stream_blocks(model, "cuda", 1)
    run(model, device="cuda")
    resident, gpu.peak, gpu.transfers = gpu.used, gpu.used, 0
    run(model, device="cuda")
    work, inputs = gpu.peak - resident, gpu.transfers
    assert resident > sum(sizes)
    for streamed in (spread(9, 3), spread(9, 9)):
        model = backbone()
        stream = Streaming(model, [*model.double_blocks, *model.single_blocks], streamed, CUDA)
        for _ in range(3):
            run(model, device="cuda")
            gpu.peak, gpu.transfers = gpu.used, 0
            run(model, device="cuda")
            away = sum(sizes[index] for index in streamed)
            assert gpu.transfers == inputs + away
            assert gpu.used <= resident - away + 8192
            assert gpu.peak <= resident - away + buffer_bytes(sizes, streamed) + work
        stream.close()


def test_buffers_and_tensors_with_tensors_inside_come_and_go_too(gpu):
    """Kinds that diffusers' hooks leave on the GPU, or move only in part."""

    class Odd(torch.nn.Module):
        def __init__(self, seed):
            super().__init__()
            draw = torch.Generator().manual_seed(seed)
            self.register_buffer("shift", torch.randn(64, generator=draw))
            self.register_buffer("nothing", None)
            self.codes = torch.nn.Parameter(torch.arange(64, dtype=torch.int8), requires_grad=False)
            scaled = Scaled(torch.randint(-99, 99, (64, 64), dtype=torch.int8, generator=draw), torch.tensor([0.01]))
            self.scaled = torch.nn.Parameter(scaled, requires_grad=False)

        def forward(self, x):
            return torch.tanh(x @ (self.scaled.codes * self.scaled.scale)) + self.shift + self.codes

    class Chain(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = torch.nn.ModuleList(Odd(seed) for seed in range(4))

        def forward(self, x):
            for block in self.blocks:
                x = block(x)
            return x

    model, x = Chain(), torch.randn(2, 64)
    names = sorted(name for name, _ in (*model.named_parameters(), *model.named_buffers()))
    expected = model(x)
    stream = Streaming(model, list(model.blocks), (0, 1, 2, 3), CUDA)
    for _ in range(3):
        assert torch.equal(model(x.to("cuda")).cpu(), expected)
        assert gpu.used < 1000  # no block, nor part of one
    stream.close()
    assert torch.equal(model(x), expected)
    assert sorted(name for name, _ in (*model.named_parameters(), *model.named_buffers())) == names
    block = model.blocks[1]
    assert type(block._parameters["scaled"].data) is Scaled
    assert set(block._buffers) == {"shift", "nothing"}


def test_the_text_encoder_is_streamed_bit_for_bit(gpu, tmp_path_factory):
    models = make_small_models(tmp_path_factory.mktemp("models"), preview_decoder=False)
    for role in ("text_encoder", "text_encoder_fp8"):
        encoder = load_text_encoder(models[role])
        expected = [encoder.encode(ids) for ids in ([5, 9, 1], list(range(2, 40)))]
        stream = Streaming(encoder, encoder.blocks, (0, 1), CUDA, stay=[encoder.embedding], lock=False)
        assert encoder.embedding.weight.device.type == "cpu"
        assert gpu.used < 2000
        for _ in range(2):
            contexts = [encoder.encode(ids) for ids in ([5, 9, 1], list(range(2, 40)))]
            assert all(map(torch.equal, contexts, expected))
        stream.close()
        assert torch.equal(encoder.to("cpu").encode([5, 9, 1]), expected[0])


def test_streaming_runs_on_the_cpu_where_nothing_moves():
    model = backbone()
    expected = run(model)
    for share in (0, 0.5):
        stream = stream_blocks(model, "cpu", share)
        assert same(run(model), expected)
        stream.close()
    with pytest.raises(ValueError, match="share of the blocks is 0 to 1, not 25"):
        stream_blocks(model, "cpu", 25)


# ---------------------------------------------------------------- nothing left behind


def test_closing_leaves_the_model_as_it_was(gpu):
    model = backbone(torch.bfloat16, fp8=True)
    before = {name: (weight.clone(), type(weight)) for name, weight in model.state_dict().items()}
    stream = stream_blocks(model, "cuda", 0.3)
    run(model, device="cuda", dtype=torch.bfloat16)
    assert gpu.locked
    stream.close()
    stream.close()  # twice is once
    assert gpu.locked == []
    model.to("cpu")
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(
        torch.equal(after[name], weight) and type(after[name]) is kind for name, (weight, kind) in before.items()
    )
    for module in model.modules():
        assert "forward" not in vars(module)
        assert not hasattr(module, "_diffusers_hook")
    assert gpu.used < 10_000  # rotary tables


def test_a_closed_model_is_gone_with_its_last_reference(gpu):
    model = backbone()
    stream = stream_blocks(model, "cuda", 0.3)
    run(model, device="cuda")
    block, gone = weakref.ref(model.single_blocks[0]), weakref.ref(model)
    gc.disable()
    try:
        stream.close()
        del model, stream
        assert gone() is block() is None
    finally:
        gc.enable()
    assert gpu.used == 0


def test_a_pass_that_failed_leaves_no_block_on_the_gpu(gpu):
    model = backbone()
    expected = run(model)
    stream = stream_blocks(model, "cuda", 0)
    run(model, device="cuda")
    calm = gpu.used

    def fail(*_):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    for number in (0, 4, 8):
        block = [*model.double_blocks, *model.single_blocks][number]
        hook = block.self_attn.register_forward_pre_hook(fail)
        with pytest.raises(torch.OutOfMemoryError):
            run(model, device="cuda")
        hook.remove()
        assert gpu.used > calm
        stream.close()
        gc.collect()
        assert gpu.used <= calm
        stream = stream_blocks(model, "cuda", 0)
        assert same(run(model, device="cuda"), expected)


def test_what_is_missing_is_said(monkeypatch):
    model = backbone()
    monkeypatch.setitem(sys.modules, "accelerate", None)
    with pytest.raises(RuntimeError, match="Streaming weights without ComfyUI needs the package accelerate"):
        stream_blocks(model, "cpu", 0.5)
    assert stream_blocks(model, "cpu", 1).streamed == ()


# ---------------------------------------------------------------- page-locked memory


def test_waiting_blocks_lie_in_one_locked_stretch_each(gpu):
    model = backbone(torch.bfloat16, fp8=True)
    expected = run(model, dtype=torch.bfloat16)
    stream = stream_blocks(model, "cuda", 0.3)
    blocks = [[*model.double_blocks, *model.single_blocks][index] for index in stream.streamed]
    assert len(gpu.locked) == len(blocks)
    assert all(gpu.is_locked(p) for block in blocks for p in block.parameters())
    held = sum(p.nbytes for block in blocks for p in block.parameters())
    assert held <= stream.locked_bytes == sum(size for _, size in gpu.locked) < held + 100 * 64 * len(blocks)
    assert same(run(model, device="cuda", dtype=torch.bfloat16), expected)
    assert gpu.most_pinned == 0  # the stretches are the only page-locked memory, and the only copy
    del stream, model, blocks
    gc.collect()
    assert gpu.locked == []


@pytest.mark.parametrize("limit", ["system", "ram"])
def test_what_cannot_be_locked_is_streamed_all_the_same(gpu, monkeypatch, limit):
    model, said = backbone(), []
    expected = run(model)
    size = streaming._stretch_bytes(model.single_blocks[0])
    if limit == "system":
        gpu.lockable = 7 * size
    else:
        monkeypatch.setattr(streaming, "free_ram", lambda: 14 * size)
    stream = stream_blocks(model, "cuda", 0, say=said.append)
    assert 0 < len(gpu.locked) < 9
    assert stream.locked_bytes <= 7 * size
    assert said == [
        f"{len(gpu.locked)} of 9 streamed blocks lie in page-locked memory; for more, RAM is short. The others are "
        "copied through a buffer, which takes longer."
    ]
    assert gpu.pinned == 0  # no second copy of what waits
    for _ in range(2):
        assert same(run(model, device="cuda"), expected)
    gc.collect()
    assert gpu.pinned == 0
    sizes = [sum(p.nbytes for p in block.parameters()) for block in (*model.double_blocks, *model.single_blocks)]
    assert 0 < gpu.most_pinned <= 2 * max(sizes)  # a buffer for the blocks under way


# ---------------------------------------------------------------- loading


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """Backbones of about 90 MB (bf16) and 180 MB (fp32) in files."""
    config = BackboneConfig(
        dim=512, ffn_dim=3072, freq_dim=32, text_dim=64, num_heads=4, num_double_layers=2, num_single_layers=5
    )
    folder = tmp_path_factory.mktemp("stored")
    for name, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
        state = NavaBackbone(config, dtype=dtype).init_weights().state_dict()
        save_file(state, folder / f"{name}.safetensors", {"config": json.dumps(asdict(config))})
    return folder


def test_mapped_weights_are_the_files_and_cannot_change_it(stored):
    path = stored / "bf16.safetensors"
    content = path.read_bytes()
    read, mapped = load_backbone(path), load_backbone(path, mapped=True)
    assert all(torch.equal(weight, read.state_dict()[name]) for name, weight in mapped.state_dict().items())
    mapped.head.head.weight.zero_()
    assert path.read_bytes() == content
    with open_checkpoint(path) as source:
        assert torch.equal(source.map("head.head.weight"), read.head.head.weight)


def test_what_cannot_be_mapped_is_read(stored, monkeypatch):
    from nava_core.checkpoint import source

    def refuse(*_, **__):
        raise OSError("no such luck")

    monkeypatch.setattr(source.mmap, "mmap", refuse)
    weights = load_backbone(stored / "bf16.safetensors", mapped=True).state_dict()
    monkeypatch.undo()
    expected = load_backbone(stored / "bf16.safetensors").state_dict()
    assert all(torch.equal(weights[name], expected[name]) for name in expected)


def test_a_tensor_that_lies_askew_is_read(tmp_path):
    data = torch.arange(4, dtype=torch.float32)
    header = json.dumps({"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}}).encode()
    header += b" " * (len(header) % 4 == 0)
    path = tmp_path / "a.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + data.numpy().tobytes())
    with open_checkpoint(path) as source:
        assert source.tensors["a"].offset % 4 != 0
        assert torch.equal(source.map("a"), data)


needs_proc = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is measured through /proc")
TAKEN = """
import sys
sys.path[:0] = [sys.argv[1], sys.argv[1] + "/tests/core"]
import torch
torch.set_num_threads(1)
from nava_core.checkpoint import load_backbone
from nava_core.offload import streaming
from _ram import measure
import diffusers.hooks

streaming._register = lambda address, size: True
streaming._unlock_all = lambda addresses: None
BLOCKS = [f"{kind}_blocks.{index}." for kind, count in (("double", 2), ("single", 5)) for index in range(count)]

def lock(model):
    for block in (*model.double_blocks, *model.single_blocks):
        assert streaming._into_locked_stretch(block)
    return model

load_backbone(sys.argv[3], mapped=True)
for path, options, then in (
    (sys.argv[2], {}, None),
    (sys.argv[2], {"mapped": True, "in_ram": BLOCKS}, None),
    (sys.argv[2], {"mapped": True, "in_ram": BLOCKS}, lock),
    (sys.argv[4], {"mapped": True, "in_ram": BLOCKS, "dtype": torch.bfloat16}, None),
    (sys.argv[4], {"mapped": True, "in_ram": BLOCKS, "dtype": torch.bfloat16}, lock),
):
    def work():
        model = load_backbone(path, **options)
        return then(model) if then else model
    print(*measure(work))
"""


@needs_proc
def test_there_are_never_two_copies_of_the_weights_in_ram(stored):
    golden = ROOT / "tests" / "golden" / "backbone_tiny.safetensors"
    files = [str(stored / "bf16.safetensors"), str(golden), str(stored / "fp32.safetensors")]
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(2**17)}  # as for the memory test of loading
    done = subprocess.run(
        [sys.executable, "-c", TAKEN, str(ROOT), *files],
        capture_output=True, text=True, timeout=180, check=False, env=environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (read, mapped, locked, converted, converted_locked) = (
        tuple(map(int, line.split())) for line in done.stdout.splitlines()
    )
    info = describe_file(files[0])
    weights = estimate_memory(info, torch.bfloat16)
    largest = max(tensor.nbytes for tensor in info.tensors.values())
    of_blocks = sum(t.nbytes for name, t in info.tensors.items() if "_blocks." in name)
    block = sum(t.nbytes for name, t in info.tensors.items() if name.startswith("double_blocks.0."))
    figures = {"weights": weights, "block": block, "read": read, "mapped": mapped, "locked": locked,
               "converted": converted, "converted and locked": converted_locked}  # fmt: skip
    print({name: figure for name, figure in figures.items()})
    assert weights > 60e6
    assert weights < read[0] < weights + 1.5 * largest + 8e6
    assert mapped[0] < 8e6  # pages of the file are the system's
    assert 0.8 * of_blocks < locked[0] < of_blocks + 8e6  # locked ones are the only ones
    # The file's fp32 tensor is there beside the weights while one is converted; a block while one is moved.
    assert weights < converted[0] < weights + 3 * largest + 8e6
    assert converted_locked[0] < weights + max(3 * largest, block) + 8e6
    assert converted_locked[1] < weights + 8e6
