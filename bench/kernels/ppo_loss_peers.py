"""What bench_ppo_loss compares with beside its eager loops: verl's functions, and the floor."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .device import clock_of

Op = Callable[[dict[str, Tensor]], tuple[Tensor, Any]]


def verl() -> Op | None:
    """The same objective from verl's public functions, as its actor and critic call them.

    None, and a line on stderr, where verl is not installed. Its dual clip is moved out of the way;
    its metrics are numbers on the host.
    """
    try:
        core: Any = importlib.import_module("verl.trainer.ppo.core_algos")
    except Exception as problem:  # a broken installation is an absent peer
        print(f"verl left out: {problem}", file=sys.stderr)
        return None

    def loss(x: dict[str, Tensor]) -> tuple[Tensor, Any]:
        logprobs, values, entropy = (x[k][None].float() for k in ("logprobs", "values", "entropy"))
        mask = x["mask"][None].float()
        policy, *metrics = core.compute_policy_loss(
            x["old_logprobs"][None], logprobs, x["advantages"][None], mask, 0.2, clip_ratio_c=1e9
        )
        value, value_clip = core.compute_value_loss(
            values, x["returns"][None], x["old_values"][None], mask, 0.2
        )
        kl = core.kl_penalty_forward(logprobs, x["ref_logprobs"][None], "low_var_kl")
        kl_loss = core.agg_loss(kl, mask, "token-mean")
        bonus = core.agg_loss(entropy, mask, "token-mean")
        total = policy + 0.1 * value + 0.05 * kl_loss - 0.01 * bonus
        return total, (metrics, value_clip, kl_loss.detach(), bonus.detach())

    return loss


def read_only(total_bytes: int, sets: int, device: torch.device) -> Callable[[int], Tensor]:
    """Reads as many bytes as one call's inputs have, once, and writes nothing: the floor.

    The faster of two reductions over one array, on rotated arrays; on a CPU with torch's threads.
    """
    arrays = [torch.ones(total_bytes // 4, device=device) for _ in range(sets)]
    reductions: tuple[Callable[[Tensor], Tensor], ...] = (torch.sum, lambda x: torch.dot(x, x))
    clock = clock_of(device)

    def least(reduction: Callable[[Tensor], Tensor]) -> float:
        turn = clock.turn(lambda k: reduction(arrays[k]), range(min(8, sets)))
        return min(sample.seconds for sample in turn)

    fastest = min(reductions, key=least)
    return lambda k: fastest(arrays[k])
