"""The benchmarks of the sampling branches, on a tiny network: what they measure, and the rows that they write."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

FOLDER = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch):
    """`script(name)` imports a benchmark as it is when run: with its folder in front of the path."""
    monkeypatch.syspath_prepend(FOLDER)

    def load(name: str) -> ModuleType:
        return importlib.import_module(name)

    return load


@pytest.fixture
def pair(script, tiny_onnx: Path, need):
    """The tiny network on both sides: what is compared here are rows, not speeds."""
    for module in ("openvino", "lightning"):
        need(module)
    support = script("fusion_support")
    return support.Pair(files=dict.fromkeys(support.SIDES, tiny_onnx), size=(64, 96), sampling="portable")


SHARED = {"backend": "onnxruntime", "precision": "fp32", "size": "64x96", "threads": 1, "sampling": "portable"}


def test_row_of_inference(script, pair) -> None:
    from ddsm_deploy.engines import EngineOptions

    cost = script("fusion_cost")
    row = cost.time_inference(pair, EngineOptions(threads=1, precision="fp32"), "onnxruntime", 12)
    assert SHARED.items() <= row.items()
    assert row["runs"] == 12  # more than one round
    assert row["ratio"] == pytest.approx(row["ms_fused"] / row["ms_add"])
    assert row["p10_p90_fused"][0] <= row["ms_fused"] <= row["p10_p90_fused"][1]
    assert "bar 1.5, goal 1.3" in cost.line(row)


def test_row_of_memory(script, pair) -> None:
    from ddsm_deploy.engines import EngineOptions

    row = script("fusion_memory").measure(pair, EngineOptions(threads=1, precision="fp32"), "onnxruntime")
    assert SHARED.items() <= row.items()
    assert row["ratio"] == pytest.approx(row["peak_mb_fused"] / row["peak_mb_add"])
    for stages in (row["stages_fused"], row["stages_add"]):
        assert 10 < stages["runtime_mb"] <= stages["loaded_mb"] <= stages["peak_mb"] < 4000
    assert "bar 1.2, goal 1.1" in script("fusion_cost").line(row)


def test_a_side_that_can_not_run_stops_it(script, pair) -> None:
    from ddsm_deploy.engines import EngineOptions
    from ddsm_deploy.errors import BackendError

    options = EngineOptions(threads=1, precision="int8")
    with pytest.raises(BackendError, match="fp32"):
        script("fusion_cost").time_inference(pair, options, "onnxruntime", 1)
    with pytest.raises(RuntimeError, match="fp32"):
        script("fusion_memory").measure(pair, options, "onnxruntime")


def test_command_line(script, tiny_checkpoint: Path, tmp_path: Path, need, monkeypatch, capsys) -> None:
    for module in ("openvino", "lightning"):
        need(module)
    cost = script("fusion_cost")
    file = tmp_path / "rows.json"
    command = f"--model {tiny_checkpoint} --size 64x96 128x64 --threads 1 --only --json {file}"
    monkeypatch.setattr(sys, "argv", ["fusion_cost", *command.split()])
    cost.main()
    assert json.loads(file.read_text(encoding="utf-8")) == []  # neither inference, training nor memory was asked for
    out = capsys.readouterr().out
    assert "load average" in out
    assert "threads 1" in out


def test_row_of_training(script, tiny_checkpoint: Path, tmp_path: Path, need) -> None:
    need("lightning")
    import torch

    training, support = script("fusion_training"), script("fusion_support")
    before = torch.get_num_threads()
    try:
        sides = support.checkpoints(tmp_path, str(tiny_checkpoint))
        row = training.measure(sides, threads=1, steps=2, batch=2, size=(64, 96))
    finally:
        torch.set_num_threads(before)
    assert (row["kind"], row["backend"], row["precision"], row["batch"]) == ("training", "torch", "bf16", 2)
    assert row["ratio"] == pytest.approx(row["ms_fused"] / row["ms_add"])
    assert row["sampling"] in ("fused", "portable")


@pytest.mark.parametrize(("ratio", "word"), [(1.3, "goal met"), (1.31, "bar met"), (1.71, "bar NOT met")])
def test_bars(script, need, ratio: float, word: str) -> None:
    need("lightning")
    row = {"kind": "inference", "backend": "openvino", "precision": "bf16", "size": "360x480", "threads": 2}
    row |= {"sampling": "fused", "ms_fused": 10.0, "ms_add": 5.0, "ratio": ratio}
    assert f"ratio {ratio:.2f} (bar 1.7, goal 1.3: {word})" in script("fusion_cost").line(row)


def test_sizes_are_read_strictly(script, need) -> None:
    need("lightning")
    support = script("fusion_support")
    assert support.parse_size("360x480") == (360, 480)
    for text in ("360", "360x", "x480", "ax2", "-1x2"):
        with pytest.raises(Exception, match="expected rows x columns"):
            support.parse_size(text)


def test_turns_leave_out_the_first_calls(script, need) -> None:
    need("torch")
    called: list[int] = []
    sides = [lambda: called.append(0), lambda: called.append(1)]
    times = script("fusion_support").alternate(sides, rounds=2, block=3, settle=1)
    assert [len(side) for side in times] == [6, 6]
    assert called == [1] * 4 + [0] * 8 + [1] * 8 + [0] * 4  # a round of warm-up, and who begins changes


def test_branches_are_told_from_the_trunk(script, tiny_onnx: Path, need) -> None:
    """Nodes by their roles: three fusions, each with both branches; the backbone and the fusions' sums are trunk."""
    import onnx

    parts = script("fusion_parts").branch_parts(tiny_onnx)
    graph = onnx.load(str(tiny_onnx)).graph
    for node in graph.node:
        weights = " ".join(node.input)
        if node.op_type == "GridSample":
            assert parts[node.name].endswith(("spatial.sampling", "channel.sampling"))
        elif ".spatial." in weights or ".channel." in weights:
            assert parts[node.name].split(".")[2] in weights.split(".")
        elif "backbone" in weights or "merge" in weights or "head" in weights:
            assert parts[node.name] == ""
    branches = {part.rpartition(".")[0] for part in parts.values() if part}
    assert branches == {f"fusions.{index}.{kind}" for index in range(3) for kind in ("spatial", "channel")}


