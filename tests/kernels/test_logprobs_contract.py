"""Besides numbers, logprobs_from_logits promises messages, determinism, torch.library and ISAs."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from rlhf_fast_kernels import logprobs_from_logits, native
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


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("bad", [-1, 300, -101, 2**40])
def test_label_out_of_range_is_named(bad: int, impl: str) -> None:
    labels = draw_labels((2, 3), 300)
    labels[1, 2] = bad
    with pytest.raises(ValueError, match=rf"label {bad} at row \(1, 2\)"):
        logprobs_from_logits(draw((2, 3, 300)), labels, impl=impl)


def test_bad_arguments_are_named() -> None:
    logits, labels = draw((2, 3, 5)), draw_labels((2, 3), 5)
    with pytest.raises(ValueError, match=r"labels \(2,\)"):
        logprobs_from_logits(logits, labels[:, 0])
    with pytest.raises(TypeError, match="int64"):
        logprobs_from_logits(logits, labels.int())
    with pytest.raises(TypeError, match="floating"):
        logprobs_from_logits(logits.long(), labels)
    with pytest.raises(ValueError, match="positive"):
        logprobs_from_logits(logits, labels, temperature=0.0)
    temperature = torch.ones(2, 3)
    temperature[1, 0] = -1.0
    with pytest.raises(ValueError, match=r"temperature -1.0 at row \(1, 0\)"):
        logprobs_from_logits(logits, labels, temperature=temperature)
    with pytest.raises(ValueError, match="temperature tensor"):
        logprobs_from_logits(logits, labels, temperature=torch.ones(3))
    with pytest.raises(ValueError, match="empty"):
        logprobs_from_logits(logits[..., :0], labels)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_other_dtypes_run_in_the_reference(dtype: torch.dtype) -> None:
    logits, labels = draw((3, 40)).to(dtype), draw_labels((3,), 40)
    logprobs, entropy = logprobs_from_logits(logits, labels)
    assert entropy is not None
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert logprobs.dtype == entropy.dtype == wide
    assert worst(logprobs, truth(logits, labels)[0]) < 1e-5
    if FAST == "cpu":
        with pytest.raises(RuntimeError, match="takes"):
            logprobs_from_logits(logits, labels, impl="cpu")


def test_reference_passes_gradcheck_in_fp64() -> None:
    logits = draw((3, 9)).double()
    logits[0, 4] = -torch.inf
    labels = torch.tensor([2, -100, 8])
    temperature = torch.tensor([0.5, 1.0, 1.7])

    def run(free: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        full = torch.cat([free, logits[:, 6:]], dim=-1)
        logprobs, entropy = logprobs_from_logits(full, labels, temperature=temperature)
        assert entropy is not None
        return logprobs, entropy

    assert torch.autograd.gradcheck(run, (draw((3, 6)).double().requires_grad_(),))


@pytest.mark.parametrize("shape", [(1, 70001), (5, 40000), (40, 3001)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_do_not_depend_on_threads_or_neighbours(
    shape: tuple[int, int], dtype: torch.dtype
) -> None:
    logits, labels = draw(shape).to(dtype), draw_labels(shape[:1], shape[1])
    before = torch.get_num_threads()
    g, h = draw((2, shape[0]), seed=8)
    try:
        results = []
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            outputs = logprobs_from_logits(logits, labels, impl=FAST)
            run = lambda x: logprobs_from_logits(x, labels, impl=FAST)  # noqa: E731
            results.append((*outputs, gradient(run, logits, g, h)))
    finally:
        torch.set_num_threads(before)
    if FAST == "cpu":
        for other in results[1:]:
            assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
        alone = logprobs_from_logits(logits[-1:], labels[-1:], impl=FAST)
        assert torch.equal(alone[0], results[0][0][-1:])


@pytest.mark.skipif(FAST != "cpu", reason="torch.library holds the compiled op")
def test_opcheck() -> None:
    op = torch.ops.rlhf_fast.logprobs_from_logits.default
    labels = torch.tensor([1, -100, 4])
    rows = torch.tensor([2, 3, 0])
    for logits in (draw((4, 40)), draw((4, 40)).bfloat16(), draw((4, 2, 40))[:, 1]):
        for extra in ((None, 1.0, None), (torch.full((3,), 0.7), 1.0, 5.0)):
            for with_entropy in (True, False):
                leaf = logits.detach().requires_grad_()
                arguments = (leaf, labels, rows, *extra, -100, 33, with_entropy, "cpu")
                torch.library.opcheck(op, arguments)


@pytest.mark.skipif(FAST != "cpu", reason="torch.compile meets the compiled op")
def test_torch_compile_without_graph_break() -> None:
    logits, labels = draw((4, 300)), draw_labels((4,), 300)

    def loss(x: torch.Tensor) -> torch.Tensor:
        logprobs, entropy = logprobs_from_logits(x, labels, temperature=0.9)
        assert entropy is not None
        return (logprobs * 2.0 + entropy).sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    grads = []
    for function in (loss, compiled):
        leaf = logits.clone().requires_grad_()
        value = function(leaf)
        value.backward()
        grads.append((value.detach(), leaf.grad))
    assert torch.equal(grads[0][0], grads[1][0])
    assert torch.equal(grads[0][1], grads[1][1])  # type: ignore[arg-type]


COMPARE_ISAS = """
import torch
from rlhf_fast_kernels import logprobs_from_logits, native
worst = 0.0
for dtype in (torch.float32, torch.bfloat16):
    for vocab in (1, 7, 300, 4099, 20001):
        g = torch.Generator().manual_seed(0)
        logits = (3 * torch.randn(4, vocab, generator=g)).to(dtype)
        labels = torch.randint(0, vocab, (4,), generator=g)
        results = []
        for x, impl in ((logits.double(), "reference"), (logits, "cpu")):
            x = x.clone().requires_grad_()
            logprobs, entropy = logprobs_from_logits(x, labels, impl=impl)
            (logprobs.sum() + entropy.sum()).backward()
            results.append((logprobs, entropy, x.grad.to(dtype)))
        for want, got in zip(*results):
            scale = 2.0 ** -8 if got.dtype == torch.bfloat16 else 1e-5
            worst = max(worst, float((got.double() - want.double()).abs().max()) / scale)
print(native.core().cpu_features().split()[0], worst)
"""


@pytest.mark.skipif(FAST != "cpu", reason="instruction sets belong to the compiled op")
# Where there is AVX-512 every other test runs with it.
@pytest.mark.parametrize(
    "isa", ["baseline", "avx2", pytest.param("avx512", marks=pytest.mark.long)]
)
def test_every_instruction_set_meets_the_same_tolerance(isa: str) -> None:
    if isa not in native.core().cpu_features():
        isa = "baseline"
    kernels = Path(native.__file__).parents[1]
    result = subprocess.run(
        [sys.executable, "-c", COMPARE_ISAS],
        env={**os.environ, "RLHF_FAST_ISA": isa, "PYTHONPATH": str(kernels)},
        capture_output=True,
        text=True,
        check=True,
    )
    name, error = result.stdout.split()
    assert name == isa
    assert float(error) < 1.0
