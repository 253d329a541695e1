"""The harness: who is timed, how memory is counted, what stands in a row, what a report holds."""

from __future__ import annotations

import json
import math
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from bench.kernels import device, environment, harness, probes
from tests.bench.fakes import FakeCuda

MIB = 1 << 20


@dataclass
class ScriptedClock:
    """A clock whose calls take what their contender says; it remembers who ran on what."""

    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    turns: list[tuple[str, list[int]]] = field(default_factory=list)

    def calls_per_turn(self, run: Any, calls: int, repeats: int) -> int:
        return calls

    def turn(self, run: Any, ring: Sequence[int]) -> list[device.Sample]:
        name, seconds = run(ring[0])
        self.turns.append((name, list(ring)))
        return [device.Sample(seconds, 2 * seconds)]

    def back_to_back(self, run: Any, sets: int, repeats: int) -> float | None:
        return 3 * run(0)[1]

    def graph(self, run: Any) -> float | None:
        return run(0)[1] / 2

    def extra_bytes(self, run: Any) -> int | None:
        return 5 * MIB


class ScriptedProbe:
    name = "of read"
    device = torch.device("cpu")
    bytes = 10**9
    flops = 10**12

    def run(self, k: int) -> tuple[str, float]:
        return "probe", 0.1  # 10 GB/s, 10 TFLOP/s


def contender(
    name: str, seconds: float = 0.01, error: float = 0.0, **more: Any
) -> harness.Contender:
    return harness.Contender(name, lambda k: (name, seconds), error, 1e-6, **more)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> ScriptedClock:
    result = ScriptedClock()
    monkeypatch.setattr(harness, "clock_of", lambda device: result)
    return result


def measure(*contenders: harness.Contender, **more: Any) -> dict[str, harness.Row]:
    settings: dict[str, Any] = {"sets": 3, "bytes_moved": 50_000_000, "probe": ScriptedProbe()}
    rows = harness.measure("case", contenders, **(settings | {"repeats": 4} | more))
    return {row.contender: row for row in rows}


# ---- what a row holds ----------------------------------------------------------------------------


