"""The stock TorchCompileModel node on a NAVA model gives what the model gives without it."""

import gc
import json
import shutil
import weakref

import pytest
import torch
from comfy_host import import_comfyui, pack_module
from torch._dynamo.testing import CompileCounter
from torch._dynamo.utils import counters

import_comfyui()

import comfy.model_management  # noqa: E402
import comfy.sd  # noqa: E402
from comfy_extras.nodes_torch_compile import TorchCompileModel  # noqa: E402
from safetensors.torch import save_file  # noqa: E402

host_model = pack_module("nodes.host.model")
host_compiled = pack_module("nodes.host.compiled")
guiders = pack_module("nodes.host.guider")
host_latents = pack_module("nodes.host.latents")
backbone = pack_module("nava_core.backbone")
formats = pack_module("nava_core.backbone.formats")
quantized = pack_module("nodes.host.quantized")
convert = pack_module("nava_core.convert").convert
geometry = pack_module("nava_core.geometry")
sampling = pack_module("nava_core.sampling")

CONFIG = backbone.BackboneConfig(
    dim=64, ffn_dim=128, freq_dim=32, text_dim=32, num_heads=2, num_double_layers=1, num_single_layers=1
)
KNOWN = [n for n in formats.MADE_HERE if quantized.host_problem(formats.FORMATS[n], torch.device("cpu")) is None]
SHAPES = {"A": (4, 64), "B": (64, 4)}  # of a LoRA's matrices for a Linear of attention
PLAIN_TENSORS = {torch._subclasses.FakeTensor}
ONE_PREDICTION = sampling.Guidance(video_text=0.0, video_align=0.0, audio_text=0.0, audio_align=0.0)


@pytest.fixture(scope="module")
def patcher(tmp_path_factory):
    """One block of each kind: the compiler takes its time."""
    weights = backbone.NavaBackbone(CONFIG).init_weights(seed=1).state_dict()
    path = tmp_path_factory.mktemp("backbone") / "tiny.safetensors"
    named = {f"backbone.{name}": weight for name, weight in weights.items()}
    save_file(named, path, metadata={"config": json.dumps(CONFIG.to_dict())})
    return host_model.load_backbone(str(path), "fp32")


def one_step(patcher, seconds=0.5, size=(96, 80), batch=1, given_frame=False, guidance=ONE_PREDICTION):
    clip = geometry.ClipGeometry(seconds, *size, "video+audio")
    context = torch.randn(1, 20, CONFIG.text_dim, generator=torch.Generator().manual_seed(3))
    guider = guiders.make_guider(patcher, [[context, {}]], None, guidance)
    sigmas = torch.tensor([1.0, 0.5])
    latent = host_latents.empty_latent(clip, batch)
    if given_frame:
        video, audio = latent["samples"].unbind()
        masks = [torch.ones_like(video[:, :1]), torch.ones_like(audio[:, :1])]
        masks[0][:, :, 0] = 0
        latent["noise_mask"] = type(latent["samples"])(masks)
    return guiders.sample(guider, latent, 11, guiders.unipc_sampler(), sigmas)["samples"].unbind()


KINDS = (
    {},
    {"seconds": 1.0, "size": (64, 128)},
    {"given_frame": True},
    {"seconds": 0.75, "guidance": sampling.Guidance()},  # alignment on
    *({"seconds": 0.5 + number / 4} for number in range(3, 10)),  # the ninth size used to fail
)


@pytest.mark.skipif(shutil.which("g++") is None, reason="the compiler needs g++")
def test_compiled_equals_eager_and_two_graphs_serve_every_clip(patcher):
    torch._dynamo.reset()
    counters.clear()
    with torch.inference_mode():
        compiled = TorchCompileModel.execute(patcher, "inductor").result[0]
        for kind in KINDS:
            eager = one_step(patcher, **kind)
            for got, wanted in zip(one_step(compiled, **kind), eager, strict=True):
                torch.testing.assert_close(got, wanted, rtol=0, atol=1e-4)
    assert counters["stats"]["unique_graphs"] == 2
    assert all("HostBackbone.__call__" in reason for reason in counters["graph_break"])  # the network as a whole
    assert patcher.model.diffusion_model.compiled is None  # the plain MODEL stays plain


