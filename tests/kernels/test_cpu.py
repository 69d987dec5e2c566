"""The fused CPU kernels give what the operator's float64 definition gives, on any input, forward and backward."""

from __future__ import annotations

import concurrent.futures
from collections.abc import Iterator

import pytest

pytest.importorskip("torch", reason="torch: it is not installed here")

import torch
from hypothesis import example, given, settings
from kernel_calls import KINDS, LAYOUTS, Case, cases, laid_out
from sampling_gradients import by_cells
from torch import Tensor

from ddsm_deploy import kernels
from ddsm_deploy.model import fused
from ddsm_deploy.model.operator import reference

SETS = kernels.status().instruction_sets or ("none",)
TOLERANCE = 1e-5
BOUND = 64.0
"""|query|·|key|/sqrt(K): up to here scores are exact enough for TOLERANCE; their rounding errors grow with it."""
BFLOAT16 = 2.0**-8
"""By how much of itself a number changes at most when it is rounded to bfloat16's 8 bits."""

properties = settings(max_examples=100, deadline=None, derandomize=True)
busy = Case(k=20, v=33, y=20, x=26, threads=3, kinds=KINDS)  # enough work for the threads to be used


@pytest.fixture(scope="module", autouse=True)
def _kernels(missing) -> Iterator[None]:
    if not kernels.status().available:
        missing("kernels", kernels.status().reason)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    kernels.use(SETS[0])


@pytest.fixture(scope="module", params=SETS)
def instruction_set(request: pytest.FixtureRequest) -> str:
    kernels.use(request.param)
    return request.param


def assert_close(got: Tensor, wanted: Tensor, *, each: float = 0.0, floor: float = 1e-6) -> None:
    """Whether no number is off by more than TOLERANCE of the largest wanted one, and `each` of its own wanted one.

    Args:
        each: for results that are rounded to a shorter type.
        floor: what the largest wanted one counts as at least: sums whose terms cancel keep the terms' rounding errors,
            and the reference has 1e-16 where zero would be right.
    """
    assert got.shape == wanted.shape
    if wanted.numel():
        off = (got.double() - wanted).abs() - each * wanted.abs()
        largest = max(wanted.abs().max().item(), floor)
        assert off.max() <= TOLERANCE * largest, f"{off.max()} of {largest}"  # NaN is not


def forward(case: Case, inputs: list[Tensor]) -> Tensor:
    torch.set_num_threads(case.threads)
    return fused.forward(*inputs)


@properties
@given(case=cases())
@example(case=busy)
def test_forward(instruction_set: str, case: Case) -> None:
    inputs = case.tensors(bound=BOUND)
    assert_close(forward(case, inputs), reference(*(tensor.double() for tensor in inputs)))


@properties
@given(case=cases())
@example(case=busy)
def test_bfloat16(instruction_set: str, case: Case) -> None:
    """Arithmetic is in float32, so the result is the reference's of the same numbers, rounded once."""
    inputs = [tensor.bfloat16() for tensor in case.tensors(bound=BOUND)]
    if case.seed % 2:
        inputs[3] = inputs[3].float() + 0.01  # as under autocast
    result = forward(case, inputs)
    assert result.dtype == torch.bfloat16
    assert_close(result, reference(*(tensor.double() for tensor in inputs)), each=BFLOAT16)


def test_bfloat16_of_a_large_map(instruction_set: str) -> None:
    """From some size on the map itself is kept in bfloat16."""
    case = Case(k=32, v=32, y=160, x=210, n=2, threads=3, kinds=KINDS)
    test_bfloat16.hypothesis.inner_test(instruction_set, case)


@pytest.mark.parametrize("bound", [1e3, 1e5])
def test_scores_of_any_size(instruction_set: str, bound: float) -> None:
    """Large ones overflow nothing; what rounding leaves of them grows with them, in proportion."""
    inputs = busy.tensors(bound=bound)
    wanted = reference(*(tensor.double() for tensor in inputs))
    off = (forward(busy, inputs) - wanted).abs().max()
    assert off <= TOLERANCE * bound / BOUND * wanted.abs().max()


def gradients(case: Case, inputs: list[Tensor]) -> tuple[list[Tensor], list[Tensor], list[float]]:
    """The kernels' gradients, autograd's of the definition in float64, and how large their terms may be."""
    torch.set_num_threads(case.threads)
    generator = torch.Generator().manual_seed(case.seed)
    grad = torch.randn(inputs[2].shape, generator=generator).to(inputs[2].dtype)
    leaves = [tensor.detach().double().requires_grad_() for tensor in inputs]
    wanted = torch.autograd.grad(by_cells(*leaves), leaves, grad.double())
    query, key, value, _ = (tensor.norm(dim=1).max().item() if tensor.numel() else 0.0 for tensor in inputs)
    slope = grad.norm(dim=1).max().item() * value if grad.numel() else 0.0
    scale = case.k**-0.5
    terms = [slope * key * scale, slope * query * scale, 0.0, slope * (1 + query * key * scale)]
    return list(fused.backward(grad, *inputs)), list(wanted), terms


