"""The fused forward under bf16: the trainer's numbers, one copy of fp32 masters, none of others."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from rlhf_fast.engine import settings as settings_module
from rlhf_fast.engine.fused_forward import FusedForward
from rlhf_fast.engine.hybrid import HybridEngine
from rlhf_fast.engine.settings import EngineSettings
from rlhf_fast.models.forward import set_compute_dtype
from rlhf_fast.models.roles import Actor
from rlhf_fast.types import PackedSequences, Rollout, SamplingParams
from tests.engine.test_generator import FUSED, batch_of, build, ragged, run, seeds_for

SAMPLING = SamplingParams(12, temperature=0.9)


def bf16(name: str, *, masters: bool = True) -> Any:
    module = build(name)
    if not masters:
        module.bfloat16()
    set_compute_dtype(module, "bfloat16")
    return module


def gap_to_exact(module: Any, rollout: Rollout, prompts: list[list[int]], group: int) -> float:
    """Mean |rollout log-prob - that of the same weights in fp64|."""
    exact = copy.deepcopy(module).double()
    set_compute_dtype(exact, "float32")
    rows = [[*prompts[s // group], *ids] for s, ids in enumerate(rollout.response_ids())]
    sequences = PackedSequences.from_lists(rows)
    targets = sequences.ids.roll(-1)
    with torch.no_grad():
        logprobs, _ = Actor(exact.eval()).logprobs(
            sequences, targets, temperature=SAMPLING.temperature
        )
    gaps, start = [], 0
    for s, row in enumerate(rows):
        n = int(rollout.lengths[s])
        mine = logprobs[start + len(row) - n - 1 : start + len(row) - 1]
        gaps.append((mine - rollout.rollout_logprobs[s, :n]).abs())
        start += len(row)
    return float(torch.cat(gaps).mean())


@pytest.mark.parametrize("masters", [True, False])
@pytest.mark.parametrize("name", FUSED)
def test_no_further_from_the_exact_numbers_than_the_modules(name: str, masters: bool) -> None:
    module, prompts = bf16(name, masters=masters), ragged(8)
    gaps = {
        path: gap_to_exact(module, run(module, prompts, SAMPLING, group=3, path=path), prompts, 3)
        for path in ("fused", "modules")
    }
    assert gaps["fused"] <= 1.25 * gaps["modules"] + 2e-3
    assert gaps["modules"] > 1e-4  # bf16 was really used


def engine_of(module: Any, **options: Any) -> tuple[HybridEngine, FusedForward]:
    settings = EngineSettings(path="fused", page_size=4, keep_memory=options.pop("keep", False))
    engine = HybridEngine(module, eos_ids=[], settings=settings, **options)
    forward = engine._runner.forward  # type: ignore[union-attr]
    assert isinstance(forward, FusedForward)
    return engine, forward


def generate(engine: HybridEngine) -> torch.Tensor:
    rollout = engine.generate(
        batch_of(ragged(3)), SamplingParams(5), samples_per_prompt=1, seeds=seeds_for(3)
    )
    return rollout.rollout_logprobs


@pytest.mark.parametrize("keep", [False, True])
def test_fp32_masters_are_copied_once_in_two_bytes_a_parameter(keep: bool) -> None:
    module = bf16("qwen2-tied")
    engine, forward = engine_of(module, keep=keep)
    assert engine.weights is not None
    assert forward.compute.nbytes == 0
    held = []
    engine.on_progress = lambda _: held.append(forward.compute.nbytes)
    generate(engine)
    assert set(held) == {engine.weights.nbytes // 2}
    assert forward.compute.nbytes == (held[0] if keep else 0)


def test_keys_and_values_leave_room_for_the_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    engine, forward = engine_of(bf16("llama"), keep=True)
    monkeypatch.setattr(settings_module, "available_host_memory", lambda: 4_000_000)
    size = forward.compute.coming
    assert engine.weights is not None
    assert size == engine.weights.nbytes // 2
    assert engine._cache_bytes() == (4_000_000 - size) // 4
    before = generate(engine)
    assert forward.compute.coming == 0
    assert engine._cache_bytes() == 1_000_000
    monkeypatch.setattr(settings_module, "available_host_memory", lambda: 0)
    assert torch.equal(generate(engine), before)  # in the pages that were kept


def test_bf16_parameters_are_read_where_they_lie() -> None:
    module = bf16("llama", masters=False)
    engine, forward = engine_of(module)
    generate(engine)
    assert forward.compute.nbytes == 0
    assert (
        forward.layers[0].down.data_ptr() == module.model.layers[0].mlp.down_proj.weight.data_ptr()
    )
    assert (
        forward.layers[0].qkv.data_ptr()
        == module.model.layers[0].self_attn.q_proj.weight.data_ptr()
    )


@pytest.mark.parametrize("change", ["version", "in place", "neither"])
def test_a_kept_copy_follows_versions_and_writes(
    change: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, version = bf16("llama"), [0]
    engine, forward = engine_of(module, keep=True, weight_version=lambda: version[0])
    before = generate(engine)
    weight = module.model.layers[1].mlp.down_proj.weight
    if change == "version":  # as an optimizer that writes through pointers
        weight.data.mul_(3.0)
        version[0] += 1
    elif change == "in place":
        with torch.no_grad():
            weight.mul_(3.0)
    copies = []
    monkeypatch.setattr(forward.compute._copy, "copy_", lambda source: copies.append(source))
    if change == "neither":
        assert torch.equal(generate(engine), before)
        assert not copies
        return
    generate(engine)
    assert len(copies) == 1
    monkeypatch.undo()
    forward.compute.free()
    assert not torch.equal(generate(engine), before)


def test_without_a_version_every_rollout_copies() -> None:
    module = bf16("llama")
    engine, _ = engine_of(module, keep=True)
    before = generate(engine)
    module.model.norm.weight.data.mul_(2.0)
    module.model.layers[1].mlp.down_proj.weight.data.mul_(3.0)
    assert not torch.equal(generate(engine), before)


def test_norms_of_another_type_than_the_embedding_run_through_the_modules() -> None:
    module = bf16("llama", masters=False)
    module.model.norm.float()
    engine = HybridEngine(module, eos_ids=[])
    assert engine.path == "modules"
    assert "model.norm.weight is kept in another type" in engine.reason


def test_weights_kept_in_bf16_run_fused_without_being_told() -> None:
    told, untold = bf16("llama", masters=False), build("llama").bfloat16()
    untold.load_state_dict(told.state_dict())
    engine = HybridEngine(untold, eos_ids=())
    assert (engine.path, untold.dtype) == ("fused", torch.bfloat16)
    ours, theirs = (run(m, ragged(4), SAMPLING, group=2) for m in (untold, told))
    assert torch.equal(ours.responses, theirs.responses)
