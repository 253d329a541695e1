"""Your own loop, with the PPO engine: you bring models, prompts and a reward, and call each step.

`python examples/engine_only.py` runs it on a CPU with a tiny model. With `trainer.train()` instead
of the loop you also get checkpoints, resume and an export.
"""

from __future__ import annotations

import tempfile

from rlhf_fast.config import OptimConfig, PPOConfig, RolloutConfig, RunConfig, SamplingConfig
from rlhf_fast.data import collate_prompts, load_prompts
from rlhf_fast.stages.ppo import PPOTrainer
from rlhf_fast.tasks.tiny import build_model, build_tokenizer


def brevity(prompts: list[str], completions: list[str]) -> list[float]:
    """1 for an empty completion, less for a longer one."""
    return [1 / (1 + len(completion.split())) for completion in completions]


def main() -> None:
    """PPO with a critic, a reference and a KL penalty, towards short completions."""
    tokenizer = build_tokenizer()
    rows = [{"prompt": "the food was"}, {"prompt": "the room in oslo was"}] * 8
    config = PPOConfig(
        run=RunConfig(output_dir=tempfile.mkdtemp()),
        rollout=RolloutConfig(prompts=16, samples_per_prompt=2),
        sampling=SamplingConfig(max_new_tokens=8),
        actor_optim=OptimConfig(lr=1e-3),
        total_steps=10,
    )
    options = {"tokenizer": tokenizer, "train_dataset": rows, "reward_function": brevity}
    trainer = PPOTrainer(config, model=build_model(tokenizer), **options)
    prompts = collate_prompts(load_prompts(rows, tokenizer).examples)
    for step in range(10):
        metrics = trainer.learner.step(prompts).metrics
        print(f"step {step}: score {metrics['objective/scores']:.3f}")


if __name__ == "__main__":
    main()
