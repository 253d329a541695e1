"""Requests that join a run while others go on: what they draw, who waits, who is given up."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import Future, wait
from typing import Any

import pytest
import torch
from torch import nn

from rlhf_fast.engine import run as run_module
from rlhf_fast.engine.hybrid import HybridEngine, Mode
from rlhf_fast.engine.live import Answer, LiveRequests
from rlhf_fast.engine.requests import Request
from rlhf_fast.engine.run import Room, Run
from rlhf_fast.engine.settings import EngineSettings
from rlhf_fast.errors import GenerationError
from rlhf_fast.types import SamplingParams

VOCAB, WIDTH = 40, 24
ROOM = Room(samples=4, columns=WIDTH, longest=WIDTH + 16, stops=1)


def build_model() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=VOCAB, **sizes, **heads)).float()


def build_engine(**options: Any) -> HybridEngine:
    settings = EngineSettings(**{"max_batch": 4, "page_size": 8, "burst": 2} | options)
    return HybridEngine(build_model(), eos_ids=[3], settings=settings)


@pytest.fixture
def live() -> Iterator[LiveRequests]:
    made = LiveRequests(build_engine(), ROOM)
    yield made
    made.close()


def request(index: int, tokens: int = WIDTH, **options: Any) -> Request:
    prompt = tuple(5 + (index * 7 + k) % 30 for k in range(3 + index % 4))
    return Request(prompt, SamplingParams(tokens, **options), (100 + index,), name=f"r{index}")


def alone(each: Request, **options: Any) -> Answer:
    out = build_engine(**options).complete([each])
    length = int(out.lengths[0])
    parts = (x[0, :length].tolist() for x in (out.tokens, out.logprobs, out.raw_logprobs))
    return Answer(*parts, bool(out.ended[0]))


def require_same(found: Answer, expected: Answer) -> None:
    assert (found.tokens, found.ended, found.aborted) == (expected.tokens, expected.ended, False)
    for mine, theirs in ((found.logprobs, expected.logprobs),):
        torch.testing.assert_close(torch.tensor(mine), torch.tensor(theirs), rtol=0, atol=1e-5)


class Gate:
    """Stops the run after its first turn until it is opened; remembers how many ran at a turn."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.turned, self.opened = threading.Event(), threading.Event()
        self.rows: list[int] = []
        turn = Run.turn

        def watched(run: Run) -> None:
            turn(run)
            self.rows.append(len(run.scheduler.rows))
            self.turned.set()
            assert self.opened.wait(60)

        monkeypatch.setattr(run_module.Run, "turn", watched)


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Gate:
    return Gate(monkeypatch)


def results(futures: list[Future[Answer]]) -> list[Answer]:
    assert not wait(futures, timeout=60).not_done
    return [future.result() for future in futures]


def test_who_comes_later_joins_and_draws_what_it_draws_alone(gate: Gate) -> None:
    """Ten requests of different settings through four places, nine of them while one runs."""
    live = LiveRequests(build_engine(), ROOM)
    kinds = [{"temperature": 0.0}, {"temperature": 0.7}, {"top_k": 5}, {"top_p": 0.8}, {}]
    asked = [request(i, 6 + 2 * i, **kinds[i % 5]) for i in range(10)]
    futures = [live.submit(asked[0])]
    assert gate.turned.wait(60)
    futures += [live.submit(each) for each in asked[1:]]
    assert not futures[0].done()
    gate.opened.set()
    for found, each in zip(results(futures), asked, strict=True):
        require_same(found, alone(each))
    assert max(gate.rows) == 4
    assert live.unanswered == 0
    live.close()


def test_equal_prompts_share_a_prefill_and_pages_run_out(gate: Gate) -> None:
    """Six pages of eight tokens for four rows: some give way, and draw the same all the same."""
    engine = build_engine(kv_bytes=6 * 8 * 2 * 2 * 2 * 8 * 4)
    live = LiveRequests(engine, ROOM)
    # Expected to be short, so that all four are let in.
    asked = [Request((5, 6, 7), SamplingParams(WIDTH), (i,), expected=1.0) for i in range(6)]
    asked += [request(3)]
    futures = [live.submit(each) for each in asked]
    gate.opened.set()
    for found, each in zip(results(futures), asked, strict=True):
        require_same(found, alone(each))
    live.close()
    assert engine.preemptions > 0


def test_a_stop_string_ends_its_own_request_alone() -> None:
    def decode(rows: list[list[int]]) -> list[str]:
        return ["".join(f"<{token}>" for token in row) for row in rows]

    engine = HybridEngine(
        build_model(), eos_ids=[3], decode=decode, settings=EngineSettings(max_batch=4)
    )
    live = LiveRequests(engine, ROOM)
    plain = live.submit(request(1)).result(60)
    stop = f"<{plain.tokens[4]}>"
    first = plain.tokens.index(plain.tokens[4])
    both = [live.submit(request(1)), live.submit(request(1, stop_strings=(stop,)))]
    untouched, stopped = results(both)
    assert untouched.tokens == plain.tokens
    assert stopped.tokens == plain.tokens[: first + 1]
    assert stopped.ended
    live.close()


