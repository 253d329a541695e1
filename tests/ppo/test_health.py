"""Each hint where its rule says, and none where all is well."""

import pytest

from rlhf_fast.config import PPOConfig, SamplingConfig
from rlhf_fast.ppo.health import hints

CONFIG = PPOConfig(sampling=SamplingConfig(max_new_tokens=100))
HEALTHY = {
    "rollout/scored_fraction": 1.0,
    "rollout/ended_fraction": 0.9,
    "rollout/length": 50.0,
    "objective/scores_std": 1.0,
    "objective/kl": 3.0,
    "policy/clipfrac_avg": 0.1,
    "policy/entropy_avg": 1.0,
    "val/explained_variance": 0.3,
}


def names(config: PPOConfig = CONFIG, **changes: float) -> list[str]:
    metrics = HEALTHY | {name.replace("__", "/"): value for name, value in changes.items()}
    return [hint.name for hint in hints(metrics, config)]


def test_a_healthy_step_has_no_hint() -> None:
    assert names() == []


@pytest.mark.parametrize(
    ("name", "value", "hint"),
    [
        ("rollout__ended_fraction", 0.0, "no-eos"),
        ("rollout__length", 99.0, "length-pinned"),
        ("objective__scores_std", 0.0, "constant-scores"),
        ("objective__kl", -2.0, "negative-kl"),
        ("policy__clipfrac_avg", 0.6, "clip-fraction"),
        ("policy__entropy_avg", 0.0, "entropy-collapse"),
        ("val__explained_variance", -2.0, "value-function"),
    ],
)
def test_what_is_odd_has_a_hint(name: str, value: float, hint: str) -> None:
    assert names(**{name: value}) == [hint]


def test_means_over_nothing_are_not_judged() -> None:
    nothing = {"objective__scores_std": 0.0, "policy__entropy_avg": 0.0}
    assert names(rollout__scored_fraction=0.0, **nothing) == ["nothing-scored"]


@pytest.mark.parametrize("change", [{"top_p": 0.9}, {"top_k": 5}, {"min_p": 0.1}])
def test_filters_of_sampling_have_a_hint(change: dict[str, float]) -> None:
    config = PPOConfig(sampling=SamplingConfig(max_new_tokens=100, **change))
    assert names(config) == ["warped-sampling"]
