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


def marked(mark: bytes) -> list[int]:
    """Ids of the processes with ``mark`` among their variables, where the system lists them."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if mark in (folder / "environ").read_bytes().split(b"\0"):
                found.append(int(folder.name))
        except OSError:
            continue
    return found


def main(folder: str, variable: str) -> None:
    sys.stdin.buffer.read()
    deadline = time.monotonic() + ENDING_SECONDS
    while time.monotonic() < deadline and (left := marked(f"{variable}={folder}".encode())):
        for process in left:
            try:
                os.kill(process, signal.SIGKILL)
            except ProcessLookupError:
                continue
        time.sleep(0.1)
    shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
