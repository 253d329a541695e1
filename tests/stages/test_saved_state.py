"""A checkpoint whose bytes are sound and whose values are not: refused by name, never trained."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import json
import random
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from rlhf_fast.distributed import Checkpoint, load, load_rng_state, rng_state
from rlhf_fast.distributed.manifest import seal
from rlhf_fast.engine.expected_lengths import ExpectedLengths
from rlhf_fast.errors import CheckpointError, DataError
from rlhf_fast.ppo.out_of_memory import TokenBudget
from rlhf_fast.ppo.trainer import PPOLearner
from rlhf_fast.stages.found_to_fit import remembering
from rlhf_fast.stages.run import Run
from rlhf_fast.stages.saved_state import load_part
from rlhf_fast.stages.supervised import SupervisedStage
from rlhf_fast.stages.training import TrainingState, load_training_state, save_training_state
from tests.ppo.synthetic import learner as learner_of
from tests.ppo.synthetic import small_config
from tests.stages.test_training import advance, build_state

Path_ = tuple[Any, ...]
ODD_VALUES = ["x", None, [], {}, [[]], {"a": []}, -5, True, 1.5, float("nan"), 10**30]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run directory with one checkpoint, of step 3."""
    path = tmp_path_factory.mktemp("saved")
    with Run(path, stage="sft", config={}, quiet=True) as run:
        state = build_state(path, seed=1)
        advance(state, 3)
        save_training_state(run, state)
    state.metrics.close()
    return path


@pytest.fixture(scope="module")
def checkpoint(folder: Path) -> Checkpoint:
    return load(folder / "checkpoints")


@pytest.fixture(autouse=True)
def generators() -> Iterator[None]:
    before = rng_state()
    yield
    load_rng_state(*before)


def resumed(checkpoint: Checkpoint, folder: Path) -> TrainingState:
    state = build_state(folder, seed=2)
    with state.metrics:
        load_training_state(checkpoint, state)
        return state


def changed(tree: Any, place: Path_, value: Any) -> Any:
    """A copy with another value in a place; `...` removes what is there."""
    if not place:
        return value
    key, *rest = place
    items = list(tree) if isinstance(tree, tuple) else copy.copy(tree)
    if value is ... and not rest:
        del items[key]
    else:
        items[key] = changed(tree[key], tuple(rest), value)
    return tuple(items) if isinstance(tree, tuple) else items


def places(tree: Any, here: Path_ = ()) -> Iterator[Path_]:
    yield here
    items: Any = ()
    if isinstance(tree, dict):
        items = tree.items()
    elif isinstance(tree, list | tuple):
        items = enumerate(tree)
    for key, value in items:
        yield from places(value, (*here, key))


OPTIMIZER = ("optimizers", "m", "optimizer")
MALFORMED: list[tuple[Path_, Any, str]] = [
    ((), [], "state is a list, not a dictionary"),
    (("samplers",), ..., "state lacks samplers"),
    (("samplers", "train"), ..., "samplers lacks train"),
    (("samplers", "train"), [], r"samplers\.train is a list"),
    (("step",), "x", r"state\.step is 'x'"),
    (("step",), -5, r"state\.step is -5"),
    (("step",), True, r"state\.step is True"),
    (("step",), 3.0, r"state\.step is 3\.0"),
    (("step",), 2, "step is 2, the checkpoint is of step 3"),
    (("metrics_position",), "x", "metrics_position is 'x'"),
    (("metrics_position",), -1, "metrics_position is -1"),
    (("metrics_position",), 10**30, "metrics_position is 1000"),
    (("aliases",), ..., "state lacks aliases"),
    (("aliases", "m"), {"a": 1}, r"aliases\.m does not map names to texts"),
    (("frozen",), {"a": 1}, r"state\.frozen"),
    (("extra",), [], r"state\.extra is a list"),
    (("optimizers", "m"), ..., "optimizers lacks m"),
    (("optimizers", "m", "bad_steps"), -1, r"optimizers\.m\.bad_steps is -1"),
    (("optimizers", "m", "scheduler", "last_epoch"), "x", r"scheduler\.last_epoch is 'x'"),
    (("optimizers", "m", "scheduler", "last_epoch"), -3, r"scheduler\.last_epoch is -3"),
    (("optimizers", "m", "scheduler", "base_lrs"), [0.1] * 7, "optimizer of the m"),
    ((*OPTIMIZER, "groups", 0, "options", "eps"), "x", r"groups\[0\]\.options\.eps is 'x'"),
    ((*OPTIMIZER, "groups", 0, "options", "betas"), (0.9,), r"betas has 1 values, not 2"),
    ((*OPTIMIZER, "groups", 0, "options", "betas"), (0.9, float("inf")), r"betas\[1\] is inf"),
    ((*OPTIMIZER, "groups", 0, "params"), 3, r"groups\[0\]\.params is 3"),
    ((*OPTIMIZER, "parameters", "0.bias", "tensors"), ["step"], "0.bias has no exp_avg"),
    ((*OPTIMIZER, "parameters", "0.bias"), [], r"parameters\.0\.bias is a list"),
    (("rng",), 7, r"state\.rng is 7"),
    (("rng", "python"), ..., "random generators lacks 'python'"),
    (("rng", "python", "gauss"), "x", r"rng\.python\.gauss is 'x'"),
    (("rng", "numpy", "state", "pos"), 10**6, r"pos is 1000000"),
    (("rng", "numpy", "bit_generator"), "x", "random generators cannot be used"),
]


