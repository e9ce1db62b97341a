"""Blocks under torch.compile: the same numbers, one graph for each kind of block whatever the clip."""

import itertools
import shutil
import sys
from importlib import import_module
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch._dynamo.testing import CompileCounter
from torch._dynamo.utils import counters
from torch.profiler import ProfilerActivity, profile

from nava_core import BackboneConfig, NavaBackbone, backbone, load_backbone
from nava_core.backbone import CompiledBlocks, activation_bytes
from nava_core.backbone import compiled as compiled_module
from nava_core.backbone.formats import MADE_HERE, PROTECTING, format_problem
from nava_core.convert import convert
from nava_core.parallel.worker import Worker

CONFIG = BackboneConfig(
    dim=64, ffn_dim=128, freq_dim=32, text_dim=40, text_len=24, num_heads=2, num_double_layers=2, num_single_layers=3
)


@pytest.fixture(autouse=True)
def anew():
    """Nothing compiled before counts."""
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


@pytest.fixture
def networks():
    """(a network whose blocks are traced and counted, the same network as it is, the counter)"""
    counter = CompileCounter()
    traced, plain = (NavaBackbone(CONFIG).init_weights(3).requires_grad_(False) for _ in range(2))
    return traced.compile_blocks(backend=counter), plain, counter


def a_pass(frames=3, height=4, width=6, steps=9, clean=(), batch=1, **conditions):
    """Arguments of a pass; ``clean``: frames that are given."""
    generator = torch.Generator().manual_seed(frames * height + width + steps)

    def random(*shape):
        return torch.randn(batch, *shape, generator=generator)

    timestep = torch.full((batch,), 600.0)
    if clean:
        times = torch.full((batch, frames), 600.0)
        times[:, list(clean)] = 0
        timestep = (times, timestep)
    return {
        "video": random(48, frames, height, width),
        "audio": random(steps, 128),
        "timestep": timestep,
        "context": random(11, 40),
        **conditions,
    }


def check_equal(traced, plain, arguments):
    with torch.no_grad():
        for got, wanted in zip(traced(**arguments), plain(**arguments), strict=True):
            assert (got is None) == (wanted is None)
            assert got is None or torch.equal(got, wanted)


def test_two_graphs_serve_all_sizes_first_frames_and_predictions(networks):
    traced, plain, counter = networks
    voices = {"timbre": torch.randn(1, 2, 192), "timbre_positions": torch.tensor([[3, -1]])}
    for number in range(12):
        size = {"frames": 2 + number, "height": 4 + number % 3, "width": 4 + number % 5, "steps": 5 + 3 * number}
        for clean in ((), (0,), (0, 1)):
            check_equal(traced, plain, a_pass(**size, clean=clean))
        check_equal(traced, plain, a_pass(**size, cross_modal=False))
        check_equal(traced, plain, a_pass(**size, clean=(0,), cross_modal=False))
        check_equal(traced, plain, a_pass(**size, **voices))
    many = torch.linspace(0, 900, 7)[None]
    check_equal(traced, plain, {**a_pass(frames=7), "timestep": (many, torch.tensor([20.0]))})
    assert counter.frame_count == 2  # one for each kind of block
    assert not counters["graph_break"]


def test_clips_of_one_modality_and_of_more_samples_are_cases_of_their_own(networks):
    traced, plain, counter = networks
    counts = []
    for arguments in ({}, {"video": None}, {"audio": None}, {"batch": 2}, {"batch": 3}):
        for steps in (9, 12):
            check_equal(traced, plain, {**a_pass(steps=steps, batch=arguments.get("batch", 1)), **_only(arguments)})
        counts.append(counter.frame_count)
    assert counts[0] == 2
    assert counts[-1] <= 10
    assert not counters["graph_break"]


def test_several_models_at_once_stay_compiled():
    """PyTorch's own limit for a function is 8 graphs; above it, it would run uncompiled."""
    counter = CompileCounter()
    blocks = CompiledBlocks(backend=counter)  # as the server's, of all MODELs that were compiled alike
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        for number in range(3):
            sizes = {"num_double_layers": 1, "num_single_layers": 1, "eps": 1e-6 * (1 + number)}
            config = BackboneConfig(**{**CONFIG.__dict__, **sizes})
            compiled, plain = (NavaBackbone(config).init_weights(3).requires_grad_(False) for _ in range(2))
            compiled.compiled = blocks
            for only in ({}, {"video": None}, {"audio": None}):
                check_equal(compiled, plain, {**a_pass(), **only})
    assert counter.frame_count == 3 * 2 * 3
    assert not counters["graph_break"]


