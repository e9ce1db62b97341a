"""Batches over several workers: the same clips, files and codes as one process, deaths, interruption, clusters.

One Ray instance serves the tests that are in this process; those of what is left behind start commands of their own.
"""

import gc
import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import tracemalloc
from collections import Counter
from dataclasses import replace
from functools import partial
from pathlib import Path

import psutil
import pytest
import torch

ray = pytest.importorskip("ray", reason="several workers need the package ray (the extra parallel)")

from nava_core.batch import Failed, Made, Runner, Watcher, run_batch  # noqa: E402
from nava_core.checkpoint import WrongFileError  # noqa: E402
from nava_core.cli import main  # noqa: E402
from nava_core.demo import make_small_models  # noqa: E402
from nava_core.jobs import Defaults  # noqa: E402
from nava_core.parallel import batch as workers  # noqa: E402
from nava_core.parallel import cluster  # noqa: E402
from nava_core.pipeline import ClipLatents  # noqa: E402

FAKE = Path(__file__).with_name("_fake_pipeline.py")
spec = importlib.util.spec_from_file_location("_fake_pipeline", FAKE)
fake = importlib.util.module_from_spec(spec)
sys.modules.setdefault("_fake_pipeline", fake)
fake = sys.modules["_fake_pipeline"]
spec.loader.exec_module(fake)
ray.cloudpickle.register_pickle_by_value(fake)
THIS = sys.modules[__name__]
ray.cloudpickle.register_pickle_by_value(THIS)
FAST = Defaults(steps=2)
ENDING_SECONDS = 10  # in which no process may be left


@pytest.fixture(scope="session")
def ray_here():
    """Ray with places for four workers; everything of it ends with the tests."""
    os.environ["PYTORCH_CUDA_ALLOC_CONF"] = "backend:cudaMallocAsync"  # as a host that started this process may have
    try:
        with cluster.connected(cpus=4):
            yield
    finally:
        os.environ.pop("PYTORCH_CUDA_ALLOC_CONF", None)


def write(folder, *lines):
    path = folder / "clips.jsonl"
    path.write_text("\n".join(json.dumps(line) for line in lines) + "\n")
    return path


def run(source, out, pipeline=fake.FakePipeline, count=2, sharing=None, **options):
    runner = partial(workers.WorkersRunner, count=count, gpus=0, sharing=sharing)
    return run_batch(source, out, pipeline, FAST, make_runner=runner, **options)


def gone(pids, seconds=20):
    """Whether these processes end; a machine with nothing else to do takes a few seconds."""
    end = time.monotonic() + seconds
    while any(map(alive, pids)) and time.monotonic() < end:
        time.sleep(0.1)
    return not any(map(alive, pids))


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def statuses(result):
    return [outcome.status for outcome in result.outcomes]


def files(out):
    return {path.name: path.read_bytes() for path in out.iterdir() if path.suffix in (".mp4", ".wav")}


def assert_same_clips(folder, other, names):
    """The same up to rounding: some processors' kernels go by where in memory weights lie, and workers hold their own.
    Of that rounding H.264 makes other files, so that latents are compared."""
    for name in names:
        one, two = (ClipLatents.load(each / f"{name}.latents.safetensors") for each in (folder, other))
        for part in ("video", "audio"):
            pair = getattr(one, part), getattr(two, part)
            assert (pair[0] is None) == (pair[1] is None)
            if pair[0] is not None:
                torch.testing.assert_close(*pair, atol=5e-3, rtol=1e-3)