@pytest.mark.parametrize("error", [1e-3, math.nan, math.inf])
def test_who_fails_the_error_gate_has_no_speed(
    clock: ScriptedClock, error: float, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = measure(contender("wrong", error=error, ours=True), contender("right", 0.02))
    assert all(name != "wrong" for name, _ in clock.turns)
    filled = {k for k, v in asdict(rows["wrong"]).items() if v is not None}
    assert filled == {"case", "contender", "ours", "error", "error_limit", "repeats"}
    assert rows["right"].median_ms == pytest.approx(20.0)
    assert harness.exit_code(list(rows.values())) == 1
    harness.print_rows(list(rows.values()))
    line = next(x for x in capsys.readouterr().out.splitlines() if x.strip().startswith("wrong"))
    assert "error gate" in line
    assert "20" not in line


def test_a_peer_that_fails_its_gate_is_no_failure_and_no_rival(clock: ScriptedClock) -> None:
    rows = measure(contender("ours", ours=True), contender("fast", 1e-6, error=1.0))
    assert rows["ours"].gain is None
    assert harness.exit_code(list(rows.values())) == 0


def test_contenders_take_turns_on_rotated_inputs(clock: ScriptedClock) -> None:
    measure(contender("a"), contender("b"), calls=2, matmul=ScriptedProbe())
    assert [name for name, _ in clock.turns] == ["probe", "probe", "a", "b"] * 4
    rings = [ring for name, ring in clock.turns if name == "a"]
    assert rings == [[0, 1], [2, 0], [1, 2], [0, 1]]


def test_rates_are_set_against_the_probes(clock: ScriptedClock) -> None:
    rows = measure(
        contender("ours", 0.01, ours=True),
        contender("peer", 0.04),
        flops=20 * 10**9,
        matmul=ScriptedProbe(),
    )
    assert rows["ours"].gb_per_s == pytest.approx(5.0)
    assert rows["ours"].of_bandwidth == pytest.approx(0.5)
    assert rows["ours"].tflops == pytest.approx(2.0)
    assert rows["ours"].of_matmul == pytest.approx(0.2)
    assert rows["peer"].of_matmul == pytest.approx(0.05)
    assert rows["peer"].gb_per_s is None
    assert rows["ours"].cpu_ms == pytest.approx(20.0)
    assert rows["ours"].wall_ms == pytest.approx(30.0)


def test_without_flops_there_is_no_rate_of_products(clock: ScriptedClock) -> None:
    row = measure(contender("ours", ours=True), matmul=ScriptedProbe())["ours"]
    assert (row.tflops, row.of_matmul) == (None, None)


def test_gains_are_over_the_fastest_peer_and_the_fastest_eager_one(clock: ScriptedClock) -> None:
    rows = measure(
        contender("ours", 0.01, ours=True),
        contender("ours too", 0.001, ours=True),
        contender("eager", 0.05),
        contender("compile eager", 0.02),
    )
    assert rows["ours"].gain == pytest.approx(2.0)
    assert rows["ours"].gain_over_eager == pytest.approx(5.0)
    assert rows["eager"].gain is None


def test_what_must_be_returned_is_not_extra(clock: ScriptedClock) -> None:
    rows = measure(
        contender("plain"),
        contender("gradient", returned_bytes=4 * MIB),
        contender("in place", returned_bytes=9 * MIB),
    )
    assert [rows[name].extra_mib for name in ("plain", "gradient", "in place")] == [5.0, 1.0, 0.0]


def test_only_what_is_declared_safe_is_captured_in_a_graph(clock: ScriptedClock) -> None:
    rows = measure(contender("syncs"), contender("safe", graph_safe=True))
    assert rows["syncs"].graph_ms is None
    assert rows["safe"].graph_ms == pytest.approx(5.0)


def test_results_of_another_device_than_the_probes_are_refused(clock: ScriptedClock) -> None:
    elsewhere = harness.Contender("x", lambda k: (torch.empty(1, device="meta"), 1.0), 0.0, 1.0)
    with pytest.raises(ValueError, match="x computes on meta, the probe is on cpu"):
        measure(elsewhere)


def test_percentiles_stand_beside_the_median() -> None:
    row = harness.Row("case", "name", False, 0.0, 1.0)
    harness._fill(row, [device.Sample(1e-3 * x) for x in (9, 1, 2, 3, 4, 5, 6, 7, 8, 10, 11)])
    assert (row.p20_ms, row.median_ms, row.p80_ms) == pytest.approx((3, 6, 9))
    assert (row.repeats, row.cpu_ms) == (11, None)


# ---- the CPU's clock -----------------------------------------------------------------------------


def test_time_on_the_cpu_is_a_mean_over_the_turn() -> None:
    def busy(_: int) -> None:
        end = device.time.perf_counter() + 2e-3
        while device.time.perf_counter() < end:
            pass

    (sample,) = device.CpuClock().turn(busy, (0, 1, 2))
    assert 2e-3 <= sample.seconds < 50e-3
    assert sample.cpu_seconds is not None


@pytest.mark.parametrize("size", [12 * MIB, 64 * MIB])
def test_peak_memory_sees_temporaries_and_not_what_is_returned(size: int) -> None:
    def run(_: int) -> torch.Tensor:
        temporary = torch.ones(size, dtype=torch.uint8)
        gradient = temporary + temporary
        del temporary
        return gradient

    # Pages that the allocator keeps must not hide those of the call. glibc keeps chunks of up to
    # the size of the largest that it freed.
    torch.ones(24 * MIB, dtype=torch.uint8)
    kept = [torch.ones(MIB, dtype=torch.uint8) for _ in range(16)]
    del kept
    run(0)
    extra = harness.extra_memory(run)
    if extra is None:
        pytest.skip("this system has no clear_refs")
    # The system's large pages (2 MiB): either buffer may reach into one more than it fills. Far
    # less than the temporary, which is what a wrong measure would miss or count twice.
    slack = 4.2
    assert extra == pytest.approx(2 * size / MIB, abs=slack)
    assert harness.extra_memory(run, returned_bytes=size) == pytest.approx(size / MIB, abs=slack)


def test_inputs_do_not_count_as_extra() -> None:
    x = torch.ones(8 * MIB)
    x.sum()  # the first call brings in the code's own pages
    extra = harness.extra_memory(lambda _: x.sum())
    assert extra is None or extra < 1.0


def test_bytes_of_gradients() -> None:
    assert harness.bytes_of(torch.empty(3, 5), torch.empty(7, dtype=torch.bfloat16)) == 74


# ---- the GPU's clock -----------------------------------------------------------------------------


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    fake = FakeCuda()
    fake.install(monkeypatch)
    return fake


def test_each_gpu_call_is_timed_alone_after_a_flush(gpu: FakeCuda) -> None:
    def run(k: int) -> None:
        gpu.order.append(f"run {k}")
        gpu.tick(1.0 + k)

    samples = device.clock_of(torch.device("cuda", 0)).turn(run, (0, 1, 0))
    assert gpu.order == ["flush", "run 0", "flush", "run 1", "flush", "run 0"]
    assert [sample.seconds for sample in samples] == pytest.approx([1e-3, 2e-3, 1e-3])
    assert all(sample.cpu_seconds is None for sample in samples)
    assert gpu.synchronized == 2  # around the turn: the host must run ahead within


@pytest.mark.parametrize(("milliseconds", "calls"), [(0.02, 12), (50.0, 4), (5000.0, 1), (0.0, 12)])
def test_long_gpu_calls_get_fewer_samples(gpu: FakeCuda, milliseconds: float, calls: int) -> None:
    clock = device.CudaClock(torch.device("cuda", 0))
    assert clock.calls_per_turn(lambda k: gpu.tick(milliseconds), 20, repeats=9) == calls


def test_wall_time_is_of_many_calls_in_a_row(gpu: FakeCuda) -> None:
    seen = []

    def run(k: int) -> None:
        seen.append(k)
        gpu.tick(0.1)

    wall = device.CudaClock(torch.device("cuda", 0)).back_to_back(run, 3, repeats=5)
    assert wall == pytest.approx(1e-4, rel=0.1)
    assert len(seen) == pytest.approx(1003, rel=0.05)
    assert set(seen) == {0, 1, 2}
    assert "flush" not in gpu.order


def test_gpu_memory_is_the_growth_of_the_allocators_peak(gpu: FakeCuda) -> None:
    def run(_: int) -> None:
        gpu.allocate(7 * MIB)
        gpu.free(5 * MIB)

    gpu.allocate(100 * MIB)
    gpu.free(50 * MIB)  # an older peak does not count
    extra = harness.extra_memory(run, torch.device("cuda", 0), returned_bytes=2 * MIB)
    assert extra == pytest.approx(5.0)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_call_that_no_graph_can_hold_has_no_graph_time(
    gpu: FakeCuda, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = device.CudaClock(torch.device("cuda", 0))
    assert clock.graph(lambda k: None) is None  # there is no GPU to capture on
    assert "no CUDA graph" in capsys.readouterr().err


def test_a_failed_capture_leaves_stream_and_allocator_as_they_were(
    gpu: FakeCuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    told, streams = [], ["current"]

    class Capture:
        """As torch.cuda.graph: its stream stays where the end of the capture raises."""

        def __init__(self, graph: Any, pool: Any) -> None: ...
        def __enter__(self) -> None:
            streams.append("capture")

        def __exit__(self, *_: Any) -> None:
            raise RuntimeError("operation failed due to a previous error during capture")

    @contextmanager
    def stream(_: Any) -> Iterator[None]:
        before = list(streams)
        try:
            yield
        finally:
            streams[:] = before

    side = SimpleNamespace(wait_stream=lambda other: None)
    for name, value in {
        "CUDAGraph": object,
        "Stream": lambda _: side,
        "current_device": lambda: 0,
        "current_stream": lambda _: side,
        "graph": Capture,
        "graph_pool_handle": lambda: (0, 7),
        "stream": stream,
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    for name in ("_cuda_endAllocateToPool", "_cuda_releasePool"):
        monkeypatch.setattr(torch._C, name, lambda *args: told.append(args), raising=False)
    assert device.CudaClock(torch.device("cuda", 0)).graph(lambda k: None) is None
    assert streams == ["current"]
    assert told == [(0, (0, 7))] * 2


def test_the_report_names_the_gpu(gpu: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def smi(*command: str) -> str:
        asked.append(command)
        return "1980, 350.2, [N/A]" if "clocks.sm" in command[2] else "580.1"

    monkeypatch.setattr(environment, "_output", smi)
    facts = environment.gpu_facts(torch.device("cuda", 0))
    assert (facts["gpu"], facts["driver"], facts["gpu_capability"]) == ("Fake GPU", "580.1", "9.0")
    clocks = environment.gpu_clocks(torch.device("cuda", 0))
    assert clocks == {"sm_mhz": 1980.0, "power_w": 350.2}
    assert all(command[0] == "nvidia-smi" for command in asked)


# ---- probes and sessions -------------------------------------------------------------------------


def test_a_matmul_probe_counts_its_flops() -> None:
    probe = probes.MatmulProbe(torch.bfloat16, shape=(8, 16, 32))
    probe.run(0)
    want = probe.left.float() @ probe.right.float()
    torch.testing.assert_close(probe.product.float(), want, rtol=1e-2, atol=0.1)
    assert probe.flops == 2 * 8 * 16 * 32
    assert probe.tflops(1) > 0


class SmallReadProbe(ScriptedProbe):
    def gb_per_s(self, repeats: int) -> float:
        return next(self.rates)

    def __init__(self, *rates: float) -> None:
        self.rates = iter(rates)


@pytest.fixture
def quick_probes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probes, "CPU_PRODUCT", (16, 16, 16))
    monkeypatch.setattr(harness, "bandwidth_probe", lambda device: SmallReadProbe(10.0, 20.0))
    monkeypatch.setattr(harness, "DRIFT", 1.5)


@pytest.mark.usefixtures("quick_probes")
def test_a_session_from_start_to_report(
    clock: ScriptedClock, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "report.json"
    arguments = ["--quick", "--threads", "1", "--json", str(path)]
    session = harness.start(harness.parser("test").parse_args(arguments))
    assert (session.repeats, session.device.type) == (harness.QUICK_REPEATS, "cpu")
    session.report.absent["Liger"] = "not installed"
    ours = [contender("ours", ours=True), contender("wrong", error=1.0)]
    session.add(harness.measure("case", ours, sets=2, bytes_moved=10, **session.limits()))
    assert len(json.loads(path.read_text())["rows"]) == 2  # before the end, in case it never comes
    assert session.finish() == 0
    report = json.loads(path.read_text())
    assert report == asdict(session.report)
    assert harness.Row(**report["rows"][0]) == session.report.rows[0]
    assert report["absent"] == {"Liger": "not installed"}
    facts = report["environment"]
    for key in ("commit", "torch", "triton", "cpu", "threads", "device", "time"):
        assert facts[key] is not None, key
    assert facts["calibration_before"]["read_gb_per_s"] == 10.0
    assert facts["calibration_after"]["read_gb_per_s"] == 20.0
    out = capsys.readouterr().out
    assert "not measured: Liger: not installed" in out
    assert "the machine changed under the run: read_gb_per_s was 10, is 20" in out


@pytest.mark.usefixtures("quick_probes")
def test_matmul_probes_of_a_session_are_kept_while_they_serve() -> None:
    session = harness.start(harness.parser("test").parse_args(["--threads", "1"]))
    first = session.matmul(torch.float32, (4, 4, 4))
    assert session.matmul(torch.float32, (4, 4, 4)) is first
    assert session.matmul(torch.bfloat16).dtype == torch.bfloat16
    assert len(session.products) == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_device_that_is_not_there_is_said() -> None:
    options = harness.parser("test").parse_args(["--device", "cuda"])
    with pytest.raises(SystemExit, match="sees no CUDA device"):
        harness.start(options)


def test_a_commit_can_be_named_where_there_is_no_history(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "_output", lambda *command: "")
    monkeypatch.setenv(environment.COMMIT_VARIABLE, "abc123")
    assert environment.environment(1)["commit"] == "abc123"


def test_the_commit_of_a_repository_around_an_installation_is_not_ours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    installed = tmp_path / "site-packages" / "rlhf_fast_bench" / "kernels"
    cloned = tmp_path / "bench" / "kernels"
    for folder in (installed, cloned):
        folder.mkdir(parents=True)
    who = ("-c", "user.name=a", "-c", "user.email=a@b.c")
    for command in (("init", "-q"), (*who, "commit", "-q", "--allow-empty", "-m", "first")):
        subprocess.run(["git", *command], cwd=tmp_path, check=True)
    monkeypatch.delenv(environment.COMMIT_VARIABLE, raising=False)
    monkeypatch.setattr(environment, "HERE", installed)
    assert environment.environment(1)["commit"] == ""
    monkeypatch.setattr(environment, "HERE", cloned)
    assert len(environment.environment(1)["commit"]) == 12


def test_an_installation_from_a_repository_has_the_commit_that_pip_noted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    noted = {"url": "https://a.b/c", "vcs_info": {"vcs": "git", "commit_id": "0123456789abcdef"}}
    found = SimpleNamespace(version="1", read_text=lambda name: json.dumps(noted))
    monkeypatch.setattr(environment.importlib.metadata, "distribution", lambda name: found)
    monkeypatch.setattr(environment, "_git", lambda *arguments: "")
    assert environment.environment(1)["commit"] == "0123456789ab"


def test_columns_that_nothing_fills_are_left_out(
    clock: ScriptedClock, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = measure(contender("a peer with quite a long name, without entropy"))
    harness.print_rows(list(rows.values()))
    lines = capsys.readouterr().out.splitlines()
    assert "TFLOP/s" not in lines[1]
    assert "gain" not in lines[1]
    assert len(lines[1]) == len(lines[2])
