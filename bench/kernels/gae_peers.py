"""What is set against the ops of GAE: other ways to the same numbers in plain PyTorch.

All take (rewards, values, mask) and give (advantages, returns). All but the eager loop are right
only where masks are trailing padding.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from rlhf_fast_kernels import reference

GAMMA, LAMBDA = 1.0, 0.95
KL_COEF = 0.05
CHUNK = 128

Inputs = tuple[Tensor, Tensor, Tensor]
Op = Callable[[Inputs], tuple[Tensor, Tensor]]
Rollout = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def eager_loop(inputs: Inputs) -> tuple[Tensor, Tensor]:
    """A loop over time steps that carries value and advantage across masked steps."""
    return reference.gae(*inputs, GAMMA, LAMBDA)


def deltas(inputs: Inputs) -> tuple[Tensor, Tensor]:
    rewards, values, mask = inputs
    values = torch.where(mask, values, 0.0)
    following = torch.nn.functional.pad(values[:, 1:], (0, 1))
    return torch.where(mask, rewards + GAMMA * following - values, 0.0), values


def dense_loop(inputs: Inputs) -> tuple[Tensor, Tensor]:
    """The leanest loop in use: all deltas at once, then one multiply-add per step."""
    delta, values = deltas(inputs)
    advantage = delta.new_zeros(delta.shape[0])
    columns = []
    for step in reversed(delta.unbind(1)):
        advantage = torch.add(step, advantage, alpha=GAMMA * LAMBDA)
        columns.append(advantage)
    advantages = torch.where(inputs[2], torch.stack(columns[::-1], dim=1), 0.0)
    return advantages, advantages + values


def _powers(columns: int, device: torch.device) -> Tensor:
    """[columns, columns]: (gamma lambda)^(source - target) where the source is not before."""
    steps = torch.arange(columns, device=device)
    distance = (steps[:, None] - steps).double()  # row: source step, column: target step
    return torch.where(distance >= 0, (GAMMA * LAMBDA) ** distance, 0.0).float()


def make_matmul(columns: int, device: torch.device) -> Op:
    """No loop, O(R^2) work; the triangle of powers is made outside the timing."""
    powers = _powers(columns, device)

    def matmul(inputs: Inputs) -> tuple[Tensor, Tensor]:
        delta, values = deltas(inputs)
        advantages = torch.where(inputs[2], delta @ powers, 0.0)
        return advantages, advantages + values

    return matmul


def make_chunked_scan(device: torch.device) -> Op:
    """slime's scheme: chunks of 128 by a matrix product, a loop over chunks for what they carry."""
    powers = _powers(CHUNK, device)
    behind = (GAMMA * LAMBDA) ** torch.arange(CHUNK, 0, -1, device=device)

    def chunked_scan(inputs: Inputs) -> tuple[Tensor, Tensor]:
        delta, values = deltas(inputs)
        rows, columns = delta.shape
        padded = torch.nn.functional.pad(delta, (0, -columns % CHUNK))
        local = padded.view(rows, -1, CHUNK) @ powers
        carried = delta.new_zeros(rows, 1)
        for chunk in reversed(local.unbind(1)):
            chunk.addcmul_(carried, behind)
            carried = chunk[:, :1]
        advantages = torch.where(inputs[2], local.view(rows, -1)[:, :columns], 0.0)
        return advantages, advantages + values

    return chunked_scan


def masked_whiten(x: Tensor, mask: Tensor) -> Tensor:
    """As trainers write it: masked mean and variance by multiplication, then the scale."""
    count = mask.sum()
    mean = (x * mask).sum() / count
    variance = ((x - mean).square() * mask).sum() / count
    return (x - mean) * torch.rsqrt(variance + 1e-8) * mask


def make_eager_chain(estimate: Op) -> Callable[[Rollout], tuple[Tensor, Tensor]]:
    """KL, rewards, GAE by `estimate` and whitening, one PyTorch op after the other."""

    def chain(rollout: Rollout) -> tuple[Tensor, Tensor]:
        old_logprobs, ref_logprobs, values, scores, mask = rollout
        rewards = -KL_COEF * (old_logprobs - ref_logprobs)
        last = mask.sum(1) - 1
        rewards[torch.arange(len(rewards), device=mask.device), last] += scores
        advantages, returns = estimate((rewards, values, mask))
        return masked_whiten(advantages, mask), returns

    return chain
