"""The PPO step that both sides of `bench_step` do: models, prompts, lengths, hyper-parameters.

Four Llamas with random weights: policy, its copy as reference, critic, reward model. Every response
has a length fixed in advance, so that both sides train on equally many tokens whatever they draw.
"""

from __future__ import annotations

import copy
import json
from dataclasses import asdict, dataclass

import torch
from torch import nn
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
)

from ..engine.bench_generate import lengths_for

PAD = 0
FIRST_WORD = 4  # ids below are special tokens
KINDS = ("fixed", "long-tailed")


@dataclass(frozen=True)
class Case:
    """Sizes and settings of a step.

    Attributes:
        lengths: `fixed`: all responses have `response` tokens; `long-tailed`: exponential lengths,
            `longest` at most, a quarter of it in the mean.
        anchor: what the ratio of ours is taken to: `recompute`, our default, by a forward of the
            policy; `rollout`, the generator's own, which is what TRL does.
        side_by_side, microbatch_tokens: see `PPOConfig`.
    """

    hidden: int = 128
    inner: int = 512
    layers: int = 4
    heads: int = 4
    vocab: int = 1024
    episodes: int = 64
    prompt: int = 16
    response: int = 48
    longest: int = 192
    lengths: str = "fixed"
    epochs: int = 2
    minibatches: int = 2
    lr: float = 3e-4
    kl_coef: float = 0.05
    threads: int = 2
    anchor: str = "recompute"
    side_by_side: int = 0
    microbatch_tokens: int = 768

    @property
    def most(self) -> int:
        """Tokens of the longest response."""
        return self.response if self.lengths == "fixed" else self.longest

    def response_lengths(self) -> list[int]:
        """Tokens of every response of a step."""
        kind = "uniform" if self.lengths == "fixed" else self.lengths
        return lengths_for(kind, self.episodes, self.most)

    def prompts(self) -> list[list[int]]:
        """Ids of every prompt of a step."""
        generator = torch.Generator().manual_seed(1)
        shape = (self.episodes, self.prompt)
        ids: list[list[int]] = torch.randint(
            FIRST_WORD, self.vocab, shape, generator=generator
        ).tolist()
        return ids

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Case:
        return cls(**json.loads(text))


PRESETS = {
    "tiny": Case(
        hidden=16,
        inner=32,
        layers=1,
        heads=2,
        vocab=64,
        episodes=8,
        prompt=4,
        response=6,
        longest=12,
    ),
    "cpu": Case(),
}


@dataclass(frozen=True)
class Models:
    """The four models, fp32 on the CPU."""

    policy: LlamaForCausalLM
    reference: LlamaForCausalLM
    critic: LlamaForSequenceClassification
    reward: LlamaForSequenceClassification

    def all(self) -> tuple[nn.Module, ...]:
        return self.policy, self.reference, self.critic, self.reward


def build_models(case: Case) -> Models:
    """The same weights in every process."""
    config = LlamaConfig(
        vocab_size=case.vocab,
        hidden_size=case.hidden,
        intermediate_size=case.inner,
        num_hidden_layers=case.layers,
        num_attention_heads=case.heads,
        num_key_value_heads=case.heads,
        max_position_embeddings=case.prompt + case.longest,
        tie_word_embeddings=False,
        pad_token_id=PAD,
        bos_token_id=1,
        eos_token_id=None,  # lengths are fixed: no token ends a response
        num_labels=1,
    )
    torch.manual_seed(0)
    # A config each, as models that were loaded have: what shares one may not compute at once.
    policy, reference = (LlamaForCausalLM(copy.deepcopy(config)) for _ in range(2))
    reference.load_state_dict(policy.state_dict())
    critic, reward = (LlamaForSequenceClassification(copy.deepcopy(config)) for _ in range(2))
    return Models(policy, reference, critic, reward)


def warm_libraries() -> None:
    """A small training step, so that the libraries' code is not counted as a step's memory."""
    policy = build_models(PRESETS["tiny"]).policy
    optimizer = torch.optim.AdamW(policy.parameters(), fused=True)
    ids = torch.arange(FIRST_WORD, FIRST_WORD + 8)[None]
    policy(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    policy.generate(input_ids=ids, max_new_tokens=2, pad_token_id=PAD)
