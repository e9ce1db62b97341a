"""Several processes equal one: the tokens split, the weights sharded. Real processes that talk over gloo."""

import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch.utils.flop_counter import FlopCounterMode

from nava_core.backbone import BackboneConfig, NavaBackbone
from nava_core.parallel.layout import exchanged_bytes, pass_operations
from nava_core.parallel.ulysses import heads_problem, share, shares

RANKS = Path(__file__).with_name("_parallel_ranks.py")
TOLERANCE = {"atol": 1e-5, "rtol": 1e-5}
SECONDS = 120


def run_ranks(folder, ranks, model, passes, **job):
    """What each of ``ranks`` processes says of ``passes``, {name: arguments}."""
    config = asdict(model.config)
    torch.save({"model": (config, model.state_dict()), "passes": passes, **job}, folder / "job.pt")
    running = []
    for rank in range(ranks):
        places = [folder / "job.pt", rank, ranks, folder / "rendezvous", folder / f"out{rank}.pt"]
        with open(folder / f"log{rank}.txt", "w") as log:
            running.append(
                subprocess.Popen([sys.executable, RANKS, *map(str, places)], stdout=log, stderr=subprocess.STDOUT)
            )
    try:
        codes = [process.wait(SECONDS) for process in running]
    finally:
        for process in running:
            process.kill()
    assert codes == [0] * ranks, "\n".join((folder / f"log{rank}.txt").read_text()[-2000:] for rank in range(ranks))
    return [torch.load(folder / f"out{rank}.pt") for rank in range(ranks)]


# ---------------------------------------------------------------- the golden network, 2 heads


def golden_model(golden):
    path = golden / "backbone_tiny.safetensors"
    weights = {name.removeprefix("backbone."): tensor for name, tensor in load_file(path).items()}
    with safe_open(path, "pt") as file:
        config = json.loads(file.metadata()["config"])
    model = NavaBackbone(BackboneConfig.from_shapes({k: tuple(v.shape) for k, v in weights.items()}, config))
    model.load_state_dict(weights)
    return model


def golden_cases(golden):
    """{name: (arguments of a pass, {modality: velocity})}"""
    path = golden / "backbone_cases.safetensors"
    tensors = load_file(path)
    with safe_open(path, "pt") as file:
        settings = json.loads(file.metadata()["cases"])
    return {name: golden_case(name, tensors, told) for name, told in settings.items()}


def golden_case(name, tensors, settings):
    def given(what):
        tensor = tensors.get(f"{name}/in/{what}")
        return None if tensor is None else tensor[None]

    video, timestep = given("video"), tensors[f"{name}/in/t"]
    if settings["own_timesteps"]:
        timestep = (given("tv"), given("ta"))
    elif settings["first_frame_clean"]:
        frames = timestep.repeat(1, video.shape[2])
        frames[:, 0] = 0
        timestep = (frames, timestep)
    positions = settings["speaker_positions"]
    arguments = {
        "video": video,
        "audio": given("audio"),
        "timestep": timestep,
        "context": given("context"),
        "timbre": given("spk"),
        "timbre_positions": None if positions is None else torch.tensor([positions]),
        "cross_modal": not settings["align_masked"],
    }
    expected = {m: tensors[f"{name}/out/{m}"] for m in ("video", "audio") if f"{name}/out/{m}" in tensors}
    return arguments, expected


def check(model, passes, outputs):
    """Every pass of every process equals one process, both modalities."""
    with torch.no_grad():
        expected = {name: model(**arguments) for name, arguments in passes.items()}
    for output in outputs:
        assert output["passes"] == len(passes)
        for name, pair in expected.items():
            for got, want in zip(output["results"][name], pair, strict=True):
                assert (got is None) == (want is None)
                if want is not None:
                    torch.testing.assert_close(got, want, **TOLERANCE)


@pytest.mark.parametrize("shard", [False, True], ids=["replicated", "sharded"])
def test_every_golden_case_over_two_processes(golden, tmp_path, shard):
    model, cases = golden_model(golden), golden_cases(golden)
    passes = {name: arguments for name, (arguments, _) in cases.items()}
    assert len(passes) == 18
    outputs = run_ranks(tmp_path, 2, model, passes, shard=shard)
    check(model, passes, outputs)
    for name, (_, expected) in cases.items():
        for modality, want in expected.items():
            got = outputs[0]["results"][name][("video", "audio").index(modality)]
            assert (got[0] - want).abs().max() < 2e-4
    whole = sum(p.numel() for p in model.parameters())
    if shard:
        assert all(output["held"] < 0.6 * whole for output in outputs)
    else:
        assert all(output["held"] == whole for output in outputs)


# ---------------------------------------------------------------- more processes, uneven token counts

