"""Options of logprobs_from_logits: softcap, rows, vocab_size, shards, lse, large offsets."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from rlhf_fast.distributed.world import World
from rlhf_fast_kernels import logprobs_from_logits
from rlhf_fast_kernels.logit_rows import RowSettings, row_gradient, row_stats
from tests.distributed.ranks import on_ranks
from tests.kernels.logprob_cases import (
    DTYPES,
    FAST,
    IMPLS,
    draw,
    draw_labels,
    gradient,
    truth,
    worst,
)

FUSED = [impl for impl in IMPLS if impl != "reference"]


def capped(logits: torch.Tensor, softcap: float) -> torch.Tensor:
    return softcap * torch.tanh(logits / softcap)


# ---- softcap, vocab_size, lse -------------------------------------------------------------------


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [0.3, 20.0, 300.0])
def test_softcap_is_no_less_exact_than_eager(scale: float, dtype: torch.dtype, impl: str) -> None:
    logits, labels = draw((4, 1000), scale=scale).to(dtype), draw_labels((4,), 1000)
    g, h = draw((2, 4), seed=2)
    exact = logits.double().requires_grad_()
    want = truth(capped(exact, 30.0), labels, temperature=0.8)
    (want_grad,) = torch.autograd.grad(want, exact, [g.double(), h.double()])
    theirs = logprobs_from_logits(
        capped(logits.float(), 30.0), labels, temperature=0.8, impl="reference"
    )
    got = logprobs_from_logits(logits, labels, softcap=30.0, temperature=0.8, impl=impl)
    for ours, true, eager in zip(got, want, theirs, strict=True):
        assert ours is not None
        assert eager is not None
        assert worst(ours, true) <= worst(eager, true) + 4e-6
    grad = gradient(
        lambda x: logprobs_from_logits(x, labels, softcap=30.0, temperature=0.8, impl=impl),
        logits,
        g,
        h,
    )
    # Where tanh is near 1, fp32 has few digits of 1 - tanh^2.
    size = float(want_grad.abs().max())
    assert worst(grad, want_grad) <= 3e-6 + (1e-5 + torch.finfo(dtype).eps) * size


@pytest.mark.parametrize("impl", IMPLS)
def test_softcap_bounds_infinite_logits(impl: str) -> None:
    """By its definition an entry at -inf is then at -softcap; NaN stays NaN."""
    logits = draw((3, 300))
    logits[0, 7] = -torch.inf
    logits[1, 7] = torch.inf
    finite = torch.where(logits.isinf(), logits.sign() * 1e6, logits)
    logits[2, 7] = torch.nan
    labels = torch.tensor([7, 7, 0])
    got = logprobs_from_logits(logits, labels, softcap=5.0, impl=impl)
    want = truth(capped(finite.double(), 5.0), labels)
    for ours, true in zip(got, want, strict=True):
        assert ours is not None
        assert worst(ours[:2], true[:2]) < 3e-6
        assert bool(ours[2].isnan())


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("softcap", [None, 5.0])
def test_columns_beyond_the_vocabulary_do_not_count(softcap: float | None, impl: str) -> None:
    """The padding of an embedding: not a logit of 0, as in verl#2656, and never read."""
    logits, labels = draw((3, 320)) - 50.0, draw_labels((3,), 300)
    logits[:, 300:] = torch.nan
    g, h = draw((2, 3), seed=3)

    def run(x: torch.Tensor, **options: Any) -> Any:
        return logprobs_from_logits(x, labels, softcap=softcap, impl=impl, **options)

    for ours, want in zip(run(logits, vocab_size=300), run(logits[:, :300]), strict=True):
        assert torch.equal(ours, want)
    grad = gradient(lambda x: run(x, vocab_size=300), logits, g, h)
    assert bool((grad[:, 300:] == 0).all())
    assert torch.equal(grad[:, :300], gradient(run, logits[:, :300].contiguous(), g, h))
    with pytest.raises(ValueError, match=r"label 310 at row \(1,\) is neither in \[0, 300\)"):
        logprobs_from_logits(
            logits, torch.tensor([0, 310, 1]), vocab_size=300, impl=impl, softcap=softcap
        )


