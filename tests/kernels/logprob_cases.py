"""Inputs, the eager formulation and the fp64 truth for the tests of logprobs_from_logits."""

from __future__ import annotations

from collections.abc import Callable

import torch

from rlhf_fast_kernels import logprobs_from_logits, native, triton_support

OP = "logprobs_from_logits"
IMPLS = ["reference"]
if native.missing(f"{OP}_forward", f"{OP}_backward") is None:
    IMPLS.append("cpu")
FAST = IMPLS[-1]
if triton_support.on_triton(torch.device("cpu")) is None:
    IMPLS.append("triton")
VOCABS = (1, 7, 300, 1025, 32003)
DTYPES = (torch.float32, torch.bfloat16)


def draw(shape: tuple[int, ...], seed: int = 0, scale: float = 3.0) -> torch.Tensor:
    return scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def draw_labels(shape: tuple[int, ...], vocab: int, seed: int = 1) -> torch.Tensor:
    return torch.randint(0, vocab, shape, generator=torch.Generator().manual_seed(seed))


def eager(
    logits: torch.Tensor, labels: torch.Tensor, temperature: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """The formulation that trainers use, in fp32."""
    log_p = torch.log_softmax(logits.float() / temperature, dim=-1)
    entropy = -(log_p.exp() * log_p.clamp(min=-1e30)).sum(-1)
    return log_p.gather(-1, labels.unsqueeze(-1)).squeeze(-1), entropy


def truth(
    logits: torch.Tensor, labels: torch.Tensor, **options: object
) -> tuple[torch.Tensor, torch.Tensor]:
    logprobs, entropy = logprobs_from_logits(logits.double(), labels, impl="reference", **options)
    assert entropy is not None
    return logprobs, entropy


def gradient(
    function: Callable[..., tuple[torch.Tensor, torch.Tensor | None]],
    logits: torch.Tensor,
    g: torch.Tensor,
    h: torch.Tensor,
) -> torch.Tensor:
    leaf = logits.detach().clone().requires_grad_()
    logprobs, entropy = function(leaf)
    assert entropy is not None
    (g * logprobs + h * entropy).sum().backward()
    assert leaf.grad is not None
    return leaf.grad


def worst(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got.detach().double() - want.detach().double()).abs().max())
