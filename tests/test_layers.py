"""The house keeps its shape: imports go leftwards only, and heavy packages stay where they belong."""

from __future__ import annotations

import ast
import resource
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

REPO = Path(__file__).parent.parent
PACKAGE = REPO / "ddsm_deploy"

LAYERS = (
    ("errors",),
    ("spec", "cache", "files", "interrupt"),
    ("images", "onnxfile", "enginefile", "bundlefile", "endpoint"),
    ("datasets", "artifact", "listing", "onnxweights", "parity"),
    ("streams",),
    ("kernels",),
    ("model", "packing", "frames"),
    ("export", "engines", "train"),
    ("runtime",),
    ("evaluate", "ray", "ros2", "serve"),
    ("optimize",),
    ("cli",),
    ("__init__", "__main__"),
)
"""Each part of the package imports only from layers before its own, and from itself; parts of one layer never meet."""

HOMES = {
    "torch": ("model/", "train/", "export/", "engines/torch.py"),
    "torchvision": ("model/", "train/"),
    "timm": ("model/",),
    "lightning": ("train/",),
    "torchmetrics": ("train/",),
    "onnx": ("export/",),
    "onnxscript": ("export/",),
    # export ends by running the file it wrote, and may not import engines/
    "onnxruntime": ("engines/onnxruntime.py", "export/verify.py"),
    # everything of OpenVINO's passes through one quiet import
    "openvino": ("engines/openvino_import.py",),
    "tensorrt": ("engines/tensorrt.py", "export/tensorrt/"),
    "tensorrt_rtx": ("engines/tensorrt.py", "export/tensorrt/"),
    "cuda": ("engines/cuda.py", "engines/tensorrt.py", "kernels/cuda.py"),
    # a served model is asked for its record where any other is read, before an engine is opened
    "tritonclient": ("endpoint.py", "engines/triton.py", "export/triton/"),
    "matplotlib": ("evaluate/", "optimize/"),
    "av": ("streams/video.py", "runtime/sinks/video.py"),
    "rosbags": ("streams/bag.py", "runtime/sinks/bag.py"),
    "rerun": ("runtime/sinks/rerun.py",),
    "ray": ("ray/",),
    "pyarrow": ("ray/",),
    "fsspec": ("ray/",),
    "cyclonedds": ("ros2/cyclonedds.py", "ros2/messages.py"),
    "rclpy": ("ros2/rclpy.py",),
    "fastapi": ("serve/",),
    "starlette": ("serve/",),
    "python_multipart": ("serve/",),
    "pydantic": ("serve/",),
    "uvicorn": ("serve/",),
    "prometheus_client": ("serve/",),
    "typer": ("cli/",),
    "rich": ("cli/",),
}
"""Where a package may be imported, inside functions included."""

HEAVY = (
    "torch",
    "timm",
    "lightning",
    "onnx",
    "onnxruntime",
    "openvino",
    "cv2",
    "cyclonedds",
    "rclpy",
    "fastapi",
    "ray",
)
COMMANDS = (
    "train",
    "export",
    "quantize",
    "build",
    "bundle",
    "deploy",
    "deploy triton",
    "segment",
    "ros2",
    "serve",
    "eval",
    "verify",
    "bench",
    "tune",
    "info",
)
FILES = sorted(PACKAGE.rglob("*.py"))


def _imports(file: Path) -> Iterator[str]:
    """Every module that a file imports, at any depth, as absolute dotted names."""
    package = ("ddsm_deploy", *file.relative_to(PACKAGE).parts[:-1])
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            module = ".".join(part for part in (base, node.module) if part)
            yield from (f"{module}.{alias.name}" for alias in node.names)


def _part(file: Path) -> str:
    return file.relative_to(PACKAGE).parts[0].removesuffix(".py")


def _rank(part: str) -> int:
    return next(rank for rank, layer in enumerate(LAYERS) if part in layer)


def test_every_part_has_a_layer() -> None:
    known = {part for layer in LAYERS for part in layer}
    assert {_part(file) for file in FILES} <= known


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_imports_go_leftwards(file: Path) -> None:
    part = _part(file)
    for name in _imports(file):
        root, *rest = name.split(".")
        if root == "ddsm_deploy" and rest:
            other = rest[0]
            if (PACKAGE / other).is_dir() or (PACKAGE / f"{other}.py").is_file():
                assert other == part or _rank(other) < _rank(part), f"{part} may not import {name}"


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_packages_stay_at_home(file: Path) -> None:
    place = file.relative_to(PACKAGE).as_posix()
    for name in _imports(file):
        homes = HOMES.get(name.split(".")[0])
        assert homes is None or place.startswith(homes), f"{place} imports {name}; that belongs in {', '.join(homes)}"


def _loaded(code: str) -> set[str]:
    """Top-level modules that are loaded after `code` ran in a fresh interpreter."""
    script = (
        f"import sys\ntry:\n    {code}\nexcept SystemExit:\n    pass\nprint('\\n'.join(sys.modules), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return {line.split(".")[0] for line in done.stderr.splitlines()}


def test_importing_the_package_loads_nothing_heavy() -> None:
    assert not _loaded("import ddsm_deploy; dir(ddsm_deploy)") & {*HEAVY, "numpy", "typer", "rich"}


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help_loads_nothing_heavy(command: str) -> None:
    loaded = _loaded(f"sys.argv[1:] = '{command} --help'.split(); from ddsm_deploy.cli import main; main()")
    assert "typer" in loaded  # the code above really ran
    assert not loaded & {*HEAVY, "numpy"}


def test_the_runtime_works_without_torch() -> None:
    loaded = _loaded("import ddsm_deploy; ddsm_deploy.Segmenter, ddsm_deploy.resolve, ddsm_deploy.open_engine")
    assert "ddsm_deploy" in loaded
    assert not loaded & {"torch", "timm", "lightning", "onnx", "onnxruntime", "openvino"}


def test_help_is_instant() -> None:
    """Under 0.3 s. It waits for nothing, so that is processor time, which other work here hardly lengthens."""
    best = float("inf")
    for _ in range(5):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, "-m", "ddsm_deploy", "--help"], check=True, capture_output=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        best = min(best, after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime)
    assert best < 0.3


def test_no_path_of_one_machine_in_the_repository() -> None:
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"], cwd=REPO, capture_output=True, text=True
    )
    if listed.returncode:
        pytest.skip("git: this is no git checkout, so its files can't be listed")
    folders = [f"/{name}/" for name in ("work", "tmp", "root", "home")]  # spelt so that this file passes
    found = []
    for name in listed.stdout.splitlines():
        file = REPO / name
        if file.suffix in {".png", ".jpg", ".onnx", ".safetensors", ".weights"} or not file.is_file():
            continue
        for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
            starts = (line.find(folder) for folder in folders if folder in line)
            # a path begins there: "https://x/work/y" and "a/home/b" do not
            if any(at == 0 or not (line[at - 1].isalnum() or line[at - 1] in "./-_}") for at in starts):
                found.append(f"{name}:{number}: {line.strip()}")
    assert not found
