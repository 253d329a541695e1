"""Attention over pages: values, shapes, what must not be read, bits, errors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_fast_kernels import PagedAttention, paged_attention
from tests.kernels.paged_cases import EVERY, FAST, assert_close, draw, needs_cpu

# The interpreter computes in numpy, which warns where a processor does not.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
CONTEXTS = (1, 0, 16, 17, 40, 150)


@pytest.mark.parametrize("impl", EVERY)
@pytest.mark.parametrize("page_size", [1, 16, 64])
@pytest.mark.parametrize("heads", [(2, 2), (6, 2)])
def test_decoding_ragged_contexts(impl: str, page_size: int, heads: tuple[int, int]) -> None:
    cache = draw(CONTEXTS, heads=heads, page_size=page_size)
    got = paged_attention(*cache.arguments(), impl=impl)
    assert_close(got, cache)
    assert (got[1] == 0).all(), "context 0: a padding row"


@pytest.mark.parametrize("impl", EVERY)
@pytest.mark.parametrize("width", [8, 24, 64, 80, 128, 256])
def test_widths_of_a_head(impl: str, width: int) -> None:
    cache = draw([5, 70], [2, 3], width=width)
    assert_close(paged_attention(*cache.arguments(), impl=impl), cache)


@pytest.mark.parametrize("impl", EVERY)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("head_major", [False, True])
def test_prefilling_whole_chunks_and_single_tokens(
    impl: str, dtype: torch.dtype, head_major: bool
) -> None:
    queries = [1, 0, 16, 5, 40, 0]
    cache = draw(CONTEXTS, queries, dtype=dtype, head_major=head_major)
    assert_close(paged_attention(*cache.arguments(), impl=impl), cache)


@pytest.mark.parametrize("impl", EVERY)
@pytest.mark.parametrize("queries", [None, [1, 0, 16, 5, 40, 33]])
@pytest.mark.parametrize(
    "options",
    [
        {"window": 1},
        {"window": 20},
        {"window": 70},
        {"softcap": 2.0},
        {"softcap": 30.0, "window": 33, "scale": 0.7},
    ],
)
def test_window_softcap_and_scale(
    impl: str, queries: list[int] | None, options: dict[str, Any]
) -> None:
    cache = draw(CONTEXTS, queries, heads=(4, 2))
    assert_close(paged_attention(*cache.arguments(), **options, impl=impl), cache, **options)


@pytest.mark.parametrize("impl", EVERY)
def test_pages_that_a_window_left_may_be_gone(impl: str) -> None:
    cache = draw([200, 130], [1, 30], page_size=16)
    want = paged_attention(*cache.arguments(), window=20, impl=impl)
    cache.table[0, :11] = -(2**30)  # sees 180 .. 199
    cache.table[1, :5] = -(2**30)  # sees 81 .. 129
    assert torch.equal(paged_attention(*cache.arguments(), window=20, impl=impl), want)


@pytest.mark.parametrize("impl", ["reference", pytest.param("cpu", marks=needs_cpu)])
def test_nan_in_a_later_token_does_not_reach_an_earlier_one(impl: str) -> None:
    cache = draw([50], [50])
    want = paged_attention(*cache.arguments(), impl=impl)
    page = int(cache.table[0, 2])
    cache.keys[page, 1] = cache.values[page, 1] = torch.nan  # token 33
    got = paged_attention(*cache.arguments(), impl=impl)
    assert torch.equal(got[:33], want[:33])
    assert got[33:].isnan().all()


@needs_cpu
@settings(max_examples=40, deadline=None)
@given(st.data())
def test_any_shape(data: st.DataObject) -> None:
    contexts = data.draw(st.lists(st.integers(0, 140), min_size=1, max_size=4))
    queries = [data.draw(st.integers(0, min(context, 70))) for context in contexts]
    kv_heads, group = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 5))
    cache = draw(
        contexts,
        queries if data.draw(st.booleans()) else None,
        heads=(kv_heads * group, kv_heads),
        width=data.draw(st.integers(1, 40)),
        page_size=data.draw(st.sampled_from([1, 3, 16, 64])),
        dtype=data.draw(st.sampled_from([torch.float32, torch.bfloat16])),
        head_major=data.draw(st.booleans()),
    )
    window = data.draw(st.one_of(st.none(), st.integers(1, 150)))
    assert_close(
        paged_attention(*cache.arguments(), window=window, impl="cpu"), cache, window=window
    )


# ---- bits ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("impl", FAST)
@pytest.mark.parametrize("queries", [None, [1, 0, 16, 17, 30, 10]])
def test_bits_do_not_depend_on_the_batch(impl: str, queries: list[int] | None) -> None:
    contexts = (1, 0, 16, 17, 40, 600)
    cache = draw(contexts, queries, heads=(2, 1))
    whole = paged_attention(*cache.arguments(), impl=impl)
    parts = [cache.only(s) for s in range(len(contexts))]
    alone = [paged_attention(*part.arguments(), impl=impl) for part in parts]
    assert torch.equal(whole, torch.cat(alone))


@needs_cpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("group", [1, 3, 40])
def test_bits_do_not_depend_on_threads_or_chunks(dtype: torch.dtype, group: int) -> None:
    cache = draw([150, 90], [150, 90], heads=(2 * group, 2), width=64, dtype=dtype)
    options: dict[str, Any] = {"softcap": 30.0, "window": 100, "impl": "cpu"}
    whole = paged_attention(*cache.arguments(), **options)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        assert torch.equal(paged_attention(*cache.arguments(), **options), whole)
    finally:
        torch.set_num_threads(threads)
    start = 0
    for size in (1, 30, 64, 55):  # a prompt in chunks, the first of one token
        stop = start + size
        got = paged_attention(
            cache.q[start:stop],
            *(cache.keys, cache.values, cache.table[:1]),
            torch.tensor([stop], dtype=torch.int32),
            torch.tensor([0, size], dtype=torch.int32),
            **options,
        )
        assert torch.equal(got, whole[start:stop])
        start = stop
    last = cache.q[[149, 239]]  # both decoded
    got = paged_attention(last, cache.keys, cache.values, cache.table, cache.contexts, **options)
    assert torch.equal(got, whole[[149, 239]])


# ---- buffers and prepared calls -----------------------------------------------------------------


@pytest.mark.parametrize("impl", EVERY)
def test_out_is_written_where_it_lies(impl: str) -> None:
    cache = draw([3, 20], [2, 1])
    q = torch.cat((cache.q, cache.q[:2]))  # two rows of no sequence
    arguments = (q, *cache.arguments()[1:])
    buffer = torch.full((5, 6, 32), 7.0)
    got = paged_attention(*arguments, out=buffer[:, 1:5], impl=impl)
    assert got.data_ptr() == buffer[:, 1:5].data_ptr()
    assert_close(got[:3], cache)
    assert (buffer[3:] == 7).all()
    assert (buffer[:, 0] == 7).all()
    assert (buffer[:, 5] == 7).all()
    assert (paged_attention(*arguments, impl=impl)[3:] == 0).all()


@pytest.mark.parametrize("impl", EVERY)
def test_a_prepared_call_follows_the_values_of_its_integers(impl: str) -> None:
    cache = draw([30, 45])
    other = draw([31, 7], seed=1)
    attend = PagedAttention(*cache.arguments(), impl=impl)
    assert_close(attend(cache.q, cache.keys, cache.values, attend.out), cache)
    cache.table.copy_(torch.nn.functional.pad(other.table, (0, 1), value=-1)[:, :4])
    cache.contexts.copy_(other.contexts)
    out = torch.empty_like(attend.out)
    assert_close(attend(other.q, other.keys, other.values, out), other)


@pytest.mark.parametrize("impl", EVERY)
def test_no_sequence_and_no_query(impl: str) -> None:
    cache = draw([])
    assert paged_attention(*cache.arguments(), impl=impl).shape == (0, 4, 32)
    cache = draw([5, 3], [0, 0])
    assert paged_attention(*cache.arguments(), impl=impl).shape == (0, 4, 32)


# ---- errors -------------------------------------------------------------------------------------


@pytest.mark.parametrize("impl", FAST)
def test_strides_beyond_two_to_the_30_elements(impl: str) -> None:
    stride = 2**30 + 16
    memory = torch.empty(2 * stride + 64, dtype=torch.bfloat16)  # pages nobody touches are free
    table = torch.tensor([[0, 1], [2, 1]], dtype=torch.int32)
    contexts = torch.tensor([3, 5], dtype=torch.int32)
    q, keys = memory.new_empty(2, 3, 16).normal_(), memory.new_empty(3, 3, 1, 16).normal_()
    far_heads = memory.as_strided(q.shape, (16, stride, 1)).copy_(q)
    got = paged_attention(far_heads, keys, keys, table, contexts, impl=impl)
    assert torch.equal(got, paged_attention(q, keys, keys, table, contexts, impl=impl))
    far_slots = memory.as_strided(keys.shape, (16, stride, 16, 1)).copy_(keys)
    got = paged_attention(q, far_slots, far_slots, table, contexts, impl=impl)
    assert torch.equal(got, paged_attention(q, keys, keys, table, contexts, impl=impl))


WRONG = {
    "q_dims": ({"q": torch.zeros(2, 32)}, ValueError, r"q is \[2, 32\]"),
    "wide": ({"q": torch.zeros(2, 4, 257)}, ValueError, r"q is \[2, 4, 257\]"),
    "heads": ({"q": torch.zeros(2, 3, 32)}, ValueError, "3 heads"),
    "dtype": ({"q": torch.zeros(2, 4, 32).bfloat16()}, TypeError, "key_pages"),
    "integers": ({"q": torch.zeros(2, 4, 32).int()}, TypeError, "q"),
    "rows": ({"q": torch.zeros(3, 4, 32)}, ValueError, "one query a sequence"),
    "strided": ({"q": torch.zeros(2, 4, 64)[..., ::2]}, ValueError, "contiguous last dim"),
    "pages": ({"key_pages": torch.zeros(4, 16, 32)}, ValueError, "key_pages"),
    "unequal": ({"value_pages": torch.zeros(9, 16, 2, 32)}, ValueError, "value_pages"),
    "table": ({"page_table": torch.zeros(2, 3).long()}, TypeError, "page_table"),
    "lengths": ({"context_lengths": torch.zeros(3).int()}, ValueError, r"context_lengths is \[3\]"),
    "too long": ({"context_lengths": torch.tensor([1, 999]).int()}, ValueError, "holds 999"),
    "negative": ({"context_lengths": torch.tensor([-1, 9]).int()}, ValueError, "holds -1"),
    "page": ({"page_table": torch.full((2, 3), 77).int()}, ValueError, "page_table holds 77"),
    "offsets": ({"cu_queries": torch.tensor([0, 2]).int()}, ValueError, r"cu_queries is \[2\]"),
    "falling": ({"cu_queries": torch.tensor([0, 2, 1]).int()}, ValueError, "offsets that rise"),
    "beyond": ({"cu_queries": torch.tensor([0, 2, 3]).int()}, ValueError, "offsets that rise"),
    "window": ({"window": 0}, ValueError, "window is 0"),
    "softcap": ({"softcap": 0.0}, ValueError, "softcap is 0.0"),
    "scale": ({"scale": float("nan")}, ValueError, "scale is nan"),
    "out": ({"out": torch.zeros(1, 4, 32)}, ValueError, r"out is \[1, 4, 32\]"),
    "max_context": ({"max_context": 20}, ValueError, "holds 30"),
}


@pytest.mark.parametrize("case", WRONG)
def test_errors_name_op_argument_and_what_was_expected(case: str) -> None:
    wrong, error, message = WRONG[case]
    cache = draw([5, 30])
    names = ("q", "key_pages", "value_pages", "page_table", "context_lengths", "cu_queries")
    arguments: dict[str, Any] = dict(zip(names, cache.arguments(), strict=True))
    with pytest.raises(error, match=message) as caught:
        paged_attention(**{**arguments, **wrong})
    assert "paged_attention: " in str(caught.value)
