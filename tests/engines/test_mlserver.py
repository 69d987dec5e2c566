"""A real server that is not Triton's: MLServer speaks the same protocol and has no model configuration to tell."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from colour_graph import write_colour_model

from ddsm_deploy import Segmenter, resolve
from ddsm_deploy.errors import ArtifactError, BackendError

STARTS_IN = 90.0  # seconds, on a loaded machine; four on an idle one
TESTS = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_colour_model(tmp_path_factory.mktemp("model") / "colours.onnx", dynamic=True)


@pytest.fixture(scope="module")
def url(need, model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The colour model, served."""
    for module in ("tritonclient", "mlserver"):
        need(module)
    folder = tmp_path_factory.mktemp("mlserver")
    ports = dict(zip(("http_port", "grpc_port", "metrics_port"), _free_ports(3), strict=True))
    settings = {"host": "127.0.0.1", "parallel_workers": 0, "debug": False, **ports}
    tensors = {"inputs": [("image", [-1, -1, -1, 3])], "outputs": [("mask", [-1, -1, -1])]}
    served = {
        "name": "colours",
        "implementation": "mlserver_runtime.OnnxModel",
        "parameters": {"uri": str(model)},
        **{key: [{"name": n, "datatype": "UINT8", "shape": s} for n, s in group] for key, group in tensors.items()},
    }
    (folder / "settings.json").write_text(json.dumps(settings), encoding="utf-8")
    (folder / "model-settings.json").write_text(json.dumps(served), encoding="utf-8")
    with _running(folder):
        address = f"127.0.0.1:{ports['grpc_port']}"
        _wait(address, folder / "log")
        yield f"triton://{address}/colours"


def test_its_masks(url: str, model: Path) -> None:
    image = np.random.default_rng(4).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    strongest = image[..., ::-1].argmax(-1)  # what `colour_graph` answers, by its definition
    with Segmenter.open(f"{url}?spec={model}") as segmenter:
        assert (segmenter.backend, segmenter.precision) == ("triton", "fp32")
        np.testing.assert_array_equal(segmenter.predict(image).mask, strongest)


def test_the_spec_must_come_from_elsewhere(url: str, model: Path) -> None:
    with pytest.raises(ArtifactError, match=r"has no ddsm.spec; .*\?spec=MODEL"):
        resolve(url)
    with pytest.raises(BackendError, match=r"/other: the server says: Model other .*not found"):
        Segmenter.open(f"{url.removesuffix('colours')}other?spec={model}")


@contextlib.contextmanager
def _running(folder: Path) -> Iterator[None]:
    script = "import sys; from mlserver.cli import main; sys.argv[0] = 'mlserver'; main()"
    search = os.pathsep.join([str(TESTS), os.environ.get("PYTHONPATH", "")])
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-c", script, "start", str(folder)],
            stdout=log,
            stderr=subprocess.STDOUT,
            env={**os.environ, "PYTHONPATH": search},
        )
    try:
        yield
    finally:
        process.send_signal(signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(10)
        process.kill()
        process.wait()


def _wait(address: str, log: Path) -> None:
    import tritonclient.grpc

    client = tritonclient.grpc.InferenceServerClient(address)
    end = time.monotonic() + STARTS_IN
    with contextlib.closing(client):
        while time.monotonic() < end:
            with contextlib.suppress(tritonclient.grpc.InferenceServerException):
                if client.is_model_ready("colours"):
                    return
            time.sleep(0.2)
    raise AssertionError(f"MLServer did not start:\n{log.read_text(errors='replace')[-3000:]}")


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for free in sockets:
            free.bind(("127.0.0.1", 0))
        return [int(free.getsockname()[1]) for free in sockets]
