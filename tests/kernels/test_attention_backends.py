"""The choice of attention, and what foreign libraries are called with, without the libraries.

Stand-ins with the libraries' signatures compute with `paged_attention`'s reference, so an argument
that means something else (a window, a bound, a layout) gives other numbers.
"""

from __future__ import annotations

import itertools
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import varlen

from rlhf_fast_kernels import attention_backends as backends
from rlhf_fast_kernels import paged_attention
from rlhf_fast_kernels.attention_backends import Decoding, Prefill, choose_attention

CUDA, CPU = torch.device("cuda"), torch.device("cpu")


def dense(q: Tensor, k: Tensor, v: Tensor, scale: float, left: int, right: int) -> Tensor:
    """Causal attention [q, H, D] over [n, Hkv, D], queries last, by its definition."""
    group = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(group, 1).double() for x in (k, v))
    score = torch.einsum("qhd,khd->hqk", q.double(), k) * scale
    at = torch.arange(len(q))[:, None] + len(k) - len(q)
    key = torch.arange(len(k))[None]
    seen = key <= at + right
    if left >= 0:
        seen &= key >= at - left
    weight = score.masked_fill(~seen, -torch.inf).softmax(-1).nan_to_num()
    return torch.einsum("hqk,khd->qhd", weight, v).to(q.dtype)


def paged(pages: Tensor, table: Tensor, length: int) -> Tensor:
    return pages[table.long()].flatten(0, 1)[:length]


class Flash:
    """flash_attn 2, by its signature."""

    def __init__(self) -> None:
        self.calls: list[dict[str, Any]] = []

    def flash_attn_with_kvcache(
        self, q, k_cache, v_cache, k=None, v=None, rotary_cos=None, rotary_sin=None,
        cache_seqlens=None, cache_batch_idx=None, cache_leftpad=None, block_table=None,
        softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0,
        rotary_interleaved=True, alibi_slopes=None, num_splits=0, return_softmax_lse=False,
    ):  # fmt: skip
        assert causal
        assert q.dim() == 4
        assert q.shape[1] == 1
        assert k_cache.stride(-1) == v_cache.stride(-1) == block_table.stride(-1) == 1
        assert cache_seqlens.dtype == block_table.dtype == torch.int32
        self.calls.append({"columns": block_table.shape[1]})
        rows = [
            dense(
                q[i], paged(k_cache, block_table[i], n), paged(v_cache, block_table[i], n),
                softmax_scale, window_size[0], 0,
            )
            for i, n in enumerate(cache_seqlens.tolist())
        ]  # fmt: skip
        return torch.stack(rows)

    def flash_attn_varlen_func(
        self, q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0,
        softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None,
        deterministic=False, return_attn_probs=False, block_table=None,
    ):  # fmt: skip
        assert causal
        assert dropout_p == 0
        assert max_seqlen_q == max_seqlen_k == int(cu_seqlens_q.diff().max())
        return packed(q, k, v, cu_seqlens_q, softmax_scale, window_size)


def packed(q: Tensor, k: Tensor, v: Tensor, bounds: Tensor, scale: float, window: Any) -> Tensor:
    edges = bounds.tolist()
    return torch.cat(
        [dense(q[a:b], k[a:b], v[a:b], scale, window[0], 0) for a, b in itertools.pairwise(edges)]
    )


class Varlen:
    """torch.nn.attention.varlen, by its signature."""

    def varlen_attn(
        self, query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None,
        window_size=(-1, -1), enable_gqa=False, seqused_k=None, block_table=None, num_splits=None,
    ):  # fmt: skip
        assert enable_gqa
        assert window_size[1] == 0
        assert max_q == max_k == int(cu_seq_q.diff().max())
        return packed(query, key, value, cu_seq_q, scale, window_size)

    def varlen_attn_out(
        self, out, query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None,
        scale=None, window_size=(-1, -1), enable_gqa=False, seqused_k=None, block_table=None,
        num_splits=None,
    ):  # fmt: skip
        assert enable_gqa
        assert window_size[1] == 0
        assert cu_seq_k is None
        assert cu_seq_q.tolist() == list(range(len(query) + 1))
        assert max_q == 1
        assert max_k >= int(seqused_k.max())
        for i, n in enumerate(seqused_k.tolist()):
            k, v = (paged(x, block_table[i], n) for x in (key, value))
            out[i] = dense(query[i : i + 1], k, v, scale, window_size[0], 0)[0]


MAKERS = [lambda: backends.FlashAttention(Flash()), lambda: backends.TorchVarlen(Varlen())]


