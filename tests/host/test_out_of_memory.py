"""Memory that runs out while a clip is sampled, a prompt or a first frame encoded: once more in a smaller form with the
same result, else one sentence; the next run works. The error is PyTorch's own, raised where it is told to."""

import gc
import logging
import weakref

import pytest
import torch
from comfy_host import import_comfyui, pack_module

import_comfyui()

import comfy.model_management as manager  # noqa: E402
import comfy.nested_tensor  # noqa: E402
import comfy.sample  # noqa: E402
import comfy.samplers  # noqa: E402
import comfy.sd  # noqa: E402
import comfy_extras.nodes_easycache as easycache  # noqa: E402
from fake_gpu import CPU, GPUS, FakeGPUs, nothing_loaded  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402

host_model = pack_module("nodes.host.model")
guiders = pack_module("nodes.host.guider")
host_latents = pack_module("nodes.host.latents")
video_vae = pack_module("nodes.host.video_vae")
text_encoder = pack_module("nodes.host.text_encoder")
out_of_memory = pack_module("nodes.host.out_of_memory")
sampling = pack_module("nava_core.sampling")
geometry = pack_module("nava_core.geometry")
TooLittleMemoryError = pack_module("nava_core.explain").TooLittleMemoryError

STEPS = 3
OWN = "NavaModel"


@pytest.fixture(autouse=True)
def inference():
    with torch.inference_mode(), nothing_loaded():
        yield


@pytest.fixture
def gpu(monkeypatch):
    return FakeGPUs(monkeypatch)


@pytest.fixture(scope="module")
def backbone(small_models, tmp_path_factory):
    """The small backbone with a tenth of its velocities, whose full ones blow rounding errors up."""
    weights = load_file(small_models["backbone"])
    for name in ("head", "head_audio"):
        weights[f"backbone.{name}.head.weight"] *= 0.1
    path = tmp_path_factory.mktemp("memory") / "backbone.safetensors"
    with host_model.open_checkpoint(small_models["backbone"]) as source:
        save_file(weights, path, metadata=source.info.metadata)
    return str(path)


@pytest.fixture
def patcher(gpu, backbone):
    return host_model.load_backbone(backbone)


@pytest.fixture(scope="module")
def latent():
    return host_latents.empty_latent(geometry.ClipGeometry(0.5, 96, 80, "video+audio"))


@pytest.fixture(scope="module")
def given(latent):
    generator = torch.Generator().manual_seed(6)
    parts = [torch.randn(part.shape, generator=generator) for part in latent["samples"].unbind()]
    masks = [torch.ones(part.shape[0], 1, *part.shape[2:]) for part in parts]
    masks[0][:, :, 0] = 0
    nest = comfy.nested_tensor.NestedTensor
    return {"samples": nest(parts), "noise_mask": nest(masks)}


def prompt(patcher, voices=True):
    generator = torch.Generator().manual_seed(3)
    context = torch.randn(1, 20, patcher.model.diffusion_model.config.text_dim, generator=generator)
    extras = {
        host_model.TIMBRE: torch.randn(1, 2, 192, generator=generator),
        host_model.TIMBRE_POSITIONS: torch.tensor([[3, 9]]),
    }
    return [[context, extras if voices else {}]]


def run(patcher, latent, *, stock=False, callback=None, steps=STEPS):
    """(picture, sound) of a run by this pack's sampler, or by a stock guider and Euler."""
    if not stock:
        guider = guiders.make_guider(patcher, prompt(patcher), None, sampling.Guidance())
        sampler = guiders.unipc_sampler()
    else:
        guider = comfy.samplers.CFGGuider(patcher)
        guider.set_conds(prompt(patcher, False), [[prompt(patcher)[0][0] * 0, {}]])
        guider.set_cfg(3.0)
        sampler = comfy.samplers.sampler_object("euler_ancestral")
    noise = comfy.sample.prepare_noise(latent["samples"], 5)
    mask = latent.get("noise_mask")
    sigmas = sampling.flow_sigmas(steps)
    out = guider.sample(noise, latent["samples"], sampler, sigmas, mask, callback, disable_pbar=True, seed=5)
    return [part.clone() for part in out.unbind()]


