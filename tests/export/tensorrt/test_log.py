"""Lines and messages as TensorRT-RTX 1.7.1.116 really wrote them, cut to what matters."""

from __future__ import annotations

import pytest

from ddsm_deploy.export.tensorrt.log import Layer, count_types, layers, node_types, reason

HALF, INT8 = (f"[ {{ Name: h, Dimensions: [1,3,8,8], Datatype: {kind}, Format: z }}]" for kind in ("Half", "Int8"))
BYTES = "[ { Name: image, Dimensions: [1,360,480,3], Datatype: UInt8, Format: (Linear) Row major linear format }]"
CAST = "[ONNX Layer: node_Cast][ONNX Layer: node_Conv_1]"
CONV = "[ONNX Layer: node_Conv_1][ONNX Layer: n4][ONNX Layer: n4]"
LOG = [
    "Layers:",
    "Name: entry^bb^signal^2, LayerType: signal, Inputs: [], Constants: [], Outputs: [], TacticName: , Metadata: ",
    f"Name: cast_4, LayerType: kgen, Inputs: {BYTES}, Constants: {INT8}, Outputs: {HALF}, Metadata: {CAST}",
    f"Name: corr_5, LayerType: correlation, Inputs: {HALF}, Constants: {HALF}, Outputs: {HALF}, Metadata: {CONV}",
    f"Name: CorrCast_93, LayerType: runtime_fusion, Inputs: {INT8}, Constants: [], Outputs: {HALF}, TacticName: , "
    "StreamId: 1, Metadata: [ONNX Layer: node_conv2d_80]",
]
DRIVER = (
    "[checkMacros.cpp::catchCudaError::250] Error Code 1: Cuda Runtime (In catchCudaError at "
    "/_src/common/dispatch/checkMacros.cpp:250 (cudaError 35: CUDA driver version is insufficient for CUDA runtime "
    "version))"
)


def test_layers_of_a_log() -> None:
    assert layers(LOG) == [
        Layer("signal", "", ()),
        Layer("kgen", "UInt8", ("node_Cast", "node_Conv_1")),
        Layer("correlation", "Half", ("node_Conv_1", "n4")),
        Layer("runtime_fusion", "Int8", ("node_conv2d_80",)),
    ]
    assert layers(["Layer(Convolution): conv1, Tactic: 0x0", "something else"]) == []  # of a form not known


def test_the_kernel_counts_not_what_brings_its_input_into_form() -> None:
    types = node_types(layers(LOG))
    assert types["node_Conv_1"] == "Half"
    assert types == node_types(reversed(layers(LOG)))
    ops = {"node_Conv_1": "Conv", "node_conv2d_80": "Conv", "gone": "Conv", "folded": "MatMul"}
    assert count_types(types, ops) == {"Conv": {"Half": 1, "Int8": 1, "unnamed": 1}, "MatMul": {"unnamed": 1}}


@pytest.mark.parametrize(
    ("said", "told"),
    [
        (
            "Invalid Node - s\nITensor::getDimensions: Error Code 4: API Usage Error (s: IGridSampleLayer `input` "
            "and `grid` must be of same type. `input` type is Half and `grid` type is Float. In validateTypes at "
            f"/_src/optimizer/common/nodes/gridSampleNode.cpp:31)\n{DRIVER}",
            "s: IGridSampleLayer `input` and `grid` must be of same type. `input` type is Half and "
            "`grid` type is Float",
        ),
        (
            "IBuilder::buildSerializedNetwork: Error Code 1: Myelin ([pass.cpp:337: check_turing] "
            "Cannot compile operation 'mm' for Turing (SM75): FP32 GEMM is not supported)",
            "Cannot compile operation 'mm' for Turing (SM75): FP32 GEMM is not supported",
        ),
    ],
)
def test_nvidias_messages_become_one_line(said: str, told: str) -> None:
    assert reason([said]) == told


def test_the_driver_is_blamed_only_where_nothing_else_is() -> None:
    assert reason([DRIVER, "the workspace is too small"]) == "the workspace is too small"
    assert "CUDA driver version is insufficient" in reason([DRIVER])
    assert reason([]) == "no reason was given"
