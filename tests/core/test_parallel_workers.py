"""Workers under Ray: they equal one process, take LoRAs, end with their owner, and are missed when they are lost."""

import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from nava_core import BackboneConfig, NavaBackbone, load_backbone
from nava_core.backbone.quant_linear import QuantLinear
from nava_core.backbone.quantized import FP8
from nava_core.convert import convert
from nava_core.parallel import workers as module
from nava_core.parallel.cluster import ClusterError, connected
from nava_core.parallel.layout import Layout, choose_layout, layout_problem, step_seconds
from nava_core.parallel.workers import ParallelBackbone, WorkersError, check_parallel

pytest.importorskip("ray", reason="the workers need the package ray (extra [parallel])")

HERE = Path(__file__).parent
TOLERANCE = {"atol": 1e-5, "rtol": 1e-5}
CONFIG = BackboneConfig(
    dim=96, ffn_dim=128, freq_dim=32, text_dim=40, text_len=24, num_heads=12, num_double_layers=2, num_single_layers=2
)
REAL = BackboneConfig()
LAYOUTS = [(1, 4), (2, 2), (4, 1), (1, 3), (2, 1), (1, 1)]


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    import json

    path = tmp_path_factory.mktemp("weights") / "backbone.safetensors"
    weights = NavaBackbone(CONFIG).init_weights(3).state_dict()
    metadata = {"config": json.dumps(CONFIG.to_dict())}
    save_file({f"backbone.{name}": tensor for name, tensor in weights.items()}, path, metadata)
    return path


@pytest.fixture(scope="module")
def ray():
    """One Ray for all tests of this file, started with an allocator that workers must not inherit."""
    before = os.environ.get("PYTORCH_CUDA_ALLOC_CONF")
    os.environ["PYTORCH_CUDA_ALLOC_CONF"] = "backend:cudaMallocAsync"
    with connected(cpus=4) as connection:
        yield connection.ray
    os.environ.pop("PYTORCH_CUDA_ALLOC_CONF")
    if before is not None:
        os.environ["PYTORCH_CUDA_ALLOC_CONF"] = before


@pytest.fixture(scope="module")
def four(ray, path):
    said = []
    backbone = ParallelBackbone(path, workers=4, say=said.append)
    backbone.said = said
    yield backbone
    backbone.close()


def some_passes():
    """Four predictions as guidance wants them, with a clean first frame; 35 video and 9 audio tokens."""
    generator = torch.Generator().manual_seed(5)

    def random(*shape):
        return torch.randn(*shape, generator=generator)

    frames = torch.tensor([[0.0, 600, 600, 600, 600]])
    text = {
        "video": random(1, 48, 5, 2, 14),
        "audio": random(1, 9, 128),
        "timestep": (frames, torch.tensor([600.0])),
        "context": random(1, 11, 40),
    }
    voiced = {**text, "timbre": random(1, 2, 192), "timbre_positions": torch.tensor([[3, -1]])}
    return [voiced, {**text, "context": random(1, 5, 40)}, {**text, "cross_modal": False}, text]


def repeat(times, function, *arguments):
    for _ in range(times):
        function(*arguments)


def on_one(path, passes, dtype=None, changes=None):
    model = load_backbone(path, dtype=dtype, changes=changes)
    with torch.no_grad():
        return [model(**each) for each in passes]


def check_equal(got, expected):
    for pair, wanted in zip(got, expected, strict=True):
        assert wanted[0] is not None
        torch.testing.assert_close(pair[0], wanted[0], **TOLERANCE)
        torch.testing.assert_close(pair[1], wanted[1], **TOLERANCE)


# ---------------------------------------------------------------- equal to one process


