"""The child process of a build: what it gives, what it says when it can't, and how its death is told."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tensorrt_graphs as graphs

from ddsm_deploy.enginefile import Profile, TensorRecord
from ddsm_deploy.errors import BackendError, BackendMissing
from ddsm_deploy.export.tensorrt.builder import Job, build, library_version
from ddsm_deploy.kernels import heap_path


@pytest.fixture
def job(tmp_path: Path, need) -> Job:
    need("tensorrt_rtx")
    onnx = graphs.save(graphs.sampling(), tmp_path / "graph.onnx")
    return Job(target="tensorrt-rtx", onnx=onnx, engine=tmp_path / "graph.engine", sampling=("linear",))


def test_what_a_build_gives(job: Job) -> None:
    shares: list[float] = []
    built = build(job, lambda phase, share: shares.append(share))
    assert built.version == library_version("tensorrt-rtx")
    assert built.inputs == (
        TensorRecord(name="x", dtype="float32", shape=(1, 2, 8, 8)),
        TensorRecord(name="grid", dtype="float32", shape=(1, 4, 4, 2)),
    )
    assert built.outputs == (TensorRecord(name="y", dtype="float32", shape=(1, 2, 4, 4)),)
    assert any("sample" in layer.nodes for layer in built.layers)
    assert shares == sorted(shares)
    assert shares[0] == 0
    assert 0.5 < shares[-1] <= 1
    assert job.engine.read_bytes()[:4] == b"vtrt"


def test_the_version_is_the_installed_one(need) -> None:
    need("tensorrt_rtx")
    from importlib.metadata import version

    assert library_version("tensorrt-rtx") == version("tensorrt-rtx")


def test_equal_jobs_give_equal_bytes(job: Job, tmp_path: Path) -> None:
    build(job)
    first = job.engine.read_bytes()
    elsewhere = tmp_path / "other"
    elsewhere.mkdir()
    again = elsewhere / "another.engine"
    build(Job(target="tensorrt-rtx", onnx=job.onnx, engine=again, sampling=job.sampling))
    assert again.read_bytes() == first


def test_the_heap_is_found_in_a_folder_with_spaces(
    job: Job, tmp_path: Path, missing, monkeypatch: pytest.MonkeyPatch
) -> None:
    if heap_path() is None:
        missing("kernels", "the heap was not built")
    (tmp_path / "a b:c").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "a b:c"))
    assert build(job).repeatable


def test_where_addresses_are_limited_it_builds_without_the_heap(job: Job) -> None:
    code = f"""
import resource
from pathlib import Path
from ddsm_deploy.export.tensorrt.builder import Job, build
resource.setrlimit(resource.RLIMIT_AS, (2**36, 2**36))
job = Job(target="tensorrt-rtx", onnx=Path({str(job.onnx)!r}), engine=Path({str(job.engine)!r}), sampling=("linear",))
print(build(job).repeatable)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "False\n"), done.stderr
    assert job.engine.read_bytes()[:4] == b"vtrt"


def test_the_child_runs_in_a_folder_of_its_own() -> None:
    """So a relative path of the caller's must not reach it as such, and the two files have names there."""
    job = Job(target="tensorrt", onnx=Path("a/b.onnx"), engine=Path("c.engine"), timing_cache=Path("times.cache"))
    fields = json.loads(job.to_json())
    assert fields["timing_cache"] == str(Path.cwd() / "times.cache")
    assert (fields["onnx"], fields["engine"]) == ("graph.onnx", "graph.engine")


def test_the_parent_loads_neither_torch_nor_nvidias_library() -> None:
    script = (
        "import sys, ddsm_deploy.export.tensorrt.builder; print('torch' in sys.modules, 'tensorrt_rtx' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"compute_capabilities": ("90",)}, r"does not build for compute capability 90, only for .*86"),
        ({"sampling": ("nearest",)}, r"misreads GridSample: the graph says 1 nearest, it took 1 linear"),
        ({"sampling": ()}, r"misreads GridSample: the graph says none, it took 1 linear"),
    ],
)
def test_a_failure_is_one_line(job: Job, changes: dict, said: str) -> None:
    with pytest.raises(BackendError, match=said) as caught:
        build(dataclasses.replace(job, **changes))
    assert str(caught.value).startswith(f"TensorRT-RTX {library_version('tensorrt-rtx')} can't build this")
    assert "\n" not in str(caught.value)
    assert not job.engine.exists()


