"""The contract that every engine keeps, run over every backend that is installed."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import cv2
import numpy as np
import pytest
from triton_server import why_no_server

from ddsm_deploy.artifact import Artifact, resolve
from ddsm_deploy.engines import (
    BACKENDS,
    FILE_KINDS,
    Engine,
    EngineOptions,
    available_precisions,
    open_engine,
    usable_backends,
)
from ddsm_deploy.errors import ArtifactError, BackendError, ConfigError, InputError
from ddsm_deploy.images import Image, read_image

SIZE = (64, 96)  # of the tiny network


@pytest.fixture(scope="module")
def artifact(
    tiny_checkpoint: Path, tiny_onnx: Path, tiny_engines: tuple[Artifact, ...], tiny_endpoint: dict[str, Path]
) -> Artifact:
    files = {"onnx": tiny_onnx, "checkpoint": tiny_checkpoint, **tiny_endpoint}
    return Artifact("tiny", resolve(tiny_onnx).spec, files, tiny_engines)


@pytest.fixture(scope="module", params=BACKENDS)
def backend(request: pytest.FixtureRequest, need, missing) -> str:
    need({"triton": "tritonclient"}.get(request.param, request.param.replace("-", "_")))
    if request.param == "triton" and (reason := why_no_server()):
        missing("pytriton", reason)
    status = {entry.backend: entry for entry in usable_backends()}[request.param]
    if not status.available:
        missing(request.param, status.reason)  # installed, but of no use here: TensorRT without a GPU
    return str(request.param)


@pytest.fixture(scope="module")
def engine(backend: str, artifact: Artifact) -> Iterator[Engine]:
    engine = open_engine(artifact, backend, EngineOptions(threads=1))
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def images(scenes: Path) -> list[Image]:
    """Three rendered frames and one of noise, each 1×64×96×3."""
    frames = [read_image(path) for path in sorted((scenes / "images").glob("*.png"))[:3]]
    resized = [cv2.resize(frame, SIZE[::-1])[np.newaxis] for frame in frames]
    return [*resized, np.random.default_rng(3).integers(0, 256, (1, *SIZE, 3), dtype=np.uint8)]


def test_names_types_and_shapes(engine: Engine, backend: str) -> None:
    assert engine.backend == backend
    (image,) = engine.inputs
    assert (image.name, image.dtype, image.shape[1:]) == ("image", np.uint8, (*SIZE, 3))
    assert image.shape[0] in (1, None)
    (mask,) = engine.outputs
    assert (mask.name, mask.dtype, mask.shape[1:]) == ("mask", np.uint8, SIZE)


def test_results_are_as_announced(engine: Engine, artifact: Artifact, images: list[Image]) -> None:
    for image in images:
        results = engine.run({"image": image})
        assert list(results) == ["mask"]
        assert (results["mask"].dtype, results["mask"].shape) == (np.uint8, (1, *SIZE))
        assert results["mask"].max() < len(artifact.spec.classes)
    masks = [engine.run({"image": image})["mask"] for image in images]
    assert any((mask != masks[0]).any() for mask in masks)  # it looks at its input


def test_precision_is_reported(engine: Engine, backend: str) -> None:
    assert engine.precision == "fp32"
    assert available_precisions(backend)[0] == "fp32"


def test_equal_inputs_give_equal_masks(engine: Engine, images: list[Image]) -> None:
    first = engine.run({"image": images[0]})["mask"]
    engine.run({"image": images[1]})
    np.testing.assert_array_equal(engine.run({"image": images[0]})["mask"], first)


def test_masks_equal_torch_where_the_margin_is_clear(engine: Engine, artifact: Artifact, images: list[Image]) -> None:
    with open_engine(artifact, "torch", EngineOptions(outputs=("mask", "logits"))) as torch_engine:  # type: ignore[attr-defined]
        for image in images:
            expected = torch_engine.run({"image": image})
            best = np.sort(expected["logits"], axis=1)
            clear = best[:, -1] - best[:, -2] > 1e-3  # far above float32's rounding in a network of this depth
            assert clear.mean() > 0.95
            got = engine.run({"image": image})["mask"]
            np.testing.assert_array_equal(got[clear], expected["mask"][clear])


def test_threads_do_not_disturb_each_other(engine: Engine, images: list[Image]) -> None:
    sequential = [engine.run({"image": image})["mask"] for image in images]
    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(lambda i: engine.run({"image": images[i % 4]})["mask"], range(24)))
    for index, mask in enumerate(results):
        np.testing.assert_array_equal(mask, sequential[index % 4])


def test_results_belong_to_the_caller(engine: Engine, images: list[Image]) -> None:
    first = engine.run({"image": images[0]})["mask"]
    kept = first.copy()
    engine.run({"image": images[3]})
    np.testing.assert_array_equal(first, kept)
    first[:] = 255
    np.testing.assert_array_equal(engine.run({"image": images[0]})["mask"], kept)


def test_read_only_and_strided_images_are_taken(engine: Engine, images: list[Image]) -> None:
    expected = engine.run({"image": images[0]})["mask"]
    frozen = images[0].copy()
    frozen.setflags(write=False)
    np.testing.assert_array_equal(engine.run({"image": frozen})["mask"], expected)
    mirrored = images[0][:, :, ::-1].copy()
    np.testing.assert_array_equal(engine.run({"image": mirrored[:, :, ::-1]})["mask"], expected)


def test_wrong_feeds_are_named(engine: Engine, images: list[Image]) -> None:
    image = images[0]
    for feeds, said in (
        ({}, "input 'image' is missing; expected image uint8"),
        ({"image": image, "mask": image}, "unknown input 'mask'; expected image"),
        ({"image": image.tolist()}, "is a list; expected a numpy array"),
        ({"image": image.astype(np.float32)}, "is float32 1x64x96x3; expected image uint8"),
        ({"image": image[0]}, "is uint8 64x96x3; expected image uint8"),
        ({"image": image[:, :32]}, "is uint8 1x32x96x3; expected image uint8"),
        ({"image": image[..., :1]}, "is uint8 1x64x96x1; expected image uint8"),
        ({"image": image[:0]}, "is uint8 0x64x96x3; expected image uint8"),
    ):
        with pytest.raises(InputError) as caught:
            engine.run(feeds)
        assert said in str(caught.value)
    engine.run({"image": image})  # none of that harmed it


def test_closing_ends_it(backend: str, artifact: Artifact, images: list[Image]) -> None:
    with open_engine(artifact, backend) as engine:  # type: ignore[attr-defined]
        engine.run({"image": images[0]})
    engine.close()
    with pytest.raises(BackendError, match="is closed"):
        engine.run({"image": images[0]})


def test_closing_amid_the_work_of_threads(backend: str, artifact: Artifact, images: list[Image]) -> None:
    engine = open_engine(artifact, backend, EngineOptions(threads=1))

    def work(_: int) -> str:
        try:
            engine.run({"image": images[0]})
        except BackendError as exc:
            return str(exc)
        return "done"

    with ThreadPoolExecutor(4) as pool:
        futures = [pool.submit(work, index) for index in range(16)]
        futures[0].result()
        engine.close()
        said = {future.result(timeout=60) for future in futures}
    assert said <= {"done", f"this {backend} engine is closed; open another"}


def test_a_model_without_the_needed_file(backend: str, artifact: Artifact) -> None:
    others = {kind: path for kind, path in artifact.files.items() if kind != FILE_KINDS[backend]}
    with pytest.raises(ArtifactError, match="has no"):
        open_engine(Artifact("tiny", artifact.spec, others), backend)


@pytest.mark.parametrize(
    ("options", "takers"),
    [
        (EngineOptions(provider="cuda"), {"onnxruntime"}),
        (EngineOptions(spinning=False), {"onnxruntime"}),
        (EngineOptions(streams=2), {"openvino", "tensorrt", "tensorrt-rtx"}),
        (EngineOptions(hint="throughput"), {"openvino"}),
    ],
)
def test_an_option_it_does_not_have_is_refused(
    backend: str, artifact: Artifact, options: EngineOptions, takers: set[str]
) -> None:
    if backend not in takers:
        with pytest.raises(ConfigError, match=f"{backend} has no option"):
            open_engine(artifact, backend, options)


def test_precisions_it_lacks_are_refused(backend: str, artifact: Artifact) -> None:
    for precision in {"fp16", "bf16", "int8"} - set(available_precisions(backend)):
        with pytest.raises(BackendError, match=f"{backend}|{precision}"):
            open_engine(artifact, backend, EngineOptions(precision=precision))


def test_bf16_where_the_cpu_has_it(backend: str, artifact: Artifact, images: list[Image], missing) -> None:
    if "bf16" not in available_precisions(backend):
        missing("bf16", f"{backend} has no bf16 on this CPU")
    with open_engine(artifact, backend, EngineOptions(precision="bf16")) as engine:  # type: ignore[attr-defined]
        assert engine.precision == "bf16"
        with open_engine(artifact, backend) as exact:  # type: ignore[attr-defined]
            for image in images[:3]:
                same = engine.run({"image": image})["mask"] == exact.run({"image": image})["mask"]
                assert same.mean() > 0.9


def test_an_output_it_lacks_is_refused(artifact: Artifact, need) -> None:
    for backend in ("onnxruntime", "openvino"):
        need(backend)
        with pytest.raises(BackendError, match="no output 'confidence'"):
            open_engine(artifact, backend, EngineOptions(outputs=("mask", "confidence")))


def test_usable_backends_agree_with_what_opens(artifact: Artifact) -> None:
    status = {entry.backend: entry for entry in usable_backends()}
    assert tuple(status) == BACKENDS
    for backend, entry in status.items():
        if entry.available:
            assert entry.version
            assert not entry.reason
            if FILE_KINDS[backend] != "endpoint" or "endpoint" in artifact.files:  # the client alone is no server
                open_engine(artifact, backend).close()
        else:
            assert "pip install" in entry.reason or "no NVIDIA driver" in entry.reason


def test_openvino_does_not_phone_home(need) -> None:
    need("openvino")
    # in a process of its own: what other tests import may load it
    code = (
        "import sys; from ddsm_deploy.engines import available_precisions; available_precisions('openvino'); "
        "assert 'openvino' in sys.modules; print('openvino_telemetry' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "False\n"), done.stderr
