"""A clip within a budget of GPU memory: where its components work, that the budget is kept, and what running out means.

The GPU is played on the CPU (``_played_gpu``), at a size that fits the small models.
"""

import importlib.util
import json
import sys
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from benchmarks.live_memory import LiveMemory
from nava_core import sampling  # noqa: F401 - its denoise module is looked up below
from nava_core.backbone import BackboneConfig, NavaBackbone, activation_bytes
from nava_core.backbone.blocks import FusionBlock
from nava_core.backbone.formats import MADE_HERE, PROTECTING, format_problem
from nava_core.backbone.quant_linear import QuantLinear
from nava_core.backbone.quantized import Fp8Linear
from nava_core.checkpoint import assign_tensor, describe_file, load_backbone
from nava_core.checkpoint.source import SafetensorsSource
from nava_core.components import AudioVAE, TextEncoder, VideoVAE, encode_bytes
from nava_core.components.text_encoder import _network, _tie
from nava_core.convert import convert
from nava_core.demo import make_small_models
from nava_core.explain import TooLittleMemoryError, explain
from nava_core.geometry import ClipGeometry
from nava_core.offload import plan, spread
from nava_core.parallel import Parallel
from nava_core.pipeline import Clip, Components, ModelFiles, NavaPipeline, clock, memory, sizes, stages
from nava_core.prompt.umt5 import UMT5Config
from nava_core.sampling import Guidance, flow_sigmas

pytest.importorskip("diffusers")
pytest.importorskip("accelerate")
spec = importlib.util.spec_from_file_location("_played_gpu", Path(__file__).with_name("_played_gpu.py"))
played = importlib.util.module_from_spec(spec)
spec.loader.exec_module(played)

CONFIG = BackboneConfig(
    dim=128, ffn_dim=512, freq_dim=32, text_dim=64, num_heads=2, num_double_layers=3, num_single_layers=6
)
SMALLER = [dtype for dtype in MADE_HERE if format_problem(dtype) is None]
MB = 10**6
SLACK = 2_600_000  # what is not counted is more, beside what is, than at the released size
LAYERS = 6  # of the text encoder
PROMPT = "Two friends in a kitchen. One says <S>good morning<E>."
SHORT = {"seconds": 0.5, "width": 64, "height": 32, "steps": 2, "seed": 5, "negative": "blurred"}
VOICE = torch.randn(1, 192, generator=torch.Generator().manual_seed(4))
BOTH = {"image": torch.rand(40, 60, 3, generator=torch.Generator().manual_seed(1)), "size_from_image": False}
KINDS = {
    "text": {},
    "text and voice": {"voices": [VOICE]},
    "first frame and voice": {**BOTH, "voices": [VOICE]},
    "no alignment": {"guidance": Guidance(alignment=False)},
    "sound alone": {"mode": "audio"},
    "picture alone": {"mode": "video"},
    "distilled": {"preset": "distilled"},
}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """The small models, and backbones of 2.7 M parameters, whose weights outweigh what passes take."""
    folder = tmp_path_factory.mktemp("models")
    models = make_small_models(folder, preview_decoder=False)
    state = NavaBackbone(CONFIG, dtype=torch.bfloat16).init_weights().state_dict()
    save_file(state, folder / "wide.safetensors", {"config": json.dumps(asdict(CONFIG))})
    convert(folder / "wide.safetensors", folder / "wide_fp8.safetensors")
    for dtype in SMALLER:
        protected = ["double_blocks.1.self_attn.q"] if dtype in PROTECTING else []
        convert(folder / "wide.safetensors", folder / f"wide_{dtype}.safetensors", dtype=dtype, protected=protected)
    encoder = load_file(models["text_encoder"])
    second = {name: tensor for name, tensor in encoder.items() if name.startswith("encoder.block.1.")}
    for number in range(2, LAYERS):
        encoder |= {name.replace(".1.", f".{number}.", 1): tensor.clone() for name, tensor in second.items()}
    save_file(encoder, folder / "deep.safetensors")
    own = {"text_encoder": "deep", "backbone": "wide", "fp8": "wide_fp8"}
    own |= {dtype: f"wide_{dtype}" for dtype in SMALLER}
    return {**models, **{role: folder / f"{name}.safetensors" for role, name in own.items()}}


