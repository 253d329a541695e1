"""The linear ops on two ranks, a shard of the vocabulary on each, against one process with all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file

from rlhf_fast.distributed.world import World
from rlhf_fast_kernels import linear_kl, linear_logprobs, linear_ppo_loss
from rlhf_fast_kernels.linear_chunks import Call
from rlhf_fast_kernels.linear_head import Head
from tests.distributed.ranks import on_ranks
from tests.kernels.linear_cases import FAST, SETTINGS, close, draw, head, leaves, per_token

TOKENS, WIDTH, VOCAB, REAL = 9, 16, 64, 59
MASK = torch.arange(TOKENS) % 4 != 1
# Rows of the head on each rank, and how the call says so.
SPLITS: dict[str, tuple[tuple[int, int, int], bool]] = {
    "equal": ((0, 32, 64), False),
    "unequal": ((0, 50, 64), True),
}


def inputs() -> dict[str, torch.Tensor]:
    hidden, weight, labels = head(TOKENS, WIDTH, VOCAB)
    ref_hidden, ref_weight, _ = head(TOKENS, 10, VOCAB, seed=30)
    return {
        "hidden": hidden,
        "weight": weight,
        "bias": draw(VOCAB, seed=5),
        "labels": labels % REAL,
        "ref_hidden": ref_hidden,
        "ref_weight": ref_weight,
        "upstream": draw(3, TOKENS, seed=9),
    }


def run(case: dict[str, torch.Tensor], cut: slice, options: dict[str, Any]) -> dict[str, Any]:
    """Outputs and gradients of the three ops with rows `cut` of the heads."""
    found: dict[str, torch.Tensor] = {}
    weight, bias = case["weight"][cut], case["bias"][cut]
    ref = (case["ref_hidden"], case["ref_weight"][cut])
    g, h, k = case["upstream"]
    labels = torch.where(MASK, case["labels"], -100)
    shared = {"temperature": 0.7, "vocab_size": REAL, "chunk_rows": 4, **options}

    def keep(op: str, own: list[Any], **outputs: torch.Tensor) -> None:
        for name, x in zip(("hidden", "weight", "bias"), own, strict=True):
            outputs[f"d_{name}"] = x.grad
        found.update({f"{op}.{name}": x.detach().clone() for name, x in outputs.items()})

    own = leaves(case["hidden"], weight, bias)
    logprobs, entropy = linear_logprobs(own[0], own[1], labels, bias=own[2], **shared)
    (g * logprobs + h * entropy).sum().backward()
    keep("logprobs", own, logprobs=logprobs, entropy=entropy)

    own = leaves(case["hidden"], weight, bias)
    kl = linear_kl(own[0], own[1], *ref, bias=own[2], mask=MASK, **shared)
    (k * kl).sum().backward()
    keep("kl", own, kl=kl)

    tensors = {n: x for n, x in per_token(TOKENS, REAL).items() if n != "ref_logprobs"}
    settings = {**SETTINGS, "kl_estimator": "exact"}
    own = leaves(case["hidden"], weight, bias)
    out = linear_ppo_loss(
        own[0], own[1], labels, bias=own[2], ref_hidden=ref[0], ref_weight=ref[1],
        normalizer=float(MASK.sum()), **tensors, **settings, **shared,
    )  # fmt: skip
    out.loss.backward()
    keep("ppo", own, loss=out.loss, kl=out.metrics["kl"], logprobs=out.logprobs)
    return found


def worker(world: World, folder: str) -> None:
    rank = world.rank
    for name, (edges, explicit) in SPLITS.items():
        options: dict[str, Any] = {"group": dist.group.WORLD, "impl": FAST}
        if explicit:
            options["vocab_start"] = edges[rank]
        found = run(inputs(), slice(edges[rank], edges[rank + 1]), options)
        save_file(found, f"{folder}/{name}{rank}.safetensors")


def test_two_ranks_with_a_shard_each_agree_with_one(tmp_path: Path) -> None:
    on_ranks(2, worker, str(tmp_path))
    want = run(inputs(), slice(None), {"impl": "reference"})
    for name in SPLITS:
        ranks = [load_file(tmp_path / f"{name}{rank}.safetensors") for rank in range(2)]
        for key, exact in want.items():
            sharded = key.endswith(("d_weight", "d_bias"))
            parts = [rank[key] for rank in ranks]
            if not sharded:
                assert torch.equal(parts[0], parts[1]), (name, key)
            close(torch.cat(parts) if sharded else parts[0], exact, 1e-5)


def test_ranks_cut_the_same_chunks_whatever_their_shards(monkeypatch) -> None:
    """400 tokens are one chunk beside 40,000 rows and two beside 50,000: collectives would hang."""
    monkeypatch.setattr(dist, "get_world_size", lambda group: 2)
    monkeypatch.setattr(dist, "get_rank", lambda group: 0)
    call = Call("cpu", torch.float32, 1.0, None, 90_000, None, True, group="group", vocab_start=0)
    heads = [Head(torch.empty(rows, 1), None, torch.float32) for rows in (40_000, 50_000)]
    cuts = [call.bounds(400, one, torch.device("cpu")) for one in heads]
    assert cuts[0] == cuts[1]


def test_a_shard_that_begins_elsewhere_says_how_large_the_vocabulary_is(tmp_path: Path) -> None:
    hidden, weight, labels = head(4, 8, 10)
    with pytest.raises(ValueError, match="vocab_start is for shards: it needs group"):
        linear_logprobs(hidden, weight, labels, vocab_start=5)
