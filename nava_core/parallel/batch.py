"""A batch's clips made by several workers, Ray actors on this machine or over a cluster.

A worker writes a clip to a file of its own and hands over the bytes, so that its machine need not share a disk with the
batch's; the files that a job names go to it in the same way. The models it reads from the paths that they have
here. A worker that ends is replaced, and its clip goes to another.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import shutil
import socket
import tempfile
import time
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..batch import Failed, Made, Runner, Task, Watcher, failure_of, make_clip
from ..explain import explain
from ..jobs import Job
from .cluster import WORKER_ENVIRONMENT, ClusterError, code_version, connected
from .workers import OWNER, LostWorkerError

ATTEMPTS = 3  # of a clip whose worker ends
START_SECONDS = 300.0  # for a worker to appear
POLL_SECONDS = 0.5

Inputs = dict[Path, bytes]
Result = tuple[Made | Failed, bytes, bytes | None]  # of a clip, its file's bytes and its latents'


class BatchWorker:
    """The actor: opens the pipeline once, then makes a clip at a time."""

    def problem(self, version: str, models: tuple[Path, ...]) -> str | None:
        """Why this worker cannot make the clips that the others make; nothing is loaded for it."""
        machine = socket.gethostname()
        if version != code_version():
            return (
                f"The worker on {machine} runs another version of this pack ({code_version()}, the batch {version}): "
                "install the same one on every machine."
            )
        missing = [path for path in models if not path.exists()]
        if missing:
            return f"The worker's machine {machine} has no {missing[0]}: every machine needs the models at one path."
        return None

    def open(self, opener: Callable[[], Callable[..., Any]], version: str, models: tuple[Path, ...]) -> Failed | None:
        """Open the pipeline; what went wrong, if something did."""
        try:
            problem = self.problem(version, models)
            if problem:
                raise ClusterError(problem)
            self.pipeline = opener()
        except Exception as error:
            return _for_the_road(Failed(explain(error), fatal=error, models=True), {})
        return None

    def make(self, task: Task, inputs: Inputs, kept: bytes | None, scratch: str | None) -> Result:
        """A clip: how it went, None where one of the workers that share it was lost; its file's bytes, and those of its
        latents where they are to be kept and were not ``kept`` already."""
        folder = Path(tempfile.mkdtemp(prefix="nava-clip-", dir=scratch))
        try:
            job, names = _with_local_inputs(task.job, inputs, folder)
            state = task.state
            if state is not None and not state.parent.parent.is_dir():
                state = folder / "segments"  # this machine does not share the batch's disk
            kept_at = folder / "kept" / task.latents.name
            local = replace(task, job=job, path=folder / task.path.name, latents=kept_at, state=state)
            local.latents.parent.mkdir()
            if kept is not None:
                local.latents.write_bytes(kept)
            try:
                result = self._made(local)
            except LostWorkerError:
                return None, b"", None
            data = local.path.read_bytes() if isinstance(result, Made) else b""
            new = kept is None and local.latents.is_file()
            return _for_the_road(result, names), data, local.latents.read_bytes() if new else None
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def _made(self, task: Task) -> Made | Failed:
        try:
            return make_clip(self.pipeline, task, lambda *_: None)
        except LostWorkerError:
            raise
        except Exception as error:
            return failure_of(error, task.job)


def _with_local_inputs(job: Job, inputs: Inputs, folder: Path) -> tuple[Job, dict[str, str]]:
    """The job with the files that it names in ``folder``; and what they are called by whom: {here: there}."""
    places = {}
    for number, (path, data) in enumerate(inputs.items()):
        places[path] = folder / str(number) / path.name
        places[path].parent.mkdir()
        places[path].write_bytes(data)
    names = {str(place): str(path) for path, place in places.items()}
    return job.moved(places), names


def _for_the_road(result: Made | Failed, names: dict[str, str]) -> Made | Failed:
    """A result that can be sent: with errors that survive the way, and files called by their real names."""

    def renamed(text: str) -> str:
        for here, there in names.items():
            text = text.replace(here, there)
        return text

    if isinstance(result, Made):
        return replace(result, warnings=tuple(renamed(warning) for warning in result.warnings))
    fatal = None if result.fatal is None else _bare(result.fatal)
    return replace(result, error=renamed(result.error), details=renamed(result.details), fatal=fatal)


def _bare(error: BaseException) -> BaseException:
    """The error made anew from its plain arguments, without what it hangs on to; a RuntimeError where it has others."""
    try:
        make, arguments, *_ = error.__reduce__()
        if all(isinstance(argument, str | int | float | None) for argument in arguments):
            return make(*arguments)
    except Exception:
        pass  # its type takes other arguments than it keeps
    return RuntimeError(explain(error))


@dataclass(eq=False)
class _Worker:
    """An actor as the batch knows it. ``places``: what is reserved for it and the workers that share its clips."""

    actor: Any
    since: float
    places: Any = None
    ready: bool = False
    task: Task | None = None


class WorkersRunner(Runner):
    """Makes clips on ``count`` workers (None: as many as the cluster has GPUs for, or one a machine where it has none).

    ``address``: of a cluster, None for workers on this machine. ``gpus``: of each worker, 0 for one on the CPU, None
    for one where there are any. ``sharing``: how many workers make each clip together (``Parallel.workers`` of the
    pipeline); their places are reserved as one group, on one machine where it has them. ``models``: files and folders
    that every worker's machine must have. ``open_pipeline`` is sent to them. Raises RuntimeError where Ray is missing;
    ClusterError, before anything is loaded, where there is no cluster or it has fewer places than workers, or a worker
    runs another version of this code or lacks a file; then what ``open_pipeline`` raises.
    """

    def __init__(
        self,
        open_pipeline: Callable[[], Callable[..., Any]],
        watcher: Watcher,
        *,
        count: int | None = None,
        address: str | None = None,
        gpus: int | None = None,
        sharing: int | None = None,
        models: tuple[Path, ...] = (),
    ) -> None:
        self.watcher, self.models, self.results = watcher, models, []
        self.sharing = sharing
        self.stack = contextlib.ExitStack()
        self.workers: list[_Worker] = []
        self.queue: deque[Task] = deque()
        self.lost: Counter[Path] = Counter()  # workers that ended, by where the clip they were at was to be
        self.calls: dict[Any, _Worker] = {}  # a worker's call under way
        self.failed_starts = 0
        try:
            cpus = None if address or count is None else count * (sharing or 1)
            self.ray, self.scratch = self.stack.enter_context(connected(address, cpus=cpus))
            self.open_pipeline = open_pipeline
            self.places = self._find_places(count, gpus)
            self.environment = _environment(None if address else self.places * (sharing or 1))
            self._first_workers()
        except BaseException:
            self.close()
            raise

    def start(self, task: Task) -> None:
        self.queue.append(task)
        self._hand_out()

    def finished(self) -> list[tuple[Task, Made | Failed]]:
        while not self.results:
            self._wait()
            self._hand_out()
        return super().finished()

    def close(self) -> None:
        for worker in self.workers:
            with contextlib.suppress(Exception):
                self.ray.kill(worker.actor)
            if worker.places is not None:  # with all that works there
                with contextlib.suppress(Exception):
                    self.ray.util.remove_placement_group(worker.places)
        self.stack.close()

    # ------------------------------------------------------------ clips

    def _hand_out(self) -> None:
        """Gives waiting clips to idle workers."""
        for worker in self.workers:
            while self.queue and worker.ready and worker.task is None:
                task = self.queue.popleft()
                try:
                    inputs = {path: path.read_bytes() for path in task.job.files}
                    kept = None if task.kept_latents() is None else task.latents.read_bytes()
                except OSError as error:
                    self.results.append((task, failure_of(error)))
                    continue
                worker.task = task
                self.calls[worker.actor.make.remote(task, inputs, kept, self.scratch)] = worker

    def _wait(self) -> None:
        """Takes what a worker has ended, or returns after a moment."""
        if self.results:
            return
        ended, _ = self.ray.wait(list(self.calls), timeout=POLL_SECONDS)
        for call in ended:
            self._take(call)
        started = any(worker.ready for worker in self.workers)
        if not started and time.monotonic() > max(worker.since for worker in self.workers) + START_SECONDS:
            raise ClusterError("All workers have ended, and no new one could start: see that the cluster is up.")

    def _take(self, call: Any) -> None:
        worker = self.calls.pop(call)
        task, worker.task = worker.task, None
        try:
            value = self.ray.get(call)
        except self.ray.exceptions.RayTaskError as error:
            if task is None:
                raise ClusterError(_start_problem(error)) from error
            self.results.append((task, failure_of(error.cause)))
        except self.ray.exceptions.RayError:
            self._replace(worker, task)
        else:
            self._opened(worker, value) if task is None else self._made_elsewhere(task, *value)

    def _made_elsewhere(self, task: Task, result: Made | Failed | None, data: bytes, latents: bytes | None) -> None:
        if result is None:
            self._again(task)
            return
        self.lost.pop(task.path, None)
        try:
            if latents is not None:
                part = task.path.with_name(task.latents.name)
                part.write_bytes(latents)
                os.replace(part, task.latents)
            if isinstance(result, Made):
                task.path.write_bytes(data)
        except OSError as error:
            result = failure_of(error)
        self.results.append((task, result))

    # ------------------------------------------------------------ workers

    def _find_places(self, count: int | None, gpus: int | None) -> int:
        """How many workers; ``self.gpus`` is then what each of them takes."""
        there = self.ray.cluster_resources()
        self.gpus = int(there.get("GPU", 0) > 0) if gpus is None else gpus
        kind = "GPU" if self.gpus else "CPU"
        each = (self.gpus or 1) * (self.sharing or 1)
        places = int(there.get(kind, 0)) // each
        machines = sum(node["Alive"] for node in self.ray.nodes())
        wanted = count or (max(1, places) if self.gpus or self.sharing else machines)
        if wanted > places:
            found = int(there.get(kind, 0))
            needed = f"{each} {kind}s" if each > 1 else f"a {kind}"
            fewer = "fewer --workers or a smaller --parallel" if self.sharing else "fewer --workers"
            raise ClusterError(
                f"{wanted} worker{'s need' if wanted > 1 else ' needs'} {needed} each, and there "
                f"{'is' if found == 1 else 'are'} {found}: give {fewer}{', or --device cpu' if self.gpus else ''}."
            )
        return wanted

    def _new_worker(self, places: Any = None) -> _Worker:
        """Starts one, in the ``places`` of another that has ended, where it had some."""
        options = {"num_gpus": self.gpus, "num_cpus": 0 if self.gpus else 1, "scheduling_strategy": "SPREAD"}
        if self.sharing:
            places = places or self._reserve()
            # Text encoder and VAEs work on the GPU of one of the workers that share the clip.
            options = {"num_gpus": OWNER if self.gpus else 0, "num_cpus": 0, "scheduling_strategy": _first_of(places)}
        actor = self.ray.remote(BatchWorker).options(
            runtime_env={"env_vars": self.environment}, max_restarts=0, **options
        )
        return _Worker(actor.remote(), time.monotonic(), places)

    def _reserve(self) -> Any:
        """Places for the workers that share a clip: a GPU each, or a core."""
        kind = "GPU" if self.gpus else "CPU"
        return self.ray.util.placement_group([{kind: 1} for _ in range(self.sharing)], strategy="PACK")

    def _first_workers(self) -> None:
        """Starts them all, and has all checked before any opens the pipeline."""
        self.workers = [self._new_worker() for _ in range(self.places)]
        asked = (code_version(), self.models)
        for problem in self._answers([worker.actor.problem.remote(*asked) for worker in self.workers]):
            if problem:
                raise ClusterError(problem)
        opened = self._answers([worker.actor.open.remote(self.open_pipeline, *asked) for worker in self.workers])
        for worker, failed in zip(self.workers, opened, strict=True):
            self._opened(worker, failed)

    def _answers(self, calls: list) -> list:
        try:
            return self.ray.get(calls, timeout=START_SECONDS)
        except self.ray.exceptions.RayError as error:
            raise ClusterError(_start_problem(error)) from error

    def _opened(self, worker: _Worker, failed: Failed | None) -> None:
        if failed is not None:
            raise failed.fatal
        worker.ready, self.failed_starts = True, 0

    def _replace(self, worker: _Worker, task: Task | None) -> None:
        """A worker has ended: another takes its place, and its clip goes to the next that is free."""
        self.workers.remove(worker)
        with contextlib.suppress(Exception):
            self.ray.kill(worker.actor)
        if task is None:
            self.failed_starts += 1
            if self.failed_starts > ATTEMPTS:
                raise ClusterError("Workers end as soon as they start: see whether memory is short.")
        else:
            self._again(task)
        new = self._new_worker(worker.places)
        self.workers.append(new)
        self.calls[new.actor.open.remote(self.open_pipeline, code_version(), self.models)] = new

    def _again(self, task: Task) -> None:
        """The clip of a worker that has ended goes to the next that is free, or is given up."""
        self.lost[task.path] += 1
        if self.lost[task.path] < ATTEMPTS:
            self.queue.appendleft(task)
            self.watcher.note(f"The worker at line {task.line} has ended: its clip goes to another.")
            return
        del self.lost[task.path]
        self.results.append(
            (
                task,
                Failed(
                    f"{ATTEMPTS} workers ended over this clip: make it smaller or shorter, as memory is what a worker "
                    "mostly ends for."
                ),
            )
        )


def _environment(workers_here: int | None) -> dict[str, str]:
    """A worker's variables beside those that it finds; ``workers_here``: that share this machine."""
    environment = dict(WORKER_ENVIRONMENT)
    if workers_here is not None:
        paths = [str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")]
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
        if "OMP_NUM_THREADS" not in os.environ:
            environment["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // workers_here))
    return environment


def _first_of(places: Any) -> Any:
    """The first of reserved places; what is started from there takes others of them."""
    strategies = importlib.import_module("ray.util.scheduling_strategies")
    return strategies.PlacementGroupSchedulingStrategy(
        places, placement_group_bundle_index=0, placement_group_capture_child_tasks=True
    )


def _start_problem(error: Exception) -> str:
    text = str(error)
    if "No module named 'nava_core" in text:
        return "A worker has no nava_core: install this pack on every machine of the cluster."
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    said = f" ({lines[-1][:200]})" if lines else ""
    return f"A worker could not start{said}: see that the same pack is installed on every machine and memory is free."
