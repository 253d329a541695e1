"""What the training stages share: set-up, run directories, and the state in a checkpoint."""

from __future__ import annotations

import contextlib
import dataclasses
import random
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from rlhf_fast.config import OptimConfig, PPOConfig, RunConfig, SFTConfig
from rlhf_fast.data import EpochSampler
from rlhf_fast.errors import CheckpointError, ConfigError, EnvironmentFault
from rlhf_fast.metrics import MetricLogger, read_metrics
from rlhf_fast.optim import GuardedOptimizer
from rlhf_fast.stages.device_choice import choose_device
from rlhf_fast.stages.messages import say
from rlhf_fast.stages.training import (
    TrainingState,
    export_bytes,
    load_training_state,
    open_run,
    require_settings,
    save_training_state,
    setup_run,
    steps_of,
    training_bytes,
)


def sft_config(out: Path, **changes: object) -> SFTConfig:
    return dataclasses.replace(SFTConfig(run=RunConfig(output_dir=str(out))), **changes)


def build_state(folder: Path, seed: int) -> TrainingState:
    torch.manual_seed(seed)
    module = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4, bias=False))
    module[1].weight = module[0].weight  # tied
    optimizer = GuardedOptimizer(module, OptimConfig(lr=0.1), 20)
    sampler = EpochSampler(10, 3, seed=7, drop_last=False)
    return TrainingState(
        {"m": module}, {"m": optimizer}, {"train": sampler}, MetricLogger(folder), extra={"a": (1,)}
    )


def advance(state: TrainingState, steps: int) -> None:
    """Steps that draw from every generator and from the data."""
    for _ in range(steps):
        batch = state.samplers["train"].next_batch()
        noise = torch.randn(4) + random.random() + np.random.rand()  # noqa: NPY002
        loss = (state.modules["m"](noise * len(batch)) * sum(batch)).sum()
        loss.backward()
        state.optimizers["m"].step()
        state.step += 1
        state.metrics.log(state.step, {"loss": float(loss.detach())})


def test_state_comes_back_to_the_bit(tmp_path: Path) -> None:
    config = sft_config(tmp_path)
    with open_run(config, "sft", quiet=True) as run:
        setup_run(config.run)
        state = build_state(tmp_path, seed=1)
        load_training_state(run.checkpoint, state)
        advance(state, 4)
        state.optimizers["m"].bad_steps = 2
        save_training_state(run, state)
        advance(state, 5)
        want = read_metrics(tmp_path)
        weights = {k: v.clone() for k, v in state.modules["m"].state_dict().items()}
        lr, order = state.optimizers["m"].lr, state.samplers["train"].state_dict()
        state.metrics.close()
    with open_run(config, "sft", quiet=True) as run:
        again = build_state(tmp_path, seed=99)
        again.extra = {}
        load_training_state(run.checkpoint, again)
        assert again.step == 4
        assert again.extra == {"a": (1,)}
        assert again.optimizers["m"].bad_steps == 2
        again.optimizers["m"].bad_steps = 0
        assert len(read_metrics(tmp_path)) == 4
        advance(again, 5)
        assert read_metrics(tmp_path) == want
        for name, tensor in again.modules["m"].state_dict().items():
            assert torch.equal(tensor, weights[name]), name
        assert again.modules["m"][0].weight is again.modules["m"][1].weight
        assert again.optimizers["m"].lr == lr
        assert again.samplers["train"].state_dict() == order
        again.metrics.close()


def test_killed_after_going_back_a_run_goes_on_from_where_it_went(tmp_path: Path) -> None:
    config = sft_config(tmp_path)
    with open_run(config, "sft", quiet=True) as run:
        state = build_state(tmp_path, seed=1)
        for step in (2, 4, 6):
            advance(state, 2)
            assert state.step == step
            save_training_state(run, state)
        want = read_metrics(tmp_path)
        state.metrics.close()
    back = dataclasses.replace(config, run=dataclasses.replace(config.run, resume_step=4))
    with open_run(back, "sft", quiet=True) as run:
        state = build_state(tmp_path, seed=2)
        load_training_state(run.checkpoint, state)
        assert read_metrics(tmp_path) == want[:4]
        state.metrics.log(5, {"loss": 99.0})  # of the new branch; killed before its next save
        state.metrics.close()
    with open_run(config, "sft", quiet=True) as run:
        assert run.checkpoint is not None
        assert run.checkpoint.step == 4
        state = build_state(tmp_path, seed=3)
        load_training_state(run.checkpoint, state)
        assert read_metrics(tmp_path) == want[:4]
        advance(state, 2)
        assert read_metrics(tmp_path) == want
        state.metrics.close()


