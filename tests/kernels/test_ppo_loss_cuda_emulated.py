"""csrc/cuda/ppo_loss.cu on a CPU: the kernels themselves, with their Python launcher.

The source is compiled as C++ against tests/kernels/cuda_emulator, which runs the threads of a block
as fibers. Ownership of tokens, reductions, alignment, tails and launches are those of a device.
"""

from __future__ import annotations

import ctypes
import math
import shutil
import subprocess
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf_fast_kernels import dispatch, native, ppo_launchers, ppo_loss
from rlhf_fast_kernels.ppo_arguments import OP
from rlhf_fast_kernels.ppo_launchers import scale
from rlhf_fast_kernels.ppo_loss import FAST_DTYPES, _run
from tests.kernels.ppo_cases import (
    DTYPES,
    FULL,
    LEAVES,
    NAMES,
    TIES,
    assert_same,
    check_tie,
    doubles,
    draw,
    one_token,
    run,
    with_exact_kl,
)

ROOT = Path(__file__).resolve().parents[2]
EMULATOR = ROOT / "tests" / "kernels" / "cuda_emulator"
COMPILER = shutil.which("g++")

pytestmark = pytest.mark.skipif(COMPILER is None, reason="needs g++")


def addresses(values: list[int]) -> Any:
    return (ctypes.c_uint64 * len(values))(*values)


def tensors_of(fields: tuple[tuple[int, int] | None, ...]) -> tuple[Any, Any]:
    pairs = [field or (0, 0) for field in fields]
    return addresses([a for a, _ in pairs]), (ctypes.c_int32 * len(pairs))(*(d for _, d in pairs))


