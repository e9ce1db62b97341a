"""ComfyUI's own several GPUs (MultiGPU CFG Split, Select Model and CLIP Device) with NAVA's MODEL and CLIP.

The devices are the CPU under several names. To the host they are different ones, so that it clones, schedules and
threads as it does for GPUs; but a tensor on any of them is on the CPU. Which tensor is where is therefore tested
apart, with tensors that have a device and a shape, and no data.
"""

import gc
import threading
import types

import comfy_host
import pytest
import torch
from graphs import text_to_latent
from safetensors.torch import load_file, save_file
from server import Comfy
from torch._subclasses.fake_tensor import FakeTensorMode

comfy_host.import_comfyui()
multigpu = pytest.importorskip("comfy.multigpu", reason="this ComfyUI does not spread predictions over GPUs")

import comfy.model_management  # noqa: E402
import comfy.nested_tensor  # noqa: E402
import comfy.samplers  # noqa: E402
import comfy.sd  # noqa: E402
import comfy_extras.nodes_multigpu as host_nodes  # noqa: E402
from comfy.quant_ops import QuantizedTensor  # noqa: E402

host_model = comfy_host.pack_module("nodes.host.model")
guiders = comfy_host.pack_module("nodes.host.guider")
host_latents = comfy_host.pack_module("nodes.host.latents")
text_encoder = comfy_host.pack_module("nodes.host.text_encoder")
sampling = comfy_host.pack_module("nava_core.sampling")
geometry = comfy_host.pack_module("nava_core.geometry")
convert = comfy_host.pack_module("nava_core.convert").convert
TooLittleMemoryError = comfy_host.pack_module("nava_core.explain").TooLittleMemoryError

STEPS, SEED = 3, 11
DEVICES = [torch.device("cpu"), *(torch.device("cpu", index) for index in (1, 2, 3))]
PREDICTIONS = {0, 1, 2, 3}  # c, u, m, n in the order they are handed to the host
LAYER = "double_blocks.0.self_attn.q"


@pytest.fixture(scope="module", autouse=True)
def inference():
    """As ComfyUI runs nodes."""
    with torch.inference_mode():
        yield


@pytest.fixture(autouse=True)
def devices(monkeypatch):
    """Four devices, the first being the one that the host would use alone."""
    monkeypatch.setattr(
        comfy.model_management, "get_all_torch_devices", lambda exclude_current=False: DEVICES[exclude_current:]
    )
    yield
    comfy.model_management.unload_all_models()
    gc.collect()
    comfy.model_management.cleanup_models()  # which the host's next clone would stumble over


@pytest.fixture(scope="module")
def files(small_models, tmp_path_factory):
    """The small backbone with a tenth of its velocities, whose full ones blow rounding errors up; and its fp8 twin."""
    folder = tmp_path_factory.mktemp("multigpu")
    weights = load_file(small_models["backbone"])
    for name in ("head", "head_audio"):
        weights[f"backbone.{name}.head.weight"] *= 0.1
    with host_model.open_checkpoint(small_models["backbone"]) as source:
        save_file(weights, folder / "plain.safetensors", metadata=source.info.metadata)
    convert(folder / "plain.safetensors", folder / "fp8.safetensors")
    convert(folder / "plain.safetensors", folder / "nvfp4.safetensors", dtype="nvfp4", protected=[LAYER])
    names = ("plain", "fp8", "nvfp4")
    return types.SimpleNamespace(**{name: str(folder / f"{name}.safetensors") for name in names})


@pytest.fixture
def patcher(files):
    return host_model.load_backbone(files.plain)


@pytest.fixture
def seen(monkeypatch):
    """Every call of a network, a prediction at a time: its device, the network, which predictions, the thread."""
    monkeypatch.setattr(host_model, "BATCH_TOKENS", 0)
    calls = []
    original = host_model.HostBackbone._predict

    def watching(self, x, timestep, context, options, **conditions):
        calls.append(
            types.SimpleNamespace(
                device=options.get("multigpu_thread_device", DEVICES[0]),
                network=self,
                predictions=tuple(options["cond_or_uncond"]),
                thread=threading.current_thread(),
                masked=not torch.is_tensor(timestep),
                weight=self.get_submodule(LAYER).weight,
            )
        )
        return original(self, x, timestep, context, options, **conditions)

    monkeypatch.setattr(host_model.HostBackbone, "_predict", watching)
    return calls


