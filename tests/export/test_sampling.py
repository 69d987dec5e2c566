"""Every ONNX form of the operator against its float64 reference, on every runtime that reads ONNX.

A file holds several calls of the operator, since it is the exporter that takes the time.
"""

from __future__ import annotations

import collections
import itertools
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import onnx
import pytest
from onnx import numpy_helper
from sampling_calls import export, inputs
from sampling_definition import by_loops

from ddsm_deploy.export.sampling import SAMPLINGS
from ddsm_deploy.export.sampling_function import inline_sampling
from ddsm_deploy.model.operator import reference

Run = Callable[[bytes, dict[str, npt.NDArray]], list[npt.NDArray]]

# B, K, V, N, Y, X, and the spread of offsets in pixels
STATIC = [
    (1, 4, 3, 9, 5, 7, 2.0),
    (2, 3, 5, 1, 4, 6, 1.0),
    (1, 2, 2, 4, 1, 1, 0.6),
    (1, 3, 2, 25, 6, 1, 3.0),
    (2, 2, 3, 9, 3, 4, 40.0),  # most positions lie outside
    (1, 2, 2, 4, 3, 3, 1e6),  # all of them, far outside
    (1, 1, 1, 4, 24, 40, 0.0),
]
DYNAMIC = [(2, 3, 2, n, 4, 5, 2.0) for n in (1, 4, 9, 25)]
OTHER_SIZES = [(1, 1, 1), (1, 6, 2), (3, 5, 9)]  # B, Y, X
FLOATS = {"rtol": 1e-5, "atol": 1e-5}  # coordinates are float32


@pytest.fixture(scope="module", params=SAMPLINGS)
def sampling(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def static(sampling: str) -> bytes:
    return export(sampling, STATIC, axes=())


@pytest.fixture(scope="module")
def dynamic(sampling: str) -> bytes:
    return export(sampling, DYNAMIC, axes=(0, 2, 3))


def check(run: Run, model: bytes, cases: list[tuple[int, int, int, int, int, int, float]]) -> None:
    tensors = [inputs(case) for case in cases]
    feeds = {f"in{i}": tensor.numpy() for i, tensor in enumerate(itertools.chain(*tensors))}
    for case, group, got in zip(cases, tensors, run(model, feeds), strict=True):
        want = reference(*(tensor.double() for tensor in group)).numpy()
        np.testing.assert_allclose(got, want, **FLOATS, err_msg=str(case))


@pytest.mark.timeout(900)
def test_static_sizes(run: Run, static: bytes) -> None:
    check(run, static, STATIC)


def test_what_is_no_position_lies_outside(run: Run, static: bytes) -> None:
    """Huge, infinite and undefined offsets among ordinary ones, each alone in its pair."""
    tensors = [inputs(case) for case in STATIC]
    offset = tensors[0][3]
    for place, number in enumerate((np.nan, np.inf, -np.inf, 1e30, -1e30)):
        offset[0, place, place, place] = number
        offset[0, 2 * place + 7, 4 - place, 6 - place] = number
    feeds = {f"in{i}": tensor.numpy() for i, tensor in enumerate(itertools.chain(*tensors))}
    want = by_loops(*(tensor.numpy() for tensor in tensors[0]))
    np.testing.assert_allclose(run(static, feeds)[0], want, **FLOATS)


@pytest.mark.timeout(900)
@pytest.mark.parametrize("size", [(2, 4, 5), *OTHER_SIZES], ids=str)
def test_one_file_for_any_batch_and_size(run: Run, dynamic: bytes, size: tuple[int, int, int]) -> None:
    b, y, x = size
    check(run, dynamic, [(b, k, v, n, y, x, spread) for _, k, v, n, _, _, spread in DYNAMIC])


def written_out(model: bytes) -> onnx.ModelProto:
    return inline_sampling(onnx.load_from_string(model))


def operators(model: bytes) -> collections.Counter[str]:
    return collections.Counter(node.op_type for node in written_out(model).graph.node)


def test_operators(sampling: str, static: bytes, dynamic: bytes) -> None:
    for model, calls in ((static, len(STATIC)), (dynamic, len(DYNAMIC))):
        found = operators(model)
        assert not found.keys() & {"Einsum", "Loop", "If", "Scan"}
        assert found["GridSample"] == (0 if sampling == "gather" else calls)
        assert found["Softmax"] == calls
    assert not operators(static).keys() & {"Shape", "Range"}


def test_static_grids_are_constants_an_axis_and_no_maps(static: bytes) -> None:
    y, x = STATIC[-1][4:6]
    for tensor in written_out(static).graph.initializer:
        assert numpy_helper.to_array(tensor).size <= 2 * max(y, x) < y * x
