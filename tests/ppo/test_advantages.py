"""Critic-free baselines against their definitions, abstentions and degenerate groups included."""

import pytest
import torch

from rlhf_fast.ppo.advantages import grpo, rloo, whitened

EVERY = torch.ones(6, dtype=torch.bool)
TOTALS = torch.tensor([1.0, 2.0, 6.0, 5.0, 5.0, 5.0])


def test_rloo_subtracts_the_mean_of_the_others():
    out = rloo(TOTALS, EVERY, 3)
    assert out.tolist() == pytest.approx([1 - 4.0, 2 - 3.5, 6 - 1.5, 0, 0, 0])


def test_grpo_standardises_within_the_group_and_zeroes_a_constant_group():
    out = grpo(TOTALS, EVERY, 3)
    first = TOTALS[:3]
    expected = ((first - first.mean()) / first.std()).tolist()
    assert out.tolist() == pytest.approx([*expected, 0, 0, 0])


@pytest.mark.parametrize("estimator", [rloo, grpo])
@pytest.mark.parametrize("group", [2, 3, 7, 8, 16])
def test_a_group_of_equal_rewards_has_advantage_exactly_zero(estimator, group):
    totals = torch.tensor([0.7, -1.3, 1e-3, 3.1e4, 20000.3, 140000.1]).repeat_interleave(group)
    assert torch.all(estimator(totals, torch.ones(len(totals), dtype=torch.bool), group) == 0)


@pytest.mark.parametrize("estimator", [rloo, grpo])
def test_abstained_rows_take_no_part(estimator):
    totals = torch.tensor([1.0, float("nan"), 3.0, float("nan"), 4.0, float("nan")])
    valid = torch.tensor([True, False, True, False, True, False])
    out = estimator(totals, valid, 3)
    alone = estimator(torch.tensor([1.0, 3.0]), torch.ones(2, dtype=torch.bool), 2)
    assert out[[0, 2]].tolist() == pytest.approx(alone.tolist())
    # The second group has a single scored row: no baseline, so no signal.
    assert out[[1, 3, 4, 5]].tolist() == [0.0] * 4


def test_whitening_leaves_masked_slots_at_zero_and_ignores_them():
    torch.manual_seed(0)
    x = torch.randn(4, 9)
    mask = torch.rand(4, 9) > 0.4
    dirty = torch.where(mask, x, float("nan"))
    for unbiased in (False, True):
        out = whitened(dirty, mask, unbiased=unbiased)
        assert torch.all(out[~mask] == 0)
        assert float(out[mask].mean()) == pytest.approx(0, abs=1e-6)
        assert float(out[mask].var(unbiased=unbiased)) == pytest.approx(1, abs=1e-5)
