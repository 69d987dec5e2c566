"""Everything that needs an NVIDIA GPU, in one command and one report; it installs nothing.

    python benchmarks/gpu_report.py -o report.md

It runs the tests that are marked `gpu`, builds the shipped model for this GPU at every precision with each TensorRT
that is installed, runs each engine beside the float32 model on images, times it, and writes `report.md` and, beside
it, `report.json`. Where ONNX Runtime has its CUDA provider, the model's ONNX files run there as well. What fails
becomes a line of the report, and the rest goes on.

With TensorRT it also builds engines that sample in the project's own CUDA kernel, a plugin that is experimental, and
sets them beside those that sample with GridSample. A model without such nodes is exported anew, by torch, if it has a
checkpoint.

A model without an INT8 form for TensorRT is calibrated on the same images; give it frames like those it will see.
Exit code: 0 all well, 1 something could not be run or a test failed, 3 an engine is further from float32 than allowed.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from ddsm_deploy.artifact import Artifact, resolve
from ddsm_deploy.engines import BackendStatus, EngineOptions, usable_backends
from ddsm_deploy.engines.cuda import Gpu, require_gpu
from ddsm_deploy.engines.tensorrt import why_no_engines
from ddsm_deploy.errors import BackendError, DdsmError
from ddsm_deploy.evaluate.benchmark import BenchOptions, bench
from ddsm_deploy.evaluate.machine import machine_facts
from ddsm_deploy.evaluate.verify import MAX_CHANGED
from ddsm_deploy.frames import frames_in
from ddsm_deploy.images import read_image
from ddsm_deploy.onnxfile import read_spec
from ddsm_deploy.optimize.build import BuildOptions, build_engine
from ddsm_deploy.optimize.buildoptions import PRECISIONS
from ddsm_deploy.optimize.quantize import QuantizeOptions, quantize
from ddsm_deploy.runtime.segmenter import Segmenter

REPO = Path(__file__).parent.parent
TARGETS = ("tensorrt", "tensorrt-rtx")
CUDA_PROVIDER = "onnxruntime cuda"
PLUGIN_PRECISIONS = ("fp32", "fp16")
PROVIDER_PRECISIONS = ("fp32", "fp16", "int8")


@dataclasses.dataclass(kw_only=True)
class Row:
    """One engine: how it was built, how far it is from float32, how fast it is; `error` where it stopped, and why."""

    target: str
    precision: str
    sampling: str = "portable"
    error: str = ""
    build_s: float | None = None
    mb: float | None = None
    layers: str = ""
    changed: float | None = None
    within: bool | None = None
    p50_ms: float | None = None
    p99_ms: float | None = None
    infer_ms: float | None = None
    fps: float | None = None


def main() -> int:
    options = _arguments()
    try:
        gpu = require_gpu()
        targets, reasons = _targets(gpu)
        if not targets:
            raise BackendError(f"{'; '.join(reasons)}; this command installs nothing")
    except DdsmError as exc:
        print(f"gpu_report: {exc}; nothing was run and no report written", file=sys.stderr)
        return 1
    say = _sayer()
    say(f"{gpu}; {', '.join(f'{t.backend} {t.version}' for t in targets)}")
    result: dict[str, Any] = {"gpu": str(gpu), "libraries": {t.backend: t.version for t in targets}}
    result["left_out"] = reasons
    result["machine"] = machine_facts()
    result["tests"] = {"skipped": "by --no-tests"} if options.no_tests else _tests(say)
    rows, result["plugin"] = _rows(gpu, targets, options, say)
    result["rows"] = [dataclasses.asdict(row) for row in rows]
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(markdown(result), encoding="utf-8")
    beside = options.output.with_suffix(".json")
    beside.write_text(json.dumps(result, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    say(f"wrote {options.output} and {beside}")
    return exit_code(result)


def _targets(gpu: Gpu) -> tuple[list[BackendStatus], list[str]]:
    """What can run a model on this GPU, and why the rest can't."""
    targets, reasons = [], []
    for status in usable_backends():
        reason = status.reason
        if status.available and status.backend in TARGETS:
            try:
                reason = why_no_engines(status.backend, gpu)
            except ImportError as exc:  # installed, but one of its own libraries is not found
                reason = f"{status.backend} can't be loaded ({exc})"
        elif status.available and status.backend == "onnxruntime":
            status, reason = _provider(status)
        if status.backend in (*TARGETS, CUDA_PROVIDER, "onnxruntime"):
            reasons.append(reason) if reason else targets.append(status)
    return targets, reasons


def _provider(status: BackendStatus) -> tuple[BackendStatus, str]:
    import onnxruntime as ort

    if "CUDAExecutionProvider" not in ort.get_available_providers():
        return status, "the installed onnxruntime has no CUDA provider (onnxruntime-gpu has)"
    return dataclasses.replace(status, backend=CUDA_PROVIDER), ""


def exit_code(result: dict[str, Any]) -> int:
    """1 where something failed or could not be run, 3 where only a comparison failed, 0 otherwise."""
    if result["tests"].get("exit_code", 0) or any(row["error"] for row in result["rows"]):
        return 1
    return 3 if any(row["within"] is False for row in result["rows"]) else 0


