"""Streaming on a real GPU: the same results, the budget, page-locked memory, and what a step takes.

Skipped where there is none; what can be shown without one is in test_offload and test_memory_plan.
"""

import gc
import json
from dataclasses import asdict

import pytest
import torch
from safetensors.torch import save_file

from benchmarks.backbone import case_inputs, clip_of
from benchmarks.streaming import measure_share, model_in_ram
from nava_core.backbone import BackboneConfig, NavaBackbone
from nava_core.convert import convert
from nava_core.demo import make_small_models
from nava_core.offload import plan, stream_blocks, streaming
from nava_core.pipeline import ModelFiles, NavaPipeline, memory, stages

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")
pytest.importorskip("accelerate")

# 0.3 B parameters: large enough that transfers take time, and small enough for any GPU
CONFIG = BackboneConfig(
    dim=1024, ffn_dim=4096, freq_dim=64, text_dim=64, num_heads=8, num_double_layers=4, num_single_layers=8
)
CLIP = clip_of(320, 192, 7)
MB = 10**6
SLACK = 200 * MB  # the models are small, and so are the kernels' workspaces


@pytest.fixture(autouse=True)
def _tidy():
    yield
    gc.collect()
    torch.cuda.empty_cache()


@pytest.fixture(scope="module", params=["bf16", "fp8"])
def model(request):
    return model_in_ram(CONFIG, "cuda", request.param)


def run(model, case):
    with torch.no_grad():
        outputs = model(**case_inputs(case, CONFIG, CLIP, torch.bfloat16, "cuda"))
    return [None if output is None else output.clone() for output in outputs]


def same(one, other):
    return all((a is b is None) or torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("lock", [True, False])
def test_streamed_equals_resident_bit_for_bit(model, lock):
    cases = ("one timestep", "first frame clean", "interaction off", "audio only")
    stream_blocks(model, "cuda", 1).close()
    resident = {case: run(model, case) for case in cases}
    for share in (0, 0.25, 0.5):
        stream = stream_blocks(model, "cuda", share, lock=lock)
        for _ in range(4):
            for case in cases:
                assert same(run(model, case), resident[case]), (share, case)
        stream.close()
    model.to("cpu")


def test_waiting_weights_are_page_locked_and_free_again(model):
    stream = stream_blocks(model, "cuda", 0)
    weights = [p for block in (*model.double_blocks, *model.single_blocks) for p in block.parameters()]
    assert all(weight.device.type == "cpu" and weight.is_pinned() for weight in weights)
    stream.close()
    assert not any(weight.is_pinned() for weight in weights)
    model.to("cpu")


def test_a_refused_page_lock_leaves_the_gpu_usable(model):
    memory_there = torch.empty(4096, dtype=torch.uint8)
    assert not streaming._register(memory_there.data_ptr() & ~4095, 2**60)
    assert torch.ones(3, device="cuda").sum().item() == 3


def test_a_pass_holds_two_streamed_blocks(model):
    stream = stream_blocks(model, "cuda", 0)
    run(model, "one timestep")
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run(model, "one timestep")
    sizes = [sum(p.nbytes for p in block.parameters()) for block in (*model.double_blocks, *model.single_blocks)]
    peak = torch.cuda.max_memory_allocated() - before
    stream.close()
    stream_blocks(model, "cuda", 1).close()
    run(model, "one timestep")
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run(model, "one timestep")
    work = torch.cuda.max_memory_allocated() - before
    assert peak <= work + sizes[0] + sizes[1] + 16 * MB
    model.to("cpu")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    models = make_small_models(folder, preview_decoder=False)
    state = NavaBackbone(CONFIG, dtype=torch.bfloat16).init_weights().state_dict()
    save_file(state, folder / "wide.safetensors", {"config": json.dumps(asdict(CONFIG))})
    convert(folder / "wide.safetensors", folder / "wide_fp8.safetensors")
    roles = {role: models[role] for role in ("text_encoder", "video_vae", "audio_vae")}
    return {
        "bf16": ModelFiles(backbone=folder / "wide.safetensors", **roles),
        "fp8": ModelFiles(backbone=folder / "wide_fp8.safetensors", **roles),
    }


@pytest.fixture
def _small_scale(monkeypatch):
    monkeypatch.setattr(plan, "SLACK", SLACK)
    monkeypatch.setattr(memory, "SLACK", SLACK)
    monkeypatch.setattr(stages, "BATCH_TOKENS", 0)


SETTINGS = {"seconds": 1, "width": 320, "height": 192, "steps": 3, "seed": 5}


@pytest.mark.usefixtures("_small_scale")
@pytest.mark.parametrize("weights", ["bf16", "fp8"])
@pytest.mark.parametrize("budget", [1500, 750, 600])
def test_the_allocator_stays_within_the_budget_over_all_stages(files, weights, budget):
    prompt = "A pier. <S>Hello.<E>"
    picture = torch.rand(100, 160, 3, generator=torch.Generator().manual_seed(1))
    said = []
    settings = {**SETTINGS, "image": picture, "size_from_image": False}
    resident = NavaPipeline.from_files(files[weights], device="cuda")
    expected = resident(prompt, **settings)
    resident.unload()
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    pipeline = NavaPipeline.from_files(files[weights], device="cuda", memory=budget * MB, say=said.append)
    clip = pipeline(prompt, **settings)
    print(*said, f"peak reserved {torch.cuda.max_memory_reserved() / MB:.0f} MB", pipeline.timing, sep="\n")
    assert torch.cuda.max_memory_reserved() <= budget * MB
    assert not [sentence for sentence in said if sentence.startswith("Out of memory while denoising")]
    assert torch.equal(clip.video_latent, expected.video_latent)
    assert torch.equal(clip.audio_latent, expected.audio_latent)
    assert torch.cuda.get_per_process_memory_fraction() == 1.0


@pytest.mark.usefixtures("_small_scale")
def test_memory_that_really_runs_out_is_met_with_the_same_clip(files, monkeypatch):
    """The plan is told of more than there is."""
    expected = NavaPipeline.from_files(files["bf16"], device="cuda")("A pier.", **SETTINGS)
    gc.collect()
    said = []
    pipeline = NavaPipeline.from_files(files["bf16"], device="cuda", memory=700 * MB, say=said.append)
    monkeypatch.setattr(pipeline.components, "_budget", lambda _: 5000 * MB)
    clip = pipeline("A pier.", **SETTINGS)
    assert [sentence for sentence in said if sentence.startswith("Out of memory while denoising")]
    assert torch.equal(clip.video_latent, expected.video_latent)


def test_a_step_with_a_quarter_of_the_blocks_resident(model):
    """Prints what it takes, as a share of a resident step's time; how long a step may take is no matter of a test."""
    cases = {}
    for share in (1.0, 0.25):
        cases[share], latents = measure_share(model, share, CLIP, "cuda", 4)
        cases[share]["latents"] = latents
    ratio = cases[0.25]["step_seconds"] / cases[1.0]["step_seconds"]
    print(f"25 % resident: {ratio:.2f} of a resident step, {torch.cuda.get_device_name()}")
    assert same(cases[0.25]["latents"], cases[1.0]["latents"])
    assert cases[0.25]["peak_allocated_bytes"] < cases[1.0]["peak_allocated_bytes"]
