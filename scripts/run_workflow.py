"""Runs the bundled text-to-clip workflow in a ComfyUI of its own folders, with small models; prints the clip's path.

    python scripts/run_workflow.py COMFYUI MODELS OUT

Run by scripts/quickstart with a Python that has ComfyUI's packages. The models, inputs and outputs of the ComfyUI
installation are not touched: the server gets a temporary base folder.
"""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
WORKFLOW = ROOT / "workflows" / "api" / "text_to_clip.json"
START_SECONDS, RUN_SECONDS = 300, 900
ROLES = {
    "NavaLoadBackbone": "backbone",
    "NavaLoadVideoVAE": "video_vae",
    "NavaLoadAudioVAE": "audio_vae",
    "NavaLoadTextEncoder": "text_encoder",
}
MODEL_SUFFIXES = (".safetensors", ".pth", ".pt", ".ckpt")
SMALL = {
    "NavaEmptyLatent": {"seconds": 1.0, "preset": "custom", "width": 160, "height": 96},
    "NavaSampler": {"steps": 8},
    "NavaSigmas": {"steps": 8},
}


class FailedError(Exception):
    """Why there is no clip, in a sentence."""


def small_graph(graph: dict, names: dict[str, str]) -> dict:
    """The workflow with the small models' file names, a short clip and few steps."""
    for node in graph.values():
        role = ROLES.get(node["class_type"])
        for key, value in node["inputs"].items():
            if role and isinstance(value, str) and value.endswith(MODEL_SUFFIXES):
                node["inputs"][key] = names[role]
        for key, value in SMALL.get(node["class_type"], {}).items():
            if key in node["inputs"]:
                node["inputs"][key] = value
    return graph


class Server:
    """ComfyUI on a free port of this machine, over ``base``."""

    def __init__(self, comfyui: Path, base: Path) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.address = f"http://127.0.0.1:{port}"
        self.base = base
        self.log = (base / "server.log").open("w+", encoding="utf-8", errors="replace")
        options = ["--port", str(port), "--base-directory", str(base), "--disable-api-nodes", "--database-url"]
        command = [sys.executable, "main.py", *options, "sqlite:///:memory:", *([] if has_gpu() else ["--cpu"])]
        self.process = subprocess.Popen(command, cwd=comfyui, stdout=self.log, stderr=subprocess.STDOUT)

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.terminate()
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.log.close()

    def wait_until_up(self) -> None:
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                raise FailedError(f"ComfyUI ended at its start: {self.last_line()}")
            try:
                self.ask("/system_stats")
                return
            except OSError:
                time.sleep(0.3)
        raise FailedError(f"ComfyUI did not answer within {START_SECONDS} s.")

    def ask(self, path: str, data: dict | None = None) -> dict:
        body = None if data is None else json.dumps(data).encode()
        request = urllib.request.Request(self.address + path, body, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.loads(answer.read())

    def run(self, graph: dict) -> list[Path]:
        """The files that a workflow saved."""
        try:
            prompt = self.ask("/prompt", {"prompt": graph})["prompt_id"]
        except urllib.error.HTTPError as error:
            raise FailedError(f"ComfyUI refused the workflow: {error.read().decode(errors='replace')[:600]}") from None
        deadline = time.monotonic() + RUN_SECONDS
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                raise FailedError(f"ComfyUI ended while it worked: {self.last_line()}")
            done = self.ask(f"/history/{prompt}").get(prompt)
            if done:
                return self.saved(done)
            time.sleep(0.3)
        raise FailedError(f"The workflow was not done within {RUN_SECONDS} s.")

    def saved(self, done: dict) -> list[Path]:
        for kind, data in done["status"].get("messages", []):
            if kind == "execution_error":
                raise FailedError(f"{data.get('node_type')}: {str(data.get('exception_message')).strip()}")
        items = [item for output in done["outputs"].values() for some in output.values() for item in some]
        files = [item for item in items if isinstance(item, dict) and "filename" in item]
        paths = [self.base / f.get("type", "output") / f.get("subfolder", "") / f["filename"] for f in files]
        return [path for path in paths if path.suffix in (".mp4", ".wav")]

    def last_line(self) -> str:
        lines = (self.base / "server.log").read_text(encoding="utf-8", errors="replace").splitlines()
        return next((line for line in reversed(lines) if line.strip()), "it said nothing")


def has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def prepare(base: Path, models: Path) -> dict[str, str]:
    """ComfyUI's folders in ``base`` with the pack and the small models; the models' names by role."""
    sys.path.insert(0, str(ROOT))
    from nava_core.demo import FILES, place_in_comfyui

    for name in ("models", "input", "output", "temp", "user", "custom_nodes"):
        (base / name).mkdir(parents=True, exist_ok=True)
    (base / "custom_nodes" / "nava-nodes").symlink_to(ROOT, target_is_directory=True)
    sources = {role: models / FILES[role] for role in ROLES.values()}
    return {role: path.name for role, path in place_in_comfyui(sources, base / "models").items()}


def main(comfyui: Path, models: Path, out: Path) -> Path:
    graph = json.loads(WORKFLOW.read_text(encoding="utf-8"))
    with tempfile.TemporaryDirectory(prefix="nava-comfyui-") as folder:
        base = Path(folder)
        names = prepare(base, models)
        with Server(comfyui, base) as server:
            server.wait_until_up()
            clips = server.run(small_graph(graph, names))
        if not clips:
            raise FailedError("The workflow ran and saved no clip.")
        target = out / f"clip_from_comfyui{clips[0].suffix}"
        part = target.with_name(f".{target.name}.part")
        shutil.copyfile(clips[0], part)
        part.replace(target)
    return target


if __name__ == "__main__":
    try:
        print(main(*(Path(argument).resolve() for argument in sys.argv[1:4])))
    except FailedError as error:
        sys.exit(str(error))
