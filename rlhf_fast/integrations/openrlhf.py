"""OpenRLHF's loss and advantage functions on our kernels.

    from rlhf_fast.integrations import openrlhf
    openrlhf.install()                                 # this process
    ray.init(runtime_env={"worker_process_setup_hook": openrlhf.WORKER_SETUP})    # every worker

Sequences are `[B, T]`, right-padded; what is about actions is `[B, A]`, `action_mask` is 1 for
generated tokens. Shapes, dtypes, masks and the place of the score are OpenRLHF's own. Scalar
losses are fp32. Options of `PolicyLoss` and `ValueLoss` that our kernels lack (GSPO, corrections
by rollout log-probs, the value loss per sequence) run OpenRLHF's own code.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from rlhf_fast.integrations.patching import Patch, Replacement, Report, constant
from rlhf_fast.integrations.peer_ops import (
    Aggregation,
    gae_over_all_columns,
    kl_estimate,
    label_logprobs,
    policy_loss,
    row_entropy,
    sequence_mean_weights,
    value_loss,
)

WORKER_SETUP = "rlhf_fast.integrations.openrlhf.worker_setup"
_KL_BOUND = 10.0
_IMPORTANCE_WEIGHT_BOUND = 10.0


def log_probs_from_logits(logits: Tensor, labels: Tensor, temperature: float = 1.0) -> Tensor:
    """Log-probability of each label, `[...]` in logits' dtype; logits `[..., V]`, left unchanged.

    OpenRLHF's own divides the logits by the temperature where they lie.
    """
    return label_logprobs(logits, labels, temperature).to(logits.dtype)


def compute_entropy(logits: Tensor) -> Tensor:
    """Entropy of each row in nats, `[...]` in logits' dtype; a logit of -inf adds nothing."""
    return row_entropy(logits).to(logits.dtype)


def compute_approx_kl(
    log_probs: Tensor,
    log_probs_base: Tensor,
    log_probs_old: Tensor | None = None,
    kl_estimator: str = "k1",
    unbiased_gradient: bool = False,
) -> Tensor:
    """k1, k2 or k3 per token in fp32, within +-10.

    With `unbiased_gradient` the gradient is that of k2, weighted by the importance ratio to
    `log_probs_old` (at most 10).
    """
    if kl_estimator not in ("k1", "k2", "k3"):
        raise ValueError(f"Unknown kl_estimator: {kl_estimator}")
    weight: Tensor | float | None = None
    if unbiased_gradient:
        weight = 1.0
        if log_probs_old is not None:
            log_ratio = log_probs.detach().float() - log_probs_old.detach().float()
            weight = log_ratio.exp().clamp(max=_IMPORTANCE_WEIGHT_BOUND)
    return kl_estimate(log_probs.float(), log_probs_base.float(), kl_estimator, _KL_BOUND, weight)


def compute_reward(
    r: Tensor,
    kl_coef: float,
    kl: Tensor,
    action_mask: Tensor | None = None,
    reward_clip_range: tuple[float, float] | None = None,
) -> Tensor:
    """-kl_coef * kl in every column, and the clipped score `r[B]` at the last action of the row.

    In plain PyTorch: the kernel of rewards goes on to the advantages, which OpenRLHF computes in
    another call. A row without an action has its score in the last column, as OpenRLHF puts it.
    """
    if action_mask is None:
        raise ValueError("compute_reward needs action_mask")
    if reward_clip_range:
        r = r.clamp(min=reward_clip_range[0], max=reward_clip_range[1])
    rewards = kl * -max(kl_coef, 0.0)
    width = action_mask.shape[1]
    columns = torch.arange(width, device=kl.device)
    last = torch.where(action_mask.bool(), columns, -1).amax(dim=1, keepdim=True)
    last = torch.where(last < 0, width - 1, last)
    return rewards.scatter_add(1, last, r.unsqueeze(1).to(rewards.dtype))


def get_advantages_and_returns(
    self: Any,
    values: Tensor,
    rewards: Tensor,
    action_mask: Tensor | None,
    gamma: float,
    lambd: float,
) -> tuple[Tensor, Tensor]:
    """GAE over all columns `[B, A]`, not whitened, in the dtype of `values`.

    A masked column counts as a step of value and reward 0, as in OpenRLHF: a hole in the mask (the
    reply of a tool) discounts by gamma * lambda. NaN in masked slots stays there.
    """
    return gae_over_all_columns(rewards, values, action_mask, gamma, lambd)


