"""The heap of engine builds: right in every call, and at the same addresses in every run."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from ddsm_deploy.kernels import heap_path

CALLS = Path(__file__).parents[1] / "heap_calls.py"


@pytest.fixture
def heap(missing) -> Path:
    path = heap_path()
    if path is None:
        missing("kernels", "the heap was not built")
    return path


def addresses(heap: Path | None, threads: int, **environment: str) -> list[str]:
    """Of the main thread's blocks."""
    preloaded = {} if heap is None else {"LD_PRELOAD": str(heap)}
    # Python's own small objects come from the heap as well
    environment = {**os.environ, **preloaded, "PYTHONHASHSEED": "0", "PYTHONMALLOC": "malloc", **environment}
    command = [sys.executable, str(CALLS), str(threads)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_blocks_are_where_they_were(heap: Path) -> None:
    first = addresses(heap, 1)
    assert len(first) > 1000
    assert addresses(heap, 1, MORE="x" * 3000) == first


def test_blocks_of_several_threads_are_whole(heap: Path) -> None:
    assert len(addresses(heap, 4)) > 1000


def test_the_systems_heap_moves(heap: Path) -> None:
    """So the test above can fail."""
    assert addresses(None, 1) != addresses(None, 1)


def test_it_serves_a_program_of_many_threads(heap: Path) -> None:
    code = (
        "import concurrent.futures, numpy as np\n"
        "with concurrent.futures.ThreadPoolExecutor(40) as pool:\n"
        "    print(sum(pool.map(lambda n: int(np.ones((n, 300, 300)).sum()), range(1, 81))))\n"
    )
    environment = {**os.environ, "LD_PRELOAD": str(heap)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout.strip()) == (0, str(90000 * sum(range(1, 81)))), done.stderr
