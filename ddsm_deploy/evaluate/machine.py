"""What a measurement was made on: processor, memory, load, versions."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import time
from pathlib import Path
from typing import Any

_PACKAGES = (
    "ddsm-deploy",
    "numpy",
    "opencv-python-headless",
    "opencv-python",
    "torch",
    "timm",
    "onnxruntime",
    "onnxruntime-gpu",
    "openvino",
)


def machine_facts() -> dict[str, Any]:
    """The facts that a reader of a timing needs, as JSON values; null where this system does not tell.

    ``cores`` are those that the system shows, ``cores_usable`` those that this process may use. ``load_average`` is the
    number of runnable processes over the last 1, 5 and 15 minutes: timings taken beside other work are not quiet ones.
    """
    return {
        "cpu": _cpu_model(),
        "architecture": platform.machine(),
        "cores": os.cpu_count(),
        "cores_usable": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_mb": _memory_mb(),
        "load_average": list(os.getloadavg()) if hasattr(os, "getloadavg") else None,
        "system": platform.platform(),
        "python": platform.python_version(),
        "versions": _versions(),
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def peak_memory_mb() -> float | None:
    """Most memory that this process has held at once, in megabytes (10⁶ bytes); None where the system does not tell.

    Read from /proc where there is one: `ru_maxrss` of a process that was just started still holds its parent's peak.
    """
    kilobytes = _proc_field(Path("/proc/self/status"), "VmHWM")
    if kilobytes is not None:
        return kilobytes * 1024 / 1e6
    try:
        import resource
    except ImportError:  # Windows
        return None
    unit = 1 if platform.system() == "Darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6


def resident_mb() -> float | None:
    """Memory that this process holds now, in megabytes (10⁶ bytes); None where there is no /proc to tell."""
    kilobytes = _proc_field(Path("/proc/self/status"), "VmRSS")
    return None if kilobytes is None else kilobytes * 1024 / 1e6


def _cpu_model() -> str | None:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return platform.processor() or None
    found = re.search(r"^(?:model name|Model|Hardware)\s*:\s*(.+)$", text, re.MULTILINE)
    return found[1].strip() if found else platform.processor() or None


def _memory_mb() -> int | None:
    kilobytes = _proc_field(Path("/proc/meminfo"), "MemTotal")
    return None if kilobytes is None else round(kilobytes * 1024 / 1e6)


def _proc_field(path: Path, name: str) -> int | None:
    try:
        found = re.search(rf"^{name}:\s*(\d+) kB$", path.read_text(encoding="utf-8"), re.MULTILINE)
    except OSError:
        return None
    return int(found[1]) if found else None


def _versions() -> dict[str, str]:
    versions = {}
    for name in _PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions
