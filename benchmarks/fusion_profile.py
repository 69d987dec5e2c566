"""Where the time of the sampling branches goes, node by node, as the runtimes' own profilers tell it.

    python benchmarks/fusion_profile.py [--size 360x480] [--threads 2] [--runs 40] [--sampling portable] [--top 60]

For OpenVINO in fp32 and bf16 and ONNX Runtime in fp32. What belongs to the branches is read off the exported graph
(see `fusion_parts`). What a runtime makes of those nodes is found by the names that they keep; a change of
layout counts for a branch where either of its ends lies in one. Profiling itself costs time, so the wall time without
it stands beside the sum.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import functools
import json
import re
import statistics
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import onnx
from fusion_parts import SAMPLERS, branch_parts
from fusion_support import (
    CONFIGURATIONS,
    SIDES,
    Pair,
    alternate,
    announce_machine,
    checkpoints,
    export_pair,
    frame,
    parse_size,
)

from ddsm_deploy import kernels
from ddsm_deploy.engines import EngineOptions, available_precisions, open_engine

WARMUP = 5


@dataclasses.dataclass(frozen=True)
class Timed:
    """One node as a runtime ran it.

    Attributes:
        names: its own there, and those of what was fused into it.
        kind: operator, kernel, layout and shape, for people.
        ms: milliseconds a run; 0 where it only gives another shape.
        sources: names of the nodes before it.
    """

    names: tuple[str, ...]
    kind: str
    ms: float
    sources: tuple[str, ...] = ()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="ddsm-lite0", help="checkpoint, bundle or shipped name")
    parser.add_argument("--size", type=parse_size, default=(360, 480))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--runs", type=int, default=40)
    parser.add_argument("--sampling", default="portable")
    parser.add_argument("--top", type=int, default=60, help="branch nodes listed one by one")
    args = parser.parse_args()
    announce_machine()
    with tempfile.TemporaryDirectory() as scratch:
        pair = export_pair(Path(scratch), checkpoints(Path(scratch), args.model), args.size, args.sampling)
        parts = branch_parts(pair.files["ddsm"])
        for backend, precision in CONFIGURATIONS:
            if precision not in available_precisions(backend):
                print(f"\n== {backend} {precision}: not on this CPU")
                continue
            profile = {"openvino": profile_openvino, "onnxruntime": profile_onnxruntime}[backend]
            wall = _wall(pair, args, backend, precision)
            nodes = {side: profile(pair.files[side], args, precision) for side in SIDES}
            print(f"\n== {backend} {precision}, {args.size[0]}x{args.size[1]}, {args.threads} threads, {args.sampling}")
            print(f"wall without profiling: DDSM {wall[0]:.2f} ms, add {wall[1]:.2f} ms, ratio {wall[0] / wall[1]:.2f}")
            report(nodes["ddsm"], nodes["add"], parts, args.top)


def profile_openvino(path: Path, args: argparse.Namespace, precision: str) -> list[Timed]:
    """Means over the runs, those of the warm-up taken out again: OpenVINO itself keeps means alone."""
    from ddsm_deploy.engines.openvino_import import ov
    from ddsm_deploy.engines.openvino_reader import SamplingReader

    core = ov.Core()
    float_type = {"fp32": "f32"}.get(precision, precision)
    settings = {
        "INFERENCE_PRECISION_HINT": float_type,
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": args.threads,
        "PERF_COUNT": True,
    }
    reader = SamplingReader("fused" if args.sampling == "fused" else "portable", precision)
    core.add_extension(reader.extension())
    compiled = core.compile_model(core.read_model(str(path)), "CPU", settings)
    reader.compiled()
    request = compiled.create_infer_request()
    image = frame(args.size)
    for _ in range(WARMUP):
        request.infer({0: image}, share_inputs=True)
    before = {node.names: node.ms * WARMUP for node in _openvino_nodes(compiled)}
    for _ in range(args.runs):
        request.infer({0: image}, share_inputs=True)
    total = WARMUP + args.runs
    return [
        dataclasses.replace(node, ms=(node.ms * total - before[node.names]) / args.runs)
        for node in _openvino_nodes(compiled)
    ]


def _openvino_nodes(compiled: Any) -> Iterator[Timed]:
    """The nodes with their mean times since loading."""
    for node in compiled.get_runtime_model().get_ordered_ops():
        info = {key: str(value.astype(str)) for key, value in node.get_rt_info().items() if hasattr(value, "astype")}
        if info.get("layerType") in (None, "Const", "Input", "Output"):
            continue
        names = (node.get_friendly_name(), *info.get("originalLayersNames", "").split(","))
        kind = f"{info['layerType']} {info['primitiveType']} -> {info['outputLayouts']} {_shape(node)}"
        time = info.get("execTimeMcs", "not_executed")
        sources = tuple(value.get_node().get_friendly_name() for value in node.input_values())
        yield Timed(names, kind, 0.0 if time == "not_executed" else float(time) / 1e3, sources)


def _shape(node: Any) -> str:
    shape = node.output(0).get_partial_shape()
    return "x".join(str(size) for size in shape)


def profile_onnxruntime(path: Path, args: argparse.Namespace, precision: str) -> list[Timed]:
    """Medians over the runs but the first ones."""
    import onnxruntime as ort

    settings = ort.SessionOptions()
    settings.intra_op_num_threads = args.threads
    settings.enable_profiling = True
    settings.log_severity_level = 4
    settings.profile_file_prefix = str(path.with_suffix(".profile"))
    settings.optimized_model_filepath = str(path.with_suffix(".optimized.onnx"))
    if args.sampling == "fused":
        settings.register_custom_ops_library(str(kernels.library_path()))
    session = ort.InferenceSession(str(path), settings, providers=["CPUExecutionProvider"])
    feeds = {session.get_inputs()[0].name: frame(args.size)}
    for _ in range(args.runs + WARMUP):
        session.run(None, feeds)
    events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
    durations: dict[str, list[float]] = {}
    kinds: dict[str, str] = {}
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
            name = event["name"].removesuffix("_kernel_time")
            durations.setdefault(name, []).append(event["dur"] / 1e3)
            shape = next(iter(event["args"]["output_type_shape"][0].values()))
            kinds[name] = f"{event['args']['op_name']} {'x'.join(map(str, shape))}"
    ends = _reorder_ends(Path(settings.optimized_model_filepath))
    return [
        Timed((name, *ends.get(name, ())), kinds[name], statistics.median(times[WARMUP:]))
        for name, times in durations.items()
    ]


def _reorder_ends(optimized: Path) -> dict[str, tuple[str, ...]]:
    """Layout changes that ONNX Runtime put in -> the names of the nodes before and behind them."""
    graph = onnx.load(str(optimized)).graph
    makes = {name: node.name for node in graph.node for name in node.output}
    ends = {}
    for node in graph.node:
        if "Reorder" in node.op_type or node.name.startswith("Transpose"):
            behind = [other.name for other in graph.node if node.output[0] in other.input]
            before = [makes[name] for name in node.input if name in makes]
            ends[node.name] = (*before, *(behind if len(behind) == 1 else ()))
            if len(behind) > 1:
                ends[node.name] += ("&".join(behind),)
    return ends


def places(nodes: list[Timed], parts: dict[str, str]) -> list[str]:
    """For each node as run, the branch part that it belongs to, or an empty text for the trunk.

    A node that goes by no name of the file's was made by the runtime, and belongs to what it is fed by.
    """
    found: dict[str, str] = {}
    for node in nodes:
        part = _place(node, parts)
        if part is None:
            before = [found[source] for source in node.sources if found.get(source)]
            sampling = "sampling" if any(name.startswith(SAMPLERS[0]) for name in node.names) else "layout"
            part = f"{before[0].rpartition('.')[0]}.{sampling}" if before else ""
        found[node.names[0]] = part
    return [found[node.names[0]] for node in nodes]


def _place(node: Timed, parts: dict[str, str]) -> str | None:
    """By names alone; None where none is known."""
    layout = "reorder" in node.kind.lower() or node.kind.startswith("Transpose")
    known = False
    for name in node.names:
        # of several readers of a changed layout all must lie in a branch: else the trunk needs the change anyway
        pieces = [piece.split("/")[0].removesuffix("_nchwc") for piece in name.split("&")]
        ends = [parts.get(piece, "") for piece in pieces]
        if layout and not any(ends):
            ends = [part for part in _ends(name, parts) if part]
        if ends and all(ends):
            return ends[0].rpartition(".")[0] + ".layout" if layout else ends[0]
        known |= any(piece in parts for piece in pieces)
    return "" if known else None


def _ends(name: str, parts: dict[str, str]) -> list[str]:
    """The parts of both ends of a layout change whose name is made of theirs, as OpenVINO's are."""
    plain = name.replace("/WithoutBiases", "")
    first = max((known for known in parts if known and plain.startswith(known + "_")), key=len, default="")
    last = max((known for known in parts if known and plain.endswith("_" + known)), key=len, default="")
    return [parts[known] for known in (first, last) if known]


