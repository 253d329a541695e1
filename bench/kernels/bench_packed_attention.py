"""Attention in packed segments with gradients: the op against SDPA on padded segments.

    python -m bench.kernels.bench_packed_attention [--case 128x30x4x4x24 ...] [--dtype fp32 ...]
                                                   [--device cpu] [--threads 2] [--repeats 9]
                                                   [--quick] [--json FILE]

A case is segments x mean length x query heads x kv heads x head dim; lengths are uniform in half to
one and a half of the mean, q, k and v views of one fused product. Contenders, forward and backward:

    cpu, triton     rlhf_fast_kernels.packed_attention
    padded sdpa     scaled_dot_product_attention(is_causal=True) on segments gathered into one
                    right-padded batch, and the result gathered back
    varlen          torch.nn.attention.varlen, on a GPU in half precision
    flash           flash_attn_varlen_func, where it is installed

Errors are the output's, against fp64. Bytes are q, k, v, out and their gradients once, and what is
read again in the backward; flops are those of 7 causal products: 2 forward, 5 backward.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from rlhf_fast_kernels import native, packed_attention

from . import harness

CASES = ("128x30x4x4x24", "64x120x8x2x64", "2x2048x8x8x64", "1x2048x8x2x128")
GPU_CASES = ("256x512x32x8x128", "16x4096x32x8x128", "512x128x16x16x64")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
ERROR_LIMIT = {torch.float32: 1e-5, torch.bfloat16: 3e-2}
ROTATED_BYTES = 128 << 20
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass
class Batch:
    """One layer."""

    fused: Tensor  # [N, Hq + 2 Hkv, D]
    above: Tensor
    lengths: Tensor
    heads: tuple[int, int]

    @property
    def offsets(self) -> Tensor:
        ends = torch.cat((torch.zeros(1, dtype=torch.int64), self.lengths.cumsum(0)))
        return ends.int().to(self.fused.device)

    def parts(self) -> tuple[Tensor, Tensor, Tensor]:
        query, kv = self.heads
        q, k, v = self.fused.split((query, kv, kv), 1)
        return q, k, v


def draw(sizes: Sequence[int], dtype: torch.dtype, device: torch.device) -> Batch:
    segments, mean, query, kv, width = sizes
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(mean // 2, 3 * mean // 2 + 1, (segments,), generator=generator)
    tokens = int(lengths.sum())
    fused = torch.randn(tokens, query + 2 * kv, width, generator=generator)
    above = torch.randn(tokens, query, width, generator=generator)
    return Batch(fused.to(device, dtype), above.to(device, dtype), lengths, (query, kv))


# ---- contenders ---------------------------------------------------------------------------------


def ours(batch: Batch) -> Attend:
    offsets, longest = batch.offsets, int(batch.lengths.max())
    return lambda q, k, v: packed_attention(q, k, v, offsets, max_length=longest)[0]


def padded_sdpa(batch: Batch) -> Attend:
    segments, width = len(batch.lengths), int(batch.lengths.max())
    column, starts = torch.arange(width), batch.lengths.cumsum(0) - batch.lengths
    last = (batch.lengths - 1)[:, None]
    gather = (starts[:, None] + torch.minimum(column, last)).flatten().to(batch.fused.device)
    real = torch.nonzero((column <= last).flatten()).flatten().to(batch.fused.device)

    def pad(x: Tensor) -> Tensor:
        return x.index_select(0, gather).unflatten(0, (segments, width)).transpose(1, 2)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        gqa = q.shape[1] != k.shape[1]
        out = F.scaled_dot_product_attention(
            *(pad(x) for x in (q, k, v)), is_causal=True, enable_gqa=gqa
        )
        return out.transpose(1, 2).flatten(0, 1).index_select(0, real)

    return attend


def varlen(batch: Batch) -> Attend:
    from torch.nn.attention.varlen import varlen_attn

    offsets, longest = batch.offsets, int(batch.lengths.max())
    gqa = batch.heads[0] != batch.heads[1]

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        ends = (offsets, offsets, longest, longest)
        out = varlen_attn(q, k, v, *ends, window_size=(-1, 0), enable_gqa=gqa)
        assert isinstance(out, Tensor)
        return out

    return attend


def flash(batch: Batch) -> Attend:
    from flash_attn import flash_attn_varlen_func

    offsets, longest = batch.offsets, int(batch.lengths.max())

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out: Tensor = flash_attn_varlen_func(
            q, k, v, offsets, offsets, longest, longest, causal=True
        )
        return out

    return attend


def with_backward(attend: Attend, batch: Batch) -> Callable[[], Tensor]:
    def run() -> Tensor:
        inputs = [x.detach().requires_grad_() for x in batch.parts()]
        out = attend(inputs[0], inputs[1], inputs[2])
        torch.autograd.grad(out, inputs, batch.above)
        return out.detach()

    return run


def contenders_of(session: harness.Session, batch: Batch) -> dict[str, Callable[[], Tensor]]:
    found = {harness.implementation("packed_attention", batch.fused): ours(batch)}
    found["padded sdpa"] = padded_sdpa(batch)
    if session.device.type == "cuda" and batch.fused.dtype != torch.float32:
        for name, peer in (("varlen", varlen), ("flash", flash)):
            try:
                attend = peer(batch)
                attend(*batch.parts())
                found[name] = attend
            except Exception as problem:  # whatever a foreign import raises leaves one peer out
                session.report.absent[name] = f"{type(problem).__name__}: {problem}"
    return {name: with_backward(attend, batch) for name, attend in found.items()}


def run_case(session: harness.Session, case: str, name: str) -> None:
    sizes = [int(part) for part in case.split("x")]
    dtype = DTYPES[name]
    first = draw(sizes, dtype, session.device)
    one = 2 * (first.fused.numel() + first.above.numel()) * dtype.itemsize
    batches = [first] + [
        draw(sizes, dtype, session.device) for _ in range(min(7, max(1, ROTATED_BYTES // one - 1)))
    ]
    q, k, v = (x.double() for x in first.parts())
    want, _ = packed_attention(q, k, v, first.offsets, impl="reference")
    made = [contenders_of(session, batch) for batch in batches]
    own = next(iter(made[0]))

    def contender(label: str) -> harness.Contender:
        error = float((made[0][label]().double() - want).abs().max())
        return harness.Contender(
            *(label, lambda k: made[k][label](), error, ERROR_LIMIT[dtype]), ours=label == own
        )

    pairs = int((first.lengths * (first.lengths + 1) // 2).sum())
    # Forward: qkv and out; backward: qkv, out and its gradient again, and the gradients of qkv.
    moved = (3 * first.fused.numel() + 3 * first.above.numel()) * dtype.itemsize
    rows = harness.measure(
        f"[{case}] {name}, {len(first.fused)} tokens, forward and backward",
        [contender(label) for label in made[0]],
        sets=len(batches),
        bytes_moved=moved,
        flops=7 * 2 * pairs * sizes[2] * sizes[4],
        **session.limits(),
    )
    session.add(rows)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = harness.parser("attention in packed segments")
    parser.add_argument("--case", nargs="+", help="SEGMENTSxMEANxHQxHKVxD")
    parser.add_argument("--dtype", nargs="+", choices=tuple(DTYPES))
    options = parser.parse_args(arguments)
    session = harness.start(options)
    on_cpu = session.device.type == "cpu"
    reason = native.missing("packed_attention")
    if reason is not None and on_cpu:
        print(f"nothing to measure: {reason}", file=sys.stderr)
        return 1
    cases = options.case or (CASES if on_cpu else GPU_CASES)
    for case in cases[:2] if session.quick else cases:
        for dtype in options.dtype or (("fp32",) if on_cpu else ("bf16", "fp32")):
            run_case(session, case, dtype)
    return session.finish()


if __name__ == "__main__":
    sys.exit(main())