@pytest.mark.parametrize(("place", "value", "named"), MALFORMED, ids=str)
def test_what_is_malformed_is_named(
    checkpoint: Checkpoint, tmp_path: Path, place: Path_, value: Any, named: str
) -> None:
    bad = dataclasses.replace(checkpoint, state=changed(checkpoint.state, place, value))
    with pytest.raises(CheckpointError, match=named) as caught:
        resumed(bad, tmp_path)
    assert caught.value.code == "RF8001"
    assert caught.value.where == str(checkpoint.path / "state.json")


def test_a_sound_state_is_taken(checkpoint: Checkpoint, tmp_path: Path) -> None:
    assert resumed(checkpoint, tmp_path).step == 3
    without = changed(checkpoint.state, ("frozen",), ...)  # as releases before there was any wrote
    assert resumed(dataclasses.replace(checkpoint, state=without), tmp_path).step == 3


def test_every_value_is_refused_with_a_code_or_trains(
    checkpoint: Checkpoint, tmp_path: Path
) -> None:
    found: dict[bool, int] = {True: 0, False: 0}
    for place in list(places(checkpoint.state)):
        for value in (..., *ODD_VALUES):
            if not place and value is ...:
                continue
            state = changed(checkpoint.state, place, value)
            live = build_state(tmp_path, seed=2)
            with live.metrics:
                try:
                    load_training_state(dataclasses.replace(checkpoint, state=state), live)
                except (CheckpointError, DataError):
                    found[False] += 1
                    continue
                assert live.step == 3, (place, value)
                assert type(live.step) is int
                try:
                    advance(live, 2)
                    live.optimizers["m"].state_tensors()
                    random.gauss(0.0, 1.0)
                    np.random.standard_normal()  # noqa: NPY002
                except Exception as error:
                    raise AssertionError(f"{place} = {value!r} was trained with") from error
                found[True] += 1
    assert found[False] > 5 * found[True] > 0


@pytest.mark.parametrize("group", ["m", "m_optimizer", "rng"])
def test_groups_of_tensors_that_are_not_there(
    checkpoint: Checkpoint, tmp_path: Path, group: str
) -> None:
    tensors = {name: t for name, t in checkpoint.tensors.items() if name != group}
    with pytest.raises(CheckpointError, match=f"RF8001.*no tensors of {group}"):
        resumed(dataclasses.replace(checkpoint, tensors=tensors), tmp_path)


@pytest.mark.parametrize(
    ("name", "tensor", "named"),
    [
        ("m_optimizer/0.bias/step", torch.ones(3), "step has shape"),
        ("m_optimizer/0.bias/exp_avg", torch.ones(()), "exp_avg has shape"),
        ("m_optimizer/0.bias/exp_avg_sq", torch.ones(5), "exp_avg_sq has shape"),
        ("rng/torch", torch.ones(3), "random generators"),
        ("rng/python", torch.ones(3), "random generators"),
        ("rng/numpy/state/key", torch.ones(3), "random generators"),
    ],
)
def test_tensors_of_another_shape(
    checkpoint: Checkpoint, tmp_path: Path, name: str, tensor: torch.Tensor, named: str
) -> None:
    group, _, key = name.partition("/")
    tensors = dict(checkpoint.tensors)
    inside = tensors[group]
    tensors[group] = type(inside).of({**{n: inside[n] for n in inside}, key: tensor})
    with pytest.raises(CheckpointError, match=f"RF8001.*{named}"):
        resumed(dataclasses.replace(checkpoint, tensors=tensors), tmp_path)


def test_a_file_with_new_checksums_is_refused_in_a_run(folder: Path, tmp_path: Path) -> None:
    """As an attacker would leave it: every digest is right."""
    path = load(folder / "checkpoints").path
    manifest, state = path / "manifest.json", path / "state.json"
    good = manifest.read_bytes(), state.read_bytes()
    try:
        data = json.dumps({**json.loads(good[1]), "step": -5}).encode()
        body = json.loads(good[0])
        body["files"]["state.json"].update(size=len(data), sha256=hashlib.sha256(data).hexdigest())
        state.write_bytes(data)
        manifest.write_bytes(seal(body))
        with pytest.raises(CheckpointError, match=r"RF8001.*step is -5"):
            resumed(load(folder / "checkpoints"), tmp_path)
    finally:
        manifest.write_bytes(good[0])
        state.write_bytes(good[1])


# ---- the learner of PPO -------------------------------------------------------------------------