class Tells(fake.FakePipeline):
    """Clips that hold what a test wants to know of the worker; some words of a prompt end or delay it."""

    def denoise(self, prompt, *, callback, **request):
        if prompt.startswith("DIE"):
            marks = Path(prompt.split()[1])
            marks.write_text(f"{marks.read_text() if marks.exists() else ''}{os.getpid()}\n")
            if len(marks.read_text().splitlines()) <= int(prompt.split()[2]):
                os.kill(os.getpid(), signal.SIGKILL)
        if "SLOW" in prompt:
            time.sleep(0.5)
        latents = super().denoise(prompt, callback=callback, **request)
        image = request["image"] and Path(request["image"]).read_bytes().decode()
        voices = [Path(voice).read_bytes().decode() for voice in request["voices"]]
        environment = {name: value for name, value in os.environ.items() if "ALLOC" in name}
        settings = {
            "prompt": prompt, "pid": os.getpid(), "node": ray.get_runtime_context().get_node_id(), "image": image,
            "voices": voices, "environment": environment,
        }  # fmt: skip
        return replace(latents, settings=settings)


def told(out):
    return [json.loads(data) for data in files(out).values()]


# --- the same as one process -------------------------------------------------------------------------------------


def test_clips_files_and_outcomes_of_one_process(tmp_path, ray_here):
    (tmp_path / "v.wav").write_bytes(b"voice")
    source = write(
        tmp_path,
        {"prompt": "one", "id": "Größe 漢字"},
        {"promt": "a typo"},
        {"prompt": "two", "typo": 1},
        {"prompt": "one"},
        {"prompt": "one", "id": "again"},
        {"prompt": "BOOM"},
        {"prompt": "BOOM", "id": "once more"},
        {"prompt": "three", "id": "Größe 漢字"},
        {"prompt": "four", "gen_turn": 2, "audio_only": True},
    )
    one = run_batch(source, tmp_path / "one", fake.FakePipeline, FAST)
    two = run(source, tmp_path / "two")
    assert files(tmp_path / "two") == files(tmp_path / "one")
    assert statuses(two) == statuses(one)

    def facts(result):
        return [{**outcome.record(), "seconds": None} for outcome in result.outcomes]

    assert facts(two) == facts(one)
    summaries = [json.loads((tmp_path / name / "summary.json").read_text()) for name in ("one", "two")]
    assert summaries[0]["counts"] == summaries[1]["counts"]
    assert [clip["line"] for clip in summaries[1]["clips"]] == [clip["line"] for clip in summaries[0]["clips"]]
    assert not list((tmp_path / "two").glob(".unfinished*"))
    records = [json.loads(line) for line in (tmp_path / "two" / "report.jsonl").read_text().splitlines()]
    assert Counter(record.get("status") for record in records)["made"] == summaries[0]["counts"]["made"]

    again = run(source, tmp_path / "two")
    assert Counter(statuses(again)) == {"skipped": 4, "duplicate": 2, "failed": 4}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    made = make_small_models(tmp_path_factory.mktemp("models"), preview_decoder=False)
    made["text_encoder_fp8"].unlink()
    made["text_encoder_pth"].unlink()
    return made["backbone"].parent


def test_real_clips_are_byte_for_byte_those_of_one_process(tmp_path, ray_here, models, capsys):
    """With picture and sound, a first frame and a voice, through the command."""
    pytest.importorskip("diffusers")
    pytest.importorskip("transformers")
    import wave

    from PIL import Image

    Image.new("RGB", (96, 64), (200, 120, 40)).save(tmp_path / "her.png")
    with wave.open(str(tmp_path / "her.wav"), "wb") as voice:
        voice.setparams((1, 2, 16000, 0, "NONE", ""))
        voice.writeframes(bytes(range(256)) * 125)
    source = write(
        tmp_path,
        {"prompt": "Rain on a roof.", "id": "rain"},
        {"prompt": "She says <S>Come in!<E>", "image_path": "her.png", "spk_wavs": ["her.wav"], "id": "her"},
        {"prompt": "A bell.", "audio_only": True, "id": "bell"},
    )
    options = ["--models", str(models), "--device", "cpu", "--seconds", "0.5", "--size", "64x32", "--steps", "2"]
    for name, more in (("one", []), ("two", ["--workers", "2"])):
        assert main(["batch", str(source), "--out", str(tmp_path / name), *options, *more]) == 0, capsys.readouterr()
    one = files(tmp_path / "one")
    assert sorted(one) == ["bell.wav", "her.mp4", "rain.mp4"]
    assert files(tmp_path / "two") == one
    said = capsys.readouterr().err
    assert "at work" in said
    assert "clips a minute, about" in said


