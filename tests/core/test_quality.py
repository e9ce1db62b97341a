"""Which layers a smaller format costs most, and what a file loses: against measures made the plain way."""

import json
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from nava_core import ClipGeometry, load_backbone
from nava_core.backbone import BackboneConfig, NavaBackbone
from nava_core.backbone.formats import FORMATS, QuantisedLayer
from nava_core.checkpoint import WrongFileError, block_linears, describe_file
from nava_core.cli import main
from nava_core.convert import convert
from nava_core.demo import make_small_models
from nava_core.quality import (
    Conditions,
    Sensitivity,
    compare_files,
    encode_conditions,
    measure_sensitivity,
    most_sensitive,
)
from nava_core.quality.compare import SOUND_ERROR, Comparison, Errors
from nava_core.quality.probes import GUIDANCE, make_probes
from nava_core.quality.streamed import StreamedBackbone, streamed_bytes

pytest.importorskip("comfy_kitchen", reason="the formats need comfy-kitchen (extra [quantized])")

CLIP = ClipGeometry(0.5, 96, 64)
CONFIG = BackboneConfig(
    dim=64, ffn_dim=128, freq_dim=32, text_dim=40, text_len=12, num_heads=2, num_double_layers=2, num_single_layers=3
)


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    path = tmp_path_factory.mktemp("backbone") / "backbone.safetensors"
    weights = NavaBackbone(CONFIG).init_weights(3).state_dict()
    # As a trained network has it: layers of very different weight.
    generator = torch.Generator().manual_seed(0)
    for name, weight in weights.items():
        if weight.ndim == 2 and "blocks" in name:
            weight.mul_(torch.exp(0.7 * torch.randn((), generator=generator)))
    save_file({f"backbone.{k}": v for k, v in weights.items()}, path, {"config": json.dumps(CONFIG.to_dict())})
    return path


@pytest.fixture(scope="module")
def conditions():
    generator = torch.Generator().manual_seed(2)
    context, negative = (torch.randn(1, n, CONFIG.text_dim, generator=generator) for n in (9, 7))
    timbre = torch.randn(1, 1, CONFIG.speaker_dim, generator=generator)
    return Conditions(context, negative, timbre, torch.tensor([[4]]))


def guided(model, probe):
    with torch.no_grad():
        return probe.combine({letter: model(**each) for letter, each in probe.passes.items()})


# --- a file run block by block -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["fp32", "fp8", "nvfp4"])
def test_block_by_block_is_the_whole_network(path, conditions, tmp_path, dtype):
    file = convert(path, tmp_path / "a.safetensors", dtype=dtype).path
    model = load_backbone(file, dtype=torch.float32)
    with StreamedBackbone(file) as streamed:
        probes = make_probes(streamed, conditions, CLIP)
        passes = [each for probe in probes for each in probe.passes.values()]
        found = streamed.run(passes)
        assert {p.device.type for p in streamed._network.double_blocks.parameters()} == {"meta"}
    with torch.no_grad():
        for each, pair in zip(passes, found, strict=True):
            for mine, wanted in zip(pair, model(**each), strict=True):
                torch.testing.assert_close(mine, wanted, rtol=0, atol=1e-5)


def test_probes_lie_on_the_networks_own_way(path, conditions):
    model = load_backbone(path, dtype=torch.float32)
    with StreamedBackbone(path) as streamed:
        first, second, third = make_probes(streamed, conditions, CLIP, sigmas=(0.9999, 0.7, 0.3))
    assert first.passes["c"]["video"].std() == pytest.approx(1, abs=0.05)
    for before, after in ((first, second), (second, third)):
        with torch.no_grad():
            velocity = model(**before.passes["c"])
        for name, v in zip(("video", "audio"), velocity, strict=True):
            wanted = before.passes["c"][name] + (after.sigma - before.sigma) * v
            torch.testing.assert_close(after.passes["c"][name], wanted, rtol=0, atol=1e-4)
    assert {letter: each.get("cross_modal", True) for letter, each in first.passes.items()} == {
        "c": True,
        "u": True,
        "m": False,
        "n": True,
    }
    assert "timbre" in first.passes["c"]
    assert not any("timbre" in first.passes[letter] for letter in "umn")


MEMORY = """
import resource, sys, torch
from nava_core.quality import measure_sensitivity
from nava_core import ClipGeometry
from nava_core.backbone import formats
formats.kitchen()
torch.zeros(64, 64) @ torch.zeros(64, 64)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
measure_sensitivity(sys.argv[1], "nvfp4", clip=ClipGeometry(0.2, 32, 32))
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)
"""


