"""Ziegler's controller against its closed form."""

import math

import pytest

from rlhf_fast.config import KLConfig
from rlhf_fast.ppo.kl_control import KLController


def test_fixed_coefficient_never_moves():
    controller = KLController(KLConfig(coef=0.05))
    controller.update(100.0, 512)
    assert controller.coef == 0.05


@pytest.mark.parametrize(
    ("kl", "error"),
    [
        (6.0, 0.0),
        (6.6, 0.1),
        (60.0, 0.2),
        (0.0, -0.2),
        (-3.0, -0.2),
        (math.inf, 0.2),
        (math.nan, 0),
    ],
)
def test_adaptive_coefficient_follows_the_clipped_error(kl, error):
    controller = KLController(KLConfig(coef=0.2, adaptive=True, target=6.0, horizon=10000))
    controller.update(kl, 256)
    assert controller.coef == pytest.approx(0.2 * (1 + error * 256 / 10000), rel=1e-12)


def test_state_comes_back():
    config = KLConfig(coef=0.2, adaptive=True)
    first, second = KLController(config), KLController(config)
    first.update(20.0, 512)
    second.load_state_dict(first.state_dict())
    assert second.coef == first.coef != config.coef
