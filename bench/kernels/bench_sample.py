"""Sampling a token a row: the op against softmax + multinomial and sort-based filters.

    python -m bench.kernels.bench_sample [--shape 256x151936 ...] [--dtype bf16 ...]
                                         [--device cpu] [--threads 2] [--repeats 9] [--quick]
                                         [--json FILE]

Cases are `plain` (temperature 1) and `top-k 50, top-p 0.9`. Contenders:

    cpu, triton         rlhf_fast_kernels.sample: token, both log-probs and entropy
    multinomial         torch.multinomial of the softmax; the token alone
    multinomial, all    the same, then log_softmax for the outputs that the op gives
    exponential race    argmax of softmax / Exp(1), with torch's generator; the token alone
    sort ...            in front of those: top-k by topk, top-p by a sort, as transformers does
    flashinfer, vllm    where they are installed, on a GPU; the token alone (vllm: its filter)

The error of a contender with log-probs is their largest difference from fp64, given the token; a
token that the filters rule out is an infinite error. The gate is 1e-4, and top-p may be off by as
much. Peers keep every tie at the border of top-k and so draw from another distribution where
bf16 logits tie: theirs is 0.1, with 0.05 of slack in top-p. Bytes are one read of the logits: a
filter needs more, but not from memory.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from rlhf_fast_kernels import native, sample
from rlhf_fast_kernels.reference.sample import kept_tokens

from . import harness

SHAPES = ("256x151936", "8x151936", "64x32000")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
CASES = {"plain": (0, 1.0), "top-k 50, top-p 0.9": (50, 0.9)}
ERROR_ROWS = 8
ERROR_LIMIT, TOP_P_SLACK = 1e-4, 1e-4
PEER_ERROR_LIMIT, PEER_TOP_P_SLACK = 0.1, 0.05
ROTATED_BYTES = 256 << 20

Outputs = tuple[Tensor, Tensor | None]  # tokens, log-probs of the processed distribution
Op = Callable[[Tensor], Outputs]


# ---- contenders ---------------------------------------------------------------------------------


def ours(logits: Tensor, seeds: Tensor, top_k: int, top_p: float) -> Outputs:
    drawn = sample(logits, seeds=seeds[: logits.shape[0]], step=0, top_k=top_k, top_p=top_p)
    return drawn.tokens, drawn.logprobs


def filtered(logits: Tensor, top_k: int, top_p: float) -> Tensor:
    """The two warpers of transformers' `generate`, in fp32."""
    z = logits.float()
    if top_k > 0:
        z = z.masked_fill(z < z.topk(top_k).values[:, -1:], -math.inf)
    if top_p < 1:
        ordered, ids = z.sort(dim=-1)
        out = ordered.softmax(-1).cumsum(-1) <= 1 - top_p
        out[:, -1] = False
        z = z.masked_fill(out.scatter(1, ids, out), -math.inf)
    return z


def multinomial(logits: Tensor, top_k: int, top_p: float) -> Outputs:
    probs = torch.softmax(filtered(logits, top_k, top_p), -1)
    return torch.multinomial(probs, 1).squeeze(-1), None


def multinomial_all(logits: Tensor, top_k: int, top_p: float) -> Outputs:
    log_p = torch.log_softmax(filtered(logits, top_k, top_p), -1)
    tokens = torch.multinomial(log_p.exp(), 1)
    raw = torch.log_softmax(logits.float(), -1) if top_k > 0 or top_p < 1 else log_p
    raw.gather(1, tokens)
    (raw.exp() * raw).sum(-1)  # the entropy, as the op gives it
    return tokens.squeeze(-1), log_p.gather(1, tokens).squeeze(-1)


def exponential_race(logits: Tensor, top_k: int, top_p: float) -> Outputs:
    probs = torch.softmax(filtered(logits, top_k, top_p), -1)
    return (probs / torch.empty_like(probs).exponential_()).argmax(-1), None


def flashinfer(top_k: int, top_p: float) -> Op:
    from flashinfer import sampling

    def run(logits: Tensor) -> Outputs:
        if top_k == 0:
            return sampling.sampling_from_logits(logits.float()), None
        return sampling.top_k_top_p_sampling_from_logits(logits.float(), top_k, top_p), None

    return run


def vllm(top_k: int, top_p: float) -> Op:
    from vllm.v1.sample.ops.topk_topp_sampler import apply_top_k_top_p

    def run(logits: Tensor) -> Outputs:
        rows, device = logits.shape[0], logits.device
        k = torch.full((rows,), top_k, device=device) if top_k > 0 else None
        p = torch.full((rows,), top_p, device=device) if top_p < 1 else None
        return exponential_race(apply_top_k_top_p(logits.float(), k, p), 0, 1.0)

    return run


