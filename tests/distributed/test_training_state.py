"""Optimizers, schedulers, generators and weights come back to the last bit, through a
checkpoint."""

from __future__ import annotations

import math
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.optim import lr_scheduler

from rlhf_fast.distributed import (
    load,
    load_module_tensors,
    load_optimizer_state,
    load_rng_state,
    load_scheduler_state,
    module_tensors,
    optimizer_state,
    rng_state,
    save,
    scheduler_state,
)
from rlhf_fast.errors import CheckpointError


def through_disk(root: Path, tensors: dict[str, Tensor], state: Any) -> tuple[Any, Any]:
    save(root, 0, tensors={"x": tensors}, state=state, keep_last=1)
    found = load(root)
    return found.tensors["x"], found.state


class Net(nn.Module):
    def __init__(self, seed: int, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embed = nn.Embedding(7, 5)
        self.head = nn.Linear(5, 7, bias=False)
        self.head.weight = self.embed.weight
        self.norm = nn.BatchNorm1d(7)
        self.unused = nn.Linear(2, 2)
        self.to(dtype)

    def forward(self, ids: Tensor) -> Tensor:
        return self.norm(self.head(self.embed(ids)))


def adamw(net: Net, **options: Any) -> torch.optim.AdamW:
    decayed = [p for p in net.parameters() if p.dim() > 1]
    others = [p for p in net.parameters() if p.dim() <= 1]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "lr": 1e-2 / 3}]
    return torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.95), **options)