def test_pictures_and_voices_travel_and_the_environment_is_clean(tmp_path, ray_here):
    for name in ("a.png", "v.wav"):
        (tmp_path / name).write_text(name)
    source = write(
        tmp_path,
        *({"prompt": f"SLOW {n} <S>so<E>", "image_path": "a.png", "spk_wavs": ["v.wav"]} for n in range(4)),
    )
    assert statuses(run(source, tmp_path / "out", Tells)) == ["made"] * 4
    clips = told(tmp_path / "out")
    assert all((clip["image"], clip["voices"]) == ("a.png", ["v.wav"]) for clip in clips)
    assert len({clip["pid"] for clip in clips}) == 2  # both worked
    assert os.getpid() not in {clip["pid"] for clip in clips}
    assert not any("cudaMallocAsync" in value for clip in clips for value in clip["environment"].values())


class Undecoded(Tells):
    """Fails to decode the clips that a mark is there for."""

    def save(self, latents, path, **options):
        if Path(latents.settings["prompt"]).exists():
            raise RuntimeError("The GPU is gone.")
        return super().save(latents, path, **options)


def test_latents_travel_and_a_clip_is_finished_from_them(tmp_path, ray_here):
    mark, out = tmp_path / "mark", tmp_path / "out"
    mark.touch()
    source = write(tmp_path, {"prompt": str(mark), "id": "a", "save_latents": True}, {"prompt": "two", "id": "b"})
    assert statuses(run(source, out, Undecoded)) == ["failed", "made"]
    path = out / "a.mp4.latents.safetensors"
    before = path.read_bytes()
    assert sorted(each.name for each in out.glob("*.latents.safetensors")) == [path.name]
    denoised = ClipLatents.load(path).settings["pid"]
    mark.unlink()
    finished, _ = run(source, out, Undecoded).outcomes
    assert (finished.status, finished.from_latents, finished.latents) == ("made", True, path.name)
    assert json.loads((out / "a.mp4").read_text())["pid"] == denoised
    assert path.read_bytes() == before


def test_a_message_names_the_file_that_was_given(tmp_path, ray_here):
    (tmp_path / "a.png").write_text("no picture")

    class Blind:
        def denoise(self, **request):
            raise ValueError(f"{request['image']} is no picture.")

    source = write(tmp_path, {"prompt": "one", "image_path": "a.png"})
    (failed,) = run(source, tmp_path / "out", Blind).failures
    assert failed.error == f"{tmp_path / 'a.png'} is no picture."


def test_faults_of_the_models_and_of_the_disk_end_the_batch(tmp_path, ray_here):
    source = write(tmp_path, {"prompt": "FAULT"}, {"prompt": "DISK"})
    for word, error in (("FAULT", WrongFileError("The VAE is incomplete.")), ("FAULT", ModuleNotFoundError("ftfy"))):
        opener = partial(_faulty, word, error)
        with pytest.raises(type(error)):
            run(source, tmp_path / type(error).__name__, opener, count=1)
    with pytest.raises(OSError, match="No space left"):
        run(write(tmp_path, {"prompt": "DISK"}), tmp_path / "disk", count=1)
    assert json.loads((tmp_path / "disk" / "summary.json").read_text())["counts"] == {"failed": 1}


def _faulty(word, error):
    pipeline = fake.FakePipeline()
    pipeline.faults = {word: error}
    return pipeline


def test_what_opening_raises_is_raised(tmp_path, ray_here):
    def opener():
        raise WrongFileError("This is a LoRA.")

    with pytest.raises(WrongFileError, match="This is a LoRA"):
        run(write(tmp_path, {"prompt": "one"}), tmp_path / "out", opener)