def test_memory_is_that_of_a_block_not_of_the_model(tmp_path):
    config = BackboneConfig(
        dim=256, ffn_dim=1024, text_dim=64, text_len=8, num_heads=2, num_double_layers=2, num_single_layers=40
    )
    weights = NavaBackbone(config).init_weights(1).state_dict()
    path = tmp_path / "deep.safetensors"
    save_file({f"backbone.{k}": v for k, v in weights.items()}, path, {"config": json.dumps(config.to_dict())})
    whole = sum(weight.nbytes for weight in weights.values())
    del weights
    root = Path(__file__).parents[2]
    run = subprocess.run(
        [sys.executable, "-c", MEMORY, path], cwd=root, capture_output=True, text=True, check=True, timeout=900
    )
    assert whole > 190e6
    assert streamed_bytes(path) < 0.25 * whole
    assert int(run.stdout) < 0.7 * whole
    assert resource.getrusage  # Linux and macOS


# --- which layers matter -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["nvfp4", "w4a8"])
def measured(request, path, conditions):
    """(format, estimate, exact)"""
    settings = {"conditions": conditions, "clip": CLIP}
    return (
        request.param,
        measure_sensitivity(path, request.param, **settings),
        measure_sensitivity(path, request.param, exact=True, **settings),
    )


def test_exact_is_one_layer_rounded_at_a_time(measured, path, conditions):
    """The yardstick itself, against the plain way: the whole network with one weight rounded."""
    format, _, exact = measured
    model = load_backbone(path, dtype=torch.float32)
    with StreamedBackbone(path) as streamed:
        probes = make_probes(streamed, conditions, CLIP)
    before = [guided(model, probe) for probe in probes]
    for name in ("double_blocks.0.self_attn.q_audio", "double_blocks.1.ffn.2", "single_blocks.2.cross_attn.o"):
        linear = model.get_submodule(name)
        weight, layer = linear.weight.data, QuantisedLayer.made(FORMATS[format], tuple(linear.weight.shape))
        linear.weight.data = layer.dequantise(layer.quantise(weight), torch.float32)
        after = [guided(model, probe) for probe in probes]
        linear.weight.data = weight
        for part in (0, 1):
            errors = [
                ((a[part] - b[part]).square().sum() / b[part].square().sum()).item()
                for a, b in zip(after, before, strict=True)
            ]
            assert exact.errors[name][part] == pytest.approx(sum(errors) / len(errors), rel=2e-3, abs=1e-9)


def ranks(values):
    return torch.tensor(list(values)).argsort().argsort().double()


def rank_correlation(first, second):
    return torch.corrcoef(torch.stack([ranks(first), ranks(second)]))[0, 1].item()


def test_the_estimate_orders_layers_as_the_exact_measure_does(measured):
    _, estimate, exact = measured
    assert estimate.errors.keys() == exact.errors.keys()
    assert len(exact.errors) == 2 * 18 + 3 * 10
    for part in (0, 1):
        pair = [[each.errors[name][part] for name in exact.errors] for each in (estimate, exact)]
        assert rank_correlation(*pair) > 0.9
    assert rank_correlation(estimate.scores().values(), exact.scores().values()) > 0.85
    wrong = [*list(estimate.scores().values())[1:], 0.0]
    assert abs(rank_correlation(wrong, exact.scores().values())) < 0.6  # so the figures above say something


def test_protecting_what_is_measured_beats_protecting_what_is_named_audio(measured, path, conditions, tmp_path):
    format, estimate, _ = measured
    chosen = most_sensitive(estimate, 0.16)
    named = [name for name in block_linears(describe_file(path)) if name.endswith("_audio")]
    sizes = {name: rows * columns for name, (rows, columns) in estimate.shapes.items()}
    assert sum(sizes[name] for name in chosen) <= 0.16 * sum(sizes.values()) < sum(sizes[name] for name in named)
    errors = {}
    for name, protected in (("none", []), ("measured", chosen), ("named", named)):
        file = convert(path, tmp_path / f"{name}.safetensors", dtype=format, protected=protected).path
        found = compare_files(path, file, conditions=conditions, clip=CLIP, seed=5)
        errors[name] = sum(each.video_error + each.audio_error for each in found.guided)
    assert errors["measured"] < 0.93 * errors["none"]
    assert errors["measured"] < errors["named"]