def prompt(patcher):
    """A conditioning with two voices: all four predictions are needed."""
    generator = torch.Generator().manual_seed(3)
    context = torch.randn(1, 20, patcher.model.diffusion_model.config.text_dim, generator=generator)
    voices = {
        host_model.TIMBRE: torch.randn(1, 2, 192, generator=generator),
        host_model.TIMBRE_POSITIONS: torch.tensor([[3, 9]]),
    }
    return [[context, voices]]


def empty():
    return host_latents.empty_latent(geometry.ClipGeometry(0.5, 96, 80, "video+audio"))


def with_first_frame():
    generator = torch.Generator().manual_seed(6)
    parts = [torch.randn(part.shape, generator=generator) for part in empty()["samples"].unbind()]
    masks = [torch.ones(part.shape) for part in parts]
    masks[0][:, :, 0] = 0
    nest = comfy.nested_tensor.NestedTensor
    return {"samples": nest(parts), "noise_mask": nest(masks)}


def run(patcher, latent=None, steps=STEPS):
    guider = guiders.make_guider(patcher, prompt(patcher), None, sampling.Guidance())
    sigmas = sampling.flow_sigmas(steps)
    return guiders.sample(guider, latent or empty(), SEED, guiders.unipc_sampler(), sigmas)["samples"].unbind()


def assert_close(first, second, tolerance=1e-5):
    """Picture and sound both."""
    assert len(first) == len(second) == 2
    for ours, theirs in zip(first, second, strict=True):
        assert ours.std() > 0.1
        assert (ours - theirs).abs().max() <= tolerance


def spread(patcher, count):
    return multigpu.create_multigpu_deepclones(patcher, count, reuse_loaded=True)


def device_threads():
    return [thread for thread in threading.enumerate() if "_worker_loop" in thread.name]


def lora(patcher, size=0.2):
    """A LoRA file for one layer, its change ``size`` times the weight's own size."""
    weight = patcher.model.diffusion_model.get_submodule(LAYER).weight
    weight = weight.to(dtype=torch.float32).dequantize() if isinstance(weight, QuantizedTensor) else weight
    generator = torch.Generator().manual_seed(1)
    up, down = (torch.randn(shape, generator=generator) for shape in ((weight.shape[0], 4), (4, weight.shape[1])))
    up *= size * weight.std() / (up @ down).std()
    return {f"diffusion_model.{LAYER}.lora_A.weight": down, f"diffusion_model.{LAYER}.lora_B.weight": up}


def with_lora(patcher, file):
    """As the stock loader makes it."""
    return comfy.sd.load_lora_for_models(patcher, None, file, 1.0, 0)[0]


# --- predictions over devices ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("count", "each"), [(2, [2, 2]), (3, [2, 2]), (4, [1, 1, 1, 1])])
def test_every_prediction_on_its_device_and_the_clip_of_one(patcher, seen, count, each):
    """ComfyUI gives each device as many as the fullest needs, so a third device has nothing to do with four."""
    alone = run(patcher)
    assert len(seen) == 4 * STEPS
    assert {call.network for call in seen} == {patcher.model.diffusion_model}
    seen.clear()
    assert_close(run(spread(patcher, count)), alone)

    assert len(seen) == 4 * STEPS
    networks = {call.device: call.network for call in seen}
    assert networks.keys() == set(DEVICES[: len(each)])
    assert networks[DEVICES[0]] is patcher.model.diffusion_model
    assert len(set(networks.values())) == len({call.thread for call in seen}) == len(each)
    for device, share in zip(DEVICES, each, strict=False):
        there = [call for call in seen if call.device == device]
        assert all(call.network is networks[device] for call in there)
        predictions = [prediction for call in there for prediction in call.predictions]
        assert len(set(predictions)) == share
        assert len(predictions) == share * STEPS
    assert {prediction for call in seen for prediction in call.predictions} == PREDICTIONS


def test_a_clone_owns_its_weights(patcher, seen):
    run(spread(patcher, 2))
    first, second = {call.device: call.weight for call in seen}.values()
    assert first.data_ptr() != second.data_ptr()
    assert torch.equal(first, second)


def test_predictions_that_share_a_batch(patcher, monkeypatch):
    """Short clips, where a device takes its two predictions at once: a batch's sums round otherwise."""
    monkeypatch.setattr(host_model, "BATCH_TOKENS", 10**9)
    assert_close(run(spread(patcher, 2)), run(patcher), 5e-4)