def _only(arguments):
    return {name: value for name, value in arguments.items() if name != "batch"}


@pytest.fixture(scope="module")
def quantised(tmp_path_factory):
    """Makes the network's file in a format; beside 4 and 6 bits, every block has another layer protected."""
    folder = tmp_path_factory.mktemp("quantised")
    weights = NavaBackbone(CONFIG).init_weights(3).state_dict()
    save_file({f"backbone.{name}": tensor for name, tensor in weights.items()}, folder / "plain.safetensors")
    layers = ("double_blocks.1.self_attn.q_audio", "single_blocks.0.self_attn.o", "single_blocks.2.cross_attn.k")

    def make(dtype):
        protected = layers if dtype in PROTECTING else ()
        path = folder / f"{dtype}.safetensors"
        return convert(folder / "plain.safetensors", path, dtype=dtype, protected=protected, overwrite=True).path

    return make


def in_bf16(arguments):
    floats = ("video", "audio", "context")
    return {name: each.bfloat16() if name in floats and each is not None else each for name, each in arguments.items()}


@pytest.mark.parametrize("dtype", ["fp8", *MADE_HERE])
def test_quantised_weights_stay_out_of_the_two_graphs(quantised, dtype):
    """No compiler has to know their types, and blocks whose layers differ in format share a graph."""
    if dtype in MADE_HERE and format_problem(dtype):
        pytest.skip(format_problem(dtype))
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    traced, plain = (load_backbone(quantised(dtype)) for _ in range(2))
    traced.compile_blocks(backend=backend)
    for arguments in (a_pass(), a_pass(5, 6, 4, 20, clean=(0,)), a_pass(4, 4, 4, 7, cross_modal=False)):
        check_equal(traced, plain, in_bf16(arguments))
    assert not counters["graph_break"]
    assert len(graphs) == 2
    for graph, linears in zip(graphs, (8 + 8, 4 + 4), strict=True):  # the feed-forward is an operator as a whole
        nodes = graph.graph.nodes
        values = [node.meta["example_value"] for node in nodes if node.op == "placeholder"]
        types = {value.dtype for value in values if torch.is_tensor(value)}
        assert types <= {torch.bfloat16, torch.float32, torch.int64}
        assert sum("backbone.linear" in str(node.target) for node in nodes) == linears
    batches = [in_bf16(a_pass(batch=2)), in_bf16({**a_pass(), "video": None})]
    for arguments in batches:
        check_equal(traced, plain, arguments)
    assert not counters["graph_break"]


@pytest.mark.skipif(shutil.which("g++") is None, reason="the compiler needs g++")
def test_quantised_weights_really_compiled(quantised):
    compiled, plain = (load_backbone(quantised("fp8")) for _ in range(2))
    compiled.compile_blocks()
    with torch.no_grad():
        for got, wanted in zip(compiled(**in_bf16(a_pass())), plain(**in_bf16(a_pass())), strict=True):
            assert (got - wanted).norm() < 0.03 * wanted.norm()  # bf16, in another order


def test_compiled_as_a_whole_by_others_quantised_layers_are_as_they_are(quantised):
    plain = load_backbone(quantised("fp8"))
    compiled = torch.compile(load_backbone(quantised("fp8")), backend="eager")
    check_equal(compiled, plain, in_bf16(a_pass()))


@pytest.mark.skipif(shutil.which("g++") is None, reason="the compiler needs g++")
def test_really_compiled_it_is_equal_within_rounding():
    config = BackboneConfig(**{**CONFIG.__dict__, "num_double_layers": 1, "num_single_layers": 1})
    compiled, plain = (NavaBackbone(config).init_weights(3).requires_grad_(False) for _ in range(2))
    compiled.compile_blocks()
    with torch.no_grad():
        for arguments in (a_pass(), a_pass(5, 6, 8, 20, clean=(0,)), a_pass(4, 2, 10, 7, cross_modal=False)):
            for got, wanted in zip(compiled(**arguments), plain(**arguments), strict=True):
                torch.testing.assert_close(got, wanted, rtol=0, atol=2e-5)
    assert counters["stats"]["unique_graphs"] == 2


