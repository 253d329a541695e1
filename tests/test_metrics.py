"""Metrics: valid JSON lines, exact truncation on resume, sinks that may fail, secrets that may not
leak."""

from __future__ import annotations

import builtins
import json
import logging
import os
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rlhf_fast.errors import ConfigError, EnvironmentFault
from rlhf_fast.metrics import METRICS_NAME, REDACTED, MetricLogger, read_metrics, redact


def lines(path: Path) -> list[dict[str, Any]]:
    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    text = (path / METRICS_NAME).read_text()
    return [json.loads(line, parse_constant=refuse) for line in text.splitlines()]


def test_one_valid_object_per_line_at_once(tmp_path: Path) -> None:
    with MetricLogger(tmp_path) as logger:
        values = {
            "loss": torch.tensor(0.1),
            "kl": np.float64(0.1),
            "count": np.int64(3),
            "flag": True,
            "missing": None,
            "nan": float("nan"),
            "inf": torch.tensor([float("inf")]),
            "low": -np.inf,
            "größe": 5,
        }
        logger.log(1, values)
        assert lines(tmp_path) == [
            {
                "step": 1,
                "loss": torch.tensor(0.1).item(),
                "kl": 0.1,
                "count": 3,
                "flag": True,
                "missing": None,
                "nan": "nan",
                "inf": "inf",
                "low": "-inf",
                "größe": 5,
            }
        ]
        back = read_metrics(tmp_path)[0]
        assert back["inf"] == float("inf")
        assert back["low"] == -float("inf")
        assert back["nan"] != back["nan"]


@pytest.mark.parametrize("value", ["text", [1.0], torch.zeros(2), {}, np.zeros(3)])
def test_what_is_not_a_number_is_refused(tmp_path: Path, value: object) -> None:
    with MetricLogger(tmp_path) as logger:
        with pytest.raises(TypeError, match="'bad'"):
            logger.log(1, {"bad": value})
        assert lines(tmp_path) == []


def test_a_resumed_file_equals_the_uninterrupted_one(tmp_path: Path) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    for path in (whole, broken):
        path.mkdir()
    with MetricLogger(whole) as logger:
        for step in range(10):
            logger.log(step, {"loss": 1 / (step + 1), "time/step": 0.1})
    logger = MetricLogger(broken)
    for step in range(7):
        logger.log(step, {"loss": 1 / (step + 1), "time/step": 0.2})
        if step == 3:
            position = logger.position()
    os.write(logger._descriptor, b'{"step": 7, "lo')  # killed in the middle of a line
    logger.close()

    with MetricLogger(broken, resume_step=4) as logger:
        assert lines(broken)[-1]["step"] == 6, "the half line is gone"
        logger.truncate(position)
        for step in range(4, 10):
            logger.log(step, {"loss": 1 / (step + 1), "time/step": 0.3})

    def untimed(path: Path) -> list[dict[str, Any]]:
        return [{k: v for k, v in r.items() if not k.startswith("time/")} for r in lines(path)]

    assert untimed(broken) == untimed(whole)


@pytest.mark.parametrize("offset", [-1, 3, 10_000])
def test_odd_positions_keep_whole_lines(
    tmp_path: Path, offset: int, caplog: pytest.LogCaptureFixture
) -> None:
    with MetricLogger(tmp_path) as logger:
        logger.log(0, {"a": 1})
        position = logger.position()
        logger.log(1, {"a": 2})
        logger.truncate(position + offset)
        logger.log(9, {"a": 3})
    assert [r["step"] for r in lines(tmp_path)] == {-1: [9], 3: [0, 9], 10_000: [0, 1, 9]}[offset]
    assert ("earlier lines are missing" in caplog.text) == (offset == 10_000)


