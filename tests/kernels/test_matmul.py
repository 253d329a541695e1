"""Products of fp32 matrices: as exact as PyTorch's, whatever lies beside a row."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from rlhf_fast_kernels.matmul import linear, matmul, tiles

tiles_only = pytest.mark.skipif(not tiles(), reason="no tile unit here: the product is PyTorch's")
SHAPES = [(1, 1, 1), (16, 32, 16), (33, 7, 17), (64, 128, 384), (45, 700, 130), (70, 300, 1100)]
LAYOUTS = ["nn", "nt", "tn", "tt"]


def draw(rows: int, columns: int, layout: str, seed: int, *, positive: bool = False) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    shape = (columns, rows) if layout == "t" else (rows, columns)
    make = torch.rand if positive else torch.randn
    x = make(shape, generator=generator)
    return x.t() if layout == "t" else x


def operands(
    shape: tuple[int, int, int], layout: str, *, positive: bool = False
) -> tuple[Tensor, Tensor]:
    rows, inner, columns = shape
    a = draw(rows, inner, layout[0], 1, positive=positive)
    return a, draw(inner, columns, layout[1], 2, positive=positive)


def error(found: Tensor, truth: Tensor, scale: Tensor) -> float:
    return float(((found.double() - truth).abs() / scale).max())


@pytest.mark.parametrize("positive", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES)
def test_as_close_to_fp64_as_pytorch(
    shape: tuple[int, int, int], layout: str, positive: bool
) -> None:
    a, b = operands(shape, layout, positive=positive)
    truth, scale = a.double() @ b.double(), a.double().abs() @ b.double().abs()
    allowed = error(a @ b, truth, scale) + 2.0**-22
    assert error(matmul(a, b), truth, scale) <= allowed


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(33, 7, 17), (45, 700, 130), (600, 40, 20)])
def test_what_is_added_and_where_it_is_written(shape: tuple[int, int, int], layout: str) -> None:
    a, b = operands(shape, layout)
    rows, _, columns = shape
    added, bias = torch.randn(rows, columns + 3)[:, :columns], torch.randn(columns)
    for add in (added, bias):
        truth = (a.double() @ b.double() + add.double()).float()
        torch.testing.assert_close(matmul(a, b, add), truth, rtol=1e-5, atol=1e-4)
        wide = torch.full((rows, columns + 5), 7.0)
        out = wide[:, 2 : 2 + columns]
        assert matmul(a, b, add, out=out) is out
        torch.testing.assert_close(out, truth, rtol=1e-5, atol=1e-4)
        assert (wide[:, :2] == 7).all()
        assert (wide[:, 2 + columns :] == 7).all()
    total = added.clone()
    matmul(a, b, total, out=total)
    torch.testing.assert_close(total, matmul(a, b, added), rtol=1e-5, atol=1e-4)


@tiles_only
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_row_does_not_depend_on_the_rows_beside_it(layout: str) -> None:
    a, b = operands((200, 300, 90), layout)
    whole = matmul(a, b)
    for rows in (1, 5, 16, 33, 100):
        assert torch.equal(matmul(a[:rows], b), whole[:rows])
    for columns in (1, 17, 64):
        assert torch.equal(matmul(a, b[:, :columns]), whole[:, :columns])


@tiles_only
@pytest.mark.parametrize("layout", LAYOUTS)
def test_threads_change_no_bit(layout: str) -> None:
    a, b = operands((150, 300, 700), layout)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = matmul(a, b)
        torch.set_num_threads(3)
        assert torch.equal(matmul(a, b), alone)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_stays_in_its_row_or_column(value: float, layout: str) -> None:
    a, b = operands((70, 300, 80), layout)
    add = torch.randn(70, 80)
    clean = matmul(a, b, add)
    a, b = a.clone(), b.clone()
    a[40, 3], b[290, 7] = value, value
    found, expected = matmul(a, b, add), torch.addmm(add, a, b)
    special = torch.zeros(70, 80, dtype=torch.bool)
    special[40], special[:, 7] = True, True
    torch.testing.assert_close(found[special], expected[special], equal_nan=True)
    assert not torch.isfinite(found[40]).any()
    assert not torch.isfinite(found[:, 7]).any()
    if tiles():
        assert torch.equal(found[~special], clean[~special])


def test_large_and_small_numbers() -> None:
    for exponent in (1e30, 1e-30):
        a, b = operands((20, 50, 20), "nt")
        a = a * exponent
        truth, scale = a.double() @ b.double(), a.double().abs() @ b.double().abs()
        assert error(matmul(a, b), truth, scale) <= 1e-6
    # Subnormal numbers may count as zero.
    tiny = matmul(torch.full((16, 32), 1e-42), torch.ones(32, 16))
    assert (tiny >= 0).all()
    assert (tiny < 1e-40).all()
    # The nearest number of bf16 to the largest of fp32 is infinite.
    largest = torch.finfo(torch.float32).max
    assert (matmul(torch.full((16, 1), largest), torch.ones(1, 16)) == largest).all()


def test_no_inner_dimension_leaves_what_is_added() -> None:
    add = torch.randn(5, 4)
    assert torch.equal(matmul(torch.empty(5, 0), torch.empty(0, 4), add), add)
    assert not matmul(torch.empty(5, 0), torch.empty(0, 4)).any()
    assert matmul(torch.empty(0, 3), torch.empty(3, 4)).shape == (0, 4)


def test_other_tensors_go_to_pytorch() -> None:
    for dtype in (torch.float64, torch.bfloat16):
        a, b = torch.randn(20, 30, dtype=dtype), torch.randn(30, 40, dtype=dtype)
        assert torch.equal(matmul(a, b), a @ b)
    a, b = torch.randn(20, 60)[:, ::2], torch.randn(30, 40)
    torch.testing.assert_close(matmul(a, b), a @ b)


def test_shapes_that_do_not_fit() -> None:
    with pytest.raises(RuntimeError):
        matmul(torch.zeros(20, 30), torch.zeros(31, 20))
    with pytest.raises(RuntimeError):
        matmul(torch.zeros(20, 30), torch.zeros(30, 20), torch.zeros(3, 20))


@pytest.mark.parametrize("wrong", ["neg", "grad", "overlapping out"])
def test_what_has_no_plain_memory_goes_to_pytorch(wrong: str) -> None:
    a, b = torch.randn(20, 30), torch.randn(30, 40)
    if wrong == "neg":
        torch.testing.assert_close(matmul(torch._neg_view(a), b), -a @ b)
    elif wrong == "grad":
        matmul(a.requires_grad_(), b).sum().backward()
        torch.testing.assert_close(a.grad, b.sum(1).expand(20, 30))
    else:
        with pytest.raises(RuntimeError):
            matmul(a, b, out=torch.zeros(1, 40).expand(20, 40))


@pytest.mark.parametrize("bias", [False, True])
def test_a_linear_layer_and_its_gradients(bias: bool) -> None:
    x, weight = torch.randn(2, 9, 30), torch.randn(40, 30)
    given = [x, weight, torch.randn(40)] if bias else [x, weight]
    ours = [t.clone().requires_grad_() for t in given]
    exact = [t.double().requires_grad_() for t in given]
    out, truth = linear(*ours), torch.nn.functional.linear(*exact)
    torch.testing.assert_close(out.double(), truth, rtol=1e-5, atol=1e-5)
    out.cos().sum().backward()
    truth.cos().sum().backward()
    for mine, theirs in zip(ours, exact, strict=True):
        torch.testing.assert_close(mine.grad.double(), theirs.grad, rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        assert torch.equal(linear(*ours), out)


def test_a_frozen_weight_keeps_no_input() -> None:
    kept: list[Tensor] = []

    def pack(x: Tensor) -> Tensor:
        kept.append(x)
        return x

    x, weight = torch.randn(3, 4).requires_grad_(), torch.randn(5, 4)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        out = linear(x, weight)
    assert kept
    assert all(t.shape != x.shape for t in kept)
    out.sum().backward()
    torch.testing.assert_close(x.grad, weight.sum(0).expand(3, 4))


def test_gradients_of_the_gradients_of_a_linear_layer() -> None:
    x, weight = (torch.randn(4, 4).requires_grad_() for _ in range(2))
    (first,) = torch.autograd.grad(linear(x, weight).pow(2).sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), weight)
    (want,) = torch.autograd.grad(
        torch.autograd.grad((x @ weight.t()).pow(2).sum(), x, create_graph=True)[0].sum(), weight
    )
    torch.testing.assert_close(second, want, rtol=1e-4, atol=1e-4)
