"""Moments in 8 bits, saved by k ranks and loaded by m: to the bit where k is m, else to a level."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from rlhf_fast.adamw8bit import decode, encode, ladder, narrowed, widened
from rlhf_fast.config import OptimConfig
from rlhf_fast.distributed import (
    load,
    load_module_tensors,
    load_optimizer_state,
    module_tensors,
    optimizer_state,
    save,
)
from rlhf_fast.distributed.gradients import RankGradients
from rlhf_fast.distributed.sharding import shard_module
from rlhf_fast.distributed.world import World
from rlhf_fast.errors import CheckpointError
from rlhf_fast.optim import GuardedOptimizer
from tests.distributed.ranks import on_ranks
from tests.models.tiny import build

# ranks, replicas
LAYOUTS = {"one": (1, 1), "two": (2, 1), "four": (4, 1), "replicas": (4, 2)}
# Of four shards a projection of 128 x 128 is 8-bit still, the embedding of 41 rows is not.
SIZES = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 1,
    "num_key_value_heads": 4,
}


class Run:
    """A model with its optimizer on the ranks of a world."""

    def __init__(self, world: World | None, seed: int) -> None:
        self.module = build(seed=seed, **SIZES)
        if world is not None:
            shard_module(self.module, world, dtype="float32")
        ranks = None if world is None else RankGradients.of(world)
        config = OptimConfig(lr=1e-2, schedule="constant", max_grad_norm=0.0)
        self.guarded = GuardedOptimizer(self.module, config, 10, bits=8, ranks=ranks)

    def step(self, seed: int) -> None:
        """With the same made-up gradients, over four decades, however the module is cut."""
        generator = torch.Generator().manual_seed(seed)
        for (_, whole), shard in zip(
            self.guarded.whole_parameters, self.guarded.parameters, strict=True
        ):
            sizes = 10 ** (4 * torch.rand(whole.shape, generator=generator) - 4)
            grad = sizes * torch.randn(whole.shape, generator=generator)
            if isinstance(whole, DTensor):
                placement: Any = whole.placements[-1]
                pieces = grad.split(
                    -(-whole.shape[placement.dim] // whole.device_mesh.size(-1)), placement.dim
                )
                rank = whole.device_mesh.get_local_rank()
                grad = pieces[rank] if rank < len(pieces) else grad[:0]
            shard.grad = grad.contiguous()
        self.guarded.optimizer.step()
        self.guarded.zero_grad()

    def groups(self) -> tuple[dict[str, Any], dict[str, Any]]:
        weights, aliases = module_tensors(self.module)
        guarded = self.guarded
        moments, state = optimizer_state(
            guarded.optimizer, guarded.named_parameters, guarded.whole_parameters
        )
        return {"model": weights, "moments": moments}, {"aliases": aliases, "optimizer": state}

    def restore(self, checkpoint: Any) -> None:
        load_module_tensors(self.module, checkpoint.tensors["model"], checkpoint.state["aliases"])
        guarded = self.guarded
        load_optimizer_state(
            guarded.optimizer,
            guarded.named_parameters,
            checkpoint.tensors["moments"],
            checkpoint.state["optimizer"],
            guarded.whole_parameters,
        )

    def live(self) -> dict[str, Tensor]:
        """This rank's weights and moments, by name, as they lie."""
        held = {name: p.detach().clone() for name, p in self.guarded.named_parameters}
        for name, parameter in self.guarded.named_parameters:
            slots = self.guarded.optimizer.state[parameter]
            held |= {f"{name}/{slot}": value.clone() for slot, value in slots.items()}
        return held

    def moments(self) -> dict[str, Tensor]:
        """All of them in fp32, whole; collective."""
        found = {}
        for name, parameter in self.guarded.named_parameters:
            slots = widened(self.guarded.optimizer.state[parameter])
            like = dict(self.guarded.whole_parameters)[name]
            for slot in ("exp_avg", "exp_avg_sq"):
                value = slots[slot]
                if isinstance(like, DTensor):
                    value = DTensor.from_local(
                        value,
                        like.device_mesh,
                        like.placements,
                        shape=like.shape,
                        stride=like.stride(),
                    ).full_tensor()
                found[f"{name}/{slot}"] = value.clone()
        return found


