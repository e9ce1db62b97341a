"""Workers for one clip: Ray actors that each hold a backbone and talk to each other through torch.distributed.

The owner (a command, or a host's server) keeps no weights: :class:`ParallelBackbone` takes the backbone's arguments
and the workers compute. Ray starts them on this machine, or on the cluster that the owner's environment names (see
``cluster``), and ends them when the owner ends, however it does.
"""

from __future__ import annotations

import os
import time
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack
from dataclasses import asdict
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import save
from torch import Tensor, nn

from ..checkpoint import (
    FileInfo,
    WeightChange,
    backbone_config,
    describe_file,
    main_dtype,
    open_checkpoint,
    plan_tensors,
    stream_tensors,
)
from ..explain import is_out_of_memory
from .cluster import ADDRESS_VARIABLES, UNWANTED, ClusterError, code_version, configured_address, connected, require_ray
from .layout import Layout, choose_layout, fitting_layouts, layout_problem
from .worker import file_digest

WEIGHTS = ("replicated", "sharded")
CHUNK_BYTES = 2**27  # of weights sent at once
START_SECONDS = 120
POLL_SECONDS = 0.5
GRACE_SECONDS = 4  # that the others' ends are waited for where one has failed
# Shares of a GPU where the places of a clip's workers are reserved: the owner works on that of one of them.
OWNER, BESIDE_OWNER = 0.1, 0.9
PACK = Path(__file__).resolve().parents[2]

Pair = tuple[Tensor | None, Tensor | None]
Changes = Callable[[], AbstractContextManager[Mapping[str, WeightChange]]]


class WorkersError(ClusterError):
    """The workers could not be started, or one was lost; the message is the sentence to show."""


class LostWorkerError(WorkersError):
    """A worker ended by itself: what was asked for can be asked for again."""


def check_parallel(
    config, workers: int, layout: Layout | None = None, weights: str = "replicated", device: str = "cpu"
) -> None:
    """Raise, in a sentence and before anything is loaded, where this cannot be: ValueError for a layout or weights that
    do not fit, RuntimeError for a missing package, too few GPUs or a platform without NCCL.

    The GPUs of a cluster, and those reserved for a batch's clip, are counted by Ray when the workers start.
    """
    if weights not in WEIGHTS:
        raise ValueError(f"There are no {weights!r} weights: choose {' or '.join(WEIGHTS)}.")
    problem = layout_problem(layout, workers, config)
    if problem is None and weights == "sharded":
        problem = layout_problem(layout or Layout(1, workers), workers, config)
    if problem:
        raise ValueError(problem)
    ray = require_ray()
    if device == "cuda":
        if not dist.is_nccl_available():
            raise RuntimeError(
                "This PyTorch has no NCCL, which the workers' GPUs would talk through (there is none for Windows): in "
                "ComfyUI use the MultiGPU CFG Split node instead, which needs none."
            )
        here = configured_address() is None and not _has_reserved_places(ray)
        if here and torch.cuda.device_count() < workers:
            raise RuntimeError(
                f"{workers} workers need {workers} GPUs, and this machine has {torch.cuda.device_count()}: ask for "
                f"fewer, or name a cluster in {ADDRESS_VARIABLES[0]}."
            )


def _has_reserved_places(ray) -> bool:
    """Whether this process makes clips of a batch whose workers have places reserved."""
    return ray.is_initialized() and ray.util.get_current_placement_group() is not None


def _check_room(ray, workers: int, device: str) -> None:
    kind = "GPU" if device == "cuda" else "CPU"
    there = int(ray.cluster_resources().get(kind, 0))
    if there < workers:
        raise WorkersError(
            f"{workers} workers need {workers} {kind}s, and Ray has {there}: ask for fewer, or add some."
        )


def _actor(ray, device: str):
    """An actor class that Ray sends to the workers by value; what it holds is their own ``nava_core``'s."""

    class NavaWorker:
        def __init__(self, device, pack, unwanted):
            import importlib
            import os
            import sys

            for name in unwanted:  # before PyTorch is imported, which reads them
                os.environ.pop(name, None)
            if os.path.isdir(os.path.join(pack, "nava_core")):
                sys.path.insert(0, pack)
            self.worker = importlib.import_module("nava_core.parallel.worker").Worker(device)

        def call(self, name, *arguments):
            return getattr(self.worker, name)(*arguments)

        def place(self):
            import ray

            return ray.util.get_node_ip_address()

    gpu = BESIDE_OWNER if _has_reserved_places(ray) else 1
    options = {"num_cpus": 0, "num_gpus": gpu} if device == "cuda" else {"num_cpus": 1, "num_gpus": 0}
    return ray.remote(max_restarts=0, **options)(NavaWorker)


