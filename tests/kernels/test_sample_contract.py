"""Besides tokens, `sample` promises messages, determinism, buffers, torch.library and ISAs."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from rlhf_fast_kernels import SampleOutput, native, sample
from tests.kernels.sample_cases import (
    EVERY,
    FAST,
    SETTINGS,
    assert_same,
    draw,
    draw_seeds,
    needs_cpu,
)

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


def buffers(rows: int) -> SampleOutput:
    return SampleOutput(torch.zeros(rows, dtype=torch.int64), *torch.zeros(3, rows).unbind())


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"logits": torch.zeros(3)}, ValueError, r"logits must be \[B, V\], got \(3,\)"),
        ({"logits": torch.zeros(3, 5).long()}, TypeError, "floating point"),
        ({"logits": torch.zeros(3, 0)}, ValueError, "empty"),
        ({"seeds": torch.arange(2)}, ValueError, r"seeds .*\(3,\).*got \(2,\)"),
        ({"seeds": torch.tensor(1)}, ValueError, "one a row"),
        ({"seeds": torch.arange(3).int()}, TypeError, "seeds must be int64"),
        ({"step": torch.zeros(4, dtype=torch.int64)}, ValueError, "step must be"),
        ({"step": torch.zeros(3)}, TypeError, "step must be int64"),
        ({"temperature": -1.0}, ValueError, r"temperature must be in \[0, inf\), got -1.0"),
        ({"temperature": float("nan")}, ValueError, "temperature"),
        ({"temperature": float("inf")}, ValueError, "temperature"),
        ({"temperature": torch.tensor([1.0, 1.0, -2.0])}, ValueError, "got -2.0 at row 2"),
        ({"top_k": -1}, ValueError, "top_k must be 0"),
        ({"top_k": 1.5}, TypeError, "top_k must be an integer"),
        ({"top_k": torch.tensor([1, -3, 0])}, ValueError, "got -3 at row 1"),
        ({"top_p": 1.1}, ValueError, r"top_p must be in \[0, 1\], got 1.1"),
        ({"top_p": torch.tensor([[1.0]])}, ValueError, "top_p must be a number or a tensor"),
        ({"min_p": torch.tensor([0, 0, 1])}, TypeError, "min_p must be floating point"),
        ({"min_p": torch.tensor([0.0, float("nan"), 1.0])}, ValueError, "at row 1"),
        ({"vocab_size": 6}, ValueError, r"vocab_size must be in \[1, 5\]"),
        ({"vocab_size": 0}, ValueError, "vocab_size"),
        ({"out": buffers(2)}, ValueError, r"out.tokens must be contiguous of shape \(3,\)"),
        ({"out": buffers(3)._replace(entropy=None)}, ValueError, "out.entropy"),
        ({"out": buffers(3)._replace(tokens=torch.zeros(3))}, ValueError, "out.tokens must be"),
    ],
)
def test_bad_arguments_are_named(
    changed: dict[str, object], error: type[Exception], message: str
) -> None:
    arguments = {"logits": torch.zeros(3, 5), "seeds": torch.arange(3), "step": 0, **changed}
    with pytest.raises(error, match=message) as caught:
        sample(arguments.pop("logits"), **arguments)  # type: ignore[arg-type]
    assert str(caught.value).startswith("sample: ")


@pytest.mark.parametrize("impl", EVERY)
def test_no_rows_and_no_entropy(impl: str) -> None:
    drawn = sample(torch.zeros(0, 5), seeds=torch.arange(0), step=0, impl=impl)
    assert [x.shape for x in drawn if x is not None] == [(0,)] * 4
    assert sample(torch.zeros(1, 5), seeds=torch.arange(1), step=0, with_entropy=False)[3] is None


@pytest.mark.parametrize("impl", EVERY)
def test_out_is_written_and_returned(impl: str) -> None:
    logits, out = draw((3, 90)), buffers(3)
    options = {"seeds": draw_seeds(3), "top_k": 7, "impl": impl}
    drawn = sample(logits, **options, step=torch.tensor(4), out=out)
    assert all(x is y for x, y in zip(drawn, out, strict=True))
    assert_same(out, sample(logits, **options, step=4), tolerance=0)
    without = sample(logits, **options, step=5, out=out, with_entropy=False)
    assert without.entropy is None
    assert without.tokens is out.tokens


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_other_dtypes_run_in_the_reference(dtype: torch.dtype) -> None:
    logits, options = draw((3, 40)).to(dtype), {"seeds": draw_seeds(3), "step": 0, "top_p": 0.9}
    drawn = sample(logits, **options)
    assert drawn.logprobs.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert_same(drawn, sample(logits.double(), **options, impl="reference"))


@pytest.mark.parametrize("shape", [(1, 70001), (3, 40000), (40, 3001)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@needs_cpu
def test_rows_do_not_depend_on_threads_or_neighbours(
    shape: tuple[int, int], dtype: torch.dtype
) -> None:
    logits, seeds = draw(shape).to(dtype), draw_seeds(shape[0])
    before = torch.get_num_threads()
    for options in (SETTINGS["plain"], SETTINGS["all"]):
        try:
            results = []
            for threads in (1, 2, 3, 7):
                torch.set_num_threads(threads)
                results.append(sample(logits, seeds=seeds, step=9, **options, impl="cpu"))
        finally:
            torch.set_num_threads(before)
        for other in results[1:]:
            assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
        alone = sample(logits[-1:], seeds=seeds[-1:], step=9, **options, impl="cpu")
        assert all(torch.equal(a, b[-1:]) for a, b in zip(alone, results[0], strict=True))


@pytest.mark.parametrize("tensors", [False, True])
@pytest.mark.parametrize("with_entropy", [False, True])
def test_opcheck(tensors: bool, with_entropy: bool) -> None:
    setting = (torch.tensor([0.7, 0.0, 1.0]), 0.0) if tensors else (None, 0.7)
    whole = (torch.tensor([0, 3, 5]), 0) if tensors else (None, 3)
    step = (torch.tensor([3, 4, 5]), 0) if tensors else (None, 3)
    arguments = (
        *(draw((3, 40)), 40, draw_seeds(3), *step),
        *(*setting, *whole, None, 0.9, None, 0.0, with_entropy, FAST),
    )
    torch.library.opcheck(torch.ops.rlhf_fast.sample.default, arguments)


def test_torch_compile_without_graph_break_for_any_shape() -> None:
    def step(logits: torch.Tensor, seeds: torch.Tensor, now: torch.Tensor) -> SampleOutput:
        return sample(2 * logits, seeds=seeds, step=now, top_k=20, top_p=0.9)

    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend="aot_eager")
    for rows, vocab in ((3, 50), (5, 300)):
        arguments = (draw((rows, vocab)), draw_seeds(rows), torch.tensor(6))
        assert_same(compiled(*arguments), step(*arguments), tolerance=0)


COMPARE_ISAS = """
import torch
from rlhf_fast_kernels import native, sample
worst = 0.0
for dtype in (torch.float32, torch.bfloat16):
    for vocab in (1, 7, 300, 4099, 20001):
        for options in ({}, {"temperature": 0.0}, {"top_k": 30, "top_p": 0.9, "min_p": 0.01}):
            g = torch.Generator().manual_seed(0)
            logits = (3 * torch.randn(4, vocab, generator=g)).to(dtype)
            options = {"seeds": torch.arange(4) - 2, "step": 3, **options}
            got, want = (sample(logits, **options, impl=i) for i in ("cpu", "reference"))
            assert torch.equal(got.tokens, want.tokens), (vocab, dtype, options)
            worst = max(worst, *(float((a - b).abs().max()) for a, b in zip(got[1:], want[1:])))
