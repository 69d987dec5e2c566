"""Fused files on ONNX Runtime and OpenVINO: on our kernels, as standard operators, and what is said of either."""

from __future__ import annotations

import collections
import ctypes
import gc
import json
import subprocess
import sys
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import onnx
import pytest
from sampling_calls import inputs, one_node
from sampling_definition import by_loops

from ddsm_deploy import kernels
from ddsm_deploy.artifact import Artifact, resolve
from ddsm_deploy.engines import Engine, EngineOptions, available_precisions, open_engine, samples
from ddsm_deploy.errors import BackendError, ConfigError
from ddsm_deploy.images import Image, read_image
from ddsm_deploy.runtime.segmenter import Segmenter

SIZE = (64, 96)  # of the tiny network
CASE = (2, 6, 5, 4, 7, 9, 2.5)  # B, K, V, N, Y, X, spread of the offsets in pixels
OPEN_AXES = (0, 2, 3)


@pytest.fixture(scope="module", params=("onnxruntime", "openvino"))
def backend(request: pytest.FixtureRequest, need, missing) -> str:
    need(request.param)
    if not kernels.status().available:
        missing("kernels", kernels.status().reason)
    return str(request.param)


@pytest.fixture(scope="module")
def fused(tiny_fused: Path) -> Artifact:
    return resolve(tiny_fused)


@pytest.fixture(scope="module")
def images(scenes: Path) -> list[Image]:
    """Four rendered frames, each 1×64×96×3."""
    frames = [read_image(path) for path in sorted((scenes / "images").glob("*.png"))[:4]]
    return [cv2.resize(frame, SIZE[::-1])[np.newaxis] for frame in frames]


@pytest.fixture(scope="module")
def node(fused: Artifact, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Artifact]:
    """`node(axes)`: a file of one fused call (inputs in0 to in3, output `attended`); `axes` are open."""

    def make(axes: tuple[int, ...] = OPEN_AXES) -> Artifact:
        path = tmp_path_factory.mktemp("node") / "node.onnx"
        onnx.save(one_node(CASE, axes=axes), path)
        return Artifact("node", fused.spec, {"onnx": path})

    return make


def feeds(b: int, y: int, x: int) -> dict[str, np.ndarray]:
    _, k, v, n, _, _, spread = CASE
    return {f"in{i}": tensor.numpy() for i, tensor in enumerate(inputs((b, k, v, n, y, x, spread)))}


def attended(engine: Engine, fed: Mapping[str, np.ndarray]) -> np.ndarray:
    return engine.run(fed)["attended"]


def test_masks_are_those_of_standard_operators(backend: str, fused: Artifact, tiny_onnx: Path, images) -> None:
    plain = open_engine(resolve(tiny_onnx), backend, EngineOptions(threads=1))
    for asked, runs in ((None, "fused"), ("fused", "fused"), ("portable", "portable")):
        engine = open_engine(fused, backend, EngineOptions(threads=2, sampling=asked))
        assert (engine.sampling, engine.sampling_note) == (runs, "")
        same = [engine.run({"image": image})["mask"] == plain.run({"image": image})["mask"] for image in images]
        assert np.mean(same) >= 0.999
        engine.close()
    assert (plain.sampling, samples(backend, fused)) == ("portable", ("fused", ""))


@pytest.mark.parametrize("sampling", ["fused", "portable"])
def test_any_batch_and_size_on_any_threads(backend: str, node, sampling: str) -> None:
    model = node()
    engines = [open_engine(model, backend, EngineOptions(threads=threads, sampling=sampling)) for threads in (1, 2)]
    for sizes in ((1, 1, 1), (2, 7, 9), (3, 1, 5), (2, 7, 9), (1, 30, 40)):
        fed = feeds(*sizes)
        expected = by_loops(*fed.values())
        for engine in engines:
            # rounding of float32 in sums of 6 products and 16 corners of numbers of about 1
            np.testing.assert_allclose(attended(engine, fed), expected, rtol=0, atol=2e-5)


def test_static_sizes(backend: str, node) -> None:
    fed = feeds(2, 7, 9)
    for sampling in ("fused", "portable"):
        engine = open_engine(node(()), backend, EngineOptions(sampling=sampling))
        np.testing.assert_allclose(attended(engine, fed), by_loops(*fed.values()), rtol=0, atol=2e-5)


def test_bf16_samples_in_float32(node, missing) -> None:
    if "bf16" not in available_precisions("openvino"):
        missing("bf16", "this CPU has none")
    fed = {name: _rounded(array) for name, array in feeds(2, 7, 9).items()}
    engine = open_engine(node(), "openvino", EngineOptions(precision="bf16", sampling="fused"))
    assert (engine.precision, engine.sampling) == ("bf16", "fused")
    # inputs that bfloat16 holds exactly: what is left is the rounding of the result, 2^-9 of it
    expected = by_loops(*fed.values())
    assert (np.abs(attended(engine, fed) - expected) <= 2**-8 * np.abs(expected) + 1e-5).all()


