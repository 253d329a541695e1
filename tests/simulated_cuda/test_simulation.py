"""The simulated device refuses what a device refuses, and computes what the host computes."""

from __future__ import annotations

import pytest
import torch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def test_numbers_and_gradients_are_the_hosts() -> None:
    torch.manual_seed(0)
    layer, x = torch.nn.Linear(4, 3), torch.randn(2, 4)
    layer(x).square().sum().backward()
    want = layer.weight.grad.clone()
    layer.zero_grad()
    layer.cuda()
    layer(x.cuda()).square().sum().backward()
    assert layer.weight.grad.device == torch.device("cuda", 0)
    torch.testing.assert_close(layer.weight.grad.cpu(), want)


def test_tensors_of_two_devices_do_not_meet() -> None:
    x = torch.zeros(3, device="cuda")
    with pytest.raises(RuntimeError, match="same device"):
        x + torch.zeros(3)
    assert (x + torch.tensor(1.0)).is_cuda  # a number may come from the host
    assert x[torch.tensor([0, 1])].is_cuda  # and so may an index
    with pytest.raises(RuntimeError, match="generator"):
        torch.rand(2, device="cuda", generator=torch.Generator())
    with pytest.raises(TypeError, match="numpy"):
        x.numpy()


def test_views_results_and_sizes_share_memory_as_they_should() -> None:
    x = torch.arange(6.0, device="cuda").view(2, 3)
    x.t()[0].fill_(7)
    assert x[:, 0].tolist() == [7, 7]
    out = torch.empty(0, device="cuda")
    torch.cat([x, x], out=out)
    assert out.shape == (4, 3)
    x.untyped_storage().resize_(0)
    assert x.untyped_storage().nbytes() == 0


def test_a_capture_runs_nothing_before_its_replay() -> None:
    counter = torch.zeros(2, device="cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        doubled = counter * 2
        counter.add_(1)
    assert counter.tolist() == [0, 0]
    for _ in range(3):
        graph.replay()
    torch.cuda.synchronize()
    assert (counter.tolist(), doubled.tolist()) == ([3, 3], [4, 4])
    with pytest.raises(RuntimeError, match="capturing"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        counter.sum().item()


def test_waits_are_found() -> None:
    x, pinned = torch.zeros(3, device="cuda"), torch.zeros(3).pin_memory()
    torch.cuda.set_sync_debug_mode("error")
    try:
        x.copy_(pinned, non_blocking=True)
        for wait in (x.sum().item, x.nonzero, x.cpu, lambda: x[x > 0]):
            with pytest.raises(RuntimeError, match="synchronizing"):
                wait()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_memory_is_counted() -> None:
    before = torch.cuda.memory_allocated()
    x = torch.zeros(1000, device="cuda")
    assert torch.cuda.memory_allocated() - before == 4096
    del x
    assert torch.cuda.memory_allocated() == before
    assert torch.zeros(4).pin_memory()[1:].is_pinned()
    assert not torch.zeros(4).is_pinned()
    with pytest.raises(torch.OutOfMemoryError):
        torch.empty(1 << 50, dtype=torch.uint8, device="cuda")