# --- deaths ------------------------------------------------------------------------------------------------------


def test_a_killed_worker_loses_no_line(tmp_path, ray_here):
    marks = tmp_path / "marks"
    lines = [{"prompt": f"clip {n}"} for n in range(6)]
    lines.insert(2, {"prompt": f"DIE {marks} 2"})  # twice, then it is made
    said = []

    class Notes(Watcher):
        def note(self, text):
            said.append(text)

    result = run(write(tmp_path, *lines), tmp_path / "out", Tells, watcher=Notes())
    assert statuses(result) == ["made"] * 7
    assert len(set(marks.read_text().split())) == 3
    assert [text for text in said if "line 3" in text] == said
    assert len(said) == 2


def test_three_deaths_are_a_failed_line(tmp_path, ray_here):
    marks = tmp_path / "marks"
    result = run(write(tmp_path, {"prompt": f"DIE {marks} 9"}, {"prompt": "one"}), tmp_path / "out", Tells)
    assert statuses(result) == ["failed", "made"]
    assert "3 workers ended over this clip" in result.failures[0].error
    assert len(marks.read_text().split()) == 3


# --- several workers for each clip -------------------------------------------------------------------------------

OPTIONS = ["--device", "cpu", "--seconds", "0.5", "--size", "64x32", "--steps", "2"]


def small_batch(folder):
    return write(
        folder,
        {"prompt": "Rain on a roof.", "id": "rain", "save_latents": True},
        {"prompt": "A bell.", "audio_only": True, "id": "bell", "save_latents": True},
        {"prompt": "A dog barks.", "id": "dog", "save_latents": True},
    )


def sharing_workers():
    """Ids of the processes below this one that compute a clip together with others."""
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            if process.cmdline()[:1] and process.cmdline()[0].startswith("ray::NavaWorker"):
                found.append(process.pid)
        except psutil.Error:
            continue
    return found


@pytest.fixture(scope="module")
def by_one_process(tmp_path_factory, models):
    pytest.importorskip("diffusers")
    folder = tmp_path_factory.mktemp("one")
    command = ["batch", str(small_batch(folder)), "--out", str(folder / "out"), "--models", str(models), *OPTIONS]
    assert main(command) == 0
    return folder / "out"


@pytest.fixture(scope="module")
def lora(tmp_path_factory, models):
    """A LoRA for two layers of the small backbone."""
    from safetensors.torch import save_file

    from nava_core import load_backbone

    path = tmp_path_factory.mktemp("lora") / "lora.safetensors"
    backbone, generator, tensors = load_backbone(models / "NAVA_tiny.safetensors"), torch.Generator().manual_seed(1), {}
    for layer in ("double_blocks.0.self_attn.q_audio", "single_blocks.0.ffn.0"):
        rows, columns = backbone.get_parameter(f"{layer}.weight").shape
        tensors[f"{layer}.lora_up.weight"] = torch.randn(rows, 4, generator=generator)
        tensors[f"{layer}.lora_down.weight"] = torch.randn(4, columns, generator=generator)
    save_file(tensors, path)
    return path


def test_two_clips_at_a_time_over_two_workers_each(tmp_path, ray_here, models, by_one_process):
    """Predictions side by side: the clips of one process."""
    out, seen = tmp_path / "out", set()
    command = ["batch", str(small_batch(tmp_path)), "--out", str(out), "--models", str(models), *OPTIONS]
    stop = threading.Event()

    def look():
        while not stop.wait(0.2):
            seen.update(sharing_workers())

    watch = threading.Thread(target=look)
    watch.start()
    try:
        assert main([*command, "--workers", "2", "--parallel", "2", "--layout", "2x1"]) == 0
    finally:
        stop.set()
        watch.join()
    assert files(out).keys() == files(by_one_process).keys()
    assert_same_clips(out, by_one_process, files(out))
    assert len(seen) == 4  # a parallel path that is not taken would have none
    assert gone(seen)