def test_abort_answers_with_what_was_drawn_and_leaves_the_others(gate: Gate) -> None:
    live = LiveRequests(build_engine(), ROOM)
    asked = [request(i) for i in range(6)]
    futures = [live.submit(each) for each in asked]
    assert gate.turned.wait(60)
    live.abort([futures[0], futures[5]])
    gate.opened.set()
    found = results(futures)
    whole = alone(asked[0])
    assert found[0].aborted
    assert 0 < len(found[0].tokens) < len(whole.tokens)
    assert found[0].tokens == whole.tokens[: len(found[0].tokens)]
    assert found[5] == Answer([], [], [], False, aborted=True)
    for index in (1, 2, 3, 4):
        require_same(found[index], alone(asked[index]))
    live.close()


def test_pause_ends_everything_and_weights_may_change(gate: Gate) -> None:
    engine = build_engine()
    live = LiveRequests(engine, ROOM)
    futures = [live.submit(request(i, temperature=0.0)) for i in range(6)]
    assert gate.turned.wait(60)
    assert engine.mode is Mode.GENERATE
    gate.opened.set()
    live.pause()
    assert all(answer.aborted or answer.ended for answer in results(futures))
    assert engine.mode is Mode.TRAIN
    later = live.submit(request(0, temperature=0.0))
    with torch.no_grad():
        for parameter in engine.module.parameters():
            parameter.copy_(parameter.flip(0))
    assert not later.done()
    live.resume()
    changed = later.result(60)
    assert changed.tokens != alone(request(0, temperature=0.0)).tokens
    live.close()
    with pytest.raises(RuntimeError, match="closed"):
        live.submit(request(0))


def test_a_request_beyond_the_room_waits_for_a_larger_run(live: LiveRequests) -> None:
    long = Request((5, 6, 7), SamplingParams(90, stop_token_ids=(8, 9, 10)), (1,))
    asked = [request(0), long, request(1)]
    for found, each in zip(results([live.submit(r) for r in asked]), asked, strict=True):
        require_same(found, alone(each))


@pytest.mark.parametrize(
    ("wrong", "code"),
    [
        (Request((), SamplingParams(4), (1,)), "RF4005"),
        (Request((VOCAB,), SamplingParams(4), (1,)), "RF4009"),
        (Request((5, 6.0), SamplingParams(4), (1,)), "RF4009"),
        (Request((5, None), SamplingParams(4), (1,)), "RF4009"),
        (Request((5,), SamplingParams(4, top_p=2.0), (1,)), "RF4001"),
        (Request((5,), SamplingParams(10**6), (1,)), "RF4006"),
        (Request((5,), SamplingParams(4, top_k=7.0), (1,)), "RF4001"),
        (Request((5,), SamplingParams(4, stop_strings=("a",)), (1,)), "RF4002"),
        (Request((5,), SamplingParams(4), (2**63,)), "RF4004"),
        (Request((5,), SamplingParams(4), (3.0,)), "RF4004"),
    ],
)
def test_what_cannot_be_generated_is_refused_at_once(
    live: LiveRequests, wrong: Request, code: str
) -> None:
    with pytest.raises(GenerationError, match=code):
        live.submit(wrong)
    require_same(live.submit(request(0)).result(60), alone(request(0)))


def test_a_request_that_no_page_holds_fails_alone() -> None:
    live = LiveRequests(build_engine(kv_bytes=6 * 8 * 2 * 2 * 2 * 8 * 4), ROOM)
    long = Request((5, 6, 7), SamplingParams(200), (1,))
    first, failed, second = (live.submit(each) for each in (request(0), long, request(1)))
    require_same(first.result(60), alone(request(0)))
    with pytest.raises(GenerationError, match="RF4007"):
        failed.result(60)
    require_same(second.result(60), alone(request(1)))
    live.close()


def test_weights_of_nan_fail_who_runs_and_the_next_one_goes_on(live: LiveRequests) -> None:
    head = live._engine.module.lm_head.weight
    kept = head.detach().clone()
    with torch.no_grad():
        head.fill_(float("nan"))
    with pytest.raises(GenerationError, match="RF4010"):
        live.submit(request(0)).result(60)
    with torch.no_grad():
        head.copy_(kept)
    require_same(live.submit(request(0)).result(60), alone(request(0)))


def test_no_page_at_all_fails_everybody_instead_of_waiting_for_ever() -> None:
    live = LiveRequests(build_engine(kv_bytes=8), ROOM)
    futures = [live.submit(request(i)) for i in range(3)]
    wait(futures, timeout=60)
    for future in futures:
        with pytest.raises(GenerationError, match="RF4007"):
            future.result(0)
    live.close()


def test_room_for_nobody_is_refused_instead_of_waiting_for_ever() -> None:
    with pytest.raises(ValueError, match="room for 0 samples"):
        LiveRequests(build_engine(), Room(samples=0, columns=WIDTH, longest=WIDTH, stops=1))


def test_a_path_whose_requests_cannot_join_says_so() -> None:
    engine = HybridEngine(build_model(), eos_ids=[3], settings=EngineSettings(path="padded"))
    live = LiveRequests(engine, ROOM)
    with pytest.raises(GenerationError, match="RF4035"):
        live.submit(request(0)).result(60)
    live.close()