def _rounded(array: np.ndarray) -> np.ndarray:
    """Float32 numbers cut to those that bfloat16 has."""
    return (array.view(np.uint32) & 0xFFFF0000).view(np.float32)


def test_shapes_that_do_not_belong_together_are_named(backend: str, node) -> None:
    with open_engine(node((0, 2, 3)), backend) as engine:  # type: ignore[attr-defined]
        fed = feeds(1, 4, 5)
        fed["in3"] = fed["in3"][:, :, :3]
        with pytest.raises(BackendError, match=rf"{backend} failed: .*belong together"):
            engine.run(fed)
        assert attended(engine, feeds(1, 4, 5)).shape == (1, CASE[2], 4, 5)  # it goes on


def test_the_kernel_runs_and_not_the_body(fused: Artifact, tmp_path: Path, images, need) -> None:
    need("onnxruntime")
    import onnxruntime as ort

    from ddsm_deploy.engines.onnxruntime import register_kernels

    found = {}
    for sampling in ("fused", "portable"):
        settings = ort.SessionOptions()
        settings.enable_profiling, settings.profile_file_prefix = True, str(tmp_path / sampling)
        if sampling == "fused":
            register_kernels(settings)
        session = ort.InferenceSession(str(fused.file("onnx")), settings, providers=["CPUExecutionProvider"])
        session.run(None, {"image": images[0]})
        events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
        found[sampling] = collections.Counter(event["args"]["op_name"] for event in events if event["cat"] == "Node")
    calls = sum(node.op_type == "DynamicSampleAttention" for node in onnx.load(fused.file("onnx")).graph.node)
    assert found["fused"]["DynamicSampleAttention"] == calls > 0 == found["fused"]["GridSample"]
    assert found["portable"]["GridSample"] == calls > 0 == found["portable"]["DynamicSampleAttention"]


def test_an_older_onnxruntime_is_told_what_it_lacks(need, missing) -> None:
    need("onnxruntime")
    import onnxruntime as ort

    found = sorted(Path(ort.__file__).parent.glob("capi/libonnxruntime.so*"))
    if not found or not kernels.status().available:
        missing("onnxruntime-library", "its C interface has no library of its own here, or there are no kernels")
    get_table_type = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_uint32)

    class Base(ctypes.Structure):
        _fields_ = [("get_table", get_table_type), ("get_version", ctypes.CFUNCTYPE(ctypes.c_char_p))]

    library = ctypes.CDLL(str(found[0]))
    library.OrtGetApiBase.restype = ctypes.POINTER(Base)
    real = library.OrtGetApiBase().contents
    older = Base(get_table_type(lambda version: real.get_table(version) if version < 20 else None), real.get_version)
    register = ctypes.CDLL(str(kernels.library_path())).RegisterCustomOps
    register.restype = ctypes.c_void_p
    status = register(None, ctypes.byref(older))
    message = ctypes.cast(real.get_table(1), ctypes.POINTER(ctypes.c_void_p))[2]  # GetErrorMessage
    said = ctypes.CFUNCTYPE(ctypes.c_char_p, ctypes.c_void_p)(message)(status).decode()
    assert said == f"ddsm's kernel needs ONNX Runtime 1.20 or later, this is {real.get_version().decode()}"


