"""The fused kernel of linear_logprobs in Triton's interpreter: fp64, options, shards, bits."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from rlhf_fast_kernels import linear_logprobs, reference, triton_support
from rlhf_fast_kernels.linear_fused import fused_stats
from rlhf_fast_kernels.logit_rows import RowSettings, RowStats, merge_shards, row_stats
from rlhf_fast_kernels.reference.linear import head_logits
from tests.kernels.linear_cases import close, draw, head, leaves

pytestmark = pytest.mark.skipif(
    triton_support.on_triton(torch.device("cpu")) is not None, reason="needs Triton's interpreter"
)
PLAIN = RowSettings(None, 1.0, None)


def exact(
    hidden: Tensor, weight: Tensor, labels: Tensor, settings: RowSettings, bias: Tensor | None
) -> RowStats:
    """The same of all logits in fp64."""
    wide = None if bias is None else bias.double()
    logits = head_logits(hidden.double(), weight.double(), wide, None)
    return row_stats("reference", logits, labels, settings, with_entropy=True)


def agree(got: RowStats, want: RowStats, tolerance: float = 2e-6) -> None:
    for name in RowStats._fields:
        close(getattr(got, name), getattr(want, name), tolerance)


@pytest.mark.parametrize(
    ("tokens", "width", "vocab"),
    [(1, 1, 1), (3, 70, 7), (9, 64, 256), (17, 33, 257), (5, 32, 700)],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_sums_against_fp64(tokens, width, vocab, dtype):
    hidden, weight, labels = head(tokens, width, vocab)
    hidden, weight = hidden.to(dtype), weight.to(dtype)
    labels[0], labels[-1] = 0, vocab - 1
    got = fused_stats(hidden, weight, labels, PLAIN)
    assert got.logprobs.dtype == torch.float32
    assert got.lse.dtype == torch.float64
    agree(got, exact(hidden, weight, labels, PLAIN, None))


@pytest.mark.parametrize("bias_dtype", [None, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "options",
    [
        {"scale": 0.7},
        {"softcap": 3.0, "scale": 1.3},
        {"temperature": torch.tensor([0.5, 0.8, 1.0, 1.3, 2.0, 0.9, 1.1])},
        {"vocab_size": 290, "softcap": 3.0},
    ],
    ids=str,
)
def test_options_against_fp64(options, bias_dtype):
    hidden, weight, labels = head(7, 40, 301)
    bias = None if bias_dtype is None else draw(301, seed=5).to(bias_dtype)
    labels = labels % 290
    labels[1] = labels[6] = -100
    settings = PLAIN._replace(**options)
    got = fused_stats(hidden, weight, labels, settings, bias=bias)
    agree(got, exact(hidden, weight, labels, settings, bias))
    for field in got:
        assert field[1] == field[6] == 0
    plain = fused_stats(hidden, weight, labels, settings, bias=bias, with_entropy=False)
    assert plain.entropy is None
    assert torch.equal(plain.logprobs, got.logprobs)


def test_padding_of_the_vocabulary_is_not_read():
    hidden, weight, labels = head(4, 32, 300)
    settings = PLAIN._replace(vocab_size=260)
    labels = labels % 260
    want = fused_stats(hidden, weight[:260], labels, PLAIN)
    weight[260:] = math.nan
    for a, b in zip(fused_stats(hidden, weight, labels, settings), want, strict=True):
        assert torch.equal(a, b)


def test_rows_are_gathered_and_others_may_hold_nan():
    hidden, weight, labels = head(9, 32, 300)
    rows = torch.tensor([7, 0, 4])
    temperature = torch.tensor([0.5, 1.0, 2.0])
    settings = PLAIN._replace(temperature=temperature)
    want = fused_stats(hidden[rows], weight, labels[rows], settings)
    spoiled = torch.full_like(hidden, math.nan)
    spoiled[rows] = hidden[rows]
    got = fused_stats(spoiled, weight, labels[rows], settings, rows=rows)
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a, b)
    beyond = fused_stats(hidden, weight, labels[:4], PLAIN, rows=torch.tensor([9, 1, -1, 2]))
    for field in beyond:
        assert field.isnan().tolist() == [True, False, True, False]


def test_ignored_rows_may_hold_nan_and_change_nothing():
    hidden, weight, labels = head(20, 32, 300)
    clean = fused_stats(hidden, weight, labels, PLAIN)
    hidden[::3], labels[::3] = math.nan, -100
    got = fused_stats(hidden, weight, labels, PLAIN)
    for a, b in zip(got, clean, strict=True):
        assert bool((a[::3] == 0).all())
        assert torch.equal(a[labels != -100], b[labels != -100])


def test_rows_that_hold_no_distribution_and_labels_that_do_not_exist():
    hidden, weight, labels = head(8, 32, 600)
    bias = draw(600, seed=3)
    hidden[0, 5] = math.nan
    hidden[1, 5] = math.inf
    labels[2], labels[3], labels[4] = 600, -1, 2**40
    got = fused_stats(hidden, weight, labels, PLAIN, bias=bias)
    assert got.logprobs.isnan().tolist() == [True] * 5 + [False] * 3
    assert got.entropy is not None
    assert got.entropy.isnan().tolist() == [True] * 2 + [False] * 6
    bias[:512] = -math.inf  # two splits without an entry above -inf
    labels[5], labels[6], labels[7] = 3, 512, 599
    got = fused_stats(hidden, weight, labels, PLAIN, bias=bias)
    assert float(got.logprobs[5]) == -math.inf
    tail = fused_stats(hidden[6:], weight[512:], labels[6:] - 512, PLAIN, bias=bias[512:])
    for a, b in zip(got, tail, strict=True):
        close(a[6:], b, 1e-6)
    nothing = fused_stats(hidden, weight, labels, PLAIN, bias=torch.full((600,), -math.inf))
    assert nothing.logprobs.isnan().all()
    assert nothing.entropy.isnan().all()
    assert nothing.lse[5:].tolist() == [-math.inf] * 3


@pytest.mark.parametrize("level", [-200.0, 200.0])
def test_levels_far_from_zero_and_peaked_rows(level):
    hidden, weight, labels = head(6, 32, 400)
    bias = draw(400, seed=4) + level
    bias[300] += 60.0
    labels[0] = 300
    got = fused_stats(hidden, weight, labels, PLAIN, bias=bias)
    # The logits themselves are of this size in fp32.
    agree(got, exact(hidden, weight, labels, PLAIN, bias), 2e-7 * 260)


@pytest.mark.parametrize("cut", [0, 100, 256, 290])
def test_shards_merge_to_the_whole(cut):
    hidden, weight, labels = head(7, 32, 301)
    labels = labels % 290
    labels[3] = -100
    settings = PLAIN._replace(vocab_size=290, softcap=5.0, scale=0.8)
    parts = []
    for start, stop in ((0, cut), (cut, 301)):
        own = settings._replace(vocab_start=start)
        piece = weight[start:stop]
        parts.append(fused_stats(hidden, piece, labels, own, shard=True))
    agree(merge_shards(parts, labels, settings), exact(hidden, weight, labels, settings, None))


def test_bits_do_not_depend_on_the_rows_beside():
    hidden, weight, labels = head(40, 40, 600)
    together = fused_stats(hidden, weight, labels, PLAIN)
    again = fused_stats(hidden, weight, labels, PLAIN)
    for a, b in zip(together, again, strict=True):
        assert torch.equal(a, b)
    for rows in (slice(0, 1), slice(17, 18), slice(5, 38)):
        alone = fused_stats(hidden[rows], weight, labels[rows], PLAIN)
        for a, b in zip(together, alone, strict=True):
            assert torch.equal(a[rows], b)


def test_strided_expanded_and_misaligned_operands():
    hidden, weight, labels = head(5, 32, 300)
    want = fused_stats(hidden, weight, labels, PLAIN)
    shifted = torch.empty(5 * 33 + 1)[1:].view(5, 33)[:, :32].copy_(hidden)
    for x, w in (
        (hidden.t().contiguous().t(), weight),
        (hidden, torch.cat([weight, weight], 1)[:, :32]),
        (shifted, weight),
    ):
        for a, b in zip(fused_stats(x, w, labels, PLAIN), want, strict=True):
            assert torch.equal(a, b)
    same = fused_stats(hidden[:1].expand(5, 32), weight, labels[:1].expand(5), PLAIN)
    for a, b in zip(same, want, strict=True):
        assert torch.equal(a, b[:1].expand(5))


def test_no_row_and_no_width():
    hidden, weight, labels = head(4, 32, 30)
    for field in fused_stats(hidden[:0], weight, labels[:0], PLAIN):
        assert field.shape == (0,)
    bias = draw(30, seed=2)
    got = fused_stats(hidden[:, :0], weight[:, :0], labels, PLAIN, bias=bias)
    close(got.lse, bias.double().logsumexp(0).expand(4), 1e-6)


def test_row_blocks_are_visited_once_in_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    kernels = triton_support.kernels("linear_logprobs")
    hidden, weight, labels = head(70, 16, 600)
    want = fused_stats(hidden, weight, labels, PLAIN)
    for blocks in (1, 2, 3):  # 5 blocks: groups that are full, and a last one that is not
        monkeypatch.setattr(kernels, "GROUP_BLOCKS", blocks)
        for a, b in zip(fused_stats(hidden, weight, labels, PLAIN), want, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"weight": draw(30, 16).bfloat16()}, TypeError, "one dtype"),
        ({"weight": draw(30, 15)}, ValueError, r"\(30, 15\)"),
        ({"labels": torch.zeros(3, dtype=torch.int64)}, ValueError, r"\(3,\) for \(4,\)"),
        ({"rows": torch.zeros(3, dtype=torch.int64)}, ValueError, "label a row of rows"),
        ({"bias": draw(29)}, ValueError, r"expected \(30,\)"),
    ],
)
def test_bad_arguments_are_named(
    change: dict[str, Any], error: type[Exception], words: str
) -> None:
    hidden, weight, labels = head(4, 16, 30)
    given: dict[str, Any] = {"hidden": hidden, "weight": weight, "labels": labels} | change
    with pytest.raises(error, match=words):
        fused_stats(settings=PLAIN, **given)


# ---- the public function ------------------------------------------------------------------------


@pytest.mark.parametrize("compute", [None, torch.bfloat16])
def test_public_function_with_a_chunked_backward(compute):
    hidden, weight, labels = head(9, 24, 301)
    labels[2] = labels[7] = -100
    hidden[2] = math.nan
    bias = draw(301, seed=5)
    options: dict[str, Any] = {"temperature": 0.8, "softcap": 5.0, "compute_dtype": compute}
    own, exact_leaves = leaves(hidden, weight, bias), leaves(hidden, weight, bias)
    got = linear_logprobs(*own[:2], labels, bias=own[2], fused=True, impl="triton", **options)
    rounded = [x if compute is None else x.to(compute) for x in exact_leaves[:2]]
    wide = [x.double() for x in rounded]
    del options["compute_dtype"]
    want = reference.linear_logprobs(*wide, labels, bias=exact_leaves[2].double(), **options)
    for ours, true in zip(got, want, strict=True):
        close(ours, true, 2e-6)
    for values in (got, want):
        (values[0] + 0.5 * values[1]).sum().backward()
    for ours, true in zip(own, exact_leaves, strict=True):
        close(ours.grad, true.grad, 2e-2 if compute else 1e-5)
    assert bool((own[0].grad[[2, 7]] == 0).all())


def test_public_function_compiled():
    hidden, weight, labels = head(5, 16, 40)
    options: dict[str, Any] = {"fused": True, "impl": "triton"}

    def run(function):
        own = leaves(hidden, weight)
        logprobs, entropy = function(*own, labels, **options)
        (logprobs + entropy).sum().backward()
        return logprobs, entropy, own[0].grad, own[1].grad

    compiled = torch.compile(linear_logprobs, fullgraph=True, dynamic=True, backend="aot_eager")
    for a, b in zip(run(compiled), run(linear_logprobs), strict=True):
        close(a, b, 1e-6)


def test_where_the_kernel_cannot_run_the_reason_is_named():
    hidden, weight, labels = head(4, 16, 30)
    with pytest.raises(ValueError, match=r"fused=True is a Triton kernel.*'reference'"):
        linear_logprobs(hidden, weight, labels, fused=True, impl="reference")
    options: dict[str, Any] = {"compute_dtype": torch.float64, "impl": "triton"}
    with pytest.raises(RuntimeError, match=r"not torch\.float64"):
        linear_logprobs(hidden, weight, labels, fused=True, **options)
