"""A real ComfyUI server on the CPU with this pack and small models, driven over HTTP and websocket."""

from __future__ import annotations

import json
import os
import socket
import struct
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
import uuid
from dataclasses import dataclass, field
from pathlib import Path

import websocket
from comfy_host import ROOT, require_comfyui

START_SECONDS = 180
RUN_SECONDS = 300
PACK_FOLDER = "nava-nodes"
# One thread: quickest for small models, and sums are then always taken in the same order.
ENVIRONMENT = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}


@dataclass
class Run:
    """What the server said of one prompt."""

    prompt_id: str
    status: str = ""  # success, error, interrupted
    error: dict = field(default_factory=dict)
    outputs: dict = field(default_factory=dict)  # node id -> its ui outputs
    progress: list = field(default_factory=list)  # (node, value, max)
    previews: list = field(default_factory=list)  # bytes of each preview picture
    files: list = field(default_factory=list)  # paths of what was saved, in order

    def file(self, suffix: str) -> Path:
        found = [path for path in self.files if path.suffix == suffix]
        assert found, f"no {suffix} among {self.files}"
        return found[-1]

    def text(self, node: str) -> str:
        return self.outputs[node]["text"][0]


class RefusedError(Exception):
    """The server did not take the prompt."""


class Comfy:
    """The server as a context; ``base`` becomes its models, input, output and custom_nodes folders."""

    def __init__(self, base: Path, *options: str):
        self.base = base
        self.options = options
        self.client = uuid.uuid4().hex
        self.process = None

    def __enter__(self) -> Comfy:
        comfy = require_comfyui()
        for name in ("models", "input", "output", "temp", "user", "custom_nodes"):
            (self.base / name).mkdir(parents=True, exist_ok=True)
        link = self.base / "custom_nodes" / PACK_FOLDER
        if not link.exists():
            link.symlink_to(ROOT, target_is_directory=True)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.log = (self.base / "server.log").open("w+")
        self.process = subprocess.Popen(
            [
                sys.executable, "main.py", "--cpu", "--port", str(self.port), "--base-directory", str(self.base),
                "--database-url", "sqlite:///:memory:", "--disable-api-nodes", *self.options,
            ],
            cwd=comfy, stdout=self.log, stderr=subprocess.STDOUT, env=ENVIRONMENT,
        )  # fmt: skip
        self._wait_until_up()
        self.socket = websocket.create_connection(
            f"ws://127.0.0.1:{self.port}/ws?clientId={self.client}", timeout=RUN_SECONDS
        )
        return self

    def __exit__(self, *_):
        self.socket.close()
        self.process.terminate()
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
        self.log.close()

    def said(self) -> str:
        """The server's log so far."""
        return (self.base / "server.log").read_text(errors="replace")

    def _wait_until_up(self) -> None:
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                raise RuntimeError(f"ComfyUI ended with {self.process.returncode}:\n{self.said()[-4000:]}")
            try:
                self.get("/system_stats")
                return
            except OSError:
                time.sleep(0.3)
        raise RuntimeError(f"ComfyUI did not answer within {START_SECONDS} s:\n{self.said()[-4000:]}")

    # ------------------------------------------------------------ HTTP

    def get(self, path: str):
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=60) as answer:
            return json.loads(answer.read())

    def post(self, path: str, data: dict):
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}{path}",
            json.dumps(data).encode(),
            {"Content-Type": "application/json"},
        )
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                body = answer.read()
        except urllib.error.HTTPError as error:
            raise RefusedError(error.read().decode()) from None
        return json.loads(body) if body else None

    # ------------------------------------------------------------ runs

    def queue(self, graph: dict, **extra) -> Run:
        answer = self.post("/prompt", {"prompt": graph, "client_id": self.client, "extra_data": extra})
        return Run(answer["prompt_id"])

    def run(self, graph: dict, on_progress=None, **extra) -> Run:
        """Queue a graph (API format) and follow it to its end; ``on_progress(run)`` may interrupt it."""
        run = self.queue(graph, **extra)
        while not run.status:
            self._follow(run, on_progress)
        self._collect(run)
        return run

    def ok(self, graph: dict, **extra) -> Run:
        """A run that must succeed."""
        run = self.run(graph, **extra)
        assert run.status == "success", f"{run.error.get('node_type')}: {run.error.get('exception_message')}"
        return run

    def fails(self, graph: dict, **extra) -> tuple[str, str]:
        """A run that must fail: (node class, message)."""
        run = self.run(graph, **extra)
        assert run.status == "error", run
        return run.error["node_type"], run.error["exception_message"].strip()

    def interrupt(self) -> None:
        self.post("/interrupt", {})

    def _follow(self, run: Run, on_progress) -> None:
        message = self.socket.recv()
        if isinstance(message, bytes):
            kind = struct.unpack(">I", message[:4])[0]
            if kind == 1:  # preview image: format, then the picture
                run.previews.append(message[8:])
            elif kind == 4:  # preview image with metadata
                length = struct.unpack(">I", message[4:8])[0]
                run.previews.append(message[8 + length :])
            return
        event = json.loads(message)
        data = event.get("data", {})
        if data.get("prompt_id") not in (None, run.prompt_id):
            return
        if event["type"] == "progress":
            run.progress.append((data["node"], data["value"], data["max"]))
            if on_progress:
                on_progress(run)
        elif event["type"] == "executed" and data.get("output"):
            run.outputs[data["node"]] = data["output"]
        elif event["type"] == "execution_error":
            run.status, run.error = "error", data
        elif event["type"] == "execution_interrupted":
            run.status = "interrupted"
        elif event["type"] == "execution_success":
            run.status = "success"

    def _collect(self, run: Run) -> None:
        history = self.get(f"/history/{run.prompt_id}").get(run.prompt_id, {})
        run.outputs.update(history.get("outputs", {}))
        for output in run.outputs.values():
            for items in output.values():
                for item in items if isinstance(items, list) else []:
                    if isinstance(item, dict) and "filename" in item:
                        folder = self.base / item.get("type", "output")
                        path = folder / item.get("subfolder", "") / item["filename"]
                        if path not in run.files:
                            run.files.append(path)