def test_a_resumed_run_holds_no_file_of_its_checkpoint(tmp_path: Path) -> None:
    config = sft_config(tmp_path)
    with open_run(config, "sft", quiet=True) as run:
        state = build_state(tmp_path, seed=1)
        advance(state, 1)
        save_training_state(run, state)
        state.metrics.close()
    with open_run(config, "sft", quiet=True) as run:
        assert run.checkpoint is not None
        state = build_state(tmp_path, seed=2)
        load_training_state(run.checkpoint, state)
        place = str(run.checkpoint.path)
        assert place not in Path("/proc/self/maps").read_text(), "deleted, it would take room still"
        weight = run.checkpoint.tensors["m"]["0.weight"]
        assert torch.equal(weight, state.modules["m"][0].weight), "opened again when asked for"
        state.metrics.close()


def test_a_state_that_cannot_be_loaded_is_not_made_the_newest(tmp_path: Path) -> None:
    config = sft_config(tmp_path)
    with open_run(config, "sft", quiet=True) as run:
        state = build_state(tmp_path, seed=1)
        for _ in range(2):
            advance(state, 1)
            save_training_state(run, state)
        state.metrics.close()
    back = dataclasses.replace(config, run=dataclasses.replace(config.run, resume_step=1))
    with open_run(back, "sft", quiet=True) as run:
        state = build_state(tmp_path, seed=1)
        state.modules = {"m": nn.Linear(2, 2)}
        with pytest.raises(CheckpointError, match="RF8007"):
            load_training_state(run.checkpoint, state)
        state.metrics.close()
    assert len(read_metrics(tmp_path)) == 2
    with open_run(config, "sft", quiet=True) as run:
        assert run.checkpoint is not None
        assert run.checkpoint.step == 2


def test_the_beginning_empties_the_metric_log(tmp_path: Path) -> None:
    state = build_state(tmp_path, seed=1)
    state.metrics.log(1, {"loss": 1.0})
    load_training_state(None, state)
    assert read_metrics(tmp_path) == []
    state.metrics.close()


def test_hard_keys_may_not_change_and_soft_ones_may(tmp_path: Path) -> None:
    config = sft_config(tmp_path)
    with open_run(config, "sft", quiet=True):
        pass
    moved = dataclasses.replace(config.run, save_every=7, threads=1)
    with open_run(dataclasses.replace(config, run=moved, packing=False), "sft", quiet=True) as run:
        assert any("packing" in notice for notice in run.notices)
        assert not any("threads" in notice for notice in run.notices)
    for changed in (
        dataclasses.replace(config, batch_size=3),
        dataclasses.replace(config, run=dataclasses.replace(config.run, seed=5)),
        dataclasses.replace(config, optim=OptimConfig(lr=1.0)),
    ):
        with pytest.raises(CheckpointError, match="RF8202"), open_run(changed, "sft", quiet=True):
            pass
    with pytest.raises(CheckpointError, match="RF8202"), open_run(config, "ppo", quiet=True):
        pass


def test_samples_side_by_side_may_change_and_samples_may_not(tmp_path: Path) -> None:
    config = PPOConfig(run=RunConfig(output_dir=str(tmp_path)))
    with open_run(config, "ppo", quiet=True):
        pass
    narrow = dataclasses.replace(config.rollout, max_batch=8)
    with open_run(dataclasses.replace(config, rollout=narrow), "ppo", quiet=True) as run:
        assert any("rollout.max_batch: 256 -> 8" in notice for notice in run.notices)
    for other in ({"prompts": 8}, {"samples_per_prompt": 2}):
        changed = dataclasses.replace(config.rollout, **other)
        with (
            pytest.raises(CheckpointError, match="RF8202"),
            open_run(dataclasses.replace(config, rollout=changed), "ppo", quiet=True),
        ):
            pass


def test_a_run_directory_in_the_home_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    config = sft_config(Path("~/runs/sft"))
    with open_run(config, "sft", quiet=True) as run:
        assert run.path == tmp_path / "home" / "runs" / "sft"
    with open_run(config, "sft", quiet=True):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["home"]


