"""OpenVINO's operators on our kernels: in one piece, and in two where the map between them is large."""

from __future__ import annotations

import gc
from pathlib import Path

import numpy as np
import onnx
import pytest
from sampling_calls import inputs, one_node

from ddsm_deploy import kernels
from ddsm_deploy.artifact import Artifact, resolve
from ddsm_deploy.engines import EngineOptions, available_precisions, open_engine, samples
from ddsm_deploy.images import read_image

OPEN_AXES = (0, 2, 3)


@pytest.fixture(autouse=True)
def _kernels(need, missing) -> None:
    need("openvino")
    if not kernels.status().available:
        missing("kernels", kernels.status().reason)


def test_a_float16_file_gives_float32s_masks(shipped_model: Path) -> None:
    """Where OpenVINO computes in float16, as it does on some CPUs, its tensors are not read as bfloat16, of the same
    size."""
    frame = read_image(Path(__file__).parents[2] / "examples" / "frames" / "street_0.jpg")
    masks = []
    for name in ("model.onnx", "model.fp16.onnx"):
        with open_engine(resolve(shipped_model / name), "openvino", EngineOptions(threads=1)) as engine:
            masks.append(engine.run({"image": frame[None]})["mask"])
            if engine.precision == "fp16":
                assert engine.sampling == "portable"
                assert engine.sampling_note == "the fused kernels take no float16"
    kind, note = samples("openvino", resolve(shipped_model / "model.fp16.onnx"))
    assert (kind, "portable where" in note) == ("fused", True)
    assert samples("openvino", resolve(shipped_model)) == ("fused", "")
    assert (masks[0] != masks[1]).mean() < 0.005


def alive(operator: str) -> int:
    """Operators of a class, by its name: of those that OpenVINO may call."""
    gc.collect()
    return sum(type(thing).__name__ == operator for thing in gc.get_objects())


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_large_map_is_a_tensor_of_openvinos(tiny_fused: Path, tmp_path: Path, missing, precision: str) -> None:
    if precision not in available_precisions("openvino"):
        missing("bf16", "this CPU has none")
    sizes = (1, 6, 5, 4, 520, 540, 2.5)  # 280,800 pixels of 32 padded channels
    # numbers that bfloat16 holds exactly: with open axes OpenVINO rounds others elsewhere
    cut = [(tensor.numpy().view(np.uint32) & 0xFFFF0000).view(np.float32) for tensor in inputs(sizes)]
    fed = {f"in{i}": array for i, array in enumerate(cut)}
    spec, results = resolve(tiny_fused).spec, []
    for axes, operator in (((), "AttendPacked"), (OPEN_AXES, "SampleAttention")):
        onnx.save(one_node(sizes, axes=axes), tmp_path / "node.onnx")
        artifact = Artifact("node", spec, {"onnx": tmp_path / "node.onnx"})
        with open_engine(artifact, "openvino", EngineOptions(precision=precision, threads=2)) as engine:
            assert alive(operator) > 0
            results.append(engine.run(fed)["attended"])
        assert alive(operator) == 0
    # the whole call is tested against the definition; in two steps sums may be rounded in another order
    step = {"fp32": 0.0, "bf16": 2**-8}[precision]
    np.testing.assert_allclose(results[0], results[1], rtol=step, atol=2e-5)
