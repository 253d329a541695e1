"""A rank that raises, hangs or is stopped: one of them says why, all of them end."""

import contextlib
import dataclasses
import io
import os
import signal
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from torch.distributed.distributed_c10d import _set_pg_timeout

from rlhf_fast.config import EngineConfig, PPOConfig
from rlhf_fast.config_distributed import DistributedConfig
from rlhf_fast.distributed.agreement import on_main
from rlhf_fast.distributed.world import World
from rlhf_fast.errors import ConfigError, RewardError, RLHFError, StoppedEarly
from rlhf_fast.stages.ranks import (
    on_ranks_of,
    require_ranks_can,
    require_same_config,
    require_same_data,
)
from rlhf_fast.stages.sft import SFTStage, run_sft
from rlhf_fast.stages.stop_signals import StopSignals, ending_at_once
from rlhf_fast.stages.training import open_run
from tests.distributed.ranks import on_ranks
from tests.stages.killed_runs import sft_config
from tests.stages.tiny_runs import (
    checkpoint_contents,
    demonstrations,
    metric_lines,
    model_directory,
    write_rows,
)


def _left_with(world: World, work) -> tuple[str, int, str]:
    """Code, exit code and text of the error that a rank leaves with, and what it printed."""
    printed = io.StringIO()
    try:
        with (
            contextlib.redirect_stdout(printed),
            on_ranks_of(world, DistributedConfig(timeout_seconds=7)),
        ):
            print(f"rank {world.rank} speaks")
            work()
    except RLHFError as error:
        return error.code, error.exit_code, str(error) + printed.getvalue()
    return "", 0, printed.getvalue()


def _raises(world: World):
    def work():
        if world.rank == 1:
            raise RewardError("RF5004", "the reason")
        world.barrier()

    return _left_with(world, work)


def test_of_a_rank_that_raises_only_its_own_error_is_told():
    found = on_ranks(3, _raises)
    assert [code for code, *_ in found] == ["RF7059", "RF5004", "RF7059"]
    assert [code for _, code, _ in found][1] == 2
    assert "rank 0 speaks" in found[0][2]
    assert "speaks" not in found[1][2] + found[2][2]


def _main_fails(world: World):
    def work():
        on_main(world, lambda: b"\xff".decode())

    try:
        return _left_with(world, work)[:2]
    except UnicodeDecodeError as error:
        return type(error).__name__


def test_what_rank_0_met_for_all_is_told_by_rank_0():
    assert on_ranks(2, _main_fails) == ["UnicodeDecodeError", ("RF7059", 2)]


def _stopped_alone(world: World):
    def work():
        with ending_at_once():
            if world.rank == 1:
                os.kill(os.getpid(), signal.SIGTERM)
            world.barrier()

    return _left_with(world, work)[:2]


def test_a_stop_signal_while_models_load_is_told_by_the_rank_that_got_it():
    waited, stopped = on_ranks(2, _stopped_alone)
    assert stopped == ("RF8303", 75)
    assert waited[0] == "RF7059"


def test_a_stop_signal_whose_error_got_lost_stops_the_run():
    with ending_at_once():
        with contextlib.suppress(StoppedEarly):
            os.kill(os.getpid(), signal.SIGTERM)
        with StopSignals(silent=True) as signals:
            assert signals.received == signal.SIGTERM
    with StopSignals(silent=True) as signals:
        assert signals.received is None


def test_a_stop_signal_whose_error_became_another_is_what_ends_the_run():
    def load() -> None:
        try:
            os.kill(os.getpid(), signal.SIGTERM)
        except StoppedEarly as error:  # as around a loader that fails in all manners
            raise ValueError("the model cannot be loaded") from error

    def train() -> None:
        with contextlib.suppress(StoppedEarly):
            os.kill(os.getpid(), signal.SIGTERM)
        with StopSignals(silent=True):
            raise ValueError("of its own")  # the signal has been taken over

    with pytest.raises(StoppedEarly, match="RF8303"), ending_at_once():
        load()
    with pytest.raises(ValueError, match="of its own"), ending_at_once():
        train()


def _differ(world: World, base: str):
    config = sft_config(Path(base), Path(base))
    rates = dataclasses.replace(config.optim, lr=1e-3 * (1 + world.rank))
    other = dataclasses.replace(config, optim=rates)
    held_out = dataclasses.replace(config.data, eval=f"{base}/eval{world.rank}.jsonl")
    out = dataclasses.replace(config.run, output_dir=f"{base}/differ")
    found = []
    for work in (
        lambda: require_same_config(world, config),
        lambda: require_same_config(world, other),
        lambda: run_sft(
            dataclasses.replace(config, data=held_out, run=out), quiet=True, world=world
        ),
    ):
        try:
            work()
        except RLHFError as error:
            found.append(str(error))
    return found