def _rows(
    gpu: Gpu, targets: list[BackendStatus], options: argparse.Namespace, say: Callable[[str], None]
) -> tuple[list[Row], dict[str, str]]:
    """All engines, and why none of them has the plugin, where none has."""
    precisions = options.precision or PRECISIONS
    rows = [
        Row(target=status.backend, precision=precision)
        for status in targets
        for precision in precisions
        if status.backend in TARGETS or precision in PROVIDER_PRECISIONS
    ]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        plain = resolve(options.model)
        model = _with_int8(plain, folder, options, say)
        fused, reason = _fused(plain, folder, targets)
        if fused is not None:
            able = [precision for precision in PLUGIN_PRECISIONS if precision in precisions]
            rows += [Row(target="tensorrt", precision=precision, sampling="fused") for precision in able]
        for row in rows:
            say(f"{row.target} {row.precision} {row.sampling}")
            try:
                if row.target == CUDA_PROVIDER:
                    _fill_from_provider(row, model, options)
                    continue
                _fill(row, fused if fused is not None and row.sampling == "fused" else model, gpu, folder, options)
            except DdsmError as exc:
                row.error = str(exc)
    return rows, {"skipped": reason} if reason else {}


def _fused(model: Artifact, folder: Path, targets: list[BackendStatus]) -> tuple[Artifact | None, str]:
    """The model with sampling nodes that can become the plugin, or None and why."""
    if all(status.backend != "tensorrt" for status in targets):
        return None, "tensorrt is not installed here, and tensorrt-rtx takes no plugin from Python"
    if "onnx" in model.files and read_spec(model.file("onnx")).provenance.get("sampling") == "fused":
        return model, ""
    if importlib.util.find_spec("torch") is None or "checkpoint" not in model.files:
        return None, f"{model.name} must be exported anew for it, and torch or its checkpoint is missing"
    from ddsm_deploy.export import ExportOptions, export_onnx

    path = folder / "fused.onnx"
    try:
        export_onnx(model.file("checkpoint"), path, ExportOptions(sampling="fused"))
    except DdsmError as exc:
        return None, str(exc)
    return resolve(path), ""


def _with_int8(model: Artifact, folder: Path, options: argparse.Namespace, say: Callable[[str], None]) -> Artifact:
    """The model with an INT8 form for TensorRT: its own, or one made here."""
    if model.pick("onnx", precisions=("int8",), target="tensorrt") is not None:
        return model
    say(f"quantizing on {options.images}")
    path = folder / "int8.onnx"
    try:
        settings = QuantizeOptions(target="tensorrt", images=options.calibration_images, force=True)
        quantize(model, path, frames_in(options.images), settings)
    except DdsmError as exc:
        say(f"no INT8 form: {exc}")  # the rows of int8 will say what is missing
        return model
    made = resolve(path)
    return dataclasses.replace(model, variants=(*model.variants, made))


def _fill_from_provider(row: Row, model: Artifact, options: argparse.Namespace) -> None:
    """The row of an ONNX file as it is, on ONNX Runtime's CUDA provider."""
    target = "tensorrt" if row.precision == "int8" else None  # signed, as GPUs compute it
    chosen = model.pick("onnx", precisions=(row.precision,), target=target)
    if chosen is None:
        raise BackendError(f"{model.name} has no {row.precision} file")
    images = [read_image(frame.path) for frame in frames_in(options.images)][:64]
    with (
        Segmenter.open(model, backend="onnxruntime", precision="fp32") as reference,
        Segmenter.open(chosen, backend="onnxruntime", options=EngineOptions(provider="cuda")) as segmenter,
    ):
        expected = [reference.predict(image).mask for image in images]
        wrong = [(segmenter.predict(image).mask != mask).mean() for image, mask in zip(images, expected, strict=True)]
        row.changed = 100 * float(np.mean(wrong))
        row.within = row.changed <= MAX_CHANGED[row.precision]
    _time(row, chosen.file("onnx"), BenchOptions(backends=("onnxruntime",), provider="cuda"), options)


def _fill(row: Row, model: Artifact, gpu: Gpu, folder: Path, options: argparse.Namespace) -> None:
    engine = folder / f"{row.target}.{row.precision}.{row.sampling}.engine"
    build = BuildOptions(
        target=row.target,
        precision=row.precision,
        sampling=row.sampling,
        compute_capabilities=(gpu.compute_capability,) if row.target == "tensorrt-rtx" else (),
        images=(options.images,),
        force=True,  # a failure is to be seen in the report
    )
    report = build_engine(model, engine, build)
    row.build_s, row.mb = report.seconds, report.record.bytes / 1e6
    row.layers = ", ".join(
        f"{n} {op} {kind}" for op, kinds in report.record.layers.items() for kind, n in kinds.items()
    )
    if report.engine_parity is None:
        raise BackendError("the engine was built, but did not run here")
    row.changed, row.within = report.engine_parity.changed, bool(report.engine_parity)
    _time(row, engine, BenchOptions(backends=(row.target,)), options)