def test_a_first_frame_stays_on_every_device(patcher, seen):
    latent = with_first_frame()
    alone = run(patcher, latent)
    seen.clear()
    many = run(spread(patcher, 4), latent)
    assert_close(many, alone)
    assert len(seen) == 4 * STEPS
    assert all(call.masked for call in seen)
    assert torch.equal(many[0][:, :, 0], latent["samples"].unbind()[0][:, :, 0])


@pytest.mark.parametrize("mode", ["audio", "video"])
def test_one_modality(patcher, seen, mode):
    latent = host_latents.empty_latent(geometry.ClipGeometry(0.5, 96, 80, mode))
    alone, many = run(patcher, latent), run(spread(patcher, 2), latent)
    for ours, theirs in zip(many, alone, strict=True):
        assert (ours - theirs).abs().max() <= 1e-5
    assert len({call.device for call in seen}) == 2


@pytest.mark.parametrize("order", ["before", "after"])
@pytest.mark.parametrize("kind", ["plain", "fp8", "nvfp4"])
def test_a_lora_reaches_every_device(files, seen, kind, order):
    patcher = host_model.load_backbone(getattr(files, kind))
    file, without = lora(patcher), run(patcher)
    alone = run(with_lora(patcher, file))
    assert (alone[0] - without[0]).abs().max() > 1e-3
    seen.clear()
    many = spread(with_lora(patcher, file), 2) if order == "before" else with_lora(spread(patcher, 2), file)
    assert_close(run(many), alone)
    assert len({call.network for call in seen}) == 2
    assert_close(run(patcher), without)  # and leaves with its MODEL


@pytest.mark.parametrize("kind", ["fp8", "nvfp4"])
def test_quantised_weights_are_quantised_on_every_device(files, seen, kind):
    patcher = host_model.load_backbone(getattr(files, kind))
    alone = run(patcher)
    seen.clear()
    assert_close(run(spread(patcher, 2)), alone)
    weights = list({call.device: call.weight for call in seen}.values())
    assert all(isinstance(weight, QuantizedTensor) for weight in weights)
    first, second = ((weight._qdata.view(torch.uint8), weight._params.scale) for weight in weights)
    assert first[0].data_ptr() != second[0].data_ptr()
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])


def test_a_preview_a_step_of_picture_and_sound(patcher, seen, monkeypatch):
    shown = []

    def prepare(model, steps):
        return lambda step, x0, x, total: shown.append((step, x0.unbind()))

    monkeypatch.setattr(guiders.latent_preview, "prepare_callback", prepare)
    run(patcher)
    alone = shown.copy()
    shown.clear()
    run(spread(patcher, 2))
    assert [step for step, _ in shown] == list(range(STEPS))
    for (_, ours), (_, theirs) in zip(shown, alone, strict=True):
        assert_close(ours, theirs)


