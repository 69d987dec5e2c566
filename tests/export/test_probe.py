"""Which tensors of a graph can be watched, and graphs that give them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from ddsm_deploy.errors import ArtifactError
from ddsm_deploy.export.probe import Tensor, expose, in_pieces, load, watchable

FLOAT = TensorProto.FLOAT


@pytest.fixture
def model() -> onnx.ModelProto:
    """x -> half -> Cast, and -> ids -> sum; `doubled` comes from weights alone."""
    nodes = [
        helper.make_node("Add", ["w", "w"], ["doubled"], name="fold"),
        helper.make_node("Mul", ["x", "doubled"], ["scaled"], name="mul"),
        helper.make_node("Cast", ["scaled"], ["half"], name="down", to=TensorProto.FLOAT16),
        helper.make_node("ArgMax", ["scaled"], ["ids"], axis=1, keepdims=1),
        helper.make_node("Cast", ["ids"], ["number"], name="up", to=FLOAT),
        helper.make_node("Cast", ["half"], ["single"], name="single", to=FLOAT),
        helper.make_node("Add", ["number", "single"], ["y"], name="end"),
    ]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", FLOAT, ["N", 4])],
        [helper.make_tensor_value_info("y", FLOAT, ["N", 4])],
        [numpy_helper.from_array(np.arange(4, dtype=np.float32), "w")],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 19)], ir_version=9)


def test_watchable(model: onnx.ModelProto) -> None:
    before = model.SerializeToString()
    assert watchable(model, (3, 4)) == [
        Tensor("scaled", "mul", "Mul", (), (3, 4), 48),
        Tensor("half", "down", "Cast", ("scaled",), (3, 4), 24),
        Tensor("number", "up", "Cast", ("scaled",), (3, 1), 12),  # the ids between are no floats
        Tensor("single", "single", "Cast", ("half",), (3, 4), 48),
        Tensor("y", "end", "Add", ("number", "single"), (3, 4), 48),
    ]
    assert model.SerializeToString() == before


def test_exposed_tensors_hold_what_flows_through_them(model: onnx.ModelProto, need) -> None:
    need("onnxruntime")
    import onnxruntime

    names = ["scaled", "half", "y"]
    copy = expose(model, names, (3, 4))
    onnx.checker.check_model(copy, full_check=True)
    assert [output.name for output in model.graph.output] == ["y"]
    session = onnxruntime.InferenceSession(copy.SerializeToString(), providers=["CPUExecutionProvider"])
    x = np.random.default_rng(0).normal(size=(2, 4)).astype(np.float32)  # another size than the one asked about
    given = dict(zip([o.name for o in session.get_outputs()], session.run(None, {"x": x}), strict=True))
    scaled = x * np.array([0, 2, 4, 6], np.float32)
    np.testing.assert_array_equal(given["scaled"], scaled)
    np.testing.assert_array_equal(given["half"], scaled.astype(np.float16))
    np.testing.assert_array_equal(given["y"], scaled.argmax(1)[:, None] + scaled.astype(np.float16).astype(np.float32))


def test_pieces() -> None:
    tensors = [Tensor(str(i), "n", "Op", (), None, size) for i, size in enumerate((5, 5, 20, 1, 4, 6))]
    pieces = [[tensor.name for tensor in piece] for piece in in_pieces(tensors, 10)]
    assert pieces == [["0", "1"], ["2"], ["3", "4"], ["5"]]
    assert not list(in_pieces([], 10))


def test_a_file_that_is_no_onnx(tmp_path: Path) -> None:
    path = tmp_path / "notes.onnx"
    path.write_text("no graph", encoding="utf-8")
    with pytest.raises(ArtifactError, match=r"notes\.onnx: can't be read as ONNX"):
        load(path)
    with pytest.raises(ArtifactError, match=r"missing\.onnx"):
        load(tmp_path / "missing.onnx")
