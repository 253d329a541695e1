"""Your own loop, with the kernels alone: sampling, log-probs, advantages and the PPO loss.

Needs torch and `rlhf_fast_kernels`. `python examples/kernels_only.py` runs it on a CPU with a tiny
model.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from rlhf_fast_kernels import logprobs_from_logits, ppo_loss, rewards_and_gae, sample, whiten

PROMPT, RESPONSE, VOCAB = 4, 8, 50


def ppo_step(model: nn.Module, ids: Tensor, mask: Tensor, scores: Tensor) -> None:
    """ids [S, P + R], mask [S, R] true through the end token, scores [S]; leaves gradients."""
    labels = ids[:, PROMPT:]
    logits = model(ids).logits[:, PROMPT - 1 : -1]  # [S, R, V]
    logprobs, entropy = logprobs_from_logits(logits, labels, inplace_backward=True)  # [S, R] both
    old, values = logprobs.detach(), torch.zeros_like(logprobs)  # here: no critic, one epoch
    estimate = rewards_and_gae(old, old, values, scores, mask, kl_coef=0.05, gamma=1, gae_lambda=1)
    advantages = whiten(estimate.advantages, mask)  # [S, R]
    terms = {"logprobs": logprobs, "old_logprobs": old, "advantages": advantages}
    output = ppo_loss(mask=mask, normalizer=mask.sum(), entropy=entropy, **terms)
    output.loss.backward()


@torch.no_grad()
def respond(model: nn.Module, prompts: Tensor, step: int) -> Tensor:
    """[S, P + R] from prompts [S, P], one token after another."""
    ids, seeds = prompts, torch.arange(len(prompts)) + step * len(prompts)
    for position in range(RESPONSE):
        drawn = sample(model(ids).logits[:, -1], seeds=seeds, step=position, with_entropy=False)
        ids = torch.cat([ids, drawn.tokens[:, None]], dim=1)
    return ids


def main() -> None:
    """Towards even tokens."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=VOCAB, num_attention_heads=2, **sizes))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    mask = torch.ones(64, RESPONSE, dtype=torch.bool)
    for step in range(10):
        ids = respond(model, torch.randint(VOCAB, (64, PROMPT)), step)
        scores = (ids[:, PROMPT:] % 2 == 0).float().mean(1)
        ppo_step(model, ids, mask, scores)
        optimizer.step()
        optimizer.zero_grad()
        print(f"step {step}: score {scores.mean():.3f}")


if __name__ == "__main__":
    main()