@pytest.mark.parametrize("impl", IMPLS)
def test_lse_is_returned_without_gradient(impl: str) -> None:
    logits, labels = draw((3, 300)).requires_grad_(), torch.tensor([5, -100, 7])
    for with_entropy in (True, False):
        logprobs, entropy, lse = logprobs_from_logits(
            logits,
            labels,
            temperature=0.5,
            with_entropy=with_entropy,
            with_lse=True,
            impl=impl,
        )
        assert (entropy is not None) == with_entropy
        assert lse.dtype == logprobs.dtype == torch.float32
        assert not lse.requires_grad
        want = torch.where(labels < 0, 0, torch.logsumexp(logits.double() / 0.5, -1))
        assert worst(lse, want) < 2e-6


# ---- rows ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("index", [torch.int64, torch.int32])
def test_only_the_named_rows_are_read(index: torch.dtype, impl: str) -> None:
    base = draw((3, 5, 301))
    logits = base[:, :-1]
    rows = torch.tensor([10, 0, 7], dtype=index)
    labels, temperature = torch.tensor([300, -100, 2]), torch.tensor([0.5, 1.0, 2.0])
    picked = logits.reshape(-1, 301)[rows]
    flat = torch.full((12, 301), torch.nan)
    flat[rows] = picked
    logits = torch.cat([flat.view(3, 4, 301), base[:, -1:]], dim=1)[:, :-1]
    g, h = draw((2, 3), seed=3)

    def run(x: torch.Tensor, **options: Any) -> Any:
        return logprobs_from_logits(x, labels, temperature=temperature, impl=impl, **options)

    for ours, want in zip(run(logits, rows=rows), run(picked), strict=True):
        assert torch.equal(ours, want)
    grad = gradient(lambda x: run(x, rows=rows), logits, g, h).reshape(-1, 301)
    assert torch.equal(grad[rows], gradient(run, picked, g, h))
    others = torch.ones(12, dtype=torch.bool)
    others[rows] = False
    assert bool((grad[others] == 0).all())


@pytest.mark.parametrize("impl", IMPLS)
def test_no_rows_at_all(impl: str) -> None:
    logits = torch.full((3, 11), torch.nan, requires_grad=True)
    nothing = torch.empty(0, dtype=torch.int64)
    logprobs, entropy = logprobs_from_logits(logits, nothing, rows=nothing, impl=impl)
    assert entropy is not None
    assert logprobs.shape == entropy.shape == (0,)
    (logprobs.sum() + entropy.sum()).backward()
    assert logits.grad is not None
    assert bool((logits.grad == 0).all())


@pytest.mark.parametrize("impl", FUSED)
def test_rows_with_the_gradient_in_place(impl: str) -> None:
    logits, rows, labels = draw((4, 50)), torch.tensor([3, 1]), torch.tensor([7, 8])
    leaf = logits.clone().requires_grad_()
    inner = leaf * 1.0
    results = []
    for x, in_place in ((leaf, False), (inner, True)):
        logprobs, _ = logprobs_from_logits(
            x, labels, rows=rows, inplace_backward=in_place, impl=impl
        )
        results.append(torch.autograd.grad(logprobs.sum(), x)[0])
    assert torch.equal(*results)
    assert results[1].data_ptr() == inner.data_ptr()


def test_bad_options_are_named() -> None:
    logits, labels, two = draw((2, 3, 5)), draw_labels((2, 3), 5), torch.tensor([1, 2])
    bad: list[tuple[str, type[Exception], dict[str, Any]]] = [
        ("softcap must be None or positive", ValueError, {"softcap": 0.0}),
        ("vocab_size must be between 1 and", ValueError, {"vocab_size": 6}),
        ("vocab_start is for a shard", ValueError, {"vocab_start": 5}),
        ("vocab_start needs vocab_size", ValueError, {"vocab_start": 5, "group": object()}),
        (r"labels must be \[M\] too", ValueError, {"rows": two}),
    ]
    for message, kind, options in bad:
        with pytest.raises(kind, match=message):
            logprobs_from_logits(logits, labels, **options)
    for message, error, rows in (
        (r"rows\[1\] = 6 is not in \[0, 6\)", ValueError, torch.tensor([0, 6])),
        (r"rows\[0\] = -1 is not", ValueError, torch.tensor([-1, 0])),
        ("rows holds 4 2 times", ValueError, torch.tensor([4, 4])),
        ("rows must be int64 or int32", TypeError, torch.tensor([0.0, 1.0])),
    ):
        with pytest.raises(error, match=message):
            logprobs_from_logits(logits, two, rows=rows)


