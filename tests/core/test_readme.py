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


@pytest.mark.parametrize("target", sorted(set(re.findall(r"\]\(([^)#:]+)\)", README))))
def test_links_lead_somewhere(target):
    assert (ROOT / target).exists()


def test_every_workflow_is_shown():
    for path in (ROOT / "workflows").glob("*.json"):
        assert f"**{path.stem}**" in README
        assert f"docs/images/{path.stem}.png" in README
