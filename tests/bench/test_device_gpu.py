"""The GPU's clock against kernels whose time and memory are known."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from bench.kernels import bench_gae, device, environment, harness, probes

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

MIB = 1 << 20


@pytest.fixture(scope="module")
def clock() -> device.CudaClock:
    return device.CudaClock(torch.device("cuda", 0))


@pytest.fixture(scope="module")
def copy() -> probes.CopyProbe:
    return probes.CopyProbe(torch.device("cuda", 0))


def test_event_time_grows_with_the_work(clock: device.CudaClock) -> None:
    x = torch.ones(64 * MIB, device="cuda")

    def run(k: int) -> None:
        for _ in range(1 + 7 * k):
            x.mul_(1.0)

    run(0)
    samples = clock.turn(run, (0, 1, 0, 1, 0, 1))
    once = sorted(sample.seconds for sample in samples[::2])[1]
    eight = sorted(sample.seconds for sample in samples[1::2])[1]
    assert eight == pytest.approx(8 * once, rel=0.4)


def test_event_time_is_of_a_cold_cache(clock: device.CudaClock) -> None:
    x = torch.ones(2 * MIB, device="cuda")  # 8 MiB, which the cache would hold
    clock.turn(lambda k: x.sum(), (0,))
    cold = min(sample.seconds for sample in clock.turn(lambda k: x.sum(), (0,) * 20))
    bandwidth = x.numel() * 4 / cold
    assert bandwidth < 8e12  # no GPU of today reads its memory that fast


def test_wall_time_holds_the_launches(clock: device.CudaClock) -> None:
    x = torch.ones(1, device="cuda")

    def run(_: int) -> None:
        for _ in range(20):
            x.mul_(1.0)

    run(0)
    wall = clock.back_to_back(run, 1, repeats=3)
    graph = clock.graph(run)
    assert wall is not None
    assert graph is not None
    assert 20e-6 < wall < 20e-3
    assert graph < wall


def test_a_call_that_waits_for_the_device_cannot_be_captured(clock: device.CudaClock) -> None:
    x = torch.ones(1, device="cuda")
    before = torch.cuda.current_stream()
    assert clock.graph(lambda k: x.item()) is None
    assert float(x + 1) == 2.0  # the device still works
    assert torch.cuda.current_stream() == before
    assert clock.graph(lambda k: x + 1) is not None


def test_extra_memory_is_of_temporaries(clock: device.CudaClock) -> None:
    x = torch.ones(16 * MIB, dtype=torch.uint8, device="cuda")

    def run(_: int) -> torch.Tensor:
        temporary = x + 1
        return temporary + 1

    assert clock.extra_bytes(run) == pytest.approx(32 * MIB, rel=0.1)
    extra = harness.extra_memory(run, "cuda", returned_bytes=16 * MIB)
    assert extra == pytest.approx(16.0, rel=0.1)


def test_calibration_names_the_limits_of_the_gpu(copy: probes.CopyProbe) -> None:
    found = probes.calibrate(copy)
    assert 50 < found["copy_gb_per_s"] < 20_000
    assert 1 < found["matmul_bf16_tflop_per_s"] < 10_000
    facts = environment.gpu_facts(copy.device)
    assert facts["gpu"]
    assert facts["cuda"]


def test_a_script_runs_on_the_gpu(tmp_path: Path) -> None:
    report = tmp_path / "gae.json"
    arguments = ["--device", "cuda", "--quick", "--rows", "4", "--columns", "64"]
    assert bench_gae.main([*arguments, "--json", str(report)]) == 0
    written = json.loads(report.read_text(encoding="utf-8"))
    (ours,) = [row for row in written["rows"] if row["ours"]]
    assert ours["median_ms"] > 0
    assert ours["wall_ms"] > 0
    assert written["environment"]["gpu"]