def test_ranks_with_other_settings_or_held_out_data_are_refused(base):
    write_rows(base / "eval0.jsonl", demonstrations(6, seed=1))
    write_rows(base / "eval1.jsonl", demonstrations(6, seed=2))
    for settings, data in on_ranks(2, _differ, str(base)):
        assert settings.startswith("RF1046")
        assert "optim.lr: 0.001 on rank 0, 0.002 on rank 1" in settings
        assert data.startswith("RF2064: rank 0 and rank 1 read different evaluation data")


def _hangs(world: World):
    _set_pg_timeout(timedelta(seconds=1))

    def work():
        world.board.note("update" if world.rank == 0 else "a call that never returns")
        if world.rank == 1:
            # Not forever: it must not outlive this test. The other has left long before.
            while world.board.failures() == 0:
                time.sleep(0.05)
        world.sum(torch.ones(2))

    return _left_with(world, work)


def test_of_a_rank_that_hangs_the_others_say_what_it_was_at():
    waited, hung = on_ranks(2, _hangs)
    assert waited[:2] == ("RF7052", 3)
    assert "rank 0 waited more than 7 s" in waited[2]
    assert "rank 1: a call that never returns" in waited[2]
    assert hung[0] == "RF7059"


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("failures")
    model_directory(folder / "base")
    write_rows(folder / "train.jsonl", demonstrations(24))
    return folder


def _sft(world: World, base: str, out: str, stops: bool):
    """SFT; SIGTERM arrives at rank 1 alone, within its second step. Returns how it left."""
    if stops and world.rank == 1:
        step, calls = SFTStage.step, []

        def stopped(stage):
            calls.append(1)
            if len(calls) == 2:
                os.kill(os.getpid(), signal.SIGTERM)
            return step(stage)

        SFTStage.step = stopped
    config = sft_config(Path(base), Path(out))

    def work():
        run_sft(config, quiet=True, world=world)

    code, exit_code, _ = _left_with(world, work)
    return code, exit_code


def test_a_stop_signal_to_one_rank_stops_all_after_the_same_step(base):
    whole, stopped = base / "whole", base / "stopped"
    assert on_ranks(2, _sft, str(base), str(whole), False) == [("", 0)] * 2
    left = on_ranks(2, _sft, str(base), str(stopped), True)
    assert left == [("RF8301", 75), ("RF7059", 75)]
    assert len(metric_lines(stopped / "sft")) == 2
    assert on_ranks(2, _sft, str(base), str(stopped), False) == [("", 0)] * 2
    assert metric_lines(stopped / "sft") == metric_lines(whole / "sft")
    for name, tensors in checkpoint_contents(whole / "sft")[0].items():
        for key, tensor in checkpoint_contents(stopped / "sft")[0][name].items():
            assert tensor.equal(tensors[key]), (name, key)
    # There is nothing left to do, which any number of ranks is told.
    assert on_ranks(1, _sft, str(base), str(stopped), False) == [("", 0)]


def _refused(world: World, out: str):
    fingerprint = ("ab" if world.rank else "cd") * 32
    codes = []
    for refuse in (
        lambda: require_same_data(world, prompts=fingerprint),
        lambda: require_ranks_can(
            PPOConfig(engine=EngineConfig(overlap_scoring="on"), side_by_side=2), world.size
        ),
        lambda: open_run(_occupied(out), "sft", quiet=True, world=world).__enter__(),
    ):
        try:
            refuse()
        except RLHFError as error:
            codes.append(error.code)
    return codes


def _occupied(out):
    config = sft_config(Path(out), Path(out))
    return dataclasses.replace(config, run=dataclasses.replace(config.run, resume="never"))


def test_what_ranks_cannot_do_is_refused_on_all(base):
    config = _occupied(base)
    with open_run(config, "sft", quiet=True) as run:
        run.mark_complete(1)
    assert on_ranks(2, _refused, str(base)) == [["RF2064", "RF1045", "RF8203"]] * 2
    with pytest.raises(ConfigError, match=r"(?s)overlap_scoring.*side_by_side"):
        require_ranks_can(PPOConfig(engine=EngineConfig(overlap_scoring="on"), side_by_side=2), 2)
