"""No op has a second derivative, and none pretends to: create_graph=True is an error."""

from __future__ import annotations

import pytest
import torch

from rlhf_fast_kernels import (
    kl_from_logits,
    linear_kl,
    linear_logprobs,
    linear_ppo_loss,
    logprobs_from_logits,
    native,
    ppo_loss,
)

LABELS = torch.tensor([3, 0, 6, 2])
OLD, ADVANTAGES = torch.zeros(4), torch.tensor([1.0, -1.0, 0.5, 2.0])
WEIGHT = torch.linspace(-1, 1, 35).view(7, 5)
LOGITS = torch.linspace(-2, 2, 28).view(4, 7)
CALL = {"old_logprobs": OLD, "advantages": ADVANTAGES, "normalizer": 4.0}

OPS = {
    "logprobs_from_logits": lambda x: logprobs_from_logits(x @ WEIGHT.t(), LABELS)[0].sum(),
    "kl_from_logits": lambda x: kl_from_logits(x @ WEIGHT.t(), LOGITS).sum(),
    "linear_logprobs": lambda x: linear_logprobs(x, WEIGHT, LABELS)[0].sum(),
    "linear_kl": lambda x: linear_kl(x, WEIGHT, x.detach() + 1, WEIGHT).sum(),
    "linear_ppo_loss": lambda x: linear_ppo_loss(x, WEIGHT, LABELS, **CALL).loss,
    "ppo_loss": lambda x: (
        ppo_loss(logprobs=x.sum(-1), mask=torch.ones(4, dtype=torch.bool), **CALL).loss
    ),
}


@pytest.mark.skipif(native.missing() is not None, reason="the reference has second derivatives")
@pytest.mark.parametrize("op", OPS)
def test_create_graph_is_refused(op):
    x = torch.linspace(-1, 1, 20).view(4, 5).requires_grad_()
    loss = OPS[op](x)
    with pytest.raises(RuntimeError, match=f"{op}: gradients of its gradients do not exist"):
        torch.autograd.grad(loss, x, create_graph=True)
    (grad,) = torch.autograd.grad(OPS[op](x), x)
    assert bool(torch.isfinite(grad).all())
    assert float(grad.abs().max()) > 0
