"""Blocks under torch.compile: the same numbers, one graph for each kind of block whatever the clip."""

import itertools
import shutil

import pytest
import torch
from torch._dynamo.testing import CompileCounter
from torch._dynamo.utils import counters
from torch.profiler import ProfilerActivity, profile

from nava_core import BackboneConfig, NavaBackbone
from nava_core.backbone import activation_bytes
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


def _only(arguments):
    return {name: value for name, value in arguments.items() if name != "batch"}


def test_fp8_weights_are_in_the_graph_too(tmp_path):
    from safetensors.torch import save_file

    from nava_core import load_backbone

    weights = NavaBackbone(CONFIG).init_weights(3).state_dict()
    save_file({f"backbone.{name}": tensor for name, tensor in weights.items()}, tmp_path / "b.safetensors")
    counter = CompileCounter()
    traced, plain = (load_backbone(tmp_path / "b.safetensors", dtype=torch.float8_e4m3fn) for _ in range(2))
    traced.compile_blocks(backend=counter)
    arguments = a_pass()
    as_bf16 = {name: arguments[name].bfloat16() for name in ("video", "audio", "context")}
    check_equal(traced, plain, {**arguments, **as_bf16})
    assert counter.frame_count == 2
    assert not counters["graph_break"]


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
