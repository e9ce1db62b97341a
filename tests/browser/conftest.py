"""What the browser tests share: the helpers of the host tests, and the program that drives the browser."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent / "host")]

from comfy_host import require_comfyui  # noqa: E402
from machine import find_browser  # noqa: E402

PLAYWRIGHT = "playwright-core@1"


@pytest.fixture(scope="session")
def playwright(tmp_path_factory) -> str:
    """playwright-core in a folder of its own; it drives the machine's Chromium and brings no browser."""
    require_comfyui()
    for program in ("node", "npm"):
        if not shutil.which(program):
            pytest.skip(f"no {program}: install Node.js to run the canvas tests")
    if not find_browser():
        pytest.skip("no Chromium: install it, or set CHROMIUM_PATH, to run the canvas tests")
    folder = tmp_path_factory.mktemp("playwright")
    options = ["--prefix", str(folder), "--no-audit", "--no-fund", "--ignore-scripts", "--no-save"]
    done = subprocess.run(["npm", "install", *options, PLAYWRIGHT], capture_output=True, text=True, timeout=300)
    if done.returncode:
        pytest.skip(f"npm could not install {PLAYWRIGHT}: {done.stderr.strip()[-200:]}")
    return str(folder / "node_modules" / "playwright-core")