class Runs:
    """Counts the calls of a function, and raises ``error`` at those that it is told."""

    def __init__(self, patch, owner, name, error=torch.OutOfMemoryError):
        self.calls, self.at, self.original = 0, (), getattr(owner, name)
        self.error = error

        def watching(*args, **kwargs):
            self.calls += 1
            if self.calls in self.at:
                raise self.error("no memory here")
            return self.original(*args, **kwargs)

        patch.setattr(owner, name, watching)

    def fail_at(self, *calls):
        self.at = [self.calls + call for call in calls]


@pytest.fixture
def blocks(monkeypatch):
    """Calls of a block's feed-forward, where tokens have been changed in place already."""
    return Runs(monkeypatch, pack_module("nava_core.backbone.layers").FeedForward, "forward")


def said(caplog):
    return [record.message for record in caplog.records if "out of memory" in record.message]


def same(first, second, tolerance=0.0):
    for ours, theirs in zip(first, second, strict=True):
        assert ours.std() > 0.1
        assert (ours - theirs).abs().max() <= tolerance


# ---------------------------------------------------------------- in the network


@pytest.mark.parametrize("stock", [False, True])
@pytest.mark.parametrize("kind", ["latent", "given"])
def test_the_same_clip_after_a_pass_ran_out(patcher, blocks, monkeypatch, caplog, request, kind, stock):
    """Bit for bit, where predictions were apart already."""
    monkeypatch.setattr(host_model, "BATCH_TOKENS", 0)
    latent = request.getfixturevalue(kind)
    steps = []
    expected = run(patcher, latent, stock=stock)
    assert not said(caplog)
    calls = blocks.calls
    blocks.fail_at(calls // 2 + 2)
    same(run(patcher, latent, stock=stock, callback=lambda step, *_: steps.append(step)), expected)
    assert steps == list(range(STEPS))
    assert len(said(caplog)) == 1
    assert "in a pass" in said(caplog)[0]
    assert calls < blocks.calls - calls < 1.5 * calls  # the pass, not the run
    same(run(patcher, latent, stock=stock), expected)


@pytest.mark.parametrize("stock", [False, True])
def test_predictions_come_apart(patcher, blocks, monkeypatch, latent, stock):
    """And stay so for the rest of the run, but not for the next."""
    monkeypatch.setattr(host_model, "BATCH_TOKENS", 10**9)
    batches = []
    original = host_model.HostBackbone._predict

    def watching(self, x, *args, **kwargs):
        batches.append(x[0].shape[0])
        return original(self, x, *args, **kwargs)

    monkeypatch.setattr(host_model.HostBackbone, "_predict", watching)
    expected = run(patcher, latent, stock=stock)
    together = batches.copy()
    assert max(together) > 1
    batches.clear()
    blocks.fail_at(1)
    same(run(patcher, latent, stock=stock), expected, 5e-4)  # a batch's sums round otherwise
    assert batches == [together[0], *[1] * sum(together)]
    batches.clear()
    run(patcher, latent, stock=stock)
    assert batches == together


def test_a_step_caches_state_is_right_after_it(patcher, blocks, latent, caplog):
    """EasyCache counts on every pass that it lets through."""
    cached = easycache.EasyCacheNode.execute(patcher, 0.9, 0.1, 0.95, False).args[0]
    run(patcher, latent, steps=8)
    whole, blocks.calls = blocks.calls, 0
    expected = run(cached, latent, steps=8)
    assert 0 < blocks.calls < whole  # it lets some through
    for call in (1, blocks.calls // 2, blocks.calls):
        caplog.clear()
        blocks.fail_at(call)
        same(run(cached, latent, steps=8), expected, 5e-4)
        assert said(caplog)


def test_more_is_streamed_and_other_models_leave(gpu, patcher, blocks, latent, small_models, caplog):
    """The text encoder had stayed on the GPU, for there was room for it."""
    clip = text_encoder.load_text_encoder(small_models["text_encoder"])
    text_encoder.encode_ids(clip, [5, 6, 1])
    expected = run(patcher, latent)
    assert gpu.models(GPUS[0]) == {OWN, type(clip.cond_stage_model).__name__}
    assert patcher.loaded_size() == patcher.model_size()
    blocks.fail_at(3)
    same(run(patcher, latent), expected, 5e-4)
    assert gpu.models(GPUS[0]) <= {OWN}
    assert patcher.loaded_size() < patcher.model_size()
    same(run(patcher, latent), expected)  # and the host fills the GPU again
    assert patcher.loaded_size() == patcher.model_size()


def test_one_sentence_where_it_does_not_fit_at_all(gpu, patcher, blocks, latent, caplog):
    expected = run(patcher, latent)
    blocks.fail_at(2, 4)
    with pytest.raises(TooLittleMemoryError) as error:
        run(patcher, latent)
    text = str(error.value)
    assert "96x80, 0.5 s with sound" in text
    assert "weight_dtype to fp8" in text
    assert "\n" not in text
    assert len(said(caplog)) == 1
    assert not gpu.models(GPUS[0])
    model = patcher.model
    assert (model._run, model._clean, model._one_by_one, model.current_patcher) == (None, None, False, None)
    same(run(patcher, latent), expected)


def test_fp8_is_not_advised_to_who_has_it(gpu, backbone, blocks, latent, tmp_path):
    convert = pack_module("nava_core.convert").convert
    convert(backbone, tmp_path / "fp8.safetensors")
    patcher = host_model.load_backbone(str(tmp_path / "fp8.safetensors"))
    blocks.fail_at(2, 4)
    with pytest.raises(TooLittleMemoryError) as error:
        run(patcher, latent)
    assert "fp8" not in str(error.value)


@pytest.mark.parametrize("error", [manager.InterruptProcessingException, ValueError, RuntimeError])
def test_anything_else_passes(patcher, blocks, latent, caplog, error):
    expected = run(patcher, latent)
    calls = blocks.calls
    blocks.error = lambda text: error()
    blocks.fail_at(4)
    with pytest.raises(error):
        run(patcher, latent)
    assert blocks.calls == calls + 4  # not tried again
    assert not said(caplog)
    same(run(patcher, latent), expected)


# ---------------------------------------------------------------- beside the network


@pytest.mark.parametrize("where", ["combine", "load"])
def test_a_run_begins_again(patcher, monkeypatch, latent, caplog, where):
    expected = run(patcher, latent)
    if where == "combine":
        place = Runs(monkeypatch, sampling.Guidance, "combine")
        place.fail_at(2)
    else:
        place = Runs(monkeypatch, manager, "load_models_gpu")
        place.fail_at(1)
    steps, fresh = [], []
    process = comfy.samplers.process_conds

    def watching(model, noise, conds, *args, **kwargs):
        fresh.append(not any(cond["model_conds"] for each in conds.values() for cond in each))
        return process(model, noise, conds, *args, **kwargs)

    monkeypatch.setattr(comfy.samplers, "process_conds", watching)
    same(run(patcher, latent, callback=lambda step, *_: steps.append(step)), expected)
    assert fresh == [True] * (2 if where == "combine" else 1)
    assert steps == ([0] if where == "combine" else []) + list(range(STEPS))
    assert "the run begins again" in said(caplog)[0]

    place.fail_at(2, 4) if where == "combine" else place.fail_at(1, 2)
    with pytest.raises(TooLittleMemoryError):
        run(patcher, latent)
    same(run(patcher, latent), expected)


# ---------------------------------------------------------------- text


@pytest.fixture
def clip(gpu, small_models):
    return text_encoder.load_text_encoder(small_models["text_encoder"])


def encoded(clip):
    ids = text_encoder.prompt_tokenizer(clip)("A bell rings.").ids
    return text_encoder.encode_ids(clip, ids), text_encoder.encode_conditioning(clip, ids)[0][0]


def with_lora(clip):
    name = "transformer.encoder.block.0.layer.0.SelfAttention.q"
    weight = clip.cond_stage_model.umt5xxl.get_submodule(name).weight
    generator = torch.Generator().manual_seed(1)
    up, down = (torch.randn(shape, generator=generator) for shape in ((weight.shape[0], 4), (4, weight.shape[1])))
    key = f"text_encoders.umt5xxl.{name}"
    file = {f"{key}.lora_A.weight": down, f"{key}.lora_B.weight": up * 0.1}
    changed = comfy.sd.load_lora_for_models(None, clip, file, 0, 1.0)[1]
    assert changed.patcher.patches
    return changed


def test_a_prompt_is_encoded_on_the_cpu_once(gpu, clip, monkeypatch, caplog):
    clip, plain = with_lora(clip), clip
    expected, unchanged = encoded(clip), encoded(plain)
    assert not torch.equal(expected[0], unchanged[0])
    devices = []
    network = type(clip.cond_stage_model)
    calls = Runs(monkeypatch, network, "encode_token_weights")

    def watching(self, tokens, original=network.encode_token_weights):
        devices.append(self.umt5xxl.execution_device)
        assert bool(gpu.models(GPUS[0])) == (devices[-1] == GPUS[0])  # the GPU is left to others
        return original(self, tokens)

    monkeypatch.setattr(network, "encode_token_weights", watching)
    for index in range(2):
        calls.fail_at(1 + index)
        for ours, theirs in zip(encoded(clip), expected, strict=True):
            assert torch.equal(ours, theirs)
        assert devices == ([GPUS[0], CPU, GPUS[0]] if index == 0 else [GPUS[0], GPUS[0], CPU])
        assert "encoded on the CPU" in said(caplog)[index]
        devices.clear()
    for ours, theirs in zip(encoded(plain), unchanged, strict=True):
        assert torch.equal(ours, theirs)
    assert devices == [GPUS[0]] * 2


def test_a_prompt_that_fits_nowhere(clip, monkeypatch):
    expected = encoded(clip)
    calls = Runs(monkeypatch, type(clip.cond_stage_model), "encode_token_weights")
    calls.fail_at(1, 2)
    with pytest.raises(TooLittleMemoryError, match="too little free memory to encode the prompt"):
        encoded(clip)
    for ours, theirs in zip(encoded(clip), expected, strict=True):
        assert torch.equal(ours, theirs)


def test_the_copy_on_the_cpu_takes_no_memory_and_is_gone(clip, monkeypatch):
    copies = []
    original = text_encoder.moved_clip

    def watching(clip, device):
        other = original(clip, device)
        weights = zip(clip.cond_stage_model.parameters(), other.cond_stage_model.parameters(), strict=True)
        copies.append(sum(ours.data_ptr() != theirs.data_ptr() for ours, theirs in weights))
        assert other.cond_stage_model is not clip.cond_stage_model
        return other

    monkeypatch.setattr(text_encoder, "moved_clip", watching)
    Runs(monkeypatch, type(clip.cond_stage_model), "encode_token_weights").fail_at(1)
    encoded(clip)
    assert copies == [0]
    gc.collect()
    manager.cleanup_models()
    assert all(loaded.device != CPU for loaded in manager.current_loaded_models)


# ---------------------------------------------------------------- a first frame


def test_a_first_frame(gpu, small_models, monkeypatch, caplog):
    vae = video_vae.load_video_vae(small_models["video_vae"])
    image = torch.rand(1, 64, 96, 3)
    expected = video_vae.encode_video(vae, image)
    calls = Runs(monkeypatch, type(vae.first_stage_model), "encode")
    calls.fail_at(1)
    assert torch.equal(video_vae.encode_video(vae, image), expected)
    assert len(said(caplog)) == 1
    assert "first frame" in said(caplog)[0]
    calls.fail_at(1, 2)
    with pytest.raises(TooLittleMemoryError, match="encoding a first frame of 96x64"):
        video_vae.encode_video(vae, image)
    assert torch.equal(video_vae.encode_video(vae, image), expected)


# ---------------------------------------------------------------- what counts as out of memory


@pytest.mark.parametrize(
    ("error", "counts"),
    [
        (torch.OutOfMemoryError("x"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"), True),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), True),
        (MemoryError(), True),
        (RuntimeError("shapes do not fit"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_which_errors(error, counts):
    attempts = []

    def work():
        attempts.append(1)
        if len(attempts) == 1:
            raise error
        return "done"

    if counts:
        assert out_of_memory.twice(work, work, str) == "done"
    else:
        with pytest.raises(type(error)):
            out_of_memory.twice(work, work, str)
        assert len(attempts) == 1


def test_tensors_of_the_failed_attempt_are_gone_before_the_next():
    seen = []

    def work():
        tensor = torch.zeros(4)
        seen.append(weakref.ref(tensor))
        raise torch.OutOfMemoryError("x")

    def again():
        assert seen[0]() is None
        return 1

    assert out_of_memory.twice(work, again, str) == 1


@pytest.fixture(autouse=True)
def _warnings(caplog):
    caplog.set_level(logging.WARNING)
