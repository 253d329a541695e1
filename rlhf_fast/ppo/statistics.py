"""What a PPO step reports. Names are those of TRL's PPO where it has one; see docs/metrics.md."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from rlhf_fast.optim import StepResult
from rlhf_fast.ppo.anchors import gap_of
from rlhf_fast.ppo.rewards import sequence_sum
from rlhf_fast.protocols import WorkSplit
from rlhf_fast.types import Experience, LossOutput

# Model -> its learning rate among the metrics.
_RATES = {"policy": "lr", "value": "lr_value"}


def _mean(values: Tensor) -> float:
    return float(values.double().mean()) if values.numel() else 0.0


def rollout_metrics(experience: Experience, shaped: Tensor, *, kl_coef: float) -> dict[str, float]:
    """Means over the sequences of a rollout batch that were scored.

    Args:
        experience: the rollout batch.
        shaped: [S] or [S, R] scores after normalisation, clipping and the missing-EOS rule.
        kl_coef: coefficient in force.
    """
    scored = experience.scored
    rollout, mask = scored.rollout, scored.loss_mask
    rows = scored.scored
    log_ratio = scored.old_logprobs - scored.ref_logprobs
    kl = sequence_sum(log_ratio, mask)[rows]
    k3 = sequence_sum(torch.expm1(-log_ratio) + log_ratio, mask)[rows]
    raw = scored.scores if scored.scores.dim() == 1 else sequence_sum(scored.scores, mask)
    total = shaped if shaped.dim() == 1 else sequence_sum(shaped, mask)
    surprise = sequence_sum(-scored.old_logprobs, mask)[rows]
    gap = gap_of(scored)
    lengths = rollout.lengths.double()
    exact = {}
    if scored.exact_kl is not None:
        exact = {"objective/kl_exact": _mean(sequence_sum(scored.exact_kl, mask)[rows])}
    non_score = -kl_coef * exact.get("objective/kl_exact", _mean(kl))
    return exact | {
        "objective/kl": _mean(kl),
        "objective/kl_k3": _mean(k3),
        "objective/entropy": _mean(surprise),
        "objective/non_score_reward": non_score,
        "objective/rlhf_reward": _mean(total[rows]) + non_score,
        "objective/scores": _mean(raw[rows]),
        "objective/scores_std": float(raw[rows].double().std(unbiased=False))
        if rows.any()
        else 0.0,
        "objective/shaped_scores": _mean(total[rows]),
        "rollout/scored_fraction": _mean(rows.double()),
        "rollout/length": _mean(lengths),
        "rollout/ended_fraction": _mean(rollout.ended.double()),
        "val/num_eos_tokens": float(rollout.ended.sum()),
        "rollout/logprob_gap": gap.absolute,
        "rollout/logprob_k3": gap.k3,
        "rollout/recomputed_fraction": gap.samples / max(len(rollout), 1),
        "rollout/score_length_correlation": _correlation(raw[rows], lengths[rows]),
    }


def _correlation(x: Tensor, y: Tensor) -> float:
    """Pearson's correlation; 0 where either side is constant."""
    if x.numel() < 2:
        return 0.0
    x, y = x.double() - x.double().mean(), y.double() - y.double().mean()
    scale = float(x.norm() * y.norm())
    return float((x * y).sum()) / scale if scale > 0 else 0.0


def _step_metrics(name: str, steps: Sequence[StepResult]) -> dict[str, float]:
    """Gradient norm and skipped steps of a model: 0 without a step, nan if none was applied."""
    applied = [s.grad_norm for s in steps if s.applied]
    no_norm = math.nan if steps else 0.0
    return {
        f"{name}/grad_norm": sum(applied) / len(applied) if applied else no_norm,
        f"{name}/skipped_steps": float(len(steps) - len(applied)),
    }