class EmulatedCore:
    """The functions of `_core` that the launcher calls, over the emulated library."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self.library = library
        library.emulated_workspace.restype = ctypes.c_int64

    def ppo_loss_workspace(self, tokens: int) -> int:
        return int(self.library.emulated_workspace(ctypes.c_int64(tokens)))

    def ppo_loss(
        self,
        tensors: tuple[tuple[int, int] | None, ...],
        mask: int,
        tokens: int,
        normalizer: float | tuple[int, int],
        settings: tuple[Any, ...],
        outputs: tuple[int, ...],
        placement: tuple[int, int, int],
    ) -> None:
        number, (address, kind) = (
            (0.0, normalizer) if isinstance(normalizer, tuple) else (normalizer, (0, -1))
        )
        numbers = [math.inf if x is None else float(x) for x in settings]
        failed = self.library.emulated_ppo_loss(
            *tensors_of(tensors),
            ctypes.c_void_p(mask),
            ctypes.c_int64(tokens),
            ctypes.c_double(number),
            ctypes.c_void_p(address),
            ctypes.c_int32(kind),
            (ctypes.c_double * len(numbers))(*numbers),
            addresses(list(outputs)),
            ctypes.c_void_p(placement[2]),
        )
        assert failed == 0

    def ppo_loss_scale(
        self,
        gradients: tuple[int, ...],
        scaled: tuple[tuple[int, int] | None, ...],
        tokens: int,
        upstream: int,
        _device: int,
        _stream: int,
    ) -> None:
        failed = self.library.emulated_scale(
            addresses(list(gradients)),
            *tensors_of(scaled),
            ctypes.c_int64(tokens),
            ctypes.c_void_p(upstream),
        )
        assert failed == 0


@pytest.fixture(scope="module")
def core(tmp_path_factory: pytest.TempPathFactory) -> EmulatedCore:
    assert COMPILER is not None
    library = tmp_path_factory.mktemp("emulated") / "ppo_loss.so"
    command = [COMPILER, "-std=c++17", "-O1", "-fPIC", "-shared", "-Wall", "-Wextra", "-Werror"]
    command += ["-Wno-unknown-pragmas", f"-I{EMULATOR}", f"-I{ROOT / 'csrc'}"]
    subprocess.run([*command, str(EMULATOR / "ppo_loss.cpp"), "-o", str(library)], check=True)
    return EmulatedCore(ctypes.CDLL(str(library)))


@pytest.fixture(autouse=True)
def cuda_on_cpu(core: EmulatedCore, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(native, "core", lambda: core)
    monkeypatch.setattr(ppo_launchers, "_stream", lambda _device: (0, 0))
    implementations = dispatch._ops[OP].implementations
    before = implementations["cuda"]
    dispatch.register(OP, "cuda", partial(_run, "cuda"), dtypes=FAST_DTYPES, preference=-2)
    yield
    implementations["cuda"] = before
    dispatch._choose.cache_clear()


def reference(tensors: dict[str, torch.Tensor], **options: Any) -> Any:
    return run(doubles(tensors), impl="reference", **options)


@pytest.mark.parametrize("tokens", [0, 1, 3, 4, 130, 1023, 1024, 1025, 3001, 20_000])
@pytest.mark.parametrize("dtype", DTYPES)
def test_matches_fp64_with_any_tail(tokens: int, dtype: torch.dtype) -> None:
    tensors = draw((tokens,), dtype=dtype)
    tolerance = 2e-6 if dtype == torch.float32 else 2**-8
    assert_same(run(tensors, impl="cuda", **FULL), reference(tensors, **FULL), tolerance)


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3", "exact"])
@pytest.mark.parametrize("kl_gradient", ["k2", "own"])
def test_matches_fp64_with_every_kl(estimator: str, kl_gradient: str) -> None:
    tensors = with_exact_kl(draw((1500,))) if estimator == "exact" else draw((1500,))
    options = {**FULL, "kl_estimator": estimator, "kl_gradient": kl_gradient}
    assert_same(run(tensors, impl="cuda", **options), reference(tensors, **options), 2e-6)


@pytest.mark.parametrize("absent", [NAMES[6:], NAMES[:6], ("weights",), ("old_values",)])
def test_parts_may_be_absent(absent: tuple[str, ...]) -> None:
    tensors = {name: x for name, x in draw((700,)).items() if name not in absent}
    options = {**FULL, "value_clip_eps": None if "old_values" in absent else 0.2, "dual_clip": None}
    if "logprobs" in absent:
        options |= {"kl_coef": 0.0, "entropy_coef": 0.0}
    assert_same(run(tensors, impl="cuda", **options), reference(tensors, **options), 2e-6)


def test_unaligned_inputs_are_read_one_by_one() -> None:
    tensors = {name: x[1:] for name, x in draw((1103,)).items()}
    assert tensors["logprobs"].data_ptr() % 16 == 4
    got, want = run(tensors, impl="cuda", **FULL), reference(tensors, **FULL)
    assert_same(got, want, 2e-6)
    aligned = {name: x.clone() for name, x in tensors.items()}
    for unaligned in ("mask", "values"):
        mixed = run({**aligned, unaligned: tensors[unaligned]}, impl="cuda", **FULL)
        assert torch.equal(got[0].loss, mixed[0].loss)


def test_mixed_dtypes_and_strides() -> None:
    tensors = draw((40, 31))
    tensors["old_logprobs"] = tensors["old_logprobs"].bfloat16()
    tensors["values"] = tensors["values"].bfloat16().t().contiguous().t()
    tensors["returns"] = tensors["returns"][:, :1].expand(40, 31)
    assert_same(run(tensors, impl="cuda", **FULL), reference(tensors, **FULL), 2**-8)


@pytest.mark.parametrize(
    "normalizer",
    [
        0,
        7,
        *(
            torch.tensor(7, dtype=d)
            for d in (torch.int64, torch.float32, torch.float64, torch.bfloat16)
        ),
        torch.tensor(0),
    ],
)
def test_normalizer_is_read_where_it_lies(normalizer: Any) -> None:
    tensors = draw((300,))
    want = run(doubles(tensors), float(normalizer), impl="reference", **FULL)
    assert_same(run(tensors, normalizer, impl="cuda", **FULL), want, 2e-6 * 300 / 7)


def test_masked_slots_change_nothing_whatever_they_hold() -> None:
    tensors = draw((9, 143))
    spoiled = {name: x.clone() for name, x in tensors.items()}
    for name, value in zip(NAMES, [torch.nan, torch.inf, -torch.inf] * 3, strict=True):
        spoiled[name][~tensors["mask"]] = value
    got, want = run(spoiled, impl="cuda", **FULL), run(tensors, impl="cuda", **FULL)
    assert torch.equal(got[0].loss, want[0].loss)
    assert all(torch.equal(got[0].metrics[name], x) for name, x in want[0].metrics.items())
    assert all(torch.equal(got[1][name], x) for name, x in want[1].items())
    tensors["mask"][:] = False
    out, grads = run(tensors, 0, impl="cuda", **FULL)
    assert [float(x) for x in (out.loss, *out.metrics.values())] == [0.0] * 20
    assert [float(x) for x in out.extrema.values()] == [-math.inf] * 2
    assert all(bool((x == 0).all()) for x in grads.values())


@pytest.mark.parametrize(
    ("advantage", "ratio", "slope"),
    [(1.0, 1.4, 0.0), (1.0, 1.1, -1.1), (-1.0, 0.5, 0.0), (-1.0, 4.0, 0.0), (0.0, 4.0, 0.0)],
)
def test_gradient_vanishes_exactly_where_the_clip_wins(
    advantage: float, ratio: float, slope: float
) -> None:
    tensors = one_token(logprobs=math.log(ratio), old_logprobs=0.0, advantages=advantage)
    _, grads = run(tensors, impl="cuda", dual_clip=3.0)
    assert float(grads["logprobs"]) == pytest.approx(slope, abs=1e-6)


@pytest.mark.parametrize("case", TIES)
def test_ties_and_bounds_of_clamps(case: str) -> None:
    check_tie(case, "cuda")


@pytest.mark.parametrize("dtype", DTYPES)
def test_upstream_scales_a_copy_in_the_dtype_of_the_input(dtype: torch.dtype) -> None:
    tensors = draw((1029,), dtype=dtype)
    _, want = run(tensors, 500, impl="cuda", **FULL)
    leaves = {name: tensors[name].clone().requires_grad_() for name in LEAVES}
    out = ppo_loss(**{**tensors, **leaves}, normalizer=500, impl="cuda", **FULL).loss
    for factor in (1.0, -2.0, 0.5):
        grads = torch.autograd.grad(out, list(leaves.values()), torch.tensor(factor), True)
        for name, grad in zip(LEAVES, grads, strict=True):
            assert grad.dtype == dtype
            assert torch.equal(grad, want[name] * factor)


def test_scaling_keeps_zeros_and_rounds_to_nearest() -> None:
    gradients = [torch.randn(1027), torch.zeros(1027), None, torch.randn(1027)]
    dtypes = [torch.bfloat16, torch.float32, None, torch.float32]
    upstream = torch.tensor(3.7)
    got = scale("cuda", gradients, upstream, dtypes)
    for x, y, dtype in zip(got, gradients, dtypes, strict=True):
        if x is None or y is None:
            assert x is y
        else:
            assert torch.equal(x, (y * upstream).to(dtype))
    kept = scale("cuda", gradients, torch.tensor(torch.inf), dtypes)[1]
    assert kept is not None
    assert torch.equal(kept, torch.zeros(1027))


def test_a_result_does_not_depend_on_what_is_behind_the_last_token() -> None:
    tensors = draw((2500,))
    whole = run(tensors, 100, impl="cuda", **FULL)[1]
    part = run({name: x[:1700] for name, x in tensors.items()}, 100, impl="cuda", **FULL)[1]
    assert all(torch.equal(x[:1700], part[name]) for name, x in whole.items())
