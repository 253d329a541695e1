"""Tensors without memory of their own: kernels must not be handed their addresses."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.two_tensor import TwoTensor

from rlhf_fast_kernels import (
    kl_from_logits,
    linear_small,
    logprobs_from_logits,
    native,
    paged_attention,
    ppo_loss,
    rms_norm,
    rope_and_store,
    silu_mul,
)

needs_core = pytest.mark.skipif(
    native.missing() is not None, reason="no compiled module on this machine"
)
ROWS = torch.randn(4, 6)


def twice(x: torch.Tensor) -> torch.Tensor:
    return TwoTensor(x, x.clone())


def attend(q: torch.Tensor) -> None:
    pages, table = torch.randn(3, 4, 2, 8), torch.ones(2, 1, dtype=torch.int32)
    paged_attention(q, pages, pages, table, torch.ones(2, dtype=torch.int32))


def store(q: torch.Tensor) -> None:
    x, pages = torch.randn(2, 2, 8), torch.zeros(3, 4, 2, 8)
    rope_and_store(q, x, x, pages, pages.clone(), torch.arange(2))


@needs_core
@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("rms_norm: x", lambda: rms_norm(twice(ROWS), torch.ones(6), 1e-6)),
        ("rms_norm: weight", lambda: rms_norm(ROWS, twice(torch.ones(6)), 1e-6)),
        ("silu_mul: gate_up", lambda: silu_mul(twice(ROWS))),
        ("linear_small: weight", lambda: linear_small(ROWS, twice(torch.randn(3, 6)))),
        ("paged_attention: q", lambda: attend(twice(torch.randn(2, 2, 8)))),
        ("rope_and_store: q", lambda: store(twice(torch.randn(2, 2, 8)))),
    ],
)
def test_ops_for_inference_refuse_them(name, call):
    with pytest.raises(TypeError, match=f"{name} is a TwoTensor, which has no memory"):
        call()


@needs_core
def test_a_subclass_with_memory_is_read():
    class Named(torch.Tensor):
        pass

    got = rms_norm(ROWS.as_subclass(Named), torch.ones(6), 1e-6)
    torch.testing.assert_close(got.as_subclass(torch.Tensor), rms_norm(ROWS, torch.ones(6), 1e-6))
    labels = torch.tensor([0, 5, 2, 3])
    got, _ = logprobs_from_logits(ROWS.as_subclass(Named), labels)
    assert torch.equal(got.as_subclass(torch.Tensor), logprobs_from_logits(ROWS, labels)[0])


def test_logprobs_of_a_dtensor_name_the_local_shard():
    class DTensor(torch.Tensor):
        pass

    with pytest.raises(TypeError, match="logits is a DTensor; pass its local shard"):
        logprobs_from_logits(ROWS.as_subclass(DTensor), torch.zeros(4, dtype=torch.int64))


def of_logprobs(logits: torch.Tensor) -> torch.Tensor:
    logprobs, entropy = logprobs_from_logits(logits, torch.zeros(4, dtype=torch.int64))
    assert entropy is not None
    return logprobs.sum() + entropy.sum()


def of_kl(logits: torch.Tensor) -> torch.Tensor:
    return kl_from_logits(logits, torch.zeros(4, 6), temperature=torch.ones(4)).sum()


def of_loss(logprobs: torch.Tensor) -> torch.Tensor:
    mask, other = torch.ones(4, 6, dtype=torch.bool), torch.zeros(4, 6)
    call = {"old_logprobs": other, "advantages": other, "mask": mask, "normalizer": 24}
    return ppo_loss(logprobs=logprobs, **call).loss


@needs_core
@pytest.mark.parametrize("objective", [of_logprobs, of_kl, of_loss])
def test_fake_tensors_get_shapes_and_gradients(objective):
    with FakeTensorMode():
        x = torch.randn(4, 6, requires_grad=True)
        loss = objective(x)
        loss.backward()
    assert loss.shape == ()
    assert loss.dtype == torch.float32
    assert x.grad is not None
    assert x.grad.shape == (4, 6)
