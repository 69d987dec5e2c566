"""Builds the C++ kernels with whatever compiler there is, as a hook of hatchling.

Without a compiler the package is built all the same: `ddsm_deploy.kernels.status()` then says why there are no
kernels, and dynamic sampling runs as standard operators. Three libraries: ``libddsm.so`` (the kernels and ONNX
Runtime's entry), ``libddsm_heap.so`` (memory for building engines) and, where the headers of oneTBB are found,
``libddsm_tbb.so`` (a pool over the threads that OpenVINO has).
"""

from __future__ import annotations

import concurrent.futures
import importlib.metadata
import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

PLACE = Path("ddsm_deploy/kernels")
NOTE = PLACE / "not_built.txt"
"""Why a library is missing; the runtime shows it."""

FLAGS = [
    *("-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-fno-exceptions", "-fno-rtti"),
    *("-fno-math-errno", "-fno-trapping-math", "-Wall", "-Wextra", "-Wno-psabi"),
]
# each file of these holds loops that only such processors run; the driver asks the processor first
FLAGS_OF = {
    "_avx2": ["-mavx2", "-mfma"],
    "_avx512": ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma"],
}
LIBRARIES = {
    "libddsm.so": PLACE / "src",
    "libddsm_tbb.so": PLACE / "src" / "tbb",
    "libddsm_heap.so": PLACE / "src" / "heap",
}


class NotBuilt(Exception):
    """One library can't be built here."""


class KernelsHook(BuildHookInterface):  # type: ignore[misc]
    """Compiles before files are collected, and ships the result; a source distribution holds the sources alone."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """See `BuildHookInterface`."""
        if self.target_name != "wheel":
            return
        root = Path(self.root)
        problems = []
        for library, sources in LIBRARIES.items():
            target = root / PLACE / library
            target.unlink(missing_ok=True)
            try:
                build(root / sources, target)
            except NotBuilt as exc:
                problems.append(f"{library}: {exc}")
                self.app.display_warning(
                    f"ddsm-deploy: {library} was not built, and the package does without it: {exc}"
                )
                continue
            build_data["artifacts"].append(f"/{PLACE / library}")
            build_data["pure_python"] = False
            # called through ctypes: any Python of this platform will do
            build_data["tag"] = f"py3-none-{sysconfig.get_platform().replace('-', '_').replace('.', '_')}"
        note = root / NOTE
        note.unlink(missing_ok=True)
        if problems:
            note.write_text("\n".join(problems) + "\n", encoding="utf-8")
            build_data["artifacts"].append(f"/{NOTE}")


def build(sources: Path, target: Path) -> None:
    """Compiles every ``*.cpp`` of a folder into one shared library.

    Raises:
        NotBuilt: no compiler, a missing header, or an error of the compiler's.
    """
    if sys.platform != "linux":
        raise NotBuilt(f"kernels are built on Linux alone so far, and this is {sys.platform}")
    compiler = find_compiler()
    with tempfile.TemporaryDirectory() as folder:
        jobs = []
        includes = [f"-I{path}" for path in header_folders()]
        for source in sorted(sources.glob("*.cpp")):
            special = next((flags for end, flags in FLAGS_OF.items() if source.stem.endswith(end)), [])
            if platform.machine() not in ("x86_64", "AMD64"):
                special = []  # the file is empty there
            output = Path(folder, f"{source.stem}.o")
            jobs.append([*compiler, *FLAGS, *special, *includes, "-c", str(source), "-o", str(output)])
        with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(run, jobs))
        linked = target.with_name(f".{target.name}.part")
        run([*compiler, "-shared", "-pthread", "-o", str(linked), *[job[-1] for job in jobs]])
        linked.replace(target)


def find_compiler() -> list[str]:
    """``$CXX`` where it is set, else the first C++ compiler on the path.

    Raises:
        NotBuilt: there is none.
    """
    if os.environ.get("CXX"):
        return shlex.split(os.environ["CXX"])
    for name in ("c++", "g++", "clang++"):
        if shutil.which(name):
            return [name]
    raise NotBuilt(
        "no C++ compiler (c++, g++ or clang++) was found; install one, such as Debian's g++, and "
        "reinstall with --force-reinstall --no-cache-dir: pip may have kept the wheel without kernels"
    )


def header_folders() -> list[str]:
    """Where pip has put the headers of the build requirement tbb-devel: none where that is not installed."""
    try:
        distribution = importlib.metadata.distribution("tbb-devel")
    except importlib.metadata.PackageNotFoundError:
        return []
    wanted = "include/oneapi/tbb/version.h"
    paths = [str(distribution.locate_file(file)) for file in distribution.files or [] if str(file).endswith(wanted)]
    return [os.path.realpath(path.removesuffix("/oneapi/tbb/version.h")) for path in paths]


def run(command: list[str]) -> None:
    """One call of the compiler.

    Raises:
        NotBuilt: it failed, with the line in which it says why.
    """
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as exc:
        raise NotBuilt(f"{command[0]} can't be run ({exc})") from exc
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if "error" in line] or done.stderr.splitlines()
        raise NotBuilt(lines[0] if lines else f"{command[0]} failed with code {done.returncode}")