def _time(row: Row, file: Path, how: BenchOptions, options: argparse.Namespace) -> None:
    (timed,) = bench(file, dataclasses.replace(how, runs=options.runs, images=options.images)).rows
    if timed.error:
        raise BackendError(timed.error)
    fields = timed.fields()
    row.p50_ms, row.p99_ms = fields["p50_ms"], fields["p99_ms"]
    row.infer_ms, row.fps = fields["infer_p50_ms"], fields["fps"]


def _tests(say: Callable[[str], None]) -> dict[str, Any]:
    """Runs the tests that are marked `gpu`; a missing pytest is told, not installed."""
    if importlib.util.find_spec("pytest") is None:
        return {"exit_code": 1, "summary": "pytest is not installed here, so no test was run"}
    say("tests")
    # these files alone: others want modules at import that may be missing here
    files = [str(path) for path in sorted((REPO / "tests").rglob("test_*.py")) if "mark.gpu" in path.read_text("utf-8")]
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "--require", "gpu", "-q", "-rfEs", "--tb=short", *files]
    done = subprocess.run(command, cwd=REPO, capture_output=True, text=True, check=False)
    lines = [line for line in done.stdout.splitlines() if line.strip()]
    return {"exit_code": done.returncode, "summary": lines[-1] if lines else "", "output": done.stdout + done.stderr}


def markdown(result: dict[str, Any]) -> str:
    """The report as people read it."""
    machine, tests = result["machine"], result["tests"]
    libraries = ", ".join(f"{name} {version}" for name, version in result["libraries"].items())
    lines = [
        "# Engines on a GPU",
        "",
        f"{result['gpu']}; {libraries}; {machine['cpu']}, {machine['system']}; {machine['started']}.",
        *(f"Left out: {reason}." for reason in result["left_out"]),
        "",
        f"Tests marked `gpu`: {tests.get('summary') or tests.get('skipped')}"
        + (f" (exit code {tests['exit_code']})." if "exit_code" in tests else "."),
        "",
        "Changed: per cent of the pixels whose class is not that of the float32 model on a CPU. Times in ms from image "
        "to mask, one image at a time; infer: the engine with both copies.",
        "",
        "| target | precision | sampling | build s | MB | changed % | within | p50 | p99 | infer | FPS | layers |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in result["rows"]:
        figures = [_figure(row[key], digits) for key, digits in (("build_s", 0), ("mb", 1), ("changed", 2))]
        times = [_figure(row[key], 2) for key in ("p50_ms", "p99_ms", "infer_ms")]
        within = {None: "–", True: "yes", False: "NO"}[row["within"]]
        cells = [
            row["target"],
            row["precision"],
            row["sampling"],
            *figures,
            within,
            *times,
            _figure(row["fps"], 0),
            row["layers"] or "–",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    failed = [row for row in result["rows"] if row["error"]]
    lines += ["", *(f"- {row['target']} {row['precision']} {row['sampling']}: {row['error']}" for row in failed)]
    lines += ["", *_plugin_lines(result)]
    if tests.get("exit_code"):
        lines += ["", "```", *tests.get("output", "").splitlines()[-60:], "```"]
    return "\n".join(lines).rstrip() + "\n"


def _plugin_lines(result: dict[str, Any]) -> list[str]:
    """The plugin beside GridSample, a line a precision; or why it was not tried."""
    title = "Sampling in the project's own CUDA kernel (a TensorRT plugin, experimental)"
    if "skipped" in result["plugin"]:
        return [f"{title}: skipped, {result['plugin']['skipped']}."]
    rows = {(row["precision"], row["sampling"]): row for row in result["rows"] if row["target"] == "tensorrt"}
    lines = []
    for (precision, sampling), row in rows.items():
        other = rows.get((precision, "portable"))
        if sampling == "fused" and other is not None and row["infer_ms"] and other["infer_ms"]:
            ratio = row["infer_ms"] / other["infer_ms"]
            lines.append(
                f"- {precision}: infer {row['infer_ms']:.2f} ms, {ratio:.2f} of the {other['infer_ms']:.2f} ms with "
                f"GridSample; changed {_figure(row['changed'], 2)} % and {_figure(other['changed'], 2)} %"
            )
    return [f"{title}{':' if lines else ': no figures.'}", "", *lines]


def _figure(value: float | None, digits: int) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


def _sayer() -> Callable[[str], None]:
    started = time.perf_counter()
    return lambda text: print(f"[{time.perf_counter() - started:6.1f} s] {text}", file=sys.stderr, flush=True)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, default=Path("gpu_report.md"), help="the report to write")
    parser.add_argument("--model", default=None, help="ONNX file, bundle or shipped model; ddsm-lite0")
    parser.add_argument("--images", type=Path, default=REPO / "examples" / "frames", help="folder of images")
    parser.add_argument("--calibration-images", type=int, default=64, help="of them, for INT8")
    parser.add_argument("--precision", action="append", choices=PRECISIONS, help="only these; repeatable")
    parser.add_argument("--runs", type=int, default=200, help="timed runs of each engine")
    parser.add_argument("--no-tests", action="store_true", help="leave the tests out")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
