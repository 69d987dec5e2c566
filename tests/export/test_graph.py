"""Storing weights as float16: only where that changes nothing."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from ddsm_deploy.export.graph import halve_weights


def model(*weights: npt.NDArray[np.float32], shared: bool = False) -> onnx.ModelProto:
    """A chain of matrix products with square weights; `shared` adds one more with the first weight."""
    names = [f"w{i}" for i in range(len(weights))]
    used = [*names, names[0]] if shared else names
    nodes = [helper.make_node("MatMul", [f"x{i}", name], [f"x{i + 1}"]) for i, name in enumerate(used)]
    size = weights[0].shape[0]
    graph = helper.make_graph(
        nodes,
        "chain",
        [helper.make_tensor_value_info("x0", TensorProto.FLOAT, [1, size])],
        [helper.make_tensor_value_info(f"x{len(used)}", TensorProto.FLOAT, [1, size])],
        [numpy_helper.from_array(w, name) for name, w in zip(names, weights, strict=True)],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 19)], ir_version=10)


def halves(size: int = 4) -> npt.NDArray[np.float32]:
    return np.random.default_rng(0).normal(size=(size, size)).astype(np.float16).astype(np.float32)


def stored(proto: onnx.ModelProto) -> dict[str, npt.NDArray]:
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in proto.graph.initializer}


def test_a_float16_number_is_kept_and_an_ulp_is_forgiven() -> None:
    weight = halves()
    nudged = np.nextafter(weight, np.float32(np.inf))  # what folding a norm of scale one can do
    proto = model(weight, nudged)
    assert halve_weights(proto) == 1.0
    onnx.checker.check_model(proto, full_check=True)
    for name in ("w0", "w1"):
        assert stored(proto)[name].dtype == np.float16
        np.testing.assert_array_equal(stored(proto)[name].astype(np.float32), weight)
    assert [node.op_type for node in proto.graph.node] == ["Cast", "MatMul", "Cast", "MatMul"]


@pytest.mark.parametrize("value", [1.0 + 1e-4, 70000.0, 1e-9], ids=["too fine", "too large", "too small"])
def test_one_other_number_keeps_the_whole_tensor(value: float) -> None:
    weight = halves()
    weight[1, 2] = value
    proto = model(weight, halves())
    assert halve_weights(proto) == 0.5
    assert stored(proto)["w0"].dtype == np.float32
    np.testing.assert_array_equal(stored(proto)["w0"], weight)


def test_a_weight_used_twice_stays_as_it_is() -> None:
    proto = model(halves(), shared=True)
    assert halve_weights(proto) == 0.0
    assert [node.op_type for node in proto.graph.node] == ["MatMul", "MatMul"]
