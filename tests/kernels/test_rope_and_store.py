"""Norm and rotation of queries and keys, and their way into the pages."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm, apply_rotary_pos_emb

from rlhf_fast_kernels import RopeAndStore, rope_and_store
from tests.kernels.paged_cases import EVERY, needs_cpu

PAGE = 4


class Layer:
    """A fused qkv product, pages of NaN and tables."""

    def __init__(
        self, tokens: int, width: int, dtype: torch.dtype, rotary: int | None = None
    ) -> None:
        generator = torch.Generator().manual_seed(tokens + width)
        self.fused = torch.randn(tokens, 4 + 2 + 2, width, generator=generator).to(dtype)
        self.before = self.fused.clone()
        self.q, self.k, self.v = self.fused.split((4, 2, 2), 1)
        # Head-major in memory, and of different strides.
        self.keys = torch.full((9, 2, PAGE, width), torch.nan, dtype=dtype).transpose(1, 2)
        self.values = torch.full((9, PAGE, 2, width), torch.nan, dtype=dtype)
        self.slots = torch.randperm(9 * PAGE, generator=generator)[:tokens]
        self.slots[1] = -1
        self.positions = torch.randint(0, 60, (tokens,), generator=generator)
        rotary = width if rotary is None else rotary
        inverse = 10000.0 ** -(torch.arange(0, rotary, 2) / rotary)
        angles = torch.cat(2 * (torch.arange(60)[:, None] * inverse,), -1)
        self.cos, self.sin = angles.cos(), angles.sin()
        self.norms = [1 + torch.randn(width, generator=generator).to(dtype) / 4 for _ in range(2)]

    def tables(self) -> dict[str, Any]:
        return {"positions": self.positions, "cos": self.cos, "sin": self.sin}

    def arguments(self) -> tuple[Tensor, ...]:
        return self.q, self.k, self.v, self.keys, self.values, self.slots

    def parts_before(self) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = self.before.split((4, 2, 2), 1)
        return q, k, v

    def assert_stored(self, k: Tensor, tolerance: float, digit: float = 0.0) -> None:
        """k and v in their slots, everything else as it was."""
        v = self.parts_before()[2]
        untouched = torch.ones(9 * PAGE, dtype=torch.bool)
        for n, slot in enumerate(self.slots.tolist()):
            if slot >= 0:
                untouched[slot] = False
                at = slot // PAGE, slot % PAGE
                torch.testing.assert_close(self.keys[at], k[n], rtol=digit, atol=tolerance)
                assert torch.equal(self.values[at], v[n])
        for pages in (self.keys, self.values):
            assert pages.reshape(9 * PAGE, -1)[untouched].isnan().all()
        assert torch.equal(self.k, self.parts_before()[1])
        assert torch.equal(self.v, v)


def rotated(x: Tensor, layer: Layer) -> Tensor:
    """As transformers does it, in the dtype of x."""
    cos, sin = (table[layer.positions][None].to(x.dtype) for table in (layer.cos, layer.sin))
    width = cos.shape[-1]
    turned, _ = apply_rotary_pos_emb(
        *(2 * (x[..., :width].transpose(0, 1)[None],)), cos, sin, unsqueeze_dim=1
    )
    return torch.cat((turned[0].transpose(0, 1), x[..., width:]), -1)


def normed(x: Tensor, weight: Tensor) -> Tensor:
    module = Qwen3RMSNorm(x.shape[-1], eps=1e-6).to(x.dtype)
    module.weight.data.copy_(weight)
    with torch.no_grad():
        return module(x)  # type: ignore[no-any-return]


@pytest.mark.parametrize("impl", EVERY)
@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize(("width", "rotary"), [(8, None), (64, None), (80, 20), (256, None)])
def test_as_transformers_does_it_in_fp32(
    impl: str, norm: bool, width: int, rotary: int | None
) -> None:
    layer = Layer(7, width, torch.float32, rotary)
    q, k, _ = layer.parts_before()
    options: dict[str, Any] = {}
    if norm:
        q, k = normed(q, layer.norms[0]), normed(k, layer.norms[1])
        options = {"q_norm": layer.norms[0], "k_norm": layer.norms[1]}
    rope_and_store(*layer.arguments(), **layer.tables(), **options, impl=impl)
    torch.testing.assert_close(layer.q, rotated(q, layer), rtol=0, atol=2e-6)
    layer.assert_stored(rotated(k, layer), 2e-6)


@pytest.mark.parametrize("impl", EVERY)
@pytest.mark.parametrize("norm", [False, True])
def test_bf16_is_rounded_once_after_the_norm_and_once_after_the_rotation(
    impl: str, norm: bool
) -> None:
    layer = Layer(7, 64, torch.bfloat16)
    q, k, _ = layer.parts_before()
    options: dict[str, Any] = {}
    if norm:
        q, k = normed(q, layer.norms[0]), normed(k, layer.norms[1])
        options = {"q_norm": layer.norms[0], "k_norm": layer.norms[1]}
    rope_and_store(*layer.arguments(), **layer.tables(), **options, impl=impl)
    want = rotated(q.double(), layer)
    error = (layer.q.double() - want).abs()
    # Half an ulp, 2^-8 of the value at most; a whole one in Triton's interpreter, which cuts where
    # a GPU rounds. After a norm the first roundings may fall the other way.
    digit = 2.0**-7 if impl == "triton" else 2.0**-8
    slack = (1e-1 if impl == "triton" else 2e-2) if norm else 1e-6
    assert (error <= want.abs() * digit + slack).all()
    layer.assert_stored(rotated(k.double(), layer).bfloat16(), slack, digit)


@pytest.mark.parametrize("impl", EVERY)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_plain_storing_leaves_q_alone(impl: str, dtype: torch.dtype) -> None:
    layer = Layer(5, 24, dtype)
    rope_and_store(*layer.arguments(), impl=impl)
    assert torch.equal(layer.fused, layer.before)
    layer.assert_stored(layer.parts_before()[1], 0.0)


@pytest.mark.parametrize("impl", EVERY)
def test_a_prepared_call_follows_slots_and_positions(impl: str) -> None:
    first, second = Layer(6, 16, torch.float32), Layer(6, 16, torch.float32)
    store = RopeAndStore(*first.arguments(), **first.tables(), q_norm=first.norms[0], impl=impl)  # type: ignore[arg-type]
    second.positions = second.positions.flip(0)
    second.slots = second.slots.flip(0)
    first.positions.copy_(second.positions)
    first.slots.copy_(second.slots)
    store(second.q, second.k, second.v, second.keys, second.values, second.norms[0])
    q, k, _ = second.parts_before()
    want = rotated(normed(q, second.norms[0]), second)
    torch.testing.assert_close(second.q, want, rtol=0, atol=2e-6)
    second.assert_stored(rotated(k, second), 2e-6)


@needs_cpu
def test_bits_do_not_depend_on_threads_or_on_the_batch() -> None:
    def run(threads: int) -> tuple[Tensor, ...]:
        generator = torch.Generator().manual_seed(0)
        fused = torch.randn(300, 8, 64, generator=generator)
        keys, values = torch.zeros(75, 4, 2, 64), torch.zeros(75, 4, 2, 64)
        options: dict[str, Any] = {
            "positions": torch.arange(300),
            "cos": fused[:, 0].cos(),
            "sin": fused[:, 0].sin(),
            "k_norm": fused[0, 0].clone(),
            "impl": "cpu",
        }
        torch.set_num_threads(threads)
        step = 300 if threads > 1 else 7
        for start in range(0, 300, step):
            part = slice(start, start + step)
            options["positions"] = torch.arange(300)[part]
            q, k, v = fused[part].split((4, 2, 2), 1)
            rope_and_store(q, k, v, keys, values, torch.arange(300)[part], **options)
        return fused, keys, values

    threads = torch.get_num_threads()
    try:
        for one, many in zip(run(1), run(3), strict=True):
            assert torch.equal(one, many)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("impl", EVERY)
def test_no_token(impl: str) -> None:
    layer = Layer(6, 16, torch.float32)
    empty = (layer.q[:0], layer.k[:0], layer.v[:0], layer.keys, layer.values, layer.slots[:0])
    rope_and_store(*empty, impl=impl)
    assert layer.keys.isnan().all()


WRONG = {
    "q": ({"q": torch.zeros(6, 64)}, ValueError, r"q is \[6, 64\]"),
    "tokens": ({"k": torch.zeros(5, 2, 16)}, ValueError, "as many tokens"),
    "v": ({"v": torch.zeros(6, 3, 16)}, ValueError, "k like v"),
    "dtype": ({"v": torch.zeros(6, 2, 16).bfloat16()}, TypeError, "v "),
    "heads": ({"key_pages": torch.zeros(9, 4, 3, 16)}, ValueError, "as many heads"),
    "slots": ({"slots": torch.zeros(6).int()}, TypeError, "slots"),
    "slot": ({"slots": torch.full((6,), 36)}, ValueError, "slots holds 36"),
    "minus": ({"slots": torch.full((6,), -2)}, ValueError, "slots holds -2"),
    "alone": ({"cos": None}, ValueError, "together"),
    "odd": ({"cos": torch.zeros(60, 7), "sin": torch.zeros(60, 7)}, ValueError, "R even"),
    "sin": ({"sin": torch.zeros(60, 8)}, ValueError, "sin is"),
    "table": ({"cos": torch.zeros(60, 16).bfloat16()}, TypeError, "cos"),
    "position": ({"positions": torch.full((6,), 60)}, ValueError, "positions holds 60"),
    "norm": ({"q_norm": torch.zeros(8)}, ValueError, "q_norm is"),
    "eps": ({"norm_eps": -1.0}, ValueError, "norm_eps is -1.0"),
}


@pytest.mark.parametrize("case", WRONG)
def test_errors_name_op_argument_and_what_was_expected(case: str) -> None:
    wrong, error, message = WRONG[case]
    layer = Layer(6, 16, torch.float32)
    names = ("q", "k", "v", "key_pages", "value_pages", "slots")
    arguments: dict[str, Any] = dict(zip(names, layer.arguments(), strict=True))
    with pytest.raises(error, match=message) as caught:
        rope_and_store(**{**arguments, **layer.tables(), **wrong})
    assert "rope_and_store: " in str(caught.value)
