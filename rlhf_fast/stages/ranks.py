"""The ranks that torchrun started: joined when a stage begins, left when it ends, however it ends.

Of a fault that takes the run down, one rank tells: the first to have it. A collective that fails
because another rank has raised is no fault of its own, so that rank leaves without a word.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

from rlhf_fast.config import PPOConfig, RewardModelConfig, SFTConfig, StageConfig, to_dict
from rlhf_fast.config_distributed import DistributedConfig
from rlhf_fast.distributed.agreement import share
from rlhf_fast.distributed.fault_board import collective_fault
from rlhf_fast.distributed.world import World
from rlhf_fast.errors import (
    ConfigError,
    DataError,
    EnvironmentFault,
    Interrupted,
    PeerError,
    Preempted,
    RLHFError,
    StoppedEarly,
)
from rlhf_fast.launch import launched_ranks
from rlhf_fast.stages.run_config import SHOWN, compare, plain_config
from rlhf_fast.stages.run_on_ranks import Nowhere, exit_code_of
from rlhf_fast.stages.training import setup_run


@contextlib.contextmanager
def joined(
    config: SFTConfig | RewardModelConfig | PPOConfig, world: World | None = None
) -> Iterator[World]:
    """Set the process up for a stage, and join the other ranks if torchrun started some.

    Standard output and error of all ranks but the first go nowhere meanwhile. A `world` that was
    joined before is handed on, and stays.

    Raises:
        EnvironmentFault: RF7050, RF7054, or RF7052, another rank died or did not come.
        PeerError: what is to be said of a fault is said by another rank.
        Other errors as `setup_run`.
    """
    device = setup_run(config.run)
    if world is not None:
        yield world
        return
    if launched_ranks() == 1:
        yield World(device)
        return
    section = config.distributed
    world = World.join(device, replicas=section.replicas, timeout_seconds=section.timeout_seconds)
    with on_ranks_of(world, section):
        require_same_config(world, config)
        yield world


def alone(config: PPOConfig) -> World:
    """Set the process up for a stage that nobody joined other ranks for.

    Raises:
        EnvironmentFault: RF7053, torchrun started several that would each do the whole of it.
        Other errors as `setup_run`.
    """
    if launched_ranks() > 1:
        raise EnvironmentFault(
            "RF7053",
            f"torchrun started {launched_ranks()} processes, and this one knows of no other",
            where="world",
            expected="the ranks, joined",
            remedy="use `with rlhf_fast.stages.ranks.joined(config) as world:` and hand `world` on",
        )
    return World(setup_run(config.run))


@contextlib.contextmanager
def on_ranks_of(world: World, section: DistributedConfig) -> Iterator[None]:
    """What surrounds a stage on several ranks; the world is left at the end."""
    try:
        with contextlib.ExitStack() as stack:
            if not world.is_main:
                stack.enter_context(contextlib.redirect_stdout(Nowhere()))
                stack.enter_context(contextlib.redirect_stderr(Nowhere()))
            world.board.note("starting")
            yield
    except BaseException as error:
        told = _told_once(error, world, section)
        world.leave(failed=True)
        if told is error:
            raise
        raise told from error
    finally:
        world.leave()


def _told_once(error: BaseException, world: World, section: DistributedConfig) -> BaseException:
    """The error that this rank leaves with: its own, or a silent one if another rank was first."""
    if isinstance(error, PeerError):
        return error
    if isinstance(error, RLHFError) and error.of_another_rank:
        return PeerError(error.exit_code)
    if isinstance(error, Preempted | Interrupted) and not isinstance(error, StoppedEarly):
        # Agreed by all.
        return error if world.is_main else PeerError(error.exit_code)
    if not world.board.report_failure():
        return PeerError(exit_code_of(error))
    kind = collective_fault(error)
    if kind is None:
        return error
    what = (
        f"rank {world.rank} waited more than {section.timeout_seconds:g} s for another rank"
        if kind == "timeout"
        else f"another rank ended while rank {world.rank} needed it"
    )
    doing = "; ".join(f"rank {rank}: {text}" for rank, text in enumerate(world.board.doing()))
    remedy = (
        "see which rank was in another phase than the rest; raise distributed.timeout_seconds if "
        "it was slow, not stuck: a reward function has to fit into it. The same command goes on "
        "from the last checkpoint"
        if kind == "timeout"
        else "see what torchrun says of it (killed? out of memory?). The same command goes on from "
        "the last checkpoint"
    )
    return EnvironmentFault("RF7052", what, where=f"at work on: {doing}", remedy=remedy)


def require_same_config(world: World, config: StageConfig) -> None:
    """Refuse ranks with different settings: a file that is old on one machine.

    Raises:
        ConfigError: RF1046, on every rank.
    """
    found = share(world, plain_config(to_dict(config)))
    for rank, other in enumerate(found):
        differences = compare(found[0], other, ())
        if differences:
            raise ConfigError(
                "RF1046",
                f"rank 0 and rank {rank} were given different settings",
                where="\n            ".join(
                    f"{d.key}: {d.before} on rank 0, {d.after} on rank {rank}"
                    for d in differences[:SHOWN]
                ),
                expected="the same config on every rank",
                remedy="give all machines the same file and the same overrides",
            )


def require_same_data(world: World, **fingerprints: str) -> None:
    """Refuse ranks that read different data.

    Args:
        world: the ranks.
        fingerprints: SHA-256 in hex, by the name of the data.

    Raises:
        DataError: RF2064, on every rank.
    """
    for name, fingerprint in fingerprints.items():
        digest = torch.tensor(list(bytes.fromhex(fingerprint)), dtype=torch.uint8)
        found = world.gather_rows(digest.to(world.device)[None])
        differing = [rank for rank, other in enumerate(found) if not torch.equal(other, found[0])]
        if differing:
            raise DataError(
                "RF2064",
                f"rank 0 and rank {differing[0]} read different {name} data",
                where=f"data, on {len(differing)} of {world.size} ranks",
                expected="the same rows in the same order on every rank",
                remedy="give all machines the same files, and the same versions of tokenizer and "
                "libraries",
            )


def require_ranks_can(config: PPOConfig, ranks: int) -> None:
    """Refuse settings that are for one rank alone, if there are more.

    Raises:
        ConfigError: RF1045, all of them at once.
    """
    if ranks == 1:
        return
    faults = []
    if config.engine.overlap_scoring == "on":
        faults.append("engine.overlap_scoring=on: which samples are finished differs by rank")
    if config.side_by_side > 1:
        faults.append(f"side_by_side={config.side_by_side}: ranks share models one by one")
    if config.memory.step_in_backward:
        faults.append("memory.step_in_backward: gradients are summed over ranks before a step")
    if faults:
        raise ConfigError(
            "RF1045",
            f"{len(faults)} setting{'s do' if len(faults) > 1 else ' does'} not work on "
            f"{ranks} ranks",
            where="; ".join(faults),
            remedy="leave them at their defaults, or run one process",
        )
