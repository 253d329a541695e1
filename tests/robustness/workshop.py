"""Tiny sound inputs of every stage, to be damaged by a test, and the commands to run on them."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from torch import Tensor

from rlhf_fast.cli import main
from tests.models.tiny import build, build_classifier, tokenizer
from tests.stages.tiny_runs import demonstrations, ranked, write_rows

REWARD = """
def score(completions, **columns):
    return [float(len(text)) for text in completions]
"""
SMALL = {
    "sft": ["max_steps=2", "batch_size=4", "microbatch_tokens=256", "optim.lr=0.01"],
    "rm": ["max_steps=2", "batch_size=4", "microbatch_tokens=512", "eval_fraction=0.25"],
    "ppo": [
        *("total_steps=2", "rollout.prompts=4", "sampling.max_new_tokens=5", "sample_every=1"),
        *("microbatch_tokens=256", "algorithm.ppo_epochs=1", "data.max_prompt_length=16"),
        *("actor_optim.lr=0.01", "critic_optim.lr=0.01"),
    ],
    "eval": ["max_prompts=4", "sampling.max_new_tokens=5", "microbatch_tokens=256"],
}


def build_inputs(folder: Path) -> None:
    """A policy, a reward model, a reward function and one data file a stage."""
    for name, module in (("policy", build()), ("judge", build_classifier())):
        module.save_pretrained(folder / name)
        tokenizer().save_pretrained(folder / name)
    rows = demonstrations(12)
    write_rows(folder / "demonstrations.jsonl", rows)
    write_rows(folder / "ranked.jsonl", ranked(12, 2))
    write_rows(folder / "prompts.jsonl", [{"prompt": row["prompt"]} for row in rows])
    (folder / "reward.py").write_text(REWARD, encoding="utf-8")


@dataclass(frozen=True)
class Outcome:
    """What a command left: exit code, both streams."""

    code: int
    out: str
    err: str

    @property
    def message(self) -> str:
        """The error: from the last `RFxxxx: ` at the start of a line to the end."""
        starts = [m.start() for m in re.finditer(r"^RF\d{4}: ", self.err, re.MULTILINE)]
        return self.err[starts[-1] :] if starts else ""


class Workshop:
    """One test's own copy of the inputs.

    Attributes:
        path: holds `policy`, `judge`, `reward.py` and the data files.
        out: output directory of the commands, not made yet.
    """

    def __init__(self, inputs: Path, path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        shutil.copytree(inputs, path)
        self.path = path
        self.out = path / "out"
        self._capsys = capsys

    def arguments(self, stage: str, *changes: str) -> list[str]:
        """Overrides of a small sound run of a stage, then `changes`."""
        p = self.path
        sources = {
            "sft": [f"model={p}/policy", f"data.train={p}/demonstrations.jsonl"],
            "rm": [f"model={p}/policy", f"data.train={p}/ranked.jsonl"],
            "ppo": [
                *(f"actor={p}/policy", f"reward.model={p}/judge"),
                f"data.train={p}/prompts.jsonl",
            ],
            "eval": [
                *(f"model={p}/policy", f"reference={p}/policy", f"reward.model={p}/judge"),
                f"data.eval={p}/prompts.jsonl",
            ],
        }
        common = [f"run.output_dir={self.out}", "run.device=cpu", "data.max_length=48"]
        if stage != "eval":
            common.append("run.save_every=1")
        return [*sources[stage], *common, *SMALL[stage], *changes]

    def run(self, stage: str, *changes: str) -> Outcome:
        """`rlhf-fast STAGE` in this process."""
        return self.call(stage, *self.arguments(stage, *changes))

    def call(self, *words: str) -> Outcome:
        """`rlhf-fast WORDS` in this process."""
        self._capsys.readouterr()
        code = main(list(words))
        return Outcome(code, *self._capsys.readouterr())

    def write(self, name: str, content: str | bytes) -> Path:
        file = self.path / name
        file.write_bytes(content.encode("utf-8") if isinstance(content, str) else content)
        return file

    def rows(self, name: str, rows: Sequence[Mapping[str, Any]]) -> Path:
        return write_rows(self.path / name, rows)

    def edit_json(self, name: str, **values: Any) -> None:
        file = self.path / name
        file.write_text(json.dumps(json.loads(file.read_text()) | values), encoding="utf-8")

    def edit_weights(self, name: str, change: Callable[[dict[str, Tensor]], None]) -> None:
        """Rewrite `<name>/model.safetensors`."""
        file = self.path / name / "model.safetensors"
        weights = {key: tensor.clone() for key, tensor in load_file(file).items()}
        change(weights)
        save_file(weights, file, metadata={"format": "pt"})


def require_refused(outcome: Outcome, code: str, exit_code: int, *words: str) -> None:
    """One message with code, place and remedy; no traceback."""
    assert "Traceback" not in outcome.out + outcome.err
    assert outcome.message.startswith(f"{code}: "), outcome.err
    assert outcome.code == exit_code, outcome.err
    assert "\n  where: " in outcome.message, outcome.message
    assert "\n  to do: " in outcome.message, outcome.message
    missing = [word for word in words if word not in outcome.message]
    assert not missing, f"{missing} not in:\n{outcome.message}"


def digest(folder: Path) -> dict[str, str]:
    """Path -> SHA-256 of every file below `folder`; the lock file is no content."""
    return {
        str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(folder.rglob("*"))
        if file.is_file() and file.name != "run.lock"
    }
