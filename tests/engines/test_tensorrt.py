"""Opening and running engines: the ways in which that fails, with NVIDIA's library and without a GPU.

What runs an engine is marked `gpu`; `test_contract.py` runs over these two backends as well where there is one.
"""

from __future__ import annotations

import dataclasses
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from ddsm_deploy.artifact import Artifact, resolve
from ddsm_deploy.enginefile import Profile, read_engine, record_path
from ddsm_deploy.engines import EngineOptions, available_precisions, open_engine, usable_backends
from ddsm_deploy.errors import ArtifactError, BackendError, ConfigError, InputError

SIZE = (64, 96)


@pytest.fixture(scope="module")
def engine(tiny_onnx: Path, tmp_path_factory: pytest.TempPathFactory, need) -> Path:
    """An engine for compute capability 86 alone."""
    need("tensorrt_rtx")
    need("cuda")
    from ddsm_deploy.optimize.build import BuildOptions, build_engine

    path = tmp_path_factory.mktemp("engine") / "tiny.engine"
    options = BuildOptions(target="tensorrt-rtx", precision="fp16", compute_capabilities=("86",), verify=False)
    build_engine(tiny_onnx, path, options)
    return path


@pytest.fixture
def no_gpu(missing) -> None:
    from ddsm_deploy.engines.cuda import find_gpu

    if find_gpu() is not None:
        missing("no-gpu", "there is a GPU here")


def copied(engine: Path, folder: Path, **changes: object) -> Path:
    """A copy of the engine, with changes to its record."""
    record = dataclasses.replace(read_engine(engine), **changes)  # type: ignore[arg-type]
    path = folder / engine.name
    path.write_bytes(engine.read_bytes())
    record_path(path).write_text(record.to_json(), encoding="utf-8")
    return path


def test_an_engine_is_a_model(engine: Path) -> None:
    artifact = resolve(engine)
    assert (artifact.name, artifact.spec.precision, artifact.target) == ("tiny", "fp16", "tensorrt-rtx")
    assert artifact.files == {"engine": engine}


def test_without_a_gpu_it_says_so(engine: Path, no_gpu: None) -> None:
    with pytest.raises(BackendError, match="no NVIDIA GPU can be used here: "):
        open_engine(resolve(engine), "tensorrt-rtx")
    with pytest.raises(BackendError, match="no NVIDIA GPU can be used here: "):
        available_precisions("tensorrt-rtx")


def test_the_state_of_the_backend(need, no_gpu: None) -> None:
    need("tensorrt_rtx")
    status = {entry.backend: entry for entry in usable_backends()}["tensorrt-rtx"]
    if not status.available:  # where NVIDIA's driver is installed and finds no GPU, only opening an engine tells
        assert status.reason == "tensorrt-rtx is installed, but no NVIDIA driver is"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"version": "1.5.0.114"}, "was built by tensorrt-rtx 1.5.0.114, and "),
        ({"target": "tensorrt"}, "was built for tensorrt, not for tensorrt-rtx"),
    ],
)
def test_an_engine_of_another_library(engine: Path, tmp_path: Path, changes: dict, said: str) -> None:
    """Told before a GPU is asked for, so that the message is the same on every machine."""
    path = copied(engine, tmp_path, **changes)
    with pytest.raises(BackendError, match=said) as caught:
        open_engine(resolve(path), "tensorrt-rtx")
    assert "ddsm build tiny.onnx --target tensorrt-rtx --precision fp16" in str(caught.value)


