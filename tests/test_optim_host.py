"""Optimizer state in host memory between updates."""

import copy

import pytest
import torch
from torch import nn

from rlhf_fast.config import OptimConfig
from rlhf_fast.distributed import optimizer_state
from rlhf_fast.optim import GuardedOptimizer


def pair():
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(8, 5), nn.Tanh(), nn.Linear(5, 1))
    twin = copy.deepcopy(module)
    config = OptimConfig(lr=0.01)
    return [(m, GuardedOptimizer(m, config, 20)) for m in (module, twin)]


def learn(module, optimizer, step):
    generator = torch.Generator().manual_seed(step)
    module(torch.randn(4, 8, generator=generator)).square().sum().backward()
    optimizer.step()


def test_offloading_between_steps_changes_no_bit():
    (module, optimizer), (twin, plain) = pair()
    for step in range(6):
        optimizer.offload_state()
        optimizer.offload_state()  # twice is once
        optimizer.restore_state()
        optimizer.restore_state()
        learn(module, optimizer, step)
        learn(twin, plain, step)
    assert all(
        torch.equal(a, b) for a, b in zip(module.parameters(), twin.parameters(), strict=True)
    )


def test_state_lies_in_the_same_host_memory_each_time_and_checkpoints_from_there():
    (module, optimizer), (twin, plain) = pair()
    learn(module, optimizer, 0)
    learn(twin, plain, 0)
    first = {p: s["exp_avg"].data_ptr() for p, s in optimizer.optimizer.state.items()}
    optimizer.offload_state()
    away = {p: s["exp_avg"].data_ptr() for p, s in optimizer.optimizer.state.items()}
    assert not {*first.values()} & {*away.values()}
    found, _ = optimizer_state(optimizer.optimizer, optimizer.named_parameters)
    expected, _ = optimizer_state(plain.optimizer, plain.named_parameters)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)
    optimizer.restore_state()
    optimizer.offload_state()
    assert away == {p: s["exp_avg"].data_ptr() for p, s in optimizer.optimizer.state.items()}


def test_a_step_without_its_state_is_refused_and_harmless():
    (module, optimizer), _ = pair()
    learn(module, optimizer, 0)
    optimizer.offload_state()
    before = [p.clone() for p in module.parameters()]
    with pytest.raises(RuntimeError, match="offloaded"):
        learn(module, optimizer, 1)
    assert all(torch.equal(a, b) for a, b in zip(before, module.parameters(), strict=True))
    optimizer.restore_state()
    optimizer.step()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_the_moments_leave_and_return():
    module = nn.Linear(1024, 1024, device="cuda")
    optimizer = GuardedOptimizer(module, OptimConfig(), 20)
    module(torch.ones(1, 1024, device="cuda")).sum().backward()
    optimizer.step()
    held = torch.cuda.memory_allocated()
    optimizer.offload_state()
    assert held - torch.cuda.memory_allocated() >= 8 * 1024 * 1024
    assert all(s["exp_avg"].is_pinned() for s in optimizer.optimizer.state.values())
    optimizer.restore_state()
    assert torch.cuda.memory_allocated() == held