class Workers:
    """Started workers that know each other. Any failure ends all of them: their collectives cannot be resumed.

    ``check``: called while anything of theirs is waited for, and may raise.
    """

    def __init__(self, count: int, device: str, sequence: int, check: Callable[[], None] | None = None) -> None:
        self.check = check
        self._connection = ExitStack()
        self.actors: list = []
        self._end = weakref.finalize(self, _end_workers, self.actors, self._connection)
        try:
            self.ray = self._connection.enter_context(connected(configured_address(), cpus=count)).ray
            _check_room(self.ray, count, device)
            actor = _actor(self.ray, device)
            self.actors += [actor.remote(device, str(PACK), UNWANTED) for _ in range(count)]
            places = self._wait([each.place.remote() for each in self.actors], START_SECONDS)
            # Neighbours in rank are on one machine, where they can be.
            order = sorted(range(count), key=lambda index: places[index])
            self.actors[:] = [self.actors[index] for index in order]
            self.places = [places[index] for index in order]
            self.about = self.ask("about")
            self._check_versions()
            # All on one machine: nothing of what they say leaves it.
            address = "127.0.0.1" if len(set(self.places)) == 1 else self.places[0]
            port = self._wait([self.actors[0].call.remote("free_port", address)])[0]
            self._wait(
                [
                    each.call.remote("join", rank, count, address, port, sequence)
                    for rank, each in enumerate(self.actors)
                ]
            )
        except BaseException:
            self.close()
            raise

    @property
    def alive(self) -> bool:
        return self._end.alive

    def close(self) -> None:
        """End the workers."""
        self._end()

    def ask(self, method: str, *arguments, check: Callable[[], None] | None = None) -> list:
        """What each worker's ``method`` returns, by rank; ``check`` is called while they work, and may raise."""
        return self._wait([each.call.remote(method, *arguments) for each in self.actors], check=check)

    def _wait(self, references: list, seconds: float | None = None, check: Callable[[], None] | None = None) -> list:
        end = None if seconds is None else time.monotonic() + seconds
        pending, check = list(references), check or self.check
        try:
            while pending:
                ready, pending = self.ray.wait(pending, num_returns=1, timeout=POLL_SECONDS)
                for reference in ready:
                    self.ray.get(reference)  # so that a failure is known while others still wait for the failed one
                if end is not None and time.monotonic() > end:
                    raise WorkersError(
                        f"The workers did not start within {seconds:.0f} s: see whether the cluster is busy or another "
                        "process uses the GPUs."
                    )
                if check is not None and pending:
                    check()
        except BaseException as error:
            known = self._explained(self._cause(error, references))
            self.close()
            if known is None:  # the check's, or the user's: the run is interrupted
                raise
            raise known from error
        return self.ray.get(references)

    def _cause(self, error: BaseException, references: list) -> BaseException:
        """What came first, as far as can be told: a worker's end shows in the others as a broken connection."""
        if not isinstance(error, self.ray.exceptions.RayTaskError) or not isinstance(error.cause, RuntimeError):
            return error
        for reference in self.ray.wait(references, num_returns=len(references), timeout=GRACE_SECONDS)[0]:
            try:
                self.ray.get(reference)
            except self.ray.exceptions.RayActorError as lost:
                return lost
            except Exception:
                continue
        return error

    def _explained(self, error: BaseException) -> Exception | None:
        errors = self.ray.exceptions
        if isinstance(error, WorkersError):
            return error
        if isinstance(error, errors.RayTaskError):
            cause = error.cause
            if isinstance(cause, ValueError):
                return ValueError(str(cause))
            if is_out_of_memory(cause):
                return WorkersError(
                    "A worker has too little free memory for this clip: make it smaller or shorter, or let the workers "
                    "share the weights (sharded)."
                )
            return WorkersError(f"A worker failed: {type(cause).__name__}: {_first_line(cause)}")
        if isinstance(error, errors.RayActorError):
            if "No module named" in str(error) or "cannot import" in str(error):
                return WorkersError(
                    "A worker's machine has no nava_core that can be imported: install this pack there, with "
                    "pip install '.[parallel]'."
                )
            return LostWorkerError(
                "A worker was lost, killed or out of memory; the others were ended with it. Run again: new ones start."
            )
        return WorkersError(f"The workers failed: {_first_line(error)}") if isinstance(error, errors.RayError) else None

    def _check_versions(self) -> None:
        own = {"code": code_version(), "torch": ".".join(torch.__version__.split(".")[:2])}
        names = {"code": "this pack", "torch": "PyTorch"}
        for about, place in zip(self.about, self.places, strict=True):
            for key, value in own.items():
                if about[key] != value:
                    raise WorkersError(
                        f"The worker on {place} has another version of {names[key]} ({about[key]}, here {value}): "
                        "install the same one on both machines."
                    )


