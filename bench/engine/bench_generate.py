"""Tokens per second of the hybrid engine beside other generators, on the same weights and lengths.

    python -m bench.engine.bench_generate [--shapes small,large] [--batches 1,16,64] [--rounds 5]
        [--lengths uniform,long-tailed] [--peers generate,generate_batch,continuous_batching,vllm]
        [--device cuda --dtype bf16] [--json results.json]

Every side samples at temperature 1 from the same prompts and draws the same number of tokens for
each: responses end at a length fixed in advance, not at a token. `uniform` gives all of them the
maximum, `long-tailed` draws lengths from an exponential whose mean is a quarter of it; `generate`
then runs to the longest of the batch, which is its way (`bench/engine/peers.py` says what is in the
time of each side). Rounds alternate between the sides; medians are compared, so a machine that
slows down slows all of them.

The roofline of a step is the larger of its arithmetic at the rate of a large product and its memory
traffic (weights once, keys and values of all contexts once) at the bandwidth of a large read, both
measured in the same process.

In fp32 on a CPU each row also shows the floor (`bench/engine/floor.py`): its products at the best
rate measured for their shapes, and its keys and values read once a step at the rate of a plain read
of as many bytes, with nothing else. "at most" beside a ratio is what an engine that runs at the
floor would reach: a target above it is out of reach of this arithmetic on this machine.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from rlhf_fast.engine.hybrid import HybridEngine
from rlhf_fast.engine.requests import Request
from rlhf_fast.engine.settings import EngineSettings
from rlhf_fast.models.forward import set_compute_dtype
from rlhf_fast.types import SamplingParams

from ..kernels.environment import environment
from ..kernels.probes import bandwidth_probe, calibrate
from . import peers
from .floor import Floor

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
LENGTHS = ("uniform", "long-tailed")


@dataclass(frozen=True)
class Shape:
    """A Llama with random weights."""

    vocab: int
    hidden: int
    inner: int
    layers: int
    heads: int
    kv_heads: int

    def build(self, device: torch.device, dtype: torch.dtype) -> LlamaForCausalLM:
        """The model; eos is no token, so that nothing ends early."""
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=self.vocab,
            hidden_size=self.hidden,
            intermediate_size=self.inner,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            max_position_embeddings=8192,
            tie_word_embeddings=True,
            bos_token_id=1,
            eos_token_id=None,
            pad_token_id=0,
        )
        with torch.device(device):
            return LlamaForCausalLM(config).to(dtype).eval()


SHAPES = {
    "tiny": Shape(64, 32, 48, 2, 4, 2),
    "small": Shape(1024, 128, 344, 4, 4, 4),
    "large": Shape(1024, 256, 688, 6, 8, 8),
    "1b": Shape(128_256, 2048, 8192, 16, 32, 8),
    "8b": Shape(128_256, 4096, 14_336, 32, 32, 8),
}


@dataclass(frozen=True)
class Row:
    """Medians of one workload: tokens per second by side, ratios, part of the roofline, the floor.

    `seconds` are those of every round by side.
    `floor` holds ms a step in parts and the rates they were put at, `most` the ratios of an engine
    that takes no longer than the floor; both only in fp32 on a CPU.
    """

    shape: str
    batch: int
    lengths: str
    tokens: int
    tokens_per_second: dict[str, float]
    seconds: dict[str, list[float]]
    ms_per_step: float
    times_faster: dict[str, float]
    roofline: float
    floor: dict[str, float] | None
    most: dict[str, float]


def lengths_for(kind: str, batch: int, maximum: int) -> list[int]:
    """Response lengths; long-tailed ones have a mean near a quarter of the maximum."""
    if kind == "uniform":
        return [maximum] * batch
    generator = torch.Generator().manual_seed(2)
    drawn = torch.empty(batch).exponential_(4 / maximum, generator=generator)
    lengths = drawn.ceil().clamp(1, maximum).long().tolist()
    lengths[0] = maximum  # somebody reaches the end
    return lengths


def engine_side(model: Any, prompts: list[list[int]], lengths: list[int]) -> Callable[[], None]:
    """One rollout through the hybrid engine."""
    engine = HybridEngine(model, eos_ids=(), settings=EngineSettings(max_batch=len(prompts)))
    requests = [
        Request(tuple(p), SamplingParams(n), (s,), float(n))
        for s, (p, n) in enumerate(zip(prompts, lengths, strict=True))
    ]

    def run() -> None:
        out = engine.complete(requests)
        assert out.lengths.tolist() == lengths

    return run


def roofline_seconds(
    shape: Shape, prompt: int, lengths: Sequence[int], width: int, found: dict[str, float]
) -> float:
    """The least time of all decoding steps of a batch, at the rates found on this machine."""
    rate = found["matmul_fp32_tflop_per_s" if width == 4 else "matmul_bf16_tflop_per_s"] * 1e12
    bandwidth = found.get("read_gb_per_s", found.get("copy_gb_per_s", 0.0)) * 1e9
    per_layer = shape.hidden * (
        shape.hidden * (2 + 2 * shape.kv_heads / shape.heads) + 3 * shape.inner
    )
    weights = shape.layers * per_layer + shape.vocab * shape.hidden
    kv = 2 * shape.layers * shape.kv_heads * (shape.hidden // shape.heads)
    total = 0.0
    for step in range(max(lengths)):
        rows = sum(n > step for n in lengths)
        context = prompt + step
        flops = 2 * rows * (weights + 2 * shape.layers * shape.hidden * context)
        traffic = width * (weights + rows * context * kv)
        total += max(flops / rate, traffic / bandwidth)
    return total


def floor_of(floor: Floor, steps: int) -> dict[str, float]:
    """What `Row.floor` holds."""
    each = 1e3 / steps
    return {
        "ms_per_step": floor.seconds * each,
        "products_ms": floor.products * each,
        "reads_ms": floor.reads * each,
        "prefill_ms": floor.prefill * each,
        "products_gflop_per_s": floor.products_gflop_per_s,
        "read_gb_per_s": floor.read_gb_per_s,
    }


def seconds_of(
    sides: dict[str, Callable[[], None]], rounds: int, device: torch.device
) -> dict[str, list[float]]:
    """Seconds of every side and round; each round runs all of them."""
    seconds: dict[str, list[float]] = {side: [] for side in sides}
    for round_ in range(rounds + 1):
        for side, run in sides.items():
            if device.type == "cuda":
                torch.cuda.synchronize()
            start = time.perf_counter()
            run()
            if device.type == "cuda":
                torch.cuda.synchronize()
            if round_:  # the first is a warm-up
                seconds[side].append(time.perf_counter() - start)
    return seconds


def measure(
    options: argparse.Namespace, name: str, batch: int, kind: str, found: dict[str, float]
) -> Row:
    """Medians of all sides, rounds interleaved after one warm-up each."""
    device, dtype = torch.device(options.device), DTYPES[options.dtype]
    shape = SHAPES[name]
    model = shape.build(device, dtype)
    set_compute_dtype(model, "bfloat16" if options.dtype == "bf16" else "float32")
    generator = torch.Generator().manual_seed(1)
    prompts = torch.randint(10, shape.vocab, (batch, options.prompt), generator=generator).tolist()
    maximum = options.new_tokens if kind == "uniform" else options.longest
    lengths = lengths_for(kind, batch, maximum)
    sides = {"engine": engine_side(model, prompts, lengths)}
    sides |= {peer: peers.MAKERS[peer](model, prompts, lengths) for peer in options.peers}
    try:
        seconds = seconds_of(sides, options.rounds, device)
    finally:
        peers.close(sides)
    medians = {side: statistics.median(times) for side, times in seconds.items()}
    tokens = sum(lengths)
    ours = medians["engine"]
    in_fp32 = device.type == "cpu" and options.dtype == "fp32"
    floor = Floor(shape, options.prompt, lengths) if in_fp32 else None
    return Row(
        shape=name,
        batch=batch,
        lengths=kind,
        tokens=tokens,
        tokens_per_second={side: tokens / t for side, t in medians.items()},
        seconds=seconds,
        ms_per_step=ours / maximum * 1e3,
        times_faster={side: t / ours for side, t in medians.items() if side != "engine"},
        roofline=roofline_seconds(shape, options.prompt, lengths, dtype.itemsize, found) / ours,
        floor=None if floor is None else floor_of(floor, maximum),
        most={
            side: t / floor.seconds
            for side, t in medians.items()
            if floor is not None and side != "engine"
        },
    )


def ms_of_floor(row: Row) -> str:
    """A cell."""
    return "" if row.floor is None else f"{row.floor['ms_per_step']:.2f}"


def ratios(row: Row) -> list[str]:
    """Cells of each peer."""
    most = {side: f"{x:.2f}" for side, x in row.most.items()}
    return [f"{x:22.2f}{most.get(side, ''):>9}" for side, x in row.times_faster.items()]


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])

    def names(text: str) -> list[str]:
        return [part for part in text.split(",") if part]

    parser.add_argument("--shapes", type=names, default=["small", "large"])
    parser.add_argument("--batches", type=names, default=["1", "16", "64"])
    parser.add_argument("--lengths", type=names, default=list(LENGTHS))
    parser.add_argument("--peers", type=names, default=list(peers.MAKERS))
    parser.add_argument("--prompt", type=int, default=16, help="prompt tokens")
    parser.add_argument("--new-tokens", type=int, default=64, help="uniform response tokens")
    parser.add_argument("--longest", type=int, default=192, help="longest long-tailed response")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="fp32")
    parser.add_argument("--json", type=Path)
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print; write the rows, after each, with what they were measured on."""
    options = parse(arguments)
    torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    facts = environment(options.threads, device)
    found = calibrate(bandwidth_probe(device))
    absent = [peer for peer in options.peers if not peers.installed(peer)]
    options.peers = [peer for peer in options.peers if peer not in absent]
    if absent:
        print(f"not installed: {', '.join(absent)}")
    print(
        f"{'shape':8}{'batch':>6} {'lengths':12}{'tokens/s':>11}{'ms/step':>9}"
        f"{'roofline':>10}{'floor':>8}",
        end="",
    )
    print("".join(f"{'x ' + peer:>22}{'at most':>9}" for peer in options.peers), flush=True)
    rows = []
    for name in options.shapes:
        for batch in map(int, options.batches):
            for kind in options.lengths:
                if kind != "uniform" and batch == 1:
                    continue
                row = measure(options, name, batch, kind, found)
                rows.append(row)
                rate = row.tokens_per_second["engine"]
                print(
                    f"{name:8}{batch:6} {kind:12}{rate:11.0f}{row.ms_per_step:9.2f}"
                    f"{row.roofline:10.0%}{ms_of_floor(row):>8}",
                    "".join(ratios(row)),
                    flush=True,
                )
                if options.json is not None:
                    record = {
                        "environment": facts,
                        "calibration": found,
                        "not_installed": absent,
                        "rows": [asdict(r) for r in rows],
                    }
                    options.json.write_text(json.dumps(record, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
