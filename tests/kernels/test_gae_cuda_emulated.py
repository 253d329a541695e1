"""csrc/cuda/rewards_and_gae.cu and whiten.cu on a CPU: the kernels themselves.

The sources are compiled as C++ against tests/kernels/cuda_emulator, which runs the threads of a
block as fibers. Ownership of tokens, scans, reductions, alignment and tails are those of a device.
"""

from __future__ import annotations

import ctypes
import math
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf_fast_kernels import gae_launchers, native, reference
from tests.kernels.gae_cases import draw, gae_by_definition, holes
from tests.kernels.test_gae_moments import moments_by_definition

ROOT = Path(__file__).resolve().parents[2]
EMULATOR = ROOT / "tests" / "kernels" / "cuda_emulator"
COMPILER = shutil.which("g++")

pytestmark = pytest.mark.skipif(COMPILER is None, reason="needs g++")
DOUBLES, LONGS = ctypes.c_double, ctypes.c_int64


def array(kind: Any, values: list[Any]) -> Any:
    return (kind * len(values))(*values)


def fields(*views: tuple[int, ...] | None) -> Any:
    """Four numbers a tensor; a mask has no dtype."""
    full = [(0, 0, 0, 0) if v is None else v if len(v) == 4 else (v[0], 0, *v[1:]) for v in views]
    return array(LONGS, [number for view in full for number in view])