print(native.core().cpu_features().split()[0], worst)
"""


@needs_cpu
# Where there is AVX-512 every other test runs with it.
@pytest.mark.parametrize(
    "isa", ["baseline", "avx2", pytest.param("avx512", marks=pytest.mark.long)]
)
def test_every_instruction_set_draws_the_same(isa: str) -> None:
    if isa not in native.core().cpu_features():
        isa = "baseline"
    result = subprocess.run(
        [sys.executable, "-c", COMPARE_ISAS],
        env={
            **os.environ,
            "RLHF_FAST_ISA": isa,
            "PYTHONPATH": str(Path(native.__file__).parents[1]),
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    name, error = result.stdout.split()
    assert name == isa
    assert float(error) < 1e-5


@needs_cpu
def test_settings_do_not_go_to_the_default_device() -> None:
    # In a process of its own: what it guards against is a read of address 0.
    code = """
import torch
from rlhf_fast_kernels import sample
logits, seeds = torch.randn(3, 50), torch.arange(3)
want = sample(logits, seeds=seeds, step=1, top_k=5, impl="cpu").tokens
torch.set_default_device("meta")
print(torch.equal(sample(logits, seeds=seeds, step=1, top_k=5, impl="cpu").tokens, want))
"""
    environment = {**os.environ, "PYTHONPATH": str(Path(native.__file__).parents[1])}
    result = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False
    )
    assert (result.returncode, result.stdout.strip()) == (0, "True"), result.stderr
