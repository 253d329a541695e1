"""Stepping each parameter inside backward: the same bits, few gradients at once, guarded."""

import copy
import gc
import math
import weakref

import pytest
import torch
from torch import nn

from rlhf_fast.config import OptimConfig
from rlhf_fast.errors import NumericalError
from rlhf_fast.models.forward import enable_gradient_checkpointing
from rlhf_fast.models.roles import Actor
from rlhf_fast.optim import GuardedOptimizer
from tests.models.tiny import build, next_token_targets, random_sequences

CONFIG = OptimConfig(lr=1e-2, max_grad_norm=0.0, weight_decay=0.1)
SEQUENCES = random_sequences([9, 4, 7])
TARGETS = next_token_targets(SEQUENCES)


def pair(bits=32, device="cpu", **overrides):
    model = build("llama", hidden_size=64, num_hidden_layers=3, **overrides).to(device)
    twin = copy.deepcopy(model)
    return [
        (m, GuardedOptimizer(m, CONFIG, 20, bits=bits, in_backward=inside))
        for m, inside in ((model, True), (twin, False))
    ]


@pytest.mark.parametrize("bits", [32, 8])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_it_is_the_ordinary_step_to_the_bit(bits, tied, checkpointing):
    results = []
    both = pair(bits, tie_word_embeddings=tied)
    for model, optimizer in both:
        if checkpointing:
            enable_gradient_checkpointing(model)
        for _ in range(3):
            loss, _ = Actor(model).logprobs(SEQUENCES, TARGETS)
            (-loss.mean()).backward()
            results.append(optimizer.step())
    (model, ours), (twin, plain) = both
    assert all(
        torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters(), strict=True)
    )
    assert ours.lr == plain.lr
    for a, b in zip(results[:3], results[3:], strict=True):
        assert a.applied
        assert b.applied
        assert a.grad_norm == pytest.approx(b.grad_norm)


@pytest.mark.parametrize("bits", [32, 8])
def test_weights_and_moments_go_with_their_owner(bits):
    (model, optimizer), _ = pair(bits)
    loss, _ = Actor(model).logprobs(SEQUENCES, TARGETS)
    loss.mean().backward()
    optimizer.step()
    slots = optimizer.optimizer.state.values()
    moments = [weakref.ref(value) for state in slots for value in state.values()]
    held = [weakref.ref(parameter) for parameter in model.parameters()] + moments
    assert moments
    del model, optimizer, slots, loss
    gc.collect()
    assert not [reference for reference in held if reference() is not None]


def test_gradients_of_a_layer_or_so_exist_at_once():
    (model, optimizer), _ = pair()
    held = []

    def measure(_):
        held.append(sum(p.grad.nbytes for p in model.parameters() if p.grad is not None))

    # Registered after the step's own hook: sees what each one left.
    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(measure)
    Actor(model).logprobs(SEQUENCES, TARGETS)[0].mean().backward()
    assert len(held) == len(list(model.parameters()))
    assert max(held) == 0
    optimizer.step()


class Chain(nn.Module):
    """Three weights in a row; the gradient of the second of them can be spoiled."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.third = (nn.Parameter(torch.full((2,), 0.5)) for _ in "abc")
        self.spoil = False

    def forward(self):
        first, second = self.first * 1.0, self.second * 1.0  # backward: the other way round
        if self.spoil:
            second.register_hook(lambda g: g * float("nan"))
        return (first * second * self.third).sum()


def test_a_gradient_that_is_not_finite_stops_the_tensors_after_it():
    model = Chain()
    optimizer = GuardedOptimizer(model, CONFIG, 20, in_backward=True, max_bad_steps=2)
    model.spoil = True
    model().backward()
    result = optimizer.step()
    assert not result.applied
    assert math.isnan(result.grad_norm)
    assert model.second.tolist() == [0.5, 0.5]
    assert model.first.tolist() == [0.5, 0.5]  # its gradient was sound and came later
    assert model.third.tolist() != [0.5, 0.5]  # its gradient came first and was sound
    model().backward()
    with pytest.raises(NumericalError, match="weights had been stepped in 1 tensors"):
        optimizer.step()
    model.spoil = False
    optimizer.bad_steps = 0
    model().backward()
    assert optimizer.step().applied
    assert model.first.tolist() != [0.5, 0.5]


def test_a_loss_that_is_not_finite_touches_nothing():
    (model, optimizer), _ = pair()
    before = [p.detach().clone() for p in model.parameters()]
    (Actor(model).logprobs(SEQUENCES, TARGETS)[0].mean() * float("nan")).backward()
    assert not optimizer.step().applied
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert not optimizer.optimizer.state


def test_a_second_backward_and_clipping_are_refused():
    model = Chain()
    optimizer = GuardedOptimizer(model, CONFIG, 20, in_backward=True)
    model().backward()
    with pytest.raises(RuntimeError, match="second backward"):
        model().backward()
    optimizer.zero_grad()
    model().backward()
    assert optimizer.step().applied
    with pytest.raises(ValueError, match="max_grad_norm=0"):
        GuardedOptimizer(Chain(), OptimConfig(), 20, in_backward=True)


def test_a_backward_while_the_state_is_away_is_refused():
    model = Chain()
    optimizer = GuardedOptimizer(model, CONFIG, 20, in_backward=True)
    optimizer.offload_state()
    with pytest.raises(RuntimeError, match="offloaded"):
        model().backward()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("bits", [32, 8])
def test_on_a_gpu_it_is_the_ordinary_step_to_the_bit(bits):
    both = pair(bits, device="cuda")
    for model, optimizer in both:
        for _ in range(3):
            Actor(model).logprobs(SEQUENCES, TARGETS)[0].mean().backward()
            assert optimizer.step().applied
    for a, b in zip(both[0][0].parameters(), both[1][0].parameters(), strict=True):
        assert torch.equal(a, b)
