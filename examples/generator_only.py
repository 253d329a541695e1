"""Your own loop, with the generator alone: samples from the very weights that you train.

`python examples/generator_only.py` runs it on a CPU with a tiny model.
"""

from __future__ import annotations

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from rlhf_fast.engine.hybrid import HybridEngine
from rlhf_fast.engine.requests import Completions, Request
from rlhf_fast.engine.settings import EngineSettings
from rlhf_fast.types import SamplingParams

PROMPT, END, VOCAB = (5, 6, 7), 2, 50


def draw(engine: HybridEngine, samples: int, step: int) -> Completions:
    """[S, R] tokens with lengths [S] and log-probs [S, R]; a sample is a function of its seed."""
    seeds = tuple(step * samples + i for i in range(samples))
    return engine.complete([Request(PROMPT, SamplingParams(8, temperature=1.0), seeds)])


def main() -> None:
    """REINFORCE towards even tokens, with a loss of plain PyTorch."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=VOCAB, num_attention_heads=2, **sizes))
    engine = HybridEngine(model, eos_ids=[END], settings=EngineSettings(max_batch=64))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    engine.guard(optimizer)  # a step while weights are read would raise
    for step in range(10):
        done = draw(engine, 64, step)
        mask = torch.arange(done.tokens.shape[1]) < done.lengths[:, None]
        scores = ((done.tokens % 2 == 0) & mask).sum(1) / done.lengths
        ids = torch.cat([torch.tensor(PROMPT).expand(64, -1), done.tokens.where(mask, 0)], dim=1)
        logprobs = model(ids).logits[:, len(PROMPT) - 1 : -1].log_softmax(-1)
        chosen = logprobs.gather(-1, ids[:, len(PROMPT) :, None]).squeeze(-1).where(mask, 0)
        loss = -((scores - scores.mean()) * chosen.sum(1)).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        print(f"step {step}: score {scores.mean():.3f}")


if __name__ == "__main__":
    main()