def test_one_clip_at_a_time_over_two_workers_with_a_lora(tmp_path, ray_here, models, lora, by_one_process):
    """Without --workers this process makes the clips, and the LoRA reaches the workers."""
    for name, more in (("one", []), ("shared", ["--parallel", "2", "--layout", "2x1"])):
        command = ["batch", str(small_batch(tmp_path)), "--out", str(tmp_path / name), "--models", str(models)]
        assert main([*command, *OPTIONS, "--lora", str(lora), *more]) == 0
    assert_same_clips(tmp_path / "shared", tmp_path / "one", files(tmp_path / "one"))
    with pytest.raises(AssertionError, match="not close"):
        assert_same_clips(tmp_path / "one", by_one_process, ["bell.wav"])


def test_a_killed_member_of_a_group_loses_no_line(tmp_path, ray_here, models, by_one_process, capsys):
    out, killed, before = tmp_path / "out", [], set(sharing_workers())
    command = ["batch", str(small_batch(tmp_path)), "--out", str(out), "--models", str(models), *OPTIONS]

    def kill_one():
        while not killed:
            for pid in sorted(set(sharing_workers()) - before)[1:2]:
                os.kill(pid, signal.SIGKILL)
                killed.append(pid)
            time.sleep(0.05)

    killer = threading.Thread(target=kill_one, daemon=True)
    killer.start()
    assert main([*command, "--workers", "1", "--parallel", "2", "--layout", "2x1"]) == 0
    assert killed
    assert files(out).keys() == files(by_one_process).keys()
    assert_same_clips(out, by_one_process, files(out))
    assert "has ended: its clip goes to another" in capsys.readouterr().err


def test_a_killed_owner_of_a_group_loses_no_line_and_leaves_no_worker(tmp_path, ray_here):
    """The process that runs a clip's stages dies: the workers it had go with it, and others take their places."""
    marks = tmp_path / "marks"
    source = write(tmp_path, {"prompt": f"DIE {marks} 1"}, {"prompt": "one"})
    result = run(source, tmp_path / "out", Owns, count=1, sharing=2)
    assert statuses(result) == ["made"] * 2
    owned = [set(map(int, line.split())) for line in (tmp_path / "marks.workers").read_text().splitlines()]
    assert len(owned) == 2
    assert all(len(pids) == 2 for pids in owned)
    assert gone(set.union(*owned))


class Owns(Tells):
    """Starts two workers of its own for its first clip, and tells them."""

    def __init__(self):
        super().__init__()
        self.workers = None

    def denoise(self, prompt, **request):
        from nava_core.parallel.workers import Workers

        if self.workers is None:
            self.workers = Workers(2, "cpu", 0)
            if prompt.startswith("DIE"):
                with Path(prompt.split()[1] + ".workers").open("a") as file:
                    file.write(" ".join(str(about["pid"]) for about in self.workers.about) + "\n")
        return super().denoise(prompt, **request)


def test_groups_that_do_not_fit(tmp_path, ray_here):
    runner = partial(workers.WorkersRunner, count=3, gpus=0, sharing=2)
    with pytest.raises(
        cluster.ClusterError, match=r"3 workers need 2 CPUs each, and there are 4: .* smaller --parallel"
    ):
        run_batch(write(tmp_path, {"prompt": "one"}), tmp_path / "out", refuse, FAST, make_runner=runner)


def test_a_layout_that_does_not_fit_the_model_is_refused_before_workers_start(tmp_path, models, capsys):
    command = ["batch", str(small_batch(tmp_path)), "--out", str(tmp_path / "out"), "--models", str(models), *OPTIONS]
    assert main([*command, "--workers", "2", "--parallel", "3", "--layout", "1x3"], open_pipeline=refuse) == 2
    assert "attention heads cannot be shared evenly by 3 workers" in capsys.readouterr().err
    assert main([*command, "--workers", "2", "--layout", "1x2"], open_pipeline=refuse) == 2
    assert "give --parallel N too" in capsys.readouterr().err