class UpdateStatistics:
    """Adds the losses' metric sums over microbatches and turns them into means."""

    def __init__(self) -> None:
        self._sums: dict[str, float] = defaultdict(float)
        self._minibatch: dict[str, float] = defaultdict(float)
        self._before: dict[str, float] = {}
        self._pretraining: list[float] = []
        self._steps: dict[str, list[StepResult]] = defaultdict(list)
        self._lr: dict[str, float] = {}
        self._minibatches = 0
        self._redone = 0
        self._first_ratio_gap = 0.0

    def begin_minibatch(self) -> None:
        """Start the sums of the next optimizer step."""
        self._minibatches += 1
        self._minibatch.clear()
        self._before = dict(self._sums)

    def redo_minibatch(self) -> None:
        """Forget the sums of the present minibatch: it is done again."""
        self._redone += 1
        self._minibatches -= 1
        if self._minibatches == 0:
            self._first_ratio_gap = 0.0
        self._sums = defaultdict(float, self._before)
        self.begin_minibatch()

    def add(self, output: LossOutput) -> None:
        """Add one microbatch's metric sums."""
        if output.metrics:
            # One transfer for all of them: on a GPU this is the only sync of a microbatch.
            values = torch.stack([v.detach() for v in output.metrics.values()]).tolist()
            for name, value in zip(output.metrics, values, strict=True):
                self._sums[name] += value
                self._minibatch[name] += value
        if self._minibatches == 1 and output.extrema:
            self._first_ratio_gap = max(self._first_ratio_gap, _ratio_gap(output.extrema))

    def agree(self, split: WorkSplit) -> None:
        """Put the sums of all ranks over the present minibatch in the place of this rank's."""
        if split.ranks == 1:
            return
        names = sorted(self._minibatch)
        gaps = [0.0] * split.ranks
        gaps[split.rank] = self._first_ratio_gap
        summed = split.sum_numbers([*(self._minibatch[name] for name in names), *gaps])
        for name, value in zip(names, summed[: len(names)], strict=True):
            self._minibatch[name] = value
            self._sums[name] = self._before.get(name, 0.0) + value
        if self._minibatches == 1:
            self._first_ratio_gap = max(summed[len(names) :])

    def minibatch_kl(self) -> float:
        """Mean k3 of new against old policy over the present minibatch."""
        tokens = self._minibatch.get("tokens", 0.0)
        return self._minibatch["approx_kl_k3"] / tokens if tokens else 0.0

    def add_pretraining(self, loss: float) -> None:
        """Note the mean cross-entropy of one PPO-ptx batch."""
        self._pretraining.append(loss)

    def add_step(self, name: str, lr: float, result: StepResult) -> None:
        """Note one optimizer step of the policy or the value model."""
        self._steps[name].append(result)
        self._lr[name] = lr

    def finalize(self, *, early_stop: bool) -> dict[str, float]:
        """Means over all loss tokens of the update.

        An update that target_kl ended in its first minibatch has no learning rates: they are those
        of the last step.
        """
        values = self._value_means()
        out = self._policy_means() | values
        for name in ("policy", "value") if values else ("policy",):
            out |= _step_metrics(name, self._steps[name])
        out |= {_RATES[name]: lr for name, lr in self._lr.items()}
        if self._pretraining:
            out["loss/ptx_avg"] = sum(self._pretraining) / len(self._pretraining)
        out["val/first_ratio_gap"] = self._first_ratio_gap
        out["policy/optimizer_steps"] = float(len(self._steps["policy"]))
        out["policy/redone_minibatches"] = float(self._redone)
        out["policy/early_stop"] = float(early_stop)
        return out

    def _policy_means(self) -> dict[str, float]:
        s, n = self._sums, max(self._sums["tokens"], 1.0)
        ratio = s["ratio"] / n
        return {
            "loss/policy_avg": s["policy_loss"] / n,
            "loss/kl_avg": s["kl"] / n,
            "policy/approxkl_avg": s["approx_kl_k2"] / n,
            "policy/approxkl_k3_avg": s["approx_kl_k3"] / n,
            "policy/clipfrac_avg": (s["clip_low"] + s["clip_high"]) / n,
            "policy/clipfrac_low_avg": s["clip_low"] / n,
            "policy/clipfrac_high_avg": s["clip_high"] / n,
            "policy/dual_clipfrac_avg": s["clip_dual"] / n,
            "policy/entropy_avg": s["entropy"] / n,
            "val/ratio": ratio,
            "val/ratio_var": max(0.0, s["ratio_squared"] / n - ratio * ratio),
        }

    def _value_means(self) -> dict[str, float]:
        s, n = self._sums, self._sums["value_tokens"]
        if not n:
            return {}
        spread = s["returns_squared"] / n - (s["returns"] / n) ** 2
        residual = s["residual_squared"] / n - (s["residual"] / n) ** 2
        return {
            "loss/value_avg": s["value_loss"] / n,
            "val/clipfrac_avg": s["value_clip"] / n,
            "val/explained_variance": 1.0 - residual / spread if spread > 1e-12 else 0.0,
            "val/returns_mean": s["returns"] / n,
        }


def _ratio_gap(extrema: Mapping[str, Tensor]) -> float:
    """Largest |ratio - 1|; 0 where no token was counted (both extrema are -inf then)."""
    high, low = float(extrema["ratio_max"]), -float(extrema["negative_ratio_min"])
    return max(high - 1.0, 1.0 - low, 0.0) if math.isfinite(high) else 0.0