def test_damage_is_found_before_nvidia_sees_it(engine: Path, tmp_path: Path) -> None:
    path = copied(engine, tmp_path)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(ArtifactError, match=r"damaged \(sha256 .*ddsm build tiny.onnx"):
        open_engine(resolve(path), "tensorrt-rtx")
    path.write_bytes(data[:-1])
    with pytest.raises(ArtifactError, match="cut short"):
        open_engine(resolve(path), "tensorrt-rtx")
    record_path(path).unlink()
    with pytest.raises(ArtifactError, match=r"an engine of TensorRT-RTX [\d.]+, but its record"):
        resolve(path)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (EngineOptions(threads=4), "computes on the GPU and has no option 'threads'"),
        (EngineOptions(provider="cuda"), "has no option 'provider'"),
        (EngineOptions(hint="latency"), "has no option 'hint'"),
    ],
)
def test_options_it_does_not_have(engine: Path, options: EngineOptions, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        open_engine(resolve(engine), "tensorrt-rtx", options)


def test_sampling_is_the_building_s_choice(engine: Path) -> None:
    from ddsm_deploy.engines.tensorrt import _sampling

    with pytest.raises(BackendError, match=r"built with portable sampling, not fused; leave open how it is to sample"):
        open_engine(resolve(engine), "tensorrt-rtx", EngineOptions(sampling="fused"))
    plugin = dataclasses.replace(read_engine(engine), target="tensorrt", sampling="fused")
    for asked in (EngineOptions(), EngineOptions(sampling="fused")):
        assert _sampling(plugin, engine, asked) == "fused"
    with pytest.raises(BackendError, match=r"not portable; build another with: ddsm build .* --sampling portable"):
        _sampling(plugin, engine, EngineOptions(sampling="portable"))
    old = dataclasses.replace(plugin, sampling="")  # of a time when no record said it
    assert _sampling(old, engine, EngineOptions()) == "portable"


def test_another_precision_needs_another_engine(engine: Path) -> None:
    with pytest.raises(BackendError, match=r"tensorrt-rtx runs tiny at fp16, .* not at fp32"):
        open_engine(resolve(engine), "tensorrt-rtx", EngineOptions(precision="fp32"))


def test_nvidias_library_refuses_what_is_no_engine(engine: Path, tmp_path: Path) -> None:
    """The last check is theirs: a file whose record, size and hash are in order, and that holds no engine."""
    import hashlib

    import tensorrt_rtx as trt

    from ddsm_deploy.engines.tensorrt import _logger, _why_invalid

    validity = trt.Runtime(_logger(trt)).get_engine_validity(b"vtrt")
    assert _why_invalid(trt, *validity) == "it is damaged"
    blob = bytes(4096)
    with pytest.raises(ArtifactError, match="it begins with"):
        path = copied(engine, tmp_path)
        path.write_bytes(blob)
        record = dataclasses.replace(read_engine(engine), sha256=hashlib.sha256(blob).hexdigest(), bytes=len(blob))
        record_path(path).write_text(record.to_json(), encoding="utf-8")
        open_engine(resolve(path), "tensorrt-rtx")


def test_diagnoses_are_put_into_words(need) -> None:
    need("tensorrt_rtx")
    import tensorrt_rtx as trt

    from ddsm_deploy.engines.tensorrt import _WHY_INVALID, _why_invalid

    assert trt.EngineInvalidityDiagnostics.__members__.keys() == _WHY_INVALID.keys()
    old = int(trt.EngineInvalidityDiagnostics.OLD_CUDA_DRIVER) | int(trt.EngineInvalidityDiagnostics.UNSUPPORTED_CC)
    said = _why_invalid(trt, trt.EngineValidity.INVALID, old)
    assert "driver here is too old" in said
    assert "compute capability" in said
    assert "does not say why" in _why_invalid(trt, trt.EngineValidity.INVALID, 0)
    assert _why_invalid(trt, trt.EngineValidity.VALID, 0) == ""


def test_a_gpu_for_which_there_are_no_engines(need) -> None:
    """TensorRT-RTX 1.7.1 on an H100 says `UNSUPPORTED_CC` of every engine, and rebuilding is no cure."""
    need("tensorrt_rtx")
    need("cuda")
    from ddsm_deploy.engines.cuda import Gpu
    from ddsm_deploy.engines.tensorrt import why_no_engines

    hopper = Gpu(index=0, name="NVIDIA H100", compute_capability="90", memory=1, driver="13.0")
    said = why_no_engines("tensorrt-rtx", hopper)
    assert "has no engines for NVIDIA H100 (compute capability 90), only for 75, 80, 86, 89, 120, 121; use " in said
    assert why_no_engines("tensorrt-rtx", dataclasses.replace(hopper, compute_capability="86")) == ""


def test_compiled_kernels_are_kept_for_one_gpu_and_driver(engine: Path) -> None:
    from ddsm_deploy.engines.cuda import Gpu
    from ddsm_deploy.engines.tensorrt import compiled_file

    record = read_engine(engine)
    gpu = Gpu(index=0, name="RTX", compute_capability="86", memory=1, driver="13.0")
    others = [
        compiled_file(record, dataclasses.replace(gpu, compute_capability="89")),
        compiled_file(record, dataclasses.replace(gpu, driver="13.1")),
        compiled_file(dataclasses.replace(record, sha256="0" * 64), gpu),
    ]
    assert len({compiled_file(record, gpu), *others}) == 4
    assert compiled_file(record, gpu).parts[-3:-1] == ("ddsm-deploy", "tensorrt-rtx")


# From here on a GPU runs. No machine has done so yet.


@pytest.fixture
def images() -> np.ndarray:
    return np.random.default_rng(3).integers(0, 256, (4, *SIZE, 3), dtype=np.uint8)


@pytest.fixture
def on_gpu(tiny_engines: tuple[Artifact, ...], missing) -> list[Artifact]:
    if not tiny_engines:
        missing("tensorrt", "neither tensorrt nor tensorrt-rtx is installed here")
    return list(tiny_engines)


@pytest.mark.gpu
def test_arrays_on_the_gpu_give_the_same_masks(on_gpu: list[Artifact], images: np.ndarray) -> None:
    from ddsm_deploy.engines import cuda
    from ddsm_deploy.engines.devicearray import DeviceArray, view

    for artifact in on_gpu:
        with open_engine(artifact, artifact.target) as engine:  # type: ignore[attr-defined]
            stream = cuda.Stream()
            for image in images:
                source = DeviceArray((1, *image.shape), image.dtype)
                address = view(source, name="image", stream=stream.handle).address
                stream.copy(address, np.ascontiguousarray(image).ctypes.data, image.nbytes)
                stream.wait()
                given = DeviceArray((1, *SIZE), np.dtype(np.uint8))
                for outputs in (None, {"mask": given}):
                    result = engine.run_device({"image": source}, outputs)["mask"]
                    mask = np.zeros((1, *SIZE), np.uint8)
                    stream.copy(mask.ctypes.data, view(result, name="mask", stream=stream.handle).address, mask.nbytes)
                    stream.wait()
                    np.testing.assert_array_equal(mask, engine.run({"image": image[np.newaxis]})["mask"])
            stream.close()
            with pytest.raises(InputError, match=r"expected an array on the GPU|of another device"):
                engine.run_device({"image": images[:1]})
            with pytest.raises(InputError, match="is missing"):
                engine.run_device({})


@pytest.mark.gpu
def test_static_engines_run_as_a_cuda_graph(on_gpu: list[Artifact], images: np.ndarray) -> None:
    for artifact in on_gpu:
        with open_engine(artifact, artifact.target) as engine:  # type: ignore[attr-defined]
            assert engine.cuda_graph, engine.cuda_graph_reason
            masks = [engine.run({"image": image[np.newaxis]})["mask"] for image in images]
            assert any((mask != masks[0]).any() for mask in masks)


@pytest.mark.gpu
@pytest.mark.parametrize("streams", [1, 3])
def test_more_threads_than_contexts(on_gpu: list[Artifact], images: np.ndarray, streams: int) -> None:
    for artifact in on_gpu:
        with open_engine(artifact, artifact.target, EngineOptions(streams=streams)) as engine:  # type: ignore[attr-defined]
            alone = [engine.run({"image": image[np.newaxis]})["mask"] for image in images]
            with ThreadPoolExecutor(8) as pool:
                runs = pool.map(lambda i: engine.run({"image": images[i % 4][np.newaxis]})["mask"], range(40))
                for index, mask in enumerate(runs):
                    np.testing.assert_array_equal(mask, alone[index % 4])


@pytest.mark.gpu
def test_open_sizes_follow_the_image(tiny_checkpoint: Path, tmp_path: Path, missing) -> None:
    from ddsm_deploy.engines.cuda import require_gpu
    from ddsm_deploy.export import ExportOptions, export_onnx
    from ddsm_deploy.optimize.build import BuildOptions, build_engine

    export_onnx(tiny_checkpoint, tmp_path / "open.onnx", ExportOptions(dynamic="batch"))
    usable = [entry.backend for entry in usable_backends() if entry.available and "tensorrt" in entry.backend]
    if not usable:
        missing("tensorrt", "neither tensorrt nor tensorrt-rtx is installed here")
    profile = Profile(min=(1, *SIZE, 3), opt=(2, *SIZE, 3), max=(3, *SIZE, 3))
    for target in usable:
        capabilities = (require_gpu().compute_capability,) if target == "tensorrt-rtx" else ()
        options = BuildOptions(target=target, profile=profile, compute_capabilities=capabilities)
        build_engine(tmp_path / "open.onnx", tmp_path / "open.engine", options)
        batch = np.random.default_rng(5).integers(0, 256, (3, *SIZE, 3), dtype=np.uint8)
        with open_engine(resolve(tmp_path / "open.engine"), target) as engine:  # type: ignore[attr-defined]
            together = engine.run({"image": batch})["mask"]
            for index in range(3):
                alone = engine.run({"image": batch[index : index + 1]})["mask"]
                np.testing.assert_array_equal(alone[0], together[index])
            with pytest.raises(InputError, match="build it with a wider --profile"):
                engine.run({"image": np.concatenate([batch, batch])})


@pytest.mark.gpu
def test_an_engine_for_another_gpu_is_refused(engine: Path, tmp_path: Path) -> None:
    path = copied(engine, tmp_path, compute_capabilities=("1",))
    with pytest.raises(BackendError, match=r"built for compute capability 1, and the GPU here has \d+"):
        open_engine(resolve(path), "tensorrt-rtx")