# ---- sizes and offsets --------------------------------------------------------------------------


@pytest.mark.parametrize("vocab", [1, 7, 300, 32003, 50257, 128256, 151935, 151936, 151937])
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_vocabulary_size(vocab: int, dtype: torch.dtype) -> None:
    logits, labels = draw((3, vocab)).to(dtype), torch.tensor([0, vocab // 2, vocab - 1])
    logits[1] -= 200.0
    g, h = draw((2, 3), seed=5)
    exact = logits.double().requires_grad_()
    want = truth(exact, labels)
    (want_grad,) = torch.autograd.grad(want, exact, [g.double(), h.double()])
    leaf = logits.clone().requires_grad_()
    got = logprobs_from_logits(leaf, labels, impl=FAST)
    for ours, true in zip(got, want, strict=True):
        assert ours is not None
        assert worst(ours, true) < 5e-6
    (grad,) = torch.autograd.grad(got, leaf, [g, h])  # type: ignore[arg-type]
    assert worst(grad, want_grad) < 2e-6 + torch.finfo(dtype).eps * float(want_grad.abs().max())


@pytest.mark.parametrize("impl", FUSED)
def test_offsets_beyond_31_bits(impl: str) -> None:
    """4.3 GB of which only two rows are ever touched, and so exist."""
    vocab, count = 151936, 14140
    large = torch.empty(count, vocab, dtype=torch.bfloat16)
    assert (count - 2) * vocab > 2**31
    few = draw((2, vocab)).bfloat16()
    large[-2:] = few
    labels = torch.tensor([151935, 3])
    rows = torch.tensor([count - 2, count - 1])
    want = logprobs_from_logits(few, labels, impl=impl)
    got = logprobs_from_logits(large, labels, rows=rows, impl=impl)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))  # type: ignore[arg-type]
    # Backward over a view of the first and the last row, in place.
    large[0], large[-1] = few[0], few[1]
    settings = RowSettings(None, 1.0, None)
    apart, ones = large[:: count - 1], torch.ones(2)
    grads = []
    for logits in (few, apart):
        stats = row_stats(impl, logits, labels, settings, with_entropy=True)
        out = torch.empty_like(few) if logits is few else logits
        row_gradient(impl, logits, labels, settings, stats, ones, ones, out)
        grads.append(out)
    assert torch.equal(*grads)


@pytest.mark.parametrize("impl", FUSED)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_has_the_same_bits_alone(dtype: torch.dtype, impl: str) -> None:
    logits, labels = draw((4, 20001)).to(dtype), draw_labels((4,), 20001)
    g, h = draw((2, 4), seed=8)

    def run(keep: slice) -> tuple[torch.Tensor, ...]:
        leaf = logits[keep].clone().requires_grad_()
        logprobs, entropy = logprobs_from_logits(leaf, labels[keep], softcap=9.0, impl=impl)
        assert entropy is not None
        (grad,) = torch.autograd.grad([logprobs, entropy], leaf, [g[keep], h[keep]])
        return logprobs, entropy, grad

    together, again, alone = run(slice(4)), run(slice(4)), run(slice(2, 3))
    for first, second, one in zip(together, again, alone, strict=True):
        assert torch.equal(first, second)
        assert torch.equal(first[2:3], one)


# ---- torch.compile ------------------------------------------------------------------------------


