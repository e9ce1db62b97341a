"""NavaParallel in ComfyUI: its MODEL samples as the one it was made of, LoRAs reach the workers, runs can stop."""

import os
import signal
import threading

import pytest
import torch
from comfy_host import import_comfyui, pack_module

import_comfyui()
pytest.importorskip("ray", reason="NavaParallel needs the package ray")

import comfy.model_management  # noqa: E402
import comfy.sd  # noqa: E402
from safetensors.torch import save_file  # noqa: E402

host_model = pack_module("nodes.host.model")
host_parallel = pack_module("nodes.host.parallel")
host_latents = pack_module("nodes.host.latents")
guiders = pack_module("nodes.host.guider")
sampling = pack_module("nava_core.sampling")
checkpoint = pack_module("nava_core.checkpoint")
cluster = pack_module("nava_core.parallel.cluster")
geometry = pack_module("nava_core.geometry")
convert = pack_module("nava_core.convert").convert

STEPS, SEED = 3, 11


@pytest.fixture(scope="module", autouse=True)
def ray():
    with cluster.connected(cpus=2):
        yield


@pytest.fixture(autouse=True)
def inference():
    """As ComfyUI runs nodes."""
    with torch.inference_mode():
        yield


@pytest.fixture(scope="module")
def path(small_models, tmp_path_factory):
    """The small backbone with a hundredth of its velocities: the full ones blow rounding errors up, step by step."""
    with checkpoint.open_checkpoint(small_models["backbone"]) as source:
        weights = {f"backbone.{name}": source.read(name) for name in source}
        metadata = source.info.metadata
    for name in ("head", "head_audio"):
        weights[f"backbone.{name}.head.weight"] *= 0.004
    path = tmp_path_factory.mktemp("backbone") / "small.safetensors"
    save_file(weights, path, metadata=metadata)
    return path


@pytest.fixture(scope="module")
def patcher(path):
    return host_model.load_backbone(str(path))


@pytest.fixture(scope="module")
def parallel(patcher):
    return host_parallel.over_workers(patcher, 2, "1x2", "replicated")


@pytest.fixture(scope="module")
def positive(patcher):
    generator = torch.Generator().manual_seed(3)
    context = torch.randn(1, 20, patcher.model.diffusion_model.config.text_dim, generator=generator)
    voice = torch.randn(1, 2, 192, generator=generator)
    return [[context, {host_model.TIMBRE: voice, host_model.TIMBRE_POSITIONS: torch.tensor([[3, 9]])}]]


def run(patcher, positive, mode="video+audio", given_frame=False):
    latent = host_latents.empty_latent(geometry.ClipGeometry(0.5, 96, 80, mode))
    if given_frame:
        video, audio = latent["samples"].unbind()
        masks = [torch.ones_like(video[:, :1]), torch.ones_like(audio[:, :1])]
        masks[0][:, :, 0] = 0
        latent["noise_mask"] = type(latent["samples"])(masks)
    guider = guiders.make_guider(patcher, positive, None, sampling.Guidance())
    out = guiders.sample(guider, latent, SEED, guiders.unipc_sampler(), sampling.flow_sigmas(STEPS))["samples"]
    return out.unbind()


def repeat(times, function, *arguments):
    for _ in range(times):
        function(*arguments)


