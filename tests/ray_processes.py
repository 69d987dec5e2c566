"""Worker processes of Ray that run `ddsm_deploy.ray`, found by their titles among this process's descendants."""

from __future__ import annotations

import os
from pathlib import Path


def worker_processes() -> list[int]:
    """Their ids, of those that a Ray started by this process runs now."""
    parents, titles = {}, {}
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            parents[int(entry.name)] = int((entry / "stat").read_text().rpartition(") ")[2].split()[1])
            titles[int(entry.name)] = (entry / "cmdline").read_bytes()
        except OSError:  # it has just ended
            continue
    return [pid for pid, title in titles.items() if b"BatchWorker" in title and os.getpid() in _ancestors(pid, parents)]


def _ancestors(pid: int, parents: dict[int, int]) -> set[int]:
    found = set()
    while (pid := parents.get(pid, 0)) > 1:
        found.add(pid)
    return found