CONFIG = {
    "dim": 96,
    "ffn_dim": 128,
    "freq_dim": 32,
    "text_dim": 40,
    "text_len": 24,
    "num_heads": 12,
    "num_double_layers": 2,
    "num_single_layers": 2,
}


@pytest.fixture(scope="module")
def small_model():
    return NavaBackbone(BackboneConfig(**CONFIG)).init_weights(3).requires_grad_(False)


def small_passes():
    """Passes of every kind, whose 35 video and 9 audio tokens no number of processes used here divides."""
    generator = torch.Generator().manual_seed(5)

    def random(*shape):
        return torch.randn(*shape, generator=generator)

    video, audio, context = random(2, 48, 5, 2, 14), random(2, 9, 128), random(2, 11, 40)
    frames = torch.tensor([[0.0, 0, 600, 600, 600], [600, 0, 600, 0, 600]])
    steps = torch.tensor([[0.0, 0, 0, 400, 400, 400, 400, 400, 0], [400.0] * 9])
    whole = {"video": video, "audio": audio, "timestep": torch.tensor([500.0, 20.0]), "context": context}
    voices = {"timbre": random(2, 2, 192), "timbre_positions": torch.tensor([[3, -1], [0, 10]])}
    return {
        "both": whole,
        "voices": {**whole, **voices},
        "apart": {**whole, "cross_modal": False},
        "clean frames and steps": {**whole, "timestep": (frames, steps)},
        "clean and apart": {**whole, "timestep": (frames, steps), "cross_modal": False},
        "own times": {**whole, "timestep": (torch.tensor([500.0, 10.0]), torch.tensor([100.0, 700.0]))},
        "audio only": {**whole, "video": None, **voices},
        "video only": {**whole, "audio": None, "timestep": (frames, frames[:, 0])},
    }


@pytest.mark.parametrize(("ranks", "shard"), [(3, False), (4, False), (3, True)])
def test_uneven_shares_equal_one_process(small_model, tmp_path, ranks, shard):
    passes = small_passes()
    check(small_model, passes, run_ranks(tmp_path, ranks, small_model, passes, shard=shard))


@pytest.mark.parametrize("ranks", [6, 8])
def test_24_heads_over_a_whole_machine(tmp_path, ranks):
    """As many heads as the released model has; 35 video and 9 audio tokens over 8 processes."""
    model = NavaBackbone(BackboneConfig(**{**CONFIG, "dim": 144, "num_heads": 24})).init_weights(3)
    passes = {name: small_passes()[name] for name in ("voices", "clean and apart", "audio only")}
    check(model, passes, run_ranks(tmp_path, ranks, model, passes))


def test_bytes_sent_are_those_that_layouts_are_chosen_by(small_model, tmp_path):
    """Velocities are gathered, never tokens."""
    passes = {"both": {name: part[:1] for name, part in small_passes()["both"].items()}}
    outputs = run_ranks(tmp_path, 3, small_model, passes)
    counted = exchanged_bytes(small_model.config, 35, 9, 3, element=4)
    assert sum(output["sent"] for output in outputs) == pytest.approx(3 * counted, rel=0.03)


def test_operations_are_those_that_layouts_are_chosen_by():
    with torch.no_grad(), torch.device("meta"), FlopCounterMode(display=False) as counter:
        NavaBackbone(dtype=torch.bfloat16)(
            torch.empty(1, 48, 37, 44, 80, dtype=torch.bfloat16),
            torch.empty(1, 152, 128, dtype=torch.bfloat16),
            torch.empty(1),
            torch.empty(1, 512, 4096, dtype=torch.bfloat16),
        )
    assert counter.get_total_flops() == pytest.approx(pass_operations(BackboneConfig(), 32_712), rel=0.02)


def test_what_cannot_be_split_is_said_in_a_sentence(small_model, tmp_path):
    passes = small_passes()
    short = {**passes["both"], "audio": passes["both"]["audio"][:, :4]}
    for output in run_ranks(tmp_path, 5, small_model, {"short": short, "heads": passes["both"]}):
        assert output["results"]["short"].startswith("4 audio tokens cannot be split over 5 workers")
        assert output["results"]["heads"] == heads_problem(12, 5)
    assert "use one of 1, 2, 3, 4, 6, 8, 12, 24." in heads_problem(24, 5)


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 6, 8])
def test_shares_are_whole_and_even(ranks):
    parts = [share(32_560, ranks, rank) for rank in range(ranks)]
    assert [part.start for part in parts[1:]] == [part.stop for part in parts[:-1]]
    assert (parts[0].start, parts[-1].stop) == (0, 32_560)
    assert max(shares(32_560, ranks)) - min(shares(32_560, ranks)) <= 1
