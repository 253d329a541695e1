"""Attention over pages: the op against torch's SDPA on padded caches, and against read bandwidth.

    python -m bench.kernels.bench_paged_attention [--case decode:64x8x2x64x256 ...] [--page 64]
                                                  [--dtype fp32 ...] [--device cpu] [--threads 2]
                                                  [--repeats 9] [--quick] [--json FILE]

A case is `decode` or `prefill`: sequences x query heads x kv heads x head dim x context. Contexts
are ragged, uniform in [C / 2, C], pages shuffled, head-major in memory. Contenders:

    cpu, triton     a prepared rlhf_fast_kernels.PagedAttention
    sdpa            scaled_dot_product_attention on padded caches that lie ready, with a mask
    gather + sdpa   the same on caches that are gathered from the pages in the call
    flash decode    flash_attn_with_kvcache on the pages, where it is installed (page 256 only)

Errors are against fp64. Bytes are one read of the keys and values of every context, q and out; the
flops of a causal product, 4 D a query head and visible key.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from rlhf_fast_kernels import PagedAttention, native, paged_attention

from . import harness

CASES = (
    "decode:64x4x4x32x80",
    "decode:64x8x2x64x256",
    "decode:16x32x8x128x512",
    "prefill:8x8x2x64x128",
)
GPU_CASES = (
    "decode:64x32x8x128x2048",
    "decode:256x32x8x128x1024",
    "decode:64x32x32x64x1024",
    "prefill:16x32x8x128x1024",
)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
ERROR_LIMIT = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
ROTATED_BYTES = 128 << 20
Op = Callable[[], Tensor]


@dataclass
class Cache:
    """One layer: pages, and the same keys and values padded."""

    q: Tensor
    keys: Tensor
    values: Tensor
    table: Tensor
    contexts: Tensor
    offsets: Tensor | None
    mask: Tensor  # [S, 1, n, C]
    padded: tuple[Tensor, Tensor]  # [S, Hkv, C, D] each

    def gathered(self, pages: Tensor) -> Tensor:
        sequences, columns = self.table.shape
        _, page, heads, width = pages.shape
        rows = pages.transpose(1, 2)[self.table.long()]  # [S, P, Hkv, page, D]
        return rows.transpose(1, 2).reshape(sequences, heads, columns * page, width)

    def sdpa(self, keys: Tensor, values: Tensor) -> Tensor:
        """Rows as the op gives them; queries of all sequences are as many."""
        sequences = len(self.contexts)
        q = self.q.unflatten(0, (sequences, -1)).transpose(1, 2)
        grouped = q.shape[1] != keys.shape[1]
        out = F.scaled_dot_product_attention(
            *(q, keys, values), attn_mask=self.mask, enable_gqa=grouped
        )
        return out.transpose(1, 2).flatten(0, 1)


def draw(kind: str, sizes: Sequence[int], page: int, dtype: torch.dtype, device: Any) -> Cache:
    sequences, heads, kv_heads, width, longest = sizes
    generator = torch.Generator().manual_seed(0)
    columns = -(-longest // page)
    contexts = torch.randint(longest // 2, longest + 1, (sequences,), generator=generator)
    queries = 1 if kind == "decode" else longest // 2
    shape = (sequences * columns, kv_heads, page, width)
    keys, values = (
        torch.randn(shape, generator=generator).to(device, dtype).transpose(1, 2) for _ in range(2)
    )
    table = torch.randperm(len(keys), generator=generator).view(sequences, columns)
    q = torch.randn(sequences * queries, heads + 2 * kv_heads, width, generator=generator)
    position = contexts[:, None] - queries + torch.arange(queries)
    mask = torch.arange(columns * page) <= position[..., None]
    offsets = None
    if kind == "prefill":
        offsets = (torch.arange(sequences + 1) * queries).int().to(device)
    cache = Cache(
        q.to(device, dtype)[:, :heads],
        keys,
        values,
        table.int().to(device),
        contexts.int().to(device),
        offsets,
        mask[:, None].to(device),
        (keys, values),
    )
    cache.padded = cache.gathered(keys), cache.gathered(values)
    return cache


def ours(cache: Cache) -> Op:
    arguments = (cache.q, cache.keys, cache.values, cache.table, cache.contexts, cache.offsets)
    queries = len(cache.q) // len(cache.contexts)
    attend = PagedAttention(*arguments, max_query=queries)
    out = attend.out
    return lambda: attend(cache.q, cache.keys, cache.values, out)


def flash_decode(cache: Cache) -> Op:
    from flash_attn import flash_attn_with_kvcache

    q = cache.q[:, None].contiguous()
    keys, values = cache.keys.contiguous(), cache.values.contiguous()

    def run() -> Tensor:
        out: Tensor = flash_attn_with_kvcache(
            *(q, keys, values), cache_seqlens=cache.contexts, block_table=cache.table, causal=True
        )
        return out[:, 0]

    return run


def contenders_of(session: harness.Session, kind: str, cache: Cache) -> dict[str, Op]:
    found = {
        harness.implementation("paged_attention", cache.q): ours(cache),
        "sdpa": lambda: cache.sdpa(*cache.padded),
        "gather + sdpa": lambda: cache.sdpa(*map(cache.gathered, (cache.keys, cache.values))),
    }
    if kind == "decode":
        try:
            run = flash_decode(cache)
            run()
            found["flash decode"] = run
        except Exception as problem:  # whatever a foreign import raises leaves one peer out
            session.report.absent["flash decode"] = f"{type(problem).__name__}: {problem}"
    return found


def exact(cache: Cache) -> Tensor:
    arguments = (cache.q.double(), cache.keys.double(), cache.values.double())
    indices = (cache.table, cache.contexts, cache.offsets)
    return paged_attention(*arguments, *indices, impl="reference")


def run_case(session: harness.Session, case: str, page: int, name: str) -> None:
    kind, _, shape = case.partition(":")
    sizes = [int(part) for part in shape.split("x")]
    dtype = DTYPES[name]
    one = 2 * sizes[0] * sizes[2] * sizes[3] * sizes[4] * dtype.itemsize
    sets = min(8, max(2, ROTATED_BYTES // (2 * one)))
    caches = [draw(kind, sizes, page, dtype, session.device) for _ in range(sets)]
    want = exact(caches[0])
    made = [contenders_of(session, kind, cache) for cache in caches]
    own = next(iter(made[0]))

    def contender(label: str) -> harness.Contender:
        error = float((made[0][label]().double() - want).abs().max())
        mine = label == own
        return harness.Contender(
            label,
            lambda k: made[k][label](),
            error,
            ERROR_LIMIT[dtype],
            ours=mine,
            graph_safe=mine,
        )

    first = caches[0]
    tokens, queries = int(first.contexts.sum()), len(first.q) // sizes[0]
    moved = 2 * tokens * sizes[2] * sizes[3] * dtype.itemsize
    moved += 2 * first.q.numel() * dtype.itemsize
    seen = sum(int(first.mask[s].sum()) for s in range(sizes[0]))
    label = f"{kind}, page {page}, [{shape}] {name}, {queries} queries"
    rows = harness.measure(
        label,
        [contender(name) for name in made[0]],
        sets=sets,
        bytes_moved=moved,
        calls=4,
        flops=4 * seen * sizes[1] * sizes[3],
        **session.limits(),
    )
    session.add(rows)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = harness.parser("attention over pages")
    parser.add_argument("--case", nargs="+", help="decode|prefill:SxHQxHKVxDxCONTEXT")
    parser.add_argument("--page", type=int, default=64, help="tokens of a page")
    parser.add_argument("--dtype", nargs="+", choices=tuple(DTYPES))
    options = parser.parse_args(arguments)
    session = harness.start(options)
    on_cpu = session.device.type == "cpu"
    reason = native.missing("PagedAttention")
    if reason is not None and on_cpu:
        print(f"nothing to measure: {reason}", file=sys.stderr)
        return 1
    cases = options.case or (CASES if on_cpu else GPU_CASES)
    for case in cases[:2] if session.quick else cases:
        for dtype in options.dtype or (("fp32", "bf16") if on_cpu else ("bf16",)):
            run_case(session, case, options.page, dtype)
    return session.finish()


if __name__ == "__main__":
    sys.exit(main())
