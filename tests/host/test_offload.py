"""NAVA Offload: models on other devices, a share of the weights resident, blocks on several devices. The numbers are
those of one device, the host loads, counts and frees, and what came in is not changed. GPUs are CPUs by other names;
which tensor is where is tested with tensors that have a device and no data."""

import contextlib
import gc

import comfy_host
import pytest
import torch

comfy_host.import_comfyui()

import comfy.model_management as manager  # noqa: E402
import fake_dynamic_vram  # noqa: E402
import test_streaming as streaming  # noqa: E402
from fake_gpu import CPU, GPUS, FakeGPUs  # noqa: E402
from torch._subclasses.fake_tensor import FakeTensorMode  # noqa: E402

host_model = comfy_host.pack_module("nodes.host.model")
offload = comfy_host.pack_module("nodes.host.offload")
devices = comfy_host.pack_module("nodes.host.devices")
guiders = comfy_host.pack_module("nodes.host.guider")
host_latents = comfy_host.pack_module("nodes.host.latents")
text_encoder = comfy_host.pack_module("nodes.host.text_encoder")
video_vae = comfy_host.pack_module("nodes.host.video_vae")
audio_vae = comfy_host.pack_module("nodes.host.audio_vae")
parallel = comfy_host.pack_module("nodes.host.parallel")
resident_module = comfy_host.pack_module("nodes.host.resident")
sampling = comfy_host.pack_module("nava_core.sampling")
geometry = comfy_host.pack_module("nava_core.geometry")
runtime = comfy_host.pack_module("nodes.runtime")

Placement = offload.Placement
KINDS = streaming.KINDS
inference, files, load = streaming.inference, streaming.files, streaming.load
everything, inputs = streaming.everything, streaming.inputs


@pytest.fixture
def gpu(monkeypatch):
    """Three GPUs, the first being the one that the host would use alone."""
    gpus = FakeGPUs(monkeypatch, count=3)
    monkeypatch.setattr(offload, "all_gpus", lambda: gpus.devices)
    monkeypatch.setattr(manager, "get_total_memory", lambda device=None, *_: gpus.total.get(device, 2**40))
    return gpus


def place(model, clip=None, vae=None, audio=None, **wanted):
    return offload.placed(model, clip, vae, audio, Placement(**wanted))


def sample(patcher, given_frame=False, callback=None):
    """A short clip with two predictions of each step."""
    generator = torch.Generator().manual_seed(3)
    context = torch.randn(1, 20, patcher.model.diffusion_model.config.text_dim, generator=generator)
    guider = guiders.make_guider(patcher, [[context, {}]], [[context.flip(1), {}]], sampling.Guidance())
    latent = host_latents.empty_latent(geometry.ClipGeometry(0.5, 64, 64, "video+audio"), 1)
    if given_frame:
        video, audio = latent["samples"].unbind()
        masks = [torch.ones_like(video[:, :1]), torch.ones_like(audio[:, :1])]
        masks[0][:, :, 0] = 0
        latent["noise_mask"] = type(latent["samples"])(masks)
    sigmas = sampling.flow_sigmas(3)
    result = guiders.sample(guider, latent, 11, guiders.unipc_sampler(), sigmas)["samples"].unbind()
    return torch.cat([part.flatten() for part in result])


def state_of(patcher):
    """What of a patcher a node could have changed."""
    return {
        "patches": {key: list(each) for key, each in patcher.patches.items()},
        "additional": dict(patcher.additional_models),
        "device": patcher.load_device,
        "share": patcher.share,
        "factory": patcher.cached_patcher_init,
        "weights": {name: id(module) for name, module in patcher.model.named_modules()},
    }


# ---------------------------------------------------------------- a share resident


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("percent", [0, 60, 100])
def test_the_host_loads_no_more_than_the_share(load, kind, percent):
    patcher = load(kind)
    before = state_of(patcher)
    whole = sample(patcher)
    limited, *_, text = place(patcher, resident=percent)
    for _ in range(2):  # after a MODEL that was all loaded, and again
        assert torch.equal(sample(limited), whole)
        loaded = limited.loaded_size()
        assert loaded <= max(percent / 100 * limited.model_size(), streaming.NEVER_LEAVES)
    assert (loaded > streaming.NEVER_LEAVES) == (
        percent > 0
    )  # less than the share: the host keeps room for the weights on their way
    assert state_of(patcher) == before
    assert torch.equal(sample(patcher), whole)
    assert patcher.loaded_size() == patcher.model_size()
    assert ("streamed" in text) == (percent < 100)


