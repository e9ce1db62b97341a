"""The host's fused kernels: the same numbers as our own code, and used only where they are there and give them."""

from types import SimpleNamespace

import pytest
import torch
from comfy_host import import_comfyui, pack_module

import_comfyui()

import comfy.quant_ops  # noqa: E402

from benchmarks.live_memory import peak_of_pass  # noqa: E402

backbone = pack_module("nava_core.backbone")
host_model = pack_module("nodes.host.model")
kernels = pack_module("nodes.host.kernels")
layers = pack_module("nava_core.backbone.layers")

kitchen = getattr(comfy.quant_ops, "ck", None)
registry = getattr(kitchen, "registry", None)
pytestmark = pytest.mark.skipif(not hasattr(kitchen, "adaln"), reason="this comfy_kitchen is older")

HEADS, WIDTH = 3, 48
TABLE = layers.rotary_table(WIDTH // HEADS, (2, 2, 3), 5, audio_start=1.0)
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 2**-7}  # of the largest value; one rounding


@pytest.fixture(autouse=True)
def inference():
    """As ComfyUI runs nodes, and nothing known yet about any device."""
    kernels._rotation_agrees.cache_clear()
    kernels._norm_agrees.cache_clear()
    with torch.inference_mode():
        yield
    kernels._rotation_agrees.cache_clear()
    kernels._norm_agrees.cache_clear()


def random(*shape, dtype=torch.float32, seed=1):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def assert_within_rounding(got, exact):
    assert got.shape == exact.shape
    assert (got.float() - exact).abs().max() <= TOLERANCE[got.dtype] * exact.abs().max()


# ---------------------------------------------------------------- numbers: the library's reference code


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("part", [slice(None), slice(5, 14), slice(12, None)], ids=["all", "across", "audio"])
def test_rotation(dtype, part):
    x = random(2, len(TABLE), WIDTH, dtype=dtype)[:, part]
    before = x.clone()
    got = kernels.fused_rotation(x, TABLE[part], HEADS)
    assert got.dtype == dtype
    assert_within_rounding(got, layers.rotated(x, TABLE[part], HEADS))
    assert torch.equal(x, before)


def stretches(dtype, groups):
    """Over 12 video and 5 audio tokens, each modality in so many groups; by (shift, scale)."""
    parts = zip((slice(0, 12), slice(12, 17)), groups, strict=True)
    return [(part, tuple(random(2, 2, count, 1, WIDTH, dtype=dtype, seed=count))) for part, count in parts]


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("groups", [(1, 1), (2, 5)], ids=["one timestep", "by frame and step"])
def test_modulated_norm(dtype, groups):
    norm = torch.nn.LayerNorm(WIDTH, eps=1e-3, elementwise_affine=False)
    tokens, over = random(2, 17, WIDTH, dtype=dtype), stretches(dtype, groups)
    before = tokens.clone()
    exact = layers.modulated_norm(
        norm, tokens.float(), [(part, [each.float() for each in vectors]) for part, vectors in over]
    )
    got = kernels.fused_norm(norm, tokens, over)
    assert got.dtype == dtype
    assert_within_rounding(got, exact)
    assert torch.equal(tokens, before)
    for part, vectors in over:  # a stretch by itself, as the head and passes of one modality have it
        assert_within_rounding(kernels.fused_norm(norm, tokens[:, part], [(slice(None), vectors)]), exact[:, part])


@pytest.mark.parametrize("batch", [1, 2])
def test_memory_figure_holds_with_them(batch):
    config = backbone.BackboneConfig(num_double_layers=1, num_single_layers=1)
    fused = backbone.Kernels(kernels.fused_rotation, kernels.fused_norm)
    like = {"dtype": torch.bfloat16, "device": "meta"}
    with torch.device("meta"):
        model = backbone.NavaBackbone(
            config, dtype=torch.bfloat16, attention=lambda q, k, v, heads, options: torch.empty_like(q), kernels=fused
        )
    latents = torch.empty(batch, 48, 31, 44, 80, **like), torch.empty(batch, 126, 128, **like)
    peak = peak_of_pass(model, *latents, torch.empty(batch, device="meta"), torch.empty(batch, 512, 4096, **like))
    assert peak == pytest.approx(backbone.activation_bytes(config, batch, 31 * 22 * 40 + 126, 2), rel=0.05)