def assert_equal(first, second):
    for a, b in zip(first, second, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


def workers_of(parallel):
    return parallel.model.diffusion_model.workers


@pytest.mark.parametrize("kind", [{}, {"mode": "audio"}, {"mode": "video"}, {"given_frame": True}], ids=str)
def test_a_run_equals_one_process_and_all_workers_take_part(patcher, parallel, positive, kind):
    before = workers_of(parallel).start().ask("total_passes")
    assert_equal(run(parallel, positive, **kind), run(patcher, positive, **kind))
    predictions = 4 if kind in ({}, {"given_frame": True}) else (3 if kind["mode"] == "audio" else 2)
    after = workers_of(parallel).workers.ask("total_passes")
    assert [a - b for a, b in zip(after, before, strict=True)] == [predictions * STEPS] * 2


def test_all_predictions_of_a_step_go_out_together(parallel, positive, monkeypatch):
    counts = []
    run_together = workers_of(parallel).run_together

    def counted(passes, check):
        counts.append([each["cross_modal"] for each in passes])
        return run_together(passes, check)

    monkeypatch.setattr(workers_of(parallel), "run_together", counted)
    run(parallel, positive)
    assert [len(each) for each in counts] == [4] * STEPS
    assert all(each.count(False) == 1 for each in counts)


def test_it_has_no_weights_and_two_runs_keep_the_workers(parallel, positive):
    assert not list(parallel.model.parameters())
    first = run(parallel, positive)
    pids = [about["pid"] for about in workers_of(parallel).workers.about]
    assert_equal(run(parallel, positive), first)
    assert [about["pid"] for about in workers_of(parallel).workers.about] == pids


def test_an_interrupted_run_is_followed_by_a_good_one(parallel, patcher, positive, monkeypatch):
    calls = []
    run_together = workers_of(parallel).run_together

    def interrupted(passes, check):
        calls.append(1)
        if len(calls) == 2:
            comfy.model_management.interrupt_current_processing()
            check()
        return run_together(passes, check)

    monkeypatch.setattr(workers_of(parallel), "run_together", interrupted)
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        run(parallel, positive)
    assert workers_of(parallel).workers is None
    assert_equal(run(parallel, positive), run(patcher, positive))


def test_an_interruption_between_two_steps_ends_the_workers_too(parallel, positive):
    latent = host_latents.empty_latent(geometry.ClipGeometry(0.5, 96, 80))
    guider = guiders.make_guider(parallel, positive, None, sampling.Guidance())

    def stop(*_):
        raise comfy.model_management.InterruptProcessingException

    samples = host_latents.comfy.nested_tensor.NestedTensor(latent["samples"].unbind())
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        guider.sample(samples, samples, guiders.unipc_sampler(), sampling.flow_sigmas(STEPS), callback=stop)
    assert workers_of(parallel).workers is None


def test_a_worker_lost_in_a_run_is_a_sentence_and_the_next_run_is_good(parallel, patcher, positive):
    pids = [about["pid"] for about in workers_of(parallel).start().about]
    threading.Timer(0.3, os.kill, (pids[1], signal.SIGKILL)).start()
    with pytest.raises(RuntimeError, match="A worker was lost"):
        repeat(1000, run, parallel, positive)
    assert_equal(run(parallel, positive), run(patcher, positive))


def test_loras_reach_the_workers(patcher, positive, caplog):
    generator = torch.Generator().manual_seed(8)
    lora = {}
    for layer in ("double_blocks_0_self_attn_q_audio", "single_blocks_1_ffn_0"):
        weight = patcher.model.diffusion_model.get_parameter(
            {"d": "double_blocks.0.self_attn.q_audio.weight", "s": "single_blocks.1.ffn.0.weight"}[layer[0]]
        )
        lora[f"lora_unet_{layer}.lora_down.weight"] = torch.randn(4, weight.shape[1], generator=generator) * 0.3
        lora[f"lora_unet_{layer}.lora_up.weight"] = torch.randn(weight.shape[0], 4, generator=generator) * 0.3
        lora[f"lora_unet_{layer}.alpha"] = torch.tensor(2.0)
    changed, _ = comfy.sd.load_lora_for_models(patcher, None, lora, 0.8, 0)
    distant = host_parallel.over_workers(changed, 2, "2x1", "replicated")
    with caplog.at_level("INFO"):
        got = run(distant, positive)
    assert_equal(got, run(changed, positive))
    assert max((a - b).abs().max() for a, b in zip(got, run(patcher, positive), strict=True)) > 1e-4
    assert "2 weights changed by LoRAs, acknowledged by 2 of 2 workers." in caplog.text
    workers_of(distant).close()


def test_loras_on_fp8_weights_are_those_of_one_process(path, positive):
    """The host rounds an fp8 weight with a LoRA by chance; the workers' weights are the very same."""
    patcher = host_model.load_backbone(str(path), "fp8")
    generator, lora = torch.Generator().manual_seed(8), {}
    rows, columns = patcher.model.diffusion_model.get_parameter("single_blocks.1.ffn.0.weight").shape
    lora["lora_unet_single_blocks_1_ffn_0.lora_down.weight"] = torch.randn(4, columns, generator=generator) * 0.1
    lora["lora_unet_single_blocks_1_ffn_0.lora_up.weight"] = torch.randn(rows, 4, generator=generator) * 0.1
    changed, _ = comfy.sd.load_lora_for_models(patcher, None, lora, 1.0, 0)
    distant = host_parallel.over_workers(changed, 2, "2x1", "replicated")
    got = run(distant, positive)
    expected = run(changed, positive)
    assert_equal(got, expected)
    assert max((a - b).abs().max() for a, b in zip(run(patcher, positive), expected, strict=True)) > 1e-4


def test_quantised_weights_with_a_lora(path, positive, tmp_path):
    """Read by the workers as they are, the LoRA rounded there as the host rounds it."""
    file = convert(path, tmp_path / "nvfp4.safetensors", dtype="nvfp4", protected=["single_blocks.1.ffn.2"]).path
    patcher = host_model.load_backbone(str(file))
    generator = torch.Generator().manual_seed(8)
    name = "diffusion_model.double_blocks.0.self_attn.q"
    lora = {f"{name}.lora_A.weight": torch.randn(4, 64, generator=generator)}
    lora[f"{name}.lora_B.weight"] = torch.randn(64, 4, generator=generator)
    changed, _ = comfy.sd.load_lora_for_models(patcher, None, lora, 0.8, 0)
    distant = host_parallel.over_workers(changed, 2, "2x1", "replicated")
    got = run(distant, positive)
    assert workers_of(distant).dtype is patcher.model.get_dtype_inference()
    comfy.model_management.load_models_gpu([changed], force_full_load=True)
    wanted = run(changed, positive)
    assert_equal(got, wanted)
    assert max((a - b).abs().max() for a, b in zip(run(patcher, positive), wanted, strict=True)) > 1e-4
    workers_of(distant).close()


def test_what_cannot_be_is_said_at_the_node(patcher, parallel):
    with pytest.raises(ValueError, match="2 attention heads cannot be shared evenly by 3 workers"):
        host_parallel.over_workers(patcher, 3, "1x3", "replicated")
    with pytest.raises(ValueError, match="through NAVA Parallel already"):
        host_parallel.over_workers(parallel, 2, "auto", "replicated")
    replaced = patcher.clone()
    replaced.set_model_patch_replace(lambda args, extra: extra["original_block"](args), "dit", "double_block", 0)
    with pytest.raises(ValueError, match="take them off"):
        host_parallel.over_workers(replaced, 2, "auto", "replicated")