def test_the_share_goes_with_clones_and_loras(load):
    limited = place(load("fp32"), resident=70)[0]
    changed = everything(limited.clone())
    sample(changed)
    assert 0 < changed.loaded_size() <= 0.7 * changed.model_size() + streaming.NEVER_LEAVES


def test_dynamic_vram_decides_by_itself_and_that_is_said(gpu, monkeypatch, files):
    fake_dynamic_vram.install(monkeypatch, gpu)
    patcher = host_model.load_backbone(*files["bf16"])
    assert patcher.is_dynamic()
    other, *_, text = place(patcher, resident=30)
    assert other is not patcher
    assert other.is_dynamic()
    assert "dynamic VRAM" in text
    assert "does not change" in text
    assert "does not change" not in place(patcher)[-1]


# ---------------------------------------------------------------- blocks on several devices


SPREADS = ("gpu:0 50, gpu:1 50", "gpu:1 40, gpu:0 60", "cuda:0 34%, gpu:1 33, gpu:2 33", "gpu:1 50, gpu:2 50")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("blocks", SPREADS)
def test_blocks_on_several_devices_give_the_same_bits(load, kind, blocks):
    patcher = load(kind)
    whole, masked, before = sample(patcher), sample(patcher, given_frame=True), state_of(patcher)
    spread, *_, text = place(patcher, blocks=blocks)
    assert torch.equal(sample(spread), whole)
    assert torch.equal(sample(spread.clone(), given_frame=True), masked)
    parts = host_model.parts_of(spread)
    named = {part.load_device for part in parts if part.model_size()}
    assert named == {device for device, _ in offload.parse_shares(blocks)} | {GPUS[0]}
    assert sum(part.model_size() for part in parts) == patcher.model_size()
    assert all(devices.name_of(device) in text for device in named)
    assert state_of(patcher) == before
    assert torch.equal(sample(patcher), whole)


def test_the_host_loads_and_counts_each_part_where_it_lives(load, gpu):
    spread = place(load("fp32"), blocks="gpu:0 30, gpu:1 70")[0]
    sample(spread)
    for part in host_model.parts_of(spread):
        assert gpu.loaded(part.load_device) == part.model_size() > 0


@pytest.mark.parametrize("kind", KINDS)
def test_too_little_memory_on_each_device(load, gpu, kind):
    patcher = load(kind)
    whole = sample(patcher)
    patcher.detach()
    spread = place(patcher, blocks="gpu:0 50, gpu:1 50")[0]
    for part in host_model.parts_of(spread):
        gpu.total[part.load_device] = manager.minimum_inference_memory() + 0.8 * part.model_size()
    assert torch.equal(sample(spread), whole)
    for part in host_model.parts_of(spread):
        assert 0 < part.loaded_size() < part.model_size()


@pytest.mark.parametrize("share", [2, 0.5])
def test_loras_reach_every_part(load, share):
    patcher = everything(load("fp32"))
    whole = sample(patcher)
    patcher.detach()
    spread = place(patcher, blocks="gpu:0 50, gpu:1 50", resident=100 if share == 2 else 50)[0]
    assert sum(len(part.patches) for part in host_model.parts_of(spread)) == len(patcher.patches)
    assert all(part.patches for part in host_model.parts_of(spread))
    assert torch.equal(sample(spread), whole)
    without = sample(load("fp32"))
    assert not torch.equal(without, whole)


def test_previews_and_block_replacements_keep_working(load):
    patcher, seen = load("fp32"), []
    spread = place(patcher, blocks="gpu:0 50, gpu:1 50")[0]

    def replaced(arguments, extra):
        seen.append(arguments["transformer_options"]["block_index"])
        return extra["original_block"](arguments)

    for kind in ("double_block", "single_block"):
        for index in range(2):
            spread.set_model_patch_replace(replaced, "dit", kind, index)
    assert torch.equal(sample(spread), sample(patcher))
    assert {0, 1} <= set(seen)