@pytest.fixture(scope="module")
def files(models):
    return ModelFiles(**{role: models[role] for role in ("backbone", "text_encoder", "video_vae", "audio_vae")})


@pytest.fixture(autouse=True)
def _small_scale(monkeypatch):
    monkeypatch.setattr(plan, "SLACK", SLACK)
    monkeypatch.setattr(memory, "SLACK", SLACK)
    monkeypatch.setattr(memory, "WORKSPACE", SLACK)
    monkeypatch.setattr(memory, "MOST_TOKENS", 48)  # the attention of 512 would be far larger than the models
    monkeypatch.setattr(AudioVAE, "decode_bytes", staticmethod(lambda *_: 8 * MB))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def gpu(monkeypatch):
    with played.PlayedGpu(100 * MB, monkeypatch) as gpu:
        yield gpu


@pytest.fixture
def _latents_only(monkeypatch):
    def undecoded(_self, latents, **_):
        return Clip(None, None, 0, latents.video, latents.audio, latents.report, latents.warnings)

    monkeypatch.setattr(NavaPipeline, "decode", undecoded)


def opened(files, said=None, **options):
    return NavaPipeline.from_files(files, device="cuda", say=[].append if said is None else said.append, **options)


def budget_for(files, resident, *, together=1, seconds=0.5, width=64, height=32, mode="video+audio", **_):
    """The bytes with which so many of a clip's nine blocks are resident."""
    components = Components(files, torch.device("cuda"), None, print, False)
    demand = components.backbone_demand(ClipGeometry(seconds, width, height, mode), together)
    work = demand.work if together == 1 else demand.batched
    streamed = spread(9, 9 - resident) if resident < 9 else ()
    return demand.weights.on_device(streamed) + work + SLACK


def latents(clip):
    return [latent for latent in (clip.video_latent, clip.audio_latent) if latent is not None]


def same(one, other):
    return all(map(torch.equal, latents(one), latents(other)))


def near(one, other):
    return all(((a - b).norm() / b.norm()) < 0.05 for a, b in zip(latents(one), latents(other), strict=True))


@contextmanager
def predictions_apart():
    """As for long clips, whose predictions share no pass."""
    before, stages.BATCH_TOKENS = stages.BATCH_TOKENS, 0
    try:
        yield
    finally:
        stages.BATCH_TOKENS = before


def both_ways(files, prompt, **settings):
    """A clip made without a budget, by whether predictions share passes."""
    batched = opened(files)(prompt, **settings)
    with predictions_apart():
        return {True: batched, False: opened(files)(prompt, **settings)}


# ---------------------------------------------------------------- the budget is kept


@pytest.mark.usefixtures("_latents_only")
@pytest.mark.parametrize("kind", KINDS)
def test_a_budget_is_kept_and_the_clip_is_the_same(files, gpu, kind):
    settings = {**SHORT, **KINDS[kind]}
    whole = both_ways(files, PROMPT, **settings)
    seen = set()
    for budget in (30 * MB, *(budget_for(files, resident, **settings) for resident in (9, 6, 3, 1, 0))):
        gpu.peak, said = gpu.used, []
        pipeline = opened(files, said, memory=budget)
        clip = pipeline(PROMPT, **settings)
        assert gpu.peak <= budget, said
        assert gpu.limit == gpu.total  # the allocator's limit ends with the work
        assert same(clip, whole[pipeline.components.plan.batched]), budget
        assert not [sentence for sentence in said if "Out of memory" in sentence]
        where = pipeline.components.plan.backbone
        assert said[0].startswith(f"Budget {budget / MB:.2f} MB: backbone {where}"), said[0]
        seen.add(len(where.streamed))
        pipeline.unload()
    assert {0, 9} <= seen
    assert len(seen) >= 4


