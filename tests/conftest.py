"""Fixtures that all tests share: frames, data sets, and a tiny network as checkpoint and as ONNX."""

from __future__ import annotations

import fcntl
import hashlib
import importlib.util
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from processor import WEIGHT_BITS
from render_scenes import write_scenes
from triton_server import TritonServer, running_server, why_no_server

if TYPE_CHECKING:
    from ddsm_deploy.artifact import Artifact

# A shell starts background jobs with Ctrl-C switched off, and processes that tests start would inherit that.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Threads of OpenMP that wait for each other would keep the cores busy on which the other process' tests run.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

REPO = Path(__file__).parent.parent
TINY_SIZE = (64, 96)
"""Height and width of the tiny network's input."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--require",
        action="append",
        default=[],
        metavar="NAME",
        help="a missing NAME (torch, onnxruntime, openvino, camvid, gpu, ...) fails its tests instead of skipping them",
    )


SLOWEST = ("test_readme.py", "test_loop.py", "test_export.py", "test_build.py")
"""Files of minutes each."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Puts the slowest files first, for a process that began one last would end long after the other."""
    items.sort(key=lambda item: SLOWEST.index(item.path.name) if item.path.name in SLOWEST else len(SLOWEST))


class Missing:
    """Skips a test for want of something, or fails it where `--require` names that."""

    def __init__(self, required: list[str]) -> None:
        self.required = required

    def __call__(self, name: str, reason: str) -> None:
        if name in self.required:
            pytest.fail(f"{name} is required (--require {name}), but {reason}")
        pytest.skip(f"{name}: {reason}")


@pytest.fixture(scope="session")
def missing(pytestconfig: pytest.Config) -> Missing:
    """`missing(name, reason)` skips, or fails under `--require name`."""
    return Missing(pytestconfig.getoption("--require"))


@pytest.fixture(scope="session")
def need(missing: Missing):
    """`need("openvino")` returns if that module can be imported, and else does as `missing`."""

    def check(module: str) -> None:
        if importlib.util.find_spec(module) is None:
            missing(module, "it is not installed here")

    return check


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Bundles are unpacked and decisions kept in a folder of the tests' own, in processes they start as well."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(autouse=True)
def _gpu_marker(request: pytest.FixtureRequest) -> None:
    if request.node.get_closest_marker("gpu") is None:
        return
    reason = _why_no_gpu()
    if reason:
        request.getfixturevalue("missing")("gpu", reason)


def _why_no_gpu() -> str:
    """Empty where a CUDA GPU can be used; cuda-bindings tells, or torch where that is missing."""
    if importlib.util.find_spec("cuda") is not None:
        from ddsm_deploy.engines.cuda import require_gpu
        from ddsm_deploy.errors import BackendError

        try:
            require_gpu()
        except BackendError as exc:
            return str(exc)
        return ""
    if importlib.util.find_spec("torch") is None:
        return "neither cuda-bindings nor torch, which could look for one, is installed here"
    import torch

    return "" if torch.cuda.is_available() else "there is no CUDA GPU here"


@pytest.fixture(scope="session")
def camvid(missing: Missing) -> Path:
    """The folder of CamVid (SegNet edition): ``$DDSM_CAMVID``, or ``../shared/data/camvid`` beside the repository."""
    given = os.environ.get("DDSM_CAMVID")
    folder = Path(given) if given else REPO.parent / "shared" / "data" / "camvid"
    if not (folder / "val").is_dir():
        missing("camvid", f"there is no {folder / 'val'}; DDSM_CAMVID can name the data set's folder")
    return folder


@pytest.fixture(scope="session")
def shipped_model(missing: Missing) -> Path:
    """The bundle of the default model, `ddsm-lite0`."""
    return _shipped("ddsm-lite0", missing)


@pytest.fixture(scope="session")
def large_model(missing: Missing) -> Path:
    """The bundle of `ddsm-lite0-large`, which has both branches, and an image that is enlarged."""
    return _shipped("ddsm-lite0-large", missing)