@pytest.fixture(scope="module")
def quantised(tmp_path_factory):
    """Makes MODELs of two blocks of each kind in a format; beside 4 and 6 bits, one layer of them is protected."""
    folder = tmp_path_factory.mktemp("quantised")
    config = backbone.BackboneConfig(**{**CONFIG.__dict__, "num_double_layers": 2, "num_single_layers": 2})
    weights = backbone.NavaBackbone(config).init_weights(seed=1).state_dict()
    named = {f"backbone.{name}": weight for name, weight in weights.items()}
    save_file(named, folder / "plain.safetensors", metadata={"config": json.dumps(config.to_dict())})

    def make(dtype):
        if dtype == "plain":
            return host_model.load_backbone(str(folder / "plain.safetensors"), "fp32")
        protected = ["double_blocks.1.self_attn.q"] if dtype in formats.PROTECTING else []
        path = folder / f"{dtype}.safetensors"
        convert(folder / "plain.safetensors", path, dtype=dtype, protected=protected, overwrite=True)
        return host_model.load_backbone(str(path))

    return make


@pytest.mark.parametrize("dtype", ["fp8", *KNOWN])
def test_quantised_weights_stay_out_of_the_two_graphs(quantised, dtype):
    """Blocks whose layers differ in format share a graph, and no compiler has to know their types; LoRAs included."""
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    torch._dynamo.reset()
    counters.clear()
    with torch.inference_mode():
        patcher = quantised(dtype)
        generator = torch.Generator().manual_seed(8)
        name = "diffusion_model.double_blocks.0.self_attn.q"
        lora = {f"{name}.lora_{part}.weight": torch.randn(shape, generator=generator) for part, shape in SHAPES.items()}
        patched = comfy.sd.load_lora_for_models(patcher, None, lora, 0.1, 0)[0]
        for model in (patcher, patched):
            compiled = TorchCompileModel.execute(model, backend).result[0]
            for kind in KINDS[:4]:
                eager = one_step(model, **kind)
                for got, wanted in zip(one_step(compiled, **kind), eager, strict=True):
                    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-4)  # positions are turned otherwise
    assert len(graphs) == 2
    assert all("HostBackbone.__call__" in reason for reason in counters["graph_break"])
    for graph in graphs:
        values = [node.meta["example_value"] for node in graph.graph.nodes if node.op == "placeholder"]
        assert {value.dtype for value in values if torch.is_tensor(value)} <= {
            torch.bfloat16,
            torch.float32,
            torch.int64,
        }
        assert {type(value) for value in values if torch.is_tensor(value)} <= PLAIN_TENSORS


def loaded(patcher, how):
    """As where the weights do not all fit the GPU: "lowvram" fetches each where it is used, "partial" some of them."""
    room = {"lowvram": 1, "partial": patcher.model_size() * 6 // 10}.get(how, 0)
    patcher.patch_model(device_to=torch.device("cpu"), lowvram_model_memory=room)
    return patcher.model.diffusion_model


@pytest.mark.parametrize("how", ["whole", "lowvram", "partial"])
@pytest.mark.parametrize("dtype", ["plain", "fp8", *({"int8", "nvfp4"} & set(KNOWN))])
def test_weights_that_are_fetched_or_changed_where_they_are_used_stay_out_of_the_two_graphs(quantised, dtype, how):
    """A LoRA on every other block included, which is added at each use where weights are fetched."""
    torch._dynamo.reset()
    counters.clear()
    counter = CompileCounter()
    generator = torch.Generator().manual_seed(5)
    lora = {}
    for layer in ("double_blocks.0.self_attn.q", "single_blocks.1.cross_attn.o", "single_blocks.0.ffn.0"):
        for part, shape in {"A": (4, 64), "B": (128 if "ffn" in layer else 64, 4)}.items():
            name = f"diffusion_model.{layer}.lora_{part}.weight"
            lora[name] = torch.randn(shape, generator=generator) / 8
    with torch.inference_mode():
        plain = quantised(dtype)
        for model in (plain, comfy.sd.load_lora_for_models(plain, None, lora, 1.0, 0)[0]):
            network = loaded(model, how)
            kind = model.model.get_dtype_inference()
            for frames in (3, 4, 5):
                shapes = ((1, 48, frames, 6, 8), (1, 8, 5 + frames, 16))
                latents = [torch.randn(shape, generator=generator).to(kind) for shape in shapes]
                context = torch.randn(1, 20, CONFIG.text_dim, generator=generator).to(kind)
                found = []
                for compiled in (None, blocks_of(counter)):
                    network.compiled = compiled
                    found.append(network(latents, torch.tensor([500.0]), context))
                for got, wanted in zip(*found, strict=True):
                    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-4)
            network.compiled = None
            model.detach()
    assert counter.frame_count == 2
    assert not counters["graph_break"]


