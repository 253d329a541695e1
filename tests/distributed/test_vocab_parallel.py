"""Ops on a head cut over ranks: equal to one process, in chunks, and with the traffic promised."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import rlhf_fast_kernels
from rlhf_fast.distributed import vocab_rows
from rlhf_fast.distributed.vocab_parallel import VocabParallel
from rlhf_fast.distributed.world import World
from tests.distributed.ranks import on_ranks
from tests.distributed.vocab_cases import REF_WIDTH, WIDTH, Case, run, wide
from tests.kernels.linear_cases import SETTINGS, leaves, relative

CASES = {
    "even": Case((0, 51, 101), (9, 4)),
    "settings": Case(
        (0, 70, 101),
        (0, 11),
        {"vocab_size": 97, "softcap": 3.0, "chunk_rows": 6},
        bias=True,
        own_temperatures=True,
        whole_reference=True,
    ),
    "one slice": Case((0, 0, 101), (6, 2), {"vocab_size": 90, "chunk_rows": 1}, bias=True),
    "bf16": Case((0, 40, 101), (9, 7), {}, torch.bfloat16, torch.bfloat16, bias=True),
    "masters": Case((0, 40, 101), (9, 7), {"chunk_rows": 4}, torch.bfloat16),
    "fp64": Case((0, 51, 101), (3, 5), {}, torch.float64, torch.float64),
    "no rows": Case((0, 51, 101), (0, 0)),
    "padding": Case((0, 10, 10, 80, 101), (5, 0, 3, 9), {"vocab_size": 78, "chunk_rows": 8}),
    "four": Case((0, 26, 52, 78, 101), (7, 7, 7, 7), {"softcap": 5.0}, torch.bfloat16, bias=True),
}


def group_of(world: World) -> Any:
    return world.shard_mesh.get_group()


def _run(world: World, names: list[str]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name in names:
        case = CASES[name]
        shards = VocabParallel(group_of(world), case.bounds)
        part = case.part(world.shard_rank)
        found[name] = run(shards, part, case.options)
        if name == "settings":
            again = run(shards, part, case.options)
            assert all(torch.equal(x, again[key]) for key, x in found[name].items())
    # A tensor would be sent as a handle on memory that is gone with the rank.
    return {
        name: {key: (x.dtype, x.double().numpy()) for key, x in outcome.items()}
        for name, outcome in found.items()
    }


@pytest.mark.parametrize(("ranks", "replicas"), [(2, 1), (4, 1), (4, 2)])
def test_ranks_agree_with_one_process(ranks: int, replicas: int) -> None:
    """Values, losses, metrics and all gradients; NaN where nothing counts changes none of them."""
    shards = ranks // replicas
    names = [name for name, case in CASES.items() if case.ranks == shards]
    names = names if replicas == 1 else names[:1]
    results = on_ranks(ranks, _run, names, replicas=replicas)
    for start in range(0, ranks, shards):
        for name in names:
            _compare(CASES[name], [found[name] for found in results[start : start + shards]])


def _compare(case: Case, parts: list[dict[str, Any]]) -> None:
    problem = case.problem()
    truth = run(rlhf_fast_kernels, wide(problem), {**case.options, "impl": "reference"})
    alone = run(rlhf_fast_kernels, problem, case.options)
    assert parts[0].keys() == truth.keys()
    for key, exact in truth.items():
        found = [torch.from_numpy(part[key][1]) for part in parts]
        if "sum_" in key:
            got = torch.stack(found).sum(0)
        elif key.endswith("max"):
            got = torch.stack(found).amax(0)
        else:
            got = torch.cat(found)
        assert parts[0][key][0] == alone[key].dtype, key
        if not sum(case.counts) and key.endswith("max"):
            assert torch.equal(got, exact), key  # -inf
            continue
        limit = 1.2 * relative(alone[key], exact) + 3e-6
        assert relative(got, exact) <= limit, (key, relative(got, exact), limit)
        if key.endswith(("d_hidden", "logprobs", "entropy", "kl")) and "sum_" not in key:
            assert bool((got[~problem["mask"]] == 0).all()), key


# ---- what is moved, and what exists -------------------------------------------------------------


class Traffic:
    """Counts collectives and the bytes that a rank receives in them."""

    def __init__(self, ranks: int) -> None:
        self.ranks = ranks
        self.reset()
        self.wrap(vocab_rows, "_gather", lambda out, own: out)
        self.wrap(vocab_rows, "_scatter", lambda out, parts: parts)
        self.wrap(dist, "all_to_all_single", lambda out, parts: out)

    def reset(self) -> tuple[int, int]:
        found = (getattr(self, "calls", 0), getattr(self, "received", 0))
        self.calls = self.received = 0
        return found

    def wrap(self, owner: Any, name: str, largest: Any) -> None:
        inner = getattr(owner, name)

        def counted(out: Tensor, own: Tensor, **more: Any) -> Any:
            self.calls += 1
            x = largest(out, own)
            self.received += x.numel() * x.element_size() * (self.ranks - 1) // self.ranks
            return inner(out, own, **more)

        setattr(owner, name, counted)


class Largest(TorchDispatchMode):
    """The most elements that any tensor had."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, Tensor):
                self.elements = max(self.elements, x.numel())
        return out


LARGE = Case((0, 51, 101), (40, 23), {"chunk_rows": 8}, torch.bfloat16)


