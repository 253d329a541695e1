"""All that the engine has to show on a GPU, in pieces of a few minutes, the most important first.

    python -m bench.engine.gpu_suite OUT [--only ops,graphs ...] [--budget 570] [--again]
    python -m bench.engine.gpu_suite OUT --tiny          every piece at its smallest, on a CPU

    ops                 every kernel against its reference on the device
    paths               fused forward against the modules and teacher forcing: fp32, bf16, LoRA
    graphs              replayed steps against the same steps run as they are, bit for bit
    attention           each installed backend against `paged_attention`: error and time
    switch              from training to generation: the check of addresses, the bf16 copy
    decode-SHAPE-BATCH  tokens per second beside generate, generate_batch and vLLM, and roofline
    memory-lora         bytes of a trunk with four roles, at rest and at the peak of a rollout

A piece writes OUT/<piece>.json with what it was measured on; one that has its file is skipped, so
the command goes on where it was cut off. No piece is started that the budget leaves no time for.
Returns 0 if all checks passed.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from rlhf_fast.engine.compute_weights import ComputeWeights
from rlhf_fast.engine.hybrid import HybridEngine
from rlhf_fast.engine.requests import Request
from rlhf_fast.engine.settings import EngineSettings
from rlhf_fast.engine.weights import AliasedWeights
from rlhf_fast.models.adapters import SharedTrunk
from rlhf_fast.models.forward import set_compute_dtype
from rlhf_fast.types import SamplingParams

from ..kernels.environment import environment
from ..kernels.probes import bandwidth_probe, calibrate
from . import bench_generate, gpu_checks

PEERS = ("generate", "generate_batch", "vllm")


@dataclass(frozen=True)
class Setup:
    """Where and how large."""

    device: torch.device
    tiny: bool

    def shape(self, name: str) -> str:
        """The name of a shape of `bench_generate.SHAPES`."""
        return "tiny" if self.tiny else name

    def time(self, run: Callable[[], Any], repeats: int = 20) -> float:
        """Median seconds of a call, the device waited for."""
        found = []
        for index in range(repeats + 1):
            self.wait()
            start = time.perf_counter()
            run()
            self.wait()
            if index:
                found.append(time.perf_counter() - start)
        return statistics.median(found)

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def allocated(self, *, peak: bool = False) -> int:
        """Bytes of tensors on the GPU; 0 on a CPU."""
        if self.device.type != "cuda":
            return 0
        count = torch.cuda.max_memory_allocated if peak else torch.cuda.memory_allocated
        return count(self.device)


def switch(setup: Setup) -> dict[str, Any]:
    """Seconds from training to generation and back, without the generation."""
    found: dict[str, Any] = {"passed": True}
    for dtype in (torch.bfloat16, torch.float32):
        model = bench_generate.SHAPES[setup.shape("1b")].build(setup.device, dtype)
        set_compute_dtype(model, "bfloat16")
        engine = HybridEngine(model, eos_ids=())
        weights = AliasedWeights.of(model)
        compute = ComputeWeights(weights, torch.bfloat16)
        compute.view(model.lm_head.weight.detach())
        name = str(dtype).removeprefix("torch.")
        found[name] = {
            "parameters": sum(p.numel() for p in model.parameters()),
            "check_seconds": setup.time(weights.check),
            "changes_seconds": setup.time(engine._follow_changes),
            "copy_seconds": setup.time(compute.refresh),
            "copy_bytes": compute.nbytes,
        }
        del model, engine, weights, compute
    return found


def decode(setup: Setup, shape: str, batch: int) -> dict[str, Any]:
    """Tokens per second of the engine beside each peer that runs here."""
    options = argparse.Namespace(
        device=str(setup.device), dtype="bf16", peers=[], rounds=1 if setup.tiny else 3,
        prompt=3 if setup.tiny else 512, new_tokens=4 if setup.tiny else 128, longest=8,
    )  # fmt: skip
    found = _calibrated(setup)
    result: dict[str, Any] = {"passed": True, "calibration": found, "rows": {}, "absent": {}}
    for peer in PEERS[:1] if setup.tiny else PEERS:
        options.peers = [peer]
        try:
            row = bench_generate.measure(options, setup.shape(shape), batch, "uniform", found)
        except Exception as error:  # a peer that does not run is a result
            result["absent"][peer] = f"{type(error).__name__}: {str(error)[:300]}"
            continue
        result["rows"][peer] = asdict(row)
    result["passed"] = bool(result["rows"])
    return result


def memory_lora(setup: Setup) -> dict[str, Any]:
    """Actor, reference, critic and reward model on one bf16 trunk: bytes held and at the peak."""
    shape = bench_generate.SHAPES[setup.shape("8b")]
    rank, batch, new = (2, 2, 4) if setup.tiny else (64, 64, 128)
    trunk = SharedTrunk(shape.build(setup.device, torch.bfloat16))
    set_compute_dtype(trunk.model, "bfloat16")
    adapter = trunk.shape(rank, float(rank), ["all-linear"])
    for index, role in enumerate(("actor", "critic", "reward")):
        trunk.add(role, adapter, seed=index, trainable=role != "reward")
    trunk.model.to(setup.device)
    sizes = {name: sum(t.numel() for t in trunk.tensors(name).values()) for name in trunk.shapes}
    base = sum(p.numel() for n, p in trunk.model.named_parameters() if ".lora_" not in n)
    expected = 2 * base + 4 * sum(sizes.values())
    engine = HybridEngine(
        trunk.model, eos_ids=(), settings=EngineSettings(max_batch=batch, kv_bytes=int(8e9))
    )
    held = setup.allocated()
    if setup.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(setup.device)
    requests = [Request((5, 6, 7), SamplingParams(new), (s,)) for s in range(batch)]
    with trunk.adapter("actor"):
        engine.complete(requests)
    return {
        "passed": not held or abs(held - expected) <= 0.05 * expected,
        "path": engine.path,
        "expected_bytes": expected,
        "held_bytes": held or "unmeasured",
        "peak_bytes_of_a_rollout": setup.allocated(peak=True),
        "graphs": engine.graphs._asdict(),
        "optimizer_bytes": 12 * (sizes["actor"] + sizes["critic"]),
    }


def _calibrated(setup: Setup) -> dict[str, float]:
    if setup.tiny:  # no figure of this run means anything
        return {
            "read_gb_per_s": 1.0,
            "matmul_fp32_tflop_per_s": 1.0,
            "matmul_bf16_tflop_per_s": 1.0,
        }
    return calibrate(bandwidth_probe(setup.device))


def pieces(setup: Setup) -> dict[str, Callable[[], dict[str, Any]]]:
    """All pieces, in order of importance."""
    found: dict[str, Callable[[], dict[str, Any]]] = {
        "ops": partial(gpu_checks.ops, setup.device),
        "paths": partial(gpu_checks.paths, setup.device),
        "graphs": partial(gpu_checks.graphs, setup.device),
        "attention": partial(gpu_checks.attention, setup.device, tiny=setup.tiny),
        "switch": partial(switch, setup),
    }
    batches = (2,) if setup.tiny else (64, 1, 256)
    for batch in batches:
        for shape in ("1b", "8b"):
            found[f"decode-{shape}-{batch}"] = partial(decode, setup, shape, batch)
    found["memory-lora"] = partial(memory_lora, setup)
    return found


def run_piece(name: str, piece: Callable[[], dict[str, Any]], setup: Setup, out: Path) -> bool:
    """Run a piece and write its file; returns whether its checks passed."""
    start = time.perf_counter()
    try:
        result = piece()
    except Exception as error:
        result = {"passed": False, "error": f"{type(error).__name__}: {error}"}
    if setup.device.type == "cuda":
        torch.cuda.empty_cache()
    record = {
        "environment": environment(torch.get_num_threads(), setup.device),
        "piece": name,
        "tiny": setup.tiny,
        "seconds": time.perf_counter() - start,
        "result": result,
    }
    path = out / f"{name}.json"
    path.write_text(json.dumps(record, indent=1) + "\n")
    verdict = "passed" if result["passed"] else f"FAILED {result.get('error', '')}"
    print(f"{name:24}{record['seconds']:8.1f} s  {verdict}", flush=True)
    return bool(result["passed"])


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--only", type=lambda text: text.split(","), default=[])
    parser.add_argument("--budget", type=float, default=570.0, help="seconds of this command")
    parser.add_argument("--again", action="store_true", help="also pieces that have their file")
    parser.add_argument("--tiny", action="store_true")
    options = parser.parse_args(arguments)
    setup = Setup(torch.device("cpu" if options.tiny else "cuda"), options.tiny)
    options.out.mkdir(parents=True, exist_ok=True)
    known, start, passed, left = pieces(setup), time.perf_counter(), True, []
    unknown = [name for name in options.only if name not in known]
    if unknown:
        parser.error(f"no piece {', '.join(unknown)}; there are {', '.join(known)}")
    for name in options.only or known:
        if (options.out / f"{name}.json").exists() and not options.again:
            continue
        if time.perf_counter() - start > options.budget:
            left.append(name)
            continue
        passed &= run_piece(name, known[name], setup, options.out)
    if left:
        print(f"left for the next run: {', '.join(left)}")
    return 0 if passed else 1


if __name__ == "__main__":
    raise SystemExit(main())