def saved(world: World | None, folder: str, name: str) -> dict[str, Tensor]:
    """Two steps, a checkpoint, two steps more; the moments of the checkpoint."""
    run = Run(world, seed=4)
    run.step(1)
    run.step(2)
    tensors, state = run.groups()
    options: dict[str, Any] = {} if world is None else {"world": world}
    save(Path(folder) / name, 2, tensors=tensors, state=state, keep_last=1, **options)
    codes = sum(t.dtype == torch.uint8 for t in run.live().values())
    assert codes >= 14
    moments = run.moments()
    before = run.live()
    run.step(3)
    # The same layout goes on to the same bits.
    resumed = Run(world, seed=9)
    resumed.restore(load(Path(folder) / name, **options))
    assert_same(resumed.live(), before)
    resumed.step(3)
    assert_same(resumed.live(), run.live())
    return {name: moment.numpy().copy() for name, moment in moments.items()}


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].dtype == value.dtype, name
        assert torch.equal(found[name], value), name


def loaded(world: World | None, folder: str, moments: dict[str, dict[str, Any]]) -> None:
    """Checkpoints of all layouts, rounded at most once more."""
    half = float(ladder(True, torch.device("cpu"))[-1] / ladder(True, torch.device("cpu"))[-2])
    options: dict[str, Any] = {} if world is None else {"world": world}
    for name, expected in moments.items():
        run = Run(world, seed=9)
        run.restore(load(Path(folder) / name, **options))
        found = run.moments()
        assert found.keys() == expected.keys()
        for key, values in expected.items():
            wanted = torch.from_numpy(values)
            # Nearest to a level; below the lowest, 1e-5 of the largest of a block, to it or 0.
            lowest = 1e-5 if key.endswith("exp_avg") else 1e-10
            torch.testing.assert_close(
                found[key],
                wanted,
                rtol=(half - 1) / 2 + 1e-3,
                atol=lowest * float(wanted.abs().max()),
                msg=lambda text, key=key, name=name: f"{name}, {key}: {text}",
            )
        run.step(3)  # what came back can be trained


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("eight_bits")


@pytest.fixture(scope="module")
def moments(folder: Path) -> dict[str, dict[str, Any]]:
    """Of a checkpoint in every layout."""
    found = {}
    for name, (size, replicas) in LAYOUTS.items():
        if size == 1:
            found[name] = saved(None, str(folder), name)
        else:
            found[name] = on_ranks(size, saved, str(folder), name, replicas=replicas)[0]
    return found


@pytest.mark.parametrize("into", LAYOUTS)
def test_every_layout_loads_every_other(
    folder: Path, moments: dict[str, dict[str, Any]], into: str
) -> None:
    size, replicas = LAYOUTS[into]
    if size == 1:
        loaded(None, str(folder), moments)
    else:
        on_ranks(size, loaded, str(folder), moments, replicas=replicas)


def test_moments_widened_and_narrowed_are_the_same_bits() -> None:
    generator = torch.Generator().manual_seed(0)
    count = (1 << 20) + 300  # two chunks, the last block short
    slots: dict[str, Any] = {"step": torch.tensor(7.0)}
    for moment, scales, signed in (("exp_avg", "scale_m", True), ("exp_avg_sq", "scale_v", False)):
        values = 10 ** (12 * torch.rand(count, generator=generator) - 12)
        values *= torch.randn(count, generator=generator) if signed else 1.0
        values[:1000:3] = 0.0
        values[256:512] = 0.0
        uniform = torch.rand(count, generator=generator)
        slots[moment], slots[scales] = encode(values, uniform, signed=signed)
        slots[moment] = slots[moment].view(4, -1)
        assert len(slots[moment].unique()) > 250
    wide = widened(slots)
    assert set(wide) == {"step", "exp_avg", "exp_avg_sq"}
    whole = decode(slots["exp_avg"].view(-1), slots["scale_m"], signed=True)
    assert torch.equal(wide["exp_avg"], whole.view(4, -1))
    back = narrowed(torch.empty(4, count // 4), wide)
    assert back.keys() == slots.keys()
    for name, value in slots.items():
        assert torch.equal(back[name], value), name


def test_codes_without_their_scales_are_refused(folder: Path, moments: dict[str, Any]) -> None:
    assert moments
    checkpoint = load(folder / "one")
    tensors = {name: t.clone() for name, t in checkpoint.tensors["moments"].items()}
    name = next(name for name in tensors if name.endswith("/scale_v"))
    on_ranks(2, _refused, tensors, checkpoint.state["optimizer"], name)


def _refused(world: World, tensors: dict[str, Tensor], state: Any, name: str) -> None:
    for damaged in (
        {key: t for key, t in tensors.items() if key != name},
        tensors | {name: tensors[name][1:]},
    ):
        run = Run(world, seed=9)
        run.step(1)
        before = run.live()
        guarded = run.guarded
        with pytest.raises(CheckpointError, match="RF8005"):
            load_optimizer_state(
                guarded.optimizer,
                guarded.named_parameters,
                damaged,
                state,
                guarded.whole_parameters,
            )
        assert_same(run.live(), before)
