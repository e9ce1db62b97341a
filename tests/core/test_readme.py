"""README's library example, run as it stands, and what README says of files and links."""

import re
import subprocess
import sys
import wave
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text()


def test_library_example(tmp_path):
    pytest.importorskip("diffusers")
    from nava_core.demo import make_small_models

    code = re.search(r"```python\n(.*?)```", README, re.DOTALL).group(1)
    make_small_models(tmp_path / "models", preview_decoder=False)
    # one of the small text encoders is to be found, as in a folder of real files
    (tmp_path / "models" / "umt5_tiny_fp8_e4m3fn_scaled.safetensors").unlink()
    (tmp_path / "models" / "models_t5_umt5-tiny-enc-bf16.pth").unlink()
    with wave.open(str(tmp_path / "friend.wav"), "wb") as file:
        file.setparams((1, 2, 16000, 0, "NONE", ""))
        file.writeframes(bytes(range(256)) * 375)
    script = f"import sys; sys.path.insert(0, {str(ROOT)!r})\n{code}"
    out = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert out.returncode == 0, out.stderr
    assert "step 4 of 4" in out.stdout
    assert "Span 1" in out.stdout
    import av

    with av.open(str(tmp_path / "pier.mp4")) as clip:
        assert clip.streams.video[0].frames == 25
        assert clip.streams.audio[0].codec_context.name == "aac"


def test_activations():
    from nava_core.backbone import BackboneConfig, activation_bytes
    from nava_core.geometry import ClipGeometry

    said = re.search(r"\| Backbone activations, .*", README).group()
    for seconds, size in ((6, (1280, 704)), (10, (1280, 704)), (6, (832, 480))):
        counted = activation_bytes(BackboneConfig(), 1, ClipGeometry(seconds, *size).tokens, 2) / 1e9
        assert f"{counted:.1f} GB" in said
    assert "832x480 for 6 s" in said


def test_resident_blocks_of_each_budget():
    """Of the released size, whose weights have the shapes and types of the files."""
    import torch

    from nava_core.backbone import BackboneConfig, NavaBackbone, activation_bytes
    from nava_core.geometry import ClipGeometry
    from nava_core.offload import Demand, Weights, least_budget, place_backbone
    from nava_core.pipeline.sizes import LATENT_COPIES

    with torch.device("meta"):
        network = NavaBackbone(BackboneConfig(), dtype=torch.bfloat16)
    blocks = [*network.double_blocks, *network.single_blocks]
    linears = [[m.weight for m in block.modules() if isinstance(m, torch.nn.Linear)] for block in blocks]
    sizes = [sum(p.nbytes for p in block.parameters()) for block in blocks]
    saved = [sum(w.numel() - 2 * len(w) for w in weights) for weights in linears]  # a byte each, and a scale a row
    rest = sum(p.nbytes for p in network.parameters()) - sum(sizes)
    geometry = ClipGeometry(6, 1280, 704)
    values = sum(torch.Size(shape).numel() for shape in (geometry.latent_shape, geometry.audio_shape))
    work = LATENT_COPIES * 4 * values + activation_bytes(BackboneConfig(), 1, geometry.tokens, 2)
    demands = [
        Demand(Weights(rest, tuple(sizes)), work),
        Demand(
            Weights(rest, tuple(a - b for a, b in zip(sizes, saved, strict=True))),
            work + 2 * max(w.numel() for w in linears[0]),
        ),
    ]
    section = README.split("### A GPU of any size")[1].split("###")[0]
    rows = re.findall(r"\| (\d+) GB \| (\d+|all) \| (\d+|all) \|", section)
    assert len(rows) == 5
    for budget, *said in rows:
        for demand, resident in zip(demands, said, strict=True):
            where, _ = place_backbone(torch.device("cuda"), int(budget) * 10**9, demand)
            assert resident == (str(30 - len(where.streamed)) if where.streamed else "all"), budget
    least = " for bf16 and ".join(f"{least_budget(demand) / 1e9:.1f} GB" for demand in demands)
    assert f"The least is {least} for fp8." in section
    assert "4 of 30 blocks resident; text encoder streamed, 10 of 24" in section


@pytest.mark.parametrize("target", sorted(set(re.findall(r"\]\(([^)#:]+)\)", README))))
def test_links_lead_somewhere(target):
    assert (ROOT / target).exists()


def test_every_workflow_is_shown():
    for path in (ROOT / "workflows").glob("*.json"):
        assert f"**{path.stem}**" in README
        assert f"docs/images/{path.stem}.png" in README
