"""A picture to send, and a service to send it to."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np
import pytest
from serving import MAX_BYTES, MAX_PIXELS, Server, running


@pytest.fixture(scope="session", autouse=True)
def _packages(need) -> None:
    for module in ("fastapi", "uvicorn", "prometheus_client", "python_multipart"):
        need(module)


@pytest.fixture(scope="session")
def picture() -> np.ndarray:
    """64×96, the size of the model: blocks of noise, so that each class comes in several regions."""
    blocks = np.random.default_rng(0).integers(0, 256, (8, 12, 3), dtype=np.uint8)
    return cv2.resize(blocks, (96, 64), interpolation=cv2.INTER_NEAREST)


@pytest.fixture(scope="module")
def server(colour_onnx: Path) -> Iterator[Server]:
    """A service that keeps nobody out, with low limits on size."""
    with running(colour_onnx, "--max-bytes", str(MAX_BYTES), "--max-pixels", str(MAX_PIXELS)) as service:
        yield service
