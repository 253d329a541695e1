"""The loss and advantage methods of DeepSpeed-Chat's PPO trainer on our kernels, as a mixin.

    class Trainer(FastPPOMixin, DeepSpeedPPOTrainer): ...

DeepSpeed-Chat is an application without a package on PyPI: there is no version to check and nothing
to patch but `gather_log_probs`, which its module calls by name; see `docs/integrations.md`.

Everything is about the columns `[B, T - 1]` of the shifted sequence. `action_mask` is the attention
mask without its first column; `start` is the prompt's length - 1, so that column `start` is the
first token of the answer. Attributes read from the trainer: kl_ctl, clip_reward_value, cliprange,
cliprange_value, gamma, lam. Losses are scalars in fp32.
"""

from __future__ import annotations

from torch import Tensor

from rlhf_fast.integrations.peer_ops import (
    Aggregation,
    gae_over_all_columns,
    label_logprobs,
    policy_loss,
    value_loss,
)


def gather_log_probs(logits: Tensor, labels: Tensor) -> Tensor:
    """Log-probability of each label, `[B, T - 1]` in logits' dtype; logits `[B, T - 1, V]`."""
    return label_logprobs(logits, labels).to(logits.dtype)


class FastPPOMixin:
    """To stand before `DeepSpeedPPOTrainer` among the bases of a class."""

    kl_ctl: float
    clip_reward_value: float
    cliprange: float
    cliprange_value: float
    gamma: float
    lam: float

    def compute_rewards(
        self,
        prompts: Tensor,
        log_probs: Tensor,
        ref_log_probs: Tensor,
        reward_score: Tensor,
        action_mask: Tensor,
    ) -> Tensor:
        """-kl_ctl * k1 in every column, and the clipped score `[B]` one past the counted tokens.

        As in DeepSpeed-Chat the score lands at column `start + n`, n the answer's tokens that count
        (the end token itself, where it is the padding token and so is masked), or in the last
        column where the answer fills the row.
        """
        rewards = (log_probs - ref_log_probs) * -self.kl_ctl
        start = prompts.shape[1] - 1
        at = start + action_mask[:, start:].sum(1, keepdim=True)
        at = at.clamp(max=rewards.shape[1] - 1)
        score = reward_score.clamp(-self.clip_reward_value, self.clip_reward_value)
        return rewards.scatter_add(1, at, score.unsqueeze(1).to(rewards.dtype))

    def get_advantages_and_returns(
        self, values: Tensor, rewards: Tensor, start: int
    ) -> tuple[Tensor, Tensor]:
        """GAE over the columns from `start` on: `[B, T - 1 - start]`, not whitened, no mask."""
        answer = (rewards[:, start:], values[:, start:])
        return gae_over_all_columns(*answer, None, self.gamma, self.lam)

    def actor_loss_fn(
        self, logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor
    ) -> Tensor:
        """The clipped policy loss, a mean over the mask of this microbatch.

        The log ratio is bounded by +-80, beyond which DeepSpeed-Chat's exponential overflows. With
        no token in the mask the loss is 0, where DeepSpeed-Chat has NaN.
        """
        kept = mask.bool()
        return policy_loss(
            logprobs,
            old_logprobs,
            advantages,
            kept,
            Aggregation(kept.sum()),
            clip_eps_low=self.cliprange,
            clip_eps_high=self.cliprange,
            dual_clip=None,
            log_ratio_clamp=80.0,
        )[0]

    def critic_loss_fn(
        self, values: Tensor, old_values: Tensor, returns: Tensor, mask: Tensor
    ) -> Tensor:
        """Half the clipped squared error, a mean over the mask; 0 with no token in it."""
        kept = mask.bool()
        clip = self.cliprange_value
        return value_loss(values, old_values, returns, kept, kept.sum(), clip)[0]
