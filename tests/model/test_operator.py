"""The operator against a definition written with loops, its gradients, and its registration with torch."""

from __future__ import annotations

import pytest
import torch
from kernel_calls import KINDS, LAYOUTS, Case
from sampling_definition import by_loops
from sampling_gradients import by_cells
from torch import Tensor

from ddsm_deploy.errors import InputError
from ddsm_deploy.model.operator import dynamic_sample_attention, reference

FORWARD = torch.ops.ddsm.dynamic_sample_attention.default
BACKWARD = torch.ops.ddsm.dynamic_sample_attention_backward.default


def tensors(b: int, k: int, v: int, n: int, y: int, x: int, spread: float = 2.0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(n * 100 + y)
    shapes = [(b, k, y, x), (b, k, y, x), (b, v, y, x), (b, 2 * n, y, x)]
    query, key, value, offset = (torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes)
    return [query, key, value, offset * spread]


@pytest.mark.parametrize(
    ("k", "v", "n", "y", "x", "spread"),
    [(3, 2, 9, 4, 5, 2.0), (1, 1, 1, 1, 1, 0.7), (2, 3, 4, 1, 6, 1.0), (2, 2, 25, 3, 3, 40.0), (4, 1, 9, 5, 2, 0.0)],
)
def test_equals_the_definition(k: int, v: int, n: int, y: int, x: int, spread: float) -> None:
    inputs = tensors(2, k, v, n, y, x, spread)
    expected = torch.from_numpy(by_loops(*(tensor.numpy() for tensor in inputs)))
    torch.testing.assert_close(dynamic_sample_attention(*inputs), expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(by_cells(*inputs), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_equals_the_definition_at_every_kind_of_offset(kind: str) -> None:
    """NaN, infinite and huge ones, on whole pixels and beside them, on the map's edge and past it."""
    inputs = [tensor.double() for tensor in Case(b=2, y=4, x=5, kinds=(kind,)).tensors()]
    expected = torch.from_numpy(by_loops(*(tensor.numpy() for tensor in inputs)))
    torch.testing.assert_close(dynamic_sample_attention(*inputs), expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(by_cells(*inputs), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("shape", [(0, 4, 5), (2, 0, 5), (2, 4, 0)], ids=["no image", "no row", "no column"])
@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16, torch.float64])
def test_nothing_of_nothing(shape: tuple[int, int, int], kind: torch.dtype) -> None:
    b, y, x = shape
    inputs = [torch.zeros(b, c, y, x, dtype=kind, requires_grad=True) for c in (3, 3, 2, 8)]
    result = dynamic_sample_attention(*inputs)
    assert result.shape == (b, 2, y, x)
    assert result.dtype == kind
    result.sum().backward()
    assert all(tensor.grad.shape == tensor.shape for tensor in inputs)


def test_gradients_are_right_in_float64() -> None:
    inputs = [t.requires_grad_() for t in tensors(1, 3, 2, 4, 4, 5)]
    assert torch.autograd.gradcheck(dynamic_sample_attention, inputs)


def test_gradients_in_float64_past_the_edge_and_on_odd_offsets() -> None:
    leaves = [t.double().requires_grad_() for t in Case(kinds=("near", "wide", "far", "special"), b=2).tensors()]
    grad = torch.randn_like(leaves[2])
    wanted = torch.autograd.grad(by_cells(*leaves), leaves, grad)
    got = torch.autograd.grad(dynamic_sample_attention(*leaves), leaves, grad)
    for one, other in zip(got, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # opcheck looks there itself
@pytest.mark.parametrize(
    ("kind", "layout"),
    [
        *((torch.float32, layout) for layout in LAYOUTS),
        *((kind, layout) for kind in (torch.bfloat16, torch.float64) for layout in ("channels last", "turned")),
    ],
)
def test_registration_keeps_its_promises(kind: torch.dtype, layout: str) -> None:
    """Shapes, types and strides for tracing are the real ones; gradients are registered; nothing aliases an input."""
    inputs = tuple(tensor.to(kind) for tensor in Case(layouts=(layout,) * 4, b=2, y=3, x=4).tensors())
    torch.library.opcheck(BACKWARD, (inputs[2] * 2, *inputs))
    if "one " not in layout:  # opcheck changes its inputs in place, which expanded ones don't bear
        inputs = tuple(tensor.requires_grad_() for tensor in inputs)
    torch.library.opcheck(FORWARD, inputs)


def test_gradients_do_not_need_autograd() -> None:
    inputs = tensors(1, 3, 2, 4, 4, 5)
    usual = BACKWARD(inputs[2], *inputs)
    with torch.inference_mode():
        assert all(torch.equal(one, other) for one, other in zip(BACKWARD(inputs[2], *inputs), usual, strict=True))


def test_only_the_gradients_that_are_wanted() -> None:
    query, key, value, offset = (t.float() for t in tensors(1, 3, 2, 4, 4, 5))
    offset.requires_grad_()
    dynamic_sample_attention(query, key, value, offset).sum().backward()
    assert offset.grad.any()
    assert query.grad is None


def test_half_precision_inputs_keep_coordinates_in_float32() -> None:
    query, key, value, offset = (t.float() for t in tensors(1, 4, 4, 9, 8, 300))
    exact = dynamic_sample_attention(query, key, value, offset)
    half = dynamic_sample_attention(query.bfloat16(), key.bfloat16(), value.bfloat16(), offset)
    assert half.dtype == torch.bfloat16
    # bfloat16 has 8 bits of mantissa: coordinates near 300 in it would be off by a whole pixel, these values are not
    assert (half.float() - exact).abs().max() < 0.1


def test_training_under_autocast() -> None:
    """Mixed types go in and out; the gradients reach the float32 weights, and are those of float32 but for rounding."""
    torch.manual_seed(0)
    image = torch.randn(2, 8, 10, 12)
    layers = torch.nn.ModuleList(torch.nn.Conv2d(8, channels, 1) for channels in (6, 6, 5, 18))

    def gradients(autocast: bool) -> list[Tensor]:
        layers.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            query, key, value, offset = (layer(image) for layer in layers)
            result = dynamic_sample_attention(query, key, value, offset.float())
            assert result.dtype == (torch.bfloat16 if autocast else torch.float32)
            result.float().square().mean().backward()
        return [layer.weight.grad.clone() for layer in layers]

    for half, exact in zip(gradients(True), gradients(False), strict=True):
        assert half.dtype == torch.float32
        assert (half - exact).norm() < 0.1 * exact.norm()


def test_compiled_training_step_is_the_plain_one() -> None:
    """With torch's own tracing of forward and backward, less the generated code, which needs a compiler."""
    inputs = [t.float().requires_grad_() for t in tensors(2, 3, 2, 4, 4, 5)]
    compiled = torch.compile(lambda *given: dynamic_sample_attention(*given).square().sum(), backend="aot_eager")
    got = torch.autograd.grad(compiled(*inputs), inputs)
    wanted = torch.autograd.grad(dynamic_sample_attention(*inputs).square().sum(), inputs)
    for one, other in zip(got, wanted, strict=True):
        torch.testing.assert_close(one, other)


def test_export_sees_one_operator() -> None:
    class Module(torch.nn.Module):
        def forward(self, query: Tensor, key: Tensor, value: Tensor, offset: Tensor) -> Tensor:
            return dynamic_sample_attention(query, key, value, offset)

    inputs = tuple(t.float() for t in tensors(1, 2, 2, 4, 3, 4))
    program = torch.export.export(Module(), inputs)
    calls = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert calls == ["ddsm.dynamic_sample_attention.default"]


def test_types_without_a_kernel_take_the_plain_path() -> None:
    inputs = [t.half() for t in tensors(1, 3, 2, 4, 4, 5)]
    result = dynamic_sample_attention(*inputs)
    assert result.dtype == torch.float16
    exact = reference(*(t.double() for t in inputs))
    assert (result.double() - exact).abs().max() <= 2.0**-10 * exact.abs().max()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ((0, (1, 0, 4, 5)), "query"),
        ((0, (2, 4, 5)), "query"),
        ((1, (1, 3, 4, 4)), "key"),
        ((2, (1, 2, 4, 6)), "value"),
        ((2, (1, 0, 4, 5)), "value"),
        ((3, (1, 3, 4, 5)), "offset"),
        ((3, (1, 0, 4, 5)), "0 positions"),
        ((3, (1, 52, 4, 5)), "26 positions"),
    ],
)
def test_shapes_that_do_not_belong_together(change: tuple[int, tuple[int, ...]], says: str) -> None:
    inputs = tensors(1, 2, 2, 4, 4, 5)
    inputs[change[0]] = torch.zeros(change[1], dtype=torch.float64)
    with pytest.raises(InputError, match=says):
        dynamic_sample_attention(*inputs)