@pytest.mark.parametrize("kind", ["fp32", "fp8"])
def test_every_tensor_is_where_its_block_is(load, monkeypatch, kind):
    """PyTorch refuses any operation between tensors of two devices; the GPUs need not be there."""
    monkeypatch.setattr(resident_module, "current", lambda device: contextlib.nullcontext())
    names = {GPUS[index]: torch.device("cuda", index) for index in range(3)}
    spread = place(load(kind), blocks="gpu:1 40, gpu:0 30, gpu:2 30")[0]
    parts = host_model.parts_of(spread)
    for part in parts:
        part.partially_load(part.load_device, 2**40)
    places = [each for each in spread.model.modules() if isinstance(each, resident_module.Elsewhere)]
    assert {each.device for each in places} == {GPUS[1], GPUS[2]}
    with torch.inference_mode(False), torch.no_grad(), FakeTensorMode(allow_non_fake_inputs=True) as mode:
        for part in parts:
            streaming.placed(part, mode, names[part.load_device])
        for each in places:
            each.device = names[each.device]
        arguments, conditions = inputs(spread.model, names[GPUS[0]])
        out = spread.model.diffusion_model(*arguments, transformer_options={}, **conditions)
    assert [part.device for part in out] == [names[GPUS[0]]] * 2


def test_that_test_sees_a_state_left_behind(load, monkeypatch):
    monkeypatch.setattr(resident_module, "_state_on", lambda device, state: state)
    with pytest.raises(RuntimeError, match=r"device.*cuda"):
        test_every_tensor_is_where_its_block_is(load, monkeypatch, "fp32")


def test_blocks_leave_with_their_model(load, gpu):
    spread = place(load("fp32"), blocks="gpu:0 50, gpu:1 50")[0]
    sample(spread)
    for device in gpu.devices:
        manager.free_memory(1e30, device)
    assert [gpu.loaded(device) for device in gpu.devices] == [0, 0, 0]
    sample(spread)
    del spread
    gc.collect()
    manager.cleanup_models()
    assert gpu.loaded(GPUS[1]) == 0


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("gpu:0", "not a device and its percents"),
        ("gpu:0 50 50", "not a device and its percents"),
        ("gpu:0 half", "not a device and its percents"),
        ("gpu:0 0, gpu:1 100", "not a device and its percents"),
        ("gpu:9 100", "no device 'gpu:9'"),
        ("gpu:0 50, cuda:0 50", "a second time"),
        ("default 100", "or none"),
        ("gpu:0 50, gpu:1 40", "add up to 90"),
    ],
)
def test_a_text_that_says_no_shares(gpu, text, part):
    with pytest.raises(ValueError, match=part):
        offload.parse_shares(text)


def test_what_does_not_go_together(load, monkeypatch):
    patcher = load("fp32")
    spread = place(patcher, blocks="gpu:0 50, gpu:1 50")[0]
    with pytest.raises(RuntimeError, match="already"):
        place(spread, blocks="gpu:0 50, gpu:1 50")
    with pytest.raises(ValueError, match="leave blocks empty"):
        parallel.over_workers(spread, 2, "auto", "replicated")
    with pytest.raises(ValueError, match="before NAVA Offload"):
        spread.model.state_dict_for_saving({})
    split = patcher.clone()
    split.set_additional_models("multigpu", [patcher.clone()])
    with pytest.raises(RuntimeError, match="MultiGPU CFG Split"):
        place(split, blocks="gpu:0 50, gpu:1 50")
    if hasattr(spread, "deepclone_multigpu"):
        with pytest.raises(RuntimeError, match="does not support multigpu"):
            spread.deepclone_multigpu(GPUS[2])
    distant = patcher.clone()
    monkeypatch.setattr(offload, "DistantModel", host_model.NavaModel)
    with pytest.raises(ValueError, match="NAVA Parallel"):
        place(distant)


def test_another_model_is_refused(gpu):
    class Other:
        model = torch.nn.Linear(1, 1)

    with pytest.raises(ValueError, match="not NAVA"):
        place(Other())


# ---------------------------------------------------------------- encoder and VAEs


@pytest.fixture
def components(small_models, gpu):
    return (
        text_encoder.load_text_encoder(small_models["text_encoder"]),
        video_vae.load_video_vae(small_models["video_vae"]),
        audio_vae.load_audio_vae(small_models["audio_vae"]),
    )


def used(clip, vae, audio):
    """What each gives."""
    latent = torch.randn(1, 48, 2, 2, 2, generator=torch.Generator().manual_seed(1))
    steps = torch.randn(1, 8, 6, 16, generator=torch.Generator().manual_seed(1))
    context = text_encoder.encode_ids(clip, [5, 6, 7, 1])
    return context, video_vae.decode_video(vae, latent), audio_vae.decode_audio(audio, steps)["waveform"]


