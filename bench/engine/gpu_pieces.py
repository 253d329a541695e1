"""The engine in `bench.gpu_suite`: the switch between modes, decoding, memory of a rollout.

What must hold on a device before its speed means much is in `gpu_checks`.
"""

from __future__ import annotations

import argparse
import statistics
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
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

from ..kernels.probes import bandwidth_probe, calibrate
from . import bench_generate, gpu_checks, peers

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
        if not peers.installed(peer):
            result["absent"][peer] = "not installed"
            continue
        options.peers = [peer]
        try:
            row = bench_generate.measure(options, setup.shape(shape), batch, "uniform", found)
        except Exception as error:  # a peer that does not run is a result
            traceback.print_exc()
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
    for batch in (64, 1, 256):
        for shape in ("1b", "8b"):
            found[f"decode-{shape}-{batch}"] = partial(
                decode, setup, shape, min(batch, 2) if setup.tiny else batch
            )
    found["memory-lora"] = partial(memory_lora, setup)
    return found