def _end_workers(actors: list, connection: ExitStack) -> None:
    import ray

    if ray.is_initialized():
        for actor in actors:
            ray.kill(actor)
    actors.clear()
    connection.close()


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


# ---------------------------------------------------------------- the backbone that computes elsewhere


class ParallelBackbone(nn.Module):
    """A backbone without weights, whose passes ``workers`` processes compute; called as :class:`NavaBackbone`.

    path: the checkpoint; each worker reads it from its own disk (the same path, or by name in its ``NAVA_MODELS``
    folders), and gets the weights sent where it has not got the file. dtype: as ``load_backbone`` takes it;
    compute_dtype: what fp8 weights are dequantised to and the rest is kept in, where it is not bfloat16. device:
    "cuda", a GPU for each worker, or "cpu". layout: None chooses for each step from the predictions and the tokens.
    weights: "replicated", or "sharded": the workers that share a prediction's tokens also share the weights, a part
    each. changes: opens what ``load_backbone`` takes as ``changes`` (LoRAs), such as ``LoraMerge.changes``. say: told
    in sentences what goes on. compile: the workers compile their blocks, which need replicated weights.

    Workers start with the first pass and stay until :meth:`close`, until a run is interrupted, or until nobody holds
    this. Raises as ``check_parallel`` does, at once; later WorkersError where one is lost, and then the next pass
    starts new ones.
    """

    def __init__(
        self,
        path: str | os.PathLike | FileInfo,
        *,
        workers: int,
        device: str = "cpu",
        dtype: torch.dtype | None = None,
        compute_dtype: torch.dtype | None = None,
        layout: Layout | None = None,
        weights: str = "replicated",
        changes: Changes | None = None,
        compile: bool = False,
        say: Callable[[str], None] | None = None,
    ) -> None:
        super().__init__()
        self.info = path if isinstance(path, FileInfo) else describe_file(path)
        self.config = backbone_config(self.info)
        check_parallel(self.config, workers, layout, weights, device)
        self.count, self.worker_device = workers, device
        self.weights_dtype, self.dtype = dtype, compute_dtype or main_dtype(self.info, dtype)
        self.sharded = weights == "sharded"
        # Every worker of a branch must take part in each of its passes for sharded weights to be there.
        self.layout = layout or (Layout(1, workers) if self.sharded else None)
        self.changes, self.compiles = changes, compile
        self.say = say or (lambda sentence: None)
        self.workers: Workers | None = None
        self._said: str | None = None

    def start(self, check: Callable[[], None] | None = None) -> Workers:
        """The workers, with their weights; started where there are none, with ``check`` called meanwhile, which ends
        them where it raises."""
        if self.workers is not None and self.workers.alive:
            return self.workers
        _only_one(self)
        self.say(f"Starting {self.count} workers.")
        workers = Workers(self.count, self.worker_device, self.layout.sequence if self.sharded else 0, check)
        plan = [tensor.plain() for tensor in plan_tensors(self.info, self.weights_dtype)]
        try:
            workers.ask("prepare", asdict(self.config), plan, self.dtype, self.compiles)
            self._send_weights(workers)
            self._send_changes(workers)
        except BaseException:
            workers.close()
            raise
        workers.check = None
        self.workers = workers
        return workers

    def close(self) -> None:
        """End the workers; the next pass starts new ones."""
        if self.workers is not None:
            self.workers.close()
            self.workers = None

    def _send_weights(self, workers: Workers) -> None:
        path = self.info.path.resolve()
        have = workers.ask("read", str(path), file_digest(path), self.weights_dtype)
        lacking = [actor for actor, has in zip(workers.actors, have, strict=True) if not has]
        if not lacking:
            return
        self.say(f"Sending the weights to {len(lacking)} of {self.count} workers.")
        with open_checkpoint(self.info) as source:
            for chunk in _chunks(stream_tensors(source, self.weights_dtype)):
                reference = workers.ray.put(save(chunk))
                workers._wait([actor.call.remote("fill", reference) for actor in lacking])

    def _send_changes(self, workers: Workers) -> None:
        if self.changes is None:
            return
        with self.changes() as changes, open_checkpoint(self.info) as source:
            if not changes:
                return
            changed = stream_tensors(source, self.weights_dtype, changes, only=changes)
            for chunk in _chunks(changed):
                for rank, names in enumerate(workers.ask("fill", workers.ray.put(save(chunk)))):
                    if names != sorted(chunk):
                        raise WorkersError(f"Worker {rank} did not take the changed weights (LoRAs); run again.")
        self.say(f"{len(changes)} weights changed by LoRAs, acknowledged by {self.count} of {self.count} workers.")

    def forward(self, video, audio, timestep, context, **conditions) -> Pair:
        """One pass; see :meth:`NavaBackbone.forward`."""
        passes = [{"video": video, "audio": audio, "timestep": timestep, "context": context, **conditions}]
        return self.run_together(passes)[0]

    def run_together(self, passes: list[dict], check: Callable[[], None] | None = None) -> list[Pair]:
        """The (video, audio) velocities of several passes, each the backbone's arguments by name.

        ``check`` is called first, and now and then while the workers start, load and compute; where it raises, the run
        is at an end and the workers with it: they cannot leave a pass half done.
        """
        if check is not None:
            self._stop_if_asked(check)
        workers = self.start(check)
        layout = self._choose(passes, workers.places)
        sent = [{name: _on_cpu(value) for name, value in each.items() if name != "options"} for each in passes]
        answers = workers.ask("run", (layout.branches, layout.sequence), workers.ray.put(sent), check=check)
        done = sum(answer["passes"] for answer in answers)
        velocities = {index: pair for answer in answers for index, pair in answer["velocities"].items()}
        if done != len(passes) * layout.sequence or sorted(velocities) != list(range(len(passes))):
            self.close()
            raise WorkersError(f"The workers made {done} of {len(passes) * layout.sequence} passes; run again.")
        return [_like(velocities[index], each) for index, each in enumerate(passes)]

    def _stop_if_asked(self, check: Callable[[], None]) -> None:
        try:
            check()
        except BaseException:
            self.close()
            raise

    def _choose(self, passes: list[dict], places: list[str]) -> Layout:
        video, audio = _token_counts(passes[0])
        layout = self.layout
        if layout is None:
            machines = Counter(places)
            neighbours = min(machines.values()) if len(machines) > 1 else None
            layout = choose_layout(self.config, self.count, len(passes), video, audio, neighbours=neighbours)
        elif layout.sequence > 1 and 0 < min(count for count in (video, audio) if count) < layout.sequence:
            fits = max(each.sequence for each in fitting_layouts(self.config, self.count, 1, video, audio))
            raise ValueError(
                f"{video} video and {audio} audio tokens cannot be split over {layout.sequence} workers: make the clip "
                f"longer or larger, or use a layout with at most {fits} workers for a prediction."
            )
        sentence = layout.sentence(self.count, len(passes))
        if sentence != self._said:
            self._said = sentence
            self.say(sentence)
        return layout