def test_the_node_is_named(job: Job, tmp_path: Path) -> None:
    mixed = graphs.save(graphs.sampling(image=graphs.F16), tmp_path / "mixed.onnx")
    with pytest.raises(BackendError, match=r"graph: GridSample 'sample': .*must be of same type"):
        build(Job(target="tensorrt-rtx", onnx=mixed, engine=job.engine))


def test_a_file_that_is_no_onnx(job: Job, tmp_path: Path) -> None:
    (tmp_path / "text.onnx").write_text("this is not protobuf", encoding="utf-8")
    with pytest.raises(BackendError, match="can't build this graph: "):
        build(Job(target="tensorrt-rtx", onnx=tmp_path / "text.onnx", engine=job.engine))


def test_open_axes_need_their_profile(tmp_path: Path, need) -> None:
    need("tensorrt_rtx")
    model = graphs.product()
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_param = "N"
    model.graph.output[0].type.tensor_type.shape.dim[0].dim_param = "N"
    onnx, engine = graphs.save(model, tmp_path / "open.onnx"), tmp_path / "open.engine"
    profile = Profile(min=(1, 4, 8), opt=(2, 4, 8), max=(4, 4, 8))
    built = build(Job(target="tensorrt-rtx", onnx=onnx, engine=engine, profiles={"x": profile}))
    assert built.inputs[0].shape == (-1, 4, 8)
    wrong = Profile(min=(1, 5, 8), opt=(2, 5, 8), max=(4, 5, 8))
    with pytest.raises(BackendError, match="can't build this"):
        build(Job(target="tensorrt-rtx", onnx=onnx, engine=engine, profiles={"x": wrong}))


@pytest.mark.parametrize(
    ("number", "said"),
    [(signal.SIGABRT, "died (SIGABRT)"), (signal.SIGKILL, "died (SIGKILL, most likely for want of memory)")],
)
def test_a_death_is_told(job: Job, number: int, said: str) -> None:
    """The process is really ended, from outside, in the middle of its build."""

    def end(phase: str, share: float) -> None:
        for child in children():
            os.kill(child, number)

    with pytest.raises(BackendError) as caught:
        build(job, end)
    assert said in str(caught.value)


def test_an_interrupt_ends_the_child(job: Job) -> None:
    seen: list[int] = []

    def interrupt(phase: str, share: float) -> None:
        seen.extend(children())
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build(job, interrupt)
    assert seen
    deadline = time.monotonic() + 10
    while any(Path(f"/proc/{child}").exists() for child in seen) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(Path(f"/proc/{child}").exists() for child in seen)


def test_a_library_that_is_missing_comes_with_its_pip_line(tmp_path: Path, missing) -> None:
    import importlib.util

    if importlib.util.find_spec("tensorrt") is not None:
        missing("no-tensorrt", "tensorrt is installed here")
    onnx = graphs.save(graphs.product(), tmp_path / "x.onnx")
    with pytest.raises(BackendMissing, match=r"tensorrt is not usable here .*pip install 'ddsm-deploy\[tensorrt\]'"):
        build(Job(target="tensorrt", onnx=onnx, engine=tmp_path / "x.engine"))


def children() -> list[int]:
    """Process ids of this process's workers."""
    if not Path("/proc/self/task").is_dir():
        pytest.skip("proc: this system has none, so the child can't be found")
    found = []
    for entry in Path("/proc/self/task").glob("*/children"):
        for pid in entry.read_text().split():
            command = Path(f"/proc/{pid}/cmdline").read_bytes()
            if b"ddsm_deploy.export.tensorrt.worker" in command:
                found.append(int(pid))
    return found
