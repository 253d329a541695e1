"""Recorded decoding steps on a CPU: a recorder that repeats the step and watches what it touches.

Replay must find every declared tensor where it was, and a recorded step must not look at a value:
both would go unnoticed on a CPU and be a stale read or a failed capture on a GPU.

Products of another number of rows round differently, so bits are compared with steps that run as
they are at the padded width, and those with steps of the rows alone up to rounding.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from rlhf_fast.engine import decode_graphs
from rlhf_fast.engine.decode_graphs import BUCKETS, bucket_of, context_bucket
from rlhf_fast.engine.hybrid import HybridEngine
from rlhf_fast.engine.live import LiveRequests
from rlhf_fast.engine.requests import Completions, Request
from rlhf_fast.engine.run import Room
from rlhf_fast.engine.settings import EngineSettings
from rlhf_fast.models.forward import set_compute_dtype
from rlhf_fast.types import SamplingParams
from tests.engine.test_fused_lora import trunk_of
from tests.engine.test_generator import EOS, VOCAB, _letters, build, ragged

PAGED = ("fused", "modules")
LOOKS = ("_local_scalar_dense", "item", "nonzero", "is_nonzero", "equal", "masked_select", "unique")


class Looked(AssertionError):
    """A recorded step wanted a value on the host."""


class NoLook(TorchDispatchMode):
    """Raises where CUDA would wait for the device."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket.__name__ in LOOKS:
            raise Looked(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def _place(tensor: Tensor) -> tuple[int, torch.Size, tuple[int, ...]]:
    return tensor.data_ptr(), tensor.shape, tensor.stride()


class RepeatingRecorder:
    """A graph that is the closure itself."""

    made: list[RepeatingRecorder] = []  # noqa: RUF012

    def __init__(self) -> None:
        self.pool_bytes = 0
        self.recorded = 0
        RepeatingRecorder.made.append(self)

    def record(self, body: Callable[[], None], inputs: Sequence[Tensor]) -> Callable[[], None]:
        self.recorded += 1
        self.pool_bytes += 100
        places = [_place(t) for t in inputs]
        graphs: Any = body.__self__  # type: ignore[attr-defined]

        def frozen() -> tuple[Any, ...]:
            """What a graph could not follow: numbers that the host put into the launches."""
            batch = graphs._rows._batch_of(slice(graphs._key[0]), graphs._cache, graphs._key[1])
            return graphs._rows.warps, batch.ids.numel(), batch.max_context

        constants = frozen()

        def replay() -> None:
            assert frozen() == constants
            assert [_place(t) for t in inputs] == places
            with NoLook():
                body()

        return replay


class FailingRecorder(RepeatingRecorder):
    def record(self, body: Callable[[], None], inputs: Sequence[Tensor]) -> Callable[[], None]:
        raise RuntimeError("operation not permitted when stream is capturing\nmore")


@pytest.fixture(autouse=True)
def no_checks_of_values(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU ops read their arguments to check them; on a GPU they do not."""
    RepeatingRecorder.made.clear()
    for name in ("sample", "paged_attention", "rope_and_store"):
        monkeypatch.setattr(
            sys.modules[f"rlhf_fast_kernels.{name}"], "reads_values", lambda _: False
        )


def engine_of(module: Any, path: str, recorder: Any = None, **options: Any) -> HybridEngine:
    eos_ids = options.pop("eos_ids", [EOS])
    decode = options.pop("decode", None)
    settings = EngineSettings(path=path, page_size=4, poison=True, **options)
    engine = HybridEngine(module, eos_ids=eos_ids, settings=settings, decode=decode)
    assert engine._runner is not None
    engine._runner.recorder = recorder
    return engine


def requests(
    sampling: Any, prompts: Any = None, group: int = 2, expected: float | None = None
) -> list[Request]:
    prompts = ragged() if prompts is None else prompts
    kinds = sampling if isinstance(sampling, list) else [sampling]
    return [
        Request(tuple(p), kinds[i % len(kinds)], tuple(range(10 * i, 10 * i + group)), expected)
        for i, p in enumerate(prompts)
    ]


def assert_same_bits(got: Completions, expected: Completions) -> None:
    assert torch.equal(got.lengths, expected.lengths)
    assert torch.equal(got.ended, expected.ended)
    live = torch.arange(expected.tokens.shape[1]) < expected.lengths[:, None]
    for name in ("tokens", "logprobs", "raw_logprobs"):
        assert torch.equal(getattr(got, name)[live], getattr(expected, name)[live]), name


def assert_as_unpadded(got: Completions, expected: Completions) -> None:
    assert torch.equal(got.lengths, expected.lengths)
    assert torch.equal(got.ended, expected.ended)
    live = torch.arange(expected.tokens.shape[1]) < expected.lengths[:, None]
    assert torch.equal(got.tokens[live], expected.tokens[live])
    for name in ("logprobs", "raw_logprobs"):
        mine, theirs = getattr(got, name)[live], getattr(expected, name)[live]
        torch.testing.assert_close(mine, theirs, atol=2e-5, rtol=1e-4)


MIXED = [
    SamplingParams(5, temperature=0.0),
    SamplingParams(12, temperature=0.7),
    SamplingParams(9, temperature=1.3, top_k=5),
    SamplingParams(14, top_p=0.7, stop_token_ids=(7, 9, 11)),
    SamplingParams(3, min_p=0.2),
]
PLAIN = SamplingParams(17, temperature=1.4)
BYTES_OF_A_PAGE = 4 * 2 * 2 * 2 * 8 * 4
SITUATIONS: dict[str, tuple[Any, dict[str, Any]]] = {
    "all at once": (PLAIN, {}),
    "admission": (PLAIN, {"max_batch": 5}),
    "preemption": (PLAIN, {"kv_bytes": 14 * BYTES_OF_A_PAGE, "eos_ids": []}),
    "chunked prefill": (PLAIN, {"prefill_tokens": 3, "max_batch": 7}),
    "settings of their own": (MIXED, {"max_batch": 6}),
    # The short ones are admitted last, into a bucket that ran without filters.
    "a filter joins": (
        [PLAIN, PLAIN, SamplingParams(8, temperature=1.3, top_k=5)],
        {"max_batch": 4, "eos_ids": []},
    ),
    "greedy": (SamplingParams(12, temperature=0.0), {}),
}


@pytest.mark.parametrize("burst", [1, 3, 8])
@pytest.mark.parametrize("situation", SITUATIONS)
@pytest.mark.parametrize("path", PAGED)
def test_replayed_steps_give_the_bits_of_eager_ones(path: str, situation: str, burst: int) -> None:
    sampling, options = SITUATIONS[situation]
    module = build()
    # Who is believed to stop at once is admitted, and gives way when pages run out.
    work = requests(sampling, expected=1.0 if situation == "preemption" else None)
    eager = engine_of(module, path, FailingRecorder, burst=burst, **options)
    replayed = engine_of(module, path, RepeatingRecorder, burst=burst, **options)
    expected, got = eager.complete(work), replayed.complete(work)
    assert_same_bits(got, expected)
    report = replayed.graphs
    assert report.reason is None
    assert report.replays > report.eager > 0
    assert report.pool_bytes == 100 * report.recorded > 0
    assert replayed.preemptions == eager.preemptions
    assert (situation == "preemption") == (eager.preemptions > 0)
    plain = engine_of(module, path, burst=burst, **options)
    assert_as_unpadded(got, plain.complete(work))
    assert plain.graphs == decode_graphs.GraphReport()


@pytest.mark.parametrize("path", PAGED)
def test_stop_strings_are_looked_for_between_replays(path: str) -> None:
    module = build()
    free = engine_of(module, path, eos_ids=[]).complete(requests(PLAIN))
    stop = _letters([free.tokens[0].tolist()])[0][6:9]
    work = requests(SamplingParams(17, temperature=1.4, stop_strings=(stop,)))
    options = {"eos_ids": [], "decode": _letters}
    replayed = engine_of(module, path, RepeatingRecorder, **options)
    got = replayed.complete(work)
    assert_same_bits(got, engine_of(module, path, FailingRecorder, **options).complete(work))
    assert_as_unpadded(got, engine_of(module, path, **options).complete(work))
    assert bool(got.ended[0])
    assert replayed.graphs.replays > 0


def test_bf16_and_adapters_are_recorded() -> None:
    trunk = trunk_of("qwen3", ["all-linear"])
    set_compute_dtype(trunk.model, "bfloat16")
    eager = engine_of(trunk.model, "fused", FailingRecorder, burst=4)
    replayed = engine_of(trunk.model, "fused", RepeatingRecorder, burst=4)
    for role in ("actor", None):
        with trunk.adapter(role):
            assert_same_bits(replayed.complete(requests(PLAIN)), eager.complete(requests(PLAIN)))
        assert replayed.graphs.reason is None
        assert replayed.graphs.replays > 0


@pytest.mark.parametrize("path", PAGED)
def test_a_failed_capture_says_why_and_changes_nothing(path: str) -> None:
    module, work = build(), requests(MIXED)
    engine = engine_of(module, path, FailingRecorder, burst=3)
    assert_as_unpadded(engine.complete(work), engine_of(module, path, burst=3).complete(work))
    assert engine.graphs.reason == (
        "RuntimeError: operation not permitted when stream is capturing"
    )
    assert engine.graphs.replays == engine.graphs.recorded == 0


def test_a_look_at_a_value_would_be_seen() -> None:
    with NoLook(), pytest.raises(Looked):
        bool(torch.ones(1).sum() > 0)


def test_every_run_records_anew_and_weights_may_move_between_them() -> None:
    module, work = build(), requests(PLAIN)
    engine = engine_of(module, "modules", RepeatingRecorder, burst=4)
    first = engine.complete(work)
    with torch.no_grad():
        for p in module.parameters():
            p.data = -p.data  # elsewhere
    second = engine.complete(work)
    assert [r.recorded > 0 for r in RepeatingRecorder.made] == [True, True]
    assert_as_unpadded(second, engine_of(module, "modules").complete(work))
    assert not torch.equal(first.tokens, second.tokens)


@pytest.mark.parametrize("moved", ["weights", "pages"])
def test_an_address_that_changed_within_a_run_is_recorded_again(moved: str) -> None:
    module, work = build(), requests(PLAIN)
    engine = engine_of(module, "modules", RepeatingRecorder, burst=2, eos_ids=[])
    recorded = []

    def move(progress: Any) -> None:
        recorded.append(RepeatingRecorder.made[-1].recorded)
        if len(recorded) == 4:
            if moved == "weights":
                norm = module.model.norm.weight
                norm.data = norm.data.clone()
            else:
                cache = engine._runner.cache  # type: ignore[union-attr]
                old = cache._storage  # type: ignore[union-attr]
                cache._storage = old.clone()  # type: ignore[union-attr]
                cache._views = [  # type: ignore[union-attr]
                    (layer[0].transpose(1, 2), layer[1].transpose(1, 2))
                    for layer in cache._storage  # type: ignore[union-attr]
                ]

    engine.on_progress = move
    got = engine.complete(work)
    assert recorded[3] == recorded[2] < recorded[-1]
    assert_as_unpadded(got, engine_of(module, "modules", eos_ids=[]).complete(work))


def test_buckets_hold_their_rows() -> None:
    assert [bucket_of(n) for n in (1, 3, 5, 17, 129, 512, 513, 1000)] == [
        1, 4, 8, 24, 192, 512, 768, 1024,
    ]  # fmt: skip
    assert all(bucket_of(b) == b for b in BUCKETS)
    assert [context_bucket(n, 4, 100) for n in (1, 16, 17, 33, 399)] == [16, 16, 32, 64, 400]
    assert context_bucket(5, 4, 3) == 12


def test_rows_that_pad_a_bucket_leave_every_sample_alone() -> None:
    """Nine rows run as sixteen; the padding writes to a row of its own."""
    prompts = [[3 + i % (VOCAB - 3)] for i in range(9)]
    engine = engine_of(build(), "fused", RepeatingRecorder, burst=4, eos_ids=[])
    got = engine.complete(requests(PLAIN, prompts, group=1))
    assert got.tokens.shape == (9, 17)
    assert got.lengths.tolist() == [17] * 9
    assert_as_unpadded(
        got, engine_of(build(), "fused", eos_ids=[]).complete(requests(PLAIN, prompts, group=1))
    )
    assert not bool(got.ended.any())


@pytest.mark.parametrize("path", PAGED)
def test_requests_that_join_and_leave_a_run_are_replayed_like_others(path: str) -> None:
    """Three places for eight requests; a filter comes and goes, one is given up, one is longer."""
    engine = engine_of(build(), path, RepeatingRecorder, burst=2, max_batch=3, eos_ids=[])
    live = LiveRequests(engine, Room(3, 14, 40, 4))
    asked = [
        Request(tuple(prompt), MIXED[i % len(MIXED)], (100 + i,))
        for i, prompt in enumerate(ragged()[:8])
    ]
    futures = [live.submit(each) for each in asked]
    gone = live.submit(Request(tuple(ragged()[0]), SamplingParams(14), (1,)))
    live.abort([gone])
    longer = Request(tuple(ragged()[1]), SamplingParams(30), (2,))
    last = live.submit(longer)
    plain = engine_of(build(), path, FailingRecorder, max_batch=3, eos_ids=[])
    for each, future in zip([*asked, longer], [*futures, last], strict=True):
        expected = plain.complete([each])
        assert future.result(60).tokens == expected.tokens[0, : int(expected.lengths[0])].tolist()
    assert gone.result(60).aborted
    live.close()
    assert engine.graphs.reason is None
    assert engine.graphs.replays > 0