class EmulatedCore:
    """The functions of `_core` that the launchers call, over the emulated libraries."""

    def __init__(self, gae_library: ctypes.CDLL, whiten_library: ctypes.CDLL) -> None:
        self.gae_library, self.whiten_library = gae_library, whiten_library
        whiten_library.emulated_chunk.restype = LONGS
        self.MOMENTS_CHUNK = whiten_library.emulated_chunk()

    def gae(self, shape, rewards, values, mask, bootstrap, gamma, gae_lambda, outputs, _place):
        views = (rewards, None, None, None, None, values, mask, bootstrap)
        numbers = (0.0, math.inf, math.inf, gamma, gae_lambda)
        self._run(views, shape, (0, 1, 0), numbers, (*outputs, 0, 0, 0))

    def rewards_and_gae(
        self, shape, source, settings, values, mask, bootstrap, gamma, gae_lambda, outputs, _place
    ):
        *tensors, per_token = source
        estimator, kl_coef, in_reward, *bounds = settings
        bounds = [math.inf if x is None else x for x in bounds]
        views = (None, *tensors, values, mask, bootstrap)
        numbers = (kl_coef, *bounds, gamma, gae_lambda)
        self._run(views, shape, (per_token, estimator, in_reward), numbers, outputs)

    def _run(self, views, shape, flags, numbers, outputs):
        failed = self.gae_library.emulated_gae(
            fields(*views),
            array(LONGS, list(shape)),
            array(LONGS, list(flags)),
            array(DOUBLES, list(numbers)),
            array(LONGS, list(outputs)),
        )
        assert failed == 0

    def moments(self, x, mask):
        """(of the chunks, of all)"""
        chunks = -(-x.numel() // self.MOMENTS_CHUNK)
        partials, out = torch.full((chunks, 3), math.nan).double(), torch.full((3,), math.nan)
        out = out.double()
        failed = self.whiten_library.emulated_moments(
            *map(LONGS, shape_of(x)),
            fields(native.view(x), native.mask_view(mask)),
            *(ctypes.c_void_p(t.data_ptr()) for t in (partials, out)),
        )
        assert failed == 0
        return partials, out

    def whiten(self, x, mask, stats, shift_mean=True, unbiased=False):
        merged, out = torch.full((3,), math.nan).double(), torch.full(x.shape, math.nan)
        failed = self.whiten_library.emulated_whiten(
            *map(LONGS, shape_of(x)),
            fields(native.view(x), native.mask_view(mask)),
            ctypes.c_void_p(stats.data_ptr()),
            LONGS(stats.numel() // 3),
            ctypes.c_void_p(merged.data_ptr()),
            *(int(shift_mean), int(unbiased), DOUBLES(1e-8)),
            ctypes.c_void_p(out.data_ptr()),
        )
        assert failed == 0
        return out


def shape_of(x):
    return (1, x.shape[0]) if x.dim() == 1 else x.shape


@pytest.fixture(scope="module")
def emulated(tmp_path_factory: pytest.TempPathFactory) -> EmulatedCore:
    assert COMPILER is not None
    libraries = []
    for name in ("gae", "whiten"):
        library = tmp_path_factory.mktemp("emulated") / f"{name}.so"
        command = [COMPILER, "-std=c++17", "-O1", "-fPIC", "-shared", "-Wall", "-Wextra", "-Werror"]
        command += ["-Wno-unknown-pragmas", f"-I{EMULATOR}", f"-I{ROOT / 'csrc'}"]
        subprocess.run([*command, str(EMULATOR / f"{name}.cpp"), "-o", str(library)], check=True)
        libraries.append(ctypes.CDLL(str(library)))
    return EmulatedCore(*libraries)


@pytest.fixture(autouse=True)
def core(emulated: EmulatedCore, monkeypatch: pytest.MonkeyPatch) -> EmulatedCore:
    monkeypatch.setattr(native, "core", lambda: emulated)
    return emulated


@pytest.mark.parametrize("columns", [1, 4, 31, 128, 129, 700, 2052])
@pytest.mark.parametrize("density", [0.0, 0.05, 0.9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gae_equals_its_definition(columns, density, dtype):
    rewards, values = (draw(2, columns, seed=i, dtype=dtype) for i in range(2))
    mask, bootstrap = holes(2, columns, density), draw(2, seed=2, dtype=dtype)
    rewards = torch.where(mask, rewards, math.nan)
    got = gae_launchers.gae_native(rewards, values, mask, 0.99, 0.95, bootstrap, None)
    for x, y in zip(
        got, gae_by_definition(rewards, values, mask, 0.99, 0.95, bootstrap), strict=True
    ):
        torch.testing.assert_close(x.double(), y, rtol=1e-5, atol=2e-5)
        assert torch.equal(x[~mask], torch.zeros_like(x[~mask]))


def run_fused(impl, old, ref, values, scores, mask, kl_estimator, **more):
    exact = kl_estimator == "exact"
    arguments = (old, None if exact else ref, ref.abs() if exact else None, values, scores, mask)
    settings = (0.1, kl_estimator, True, None if exact else 2.0, 1.0, 0.99, 0.95)
    return impl(*arguments, *settings, more.get("bootstrap"), more.get("cu_seqlens"))


@pytest.mark.parametrize("kl_estimator", ["k1", "k2", "k3", "exact"])
@pytest.mark.parametrize("per_token", [True, False])
@pytest.mark.parametrize("columns", [132, 133])
def test_every_layout_equals_the_reference(kl_estimator, per_token, columns):
    old, ref, values = (draw(3, columns, seed=i) for i in range(3))
    scores = draw(3, columns, seed=4) if per_token else draw(3, seed=4)
    mask = holes(3, columns)
    ours = gae_launchers.rewards_and_gae_native
    wanted = run_fused(reference.rewards_and_gae, old, ref, values, scores, mask, kl_estimator)
    got = run_fused(ours, old, ref, values, scores, mask, kl_estimator)
    strided = [x.t().contiguous().t() for x in (old, ref, values)]
    again = run_fused(ours, *strided, scores, mask, kl_estimator)
    for x, y, z in zip(got, wanted, again, strict=True):
        torch.testing.assert_close(x, y, rtol=2e-5, atol=3e-5, check_dtype=False)
        assert torch.equal(x, z)
    alone = run_fused(ours, old[1:2], ref[1:2], values[1:2], scores[1:2], mask[1:2], kl_estimator)
    assert all(torch.equal(x[1:2], y) for x, y in zip(got, alone, strict=True))
    torch.testing.assert_close(got[4], moments_by_definition(got[2], mask), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("offsets_dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("with_mask", [True, False])
def test_packed_rows_equal_the_reference(offsets_dtype, with_mask):
    old, ref, values = (draw(1500, seed=i) for i in range(3))
    mask = holes(1, 1500)[0] if with_mask else None
    offsets = torch.tensor([0, 5, 5, 1200, 1201, 1500], dtype=offsets_dtype)
    call = (old, ref, values, draw(5, seed=3), mask, "k3")
    got = run_fused(gae_launchers.rewards_and_gae_native, *call, cu_seqlens=offsets)
    wanted = run_fused(reference.rewards_and_gae, *call, cu_seqlens=offsets)
    for x, y in zip(got, wanted, strict=True):
        torch.testing.assert_close(x, y, rtol=2e-5, atol=3e-5, check_dtype=False)


@pytest.mark.parametrize("shape", [(3, 900), (5000,), (1, 1), (2, 2048)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("unbiased", [True, False])
def test_moments_and_whitening_equal_the_reference(core, shape, dtype, unbiased):
    x, mask = (draw(*shape) + 100.0).to(dtype), draw(*shape, seed=1) < 0.5
    layouts = [(torch.where(mask, x, math.nan), mask), (x, None)]
    if x.dim() == 2:
        layouts.append((x.t().contiguous().t(), mask))
    for a, m in layouts:
        partials, moments = core.moments(a, m)
        torch.testing.assert_close(moments, reference.masked_moments(a, m), rtol=1e-11, atol=1e-11)
        got = core.whiten(a, m, partials, not unbiased, unbiased)
        wanted = reference.whiten(a, m, not unbiased, unbiased)
        torch.testing.assert_close(got, wanted, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("sets", [1, 2, 300, 513])
def test_any_number_of_sets_is_merged(core, sets):
    x, mask = draw(sets, 5) + 3.0, holes(sets, 5)
    stats = reference.row_moments(x, mask)
    got = core.whiten(x, mask, stats)
    torch.testing.assert_close(got, reference.whiten(x, mask), rtol=1e-6, atol=1e-6)


def test_nothing_has_moments_of_zero(core):
    assert core.moments(torch.zeros(0), None)[1].tolist() == [0, 0, 0]
