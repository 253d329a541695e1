"""A training run of ours for `bench_learning`: `python -m bench.ppo.learn_ours CASE_JSON`."""

from __future__ import annotations

import sys
import tempfile

import torch

from rlhf_fast.config import (
    AlgorithmConfig,
    KLConfig,
    OptimConfig,
    PPOConfig,
    RewardConfig,
    RolloutConfig,
    RunConfig,
    SamplingConfig,
)
from rlhf_fast.data import collate_prompts
from rlhf_fast.stages.ppo import PPOTrainer
from rlhf_fast.tasks.reviews import prompt_split

from .learning_task import Curve, LearningCase, load
from .side import Turns


def settings(case: LearningCase, folder: str) -> PPOConfig:
    """The rules of TRL's trainer of the same name where the two differ by default."""
    group = 1 if case.algorithm == "ppo" else case.group
    optim = OptimConfig(lr=case.lr, schedule="constant", max_grad_norm=0.0, eps=1e-8)
    in_loss = case.algorithm == "grpo"
    return PPOConfig(
        run=RunConfig(output_dir=folder, device="cpu", seed=case.seed),
        rollout=RolloutConfig(prompts=case.episodes // group, samples_per_prompt=group),
        sampling=SamplingConfig(max_new_tokens=case.response),
        reward=RewardConfig(normalize=False, clip=0.0, missing_eos="none"),
        kl=KLConfig(
            coef=case.kl_coef,
            estimator="k3" if in_loss else "k1",
            placement="loss" if in_loss else "reward",
        ),
        algorithm=AlgorithmConfig(
            estimator="gae" if case.algorithm == "ppo" else case.algorithm,
            ppo_epochs=case.epochs,
            minibatches=case.minibatches,
            whiten_unbiased=True,
        ),
        actor_optim=optim,
        critic_optim=optim,
        microbatch_tokens=1024,
        total_steps=case.steps,
    )


def run(case: LearningCase) -> Curve:
    """Train; the steps of `PPOTrainer.train` without its files."""
    model, tokenizer = load(case)
    curve = Curve(tokenizer)
    with tempfile.TemporaryDirectory() as folder:
        trainer = PPOTrainer(
            settings(case, folder),
            model=model,
            tokenizer=tokenizer,
            reward_function=curve,
            train_dataset=[{"prompt": prompt} for prompt in prompt_split()[0]],
            quiet=True,
        )
        curve.start()
        for _ in range(case.steps):
            batch = [trainer.data[i] for i in trainer.sampler.next_batch()]
            trainer.learner.step(collate_prompts(batch))
    return curve


def main() -> None:
    """Run once and answer."""
    turns = Turns()
    case = LearningCase.from_json(sys.argv[1])
    torch.set_num_threads(case.threads)
    turns.tell(run(case).found())


if __name__ == "__main__":
    main()