def test_torch_compile_with_dynamic_shapes_and_options() -> None:
    def loss(
        x: torch.Tensor, labels: torch.Tensor, rows: torch.Tensor, temperature: torch.Tensor
    ) -> torch.Tensor:
        logprobs, entropy, lse = logprobs_from_logits(
            x,
            labels,
            rows=rows,
            temperature=temperature,
            softcap=6.0,
            vocab_size=290,
            with_lse=True,
        )
        assert entropy is not None
        return (logprobs * 2.0 + entropy + lse).sum()

    compiled = torch.compile(loss, fullgraph=True, dynamic=True, backend="aot_eager")
    for rows in (torch.tensor([5, 0, 3]), torch.tensor([1, 5])):
        labels, temperature = draw_labels(tuple(rows.shape), 290), 0.5 + torch.rand(len(rows))
        logits = draw((4 + len(rows), 300))
        results = []
        for function in (loss, compiled):
            leaf = logits.clone().requires_grad_()
            value = function(leaf, labels, rows, temperature)
            results.append((value, torch.autograd.grad(value, leaf)[0]))
        assert worst(results[0][0], results[1][0]) < 1e-5
        assert torch.equal(results[0][1], results[1][1])


def test_compiled_log_sum_exp_carries_no_gradient() -> None:
    leaf, labels = draw((4, 300)).requires_grad_(), draw_labels((4,), 300)

    def lse(x: torch.Tensor) -> torch.Tensor:
        return logprobs_from_logits(x, labels, with_lse=True)[2]

    for function in (lse, torch.compile(lse, fullgraph=True, backend="aot_eager")):
        assert not function(leaf).requires_grad


# ---- vocabulary shards --------------------------------------------------------------------------


def shard_case() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    logits, labels = draw((4, 64)), torch.tensor([0, 40, -100, 57])
    logits[:, 58:] = torch.nan
    return logits, labels, draw((2, 4), seed=4)


def run_shard(world: World, folder: str) -> None:
    rank = world.rank
    logits, labels, upstream = shard_case()
    results = {}
    for impl in IMPLS:
        for name, edges, options in (
            ("equal", (0, 32, 64), {"vocab_size": 58}),
            ("unequal", (0, 50, 64), {"vocab_size": 58, "vocab_start": 50 * rank}),
            ("whole", (0, 29, 58), {}),
        ):
            leaf = logits[:, edges[rank] : edges[rank + 1]].clone().requires_grad_()
            outputs = logprobs_from_logits(
                leaf,
                labels,
                temperature=0.7,
                softcap=8.0,
                group=dist.group.WORLD,
                with_lse=True,
                impl=impl,
                **options,
            )
            grads = torch.autograd.grad(outputs[:2], leaf, tuple(upstream))
            results[impl, name] = ([x.detach() for x in outputs], grads[0])
    torch.save(results, f"{folder}/{rank}.pt")


def test_two_ranks_with_a_shard_each_agree_with_one(tmp_path: Path) -> None:
    on_ranks(2, run_shard, str(tmp_path))
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    logits, labels, upstream = shard_case()
    exact = logits.double().requires_grad_()
    want = truth(exact, labels, temperature=0.7, softcap=8.0, vocab_size=58)
    (want_grad,) = torch.autograd.grad(want, exact, list(upstream.double()))
    assert len(ranks[0]) == 3 * len(IMPLS)
    for case in ranks[0]:
        (outputs, _), (others, _) = (rank[case] for rank in ranks)
        assert all(torch.equal(a, b) for a, b in zip(outputs, others, strict=True)), case
        for ours, true in zip(outputs, want, strict=False):
            assert worst(ours, true) < 3e-6, case
        grad = torch.cat([rank[case][1] for rank in ranks], dim=-1)
        assert worst(grad, want_grad[:, : grad.shape[-1]]) < 3e-6, case


def test_torch_compile_leaves_the_gather_out_of_its_graph(tmp_path: Path) -> None:
    logits, labels, _ = shard_case()
    options: dict[str, Any] = {"vocab_size": 58, "impl": FAST}
    want = logprobs_from_logits(logits, labels, **options)
    dist.init_process_group("gloo", f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        compiled = torch.compile(logprobs_from_logits, backend="eager")
        got = compiled(logits, labels, group=dist.group.WORLD, **options)
    finally:
        dist.destroy_process_group()
    for ours, whole in zip(got, want, strict=True):
        assert worst(ours, whole) < 1e-6
