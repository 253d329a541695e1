"""Stage 3: PPO. `run_ppo` works from directories, `PPOTrainer` from models in memory."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from rlhf_fast.config import PPOConfig
from rlhf_fast.config_loading import require_valid
from rlhf_fast.data import (
    EpochSampler,
    LoadedData,
    LoadOptions,
    PromptExample,
    collate_prompts,
    load_prompts,
    load_sft,
)
from rlhf_fast.data.readers import RowSource
from rlhf_fast.default_device import on_the_host
from rlhf_fast.distributed.work import WorldSplit
from rlhf_fast.distributed.world import World
from rlhf_fast.engine.memory_held import MemoryWatch
from rlhf_fast.engine.stopping import stops_of
from rlhf_fast.metrics import METRICS_NAME, read_last_metrics
from rlhf_fast.models.adapter_files import export_adapter
from rlhf_fast.models.adapter_roles import AdapterActor
from rlhf_fast.models.adapters import AdapterModule
from rlhf_fast.models.checks import check_positions
from rlhf_fast.models.directory import stop_ids
from rlhf_fast.models.export import export_model
from rlhf_fast.models.reward_function import RewardFunction
from rlhf_fast.ppo.health import hints
from rlhf_fast.ppo.trainer import PPOLearner, StepOutput
from rlhf_fast.stages.adapted import ADAPTER_NAME, export_adapted, trunk_digest
from rlhf_fast.stages.finished import finished_summary
from rlhf_fast.stages.found_to_fit import remembering
from rlhf_fast.stages.generation import (
    engine_of,
    generation_fields,
    generation_metrics,
    show_generation,
)
from rlhf_fast.stages.memory_report import MemoryReport, memory_report
from rlhf_fast.stages.messages import say, show_reports
from rlhf_fast.stages.ppo_checks import check_roles
from rlhf_fast.stages.ppo_ranks import roles_on_ranks
from rlhf_fast.stages.ppo_roles import PretrainingBatches, build_roles, critic_to_export
from rlhf_fast.stages.ranks import alone, joined, require_ranks_can, require_same_data
from rlhf_fast.stages.run import Run
from rlhf_fast.stages.run_files import keep_samples
from rlhf_fast.stages.saved_state import load_part
from rlhf_fast.stages.shared_roles import shared_bytes, shared_trunk
from rlhf_fast.stages.training import (
    MODEL_NAME,
    TrainingState,
    load_stage_tokenizer,
    load_training_state,
    open_metrics,
    open_run,
    require_budget,
    require_settings,
    train,
    training_bytes,
)

CRITIC_NAME = "critic"
SAMPLES_NAME = "samples.jsonl"
SAMPLES_A_TIME = 4
_SHOWN = {"score": "objective/scores", "kl": "objective/kl", "len": "rollout/length"}
_KEPT = ("objective/scores", "objective/kl", "rollout/length", "rollout/ended_fraction")

OnStep = Callable[[int, StepOutput], Mapping[str, float] | None]


@dataclass(frozen=True)
class PPOResult:
    """What a PPO run leaves.

    Args:
        model_dir: exported policy, loadable by `AutoModelForCausalLM`; with LoRA a peft adapter
            (docs/lora.md).
        steps: PPO steps done.
        metrics: means of the last step.
    """

    model_dir: Path
    steps: int
    metrics: dict[str, float]

    def summary(self) -> str:
        """A few plain lines."""
        m = self.metrics
        return (
            f"PPO: {self.steps} steps; last step: score {m['objective/scores']:.3f}, "
            f"KL {m['objective/kl']:.2f} nats per response, "
            f"length {m['rollout/length']:.1f}, ended {m['rollout/ended_fraction']:.0%}\n"
            f"policy: {self.model_dir}"
        )


class PPOTrainer:
    """PPO on a policy, a reward and prompts.

    Example:
        trainer = PPOTrainer(
            PPOConfig(run=RunConfig(output_dir="out"), total_steps=100),
            model=policy, tokenizer=tokenizer, reward_model=reward_model,
            train_dataset=[{"prompt": "..."}, ...],
        )
        trainer.train()

    Args:
        config: settings; `config.actor`, `config.reward.model` and so on name directories for
            whatever is not passed here.
        model: the policy, a Hugging Face causal LM; trained in place, its weights as fp32. With
            `config.lora` the trunk: frozen, its linear layers replaced in place.
        tokenizer: its tokenizer.
        train_dataset: rows with a `prompt` column: path, list of dicts or `datasets.Dataset`; or
            prompts that are loaded already.
        reference: frozen reference; None copies the policy as it is now.
        critic: sequence classifier with one label; None copies the reward model, or puts a zero
            head on a copy of the policy's trunk.
        reward_model: sequence classifier with one label.
        reward_tokenizer: its tokenizer if it is not the policy's.
        reward_function: called as fn(prompts=[...], completions=[...], completion_ids=[...],
            **columns), returns a list of numbers, of None to abstain, or of per-token lists.
        pretraining_dataset: rows for the PPO-ptx term.
        on_step: called after each step with (step, StepOutput), on every rank; the metrics it
            returns are logged.
        end_ids: ids that end a response, none if empty; None: what the tokenizer and the policy's
            generation config name.
        quiet: rare plain lines instead of progress bars.
        world: the ranks that torchrun started, from `joined`; None: this process alone.
    """

    @on_the_host
    def __init__(
        self,
        config: PPOConfig,
        *,
        model: nn.Module | None = None,
        tokenizer: Any = None,
        train_dataset: RowSource | LoadedData[PromptExample] | None = None,
        reference: nn.Module | None = None,
        critic: nn.Module | None = None,
        reward_model: nn.Module | None = None,
        reward_tokenizer: Any = None,
        reward_function: RewardFunction | None = None,
        pretraining_dataset: RowSource | None = None,
        on_step: OnStep | None = None,
        end_ids: Sequence[int] | None = None,
        quiet: bool = False,
        world: World | None = None,
    ) -> None:
        # Whether there is a reward at all is found by `build_reward`, with the objects at hand.
        given = ["reward"] if pretraining_dataset is None else ["reward", "ptx.data"]
        require_valid(config, given=given)
        needed = [] if model is not None else ["actor"]
        needed += [] if train_dataset is not None else ["data.train"]
        require_settings(config, "run.output_dir", *needed)
        self.config = config
        self.on_step = on_step
        self.quiet = quiet
        self.world = alone(config) if world is None else world
        self.device = self.world.device
        require_ranks_can(config, self.world.size)
        self.tokenizer = tokenizer or load_stage_tokenizer(config.actor, config.data)
        options = LoadOptions.from_config(config.data, stop_ids=self._stop_ids(model, end_ids))
        if not isinstance(train_dataset, LoadedData):
            train_dataset = load_prompts(
                config.data.train if train_dataset is None else train_dataset,
                self.tokenizer,
                options,
                split=config.data.split,
            )
        self.data: LoadedData[PromptExample] = train_dataset
        self.sampler = EpochSampler(
            len(self.data),
            config.rollout.prompts,
            seed=config.run.seed,
            fingerprint=self.data.fingerprint,
            setting="rollout.prompts",
        )
        require_same_data(self.world, prompts=self.data.fingerprint)
        self.pretraining = self._load_pretraining(pretraining_dataset, options)
        roles = build_roles(
            config,
            self.tokenizer,
            self.device,
            actor=model,
            reference=reference,
            critic=critic,
            reward_model=reward_model,
            reward_tokenizer=reward_tokenizer,
            reward_function=reward_function,
            pretraining=self.pretraining,
            end_ids=end_ids,
            world=self.world,
        )
        longest = max(len(e) for e in self.data.examples)
        texts = [] if self.pretraining is None else [len(e) for e in self.pretraining.examples]
        check_roles(roles, self.tokenizer, longest, config.sampling.max_new_tokens)
        check_positions(roles.actor.module, max(texts, default=0))
        sequence = longest + config.sampling.max_new_tokens
        require_budget(config.microbatch_tokens, max([sequence, *texts]))
        self.roles = roles_on_ranks(roles, config, self.world)
        self.learner = PPOLearner(config, self.roles)
        self.longest_prompt = longest
        self.memory_watch: MemoryWatch | None = None
        self._hinted: set[str] = set()

    def _stop_ids(self, model: nn.Module | None, given: Sequence[int] | None) -> tuple[int, ...]:
        """What ends a response, as generation will know it."""
        if given is not None:
            return tuple(given)
        if model is None:
            return stop_ids(self.config.actor)
        return tuple(stops_of(model, self.tokenizer)[0])

    def _load_pretraining(
        self, dataset: RowSource | None, options: LoadOptions
    ) -> PretrainingBatches | None:
        ptx = self.config.ptx
        if ptx.coef == 0:
            return None
        source = ptx.data if dataset is None else dataset
        data = load_sft(source, self.tokenizer, options, name="pretraining")
        show_reports(data.report)
        require_same_data(self.world, pretraining=data.fingerprint)
        sampler = EpochSampler(
            len(data),
            ptx.batch_size,
            seed=self.config.run.seed,
            fingerprint=data.fingerprint,
            setting="ptx.batch_size",
            where="pretraining data",
        )
        split = WorldSplit(self.world)
        return PretrainingBatches(
            data.examples, sampler, self.config.microbatch_tokens, self.device, split
        )

    @on_the_host
    def train(self) -> PPOResult:
        """Run to `config.total_steps`, continuing a run found in the output directory.

        Raises:
            RLHFError: a user's mistake, a numerical abort, or a signal after a good checkpoint.
        """
        config = self.config
        run = open_run(
            config,
            "ppo",
            outputs=(MODEL_NAME, CRITIC_NAME, ADAPTER_NAME, SAMPLES_NAME),
            bytes_needed=self._bytes_needed(),
            quiet=self.quiet,
            world=self.world,
        )
        with run:
            if run.already_complete:
                return self._finished(run)
            show_reports(self.data.report)
            with open_metrics(run, config) as log:
                return self._train(run, self._state(log))

    def _state(self, log: Any) -> TrainingState:
        modules = {"actor": self.roles.actor.module}
        optimizers = {"actor": self.roles.actor_optimizer}
        if self.roles.critic is not None:
            modules[CRITIC_NAME] = self.roles.critic.module
        if self.roles.critic_optimizer is not None:
            optimizers[CRITIC_NAME] = self.roles.critic_optimizer
        samplers = {"prompts": self.sampler}
        if self.pretraining is not None:
            samplers["pretraining"] = self.pretraining.sampler
        return TrainingState(
            modules, optimizers, samplers, log, frozen=trunk_digest(modules["actor"])
        )

    def _bytes_needed(self) -> int:
        config, trunk = self.config, shared_trunk(self.roles)
        keep = config.run.keep_last
        if trunk is None:
            return 2 * training_bytes(config.actor, keep)
        return shared_bytes(self.roles, trunk, keep_last=keep, merge=config.lora.merge_on_export)

    def _train(self, run: Run, state: TrainingState) -> PPOResult:
        config, learner = self.config, self.learner
        load_training_state(
            run.checkpoint,
            state,
            allow_data_change=config.run.allow_data_change,
            world=run.world,
        )
        if run.checkpoint is not None:
            load_part(run.checkpoint, learner, state.extra)
        engine = engine_of(self.roles.generator)
        show_generation(engine, lambda progress: run.note(**generation_fields(progress)))
        learner.phase = self.memory_watch.around(run.phase) if self.memory_watch else run.phase
        samples = run.path / SAMPLES_NAME
        run.on_main(lambda: keep_samples(samples, state.step))

        def step() -> dict[str, float]:
            batch = collate_prompts([self.data[i] for i in self.sampler.next_batch()])
            output = learner.step(batch)
            state.extra = learner.state_dict()
            done = state.step + 1
            # In a step without any update, which target_kl forbade, these are all there is.
            metrics = self.roles.rates | output.metrics | generation_metrics(self.roles.generator)
            if self.on_step is not None:
                metrics |= self.on_step(done, output) or {}
            self._advise(output, metrics)
            due = done % config.sample_every == 0 or done == config.total_steps
            if due and self.world.is_main:
                _append_samples(samples, done, output, self.tokenizer)
            return metrics

        with remembering(run, learner.budget, learner):
            train(
                run,
                state,
                step,
                total_steps=config.total_steps,
                save_every=config.run.save_every,
                description="PPO",
                shown=_SHOWN,
            )
        self.save_model(run.path / MODEL_NAME)
        critic = critic_to_export(self.roles)
        if critic is not None:
            self._save_critic(critic, run.path / CRITIC_NAME)
        metrics = run.on_main(lambda: _kept_metrics(run.path, state.step))
        run.mark_complete(state.step, metrics)
        return PPOResult(run.path / MODEL_NAME, state.step, metrics)

    def watch_memory(self) -> None:
        """From now on count what every role holds in every phase; see `memory_report`."""
        if self.memory_watch is None:
            self.memory_watch = MemoryWatch(self.roles)
            self.memory_watch.attach()

    def memory_report(self) -> MemoryReport:
        """Predicted against held bytes of the phases seen since `watch_memory`; or of now.

        On several ranks each compares what it holds with its share of the plan.
        """
        watch = self.memory_watch or MemoryWatch(self.roles)
        return memory_report(
            self.config,
            self.roles,
            watch,
            longest_prompt=self.longest_prompt,
            world=self.world,
        )

    @on_the_host
    def save_model(self, directory: str | Path) -> None:
        """Export the policy and its tokenizer as a Hugging Face directory, or its adapter."""
        actor, target = self.roles.actor, Path(directory)
        if isinstance(actor, AdapterActor):
            merge = self.config.lora.merge_on_export
            export_adapted(actor.adapted, self.tokenizer, target, merge=merge, world=self.world)
        else:
            export_model(actor.module, self.tokenizer, target, world=self.world)

    def _save_critic(self, module: nn.Module, directory: Path) -> None:
        export: Callable[..., Path] = export_model
        if isinstance(module, AdapterModule):
            export = export_adapter
        export(module, self.tokenizer, directory, world=self.world)

    def _advise(self, output: StepOutput, metrics: Mapping[str, float]) -> None:
        """Show warnings, and each health hint once a run."""
        say(f"warning: {text}" for text in output.warnings)
        for hint in hints(metrics, self.config):
            if hint.name not in self._hinted:
                self._hinted.add(hint.name)
                say([f"hint: {hint.text}"])

    def _finished(self, run: Run) -> PPOResult:
        # More than `total_steps` if that was lowered after they were done.
        done = run.checkpoint.step if run.checkpoint is not None else self.config.total_steps
        summary = finished_summary(run, dict.fromkeys(_KEPT, float))
        metrics = {name: summary.get(name, math.nan) for name in _KEPT}
        return PPOResult(run.path / MODEL_NAME, done, metrics)


def run_ppo(config: PPOConfig, *, world: World | None = None) -> PPOResult:
    """Stage 3 from the directories that the config names, on `world` or what torchrun started."""
    require_valid(config)
    with joined(config, world) as world:
        return PPOTrainer(config, world=world).train()


def _kept_metrics(directory: Path, step: int) -> dict[str, float]:
    """What is kept of the last step; NaN if the log has lost its line, as on a full disk."""
    last = read_last_metrics(directory / METRICS_NAME)
    if last.get("step") != step:
        return dict.fromkeys(_KEPT, math.nan)
    return {name: float(last[name] or 0.0) for name in _KEPT}


def _append_samples(path: Path, step: int, output: StepOutput, tokenizer: Any) -> None:
    """Write a few prompts and responses of a step, one JSON object a line."""
    scored = output.experience.scored
    rollout = scored.rollout
    responses = rollout.response_ids()
    scores = scored.scores if scored.scores.dim() == 1 else scored.scores.sum(1)
    with path.open("a", encoding="utf-8") as file:
        for s in range(min(SAMPLES_A_TIME, len(rollout))):
            row = {
                "step": step,
                "prompt": rollout.prompts.texts[s // rollout.samples_per_prompt],
                "response": tokenizer.decode(responses[s], skip_special_tokens=True),
                "score": float(scores[s]) if bool(scored.scored[s]) else None,
                "ended": bool(rollout.ended[s]),
            }
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
