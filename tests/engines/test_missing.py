"""A backend that is not installed, or not whole: told in one line with its pip line, and never fallen back from.

Each test runs in a process where importing the runtime fails for real.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from colour_graph import write_colour_model

SCRIPT = """
import sys
sys.modules[{module!r}] = None
from ddsm_deploy import BackendMissing, Segmenter
from ddsm_deploy.engines import usable_backends
status = {{entry.backend: entry for entry in usable_backends()}}[{backend!r}]
assert not status.available
print(status.reason)
try:
    Segmenter.open({model!r}, backend={backend!r})
except BackendMissing as exc:
    print(exc)
"""

AUTO = """
import sys
sys.modules["openvino"] = None
from ddsm_deploy import Segmenter
with Segmenter.open({model!r}) as segmenter:
    print(segmenter.backend)
    print(segmenter.choice)
assert "torch" not in sys.modules
"""


def python(script: str) -> list[str]:
    command = [sys.executable, "-W", "error", "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.mark.parametrize(
    ("backend", "module", "extra"),
    [
        ("onnxruntime", "onnxruntime", "cpu"),
        ("openvino", "openvino", "cpu"),
        ("torch", "torch", "train"),
        ("torch", "timm", "train"),
        ("triton", "tritonclient", "triton"),
    ],
)
def test_a_missing_backend_says_how_to_get_it(tmp_path: Path, backend: str, module: str, extra: str) -> None:
    model = str(write_colour_model(tmp_path / "model.onnx"))
    reason, error = python(SCRIPT.format(module=module, backend=backend, model=model))
    for text in (reason, error):
        assert text.startswith(f"{backend} is not usable here (")
        assert module in text
        assert text.endswith(f"install it with: pip install 'ddsm-deploy[{extra}]'")


def test_auto_passes_over_what_is_missing_and_says_so(tmp_path: Path, need) -> None:
    need("onnxruntime")
    backend, choice = python(AUTO.format(model=str(write_colour_model(tmp_path / "model.onnx"))))
    assert backend == "onnxruntime"
    assert choice.startswith("onnxruntime fp32, the only one that can run this; openvino is not usable here (")
    assert "pip install 'ddsm-deploy[cpu]'" in choice


def test_a_gpu_provider_that_is_not_there_is_an_error(tmp_path: Path, need, missing) -> None:
    need("onnxruntime")
    import onnxruntime

    from ddsm_deploy.artifact import resolve
    from ddsm_deploy.engines import EngineOptions, open_engine
    from ddsm_deploy.errors import BackendError

    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        missing("cpu-only", "this onnxruntime has CUDA")
    artifact = resolve(write_colour_model(tmp_path / "model.onnx"))
    for provider in ("cuda", "tensorrt"):
        with pytest.raises(BackendError, match=r"no \w+ExecutionProvider.*pip install 'ddsm-deploy\[gpu\]'"):
            open_engine(artifact, "onnxruntime", EngineOptions(provider=provider))
