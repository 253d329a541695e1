"""Drawing tokens from logits in plain PyTorch; the definition is in `rlhf_fast_kernels.sample`."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from rlhf_fast_kernels.reference.common import output_dtype

INVALID_TOKEN = -1
WORD = 0xFFFFFFFF
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
ROUNDS = 10
Setting = float | Tensor


def _product(multiplier: int, x: Tensor) -> tuple[Tensor, Tensor]:
    """(high, low) words of a 32 x 32 bit product; the parts of 16 bits keep int64 from wrapping."""
    low = multiplier * (x & 0xFFFF)
    high = multiplier * (x >> 16) + (low >> 16)
    return high >> 16, ((high & 0xFFFF) << 16) | (low & 0xFFFF)


def philox(counter: tuple[Tensor, ...], key: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    """Philox4x32-10: four words in [0, 2^32) as int64, from four counter and two key words.

    Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(ROUNDS):
        high0, low0 = _product(MULTIPLIERS[0], c0)
        high1, low1 = _product(MULTIPLIERS[1], c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + KEY_STEPS[0]) & WORD, (k1 + KEY_STEPS[1]) & WORD
    return c0, c1, c2, c3


def exponentials(seeds: Tensor, steps: Tensor, vocab: int) -> Tensor:
    """[B, vocab] fp64: the Exp(1) variable of every (seed, step, token id)."""
    ids = torch.arange(vocab, device=seeds.device)
    counter = (ids >> 12 << 10) | (ids & 1023)
    seeds, steps = seeds.unsqueeze(-1), steps.unsqueeze(-1)
    words = philox(
        (counter, steps & WORD, (steps >> 32) & WORD, torch.zeros_like(counter)),
        (seeds & WORD, (seeds >> 32) & WORD),
    )
    which = ((ids >> 10) & 3).expand_as(words[0])
    drawn = torch.stack(words).gather(0, which.unsqueeze(0)).squeeze(0)
    return -torch.log1p(-(drawn.double() + 0.5) * 2.0**-32)


def kept_tokens(z: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor) -> Tensor:
    """[B, V] bool: what top-k, then top-p, then min-p leave.

    Args:
        z: [B, V] fp64, (logits - max) / temperature.
        top_k, top_p, min_p: [B].
    """
    vocab = z.shape[-1]
    ordered, ids = z.sort(dim=-1, descending=True, stable=True)  # ties: the lower id first
    rank = torch.arange(vocab, device=z.device)
    limit = torch.where(top_k > 0, top_k, vocab).unsqueeze(-1)
    mass = torch.where(rank < limit, ordered.exp(), 0)
    before = mass.cumsum(-1) - mass
    nucleus = (before < (top_p.unsqueeze(-1) * mass.sum(-1, keepdim=True))) | (rank == 0)
    nucleus = nucleus | (top_p >= 1).unsqueeze(-1)
    peaked_enough = ordered >= min_p.log().unsqueeze(-1)
    keep = (rank < limit) & nucleus & peaked_enough
    return torch.zeros_like(keep).scatter_(-1, ids, keep)


def sample(
    logits: Tensor,
    *,
    seeds: Tensor,
    step: int | Tensor,
    temperature: Setting = 1.0,
    top_k: int | Tensor = 0,
    top_p: Setting = 1.0,
    min_p: Setting = 0.0,
    vocab_size: int | None = None,
    with_entropy: bool = True,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """(tokens, logprobs, raw_logprobs, entropy); see `rlhf_fast_kernels.sample`.

    Temperature, masses and race in fp64, so this decides what the fast implementations round.
    """
    compute, device, rows = output_dtype(logits), logits.device, logits.shape[:1]
    x = logits[:, :vocab_size].double()

    def per_row(value: float | Tensor, dtype: torch.dtype) -> Tensor:
        if isinstance(value, Tensor):
            return value.to(dtype).expand(rows)
        return torch.full(rows, value, dtype=dtype, device=device)

    steps, k = per_row(step, torch.int64), per_row(top_k, torch.int64)
    # In fp32 first, as the kernels receive them: 0.9 is the same number everywhere.
    t, p, floor = (per_row(v, torch.float32).double() for v in (temperature, top_p, min_p))
    best = x.amax(-1)
    legal = (t >= 0) & (t < math.inf) & (k >= 0) & (p >= 0) & (p <= 1) & (floor >= 0) & (floor <= 1)
    valid = legal & best.isfinite()  # NaN in a row is its maximum here
    z = (x - best.unsqueeze(-1)) / torch.where(t > 0, t, 1).unsqueeze(-1)
    log_p = torch.log_softmax(z, -1)
    greedy = (t == 0) | (k == 1) | (p == 0)
    kept = torch.where(kept_tokens(z, k, p, floor), z, -math.inf)
    race = kept - exponentials(seeds, steps, x.shape[-1]).log()
    race = torch.where(greedy.unsqueeze(-1), x, race)
    # argmax may return any of equal maxima; the first of them is the definition.
    ahead = race == race.amax(-1, keepdim=True)
    tokens = ahead.to(torch.uint8).argmax(-1, keepdim=True)
    drawn = torch.log_softmax(kept, -1).gather(-1, tokens).squeeze(-1)
    drawn = torch.where(greedy, 0, drawn)
    raw = log_p.gather(-1, tokens).squeeze(-1)

    def finish(value: Tensor) -> Tensor:
        return torch.where(valid, value, math.nan).to(compute)

    entropy = None
    if with_entropy:
        finite = torch.where(log_p == -math.inf, 0, log_p)
        entropy = finish(-(log_p.exp() * finite).sum(-1))
    tokens = torch.where(valid, tokens.squeeze(-1), INVALID_TOKEN)
    return tokens, finish(drawn), finish(raw), entropy