def test_resume_off_and_overwrite(tmp_path: Path) -> None:
    config = sft_config(tmp_path)
    with open_run(config, "sft", quiet=True):
        pass
    off = dataclasses.replace(config, run=dataclasses.replace(config.run, resume="never"))
    with pytest.raises(CheckpointError, match="RF8203"), open_run(off, "sft", quiet=True):
        pass
    always = dataclasses.replace(config.run, resume="always", output_dir=str(tmp_path / "none"))
    with (
        pytest.raises(CheckpointError, match="RF8204"),
        open_run(dataclasses.replace(config, run=always), "sft", quiet=True),
    ):
        pass
    (tmp_path / "model").mkdir()
    for resume in ("auto", "never"):
        fresh = dataclasses.replace(config.run, overwrite=True, resume=resume, seed=9)
        with open_run(dataclasses.replace(config, run=fresh), "sft", quiet=True) as run:
            assert run.checkpoint is None
            assert not (tmp_path / "model").exists()


def test_device_and_its_mistakes() -> None:
    assert choose_device(RunConfig(device="cpu")) == torch.device("cpu")
    auto = choose_device(RunConfig(device="auto"))
    assert auto.type == ("cuda" if torch.cuda.is_available() else "cpu")
    with pytest.raises(ConfigError, match="RF1030"):
        choose_device(RunConfig(device="gpu"))
    with pytest.raises(EnvironmentFault, match="RF7030") as caught:
        choose_device(RunConfig(device="cuda:99"))
    assert caught.value.exit_code == 3


def test_bfloat16_is_asked_of_the_gpu_of_the_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    """An older GPU can hold a bf16 tensor, which PyTorch counts unless asked not to."""
    current = [0]

    @contextlib.contextmanager
    def on(device: torch.device) -> Iterator[None]:
        current.append(device.index)
        yield
        current.pop()

    def supported(including_emulation: bool = True) -> bool:
        return including_emulation or current[-1] == 1

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "device", on)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", supported)
    monkeypatch.setenv("WORLD_SIZE", "2")
    config = RunConfig(device="cuda", dtype="bfloat16")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert choose_device(config) == torch.device("cuda", 1)
    monkeypatch.setenv("LOCAL_RANK", "0")
    with pytest.raises(EnvironmentFault, match="RF7031"):
        choose_device(config)


def test_set_up_seeds_every_generator_and_sets_threads() -> None:
    threads = torch.get_num_threads()
    try:
        draws = []
        for _ in range(2):
            setup_run(RunConfig(seed=3, threads=1, device="cpu"))
            draws.append((random.random(), np.random.rand(), float(torch.rand(()))))  # noqa: NPY002
            assert torch.get_num_threads() == 1
        assert draws[0] == draws[1]
        setup_run(RunConfig(seed=4, device="cpu"))
        assert random.random() != draws[0][0]
    finally:
        torch.set_num_threads(threads)


def test_a_gpu_that_is_named_becomes_the_current_one(monkeypatch: pytest.MonkeyPatch) -> None:
    current: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    for name in ("cuda:1", "cuda", "cpu"):
        assert setup_run(RunConfig(device=name)) == torch.device(name)
    assert current == [torch.device("cuda:1")]


def test_required_settings_are_listed_at_once() -> None:
    with pytest.raises(ConfigError, match=r"2 required settings[^$]*actor, run\.output_dir"):
        require_settings(PPOConfig(total_steps=1), "actor", "run.output_dir", "total_steps")
    require_settings(PPOConfig(actor="x"), "actor")


def test_steps_by_epochs_or_by_number() -> None:
    sampler = EpochSampler(10, 4, seed=1, drop_last=False)
    assert steps_of(2, 0, sampler) == 5
    assert steps_of(2, 7, sampler) == 7
    # 65 rows three times over are 195 rows: six batches of 64 would be nearly six passes.
    assert steps_of(3, 0, EpochSampler(65, 64, seed=1, drop_last=False)) == 4


def test_space_is_estimated_from_the_weights_that_the_config_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "model.safetensors").write_bytes(bytes(1000))
    monkeypatch.setenv("HOME", str(tmp_path.parent))
    monkeypatch.chdir(tmp_path)
    assert export_bytes(f"~/{tmp_path.name}") == 1000
    assert export_bytes("") == 0, "weights in the working directory are not those in memory"


def test_space_is_estimated_from_the_weights(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"x" * 1000)
    assert training_bytes(tmp_path, keep_last=2) == 10 * 1000
    assert training_bytes("owner/name", keep_last=2) == 0


def test_lines_are_printed_without_control_characters(
    capsys: pytest.CaptureFixture[str],
) -> None:
    say(["plain", "red \x1b[31mtext\x07"])
    assert capsys.readouterr().out == "plain\nred text\n"
