"""A PPO step on several ranks: seconds and bytes received by phase, parameters held.

    python -m bench.distributed.bench_step --ranks 1,2,4 --views tp,gather,copies [--json FILE]
    torchrun --nproc-per-node 8 -m bench.distributed.bench_step --device cuda [--json FILE]

The first starts torchrun for every number of ranks; under a torchrun of one's own its world is
measured. Views: `tp` and `gather` are `distributed.weights` on models cut over all ranks, `copies`
is `distributed.replicas` of as many as there are ranks. One rank is `alone`, whatever the view.

Policy, reference and critic are Llamas with random weights, the reward is a function. Samples are
the same on any number of ranks. After a warm-up step, seconds are medians over `--steps` steps of
the slowest rank; ranks wait for each other before a phase. `received` is the mean over steps of the
rank that receives most, by the volume of the collectives (`bench/distributed/traffic.py`). Beside
the bytes of the parameters of the three models that a rank holds stands the formula: matrices and
vocabulary cut, vectors and the value head whole.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
)

from rlhf_fast.config import (
    AlgorithmConfig,
    PPOConfig,
    RewardConfig,
    RolloutConfig,
    RunConfig,
    SamplingConfig,
)
from rlhf_fast.config_distributed import DistributedConfig
from rlhf_fast.data import collate_prompts
from rlhf_fast.distributed.world import REPLICATE, SHARD, World
from rlhf_fast.engine.memory_held import held_bytes
from rlhf_fast.stages.ppo import PPOTrainer
from rlhf_fast.stages.ranks import joined

from ..choices import several
from ..kernels.environment import environment
from ..kernels.tables import print_environment
from .traffic import Traffic

PHASES = ("generate", "score", "prepare", "update")
VIEWS = ("tp", "gather", "copies")
DTYPES = {"fp32": "float32", "bf16": "bfloat16"}
WARMUPS = 1
HEADS = 4
PROMPT_TOKENS = 16


@dataclass(frozen=True)
class Row:
    """One world and view.

    Attributes:
        seconds: by phase, and of the whole step under `step`.
        samples: the same of each step.
        received: bytes by phase, of the rank that receives most.
        collectives: by phase, of that rank.
        ranks_received: bytes by phase, of each rank.
        tokens_per_second: sampled tokens of a step over its seconds.
        parameter_bytes: held by the rank that holds most.
        parameter_formula: what it should hold.
    """

    ranks: int
    view: str
    seconds: dict[str, float]
    samples: list[dict[str, float]]
    received: dict[str, float]
    collectives: dict[str, float]
    ranks_received: list[dict[str, float]]
    tokens_per_second: float
    parameter_bytes: int
    parameter_formula: int


class Meter:
    """Times phases and names them to the traffic."""

    def __init__(self, world: World, traffic: Traffic) -> None:
        self.world = world
        self.traffic = traffic
        self.seconds: dict[str, float] = {}

    def _settle(self) -> None:
        if self.world.device.type == "cuda":
            torch.cuda.synchronize()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """What runs inside, from the moment that all ranks are there."""
        self._settle()
        self.world.barrier()
        self.traffic.phase = name
        begin = time.perf_counter()
        try:
            yield
            self._settle()
        finally:
            self.seconds[name] = time.perf_counter() - begin
            self.traffic.phase = "other"


# ---- the run ------------------------------------------------------------------------------------


def build_tokenizer(vocab: int) -> PreTrainedTokenizerFast:
    words = {"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3} | {f"w{i}": i for i in range(4, vocab)}
    inner = Tokenizer(WordLevel(words, unk_token="<unk>"))
    inner.pre_tokenizer = WhitespaceSplit()  # type: ignore[assignment]
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
    )


def build_models(options: argparse.Namespace) -> tuple[nn.Module, nn.Module, nn.Module]:
    """Policy, reference and critic."""
    config = LlamaConfig(
        vocab_size=options.vocab,
        hidden_size=options.hidden,
        intermediate_size=4 * options.hidden,
        num_hidden_layers=options.layers,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        max_position_embeddings=PROMPT_TOKENS + options.new_tokens,
        tie_word_embeddings=False,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        num_labels=1,
    )
    torch.manual_seed(0)
    policy = LlamaForCausalLM(config)
    reference = LlamaForCausalLM(config)
    reference.load_state_dict(policy.state_dict())
    return policy, reference, LlamaForSequenceClassification(config)


def parameter_formula(modules: Sequence[nn.Module], shards: int) -> int:
    """Bytes of the first rank: matrices cut along one of their dimensions, evenly or not."""
    total = 0
    for name, parameter in (p for module in modules for p in module.named_parameters()):
        cut = parameter.dim() == 2 and not name.startswith("score.")
        size = parameter.numel() * parameter.itemsize
        total += -(-size // shards) if cut else size
    return total


def settings(options: argparse.Namespace, view: str, ranks: int, folder: str) -> PPOConfig:
    weights = "auto" if view in ("copies", "alone") else view
    return PPOConfig(
        run=RunConfig(output_dir=folder, device=options.device, dtype=DTYPES[options.dtype]),
        rollout=RolloutConfig(prompts=options.prompts, samples_per_prompt=1),
        sampling=SamplingConfig(max_new_tokens=options.new_tokens),
        reward=RewardConfig(),
        algorithm=AlgorithmConfig(ppo_epochs=1, minibatches=2),
        distributed=DistributedConfig(replicas=ranks if view == "copies" else 1, weights=weights),
        total_steps=WARMUPS + options.steps,
        microbatch_tokens=options.microbatch_tokens,
    )


def prompts(options: argparse.Namespace) -> list[dict[str, str]]:
    generator = torch.Generator().manual_seed(1)
    count = max(64, options.prompts)
    drawn = torch.randint(4, options.vocab, (count, PROMPT_TOKENS), generator=generator)
    return [{"prompt": " ".join(f"w{i}" for i in row)} for row in drawn.tolist()]


def reward(completion_ids: Sequence[Sequence[int]], **columns: Any) -> list[float]:
    """Share of even tokens."""
    return [sum(i % 2 == 0 for i in ids) / max(len(ids), 1) for ids in completion_ids]


def with_replicas(world: World, replicas: int) -> World:
    """The same ranks on another mesh, without new processes."""
    if world.mesh is None:
        return world
    ranks = torch.arange(world.size).view(replicas, world.size // replicas)
    mesh = DeviceMesh(world.device.type, ranks, mesh_dim_names=(REPLICATE, SHARD))
    return dataclasses.replace(world, mesh=mesh)


def measure(world: World, view: str, options: argparse.Namespace) -> Row:
    """Every rank of `world` calls it; all get the row."""
    with tempfile.TemporaryDirectory() as folder:
        config = settings(options, view, world.size, folder)
        world = with_replicas(world, config.distributed.replicas)
        with joined(config, world):
            return _measure(world, view, config, options)


def build_trainer(
    config: PPOConfig, models: Sequence[nn.Module], options: argparse.Namespace, world: World
) -> PPOTrainer:
    """On policy, reference and critic."""
    policy, reference, critic = models
    return PPOTrainer(
        config,
        model=policy,
        reference=reference,
        critic=critic,
        tokenizer=build_tokenizer(options.vocab),
        reward_function=reward,
        train_dataset=prompts(options),
        quiet=True,
        world=world,
    )


def _measure(world: World, view: str, config: PPOConfig, options: argparse.Namespace) -> Row:
    models = build_models(options)
    formula = parameter_formula(models, world.shards)
    trainer = build_trainer(config, models, options, world)
    traffic = Traffic()
    meter = Meter(world, traffic)
    trainer.learner.phase = meter.phase
    steps = []
    with traffic.counting():
        for _ in range(WARMUPS + options.steps):
            batch = [trainer.data[i] for i in trainer.sampler.next_batch()]
            output = trainer.learner.step(collate_prompts(batch))
            tokens = int(output.experience.scored.rollout.response_mask.sum())
            received, calls = traffic.take()
            steps.append((dict(meter.seconds), received, calls, tokens))
    ledger = held_bytes(trainer.roles)
    held = sum(size for slot, size in ledger.items() if slot.part == "weights")
    everyone: list[Any] = [(steps[WARMUPS:], held)]
    if world.size > 1:
        everyone = [None] * world.size
        dist.all_gather_object(everyone, (steps[WARMUPS:], held))
    return summary(world.size, view, everyone, formula)


def summary(ranks: int, view: str, everyone: Sequence[Any], formula: int) -> Row:
    """The row of what every rank saw: steps of (seconds, received, calls, tokens), and bytes."""
    by_step = list(zip(*(steps for steps, _ in everyone), strict=True))
    slowest = [{p: max(rank[0][p] for rank in step) for p in PHASES} for step in by_step]
    samples = [{**step, "step": sum(step.values())} for step in slowest]
    seconds = {p: statistics.median(step[p] for step in samples) for p in (*PHASES, "step")}

    def mean(steps: Any, which: int) -> dict[str, float]:
        return {p: statistics.mean(step[which].get(p, 0) for step in steps) for p in PHASES}

    received = [mean(steps, 1) for steps, _ in everyone]
    most = max(range(ranks), key=lambda rank: sum(received[rank].values()))
    tokens = statistics.mean(step[0][3] for step in by_step)
    return Row(
        ranks,
        view,
        seconds,
        samples,
        received[most],
        mean(everyone[most][0], 2),
        received,
        tokens / seconds["step"],
        max(held for _, held in everyone),
        formula,
    )


# ---- tables and processes -----------------------------------------------------------------------


def print_row(row: Row) -> None:
    print(
        f"\n{row.ranks} ranks, {row.view}: {row.tokens_per_second:.1f} tokens/s; parameters "
        f"{row.parameter_bytes / 2**20:.3f} MiB a rank, formula "
        f"{row.parameter_formula / 2**20:.3f}"
    )
    print(f"  {'':10}{'seconds':>10}{'received MiB':>14}{'collectives':>13}")
    for phase in PHASES:
        print(
            f"  {phase:10}{row.seconds[phase]:10.3f}{row.received[phase] / 2**20:14.3f}"
            f"{row.collectives[phase]:13.1f}",
            flush=True,
        )


def work(options: argparse.Namespace) -> int:
    """One rank of the world that torchrun started."""
    torch.set_num_threads(options.threads)
    device = torch.device("cpu")
    if options.device == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    world = World.join(device)
    views = options.views if world.size > 1 else ["alone"]
    facts = environment(options.threads, device)
    if world.is_main and not options.worker:
        print_environment(facts)
    rows = []
    for view in views:
        rows.append(measure(world, view, options))
        gc.collect()
        if world.is_main:
            print_row(rows[-1])
    if world.is_main and options.json:
        write(options, facts, [asdict(row) for row in rows])
    world.leave()
    return 0


def write(options: argparse.Namespace, facts: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    arguments = {k: v for k, v in vars(options).items() if k not in ("json", "worker")}
    report = {"environment": facts, "arguments": arguments, "rows": rows}
    Path(options.json).write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def launch(options: argparse.Namespace, arguments: Sequence[str]) -> int:
    """A torchrun for every number of ranks; what the workers found, together."""
    facts = environment(options.threads, options.device)
    print_environment(facts)
    rows: list[dict[str, Any]] = []
    for ranks in options.ranks:
        with tempfile.TemporaryDirectory() as folder:
            found = Path(folder) / "rows.json"
            command = [
                *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
                *("--nproc-per-node", str(ranks), "-m", f"{__package__}.bench_step"),
                *(*arguments, "--worker", "--json", str(found)),
            ]
            # torchrun would set the number of threads, and print that it did.
            done = subprocess.run(command, env={"OMP_NUM_THREADS": "1", **os.environ})
            if done.returncode:
                print(f"{ranks} ranks failed with {done.returncode}", file=sys.stderr)
                return done.returncode
            rows += json.loads(found.read_text(encoding="utf-8"))["rows"]
    if options.json:
        write(options, facts, rows)
    return 0


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="a PPO step on several ranks, phase by phase")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--ranks", type=_numbers, default=[1, 2, 4], help="not under torchrun")
    parser.add_argument("--views", type=several(VIEWS, "view"), default=list(VIEWS))
    parser.add_argument("--steps", type=int, default=3, help="measured after a warm-up")
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--vocab", type=int, default=1024)
    parser.add_argument("--prompts", type=int, default=16, help="of a step, one sample each")
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--microbatch-tokens", type=int, default=256)
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="fp32")
    parser.add_argument("--threads", type=int, default=1, help="of torch on the CPU, each rank")
    parser.add_argument("--json", help="write the report to this file")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    options = parse(arguments)
    if options.worker or "WORLD_SIZE" in os.environ:
        return work(options)
    return launch(options, arguments)


def _numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


if __name__ == "__main__":
    sys.exit(main())
