"""Triton kernel of `gae` and `rewards_and_gae`: one program a row, tiles from its end to its start.

In a tile, with n_t the number of valid tokens up to and including t, the recurrence has the closed
form

    A_t = sum over valid s >= t of rate^(n_s - n_t) delta_s + rate^(n_last - n_t + 1) A_behind

because its coefficient is rate = gamma gae_lambda on a valid token and 1 on a masked one. The
matrix n_s - n_t also finds the next valid value, where it is 1. So a tile costs two sums over a
[BLOCK, BLOCK] matrix and no scan. rate^k is exp2(k log2(rate)); log2_rate is finite for rate 0, so
that 0^0 is exp2(0) = 1.

The moments of the advantages are those of x - shift, where shift is an advantage of the row: no
cancellation, and one pass.
"""

import triton
import triton.language as tl

from rlhf_fast_kernels.triton_support import AotCase

BLOCK = 64
NUM_WARPS = 4
NO_KL, EXACT_KL = 0, 4


@triton.jit
def _read(tensor, offset, valid):
    return tl.load(tensor + offset, mask=valid, other=0.0).to(tl.float32)


@triton.jit
def _clamp(x, bound):
    x = tl.where(x < -bound, -bound, x)  # written so that NaN stays NaN
    return tl.where(x > bound, bound, x)


@triton.jit
def _k3(d):
    """exp(-d) - 1 + d; below 0.5 its Taylor polynomial, which does not cancel."""
    y = -d
    s = 1.0 / 3628800.0
    s = s * y + 1.0 / 362880.0
    s = s * y + 1.0 / 40320.0
    s = s * y + 1.0 / 5040.0
    s = s * y + 1.0 / 720.0
    s = s * y + 1.0 / 120.0
    s = s * y + 1.0 / 24.0
    s = s * y + 1.0 / 6.0
    s = s * y + 0.5
    return tl.where((y < 0.5) & (y > -0.5), s * y * y, tl.exp(y) - 1.0 - y)


