"""The engine's benchmark runs at its smallest, and its limits are what they claim."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from bench.engine import bench_generate, peers


def test_the_smallest_preset_runs_and_writes_what_it_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bench_generate, "calibrate", lambda _: RATES)
    monkeypatch.setattr("bench.engine.peers.installed", lambda peer: peer != "vllm")
    path = tmp_path / "out.json"
    arguments = ["--shapes", "tiny", "--batches", "2", "--prompt", "3", "--new-tokens", "4"]
    arguments += ["--longest", "8", "--rounds", "1", "--threads", "1", "--json", str(path)]
    assert bench_generate.main(arguments) == 0
    rows = json.loads(path.read_text())["rows"]
    assert [(r["batch"], r["lengths"]) for r in rows] == [(2, "uniform"), (2, "long-tailed")]
    for row in rows:
        peers = {"generate", "generate_batch", "continuous_batching"}
        assert set(row["tokens_per_second"]) == {"engine", *peers}
        assert all(row["times_faster"][peer] > 0 for peer in peers)
        assert all(len(times) == 1 for times in row["seconds"].values())
    assert "long-tailed" in capsys.readouterr().out


def test_vllm_gets_the_weights_the_prompts_and_the_lengths(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A stand-in with its calling convention: vllm itself needs a GPU."""
    seen: dict[str, Any] = {}

    class LLM:
        def __init__(self, model: str, **options: Any) -> None:
            seen.update(options, files=sorted(path.name for path in Path(model).iterdir()))

        def generate(self, prompts: Any, limits: Any, use_tqdm: bool) -> Any:
            seen["prompts"] = prompts
            tokens = [SimpleNamespace(token_ids=[0] * limit.max_tokens) for limit in limits]
            return [SimpleNamespace(outputs=[row]) for row in tokens]

    stand_in = SimpleNamespace(LLM=LLM, SamplingParams=lambda **options: SimpleNamespace(**options))
    monkeypatch.setitem(sys.modules, "vllm", stand_in)
    shape = bench_generate.Shape(50, 16, 24, 1, 2, 1)
    model = shape.build(torch.device("cpu"), torch.float32)
    peers.vllm(model, [[3, 4], [5]], [2, 6])()
    assert "model.safetensors" in seen["files"]
    assert (seen["dtype"], seen["max_model_len"]) == ("float32", 8)
    assert seen["prompts"] == [{"prompt_token_ids": [3, 4]}, {"prompt_token_ids": [5]}]


RATES = {"matmul_fp32_tflop_per_s": 1e-3, "read_gb_per_s": 1.0}


def test_long_tailed_lengths_reach_the_maximum_with_a_mean_near_a_quarter() -> None:
    lengths = bench_generate.lengths_for("long-tailed", 400, 192)
    assert max(lengths) == 192
    assert min(lengths) >= 1
    assert 0.2 < sum(lengths) / len(lengths) / 192 < 0.3


def test_the_roofline_is_arithmetic_or_traffic_whichever_takes_longer() -> None:
    shape = bench_generate.Shape(8, 4, 6, 1, 2, 1)
    weights = 4 * (4 * 3 + 3 * 6) + 8 * 4
    fast_memory = {"matmul_fp32_tflop_per_s": 1e-12, "read_gb_per_s": 1e9}
    flops = 2 * 2 * (weights + 2 * 4 * 5)
    assert bench_generate.roofline_seconds(shape, 5, [1, 1], 4, fast_memory) == flops
    fast_arithmetic = {"matmul_fp32_tflop_per_s": 1e9, "read_gb_per_s": 1e-9}
    traffic = 4 * (weights + 2 * 5 * 2 * 2)
    assert bench_generate.roofline_seconds(shape, 5, [1, 1], 4, fast_arithmetic) == traffic
