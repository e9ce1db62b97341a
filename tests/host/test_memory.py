"""The memory figures that the host plans with, against live tensors counted while the real network, samplers and VAEs
run: on the meta device at the released sizes, where nothing is computed, and on the CPU at small ones."""

import json
import math
from dataclasses import asdict

import pytest
import torch
from comfy_host import import_comfyui, pack_module

import_comfyui()

import comfy.ldm.modules.attention as host_attention  # noqa: E402
import comfy.model_management  # noqa: E402
import comfy.nested_tensor  # noqa: E402
import comfy.sample  # noqa: E402
import comfy.samplers  # noqa: E402

from benchmarks.live_memory import LiveMemory  # noqa: E402

host_model = pack_module("nodes.host.model")
memory = pack_module("nodes.host.memory")
guiders = pack_module("nodes.host.guider")
host_latents = pack_module("nodes.host.latents")
quantized = pack_module("nodes.host.quantized")
core = pack_module("nava_core.backbone")
sampling = pack_module("nava_core.sampling")
geometry = pack_module("nava_core.geometry")

WITHIN = 0.05  # of the counted bytes, before the slack for PyTorch's allocator


@pytest.fixture(autouse=True)
def inference():
    """Not in inference mode: there the counter does not see what composite operations make on the way."""
    with torch.no_grad():
        yield


@pytest.fixture
def like_a_gpu(monkeypatch):
    """PyTorch's attention makes its output alone, as on a GPU (without data it shows another way, which makes more)."""

    def output_alone(q, k, v, *_, **__):
        return torch.empty_like(q.transpose(1, 2)).transpose(1, 2)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", output_alone)
    monkeypatch.setattr(host_attention, "optimized_attention", host_attention.attention_pytorch)


@pytest.fixture
def distinct(monkeypatch):
    """How many distinct timesteps there are is in the data, and there is none: 0 and the step's."""
    monkeypatch.setattr(
        torch,
        "unique",
        lambda values, **_: (values.new_empty(2), torch.zeros_like(values, dtype=torch.long)),
    )


def released(dtype=torch.bfloat16, compute=None, operations=None):
    """The released size, in as many blocks as the peak needs, without data."""
    settings = host_model.NavaConfig(asdict(core.BackboneConfig(num_double_layers=1, num_single_layers=1)))
    settings.set_inference_dtype(dtype, compute)
    if operations is not None:
        settings.custom_operations = operations
    with torch.device("meta"):
        return host_model.NavaModel(settings, device="meta")


def released_fp8():
    names = released().diffusion_model.state_dict()
    weights = {}
    for name, weight in names.items():
        weights[name] = weight
        if "_blocks." in name and weight.ndim == 2:
            weights[name] = weight.to(torch.float8_e4m3fn)
            weights[f"{name}_scale"] = weight.new_empty(weight.shape[0], dtype=torch.bfloat16)
    model = released(
        torch.bfloat16, torch.bfloat16, quantized.quantised_operations(torch.bfloat16, torch.device("cpu"))
    )
    model.load_model_weights(weights, "", assign=True)
    return model


def clip(seconds, width=1280, height=704, mode="video+audio"):
    """Shapes of a latent's parts."""
    latent = host_latents.empty_latent(geometry.ClipGeometry(seconds, width, height, mode))
    return [tuple(part.shape) for part in latent["samples"].unbind()]


CLIPS = {
    "1280x704 for 6 s": (1, clip(6)),
    "two of them": (2, clip(6)),
    "10 s": (1, clip(10)),
    "832x480 for 2 s": (1, clip(2, 832, 480)),
    "three of them": (3, clip(2, 832, 480)),
    "256x256 for 1 s": (1, clip(1, 256, 256)),
    "odd sides": (2, clip(0.5, 112, 80)),
    "sound alone": (1, clip(6, mode="audio")),
    "picture alone": (1, clip(6, mode="video")),
}


def packed(shapes, batch):
    return [batch, 1, sum(math.prod(shape[1:]) for shape in shapes)]


def counted_pass(model, batch, shapes, *, masked=False, voices=0, cross_modal=True):
    """Live bytes at the fullest moment of one pass of the real network, beside its weights and inputs."""
    like = {"device": "meta", "dtype": model.get_dtype_inference()}
    parts = [torch.empty(batch, *shape[1:], **like) for shape in shapes]
    context = torch.empty(batch, 512, 4096, **like)
    times = [torch.empty(batch, shape[2], device="meta") for shape in shapes]
    given = {}
    if voices:
        positions = torch.empty(batch, voices, device="meta", dtype=torch.long)
        given = {"timbre": torch.empty(batch, voices, 192, **like), "timbre_positions": positions}
    with LiveMemory() as live:
        live.ignore(*model.parameters(), *parts, context)
        timestep = tuple(times) if masked else torch.empty(batch, device="meta")
        model.diffusion_model(parts, timestep, context, transformer_options={}, cross_modal=cross_modal, **given)
    return live.peak