@triton.jit
def rewards_and_gae_kernel(
    rewards,
    old_logprobs,
    ref_logprobs,
    kl,
    scores,
    values,
    mask,
    bootstrap,
    cu_seqlens,
    out_rewards,
    out_kl,
    out_advantages,
    out_returns,
    out_moments,
    columns,
    rewards_row,
    rewards_column,
    old_row,
    old_column,
    ref_row,
    ref_column,
    kl_row,
    kl_column,
    scores_row,
    scores_column,
    values_row,
    values_column,
    mask_row,
    mask_column,
    bootstrap_row,
    kl_coef,
    log_ratio_clamp,
    reward_clip,
    gamma,
    log2_rate,
    KL: tl.constexpr,
    KL_IN_REWARD: tl.constexpr,
    SCORE_PER_TOKEN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    if cu_seqlens is None:
        start = row * 0
        length = start + columns
        output = row * columns
    else:
        start = tl.load(cu_seqlens + row).to(tl.int64)
        length = tl.load(cu_seqlens + row + 1).to(tl.int64) - start
        output = start
    carried_value = 0.0
    if bootstrap is not None:
        carried_value = tl.load(bootstrap + row * bootstrap_row).to(tl.float32)
    score = 0.0
    if rewards is None and not SCORE_PER_TOKEN:
        score = _clamp(tl.load(scores + row * scores_row).to(tl.float32), reward_clip)
    carried_advantage = 0.0
    count = 0
    shift = tl.full([], 0.0, tl.float64)
    sums = tl.zeros([BLOCK], tl.float64)
    squares = tl.zeros([BLOCK], tl.float64)
    lanes = tl.arange(0, BLOCK)
    earlier = lanes[None, :] <= lanes[:, None]  # [t, s]

    tiles = (length + BLOCK - 1) // BLOCK
    for tile in range(tiles):
        t = (tiles - 1 - tile) * BLOCK + lanes
        inside = t < length
        at = start + t
        valid = inside
        if mask is not None:
            kept = tl.load(mask + row * mask_row + at * mask_column, mask=inside, other=0)
            valid = inside & (kept != 0)
        number = tl.sum(tl.where(earlier, valid.to(tl.int32)[None, :], 0), axis=1)
        total = tl.sum(valid.to(tl.int32), axis=0)
        value = _read(values, row * values_row + at * values_column, valid)

        if rewards is not None:
            reward = _read(rewards, row * rewards_row + at * rewards_column, valid)
        else:
            reward = tl.zeros([BLOCK], tl.float32)
            divergence = tl.zeros([BLOCK], tl.float32)
            if KL == 4:
                divergence = _read(kl, row * kl_row + at * kl_column, valid)
            elif KL != 0:
                d = _read(old_logprobs, row * old_row + at * old_column, valid)
                d -= _read(ref_logprobs, row * ref_row + at * ref_column, valid)
                d = _clamp(d, log_ratio_clamp)
                if KL == 1:
                    divergence = d
                elif KL == 2:
                    divergence = 0.5 * d * d
                else:
                    divergence = _k3(d)
            tl.store(out_kl + output + t, tl.where(valid, divergence, 0.0), mask=inside)
            if KL != 0 and KL_IN_REWARD:
                reward = -kl_coef * divergence
            if SCORE_PER_TOKEN:
                token_score = _read(scores, row * scores_row + at * scores_column, valid)
                reward += _clamp(token_score, reward_clip)
            else:
                last = valid & (number == total) & (count == 0)
                reward = tl.where(last, reward + score, reward)
            tl.store(out_rewards + output + t, tl.where(valid, reward, 0.0), mask=inside)

        distance = number[None, :] - number[:, None]  # [t, s]; for valid s >= t at least 0
        following = tl.where(valid[None, :] & (distance == 1), value[None, :], 0.0)
        next_value = tl.where(number == total, carried_value, tl.sum(following, axis=1))
        delta = reward + gamma * next_value - value
        powers = tl.exp2(tl.maximum(distance, 0).to(tl.float32) * log2_rate)
        terms = tl.where(valid[None, :] & (distance >= 0), powers * delta[None, :], 0.0)
        behind = tl.exp2((total - number + 1).to(tl.float32) * log2_rate)
        advantage = tl.sum(terms, axis=1) + behind * carried_advantage
        tl.store(out_advantages + output + t, tl.where(valid, advantage, 0.0), mask=inside)
        tl.store(out_returns + output + t, tl.where(valid, advantage + value, 0.0), mask=inside)

        front = valid & (number == 1)
        front_advantage = tl.sum(tl.where(front, advantage, 0.0), axis=0)
        front_value = tl.sum(tl.where(front, value, 0.0), axis=0)
        carried_advantage = tl.where(total > 0, front_advantage, carried_advantage)
        carried_value = tl.where(total > 0, front_value, carried_value)
        if out_moments is not None:
            shift = tl.where(count == 0, carried_advantage.to(tl.float64), shift)
            deviation = tl.where(valid, advantage.to(tl.float64) - shift, 0.0)
            sums += deviation
            squares += deviation * deviation
        count += total

    if out_moments is not None:
        n = count.to(tl.float64)
        some = tl.where(count > 0, n, 1.0)
        sum_ = tl.sum(sums, axis=0)
        m2 = tl.sum(squares, axis=0) - sum_ * (sum_ / some)
        tl.store(out_moments + 3 * row, n)
        tl.store(out_moments + 3 * row + 1, shift + sum_ / some)
        tl.store(out_moments + 3 * row + 2, tl.where(m2 < 0, 0.0, m2))


_TENSORS = ("rewards", "old_logprobs", "ref_logprobs", "kl", "scores", "values", "bootstrap")
_OUTPUTS = ("out_rewards", "out_kl", "out_advantages", "out_returns")
_NUMBERS = dict.fromkeys(
    ("kl_coef", "log_ratio_clamp", "reward_clip", "gamma", "log2_rate"), "fp32"
)
_STRIDES = {
    name: "i64" for name in rewards_and_gae_kernel.arg_names if name.endswith(("_row", "_column"))
}


def _case(dtype, absent, offsets=None, KL=NO_KL, SCORE_PER_TOKEN=False):
    """An AOT case without the tensors named in `absent`."""
    pointers = dict.fromkeys(_TENSORS, dtype) | dict.fromkeys(_OUTPUTS, "*fp32")
    pointers |= {"mask": "*i1", "out_moments": "*fp64"}
    if offsets is not None:
        pointers["cu_seqlens"] = offsets
    signature = {name: kind for name, kind in pointers.items() if name not in absent}
    nothing = dict.fromkeys({*absent, *(["cu_seqlens"] if offsets is None else [])})
    flags = {"KL": KL, "KL_IN_REWARD": True, "SCORE_PER_TOKEN": SCORE_PER_TOKEN, "BLOCK": BLOCK}
    return AotCase(
        rewards_and_gae_kernel,
        signature | {"columns": "i64"} | _STRIDES | _NUMBERS,
        nothing | flags,
        num_warps=NUM_WARPS,
    )


AOT_CASES = (
    _case("*fp32", {"rewards", "kl", "bootstrap"}, KL=3),
    _case("*bf16", {"rewards", "kl", "bootstrap", "mask"}, offsets="*i32", KL=1),
    _case("*fp32", {"rewards", "old_logprobs", "ref_logprobs"}, KL=EXACT_KL, SCORE_PER_TOKEN=True),
    _case(
        "*fp32",
        {*_TENSORS, "out_rewards", "out_kl", "out_moments"} - {"rewards", "values"},
    ),
)
