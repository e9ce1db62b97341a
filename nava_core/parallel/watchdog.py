"""Run as a program beside a private Ray instance: when the process at the other end of stdin has ended, however that
came, it ends what is left of the instance and removes its folder. Ray's own helpers would stay for a minute.

Arguments: the folder, and the variable that the instance's processes carry the folder's name in. Imports nothing else
of the pack.
"""

import os
import shutil
import signal
import sys
import time
from pathlib import Path

ENDING_SECONDS = 5.0


def processes_of(folder: str, variable: str) -> list[int]:
    """Ids of the instance's processes, where the system lists them: those that carry the folder's name in ``variable``
    or, as some of Ray's write over their variables, have files in the folder open. The owner has some, too."""
    mark, found = f"{variable}={folder}".encode(), []
    for process in Path("/proc").glob("[0-9]*"):
        if int(process.name) == os.getppid():
            continue
        try:
            if mark in (process / "environ").read_bytes().split(b"\0") or _has_open(process, folder):
                found.append(int(process.name))
        except OSError:
            continue
    return found


def _has_open(process: Path, folder: str) -> bool:
    return any(os.readlink(file).startswith(folder + os.sep) for file in (process / "fd").iterdir())


def main(folder: str, variable: str) -> None:
    sys.stdin.buffer.read()
    deadline = time.monotonic() + ENDING_SECONDS
    while time.monotonic() < deadline and (left := processes_of(folder, variable)):
        for process in left:
            try:
                os.kill(process, signal.SIGKILL)
            except ProcessLookupError:
                continue
        time.sleep(0.1)
    shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