def a_learner() -> PPOLearner:
    learner = learner_of(small_config())
    lengths = ExpectedLengths()
    lengths.observe([3], [7])
    learner.roles.checkpointed = {"expected_lengths": lengths}
    return learner


LEARNER: list[tuple[Path_, Any, str]] = [
    ((), [], "learner is a list"),
    (("steps",), "x", r"learner\.steps is 'x'"),
    (("steps",), -1, r"learner\.steps is -1"),
    (("steps",), ..., "learner lacks 'steps'"),
    (("kl_controller",), ..., "learner lacks 'kl_controller'"),
    (("kl_controller",), 3, r"kl_controller is 3, not a dictionary"),
    (("kl_controller", "coef"), float("nan"), r"kl_controller\.coef is nan"),
    (("kl_controller", "coef"), -1.0, r"kl_controller\.coef is -1"),
    (("score_moments", "m2"), -1.0, r"score_moments\.m2 is -1"),
    (("score_moments", "mean"), None, r"score_moments\.mean is None"),
    (("token_budget", "tokens"), 0, r"token_budget\.tokens is 0"),
    (("token_budget", "tokens"), [], r"token_budget\.tokens is a list"),
    (("expected_lengths", "uids"), [], "learner cannot be used"),
    (("expected_lengths", "uids"), 3, "uids is 3"),
    (("expected_lengths", "means"), ["x"], r"means\[0\] is 'x'"),
    (("expected_lengths", "means"), [float("nan")], r"means\[0\] is nan"),
]


@pytest.mark.parametrize(("place", "value", "named"), LEARNER, ids=str)
def test_a_malformed_learner_is_named(
    checkpoint: Checkpoint, place: Path_, value: Any, named: str
) -> None:
    learner = a_learner()
    sound = learner.state_dict()
    load_part(checkpoint, learner, sound)
    with pytest.raises(CheckpointError, match=f"RF8001.*{named}"):
        load_part(checkpoint, learner, changed(sound, place, value))


def test_every_value_of_a_learner_is_refused_with_a_code_or_is_of_its_kind(
    checkpoint: Checkpoint,
) -> None:
    learner = a_learner()
    sound = learner.state_dict()
    refused = 0
    for place in list(places(sound)):
        for value in ODD_VALUES:
            try:
                load_part(checkpoint, learner, changed(sound, place, value))
            except CheckpointError:
                refused += 1
                learner.load_state_dict(sound)
            found = learner.state_dict()
            for one, other in zip(places(sound), places(found), strict=False):
                assert one == other or "expected_lengths" in one
            json.dumps(found, allow_nan=False)
            assert learner.score_moments.std > 0
    assert refused > 100


def test_an_older_checkpoint_without_a_token_budget(checkpoint: Checkpoint) -> None:
    learner = a_learner()
    load_part(checkpoint, learner, changed(learner.state_dict(), ("token_budget",), ...))
    assert learner.budget.tokens == 4096


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("{}", "lacks token_budget"),
        ('{"token_budget": 3, "rollout_halvings": 0}', "token_budget is 3"),
        ('{"token_budget": {"configured": 4096}, "rollout_halvings": 0}', "lacks tokens"),
        (
            '{"token_budget": {"configured": 4096, "tokens": "x"}, "rollout_halvings": 0}',
            "tokens is 'x'",
        ),
        (
            '{"token_budget": {"configured": 4096, "tokens": 64}, "rollout_halvings": 1000000000}',
            "rollout_halvings is 1000000000",
        ),
    ],
)
def test_a_malformed_note_of_what_fits(tmp_path: Path, text: str, named: str) -> None:
    (tmp_path / "out_of_memory.json").write_text(text)
    run = Run(tmp_path, stage="ppo", config={}, quiet=True)
    learner = a_learner()
    with (
        pytest.raises(CheckpointError, match=f"RF8206.*{named}"),
        remembering(run, learner.budget, learner),
    ):
        raise AssertionError("it began")


@pytest.mark.parametrize(
    ("extra", "named"),
    [
        ({}, "losses lacks 'train_loss'"),
        ({"train_loss": "x"}, "losses cannot be used"),
        ({"train_loss": 1.0, "eval": []}, "losses cannot be used"),
        ({"train_loss": 1.0, "eval": {"loss/eval": {}}}, "losses cannot be used"),
        ({"train_loss": 1.0, "token_budget": 3}, "token_budget is 3"),
    ],
)
def test_what_a_supervised_stage_saved_of_its_own_is_checked(
    checkpoint: Checkpoint, extra: dict[str, Any], named: str
) -> None:
    stage = SimpleNamespace(state=SimpleNamespace(step=3), budget=TokenBudget(64))
    load: Any = SupervisedStage._load_extra
    load(stage, checkpoint, {"train_loss": 1.0, "eval": {"loss/eval": 2.0}})
    with pytest.raises(CheckpointError, match=named) as caught:
        load(stage, checkpoint, extra)
    assert caught.value.code == "RF8001"
