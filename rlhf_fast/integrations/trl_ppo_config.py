"""`PPOConfig` with the fields and defaults of TRL 1.12's, read as settings of our trainer."""

from __future__ import annotations

import math
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any

from transformers import TrainingArguments

from rlhf_fast.config import (
    AlgorithmConfig,
    DataConfig,
    KLConfig,
    OptimConfig,
    RewardConfig,
    RolloutConfig,
    RunConfig,
    SamplingConfig,
)
from rlhf_fast.config import PPOConfig as Settings

RUN_NAME = "run"
_SCHEDULES = {
    "linear": "linear",
    "cosine": "cosine",
    "constant": "constant",
    "constant_with_warmup": "constant",
}
_SINKS = ("tensorboard", "wandb", "trackio")

# Fields that decide something here.
_READ = {
    *("output_dir", "per_device_train_batch_size", "per_device_eval_batch_size", "use_cpu", "bf16"),
    *("num_train_epochs", "learning_rate", "lr_scheduler_type", "warmup_steps", "weight_decay"),
    *("adam_beta1", "adam_beta2", "adam_epsilon", "gradient_accumulation_steps", "seed", "optim"),
    *("activation_checkpointing", "gradient_checkpointing", "resume_from_checkpoint", "report_to"),
    *("save_strategy", "save_steps", "save_total_limit", "disable_tqdm"),
}
# Fields that TRL's PPO does not read either, or that change what is shown or how fast data comes.
_WITHOUT_EFFECT = {
    *("max_grad_norm", "logging_steps", "logging_strategy", "logging_first_step", "log_level"),
    *("log_level_replica", "log_on_each_node", "logging_nan_inf_filter", "logging_dir", "run_name"),
    *("project", "eval_strategy", "eval_steps", "eval_delay", "eval_on_start", "do_train"),
    *("do_eval", "do_predict", "prediction_loss_only", "remove_unused_columns", "label_names"),
    *("dataloader_drop_last", "dataloader_num_workers", "dataloader_pin_memory", "tf32"),
    *("dataloader_persistent_workers", "dataloader_prefetch_factor", "dataloader_in_order"),
    *("dataloader_multiprocessing_context", "torch_empty_cache_steps", "skip_memory_metrics"),
    *("gradient_checkpointing_kwargs", "activation_checkpointing_kwargs", "local_rank"),
    *("ddp_timeout", "ddp_backend", "ddp_find_unused_parameters", "save_safetensors"),
    *("average_tokens_across_devices", "use_cache", "save_on_each_node", "save_only_model"),
    *("hub_token", "hub_private_repo", "hub_strategy", "hub_always_push", "hub_revision"),
    *("overwrite_output_dir", "full_determinism"),
}