_current: weakref.ref | None = None


def _only_one(backbone: ParallelBackbone) -> None:
    """Workers of another backbone of this process give way: the GPUs are needed for these."""
    global _current
    former = _current() if _current is not None else None
    if former is not None and former is not backbone:
        former.close()
    _current = weakref.ref(backbone)


def _chunks(tensors: Iterable[tuple[str, Tensor]]) -> Iterator[dict[str, Tensor]]:
    chunk: dict[str, Tensor] = {}
    size = 0
    for name, tensor in tensors:
        plain = tensor.cpu().contiguous()
        # The safetensors package writes more types of a byte than it reads; workers know which they are.
        chunk[name] = plain.view(torch.uint8) if plain.dtype.itemsize == 1 else plain
        size += tensor.nbytes
        if size >= CHUNK_BYTES:
            yield chunk
            chunk, size = {}, 0
    if chunk:
        yield chunk


def _on_cpu(value):
    if isinstance(value, tuple):
        return tuple(_on_cpu(each) for each in value)
    return value.detach().cpu() if torch.is_tensor(value) else value


def _like(pair: Pair, arguments: dict) -> Pair:
    """Velocities on the devices of the latents they belong to."""
    latents = (arguments["video"], arguments["audio"])
    return tuple(None if v is None else v.to(latent.device) for v, latent in zip(pair, latents, strict=True))


def _token_counts(arguments: dict) -> tuple[int, int]:
    video, audio = arguments["video"], arguments["audio"]
    if video is None and audio is None:
        raise ValueError("The backbone was given neither video nor audio latents; pass at least one of them.")
    frames = 0 if video is None else video.shape[2] * -(-video.shape[3] // 2) * -(-video.shape[4] // 2)
    return frames, 0 if audio is None else audio.shape[1]