# ---------------------------------------------------------------- when they are used


@pytest.fixture
def model(small_models):
    return host_model.load_backbone(str(small_models["backbone"]), "fp32").model.diffusion_model


def run(model):
    video, audio, context = random(2, 48, 2, 4, 6), random(2, 8, 5, 16), random(2, 9, model.config.text_dim)
    return model([video, audio], torch.tensor([500.0, 20.0]), context, transformer_options={})


@pytest.fixture
def capable(monkeypatch):
    """A backend of the host's library for this device: its reference code, counted, perhaps off by a factor."""
    from comfy_kitchen.backends import eager

    backend = SimpleNamespace(calls=[], factor=1.0)

    def counted(name):
        def kernel(**arguments):
            backend.calls.append(name)
            return getattr(eager, name)(**arguments) * backend.factor

        return kernel

    names = ("apply_rope1", "adaln")
    for name in names:
        setattr(backend, name, counted(name))
    constraints = {name: registry.get_constraints("eager", name) for name in names}
    for table in ("_backends", "_capabilities", "_constraints"):
        monkeypatch.setattr(registry, table, dict(getattr(registry, table)))
    monkeypatch.setattr(registry, "_priority", ["capable", "eager"])
    registry.register("capable", backend, constraints)
    return backend


def own_code(model, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(model, "kernels", backbone.Kernels())
        return run(model)


def test_used_where_another_backend_serves(model, capable, monkeypatch):
    expected = own_code(model, monkeypatch)
    run(model)  # looks at each kernel first
    capable.calls.clear()
    for got, wanted in zip(run(model), expected, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)
    blocks = len(model.double_blocks) + len(model.single_blocks)
    assert capable.calls.count("adaln") == 2 * 2 * blocks + 2  # two norms, two modalities; the two heads
    assert capable.calls.count("apply_rope1") == 2 * (2 * len(model.double_blocks) + len(model.single_blocks))


@pytest.mark.parametrize("factor", [1 + 1e-4, float("nan")])
def test_not_used_where_it_computes_something_else(model, capable, factor, monkeypatch, caplog):
    capable.factor = factor
    expected = own_code(model, monkeypatch)
    for got, wanted in zip(run(model), expected, strict=True):
        assert torch.equal(got, wanted)
    run(model)
    assert sorted(capable.calls) == ["adaln", "adaln", "apply_rope1"]  # looked at once, by stretch
    assert [line.split(" is ")[0] for line in caplog.messages if "kernel" in line] == [
        "NAVA: the host's kernel adaln",
        "NAVA: the host's kernel apply_rope1",
    ]


def test_not_used_where_it_fails(model, capable, monkeypatch):
    expected = own_code(model, monkeypatch)
    capable.adaln = capable.apply_rope1 = None  # "not callable"
    for got, wanted in zip(run(model), expected, strict=True):
        assert torch.equal(got, wanted)


@pytest.mark.parametrize("kind", ["reference only", "absent", "without registry", "without the functions"])
def test_own_code_where_the_host_has_nothing_better(model, kind, monkeypatch, caplog):
    expected = own_code(model, monkeypatch)
    if kind == "absent":
        monkeypatch.delattr(comfy.quant_ops, "ck")
    elif kind == "without registry":
        monkeypatch.setattr(comfy.quant_ops, "ck", SimpleNamespace(adaln=kitchen.adaln, apply_rope1=None))
    elif kind == "without the functions":
        monkeypatch.setattr(comfy.quant_ops, "ck", SimpleNamespace(registry=registry))
    for name in ("fused_norm", "fused_rotation"):
        monkeypatch.setattr(kernels, name, None)
    for got, wanted in zip(run(model), expected, strict=True):
        assert torch.equal(got, wanted)
    assert not [line for line in caplog.messages if "kernel" in line]


def test_not_used_while_compiling(model, capable, monkeypatch):
    run(model)
    capable.calls.clear()
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    run(model)
    assert not capable.calls
