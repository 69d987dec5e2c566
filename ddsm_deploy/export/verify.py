"""Running an exported file and comparing it with torch, so that no export ends unseen."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np
import numpy.typing as npt

from ddsm_deploy.errors import BackendError, BackendMissing, ConfigError
from ddsm_deploy.frames import evenly, frames_in
from ddsm_deploy.images import read_image
from ddsm_deploy.parity import ParityBudget, ParityMeter, ParityResult
from ddsm_deploy.spec import ModelSpec

if TYPE_CHECKING:
    from ddsm_deploy.model.deploy import DeployModule

Array = npt.NDArray[Any]

MAX_IMAGES = 32
"""Of a larger folder this many are compared, evenly spaced."""


def require_onnxruntime() -> None:
    """Raises `BackendMissing` unless ONNX Runtime is installed: said before an export starts, not after it."""
    if importlib.util.find_spec("onnxruntime") is None:
        raise BackendMissing("onnxruntime", extra="cpu")


def find_images(paths: Sequence[Path]) -> list[Path]:
    """Image files among `paths`, folders searched recursively; evenly thinned to `MAX_IMAGES`.

    Raises:
        InputError: a path does not exist, or a folder holds no image.
    """
    found: list[Path] = []
    for path in paths:
        found.extend(frame.path for frame in frames_in(path))
    return list(evenly(found, MAX_IMAGES))


def load_images(paths: Sequence[Path], spec: ModelSpec) -> list[Array]:
    """Images as the deployed input wants them: uint8 1×H×W×3 at the spec's size, in the spec's channel order."""
    arrays = []
    for path in paths:
        image = cv2.resize(read_image(path), (spec.width, spec.height), interpolation=cv2.INTER_LINEAR)
        ordered = image if spec.channel_order == "bgr" else np.ascontiguousarray(image[..., ::-1])
        arrays.append(ordered[None])
    return arrays


def synthetic_images(height: int, width: int, count: int = 4) -> list[Array]:
    """Shaded planes, coloured shapes and noise, always the same ones: uint8 1×H×W×3 each."""
    rng = np.random.default_rng(0)
    rows, columns = np.mgrid[0:height, 0:width].astype(np.float32)
    images = []
    for index in range(count):
        slopes = rng.uniform(-128, 128, (2, 3))
        image = 128 + (rows / height - 0.5)[..., None] * slopes[0] + (columns / width - 0.5)[..., None] * slopes[1]
        image = np.ascontiguousarray(image.clip(0, 255).astype(np.uint8))
        for _ in range(12):
            colour = [int(c) for c in rng.integers(0, 256, 3)]
            x, y = int(rng.integers(0, width)), int(rng.integers(0, height))
            reach = int(rng.integers(2, max(3, min(height, width) // 3)))
            if rng.random() < 0.5:
                cv2.rectangle(image, (x, y), (x + reach, y + 2 * reach), colour, thickness=-1)
            else:
                cv2.circle(image, (x, y), reach, colour, thickness=-1)
        noise = rng.normal(0, 6 * (index + 1), image.shape)
        images.append((image + noise).clip(0, 255).astype(np.uint8)[None])
    return images


def compare(
    path: Path,
    module: DeployModule,
    images: Sequence[Array],
    *,
    classes: Sequence[str],
    dynamic: str,
    budget: ParityBudget | None = None,
) -> ParityResult:
    """Runs an ONNX file on ONNX Runtime (CPU) beside the torch module it was made from (A is torch, B the file).

    A file with a symbolic batch is given a batch of two as well, and one with symbolic sizes also an odd, smaller size.

    Args:
        path: the file.
        module: the reference.
        images: uint8 1×H×W×3 each, at least one.
        classes: names of the classes.
        dynamic: which axes are symbolic, as in `graph.DYNAMIC`.
        budget: what is allowed; None is the default of `ParityBudget`.

    Raises:
        ConfigError: no images: a comparison of nothing would pass.
        BackendError: the file does not load or run.
    """
    import torch  # lazily: `ddsm build` takes its images from here, on machines without torch

    if not images:
        raise ConfigError("no image to verify the export on")
    session, meter = _session(path), ParityMeter(classes)
    for feed in _feeds(images, dynamic):
        got = dict(zip(module.outputs, _run(session, path, feed), strict=True))
        with torch.inference_mode():
            want = {n: t.numpy() for n, t in zip(module.outputs, module(torch.from_numpy(feed)), strict=True)}
        if got["mask"].dtype != np.uint8 or got["mask"].shape != feed.shape[:3]:
            raise BackendError(f"{path}: gives a {got['mask'].dtype} mask of {got['mask'].shape} for {feed.shape}")
        for index in range(len(feed)):
            logits = (want["logits"][index], got["logits"][index]) if "logits" in want else None
            meter.update(want["mask"][index], got["mask"][index], logits=logits)
    return meter.result(budget)


def _feeds(images: Sequence[Array], dynamic: str) -> Iterator[Array]:
    yield from images
    if dynamic != "none":
        yield np.concatenate([images[0], images[-1]])
    if dynamic == "batch,size":
        height, width = images[0].shape[1:3]
        size = (max(32, width // 2 + 3), max(32, height // 2 + 5))
        yield cv2.resize(np.ascontiguousarray(images[0][0]), size)[None]


def _session(path: Path) -> Any:
    import onnxruntime  # lazily: an export with verification off needs none

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as exc:  # its exceptions share no base but Exception
        raise BackendError(f"{path}: ONNX Runtime can't load the exported graph ({_line(exc)})") from exc


def _run(session: Any, path: Path, feed: Array) -> list[Array]:
    try:
        results: list[Array] = session.run(None, {"image": np.ascontiguousarray(feed)})
        return results
    except Exception as exc:  # its exceptions share no base but Exception
        raise BackendError(f"{path}: ONNX Runtime can't run the exported graph ({_line(exc)})") from exc


def _line(exc: Exception) -> str:
    return str(exc).strip().splitlines()[0][:300] if str(exc).strip() else type(exc).__name__
