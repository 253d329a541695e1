"""What a policy is worth: score, KL to a reference, entropy, lengths, and the best-of-n curve.

Every figure is a mean over prompts of the mean over a prompt's samples, with the standard error
over prompts: samples of one prompt are not independent. KL is the sequence sum of the log-ratio on
the policy's own samples, an unbiased estimate of KL(policy || reference) at the sampling
temperature.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from rlhf_fast.config import EvalConfig, RewardConfig
from rlhf_fast.config_loading import require_valid
from rlhf_fast.data import (
    LoadedData,
    LoadOptions,
    PromptExample,
    collate_prompts,
    epoch_permutation,
    load_prompts,
    pack_by_tokens,
)
from rlhf_fast.default_device import on_the_host
from rlhf_fast.engine.best_of_n import best_of_n_curve
from rlhf_fast.engine.hybrid import HybridEngine
from rlhf_fast.engine.progress import Progress
from rlhf_fast.engine.settings import engine_settings
from rlhf_fast.models.checks import check_context, check_vocabulary
from rlhf_fast.models.loading import load_causal_lm, load_sequence_classifier, load_tokenizer
from rlhf_fast.models.reward_function import (
    FunctionReward,
    completion_texts,
    load_reward_function,
)
from rlhf_fast.models.rewards import ModelReward
from rlhf_fast.models.roles import Reference, RewardModel
from rlhf_fast.ppo.layout import longest_sample, response_slots
from rlhf_fast.ppo.out_of_memory import TokenBudget, in_halves, require_smaller_rollout
from rlhf_fast.ppo.rewards import sequence_sum
from rlhf_fast.ppo.trainer import sampling_params
from rlhf_fast.protocols import Alone, PolicyModel, Reward
from rlhf_fast.seeds import derive_seed
from rlhf_fast.stages.evaluate_files import (
    EVAL_NAME,
    GOLD,
    REWARD_FUNCTION,
    REWARD_MODEL,
    SAMPLES_NAME,
    as_metrics,
    files_of,
    judge_name,
)
from rlhf_fast.stages.generation import generation_fields, show_generation
from rlhf_fast.stages.messages import say, show_reports
from rlhf_fast.stages.ppo_checks import check_tokenizers
from rlhf_fast.stages.progress import ProgressBar
from rlhf_fast.stages.run import Run
from rlhf_fast.stages.training import (
    compute_type,
    load_stage_tokenizer,
    open_metrics,
    open_run,
    require_budget,
    require_settings,
    setup_run,
)
from rlhf_fast.types import PromptBatch, Rollout

# Sequences generated and scored between two looks at the stop signals, in units of `max_batch`.
_BATCHES_PER_CHUNK = 4
SCORE = "score"


@dataclass(frozen=True)
class Estimate:
    """A mean over prompts and its standard error, NaN for a single prompt."""

    mean: float
    stderr: float
    prompts: int


@dataclass(frozen=True)
class EvalResult:
    """What an evaluation found.

    Args:
        output_dir: holds `eval.json` and `samples.jsonl`.
        prompts: prompts evaluated.
        samples_per_prompt: samples of each.
        estimates: by name: `score` (what PPO would optimise), `reward_model`, `reward_function`,
            `kl` (nats a sequence), `entropy` (nats a token), `length` (tokens), `ended` (fraction).
        best_of_n: rows of `best_of_n_rows`; empty if none were asked for.
        best_of_n_prompts: prompts they are of, all of whose samples were scored; None: none asked.
        reports: counts of the data source, as `DataReport.to_dict`.
    """

    output_dir: str
    prompts: int
    samples_per_prompt: int
    estimates: dict[str, Estimate]
    best_of_n: list[dict[str, float]] = field(default_factory=list)
    best_of_n_prompts: int | None = None
    reports: dict[str, Any] = field(default_factory=dict)

    def summary(self) -> str:
        """The result in a few plain lines."""
        lines = [f"evaluation: {self.prompts} prompts x {self.samples_per_prompt} samples"]
        for name, e in self.estimates.items():
            lines.append(f"  {name:<16} {e.mean:.4f} +- {e.stderr:.4f}")
        if self.best_of_n_prompts is not None and self.best_of_n_prompts < self.prompts:
            lines.append(
                f"  best of n of {self.best_of_n_prompts} prompts; the others have samples "
                "without a score"
            )
        for row in self.best_of_n:
            judge = judge_name(row)
            selector = f"proxy {row['proxy']:.4f}, " if "proxy" in row else ""
            lines.append(
                f"  best of {row['n']:<8.0f} {selector}{judge} {row[judge]:.4f} +- "
                f"{row[f'{judge}_stderr']:.4f}, KL {row['kl']:.3f}"
            )
        return "\n".join([*lines, f"  files: {self.output_dir}/{EVAL_NAME}, {SAMPLES_NAME}"])


@on_the_host
def run_evaluate(config: EvalConfig, *, quiet: bool = False) -> EvalResult:
    """Generate, score and compare; writes `eval.json` and `samples.jsonl`.

    Prompts come from `data.eval`, or from `data.train` if that is empty. Nothing is resumed: in a
    directory of an earlier evaluation, of whatever configuration, the results replace the earlier
    ones once they are there.

    Args:
        config: the stage's config; `model` and `run.output_dir` are required.
        quiet: rare plain lines instead of progress bars.

    Raises:
        RLHFError: any kind.
    """
    require_valid(config)
    prompts = "data.eval" if config.data.eval else "data.train"
    require_settings(config, "model", prompts, "run.output_dir")
    device = setup_run(config.run)
    outputs = (EVAL_NAME, SAMPLES_NAME)
    with open_run(config, "eval", outputs=outputs, resumable=False, quiet=quiet) as run:
        stage = EvalStage(config, run, device)
        with open_metrics(run, config) as metrics:  # a sink that does not start costs no results
            samples = stage.sample_and_score()
            result = stage.result(samples)
            metrics.truncate(0)
            run.renew_record(files_of(result, samples, config))
            metrics.log(0, as_metrics(result))
    return result


@dataclass(frozen=True)
class Samples:
    """S = B * G samples and what is known of each.

    Args:
        prompts: [S] prompt texts.
        responses: [S] response texts.
        values: name -> [S] float64, NaN where a reward abstained.
    """

    prompts: list[str]
    responses: list[str]
    values: dict[str, Tensor]

    @classmethod
    def join(cls, parts: Sequence[Samples]) -> Samples:
        """The samples of several chunks, in order."""
        return cls(
            [text for part in parts for text in part.prompts],
            [text for part in parts for text in part.responses],
            {name: torch.cat([p.values[name] for p in parts]) for name in parts[0].values},
        )


class EvalStage:
    """Policy, reference, rewards and prompts of an evaluation."""

    def __init__(self, config: EvalConfig, run: Run, device: torch.device) -> None:
        self.config, self.run, self.device = config, run, device
        self.tokenizer = load_stage_tokenizer(config.model, config.data)
        self.data, self.examples = choose_prompts(config, self.tokenizer)
        show_reports(self.data.report)
        self.sampling = sampling_params(config.sampling)
        self._advise()
        check_tokenizers(self.tokenizer, reference=config.reference)
        self.policy = self._load_policy(config.model)
        self.engine = HybridEngine.from_tokenizer(
            self.policy.module,
            self.tokenizer,
            settings=engine_settings(config.engine, config.max_batch),
        )
        self.reference = self._load_policy(config.reference) if config.reference else None
        self.rewards = self._load_rewards(config.reward)
        self.budget = TokenBudget(config.microbatch_tokens)
        self._check_lengths()

    def _advise(self) -> None:
        if self.config.reference and self.sampling.warps:
            say(
                [
                    "warning: samples are not drawn from softmax(logits / temperature) (greedy, "
                    "top_k, top_p or min_p), so `kl` and `entropy` are not those of the policy"
                ]
            )

    def _load_policy(self, path: str) -> Reference:
        module = load_causal_lm(path, dtype=compute_type(self.config.run))
        check_vocabulary(self.tokenizer, module)
        return Reference(module.to(self.device))

    def _load_rewards(self, settings: RewardConfig) -> dict[str, tuple[float, Reward]]:
        """Name -> (weight in the score, reward)."""
        rewards: dict[str, tuple[float, Reward]] = {}
        if settings.model:
            module = load_sequence_classifier(
                settings.model, init_head=False, dtype=compute_type(self.config.run)
            )
            judge = ModelReward(
                RewardModel(module.to(self.device)),
                self.tokenizer,
                load_tokenizer(settings.model),
                token_budget=self.config.microbatch_tokens,
            )
            rewards[REWARD_MODEL] = (1.0, judge)
        if settings.function:
            function = FunctionReward(
                load_reward_function(settings.function),
                self.tokenizer,
                on_error="abstain" if settings.on_error == "abstain" else "fail",
            )
            weight = settings.function_weight if rewards else 1.0
            rewards[REWARD_FUNCTION] = (weight, function)
        return rewards

    def _check_lengths(self) -> None:
        longest, new = max(len(e) for e in self.examples), self.sampling.max_new_tokens
        for policy in (self.policy, self.reference):
            if policy is not None:
                check_context(policy.module, longest, new)
        require_budget(self.config.microbatch_tokens, longest + new)

    def sample_and_score(self) -> Samples:
        """All samples, a chunk of prompts at a time."""
        group = self.config.samples_per_prompt
        size = max(1, _BATCHES_PER_CHUNK * self.config.max_batch // group)
        parts = []
        with self.run.progress("evaluate", len(self.examples) * group) as bar:
            for start in range(0, len(self.examples), size):
                prompts = collate_prompts(self.examples[start : start + size])
                parts.append(self.measure(self.generate(prompts, bar)))
                if self.run.should_stop():
                    self.run.raise_if_stopped(None)
        return Samples.join(parts)

    def generate(self, prompts: PromptBatch, bar: ProgressBar) -> Rollout:
        """G samples of each prompt, keyed by (seed, prompt, sample).

        What runs out of memory is drawn again, half as many samples at a time: the same samples.
        """
        before = bar.completed

        def show(progress: Progress) -> None:
            bar.advance(before + progress.finished - bar.completed)
            bar.note(**generation_fields(progress))

        show_generation(self.engine, show)
        group = self.config.samples_per_prompt
        seed = self.config.run.seed
        seeds = [derive_seed(seed, 0, uid, g) for uid in prompts.uid for g in range(group)]
        drawn: list[Rollout] = []

        def draw() -> None:
            drawn.append(
                self.engine.generate(prompts, self.sampling, samples_per_prompt=group, seeds=seeds)
            )

        with self.run.phase("generate"):
            in_halves(draw, Alone(), halve=lambda: require_smaller_rollout(self.engine.halve_batch))
        return drawn[-1]

    def measure(self, rollout: Rollout) -> Samples:
        """Scores, KL, entropy, length and ended flag of each sample of a rollout."""
        mask = rollout.response_mask
        values = {}
        with self.run.phase("score"):
            total, scored_by_any = torch.zeros(len(rollout)).double(), torch.zeros(len(rollout))
            for name, (weight, reward) in self.rewards.items():
                scores, scored = reward.score(rollout)
                scores = scores if scores.dim() == 1 else sequence_sum(scores, mask)
                values[name] = torch.where(scored, scores.double(), math.nan).cpu()
                total += torch.where(scored, weight * scores.double(), 0.0).cpu()
                scored_by_any += scored.cpu()
            if self.rewards:
                values[SCORE] = torch.where(scored_by_any > 0, total, math.nan)
        with self.run.phase("logprobs"):
            logprobs, entropy = self.padded_logprobs(self.policy, rollout)
            if self.reference is not None:
                reference, _ = self.padded_logprobs(self.reference, rollout)
                values["kl"] = sequence_sum((logprobs - reference).double(), mask)
        lengths = rollout.lengths.double()
        values["entropy"] = sequence_sum(entropy.double(), mask) / mask.sum(1).clamp(min=1)
        values["length"] = lengths
        values["ended"] = rollout.ended.double()
        texts = [t for t in rollout.prompts.texts for _ in range(rollout.samples_per_prompt)]
        return Samples(texts, completion_texts(rollout, self.tokenizer), values)

    def padded_logprobs(self, policy: PolicyModel, rollout: Rollout) -> tuple[Tensor, Tensor]:
        """(log-probs, entropies) [S, R] float32 at the sampling temperature, 0 outside the mask."""
        logprobs, entropies = (torch.zeros(rollout.responses.shape) for _ in range(2))
        lengths = (rollout.prompt_lengths + rollout.lengths).tolist()

        def read() -> None:
            for indices in pack_by_tokens(lengths, self.budget.tokens):
                slots = response_slots(rollout, indices)
                targets = slots.targets(rollout.response_mask)
                found, entropy = policy.logprobs(
                    slots.sequences,
                    targets,
                    temperature=self.sampling.temperature or 1.0,
                    with_entropy=True,
                )
                assert entropy is not None
                slots.to_padded(found.cpu(), logprobs)
                slots.to_padded(entropy.cpu(), entropies)

        self.budget.in_halves(read, Alone(), longest=longest_sample(rollout))
        return logprobs, entropies

    def result(self, samples: Samples) -> EvalResult:
        """Means over prompts, and the best-of-n curve."""
        config, group = self.config, self.config.samples_per_prompt
        rewards = _rewards(samples.values, group)
        judged = bool(config.best_of and rewards)
        return EvalResult(
            output_dir=str(self.run.path),
            prompts=len(self.examples),
            samples_per_prompt=group,
            estimates={n: estimate(v.reshape(-1, group)) for n, v in samples.values.items()},
            best_of_n=best_of_n_rows(samples.values, config.best_of, group),
            best_of_n_prompts=int(_complete(rewards).sum()) if judged else None,
            reports={"prompts": self.data.report.to_dict()},
        )


def choose_prompts(
    config: EvalConfig, tokenizer: Any
) -> tuple[LoadedData[PromptExample], list[PromptExample]]:
    """All prompts of the data, and the `max_prompts` of them that are evaluated."""
    source = config.data
    held_out = bool(source.eval)
    data = load_prompts(
        source.eval if held_out else source.train,
        tokenizer,
        LoadOptions.from_config(source),
        split=source.eval_split if held_out else source.split,
        name="prompts",
    )
    # A fair sample of the file, whatever order it is in.
    order = epoch_permutation(len(data), config.run.seed, 0)
    return data, [data[i] for i in sorted(order[: config.max_prompts])]


def estimate(values: Tensor) -> Estimate:
    """Mean of values [B, G] and its standard error over the B prompts.

    NaN values are left out, and with them prompts that have no other.
    """
    present = ~values.isnan()
    rows = present.any(1)
    if not bool(rows.any()):
        return Estimate(math.nan, math.nan, 0)
    means = torch.where(present, values, 0.0).sum(1)[rows] / present.sum(1)[rows]
    count = int(rows.sum())
    spread = float(means.std()) / math.sqrt(count) if count > 1 else math.nan
    return Estimate(float(means.mean()), spread, count)


def best_of_n_rows(
    values: dict[str, Tensor], ns: Sequence[int], group: int
) -> list[dict[str, float]]:
    """The curve of best-of-n: the reward model selects, the function judges if there are both.

    Prompts with an unscored sample are left out: what best-of-n would have kept is unknown.

    Returns:
        Rows of n, kl, proxy, gold and gold_stderr with both; with one alone, which selects by the
        very score it reports, of n, kl, and that score and its `_stderr` under its own name.
    """
    rewards = _rewards(values, group)
    names = list(rewards)
    if not ns or not names:
        return []
    complete = _complete(rewards)
    if not bool(complete.any()):
        return []
    proxy, gold = (rewards[name][complete] for name in (names[0], names[-1]))
    curve = best_of_n_curve(proxy, gold, ns)
    columns = {"n": [float(n) for n in curve.ns], "kl": curve.kl.tolist()}
    if len(names) == 2:
        columns["proxy"] = curve.proxy.tolist()
    judge = GOLD if len(names) == 2 else names[0]
    columns |= {judge: curve.gold.tolist(), f"{judge}_stderr": curve.gold_stderr.tolist()}
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def _rewards(values: Mapping[str, Tensor], group: int) -> dict[str, Tensor]:
    """[prompts, group] of each reward that there is, what selects first."""
    names = [name for name in (REWARD_MODEL, REWARD_FUNCTION) if name in values]
    return {name: values[name].reshape(-1, group) for name in names}


def _complete(rewards: Mapping[str, Tensor]) -> Tensor:
    """[prompts] bool: every sample has every reward."""
    return ~torch.stack([scores.isnan().any(1) for scores in rewards.values()]).any(0)
