"""Fixtures that all tests share: frames, data sets, and a tiny network as checkpoint and as ONNX."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from render_scenes import write_scenes

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


@pytest.fixture(autouse=True)
def _gpu_marker(request: pytest.FixtureRequest) -> None:
    if request.node.get_closest_marker("gpu") is None:
        return
    missing = request.getfixturevalue("missing")
    if importlib.util.find_spec("torch") is None:
        missing("gpu", "torch, which looks for it, is not installed here")
    import torch

    if not torch.cuda.is_available():
        missing("gpu", "there is no CUDA GPU here")


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
    folder = REPO / "ddsm_deploy" / "models" / "ddsm-lite0"
    if not (folder / "bundle.json").is_file():
        missing("shipped-model", f"there is no {folder.relative_to(REPO)}")
    return folder


@pytest.fixture(scope="session")
def kept(
    pytestconfig: pytest.Config, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str, list[Path], Callable[[Path], None]], Path]:
    """`kept(name, sources, make)`: the folder that `make(folder)` filled, in pytest's cache until a source changes."""

    def folder(name: str, sources: list[Path], make: Callable[[Path], None]) -> Path:
        digest = hashlib.sha256()
        for source in sorted(sources):
            digest.update(source.read_bytes())
        cache = getattr(pytestconfig, "cache", None)  # `-p no:cacheprovider` switches it off
        place = (cache.mkdir(name) if cache else tmp_path_factory.mktemp(name)) / digest.hexdigest()[:16]
        if not place.is_dir():
            half = place.with_name(f"{place.name}.{os.getpid()}")
            half.mkdir()
            make(half)
            with contextlib.suppress(OSError):  # another run was first, with the same files
                half.rename(place)
        return place

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
def tiny_onnx(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory, need) -> Path:
    """`tiny_checkpoint` as deployed ONNX: static 1×64×96, output `mask`."""
    for module in ("onnx", "onnxscript", "onnxruntime"):
        need(module)
    from ddsm_deploy.export import ExportOptions, export_onnx

    path = tmp_path_factory.mktemp("tiny") / "tiny.onnx"
    export_onnx(tiny_checkpoint, path, ExportOptions())
    return path


@pytest.fixture(scope="session")
def colour_onnx(tmp_path_factory: pytest.TempPathFactory, need) -> Path:
    """A deployed ONNX file (1×64×96, outputs `mask` and `confidence`) whose answers are known: see `colour_graph`."""
    for module in ("onnx", "onnxruntime"):
        need(module)
    from colour_graph import write_colour_model

    return write_colour_model(tmp_path_factory.mktemp("colours") / "colours.onnx", size=TINY_SIZE, confidence=True)
