"""What the ranks do with a run directory that they do not all see alike."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from rlhf_fast.config import RunConfig, SFTConfig
from rlhf_fast.distributed.world import World
from rlhf_fast.stages import training
from rlhf_fast.stages.training import open_run
from tests.distributed.ranks import on_ranks


def _resume(world: World, folder: str) -> Any:
    config = SFTConfig(run=RunConfig(output_dir=folder))
    with pytest.MonkeyPatch.context() as patch:
        plain = Path.exists

        def exists(path: Path) -> bool:
            late = path.name == training.RUN_NAME and not world.is_main
            return not late and plain(path)

        patch.setattr(Path, "exists", exists)
        changed = dataclasses.replace(config, packing=not config.packing)
        with open_run(changed, "sft", quiet=True, world=world) as run:
            return run._resume, [str(notice) for notice in run.notices]


def test_the_first_rank_says_whether_there_is_a_run(tmp_path: Path) -> None:
    config = SFTConfig(run=RunConfig(output_dir=str(tmp_path)))
    with open_run(config, "sft", quiet=True):
        pass
    one, other = on_ranks(2, _resume, str(tmp_path))
    assert one == other
    assert one[0] is True
    assert any("packing" in notice for notice in one[1])