@pytest.mark.usefixtures("_latents_only")
@pytest.mark.parametrize(
    ("dtype", "size"),
    [*(("fp8", size) for size in ((64, 32, 0.5), (128, 96, 1), (160, 160, 2))), *((n, (128, 96, 1)) for n in SMALLER)],
)
def test_a_budget_is_kept_for_clips_of_several_sizes_and_quantised_weights(models, gpu, dtype, size):
    """And the clip is that of resident weights, to the last bit."""
    files = ModelFiles(models[dtype], *(models[role] for role in ("text_encoder", "video_vae", "audio_vae")))
    settings = {**SHORT, **dict(zip(("width", "height", "seconds"), size, strict=True))}
    expected = both_ways(files, PROMPT, **settings)
    for budget in (budget_for(files, resident, **settings) for resident in (4, 0)):
        gpu.peak = gpu.used
        pipeline = opened(files, memory=budget)
        assert same(pipeline(PROMPT, **settings), expected[pipeline.components.plan.batched])
        assert pipeline.components.plan.backbone.streamed
        assert gpu.peak <= budget
        pipeline.unload()


def test_a_whole_clip_within_a_budget_with_all_that_is_decoded(files, gpu):
    whole = opened(files)(PROMPT, **SHORT, **BOTH)
    gpu.peak, budget, limits = gpu.used, 25 * MB, []
    clip = opened(files, memory=budget)(PROMPT, **SHORT, **BOTH, callback=lambda *_: limits.append(gpu.limit))
    assert limits == [budget, budget]  # the allocator's, while a component is at work
    assert gpu.peak <= budget
    assert torch.equal(clip.frames, whole.frames)
    assert torch.equal(clip.waveform, whole.waveform)


@pytest.mark.parametrize("dtype", SMALLER)
def test_the_plan_counts_quantised_weights_as_they_are(models, dtype):
    info = describe_file(models[dtype])
    model = load_backbone(info)
    blocks = tuple(
        sum(parameter.nbytes for parameter in block.parameters())
        for block in (*model.double_blocks, *model.single_blocks)
    )
    weights = sizes.component_weights("backbone", info, None)
    assert weights.blocks == blocks
    assert weights.total == sum(parameter.nbytes for parameter in model.parameters())
    assert sum(blocks) < 0.6 * sum(sizes.component_weights("backbone", info, torch.bfloat16).blocks)


@pytest.mark.parametrize("dtype", ["fp8", *SMALLER])
def test_a_plan_has_what_dequantising_a_weight_takes(models, dtype):
    """By comfy_kitchen's reference code, beside a product's inputs."""
    info = describe_file(models[dtype])
    most = 0
    for layer in load_backbone(info).modules():
        if isinstance(layer, QuantLinear | Fp8Linear) and layer.in_features * layer.out_features == 128 * 512:
            with LiveMemory() as taken, torch.no_grad():
                x = torch.zeros(1, layer.in_features, dtype=torch.bfloat16)
                taken.ignore(*layer.parameters())
                layer(x)
            most = max(most, taken.peak)
    assert 0.9 * most < sizes._unpacked_bytes(info, None) < 1.1 * most


@pytest.mark.usefixtures("_latents_only")
def test_without_a_budget_it_is_what_is_free(files, gpu, monkeypatch):
    said = []
    expected = both_ways(files, PROMPT, **SHORT)
    opened(files, said)(PROMPT, **SHORT)
    assert not [sentence for sentence in said if sentence.startswith("Budget")]
    budget = budget_for(files, 3)
    taken = torch.empty(100 * MB - SLACK - budget, dtype=torch.uint8, device="cuda")  # another program's
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda *_: gpu.used - taken.nbytes)
    pipeline = opened(files, said)
    clip = pipeline(PROMPT, **SHORT)
    assert [sentence for sentence in said if sentence.startswith(f"Budget {budget / MB:.2f} MB: backbone streamed, ")]
    assert same(clip, expected[pipeline.components.plan.batched])


@pytest.mark.usefixtures("_latents_only")
def test_loras_are_merged_into_streamed_blocks_too(files, gpu, tmp_path):
    tensors = {}
    for layer in ("double_blocks.1.ffn.0", "single_blocks.3.self_attn.q"):
        rows = 512 if "ffn" in layer else 128
        tensors[f"{layer}.lora_up.weight"] = torch.randn(rows, 4, generator=torch.Generator().manual_seed(1)) * 0.2
        tensors[f"{layer}.lora_down.weight"] = torch.randn(4, 128, generator=torch.Generator().manual_seed(2))
    save_file(tensors, tmp_path / "lora.safetensors")
    loras = [tmp_path / "lora.safetensors"]
    with predictions_apart():
        plain = opened(files)(PROMPT, **SHORT)
        resident, streamed = (
            opened(files, loras=loras, memory=m)(PROMPT, **SHORT) for m in (None, budget_for(files, 1))
        )
    assert same(streamed, resident)
    assert not same(streamed, plain)


