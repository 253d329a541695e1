"""The closed forms of the exact task against brute force."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_fast.errors import DataError, NumericalError
from rlhf_fast.tasks import exact


def random_policy(seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (2 * torch.randn(exact.COUNT, generator=generator, dtype=torch.float64)).log_softmax(0)


def test_sequences_are_all_triples_in_order() -> None:
    triples = [list(t) for t in itertools.product(range(6), repeat=3)]
    assert exact.sequences().tolist() == triples
    assert exact.sequence_index(exact.sequences()).tolist() == list(range(216))


def test_score_looks_up_the_reward_of_each_response() -> None:
    task = exact.ExactTask.from_seed(1)
    responses = torch.tensor([[5, 0, 3], [0, 0, 0]])
    expected = [task.rewards[5 * 36 + 3], task.rewards[0]]
    torch.testing.assert_close(task.score(responses), torch.stack(expected).float())


@pytest.mark.parametrize("bad", [torch.zeros(2, 4), torch.full((1, 3), 6), -torch.ones(1, 3)])
def test_foreign_responses_are_refused(bad: torch.Tensor) -> None:
    with pytest.raises(DataError, match="RF2911"):
        exact.sequence_index(bad)


def test_kl_and_reward_equal_plain_sums() -> None:
    task, p, q = exact.ExactTask.from_seed(0), random_policy(1), random_policy(2)
    reward = sum(math.exp(a) * r for a, r in zip(p.tolist(), task.rewards.tolist(), strict=True))
    kl = sum(math.exp(a) * (a - b) for a, b in zip(p.tolist(), q.tolist(), strict=True))
    assert task.expected_reward(p) == pytest.approx(reward, abs=1e-12)
    assert exact.kl_divergence(p, q) == pytest.approx(kl, abs=1e-12)
    assert task.objective(p, q, 0.3) == pytest.approx(reward - 0.3 * kl, abs=1e-12)


def test_kl_counts_impossible_responses_as_zero() -> None:
    p = torch.full((exact.COUNT,), -math.inf, dtype=torch.float64)
    p[7] = 0.0
    assert exact.kl_divergence(p, random_policy(0)) == pytest.approx(-float(random_policy(0)[7]))


@given(seed=st.integers(0, 10_000), beta=st.floats(0.05, 5.0))
@settings(max_examples=40, deadline=None)
def test_no_policy_beats_the_closed_form(seed: int, beta: float) -> None:
    task, ref, other = exact.ExactTask.from_seed(seed), random_policy(seed + 1), random_policy(seed)
    best = task.optimal_logprobs(ref, beta)
    optimum = task.optimal_objective(ref, beta)
    assert task.objective(best, ref, beta) == pytest.approx(optimum, rel=1e-9, abs=1e-9)
    # J* - J(pi) = beta KL(pi || pi*), so only pi* reaches J*.
    gap = beta * exact.kl_divergence(other, best)
    assert optimum - task.objective(other, ref, beta) == pytest.approx(gap, rel=1e-7, abs=1e-9)


def test_gradient_ascent_finds_the_closed_form() -> None:
    task, ref = exact.ExactTask.from_seed(3), random_policy(4)
    logits = torch.zeros(exact.COUNT, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([logits], max_iter=500, line_search_fn="strong_wolfe")

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        p = logits.log_softmax(0)
        value = -(p.exp() * (task.rewards - 0.5 * (p - ref))).sum()
        value.backward()
        return value

    optimizer.step(loss)
    summary = task.summary(logits.detach().log_softmax(0), ref, 0.5)
    assert summary.gain == pytest.approx(1.0, abs=1e-4)
    assert summary.objective <= summary.optimal_objective


def test_summary_is_zero_gain_at_the_reference() -> None:
    task, ref = exact.ExactTask.from_seed(5), random_policy(5)
    summary = task.summary(ref, ref, 1.0)
    assert summary.gain == pytest.approx(0.0, abs=1e-12)
    assert summary.kl == pytest.approx(0.0, abs=1e-12)
    assert task.summary(task.optimal_logprobs(ref, 1.0), ref, 1.0).gain == pytest.approx(1.0)


@pytest.mark.parametrize("ties", [False, True])
def test_best_of_two_equals_enumeration_of_pairs(ties: bool) -> None:
    rewards = exact.ExactTask.from_seed(6).rewards
    task = exact.ExactTask(rewards.round() if ties else rewards)
    p = random_policy(7).exp()
    pairs = p[:, None] * p[None, :]
    r = task.rewards
    # The first of two equals wins; by symmetry that shares a tie in proportion to p.
    first = r[:, None] >= r[None, :]
    chosen = (pairs * first).sum(1) + (pairs * ~first).sum(0)
    result = task.best_of_n(p.log(), 2)
    torch.testing.assert_close(result.exp(), chosen, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("n", [1, 4, 64, 10_000])
def test_best_of_n_is_a_policy_within_its_kl_bound(n: int) -> None:
    task, ref = exact.ExactTask.from_seed(8), random_policy(8)
    best = task.best_of_n(ref, n)
    assert float(best.logsumexp(0)) == pytest.approx(0.0, abs=1e-9)
    assert exact.kl_divergence(best, ref) <= math.log(n) - (n - 1) / n + 1e-9
    assert task.expected_reward(best) >= task.expected_reward(ref) - 1e-12


def test_best_of_64_agrees_with_sampling() -> None:
    task, ref = exact.ExactTask.from_seed(9), random_policy(9)
    generator = torch.Generator().manual_seed(0)
    draws = torch.multinomial(ref.exp(), 4000 * 64, replacement=True, generator=generator)
    sampled = task.rewards[draws].view(4000, 64).max(1).values
    error = float(sampled.std()) / math.sqrt(4000)
    assert task.expected_reward(task.best_of_n(ref, 64)) == pytest.approx(
        float(sampled.mean()), abs=4 * error
    )


def test_policy_logprobs_equal_one_token_at_a_time() -> None:
    model = exact.build_policy(0).eval()
    logprobs = exact.policy_logprobs(model)
    assert float(logprobs.exp().sum()) == pytest.approx(1.0, abs=1e-9)
    for index in (0, 17, 100, 215):
        ids, total = [exact.BOS], 0.0
        for token in exact.sequences()[index].tolist():
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([ids])).logits[0, -1]
            total += float(logits.double().log_softmax(0)[token])
            ids.append(token)
        assert float(logprobs[index]) == pytest.approx(total, abs=1e-5)


def test_policies_differ_from_uniform_and_between_seeds() -> None:
    uniform = torch.full((exact.COUNT,), -math.log(exact.COUNT), dtype=torch.float64)
    policies = [exact.policy_logprobs(exact.build_policy(seed)) for seed in (0, 0, 1)]
    assert torch.equal(policies[0], policies[1])
    assert not torch.allclose(policies[0], policies[2], atol=0.1)
    assert exact.kl_divergence(policies[0], uniform) > 0.1


def test_building_a_policy_keeps_the_global_random_state() -> None:
    torch.manual_seed(11)
    before = torch.get_rng_state()
    exact.build_policy(3)
    assert torch.equal(before, torch.get_rng_state())


def test_bad_policies_are_refused() -> None:
    task, ref = exact.ExactTask.from_seed(0), random_policy(0)
    with pytest.raises(NumericalError, match="RF6912"):
        task.expected_reward(ref + 0.1)
    with pytest.raises(NumericalError, match="RF6912"):
        task.expected_reward(torch.full((exact.COUNT,), math.nan))
    with pytest.raises(DataError, match="RF2913"):
        task.expected_reward(ref[:-1])
    with pytest.raises(DataError, match="RF2914"):
        task.optimal_logprobs(ref, 0.0)
    with pytest.raises(DataError, match="RF2912"):
        task.best_of_n(ref, 0)
    broken = exact.build_policy(0)
    torch.nn.init.constant_(broken.lm_head.weight, math.nan)
    with pytest.raises(NumericalError, match="RF6911"):
        exact.policy_logprobs(broken)
