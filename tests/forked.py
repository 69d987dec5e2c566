"""`ddsm` in processes that are forked off one which has PyTorch and Lightning already: importing them takes longer than
most of what a test asks of the command. As separate as processes begun anew, but for what was imported before.

They compute with one thread (a fork has none of OpenMP's others), and take the environment of the first of them.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
from pathlib import Path

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["forked_imports"])


def ddsm(*arguments: str, timeout: float = 300) -> subprocess.CompletedProcess[str]:
    """What `python -m ddsm_deploy ARGUMENTS` gives, as `subprocess.run` would tell it; `timeout` in seconds."""
    with tempfile.TemporaryDirectory() as folder:
        stdout, stderr = Path(folder, "stdout"), Path(folder, "stderr")
        process = _CONTEXT.Process(target=_main, args=(arguments, str(stdout), str(stderr)))
        process.start()
        process.join(timeout)
        if process.exitcode is None:
            process.kill()
            process.join()
            raise subprocess.TimeoutExpired(arguments, timeout)
        return subprocess.CompletedProcess(arguments, process.exitcode, stdout.read_text(), stderr.read_text())


def _main(arguments: tuple[str, ...], *paths: str) -> None:
    for number, path in enumerate(paths, start=1):
        file = os.open(path, os.O_WRONLY | os.O_CREAT)
        os.dup2(file, number)
        os.close(file)
    sys.argv = ["ddsm", *arguments]
    runpy.run_module("ddsm_deploy", run_name="__main__")
