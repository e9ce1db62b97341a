"""How much memory of its own a process takes while it works, for the scripts that tests start; Linux only."""

import threading
import time
from pathlib import Path


def anonymous():
    """Bytes of the process that are no file's."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


def measure(work):
    """(at its highest while ``work`` runs, after it, what it made being kept) in bytes above what was there before."""
    peak, done = 0, False

    def watch():
        nonlocal peak
        while not done:
            peak = max(peak, anonymous())
            time.sleep(0.0005)

    start = anonymous()
    thread = threading.Thread(target=watch)
    thread.start()
    kept = work()  # noqa: F841 - so that it is still there
    done = True
    thread.join()
    after = anonymous()
    return max(peak, after) - start, after - start  # on a busy machine the watch may have missed the end