def _shipped(name: str, missing: Missing) -> Path:
    folder = REPO / "ddsm_deploy" / "models" / name
    if not (folder / "bundle.json").is_file():
        missing("shipped-model", f"there is no {folder.relative_to(REPO)}")
    return folder


def _made_once(place: Path, make: Callable[[Path], None]) -> Path:
    """Fills the folder `place` by `make(folder)`, unless that has been done; other processes wait for it meanwhile."""
    place.parent.mkdir(parents=True, exist_ok=True)
    with place.with_name(f"{place.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not place.is_dir():
            half = place.with_name(f"{place.name}.half")
            shutil.rmtree(half, ignore_errors=True)  # of a run that was stopped
            half.mkdir()
            make(half)
            half.rename(place)
    return place


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, Callable[[Path], None]], Path]:
    """`shared(name, make)`: the folder that `make(folder)` filled, once for all processes of this run."""
    base = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        base = base.parent  # each process has a folder of its own in there
    return lambda name, make: _made_once(base / "shared" / name, make)


@pytest.fixture(scope="session")
def kept(pytestconfig: pytest.Config, shared) -> Callable[[str, list[Path], Callable[[Path], None]], Path]:
    """`kept(name, sources, make)`: as `shared`, and in pytest's cache for later runs until a source changes."""

    def folder(name: str, sources: list[Path], make: Callable[[Path], None]) -> Path:
        digest = hashlib.sha256()
        for source in sorted(sources):
            digest.update(source.read_bytes())
        cache = getattr(pytestconfig, "cache", None)  # `-p no:cacheprovider` switches it off
        return _made_once(cache.mkdir(name) / digest.hexdigest()[:16], make) if cache else shared(name, make)

    return folder


RENDERER = [REPO / "examples" / "render_scenes.py", *(REPO / "examples" / "street").glob("*.py")]


@pytest.fixture(scope="session")
def scenes(kept) -> Path:
    """A `folder` data set of 24 rendered frames, 96×128: images/, labels/ and classes.json. Not to be written to."""
    return kept("scenes", RENDERER, lambda folder: write_scenes(folder, count=24, height=96, width=128, seed=7))


@pytest.fixture(scope="session")
def tiny_checkpoint(kept, need, scenes: Path) -> Path:
    """Checkpoint of a tiny network (input 64×96, CamVid's classes) that knows the scenes. Not to be written to."""
    for module in ("torch", "timm"):
        need(module)

    def make(folder: Path) -> None:
        from tiny_network import write_tiny_checkpoint

        write_tiny_checkpoint(folder / "tiny.safetensors", scenes=scenes, size=TINY_SIZE)

    sources = [*RENDERER, *(REPO / "ddsm_deploy" / "model").glob("*.py"), REPO / "tests" / "tiny_network.py"]
    return kept("tiny", sources, make) / "tiny.safetensors"


@pytest.fixture(scope="session")
def tiny_onnx(tiny_checkpoint: Path, shared, need) -> Path:
    """`tiny_checkpoint` as deployed ONNX: static 1×64×96, output `mask`."""
    for module in ("onnx", "onnxscript", "onnxruntime"):
        need(module)
    from ddsm_deploy.export import ExportOptions, export_onnx

    def make(folder: Path) -> None:
        export_onnx(tiny_checkpoint, folder / "tiny.onnx", ExportOptions())

    return shared("tiny-onnx", make) / "tiny.onnx"


@pytest.fixture(scope="session")
def tiny_fused(tiny_checkpoint: Path, shared, need) -> Path:
    """As `tiny_onnx`, with fused sampling."""
    for module in ("onnx", "onnxscript", "onnxruntime"):
        need(module)
    from ddsm_deploy.export import ExportOptions, export_onnx

    def make(folder: Path) -> None:
        export_onnx(tiny_checkpoint, folder / "fused.onnx", ExportOptions(sampling="fused"))

    return shared("tiny-fused", make) / "fused.onnx"


