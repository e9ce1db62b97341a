"""The speaker encoder in numbers, its safe loading, both audio paths, and voices good and bad."""

import hashlib
import io
import json
import math
import os
import pickle
import re
import shutil
import subprocess
import sys
import wave
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from nava_core.checkpoint import FileKind, WrongFileError, describe_file
from nava_core.timbre import check_voice, encode_timbre, load_redimnet
from nava_core.timbre import mel as mel_module
from nava_core.timbre import resample as resample_module
from nava_core.timbre.config import FrontEndConfig, ReDimNetConfig
from nava_core.timbre.features import FrontEnd
from nava_core.timbre.redimnet import ReDimNet
from nava_core.timbre.resample import resample

GOLDEN = Path(__file__).parents[1] / "golden"
SMALL = GOLDEN / "redimnet_small.pt"
# Measured agreement is below 1e-6; taking the wrong GELU in the feed-forward alone costs 4e-5.
TOLERANCE = 1e-5
CASES = ["one_second", "odd_length", "six_seconds"]
HAS_TORCHAUDIO = resample_module.find_torchaudio() is not None
PATHS = [pytest.param(True, marks=pytest.mark.skipif(not HAS_TORCHAUDIO, reason="no torchaudio")), False]
needs_torchaudio = pytest.mark.skipif(not HAS_TORCHAUDIO, reason="no torchaudio to compare with")


@pytest.fixture(scope="module")
def model() -> ReDimNet:
    return load_redimnet(SMALL)


@pytest.fixture(scope="module")
def model_m_file(tmp_path_factory) -> Path:
    """The M configuration in the published form, with the golden weights and no `model_config` entries."""
    with safe_open(GOLDEN / "redimnet_m_cases.safetensors", "pt") as file:
        metadata = file.metadata()
    shapes = json.loads(metadata["keys"])
    generator = torch.Generator().manual_seed(int(metadata["seed"]))
    state = {}
    for name in sorted(shapes):
        if name.startswith("spec."):
            continue
        if name.endswith("num_batches_tracked"):
            state[name] = torch.tensor(0)
        else:
            state[name] = draw(name, torch.randn(shapes[name], generator=generator))
    path = tmp_path_factory.mktemp("redimnet") / "m.pt"
    torch.save({"model_config": json.loads(metadata["model_config"]), "state_dict": state}, path)
    return path


def draw(name: str, r: torch.Tensor) -> torch.Tensor:
    """The rule by which the golden M weights were drawn."""
    if name.endswith("running_var"):
        return 1 + 0.1 * r.abs()
    if name.endswith("running_mean"):
        return 0.1 * r
    if r.ndim == 1 and name.endswith(".weight"):
        return 1 + 0.1 * r
    return 0.05 * r if r.ndim <= 1 else r / math.sqrt(r[0].numel())


def golden_case(file_name: str, case: str) -> tuple[torch.Tensor, torch.Tensor]:
    tensors = load_file(GOLDEN / file_name)
    return tensors[f"{case}/in"], tensors[f"{case}/out"]


