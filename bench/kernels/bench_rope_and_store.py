"""Rotating queries and keys and storing keys and values in pages: the op against eager PyTorch.

    python -m bench.kernels.bench_rope_and_store [--shape 64x8x2x64 ...] [--dtype fp32 ...]
                                                 [--device cpu] [--threads 2] [--repeats 9]
                                                 [--quick] [--json FILE]

A shape is tokens x query heads x kv heads x head dim; with and without the norms of Qwen3.
Contenders:

    cpu, triton    a prepared rlhf_fast_kernels.RopeAndStore
    eager          x * cos + rotate_half(x) * sin and index_put, as transformers writes them

Both change q in place, so calls of a turn rotate it on and on. Errors are those of the stored keys
against fp64. Bytes are one read of q, k and v, and one write of q and the pages.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from rlhf_fast_kernels import RopeAndStore, native
from rlhf_fast_kernels.reference.rope_and_store import rms_norm, rotate

from . import harness

SHAPES = ("64x4x4x32", "64x8x2x64", "1024x8x2x64", "1024x32x8x128")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
ERROR_LIMIT = {torch.float32: 1e-5, torch.bfloat16: 1e-1}
PAGE = 64
SETS = 8


class Layer:
    """A fused product, pages, tables and norms."""

    def __init__(
        self, sizes: Sequence[int], norm: bool, dtype: torch.dtype, device: torch.device
    ) -> None:
        tokens, heads, kv_heads, width = sizes
        generator = torch.Generator().manual_seed(0)
        fused = torch.randn(tokens, heads + 2 * kv_heads, width, generator=generator)
        self.q, self.k, self.v = fused.to(device, dtype).split((heads, kv_heads, kv_heads), 1)
        pages = torch.zeros(2, tokens // PAGE + 1, kv_heads, PAGE, width, dtype=dtype)
        self.keys, self.values = pages.to(device).transpose(2, 3)
        self.slots = torch.randperm(tokens, generator=generator).to(device)
        angles = torch.randn(tokens, width // 2, generator=generator)
        self.positions = torch.arange(tokens, device=device)
        self.cos, self.sin = (
            torch.cat((x, x), -1).to(device) for x in (angles.cos(), angles.sin())
        )
        weights = 1 + torch.randn(2, width, generator=generator) / 4
        self.norms = tuple(weights.to(device, dtype)) if norm else (None, None)

    def tables(self) -> dict[str, Any]:
        return {"positions": self.positions, "cos": self.cos, "sin": self.sin}

    def ours(self) -> Callable[[], Tensor]:
        layer = (self.q, self.k, self.v, self.keys, self.values)
        norms = {"q_norm": self.norms[0], "k_norm": self.norms[1]}
        store = RopeAndStore(*layer, self.slots, **self.tables(), **norms)

        def run() -> Tensor:
            store(*layer, *self.norms)
            return self.keys

        return run

    def eager(self) -> Callable[[], Tensor]:
        def run() -> Tensor:
            cos, sin = self.cos[self.positions], self.sin[self.positions]
            self.q.copy_(rotate(rms_norm(self.q, self.norms[0], 1e-6), cos, sin))
            at = self.slots // PAGE, self.slots % PAGE
            self.keys[at] = rotate(rms_norm(self.k, self.norms[1], 1e-6), cos, sin)
            self.values[at] = self.v
            return self.keys

        return run

    def error(self, run: Callable[[], Tensor]) -> float:
        weight = None if self.norms[1] is None else self.norms[1].double()
        k = rms_norm(self.k.double(), weight, 1e-6)
        want = rotate(k, self.cos.double()[self.positions], self.sin.double()[self.positions])
        got = run()[self.slots // PAGE, self.slots % PAGE]
        return float((got.double() - want).abs().max())


def run_case(session: harness.Session, shape: str, name: str, norm: bool) -> None:
    sizes = [int(part) for part in shape.split("x")]
    dtype = DTYPES[name]
    layers = [Layer(sizes, norm, dtype, session.device) for _ in range(SETS)]
    own = harness.implementation("rope_and_store", layers[0].q)
    made = {own: [x.ours() for x in layers], "eager": [x.eager() for x in layers]}

    def contender(label: str) -> harness.Contender:
        runs, mine = made[label], label == own
        error = layers[0].error(runs[0])
        limit = ERROR_LIMIT[dtype]
        return harness.Contender(
            label, lambda k: runs[k](), error, limit, ours=mine, graph_safe=mine
        )

    tokens, heads, kv_heads, width = sizes
    rows = harness.measure(
        f"[{shape}] {name}{', norms' if norm else ''}",
        [contender(label) for label in made],
        sets=SETS,
        bytes_moved=tokens * (2 * heads + 4 * kv_heads) * width * dtype.itemsize,
        calls=8,
        **session.limits(),
    )
    session.add(rows)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = harness.parser("rotating and storing")
    parser.add_argument("--shape", nargs="+", default=SHAPES, help="TOKENSxHQxHKVxD")
    parser.add_argument("--dtype", nargs="+", default=tuple(DTYPES), choices=tuple(DTYPES))
    options = parser.parse_args(arguments)
    session = harness.start(options)
    reason = native.missing("RopeAndStore")
    if reason is not None and session.device.type == "cpu":
        print(f"nothing to measure: {reason}", file=sys.stderr)
        return 1
    for shape in options.shape[:2] if session.quick else options.shape:
        for dtype in options.dtype:
            for norm in (False, True):
                run_case(session, shape, dtype, norm)
    return session.finish()


if __name__ == "__main__":
    sys.exit(main())