def test_limits_count_operations_and_bytes(script) -> None:
    """By hand for one pixel: 9 samples × 2 channels × (4 products and 3 sums, 2 to score; 8 to add the value)."""
    limits = script("kernel_limits")
    shape = limits.Shape("one pixel", 2, 2, 1, 1, 1)
    assert shape.operations == 9 * (2 * (7 + 2) + 2 * 8)
    assert shape.read_bytes(4) == 9 * 4 * (2 + 2) * 4  # samples, corners, channels, float32
    assert shape.moved_bytes(2) == 2 * (2 + 2 + 2 + 18 + 2)


def test_limits_of_the_kernel(script, monkeypatch, missing, tmp_path: Path) -> None:
    from ddsm_deploy import kernels

    state = kernels.status()
    if not state.available:
        missing("kernels", state.reason)
    limits = script("kernel_limits")
    monkeypatch.setattr(limits, "SHAPES", (limits.Shape("small", 8, 8, 6, 7, 1),))
    monkeypatch.setattr(limits, "SECONDS", 1e-4)
    monkeypatch.setattr(limits, "COPY_BYTES", 1 << 16)
    file = tmp_path / "rows.json"
    command = f"--threads 1 --layouts planar channels-last --types f32 bf16 --rounds 1 --json {file}"
    monkeypatch.setattr(sys, "argv", ["kernel_limits", *command.split()])
    limits.main()
    rows = json.loads(file.read_text(encoding="utf-8"))
    assert len(rows) == 4 * len(state.instruction_sets)
    for row in rows:
        assert all(np.isfinite(row[name]) and row[name] > 0 for name in ("ms", "gflops", "of_fma", "of_l2", "of_copy"))


def test_limits_run_the_same_call_in_both_layouts(script, missing) -> None:
    """The views that the benchmark makes are right: planar and channels last give one result."""
    from ddsm_deploy import kernels

    if not kernels.status().available:
        missing("kernels", kernels.status().reason)
    limits = script("kernel_limits")
    shape = limits.Shape("small", 4, 4, 5, 6, 1)
    results = {}
    for layout in ("planar", "channels-last"):
        call = limits.make_call(shape, layout, "f32", 1)
        call()
        held = call.__defaults__[0]["out"]
        results[layout] = held if layout == "channels-last" else held.T
    np.testing.assert_allclose(results["planar"], results["channels-last"], rtol=1e-5)
