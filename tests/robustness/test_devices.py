"""Prompts and rollouts may lie on another device than the models."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from rlhf_fast.ppo.layout import response_slots
from rlhf_fast.types import PackedSequences, PromptBatch, Rollout, SamplingParams
from tests.robustness.workshop import Workshop


def rollout() -> Rollout:
    prompts = PromptBatch(
        PackedSequences.from_lists([[4, 5], [6]]), (0, 1), ({}, {}), ("w4 w5", "w6")
    )
    lengths = torch.tensor([2, 1])
    mask = torch.arange(2) < lengths[:, None]
    return Rollout(
        prompts=prompts,
        samples_per_prompt=1,
        responses=torch.tensor([[7, 8], [9, 0]]),
        response_mask=mask,
        lengths=lengths,
        ended=torch.tensor([True, False]),
        rollout_logprobs=torch.zeros(2, 2),
        sampling=SamplingParams(2),
        weight_version=3,
    )


def tensors(of: Rollout) -> list[Tensor]:
    packed = of.prompts.sequences
    return [
        *(packed.ids, packed.positions, packed.cu_seqlens),
        *(of.responses, of.response_mask, of.lengths, of.ended, of.rollout_logprobs),
    ]


def test_a_rollout_moves_as_a_whole() -> None:
    # The meta device has no data, but it is another device.
    moved = rollout().to(torch.device("meta"))
    assert {tensor.device.type for tensor in tensors(moved)} == {"meta"}
    assert moved.prompts.texts == ("w4 w5", "w6")
    assert moved.weight_version == 3


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_slots_take_values_from_another_device() -> None:
    slots = response_slots(rollout(), [1, 0])
    out = torch.zeros(2, 2)
    slots.to_padded(torch.arange(10.0, 16.0, device="cuda"), out)
    # Packed: 6 9 | 4 5 7 8; a response token is read one position before its own.
    assert out.tolist() == [[13.0, 14.0], [10.0, 0.0]]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("stage", ["sft", "rm", "ppo", "eval"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_stage_runs_on_a_gpu(stage: str, dtype: str, workshop: Workshop) -> None:
    changes = [f"ptx.data={workshop.path}/demonstrations.jsonl", "ptx.coef=1", "ptx.batch_size=4"]
    changes += ["algorithm.bootstrap_truncated=true", "algorithm.max_logprob_gap=5"]
    more = changes if stage == "ppo" else []
    outcome = workshop.run(stage, "run.device=cuda", f"run.dtype={dtype}", *more)
    assert outcome.code == 0, outcome.err