def test_interrupted_on_a_device_and_run_again(patcher, seen, monkeypatch):
    many = spread(patcher, 2)
    whole = run(many)
    calls = len(seen)
    original = host_model.HostBackbone._predict

    def interrupting(self, *args, **kwargs):
        if len(seen) == calls + 4:  # in the second step
            comfy.model_management.interrupt_current_processing()
        return original(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(host_model.HostBackbone, "_predict", interrupting)
        with pytest.raises(comfy.model_management.InterruptProcessingException):
            run(many)
    assert len(seen) < calls + 4 * STEPS
    assert not device_threads()
    assert patcher.model._clean is None
    assert_close(run(many), whole)


def test_an_error_on_a_device_is_the_runs_and_the_next_run_works(patcher, seen, monkeypatch):
    many = spread(patcher, 2)
    original = host_model.HostBackbone._predict

    def failing(self, x, timestep, context, options, **conditions):
        if options["multigpu_thread_device"] == DEVICES[1]:
            raise ValueError("The sound is gone.")
        return original(self, x, timestep, context, options, **conditions)

    with monkeypatch.context() as patch:
        patch.setattr(host_model.HostBackbone, "_predict", failing)
        with pytest.raises(ValueError, match="The sound is gone"):
            run(many)
    assert not device_threads()
    assert_close(run(many), run(patcher))


@pytest.mark.parametrize("index", [0, 1])
def test_memory_that_runs_out_on_one_device(patcher, seen, monkeypatch, index):
    """The model's own device takes its pass again; of another's the run begins anew. Twice is one sentence."""
    many = spread(patcher, 2)
    whole = run(many)
    original, failures = host_model.HostBackbone.run_pass, []

    def failing(self, *args, options, **kwargs):
        if failures and options["multigpu_thread_device"] == DEVICES[index]:
            raise failures.pop()
        return original(self, *args, options=options, **kwargs)

    monkeypatch.setattr(host_model.HostBackbone, "run_pass", failing)
    seen.clear()
    failures[:] = [torch.OutOfMemoryError("no memory here")]
    assert_close(run(many), whole)
    assert 4 * STEPS < len(seen) <= 4 * STEPS + 4
    failures[:] = [torch.OutOfMemoryError("no memory here")] * 2
    with pytest.raises(TooLittleMemoryError, match="to sample this clip"):
        run(many)
    assert not device_threads()
    failures.clear()
    assert_close(run(many), whole)


def test_another_clip_after_the_first(patcher, seen):
    """Sizes, masks and modes of one run do not stay on a device."""
    many = spread(patcher, 2)
    for latent in (with_first_frame(), host_latents.empty_latent(geometry.ClipGeometry(1.0, 64, 64, "video+audio"))):
        assert_close(run(many, latent), run(patcher, latent))


# --- one part on another device ----------------------------------------------------------------------------------


def moved(patcher, device):
    """What Select Model and CLIP Device do for a GPU (the CPU they treat apart, under any name)."""
    return host_nodes._retarget_patcher(patcher.clone(), device, DEVICES[0])


def test_select_model_device(patcher, seen):
    alone = run(patcher)
    seen.clear()
    there = moved(patcher, DEVICES[2])
    assert_close(run(there), alone)
    assert {call.network for call in seen} == {there.model.diffusion_model}
    assert there.model is not patcher.model
    seen.clear()
    assert_close(run(spread(there, 2)), alone)
    assert {call.device for call in seen} == {DEVICES[2], DEVICES[0]}


def test_select_cpu_for_the_model(patcher, seen):
    (there,) = host_nodes.SelectModelDeviceNode.execute(patcher, "cpu").args
    assert_close(run(there), run(patcher))


@pytest.mark.parametrize("encode", [text_encoder.encode_ids, lambda *of: text_encoder.encode_conditioning(*of)[0][0]])
def test_select_clip_device(small_models, monkeypatch, encode):
    """The text encoder on the chosen device is the one that encodes, with its LoRAs."""
    clip = text_encoder.load_text_encoder(small_models["text_encoder"])
    there = clip.clone()
    there.patcher = moved(clip.patcher, DEVICES[1])  # as the node does it
    assert there.patcher.model is not clip.patcher.model
    encoding = []
    for network in (clip.patcher.model, there.patcher.model):

        def watching(tokens, network=network, original=network.encode_token_weights):
            encoding.append(network)
            return original(tokens)

        monkeypatch.setattr(network, "encode_token_weights", watching)
    ids = text_encoder.prompt_tokenizer(clip)("A bell rings.").ids
    assert torch.equal(encode(there, ids), encode(clip, ids))
    assert encoding == [there.patcher.model, clip.patcher.model]


# --- which tensor is where ---------------------------------------------------------------------------------------


def put(module, mode, device):
    """All weights as tensors without data on ``device``."""
    for child in module.modules():
        for name, weight in child._parameters.items():
            if weight is not None:
                there = mode.from_tensor(torch.empty_like(weight, device="cpu")).to(device)
                child._parameters[name] = torch.nn.Parameter(there, requires_grad=False)
        for name, value in child._buffers.items():
            if value is not None:
                child._buffers[name] = mode.from_tensor(torch.empty_like(value, device="cpu")).to(device)


@pytest.mark.parametrize("masked", [False, True])
def test_no_tensor_is_on_another_device_than_its_network(patcher, seen, monkeypatch, masked):
    """Two GPUs that need not be there: PyTorch refuses any operation between tensors of two devices."""
    gpus = [torch.device("cuda", index) for index in range(2)]
    many = spread(patcher, 2)
    (clone,) = many.get_additional_models_with_key("multigpu")
    monkeypatch.setattr(comfy.model_management, "set_torch_device", lambda device: None)
    monkeypatch.setattr(
        comfy.model_management,
        "get_free_memory",
        lambda _=None, torch_free_too=False: (1e12, 1e12) if torch_free_too else 1e12,
    )
    # how many distinct timesteps there are is in the data
    monkeypatch.setattr(
        torch, "unique", lambda values, **_: (values.flatten()[:2], torch.zeros_like(values, dtype=torch.long))
    )
    shapes = [tuple(part.shape) for part in empty()["samples"].unbind()]
    with torch.inference_mode(False), torch.no_grad(), FakeTensorMode(allow_non_fake_inputs=True) as mode:
        for owner, gpu in zip((many, clone), gpus, strict=True):
            put(owner.model, mode, gpu)
            owner.model.current_patcher = owner
        packed = torch.zeros(1, 1, sum(torch.Size(shape[1:]).numel() for shape in shapes), device=gpus[0])
        guider = guiders.make_guider(many, prompt(many), None, sampling.Guidance())
        many.model.latent_shapes = shapes
        conds = comfy.samplers.process_conds(
            many.model, packed, {name: [c.copy() for c in cond] for name, cond in guider.original_conds.items()},
            gpus[0], packed, torch.ones_like(packed) if masked else None, 0, latent_shapes=shapes,
        )  # fmt: skip
        options = {
            "multigpu_clones": dict(zip(gpus, (many, clone), strict=True)),
            "transformer_options": {"sample_sigmas": torch.ones(STEPS, device=gpus[0])},
        }
        sigma = torch.ones(1, device=gpus[0])
        out = comfy.samplers.calc_cond_batch(many.model, list(conds.values()), packed, sigma, options)
    assert {call.device for call in seen} == set(gpus)
    assert [prediction.device for prediction in out] == [gpus[0]] * 4
    assert all(prediction.shape == packed.shape for prediction in out)


# --- the server --------------------------------------------------------------------------------------------------

FAKE_DEVICES = """
import logging
import comfy.model_management, comfy.multigpu, torch
comfy.model_management.get_all_torch_devices = lambda exclude_current=False: [
    torch.device("cpu"), torch.device("cpu", 1)
][exclude_current:]
submit = comfy.multigpu.MultiGPUThreadPool.submit
def saying(self, device, *args, **kwargs):
    logging.info("work for %s", device)
    submit(self, device, *args, **kwargs)
comfy.multigpu.MultiGPUThreadPool.submit = saying
NODE_CLASS_MAPPINGS = {}
"""


@pytest.fixture(scope="module")
def two_devices(tmp_path_factory, small_models, files):
    """A server that takes its CPU for two."""
    from nava_core.demo import place_in_comfyui

    base = tmp_path_factory.mktemp("two")
    (base / "custom_nodes" / "two_devices").mkdir(parents=True)
    (base / "custom_nodes" / "two_devices" / "__init__.py").write_text(FAKE_DEVICES)
    names = place_in_comfyui({**small_models, "backbone": files.plain}, base / "models")
    with Comfy(base, "--cache-none") as server:
        server.names = {key: path.name for key, path in names.items()}
        yield server


def graph(server, prefix, count):
    made, latent = text_to_latent(server.names, steps=STEPS)
    sampler = made[latent[0]]["inputs"]
    if count > 1:
        sampler["model"] = made.add("MultiGPU_WorkUnits", model=sampler["model"], max_gpus=count)
    made.save_latents(latent, prefix)
    return made


def saved(done, prefix):
    return [
        load_file(next(path for path in done.files if path.name.startswith(f"{prefix}_{part}")))["latent_tensor"]
        for part in ("video", "audio")
    ]


def test_two_devices_on_the_server(two_devices):
    alone = two_devices.ok(graph(two_devices, "alone", 1))
    assert "work for" not in two_devices.said()
    many = two_devices.ok(graph(two_devices, "many", 2), preview_method="latent2rgb")
    assert_close(saved(many, "many"), saved(alone, "alone"), 5e-4)  # batched otherwise
    said = two_devices.said()
    assert said.count("work for cpu:1") == STEPS
    assert said.count("work for cpu\n") == STEPS
    assert len(many.previews) >= 1

    stop = two_devices.run(graph(two_devices, "stop", 2), on_progress=lambda run: two_devices.interrupt())
    assert stop.status == "interrupted"
    again = two_devices.ok(graph(two_devices, "again", 2))
    assert_close(saved(again, "again"), saved(many, "many"))