def where(clip, vae, audio):
    return [each.load_device for each in (clip.patcher, offload.vae_patcher(vae), offload.vae_patcher(audio))]


@pytest.mark.parametrize(("name", "device"), [("cpu", CPU), ("gpu:1", GPUS[1])])
def test_encoder_and_vaes_on_another_device(load, components, name, device):
    before, wanted = where(*components), used(*components)
    _, *others, text = place(load("fp32"), *components, encoder_device=name, vae_device=name)
    assert where(*others) == [device] * 3
    for first, second in zip(wanted, used(*others), strict=True):
        torch.testing.assert_close(first, second, rtol=1e-4, atol=1e-5)
    assert text.count(f"on {name} (as asked for)") == 3
    assert where(*components) == before
    for first, second in zip(wanted, used(*components), strict=True):
        assert torch.equal(first, second)


def test_default_is_where_they_were_loaded_for(load, components):
    _, *others, _ = place(load("fp32"), *components, encoder_device="default", vae_device="default")
    assert all(one is other for one, other in zip(components, others, strict=True))


def test_auto_takes_a_gpu_that_the_backbone_leaves_free(load, components, gpu):
    gpu.total[GPUS[2]] = 2**45  # less than the second has
    _, *others, text = place(load("fp32"), *components)
    assert where(*others)[0] == GPUS[1]
    assert "leaves free" in text
    _, *others, _ = place(load("fp32"), *components, blocks="gpu:0 50, gpu:1 50")
    assert where(*others)[0] == GPUS[2]
    gpu.total[GPUS[1]] = gpu.total[GPUS[2]] = 1000  # too small for any
    _, *others, text = place(load("fp32"), *components)
    assert where(*others)[0] == GPUS[0]
    assert "it leaves when sampling needs the room" in text


def test_encoder_and_vaes_leave_before_weights_are_streamed(load, components, gpu):
    """On one GPU: with room for the backbone and its clip alone."""
    patcher = load("fp32")
    gpu.devices[1:] = []
    _, *others, _ = place(patcher, *components)
    used(*others)
    assert gpu.loaded(GPUS[0]) > 0
    gpu.set_total(manager.minimum_inference_memory() + 1.15 * patcher.model_size())
    sample(patcher)
    assert gpu.models(GPUS[0]) == {"NavaModel"}
    assert patcher.loaded_size() == patcher.model_size()


# ---------------------------------------------------------------- what is said, and the node


def test_figures_are_those_that_the_host_plans_with(load, gpu):
    patcher = load("bf16")
    text = place(patcher)[-1]
    clip = geometry.ClipGeometry(5.0)
    patcher.model.latent_shapes = [(1, *clip.latent_shape), (1, *clip.audio_shape)]
    values = sum(torch.Size(shape).numel() for shape in patcher.model.latent_shapes)
    planned = patcher.model.memory_required([1, 1, values])
    assert f"takes {planned / 2**30:.1f} GB beside the weights" in text
    gpu.total[GPUS[0]] = planned + manager.extra_reserved_memory() + 0.4 * patcher.model_size()
    assert "40% of it stays there" in place(patcher)[-1]
    assert "30% of it stays there" in place(patcher, resident=30)[-1]


def test_the_node_gives_back_what_is_connected(load):
    patcher = load("fp32")
    output = runtime.NavaOffload.execute(patcher, "auto", "auto", -1, "")
    model, clip, vae, audio, text = output.result
    assert model is not patcher
    assert model.model is patcher.model
    assert (clip, vae, audio) == (None, None, None)
    assert text.startswith("Backbone: ")


@pytest.mark.parametrize("kind", KINDS)
def test_blocks_on_several_devices_under_dynamic_vram(monkeypatch, gpu, load, files, kind):
    whole = streaming.predict(load(kind))
    fake_dynamic_vram.install(monkeypatch, gpu)
    patcher = host_model.load_backbone(*files[kind])
    spread = place(patcher, blocks="gpu:0 50, gpu:1 50")[0]
    parts = host_model.parts_of(spread)
    assert [part.is_dynamic() for part in parts] == [True, True]
    for part in parts:
        fake_dynamic_vram.as_mapped(part)
        part.partially_load(part.load_device, 0)
    for options in ({}, {"prefetch_dynamic_vbars": True}):
        assert torch.equal(streaming.predict(spread, **options), whole)
    assert all(part.loaded_size() > 0 for part in parts)