# ---------------------------------------------------------------- estimates


@pytest.mark.parametrize(("seconds", "size"), [(6, (1280, 704)), (10, (1280, 704)), (2, (832, 480)), (1, (640, 352))])
def test_denoising_takes_what_is_planned_with_at_the_released_size(monkeypatch, seconds, size):
    """Live tensors of a whole run, counted where nothing is computed; of a pass the peak is one block's."""
    loop = sys.modules["nava_core.sampling.denoise"]
    monkeypatch.setattr(loop, "_check_finite", lambda *_: None)
    config = replace(BackboneConfig(), num_double_layers=1, num_single_layers=1)
    with torch.device("meta"):
        network = NavaBackbone(config, dtype=torch.bfloat16, attention=lambda q, *_: torch.empty_like(q))
    geometry = ClipGeometry(seconds, *size)
    video = torch.empty(1, *geometry.latent_shape, device="meta")
    audio = torch.empty(1, geometry.audio_tokens, 128, device="meta")
    context = torch.empty(1, 512, 4096, device="meta", dtype=torch.bfloat16)
    voice = {
        "timbre": torch.empty(1, 1, 192, device="meta", dtype=torch.bfloat16),
        "timbre_positions": torch.zeros(1, 1, dtype=torch.long, device="meta"),
    }
    for batched in (False, True)[: 1 + (geometry.tokens <= stages.BATCH_TOKENS)]:
        with LiveMemory() as live:
            live.ignore(*network.parameters(), context, *voice.values())
            settings = {"sigmas": flow_sigmas(3), "guidance": Guidance(), "batch_predictions": batched}
            loop.denoise(network, video.clone(), audio.clone(), context, negative=context.clone(), **settings, **voice)
        work = sizes.LATENT_COPIES * (video.nbytes + audio.nbytes)
        work += activation_bytes(config, 3 if batched else 1, geometry.tokens, 2)
        assert 0.9 * work < live.peak < work + 0.1 * 2**29, (batched, live.peak, work)  # the room is five times that


@pytest.mark.parametrize("scaled", [False, True])
def test_encoding_text_takes_no_more_than_is_planned_with_at_the_released_size(scaled):
    config = UMT5Config()
    names = {f"{name}.weight" for name, module in _network(config, set()).named_modules() if hasattr(module, "stored")}
    network = _network(config, names if scaled else set())
    for name, parameter in list(network.named_parameters()):
        if name.endswith("stored"):
            dtype = torch.float8_e4m3fn if scaled else torch.float16
            assign_tensor(network, name, torch.empty(parameter.shape, dtype=dtype, device="meta"))
    _tie(network)
    rows = torch.empty(1, 512, config.d_model, device="meta")
    with torch.no_grad(), LiveMemory() as live:
        live.ignore(*network.parameters(), *network.buffers(), rows)
        network.encoder(inputs_embeds=rows)
    planned = encode_bytes(config, 512)
    assert TextEncoder(network).encode_bytes(512) == planned
    assert live.peak < planned < 2 * live.peak


# ---------------------------------------------------------------- where components work


@pytest.mark.usefixtures("_latents_only")
def test_the_text_encoder_is_streamed_where_it_does_not_fit(files, gpu):
    weights = opened(files).components.weights("text_encoder")
    work = encode_bytes(UMT5Config(64, 16, 128, LAYERS, 4, 1), 48)
    expected, everything = opened(files)(PROMPT, **SHORT), tuple(range(LAYERS))
    fewest = next(n for n in range(1, LAYERS) if weights.on_device(spread(LAYERS, n)) < weights.total)
    budgets = {weights.total: (), weights.total - 1: spread(LAYERS, fewest), weights.on_device(everything): everything}
    for budget, streamed in ((budget + work + SLACK, streamed) for budget, streamed in budgets.items()):
        pipeline = opened(files)
        pipeline.components._ceilings["text_encoder"] = budget
        contexts = pipeline(PROMPT, **SHORT)
        assert pipeline.components.plan.text_encoder.streamed == streamed
        assert same(contexts, expected)
        pipeline.unload()


