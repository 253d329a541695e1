"""The memory of a few PPO steps in one mode: what is held, what was predicted, what the peak was.

    python -m bench.ppo.memory_step MODE CASE_JSON [cuda]   # a child of bench_memory

Modes:

    naive    four whole models, resident, Adam in fp32: what a trainer without a plan holds
    full     full fine-tuning with all that saves memory: frozen models read a layer at a time from
             host memory, moments of 8 bits that leave the device while no step is taken
    shared   one frozen trunk, LoRA adapters of actor and critic, the bare trunk as reference
"""

from __future__ import annotations

import sys
import tempfile
from dataclasses import replace
from typing import Any

import torch

from rlhf_fast.config import LoraConfig, MemoryConfig, PPOConfig
from rlhf_fast.data import collate_prompts
from rlhf_fast.engine.memory_ledger import PHASES
from rlhf_fast.stages.memory_report import MemoryReport
from rlhf_fast.stages.ppo import PPOTrainer
from rlhf_fast.types import PromptBatch

from ..distributed.bench_step import build_tokenizer
from . import resident
from .case import Case, build_models, warm_libraries
from .meter import REST, Meter
from .our_step import prompt_rows, settings
from .side import Turns

MODES: dict[str, dict[str, Any]] = {
    "naive": {},
    "full": {
        "memory": MemoryConfig(
            reference="offload",
            reward_model="offload",
            optimizer_state="offload",
            optimizer="adamw8bit",
        )
    },
    "shared": {"lora": LoraConfig(rank=8)},
}
STEPS = 2


def config_of(mode: str, case: Case, folder: str, device: str) -> PPOConfig:
    """The config of `our_step` in a mode."""
    config = replace(settings(case, folder), **MODES[mode])
    return replace(config, run=replace(config.run, device=device), total_steps=STEPS)


def build(mode: str, case: Case, folder: str, device: str) -> PPOTrainer:
    """The trainer of a mode; the shared trunk brings its own reference and critic."""
    models, tokenizer = build_models(case), build_tokenizer(case.vocab)
    own = {} if mode == "shared" else {"reference": models.reference, "critic": models.critic}
    return PPOTrainer(
        config_of(mode, case, folder, device),
        model=models.policy,
        reward_model=models.reward,
        reward_tokenizer=tokenizer,
        tokenizer=tokenizer,
        train_dataset=prompt_rows(case),
        quiet=True,
        **own,
    )


def rows_of(report: MemoryReport) -> list[dict[str, Any]]:
    """Every slot of every phase, in bytes."""
    return [
        {"phase": phase, **slot._asdict(), "predicted": predicted, "held": held}
        for phase, slot, predicted, held in report.rows()
    ]


def measure(mode: str, case: Case, device: str) -> dict[str, Any]:
    """Run the steps."""
    warm_libraries()
    before = resident.resident()
    with tempfile.TemporaryDirectory() as folder:
        trainer = build(mode, case, folder, device)
        trainer.watch_memory()
        meter = Meter(before)
        watched = trainer.memory_watch
        assert watched is not None
        trainer.learner.phase = watched.around(meter.phase)
        meter.begin()
        for _ in range(STEPS):
            trainer.learner.step(prompt_batch(trainer))
        peaks = meter.end()["extra_bytes"]
        report = trainer.memory_report()
    peaks.pop(REST)
    return {
        "mode": mode,
        "rows": rows_of(report),
        "worst": report.worst(),
        "predicted_peak": {p: report.plan.device(p) + report.plan.host(p) for p in PHASES},
        "resident_peak": peaks,
        "allocated_peak": dict(report.allocated),
    }


def prompt_batch(trainer: PPOTrainer) -> PromptBatch:
    """The prompts of the next step."""
    return collate_prompts([trainer.data[i] for i in trainer.sampler.next_batch()])


def main() -> None:
    """Measure one mode and answer once."""
    turns = Turns()
    mode, case = sys.argv[1], Case.from_json(sys.argv[2])
    torch.set_num_threads(case.threads)
    turns.tell(measure(mode, case, sys.argv[3] if len(sys.argv) > 3 else "cpu"))


if __name__ == "__main__":
    main()
