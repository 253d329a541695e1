"""Drawing tokens from logits, with randomness that belongs to the sample and not to the batch.

A draw is a pure function of (logits row, seed, step). There is no random-number generator with a
state: the uniform of step t of a sample is a hash of its seed and t, so a sample comes out the same
alone, in any batch, after a resume, or on another rank.

    u = hash(seed, step)                   in (0, 1), 50 bits
    token = min { v : sum_{w <= v} p_w > u * sum_w p_w }     (inverse CDF, fp64, index order)

The hash is two rounds of the splitmix64 finaliser (Steele, Lea and Flood, "Fast splittable
pseudorandom number generators", OOPSLA 2014) in wrapping int64 arithmetic.

Order of the warps: temperature, top-k, top-p on what top-k left, min-p on what top-p left. This is
the order of transformers' `generate`. Ties at the top-k and top-p borders go to the lower token id,
so `top_k=1` and `top_p=0` are greedy decoding even where bf16 logits tie.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from rlhf_fast.errors import GenerationError
from rlhf_fast.types import SamplingParams

INVALID_TOKEN = -1
_UNIFORM_BITS = 50


class Draw(NamedTuple):
    """One token a row.

    Args:
        tokens: [B] int64, INVALID_TOKEN where the logits were unusable.
        logprobs: [B] float32 under the distribution that was drawn from, after every warp;
            exactly 0 for greedy rows, NaN for unusable ones.
        raw_logprobs: [B] float32 under softmax(logits / temperature) without top-k, top-p and
            min-p; under softmax(logits) at temperature 0. NaN for unusable rows. This one is
            comparable with the trainer's log-probs and is what a Rollout holds.
    """

    tokens: Tensor
    logprobs: Tensor
    raw_logprobs: Tensor


def validate_sampling(sampling: SamplingParams, vocab_size: int | None = None) -> None:
    """Check the parameters; every violation is in the one message.

    `top_k` above the vocabulary is legal and keeps everything; `top_p` 0 keeps the best token.

    Raises:
        GenerationError: RF4001.
    """
    numbers = {
        "temperature": (sampling.temperature, math.inf),
        "top_p": (sampling.top_p, 1.0),
        "min_p": (sampling.min_p, 1.0),
    }
    faults = [
        f"{name}={value}: finite and in [0, {'inf)' if high == math.inf else '1]'}"
        for name, (value, high) in numbers.items()
        if not (math.isfinite(value) and 0.0 <= value <= high)
    ]
    if sampling.max_new_tokens < 1:
        faults.append(f"max_new_tokens={sampling.max_new_tokens}: at least 1")
    if sampling.top_k < 0:
        faults.append(f"top_k={sampling.top_k}: 0 (off) or more")
    limit = math.inf if vocab_size is None else vocab_size
    strangers = [i for i in sampling.stop_token_ids if not 0 <= i < limit]
    if strangers:
        faults.append(f"stop_token_ids={strangers}: ids in [0, {limit})")
    if any(not text for text in sampling.stop_strings):
        faults.append("stop_strings: an empty string would stop every response")
    if faults:
        raise GenerationError(
            "RF4001",
            f"{len(faults)} invalid sampling parameter{'s' if len(faults) > 1 else ''}",
            where="SamplingParams",
            expected="; ".join(faults),
            remedy="correct the values named above",
        )


def _signed(constant: int) -> int:
    return constant - (1 << 64) if constant >= 1 << 63 else constant


_GOLDEN = _signed(0x9E3779B97F4A7C15)
_MIX_1 = _signed(0xBF58476D1CE4E5B9)
_MIX_2 = _signed(0x94D049BB133111EB)


def _logical_shift(x: Tensor, bits: int) -> Tensor:
    # int64 >> keeps the sign; the mask clears what it dragged in.
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _mix(x: Tensor) -> Tensor:
    x = (x ^ _logical_shift(x, 30)) * _MIX_1
    x = (x ^ _logical_shift(x, 27)) * _MIX_2
    return x ^ _logical_shift(x, 31)


def counter_uniform(seeds: Tensor, steps: Tensor | int) -> Tensor:
    """Float64 uniforms strictly inside (0, 1), one for each (seed, step), broadcast.

    Args:
        seeds: [B] or [B, 1] int64, any values.
        steps: [B] or [R] int64 or one int: the counter, the index of the response token.
    """
    counter = torch.as_tensor(steps, dtype=torch.int64, device=seeds.device) + 1
    state = _mix(seeds + _GOLDEN) + counter * _GOLDEN
    bits = _logical_shift(_mix(state), 64 - _UNIFORM_BITS)
    # 50 bits, not 53: the largest u is then 4 ulps below 1 and u * total stays below total.
    return (bits.to(torch.float64) + 0.5) * 2.0**-_UNIFORM_BITS


def top_k_mask(logits: Tensor, k: int) -> Tensor:
    """[B, V] bool: exactly the k best tokens of each row; ties to the lower id; k > V is V."""
    k = min(k, logits.shape[-1])
    kth = logits.topk(k, dim=-1).values[:, -1:]
    above = logits > kth
    ties = logits == kth
    room = k - above.sum(-1, keepdim=True)
    return above | (ties & (ties.cumsum(-1) <= room))


def top_p_mask(logits: Tensor, top_p: float) -> Tensor:
    """[B, V] bool: the shortest prefix of the tokens, best first, whose mass reaches top_p.

    The best token is always kept, so 0 is legal (Holtzman et al. 2020, nucleus sampling).
    """
    ordered, index = torch.softmax(logits, dim=-1).sort(dim=-1, descending=True, stable=True)
    mass_before = ordered.cumsum(-1, dtype=torch.float64) - ordered
    keep = mass_before < top_p
    keep[:, 0] = True
    return torch.zeros_like(keep).scatter_(-1, index, keep)


def warp_logits(scaled: Tensor, sampling: SamplingParams) -> Tensor:
    """Apply top-k, top-p, min-p to logits [B, V] float32 that temperature has already divided.

    Tokens that are ruled out become -inf.
    """
    if 0 < sampling.top_k < scaled.shape[-1]:
        scaled = scaled.where(top_k_mask(scaled, sampling.top_k), -math.inf)
    if sampling.top_p < 1.0:
        scaled = scaled.where(top_p_mask(scaled, sampling.top_p), -math.inf)
    if sampling.min_p > 0.0:
        floor = scaled.amax(-1, keepdim=True) + math.log(sampling.min_p)
        scaled = scaled.where(scaled >= floor, -math.inf)
    return scaled


def inverse_cdf(probs: Tensor, uniforms: Tensor, best: Tensor) -> Tensor:
    """[B] int64: the token whose slice of the cumulative distribution holds the uniform.

    Never a token of probability 0: the cumulative sum has to rise strictly at the token drawn.

    Args:
        probs: [B, V] float32 or float64, non-negative, not necessarily summing to 1.
        uniforms: [B] float64.
        best: [B] int64, any token of positive probability; answers for the rounding below.
    """
    cdf = probs.cumsum(-1, dtype=torch.float64)
    target = (uniforms * cdf[:, -1]).unsqueeze(-1)
    tokens = torch.searchsorted(cdf, target, right=True).squeeze(-1)
    tokens = tokens.clamp_(max=probs.shape[-1] - 1)
    # A parallel scan (CUDA) may round neighbours apart by an ulp although nothing lies between.
    hit = probs.gather(-1, tokens.unsqueeze(-1)).squeeze(-1) > 0
    return torch.where(hit, tokens, best)


def sample(logits: Tensor, uniforms: Tensor, sampling: SamplingParams) -> Draw:
    """Draw one token a row.

    A row is unusable if it holds NaN or +inf or nothing but -inf; it comes back as INVALID_TOKEN,
    and it is the caller's to raise, since the caller knows whose row it is. Single -inf entries are
    legal and never drawn.

    Args:
        logits: [B, V] in any float dtype; computed in float32.
        uniforms: [B] float64, `counter_uniform(seeds, step)`.
        sampling: validated parameters.
    """
    logits = logits.float()
    top, best = logits.max(dim=-1)
    valid = top.isfinite()
    # Shift before dividing: a temperature of 1e-30 then gives -inf, never inf - inf.
    scaled = logits - top.unsqueeze(-1)
    if sampling.temperature not in (0.0, 1.0):
        scaled = scaled / sampling.temperature
    raw = torch.log_softmax(scaled, dim=-1)
    if sampling.temperature == 0.0:
        tokens, drawn = best, torch.zeros_like(top)
    else:
        log_probs = torch.log_softmax(warp_logits(scaled, sampling), -1) if sampling.warps else raw
        tokens = inverse_cdf(log_probs.exp(), uniforms, best)
        drawn = log_probs.gather(-1, tokens.unsqueeze(-1)).squeeze(-1)
    chosen = raw.gather(-1, tokens.unsqueeze(-1)).squeeze(-1)
    return Draw(
        torch.where(valid, tokens, INVALID_TOKEN),
        drawn.where(valid, math.nan),
        chosen.where(valid, math.nan),
    )