@pytest.mark.usefixtures("_latents_only")
def test_parts_work_on_the_devices_chosen_for_them(files, gpu, monkeypatch):
    worked = {}

    def watched(kind, method):
        original = getattr(kind, method)

        def work(self, *args):
            parameter = next(p for n, p in self.named_parameters() if "shared" not in n and "embed_tokens" not in n)
            worked[method] = parameter.device.type
            return original(self, *args)

        monkeypatch.setattr(kind, method, work)

    watched(TextEncoder, "encode")
    original = VideoVAE.encode

    def encode(self, frames):
        worked["picture"] = self._device.type
        return original(self, frames)

    monkeypatch.setattr(VideoVAE, "encode", encode)
    for options, places in (
        ({}, ("cuda", "cuda")),
        ({"encoder_device": "cpu"}, ("cpu", "cuda")),
        ({"vae_device": "cpu"}, ("cuda", "cpu")),
        ({"encoder_device": "cuda:0", "vae_device": "cuda:0"}, ("cuda", "cuda")),
    ):
        pipeline = opened(files, **options)
        pipeline(PROMPT, **SHORT, **BOTH)
        assert (worked["encode"], worked["picture"]) == places, options
        assert (pipeline.components.vae_dtype is torch.float32) == (places[1] == "cpu")
        assert pipeline.components.home("audio_vae").type == places[1]
        pipeline.unload()


@pytest.mark.usefixtures("_latents_only")
def test_a_part_with_a_device_of_its_own_does_not_leave_it(files, gpu):
    said = []
    pipeline = opened(files, said, memory=budget_for(files, 2), encoder_device="cuda")
    pipeline.components._ceilings["text_encoder"] = SLACK
    pipeline(PROMPT, **SHORT)
    assert pipeline.components.plan.text_encoder == plan.Placement(torch.device("cuda"), tuple(range(LAYERS)), LAYERS)


@pytest.mark.usefixtures("_latents_only")
def test_the_backbone_waits_where_it_is_for_a_clip_of_the_same_plan(files, gpu, monkeypatch):
    """And the text encoder is streamed beside it rather than having it read again."""
    loaded = []
    for name in ("load_backbone", "load_text_encoder"):
        original = getattr(memory, name)

        def load(*args, name=name, original=original, **options):
            loaded.append((name, tuple(options.get("in_ram", ()))))
            return original(*args, **options)

        monkeypatch.setattr(memory, name, load)
    pipeline = opened(files, memory=budget_for(files, 6))
    components = pipeline.components
    monkeypatch.setattr(stages, "BATCH_TOKENS", 0)
    first = pipeline(PROMPT, **SHORT)
    held, stream = gpu.used, components._streams["backbone"]
    assert held > 3 * MB
    again = pipeline(PROMPT, **SHORT)
    assert components._streams["backbone"] is stream
    assert [name for name, _ in loaded] == ["load_text_encoder", "load_backbone", "load_text_encoder"]
    assert same(first, again)
    size = {**SHORT, "width": 128, "height": 96, "seconds": 1}
    assert budget_for(files, 0, **size) < components.limit
    larger = pipeline(PROMPT, **size)
    assert len(components._streams["backbone"].streamed) > len(stream.streamed)
    assert sum(name == "load_backbone" for name, _ in loaded) == 1  # moved, not read again
    pipeline.unload()
    assert same(larger, pipeline(PROMPT, **size))
    components.unload()
    assert gpu.used < 20_000
    assert gpu.locked == []


@pytest.mark.usefixtures("_latents_only")
def test_what_stays_in_ram_as_it_is_in_the_file_is_mapped(files, gpu, monkeypatch):
    mapped = []
    original = SafetensorsSource.map

    def map_(self, name):
        mapped.append((self.info.path.name, name))
        return original(self, name)

    monkeypatch.setattr(SafetensorsSource, "map", map_)
    NavaPipeline.from_files(files, device="cpu")(PROMPT, **SHORT)
    tensors = describe_file(files.backbone).model_tensors
    assert {name for file, name in mapped if file == "wide.safetensors"} == set(tensors)
    assert ("deep.safetensors", "encoder.block.3.layer.0.SelfAttention.q.weight") in mapped
    mapped.clear()
    pipeline = opened(files, memory=budget_for(files, 1))
    pipeline(PROMPT, **SHORT)
    names = sizes.block_names(describe_file(files.backbone))
    streamed = [f"{names[index]}." for index in pipeline.components.plan.backbone.streamed]
    of_blocks = {name for name in tensors if name.startswith(tuple(streamed))}
    assert {name for file, name in mapped if file == "wide.safetensors"} == of_blocks
    assert ("deep.safetensors", "shared.weight") in mapped


