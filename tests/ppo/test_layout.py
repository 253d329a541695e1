"""Padded to packed and back, against a loop that reads the definition off the page."""

import torch

from rlhf_fast.ppo.layout import build_microbatch, response_slots
from rlhf_fast.types import IGNORE_INDEX, Experience, ScoredRollout
from tests.ppo.synthetic import random_rollout


def test_slots_point_at_the_position_before_each_response_token():
    rollout = random_rollout(5, 2)
    chosen = [7, 0, 3]
    slots = response_slots(rollout, chosen)
    prompts = rollout.prompts.sequences
    bounds = prompts.cu_seqlens.tolist()
    expected_ids, expected = [], []
    for sample in chosen:
        b = sample // 2
        prompt = prompts.ids[bounds[b] : bounds[b + 1]].tolist()
        start = len(expected_ids)
        response = rollout.response_ids()[sample]
        expected_ids += prompt + response
        expected += [(sample, t, start + len(prompt) - 1 + t) for t in range(len(response))]
    assert slots.sequences.ids.tolist() == expected_ids
    found = torch.stack([slots.rows, slots.cols, slots.positions], 1).tolist()
    assert [tuple(row) for row in found] == expected
    assert slots.last.tolist() == (slots.sequences.cu_seqlens[1:] - 1).tolist()


def test_round_trip_touches_only_the_chosen_rows():
    rollout = random_rollout()
    padded = torch.randn(len(rollout), rollout.responses.shape[1])
    out = torch.full_like(padded, -7.0)
    slots = response_slots(rollout, [1, 4])
    slots.to_padded(slots.to_packed(padded), out)
    inside = torch.arange(padded.shape[1]) < rollout.lengths[:, None]
    chosen = torch.zeros(len(rollout), 1, dtype=torch.bool)
    chosen[[1, 4]] = True
    assert torch.equal(out, torch.where(inside & chosen, padded, -7.0))


def test_microbatch_targets_are_the_masked_response_tokens():
    rollout = random_rollout()
    shape = rollout.responses.shape
    zeros, ones = torch.zeros(shape), torch.ones(shape)
    scored = ScoredRollout(
        rollout,
        torch.zeros(shape[0]),
        torch.tensor([True] * (shape[0] - 1) + [False]),
        zeros,
        zeros,
        zeros,
    )
    experience = Experience(scored, zeros, zeros, zeros, zeros)
    batch = build_microbatch(
        experience, [2, shape[0] - 1], advantages=ones, weights=ones, num_loss_tokens=11
    )
    mask = rollout.response_mask[2]
    assert batch.targets[batch.loss_mask].tolist() == rollout.responses[2][mask].tolist()
    assert torch.all(batch.targets[~batch.loss_mask] == IGNORE_INDEX)
    # The abstained row is in the forward but in no loss.
    assert int(batch.loss_mask.sum()) == int(mask.sum())
    assert batch.num_loss_tokens == 11