def train(net: Net, optimizer: torch.optim.Optimizer, steps: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        ids = torch.randint(0, 7, (6,), generator=generator)
        loss = net(ids).float().square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def assert_same_bits(left: Any, right: Any) -> None:
    assert type(left) is type(right)
    if isinstance(left, dict):
        assert list(left) == list(right)
        for key in left:
            assert_same_bits(left[key], right[key])
    elif isinstance(left, list | tuple):
        assert len(left) == len(right)
        for a, b in zip(left, right, strict=True):
            assert_same_bits(a, b)
    elif isinstance(left, Tensor):
        assert left.dtype == right.dtype
        assert left.device == right.device
        assert torch.equal(left, right)
    else:
        assert repr(left) == repr(right)


@pytest.mark.parametrize("options", [{}, {"amsgrad": True}, {"foreach": False}, {"fused": True}])
def test_adamw_continues_to_the_bit(tmp_path: Path, options: dict[str, Any]) -> None:
    net = Net(0)
    optimizer = adamw(net, **options)
    train(net, optimizer, 5, seed=1)
    weights, aliases = module_tensors(net)
    tensors, state = optimizer_state(optimizer, net.named_parameters())
    assert "embed.weight/exp_avg" in tensors
    assert tensors["embed.weight/step"].item() == 5
    both = {f"w/{k}": v for k, v in weights.items()} | {f"o/{k}": v for k, v in tensors.items()}
    file, saved = through_disk(tmp_path, both, {"optimizer": state, "aliases": aliases})

    other = Net(99)
    restored = adamw(other, **options)
    load_module_tensors(
        other, {k[2:]: file[k] for k in file if k.startswith("w/")}, saved["aliases"]
    )
    load_optimizer_state(
        restored,
        other.named_parameters(),
        {k[2:]: file[k] for k in file if k.startswith("o/")},
        saved["optimizer"],
    )
    assert_same_bits(restored.state_dict(), optimizer.state_dict())
    train(net, optimizer, 5, seed=2)
    train(other, restored, 5, seed=2)
    assert_same_bits(dict(other.state_dict()), dict(net.state_dict()))
    assert_same_bits(restored.state_dict(), optimizer.state_dict())


def test_options_that_are_tensors_and_odd_floats(tmp_path: Path) -> None:
    parameter = nn.Parameter(torch.ones(3))
    names = [("p", parameter)]
    optimizer = torch.optim.AdamW([parameter], lr=torch.tensor(1e-3), capturable=False)
    optimizer.param_groups[0]["initial_lr"] = 0.1 + 0.2
    optimizer.param_groups[0]["note"] = float("inf")
    tensors, state = optimizer_state(optimizer, names)
    file, saved = through_disk(tmp_path, tensors, state)
    restored = torch.optim.AdamW([parameter], lr=torch.tensor(0.5), capturable=False)
    load_optimizer_state(restored, names, file, saved)
    assert_same_bits(restored.state_dict(), optimizer.state_dict())
    assert restored.param_groups[0]["initial_lr"] == 0.1 + 0.2


def test_wide_moments_of_narrow_weights_are_not_rounded(tmp_path: Path) -> None:
    parameter = nn.Parameter(torch.ones(64, dtype=torch.bfloat16))
    names = [("p", parameter)]
    optimizer = torch.optim.SGD([parameter], lr=0.1, momentum=0.9)
    torch.manual_seed(0)
    optimizer.state[parameter]["momentum_buffer"] = torch.randn(64)
    tensors, state = optimizer_state(optimizer, names)
    file, saved = through_disk(tmp_path, tensors, state)
    restored = torch.optim.SGD([parameter], lr=0.1, momentum=0.9)
    load_optimizer_state(restored, names, file, saved)
    back = restored.state[parameter]["momentum_buffer"]
    assert back.dtype == torch.float32
    assert torch.equal(back, tensors["p/momentum_buffer"])
    assert back.data_ptr() != tensors["p/momentum_buffer"].data_ptr()


def test_names_and_not_positions_carry_the_state(tmp_path: Path) -> None:
    a, b = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2) * 2)
    optimizer = torch.optim.AdamW([a, b])
    a.grad, b.grad = torch.ones(2), torch.ones(2) * 3
    optimizer.step()
    tensors, state = optimizer_state(optimizer, [("a", a), ("b", b)])
    reordered = torch.optim.AdamW([b, a])
    load_optimizer_state(reordered, [("b", b), ("a", a)], tensors, state)
    for parameter in (a, b):
        assert_same_bits(reordered.state[parameter], optimizer.state[parameter])
    assert not torch.equal(reordered.state[a]["exp_avg"], reordered.state[b]["exp_avg"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s, t: s.update(optimizer="SGD"), "SGD"),
        (lambda s, t: s["groups"].append({"params": [], "options": {}}), "2 parameter groups"),
        (lambda s, t: s["groups"][0]["params"].append("ghost"), "ghost"),
        (lambda s, t: t.pop("p/exp_avg"), "lacks p/exp_avg"),
        (lambda s, t: t.update({"p/exp_avg": torch.zeros(5)}), "p/exp_avg has shape"),
    ],
)
def test_a_foreign_optimizer_is_refused_and_nothing_changes(change: Any, message: str) -> None:
    parameter = nn.Parameter(torch.ones(3))
    names = [("p", parameter)]
    optimizer = torch.optim.AdamW([parameter])
    parameter.grad = torch.ones(3)
    optimizer.step()
    tensors, state = optimizer_state(optimizer, names)
    change(state, tensors)
    before = optimizer.state[parameter]["exp_avg"].clone()
    with pytest.raises(CheckpointError, match=message) as caught:
        load_optimizer_state(optimizer, names, tensors, state)
    assert caught.value.code == "RF8005"
    assert torch.equal(optimizer.state[parameter]["exp_avg"], before)


def test_unnamed_parameters_are_refused() -> None:
    optimizer = torch.optim.AdamW([nn.Parameter(torch.ones(3))])
    with pytest.raises(CheckpointError, match="have no name"):
        optimizer_state(optimizer, [])


SCHEDULERS = {
    "cosine": lambda o: lr_scheduler.CosineAnnealingLR(o, T_max=17),
    "lambda": lambda o: lr_scheduler.LambdaLR(o, lambda step: 1 / math.sqrt(step + 3)),
    "milestones": lambda o: lr_scheduler.MultiStepLR(o, milestones=[2, 4, 4], gamma=0.3),
    "sequence": lambda o: lr_scheduler.SequentialLR(
        o,
        [lr_scheduler.LinearLR(o, 0.1, total_iters=4), lr_scheduler.ExponentialLR(o, 0.7)],
        milestones=[4],
    ),
}


