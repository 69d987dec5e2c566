"""Every rule of the guard on a real graph, and beside it what NVIDIA's own parser and builder make of that graph."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import tensorrt_graphs as graphs
from onnx import ModelProto, helper

from ddsm_deploy.errors import BackendError
from ddsm_deploy.export.tensorrt.builder import Job, build, library_version
from ddsm_deploy.export.tensorrt.guard import Graph, Target, check_graph
from ddsm_deploy.export.tensorrt.known import KNOWN_BAD, WARN, known_bad

RTX = Target(target="tensorrt-rtx", version="1.7.1.116", compute_capabilities=("86",))
TURING = Target(target="tensorrt-rtx", version="1.7.1.116", compute_capabilities=("75", "86"))
TENSORRT = Target(target="tensorrt", version="10.13.3.9")

# name: graph, what the guard says, what NVIDIA says without it (None: nothing, it builds an engine from it)
REFUSED = {
    "mixed types": (
        graphs.sampling(image=graphs.F16),
        "GridSample 'sample' takes a float16 map and a float grid; both must be of one type",
        "must be of same type",
    ),
    "unsigned": (
        graphs.quantized(zero=np.array(0, np.uint8)),
        "QuantizeLinear 'quantize' is of uint8, which TensorRT reads as int8",
        None,  # it builds, with a warning, and halves the range
    ),
    "no zero point": (
        graphs.quantized(zero=None),
        "QuantizeLinear 'quantize' is of uint8 (that is what ONNX says of one without a zero point)",
        None,  # it builds, without a word
    ),
    "zero point not 0": (
        graphs.quantized(zero=np.array(3, np.int8)),
        "QuantizeLinear 'quantize' has a zero point other than 0",
        "Non-zero zero point is not supported",
    ),
    "unsigned weights": (
        graphs.quantized(weight_zero=np.zeros(4, np.uint8)),
        "DequantizeLinear 'weight.dq' is of uint8",
        "unsupported input type of UINT8",
    ),
    "zero point of a weight not 0": (
        graphs.quantized(weight_zero=np.ones(4, np.int8)),
        "DequantizeLinear 'weight.dq' has a zero point other than 0",
        "Non-zero zero point is not supported",
    ),
    "int32 bias": (
        graphs.quantized(bias="int32"),
        "DequantizeLinear 'bias.dq' takes an int32 bias",
        "has type Int32",
    ),
    "uint8 inside": (
        graphs.uint8_inside(),
        "Cast 'cast' gives uint8 inside the graph",
        "does not support UINT8 types for intermediate tensors",
    ),
    "uint8 input": (
        graphs.uint8_input_transposed(),
        "Transpose 'transpose' reads the uint8 input 'x'; only a Cast may",
        "has type UInt8",
    ),
    "int16": (graphs.int16_inside(), "Cast 'down' gives int16, a type that TensorRT lacks", "Unsupported data type"),
    "stored int8": (
        graphs.stored_int8(),
        "Cast 'cast' reads the stored int8 tensor 'k'; only a DequantizeLinear may",
        "only allowed before DQ",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.parametrize("target", [RTX, TENSORRT], ids=str)
def test_it_is_refused_with_its_node(name: str, target: Target) -> None:
    model, said, _ = REFUSED[name]
    with pytest.raises(BackendError) as caught:
        check_graph(model, target)
    assert str(caught.value).startswith(f"this graph can't go to {target}: {said}")


@pytest.mark.parametrize("name", REFUSED)
def test_what_nvidia_says_of_it(name: str, tmp_path: Path, need) -> None:
    need("tensorrt_rtx")
    model, _, said = REFUSED[name]
    job = job_of(model, tmp_path)
    if said is None:
        built = build(job)
        assert job.engine.stat().st_size
        assert not [warning for warning in built.warnings if "UINT8" in warning] or name == "unsigned"
    else:
        with pytest.raises(BackendError, match=said):
            build(job)


@pytest.mark.parametrize(
    "model",
    [
        graphs.sampling(),
        graphs.sampling(image=graphs.F16, grid=graphs.F16),
        graphs.quantized(),
        graphs.uint8_ends(),
        graphs.product(),
    ],
    ids=["sampling", "half sampling", "quantized", "uint8 ends", "product"],
)
def test_sound_graphs_pass_and_build(model: ModelProto, tmp_path: Path, need) -> None:
    assert check_graph(model, RTX) == ()
    need("tensorrt_rtx")
    job = job_of(model, tmp_path)
    build(job)
    assert job.engine.stat().st_size


def test_float_products_on_turing(tmp_path: Path, need) -> None:
    with pytest.raises(BackendError, match=r"MatMul 'product' multiplies float32 matrices.*75.*--precision fp16"):
        check_graph(graphs.product(), TURING)
    assert check_graph(graphs.product(graphs.F16), TURING) == ()
    assert check_graph(graphs.product(), RTX) == ()
    assert (
        check_graph(graphs.product(), Target(target="tensorrt", version="10.13.3.9", compute_capabilities=("75",)))
        == ()
    )
    need("tensorrt_rtx")
    for kind in (graphs.F32, graphs.F16):
        job = job_of(graphs.product(kind), tmp_path, compute_capabilities=("75",))
        if kind == graphs.F32:
            with pytest.raises(BackendError, match="FP32 GEMM is not supported; build it with --precision fp16"):
                build(job)
        else:
            build(job)


SMOOTH_20 = [("linear", 20), (None, 20), ("cubic", 20), ("linear", 22)]


@pytest.mark.parametrize(("mode", "opset"), SMOOTH_20)
@pytest.mark.parametrize(
    ("target", "version", "effect"),
    [
        ("tensorrt", "10.13.3.9", "samples nearest"),
        ("tensorrt", "11.1.0.106", "samples nearest"),
        ("tensorrt", "11.4.0.106", "nobody has tried this one"),
        ("tensorrt-rtx", "1.5.0.114", "samples nearest"),
        ("tensorrt-rtx", "1.7.1.116", "would be misread by others"),
        ("tensorrt-rtx", "1.9.0.1", "nobody has tried this one"),
    ],
)
def test_new_names_of_modes_are_refused(mode: str | None, opset: int, target: str, version: str, effect: str) -> None:
    model = graphs.sampling(mode=mode, opset=opset)
    with pytest.raises(BackendError) as caught:
        check_graph(model, Target(target=target, version=version))
    for text in (f"GridSample 'sample' is of opset {opset}", effect, "export it at opset 19"):
        assert text in str(caught.value)


@pytest.mark.parametrize(("mode", "opset"), [("nearest", 20), ("bilinear", 19), ("bicubic", 16), (None, 16)])
def test_old_names_and_nearest_are_not(mode: str | None, opset: int) -> None:
    for target, version in (("tensorrt", "10.13.3.9"), ("tensorrt-rtx", "1.5.0.114"), ("tensorrt-rtx", "1.7.1")):
        check_graph(graphs.sampling(mode=mode, opset=opset), Target(target=target, version=version))


@pytest.mark.parametrize(("mode", "opset"), SMOOTH_20)
def test_nvidias_parser_takes_new_names_without_a_word(mode: str | None, opset: int, tmp_path: Path, need) -> None:
    """So without the guard it would have gone through; how it was read is what the table says of the version here.

    The child process reads the modes back from the parser: told of nearest, it complains where they were read right.
    """
    need("tensorrt_rtx")
    model = graphs.sampling(mode=mode, opset=opset)
    row = known_bad(
        "tensorrt-rtx",
        library_version("tensorrt-rtx"),
        op="GridSample",
        opset=opset,
        mode=mode or "linear",
        action="refuse",
    )
    assert row is not None
    job = job_of(model, tmp_path, sampling=("nearest",))
    if "reads the new names rightly" in row.effect:
        with pytest.raises(BackendError, match=f"its parser misreads GridSample: .* it took 1 {mode or 'linear'}"):
            build(job)
        job = job_of(model, tmp_path, sampling=(mode or "linear",))
    assert build(job).warnings == ()
    assert job.engine.stat().st_size


def test_a_function_is_looked_into() -> None:
    model = graphs.sampling(mode="linear", opset=20)
    (node,) = model.graph.node
    body = helper.make_function("ddsm", "Sample", ["x", "grid"], ["y"], [node], [helper.make_opsetid("", 20)])
    call = helper.make_node("Sample", ["x", "grid"], ["y"], domain="ddsm", name="call")
    del model.graph.node[:]
    model.graph.node.append(call)
    model.functions.append(body)
    model.opset_import.append(helper.make_opsetid("ddsm", 1))
    onnx.checker.check_model(model)
    with pytest.raises(BackendError, match="is of opset 20"):
        check_graph(model, RTX)


def test_several_problems_are_counted() -> None:
    with pytest.raises(BackendError, match=r"\(and 1 more like it\)$"):
        check_graph(graphs.quantized(zero=np.array(0, np.uint8)), RTX)  # the pair's two nodes


def test_doubts_are_told_and_not_refused() -> None:
    doubts = check_graph(graphs.sampling(), Target(target="tensorrt", version="10.14.1.48"))
    assert len(doubts) == 1
    assert "https://github.com/pytorch/TensorRT/issues/4074" in doubts[0]
    assert check_graph(graphs.product(), Target(target="tensorrt", version="10.14.1.48")) == ()
    assert check_graph(graphs.sampling(), TENSORRT) == ()  # 10.13 is older than that report


def test_each_row_names_its_source() -> None:
    for row in KNOWN_BAD:
        assert row.source.startswith(("https://", "tests/"))
        assert row.effect
    assert any(row.action == WARN for row in KNOWN_BAD)


def test_modes_are_read_as_the_graph_means_them() -> None:
    for mode, meant in (("bilinear", "linear"), ("bicubic", "cubic"), ("nearest", "nearest"), (None, "linear")):
        assert Graph(graphs.sampling(mode=mode)).sampling_modes() == [meant]


def job_of(model: ModelProto, folder: Path, **changes: object) -> Job:
    modes = tuple(Graph(model).sampling_modes())
    fields = {
        "target": "tensorrt-rtx",
        "onnx": graphs.save(model, folder / "graph.onnx"),
        "engine": folder / "graph.engine",
        "sampling": modes,
        "compute_capabilities": ("86",),
    }
    return Job(**{**fields, **changes})  # type: ignore[arg-type]
