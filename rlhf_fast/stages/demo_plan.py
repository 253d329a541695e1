"""The demo's settings: sizes, and the config of each of its stages.

Tuned for a policy of 0.34 M parameters on two CPU cores; nothing here is advice for real models,
whose defaults are in `rlhf_fast.config`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from rlhf_fast.config import (
    AlgorithmConfig,
    DataConfig,
    EvalConfig,
    KLConfig,
    OptimConfig,
    PPOConfig,
    RewardConfig,
    RewardModelConfig,
    RolloutConfig,
    RunConfig,
    SamplingConfig,
    SFTConfig,
)
from rlhf_fast.tasks import gold

KL_COEF = 0.1
RESPONSE_TOKENS = 40
SEQUENCE_TOKENS = 56
MICROBATCH_TOKENS = 16384


@dataclass(frozen=True)
class Plan:
    """Sizes of the demo.

    Args:
        folder: where everything goes.
        seed: of everything.
        sft_rows, sft_steps: stage 1; rows are for 64 a step.
        pairs: preference pairs sampled from the SFT policy, a tenth of them held out.
        ppo_steps: PPO with the KL penalty.
        no_kl_steps: PPO without it; 0 leaves the warning example out.
        prompts: prompts of a PPO step, two samples each.
        best_of: the largest n of best-of-n.
        eval_samples: samples a held-out prompt when a policy is measured.
    """

    folder: Path
    seed: int
    sft_rows: int = 16_000
    sft_steps: int = 300
    pairs: int = 2_800
    ppo_steps: int = 40
    no_kl_steps: int = 90
    prompts: int = 64
    best_of: int = 64
    eval_samples: int = 32

    def place(self, name: str) -> Path:
        """A folder of the demo."""
        return self.folder / name

    def model(self, stage: str) -> str:
        """The exported model of a stage."""
        return str(self.place(stage) / "model")


def full(folder: Path, seed: int) -> Plan:
    """About four minutes on two cores."""
    return Plan(folder, seed)


def quick(folder: Path, seed: int) -> Plan:
    """About a minute: fewer pairs and steps, no over-optimised run."""
    return Plan(
        folder,
        seed,
        sft_rows=12_800,
        sft_steps=200,
        pairs=1_600,
        ppo_steps=20,
        no_kl_steps=0,
        best_of=16,
    )


def _run(plan: Plan, name: str, save_every: int) -> RunConfig:
    # One thread: at this size a second one gains nothing on an idle machine, and where another
    # process competes for the core its barriers cost ten times the work.
    return RunConfig(
        output_dir=str(plan.place(name)),
        seed=plan.seed,
        device="cpu",
        threads=1,
        save_every=save_every,
    )


def _data(train: Path | str = "", held_out: Path | str = "") -> DataConfig:
    return DataConfig(
        train=str(train), eval=str(held_out), max_prompt_length=12, max_length=SEQUENCE_TOKENS
    )


def _optim(lr: float, schedule: str, weight_decay: float = 0.0) -> OptimConfig:
    # Gradients of so small a model are small too: eps 1e-5 would damp Adam.
    return OptimConfig(
        lr=lr, schedule=schedule, warmup_steps=20, weight_decay=weight_decay, eps=1e-8
    )


def _sampling() -> SamplingConfig:
    return SamplingConfig(max_new_tokens=RESPONSE_TOKENS)


def sft(plan: Plan, train: Path, held_out: Path) -> SFTConfig:
    """Stage 1."""
    return SFTConfig(
        model=str(plan.place("base")),
        run=_run(plan, "sft", 100),
        data=_data(train, held_out),
        optim=_optim(3e-3, "cosine", weight_decay=0.01),
        max_steps=plan.sft_steps,
        batch_size=64,
        microbatch_tokens=MICROBATCH_TOKENS,
    )


def reward_model(plan: Plan, pairs: Path, demonstrations: Path) -> RewardModelConfig:
    """Stage 2. Unit gain makes the proxy read in standard deviations of the demonstrations."""
    return RewardModelConfig(
        model=plan.model("sft"),
        run=_run(plan, "reward_model", 50),
        data=_data(pairs),
        optim=_optim(2e-3, "cosine", weight_decay=0.01),
        epochs=2,
        batch_size=64,
        microbatch_tokens=MICROBATCH_TOKENS,
        demonstrations=str(demonstrations),
        unit_gain=True,
    )


def ppo(plan: Plan, name: str, prompts: Path, *, kl_coef: float, steps: int) -> PPOConfig:
    """Stage 3, with or without the KL penalty."""
    return PPOConfig(
        actor=plan.model("sft"),
        run=_run(plan, name, 10),
        data=_data(prompts),
        rollout=RolloutConfig(prompts=plan.prompts, samples_per_prompt=2),
        sampling=_sampling(),
        # The reward model is calibrated to unit gain; scaling its scores again would move beta.
        reward=RewardConfig(
            model=plan.model("reward_model"), normalize=False, clip=0.0, missing_eos="none"
        ),
        kl=KLConfig(coef=kl_coef),
        algorithm=AlgorithmConfig(ppo_epochs=2, minibatches=2, value_clip_eps=0.0),
        actor_optim=_optim(3e-4, "constant"),
        critic_optim=_optim(1e-3, "constant"),
        total_steps=steps,
        microbatch_tokens=MICROBATCH_TOKENS,
        # Two models need each other once a minibatch only, whoever else is at work on the cores.
        side_by_side=2,
        sample_every=10,
    )


def sample_pairs(plan: Plan, prompts: Path, samples_per_prompt: int) -> EvalConfig:
    """Draw the completions that the noisy judge compares."""
    return EvalConfig(
        model=plan.model("sft"),
        run=_run(plan, "pairs", 1),
        data=_data(held_out=prompts),
        sampling=_sampling(),
        max_prompts=10_000,
        samples_per_prompt=samples_per_prompt,
        microbatch_tokens=MICROBATCH_TOKENS,
    )


def evaluation(plan: Plan, name: str, model: str, prompts: Path, *, best_of: bool) -> EvalConfig:
    """Measure a policy on held-out prompts: KL from SFT, proxy, gold, and best-of-n of SFT."""
    samples = plan.best_of if best_of else plan.eval_samples
    powers = [2**k for k in range(samples.bit_length())]
    return EvalConfig(
        model=model,
        reference=plan.model("sft"),
        run=_run(plan, name, 1),
        data=_data(held_out=prompts),
        sampling=_sampling(),
        reward=RewardConfig(
            model=plan.model("reward_model"), function=f"{gold.__file__}:gold_reward"
        ),
        samples_per_prompt=samples,
        best_of=powers if best_of else [],
        microbatch_tokens=MICROBATCH_TOKENS,
    )
