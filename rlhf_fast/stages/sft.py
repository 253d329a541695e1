"""Stage 1: supervised fine-tuning on demonstrations.

The loss is the negative log-likelihood of response tokens, summed over an optimizer step and
divided by the step's own number of response tokens: neither packing nor the size of a microbatch
changes the gradient. The vocabulary head runs at those positions only. The export in
`output_dir/model` is what PPO starts from: pad and EOS set, chat template included.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from rlhf_fast.config import SFTConfig
from rlhf_fast.config_loading import require_valid
from rlhf_fast.data import (
    LoadedData,
    PackedBatch,
    SFTExample,
    collate_sft,
    load_sft,
    pack_best_fit,
    pack_by_tokens,
    warn_overlap,
)
from rlhf_fast.default_device import on_the_host
from rlhf_fast.distributed.world import World
from rlhf_fast.metrics import MetricLogger
from rlhf_fast.models.adapter_roles import AdapterActor
from rlhf_fast.models.export import export_model
from rlhf_fast.models.loading import load_causal_lm
from rlhf_fast.models.roles import Actor
from rlhf_fast.stages.adapted import ADAPTER_NAME, export_adapted, one_adapter, stage_bytes
from rlhf_fast.stages.finished import finished_result
from rlhf_fast.stages.messages import show_reports
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


@dataclass(frozen=True)
class SFTResult:
    """What a finished run leaves.

    Args:
        output_dir: the run directory.
        model_dir: the exported model.
        steps: optimizer steps.
        train_loss: nats per response token, of the last step.
        eval_loss: nats per response token on held-out rows; None without them.
        eval_token_accuracy: fraction of held-out response tokens that were the likeliest; or None.
        reports: counts of each data source, as `DataReport.to_dict`.
    """

    output_dir: str
    model_dir: str
    steps: int
    train_loss: float
    eval_loss: float | None = None
    eval_token_accuracy: float | None = None
    reports: dict[str, Any] = field(default_factory=dict)

    @property
    def eval_perplexity(self) -> float | None:
        """exp of `eval_loss`, as `eval/perplexity`."""
        return None if self.eval_loss is None else perplexity_of(self.eval_loss)

    def summary(self) -> str:
        """The result in a few plain lines."""
        lines = [f"SFT: {self.steps} steps, training loss {self.train_loss:.4f} nats per token"]
        if self.eval_loss is not None and self.eval_token_accuracy is not None:
            lines.append(
                f"  held out: loss {self.eval_loss:.4f}, perplexity {self.eval_perplexity:.5g},"
                f" token accuracy {self.eval_token_accuracy:.1%}"
            )
        return "\n".join([*lines, f"  model: {self.model_dir}"])


@on_the_host
def run_sft(config: SFTConfig, *, quiet: bool = False, world: World | None = None) -> SFTResult:
    """Train, evaluate and export, or continue where an earlier run stopped.

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
    opened = partial(open_run, config, "sft", outputs=outputs, bytes_needed=space, quiet=quiet)
    with joined(config, world) as world, opened(world=world) as run:
        if run.already_complete:
            return finished_result(run, SFTResult)
        with open_metrics(run, config) as metrics:
            stage = SFTStage(config, run, metrics, world.device)
            stage.train()
            result = stage.export()
        run.mark_complete(result.steps, dataclasses.asdict(result))
    return result


