"""Tokens per second of HFGenerator beside transformers' `generate` on the same module.

    python -m bench.bench_generate [--rounds 5] [--threads 2] [--models tiny,small]

Both sides sample at temperature 1 from the same left-padded prompts, in fp32, with a key-value
cache and the same limit on new tokens. Two workloads: `full` never ends a response, so both sides
draw the same number of tokens; `ending` ends responses at random lengths through a set of stop ids,
where only responses' own tokens count. Rounds alternate between the sides, the medians are
compared, so a machine that slows down slows both.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from rlhf_fast.engine.batching import pad_left
from rlhf_fast.engine.generator import HFGenerator
from rlhf_fast.types import PackedSequences, PromptBatch, SamplingParams


@dataclass(frozen=True)
class Workload:
    """A model and a batch: B prompts of 4 to 12 tokens, G samples each."""

    name: str
    vocab: int
    hidden: int
    layers: int
    heads: int
    prompts: int
    group: int
    new_tokens: int
    stop_ids: int

    @property
    def samples(self) -> int:
        return self.prompts * self.group


TINY = {"vocab": 100, "hidden": 96, "layers": 3, "heads": 4}
SMALL = {"vocab": 4096, "hidden": 512, "layers": 8, "heads": 8}
WORKLOADS = {
    "tiny": [
        Workload("0.36M full     64x1", **TINY, prompts=64, group=1, new_tokens=40, stop_ids=0),
        Workload("0.36M full    256x1", **TINY, prompts=256, group=1, new_tokens=40, stop_ids=0),
        Workload("0.36M ending  256x1", **TINY, prompts=256, group=1, new_tokens=40, stop_ids=5),
        Workload("0.36M ending   64x8", **TINY, prompts=64, group=8, new_tokens=40, stop_ids=5),
    ],
    "small": [
        Workload("30M full       16x1", **SMALL, prompts=16, group=1, new_tokens=32, stop_ids=0),
        Workload("30M ending     16x4", **SMALL, prompts=16, group=4, new_tokens=32, stop_ids=250),
    ],
}


def build_model(work: Workload) -> LlamaForCausalLM:
    """A random Llama; its flat distribution makes stop ids arrive at random."""
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=work.vocab,
            hidden_size=work.hidden,
            intermediate_size=work.hidden * 8 // 3 // 8 * 8,
            num_hidden_layers=work.layers,
            num_attention_heads=work.heads,
            num_key_value_heads=work.heads,
            max_position_embeddings=128,
            tie_word_embeddings=True,
            bos_token_id=1,
            eos_token_id=None,
            pad_token_id=0,
        )
    ).eval()


def build_prompts(work: Workload) -> PromptBatch:
    generator = torch.Generator().manual_seed(1)
    sizes = torch.randint(4, 13, (work.prompts,), generator=generator).tolist()
    prompts = [torch.randint(10, work.vocab, (n,), generator=generator) for n in sizes]
    n = work.prompts
    return PromptBatch(PackedSequences.from_lists(prompts), tuple(range(n)), ({},) * n, ("",) * n)


def ours(model: LlamaForCausalLM, prompts: PromptBatch, work: Workload) -> Callable[[], int]:
    """One rollout; returns its response tokens."""
    generator = HFGenerator(model, eos_ids=range(2, 2 + work.stop_ids), max_batch=256)
    sampling = SamplingParams(work.new_tokens)
    seeds = list(range(work.samples))

    def run() -> int:
        rollout = generator.generate(prompts, sampling, samples_per_prompt=work.group, seeds=seeds)
        return int(rollout.lengths.sum())

    return run


def theirs(model: LlamaForCausalLM, prompts: PromptBatch, work: Workload) -> Callable[[], int]:
    """The same batch through `generate`, at most 256 sequences side by side as well."""
    padded = pad_left(prompts.sequences, range(work.prompts), torch.device("cpu"))
    stops = torch.arange(2, 2 + work.stop_ids)
    options: dict[str, Any] = {
        "max_new_tokens": work.new_tokens,
        "do_sample": True,
        "temperature": 1.0,
        "top_k": 0,
        "num_return_sequences": work.group,
        "eos_token_id": stops.tolist() or None,
        "pad_token_id": 0,
    }
    chunk = max(1, 256 // work.group)

    def run() -> int:
        tokens = 0
        for start in range(0, work.prompts, chunk):
            rows = slice(start, start + chunk)
            out = model.generate(
                padded.ids[rows], attention_mask=padded.mask[rows].long(), **options
            )[:, padded.ids.shape[1] :]
            ended = torch.isin(out, stops)
            before = ended.cumsum(-1) - ended.long()
            tokens += int((before == 0).sum())
        return tokens

    return run


def measure(work: Workload, rounds: int) -> tuple[float, float]:
    """Median tokens per second of both sides, rounds interleaved after one warm-up each."""
    model, prompts = build_model(work), build_prompts(work)
    sides = [ours(model, prompts, work), theirs(model, prompts, work)]
    rates: list[list[float]] = [[], []]
    for side in sides:
        side()
    for _ in range(rounds):
        for side, rate in zip(sides, rates, strict=True):
            start = time.perf_counter()
            tokens = side()
            rate.append(tokens / (time.perf_counter() - start))
    return statistics.median(rates[0]), statistics.median(rates[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--models", default="tiny,small")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print(f"{'workload':22}{'HFGenerator':>14}{'generate()':>14}{'ratio':>8}   tokens/s, medians")
    for name in args.models.split(","):
        for work in WORKLOADS[name]:
            mine, peer = measure(work, args.rounds)
            print(f"{work.name:22}{mine:14.0f}{peer:14.0f}{mine / peer:8.2f}", flush=True)


if __name__ == "__main__":
    main()