def _measure(world: World) -> dict[str, Any]:
    case, traffic, peak, found = LARGE, Traffic(world.shards), Largest(), {}
    shards = VocabParallel(group_of(world), case.bounds)
    part = case.part(world.shard_rank)
    labels = torch.where(part["mask"], part["labels"], -100)
    per = {name: part[name] for name in ("old_logprobs", "advantages")}
    ref = {"ref_hidden": part["ref_hidden"], "ref_weight": part["ref_weight"]}
    options = {**SETTINGS, "mask": part["mask"], "normalizer": 1.0, **per, **case.options}
    frozen = {**options, "ref_logprobs": part["ref_logprobs"], "entropy_coef": 0.0}
    with peak:
        for name, entropy in (("logprobs", True), ("bare", False)):
            own = leaves(part["hidden"], part["weight"])
            out, _ = shards.linear_logprobs(*own, labels, with_entropy=entropy, **case.options)
            found[f"{name} forward"] = traffic.reset()
            out.sum().backward()
            found[f"{name} backward"] = traffic.reset()
        own = leaves(part["hidden"], part["weight"])
        exact = {**options, **ref, "kl_estimator": "exact"}
        loss = shards.linear_ppo_loss(*own, labels, **exact).loss
        found["exact"] = traffic.reset()
        loss.backward()
        found["exact backward"] = traffic.reset()
        own = leaves(part["hidden"], part["weight"])
        shards.linear_ppo_loss(own[0].detach(), own[1], labels, **frozen)
        found["frozen trunk"] = traffic.reset()
        with torch.no_grad():
            shards.linear_ppo_loss(*own, labels, **frozen)
        found["no gradient"] = traffic.reset()
        kl = shards.linear_kl(*own, *ref.values(), mask=part["mask"], **case.options)
        found["kl forward"] = traffic.reset()
        kl.sum().backward()
        found["kl backward"] = traffic.reset()
    return {**found, "elements": peak.elements}


def test_traffic_and_memory_are_as_documented() -> None:
    n, c, m = 2, 2, 30  # 3 of 4 tokens count
    k = -(-m // 4)
    h, ref = WIDTH, REF_WIDTH
    per_row = {
        "logprobs forward": (k + 3, h * c + 8 + 24),
        "logprobs backward": (2 * k + 1, h * c + h * 4 + 32),
        "bare forward": (k + 3, h * c + 8 + 16),
        "bare backward": (2 * k + 1, h * c + h * 4 + 16),
        "exact": (5 * k + 2, h * c + h * 4 + 8 + 24 + 8 * 4 + ref * c + 24 + 32),
        "exact backward": (0, 0),
        "frozen trunk": (3 * k + 2, h * c + 8 + 24 + 16),
        "no gradient": (2 * k + 2, h * c + 8 + 24),
        "kl forward": (2 * k + 3, h * c + ref * c + 8 + 24),
        "kl backward": (3 * k + 1, h * c + ref * c + h * 4 + 32),
    }
    for found in on_ranks(n, _measure):
        elements = found.pop("elements")
        assert found == {
            name: (calls, (n - 1) * (m * size + 8 * ("backward" not in name)))
            for name, (calls, size) in per_row.items()
        }
        # The slice of the weight, 8 rows of its logits; neither all rows' logits nor all rows.
        assert elements <= 51 * WIDTH < m * n * WIDTH < m * n * 51


# ---- the rest of the contract -------------------------------------------------------------------


def _contract(world: World) -> list[str]:
    case = CASES["even"]
    shards = VocabParallel.like_shard(group_of(world), 101)
    assert shards.bounds == case.bounds
    part = case.part(world.shard_rank)
    hidden, weight = leaves(part["hidden"], part["weight"])
    labels = torch.where(part["mask"], part["labels"], -100)

    whole = torch.arange(101.0, requires_grad=True)
    own = shards.local(whole)
    assert own.tolist() == list(range(101))[shards.rows]
    (own * own).sum().backward()
    assert torch.equal(world.sum(whole.grad), 2 * whole)

    clean = torch.where(part["mask"][:, None], part["hidden"], 0.0)
    logits = case.problem()["weight"] @ clean.T
    assert torch.equal(shards.likeliest(clean, part["weight"]), logits.argmax(0))
    equal = torch.zeros_like(part["weight"])
    assert shards.likeliest(clean, equal).tolist() == [0] * len(clean)

    found = []
    logprobs, _ = shards.linear_logprobs(hidden, weight, labels)
    (grad,) = torch.autograd.grad(logprobs.square().sum(), weight, create_graph=True)
    loss = shards.linear_ppo_loss(
        *(hidden, weight, labels),
        **{name: part[name] for name in ("old_logprobs", "advantages", "mask")},
        normalizer=1.0,
    ).loss
    loss.backward(retain_graph=True)
    calls = [
        lambda: grad.sum().backward(),
        loss.backward,
        lambda: shards.linear_logprobs(hidden, case.problem()["weight"], labels),
        lambda: shards.linear_logprobs(hidden, weight, labels.clamp(min=101)),
        lambda: VocabParallel(shards.group, (0, 60, 50)),
        lambda: shards.linear_kl(hidden, weight, hidden, weight, mask=part["mask"][:1]),
        lambda: shards.linear_ppo_loss(
            *(hidden, weight, labels),
            **{name: part[name] for name in ("old_logprobs", "advantages", "mask")},
            normalizer=1.0,
            kl_estimator="exact",
        ),
    ]
    for call in calls:
        try:
            call()
        except (RuntimeError, ValueError) as error:
            found.append(str(error))
    return found


def test_refusals_and_the_likeliest_token() -> None:
    for messages in on_ranks(2, _contract):
        starts = [
            *("trying to differentiate twice", "linear_ppo_loss: on a sharded head, backward"),
            *("linear_logprobs: weight must be", "linear_logprobs: label 101"),
            *("bounds must ascend", "linear_kl: mask must be bool"),
            "linear_ppo_loss: ref_hidden and ref_weight go with",
        ]
        assert [m[: len(s)] for m, s in zip(messages, starts, strict=True)] == starts
