"""Tiny model directories, data files and comparisons of runs for the stage tests."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from rlhf_fast.distributed import load
from rlhf_fast.stages.run import Run
from tests.models.tiny import build, tokenizer

UNSTEADY = ("rollout/tokens_per_second", "rollout/peak_kv_use")
WORDS = [f"w{i}" for i in range(4, 37)]


def model_directory(path: Path, model_type: str = "llama", **overrides: Any) -> Path:
    """A saved tiny causal LM with its tokenizer."""
    build(model_type, **overrides).save_pretrained(path)
    tokenizer().save_pretrained(path)
    return path


def write_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def demonstrations(count: int, seed: int = 0) -> list[dict[str, str]]:
    """Prompts of one to six words, answered by the last of them once, twice or three times."""
    draw = random.Random(seed)
    rows = []
    for _ in range(count):
        prompt = [draw.choice(WORDS) for _ in range(draw.randint(1, 6))]
        answer = [prompt[-1]] * draw.randint(1, 3)
        rows.append({"prompt": " ".join(prompt), "completion": " " + " ".join(answer)})
    return rows


def ranked(
    count: int, completions: int, seed: int = 0, noise: bool = False
) -> list[dict[str, Any]]:
    """Ranked rows: the completion with more `w4` is better; with `noise` the order is a draw."""
    draw = random.Random(seed)
    rows = []
    for i in range(count):
        prompt = " ".join(draw.choice(WORDS) for _ in range(3)) + f" {WORDS[i % len(WORDS)]}"
        good = sorted(draw.sample(range(7), completions), reverse=True)
        texts = [
            " " + " ".join(["w4"] * n + [draw.choice(WORDS[1:]) for _ in range(6 - n)])
            for n in good
        ]
        if noise:
            draw.shuffle(texts)
        rows.append({"prompt": prompt, "completions": texts})
    return rows


def as_pairs(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    """Best and worst completion of each ranked row."""
    return [
        {"prompt": r["prompt"], "chosen": r["completions"][0], "rejected": r["completions"][-1]}
        for r in rows
    ]


def metric_lines(directory: str | Path) -> list[dict[str, Any]]:
    """metrics.jsonl without what depends on the clock, or on pages that an earlier step left."""
    lines = (Path(directory) / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [
        {k: v for k, v in json.loads(line).items() if not (k.startswith("time/") or k in UNSTEADY)}
        for line in lines
    ]


def checkpoint_contents(directory: str | Path) -> tuple[dict[str, dict[str, Tensor]], Any]:
    """Every tensor of the newest checkpoint, and its plain values less what depends on the clock.

    The length of metrics.jsonl does: seconds are printed with as many digits as they have.
    """
    found = load(Path(directory) / "checkpoints")
    tensors = {name: {k: file[k].clone() for k in file} for name, file in found.tensors.items()}
    state = dict(found.state)
    state.pop("metrics_position")
    return tensors, state


def exported(directory: str | Path) -> dict[str, Tensor]:
    weights: dict[str, Tensor] = load_file(Path(directory) / "model" / "model.safetensors")
    return weights


def stop_after(monkeypatch: Any, polls: int) -> None:
    """Let the run see SIGTERM at the `polls`-th safe point that asks."""
    import signal

    seen = {"polls": 0}
    original = Run.should_stop

    def should_stop(run: Run) -> bool:
        seen["polls"] += 1
        if seen["polls"] == polls:
            run._signals.received = signal.SIGTERM
        return original(run)

    monkeypatch.setattr(Run, "should_stop", should_stop)