@pytest.mark.parametrize("shape", LAYOUTS, ids=lambda shape: "{}x{}".format(*shape))
def test_every_layout_equals_one_process_and_is_really_taken(four, path, shape):
    passes = some_passes()
    four.layout = Layout(*shape)
    workers = four.start()
    before = workers.ask("total_passes")
    got = four.run_together(passes)
    check_equal(got, on_one(path, passes))
    branches, sequence = shape
    took_part = [after - was for after, was in zip(workers.ask("total_passes"), before, strict=True)]
    expected = [len(range(rank // sequence, 4, branches)) if rank < branches * sequence else 0 for rank in range(4)]
    assert took_part == expected


def test_the_layout_is_chosen_and_said(four, path):
    four.layout = None
    passes = some_passes()
    check_equal(four.run_together(passes), on_one(path, passes))
    check_equal(four.run_together(passes[:1]), on_one(path, passes[:1]))
    assert "Layout 4x1 for 4 predictions: 4 predictions side by side, a worker for each." in four.said


def test_workers_have_a_clean_environment(four):
    four.start()
    assert [about["inherited"] for about in four.workers.about] == [[]] * 4
    assert len({about["pid"] for about in four.workers.about} | {os.getpid()}) == 5


@pytest.mark.skipif(not hasattr(os, "getpriority"), reason="a system without niceness")
def test_workers_are_no_background_job(four):
    mine = os.getpriority(os.PRIO_PROCESS, 0)
    assert {os.getpriority(os.PRIO_PROCESS, about["pid"]) for about in four.start().about} == {mine}


class Stop(Exception):  # noqa: N818
    pass


@pytest.mark.parametrize("at", ["before a pass", "in a pass"])
def test_an_interruption_ends_the_workers_and_the_next_run_starts_others(four, path, at):
    asked = []

    def check():
        asked.append(1)
        if at == "before a pass" or len(asked) > 1:
            raise Stop

    four.layout = Layout(1, 4)
    pids = [about["pid"] for about in four.start().about]
    big = [{**each, "video": torch.zeros(1, 48, 9, 40, 40), "timestep": torch.tensor([5.0])} for each in some_passes()]
    with pytest.raises(Stop):
        four.run_together(big * 4, check)
    assert gone(pids, seconds=10)
    passes = some_passes()
    check_equal(four.run_together(passes, lambda: None), on_one(path, passes))
    assert not set(pids) & {about["pid"] for about in four.workers.about}


def test_an_interruption_while_they_start_leaves_none(path, monkeypatch):
    pids, asked = [], []
    versions, ask = module.Workers._check_versions, module.Workers.ask

    def noted(started):
        pids.extend(about["pid"] for about in started.about)
        versions(started)

    def check():
        if pids:  # they are there, and have no weights yet
            raise Stop

    def asks(started, method, *arguments, **named):
        asked.append(method)
        return ask(started, method, *arguments, **named)

    monkeypatch.setattr(module.Workers, "_check_versions", noted)
    monkeypatch.setattr(module.Workers, "ask", asks)
    with pytest.raises(Stop):
        ParallelBackbone(path, workers=2).run_together(some_passes(), check)
    assert asked == ["about"]  # not even the weights
    assert len(pids) == 2
    assert gone(pids, seconds=10)


def test_a_mistake_is_told_as_on_one_process(four):
    four.layout = Layout(1, 4)
    short = [{**each, "audio": each["audio"][:, :3], "timestep": torch.tensor([5.0])} for each in some_passes()]
    with pytest.raises(ValueError, match="3 audio tokens cannot be split over 4 workers"):
        four.run_together(short)


def test_a_lost_worker_is_one_sentence_and_the_next_run_works(four, path):
    four.layout = Layout(1, 4)
    passes = some_passes()
    four.run_together(passes)
    first = [about["pid"] for about in four.workers.about]
    threading.Timer(0.5, os.kill, (first[2], signal.SIGKILL)).start()
    with pytest.raises(WorkersError, match="A worker was lost, killed or out of memory"):
        repeat(10_000, four.run_together, passes)
    assert gone(first)
    check_equal(four.run_together(passes), on_one(path, passes))
    assert not set(first) & {about["pid"] for about in four.workers.about}


# ---------------------------------------------------------------- weights


CHANGED = ("double_blocks.0.self_attn.q_audio.weight", "single_blocks.1.ffn.0.weight", "head.head.bias")


def changes():
    """Small changes of weights of both kinds of block, as LoRAs make them; most are below half a step of fp8."""

    def change(seed, weight):
        generator = torch.Generator().manual_seed(seed)
        return weight + 0.01 * torch.randn(weight.shape, generator=generator)

    return nullcontext({name: partial(change, seed) for seed, name in enumerate(CHANGED)})


def test_changed_weights_reach_sharded_workers_that_have_no_file(ray, path, monkeypatch):
    """The weights are sent, sharded and changed; acknowledged."""
    monkeypatch.setattr(module, "file_digest", lambda path: "of another file")
    monkeypatch.setattr(module, "CHUNK_BYTES", 100_000)
    said, passes = [], some_passes()
    backbone = ParallelBackbone(path, workers=2, weights="sharded", changes=changes, say=said.append)
    got = backbone.run_together(passes)
    check_equal(got, on_one(path, passes, changes=changes().enter_result))
    assert (got[0][0] - on_one(path, passes)[0][0]).abs().max() > 1e-3
    assert "Sending the weights to 2 of 2 workers." in said
    assert "3 weights changed by LoRAs, acknowledged by 2 of 2 workers." in said
    backbone.close()


def test_fp8_weights_are_sent_and_their_changes_rounded_as_on_one_process(ray, path, monkeypatch):
    """By chance with the same seed: rounded to the nearest, most of a LoRA would be lost."""
    monkeypatch.setattr(module, "file_digest", lambda path: "of another file")
    backbone = ParallelBackbone(path, workers=2, layout=Layout(2, 1), dtype=FP8, changes=changes)
    passes = [{k: v.bfloat16() if k in ("video", "audio", "context", "timbre") else v for k, v in each.items()}
              for each in some_passes()]  # fmt: skip
    got = backbone.run_together(passes)
    for pair, wanted in zip(got, on_one(path, passes, FP8, changes().enter_result), strict=True):
        assert torch.equal(pair[0], wanted[0])
        assert torch.equal(pair[1], wanted[1])
    assert not torch.equal(got[0][1], on_one(path, passes, FP8)[0][1])
    backbone.close()


@pytest.mark.parametrize("weights", ["replicated", "sharded"])
@pytest.mark.parametrize("kind", ["nvfp4", "w4a8", "mxfp8 as ComfyUI saves it"])
def test_quantised_weights_are_sent_and_their_changes_rounded_as_on_one_process(
    ray, path, tmp_path, monkeypatch, kind, weights
):
    """Packed values, scales of types of their own, one without dimensions, two formats in a file."""
    pytest.importorskip("comfy_kitchen", reason="the formats need comfy-kitchen (extra [quantized])")
    monkeypatch.setattr(module, "file_digest", lambda path: "of another file")
    dtype, powers = kind.split()[0], len(kind.split()) > 1
    protected = [] if powers else [CHANGED[0].removesuffix(".weight"), "single_blocks.0.ffn.2"]
    file = convert(path, tmp_path / "small.safetensors", dtype=dtype, protected=protected).path
    if powers:
        file = with_powers_of_two(file, tmp_path / "saved.safetensors")
    passes = [{k: v.bfloat16() if k in ("video", "audio", "context", "timbre") else v for k, v in each.items()}
              for each in some_passes()]  # fmt: skip
    layout = Layout(2, 1) if weights == "replicated" else Layout(1, 2)
    backbone = ParallelBackbone(file, workers=2, layout=layout, weights=weights, changes=changes)
    got = backbone.run_together(passes)
    kinds = {m.layer.format.name for m in load_backbone(file).modules() if isinstance(m, QuantLinear)}
    assert len(kinds) == (1 if powers else 2)
    wanted, without = (on_one(file, passes, changes=each) for each in (changes().enter_result, None))
    for pair, right, wrong in zip(got, wanted, without, strict=True):
        for part, x, y in zip(pair, right, wrong, strict=True):
            if weights == "replicated":
                assert torch.equal(part, x)
            assert (part - x).norm() < 0.3 * (part - y).norm()  # bf16, summed in another order
    backbone.close()


def with_powers_of_two(file, path):
    """mxfp8 with scales in the type that ComfyUI saves them in."""
    if not hasattr(torch, "float8_e8m0fnu"):
        pytest.skip("this PyTorch has no such type")
    with safe_open(file, "pt") as opened:
        tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        metadata = opened.metadata()
    for name in [name for name in tensors if name.endswith(".weight_scale")]:
        tensors[name] = tensors[name].view(torch.float8_e8m0fnu)
    save_file(tensors, path, metadata)
    return path


# ---------------------------------------------------------------- processes


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def gone(pids, seconds=20):  # 10 on a machine that has nothing else to do
    end = time.monotonic() + seconds
    while any(map(alive, pids)) and time.monotonic() < end:
        time.sleep(0.1)
    return not any(map(alive, pids))


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks at processes in /proc")
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT], ids=lambda how: how.name)
def test_no_worker_outlives_its_owner(path, how, tmp_path):
    with open(tmp_path / "log", "w") as log:
        owner = subprocess.Popen(
            [sys.executable, HERE / "_parallel_owner.py", path], stdout=subprocess.PIPE, stderr=log, text=True
        )
    try:
        pids = [int(pid) for pid in owner.stdout.readline().split()]
        assert len(pids) == 2, (tmp_path / "log").read_text()
        assert all(map(alive, pids))
        owner.send_signal(how)
        assert gone([*pids, owner.pid])
    finally:
        owner.kill()
        owner.wait()
        owner.stdout.close()


def test_two_machines_of_a_cluster(path, tmp_path):
    passes = some_passes()
    torch.save(passes, tmp_path / "passes.pt")
    done = subprocess.run(
        [sys.executable, HERE / "_parallel_two_nodes.py", path, tmp_path / "passes.pt", tmp_path / "out.pt"],
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    result = torch.load(tmp_path / "out.pt")
    assert len(set(result["nodes"])) == 2
    check_equal(result["outputs"], on_one(path, passes))


# ---------------------------------------------------------------- what cannot be


def test_workers_of_another_version_are_refused_before_weights_are_loaded(ray, path, monkeypatch):
    monkeypatch.setattr(module, "code_version", lambda: "0123456789ab")
    said = []
    with pytest.raises(WorkersError, match=r"another version of this pack \(\w{12}, here 0123456789ab\)"):
        ParallelBackbone(path, workers=1, say=said.append).start()
    assert said == ["Starting 1 workers."]


def test_more_workers_than_there_are_places(ray, path):
    with pytest.raises(WorkersError, match="9 workers need 9 CPUs, and Ray has 4"):
        ParallelBackbone(path, workers=9).start()


def test_a_cluster_that_is_not_there(monkeypatch, path, tmp_path):
    code = f"from nava_core.parallel.workers import ParallelBackbone as P; P({str(path)!r}, workers=1).start()"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "NAVA_RAY_ADDRESS": "127.0.0.1:1", "PYTHONPATH": str(HERE.parents[1])},
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert "No Ray cluster answers at 127.0.0.1:1" in done.stderr.strip().splitlines()[-1]
    assert issubclass(WorkersError, ClusterError)


@pytest.mark.parametrize(
    ("workers", "layout", "weights", "words"),
    [
        (
            5,
            "1x5",
            "replicated",
            "24 attention heads cannot be shared evenly by 5 workers: use one of 1, 2, 3, 4, 6, 8",
        ),
        (5, "auto", "sharded", "24 attention heads cannot be shared evenly by 5 workers"),
        (4, "2x4", "replicated", "The layout 2x4 is for 8 workers, and there are 4"),
        (0, "auto", "replicated", "0 workers cannot make a clip"),
        (2, "auto", "scattered", "no 'scattered' weights: choose replicated or sharded"),
    ],
)
def test_what_does_not_fit_is_told_before_anything_is_loaded(workers, layout, weights, words):
    with pytest.raises(ValueError, match=words):
        check_parallel(REAL, workers, Layout.parse(layout), weights)


def test_a_platform_without_nccl_is_told_what_to_use_instead(monkeypatch):
    monkeypatch.setattr(module.dist, "is_nccl_available", lambda: False)
    with pytest.raises(RuntimeError, match=r"no NCCL.*MultiGPU CFG Split"):
        check_parallel(REAL, 2, device="cuda")


def test_more_workers_than_gpus(monkeypatch):
    monkeypatch.setattr(module.dist, "is_nccl_available", lambda: True)
    monkeypatch.setattr(module.torch.cuda, "device_count", lambda: 1)
    monkeypatch.delenv("NAVA_RAY_ADDRESS", raising=False)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with pytest.raises(RuntimeError, match="2 workers need 2 GPUs, and this machine has 1"):
        check_parallel(REAL, 2, device="cuda")


# ---------------------------------------------------------------- layouts

TOKENS = (32_560, 152)


@pytest.mark.parametrize(
    ("workers", "predictions", "expected"),
    [
        (1, 4, "1x1"),
        (2, 4, "2x1"),
        (2, 3, "1x2"),
        (3, 3, "3x1"),
        (4, 4, "4x1"),
        (5, 4, "4x1"),
        (8, 4, "4x2"),
        (8, 3, "1x8"),
        (8, 2, "2x4"),
        (8, 1, "1x8"),
        (6, 3, "3x2"),
    ],
)
def test_auto_at_the_real_size(workers, predictions, expected):
    assert str(choose_layout(REAL, workers, predictions, *TOKENS)) == expected


def test_auto_shares_tokens_within_a_machine_only():
    assert choose_layout(REAL, 8, 3, *TOKENS, neighbours=4) == Layout(3, 2)  # one round, where 2x4 takes two
    assert choose_layout(REAL, 8, 2, *TOKENS, neighbours=4) == Layout(2, 4)
    assert choose_layout(REAL, 8, 1, *TOKENS, neighbours=4) == Layout(1, 4)
    assert choose_layout(REAL, 2, 1, *TOKENS, neighbours=1) == Layout(1, 1)


def test_auto_never_gives_a_worker_no_token():
    assert choose_layout(REAL, 8, 1, 500_000, 3).sequence <= 3
    assert choose_layout(REAL, 8, 1, 0, 5).sequence <= 5


def test_every_auto_layout_fits_and_none_is_slower_than_one_worker():
    for workers in range(1, 17):
        for predictions in range(1, 5):
            layout = choose_layout(REAL, workers, predictions, *TOKENS)
            assert layout_problem(layout, layout.workers, REAL) is None
            assert layout.workers <= workers
            one = step_seconds(REAL, Layout(), predictions, *TOKENS)
            assert step_seconds(REAL, layout, predictions, *TOKENS) <= one


def test_a_layout_reads_and_says_itself():
    assert Layout.parse(" 2x4") == Layout(2, 4)
    assert Layout.parse("auto") is None
    with pytest.raises(ValueError, match="'2 by 4' is no layout"):
        Layout.parse("2 by 4")
    assert Layout(2, 2).sentence(5, 4) == (
        "Layout 2x2 for 4 predictions: 2 predictions side by side, 2 workers sharing the tokens of each; "
        "1 of 5 workers idle."
    )


# ---------------------------------------------------------------- whole runs without a host


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Small models, the backbone with a hundredth of its velocities: the full ones blow rounding errors up."""
    from nava_core.checkpoint import open_checkpoint
    from nava_core.demo import make_small_models

    folder = tmp_path_factory.mktemp("models")
    paths = make_small_models(folder, preview_decoder=False)
    with open_checkpoint(paths["backbone"]) as source:
        weights, metadata = {f"backbone.{name}": source.read(name) for name in source}, source.info.metadata
    for name in ("head", "head_audio"):
        weights[f"backbone.{name}.head.weight"] *= 0.004
    save_file(weights, paths["backbone"], metadata)
    return {role: paths[role] for role in ("backbone", "text_encoder", "video_vae", "audio_vae", "speaker_encoder")}


@pytest.mark.parametrize("settings", [("1x2", "replicated"), ("2x1", "replicated"), ("auto", "sharded")], ids=str)
def test_a_whole_clip_equals_one_process(ray, models, settings):
    from nava_core import ModelFiles, NavaPipeline
    from nava_core.parallel import Parallel

    def clip(parallel):
        said = []
        pipeline = NavaPipeline.from_files(
            ModelFiles(**models), device="cpu", dtype=torch.float32, parallel=parallel, say=said.append
        )
        voice = torch.randn(1, 192, generator=torch.Generator().manual_seed(2))
        made = pipeline("She says <S>Good morning!<E>", voices=[voice], seconds=0.5, width=64, height=64, steps=3)
        again = pipeline("He says <S>Good evening!<E>", seconds=0.5, width=64, height=64, steps=2)
        pipeline.unload()
        return made, again, said

    several, one = clip(Parallel(2, *settings)), clip(None)
    for got, wanted in zip(several[:2], one[:2], strict=True):
        for part in ("video_latent", "audio_latent", "frames", "waveform"):
            torch.testing.assert_close(getattr(got, part), getattr(wanted, part), **TOLERANCE)
    assert several[2].count("Starting 2 workers.") == 1
    assert any(sentence.startswith("Layout ") for sentence in several[2])


def command(*arguments):
    from nava_core.cli import main

    return main([str(each) for each in arguments])


def test_generate_with_workers(ray, models, tmp_path, capsys):
    from nava_core import read_audio

    files = [part for role, path in models.items() for part in (f"--{role.replace('_', '-')}", path)]
    common = ["generate", "Rain on a roof.", "--device", "cpu", "--dtype", "fp32", "--audio-only", "--seconds", "0.5"]
    common += ["--steps", "2", *files]
    assert command(*common, "--parallel", "2", "--layout", "1x2", "--out", tmp_path / "two.wav") == 0
    assert "Layout 1x2 for 2 predictions" in capsys.readouterr().err
    assert command(*common, "--out", tmp_path / "one.wav") == 0
    two, one = (read_audio(tmp_path / f"{name}.wav")[0] for name in ("two", "one"))
    torch.testing.assert_close(two, one, **TOLERANCE)
    capsys.readouterr()
    for wrong, words in (
        (["--parallel", "3", "--layout", "1x3"], "--parallel: The model's 2 attention heads cannot be shared evenly"),
        (["--parallel", "2", "--layout", "two"], "--parallel: 'two' is no layout"),
        (["--layout", "1x2"], "--layout and --weights are for several workers"),
    ):
        assert command(*common, *wrong, "--out", tmp_path / "none.wav") == 2
        assert words in capsys.readouterr().err


def test_the_benchmark_measures_every_layout(ray, path, capsys):
    from benchmarks.parallel import main

    main(["--measure", str(path), "--workers", "2", "--device", "cpu", "--size", "64x32", "--seconds", "0.5"])
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [row[0] for row in rows] == ["layout", "1x1", "1x2", "2x1"]
    assert rows[1][2] == "1.00x"
    assert all(float(row[1]) > 0 for row in rows[1:])