def planned_pass(model, batch, shapes, masked=False):
    """The model's figure for the same, less the slack."""
    model.latent_shapes = shapes
    model._run = memory.RunSize(tuple((batch, *shape[1:]) for shape in shapes), 4, True) if masked else None
    return model.memory_required(packed(shapes, batch)) / memory.ALLOCATOR_SLACK


@pytest.mark.parametrize("name", CLIPS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_pass(like_a_gpu, dtype, name):
    batch, shapes = CLIPS[name]
    model = released(dtype)
    planned = planned_pass(model, batch, shapes)
    assert planned == pytest.approx(counted_pass(model, batch, shapes), rel=WITHIN)
    with_voices = counted_pass(model, batch, shapes, voices=16, cross_modal=False)
    assert planned == pytest.approx(with_voices, rel=WITHIN)


@pytest.mark.parametrize("name", CLIPS)
def test_a_pass_with_given_parts(like_a_gpu, distinct, name):
    """A frame or a step has a timestep of its own then."""
    batch, shapes = CLIPS[name]
    model = released()
    planned = planned_pass(model, batch, shapes, masked=True)
    assert planned == pytest.approx(counted_pass(model, batch, shapes, masked=True), rel=WITHIN)


@pytest.mark.parametrize("name", ["1280x704 for 6 s", "832x480 for 2 s", "odd sides", "sound alone"])
@pytest.mark.parametrize(
    "weights",
    [
        released_fp8,
        lambda: released(torch.bfloat16, torch.float32),
        lambda: released(torch.float32, torch.bfloat16),
    ],
    ids=["fp8", "bf16 in fp32", "fp32 in bf16"],
)
def test_a_pass_whose_weights_are_made_anew(like_a_gpu, weights, name):
    """Dequantised or cast as they are used; of the cast ones the sound's convolutions are the largest."""
    batch, shapes = CLIPS[name]
    model = weights()
    assert planned_pass(model, batch, shapes) == pytest.approx(counted_pass(model, batch, shapes), rel=WITHIN)


OTHER_ATTENTION = [
    *(("attention_sub_quad", name) for name in CLIPS),
    ("attention_split", "odd sides"),  # of many tokens it refuses what it cannot halve
    ("attention_split", "832x480 for 2 s"),
    ("attention_basic", "odd sides"),  # all scores at once
    ("attention_basic", "256x256 for 1 s"),
]


@pytest.mark.parametrize(("kind", "name"), OTHER_ATTENTION)
def test_a_pass_under_the_hosts_other_attention(like_a_gpu, monkeypatch, kind, name):
    """With as much free as the host keeps, or as its smallest pieces need."""
    batch, shapes = CLIPS[name]
    model = released()
    model.latent_shapes = shapes
    tokens = model._tokens(packed(shapes, batch))
    free = max(comfy.model_management.minimum_inference_memory(), 4.04 * batch * 24 * 2 * 256 * tokens)
    monkeypatch.setattr(
        comfy.model_management,
        "get_free_memory",
        lambda device=None, torch_free_too=False: (free, free) if torch_free_too else free,
    )
    monkeypatch.setattr(host_attention, "optimized_attention", getattr(host_attention, kind))
    assert planned_pass(model, batch, shapes) == pytest.approx(counted_pass(model, batch, shapes), rel=0.1)


# ---------------------------------------------------------------- a whole run


@pytest.fixture(scope="module")
def patcher(small_models):
    return host_model.load_backbone(str(small_models["backbone"]))


def latent(batch=1, masked=False, mode="video+audio", shown=0.0):
    made = host_latents.empty_latent(geometry.ClipGeometry(2, 320, 192, mode), batch)
    if masked:
        parts = [torch.randn(part.shape) for part in made["samples"].unbind()]
        masks = [torch.ones(part.shape[0], 1, *part.shape[2:]) for part in parts]
        masks[0][:, :, 0] = shown
        made = {
            name: comfy.nested_tensor.NestedTensor(each) for name, each in (("samples", parts), ("noise_mask", masks))
        }
    return made


def guider_of(patcher, kind):
    """(guider, predictions of a step)."""
    context = torch.randn(1, 20, patcher.model.diffusion_model.config.text_dim)
    if kind == "stock":
        guider = comfy.samplers.CFGGuider(patcher)
        guider.set_conds([[context, {}]], [[context * 0, {}]])
        guider.set_cfg(3.0)
        return guider, 2
    voices = {host_model.TIMBRE: torch.randn(1, 2, 192), host_model.TIMBRE_POSITIONS: torch.tensor([[3, 9]])}
    return guiders.make_guider(patcher, [[context, voices]], None, sampling.Guidance()), 4


RUNS = {
    "ours": {},
    "with given parts": {"masked": True},
    "with given parts at the level of the rest": {"masked": True, "shown": 2.0**-10},
    "two clips": {"batch": 2},
    "sound alone": {"mode": "audio"},
    "stock": {"kind": "stock"},
    "stock with given parts": {"kind": "stock", "masked": True},
}


def counted_run(patcher, kind="ours", **clip):
    """(live bytes at its fullest moment, the model's figures as the host asked for them: as planned and at least)."""
    made, (guider, _) = latent(**clip), guider_of(patcher, kind)
    noise = comfy.sample.prepare_noise(made["samples"], 1)
    sampler = guiders.unipc_sampler() if kind == "ours" else comfy.samplers.sampler_object("euler")
    asked, original = [], comfy.model_management.load_models_gpu

    def watching(models, memory_required=0, minimum_memory_required=None, **settings):
        asked.append((memory_required, minimum_memory_required))
        original(models, memory_required, minimum_memory_required=minimum_memory_required, **settings)

    with pytest.MonkeyPatch.context() as patch, LiveMemory() as live:
        patch.setattr(comfy.model_management, "load_models_gpu", watching)
        live.ignore(*patcher.model.parameters())
        guider.sample(
            noise, made["samples"], sampler, sampling.flow_sigmas(4), made.get("noise_mask"), disable_pbar=True
        )
    ((planned, least),) = asked
    return live.peak, planned, least


@pytest.mark.parametrize("name", RUNS)
def test_what_a_run_holds_beside_the_network(patcher, monkeypatch, name):
    """At the moment when the network is asked; the network itself is what a pass's figure is for."""
    held, batches = [], []
    live = LiveMemory()

    def answer(self, x, *_):
        held.append(live.current)
        batches.append(x[0].shape[0])
        return [torch.zeros_like(part) for part in x]

    monkeypatch.setattr(host_model.HostBackbone, "_predict", lambda self, x, *_, **__: answer(self, x))
    monkeypatch.setattr(host_model, "BATCH_TOKENS", 0)
    settings = dict(RUNS[name])
    kind = settings.pop("kind", "ours")
    made, (guider, predictions) = latent(**settings), guider_of(patcher, kind)
    noise = comfy.sample.prepare_noise(made["samples"], 1)
    sampler = guiders.unipc_sampler() if kind == "ours" else comfy.samplers.sampler_object("euler")
    mask = made.get("noise_mask")
    with live:
        live.ignore(*patcher.model.parameters())
        guider.sample(noise, made["samples"], sampler, sampling.flow_sigmas(4), mask, disable_pbar=True)
    shapes = tuple(tuple(part.shape) for part in made["samples"].unbind())
    run = memory.RunSize(shapes, predictions, mask is not None)
    planned = memory.run_bytes(run, batches[0], patcher.model.diffusion_model.config, 4)
    assert planned == pytest.approx(max(held), rel=0.1)


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """A network wide enough that, as in the released one, a run is at its fullest inside it."""
    from safetensors.torch import save_file

    config = core.BackboneConfig(
        dim=384, ffn_dim=1536, num_heads=3, text_dim=64, text_len=64, num_double_layers=1, num_single_layers=1
    )
    weights = core.NavaBackbone(config).init_weights(3).state_dict()
    path = tmp_path_factory.mktemp("wide") / "wide.safetensors"
    save_file({f"backbone.{name}": weight for name, weight in weights.items()}, path, metadata=config_metadata(config))
    return host_model.load_backbone(str(path))


def config_metadata(config):
    return {"config": json.dumps(config.to_dict())}


@pytest.mark.parametrize("name", RUNS)
def test_a_whole_run_is_what_the_host_was_told(wide, monkeypatch, name):
    monkeypatch.setattr(host_model, "BATCH_TOKENS", 0)
    monkeypatch.setattr(host_attention, "optimized_attention", host_attention.attention_pytorch)
    peak, _, least = counted_run(wide, **RUNS[name])
    assert 0.98 * peak <= least <= 1.15 * peak


# ---------------------------------------------------------------- the VAEs and the text encoder

component_memory = pack_module("nodes.host.component_memory")
video_vae = pack_module("nodes.host.video_vae")
audio_vae = pack_module("nodes.host.audio_vae")
text_encoder = pack_module("nodes.host.text_encoder")
umt5 = pack_module("nava_core.prompt.umt5")


def counted(network, work, *inputs):
    """Live bytes at its fullest moment of ``work(*inputs)``, beside the network's weights and the inputs."""
    with LiveMemory() as live:
        live.ignore(*network.parameters(), *network.buffers(), *inputs)
        work(*inputs)
    return live.peak


def video_network(dtype, widths=video_vae.RELEASED_WIDTHS):
    with torch.device("meta"):
        return video_vae._video_network(widths).to(dtype)


@pytest.fixture
def pytorch_attention_in_vaes(like_a_gpu, monkeypatch):
    import comfy.ldm.modules.diffusionmodules.model as diffusion_model
    import comfy.ldm.wan.vae as wan_vae

    monkeypatch.setattr(wan_vae, "vae_attention", lambda: diffusion_model.pytorch_attention)


SIZES = [(44, 80), (30, 52), (16, 16)]  # in latent pixels
VAE_SLACK = component_memory.ALLOCATOR_SLACK


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("frames", [1, 2, 3, 13, 61])
def test_decoding_frames(pytorch_attention_in_vaes, dtype, size, frames):
    network = video_network(dtype)
    latent = torch.empty(1, 48, frames, *size, device="meta", dtype=dtype)
    planned = component_memory.video_decode_bytes(latent.shape, dtype) / VAE_SLACK
    assert planned == pytest.approx(counted(network, network.decode, latent), rel=0.02)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("frames", [1, 5, 9, 49, 145])
@pytest.mark.parametrize("weights", [torch.bfloat16, torch.float32])
def test_encoding_frames(pytorch_attention_in_vaes, weights, size, frames):
    """As first frames are encoded, in fp32 whatever the weights are; the picture is on the device too."""
    network = video_network(weights)
    video_vae._cast_encoder_weights(network)
    pixels = torch.empty(1, 3, frames, 16 * size[0], 16 * size[1], device="meta")
    planned = component_memory.video_encode_bytes(pixels.shape, torch.float32, weight_dtype=weights) / VAE_SLACK
    assert planned == pytest.approx(counted(network, network.encode, pixels) + pixels.nbytes, rel=0.05)


@pytest.mark.parametrize("widths", [(32, 64), (160, 256)])
def test_video_vaes_of_other_widths(pytorch_attention_in_vaes, widths):
    network = video_network(torch.float32, widths)
    latent = torch.empty(1, 48, 13, 30, 52, device="meta")
    planned = component_memory.video_decode_bytes(latent.shape, torch.float32, widths[1]) / VAE_SLACK
    assert planned == pytest.approx(counted(network, network.decode, latent), rel=0.02)
    pixels = torch.empty(1, 3, 17, 480, 832, device="meta")
    planned = component_memory.video_encode_bytes(pixels.shape, torch.float32, widths[0]) / VAE_SLACK
    assert planned == pytest.approx(counted(network, network.encode, pixels) + pixels.nbytes, rel=0.02)


def audio_network(base, low, high):
    """The host's audio VAE and vocoder of these widths; LTX-2.3's have 128, 1536 and 512."""
    import copy

    import comfy.ldm.lightricks.vae.audio_vae as host_vae

    from nava_core.demo import AUDIO_CONFIG

    config = copy.deepcopy(AUDIO_CONFIG)
    config["audio_vae"]["model"]["params"]["ddconfig"]["ch"] = base
    config["vocoder"]["vocoder"]["upsample_initial_channel"] = low
    config["vocoder"]["bwe"]["upsample_initial_channel"] = high
    with torch.device("meta"):
        network = torch.nn.Module()
        network.autoencoder = host_vae.CausalAudioAutoencoder(config=config["audio_vae"])
        network.vocoder = host_vae.VocoderWithBWE(config=config["vocoder"])
    return network


AUDIO_WIDTHS = [(128, 1536, 512), (16, 128, 64), (128, 128, 64), (16, 1536, 64)]


def test_the_released_audio_vaes_size():
    parameters = sum(weight.numel() for weight in audio_network(*AUDIO_WIDTHS[0]).parameters())
    assert 2 * parameters == pytest.approx(0.35e9, rel=0.05)


@pytest.mark.parametrize("steps", [5, 52, 152, 1500])
@pytest.mark.parametrize("widths", AUDIO_WIDTHS)
def test_decoding_sound(widths, steps):
    network = audio_network(*widths)

    def decode(latent):
        return network.vocoder(network.autoencoder.decode(latent, (1, 2, 4 * steps - 3, 64)).transpose(2, 3))

    latent = torch.empty(1, 8, steps, 16, device="meta")
    planned = component_memory.audio_decode_bytes(network, latent.shape) / VAE_SLACK
    assert planned == pytest.approx(counted(network, decode, latent), rel=0.05)


@pytest.mark.parametrize("frames", [51, 601, 6001])
@pytest.mark.parametrize("widths", AUDIO_WIDTHS)
def test_encoding_sound(widths, frames):
    network = audio_network(*widths)
    mel = torch.empty(1, 2, frames, 64, device="meta")
    planned = component_memory.audio_encode_bytes(network, frames) / VAE_SLACK
    assert planned == pytest.approx(counted(network, network.autoencoder.encode, mel), rel=0.05)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("tokens", [1, 20, 153, 512])
@pytest.mark.parametrize("sections", [1, 2])
def test_encoding_text(like_a_gpu, monkeypatch, dtype, tokens, sections):
    import comfy.ops
    import comfy.text_encoders.t5 as host_t5

    monkeypatch.setattr(host_t5, "optimized_attention_for_device", lambda *_, **__: host_attention.attention_pytorch)
    config = umt5.UMT5Config(num_layers=2)
    settings = {**asdict(config), "dense_act_fn": "gelu_pytorch_tanh", "is_gated_act": True, "model_type": "umt5"}
    with torch.device("meta"):
        network = host_t5.T5(settings, dtype, "meta", comfy.ops.manual_cast)
    embeds = torch.empty(sections, tokens, config.d_model, device="meta")
    mask = torch.empty(sections, tokens, device="meta", dtype=torch.long)
    peak = counted(network, lambda x, m: network(None, m, embeds=x, dtype=torch.float32), embeds, mask)
    planned = component_memory.text_encode_bytes(config, tokens, sections, dtype) / VAE_SLACK
    assert planned == pytest.approx(peak, rel=0.05)


def test_loaded_parts_tell_the_host_these_figures(small_models, monkeypatch):
    """And the host asks with them; objects of the stock loaders keep the host's."""
    video = video_vae.load_video_vae(small_models["video_vae"])
    shape = (1, 48, 3, 4, 6)
    width = video.first_stage_model.decoder.head[0].gamma.shape[0]
    assert video.memory_used_decode(shape, torch.float32) == component_memory.video_decode_bytes(
        shape, torch.float32, width
    )
    asked = []
    monkeypatch.setattr(
        comfy.model_management,
        "load_models_gpu",
        lambda models, memory_required=0, **_: asked.append(memory_required),
    )
    with torch.inference_mode():
        video.decode(torch.zeros(shape))
        video_vae.encode_video(video, torch.rand(1, 64, 96, 3))
    assert asked[0] == video.memory_used_decode(shape, video.vae_dtype)
    encoder = video.first_stage_model.dim
    pixels = (1, 3, 1, 64, 96)
    assert asked[1] == component_memory.video_encode_bytes(pixels, torch.float32, encoder, video.vae_dtype)

    clip = text_encoder.load_text_encoder(small_models["text_encoder"])
    asked.clear()
    with torch.inference_mode():
        text_encoder.encode_ids(clip, [5, 6, 7, 1])
    (needed,) = asked
    stack = clip.cond_stage_model.umt5xxl.transformer
    config = umt5.UMT5Config.from_shapes({name: tuple(w.shape) for name, w in stack.state_dict().items()})
    assert needed == component_memory.text_encode_bytes(config, 4, 1, stack.dtype)

    sound = audio_vae.load_audio_vae(small_models["audio_vae"])
    module = audio_vae.audio_module(sound)
    asked.clear()
    with torch.inference_mode():
        audio_vae.decode_audio(sound, torch.zeros(1, 8, 6, 16))
        audio_vae.encode_audio(sound, {"waveform": torch.zeros(1, 2, 48000), "sample_rate": 48000})
    assert asked[0] == component_memory.audio_decode_bytes(module, (1, 8, 6, 16))
    assert component_memory.audio_encode_bytes(module, 101) in asked
