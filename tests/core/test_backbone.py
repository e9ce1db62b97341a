"""The backbone against its golden numbers, and the invariants it must keep."""

import json
import shutil

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file

from benchmarks.live_memory import peak_of_pass
from nava_core.backbone import BackboneConfig, NavaBackbone, activation_bytes, layers

TOLERANCE = 2e-4


def read_metadata(path, key):
    with safe_open(path, "pt") as file:
        return json.loads(file.metadata()[key])


def tiny_config(golden):
    return BackboneConfig.from_shapes(
        {k.removeprefix("backbone."): tuple(v.shape) for k, v in tiny_weights(golden).items()},
        read_metadata(golden / "backbone_tiny.safetensors", "config"),
    )


def tiny_weights(golden):
    return load_file(golden / "backbone_tiny.safetensors")


@pytest.fixture(scope="module")
def model(golden):
    model = NavaBackbone(tiny_config(golden))
    weights = {k.removeprefix("backbone."): v for k, v in tiny_weights(golden).items()}
    model.load_state_dict(weights, strict=True)
    return model.eval()


@pytest.fixture(scope="module")
def cases(golden):
    path = golden / "backbone_cases.safetensors"
    tensors = load_file(path)
    cases = {}
    for name, settings in read_metadata(path, "cases").items():
        data = {"in": {}, "out": {}}
        for key, value in tensors.items():
            case, side, what = key.split("/")
            if case == name:
                data[side][what] = value
        cases[name] = (settings, data["in"], data["out"])
    return cases


def arguments(settings, inputs):
    """A golden case as the arguments of one pass with a batch of one."""

    def batch(name):
        return inputs[name][None] if name in inputs else None

    video = batch("video")
    timestep = inputs["t"]
    if settings["own_timesteps"]:
        timestep = (batch("tv"), batch("ta"))
    elif settings["first_frame_clean"]:
        frames = timestep.repeat(1, video.shape[2])
        frames[:, 0] = 0
        timestep = (frames, timestep)
    positions = settings["speaker_positions"]
    return {
        "video": video,
        "audio": batch("audio"),
        "timestep": timestep,
        "context": batch("context"),
        "timbre": batch("spk"),
        "timbre_positions": None if positions is None else torch.tensor([positions]),
        "cross_modal": not settings["align_masked"],
    }


CASES = [
    "t2av", "t2av_align_masked", "t2av_timbre", "t2av_one_null_timbre", "i2av", "i2av_timbre", "t2a", "t2a_timbre",
    "t2v", "t2av_t0", "t2av_t999", "t2av_full_context", "i2av_align_masked", "odd_height", "odd_both",
    "own_timesteps", "audio_given", "zero_context",
]  # fmt: skip


def test_every_golden_case_is_tested(cases):
    assert sorted(cases) == sorted(CASES)


@pytest.mark.parametrize("name", CASES)
def test_golden(model, cases, name):
    settings, inputs, expected = cases[name]
    with torch.inference_mode():
        got = dict(zip(("video", "audio"), model(**arguments(settings, inputs)), strict=True))
    for modality in ("video", "audio"):
        if modality in expected:
            assert (got[modality][0] - expected[modality]).abs().max() < TOLERANCE
        else:
            assert got[modality] is None


def pair(a, b):
    """Two arguments of batch one as one of batch two."""
    if isinstance(a, tuple) or isinstance(b, tuple):
        return tuple(pair(x, y) for x, y in zip(a, b, strict=True))
    return torch.cat([a, b]) if torch.is_tensor(a) else a


@pytest.mark.parametrize(
    ("first", "second"),
    [("t2av", "t2av_t999"), ("own_timesteps", "audio_given"), ("t2av_timbre", "t2av_one_null_timbre")],
)
def test_a_batch_equals_its_halves(model, cases, first, second):
    one, two = (arguments(*cases[name][:2]) for name in (first, second))
    length = max(one["context"].shape[1], two["context"].shape[1])
    for case in (one, two):
        case["context"] = torch.nn.functional.pad(case["context"], (0, 0, 0, length - case["context"].shape[1]))
    with torch.inference_mode():
        together = model(**{key: pair(one[key], two[key]) for key in one})
        apart = [model(**case) for case in (one, two)]
    for index in range(2):
        for modality in range(2):
            torch.testing.assert_close(together[modality][index], apart[index][modality][0], atol=1e-5, rtol=1e-5)


