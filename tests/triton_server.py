"""A real Triton Inference Server on this machine: the one that the package nvidia-pytriton carries.

Of that package only the program is used, so it is installed without what else it asks for (numpy 1):

    pip install --no-deps nvidia-pytriton
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

STARTS_IN = 60.0  # seconds, on a loaded machine; two on an idle one


class TritonServer:
    """A running server.

    Attributes:
        address: host and port of its gRPC service.
        repository: its model repository; `load` makes it read a model there.
        log: what it has printed.
    """

    def __init__(self, address: str, repository: Path, log: Path) -> None:
        import tritonclient.grpc

        self.address, self.repository, self.log = address, repository, log
        self.client: Any = tritonclient.grpc.InferenceServerClient(address)

    def load(self, name: str) -> str:
        """Loads a model, or loads it anew; returns its URL."""
        self.client.load_model(name)
        return f"triton://{self.address}/{name}"

    def batches(self, name: str) -> dict[int, int]:
        """How often the model was executed on how many images, by Triton's own count."""
        (stats,) = self.client.get_inference_statistics(name).model_stats
        return {entry.batch_size: entry.compute_infer.count for entry in stats.batch_stats}


def why_no_server() -> str:
    """Empty where a server can be started."""
    if importlib.util.find_spec("tritonclient") is None:
        return "tritonclient is not installed here"
    if importlib.util.find_spec("pytriton") is None:
        return "nvidia-pytriton is not installed here (pip install --no-deps nvidia-pytriton)"
    if not (_home() / "python_backend_stubs" / _python()).is_dir():
        return f"nvidia-pytriton has nothing for Python {_python()}"
    library = str(sysconfig.get_config_var("LDLIBRARY"))
    return "" if ".so" in library else "this Python has no shared library, which Triton needs"


@contextlib.contextmanager
def running_server(folder: Path) -> Iterator[TritonServer]:
    """Starts a server without models, with its files in `folder`, and stops it in the end."""
    repository, log = folder / "repository", folder / "log"
    repository.mkdir()
    port = _free_port()
    command = [
        _home() / "bin" / "tritonserver",
        f"--model-repository={repository}",
        f"--backend-directory={_backends(folder / 'backends')}",
        "--model-control-mode=explicit",
        "--disable-auto-complete-config",  # config.pbtxt must say all that there is to say
        "--allow-http=false",
        "--allow-metrics=false",
        "--grpc-address=127.0.0.1",
        f"--grpc-port={port}",
        "--exit-timeout-secs=10",
    ]
    search = [entry for entry in sys.path if entry]
    own = _home().parent.with_name("nvidia_pytriton.libs")  # the backend's copy no longer finds them by itself
    libraries = [str(own), str(sysconfig.get_config_var("LIBDIR")), os.environ.get("LD_LIBRARY_PATH", "")]
    environment = {
        **os.environ,
        "DDSM_TESTS_PATH": json.dumps(search),
        "LD_LIBRARY_PATH": os.pathsep.join(entry for entry in libraries if entry),
    }
    with log.open("wb") as file:
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=environment)
    try:
        server = TritonServer(f"127.0.0.1:{port}", repository, log)
        _wait(server, process)
        yield server
        server.client.close()
    finally:
        process.send_signal(signal.SIGINT)  # it ends its own children then
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(20)
        process.kill()
        process.wait()


def _wait(server: TritonServer, process: subprocess.Popen[bytes]) -> None:
    import tritonclient.grpc

    end = time.monotonic() + STARTS_IN
    while True:
        with contextlib.suppress(tritonclient.grpc.InferenceServerException):
            if server.client.is_server_ready():
                return
        if process.poll() is not None or time.monotonic() > end:
            raise AssertionError(f"Triton did not start:\n{server.log.read_text(errors='replace')[-3000:]}")
        time.sleep(0.1)


def _home() -> Path:
    found = importlib.util.find_spec("pytriton")
    assert found is not None
    assert found.submodule_search_locations
    return Path(found.submodule_search_locations[0]) / "tritonserver"


def _python() -> str:
    return f"{sys.version_info.major}.{sys.version_info.minor}"


def _backends(folder: Path) -> Path:
    """Triton's Python backend with the part for this Python, and `triton_backend.py` under the name onnxruntime."""
    python = folder / "python"
    python.mkdir(parents=True)
    files = [*(_home() / "backends" / "python").iterdir(), *(_home() / "python_backend_stubs" / _python()).iterdir()]
    for file in files:
        if file.is_file():
            shutil.copy2(file, python)  # Triton refuses links that lead out of the folder
    (folder / "onnxruntime").mkdir()
    shutil.copyfile(Path(__file__).with_name("triton_backend.py"), folder / "onnxruntime" / "model.py")
    return folder


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])
