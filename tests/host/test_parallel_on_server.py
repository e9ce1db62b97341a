"""NavaParallel on a real server: clips, previews, interruption over HTTP, and no process left however it ends."""

import io
import signal
import time
from pathlib import Path

import pytest
import torch
from comfy_host import require_comfyui
from graphs import Graph
from PIL import Image
from safetensors.torch import load_file
from server import Comfy

require_comfyui()
pytest.importorskip("ray", reason="NavaParallel needs the package ray")
psutil = pytest.importorskip("psutil", reason="processes are looked at through psutil")

STEPS = 3
ENDING_SECONDS = 10  # in which no worker may be left


@pytest.fixture(scope="module")
def models(tmp_path_factory, small_models):
    from nava_core.demo import place_in_comfyui

    base = tmp_path_factory.mktemp("parallel")
    return base, {key: path.name for key, path in place_in_comfyui(small_models, base / "models").items()}


@pytest.fixture(scope="module")
def comfy(models):
    """A server that keeps its nodes' outputs, as users have it: workers stay as long as the MODEL does."""
    base, names = models
    with Comfy(base) as server:
        server.names = names
        yield server


def graph_of(names, prefix, workers=2, layout="1x2", **sampler):
    graph = Graph()
    model = graph.model(names)
    if workers:
        model = graph.add("NavaParallel", model=model, workers=workers, layout=layout, weights="replicated")
    latent = graph.sampler(model, graph.prompt(graph.clip(names)), graph.latent(), **{"steps": STEPS, **sampler})
    graph.save_latents(latent, prefix)
    return graph


def latents(run, prefix):
    paths = [next(p for p in run.files if p.name.startswith(f"{prefix}_{part}")) for part in ("video", "audio")]
    return [load_file(path)["latent_tensor"] for path in paths]


def workers_of(server):
    """The processes under the server that compute clips."""
    found = []
    for process in psutil.Process(server.process.pid).children(recursive=True):
        try:
            if process.cmdline() and process.cmdline()[0].startswith("ray::NavaWorker"):
                found.append(process)
        except psutil.Error:
            continue
    return found


def gone(processes, seconds=ENDING_SECONDS):
    """The processes that are still there after a while."""
    return psutil.wait_procs(processes, timeout=seconds)[1]


def test_clips_previews_and_two_prompts_in_a_row(comfy):
    expected = latents(comfy.ok(graph_of(comfy.names, "one", workers=0)), "one")
    pids = []
    for seed, prefix in ((7, "two"), (8, "three")):
        run = comfy.ok(graph_of(comfy.names, prefix, seed=seed), preview_method="latent2rgb")
        assert len(run.previews) >= STEPS
        for picture in [Image.open(io.BytesIO(data)) for data in run.previews]:
            assert picture.width / picture.height == pytest.approx(96 / 64, rel=0.1)
        pids.append({process.pid for process in workers_of(comfy)})
        if seed == 7:
            for part, wanted in zip(latents(run, prefix), expected, strict=True):
                # The small network blows rounding errors up, step by step; that of another seed is 1 off.
                assert (part - wanted).abs().max() < 2e-2 * wanted.abs().max()
    assert len(pids[0]) == 2
    assert pids[0] == pids[1]  # they kept their weights
    said = comfy.said()
    assert said.count("NAVA Parallel: Starting 2 workers.") == 1
    assert "Layout 1x2 for 3 predictions" in said


def test_an_interruption_over_http_leaves_no_worker_and_the_next_prompt_runs(comfy):
    expected = latents(comfy.ok(graph_of(comfy.names, "before", seed=21)), "before")
    workers = workers_of(comfy)
    assert len(workers) == 2
    asked = []

    def interrupt(run):
        if not asked and run.progress[-1][1] >= 2:
            asked.append(time.monotonic())
            comfy.interrupt()

    run = comfy.run(graph_of(comfy.names, "long", steps=200, seed=9), on_progress=interrupt)
    assert run.status == "interrupted"
    assert not gone(workers)
    assert time.monotonic() - asked[0] < ENDING_SECONDS
    assert not workers_of(comfy)
    # A scale that nothing uses without a voice, so that the server cannot take the result it has.
    again = latents(comfy.ok(graph_of(comfy.names, "after", seed=21, audio_timbre=2.5)), "after")
    assert len(workers_of(comfy)) == 2
    assert all(torch.equal(a, b) for a, b in zip(again, expected, strict=True))


def test_freeing_the_servers_memory_ends_the_workers(comfy):
    """The button that unloads models and empties the cache, which holds the MODEL."""
    comfy.ok(graph_of(comfy.names, "held", seed=31))
    workers = workers_of(comfy)
    assert workers
    comfy.post("/free", {"unload_models": True, "free_memory": True})
    assert not gone(workers, 30)  # the server looks at it now and then
    comfy.ok(graph_of(comfy.names, "new", seed=32))
    assert workers_of(comfy)


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks at processes in /proc")
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL], ids=lambda how: how.name)
def test_no_process_outlives_the_server(models, how):
    base, names = models
    server = Comfy(base)
    with server:
        server.ok(graph_of(names, f"ends_{how.name}"))
        below = psutil.Process(server.process.pid).children(recursive=True)
        assert len(workers_of(server)) == 2
        server.process.send_signal(how)
        server.process.wait(30)
        assert not gone(below, 2 * ENDING_SECONDS)  # half of it on a machine that has nothing else to do