def installed(session: harness.Session, top_k: int, top_p: float) -> dict[str, Op]:
    """The peers from other projects that import; the others are noted with the reason."""
    found: dict[str, Op] = {}
    for load in (flashinfer, vllm):
        if session.device.type != "cuda":
            session.report.absent[load.__name__] = "runs on CUDA devices only"
            continue
        try:
            found[load.__name__] = load(top_k, top_p)
        except Exception as problem:  # whatever a foreign import raises leaves one peer out
            session.report.absent[load.__name__] = f"{type(problem).__name__}: {problem}"
    return found


# ---- errors -------------------------------------------------------------------------------------


def largest_error(op: Op, logits: Tensor, top_k: int, top_p: float, slack: float) -> float:
    logits = logits[:ERROR_ROWS]
    tokens, logprobs = op(logits)
    z = logits.double() - logits.double().amax(-1, keepdim=True)
    column = torch.ones(len(z), device=z.device)

    def kept(p: float) -> Tensor:
        return kept_tokens(z, (top_k * column).long(), p * column.double(), 0 * column.double())

    at = tokens.long().unsqueeze(-1)
    lowest = z.masked_fill(~kept(min(1.0, top_p + slack)), math.inf).amin(-1, keepdim=True)
    if (z.gather(1, at) < lowest).any():
        return math.inf
    if logprobs is None:
        return 0.0
    exact = torch.log_softmax(z.masked_fill(~kept(top_p), -math.inf), -1).gather(1, at).squeeze(-1)
    return float((logprobs.double() - exact).abs().max())


# ---- the script ---------------------------------------------------------------------------------


def draw(rows: int, vocab: int, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    size = rows * vocab * dtype.itemsize
    sets = min(8, max(2, ROTATED_BYTES // size))
    return [
        (2 * torch.randn(rows, vocab, generator=generator)).to(device, dtype) for _ in range(sets)
    ]


def run_case(
    session: harness.Session, sets: Sequence[Tensor], label: str, top_k: int, top_p: float
) -> None:
    seeds = torch.arange(sets[0].shape[0], device=session.device)
    prefix = "sort, " if top_p < 1 else ""
    own = harness.implementation("sample", sets[0])
    settings = {"top_k": top_k, "top_p": top_p}
    ops: dict[str, Op] = {
        own: partial(ours, seeds=seeds, **settings),  # type: ignore[arg-type]
        f"{prefix}multinomial": partial(multinomial, **settings),  # type: ignore[arg-type]
        f"{prefix}multinomial, all": partial(multinomial_all, **settings),  # type: ignore[arg-type]
        f"{prefix}exponential race": partial(exponential_race, **settings),  # type: ignore[arg-type]
        **installed(session, top_k, top_p),
    }

    def contender(name: str, op: Op) -> harness.Contender:
        def run(k: int) -> Any:
            return op(sets[k])

        mine = name == own
        slack, limit = TOP_P_SLACK, ERROR_LIMIT
        if not mine:
            slack, limit = PEER_TOP_P_SLACK, PEER_ERROR_LIMIT
        error = largest_error(op, sets[0], top_k, top_p, slack)
        return harness.Contender(name, run, error, limit, ours=mine, graph_safe=mine)

    rows = harness.measure(
        label,
        [contender(name, op) for name, op in ops.items()],
        sets=len(sets),
        bytes_moved=sets[0].numel() * sets[0].element_size(),
        **session.limits(),
    )
    session.add(rows)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = harness.parser("sampling a token a row")
    parser.add_argument("--shape", nargs="+", default=SHAPES, help="ROWSxVOCAB")
    parser.add_argument("--dtype", nargs="+", default=tuple(DTYPES), choices=tuple(DTYPES))
    options = parser.parse_args(arguments)
    session = harness.start(options)
    reason = native.missing("sample")
    if reason is not None and session.device.type == "cpu":
        print(f"nothing to measure: {reason}", file=sys.stderr)
        return 1
    for shape in options.shape[-1:] if session.quick else options.shape:
        rows, vocab = (int(part) for part in shape.split("x"))
        for dtype in options.dtype:
            sets = draw(rows, vocab, DTYPES[dtype], session.device)
            for name, (top_k, top_p) in CASES.items():
                run_case(session, sets, f"[{rows}, {vocab}] {dtype}, {name}", top_k, top_p)
    return session.finish()


if __name__ == "__main__":
    sys.exit(main())
