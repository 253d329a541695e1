"""Attention in packed segments: values and gradients, what must not be read, bits, errors."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from rlhf_fast_kernels import native, packed_attention
from tests.kernels.packed_cases import Batch, assert_as_good, draw, ours
from tests.kernels.paged_cases import needs_triton

# The interpreter computes in numpy, which warns where a processor does not.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
needs_cpu = pytest.mark.skipif(
    native.missing("packed_attention") is not None, reason="no compiled module"
)
EVERY = (
    "reference",
    pytest.param("cpu", marks=needs_cpu),
    pytest.param("triton", marks=needs_triton),
)
ROOT = Path(__file__).resolve().parents[2]
RAGGED = (5, 0, 35, 1, 64, 67, 0)
FEW = (5, 0, 35, 1)  # for the interpreter, which takes some 20 ms a program


def lengths_for(impl: str, lengths: tuple[int, ...]) -> tuple[int, ...]:
    return FEW if impl == "triton" else lengths


@pytest.mark.parametrize("impl", EVERY)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", ["fused", "heads"])
def test_ragged_segments(impl: str, dtype: torch.dtype, layout: str) -> None:
    if impl == "triton" and dtype == torch.bfloat16:
        pytest.skip("the interpreter truncates fp32 to bf16; no device does")
    assert_as_good(draw(lengths_for(impl, RAGGED), (2, 1), 24, dtype, layout), impl)


@pytest.mark.parametrize("impl", EVERY)
@pytest.mark.parametrize(
    ("heads", "width"), [((2, 2), 8), ((6, 1), 17), ((2, 1), 80), ((1, 1), 256)]
)
def test_heads_and_widths(impl: str, heads: tuple[int, int], width: int) -> None:
    assert_as_good(draw(lengths_for(impl, (33, 70))[-2:], heads, width), impl)


@pytest.mark.parametrize("impl", EVERY)
@pytest.mark.parametrize("window", [2, 3, 20, 64, 90, 1000])
def test_window_and_scale(impl: str, window: int) -> None:
    if impl == "triton" and window in (2, 64, 90):
        pytest.skip("the interpreter is slow: others of the kind serve")
    lengths = lengths_for(impl, (30, 150))
    assert_as_good(draw(lengths, (1, 1), 16), impl, window=window, scale=0.7)


@pytest.mark.parametrize("impl", EVERY)
def test_a_window_of_one_token(impl: str) -> None:
    batch = draw([30, 3])
    out, _, _, grad_v, _ = ours(batch, impl, window=1)
    assert torch.equal(out, batch.v.repeat_interleave(2, 1))
    torch.testing.assert_close(grad_v, batch.above.unflatten(1, (2, 2)).sum(2))


@pytest.mark.parametrize("impl", EVERY)
def test_empty_batches(impl: str) -> None:
    for lengths in ((), (0,), (0, 0)):
        out, *grads, lse = ours(draw(lengths), impl)
        assert out.shape == (0, 4, 24)
        assert lse.shape == (0, 4)
        assert [len(x) for x in grads] == [0, 0, 0]


@pytest.mark.parametrize("impl", EVERY)
@pytest.mark.parametrize("window", [None, 7])
def test_nan_stays_in_its_segment(impl: str, window: int | None) -> None:
    batch = draw([6, 20, 9], (1, 1))
    want = ours(batch, impl, window=window)
    for x in (batch.q, batch.k, batch.v, batch.above):
        x[6:26] = torch.nan
    for got, kept in zip(ours(batch, impl, window=window), want, strict=True):
        assert torch.equal(got[:6], kept[:6])
        assert torch.equal(got[26:], kept[26:])
        assert got[6:26].isnan().all()


@pytest.mark.parametrize("impl", EVERY[1:])
@pytest.mark.parametrize("window", [None, 20])
def test_bits_do_not_depend_on_the_neighbours(impl: str, window: int | None) -> None:
    lengths = lengths_for(impl, (5, 130, 64))
    batch = draw(lengths, (2, 1), 16)
    whole = ours(batch, impl, window=window)
    start = 0
    for length in lengths:
        here = slice(start, start + length)
        offsets = torch.tensor([0, length], dtype=torch.int32)
        part = Batch(batch.q[here], batch.k[here], batch.v[here], offsets, batch.above[here])
        alone = ours(part, impl, window=window)
        assert all(torch.equal(x, y[here]) for x, y in zip(alone, whole, strict=True))
        start += length


@needs_cpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("window", [None, 100])
def test_bits_do_not_depend_on_threads(dtype: torch.dtype, window: int | None) -> None:
    # With threads the long segment's gradients are computed tile by tile, alone in one go.
    batch = draw([700, 3, 40], (4, 2), 40, dtype)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = ours(batch, "cpu", window=window)
        torch.set_num_threads(4)
        four = ours(batch, "cpu", window=window)
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(x, y) for x, y in zip(one, four, strict=True))
    assert_as_good(batch, "cpu", window=window)


@needs_cpu
@settings(max_examples=40, deadline=None)
@given(st.data())
def test_any_shape(data: st.DataObject) -> None:
    kv_heads, group = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 4))
    batch = draw(
        data.draw(st.lists(st.integers(0, 140), min_size=1, max_size=4)),
        (kv_heads * group, kv_heads),
        data.draw(st.integers(1, 70)),
        data.draw(st.sampled_from([torch.float32, torch.bfloat16])),
        data.draw(st.sampled_from(["fused", "heads"])),
        data.draw(st.integers(0, 9)),
    )
    assert_as_good(batch, "cpu", window=data.draw(st.one_of(st.none(), st.integers(1, 150))))


EVERY_ISA = """
import torch
from tests.kernels.packed_cases import assert_as_good, draw
for dtype in (torch.float32, torch.bfloat16):
    for window in (None, 1, 5, 70):
        assert_as_good(draw((3, 0, 70, 13), (2, 1), 21, dtype), "cpu", window=window)
