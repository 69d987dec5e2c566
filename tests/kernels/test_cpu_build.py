"""How the CPU kernels compile and what their library shows; and short runs of the sanitizers and of the fuzzer."""

from __future__ import annotations

import concurrent.futures
import importlib.util
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from ddsm_deploy import kernels

REPO = Path(__file__).parents[2]
SOURCES = REPO / "ddsm_deploy" / "kernels" / "src"
CHECK = REPO / "tools" / "check_kernels.py"
SETS = {"plain": 4, "avx2": 8, "avx512": 16}
"""Floats a vector, as `loops_*.cpp` say."""


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    """tools/check_kernels.py as a module: it knows the package's compiler flags."""
    spec = importlib.util.spec_from_file_location("check_kernels", CHECK)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["check_kernels"] = module  # dataclasses look there for the types of their fields
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module", params=["g++", "clang++"])
def objects(request: pytest.FixtureRequest, missing, tool: ModuleType, tmp_path_factory) -> dict[str, Path]:
    """Every kernel file, compiled with the package's flags and no warning let through."""
    if shutil.which(request.param) is None:
        missing(request.param, "no such compiler is on the path")
    folder = tmp_path_factory.mktemp("objects")

    sources = sorted(SOURCES.glob("*.cpp"))
    # not in the threads: two that parse Python at once can end in "AST constructor recursion depth mismatch" (3.11)
    flags = {source: tool.flags_of(source) for source in sources}

    def build(source: Path) -> tuple[str, Path]:
        output = folder / f"{source.stem}.o"
        # -O1 inlines less than the package does, so it shows more of what could be shared by mistake
        command = [request.param, *flags[source], "-O1", "-Werror", "-c", str(source), "-o", str(output)]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return source.stem, output

    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        return dict(pool.map(build, sources))


def symbols(*arguments: object) -> list[tuple[str, str]]:
    """Kind and name of every defined symbol, as `nm` prints them."""
    listed = subprocess.run(["nm", "--defined-only", *map(str, arguments)], capture_output=True, text=True, check=True)
    return [(kind, name) for _, kind, name in (line.split() for line in listed.stdout.splitlines())]


def test_no_instructions_leak_out_of_their_file(objects: dict[str, Path], missing) -> None:
    """Shared copies of a function are kept once: one with AVX in it would crash the processors that have none."""
    if shutil.which("nm") is None:
        missing("nm", "it is not on the path")
    loops = {stem: path for stem, path in objects.items() if stem.startswith("loops_")}
    assert len(loops) == len(list(SOURCES.glob("loops_*.cpp")))
    for stem, path in loops.items():
        seen = [(kind, name) for kind, name in symbols(path) if kind.isupper() or kind in "vwu"]
        assert len(seen) == 1, seen  # the table of that instruction set
        assert stem.replace("loops_", "") in seen[0][1]
        assert seen[0][0] in "DR"


def test_the_library_shows_its_interface_alone(missing) -> None:
    if shutil.which("nm") is None:
        missing("nm", "it is not on the path")
    if not kernels.status().available:
        missing("kernels", kernels.status().reason)
    declared = re.findall(r"^DDSM_API [^;(]*?(\w+)\(", (SOURCES / "ddsm.h").read_text(encoding="utf-8"), re.M)
    assert len(declared) >= 8
    shown = {name for _, name in symbols("-D", kernels.library_path())}
    assert shown == {*declared, "RegisterCustomOps"}


@pytest.mark.parametrize("instruction_set", SETS)
def test_locate_on_vectors_is_the_scalar_one_bit_for_bit(
    instruction_set: str, missing, tool: ModuleType, tmp_path: Path
) -> None:
    compiler = next((name for name in ("g++", "clang++") if shutil.which(name)), None)
    if compiler is None:
        missing("g++", "neither it nor clang++ is on the path")
    if instruction_set not in kernels.status().instruction_sets:
        missing(instruction_set, "this processor has no such instructions, or the kernels were not built")
    whole = (
        ["-fwhole-program"] if compiler == "g++" else []
    )  # leaves out the rest of the loops, so that it takes no time
    flags = [*tool.flags_of(SOURCES / f"loops_{instruction_set}.cpp"), *whole, f"-DDDSM_LANES={SETS[instruction_set]}"]
    source = str(REPO / "tests" / "kernels" / "check_locate.cpp")
    subprocess.run([compiler, *flags, f"-I{SOURCES}", source, "-o", str(tmp_path / "locate")], check=True)
    done = subprocess.run([tmp_path / "locate"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(
    ("part", "options"),
    [
        # unoptimised where that compiles quicker than it runs slower
        ("address", "--level 0 --cases 80"),
        ("thread", "--level 1 --cases 40"),
        ("fuzz", "--level 0 --runs 2000"),
    ],
    ids=["address", "thread", "fuzz"],
)
def test_sanitizers_find_nothing(part: str, options: str, missing) -> None:
    """A short run; `python tools/check_kernels.py` makes a long one."""
    command = [sys.executable, str(CHECK), "--only", part, *options.split()]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode == 77:
        missing(part, done.stdout.strip())
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{part}: clean" in done.stdout