@pytest.mark.parametrize("kind", SCHEDULERS)
def test_schedulers_continue_exactly(tmp_path: Path, kind: str) -> None:
    def build() -> tuple[torch.optim.Optimizer, Any]:
        optimizer = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.1)
        return optimizer, SCHEDULERS[kind](optimizer)

    def rates(optimizer: torch.optim.Optimizer, scheduler: Any, steps: int) -> list[float]:
        found = []
        for _ in range(steps):
            optimizer.step()
            scheduler.step()
            found.append(optimizer.param_groups[0]["lr"])
        return found

    optimizer, scheduler = build()
    rates(optimizer, scheduler, 3)
    state = {
        "scheduler": scheduler_state(scheduler),
        "lr": optimizer.param_groups[0]["lr"],
    }
    _, saved = through_disk(tmp_path, {}, state)
    other, restored = build()
    load_scheduler_state(restored, saved["scheduler"])
    other.param_groups[0]["lr"] = saved["lr"]
    assert rates(other, restored, 9) == rates(optimizer, scheduler, 9)


def test_a_foreign_scheduler_is_refused() -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.1)
    state = scheduler_state(SCHEDULERS["milestones"](optimizer))
    with pytest.raises(CheckpointError, match="milestones"):
        load_scheduler_state(SCHEDULERS["cosine"](optimizer), state)


def draw(generators: dict[str, Any]) -> list[Any]:
    return [
        torch.randn(5).tolist(),
        random.gauss(0, 1),
        random.random(),
        np.random.standard_normal(3).tolist(),  # noqa: NPY002 - the legacy global generator
        torch.randperm(9, generator=generators["torch"]).tolist(),
        generators["python"].gauss(0, 1),
        generators["numpy"].integers(0, 2**60, 4).tolist(),
        generators["mt"].standard_normal(3).tolist(),
    ]


def make_generators(seed: int) -> dict[str, Any]:
    return {
        "torch": torch.Generator().manual_seed(seed),
        "python": random.Random(seed),
        "numpy": np.random.default_rng(seed),
        "mt": np.random.Generator(np.random.MT19937(seed)),
    }


def test_random_streams_continue_exactly(tmp_path: Path) -> None:
    outside = rng_state()
    try:
        generators = make_generators(1)
        draw(generators)  # leaves a cached Gaussian in Python's and NumPy's generators
        tensors, state = rng_state(generators)
        file, saved = through_disk(tmp_path, tensors, state)
        expected = [draw(generators) for _ in range(3)]
        others = make_generators(2)
        draw(others)
        load_rng_state(file, saved, others)
        assert [draw(others) for _ in range(3)] == expected
    finally:
        load_rng_state(*outside)


def test_other_generators_are_refused() -> None:
    tensors, state = rng_state({"a": torch.Generator()})
    before = torch.get_rng_state()
    for given in ({}, {"b": torch.Generator()}, {"a": random.Random()}):
        with pytest.raises(CheckpointError, match="RF8006"):
            load_rng_state(tensors, state, given)
    state["cuda_devices"] = 77
    with pytest.raises(CheckpointError, match="77 CUDA"):
        load_rng_state(tensors, state, {"a": torch.Generator()})
    assert torch.equal(torch.get_rng_state(), before)
    with pytest.raises(CheckpointError, match="is a int"):
        rng_state({"a": 3})  # type: ignore[dict-item]


@pytest.mark.parametrize(
    ("saved", "one", "here", "device", "expected"),
    [
        (1, True, 0, "cpu", {}),  # a run on a GPU goes on without one
        (1, True, 2, "cuda:1", {"cuda:1": 0}),
        (1, True, 2, "cpu", {"cuda": 0}),
        (2, False, 2, "cuda:1", {"cuda:0": 0, "cuda:1": 1}),  # what something beside it drew from
        (2, False, 4, "cuda:3", {"cuda:3": 0}),
        (2, False, 4, "cpu", None),
        (1, True, 0, None, None),
        (2, False, 0, None, None),
    ],
)
def test_generators_of_devices_go_where_the_run_goes(
    monkeypatch: pytest.MonkeyPatch,
    saved: int,
    one: bool,
    here: int,
    device: str | None,
    expected: dict[str, int] | None,
) -> None:
    tensors, state = rng_state()
    state["cuda_devices"] = saved
    state |= {"one_device": True} if one else {}
    tensors |= {f"cuda/{i}": torch.tensor([i]) for i in range(saved)}
    found: dict[str, int] = {}
    monkeypatch.setattr(torch.cuda, "device_count", lambda: here)
    monkeypatch.setattr(
        torch.cuda, "set_rng_state", lambda value, where: found.update({str(where): int(value)})
    )
    where = None if device is None else torch.device(device)
    if expected is None:
        with pytest.raises(CheckpointError, match="RF8006"):
            load_rng_state(tensors, state, device=where)
        assert found == {}
    else:
        load_rng_state(tensors, state, device=where)
        assert found == expected