def pages_of(pages: int, size: int, heads: int, width: int, seed: int) -> Tensor:
    """Head-major within a page, as `PagedCache` lays them out."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(pages, heads, size, width, generator=generator).transpose(1, 2)


@pytest.mark.parametrize("window", [None, 3, 64])
@pytest.mark.parametrize("make", MAKERS)
def test_decoding_gives_what_paged_attention_gives(make: Any, window: int | None) -> None:
    keys, values = pages_of(9, 4, 2, 8, 0), pages_of(9, 4, 2, 8, 1)
    qkv = torch.randn(3, 8, 8, generator=torch.Generator().manual_seed(2))
    q, out = qkv[:, :4], torch.empty(3, 4, 8)
    table = torch.tensor([[1, 2, 3, 0, 0], [4, 0, 0, 0, 0], [5, 6, 7, 8, 0]], dtype=torch.int32)
    contexts = torch.tensor([9, 1, 14], dtype=torch.int32)
    call = Decoding(table, contexts, 0.3, window, 16)
    run = make().decoding(q, keys, values, out, call)
    for _ in range(2):
        run(q, keys, values, out)
        expected = paged_attention(q, keys, values, table, contexts, scale=0.3, window=window)
        torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)
        # A row grows into another page: what was prepared must see it.
        contexts[0] = 13
        table[0, 3] = 4


def test_the_bound_of_contexts_is_the_width_of_the_table() -> None:
    flash = Flash()
    table, contexts = torch.ones(2, 50, dtype=torch.int32), torch.tensor([3, 5], dtype=torch.int32)
    keys, q = pages_of(2, 4, 1, 8, 0), torch.randn(2, 1, 8)
    call = Decoding(table, contexts, 1.0, None, 10)
    backends.FlashAttention(flash).decoding(q, keys, keys, q.clone(), call)(
        q, keys, keys, q.clone()
    )
    assert flash.calls == [{"columns": 3}]


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("make", MAKERS)
def test_prefill_gives_what_paged_attention_gives(make: Any, window: int | None) -> None:
    generator = torch.Generator().manual_seed(0)
    q, v = torch.randn(9, 4, 8, generator=generator), torch.randn(9, 2, 8, generator=generator)
    k = torch.randn(9, 2, 8, generator=generator)
    keys, values = pages_of(6, 4, 2, 8, 3), pages_of(6, 4, 2, 8, 4)
    table = torch.tensor([[2, 4], [5, 0]], dtype=torch.int32)
    slots = torch.tensor([8, 9, 10, 11, 16, 17, 20, 21, 22])
    keys[slots // 4, slots % 4], values[slots // 4, slots % 4] = k, v
    bounds, contexts = torch.tensor([0, 6, 9], dtype=torch.int32), torch.tensor([6, 3]).int()
    stored = backends.stored_keys(keys, slots)
    assert torch.equal(stored, k)
    got = make().prefill(q, stored, v, Prefill(slots, bounds, 6, 0.3, window))
    expected = paged_attention(
        q, keys, values, table, contexts, bounds, scale=0.3, window=window, max_query=6
    )
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


def chosen(**options: Any) -> tuple[str, str | None, str]:
    settings: dict[str, Any] = {
        "device": CUDA, "dtype": torch.bfloat16, "head_dim": 128, "page_size": 256,
        "flash": "is not installed", "varlen": "is not installed", "active": "",
    }  # fmt: skip
    choice = choose_attention(**{**settings, **options})
    return choice.decode.name, choice.prefill.name if choice.prefill else None, choice.reason


OLD_FLASH = SimpleNamespace(
    flash_attn_with_kvcache=lambda q, k_cache, v_cache, cache_seqlens, softmax_scale, causal: None,
    flash_attn_varlen_func=Flash().flash_attn_varlen_func,
)


@pytest.mark.parametrize(
    ("options", "decode", "prefill", "reason"),
    [
        ({}, "rlhf_fast", None, "is not installed"),
        ({"flash": Flash(), "varlen": Varlen()}, "flash_attn", "flash_attn", ""),
        ({"flash": Flash(), "page_size": 64}, "rlhf_fast", "flash_attn", "multiple of 256"),
        ({"varlen": Varlen()}, "rlhf_fast", "torch_varlen", "no implementation with a block table"),
        ({"varlen": Varlen(), "active": "FA3"}, "torch_varlen", "torch_varlen", "not flash_attn"),
        ({"flash": OLD_FLASH}, "rlhf_fast", None, "takes no block_table, window_size"),
        ({"flash": SimpleNamespace()}, "rlhf_fast", None, "has no flash_attn_with_kvcache"),
        ({"flash": Flash(), "dtype": torch.float32}, "rlhf_fast", None, "not float32"),
        ({"flash": Flash(), "head_dim": 320}, "rlhf_fast", None, "not 320"),
        ({"flash": Flash(), "device": CPU}, "rlhf_fast", None, "not on cpu"),
        ({"flash": Flash(), "wish": "rlhf_fast"}, "rlhf_fast", None, "asked for"),
        ({"flash": Flash(), "varlen": Varlen(), "active": "FA4", "wish": "torch_varlen"},
         "torch_varlen", "torch_varlen", "asked for"),
    ],
)  # fmt: skip
def test_the_choice(options: Any, decode: str, prefill: str | None, reason: str) -> None:
    got = chosen(**options)
    assert got[:2] == (decode, prefill)
    assert reason in got[2]


def test_a_wish_that_cannot_decode_is_refused() -> None:
    with pytest.raises(ValueError, match="flash_attn cannot run: is not installed"):
        chosen(wish="flash_attn")
    with pytest.raises(ValueError, match="no attention 'sdpa'"):
        chosen(wish="sdpa")


@pytest.mark.parametrize("ops", ["paged_attention=reference", "reference"])
def test_an_implementation_that_the_environment_names_is_ours(
    ops: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RLHF_FAST_OPS", ops)
    assert chosen(flash=Flash(), varlen=Varlen()) == ("rlhf_fast", None, f"RLHF_FAST_OPS={ops}")


def test_this_torch_has_the_packed_attention_that_is_called() -> None:
    """A renamed argument shows here, not on a GPU."""
    assert backends.lacks(varlen, backends._VARLEN_ARGUMENTS) is None
    if torch.__version__ >= "2.12":
        assert backends.lacks(varlen, backends._PAGED_ARGUMENTS) is None