"""


@needs_cpu
@pytest.mark.parametrize("isa", ["baseline", "avx2"])
def test_other_instruction_sets(isa: str) -> None:
    """A vector of 4 or 8 lanes meets strips of 8 rows in another way than one of 16."""
    folders = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    done = subprocess.run(
        [sys.executable, "-c", EVERY_ISA],
        env={**os.environ, "RLHF_FAST_ISA": isa, "PYTHONPATH": folders},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


@needs_cpu
def test_large_scores_and_far_keys() -> None:
    batch = draw([90], (1, 1), 16)
    q, k = 30 * batch.q, 30 * batch.k
    got = ours(Batch(q, k, batch.v, batch.offsets, batch.above), "cpu")
    exact = functional.scaled_dot_product_attention(
        *(x.double().transpose(0, 1) for x in (q, k, batch.v)), is_causal=True
    )
    torch.testing.assert_close(got[0].double(), exact.transpose(0, 1), rtol=1e-3, atol=1e-3)
    assert all(x.isfinite().all() for x in got)


@pytest.mark.parametrize("impl", EVERY)
def test_gradients_that_are_views(impl: str) -> None:
    batch = draw([20, 3])
    q = batch.q.detach().requires_grad_()
    out, _ = packed_attention(q, batch.k, batch.v, batch.offsets, impl=impl)
    (summed,) = torch.autograd.grad(out.sum(), q, retain_graph=True)  # expanded from one number
    (dense,) = torch.autograd.grad(out, q, torch.ones_like(out))
    assert torch.equal(summed, dense)


def test_reference_against_autograd() -> None:
    batch = draw([4, 0, 7], (2, 1), 3, torch.float64)
    inputs = [x.clone().requires_grad_() for x in (batch.q, batch.k, batch.v)]
    assert torch.autograd.gradcheck(
        lambda *x: packed_attention(*x, batch.offsets, window=4)[0], inputs, fast_mode=True
    )


def test_a_second_derivative_is_refused() -> None:
    batch = draw([9])
    q = batch.q.detach().requires_grad_()
    out, lse = packed_attention(q, batch.k, batch.v, batch.offsets)
    assert not lse.requires_grad
    with pytest.raises(RuntimeError, match="packed_attention: gradients of its gradients"):
        torch.autograd.grad(out.sum(), q, create_graph=True)


def test_registered_op() -> None:
    batch = draw([9, 0, 30])
    q, k, v = (x.detach().requires_grad_() for x in (batch.q, batch.k, batch.v))
    arguments = (q, k, v, batch.offsets, 0.2, 10, 30, "auto")
    torch.library.opcheck(torch.ops.rlhf_fast.packed_attention, arguments)


def test_under_compile() -> None:
    batch = draw([9, 0, 30])

    def loss(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return packed_attention(2 * q, k, v, batch.offsets)[0].square().sum()

    inputs = [x.detach().requires_grad_() for x in (batch.q, batch.k, batch.v)]
    want = torch.autograd.grad(loss(*inputs), inputs)
    for dynamic in (None, True):
        compiled = torch.compile(loss, fullgraph=True, backend="aot_eager", dynamic=dynamic)
        got = torch.autograd.grad(compiled(*inputs), inputs)
        for x, y in zip(got, want, strict=True):
            torch.testing.assert_close(x, y)


def _arguments(**changes: Any) -> dict[str, Any]:
    batch = draw([3, 4])
    named = {"q": batch.q, "k": batch.k, "v": batch.v, "cu_seqlens": batch.offsets}
    return named | changes


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"q": torch.zeros(7, 96)}, ValueError, r"q is \[7, 96\]; expected \[N, heads, D\]"),
        ({"q": torch.zeros(7, 5, 24)}, ValueError, "q has 5 heads, k 2; expected a multiple"),
        ({"q": torch.zeros(7, 4, 300)}, ValueError, r"expected D in \[1, 256\]"),
        ({"q": torch.zeros(7, 4, 48)[..., ::2]}, ValueError, "a contiguous last dim"),
        ({"k": torch.zeros(7, 2, 24).bfloat16()}, TypeError, "expected torch.float32, as q"),
        ({"v": torch.zeros(6, 2, 24)}, ValueError, r"v \[6, 2, 24\]"),
        ({"k": torch.zeros(7, 2, 16)}, ValueError, "k is"),
        ({"cu_seqlens": torch.tensor([0, 3, 7])}, TypeError, "expected torch.int32"),
        ({"cu_seqlens": torch.tensor([], dtype=torch.int32)}, ValueError, r"expected \[K \+ 1\]"),
        ({"cu_seqlens": torch.tensor([0, 9, 7]).int()}, ValueError, "rise from 0 to 7"),
        ({"cu_seqlens": torch.tensor([0, 3, 6]).int()}, ValueError, "rise from 0 to 7"),
        ({"cu_seqlens": torch.tensor([1, 3, 7]).int()}, ValueError, "rise from 0 to 7"),
        ({"scale": float("nan")}, ValueError, "scale is nan"),
        ({"window": 0}, ValueError, "window is 0"),
    ],
)
def test_bad_arguments(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"packed_attention: .*{message}"):
        packed_attention(**_arguments(**changes))
