"""The simulated device refuses what a device refuses, and computes what the host computes."""

from __future__ import annotations

import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import reduce_tensor
from torch.nn.attention.varlen import varlen_attn

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
        torch.cuda.set_sync_debug_mode("warn")
        with pytest.warns(UserWarning, match="synchronizing"):
            x.sum().item()
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


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two devices")
def test_results_and_their_bytes_are_on_the_device_of_the_operands() -> None:
    x, before = torch.ones(1000, device="cuda:1"), torch.cuda.memory_allocated(0)
    y = x * 2
    assert y.device == torch.device("cuda", 1)
    x.untyped_storage().resize_(1 << 16)
    assert torch.cuda.memory_allocated(0) == before
    assert torch.cuda.current_device() == 0
    with pytest.raises(RuntimeError, match="same device"):
        x + torch.ones(1000, device="cuda:0")


@pytest.mark.parametrize("window", [(-1, 0), (2, 0)])
def test_varlen_attention_has_the_gradients_of_its_formula(window: tuple[int, int]) -> None:
    generator = torch.Generator("cuda").manual_seed(0)
    bounds = torch.tensor([0, 5, 6, 13], dtype=torch.int32, device="cuda")
    shapes = (13, 4, 8), (13, 2, 8), (13, 2, 8)
    leaves = [torch.randn(s, device="cuda", generator=generator).bfloat16() for s in shapes]
    results = []
    for reference in (False, True):
        q, k, v = (x.double() if reference else x.clone() for x in leaves)
        for x in (q, k, v):
            x.requires_grad_()
        if reference:
            out = torch.cat([attended(q[a:b], k[a:b], v[a:b], window[0]) for a, b in BOUNDS])
        else:
            out = varlen_attn(q, k, v, bounds, bounds, 7, 7, window_size=window, enable_gqa=True)
        out.square().sum().backward()
        results.append([out, q.grad, k.grad, v.grad])
    for found, want in zip(*results, strict=True):
        torch.testing.assert_close(found.double(), want, rtol=0.03, atol=0.1)


BOUNDS = ((0, 5), (5, 6), (6, 13))


def attended(q: Tensor, k: Tensor, v: Tensor, left: int) -> Tensor:
    k, v = (x.repeat_interleave(2, 1) for x in (k, v))
    distance = torch.arange(len(q), device="cuda")[:, None] - torch.arange(len(k), device="cuda")
    unseen = (distance < 0) | ((distance > left) & (left >= 0))
    scores = torch.einsum("qhd,khd->hqk", q, k) * q.shape[-1] ** -0.5
    return torch.einsum("hqk,khd->qhd", scores.masked_fill(unseen, -torch.inf).softmax(-1), v)


ANOTHER_PROCESS = """
import pickle, sys
if sys.argv[1] == "simulated":
    from tests.simulated_cuda.loading import load
    load()
import torch
rebuild, arguments = pickle.loads(sys.stdin.buffer.read())
mapped = rebuild(*arguments)
mapped += torch.arange(mapped.numel(), device=mapped.device)
print(mapped.device, torch.cuda.memory_allocated())
"""


def test_another_process_writes_what_it_has_mapped() -> None:
    x = torch.full((3000,), 7, device="cuda")
    before = torch.cuda.memory_allocated()
    handle = pickle.dumps(reduce_tensor(x[1000:]))
    device = "simulated" if "simulated_cuda" in sys.modules else "real"
    command = [sys.executable, "-c", ANOTHER_PROCESS, device]
    root = Path(__file__).parents[2]
    run = subprocess.run(command, input=handle, capture_output=True, cwd=root, check=False)
    assert run.returncode == 0, run.stderr.decode()
    where, held = run.stdout.decode().split()
    assert where == "cuda:0"
    assert int(held) < 8 * 3000 + 8 * 3000  # what it has mapped is not its own
    torch.testing.assert_close(x[1000:], 7 + torch.arange(2000, device="cuda"))
    assert (x[:1000] == 7).all()
    assert torch.cuda.memory_allocated() == before


def test_a_handle_is_of_one_memory_alone() -> None:
    """As a server's whose weights were given up and allocated again."""
    handles = []
    for _ in range(3):
        x = torch.ones(100, device="cuda")
        handles.append(reduce_tensor(x)[1])
        x.untyped_storage().resize_(0)
    names = {next(part for part in handle if isinstance(part, bytes)) for handle in handles}
    assert len(names) == 3
