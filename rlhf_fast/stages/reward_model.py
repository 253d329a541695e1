"""Stage 2: a reward model from ranked completions.

All completions of a prompt share one forward pass and its loss is the mean over their pairs
(`rlhf_fast.models.ranking_loss`); the step's loss is the mean over its prompts. Held-out accuracy
comes with a confidence interval, on prompts that training never saw, because a reward model near
chance is the cheapest way to waste a PPO run. After training, a bias puts the mean score of human
demonstrations at zero; it travels in the exported config and is applied wherever the model scores.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from rlhf_fast.config import RewardModelConfig
from rlhf_fast.config_loading import require_valid
from rlhf_fast.data import (
    LoadedData,
    LoadOptions,
    PreferenceBatch,
    PreferenceExample,
    collate_preferences,
    load_preferences,
    load_sft,
    pack_best_fit,
    pack_by_tokens,
    warn_overlap,
)
from rlhf_fast.data.packing import Share
from rlhf_fast.default_device import on_the_host
from rlhf_fast.distributed.world import World
from rlhf_fast.metrics import MetricLogger
from rlhf_fast.models.adapter_roles import adapted_last_hidden
from rlhf_fast.models.adapters import AdapterModule
from rlhf_fast.models.export import export_model
from rlhf_fast.models.heads import scalar_outputs, set_calibration
from rlhf_fast.models.loading import init_reward_head, load_sequence_classifier
from rlhf_fast.models.ranking_loss import PairCounts, count_pairs, pair_accuracy, ranking_loss
from rlhf_fast.models.roles import last_token_hidden
from rlhf_fast.stages.adapted import ADAPTER_NAME, export_adapted, one_adapter, stage_bytes
from rlhf_fast.stages.calibration import calibration_of
from rlhf_fast.stages.finished import finished_result
from rlhf_fast.stages.held_out import Split, split_by_prompt
from rlhf_fast.stages.messages import say, show_reports, warn_loudly
from rlhf_fast.stages.ranks import joined
from rlhf_fast.stages.run import Run
from rlhf_fast.stages.supervised import SupervisedStage
from rlhf_fast.stages.training import (
    MODEL_NAME,
    compute_type,
    load_options,
    open_metrics,
    open_run,
    prepare_for_training,
    require_budget,
    require_settings,
)
from rlhf_fast.types import LossOutput, PackedSequences

# A judge that may be right less often than this mostly gives PPO noise to climb.
NEAR_CHANCE = 0.55


@dataclass(frozen=True)
class RewardModelResult:
    """What a finished run leaves.

    Args:
        output_dir: the run directory.
        model_dir: the exported model, calibration included.
        steps: optimizer steps.
        train_loss: nats per pair, of the last step.
        accuracy: fraction of held-out pairs ordered rightly, ties one half; None without them.
        accuracy_low, accuracy_high: 95 % confidence interval of `accuracy`.
        near_chance: the lower end is below 0.55, so PPO may exploit the model.
        eval_loss: nats per pair on held-out prompts; None without them.
        margin: mean score difference of held-out pairs.
        eval_prompts, eval_pairs: what the held-out figures rest on.
        gain, bias: the calibration: score = gain * raw + bias.
        demonstrations: sequences it was fitted on.
        reports: counts of each data source, as `DataReport.to_dict`.
    """

    output_dir: str
    model_dir: str
    steps: int
    train_loss: float
    accuracy: float | None
    accuracy_low: float | None
    accuracy_high: float | None
    near_chance: bool
    eval_loss: float | None
    margin: float | None
    eval_prompts: int
    eval_pairs: int
    gain: float
    bias: float
    demonstrations: int
    reports: dict[str, Any] = field(default_factory=dict)

    def summary(self) -> str:
        """The result in a few plain lines."""
        lines = [f"reward model: {self.steps} steps, training loss {self.train_loss:.4f}"]
        if self.accuracy is None:
            lines.append("  held out: nothing, so nobody knows whether it ranks (data.eval)")
        else:
            lines.append(f"  held out: {_accuracy_text(self)}, mean margin {self.margin:.3f}")
        if self.near_chance:
            lines.append("  WARNING: near chance; PPO will exploit it")
        return "\n".join(
            [
                *lines,
                f"  calibrated on {self.demonstrations} sequences: score = {self.gain:.4g} * raw "
                f"{'+' if self.bias >= 0 else '-'} {abs(self.bias):.4g}",
                f"  model: {self.model_dir}",
            ]
        )


def _accuracy_text(result: RewardModelResult) -> str:
    return (
        f"{result.accuracy:.1%} of {result.eval_pairs} pairs right "
        f"(95 % interval {result.accuracy_low:.1%} to {result.accuracy_high:.1%}, "
        f"{result.eval_prompts} rows)"
    )


@on_the_host
def run_reward_model(
    config: RewardModelConfig, *, quiet: bool = False, world: World | None = None
) -> RewardModelResult:
    """Train, evaluate, calibrate and export, or continue where an earlier run stopped.

    Args:
        config: the stage's config; `model`, `data.train` and `run.output_dir` are required.
        quiet: rare plain lines instead of progress bars.
        world: ranks that were joined before; None: those that torchrun started.

    Raises:
        RLHFError: any kind; `Preempted` and `Interrupted` after a good checkpoint.
    """
    require_valid(config)
    require_settings(config, "model", "data.train", "run.output_dir")
    space = stage_bytes(config.model, config.run.keep_last, config.lora)
    outputs = (MODEL_NAME, ADAPTER_NAME)
    opened = partial(
        open_run, config, "reward_model", outputs=outputs, bytes_needed=space, quiet=quiet
    )
    with joined(config, world) as world, opened(world=world) as run:
        if run.already_complete:
            result = finished_result(run, RewardModelResult)
        else:
            with open_metrics(run, config) as metrics:
                stage = RewardModelStage(config, run, metrics, world.device)
                stage.train()
                result = stage.finish()
            run.mark_complete(result.steps, dataclasses.asdict(result))
        if result.near_chance:
            warn_near_chance(result)
    return result


def warn_near_chance(result: RewardModelResult) -> None:
    """The panel on standard error for a model that cannot be told from a coin."""
    warn_loudly(
        "this reward model is near chance",
        f"{_accuracy_text(result)}. The lower end is below {NEAR_CHANCE:.0%}: PPO will exploit the "
        "model's errors and the text gets worse while the reward rises.\nMore or cleaner "
        "preferences help most; then more held-out rows, to narrow the interval.",
    )


class RewardModelStage(SupervisedStage[RewardModelConfig]):
    """Model, data and optimizer of a run; `train`, then `finish`."""

    role = "reward_model"
    description = "reward model"
    shown: ClassVar[Mapping[str, str]] = {"loss": "loss/train", "accuracy": "train/accuracy"}

    def __init__(
        self, config: RewardModelConfig, run: Run, metrics: MetricLogger, device: torch.device
    ) -> None:
        super().__init__(config, run, device)
        self.reports: dict[str, Any] = {}
        self.fingerprints: dict[str, str] = {}
        self.split = self._load_data()
        self.demonstrations = self._load_demonstrations()
        self.module = self._load_module()
        self.begin(self.module, metrics, rows=len(self.split.train), fingerprints=self.fingerprints)

    def _load_data(self) -> Split:
        config, source = self.config, self.config.data
        options = load_options(config.model, source)
        data = load_preferences(source.train, self.tokenizer, options, split=source.split)
        self.reports["train"] = data.report.to_dict()
        self.fingerprints["training"] = data.fingerprint
        show_reports(data.report)
        if source.eval:
            return Split(list(data.examples), self._load_eval(data, options))
        split = split_by_prompt(data.examples, config.eval_fraction, config.run.seed)
        self.reports["train"]["held_out"] = len(split.held_out)
        say([f"  held out by prompt: {len(split.held_out)} of {len(data)} rows"])
        return split

    def _load_eval(
        self, data: LoadedData[PreferenceExample], options: LoadOptions
    ) -> list[PreferenceExample]:
        source = self.config.data
        held_out = load_preferences(
            source.eval, self.tokenizer, options, split=source.eval_split, name="eval"
        )
        warn_overlap(data, held_out)
        self.reports["eval"] = held_out.report.to_dict()
        self.fingerprints["evaluation"] = held_out.fingerprint
        show_reports(held_out.report)
        return list(held_out.examples)

    def _load_demonstrations(self) -> list[Tensor]:
        """Sequences whose mean score will be zero: the human ones, else the preferred ones."""
        if not self.config.demonstrations:
            return [example.sequences()[0] for example in self.split.train]
        options = load_options(self.config.model, self.config.data)
        data = load_sft(self.config.demonstrations, self.tokenizer, options, name="demonstrations")
        self.reports["demonstrations"] = data.report.to_dict()
        self.fingerprints["demonstration"] = data.fingerprint
        show_reports(data.report)
        return [example.ids for example in data.examples]

    def _load_module(self) -> nn.Module:
        config = self.config
        examples = [*self.split.train, *self.split.held_out]
        require_budget(config.microbatch_tokens, max(len(e) for e in examples))
        longest = max(s.numel() for e in examples for s in e.sequences())
        longest = max(longest, max(s.numel() for s in self.demonstrations))
        if config.lora.rank > 0:
            return self._load_adapted(longest)
        module: nn.Module = load_sequence_classifier(
            config.model,
            init_head=config.init_head,
            dtype=compute_type(config.run),
            seed=config.run.seed,
        )
        prepare_for_training(
            module,
            self.tokenizer,
            self.world,
            longest=longest,
            gradient_checkpointing=config.gradient_checkpointing,
        )
        # Training and calibration read raw scores; one that an earlier stage left would be counted
        # twice.
        set_calibration(module, 1.0, 0.0)
        return module

    def _load_adapted(self, longest: int) -> AdapterModule:
        """An adapter and a new head on the model, which stays as it is."""
        trunk = one_adapter(self.config, self.tokenizer, self.world, name="reward", longest=longest)
        module = trunk.role_module("reward", head=True)
        init_reward_head(module, self.config.run.seed)
        return module

    def scores(self, sequences: PackedSequences) -> Tensor:
        """[K] float32 scores, raw until calibration; gradients flow."""
        module = self.module
        if isinstance(module, AdapterModule):
            return scalar_outputs(module, adapted_last_hidden(module, sequences))
        return scalar_outputs(module, last_token_hidden(module, sequences))

    def step(self) -> dict[str, float]:
        """One optimizer step: pack, accumulate gradients, update; evaluate after the last one."""
        with self.run.phase("data"):
            epoch = self.sampler.epoch + self.sampler.cursor / self.sampler.n
            examples = [self.split.train[i] for i in self.sampler.next_batch()]
        with self.run.phase("forward_backward"):
            sums = self.accumulate(examples)
        update = self.update()
        metrics = {
            "loss/train": sums["loss"],
            "train/accuracy": sums["correct"],
            "train/margin": sums["margin"],
            "rewards/chosen": sums["chosen"],
            "rewards/rejected": sums["rejected"],
            **update,
            "tokens": float(sum(len(e) for e in examples)),
            "epoch": epoch,
        }
        self.state.extra["train_loss"] = metrics["loss/train"]
        done = self.state.step + 1
        if self.split.held_out and done == self.total_steps:
            metrics |= self.held_out(self.split.held_out, done)
        return metrics

    def pack(self, examples: Sequence[PreferenceExample]) -> list[Share]:
        """Rows of this rank's microbatches of at most `microbatch_tokens` tokens."""
        lengths = [len(e) for e in examples]
        return self.dealt(pack_by_tokens(lengths, max([self.budget.tokens, *lengths])), lengths)

    def accumulate(self, examples: Sequence[PreferenceExample]) -> dict[str, float]:
        """Add the gradients of all microbatches; returns means over the step's prompts."""
        totals: dict[str, Tensor] = {}

        def microbatches() -> None:
            totals.clear()
            for share in self.pack(examples):
                batch = collate_preferences([examples[i] for i in share.rows])
                output = self.loss(batch, len(examples))
                counts = 0.0 if share.idle else 1.0
                (counts * output.loss).backward()
                for name, value in output.metrics.items():
                    totals[name] = totals.get(name, torch.zeros_like(value)) + counts * value

        self.in_halves(microbatches, max(len(e) for e in examples))
        sums = self.work.sum_numbers([float(value) for value in totals.values()])
        return {name: value / len(examples) for name, value in zip(totals, sums, strict=True)}

    def loss(self, batch: PreferenceBatch, prompts: int) -> LossOutput:
        """The batch's share of the loss of a step of `prompts` prompts."""
        scores = self.scores(batch.sequences)
        margins = batch.margins if self.config.margin else None
        return ranking_loss(scores, batch.group_sizes, margins, num_prompts=prompts)

    def evaluate(self, examples: Sequence[PreferenceExample]) -> dict[str, float]:
        """`eval/*` on held-out prompts, with the interval of the accuracy."""
        sums = {"loss": 0.0, "margin": 0.0}
        correct, pairs = [0.0] * len(examples), [0.0] * len(examples)
        self.module.eval()
        with torch.no_grad():
            for share in self.pack(examples):
                batch = collate_preferences([examples[i] for i in share.rows])
                scores = self.scores(batch.sequences)
                margins = batch.margins if self.config.margin else None
                output = ranking_loss(scores, batch.group_sizes, margins)
                if share.idle:
                    continue
                counts = count_pairs(scores, batch.group_sizes)
                for i, right, of in zip(share.rows, counts.correct, counts.pairs, strict=True):
                    correct[i], pairs[i] = right, float(of)
                for name in sums:
                    sums[name] += float(output.metrics[name].double())
        self.module.train()
        sums = dict(zip(sums, self.work.sum_numbers(list(sums.values())), strict=True))
        correct = self.work.sum_numbers(correct)
        pairs = self.work.sum_numbers(pairs)
        accuracy = pair_accuracy(PairCounts(correct, [int(of) for of in pairs]))
        return {
            "eval/loss": sums["loss"] / len(examples),
            "eval/margin": sums["margin"] / len(examples),
            "eval/accuracy": accuracy.value,
            "eval/accuracy_low": accuracy.low,
            "eval/accuracy_high": accuracy.high,
            "eval/near_chance": float(accuracy.low < NEAR_CHANCE),
            "eval/prompts": float(len(examples)),
            "eval/pairs": float(sum(pairs)),
        }

    def finish(self) -> RewardModelResult:
        """Calibrate, write `output_dir/model` and sum up."""
        if self.split.held_out:
            self.require_held_out(self.split.held_out)
        with self.run.phase("calibrate"):
            scores = self.raw_scores(self.demonstrations)
            gain, bias = calibration_of(scores, unit_gain=self.config.unit_gain)
            set_calibration(self.module, gain, bias)
        with self.run.phase("export"):
            target = self.run.path / MODEL_NAME
            model_dir = str(self._export(target))
        held_out = self.state.extra.get("eval", {})
        return RewardModelResult(
            output_dir=str(self.run.path),
            model_dir=model_dir,
            steps=self.state.step,
            train_loss=self.state.extra["train_loss"],
            accuracy=held_out.get("eval/accuracy"),
            accuracy_low=held_out.get("eval/accuracy_low"),
            accuracy_high=held_out.get("eval/accuracy_high"),
            near_chance=bool(held_out.get("eval/near_chance", 0.0)),
            eval_loss=held_out.get("eval/loss"),
            margin=held_out.get("eval/margin"),
            eval_prompts=int(held_out.get("eval/prompts", 0)),
            eval_pairs=int(held_out.get("eval/pairs", 0)),
            gain=gain,
            bias=bias,
            demonstrations=len(self.demonstrations),
            reports=self.reports,
        )

    def _export(self, directory: Path) -> Path:
        if isinstance(self.module, AdapterModule):
            merge = self.config.lora.merge_on_export
            return export_adapted(
                self.module, self.tokenizer, directory, merge=merge, world=self.world
            )
        return export_model(self.module, self.tokenizer, directory, world=self.world)

    def raw_scores(self, sequences: Sequence[Tensor]) -> Tensor:
        """[K] float64 uncalibrated scores, on the CPU."""
        scores = torch.zeros(len(sequences), dtype=torch.float64)
        lengths = [s.numel() for s in sequences]
        budget = max(self.budget.tokens, *lengths)
        self.module.eval()
        with torch.no_grad():
            for chosen, idle in self.dealt(pack_best_fit(lengths, budget), lengths):
                packed = PackedSequences.from_lists([sequences[i] for i in chosen])
                output = self.scores(packed)
                if not idle:
                    scores[torch.tensor(chosen)] = output.double().cpu()
        self.module.train()
        return self.work.sum(scores)
