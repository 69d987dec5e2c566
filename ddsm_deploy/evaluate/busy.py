"""Processes that keep the processor busy beside a measurement: `python -m ddsm_deploy.evaluate.busy` is one of them."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator

import numpy as np

from ddsm_deploy.errors import DdsmError

_READY = b"busy\n"

WHAT = "each loops over Python integers and over a numpy array of 8 MB in turn, at the usual priority"
"""What such a process does, in words."""


@contextlib.contextmanager
def busy_processes(count: int) -> Iterator[tuple[int, ...]]:
    """Gives the ids of `count` busy processes, all of them at work; they are gone when the block ends.

    Should this process be killed, they see their standard input end, and end themselves.

    Raises:
        DdsmError: one did not start, or ended before the block did.
    """
    # -P: a file of the current folder must not pass for a module of the same name
    command = [sys.executable, "-P", "-m", "ddsm_deploy.evaluate.busy"]
    with contextlib.ExitStack() as stack:
        processes = []
        for _ in range(count):
            process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
            )
            stack.callback(_end, process)
            processes.append(process)
        for process in processes:
            assert process.stdout is not None
            if process.stdout.readline() != _READY:
                raise DdsmError(f"a process of the background load did not start (exit code {process.wait()})")
        yield tuple(process.pid for process in processes)
        if ended := [process.returncode for process in processes if process.poll() is not None]:
            codes = ", ".join(map(str, ended))
            raise DdsmError(f"{len(ended)} of {count} processes of the background load ended early (exit code {codes})")


def _end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.communicate()


def _watch_the_parent() -> None:
    sys.stdin.buffer.read()
    os._exit(0)


def main() -> None:
    """Works until it is killed, or until its standard input ends."""
    # Ctrl-C at a terminal is for the measurement, which ends this process in its turn (in a session of its own it would
    # get another share of the processor from Linux)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_watch_the_parent, daemon=True).start()
    block = np.ones(1 << 20)
    os.write(1, _READY)
    while True:
        total = 0
        for number in range(100_000):
            total += number * number
        np.sqrt(block, out=block)


if __name__ == "__main__":
    main()