def another_copy(monkeypatch):
    """The package imported once more, in a process that has it, as by a node pack and by an installed one."""
    folder = Path(backbone.__file__).parents[1]
    for name in [name for name in sys.modules if name.partition(".")[0] == "nava_again"]:
        monkeypatch.delitem(sys.modules, name)
    spec = spec_from_file_location("nava_again", folder / "__init__.py", submodule_search_locations=[str(folder)])
    monkeypatch.setitem(sys.modules, "nava_again", module_from_spec(spec))
    made = import_module("nava_again.backbone")
    for name in [name for name in sys.modules if name.startswith("nava_again.")]:
        monkeypatch.setitem(sys.modules, name, sys.modules[name])
    return made


def test_copies_of_the_package_leave_each_others_operators(networks, monkeypatch):
    """Compiled before the others came, after, and in turns; two of them under one name."""
    traced, plain, _ = networks
    check_equal(traced, plain, a_pass())
    compiled = [traced]
    for _ in range(2):
        again = another_copy(monkeypatch)
        assert again.NavaBackbone is not NavaBackbone
        other = again.NavaBackbone(again.BackboneConfig(**CONFIG.__dict__)).init_weights(3).requires_grad_(False)
        compiled.append(other.compile_blocks(backend="eager"))
    for each in (*reversed(compiled), *compiled):
        check_equal(each, plain, a_pass(cross_modal=False))


@pytest.mark.parametrize(
    "options",
    [
        {"backend": "cudagraphs"},
        {"mode": "reduce-overhead"},
        {"mode": "max-autotune"},
        {"options": {"triton.cudagraphs": True}},
    ],
)
def test_cuda_graphs_are_refused(networks, options):
    """They would repeat what an operator did in the block that they were recorded in."""
    with pytest.raises(ValueError, match="cannot be compiled into CUDA graphs") as refused:
        networks[1].compile_blocks(**options)
    assert str(next(iter(options.values()))) in str(refused.value) or "triton.cudagraphs" in str(refused.value)
    assert networks[1].compiled is None
    tag = getattr(torch.Tag, "cudagraph_unsafe", None)
    operators = getattr(torch.ops, compiled_module.NAMESPACE)
    for name in ("self_attention", "attention", "linear", "norm_weights", "feed_forward"):
        assert tag is None or tag in getattr(operators, name).default.tags


def test_where_nothing_can_be_compiled_a_sentence_says_so():
    def backend(graph, inputs):
        raise OSError("there is no g++")

    network = NavaBackbone(CONFIG).init_weights(3).requires_grad_(False).compile_blocks(backend=backend)
    with torch.no_grad(), pytest.raises(RuntimeError, match=r"could not be compiled \(OSError: there is no g\+\+\)"):
        network(**a_pass())


def test_errors_of_the_network_itself_are_not_the_compilers(networks):
    traced, _, _ = networks
    traced.attention = _no_attention
    with torch.no_grad(), pytest.raises(torch.OutOfMemoryError, match="as on a GPU"):
        traced(**a_pass())


def _no_attention(*_):
    raise torch.OutOfMemoryError("as on a GPU")


def test_workers_compile_theirs():
    worker = Worker("cpu")
    worker.shards = 0
    for wanted in (True, False):
        worker.prepare(CONFIG.__dict__, [], torch.float32, wanted)
        assert (worker.model.compiled is not None) == wanted


# ---------------------------------------------------------------- memory


def allocated(work):
    """Most bytes that PyTorch's allocator on the CPU has handed out at once: what a graph makes, nobody else sees."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as watched:
        work()
    events = [event for event in watched.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    return max(itertools.accumulate(now))


@pytest.mark.skipif(shutil.which("g++") is None, reason="the compiler needs g++")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_memory_figure_of_compiled_blocks(dtype):
    config = BackboneConfig(
        dim=256, ffn_dim=512, freq_dim=32, text_dim=32, num_heads=4, num_double_layers=1, num_single_layers=1
    )
    network = NavaBackbone(config).init_weights(seed=1).eval().to(dtype)
    network.compile_blocks()
    for frames, steps in ((10, 500), (16, 300)):
        parts = torch.randn(1, 48, frames, 48, 48), torch.randn(1, steps, 128)
        video, audio, context = (part.to(dtype) for part in (*parts, torch.randn(1, config.text_len, 32)))

        def one_pass(video=video, audio=audio, context=context):
            network(video, audio, torch.tensor([500.0]), context, options={})

        with torch.inference_mode():
            one_pass()
            counted = allocated(one_pass)
        tokens, size = frames * 24 * 24 + steps, dtype.itemsize
        plain, planned = (
            activation_bytes(config, 1, tokens, size, audio_tokens=steps, compiled=compiled)
            for compiled in (False, True)
        )
        assert planned == pytest.approx(counted, rel=0.15)
        assert plain < 0.85 * counted