def blocks_of(backend):
    return host_compiled.compiled_blocks({host_compiled.TORCH_COMPILE_KWARGS: {"backend": backend}})


def test_norms_weights_are_those_the_host_would_use(quantised):
    """Fetched, or with a LoRA's change."""
    with torch.inference_mode():
        model = quantised("plain")
        name = "diffusion_model.single_blocks.0.norm3.weight"
        model.add_patches({name: (torch.full((64,), 2.0),)}, 0.5)
        norm = loaded(model, "lowvram").single_blocks[0].norm3
        x = torch.randn(1, 5, 64)
        weight, bias = host_model.HOST_KERNELS.norm_weights(norm, x)
        torch.testing.assert_close(torch.nn.functional.layer_norm(x, (64,), weight, bias, norm.eps), norm(x))
        model.detach()
        before = loaded(quantised("plain"), "whole").single_blocks[0].norm3.weight
        torch.testing.assert_close(weight, before + 1)


def test_a_compiled_model_is_let_go(quantised):
    with torch.inference_mode():
        model = quantised("plain")
        compiled = TorchCompileModel.execute(model, "eager").result[0]
        one_step(compiled)
        references = [weakref.ref(each) for each in (model.model, model.model.diffusion_model.single_blocks[1].ffn[0])]
        comfy.model_management.unload_all_models()
        del model, compiled
        gc.collect()
        comfy.model_management.cleanup_models()
        gc.collect()
    assert [reference() for reference in references] == [None, None]


def test_cuda_graphs_are_refused(patcher):
    compiled = TorchCompileModel.execute(patcher, "cudagraphs").result[0]
    with torch.inference_mode(), pytest.raises(ValueError, match="CUDA graphs, which the backend cudagraphs makes"):
        one_step(compiled)


def test_each_prediction_goes_by_itself_so_that_no_batch_is_compiled_for(patcher, monkeypatch):
    """Small clips' predictions are otherwise batched."""
    sizes = []

    class Counts:
        def __call__(self, block, tokens, state):
            sizes.append(tokens.shape[0])
            return block(tokens, state)

        def prepare(self, state):
            return state

    monkeypatch.setattr(host_model, "compiled_blocks", lambda options: Counts())
    with torch.inference_mode():
        one_step(patcher, guidance=sampling.Guidance())
    assert set(sizes) == {1}
    assert len(sizes) == 3 * 2  # predictions and blocks


def test_what_a_node_puts_in_a_blocks_place_is_given_the_compiled_block(patcher, monkeypatch):
    seen = []

    class Marks:
        def __call__(self, block, tokens, state):
            seen.append(block)
            return block(tokens, state)

        def prepare(self, state):
            return state

    monkeypatch.setattr(host_model, "compiled_blocks", lambda options: Marks())
    replaced = patcher.clone()
    replaced.set_model_patch_replace(lambda args, extra: extra["original_block"](args), "dit", "double_block", 0)
    with torch.inference_mode():
        one_step(replaced)
    assert len(seen) == 2