def _policy_forward(own: Callable[..., Any]) -> Callable[..., Any]:
    def forward(
        self: Any,
        log_probs: Tensor,
        old_log_probs: Tensor,
        advantages: Tensor,
        action_mask: Tensor | None = None,
        rollout_log_probs: Tensor | None = None,
        dp_size: int = 1,
        batch_num_tokens: float | None = None,
        global_batch_size: float | None = None,
    ) -> tuple[Tensor, Tensor, Tensor, None, None]:
        """(loss, clip fraction, k1 of old and new, None, None), all `[]` fp32."""
        if (
            action_mask is None
            or self.policy_loss_type != "ppo"
            or self.is_correction_level != "off"
        ):
            totals = (dp_size, batch_num_tokens, global_batch_size)
            inputs = (log_probs, old_log_probs, advantages, action_mask, rollout_log_probs)
            return own(self, *inputs, *totals)
        mask = action_mask.bool()
        loss, sums = policy_loss(
            log_probs,
            old_log_probs,
            advantages,
            mask,
            _aggregation(self, mask, dp_size, batch_num_tokens, global_batch_size),
            clip_eps_low=self.clip_eps_low,
            clip_eps_high=self.clip_eps_high,
            dual_clip=self.dual_clip,
        )
        tokens = sums["tokens"].clamp(min=1)
        clipped = (sums["clip_low"] + sums["clip_high"]) / tokens
        return loss, clipped, sums["approx_kl_k1"] / tokens, None, None

    return forward


def _value_forward(own: Callable[..., Any]) -> Callable[..., Any]:
    def forward(
        self: Any,
        values: Tensor,
        old_values: Tensor,
        returns: Tensor,
        action_mask: Tensor | None = None,
        dp_size: int = 1,
        batch_num_tokens: float | None = None,
        global_batch_size: float | None = None,
    ) -> Tensor:
        """Half the clipped squared error, `[]` fp32."""
        if action_mask is None or not self.token_level_loss or self.clip_eps == 0:
            totals = (dp_size, batch_num_tokens, global_batch_size)
            return own(self, values, old_values, returns, action_mask, *totals)
        mask = action_mask.bool()
        how = _aggregation(self, mask, dp_size, batch_num_tokens, global_batch_size)
        return value_loss(values, old_values, returns, mask, how.normalizer, self.clip_eps)[0]

    return forward


def _aggregation(
    loss: Any,
    mask: Tensor,
    dp_size: int,
    batch_num_tokens: float | None,
    global_batch_size: float | None,
) -> Aggregation:
    """Over the step's totals, times `dp_size`, or over this microbatch where none are given."""
    if loss.token_level_loss:
        weights, total, here = None, batch_num_tokens, mask.sum()
    else:
        weights, total, here = sequence_mean_weights(mask), global_batch_size, mask.any(-1).sum()
    return Aggregation(here if total is None else total / dp_size, weights)


_UTILS, _LOSS = "openrlhf.models.utils", "openrlhf.models.loss"
_MAKER = "openrlhf.trainer.ppo_utils.experience_maker"
_PATCH = Patch(
    "openrlhf",
    {
        "0.11.2": (
            Replacement(_UTILS, "log_probs_from_logits", constant(log_probs_from_logits)),
            Replacement(_UTILS, "compute_approx_kl", constant(compute_approx_kl)),
            Replacement(_UTILS, "compute_reward", constant(compute_reward)),
            Replacement(_UTILS, "compute_entropy", constant(compute_entropy)),
            Replacement(_LOSS, "PolicyLoss.forward", _policy_forward),
            Replacement(_LOSS, "ValueLoss.forward", _value_forward),
            Replacement(
                _MAKER,
                "RemoteExperienceMaker.get_advantages_and_returns",
                constant(get_advantages_and_returns),
            ),
        )
    },
)


def install() -> Report:
    """Replace in this process for good. Raises EnvironmentFault, see `Patch.install`."""
    return _PATCH.install()


def worker_setup() -> None:
    """Replace in this process, in each module of OpenRLHF as soon as it is imported.

    For Ray's `worker_process_setup_hook`: a worker that only generates must not load DeepSpeed.
    """
    _PATCH.install(on_import=True)


def patched() -> AbstractContextManager[Report]:
    """Replace inside a `with` block."""
    return _PATCH.scoped()


def uninstall() -> None:
    """Give OpenRLHF its own functions back."""
    _PATCH.remove()
