"""Finds ComfyUI and imports it, and the pack beside it, into a test process on the CPU."""

import importlib
import os
import sys
import types
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACK = "nava_pack"  # what the pack is called here; in ComfyUI its name is its folder's path


def find_comfyui() -> Path | None:
    """ComfyUI's folder: COMFYUI_PATH, or where that is not set the folder above ``custom_nodes`` that this checkout is
    in, or ``~/comfy/ComfyUI`` (comfy-cli's default); None where there is none."""
    if os.environ.get("COMFYUI_PATH"):
        places = [Path(os.environ["COMFYUI_PATH"]).expanduser()]
    else:
        places = [ROOT.parent.parent] if ROOT.parent.name == "custom_nodes" else []
        places.append(Path("~/comfy/ComfyUI").expanduser())
    return next((place.resolve() for place in places if (place / "comfy" / "sd.py").is_file()), None)


def require_comfyui() -> Path:
    """ComfyUI's folder, or skip the test with the reason."""
    folder = find_comfyui()
    if folder is None:
        pytest.skip("no ComfyUI: set COMFYUI_PATH, or install it at ~/comfy/ComfyUI", allow_module_level=True)
    return folder


def import_comfyui() -> Path:
    """Make ``import comfy`` work in this process, on the CPU; skip where there is no ComfyUI."""
    folder = require_comfyui()
    if str(folder) not in sys.path:
        sys.path.append(str(folder))  # behind the others: its top folder has names such as `nodes` and `utils`
    try:
        import comfy.cli_args
    except ImportError as error:
        pytest.skip(f"ComfyUI at {folder} cannot be imported here: {error}", allow_module_level=True)
    comfy.cli_args.args.cpu = True  # read when comfy.model_management is imported
    return folder


def pack_module(name: str):
    """A module of the pack by its name below the root ("nodes.host.vae"), loaded as ComfyUI loads the pack: as one
    package, without running the root's ``__init__``, which registers nodes."""
    if PACK not in sys.modules:
        package = types.ModuleType(PACK)
        package.__path__ = [str(ROOT)]
        sys.modules[PACK] = package
    return importlib.import_module(f"{PACK}.{name}")
