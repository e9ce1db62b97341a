"""Ray for this project: a private instance on this machine for as long as it is needed, or a cluster that is there.

Nothing is reported to anyone, no dashboard runs, and a private instance listens on the loopback interface only.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterable, Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

ADDRESS_VARIABLES = ("NAVA_RAY_ADDRESS", "RAY_ADDRESS")
OBJECT_STORE = 256 << 20  # bytes of a private instance; what does not fit goes to the disk
CONNECT_SECONDS = 5.0
CLOSE_SECONDS = 8.0
# Read when Ray is imported, by it and by the processes it starts: nothing reported, and 127.0.0.1 taken at its word.
PRIVATE = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}
# What a worker must not inherit: a host may have set PyTorch's allocator to cudaMallocAsync, which workers fail under.
UNWANTED = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF")
WORKER_ENVIRONMENT = {name: "" for name in UNWANTED}
FOLDER_VARIABLE = "NAVA_RAY_FOLDER"  # carried by every process of a private instance


class ClusterError(RuntimeError):
    """There is no cluster, or not one that can be used; the message is the sentence to show."""


def require_ray() -> Any:
    """The ``ray`` module. Raises RuntimeError, in a sentence, where it is not installed."""
    for name, value in PRIVATE.items():
        os.environ.setdefault(name, value)
    try:
        return importlib.import_module("ray")
    except ImportError as error:
        raise RuntimeError(
            "Several workers need the package ray: run `pip install .[parallel]` in the pack's folder."
        ) from error


def configured_address(environment: Mapping[str, str] = os.environ) -> str | None:
    """The cluster's address from the environment: NAVA_RAY_ADDRESS, or Ray's own RAY_ADDRESS."""
    return next((environment[name] for name in ADDRESS_VARIABLES if environment.get(name)), None)


@lru_cache(maxsize=1)
def code_version() -> str:
    """The version of this very code: a hash of the package's sources."""
    package = Path(__file__).parents[1]
    digest = hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        digest.update(path.relative_to(package).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:12]


class Connection(NamedTuple):
    """``ray``, connected; ``folder``: a private instance's own, which goes with it."""

    ray: Any
    folder: str | None = None


@contextlib.contextmanager
def connected(address: str | None = None, *, cpus: int | None = None) -> Iterator[Connection]:
    """Ray, connected for the time of the context: to the cluster at ``address`` ("HOST:PORT"), else to a private
    instance with ``cpus`` places (None: the machine's cores) that ends with it. A connection that is there already is
    used, and left.

    Raises RuntimeError where Ray is missing, ClusterError for an address where no cluster answers.
    """
    ray = require_ray()
    if ray.is_initialized():
        yield Connection(ray)
        return
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(_watched_folder()) if address is None else None
        stack.callback(_shut_down, ray)
        with _own_signals():
            if folder is not None:
                _start(ray, folder, cpus)
            else:
                _join(ray, address)
        yield Connection(ray, folder)


def _shut_down(ray: Any) -> None:
    with contextlib.suppress(Exception):
        ray.shutdown()


@contextlib.contextmanager
def _watched_folder() -> Iterator[str]:
    """A folder for a private instance. A program outlives this process to end what is left of the instance and remove
    the folder, so that a killed batch, too, leaves nothing."""
    folder = tempfile.mkdtemp(prefix="nava-ray-")
    command = [sys.executable, "-S", str(Path(__file__).with_name("watchdog.py")), folder, FOLDER_VARIABLE]
    watchdog = subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True)
    try:
        yield folder
    finally:
        watchdog.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            watchdog.wait(CLOSE_SECONDS)


def _start(ray: Any, folder: str, cpus: int | None) -> None:
    with _changed({FOLDER_VARIABLE: folder}, UNWANTED):
        ray.init(
            address="local",
            num_cpus=cpus,
            include_dashboard=False,
            log_to_driver=False,
            logging_level="error",
            object_store_memory=OBJECT_STORE,
            _node_ip_address="127.0.0.1",
            _temp_dir=folder,
            _system_config={"worker_niceness": 0},  # they are the work itself, which Ray would do in the background
        )


def _join(ray: Any, address: str) -> None:
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or "/" in address:
        raise ClusterError(f"{address!r} is no address of a Ray cluster: write HOST:PORT, as `ray start` shows it.")
    try:
        socket.create_connection((host.strip("[]"), int(port)), CONNECT_SECONDS).close()
    except OSError as error:
        raise ClusterError(
            f"No Ray cluster answers at {address} ({error.strerror or error}): start one there with "
            f"`ray start --head`, or correct the address."
        ) from None
    try:
        ray.init(address=address, log_to_driver=False, logging_level="error")
    except Exception as error:
        said = " ".join(str(error).split())[:200]
        raise ClusterError(
            f"The Ray cluster at {address} cannot be joined from this machine, which must be one of its nodes "
            f"(`ray start --address {address}`) with the same Ray and token: {said}"
        ) from error


@contextlib.contextmanager
def _own_signals() -> Iterator[None]:
    """This process keeps its answer to a request to end, which Ray would replace by its own."""
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread() and before is not None:
            signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def _changed(added: Mapping[str, str], removed: Iterable[str]) -> Iterator[None]:
    """The environment changed for the processes that are started meanwhile."""
    before = {name: os.environ.pop(name, None) for name in (*added, *removed)}
    os.environ.update(added)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value