def test_a_gpu_run_keeps_the_generator_of_its_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda where: torch.tensor([where.index]))
    monkeypatch.setattr(
        torch.cuda, "get_rng_state_all", lambda: [torch.tensor([i]) for i in range(4)]
    )
    tensors, state = rng_state(device=torch.device("cuda", 3))
    assert (int(tensors["cuda/0"]), state["cuda_devices"], state["one_device"]) == (3, 1, True)
    tensors, state = rng_state(device=torch.device("cpu"))
    assert [int(tensors[f"cuda/{i}"]) for i in range(4)] == [0, 1, 2, 3]
    assert "one_device" not in state


def test_tied_weights_are_stored_once_and_stay_tied(tmp_path: Path) -> None:
    net, other = Net(0), Net(1)
    tensors, aliases = module_tensors(net)
    assert aliases == {"head.weight": "embed.weight"}
    assert "head.weight" not in tensors
    place = other.embed.weight.data_ptr()
    file, saved = through_disk(tmp_path, tensors, aliases)
    load_module_tensors(other, file, saved)
    assert other.head.weight is other.embed.weight
    assert other.embed.weight.data_ptr() == place, "loading must not replace storage"
    assert_same_bits(dict(other.state_dict()), dict(net.state_dict()))


def test_views_of_one_flat_buffer_are_not_ties(tmp_path: Path) -> None:
    flat = torch.arange(12.0)
    net = nn.Module()
    net.q = nn.Parameter(flat[:6].view(2, 3))
    net.k = nn.Parameter(flat[6:].view(2, 3))
    net.empty = nn.Parameter(flat[:0])
    net.also_empty = nn.Parameter(flat[:0])
    tensors, aliases = module_tensors(net)
    assert aliases == {}
    file, _ = through_disk(tmp_path, tensors, {})
    flat.zero_()
    load_module_tensors(net, file)
    assert torch.equal(flat, torch.arange(12.0)), "the views still share the buffer"


def test_weights_that_do_not_fit_are_listed() -> None:
    net = Net(0)
    tensors, aliases = module_tensors(net)
    before = net.norm.weight.detach().clone()
    cases: list[tuple[dict[str, Tensor], dict[str, str], str]] = [
        ({k: v for k, v in tensors.items() if k != "norm.weight"}, aliases, "1 missing.*norm.wei"),
        ({**tensors, "ghost": torch.ones(1)}, aliases, "1 unexpected.*ghost"),
        ({**tensors, "norm.weight": torch.ones(8)}, aliases, r"float32\[8\], model float32\[7\]"),
        ({**tensors, "norm.weight": torch.ones(7).half()}, aliases, "norm.weight: saved float16"),
        (tensors, {"head.weight": "ghost"}, "alias of nothing"),
        ({**tensors, "head.weight": torch.zeros(7, 5)}, {}, "tied in the model but not equal"),
    ]
    for bad, alias, message in cases:
        with pytest.raises(CheckpointError, match=message) as caught:
            load_module_tensors(net, bad, alias)
        assert caught.value.code == "RF8007"
        assert torch.equal(net.norm.weight, before)


def test_equal_copies_may_fill_tied_weights() -> None:
    net = Net(0)
    tensors, _ = module_tensors(net)
    copies = {name: tensor.clone() for name, tensor in tensors.items()}
    copies["head.weight"] = copies["embed.weight"].clone()
    other = Net(1)
    load_module_tensors(other, copies)
    assert_same_bits(dict(other.state_dict()), dict(net.state_dict()))
