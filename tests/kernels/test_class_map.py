"""From logits to classes in one step, against bilinear interpolation in float64 written out axis by axis."""

from __future__ import annotations

import ctypes

import numpy as np
import pytest

from ddsm_deploy import kernels
from ddsm_deploy.errors import InputError

Logits = np.ndarray

# batch, classes, rows and columns of the logits, rows and columns of the mask
CASES = [
    (1, 11, 45, 60, 90, 120),  # doubled, as `ddsm-lite0` does it
    (2, 3, 5, 7, 9, 13),
    (1, 1, 3, 3, 6, 6),  # one class
    (1, 19, 1, 1, 4, 5),  # one pixel
    (2, 5, 8, 9, 8, 9),  # of the same size
    (1, 7, 16, 20, 5, 6),  # smaller
    (1, 4, 3, 40, 3, 17),
    (3, 12, 4, 2, 33, 65),
    (1, 256, 3, 4, 30, 41),  # the most
]


@pytest.fixture(scope="module", autouse=True)
def _kernels(missing) -> None:
    if not kernels.status().available:
        missing("kernels", kernels.status().reason)


@pytest.fixture(params=["avx512", "avx2", "plain"])
def _each_set(request: pytest.FixtureRequest, missing):
    names = kernels.status().instruction_sets
    if request.param not in names:
        missing(request.param, f"this processor has {', '.join(names)}")
    kernels.use(request.param)
    yield
    kernels.use(names[0])


def along(logits: Logits, axis: int, size: int) -> Logits:
    """Resized along one axis: each of `size` centres between its two neighbours, edges repeated."""
    count = logits.shape[axis]
    at = np.clip((np.arange(size) + 0.5) * count / size - 0.5, 0, count - 1)
    first = at.astype(int)
    weight = np.expand_dims(at - first, tuple(i for i in range(4) if i != axis))
    after = np.minimum(first + 1, count - 1)
    return np.take(logits, first, axis) * (1 - weight) + np.take(logits, after, axis) * weight


def wanted(logits: Logits, size: tuple[int, int]) -> Logits:
    """B×C×Y×X -> B×Y'×X', numpy's argmax, which takes the first of equal ones as well."""
    return along(along(logits.astype(np.float64), 2, size[0]), 3, size[1]).argmax(1)


def class_map(logits: Logits, size: tuple[int, int], *, planar: bool = False, pool: kernels.Pool | None = None):
    """The kernel's answer; float32 logits, or bfloat16 as uint16."""
    b, c, y, x = logits.shape
    kind = kernels.F32 if logits.dtype == np.float32 else kernels.BF16
    array = np.ascontiguousarray(logits if planar else logits.transpose(0, 2, 3, 1))
    strides = (y * x, 1) if planar else (1, c)
    mask = np.full((b, *size), 0xFF, np.uint8)
    view = kernels.View(array.ctypes.data, c * y * x, *strides, kind)
    kernels.class_map(kernels.MapSizes(b, c, y, x, *size), view, mask.ctypes.data, pool)
    return mask


def some_logits(b: int, c: int, y: int, x: int) -> Logits:
    return np.random.default_rng(c + y).standard_normal((b, c, y, x)).astype(np.float32)


@pytest.mark.usefixtures("_each_set")
@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_class_of_the_greatest_logit(case: tuple[int, ...]) -> None:
    logits, size = some_logits(*case[:4]), case[4:]
    for planar in (False, True):
        np.testing.assert_array_equal(class_map(logits, size, planar=planar), wanted(logits, size))


@pytest.mark.usefixtures("_each_set")
def test_bfloat16_is_widened_and_not_rounded_again() -> None:
    bits = some_logits(2, 11, 9, 14).view(np.uint32) >> 16  # cut off: each a bfloat16
    logits = (bits << 16).view(np.float32)
    mask = class_map(bits.astype(np.uint16), (18, 28))
    # sums of a few 8-bit fractions tie more often than those of float32; both sides then take the first
    np.testing.assert_array_equal(mask, wanted(logits, (18, 28)))


@pytest.mark.usefixtures("_each_set")
def test_of_equal_logits_the_first_counts() -> None:
    logits = np.zeros((1, 5, 4, 6), np.float32)
    logits[:, [2, 4]] = 1
    assert (class_map(logits, (8, 12)) == 2).all()
    assert (class_map(np.zeros_like(logits), (8, 12)) == 0).all()


def test_nan_is_no_class_beyond_the_last() -> None:
    assert (class_map(np.full((1, 4, 6, 8), np.nan, np.float32), (12, 16)) < 4).all()


def test_threads_make_no_difference() -> None:
    run_type = ctypes.CFUNCTYPE(
        None, ctypes.c_void_p, ctypes.c_int64, ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_int64), ctypes.c_void_p
    )
    counts = []

    def run(_, count, task, data) -> None:
        counts.append(count)
        for index in reversed(range(count)):
            task(data, index)

    callback = run_type(run)
    pool = kernels.Pool(ctypes.cast(callback, ctypes.c_void_p), None, 3)
    logits = some_logits(2, 11, 60, 80)
    np.testing.assert_array_equal(class_map(logits, (120, 160), pool=pool), class_map(logits, (120, 160)))
    assert counts and counts[0] > 1
    class_map(some_logits(1, 3, 5, 5), (6, 6), pool=pool)
    assert len(counts) == 1  # so little work is done before another thread has woken


@pytest.mark.parametrize(
    ("field", "number", "says"),
    [
        ("batch", -1, "not positive"),
        ("classes", 0, "not positive"),
        ("rows", 0, "not positive"),
        ("out_columns", -5, "not positive"),
        ("classes", 257, "more than 256"),
        ("out_rows", 2**62, "too large"),
        ("columns", 2**21, "too large"),
        ("batch", 2**40, "too large"),
    ],
)
def test_sizes_that_are_refused(field: str, number: int, says: str) -> None:
    sizes, array, mask = kernels.MapSizes(1, 2, 3, 4, 5, 6), np.zeros(24, np.float32), np.zeros(30, np.uint8)
    setattr(sizes, field, number)
    with pytest.raises(InputError, match=f"class map: .*{says}"):
        kernels.class_map(sizes, kernels.View(array.ctypes.data, 24, 1, 2, kernels.F32), mask.ctypes.data)


def test_what_is_missing_is_refused_and_a_batch_of_none_is_not() -> None:
    sizes, array, mask = kernels.MapSizes(1, 2, 3, 4, 5, 6), np.zeros(24, np.float32), np.zeros(30, np.uint8)
    view = kernels.View(array.ctypes.data, 24, 1, 2, kernels.F32)
    for logits, address in (
        (kernels.View(None, 24, 1, 2, kernels.F32), mask.ctypes.data),
        (kernels.View(array.ctypes.data, 24, 1, 2, 7), mask.ctypes.data),
        (view, 0),
    ):
        with pytest.raises(InputError, match="class map: a tensor has no address"):
            kernels.class_map(sizes, logits, address)
    sizes.batch = 0
    kernels.class_map(sizes, kernels.View(None, 0, 0, 0, 0), 0)
