"""The GPU kernel's body on the CPU, every block and thread of it, against the definition; under sanitizers."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from cuda_cases import CASES, FAR, Array, Case, assert_equal
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from sampling_definition import by_loops

HERE = Path(__file__).parent
SOURCES = HERE.parents[1] / "ddsm_deploy" / "kernels" / "src"
UNWRITTEN = -12345.0


@pytest.fixture(scope="session")
def shim(tmp_path_factory: pytest.TempPathFactory, missing) -> Path:
    """The body and a loop over the grid, compiled for the CPU with AddressSanitizer and UBSan."""
    if shutil.which("g++") is None:
        missing("g++", "no such compiler is on the path")
    program = tmp_path_factory.mktemp("cuda") / "shim"
    command = ["g++", "-std=c++17", "-O0", "-g1", "-Wall", "-Wextra", "-Werror", f"-I{SOURCES}"]
    command += ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", str(HERE / "cuda_shim.cpp")]
    done = subprocess.run([*command, "-o", str(program)], capture_output=True, text=True, check=False)
    if done.returncode and ("-fsanitize" in done.stderr or "_Float16" in done.stderr or "lasan" in done.stderr):
        missing("g++", f"it has no sanitizers or no float16: {done.stderr.splitlines()[0]}")
    assert done.returncode == 0, done.stderr
    return program


def run(shim: Path, tensors: list[Array], chunk: int | None = None) -> Array:
    """What the kernel makes of them."""
    query, _, value, offset = tensors
    b, k, y, x = query.shape
    v, n = value.shape[1], offset.shape[1] // 2
    kinds = [int(tensor.dtype == np.float16) for tensor in (query, offset)]
    head = np.array([*kinds, b, k, v, n, y, x, chunk or v], dtype=np.int32)
    data = b"".join(np.ascontiguousarray(array).tobytes() for array in (head, *tensors))
    done = subprocess.run([shim], input=data, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode(errors="replace")[:4000]
    result = np.frombuffer(done.stdout, dtype=query.dtype).reshape(value.shape)
    assert not (result == UNWRITTEN).any()
    return result


@pytest.mark.parametrize("n", range(1, 26))
def test_any_number_of_samples(shim: Path, n: int) -> None:
    tensors = Case(n=n, y=3, x=4).tensors()
    assert_equal(run(shim, tensors), tensors)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_any_sizes(shim: Path, case: Case) -> None:
    tensors = case.tensors()
    assert_equal(run(shim, tensors, case.chunk), tensors)


@pytest.mark.parametrize("spread", [0.0, 0.3, 5.0, 300.0])
def test_inside_and_outside(shim: Path, spread: float) -> None:
    tensors = Case(y=5, x=6).tensors(spread=spread)
    assert_equal(run(shim, tensors), tensors)


def test_places_on_the_edge(shim: Path) -> None:
    """Nine samples a pixel, from just outside one edge to just outside the other, whole pixels among them."""
    tensors = Case(y=3, x=4).tensors()
    rows, columns = np.mgrid[0:3, 0:4]
    steps = np.linspace(-1.5, 4.5, 9)  # -1.5, -0.75, 0, 0.75 ... 4.5
    for n in range(9):
        tensors[3][0, 2 * n] = steps[n] - rows
        tensors[3][0, 2 * n + 1] = steps[(n * 5) % 9] - columns
    assert_equal(run(shim, tensors), tensors)


@pytest.mark.parametrize("far", FAR, ids=str)
def test_far_offsets_read_zero(shim: Path, far: float) -> None:
    """One axis far away, or both; where all samples are, the result is zero."""
    tensors = Case(n=4).tensors()
    tensors[3][:, 1] = far
    tensors[3][:, 2] = far
    tensors[3][:, 4:6] = far
    assert_equal(run(shim, tensors), tensors)
    tensors[3][:, ::2] = far
    assert not run(shim, tensors).any()


def test_what_is_not_sampled_may_be_anything(shim: Path) -> None:
    """Infinite and NaN cells of the map reach no pixel whose samples lie elsewhere, or off the map."""
    tensors = Case(n=4, y=6, x=6).tensors(spread=0.0)
    _, key, value, offset = tensors
    offset[:, :, :, 3:] = 100.0  # the right half looks off the map, the left half at itself
    clean = by_loops(*tensors)
    key[:, :, :, 3:] = np.nan
    value[:, :, 2:, 3:] = np.inf
    result = run(shim, tensors)
    np.testing.assert_allclose(result, clean, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("offset_kind", [np.float16, np.float32])
@pytest.mark.parametrize("n", [1, 4, 9])
def test_float16(shim: Path, n: int, offset_kind: type) -> None:
    """Arithmetic is in float32, so the result is the definition's of the same numbers, rounded once to 11 bits."""
    tensors = Case(k=16, v=5, n=n, y=6, x=7).tensors(kind=np.float16, offset_kind=offset_kind)
    assert_equal(run(shim, tensors), tensors, tolerance=2**-11 + 1e-5)


def test_float16_offsets_beside_float32(shim: Path) -> None:
    tensors = Case(n=9).tensors(offset_kind=np.float16)
    assert_equal(run(shim, tensors), tensors)


numbers = st.floats(-2, 2, width=32)
offsets = st.one_of(
    st.floats(-4, 4, width=32), st.floats(width=32, allow_nan=True, allow_infinity=True), st.sampled_from(FAR)
)


@st.composite
def calls(draw: st.DrawFn) -> tuple[list[Array], int]:
    b, k, v = draw(st.integers(1, 2)), draw(st.integers(1, 10)), draw(st.integers(1, 10))
    n, y, x = draw(st.integers(1, 25)), draw(st.integers(1, 4)), draw(st.integers(1, 9))
    shapes = [(b, k, y, x), (b, k, y, x), (b, v, y, x)]
    tensors = [draw(arrays(np.float32, shape, elements=numbers)) for shape in shapes]
    return [*tensors, draw(arrays(np.float32, (b, 2 * n, y, x), elements=offsets))], draw(st.integers(1, v))


@settings(max_examples=40, deadline=None, derandomize=True)
@given(call=calls())
def test_adversarial_calls(shim: Path, call: tuple[list[Array], int]) -> None:
    tensors, chunk = call
    result = run(shim, tensors, chunk)
    np.testing.assert_allclose(result, by_loops(*tensors), rtol=1e-5, atol=1e-5)