class SFTStage(SupervisedStage[SFTConfig]):
    """Model, data and optimizer of a run; `train`, then `export`."""

    role = "actor"
    description = "sft"
    shown: ClassVar[Mapping[str, str]] = {"loss": "loss/train", "lr": "lr"}

    def __init__(
        self, config: SFTConfig, run: Run, metrics: MetricLogger, device: torch.device
    ) -> None:
        super().__init__(config, run, device)
        self.data, self.eval_data = self._load_data()
        sources = [d for d in (self.data, self.eval_data) if d is not None]
        show_reports(*(d.report for d in sources))
        longest = max(d.report.longest for d in sources)
        require_budget(config.microbatch_tokens, longest)
        self.actor = self._load_actor(longest)
        fingerprints = {"training": self.data.fingerprint}
        if self.eval_data is not None:
            fingerprints["evaluation"] = self.eval_data.fingerprint
        self.begin(self.actor.module, metrics, rows=len(self.data), fingerprints=fingerprints)

    def _load_actor(self, longest: int) -> Actor | AdapterActor:
        config = self.config
        if config.lora.rank > 0:
            return AdapterActor(
                one_adapter(config, self.tokenizer, self.world, name="actor", longest=longest)
            )
        return Actor(
            prepare_for_training(
                load_causal_lm(config.model, dtype=compute_type(config.run)),
                self.tokenizer,
                self.world,
                longest=longest,
                gradient_checkpointing=config.gradient_checkpointing,
            )
        )

    def _load_data(self) -> tuple[LoadedData[SFTExample], LoadedData[SFTExample] | None]:
        source = self.config.data
        options = load_options(self.config.model, source)
        data = load_sft(source.train, self.tokenizer, options, split=source.split)
        if not source.eval:
            return data, None
        held_out = load_sft(
            source.eval, self.tokenizer, options, split=source.eval_split, name="eval"
        )
        warn_overlap(data, held_out)
        return data, held_out

    def step(self) -> dict[str, float]:
        """One optimizer step: pack, accumulate gradients, update; evaluate when it is due."""
        with self.run.phase("data"):
            epoch = self.sampler.epoch + self.sampler.cursor / self.sampler.n
            examples = [self.data[i] for i in self.sampler.next_batch()]
            loss_tokens = max(1, sum(int(e.loss_mask[1:].sum()) for e in examples))
        with self.run.phase("forward_backward"):
            loss = self.accumulate(examples, loss_tokens)
        update = self.update()
        metrics = {
            "loss/train": loss,
            **update,
            "tokens": float(sum(len(e) for e in examples)),
            "loss_tokens": float(loss_tokens),
            "epoch": epoch,
        }
        self.state.extra["train_loss"] = loss
        done, every = self.state.step + 1, self.config.eval_every
        if self.eval_data is not None and (
            done == self.total_steps or (every and done % every == 0)
        ):
            metrics |= self.held_out(self.eval_data.examples, done)
        return metrics

    def pack(self, examples: Sequence[SFTExample]) -> list[PackedBatch]:
        """Microbatches of at most `microbatch_tokens` tokens, of all those this rank's."""
        fill = pack_best_fit if self.config.packing else pack_by_tokens
        return self._dealt_batches(examples, fill, self.budget.tokens)

    def _dealt_batches(
        self,
        examples: Sequence[SFTExample],
        fill: Callable[[Sequence[int], int], list[list[int]]],
        budget: int,
    ) -> list[PackedBatch]:
        lengths = [len(e) for e in examples]
        batches = []
        for share in self.dealt(fill(lengths, max([budget, *lengths])), lengths):
            batch = collate_sft([examples[i] for i in share.rows])
            batches.append(batch.idle() if share.idle else batch)
        return batches

    def accumulate(self, examples: Sequence[SFTExample], loss_tokens: int) -> float:
        """Add the gradients of all microbatches; returns the loss of the step, nats per token."""
        total = torch.zeros((), device=self.device)

        def microbatches() -> None:
            total.zero_()
            for batch in self.pack(examples):
                loss = nll_sum(self.actor, batch) / loss_tokens
                loss.backward()
                total.add_(loss.detach())

        self.in_halves(microbatches, max(len(e) for e in examples))
        return self.work.sum_numbers([float(total)])[0]

    def evaluate(self, examples: Sequence[SFTExample]) -> dict[str, float]:
        """`loss/eval`, `eval/perplexity` and `eval/token_accuracy` over all response tokens."""
        nll, hits, tokens = 0.0, 0.0, 0.0
        self.actor.module.eval()
        with torch.no_grad():
            for batch in self._dealt_batches(examples, pack_best_fit, self.budget.tokens):
                nll += float(nll_sum(self.actor, batch).double())
                hits += int(hit_count(self.actor, batch))
                tokens += batch.num_loss_tokens
        self.actor.module.train()
        nll, hits, tokens = self.work.sum_numbers([nll, hits, tokens])
        loss = nll / max(1, tokens)
        return {
            "loss/eval": loss,
            "eval/perplexity": perplexity_of(loss),
            "eval/token_accuracy": hits / max(1, tokens),
        }

    def export(self) -> SFTResult:
        """Write `output_dir/model` and sum up."""
        if self.eval_data is not None:
            self.require_held_out(self.eval_data.examples)
        with self.run.phase("export"):
            target = self.run.path / MODEL_NAME
            model_dir = str(self._export(target))
        held_out = self.state.extra.get("eval", {})
        sources = {"train": self.data, "eval": self.eval_data}
        return SFTResult(
            output_dir=str(self.run.path),
            model_dir=model_dir,
            steps=self.state.step,
            train_loss=self.state.extra["train_loss"],
            eval_loss=held_out.get("loss/eval"),
            eval_token_accuracy=held_out.get("eval/token_accuracy"),
            reports={n: d.report.to_dict() for n, d in sources.items() if d is not None},
        )

    def _export(self, directory: Path) -> Path:
        if isinstance(self.actor, AdapterActor):
            merge = self.config.lora.merge_on_export
            return export_adapted(
                self.actor.adapted, self.tokenizer, directory, merge=merge, world=self.world
            )
        return export_model(self.actor.module, self.tokenizer, directory, world=self.world)


def perplexity_of(loss: float) -> float:
    """exp of a loss in nats; what diverged so far that it has none counts as 700."""
    return math.exp(min(loss, 700.0))


def nll_sum(actor: Actor | AdapterActor, batch: PackedBatch) -> Tensor:
    """[] float32 negative log-likelihood in nats, summed over the batch's loss tokens."""
    logprobs, _ = actor.logprobs(batch.sequences, batch.targets)
    return -logprobs.sum()


def hit_count(actor: Actor | AdapterActor, batch: PackedBatch) -> Tensor:
    """[] int64 loss tokens that the model finds likelier than every other token."""
    rows = torch.nonzero(batch.loss_mask).squeeze(1)
    likeliest = actor.likeliest_tokens(batch.sequences, rows)
    return (likeliest == batch.targets[rows].to(likeliest.device)).sum()
