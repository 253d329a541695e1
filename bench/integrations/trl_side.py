"""One side of `bench_trl_runs`: a GRPO or RLOO run of TRL's that takes a step when told to.

    python -m bench.integrations.trl_side CASE_JSON

The turn begins where TRL begins an optimizer step, with generation, and ends where it ends.
"""

from __future__ import annotations

import json
import random
import sys
import tempfile
from dataclasses import asdict, dataclass
from typing import Any

import datasets
import torch
from transformers import LlamaConfig, LlamaForCausalLM, TrainerCallback

from ..distributed.bench_step import build_tokenizer
from ..ppo import resident
from ..ppo.meter import Meter
from ..ppo.side import Turns

SIDES = ("theirs", "logprobs", "ours")
MOST_STEPS = 1_000_000  # the parent says when it is enough


@dataclass(frozen=True)
class Case:
    """What is trained, and with how much of ours: nothing, the log-probs, the generator as well."""

    side: str
    kind: str = "GRPO"
    threads: int = 2
    hidden: int = 256
    layers: int = 4
    vocab: int = 8000
    prompts: int = 4
    generations: int = 8
    prompt_tokens: int = 32
    completion_tokens: int = 64

    def to_json(self) -> str:
        """For `from_json` in another process."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Case:
        """A case from `to_json`."""
        return cls(**json.loads(text))


class InTurns(TrainerCallback):
    """Waits for a turn before each optimizer step, and says after it what it took."""

    def __init__(self, turns: Turns, meter: Meter) -> None:
        self.turns = turns
        self.meter = meter
        self.lengths: list[int] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Wait; without a further turn the process is done."""
        if not self.turns.wait():
            raise SystemExit
        self.lengths.clear()
        self.meter.begin()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Tell the figures."""
        self.turns.tell(self.meter.end() | {"tokens": sum(self.lengths)})

    def reward(self, completion_ids: list[list[int]], **_: Any) -> list[float]:
        """The share of even tokens."""
        self.lengths += [len(ids) for ids in completion_ids]
        return [sum(i % 2 == 0 for i in ids) / len(ids) for ids in completion_ids]


def build(case: Case, callback: InTurns, folder: str) -> Any:
    """The trainer, on as much of ours as the case says."""
    import trl

    tokenizer = build_tokenizer(case.vocab)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=case.vocab,
        hidden_size=case.hidden,
        intermediate_size=4 * case.hidden,
        num_hidden_layers=case.layers,
        num_attention_heads=8,
        num_key_value_heads=8,
        max_position_embeddings=case.prompt_tokens + case.completion_tokens,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    draw = random.Random(0)
    prompts = [
        " ".join(f"w{draw.randrange(4, case.vocab)}" for _ in range(case.prompt_tokens))
        for _ in range(8 * case.prompts)
    ]
    args = getattr(trl, f"{case.kind}Config")(
        output_dir=folder,
        per_device_train_batch_size=case.prompts * case.generations,
        num_generations=case.generations,
        max_completion_length=case.completion_tokens,
        max_steps=MOST_STEPS,
        beta=0.0,
        bf16=False,
        gradient_checkpointing=False,
        use_cpu=True,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
    )
    return getattr(trl, f"{case.kind}Trainer")(
        model=LlamaForCausalLM(config),
        reward_funcs=callback.reward,
        args=args,
        train_dataset=datasets.Dataset.from_dict({"prompt": prompts}),
        processing_class=tokenizer,
        callbacks=[callback],
    )


def main() -> None:
    """Build the trainer, say so, and step when told to."""
    turns = Turns()
    case = Case.from_json(sys.argv[1])
    torch.set_num_threads(case.threads)
    meter = Meter(0)
    callback = InTurns(turns, meter)
    with tempfile.TemporaryDirectory() as folder:
        trainer = build(case, callback, folder)
        if case.side != "theirs":
            from rlhf_fast.integrations import trl as adapter

            adapter.install()
        if case.side == "ours":
            from rlhf_fast.integrations import trl_rollout

            trl_rollout.attach(trainer)
        meter.base = resident.resident()
        turns.tell({"ready": case.side})
        trainer.train()


if __name__ == "__main__":
    main()
