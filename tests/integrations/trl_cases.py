"""Small runs of TRL's trainers: a random Llama, a tokenizer made here, a reward by rule."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import torch
from transformers import LlamaForSequenceClassification, TrainerCallback

from rlhf_fast.tasks.reviews import CITIES, NOUNS
from rlhf_fast.tasks.tiny import build_model, build_tokenizer

PROMPTS = [f"review of the {x} :" for x in ("soup in oslo", "film", "pizza in rome", "hotel")]
LIMIT = 8


class Recorder(TrainerCallback):
    """What a trainer logs at each step, and the completions that its reward saw.

    Args:
        ranked: the reward depends on the place in the batch as well, so that a group of equal
            completions, as greedy decoding makes, has something to learn from.
    """

    def __init__(self, *, ranked: bool = False) -> None:
        self.ranked = ranked
        self.logs: list[dict[str, float]] = []
        self.completions: list[list[int]] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        self.logs.append(dict(logs))

    def series(self, name: str) -> list[float]:
        return [log[name] for log in self.logs if name in log]

    def reward(self, completion_ids: list[list[int]], **_: Any) -> list[float]:
        """The share of even tokens."""
        self.completions += completion_ids
        places = enumerate(completion_ids)
        return [
            sum(t % 2 == 0 for t in ids) / len(ids) + (self.ranked and i % 3) for i, ids in places
        ]


def online_trainer(kind: str, folder: Path, recorder: Recorder, **options: Any) -> Any:
    """`GRPOTrainer` or `RLOOTrainer`, four generations for each of two prompts a step."""
    import trl

    tokenizer = build_tokenizer()
    settings: dict[str, Any] = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "num_generations": 4,
        "max_completion_length": LIMIT,
        "max_steps": 3,
        "learning_rate": 1e-3,
        "lr_scheduler_type": "constant",
        "beta": 0.0,
        "bf16": False,
        "gradient_checkpointing": False,
        "logging_steps": 1,
        "report_to": [],
        "save_strategy": "no",
        "use_cpu": not torch.cuda.is_available(),
        "disable_tqdm": True,
        "seed": 5,
    }
    extra = {k: options.pop(k) for k in ("rollout_func", "peft_config") if k in options}
    prompts: list[Any] = PROMPTS * 4
    if options.pop("conversational", False):
        tokenizer.chat_template = "{% for m in messages %}{{ m.content }} :{% endfor %}"
        prompts = [[{"role": "user", "content": p}] for p in prompts]
    torch.manual_seed(0)
    model = build_model(tokenizer, seed=1)
    return getattr(trl, f"{kind}Trainer")(
        model=model,
        reward_funcs=recorder.reward,
        args=getattr(trl, f"{kind}Config")(**settings | options),
        train_dataset=datasets.Dataset.from_dict({"prompt": prompts}),
        processing_class=tokenizer,
        callbacks=[recorder],
        **extra,
    )


def scorer(seed: int) -> Any:
    """A sequence classifier with one label, random throughout."""
    config = build_model(build_tokenizer()).config
    config.num_labels = 1
    model = LlamaForSequenceClassification(config)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.05)
    return model


def ppo_settings(folder: Path, **options: Any) -> dict[str, Any]:
    """Fields of TRL 1.12's `PPOConfig`: 16 episodes a rollout, two passes."""
    settings: dict[str, Any] = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 8,
        "gradient_accumulation_steps": 2,
        "num_mini_batches": 1,
        "num_ppo_epochs": 2,
        "total_episodes": 48,
        "response_length": LIMIT,
        "stop_token": "eos",
        "missing_eos_penalty": 1.0,
        "learning_rate": 1e-3,
        "lr_scheduler_type": "constant",
        "bf16": False,
        "gradient_checkpointing": False,
        "num_sample_generations": 0,
        "logging_steps": 1,
        "report_to": [],
        "save_strategy": "no",
        "use_cpu": not torch.cuda.is_available(),
        "disable_tqdm": True,
        "seed": 5,
    }
    return settings | options


def ppo_models() -> dict[str, Any]:
    """The models, tokenizer and prompts that both PPO trainers are given, made anew."""
    tokenizer = build_tokenizer()
    # Prompts of one length: padding among them is where the two trainers differ by design.
    prompts = [f"review of the {noun} in {city} :" for noun in NOUNS[:8] for city in CITIES[:8]]
    ids = [tokenizer(p)["input_ids"] for p in prompts]
    return {
        "processing_class": tokenizer,
        "model": build_model(tokenizer, seed=1),
        "ref_model": None,
        "reward_model": scorer(2),
        "value_model": scorer(3),
        "train_dataset": datasets.Dataset.from_dict({"input_ids": ids}),
    }