# --- what is not there -------------------------------------------------------------------------------------------


def refuse():
    raise AssertionError("loaded")


def test_another_version_is_refused_before_anything_is_loaded(tmp_path, ray_here, monkeypatch):
    monkeypatch.setattr(workers, "code_version", lambda: "another")
    with pytest.raises(cluster.ClusterError, match=r"runs another version of this pack .*the batch another"):
        run(write(tmp_path, {"prompt": "one"}), tmp_path / "out", refuse)


def test_models_that_a_worker_lacks_are_named_before_anything_is_loaded(tmp_path, ray_here):
    runner = partial(workers.WorkersRunner, count=2, gpus=0, models=(tmp_path / "NAVA.safetensors",))
    with pytest.raises(cluster.ClusterError, match=r"has no .*NAVA\.safetensors"):
        run_batch(write(tmp_path, {"prompt": "one"}), tmp_path / "out", refuse, FAST, make_runner=runner)


def test_more_workers_than_places(tmp_path, ray_here):
    for count, gpus, words in ((5, 0, "5 workers need a CPU each, and there are 4"), (1, 1, "1 worker needs a GPU")):
        runner = partial(workers.WorkersRunner, count=count, gpus=gpus)
        with pytest.raises(cluster.ClusterError, match=words):
            run_batch(write(tmp_path, {"prompt": "one"}), tmp_path / "out", refuse, FAST, make_runner=runner)


def test_a_cluster_that_is_not_there_is_one_sentence(tmp_path, models, monkeypatch, capsys):
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "shutdown", lambda: None)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    source = write(tmp_path, {"prompt": "one"})
    command = ["batch", str(source), "--out", str(tmp_path / "out"), "--models", str(models), "--device", "cpu"]
    for address in (f"127.0.0.1:{port}", "nonsense", "ray://127.0.0.1:1"):
        assert main([*command, "--cluster", address], open_pipeline=refuse) == 1
        said = capsys.readouterr().err.strip().splitlines()
        assert len([line for line in said if line.startswith("nava batch:")]) == 1
        assert address in said[-1]


def test_the_clusters_address_comes_from_the_environment(tmp_path, models, monkeypatch, capsys):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    source = write(tmp_path, {"prompt": "one"})
    command = ["batch", str(source), "--out", str(tmp_path / "out"), "--models", str(models), "--cluster"]
    assert main(command) == 2
    assert "NAVA_RAY_ADDRESS" in capsys.readouterr().err
    assert cluster.configured_address({"RAY_ADDRESS": "a:1"}) == "a:1"
    assert cluster.configured_address({"RAY_ADDRESS": "a:1", "NAVA_RAY_ADDRESS": "b:2"}) == "b:2"
    assert main([*command[:-1], "--workers", "2", "--device", "cuda:1"]) == 2
    assert "CUDA_VISIBLE_DEVICES" in capsys.readouterr().err


def test_without_ray_it_is_one_sentence(tmp_path, models, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "ray", None)
    source = write(tmp_path, {"prompt": "one"})
    command = ["batch", str(source), "--out", str(tmp_path / "out"), "--models", str(models), "--workers", "2"]
    assert main(command, open_pipeline=refuse) == 1
    assert "pip install .[parallel]" in capsys.readouterr().err


# --- long files --------------------------------------------------------------------------------------------------


class Hands(Runner):
    """Four places; ends the oldest clip first, and notes how many there are."""

    places = 4

    def __init__(self, open_pipeline, watcher):
        self.tasks, self.most = [], 0
        Hands.last = self

    def start(self, task):
        self.tasks.append(task)
        self.most = max(self.most, len(self.tasks))

    def finished(self):
        task = self.tasks.pop(0)
        if "BOOM" in task.job.prompt:
            return [(task, Failed("boom"))]
        task.path.write_text(task.key)
        return [(task, Made(0.0))]

    def close(self):
        self.tasks.clear()


