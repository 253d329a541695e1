"""The task of `bench_learning`: reviews, judged by a rule, by a policy that can write them already.

Prompts, tokenizer, model and rule are `rlhf_fast.tasks`'. Every side starts from one supervised
policy, made once a run with plain PyTorch, and its reward is the rule itself, so that no reward
model stands between a trainer and the curve.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from rlhf_fast.tasks.gold import gold_reward
from rlhf_fast.tasks.reviews import corpus, prompt_split
from rlhf_fast.tasks.tiny import build_model, build_tokenizer

ALGORITHMS = ("ppo", "rloo", "grpo")
IGNORED = -100  # no target


@dataclass(frozen=True)
class LearningCase:
    """Sizes and settings; every algorithm and side has the same.

    Attributes:
        model: directory of the supervised policy.
        group: responses a prompt, of RLOO and GRPO; PPO draws as many episodes, one a prompt.
    """

    algorithm: str = "ppo"
    seed: int = 1
    model: str = ""
    sft_steps: int = 150
    steps: int = 40
    episodes: int = 64
    group: int = 4
    response: int = 44
    epochs: int = 2
    minibatches: int = 2
    lr: float = 3e-4
    kl_coef: float = 0.05
    threads: int = 2

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> LearningCase:
        return cls(**json.loads(text))


PRESETS = {
    "tiny": LearningCase(sft_steps=3, steps=2, episodes=8, group=2, response=8),
    "cpu": LearningCase(),
}


def supervised_policy(case: LearningCase, folder: Path) -> str:
    """Train the policy that everybody starts from; returns its directory."""
    tokenizer = build_tokenizer()
    model = build_model(tokenizer, seed=0)
    rows = corpus(prompt_split()[0], 64 * case.sft_steps, seed=0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.0)
    for step in range(case.sft_steps):
        optimizer.param_groups[0]["lr"] = 3e-3 * (1 - step / case.sft_steps)
        texts = [
            r["prompt"] + r["completion"] + tokenizer.eos_token
            for r in rows[64 * step : 64 * (step + 1)]
        ]
        batch = tokenizer(texts, return_tensors="pt", padding=True)
        targets = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, IGNORED)
        loss = model(
            input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], labels=targets
        ).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def load(case: LearningCase) -> tuple[Any, Any]:
    """A policy of its own and its tokenizer."""
    return AutoModelForCausalLM.from_pretrained(case.model), AutoTokenizer.from_pretrained(
        case.model
    )


@dataclass
class Curve:
    """The rule as a reward function; remembers when it was asked and what it said.

    Attributes:
        points: (seconds since `start`, response tokens so far, mean reward) of every rollout batch.
    """

    tokenizer: Any
    points: list[tuple[float, int, float]] = field(default_factory=list)
    _start: float = 0.0
    _tokens: int = 0

    def start(self) -> None:
        """Training begins."""
        self._start = time.perf_counter()

    def __call__(
        self,
        prompts: Sequence[str],
        completions: Sequence[str],
        completion_ids: Sequence[Sequence[int]],
        **_columns: Any,
    ) -> list[float]:
        """Rewards as both sides' trainers ask for them."""
        texts = self.tokenizer.batch_decode(completion_ids, skip_special_tokens=True)
        rewards = gold_reward(prompts, texts)
        self._tokens += sum(map(len, completion_ids))
        seconds = time.perf_counter() - self._start
        self.points.append((seconds, self._tokens, sum(rewards) / len(rewards)))
        return rewards

    def found(self) -> dict[str, Any]:
        """What a child answers."""
        return {"points": self.points, "seconds": time.perf_counter() - self._start}
