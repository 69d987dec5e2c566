"""The plugin's definitions, as far as they go without a GPU: NVIDIA's own bindings check them."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import tensorrt_graphs as graphs

from ddsm_deploy.errors import BackendError
from ddsm_deploy.export.sampling_function import PLUGIN
from ddsm_deploy.export.tensorrt import plugin
from ddsm_deploy.export.tensorrt.builder import Job, Plugin, build
from ddsm_deploy.kernels import cuda
from ddsm_deploy.onnxfile import SAMPLING_OP

PROBE = Path(__file__).parent / "plugin_probe.py"

# What the bindings want of NVIDIA's libraries. They give nothing, as those do where there is no driver.
STUB = "\n".join(
    f"void* {name}(void) {{ return 0; }}"
    for name in (
        *(f"create{kind}_INTERNAL" for kind in ("InferBuilder", "InferRefitter", "InferRuntime", "NvOnnxParser")),
        "createNvOnnxParserRefitter_INTERNAL",
        "getBuilderPluginRegistry",
        "getNvOnnxParserVersion",
        "getPluginRegistry",
        "initLibNvInferPlugins",
    )
)


@pytest.fixture(scope="module")
def nvrtc(need, missing) -> tuple[int, int]:
    """Its version."""
    need("cuda")
    try:
        return cuda.compiler_version()
    except BackendError as exc:
        missing("nvrtc", str(exc))
        raise


@pytest.fixture(scope="module")
def probed(nvrtc: tuple[int, int], tmp_path_factory: pytest.TempPathFactory, need, missing) -> dict:
    """What `plugin_probe` printed, run with the bindings that are installed."""
    command = [sys.executable, str(PROBE)]
    if importlib.util.find_spec("tensorrt") is None:
        need("tensorrt_bindings")  # pip install --no-deps tensorrt-cu13-bindings: they alone are enough here
        if shutil.which("cc") is None:
            missing("cc", "no C compiler is on the path, to make what stands in for NVIDIA's libraries")
        command.append(str(stubs(tmp_path_factory.mktemp("stubs"))))
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def stubs(folder: Path) -> Path:
    spec = importlib.util.find_spec("tensorrt_bindings")
    assert spec is not None
    assert spec.origin is not None
    wanted = re.findall(
        rb"lib(?:nvinfer|nvinfer_plugin|nvonnxparser)\.so\.\d+",
        Path(spec.origin, "../tensorrt.so").resolve().read_bytes(),
    )
    source = folder / "stub.c"
    source.write_text(STUB, encoding="utf-8")
    for name in {name.decode() for name in wanted}:
        line = ["cc", "-shared", "-fPIC", f"-Wl,-soname,{name}", str(source), "-o", str(folder / name)]
        subprocess.run(line, check=True)
    return folder


def test_the_bindings_take_the_definitions(probed: dict) -> None:
    assert probed["inputs"] == ["query", "key", "value", "offset"]
    assert (probed["outputs"], probed["attributes"]) == (1, [])
    assert probed["result"] == [True, 4]  # value's type and number of axes
    assert probed["creator"] == [SAMPLING_OP, PLUGIN["plugin_namespace"], PLUGIN["plugin_version"]]
    assert probed["made"] == ["_TemplateAOTPlugin", True]


def test_it_gives_a_kernel_for_each_type(probed: dict) -> None:
    for kernel in probed["kernels"]:
        # Y, X, K, V and the channels a block makes, each a symbol of 32 bits, as the kernel's arguments are
        assert kernel == {"name": cuda.KERNEL, "entry": True, "grid": True, "numbers": [True] * 5}


def test_what_it_has_no_kernel_for(probed: dict) -> None:
    assert probed["mixed"]["error"] == "BackendError: query, key and value are of fp16 and fp32; expected one type"
    assert probed["integers"]["error"].startswith("ConfigError: the GPU kernel's elements are ")
    assert probed["many"]["error"].startswith("ConfigError: the GPU kernel was asked for 26 samples a pixel")


@pytest.mark.parametrize(
    ("shape", "chunk"),
    [
        ((1, 64, 90, 120), 64),  # a map of the pyramid: every block makes all channels
        ((1, 144, 8, 8), 16),  # the channel branch's plane
        ((4, 10, 16, 16), 10),
        ((1, 64, 16, 17), 64),
        ((-1, 144, 12, 12), 16),  # any number of images
        ((1, 64, -1, -1), 64),  # any size
    ],
)
def test_small_planes_are_split_by_channels(shape: tuple[int, ...], chunk: int) -> None:
    assert plugin.chunk_of(shape) == chunk


def test_an_older_driver_reads_no_newer_ptx(nvrtc: tuple[int, int]) -> None:
    major, minor = nvrtc
    for driver in (f"{major}.{minor}", f"{major}.{minor + 1}", f"{major + 1}.0"):
        plugin.check_driver(driver)
    with pytest.raises(BackendError, match=rf"NVRTC {major}\.{minor} is newer than .* CUDA {major - 1}\.9; install"):
        plugin.check_driver(f"{major - 1}.9")


def test_a_library_without_such_plugins(need) -> None:
    """TensorRT-RTX has none, and TensorRT has them from 10.9 on."""
    need("tensorrt_rtx")
    import tensorrt_rtx

    with pytest.raises(BackendError, match=r"no plugins that are compiled ahead of time; 10\.9 brought them, this is"):
        plugin.register(tensorrt_rtx, "86")


@pytest.mark.parametrize(
    ("driver", "said"),
    [
        ("99.0", "it has no plugins that are compiled ahead of time"),
        ("1.0", r"NVRTC \d+\.\d+ is newer than .* CUDA 1\.0"),
    ],
)
def test_a_build_says_why_it_gets_no_plugin(nvrtc, tmp_path: Path, need, driver: str, said: str) -> None:
    need("tensorrt_rtx")
    wanted = Plugin(compute_capability="86", driver=driver, nodes=1)
    onnx = graphs.save(graphs.sampling(), tmp_path / "graph.onnx")
    job = Job(target="tensorrt-rtx", onnx=onnx, engine=tmp_path / "x.engine", sampling=("linear",), plugin=wanted)
    with pytest.raises(BackendError, match=rf"can't build this: its sampling plugin can't be made: {said}"):
        build(job)