@pytest.mark.parametrize("same", [False, True])
def test_a_long_file_is_streamed(tmp_path, same):
    """40 MB of prompts; duplicates, too, wait in bounded number."""
    count, length = 1000, 40_000
    source = tmp_path / "long.jsonl"
    with source.open("w") as file:
        for number in range(count):
            file.write(json.dumps({"prompt": f"{0 if same else number} " + "rain " * (length // 5)}) + "\n")
    gc.collect()
    tracemalloc.start()
    try:
        result = run_batch(source, tmp_path / "out", lambda: None, FAST, make_runner=Hands)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert Hands.last.most == (1 if same else 4)
    assert Counter(statuses(result)) == ({"made": 1, "duplicate": count - 1} if same else {"made": count})
    assert peak < count * length / 4
    assert [outcome.line for outcome in result.outcomes] == list(range(1, count + 1))


def test_likes_of_a_failed_clip_are_tried_themselves(tmp_path):
    lines = [{"prompt": "BOOM", "id": f"a{n}"} for n in range(3)]
    result = run_batch(write(tmp_path, *lines), tmp_path / "out", lambda: None, FAST, make_runner=Hands)
    assert statuses(result) == ["failed"] * 3


# --- what is left behind -----------------------------------------------------------------------------------------


def start(source, out, models, *options, seconds=1.0, **environment):
    environment = {
        **os.environ, "FAKE_SECONDS_A_CLIP": str(seconds), "PYTHONPATH": str(FAKE.parents[2]), **environment,
    }  # fmt: skip
    command = [sys.executable, str(FAKE), "batch", str(source), "--out", str(out), "--steps", "2", "--device", "cpu"]
    return subprocess.Popen(
        [*command, "--models", str(models), *options],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def marked(mark):
    """Processes that have ``mark`` in their environment, by id: their names."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if mark.encode() in (folder / "environ").read_bytes():
                found[int(folder.name)] = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode()[:80]
        except OSError:
            continue
    return found


def wait_for(condition, process, seconds=120):
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.stdout.read()
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="processes are found through /proc")
@pytest.mark.parametrize(("kind", "code"), [(signal.SIGKILL, -9), (signal.SIGINT, 130), (signal.SIGTERM, 130)])
def test_no_process_is_left_and_the_next_run_goes_on(tmp_path, models, kind, code):
    source = write(tmp_path, *({"prompt": f"clip {n}"} for n in range(8)))
    out, mark = tmp_path / "out", f"NAVA_TEST_MARK={tmp_path}"
    process = start(source, out, models, "--workers", "2", NAVA_TEST_MARK=str(tmp_path))
    wait_for(lambda: out.is_dir() and len(files(out)) >= 2, process)
    assert len([name for name in marked(mark).values() if "BatchWorker" in name]) == 2
    process.send_signal(kind)
    deadline = time.monotonic() + ENDING_SECONDS
    while time.monotonic() < deadline and marked(mark):
        process.poll()
        time.sleep(0.1)
    assert marked(mark) == {}
    said = process.communicate(timeout=10)[0]
    assert process.returncode == code, said
    before = files(out)
    assert 2 <= len(before) < 8
    assert all(json.loads(data)["steps"] == 2 for data in before.values())  # whole
    if kind != signal.SIGKILL:
        assert "Interrupted" in said
        assert json.loads((out / "summary.json").read_text())["interrupted"]
    result = run_batch(source, out, fake.FakePipeline, FAST)
    assert Counter(statuses(result))["skipped"] >= len(before) - 1
    assert len(files(out)) == 8


# --- two machines ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def two_nodes():
    """A cluster of two Ray nodes on this machine, started apart from this process."""
    if ray.is_initialized():
        ray.shutdown()
    from ray.cluster_utils import Cluster

    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    made.add_node(num_cpus=1)
    yield made
    made.shutdown()


def makers(name):
    """Process and node of every clip in a folder."""
    return {(clip["pid"], clip["node"]) for clip in told(name)}


def test_a_batch_over_two_nodes(tmp_path, models, two_nodes):
    """A worker a node; a kill of the batch ends its workers and leaves the cluster to the next batch."""
    (tmp_path / "v.wav").write_bytes(b"voice")
    lines = [{"prompt": f"SLOW {n} <S>so<E>", "spk_wavs": ["v.wav"]} for n in range(12)]
    source, out, mark = write(tmp_path, *lines), tmp_path / "out", f"NAVA_TEST_MARK={tmp_path}"
    options = {"NAVA_RAY_ADDRESS": two_nodes.address, "NAVA_TEST_MARK": str(tmp_path), "FAKE_TELLS": "1"}
    process = start(source, out, models, "--cluster", seconds=0.2, **options)
    wait_for(lambda: out.is_dir() and len(files(out)) >= 2, process)
    process.kill()
    process.wait()
    here = {pid for pid, _ in makers(out)}
    deadline = time.monotonic() + ENDING_SECONDS
    while time.monotonic() < deadline and (any(Path("/proc", str(pid)).exists() for pid in here) or marked(mark)):
        time.sleep(0.1)
    assert not [pid for pid in here if Path("/proc", str(pid)).exists()]
    assert marked(mark) == {}

    process = start(source, out, models, "--cluster", two_nodes.address, seconds=0.2, FAKE_TELLS="1")
    said = process.communicate(timeout=180)[0]
    assert process.returncode == 0, said
    assert "finished before" in said
    assert len(files(out)) == len(lines)
    assert len({node for pid, node in makers(out) if pid not in here}) == 2
    assert all(clip["voices"] == ["voice"] for clip in told(out))


# --- given parts and long clips ----------------------------------------------------------------------------------


class Reads(fake.FakePipeline):
    """Clips that hold the words of the files that were given; long clips die where a prompt says so, once."""

    def denoise(self, prompt, *, callback, **request):
        latents = super().denoise(prompt, callback=callback, **request)
        given = {name: Path(request[name]).read_text() for name in ("sound", "frames") if name in request}
        given |= {str(time): Path(path).read_text() for time, path in request.get("pictures", {}).items()}
        return replace(latents, settings={"prompt": prompt, "given": given})

    def make_long(self, path, prompts, *, state, **rest):
        if "DIE" in prompts[-1] and not (Path(state) / "0.txt").exists():
            super().make_long(path, prompts[:1], state=state, **rest)
            os.kill(os.getpid(), signal.SIGKILL)
        made = super().make_long(path, prompts, state=state, **rest)
        return replace(made, warnings=(f"made {self.made}",))


@pytest.mark.usefixtures("ray_here")
def test_given_files_go_to_the_worker_and_a_lost_long_clip_goes_on_there(tmp_path):
    for name in ("a.wav", "b.mp4", "c.png", "d.png"):
        (tmp_path / name).write_text(name)
    source = write(
        tmp_path,
        {"id": "s", "prompt": "x", "sound_path": "a.wav", "last_image_path": "c.png", "images_at": {"1": "d.png"}},
        {"id": "v", "prompt": "y", "video_path": "b.mp4"},
        {"id": "l", "prompt": "one", "then": ["two DIE"], "seconds": 20},
    )
    out = tmp_path / "out"
    result = run(source, out, Reads)
    assert statuses(result) == ["made"] * 3
    given = [json.loads((out / f"{name}.mp4").read_text())["given"] for name in "sv"]
    assert given == [{"sound": "a.wav", "1.0": "d.png", "end": "c.png"}, {"frames": "b.mp4"}]
    assert (out / "l.mp4").read_text() == "one | two DIE"
    assert result.outcomes[2].warnings == ("made [1]",)  # the first stage was that of the worker that was lost
    assert not (out / ".segments").exists()
