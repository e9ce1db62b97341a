"""The host's prefetch queue around the blocks: each in its turn, and no LoRA added twice to weights fetched once."""

import pytest
import torch
from comfy_host import import_comfyui, pack_module

import_comfyui()

import comfy.cli_args  # noqa: E402
import comfy.model_management  # noqa: E402
import comfy.model_patcher  # noqa: E402
import comfy.ops  # noqa: E402
import comfy_aimdo.model_vbar  # noqa: E402

host_model = pack_module("nodes.host.model")
prefetch = pack_module("nodes.host.prefetch")

CPU = torch.device("cpu")
NAME = "single_blocks.0.ffn.0"
needs_queue = pytest.mark.skipif(prefetch.host_prefetch is None, reason="this ComfyUI has no prefetch queue")


@pytest.fixture(autouse=True)
def inference():
    """As ComfyUI runs nodes."""
    with torch.inference_mode():
        yield


@pytest.fixture
def model(small_models):
    return host_model.load_backbone(str(small_models["backbone"]), "fp32").model.diffusion_model


def run(model, **options):
    generator = torch.Generator().manual_seed(1)
    shapes = ((1, 48, 2, 4, 6), (1, 8, 5, 16), (1, 9, model.config.text_dim))
    video, audio, context = (torch.randn(shape, generator=generator) for shape in shapes)
    return model([video, audio], torch.tensor([500.0]), context, transformer_options=options)


def test_hosts_without_a_queue(model, monkeypatch):
    expected = run(model)
    monkeypatch.setattr(prefetch, "host_prefetch", None)
    for ours, theirs in zip(run(model, prefetch_dynamic_vbars=True), expected, strict=True):
        assert torch.equal(ours, theirs)


@needs_queue
def test_every_block_in_its_turn(model, monkeypatch):
    blocks, calls = [*model.double_blocks, *model.single_blocks], []

    def make(queue, device, options):
        assert options["prefetch_dynamic_vbars"]
        assert queue == [[block] for block in blocks]
        return ["the queue"]

    monkeypatch.setattr(prefetch.host_prefetch, "make_prefetch_queue", make)
    monkeypatch.setattr(prefetch.host_prefetch, "prefetch_queue_pop", lambda *pop: calls.append(pop))
    run(model, prefetch_dynamic_vbars=True)
    assert calls == [(["the queue"], CPU, block) for block in [*blocks, None]]


@needs_queue
@pytest.mark.parametrize("pieces", [1, 2])
def test_a_lora_on_weights_fetched_ahead_is_added_once(model, monkeypatch, pieces):
    """The host's own queue over a GPU without room (stand-ins for the GPU's side)."""
    block, linear = model.single_blocks[0], model.get_submodule(NAME)
    patch = ("diff", (torch.ones_like(linear.weight),))
    lowvram = comfy.model_patcher.LowVramPatch("key", {"key": [(1.0, patch, 1.0, None, None)]})
    for layer in (linear, block.self_attn.q):
        layer._v, layer._v_signature, layer._pin_state, layer.seed_key = object(), None, {}, NAME
    linear.weight_lowvram_function, lowvram._pin_state = lowvram, {}
    monkeypatch.setattr(comfy_aimdo.model_vbar, "vbar_fault", lambda allocation: None)
    monkeypatch.setattr(comfy_aimdo.model_vbar, "vbar_signature_compare", lambda a, b: False)
    monkeypatch.setattr(comfy.cli_args.args, "disable_pinned_memory", True)
    for name, value in {
        "NUM_STREAMS": 1,
        "is_device_cpu": lambda device: False,
        "device_supports_non_blocking": lambda device: True,
        "get_offload_stream": lambda device: None,
        "ensure_pin_registerable": lambda size: None,
    }.items():
        monkeypatch.setattr(comfy.model_management, name, value)

    tokens = torch.zeros(1, 1 + (pieces - 1) * prefetch.FEED_FORWARD_TOKENS, 1)
    queue = prefetch.prefetch_queue([block], tokens, {"prefetch_dynamic_vbars": True})
    prefetch.fetch_next(queue, CPU, block)
    assert hasattr(block.self_attn.q, "_prefetch")
    for _ in range(pieces):
        alone = not hasattr(linear, "_prefetch")
        if alone:  # as the host does for a layer that was not fetched ahead
            comfy.ops.cast_modules_with_vbar([linear], torch.float32, CPU, torch.float32, False)
        used, _ = comfy.ops.resolve_cast_module_with_vbar(
            linear, torch.float32, CPU, torch.float32, torch.float32, False
        )
        torch.testing.assert_close(used, linear.weight + 1)
        if alone:
            del linear._prefetch
    prefetch.fetch_next(queue, CPU, None)
    assert not hasattr(block.self_attn.q, "_prefetch")
    assert not hasattr(linear, "_prefetch")
