"""DeepSpeed-Chat's methods, from their definitions row by row in fp64: it is no package on PyPI."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from rlhf_fast.integrations.deepspeed_chat import FastPPOMixin, gather_log_probs
from tests.integrations.peers import EXAMPLES, Batch, batches


class Trainer(FastPPOMixin):
    kl_ctl = 0.1
    clip_reward_value = 1.5
    cliprange = 0.2
    cliprange_value = 0.2
    gamma = 0.99
    lam = 0.95


TRAINER = Trainer()


def close(found: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=tolerance)


@EXAMPLES
@given(batch=batches())
def test_gather_log_probs(batch: Batch) -> None:
    logits, labels = batch.floats(11, scale=3.0), batch.labels(11)
    found = gather_log_probs(logits, labels)
    assert found.dtype == logits.dtype
    for row, label, value in zip(
        logits.flatten(0, 1), labels.flatten(), found.flatten(), strict=True
    ):
        numbers = [float(x) for x in row]
        expected = numbers[int(label)] - math.log(sum(math.exp(x) for x in numbers))
        assert float(value) == pytest.approx(
            expected, abs=1e-5 if batch.dtype.itemsize == 4 else 0.1
        )


@EXAMPLES
@given(batch=batches(), prompt=st.integers(1, 3), answer=st.lists(st.integers(0, 9), min_size=4))
def test_rewards_have_the_score_one_past_the_counted_tokens(
    batch: Batch, prompt: int, answer: list[int]
) -> None:
    """pad == eos: the end token is masked, and the score is on it."""
    log_probs, ref, score = batch.floats(), batch.floats(), batch.per_row()
    rows, columns = batch.shape
    start = min(prompt, columns) - 1
    mask = torch.zeros(rows, columns, dtype=torch.long)
    mask[:, :start] = 1
    for row in range(rows):
        mask[row, start : start + answer[row]] = 1
    found = TRAINER.compute_rewards(torch.zeros(rows, start + 1), log_probs, ref, score, mask)
    expected = -0.1 * (log_probs.double() - ref.double())
    for row in range(rows):
        counted = int(mask[row, start:].sum())
        expected[row, min(start + counted, columns - 1)] += min(max(float(score[row]), -1.5), 1.5)
    close(found, expected, batch.dtype)


def test_the_log_probs_are_left_unchanged() -> None:
    log_probs = torch.randn(2, 4)
    before = log_probs.clone()
    mask = torch.ones(2, 4, dtype=torch.long)
    TRAINER.compute_rewards(torch.zeros(2, 2), log_probs, log_probs, torch.ones(2), mask)
    assert torch.equal(log_probs, before)


@EXAMPLES
@given(batch=batches(), prompt=st.integers(1, 3))
def test_advantages_by_their_sum(batch: Batch, prompt: int) -> None:
    """A_t = sum over k of (gamma lambda)^k delta_{t+k}, from the first column of the answer on."""
    values, rewards = batch.floats(), batch.floats()
    start = min(prompt, batch.shape[1]) - 1
    advantages, returns = TRAINER.get_advantages_and_returns(values, rewards, start)
    v, r = values.double()[:, start:], rewards.double()[:, start:]
    following = torch.cat([v[:, 1:], torch.zeros(len(v), 1, dtype=torch.float64)], dim=1)
    deltas = r + 0.99 * following - v
    steps = range(v.shape[1])
    expected = torch.stack(
        [sum((0.99 * 0.95) ** (k - t) * deltas[:, k] for k in steps if k >= t) for t in steps],
        dim=1,
    )
    assert advantages.dtype == values.dtype
    scale = 1.0 if batch.dtype == torch.float32 else 4.0
    close(advantages / scale, expected / scale, batch.dtype)
    close(returns / scale, (expected + v) / scale, batch.dtype)


@EXAMPLES
@given(batch=batches(), as_mask=st.sampled_from((torch.long, torch.bool, torch.float32)))
def test_actor_loss_and_its_gradient(batch: Batch, as_mask: torch.dtype) -> None:
    old, advantages = batch.floats(), batch.floats()
    new = (old + batch.floats(scale=0.4)).requires_grad_()
    loss = TRAINER.actor_loss_fn(new, old, advantages, batch.mask.to(as_mask))
    loss.backward()
    exact = new.detach().double().requires_grad_()
    terms = []
    for row, column in batch.mask.nonzero().tolist():
        ratio = (exact[row, column] - old[row, column].double()).exp()
        a = advantages[row, column].double()
        terms.append(torch.maximum(-a * ratio, -a * ratio.clamp(0.8, 1.2)))
    expected = torch.stack(terms).mean()
    expected.backward()
    assert exact.grad is not None
    assert new.grad is not None
    close(loss.detach(), expected.detach(), torch.float32)
    close(new.grad, exact.grad, batch.dtype)


@EXAMPLES
@given(batch=batches(), as_mask=st.sampled_from((torch.long, torch.bool, torch.float32)))
def test_critic_loss_and_its_gradient(batch: Batch, as_mask: torch.dtype) -> None:
    old, returns = batch.floats(), batch.floats()
    new = batch.floats().requires_grad_()
    loss = TRAINER.critic_loss_fn(new, old, returns, batch.mask.to(as_mask))
    loss.backward()
    exact = new.detach().double().requires_grad_()
    terms = []
    for row, column in batch.mask.nonzero().tolist():
        v, v_old = exact[row, column], old[row, column].double()
        target = returns[row, column].double()
        near = torch.minimum(torch.maximum(v, v_old - 0.2), v_old + 0.2)
        terms.append(torch.maximum((v - target) ** 2, (near - target) ** 2) / 2)
    expected = torch.stack(terms).mean()
    expected.backward()
    assert exact.grad is not None
    assert new.grad is not None
    close(loss.detach(), expected.detach(), torch.float32)
    close(new.grad, exact.grad, batch.dtype)


def test_losses_ignore_what_masked_slots_hold_and_are_0_without_a_token() -> None:
    batch = Batch(1, 3, 7, "holes", torch.float32)
    tensors = [batch.floats() for _ in range(3)]
    poisoned = [x.masked_fill(~batch.mask, torch.nan) for x in tensors]
    nothing = torch.zeros_like(batch.mask)
    for loss in (TRAINER.actor_loss_fn, TRAINER.critic_loss_fn):
        assert torch.equal(loss(*tensors, batch.mask), loss(*poisoned, batch.mask))
        assert float(loss(*tensors, nothing)) == 0.0
