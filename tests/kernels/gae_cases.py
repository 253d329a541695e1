"""Inputs and fp64 truth shared by the tests of GAE."""

from __future__ import annotations

import numpy as np
import torch

from rlhf_fast_kernels import native, rewards_and_gae, triton_support

TRITON = triton_support.installed() and triton_support.interpreting()
IMPLS = [
    "reference",
    *(["cpu"] if native.missing("gae") is None else []),
    *(["triton"] if TRITON else []),
]
GAMMA, LAMBDA = 0.99, 0.95


def gae_by_definition(rewards, values, mask, gamma, gae_lambda, bootstrap=None):
    """A_t = sum_k (gamma lambda)^k delta_{t+k} over the true slots, O(T^2), fp64."""
    r, v = rewards.double().numpy(), values.double().numpy()
    m = mask.numpy()
    advantages, returns = np.zeros_like(v), np.zeros_like(v)
    for s in range(v.shape[0]):
        at = np.flatnonzero(m[s])
        if at.size == 0:
            continue
        after = 0.0 if bootstrap is None else float(bootstrap[s])
        following = np.append(v[s, at[1:]], after)
        delta = r[s, at] + gamma * following - v[s, at]
        for k, t in enumerate(at):
            decay = (gamma * gae_lambda) ** np.arange(at.size - k)
            advantages[s, t] = (decay * delta[k:]).sum()
        returns[s, at] = advantages[s, at] + v[s, at]
    return torch.from_numpy(advantages), torch.from_numpy(returns)


def holes(rows, columns, density=0.8, seed=0):
    return torch.rand(rows, columns, generator=torch.Generator().manual_seed(seed)) < density


def trailing(rows, columns, seed=0):
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(0, columns + 1, (rows, 1), generator=generator)
    return torch.arange(columns) < lengths


def draw(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def assert_as_exact_as_eager(got, truth, eager):
    """No worse than fp32 PyTorch, plus a few ulp of the largest value."""
    scale = float(truth.abs().max()) if truth.numel() else 0.0
    allowed = 1.5 * float((eager.double() - truth).abs().max() if truth.numel() else 0.0)
    error = float((got.double() - truth).abs().max() if truth.numel() else 0.0)
    assert error <= allowed + 4e-7 * scale


def fused_with_moments(old, ref, values, scores, mask, impl, **more):
    return rewards_and_gae(
        *(old, ref, values, scores, mask),
        **{"kl_coef": 0.1, "kl_estimator": "k3", "gamma": GAMMA, "gae_lambda": LAMBDA} | more,
        impl=impl,
    )


def fused(*arguments, **more):
    """What there is per token: rewards, kl, advantages, returns."""
    return fused_with_moments(*arguments, **more)[:4]


def inputs(rows=6, columns=130):
    floats = [draw(rows, columns, seed=i) for i in range(3)]
    return *floats, draw(rows, seed=9), holes(rows, columns)