def test_the_share_is_of_weights_and_sound_counts_as_much():
    shapes = {"a": (10, 10), "b": (10, 10), "c": (20, 10), "d": (10, 60)}
    errors = {"a": (4.0, 0.0), "b": (0.0, 0.4), "c": (2.0, 0.1), "d": (4.0, 0.5)}
    found = Sensitivity(errors, shapes)
    scores = found.scores()
    assert scores == pytest.approx({"a": 4.0, "b": 4.0, "c": 3.0, "d": 9.0})  # sound, a tenth of picture, times ten
    assert most_sensitive(found, 0.1) == ["a"]
    assert most_sensitive(found, 0.2) == ["a", "b"]
    assert most_sensitive(found, 0.45) == ["a", "b", "c"]
    assert most_sensitive(found, 0) == []
    assert set(most_sensitive(found, 1)) == set("abcd")
    louder = Sensitivity({"a": (0.1, 3.0), "b": (0.2, 0.0)}, {"a": (1, 1), "b": (1, 1)})
    assert louder.scores() == pytest.approx({"a": 3.1, "b": 0.2})
    with pytest.raises(ValueError, match="between 0 and 1"):
        most_sensitive(found, 1.5)


def test_progress_and_an_interruption(path):
    seen = []
    measure_sensitivity(path, "nvfp4", clip=CLIP, progress=lambda done, of: seen.append((done, of)))
    assert seen == [(step, 10) for step in range(1, 11)]

    def stop(done, of):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        measure_sensitivity(path, "nvfp4", clip=CLIP, progress=stop)


# --- two files ---------------------------------------------------------------------------------------------------


def test_a_comparison_is_the_plain_one(path, conditions, tmp_path):
    file = convert(path, tmp_path / "a.safetensors", dtype="nvfp4").path
    found = compare_files(path, file, conditions=conditions, clip=CLIP, sigmas=(0.9999, 0.5))
    first, second = (load_backbone(each, dtype=torch.float32) for each in (path, file))
    with StreamedBackbone(path) as streamed:
        probes = make_probes(streamed, conditions, CLIP, sigmas=(0.9999, 0.5))
    for probe, one, both in zip(probes, found.predictions, found.guided, strict=True):
        with torch.no_grad():
            pairs = [
                [model(**probe.passes["c"]) for model in (first, second)],
                [guided(m, probe) for m in (first, second)],
            ]
        for errors, (wanted, got) in zip((one, both), pairs, strict=True):
            for part, (x, y) in zip(("video", "audio"), zip(got, wanted, strict=True), strict=True):
                assert getattr(errors, f"{part}_error") == pytest.approx(((x - y).norm() / y.norm()).item(), rel=1e-3)
                cosine = torch.nn.functional.cosine_similarity(x.flatten(), y.flatten(), dim=0).item()
                assert getattr(errors, f"{part}_cosine") == pytest.approx(cosine, abs=1e-5)
    assert found.guided[0].audio_error > found.predictions[0].audio_error  # guidance amplifies
    assert set(found.weights) == {"self_attn", "cross_attn", "ffn", "outside the blocks"}
    assert 0.08 < found.weights["ffn"] < 0.11
    assert found.weights["outside the blocks"] < 0.004  # bf16
    assert found.warning


def test_equal_files_differ_in_nothing_and_better_ones_in_less(path, conditions, tmp_path):
    same = compare_files(path, path, conditions=conditions, clip=CLIP)
    assert max(each.audio_error for each in same.guided) < 1e-6
    assert same.warning is None
    errors = []
    for dtype in ("int8", "w6a8", "nvfp4"):
        try:
            file = convert(path, tmp_path / f"{dtype}.safetensors", dtype=dtype).path
        except RuntimeError:
            pytest.skip("this comfy-kitchen has no 6 bits")
        errors.append(compare_files(path, file, conditions=conditions, clip=CLIP).guided[0].audio_error)
    assert errors == sorted(errors)


def test_the_warning_begins_at_its_threshold():
    def comparison(error):
        return Comparison((), (Errors(0.5, 0.5, error, 1.0, 1.0), Errors(0.9, 0.0, 0.0, 1.0, 1.0)), {}, True)

    assert comparison(0.99 * SOUND_ERROR).warning is None
    assert "The sound will suffer" in comparison(1.01 * SOUND_ERROR).warning


def test_networks_of_different_sizes(path, tmp_path):
    other = make_small_models(tmp_path, preview_decoder=False)["backbone"]
    with pytest.raises(WrongFileError, match="networks of different sizes"):
        compare_files(path, other, clip=CLIP)