@pytest.mark.usefixtures("_latents_only")
@pytest.mark.parametrize("keep_loaded", [False, True])
def test_a_streamed_backbone_leaves_for_what_does_not_fit_beside_it(files, gpu, keep_loaded):
    pipeline = opened(files, memory=budget_for(files, 1), keep_loaded=keep_loaded)
    first = pipeline(PROMPT, **SHORT)
    components = pipeline.components
    assert "backbone" in components._streams
    left = components.limit - gpu.used
    assert components.make_room(left)
    assert "backbone" in components._streams
    assert components.make_room(left + MB)
    assert not components.make_room(components.limit + 1)
    assert components._streams == {}
    assert gpu.locked == []
    assert ("backbone" in components._kept) is keep_loaded
    assert same(pipeline(PROMPT, **SHORT), first)


def test_a_budget_that_cannot_be_kept_is_refused_before_anything_is_loaded(files, gpu):
    said = []
    pipeline = opened(files, said, memory=6 * MB)
    with pytest.raises(ValueError, match=r"6\.00 MB cannot be kept to: denoising 22 tokens takes ") as refused:
        pipeline(PROMPT, **SHORT)
    assert said == []
    least = float(str(refused.value).split("takes ")[1].split(" MB")[0])
    assert str(refused.value).endswith("Allow that much (--memory), or make the clip smaller or shorter.")
    assert opened(files, memory=f"{least + 0.01:.2f}MB")(PROMPT, **SHORT).frames is not None


def test_what_makes_no_sense_is_refused_when_the_pipeline_is_made(files, gpu):
    for options, words in (
        ({"memory": "much"}, "'much' is no amount of memory"),
        ({"memory": "101%"}, r"101% is more memory than there is: the GPU has 0\.1 GB"),
        ({"memory": "50MB", "parallel": Parallel(2)}, "is for one GPU, not for parallel workers"),
        ({"encoder_device": "cuda:1"}, "There is no device cuda:1 here"),
        ({"vae_device": "toaster"}, "There is no device toaster here"),
    ):
        with pytest.raises(ValueError, match=words):
            opened(files, **options)
    with pytest.raises(ValueError, match="is for a CUDA GPU, and the models work on cpu"):
        NavaPipeline.from_files(files, device="cpu", memory="50MB")


# ---------------------------------------------------------------- out of memory


class Shortage:
    """Makes a method run out of memory at its calls of the numbers ``at``, counted from 1."""

    def __init__(self, monkeypatch, kind, method, at, error=None):
        self.calls = 0
        original = getattr(kind, method)

        def called(this, *args, **kwargs):
            self.calls += 1
            if self.calls in at:
                raise error or torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
            return original(this, *args, **kwargs)

        monkeypatch.setattr(kind, method, called)


@pytest.mark.usefixtures("_latents_only")
def test_text_that_takes_too_much_is_encoded_once_more_in_a_smaller_form(files, gpu, monkeypatch):
    expected, said = opened(files)(PROMPT, **SHORT), []
    Shortage(monkeypatch, TextEncoder, "encode", {2, 5, 6})
    pipeline = opened(files, said)
    assert same(pipeline(PROMPT, **SHORT), expected)
    assert (
        "Out of memory while encoding the text: once more with the text encoder streamed, 3 of 6 blocks resident."
        in said
    )
    assert len(pipeline.components.plan.text_encoder.streamed) == 3
    pipeline = opened(files)
    with pytest.raises(
        TooLittleMemoryError, match="for encoding the text: let the text encoder work on the CPU"
    ) as short:
        pipeline(PROMPT, **SHORT)
    assert "--encoder-device cpu" in explain(short.value)
    assert same(pipeline(PROMPT, **SHORT), expected)  # and the next clip is made


