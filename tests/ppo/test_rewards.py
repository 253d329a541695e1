"""Score shaping: order of the rules, running statistics, abstentions, missing EOS."""

import numpy as np
import pytest
import torch

from rlhf_fast.config import RewardConfig
from rlhf_fast.ppo.rewards import RunningMoments, last_true, shape_scores

OFF = RewardConfig(normalize=False, clip=0.0, missing_eos="none")


def make(scores, ended=None, scored=None, length=3):
    scores = torch.tensor(scores)
    n = scores.shape[0]
    return {
        "scores": scores,
        "scored": torch.ones(n, dtype=torch.bool) if scored is None else torch.tensor(scored),
        "mask": torch.ones(n, length, dtype=torch.bool),
        "ended": torch.ones(n, dtype=torch.bool) if ended is None else torch.tensor(ended),
        "moments": RunningMoments(),
    }


def test_running_moments_match_numpy_over_uneven_batches():
    generator = np.random.default_rng(0)
    batches = [generator.normal(1e4, 1e-2, n) for n in (1, 7, 0, 300, 2)]
    moments = RunningMoments()
    for batch in batches:
        moments.update(torch.tensor(batch))
    everything = np.concatenate(batches)
    assert moments.count == everything.size
    assert moments.mean == pytest.approx(everything.mean(), rel=1e-12)
    assert moments.std == pytest.approx(everything.std(), rel=1e-6)


def test_constant_scores_normalise_to_zero_not_nan():
    args = make([2.5, 2.5, 2.5])
    out = shape_scores(**args, config=RewardConfig(normalize=True))
    assert out.tolist() == [0.0, 0.0, 0.0]


def test_abstained_rows_are_zero_and_out_of_the_statistics():
    args = make([1.0, float("nan"), 3.0], scored=[True, False, True])
    out = shape_scores(**args, config=RewardConfig(normalize=True, clip=0.0))
    assert out.tolist() == [-1.0, 0.0, 1.0]
    assert args["moments"].count == 2


def test_clip_precedes_the_missing_eos_penalty():
    args = make([50.0, 50.0], ended=[True, False])
    config = RewardConfig(normalize=False, clip=5.0, missing_eos="penalty", missing_eos_value=1.0)
    assert shape_scores(**args, config=config).tolist() == [5.0, 4.0]


def test_missing_eos_replacement():
    args = make([3.0, 3.0], ended=[True, False])
    config = RewardConfig(normalize=False, clip=0.0, missing_eos="replace", missing_eos_value=1.0)
    assert shape_scores(**args, config=config).tolist() == [3.0, -1.0]


@pytest.mark.parametrize(
    ("rule", "expected"), [("penalty", [[1.0, 1.0, 0.5]]), ("replace", [[0.0, 0.0, -0.5]])]
)
def test_missing_eos_of_per_token_rewards_lands_on_the_last_token(rule, expected):
    args = make([[1.0, 1.0, 1.0]], ended=[False])
    config = RewardConfig(normalize=False, clip=0.0, missing_eos=rule, missing_eos_value=0.5)
    assert shape_scores(**args, config=config).tolist() == expected


def test_per_token_rewards_ignore_masked_columns():
    args = make([[1.0, float("nan"), 1.0]])
    args["mask"][0, 1] = False
    assert shape_scores(**args, config=OFF).tolist() == [[1.0, 0.0, 1.0]]


def test_a_score_at_the_last_token_is_worth_as_much_as_one_for_the_sequence():
    scores, lengths = [4.0, 1.0, -2.0], torch.tensor([3, 1, 2])
    mask = torch.arange(3) < lengths[:, None]
    whole, spread = make(scores), make([[0.0, 0.0, 4.0], [1.0, 0.0, 0.0], [0.0, -2.0, 0.0]])
    whole["mask"] = spread["mask"] = mask
    for _ in range(2):  # the statistics of the first batch are there in the second
        expected = shape_scores(**whole, config=RewardConfig())
        found = shape_scores(**spread, config=RewardConfig())
        torch.testing.assert_close(found, torch.where(last_true(mask), expected[:, None], 0.0))


def test_normalising_per_token_rewards_pays_no_token_for_being_there():
    args = make([[1.0, 0.0, 1.0], [1.0, 0.0, 0.0]])
    args["mask"][1, 2] = False
    out = shape_scores(**args, config=RewardConfig(clip=0.0))
    assert out[:, 1].tolist() == [0.0, pytest.approx(-3.0)]  # std 0.5, mean 1.5 at the last token
    assert out.sum(1).tolist() == pytest.approx([1.0, -1.0])


def test_last_true_with_holes_and_empty_rows():
    mask = torch.tensor([[1, 0, 1, 0], [0, 0, 0, 0], [1, 1, 1, 1]], dtype=torch.bool)
    assert last_true(mask).nonzero().tolist() == [[0, 2], [2, 3]]
