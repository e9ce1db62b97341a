"""The plain implementation against the golden numbers, and this project's backbone against the plain one."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from benchmarks import backbone as benchmark
from benchmarks import decode as decoding
from benchmarks import streaming
from benchmarks.plain import PlainBackbone
from nava_core.backbone import BackboneConfig, NavaBackbone

TOLERANCE = 2e-4
SMALL = BackboneConfig(
    dim=256, ffn_dim=1024, text_dim=64, text_len=64, num_heads=4, num_double_layers=2, num_single_layers=2
)
CLIP = benchmark.clip_of(320, 192, 5)  # 300 video and 18 audio tokens


def metadata(path, key):
    with safe_open(path, "pt") as file:
        return json.loads(file.metadata()[key])


@pytest.fixture(scope="module")
def golden_weights(golden):
    path = golden / "backbone_tiny.safetensors"
    weights = {name.removeprefix("backbone."): value for name, value in load_file(path).items()}
    shapes = {name: tuple(value.shape) for name, value in weights.items()}
    return BackboneConfig.from_shapes(shapes, metadata(path, "config")), weights


@pytest.fixture(scope="module")
def small_weights():
    return benchmark.random_weights(SMALL, torch.float32, "cpu")


def golden_arguments(settings, tensors):
    one = {name: value[None] for name, value in tensors.items()}
    timestep, positions = tensors["t"], settings["speaker_positions"]
    if settings["own_timesteps"]:
        timestep = (one["tv"], one["ta"])
    elif settings["first_frame_clean"]:
        frames = timestep.repeat(1, one["video"].shape[2])
        frames[:, 0] = 0
        timestep = (frames, timestep)
    return {
        "video": one.get("video"),
        "audio": one.get("audio"),
        "timestep": timestep,
        "context": one["context"],
        "timbre": one.get("spk"),
        "timbre_positions": None if positions is None else torch.tensor([positions]),
        "cross_modal": not settings["align_masked"],
    }


def test_plain_is_within_the_golden_numbers(golden, golden_weights):
    model = benchmark.plain(*golden_weights)
    path = golden / "backbone_cases.safetensors"
    tensors, cases = load_file(path), metadata(path, "cases")
    assert len(cases) == 18
    for case, settings in cases.items():
        inputs = {k.split("/")[2]: v for k, v in tensors.items() if k.startswith(f"{case}/in/")}
        results = benchmark.run(model, golden_arguments(settings, inputs))
        for modality, got in zip(("video", "audio"), results, strict=True):
            expected = tensors.get(f"{case}/out/{modality}")
            assert (got is None) == (expected is None), case
            if got is not None:
                assert (got[0] - expected).abs().max() < TOLERANCE, (case, modality)


def test_both_take_the_same_weights_without_copies(small_weights):
    ours, plain = (build(SMALL, small_weights).state_dict() for build in benchmark.BUILDERS.values())
    assert sorted(ours) == sorted(plain)
    for name, weight in small_weights.items():
        assert ours[name].data_ptr() == plain[name].data_ptr() == weight.data_ptr(), name


@pytest.mark.parametrize("case", benchmark.CASES)
def test_both_agree_in_fp32(small_weights, case):
    inputs = benchmark.case_inputs(case, SMALL, CLIP, torch.float32, "cpu")
    ours, plain = (benchmark.run(build(SMALL, small_weights), inputs) for build in benchmark.BUILDERS.values())
    apart = benchmark.difference(ours, plain)
    assert list(apart) == (["audio"] if case == "audio only" else ["video", "audio"])
    assert all(part["relative_l2"] < 1e-5 for part in apart.values())


def test_bf16_error_is_no_larger_than_the_plain_implementations():
    """Root mean square over draws of weights and latents: of one draw, rounding alone can decide."""
    squares = {(name, modality): 0.0 for name in benchmark.BUILDERS for modality in ("video", "audio")}
    for seed in range(6):
        low = benchmark.random_weights(SMALL, torch.bfloat16, "cpu", seed)
        full = {name: weight.float() for name, weight in low.items()}
        for case in ("one timestep", "first frame clean", "interaction off"):
            inputs = benchmark.case_inputs(case, SMALL, CLIP, torch.bfloat16, "cpu", seed)
            precise = {k: v.float() if torch.is_tensor(v) else v for k, v in inputs.items()}
            truth = benchmark.run(benchmark.plain(SMALL, full), precise)
            for name, build in benchmark.BUILDERS.items():
                error = benchmark.difference(benchmark.run(build(SMALL, low), inputs), truth)
                for modality, part in error.items():
                    squares[name, modality] += part["relative_l2"] ** 2
    for modality in ("video", "audio"):
        assert 0 < squares["nava", modality] <= squares["plain", modality], squares


def test_a_pass_holds_far_less_than_the_plain_one_at_the_released_size():
    # the peak is one block's, so that two blocks tell it
    peaks = benchmark.live_memory_at_real_size(replace(BackboneConfig(), num_double_layers=1, num_single_layers=1))
    for case in ("one timestep", "interaction off"):
        assert peaks[case]["plain"] > 3 * peaks[case]["nava"]
    assert peaks["audio only"]["plain"] > peaks["audio only"]["nava"]


def test_weights_are_the_seeds_and_fit_the_backbone():
    first, again, other = (benchmark.random_weights(SMALL, torch.bfloat16, "cpu", seed) for seed in (3, 3, 4))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["head.head.weight"], other["head.head.weight"])
    NavaBackbone(SMALL, dtype=torch.bfloat16).load_state_dict(first, strict=True)
    PlainBackbone(SMALL).load_state_dict(first, strict=True)


def test_the_command_reports_time_memory_and_difference(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(benchmark.CONFIGS, "middle", SMALL)
    monkeypatch.setattr(benchmark, "live_memory_at_real_size", lambda: {"one timestep": {"nava": 1, "plain": 4}})
    path = tmp_path / "figures.json"
    benchmark.main(["--size", "128x64x2", "--steps", "1", "--json", str(path)])
    report = json.loads(path.read_text())
    assert report["tokens"] == {"video": 16, "audio": 6}
    assert [case["case"] for case in report["cases"]] == list(benchmark.CASES)
    for case in report["cases"]:
        for name in benchmark.BUILDERS:
            assert case[name]["seconds"] > 0
            assert case[name]["peak_bytes"] > 0
        assert all(part["relative_l2"] < 1e-5 for part in case["difference"].values())
    draws = report["error_against_fp32"]["draws"]
    assert all(1e-4 < draw[name]["video"]["relative_l2"] < 0.05 for draw in draws for name in benchmark.BUILDERS)
    printed = capsys.readouterr().out
    assert report["device"] in printed
    assert "| audio only |" in printed


@pytest.mark.parametrize(
    ("arguments", "words"),
    [(["--size", "128x64"], "WIDTHxHEIGHTxLATENT_FRAMES"), (["--steps", "0"], "at least 1"), (["--size", "7"], "7")],
)
def test_wrong_arguments_end_in_a_sentence(arguments, words, capsys):
    with pytest.raises(SystemExit):
        benchmark.parse(arguments)
    assert words in capsys.readouterr().err


def test_results_that_are_not_finite_are_refused():
    with pytest.raises(RuntimeError, match="not finite"):
        benchmark.difference((None, torch.tensor([float("nan")])), (None, torch.ones(1)))


# ---------------------------------------------------------------- streaming


def test_the_streaming_command_reports_every_share(tmp_path, capsys):
    pytest.importorskip("accelerate")
    path = tmp_path / "figures.json"
    streaming.main(["--steps", "2", "--weights", "fp8", "--json", str(path)])
    report = json.loads(path.read_text())
    assert [case["resident"] for case in report["cases"]] == [1.0, 0.5, 0.25, 0.0]
    assert [len(case["streamed_blocks"]) for case in report["cases"]] == [0, 5, 7, 9]
    for case in report["cases"]:
        assert case["equal_to_resident"]
        assert case["step_seconds"] > 0
        assert case["first_step_seconds"] > 0
        assert case["live_bytes_beside_weights"] > 0
    assert "| 25% |" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "words"), [(["--size", "64x64"], "WIDTHxHEIGHTxLATENT_FRAMES"), (["--steps", "1"], "at least 2")]
)
def test_wrong_arguments_of_streaming_end_in_a_sentence(arguments, words, capsys):
    with pytest.raises(SystemExit):
        streaming.main(arguments)
    assert words in capsys.readouterr().err


# ---------------------------------------------------------------- decoding


def test_the_decoding_command_reports_every_form(tmp_path, capsys):
    pytest.importorskip("diffusers")
    path = tmp_path / "figures.json"
    decoding.main(["--width", "small", "--size", "160x64x2", "--json", str(path)])
    report = json.loads(path.read_text())
    forms = report["video"]
    assert [(form["tile"], form["overlap"]) for form in forms] == [(0, 0), (0, 0), (128, 64)]
    assert [form["equal"] for form in forms[:1]] == [True]
    assert forms[1]["largest"] < 1e-5 < forms[2]["relative_rms"] < 1
    for form in [*forms, *report["sound"]["forms"]]:
        assert form["seconds"] > 0
        assert form["peak_bytes"] > 0
    assert forms[1]["peak_bytes"] < forms[0]["peak_bytes"]
    assert forms[0]["peak_bytes"] < forms[0]["estimated_bytes"] * 1.1
    assert report["sound"]["forms"][1]["relative_rms"] < 1e-4
    printed = capsys.readouterr().out
    assert "| tiles of 128 pixels, 64 shared |" in printed
    assert "random weights" in printed


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--size", "128x64"], "WIDTHxHEIGHTxLATENT_FRAMES"),
        (["--size", "130x64x2"], "multiples of 16"),
        (["--vae", "gone.safetensors"], "--vae: there is no file gone.safetensors"),
    ],
)
def test_wrong_arguments_for_decoding_end_in_a_sentence(arguments, words, capsys):
    with pytest.raises(SystemExit):
        decoding.parse(arguments)
    assert words in capsys.readouterr().err