def report(ddsm: list[Timed], add: list[Timed], parts: dict[str, str], top: int) -> None:
    placed = list(zip(places(ddsm, parts), ddsm, strict=True))
    total, plain = sum(node.ms for node in ddsm), sum(node.ms for node in add)
    trunk = sum(node.ms for part, node in placed if not part)
    print(
        f"sum of nodes: DDSM {total:.2f} ms, of that trunk {trunk:.2f}, branches {total - trunk:.2f}; add {plain:.2f}"
    )
    for title, label in (
        ("by branch and part", lambda part, node: part),
        ("by part, the three fusions together", lambda part, node: re.sub(r"fusions\.\d+\.", "", part)),
        ("by part and kind", lambda part, node: re.sub(r"fusions\.\d+\.", "", part) + "  " + node.kind.split()[0]),
    ):
        sums: collections.Counter[str] = collections.Counter()
        for part, node in placed:
            if part:
                sums[label(part, node)] += node.ms
        print(f"-- {title}")
        for name, ms in sorted(sums.items(), key=lambda item: -item[1]):
            if ms >= 0.02:
                print(f"{ms:8.3f} ms  {100 * ms / plain:5.1f} % of add  {name}")
    print("-- trunk by kind: with branches, without, difference (what the branches change in the trunk)")
    kinds: dict[str, list[float]] = {}
    for index, nodes in enumerate(([n for p, n in placed if not p], add)):
        for node in nodes:
            kinds.setdefault(node.kind.split()[0], [0.0, 0.0])[index] += node.ms
    for kind, (a, b) in sorted(kinds.items(), key=lambda item: -abs(item[1][0] - item[1][1])):
        if max(a, b) >= 0.05:
            print(f"{a:8.3f} {b:8.3f} {a - b:+8.3f}  {kind}")
    print("-- trunk nodes other than convolutions, one by one")
    others = [node for part, node in placed if not part and not node.kind.startswith("Conv")]
    for node in sorted(others, key=lambda node: -node.ms)[:12]:
        print(f"{node.ms:8.3f} ms  {node.kind}  [{node.names[0]}]")
    print("-- branch nodes one by one")
    for part, node in sorted((item for item in placed if item[0]), key=lambda item: -item[1].ms)[:top]:
        print(f"{node.ms:8.3f} ms  {part:28} {node.kind}  [{node.names[0]}]")


def _wall(pair: Pair, args: argparse.Namespace, backend: str, precision: str) -> list[float]:
    options = EngineOptions(threads=args.threads, precision=precision)
    engines = [open_engine(pair.artifact(side), backend, options) for side in SIDES]
    feeds = {engines[0].inputs[0].name: frame(args.size)}
    times = alternate([functools.partial(engine.run, feeds) for engine in engines], rounds=max(1, args.runs // 5))
    for engine in engines:
        engine.close()
    return [statistics.median(side) for side in times]


if __name__ == "__main__":
    main()
