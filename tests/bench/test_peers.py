"""Peers: absent ones have reasons, installed ones compute what their signature says."""

from __future__ import annotations

import ast
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor

from bench.kernels import peers, ppo_loss_peers

FOREIGN = {"trl", "verl", "liger_kernel", "cut_cross_entropy", "flash_attn"}
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Of bf16 inside a peer (verl's and Liger's chunks) and of gradients filtered at 2^-12 (CCE).
TOLERANCE = 2e-3


def the_peer(op: str, name: str) -> Callable[..., object]:
    found, absent = peers.find(op, DEVICE)
    if name in absent:
        pytest.skip(absent[name])
    return next(peer.function for peer in found if peer.name == name)


def of(op: str) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("name", peers.names(op))


def draw(*shape: int, scale: float = 1.0) -> Tensor:
    return (scale * torch.randn(*shape)).to(DEVICE)


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture
def problem() -> tuple[Tensor, Tensor, Tensor]:
    """hidden [128, 128], weight [512, 128], labels [128]: sizes that all peers' tiles divide."""
    hidden, weight = draw(128, 128), draw(512, 128, scale=0.1)
    return hidden, weight, torch.randint(0, 512, (128,)).to(DEVICE)


def logprobs_and_entropy(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    log_p = torch.log_softmax(logits.double(), -1)
    return log_p.gather(-1, labels.unsqueeze(-1)).squeeze(-1), -(log_p.exp() * log_p).sum(-1)


def close(got: Tensor, want: Tensor) -> None:
    torch.testing.assert_close(got.double(), want.double(), rtol=TOLERANCE, atol=TOLERANCE)


@of("logprobs")
def test_logprobs_of_a_peer(name: str) -> None:
    logits, labels = draw(6, 300), torch.randint(0, 300, (6,)).to(DEVICE)
    want = logprobs_and_entropy(logits, labels)
    got = the_peer("logprobs", name)(logits, labels)
    close(got[0], want[0])
    assert (got[1] is None) == ("no entropy" in name)
    if got[1] is not None:
        close(got[1], want[1])


@of("linear_logprobs")
def test_linear_logprobs_of_a_peer(name: str, problem: tuple[Tensor, Tensor, Tensor]) -> None:
    hidden, weight, labels = problem
    function = the_peer("linear_logprobs", name)
    dtype = torch.bfloat16 if DEVICE == "cuda" else torch.float32
    hidden, weight = hidden.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_()
    want = logprobs_and_entropy(hidden.double() @ weight.double().T, labels)
    got = function(hidden, weight, labels)
    tolerance = 2e-2 if DEVICE == "cuda" else TOLERANCE
    torch.testing.assert_close(got[0].double(), want[0], rtol=tolerance, atol=tolerance)
    assert (got[1] is None) == ("no entropy" in name)
    exact = torch.autograd.grad(want[0].sum(), (hidden, weight))
    for gradient, truth in zip(
        torch.autograd.grad(got[0].sum(), (hidden, weight)), exact, strict=True
    ):
        error = (gradient.double() - truth.double()).norm() / truth.double().norm()
        assert error < 10 * tolerance


@of("linear_ce")
def test_linear_cross_entropy_of_a_peer(name: str, problem: tuple[Tensor, Tensor, Tensor]) -> None:
    hidden, weight, labels = problem
    got = the_peer("linear_ce", name)(hidden, weight, labels)
    close(got, -logprobs_and_entropy(hidden.double() @ weight.double().T, labels)[0].mean())


def policy_problem(problem: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, ...]:
    """hidden [4, 32, H], weight, labels, old log-probs, mask [4, 32], advantages [4]."""
    hidden, weight, labels = problem
    logprobs = logprobs_and_entropy(hidden @ weight.T, labels)[0].float().view(4, 32)
    old = logprobs + draw(4, 32, scale=0.3)
    mask = torch.arange(32, device=DEVICE) < torch.tensor([[32], [20], [7], [1]], device=DEVICE)
    return hidden.view(4, 32, -1), weight, labels.view(4, 32), old, mask, draw(4)


def policy_loss(logprobs: Tensor, old: Tensor, advantages: Tensor, mask: Tensor) -> Tensor:
    ratio = (logprobs - old).exp()
    token = torch.maximum(-advantages * ratio, -advantages * ratio.clamp(0.8, 1.2))
    return token[mask].mean()


@of("linear_ppo_loss")
def test_policy_loss_from_hidden_states_of_a_peer(
    name: str, problem: tuple[Tensor, Tensor, Tensor]
) -> None:
    hidden, weight, labels, old, mask, advantages = policy_problem(problem)
    got = the_peer("linear_ppo_loss", name)(hidden, weight, labels, old, mask, advantages)
    logprobs = logprobs_and_entropy(hidden.double() @ weight.double().T, labels)[0]
    close(got, policy_loss(logprobs, old.double(), advantages.double()[:, None], mask))


@of("logits_ppo_loss")
def test_policy_loss_from_logits_of_a_peer(
    name: str, problem: tuple[Tensor, Tensor, Tensor]
) -> None:
    hidden, weight, labels, old, mask, advantages = policy_problem(problem)
    logits = torch.nn.functional.pad(hidden @ weight.T, (0, 0, 0, 1), value=float("nan"))
    got = the_peer("logits_ppo_loss", name)(logits, labels, old, mask, advantages)
    logprobs = logprobs_and_entropy(logits[:, :-1], labels)[0]
    close(got, policy_loss(logprobs, old.double(), advantages.double()[:, None], mask))


def test_policy_loss_of_a_per_token_peer(problem: tuple[Tensor, Tensor, Tensor]) -> None:
    def linear_logprobs(hidden: Tensor, weight: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        return logprobs_and_entropy(hidden @ weight.T, labels)

    hidden, weight, labels, old, mask, advantages = policy_problem(problem)
    old[~mask] = float("nan")
    got = peers.with_policy_loss(linear_logprobs)(hidden, weight, labels, old, mask, advantages)
    logprobs = logprobs_and_entropy(hidden.double() @ weight.double().T, labels)[0]
    close(got, policy_loss(logprobs, old.double(), advantages.double()[:, None], mask))


def whitened(x: Tensor, mask: Tensor) -> Tensor:
    return (x - x[mask].mean()) / x[mask].std()


@of("gae")
def test_gae_of_a_peer(name: str) -> None:
    rewards, values = draw(3, 9), draw(3, 9)
    mask = torch.arange(9, device=DEVICE) < torch.tensor([[9], [4], [1]], device=DEVICE)
    advantages, returns = the_peer("gae", name)(rewards, values, mask, 0.99, 0.95)
    want = torch.zeros(3, 10, dtype=torch.float64)
    following = torch.nn.functional.pad(values * mask, (0, 1)).double().cpu()
    for t in reversed(range(9)):
        delta = rewards.double().cpu()[:, t] + 0.99 * following[:, t + 1] - following[:, t]
        want[:, t] = torch.where(mask.cpu()[:, t], delta + 0.99 * 0.95 * want[:, t + 1], 0.0)
    close(returns.cpu()[mask.cpu()], (want[:, :9] + following[:, :9])[mask.cpu()])
    close(advantages.cpu()[mask.cpu()], whitened(want[:, :9], mask.cpu())[mask.cpu()])


@of("policy_loss")
def test_policy_loss_of_a_peer(name: str) -> None:
    old, advantages, mask = draw(4, 32), draw(4, 32), draw(4, 32) > 0
    logprobs = old + draw(4, 32, scale=0.3)
    got = the_peer("policy_loss", name)(logprobs, old, advantages, mask)
    close(got, policy_loss(logprobs, old, advantages, mask))


@of("value_loss")
def test_value_loss_of_a_peer(name: str) -> None:
    old, returns, mask = draw(4, 32), draw(4, 32), draw(4, 32) > 0
    values = old + draw(4, 32, scale=0.3)
    got = the_peer("value_loss", name)(values, old, returns, mask)
    near = old + (values - old).clamp(-0.2, 0.2)
    squared = torch.maximum((values - returns).square(), (near - returns).square())
    close(got, 0.5 * squared[mask].mean())


@of("whiten")
def test_whitening_of_a_peer(name: str) -> None:
    x, mask = draw(4, 32), draw(4, 32) > 0
    got = the_peer("whiten", name)(x, mask)
    close(got[mask], whitened(x, mask)[mask])


# ---- finding them --------------------------------------------------------------------------------


def test_every_peer_is_found_or_absent_with_a_reason() -> None:
    for op in peers.ops():
        found, absent = peers.find(op, DEVICE)
        assert sorted([p.name for p in found] + list(absent)) == sorted(peers.names(op))
        assert all(absent.values())
        assert all(peer.op == op for peer in found)


def test_a_package_that_is_not_installed_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "trl"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "trl", None)  # what import finds then is an ImportError
    found, absent = peers.find("logprobs", "cpu")
    assert "TRL" not in [peer.name for peer in found]
    assert "trl" in absent["TRL"]


def test_a_release_without_the_function_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    empty = ModuleType("trl.trainer.utils")
    for name in ("trl", "trl.trainer"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, "trl.trainer.utils", empty)
    absent = peers.find("logprobs", "cpu")[1]
    assert "has no selective_log_softmax, entropy_from_logits" in absent["TRL"]


def test_a_stand_in_for_a_package_is_called_with_its_own_signature(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("flash_attn", "flash_attn.ops", "flash_attn.ops.triton"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    fake = ModuleType("flash_attn.ops.triton.cross_entropy")

    def cross_entropy_loss(
        logits: Tensor, labels: Tensor, *, inplace_backward: bool = False
    ) -> tuple[Tensor, Tensor]:
        seen.append(inplace_backward)
        losses = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
        return losses, torch.zeros_like(losses)

    seen: list[bool] = []
    fake.cross_entropy_loss = cross_entropy_loss  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, fake.__name__, fake)
    found = {peer.name: peer.function for peer in peers.find("logprobs", "cuda")[0]}
    logits, labels = torch.randn(3, 11), torch.tensor([0, 10, 4])
    for name in ("flash-attn, no entropy", "flash-attn, no entropy, in place"):
        logprobs, entropy = found[name](logits, labels)
        close(logprobs, logprobs_and_entropy(logits, labels)[0])
        assert entropy is None
    assert seen == [False, True]


def test_a_peer_that_does_not_take_the_inputs_is_absent_with_its_error() -> None:
    def trial(function: Callable[..., object]) -> None:
        raise AssertionError("hidden must be a multiple of 128\nand more")

    functions, absent = peers.usable("linear_ce", DEVICE, trial)
    assert functions == {}
    assert sorted(absent) == sorted(peers.names("linear_ce"))
    if hasattr(torch.nn.functional, "linear_cross_entropy"):
        want = "AssertionError: hidden must be a multiple of 128"
        assert absent["PyTorch linear_cross_entropy"] == want


def test_what_needs_a_gpu_is_not_imported_without_one() -> None:
    absent = peers.find("linear_logprobs", "cpu")[1]
    assert absent["verl Triton"] == "runs on CUDA devices only"


def test_the_floor_of_the_ppo_loss_reads_memory_of_the_device_that_is_timed() -> None:
    # The meta device has no data, but it is another device.
    read = ppo_loss_peers.read_only(64, 2, torch.device("meta"))
    assert read(1).device.type == "meta"
    assert float(ppo_loss_peers.read_only(64, 2, torch.device("cpu"))(1)) == 16.0


def test_no_peer_is_imported_with_the_module() -> None:
    tree = ast.parse(Path(peers.__file__).read_text(encoding="utf-8"))
    imports = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
    roots = {
        alias.name.split(".")[0] if isinstance(node, ast.Import) else str(node.module).split(".")[0]
        for node in imports
        for alias in node.names
    }
    assert not roots & FOREIGN