# --- on the command line -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return make_small_models(tmp_path_factory.mktemp("models"), preview_decoder=False)


def test_texts_of_a_real_encoder(models):
    from nava_core.checkpoint import backbone_config

    config = backbone_config(describe_file(models["backbone"]))
    found = encode_conditions(models["text_encoder"], config)
    assert found.real
    assert found.context.shape[2] == found.negative.shape[2] == config.text_dim
    assert 0 < int(found.timbre_positions) < found.context.shape[1]
    assert not torch.equal(found.context[:, :5], found.negative[:, :5])


def test_convert_with_protection_and_a_comparison(models, tmp_path, capsys):
    target = tmp_path / "small.safetensors"
    options = ["--text-encoder", str(models["text_encoder"]), "--device", "cpu"]
    command = ["convert", str(models["backbone"]), str(target), "--to", "nvfp4", "--protect", "0.2", *options]
    assert main(command) == 0
    said = capsys.readouterr()
    assert said.out.strip() == str(target)
    assert "Encoding texts with" in said.err
    assert "In mxfp8 stay" in said.err
    info = describe_file(target)
    sizes = {"nvfp4": 0, "mxfp8": 0}
    for layer in info.layers.values():
        sizes[layer.format.name] += layer.shape[0] * layer.shape[1]
    assert 0.1 < sizes["mxfp8"] / sum(sizes.values()) <= 0.2

    assert main(["inspect", str(target)]) == 0
    told = capsys.readouterr().out
    protected = [name for name, layer in info.layers.items() if layer.format.name == "mxfp8"]
    assert f"in mxfp8: {', '.join(protected)}" in told
    assert main(["inspect", str(target), "--json"]) == 0
    finding = json.loads(capsys.readouterr().out)
    assert finding["protected"] == {"format": "mxfp8", "layers": protected}
    assert "memory_bytes_fp8" not in finding

    compared = ["inspect", "--compare", str(models["backbone"]), str(target), *options]
    assert main(compared) == 0
    text = capsys.readouterr()
    assert "guided combination" in text.out
    assert "of memory on cpu" in text.err
    assert main([*compared, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert len(found["guided"]) == len(found["predictions"]) == 4
    assert (found["warning"] is not None) == ("The sound will suffer" in text.out)


def test_without_a_text_encoder_it_is_said(models, tmp_path, capsys):
    target = tmp_path / "small.safetensors"
    assert (
        main(["convert", str(models["backbone"]), str(target), "--to", "w4a8", "--protect", "0.1", "--device", "cpu"])
        == 0
    )
    assert "Measured without a text" in capsys.readouterr().err


def test_four_bits_unprotected_are_warned_of(models, tmp_path, capsys):
    assert main(["convert", str(models["backbone"]), str(tmp_path / "a.safetensors"), "--to", "nvfp4"]) == 0
    assert "At 4 bits the sound suffers first" in capsys.readouterr().err
    assert main(["convert", str(models["backbone"]), str(tmp_path / "b.safetensors"), "--to", "int8"]) == 0
    assert "suffers" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--to", "int8", "--protect", "0.1"], "keeps weights at 8 bits beside nvfp4, w4a8, w6a8; int8 has 8 or more"),
        (["--protect", "0.1"], "fp8 has 8 or more"),
        (["--to", "nvfp4", "--protect", "10"], "a share of the weights from 0 to 1"),
        (["--to", "nvfp4", "--device", "cuda:7"], "There is no device cuda:7"),
        (["--to", "int3"], "invalid choice"),
    ],
)
def test_wrong_options_are_told_before_anything_is_read(models, tmp_path, capsys, arguments, words):
    target = tmp_path / "a.safetensors"
    try:
        code = main(["convert", str(models["backbone"]), str(target), *arguments])
    except SystemExit as error:
        code = error.code
    assert code in (1, 2)
    assert words in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_comparison_takes_two_files(models, capsys):
    assert main(["inspect", "--compare", str(models["backbone"])]) == 2
    assert "--compare takes two files" in capsys.readouterr().err


def test_dtype_is_still_a_name_of_to(models, tmp_path):
    target = tmp_path / "a.safetensors"
    assert main(["convert", str(models["backbone"]), str(target), "--dtype", "bf16"]) == 0
    assert all(tensor.dtype is torch.bfloat16 for tensor in load_file(target).values())


def test_guidance_is_the_makers():
    assert (GUIDANCE.video_text, GUIDANCE.audio_align, GUIDANCE.audio_timbre) == (3.0, 2.0, 3.0)
