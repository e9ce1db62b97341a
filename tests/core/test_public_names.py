"""The names others build on, and what importing the core may cost."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import nava_core

ROOT = Path(nava_core.__file__).parents[1]
PROMISED = [
    "load_backbone", "NavaBackbone", "flow_sigmas", "FlowUniPC", "Guidance", "load_redimnet", "encode_timbre",
    "parse_spans", "StructuredPrompt", "PromptTokenizer", "ClipGeometry", "mux",
]  # fmt: skip


@pytest.mark.parametrize("name", sorted({*PROMISED, *nava_core.__all__}))
def test_every_public_name_is_there(name):
    assert name in nava_core.__all__
    assert getattr(nava_core, name).__doc__


def test_import_is_light():
    code = "import nava_core, sys; print([m for m in ('torch', 'av', 'transformers', 'diffusers') if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((0, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.level, node.module or ""


HOST = ("comfy", "comfy_api", "folder_paths", "latent_preview", "nodes", "execution", "server")


@pytest.mark.parametrize("path", sorted((ROOT / "nava_core").rglob("*.py")), ids=lambda p: str(p.relative_to(ROOT)))
def test_the_core_knows_no_host(path):
    depth = len(path.relative_to(ROOT / "nava_core").parts)
    for level, name in imports(path):
        assert level or name.split(".")[0] not in HOST
        assert level <= depth, f"{path.name} reaches above the core"
        assert level or not name.startswith("nava_core"), f"{path.name}: the pack may have another name in a host"


@pytest.mark.parametrize("path", sorted((ROOT / "nodes").glob("*.py")), ids=lambda p: p.name)
def test_nodes_leave_arithmetic_and_host_insides_to_others(path):
    allowed = ("comfy_api.latest", "folder_paths")
    for level, name in imports(path):
        root = name.split(".")[0]
        assert level or name in allowed or root in sys.stdlib_module_names, f"{path.name} imports {name}"


def test_no_code_from_files():
    for path in [*(ROOT / "nava_core").rglob("*.py"), *(ROOT / "nodes").rglob("*.py")]:
        text = path.read_text()
        for word in ("trust_remote_code=True", "torch.hub", "weights_only=False", "pickle.load"):
            assert word not in text, f"{word} in {path.name}"
