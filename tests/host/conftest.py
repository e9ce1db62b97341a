"""One ComfyUI server for the host tests, with small models in its folders."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from comfy_host import find_comfyui


def pytest_report_header():
    folder = find_comfyui()
    return f"ComfyUI: {folder}" if folder else "ComfyUI: not found, the host tests are not run"


@pytest.fixture(scope="session")
def small_models(tmp_path_factory):
    """Small model files by what they are."""
    from nava_core.demo import make_small_models

    return make_small_models(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="session")
def comfy(tmp_path_factory, small_models):
    """A running server with its result cache off, so that sameness of two runs means something."""
    from comfy_host import require_comfyui
    from server import Comfy

    from nava_core.demo import place_in_comfyui

    require_comfyui()
    base = tmp_path_factory.mktemp("comfy")
    names = place_in_comfyui(small_models, base / "models")
    with Comfy(base, "--cache-none") as server:
        server.names = {key: path.name for key, path in names.items()}
        yield server