def test_interaction_off_equals_each_modality_alone(model, cases):
    case = arguments(*cases["t2av_align_masked"][:2])
    with torch.inference_mode():
        both = model(**case)
        video, none = model(**{**case, "audio": None})
        nothing, audio = model(**{**case, "video": None})
    assert none is None
    assert nothing is None
    torch.testing.assert_close(both[0], video, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(both[1], audio, atol=1e-5, rtol=1e-5)


def test_unused_timbre_positions_change_nothing(model, cases):
    case = arguments(*cases["t2av_timbre"][:2])
    with torch.inference_mode():
        expected = model(**case)
        extra = torch.cat([case["timbre"], torch.ones(1, 1, 192)], dim=1)
        positions = torch.cat([case["timbre_positions"], torch.tensor([[-1]])], dim=1)
        got = model(**{**case, "timbre": extra, "timbre_positions": positions})
    torch.testing.assert_close(got, expected)


def test_inputs_are_left_as_they_were(model, cases):
    case = arguments(*cases["i2av_timbre"][:2])
    before = {k: v.clone() for k, v in case.items() if torch.is_tensor(v)}
    with torch.inference_mode():
        model(**case)
    for key, value in before.items():
        assert torch.equal(case[key], value)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"video": None, "audio": None}, "neither video nor audio"),
        ({"video": torch.zeros(1, 16, 3, 4, 6)}, r"48, frames"),
        ({"audio": torch.zeros(1, 8, 17, 16)}, r"steps, 128"),
        ({"context": torch.zeros(1, 25, 40)}, "at most 24"),
        ({"context": torch.zeros(1, 5, 41)}, "tokens, 40"),
        ({"timbre": torch.zeros(1, 1, 192)}, "come together"),
        ({"timestep": (torch.zeros(1, 2), torch.zeros(1))}, "2 video timesteps for 3"),
    ],
)
def test_wrong_shapes_are_refused_in_words(model, cases, change, words):
    with pytest.raises(ValueError, match=words):
        model(**{**arguments(*cases["t2av"][:2]), **change})


def test_modulation_vectors_only_for_distinct_timesteps(model, cases):
    case = arguments(*cases["i2av"][:2])
    seen = []
    hook = model.time_projection.register_forward_hook(lambda _, args, __: seen.append(args[0].shape[0]))
    try:
        with torch.inference_mode():
            model(**case)
            model(**{**case, "timestep": torch.tensor([500.0])})
    finally:
        hook.remove()
    assert seen == [2, 1]


@pytest.mark.parametrize(
    ("batch", "frames", "height", "width", "steps"), [(1, 37, 44, 80, 152), (1, 61, 44, 80, 252), (2, 13, 22, 40, 52)]
)
@pytest.mark.parametrize("cross_modal", [True, False])
def test_activation_figure_is_the_real_size_models_peak(batch, frames, height, width, steps, cross_modal):
    """The memory figure a host plans with, against live tensors counted at the released model's size."""
    with torch.device("meta"):
        big = NavaBackbone(dtype=torch.bfloat16, attention=lambda q, k, v, heads, options: torch.empty_like(q))
        peak = peak_of_pass(
            big,
            torch.empty(batch, 48, frames, height, width, dtype=torch.bfloat16),
            torch.empty(batch, steps, 128, dtype=torch.bfloat16),
            torch.empty(batch),
            torch.empty(batch, 512, 4096, dtype=torch.bfloat16),
            cross_modal=cross_modal,
        )
    tokens = frames * height * width // 4 + steps
    assert peak == pytest.approx(activation_bytes(big.config, batch, tokens, 2), rel=0.05)


@pytest.mark.parametrize(("frames", "height", "width", "steps"), [(61, 44, 80, 252), (7, 16, 16, 27), (4, 4, 4, 14)])
def test_activation_figure_where_every_frame_and_step_has_its_own_timestep(frames, height, width, steps, monkeypatch):
    distinct = frames + steps
    monkeypatch.setattr(  # how many there are is in the data, and there is none
        torch,
        "unique",
        lambda values, **_: (values.new_empty(distinct), torch.zeros_like(values, dtype=torch.long)),
    )
    config = BackboneConfig(num_double_layers=1, num_single_layers=1)
    with torch.device("meta"):
        big = NavaBackbone(config, dtype=torch.bfloat16, attention=lambda q, k, v, heads, options: torch.empty_like(q))
        peak = peak_of_pass(
            big,
            torch.empty(1, 48, frames, height, width, dtype=torch.bfloat16),
            torch.empty(1, steps, 128, dtype=torch.bfloat16),
            (torch.empty(1, frames), torch.empty(1, steps)),
            torch.empty(1, 512, 4096, dtype=torch.bfloat16),
        )
    tokens = frames * height * width // 4 + steps
    groups = {"audio_tokens": steps, "timesteps": distinct, "timestep_groups": distinct}
    assert peak == pytest.approx(activation_bytes(config, 1, tokens, 2, **groups), rel=0.03)


def test_the_released_models_size():
    with torch.device("meta"):
        parameters = sum(p.numel() for p in NavaBackbone().parameters())
    assert parameters == pytest.approx(6.297e9, rel=1e-3)


@pytest.mark.skipif(shutil.which("g++") is None, reason="the compiler needs g++")
def test_what_the_compiler_makes_of_the_steps_over_slices():
    """One piece between two attention calls of a host that the compiler does not see into."""
    generator = torch.Generator().manual_seed(2)
    vectors = torch.randn(1, 1, 6, 64, generator=generator).permute(2, 0, 1, 3)[:, :, :, None]
    stretches = [(slice(0, 24), vectors[2:3]), (slice(24, None), vectors[5:6])]
    table = layers.rotary_table(32, (2, 3, 4), 10)

    def steps(tokens, update):
        tokens = layers.per_stretch(tokens, layers.add_gated_, stretches, update)
        return tokens, layers.rotated(F.layer_norm(tokens, (64,)), table, heads=2)

    tokens, update = (torch.randn(1, 34, 64, generator=generator) for _ in range(2))
    with torch.inference_mode():
        compiled = torch.compile(steps)(tokens.clone(), update)
        for got, wanted in zip(compiled, steps(tokens, update), strict=True):
            torch.testing.assert_close(got, wanted, rtol=0, atol=1e-5)
