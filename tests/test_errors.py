"""Errors as values: they cross processes as they are."""

from __future__ import annotations

import pickle

import pytest

from rlhf_fast.errors import DivergedGeneration, EnvironmentFault, PeerError, RLHFError


@pytest.mark.parametrize(
    "error",
    [
        EnvironmentFault("RF7331", "what", where="where", expected="this", remedy="that"),
        DivergedGeneration("RF4010", "what"),
        PeerError(4),
    ],
)
def test_an_error_says_the_same_in_another_process(error: RLHFError) -> None:
    found = pickle.loads(pickle.dumps(error))
    assert type(found) is type(error)
    assert str(found) == str(error)
    assert vars(found) == vars(error)
    assert found.exit_code == error.exit_code