def voice(seconds: float, sample_rate: int = 16000, pitch: float = 120.0, seed: int = 0) -> torch.Tensor:
    """A buzz with wandering pitch and syllables, peak 0.5: (samples,)."""
    t = torch.arange(round(seconds * sample_rate), dtype=torch.float64) / sample_rate
    phase = 2 * math.pi * pitch * (t + 0.02 * torch.sin(2 * math.pi * 1.3 * t))
    buzz = sum(torch.sin(k * phase) / k for k in range(1, 20) if k * pitch * 1.2 < sample_rate / 2)
    noise = torch.randn(t.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    sound = (buzz + 0.02 * noise) * (0.55 + 0.45 * torch.sin(2 * math.pi * 3 * t))
    return (0.5 * sound / sound.abs().max()).float()


def published() -> dict:
    return torch.load(SMALL, weights_only=True)


def embed(model: ReDimNet, waveform: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(waveform)


# ---- the network in numbers


@pytest.mark.parametrize("use_torchaudio", PATHS)
@pytest.mark.parametrize("case", CASES)
def test_small_model_golden(case, use_torchaudio):
    waveform, expected = golden_case("redimnet_small_cases.safetensors", case)
    model = load_redimnet(SMALL, use_torchaudio=use_torchaudio)
    torch.testing.assert_close(embed(model, waveform), expected, atol=TOLERANCE, rtol=0)
    torch.testing.assert_close(
        encode_timbre(model, waveform, 16000, use_torchaudio=use_torchaudio), expected, atol=TOLERANCE, rtol=0
    )


@pytest.mark.parametrize("use_torchaudio", PATHS)
@pytest.mark.parametrize("case", CASES)
def test_m_model_golden(case, use_torchaudio, model_m_file):
    waveform, expected = golden_case("redimnet_m_cases.safetensors", case)
    model = load_redimnet(model_m_file, use_torchaudio=use_torchaudio)
    torch.testing.assert_close(embed(model, waveform), expected, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("use_torchaudio", PATHS)
def test_m_model_has_the_published_names_and_shapes(use_torchaudio):
    with safe_open(GOLDEN / "redimnet_m_cases.safetensors", "pt") as file:
        published = json.loads(file.metadata()["keys"])
    with torch.device("meta"):
        state = ReDimNet(ReDimNetConfig(), use_torchaudio=use_torchaudio).state_dict()
    assert {name: list(tensor.shape) for name, tensor in state.items()} == published


def kinds() -> dict:
    with safe_open(GOLDEN / "redimnet_kinds.safetensors", "pt") as file:
        return json.loads(file.metadata()["kinds"])


def drawn_state(config: dict, seed: int) -> dict[str, torch.Tensor]:
    """Weights by the golden rule, of the names and shapes that our network has."""
    state = ReDimNet(ReDimNetConfig.from_published(config)).state_dict()
    generator = torch.Generator().manual_seed(seed)
    for name in sorted(state):
        constant = name.startswith(("spec.torchfbank.", "spec.spectrogram."))
        if state[name].is_floating_point() and not constant:
            state[name] = draw(name, torch.randn(state[name].shape, generator=generator))
    return state


@pytest.mark.parametrize("kind", kinds())
def test_every_kind_of_the_family(kind, tmp_path):
    golden = kinds()[kind]
    state = drawn_state(golden["model_config"], golden["seed"])
    names = "\n".join(f"{name} {list(state[name].shape)}" for name in sorted(state))
    assert hashlib.sha256(names.encode()).hexdigest() == golden["state_sha256"]
    path = save({"model_config": golden["model_config"], "state_dict": state}, tmp_path)
    assert describe_file(path).kind is FileKind.REDIMNET
    model = load_redimnet(path)
    embeddings = load_file(GOLDEN / "redimnet_kinds.safetensors")
    cases = [name.partition("/")[2] for name in embeddings if name.startswith(f"{kind}/")]
    assert cases
    for case in cases:
        waveform, _ = golden_case("redimnet_small_cases.safetensors", case)
        torch.testing.assert_close(embed(model, waveform), embeddings[f"{kind}/{case}"], atol=TOLERANCE, rtol=0)


def test_weights_too_small_to_matter_do_not_slow_the_network_down(tmp_path, model):
    content = published()
    weight = content["state_dict"]["linear.weight"]
    weight[:, :5] = 1e-41
    loaded = load_redimnet(save(content, tmp_path)).linear.weight
    assert torch.equal(loaded[:, :5], torch.zeros(192, 5))
    assert torch.equal(loaded[:, 5:], weight[:, 5:])


def test_batch_equals_its_rows(model):
    rows = torch.stack([voice(1.0, pitch=110), voice(1.0, pitch=210)])
    halves = torch.cat([embed(model, rows[:1]), embed(model, rows[1:])])
    torch.testing.assert_close(embed(model, rows), halves, atol=1e-5, rtol=0)
    assert (halves[0] - halves[1]).abs().max() > 1e-3


# ---- with and without torchaudio


@needs_torchaudio
@pytest.mark.parametrize("chosen", [{}, {"n_fft": 1024, "win_length": 800, "f_min": 50, "hop_length": 240}])
@pytest.mark.parametrize("n_mels", [24, 72])
@pytest.mark.parametrize("seconds", [1.0, 2.337])
def test_mel_front_ends_agree(n_mels, seconds, chosen):
    waveform, config = voice(seconds)[None], FrontEndConfig(**chosen)
    with_it, without_it = (FrontEnd(config, n_mels, use_torchaudio=choice) for choice in (True, False))
    torch.testing.assert_close(without_it(waveform), with_it(waveform), atol=1e-5, rtol=0)
    for name, buffer in with_it.state_dict().items():
        torch.testing.assert_close(without_it.state_dict()[name], buffer, atol=1e-6, rtol=0)


def test_mel_front_end_of_the_published_file():
    published = torch.load(SMALL, weights_only=True)["state_dict"]
    ours = FrontEnd(FrontEndConfig(), 24, use_torchaudio=False).state_dict()
    for name, buffer in ours.items():
        torch.testing.assert_close(buffer, published[f"spec.{name}"], atol=1e-6, rtol=0)


@needs_torchaudio
@pytest.mark.parametrize("rate", [8000, 11025, 22050, 24000, 32000, 44100, 48000, 96000, 192000])
def test_resamplers_agree(rate):
    waveform = torch.randn(rate // 2 + 17, generator=torch.Generator().manual_seed(rate))
    with_it = resample(waveform, rate, 16000, use_torchaudio=True)
    without_it = resample(waveform, rate, 16000, use_torchaudio=False)
    assert without_it.shape == with_it.shape == (math.ceil(waveform.numel() * 16000 / rate),)
    torch.testing.assert_close(without_it, with_it, atol=1e-5, rtol=0)


@needs_torchaudio
def test_own_resampler_is_torchaudios_function():
    """Against the library itself, not against our call of it."""
    import torchaudio

    waveform = torch.randn(4800, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    expected = torchaudio.functional.resample(waveform, 48000, 16000).float()
    torch.testing.assert_close(resample(waveform, 48000, 16000, use_torchaudio=False), expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("rate", [8000, 44100, 44101, 96000])
def test_resampling_keeps_a_tone_and_drops_what_folds(rate):
    t = torch.arange(rate, dtype=torch.float64) / rate
    expected = torch.sin(2 * math.pi * 440 * torch.arange(16000, dtype=torch.float64) / 16000).float()
    result = resample(torch.sin(2 * math.pi * 440 * t), rate, 16000, use_torchaudio=False)
    assert (result - expected)[200:-200].abs().max() < 5e-3
    if rate > 32000:
        ultrasound = resample(torch.sin(2 * math.pi * 12000 * t), rate, 16000, use_torchaudio=False)
        assert ultrasound[200:-200].abs().max() < 5e-3


def test_resampling_across_chunks(monkeypatch):
    waveform = torch.randn(9000, generator=torch.Generator().manual_seed(2))
    whole = resample(waveform, 44100, 16000, use_torchaudio=False)
    monkeypatch.setattr(resample_module, "_MAX_WINDOW_ELEMENTS", 4096)
    assert torch.equal(resample(waveform, 44100, 16000, use_torchaudio=False), whole)


def test_torchaudio_is_optional(monkeypatch):
    """A torchaudio that breaks on import counts as none; insisting on it is a clear error."""
    monkeypatch.setitem(sys.modules, "torchaudio", None)
    assert resample_module.find_torchaudio() is None
    waveform = voice(1.5, 48000)
    embedding = encode_timbre(load_redimnet(SMALL), waveform, 48000)
    assert isinstance(load_redimnet(SMALL).spec.torchfbank[2], mel_module.MelSpectrogram)
    assert embedding.shape == (1, 192)
    for call in (
        lambda: resample(waveform, 48000, 16000, use_torchaudio=True),
        lambda: load_redimnet(SMALL, use_torchaudio=True),
    ):
        with pytest.raises(RuntimeError, match="torchaudio was asked for"):
            call()


def test_import_needs_no_torchaudio():
    code = "import sys, nava_core.timbre; assert 'torchaudio' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=GOLDEN.parents[1], timeout=60)


# ---- loading


def test_loaded_model_is_frozen_float32_in_eval(model):
    assert not model.training
    assert all(p.dtype == torch.float32 and not p.requires_grad for p in model.parameters())
    assert not any(tensor.is_meta for tensor in model.state_dict().values())


def save(content, tmp_path: Path, name: str = "voice.pt") -> Path:
    torch.save(content, tmp_path / name)
    return tmp_path / name


def test_variants_of_the_same_file(tmp_path, model):
    waveform, _ = golden_case("redimnet_small_cases.safetensors", "one_second")
    expected = embed(model, waveform)
    content = published()
    state, config = content["state_dict"], content["model_config"]
    no_front_end = {name: tensor for name, tensor in state.items() if not name.startswith("spec.")}
    with_head = state | {"cls_head.2.weight": torch.zeros(7, 192)}
    training = config | {"num_classes": 7, "class_dropout": 0.1, "spec_params": {"do_spec_aug": True}}
    save_file(state, tmp_path / "voice.safetensors", metadata={"model_config": json.dumps(config)})
    for path in (
        save({"model_config": config, "state_dict": no_front_end}, tmp_path, "no_front_end.pt"),
        save({"model_config": training, "state_dict": with_head}, tmp_path, "with_head.pt"),
        save(content, tmp_path, "named_like_another.ckpt"),
        tmp_path / "voice.safetensors",
    ):
        assert torch.equal(embed(load_redimnet(path), waveform), expected), path.name
    half = {name: t.half() if t.is_floating_point() else t for name, t in state.items()}
    in_half = load_redimnet(save({"model_config": config, "state_dict": half}, tmp_path, "half.pt"))
    torch.testing.assert_close(embed(in_half, waveform), expected, atol=2e-2, rtol=0)


def test_the_old_torch_format_loads(tmp_path, model):
    path = tmp_path / "old.pt"
    torch.save(published(), path, _use_new_zipfile_serialization=False)
    assert torch.equal(load_redimnet(path).linear.weight, model.linear.weight)


class RunsCode:
    def __init__(self, target: Path):
        self.target = target

    def __reduce__(self):
        return os.mkdir, (str(self.target),)


def wrong_files(folder: Path) -> dict[str, tuple[bytes, str]]:
    """Name -> (content, what the error must say)."""
    good = SMALL.read_bytes()
    weights = {"blocks.0.attn.weight": torch.zeros(4, 4), "blocks.1.attn.weight": torch.zeros(4, 4)}
    other, run = io.BytesIO(), io.BytesIO()
    torch.save(weights, other)
    torch.save({"model_config": {}, "state_dict": RunsCode(folder / "ran")}, run)
    save_file(weights, folder / "lora.safetensors")
    lora = (folder / "lora.safetensors").read_bytes()
    return {
        "empty.pt": (b"", "an empty file"),
        "page.pt": (b"\n<!DOCTYPE html><html><body>404</body></html>", "a web page"),
        "page.safetensors": (b"<html>sign in</html>", "a web page"),
        "pointer.pt": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git-lfs pointer"),
        "cut.pt": (good[: len(good) // 2], "incomplete download"),
        "cut_short.pt": (good[:40], "incomplete download"),
        "cut.safetensors": (lora[:-10], "incomplete download"),
        "song.pt": (b"RIFF\x24\x00\x00\x00WAVEfmt " + bytes(100), "a file of an unknown kind"),
        "other.pt": (other.getvalue(), "unknown kind.*blocks.0.attn.weight.*a ReDimNet speaker encoder is needed"),
        "lora.safetensors": (lora, "unknown kind.*blocks.*a ReDimNet speaker encoder is needed"),
        "run.pt": (run.getvalue(), "run code"),
        "run_old.pt": (pickle.dumps(RunsCode(folder / "ran")), "run code"),
        "number.pt": (pickle.dumps(17), "run code"),
    }


WRONG_FILES = [
    "empty.pt",
    "page.pt",
    "page.safetensors",
    "pointer.pt",
    "cut.pt",
    "cut_short.pt",
    "cut.safetensors",
    "song.pt",
    "other.pt",
    "lora.safetensors",
    "run.pt",
    "run_old.pt",
    "number.pt",
]


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("name", WRONG_FILES)
def test_wrong_files_are_named_in_one_sentence(name, tmp_path):
    content, message = wrong_files(tmp_path)[name]
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        load_redimnet(path)
    assert name in str(error.value)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "ran").exists()


def test_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no file .*nothing\.pt"):
        load_redimnet(tmp_path / "nothing.pt")


def test_a_huge_file_is_refused_unread(tmp_path):
    path = tmp_path / "video_vae.pt"
    with path.open("wb") as file:
        file.write(b"PK\x03\x04")
        file.truncate(3 << 30)  # sparse
    with pytest.raises(WrongFileError, match=r"video_vae\.pt is an incomplete download"):
        load_redimnet(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"F": 0}, "F = 0; a whole number"),
        ({"C": 4096, "F": 1024, "stages_setup": [[1, 1, 1, [[3, 3]], None]]}, "does not fit its own model_config"),
        ({"C": 10**12}, "from 1 to 4096"),
        ({"stages_setup": [[5, 1, 1, [[3, 3]], None]]}, "24 bands by 5, which does not divide"),
        ({"group_divisor": 5}, "group_divisor = 5, which does not divide 4 channels"),
        ({"stages_setup": []}, "0 stages"),
        ({"stages_setup": [[1, 1, 1]]}, "five values"),
        ({"stages_setup": 7}, "stages_setup = 7; a list"),
        ({"stages_setup": ["abcde"]}, "a stage = 'abcde'; a list"),
        ({"stages_setup": [[[1, 1], 1, 1, [[3, 3]], 4]]}, r"stride = \[1, 1\]; a whole number"),
        ({"stages_setup": [[1, 1, math.nan, [[3, 3]], 4]]}, "channel expansion = nan"),
        ({"stages_setup": [[1, 1, 1, [[3, 3]], 5]]}, "attention heads"),
        ({"stages_setup": [[1, 1, 1, [[3, 3]], 500]]}, "reduces 96 features by 500"),
        ({"feat_type": "raw"}, "feat_type = 'raw'; known is 'pt' or"),
        ({"feat_type": "tf_spec"}, "F = 24, but its spectrogram has 128 bands"),
        ({"feat_type": "tf_spec", "spec_params": {"pool_freqs": 2}}, "pool_freqs = 2; a list"),
        ({"block_1d_type": "gru"}, "block_1d_type = 'gru'; known is 'att' or"),
        ({"block_2d_type": ["convnext_like"]}, "block_2d_type = "),
        ({"pooling_func": "TSTP_var"}, "pooling_func = 'TSTP_var'"),
        ({"pooling_func": "MQMHASTP", "out_channels": 12}, "pools 12 features with 8 heads"),
        ({"global_context_att": 2}, "global_context_att = 2; known is False or True"),
        ({"emb_bn": True}, "lacks .* bn2"),
        ({"out_channels": 0}, "out_channels = 0"),
        ({"tf_optimized_arch": True}, "tf_optimized_arch = True"),
        ({"is_subnet": True}, "is_subnet = True"),
        ({"offset_fm_weights": 2}, "offset_fm_weights = 2"),
        ({"embed_dim": 256}, "embed_dim = 256; known is 192"),
        ({"hop_length": "160"}, "hop_length = '160'"),
        ({"spec_params": {"n_fft": 10**9}}, "n_fft = 1000000000"),
        ({"spec_params": {"win_length": 800}}, "win_length = 800, longer than n_fft = 512"),
        ({"spec_params": {"f_min": 7700}}, "f_min = 7700, not below"),
        ({"spec_params": {"sample_rate": 8000}}, "sample_rate = 8000"),
        ({"spec_params": {"spec_norm": "none"}}, "spec_norm = 'none'"),
        ({"spec_params": {"n_mels": 80}}, "spec_params has the setting 'n_mels'"),
        ({"spec_params": 3}, "spec_params = 3"),
        ({"something_else": 1}, "model_config has the setting 'something_else'"),
    ],
)
def test_configurations_that_do_not_fit(change, message, tmp_path):
    content = published()
    content["model_config"].update(change)
    with pytest.raises(ValueError, match=message) as error:
        load_redimnet(save(content, tmp_path))
    assert "\n" not in str(error.value)
    assert str(error.value).startswith("voice.pt ")


SETTINGS = published()["model_config"]


@given(
    name=st.sampled_from([*sorted(SETTINGS), "spec_params", "feat_type", "is_subnet", "num_classes"]),
    value=st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
        lambda inner: st.lists(inner, max_size=6) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
        max_leaves=8,
    ),
)
@settings(max_examples=200)
def test_any_setting_is_taken_or_named(name, value):
    """Whatever a file claims, it makes a configuration or a sentence, in no time and no memory."""
    sentence = ""
    try:
        config = ReDimNetConfig.from_published(SETTINGS | {name: value})
    except ValueError as error:
        sentence = str(error)
    assert "\n" not in sentence
    assert sentence.startswith("model_config") if sentence else config.width <= 1024 * 4096


def test_numbers_as_tuples_and_of_numpy(tmp_path, model):
    numpy = pytest.importorskip("numpy")
    content = published()
    config = content["model_config"]
    config["stages_setup"] = tuple(tuple(stage) for stage in config["stages_setup"])
    config |= {"F": numpy.int64(24), "C": numpy.float32(4), "emb_bn": numpy.bool_(False), "is_subnet": False}
    content["epoch"] = numpy.float64(3.5)
    assert torch.equal(load_redimnet(save(content, tmp_path)).linear.weight, model.linear.weight)


def test_tensors_that_do_not_fit(tmp_path):
    lacking, foreign, misshapen, not_a_tensor, whole = (published() for _ in range(5))
    del lacking["state_dict"]["linear.bias"]
    foreign["state_dict"]["extra.weight"] = torch.zeros(2)
    misshapen["state_dict"]["linear.weight"] = torch.zeros(192, 3)
    not_a_tensor["state_dict"]["linear.bias"] = 5
    whole["state_dict"]["linear.weight"] = torch.zeros(192, 192, dtype=torch.int8)
    for content, message in (
        (lacking, r"it lacks tensor linear\.bias"),
        (foreign, r"unknown tensor extra\.weight"),
        (misshapen, r"linear\.weight has the shape \(192, 3\) where \(192, 192\)"),
        (not_a_tensor, r"it lacks tensor linear\.bias"),
        (whole, r"linear\.weight is of the type int8"),
    ):
        with pytest.raises(WrongFileError, match=message):
            load_redimnet(save(content, tmp_path))


def test_a_model_config_that_is_no_table(tmp_path):
    for text, message in (("[1]", "not a table"), ("{", "not JSON"), ("[" * 100_000, "not JSON")):
        path = tmp_path / "voice.safetensors"
        save_file(published()["state_dict"], path, metadata={"model_config": text})
        with pytest.raises(WrongFileError, match=message):
            load_redimnet(path)


# ---- a recording to an embedding


def test_shapes_types_and_determinism(model):
    mono = voice(2.0)
    expected = encode_timbre(model, mono, 16000)
    assert expected.shape == (1, 192)
    assert expected.dtype == torch.float32
    assert expected.device.type == "cpu"
    assert not expected.requires_grad
    assert not expected.is_inference()
    for same in (mono[None], mono[None, None], mono.double(), torch.stack([mono, mono]), mono[None, None].clone()):
        assert torch.equal(encode_timbre(model, same, 16000), expected)
    assert torch.equal(encode_timbre(model, mono, 16000.0), expected)


def test_loading_and_encoding_inside_inference_mode(model):
    with torch.inference_mode():
        inside = encode_timbre(load_redimnet(SMALL), voice(1.0), 16000)
    assert torch.equal(inside, encode_timbre(model, voice(1.0), 16000))


def test_stereo_is_averaged(model):
    left, right = voice(1.5, pitch=110), voice(1.5, pitch=190)
    both = encode_timbre(model, torch.stack([left, right])[None], 16000)
    assert torch.equal(both, encode_timbre(model, (left + right) / 2, 16000))
    assert (both - encode_timbre(model, left, 16000)).abs().max() > 1e-3


def test_short_voices_are_padded_with_silence(model):
    short = voice(0.2)
    padded = torch.cat([short, torch.zeros(16000 - short.numel())])
    assert torch.equal(encode_timbre(model, short, 16000), embed(model, padded[None]))
    assert encode_timbre(model, short[:1], 16000).isfinite().all()
    assert encode_timbre(model, voice(0.2, 8000), 8000).isfinite().all()


@pytest.mark.parametrize("rate", [44100, 48000])
def test_long_voices_are_cut_to_thirty_seconds_as_if_resampled_whole(rate, monkeypatch):
    """What the network gets of 33 s is the start of the whole recording resampled, edge included."""
    long = voice(33.0, rate)
    seen = []

    class Probe(torch.nn.Linear):
        def forward(self, waveform):
            seen.append(waveform)
            return torch.zeros(1, 192)

    encode_timbre(Probe(1, 1), long, rate)
    expected = resample(long, rate, 16000)[:480000]
    assert seen[0].shape == (1, 480000)
    torch.testing.assert_close(seen[0][0], expected, atol=1e-6, rtol=0)


def test_ten_minutes_cost_what_thirty_seconds_cost(model):
    """The cut comes before any arithmetic: a 10 min recording in a view of little memory is not copied whole."""
    rate = 96000
    ten_minutes = torch.zeros(1, 1).expand(2, rate * 600)  # 460 MB if anything made it real
    calls = []
    original = torch.Tensor.float

    def recording_float(self, *args, **kwargs):
        calls.append(self.numel())
        return original(self, *args, **kwargs)

    torch.Tensor.float = recording_float
    try:
        embedding = encode_timbre(model, ten_minutes, rate)
        check_voice(ten_minutes, rate)
    finally:
        torch.Tensor.float = original
    assert embedding.isfinite().all()
    assert max(calls) <= 2 * rate * 31


def test_start_and_duration_choose_the_part(model):
    recording = torch.cat([voice(2.0, pitch=100), voice(2.0, pitch=220)])
    second = encode_timbre(model, recording[32000:], 16000)
    assert torch.equal(encode_timbre(model, recording, 16000, start=2.0), second)
    assert torch.equal(encode_timbre(model, recording, 16000, start=2.0, duration=99.0), second)
    first = encode_timbre(model, recording, 16000, duration=2.0)
    assert torch.equal(first, encode_timbre(model, recording[:32000], 16000))
    assert (first - second).abs().max() > 1e-3
    recording[:100] = math.nan  # outside the chosen part it does no harm
    assert torch.equal(encode_timbre(model, recording, 16000, start=2.0), second)


@pytest.mark.parametrize("rate", [8000, 22050, 48000, 96000])
def test_the_same_voice_at_other_rates(model, rate):
    """Where the band is the same, the rate hardly matters."""
    reference = encode_timbre(model, voice(2.0, 16000, pitch=90), 16000)
    other = encode_timbre(model, resample(voice(2.0, 16000, pitch=90), 16000, rate), rate)
    similarity = torch.nn.functional.cosine_similarity(reference, other).item()
    assert similarity > (0.8 if rate == 8000 else 0.99)


@pytest.mark.parametrize(
    ("dtype", "scale", "offset"),
    [(torch.int16, 2**15, 0), (torch.int32, 2**31, 0), (torch.uint8, 2**7, 2**7)],
)
def test_pcm_is_scaled(model, dtype, scale, offset):
    floats = voice(1.0)
    pcm = (floats.double() * scale + offset).round().to(dtype)
    back = ((pcm.double() - offset) / scale).float()
    assert torch.equal(encode_timbre(model, pcm, 16000), encode_timbre(model, back, 16000))


@pytest.mark.parametrize(
    ("waveform", "rate", "options", "message"),
    [
        (torch.zeros(2, 1, 100), 16000, {}, "batch of 2"),
        (torch.zeros(1, 1, 1, 100), 16000, {}, r"shape \(1, 1, 1, 100\)"),
        (torch.zeros(()), 16000, {}, r"shape \(\)"),
        (torch.zeros(1, 0), 16000, {}, "no samples"),
        (torch.zeros(48000, 2), 16000, {}, "48000 channels"),
        ([0.0, 1.0], 16000, {}, "is a list"),
        ({"waveform": torch.zeros(1, 1, 9), "sample_rate": 16000}, 16000, {}, "is a dict"),
        (torch.zeros(100, dtype=torch.int64), 16000, {}, "torch.int64"),
        (torch.zeros(100, dtype=torch.bool), 16000, {}, "torch.bool"),
        (torch.full((100,), math.nan), 16000, {}, "not finite"),
        (torch.tensor([0.0, math.inf]), 16000, {}, "not finite"),
        (torch.full((100,), 20000.0), 16000, {}, "reaches 20000"),
        (torch.zeros(100), 0, {}, "sample rate 0"),
        (torch.zeros(100), -16000, {}, "sample rate"),
        (torch.zeros(100), 44100.5, {}, "sample rate"),
        (torch.zeros(100), "16000", {}, "sample rate"),
        (torch.zeros(100), 10**9, {}, "sample rate"),
        (torch.zeros(16000), 16000, {"start": 1.0}, r"start at 1 s, but the recording lasts 1\.00 s"),
        (torch.zeros(16000), 16000, {"start": -1.0}, "start of the voice is -1"),
        (torch.zeros(16000), 16000, {"start": math.nan}, "start of the voice is nan"),
        (torch.zeros(16000), 16000, {"duration": 0.0}, "duration of the voice is 0"),
    ],
)
def test_wrong_recordings(model, waveform, rate, options, message):
    for call in (
        lambda: encode_timbre(model, waveform, rate, **options),
        lambda: check_voice(waveform, rate, **options),
    ):
        with pytest.raises(ValueError, match=message) as error:
            call()
        assert "\n" not in str(error.value)


def test_damaged_weights_are_reported():
    broken = load_redimnet(SMALL)
    broken.linear.bias.fill_(math.nan)
    with pytest.raises(RuntimeError, match="not finite"):
        encode_timbre(broken, voice(1.0), 16000)


# ---- what makes a voice suffer


def test_a_good_voice_has_no_warnings():
    assert check_voice(voice(5.0, 48000), 48000) == []
    assert check_voice(torch.stack([voice(5.0, 44100)] * 2)[None], 44100) == []
    loud = 2 * voice(5.0)  # normalised to a peak of 1 is not clipped
    assert loud.abs().max() == 1
    assert check_voice(loud, 16000) == []


@pytest.mark.parametrize(
    ("waveform", "rate", "message"),
    [
        (torch.zeros(80000), 16000, "nearly silent .digital silence"),
        (voice(5.0) * 1e-4, 16000, r"nearly silent .\d\d dB below"),
        ((voice(5.0) * 6).clamp(-1, 1), 16000, "clipped"),
        ((voice(5.0) * 6).clamp(-1, 1) * 0.3, 16000, "clipped"),
        (((voice(5.0) * 6).clamp(-1, 1) * 32767).to(torch.int16), 16000, "clipped"),
        (torch.stack([voice(5.0), (voice(5.0) * 6).clamp(-1, 1)]), 16000, "clipped"),
        (voice(0.2), 16000, r"only 0\.20 s and is padded"),
        (voice(2.0), 16000, r"only 2\.0 s; 3 to 10 s"),
        (voice(5.0, 8000), 8000, r"8000 Hz and has nothing above 4 kHz"),
        (voice(600.0, 1000, pitch=100), 1000, "only the first 30 s"),
    ],
)
def test_warnings(model, waveform, rate, message):
    found = check_voice(waveform, rate)
    assert any(re.search(message, sentence) for sentence in found), found
    assert all(sentence.endswith(".") and "\n" not in sentence for sentence in found)
    assert encode_timbre(model, waveform, rate).isfinite().all()


def test_warnings_are_about_the_chosen_part():
    recording = torch.cat([torch.zeros(80000), voice(5.0)])
    assert check_voice(recording, 16000, start=5.0) == []
    assert "digital silence" in check_voice(recording, 16000, duration=4.0)[0]
    assert check_voice(torch.cat([voice(20.0)] * 2), 16000, start=5.0, duration=10.0) == []


# ---- real speech


def speak(text: str, voice_name: str, folder: Path) -> tuple[torch.Tensor, int]:
    path = folder / f"{voice_name.replace('+', '_')}.wav"
    subprocess.run(["espeak-ng", "-v", voice_name, "-w", str(path), text], check=True, timeout=30)
    with wave.open(str(path)) as file:
        assert (file.getsampwidth(), file.getnchannels()) == (2, 1)
        samples = torch.frombuffer(bytearray(file.readframes(file.getnframes())), dtype=torch.int16)
        return samples, file.getframerate()


@pytest.mark.skipif(shutil.which("espeak-ng") is None, reason="no espeak-ng")
def test_real_voices(model, tmp_path):
    text = "The lamp in the harbour burned all night, and the boats came home one after another."
    man, rate = speak(text, "en-us+m3", tmp_path)
    woman, _ = speak(text, "en-us+f4", tmp_path)
    assert check_voice(man, rate) == []
    assert check_voice(woman, rate) == []
    a, b = encode_timbre(model, man, rate), encode_timbre(model, woman, rate)
    # Even random weights tell two speakers from two parts of one recording.
    again = encode_timbre(model, man, rate, start=0.5)
    assert (a - again).norm() < (a - b).norm()
    torch.testing.assert_close(encode_timbre(model, man, rate, use_torchaudio=False), a, atol=1e-4, rtol=0)
