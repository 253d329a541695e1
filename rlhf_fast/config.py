"""The config of every stage: one tree of frozen dataclasses, one sentence and one source a leaf.

`setting()` carries the documentation, the bounds and the choices of a leaf; `violations()` of
`config_rules` checks a whole tree. Defaults are for real models (1B and up) and lie where the
literature puts them; the embedded tasks bring their own. Sources, by short name:

    OAI     Ziegler et al. 2019, "Fine-tuning language models from human preferences", and its code
    TLDR    Stiennon et al. 2020, "Learning to summarize", and Huang et al. 2024, "The N+
            implementation details of RLHF with PPO"
    IGPT    Ouyang et al. 2022, "InstructGPT"
    PPO     Schulman et al. 2017;  GAE  Schulman et al. 2016
    RLOO    Ahmadian et al. 2024;  GRPO  Shao et al. 2024 (DeepSeekMath)
    DUAL    Ye et al. 2020, "Mastering complex control in MOBA games" (dual clip)
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from rlhf_fast.config_distributed import DistributedConfig
from rlhf_fast.config_lora import (
    AdapterConfig,
    LoraConfig,
)
from rlhf_fast.config_setting import setting


@dataclass(frozen=True)
class RunConfig:
    """Where a run lives and how it is kept."""

    output_dir: str = setting("", "folder of the run: checkpoints, metrics.jsonl, exported model")
    seed: int = setting(
        1,
        "seeds data order, weights made here and every sample",
        low=0,
        high=2**64 - 1,  # of torch's generators
    )
    device: str = setting("auto", "auto, cpu or cuda")
    dtype: str = setting(
        "float32",
        "compute type; bfloat16 keeps fp32 master weights (pure bf16 cannot learn at lr 1e-6)",
        choices=("float32", "bfloat16"),
    )
    threads: int = setting(0, "CPU threads; 0 leaves torch's choice", low=0)
    resume: str = setting(
        "auto",
        "auto continues the run in output_dir or starts one; always insists on one, never on none",
        choices=("auto", "always", "never"),
    )
    resume_step: int = setting(-1, "resume from this very step; -1 is the newest valid", low=-1)
    overwrite: bool = setting(False, "discard what another run left in output_dir")
    allow_data_change: bool = setting(False, "resume although the data changed; resets the cursor")
    save_every: int = setting(50, "optimizer or PPO steps between checkpoints", low=1)
    keep_last: int = setting(2, "checkpoints kept", low=1)
    async_save: str = setting(
        "off",
        "on writes checkpoints in the background, from a copy of the state in host memory",
        choices=("off", "on"),
    )
    max_bad_steps: int = setting(3, "non-finite steps in a row before the run aborts", low=1)
    sinks: list[str] = setting(
        [], "extra metric sinks beside metrics.jsonl: tensorboard, wandb, trackio"
    )


@dataclass(frozen=True)
class DataConfig:
    """Rows in, examples out."""

    train: str = setting("", "JSONL, parquet or arrow file, or a hub name")
    eval: str = setting(
        "", "held-out rows of SFT and reward model; prompts of an evaluation; PPO reads none"
    )
    split: str = setting("train", "split of a hub dataset used for training")
    eval_split: str = setting("test", "split of a hub dataset used for evaluation")
    chat_template: str = setting("", "Jinja template text or file; empty: the tokenizer's own")
    max_prompt_length: int = setting(512, "tokens of a prompt", low=1)
    max_length: int = setting(1024, "tokens of prompt and response", low=2)
    overlong: str = setting(
        "filter",
        "rows over length: drop and count, cut the prompt from the left, or stop",
        choices=("filter", "truncate-left", "error"),
    )
    on_bad_row: str = setting("error", "unreadable rows: stop, or skip", choices=("error", "skip"))
    max_bad_rows: int = setting(100, "skipped rows before the run stops all the same", low=0)


@dataclass(frozen=True)
class OptimConfig:
    """AdamW and its schedule."""

    lr: float = setting(
        3e-6, "peak learning rate; 1e-6 to 5e-6 usual in PPO (TLDR 3e-6, OAI 5e-6)", above=0
    )
    beta1: float = setting(0.9, "first-moment decay", low=0, high=0.999999)
    beta2: float = setting(0.95, "second-moment decay (IGPT 0.95)", low=0, high=0.999999)
    eps: float = setting(1e-5, "added to sqrt(v); 1e-5 in TLDR", above=0)
    weight_decay: float = setting(0.0, "decoupled weight decay", low=0)
    max_grad_norm: float = setting(1.0, "clip of the global gradient norm; 0 is off", low=0)
    schedule: str = setting(
        "linear",
        "decay to 0 (TLDR), half a cosine, or none",
        choices=("linear", "cosine", "constant"),
    )
    warmup_steps: int = setting(0, "optimizer steps of linear warm-up", low=0)


@dataclass(frozen=True)
class SFTConfig:
    """Stage 1: supervised fine-tuning on demonstrations."""

    model: str = setting("", "Hugging Face causal LM directory to start from")
    run: RunConfig = field(default_factory=RunConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=lambda: OptimConfig(lr=1e-5, schedule="cosine"))
    lora: AdapterConfig = field(default_factory=AdapterConfig)
    distributed: DistributedConfig = field(default_factory=DistributedConfig)
    epochs: int = setting(1, "passes over the data", low=1)
    max_steps: int = setting(0, "optimizer steps; 0 is by epochs", low=0)
    batch_size: int = setting(64, "sequences of an optimizer step", low=1)
    microbatch_tokens: int = setting(8192, "tokens of one forward", low=1)
    packing: bool = setting(True, "fill forwards by best fit; off keeps data order within a batch")
    eval_every: int = setting(0, "steps between evaluations; 0 is at the end", low=0)
    gradient_checkpointing: bool = setting(False, "recompute activations in backward")


@dataclass(frozen=True)
class RewardModelConfig:
    """Stage 2: a reward model from ranked completions."""

    model: str = setting("", "causal LM (head made here) or sequence-classification directory")
    run: RunConfig = field(default_factory=RunConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=lambda: OptimConfig(lr=1e-5))
    lora: AdapterConfig = field(default_factory=AdapterConfig)
    distributed: DistributedConfig = field(default_factory=DistributedConfig)
    init_head: bool = setting(True, "make a new scalar head where the directory has none")
    epochs: int = setting(1, "passes over the data; more than 1 over-fits (IGPT)", low=1)
    max_steps: int = setting(0, "optimizer steps; 0 is by epochs", low=0)
    batch_size: int = setting(
        64, "prompts of an optimizer step, all their completions together", low=1
    )
    microbatch_tokens: int = setting(8192, "tokens of one forward", low=1)
    margin: bool = setting(False, "subtract the data's `margin` column inside the sigmoid")
    eval_fraction: float = setting(
        0.1, "part of the training rows held out when data.eval is empty", low=0, high=0.9
    )
    demonstrations: str = setting(
        "", "prompt-completion rows whose mean score becomes 0 (TLDR, IGPT); empty: chosen ones"
    )
    unit_gain: bool = setting(False, "also scale scores of the demonstrations to std 1 (OAI)")
    gradient_checkpointing: bool = setting(False, "recompute activations in backward")


@dataclass(frozen=True)
class SamplingConfig:
    """How responses are drawn."""

    max_new_tokens: int = setting(512, "response tokens, EOS included", low=1)
    temperature: float = setting(
        1.0, "0.7 to 1.0 usual (OAI, TLDR 0.7); used in training too", low=0
    )
    top_p: float = setting(1.0, "nucleus; 1 is off. Warping biases KL and ratio", low=0, high=1)
    top_k: int = setting(0, "0 is off", low=0)
    min_p: float = setting(0.0, "0 is off", low=0, high=1)
    stop: list[str] = setting([], "stop strings; the response ends right after one")


@dataclass(frozen=True)
class RolloutConfig:
    """One rollout batch."""

    prompts: int = setting(512, "prompts of a rollout batch; 256 to 1024 usual (IGPT 512)", low=1)
    samples_per_prompt: int = setting(1, "G; at least 2 for rloo and grpo", low=1)
    max_batch: int = setting(256, "sequences decoded side by side", low=1)


@dataclass(frozen=True)
class EngineConfig:
    """How responses are generated; nothing here changes what is sampled."""

    path: str = setting(
        "auto",
        "what runs the model: fused forward, its modules over pages, padded batches; auto takes "
        "the first of these that can. transformers: its continuous batching with our sampler",
        choices=("auto", "fused", "modules", "transformers", "padded"),
    )
    kv_gb: float = setting(
        0.0,
        "GB (1e9 bytes) of key-value memory at most; 0: 80 % of a GPU's free memory, 25 % of the "
        "host's. Samples that do not fit wait, or give way and are recomputed",
        low=0,
    )
    page_size: int = setting(0, "tokens of a page; 0: 64 on a CPU, 256 on a GPU", low=0)
    prefill_tokens: int = setting(8192, "prompt tokens of one forward", low=1)
    burst: int = setting(
        0,
        "decoding steps between two looks of the host; 0: 8, or 1 where an ended row would go on",
        low=0,
    )
    overlap_scoring: str = setting(
        "auto",
        "PPO scores finished samples while the last ones are drawn; auto: on a GPU, a CPU gains "
        "nothing",
        choices=("auto", "on", "off"),
    )
    attention: str = setting(
        "auto",
        "what attends on the fused path on a GPU; auto takes the first that can",
        choices=("auto", "flash_attn", "torch_varlen", "rlhf_fast"),
    )
    cuda_graphs: bool = setting(
        True, "on a GPU, record the decoding step once a batch size and replay it"
    )
    keep_memory: bool = setting(
        False,
        "hold a GPU's key-value memory, and the bf16 copy of fp32 weights (2 bytes a parameter), "
        "while training runs: faster rollouts, less room for activations",
    )


@dataclass(frozen=True)
class RewardConfig:
    """From raw scores to what GAE sees."""

    model: str = setting("", "reward-model directory; empty: none")
    function: str = setting("", "file.py:name of a Python reward over texts; empty: none")
    function_weight: float = setting(1.0, "weight of the function beside a model's score")
    on_error: str = setting(
        "fail",
        "a reward function that raises: stop, or leave the row out",
        choices=("fail", "abstain"),
    )
    normalize: bool = setting(
        True, "subtract the running mean and divide by the running std of scores"
    )
    clip: float = setting(
        10.0, "clip of the score, before the KL term; 0 is off (DS-Chat 5, OpenRLHF 10)", low=0
    )
    whiten: bool = setting(
        False, "divide per-token rewards by their std, mean kept (OAI on, TLDR off)"
    )
    missing_eos: str = setting(
        "penalty",
        "a truncated response: nothing, subtract missing_eos_value, or replace the score by it",
        choices=("none", "penalty", "replace"),
    )
    missing_eos_value: float = setting(
        1.0, "subtracted (penalty) or negated and put in place (replace; TLDR: -1)"
    )


@dataclass(frozen=True)
class KLConfig:
    """The leash to the reference."""

    coef: float = setting(0.05, "0.01 to 0.2 usual (TLDR 0.05, IGPT 0.02)", low=0)
    estimator: str = setting(
        "k1",
        "per-token estimator (Schulman 2020), or the exact KL over the whole vocabulary",
        choices=("k1", "k2", "k3", "exact"),
    )
    placement: str = setting(
        "reward", "in the reward (OAI) or in the loss (GRPO)", choices=("reward", "loss")
    )
    adaptive: bool = setting(False, "Ziegler's proportional controller of coef (OAI)")
    target: float = setting(6.0, "nats per sequence the controller aims at (OAI 6)", above=0)
    horizon: int = setting(10000, "episodes of the controller's time constant (OAI 10000)", low=1)


@dataclass(frozen=True)
class AlgorithmConfig:
    """Advantages and losses."""

    estimator: str = setting(
        "gae", "gae has a critic; rloo and grpo are critic-free", choices=("gae", "rloo", "grpo")
    )
    gamma: float = setting(1.0, "discount (OAI 1)", low=0, high=1)
    gae_lambda: float = setting(0.95, "GAE lambda (OAI 0.95)", low=0, high=1)
    bootstrap_truncated: bool = setting(
        False, "value of the last state follows a truncated response"
    )
    ppo_epochs: int = setting(4, "passes over a rollout batch; 1 to 4 usual (OAI 4)", low=1)
    minibatches: int = setting(1, "optimizer steps of one pass (TLDR 1)", low=1)
    clip_eps_low: float = setting(0.2, "lower clip of the ratio (PPO 0.2)", above=0, high=1)
    clip_eps_high: float = setting(0.2, "upper clip of the ratio (PPO 0.2)", above=0)
    dual_clip: float = setting(
        0.0, "bound of the loss for negative advantages, > 1 (DUAL 3); 0 is off", low=0
    )
    value_clip_eps: float = setting(0.2, "clip of the value change; 0 is off (OAI 0.2)", low=0)
    entropy_coef: float = setting(0.0, "entropy bonus (0 in OAI, TLDR, IGPT)", low=0)
    target_kl: float = setting(
        0.0, "mean k3 of new against old policy that ends the PPO epochs; 0 is off", low=0
    )
    whiten: bool = setting(
        True, "whiten the advantages of gae (OAI); rloo and grpo have baselines of their own"
    )
    whiten_scope: str = setting(
        "batch",
        "statistics over the rollout batch or each minibatch",
        choices=("batch", "minibatch"),
    )
    whiten_unbiased: bool = setting(False, "Bessel's correction (TRL, verl on; OAI off)")
    rollout_correction: float = setting(
        0.0, "cap of the truncated importance weight trainer/generator; 0 is off", low=0
    )
    old_logprobs: str = setting(
        "recompute",
        "anchor of the ratio: recomputed by the actor, or the generator's own, which saves that "
        "forward and needs rollout_correction",
        choices=("recompute", "rollout"),
    )
    max_rollout_kl: float = setting(
        1e-4,
        "nats a token (k3) between generator and trainer, measured in each step, above which "
        "old_logprobs=rollout recomputes",
        above=0,
    )
    max_logprob_gap: float = setting(
        1.0, "mean |trainer - generator| log-prob that aborts the run; 0.05 warns", above=0
    )


@dataclass(frozen=True)
class PtxConfig:
    """PPO-ptx: a pretraining loss beside PPO (IGPT)."""

    coef: float = setting(0.0, "weight of the language-model loss; 0 is off (IGPT 27.8)", low=0)
    data: str = setting("", "rows with `text`, prompt-completion or messages")
    batch_size: int = setting(64, "sequences of an optimizer step", low=1)


@dataclass(frozen=True)
class MemoryConfig:
    """Where the four models live, and in how many bytes (docs/memory.md has the sums)."""

    reference: str = setting(
        "resident",
        "the reference on the device, or in host memory and read a layer at a time",
        choices=("resident", "offload"),
    )
    reward_model: str = setting(
        "resident",
        "the reward model on the device, or in host memory and read a layer at a time",
        choices=("resident", "offload"),
    )
    optimizer_state: str = setting(
        "resident",
        "Adam's moments on the device always, or in host memory while sampling and scoring",
        choices=("resident", "offload"),
    )
    optimizer: str = setting(
        "adamw",
        "moments in 8 bytes a parameter, or in 2.03 (block-wise 8 bits, Dettmers et al. 2022)",
        choices=("adamw", "adamw8bit"),
    )
    step_in_backward: bool = setting(
        False, "step each parameter as its gradient is made, so that few gradients exist at once"
    )
    value_head: str = setting(
        "separate",
        "the critic is a model of its own, or a scalar head on the actor's trunk",
        choices=("separate", "actor"),
    )
    value_coef: float = setting(
        0.1, "weight of the value loss on a shared trunk (OAI 0.1)", above=0
    )


@dataclass(frozen=True)
class PPOConfig:
    """Stage 3: PPO, RLOO and GRPO as settings of one trainer."""

    actor: str = setting("", "causal LM directory from SFT")
    reference: str = setting("", "frozen reference; empty: a copy of the actor as loaded")
    critic: str = setting(
        "", "critic to start from; empty: the reward model, else the actor's trunk"
    )
    run: RunConfig = field(default_factory=lambda: RunConfig(save_every=10))
    data: DataConfig = field(default_factory=DataConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    kl: KLConfig = field(default_factory=KLConfig)
    algorithm: AlgorithmConfig = field(default_factory=AlgorithmConfig)
    ptx: PtxConfig = field(default_factory=PtxConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    memory: MemoryConfig = field(default_factory=MemoryConfig)
    distributed: DistributedConfig = field(default_factory=DistributedConfig)
    actor_optim: OptimConfig = field(default_factory=OptimConfig)
    critic_optim: OptimConfig = field(default_factory=lambda: OptimConfig(lr=9e-6))
    total_steps: int = setting(500, "rollout batches", low=1)
    microbatch_tokens: int = setting(8192, "tokens of one forward", low=1)
    side_by_side: int = setting(
        0,
        "models that score or train at the same time on a CPU, each on its share of run.threads, "
        "at least one; 0: as many as there are threads; 1: one after another, in less memory",
        low=0,
    )
    sample_every: int = setting(10, "steps between samples written to samples.jsonl", low=1)
    gradient_checkpointing: bool = setting(False, "recompute activations in backward")


@dataclass(frozen=True)
class EvalConfig:
    """Scores of a policy: reward, KL to a reference, best-of-N."""

    model: str = setting("", "causal LM directory to evaluate")
    reference: str = setting("", "directory the KL is taken against; empty: no KL")
    run: RunConfig = field(default_factory=RunConfig)
    data: DataConfig = field(default_factory=DataConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    max_prompts: int = setting(256, "prompts evaluated", low=1)
    samples_per_prompt: int = setting(1, "samples a prompt", low=1)
    best_of: list[int] = setting([], "n of best-of-n to report; each at most samples_per_prompt")
    max_batch: int = setting(256, "sequences decoded side by side", low=1)
    engine: EngineConfig = field(default_factory=EngineConfig)
    microbatch_tokens: int = setting(8192, "tokens of one forward", low=1)


StageConfig = SFTConfig | RewardModelConfig | PPOConfig | EvalConfig


def leaves(config: Any, prefix: str = "") -> Iterator[tuple[str, Any, dataclasses.Field[Any]]]:
    """(dotted key, value, field) of every leaf of a config tree."""
    for f in dataclasses.fields(config):
        value, key = getattr(config, f.name), f"{prefix}{f.name}"
        if dataclasses.is_dataclass(value):
            yield from leaves(value, f"{key}.")
        else:
            yield key, value, f


def to_dict(config: StageConfig) -> dict[str, Any]:
    """The config as nested plain dicts, ready for YAML or JSON."""
    return dataclasses.asdict(config)