@dataclass
class PPOConfig(TrainingArguments):
    """Fields of TRL 1.12's `PPOConfig`, with its defaults; the others are `TrainingArguments`'.

    A field that our trainer does not follow and that is not at its default is refused when the
    trainer is made. See `rlhf_fast.integrations.trl_ppo.PPOTrainer` for what differs.
    """

    learning_rate: float = 3e-6
    logging_steps: float = 10
    gradient_checkpointing: bool | None = True
    bf16: bool | None = None  # type: ignore[assignment]  # on, unless fp16 is
    dataset_num_proc: int | None = None
    num_mini_batches: int = 1
    total_episodes: int | None = None  # num_train_epochs times the rows of the dataset
    local_rollout_forward_batch_size: int = 64
    num_sample_generations: int = 10
    response_length: int = 53
    stop_token: str | None = None  # or "eos"
    stop_token_id: int | None = None
    temperature: float = 0.7
    missing_eos_penalty: float | None = None
    sft_model_path: str = "EleutherAI/pythia-160m"
    world_size: int | None = None
    num_total_batches: int | None = None
    micro_batch_size: int | None = None
    local_batch_size: int | None = None
    batch_size: int | None = None
    local_mini_batch_size: int | None = None
    mini_batch_size: int | None = None
    push_to_hub: bool = False
    reward_model_path: str = "EleutherAI/pythia-160m"
    model_adapter_name: str | None = None
    ref_adapter_name: str | None = None
    num_ppo_epochs: int = 4
    whiten_rewards: bool = False
    kl_coef: float = 0.05
    kl_estimator: str = "k1"  # or "k3"
    cliprange: float = 0.2
    vf_coef: float = 0.1
    cliprange_value: float = 0.2
    gamma: float = 1.0
    lam: float = 0.95
    ds3_gather_for_generation: bool = True

    def __post_init__(self) -> None:
        # Before the base class rewrites what was given.
        self.changed = {
            f.name: getattr(self, f.name)
            for f in fields(TrainingArguments)
            if f.default is not MISSING and _off(getattr(self, f.name)) != _off(f.default)
        }
        self.bf16 = not self.fp16 if self.bf16 is None else self.bf16
        super().__post_init__()

    @property
    def sinks(self) -> list[str]:
        """Where metrics go besides the file."""
        given = [self.report_to] if isinstance(self.report_to, str) else self.report_to or []
        return [name for name in given if name != "none"]

    def faults(self) -> list[str]:
        """Every field that our trainer cannot follow, in words."""
        known = (
            _READ
            | _WITHOUT_EFFECT
            | {f.name for f in fields(PPOConfig)} - {f.name for f in fields(TrainingArguments)}
        )
        found = [f"{k}={v!r}" for k, v in self.changed.items() if k not in known]
        found += [f"report_to has {s!r}" for s in self.sinks if s not in _SINKS]
        found += [
            f"{name}={getattr(self, name)!r}"
            for name in ("push_to_hub", "model_adapter_name", "ref_adapter_name")
            if getattr(self, name) and name not in self.changed
        ]
        if self.stop_token and self.stop_token_id is not None:
            found.append("stop_token and stop_token_id are both set")
        rules = {
            "stop_token": self.stop_token in (None, "eos"),
            "kl_estimator": self.kl_estimator in ("k1", "k3"),
            "lr_scheduler_type": _name(self.lr_scheduler_type) in _SCHEDULES,
            "optim": _name(self.optim) in ("adamw_torch", "adamw_torch_fused"),
            "save_strategy": _name(self.save_strategy) in ("no", "steps"),
            "vf_coef": self.vf_coef > 0,
            "cliprange_value": self.cliprange_value > 0,
            "num_mini_batches": self.num_mini_batches > 0
            and self.rollout % self.num_mini_batches == 0,
            "missing_eos_penalty": self.missing_eos_penalty is None or self.missing_eos_penalty > 0,
        }
        named = [name for name, holds in rules.items() if not holds]
        return found + [f"{n}={getattr(self, n)!r}" for n in named]

    @property
    def rollout(self) -> int:
        """Episodes of a rollout batch."""
        return self.per_device_train_batch_size * self.gradient_accumulation_steps

    def fill_sizes(self, rows: int) -> None:
        """The batch sizes that TRL's trainer writes into its config, for one process."""
        if self.total_episodes is None:
            self.total_episodes = int(self.num_train_epochs * rows)
        self.world_size = 1
        self.micro_batch_size = self.per_device_train_batch_size
        self.local_batch_size = self.batch_size = self.rollout
        self.local_mini_batch_size = self.mini_batch_size = self.rollout // self.num_mini_batches
        self.num_total_batches = max(1, math.ceil(self.total_episodes / self.rollout))

    def settings(self, longest_prompt: int) -> Settings:
        """Our trainer's config, once `fill_sizes` has been called."""
        total = self.num_total_batches
        assert total is not None
        longest = longest_prompt + self.response_length
        optim = self._optim(total)
        save_every = total
        if _name(self.save_strategy) == "steps":
            steps = self.save_steps if self.save_steps >= 1 else self.save_steps * total
            save_every = max(1, math.ceil(steps))
        penalty = self.missing_eos_penalty
        return Settings(
            run=RunConfig(
                output_dir=str(Path(self.output_dir or "trainer_output") / RUN_NAME),
                seed=self.seed,
                device="cpu" if self.use_cpu else "auto",
                dtype="bfloat16" if self.bf16 else "float32",
                resume="auto" if self.resume_from_checkpoint else "never",
                overwrite=not self.resume_from_checkpoint,
                save_every=save_every,
                keep_last=self.save_total_limit or max(1, math.ceil(total / save_every)),
                sinks=self.sinks,
            ),
            data=DataConfig(max_prompt_length=longest_prompt, max_length=longest),
            rollout=RolloutConfig(
                prompts=self.rollout, max_batch=self.local_rollout_forward_batch_size
            ),
            sampling=SamplingConfig(
                max_new_tokens=self.response_length, temperature=self.temperature
            ),
            reward=RewardConfig(
                normalize=False,
                clip=0.0,
                whiten=self.whiten_rewards,
                missing_eos="none" if penalty is None else "penalty",
                missing_eos_value=penalty or 0.0,
            ),
            kl=KLConfig(coef=self.kl_coef, estimator=self.kl_estimator),
            algorithm=AlgorithmConfig(
                gamma=self.gamma,
                gae_lambda=self.lam,
                ppo_epochs=self.num_ppo_epochs,
                minibatches=self.num_mini_batches,
                clip_eps_low=self.cliprange,
                clip_eps_high=self.cliprange,
                value_clip_eps=self.cliprange_value,
                whiten_unbiased=True,
            ),
            actor_optim=optim,
            critic_optim=optim,
            total_steps=total,
            microbatch_tokens=self.per_device_train_batch_size * longest,
            gradient_checkpointing=bool(
                getattr(self, "activation_checkpointing", self.gradient_checkpointing)
            ),
        )

    def _optim(self, total: int) -> OptimConfig:
        updates = self.num_ppo_epochs * self.num_mini_batches
        kind = _name(self.lr_scheduler_type)
        warmup = 0 if kind == "constant" else self.get_warmup_steps(total)
        return OptimConfig(
            lr=self.learning_rate,
            beta1=self.adam_beta1,
            beta2=self.adam_beta2,
            eps=self.adam_epsilon,
            weight_decay=self.weight_decay,
            max_grad_norm=0.0,  # TRL's PPO has no clipping
            schedule=_SCHEDULES[kind],
            warmup_steps=warmup * updates,
        )


def _off(value: Any) -> Any:
    """The value; None for every way to say no, of which command lines have their own."""
    return None if not value or value == "no" else value


def _name(choice: Any) -> str:
    """The text of an enumeration of transformers, or of what stands for it."""
    return str(getattr(choice, "value", choice))
