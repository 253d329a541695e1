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
from rlhf_fast.distributed.world import World
from rlhf_fast.errors import ConfigError, RewardError, RLHFError
from rlhf_fast.stages.ranks import on_ranks_of, require_ranks_can, require_same_data
from rlhf_fast.stages.sft import SFTStage, run_sft
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
            PPOConfig(engine=EngineConfig(overlap_scoring="on"), side_by_side=2), world
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
        require_ranks_can(
            PPOConfig(engine=EngineConfig(overlap_scoring="on"), side_by_side=2),
            dataclasses.replace(World(torch.device("cpu")), size=2),
        )