@pytest.mark.usefixtures("_latents_only")
def test_a_waiting_backbone_leaves_before_text_is_encoded_once_more(files, gpu, monkeypatch):
    pipeline = opened(files)
    expected = pipeline(PROMPT, **SHORT)
    there = []
    original = TextEncoder.encode

    def encode(self, ids):
        there.append("backbone" in pipeline.components._kept)
        if len(there) == 1:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return original(self, ids)

    monkeypatch.setattr(TextEncoder, "encode", encode)
    assert same(pipeline(PROMPT, **SHORT), expected)
    assert there == [True, False, False]


@pytest.mark.usefixtures("_latents_only")
def test_a_first_frame_that_takes_too_much_is_encoded_on_the_cpu(files, gpu, monkeypatch):
    expected, said = opened(files)(PROMPT, **SHORT, **BOTH), []
    network = memory.load_video_vae(files.video_vae).network
    Shortage(monkeypatch, type(network), "_encode", {1, 3})
    pipeline = opened(files, said)
    assert near(pipeline(PROMPT, **SHORT, **BOTH), expected)
    assert "Out of memory while encoding the first frame: once more with the video VAE on the CPU." in said
    with pytest.raises(
        TooLittleMemoryError, match="too little free memory on cuda for encoding a first frame of 64x32"
    ):
        opened(files, vae_device="cuda")(PROMPT, **SHORT, **BOTH)


@pytest.mark.usefixtures("_latents_only")
def test_given_frames_and_sound_that_take_too_much_are_encoded_on_the_cpu(files, gpu, monkeypatch):
    tone = (torch.sin(torch.arange(24000) / 20)[None] / 3, 24000)
    for given, module, role, doing in (
        ({"frames": torch.rand(13, 32, 64, 3), "size_from_image": False}, "video_vae", "video VAE", "13 frames"),
        ({"sound": tone}, "audio_vae", "audio VAE", "the sound"),
    ):
        expected, said = opened(files)(PROMPT, **SHORT, **given), []
        with monkeypatch.context() as short:
            if module == "video_vae":
                Shortage(short, type(memory.load_video_vae(files.video_vae).network), "_encode", {1})
            else:
                Shortage(short, memory.AudioVAE, "encode", {1})
            assert near(opened(files, said)(PROMPT, **SHORT, **given), expected)
        assert f"Out of memory while encoding {doing}: once more with the {role} on the CPU." in said