@pytest.fixture(scope="session")
def tiny_files(tiny_checkpoint: Path, tiny_onnx: Path, scenes: Path, shared, need) -> dict[str, Path]:
    """The tiny network in every form that needs no GPU: checkpoint, fp32, fp16, int8 for two backends."""
    need("openvino")
    from ddsm_deploy.artifact import resolve
    from ddsm_deploy.datasets import open_dataset
    from ddsm_deploy.export.fp16 import to_fp16
    from ddsm_deploy.export.onnxgraph import load_graph, save_graph
    from ddsm_deploy.frames import frames_of
    from ddsm_deploy.optimize.quantize import QuantizeOptions, quantize

    targets = ("onnxruntime", "openvino")

    def make(folder: Path) -> None:
        half = resolve(tiny_onnx).spec.replace(precision="fp16")
        save_graph(to_fp16(load_graph(tiny_onnx)), folder / "half.onnx", half)
        pictures = frames_of(open_dataset("folder", scenes, ""))
        for target in targets:
            # far more than it takes: what these files are for is not their accuracy
            options = QuantizeOptions(target=target, images=8, changed=10, miou_drop=10, weight_bits=WEIGHT_BITS)
            quantize(tiny_onnx, folder / f"{target}.onnx", pictures, options)

    folder = shared("tiny-forms", make)
    ints = {target: folder / f"{target}.onnx" for target in targets}
    return {"checkpoint": tiny_checkpoint, "fp32": tiny_onnx, "fp16": folder / "half.onnx", **ints}


@pytest.fixture(scope="session")
def tiny_bundle(tiny_files: dict[str, Path], shared) -> Path:
    """`tiny_files` as one bundle. Not to be written to."""
    from ddsm_deploy.packing import make_bundle

    return shared("bundle", lambda folder: make_bundle(folder / "tiny", list(tiny_files.values()))) / "tiny"


@pytest.fixture(scope="session")
def colour_onnx(tmp_path_factory: pytest.TempPathFactory, need) -> Path:
    """A deployed ONNX file (1×64×96, outputs `mask` and `confidence`) whose answers are known: see `colour_graph`."""
    for module in ("onnx", "onnxruntime"):
        need(module)
    from colour_graph import write_colour_model

    return write_colour_model(tmp_path_factory.mktemp("colours") / "colours.onnx", size=TINY_SIZE, confidence=True)


@pytest.fixture(scope="session")
def tiny_engines(tiny_onnx: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Artifact, ...]:
    """`tiny_onnx` as an engine of each TensorRT that is installed, built for the GPU here; none without a GPU."""
    if _why_no_gpu():
        return ()
    from ddsm_deploy.artifact import resolve
    from ddsm_deploy.engines import usable_backends
    from ddsm_deploy.engines.cuda import require_gpu
    from ddsm_deploy.optimize.build import BuildOptions, build_engine

    engines = []
    for target in ("tensorrt", "tensorrt-rtx"):
        if next(entry.available for entry in usable_backends() if entry.backend == target):
            capabilities = (require_gpu().compute_capability,) if target == "tensorrt-rtx" else ()
            path = tmp_path_factory.mktemp("engines") / f"tiny.{target}.engine"
            build_engine(tiny_onnx, path, BuildOptions(target=target, compute_capabilities=capabilities))
            engines.append(resolve(path))
    return tuple(engines)


@pytest.fixture(scope="session")
def triton_server(missing: Missing, need, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TritonServer]:
    """A real Triton server on this machine, without models."""
    need("tritonclient")
    if reason := why_no_server():
        missing("pytriton", reason)
    with running_server(tmp_path_factory.mktemp("triton")) as server:
        yield server


@pytest.fixture(scope="session")
def tiny_endpoint(request: pytest.FixtureRequest, tiny_onnx: Path) -> dict[str, Path]:
    """`tiny_onnx` served by `triton_server`, as a model's file; none where there is no such server."""
    if why_no_server():
        return {}
    from ddsm_deploy.artifact import resolve
    from ddsm_deploy.export.triton.config import TritonOptions
    from ddsm_deploy.export.triton.repository import deploy

    server = request.getfixturevalue("triton_server")
    deploy(tiny_onnx, server.repository, TritonOptions(name="tiny", threads=1))
    return dict(resolve(server.load("tiny")).files)