@settings(properties, max_examples=60)
@given(case=cases(most=40))
@example(case=busy)
def test_backward(instruction_set: str, case: Case) -> None:
    got, wanted, terms = gradients(case, case.tensors(bound=BOUND / 4))
    for one, other, term in zip(got, wanted, terms, strict=True):
        assert_close(one, other, floor=term / 10)


@settings(properties, max_examples=50)
@given(case=cases(most=20))
def test_backward_in_bfloat16(instruction_set: str, case: Case) -> None:
    inputs = [tensor.bfloat16() for tensor in case.tensors(bound=BOUND / 4)]
    got, wanted, terms = gradients(case, inputs)
    for one, other, term in zip(got, wanted, terms, strict=True):
        assert one.dtype == torch.bfloat16
        assert_close(one, other, each=BFLOAT16, floor=term / 10)


@pytest.mark.parametrize("case", [Case(y=1, x=3000, k=4, v=4), Case(y=3000, x=1, k=4, v=4)], ids=["wide", "high"])
def test_fractions_keep_their_accuracy_far_from_the_first_pixel(instruction_set: str, case: Case) -> None:
    """`pixel + offset` in float32 would lose four digits of the fraction here."""
    inputs = case.tensors(bound=8)
    random = torch.Generator().manual_seed(1)
    along = 1 if case.y == 1 else 0
    inputs[3].fill_(0.0)
    inputs[3][:, along::2] = torch.rand(1, case.n, case.y, case.x, generator=random)
    inputs[3][:, along::4] += 2000.3
    inputs[3][:, along + 2 :: 4] -= 2000.3
    assert_close(forward(case, inputs), reference(*(tensor.double() for tensor in inputs)))
    got, wanted, _ = gradients(case, inputs)
    for one, other in zip(got, wanted, strict=True):
        assert_close(one, other)


def test_a_sample_beyond_the_border_does_not_move(instruction_set: str) -> None:
    """One that lies more than a pixel outside, on either axis, has no gradient; one on the border itself has."""
    case = Case(n=6, y=5, x=6)
    inputs = case.tensors()
    rows, columns = torch.arange(5.0).view(5, 1), torch.arange(6.0)
    places = [(-1.01, 2.5), (2.5, -1.5), (5.0, 2.5), (1e30, 2.5), (2.5, torch.nan), (-0.5, 5.5)]
    for n, (row, column) in enumerate(places):
        inputs[3][:, 2 * n] = row - rows
        inputs[3][:, 2 * n + 1] = column - columns
    *_, by_offset = fused.backward(torch.ones_like(inputs[2]), *inputs)
    assert not by_offset[:, :10].any()
    assert by_offset[:, 10:].all()


def test_what_is_not_read_may_be_anything(instruction_set: str) -> None:
    """NaN and infinity reach only the pixels whose samples, or whose samples' neighbours, lie on them."""
    case = Case(n=4, y=6, x=8, k=9, v=17, kinds=("whole",))
    query, key, value, offset = case.tensors()
    offset[..., :4] = 0.25
    offset[:, 1::2, :, :4] = 2.5 - torch.arange(4.0)  # the left half looks at columns 2 and 3, the right half anywhere
    clean = reference(*(tensor.double() for tensor in (query, key, value, offset)))
    key[:, 3, :, 5:] = torch.nan
    value[:, 2:, :, 5:] = torch.inf
    query[:, :, :, 7] = torch.nan
    result = forward(case, [query, key, value, offset])
    assert_close(result[..., :4], clean[..., :4])
    assert result[..., 7].isnan().all()


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_the_same_threads_give_the_same_bits(instruction_set: str, threads: int) -> None:
    torch.set_num_threads(threads)
    inputs = busy.tensors()
    first = [fused.forward(*inputs), *fused.backward(inputs[2], *inputs)]
    for _ in range(5):
        again = [fused.forward(*inputs), *fused.backward(inputs[2], *inputs)]
        assert all(torch.equal(one, other) for one, other in zip(first, again, strict=True))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_and_threads_change_no_bit(instruction_set: str, layout: str) -> None:
    """Each number's sums are taken in one order, wherever the number lies and whoever takes them."""
    inputs = busy.tensors()
    if layout.startswith("one "):
        inputs = [laid_out(tensor, layout).contiguous() for tensor in inputs]
    torch.set_num_threads(1)
    plain = fused.forward(*inputs)
    torch.set_num_threads(3)
    assert torch.equal(fused.forward(*(laid_out(tensor, layout) for tensor in inputs)), plain)


def test_python_threads_at_once(instruction_set: str) -> None:
    """Calls release the GIL, so they do run at the same time; each has scratch memory of its own."""
    many = [Case(k=3 + i, v=40 - i, y=9 + i, x=21 - i, seed=i, kinds=KINDS, threads=2).tensors() for i in range(8)]
    wanted = [by_cells(*inputs) for inputs in many]
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        for _ in range(5):
            for got, right in zip(pool.map(lambda inputs: fused.forward(*inputs), many), wanted, strict=True):
                assert_close(got, right)