@pytest.mark.usefixtures("_latents_only")
@pytest.mark.parametrize("at", [1, 4, 15, 22])
@pytest.mark.parametrize("error", [None, RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED")])
def test_a_step_that_runs_out_is_made_again_with_predictions_apart_and_half_the_blocks(
    files, gpu, monkeypatch, at, error
):
    """Without alignment there are two predictions, which share a pass."""
    settings = {**SHORT, "steps": 4, "guidance": Guidance(alignment=False)}
    expected, said = both_ways(files, PROMPT, **settings), []
    shortage = Shortage(monkeypatch, FusionBlock, "forward", {at}, error)
    clip = opened(files, said)(PROMPT, **settings)
    assert [sentence for sentence in said if sentence.startswith("Out of memory")] == [
        "Out of memory while denoising: this step once more with the backbone streamed, 4 of 9 blocks resident."
    ]
    whole, failed = divmod(at - 1, 6)  # steps of one pass before; and blocks of the pass that failed
    assert shortage.calls == whole * 6 + failed + 1 + (4 - whole) * 12
    assert near(clip, expected[True])
    assert not same(expected[True], expected[False])
    assert whole or same(clip, expected[False])


@pytest.mark.usefixtures("_latents_only")
@pytest.mark.parametrize("resident", [9, 2])
@pytest.mark.parametrize("at", [3, 60, 100])
def test_a_retried_run_is_the_same_clip_to_the_last_bit(files, gpu, monkeypatch, resident, at):
    """Where predictions were apart before: the solvers go on from what they had."""
    settings, said = {**SHORT, "steps": 5, "voices": [VOICE]}, []
    with predictions_apart():
        expected = opened(files)(PROMPT, **settings)
        shortage = Shortage(monkeypatch, FusionBlock, "forward", {at})
        pipeline = opened(files, said, memory=budget_for(files, resident, **settings))
        assert same(pipeline(PROMPT, **settings), expected)
    assert shortage.calls > 5 * 4 * 6
    assert sum(sentence.startswith("Out of memory") for sentence in said) == 1
    assert len(pipeline.components.plan.backbone.streamed) == 9 - resident // 2


@pytest.mark.usefixtures("_latents_only")
def test_a_step_that_runs_out_twice_is_one_sentence(files, gpu, monkeypatch):
    Shortage(monkeypatch, FusionBlock, "forward", {9, 10})
    with pytest.raises(
        TooLittleMemoryError, match="too little free memory on cuda for denoising: make the clip smaller"
    ):
        opened(files)(PROMPT, **SHORT)


@pytest.mark.usefixtures("_latents_only")
def test_with_all_blocks_streamed_and_predictions_apart_nothing_is_left_to_try(files, gpu, monkeypatch):
    monkeypatch.setattr(stages, "BATCH_TOKENS", 0)
    pipeline = opened(files)
    pipeline.components._ceilings["backbone"] = 1
    shortage = Shortage(monkeypatch, FusionBlock, "forward", {9})
    with pytest.raises(TooLittleMemoryError, match=r"for denoising, even with all blocks streamed: .*--memory"):
        pipeline(PROMPT, **SHORT)
    assert shortage.calls == 9


@pytest.mark.usefixtures("_latents_only")
def test_a_backbone_that_does_not_go_onto_the_gpu_is_loaded_once_more(files, gpu, monkeypatch):
    expected, said, calls = opened(files)(PROMPT, **SHORT), [], []
    original = memory.load_backbone

    def load(*args, **options):
        calls.append(len(options["in_ram"]))
        if len(calls) in (1, 3, 4):
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return original(*args, **options)

    monkeypatch.setattr(memory, "load_backbone", load)
    assert same(opened(files, said)(PROMPT, **SHORT), expected)
    assert calls == [0, 5]
    assert "Out of memory while denoising: once more with the backbone streamed, 4 of 9 blocks resident." in said
    with pytest.raises(TooLittleMemoryError):
        opened(files)(PROMPT, **SHORT)


@pytest.mark.usefixtures("_latents_only")
def test_a_gpu_that_has_less_than_it_seems_is_met_in_every_stage(files, gpu, monkeypatch):
    """The played GPU really runs out: it holds 10 MB, and says that there are 100."""
    monkeypatch.setattr(stages, "BATCH_TOKENS", 0)
    expected = opened(files)(PROMPT, **SHORT)
    said = []
    pipeline = opened(files, said)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda *_: (100 * MB - gpu.used, 100 * MB))
    gpu.total = gpu.limit = 10 * MB
    clips = [pipeline(PROMPT, **SHORT) for _ in range(2)]
    assert all(same(clip, expected) for clip in clips)
    assert sum(sentence.startswith("Out of memory") for sentence in said) == 1  # the second clip knows


def test_errors_that_are_none_of_memory_go_through(files, gpu, monkeypatch):
    Shortage(monkeypatch, FusionBlock, "forward", {9}, RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        opened(files)(PROMPT, **SHORT)


# ---------------------------------------------------------------- the first step


@pytest.mark.usefixtures("_latents_only")
def test_the_time_to_the_first_step_is_said_and_there_to_read(files, monkeypatch):
    now = iter(range(1000))
    monkeypatch.setattr(clock.time, "monotonic", lambda: float(next(now)))
    said, steps = [], []
    pipeline = NavaPipeline.from_files(files, device="cpu", say=said.append)
    pipeline(PROMPT, **SHORT, callback=lambda step, *_: steps.append((step, dict(pipeline.timing))))
    (sentence,) = (s for s in said if s.startswith("First step"))
    timing = pipeline.timing
    assert sentence == (
        f"First step after {timing['first_step']:.1f} s: {steps[0][1]['loading']:.1f} s loading, "
        f"{timing['encoding']:.1f} s encoding, {timing['step']:.1f} s for the step itself."
    )
    assert [step for step, _ in steps] == [1, 2]
    assert steps[0][1]["first_step"] >= steps[0][1]["loading"] + timing["encoding"] + timing["step"]
    assert timing["encoding"] == 1.0  # between two looks at the clock