@pytest.mark.parametrize(("threads", "streams"), [(1, 1), (2, 1), (2, 2)])
def test_openvino_lends_as_many_threads_as_it_was_given(
    node, monkeypatch: pytest.MonkeyPatch, need, missing, threads: int, streams: int
) -> None:
    need("openvino")
    from ddsm_deploy.engines.openvino_op import pool_problem
    from ddsm_deploy.runtime.decisions import usable_cores

    if pool_problem():
        missing("openvino-threads", pool_problem())
    if usable_cores() < threads:
        missing("cores", f"OpenVINO takes no more threads than cores, of which there are {usable_cores()} here")
    lent, forward = set(), kernels.forward

    def observed(*arguments: Any, **named: Any) -> None:
        lent.add(arguments[6].threads)  # of the pool
        forward(*arguments, **named)

    monkeypatch.setattr(kernels, "forward", observed)
    with open_engine(node(), "openvino", EngineOptions(threads=threads, streams=streams)) as engine:  # type: ignore[attr-defined]
        engine.run(feeds(1, 30, 40))
    assert lent == {threads // streams}


def test_callers_side_by_side(backend: str, fused: Artifact, images) -> None:
    options = EngineOptions(threads=2, streams=2 if backend == "openvino" else None)
    with open_engine(fused, backend, options) as engine:  # type: ignore[attr-defined]
        alone = [engine.run({"image": image})["mask"] for image in images]
        with ThreadPoolExecutor(4) as pool:
            tasks = [pool.submit(engine.run, {"image": images[i % 4]}) for i in range(40)]
            masks = [task.result(timeout=60)["mask"] for task in tasks]
    for index, mask in enumerate(masks):
        np.testing.assert_array_equal(mask, alone[index % 4])


def test_openvino_frees_what_was_made_for_it(node, need) -> None:
    need("openvino")
    from ddsm_deploy.engines.openvino_op import SampleAttention

    def alive() -> int:
        gc.collect()
        return sum(type(thing) is SampleAttention for thing in gc.get_objects())

    before = alive()
    engine = open_engine(node(), "openvino")
    engine.run(feeds(1, 3, 4))
    made = alive()
    for size in range(5, 9):  # each new shape makes OpenVINO copy its operators
        engine.run(feeds(1, size, size))
    assert alive() == made > before
    engine.close()
    assert alive() == before


def test_a_process_may_end_with_an_engine_open(tiny_fused: Path, backend: str) -> None:
    code = (
        "import sys, numpy as np; from ddsm_deploy import open_engine, resolve\n"
        "engine = open_engine(resolve(sys.argv[1]), sys.argv[2])\n"
        "engine.run({'image': np.zeros((1, 64, 96, 3), np.uint8)})\n"
        "print(engine.sampling)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tiny_fused), backend], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "fused\n", "")


def test_what_a_file_or_a_provider_can_not_do(tiny_onnx: Path, fused: Artifact, backend: str) -> None:
    portable = resolve(tiny_onnx)
    with pytest.raises(BackendError, match=r"written with portable sampling, .* can't sample fused; export it with"):
        open_engine(portable, backend, EngineOptions(sampling="fused"))
    with pytest.raises(ConfigError, match=r"sampling is 'quick'; expected one of fused, portable"):
        EngineOptions(sampling="quick")
    open_engine(portable, backend, EngineOptions(sampling="portable")).close()
    if backend == "onnxruntime":
        with pytest.raises(BackendError, match=r"can't sample fused: the kernels are for CPUs, .* provider is cuda"):
            open_engine(fused, backend, EngineOptions(sampling="fused", provider="cuda"))


def test_torch_samples_on_the_kernels_by_itself(tiny_checkpoint: Path, missing) -> None:
    if not kernels.status().available:
        missing("kernels", kernels.status().reason)
    artifact = resolve(tiny_checkpoint)
    assert samples("torch", artifact) == ("fused", "")
    for precision, runs, other in (("fp32", "fused", "portable"), ("fp16", "portable", "fused")):
        with open_engine(artifact, "torch", EngineOptions(precision=precision)) as engine:  # type: ignore[attr-defined]
            assert engine.sampling == runs
        with pytest.raises(BackendError, match=f"torch samples {runs} here, not {other}"):
            open_engine(artifact, "torch", EngineOptions(precision=precision, sampling=other))


def run_without(library: str, folder: Path, model: Path, backend: str, sampling: str | None) -> dict[str, str]:
    """Opens a model in a process whose kernels lie in a folder that lacks one library."""
    for name in {"libddsm.so", "libddsm_tbb.so"} - {library}:
        (folder / name).symlink_to(Path(kernels.__file__).with_name(name))
    code = """
import json, sys, numpy as np
from pathlib import Path
from ddsm_deploy import Segmenter, kernels
from ddsm_deploy.errors import BackendError
folder, model, backend, sampling = sys.argv[1:]
kernels._FOLDER = Path(folder)
from ddsm_deploy.engines import EngineOptions
try:
    with Segmenter.open(model, backend=backend, options=EngineOptions(sampling=sampling or None)) as segmenter:
        mask = segmenter.predict(np.full((64, 96, 3), 90, np.uint8)).mask
        print(json.dumps({"ran": segmenter.sampling, "choice": segmenter.choice, "mask": mask.tolist()}))
except BackendError as exc:
    print(json.dumps({"error": str(exc)}))
"""
    command = [sys.executable, "-c", code, str(folder), str(model), backend, sampling or ""]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return dict(json.loads(done.stdout))


def test_without_kernels_the_body_runs_and_that_is_said(tiny_fused: Path, tmp_path: Path, backend: str) -> None:
    found = run_without("libddsm.so", tmp_path, tiny_fused, backend, None)
    assert found["ran"] == "portable"
    cure = "the fused kernels were not built (reinstall ddsm-deploy where there is a C++ compiler)"
    assert found["choice"] == f"{backend}, as asked for; {backend} samples portable: {cure}"
    with Segmenter.open(tiny_fused, backend=backend) as segmenter:
        assert segmenter.sampling == "fused"
        same = segmenter.predict(np.full((*SIZE, 3), 90, np.uint8)).mask == np.array(found["mask"])
    assert same.mean() >= 0.999


def test_without_kernels_fused_is_refused(tiny_fused: Path, tmp_path: Path, backend: str) -> None:
    found = run_without("libddsm.so", tmp_path, tiny_fused, backend, "fused")
    assert found["error"].startswith(f"{backend} can't sample fused: the fused kernels were not built (reinstall")


def test_without_the_pool_openvino_samples_on_one_thread(tiny_fused: Path, tmp_path: Path, need) -> None:
    need("openvino")
    found = run_without("libddsm_tbb.so", tmp_path, tiny_fused, "openvino", "fused")
    assert found["ran"] == "fused"
    assert "openvino samples fused: on one thread of each inference (libddsm_tbb.so was not built" in found["choice"]
