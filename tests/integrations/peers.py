"""What the tests against other trainers share: masks, and the comparison itself."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable, Sequence

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from torch import Tensor

EXAMPLES = settings(max_examples=25, deadline=None, derandomize=True)
MASKS = ("right", "left", "holes", "both sides")
Call = Callable[..., tuple[Tensor, ...]]


def installed(peer: str, *versions: str) -> str:
    """The version of a peer, or a skip where `make test-integrations` has not put it."""
    try:
        version = importlib.metadata.version(peer)
    except importlib.metadata.PackageNotFoundError:
        pytest.skip(
            f"{peer} is not installed here: make test-integrations", allow_module_level=True
        )
    if version not in versions:
        pytest.skip(f"this is {peer} {version}, these tests are for {versions}")
    return version


# ---- inputs -------------------------------------------------------------------------------------


def draw_mask(generator: torch.Generator, rows: int, columns: int, kind: str) -> Tensor:
    """bool `[rows, columns]`, at least two slots true."""
    at = torch.arange(columns)
    first = torch.randint(0, columns, (rows, 1), generator=generator)
    last = torch.randint(0, columns, (rows, 1), generator=generator)
    if kind == "right":
        mask = at <= last
    elif kind == "left":
        mask = at >= first
    elif kind == "both sides":
        mask = (at >= torch.minimum(first, last)) & (at <= torch.maximum(first, last))
    else:
        mask = torch.rand(rows, columns, generator=generator) < 0.6
    mask[0, :2] = True
    return mask


class Batch:
    """Random tensors of one shape, reproducible from its arguments."""

    def __init__(self, seed: int, rows: int, columns: int, kind: str, dtype: torch.dtype) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.shape = (rows, columns)
        self.dtype = dtype
        self.mask = draw_mask(self.generator, rows, columns, kind)

    def __repr__(self) -> str:
        return f"Batch({self.shape}, {self.dtype}, {self.mask.int().tolist()})"

    def floats(self, *tail: int, scale: float = 1.0) -> Tensor:
        return (scale * torch.randn(*self.shape, *tail, generator=self.generator)).to(self.dtype)

    def per_row(self) -> Tensor:
        return torch.randn(self.shape[0], generator=self.generator).to(self.dtype)

    def labels(self, vocab: int) -> Tensor:
        return torch.randint(0, vocab, self.shape, generator=self.generator)


def batches(columns: int = 9) -> st.SearchStrategy[Batch]:
    return st.builds(
        Batch,
        seed=st.integers(0, 2**31),
        rows=st.integers(1, 4),
        columns=st.integers(2, columns),
        kind=st.sampled_from(MASKS),
        dtype=st.sampled_from((torch.float32, torch.bfloat16)),
    )


# ---- the comparison -----------------------------------------------------------------------------


def _outputs_and_gradients(call: Call, tensors: Sequence[Tensor]) -> list[Tensor]:
    leaves = [x.detach().clone().requires_grad_() for x in tensors]
    outputs = [x for x in call(*leaves) if x is not None]
    generator = torch.Generator().manual_seed(0)
    # Numbers of every dtype: the gradient that comes in is the same for all.
    seeds = [torch.randn(x.shape, generator=generator).bfloat16() for x in outputs]
    with_grad = [(x, s) for x, s in zip(outputs, seeds, strict=True) if x.requires_grad]
    results = [x.detach() for x in outputs]
    if with_grad:
        sum((x * s.to(x.dtype)).sum() for x, s in with_grad).backward()
        results += [torch.zeros_like(x) if x.grad is None else x.grad for x in leaves]
    return results


def compare(theirs: Call, ours: Call, *tensors: Tensor, where: Tensor | None = None) -> None:
    """Outputs and gradients: fp32 within 1e-5 of theirs, bf16 no further from fp64 than theirs.

    Args:
        where: bool mask of the slots that are compared, of results of its shape.
    """
    own = _outputs_and_gradients(theirs, tensors)
    mine = _outputs_and_gradients(ours, tensors)
    assert len(own) == len(mine)
    truth = own
    if tensors[0].dtype == torch.bfloat16:
        truth = _outputs_and_gradients(theirs, [x.double() for x in tensors])
    for a, b, exact in zip(own, mine, truth, strict=True):
        assert a.shape == b.shape
        a, b, exact = (x.double() for x in (a, b, exact))
        if where is not None and a.shape == where.shape:
            a, b, exact = a[where], b[where], exact[where]
        if a.numel() == 0:
            continue
        if tensors[0].dtype == torch.float32:
            torch.testing.assert_close(b, a, rtol=1e-5, atol=1e-5)
        else:
            # One rounding to bf16 is half a step, 2^-9 of the number.
            rounding = 2**-9 * float(exact.abs().max()) + 1e-6
            assert float((b - exact).abs().max()) <= float((a - exact).abs().max()) + rounding