def test_reading_tolerates_only_a_cut_last_line(tmp_path: Path) -> None:
    path = tmp_path / METRICS_NAME
    path.write_text('{"step": 1}\n{"st')
    assert read_metrics(path) == [{"step": 1}]
    path.write_text('{"step": 1}\nnonsense\n{"step": 2}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl:2"):
        read_metrics(path)
    path.write_text("[]\n")
    with pytest.raises(ValueError, match=":1: not a JSON object"):
        read_metrics(path)


def test_a_full_disk_is_one_warning_and_no_half_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    write = os.write
    with MetricLogger(tmp_path) as logger:
        logger.log(0, {"a": 1})

        def full(descriptor: int, data: bytes) -> int:
            if len(data) > 4:
                return write(descriptor, data[:4])
            raise OSError(28, "No space left on device")

        with monkeypatch.context() as patch:
            patch.setattr(os, "write", full)
            logger.log(1, {"a": 1})
            logger.log(2, {"a": 1})
        logger.log(3, {"a": 1})
    assert [record["step"] for record in lines(tmp_path)] == [0, 3]
    assert caplog.text.count("No space left") == 1


def test_unknown_sink_and_unwritable_place(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"RF1701.*'wanbd'"):
        MetricLogger(tmp_path, ["wanbd"])
    with pytest.raises(EnvironmentFault, match="RF7105"):
        MetricLogger(tmp_path / "absent")


@pytest.mark.parametrize("name", ["tensorboard", "wandb", "trackio"])
def test_a_sink_that_is_not_installed_names_the_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    real = builtins.__import__

    def absent(module: str, *args: Any, **options: Any) -> Any:
        if module.split(".")[0] == name:
            raise ModuleNotFoundError(f"No module named {name!r}")
        return real(module, *args, **options)

    for loaded in list(sys.modules):
        if loaded.split(".")[0] == name or loaded.startswith("torch.utils.tensorboard"):
            monkeypatch.delitem(sys.modules, loaded)
    monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setattr(builtins, "__import__", absent)
    with pytest.raises(EnvironmentFault, match=r"rlhf-fast\[loggers\]") as caught:
        MetricLogger(tmp_path, [name])
    assert name in caught.value.what
    assert caught.value.code == "RF7104"


class FakeTracker(types.ModuleType):
    """Stands in for W&B and Trackio: `init` gives a run that fails when told to."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.options: dict[str, Any] = {}
        self.logged: list[tuple[int, dict[str, float]]] = []
        self.broken = False
        self.finished = 0

    def init(self, **options: Any) -> FakeTracker:
        if self.broken:
            raise RuntimeError("no account")
        self.options = options
        return self

    def log(self, metrics: dict[str, float], step: int) -> None:
        if self.broken:
            raise ConnectionError("offline")
        self.logged.append((step, metrics))

    def finish(self) -> None:
        self.finished += 1
        if self.broken:
            raise ConnectionError("offline")


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_a_sink_that_fails_later_is_one_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    fake = FakeTracker(name)
    monkeypatch.setitem(sys.modules, name, fake)
    config = {"lr": 1e-5, "hub_token": "hf_abcdefghijklmnopqrst"}
    with MetricLogger(tmp_path, [name], config=config) as logger:
        logger.log(1, {"a": 1, "none": None})
        fake.broken = True
        with caplog.at_level(logging.WARNING):
            for step in range(2, 6):
                logger.log(step, {"a": 1})
    assert fake.logged == [(1, {"a": 1.0})]
    assert caplog.text.count("offline") == 1
    assert [record["step"] for record in lines(tmp_path)] == [1, 2, 3, 4, 5]
    assert fake.options["config"] == {"lr": 1e-5, "hub_token": REDACTED}


def test_a_sink_that_does_not_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeTracker("wandb")
    fake.broken = True
    monkeypatch.setitem(sys.modules, "wandb", fake)
    with pytest.raises(EnvironmentFault, match="no account"):
        MetricLogger(tmp_path, ["wandb"])


def test_wandb_keeps_its_run_over_a_resume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeTracker("wandb")
    monkeypatch.setitem(sys.modules, "wandb", fake)
    names = []
    for resume_step in (None, 5, None):
        MetricLogger(tmp_path, ["wandb"], resume_step=resume_step).close()
        names.append(fake.options["id"])
    assert names[0] == names[1] != names[2]
    assert fake.finished == 3


def test_tensorboard_writes_events(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing import event_accumulator

    with MetricLogger(tmp_path, ["tensorboard"], config={"lr": 1.0}) as logger:
        for step in range(6):
            logger.log(step, {"loss": step / 4})
    with MetricLogger(tmp_path, ["tensorboard"], resume_step=2) as logger:
        logger.log(3, {"loss": 7.0})
    events = event_accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [
        (0, 0.0),
        (1, 0.25),
        (2, 0.5),
        (3, 7.0),
    ]


@pytest.mark.parametrize(
    "key",
    [
        *("token", "hub_token", "HF_TOKEN", "wandbApiKey", "api_key", "api-key", "apikey"),
        *("client_secret", "password", "db.password", "aws_access_key_id", "ssh_private_key"),
        "credentials",
    ],
)
def test_secret_keys_are_redacted(key: str) -> None:
    config = {"model": {key: "value", "list": [{key: ["value"]}]}, "tuple": ({key: "value"},)}
    assert "value" not in repr(redact(config))
    assert config["model"][key] == "value", "the original is untouched"  # type: ignore[index]


def test_ordinary_keys_are_kept() -> None:
    config = {
        "tokenizer": "path",
        "pad_token": "<pad>",
        "eos_token": "<eos>",
        "missing_eos_token": "x",
        "max_new_tokens": 12,
        "tokens_per_microbatch": 4096,
        "token": None,
        "password": "",
        "key": "column",
        "nested": [1, (2.5, "text"), None],
    }
    assert redact(config) == config


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("use hf_abcdefghijklmnopqrstuv here", "use [redacted] here"),
        ("sk-ant-0123456789abcdefghij", "[redacted]"),
        ("https://user:pass@host/path", "https://[redacted]@host/path"),
        ("https://host/path@2", "https://host/path@2"),
        ("hf_short", "hf_short"),
    ],
)
def test_secret_values_are_redacted_under_any_key(text: str, kept: str) -> None:
    assert redact({"a": text})["a"] == kept
