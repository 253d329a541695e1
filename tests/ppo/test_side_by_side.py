"""Independent models at the same time: the same numbers, errors, modes and threads."""

from __future__ import annotations

import contextvars
import threading

import pytest
import torch

from rlhf_fast.ppo.side_by_side import SideBySide

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def meeting():
    """Calls that end only if they run at the same time."""
    barrier = threading.Barrier(2, timeout=20)

    def call(result):
        barrier.wait()
        return result

    return [lambda: call("first"), lambda: call("second")]


def test_calls_run_at_the_same_time_and_results_keep_their_order():
    assert SideBySide(independent=True).run(meeting(), CPU) == ["first", "second"]


def test_more_calls_than_threads_all_run():
    calls = [lambda n=n: n * n for n in range(7)]
    assert SideBySide(independent=True).run(calls, CPU) == [n * n for n in range(7)]
    assert SideBySide(independent=True).run([], CPU) == []


@pytest.mark.parametrize(
    ("independent", "most", "device", "threads"),
    [(False, 0, CPU, 2), (True, 1, CPU, 2), (True, 0, torch.device("cuda"), 2), (True, 0, CPU, 1)],
)
def test_otherwise_one_after_another_on_the_calling_thread(independent, most, device, threads):
    torch.set_num_threads(threads)
    seen = []
    calls = [lambda: seen.append((1, threading.get_ident(), torch.get_num_threads()))]
    calls.append(lambda: seen.append((2, threading.get_ident(), torch.get_num_threads())))
    SideBySide(independent, most).run(calls, device)
    me = threading.get_ident()
    assert seen == [(1, me, threads), (2, me, threads)]


def test_more_models_than_threads_may_be_asked_for():
    torch.set_num_threads(1)
    assert SideBySide(independent=True, most=2).run(meeting(), CPU) == ["first", "second"]
    assert torch.get_num_threads() == 1


def test_threads_are_shared_and_given_back():
    torch.set_num_threads(5)
    shares = SideBySide(independent=True, most=2).run([torch.get_num_threads] * 2, CPU)
    assert shares == [2, 2]
    assert torch.get_num_threads() == 5


@pytest.mark.parametrize(
    ("threads", "most", "calls", "shares"),
    [
        (2, 0, 3, [1, 1, 2]),
        (2, 0, 4, [1, 1, 1, 1]),
        (4, 0, 6, [1, 1, 1, 1, 4, 4]),
        (4, 0, 7, [1] * 7),  # three of four threads are busy: by themselves they would take longer
        (1, 2, 3, [1, 1, 1]),  # more workers than threads: nobody is idle
    ],
)
def test_what_would_leave_threads_idle_gets_all_of_them(threads, most, calls, shares):
    torch.set_num_threads(threads)
    assert SideBySide(True, most).run([torch.get_num_threads] * calls, CPU) == shares


def test_an_error_of_the_first_keeps_the_last_from_running():
    seen = []

    def fails():
        raise ValueError("of the first")

    with pytest.raises(ValueError, match="of the first"):
        SideBySide(independent=True).run([fails, lambda: None, lambda: seen.append(1)], CPU)
    assert seen == []


def test_grad_mode_and_context_are_the_callers():
    variable = contextvars.ContextVar("variable", default="default")
    variable.set("mine")
    barrier = threading.Barrier(2, timeout=20)

    def look():
        barrier.wait()
        return torch.is_grad_enabled(), variable.get()

    side_by_side = SideBySide(independent=True)
    with torch.no_grad():
        assert side_by_side.run([look, look], CPU) == [(False, "mine")] * 2
    assert side_by_side.run([look, look], CPU) == [(True, "mine")] * 2


def test_an_error_waits_for_the_others_and_leaves_it_usable():
    side_by_side, ended = SideBySide(independent=True), threading.Event()
    barrier = threading.Barrier(2, timeout=20)

    def fails():
        barrier.wait()
        raise ValueError("of the second")

    def works():
        barrier.wait()
        torch.randn(300, 300).matmul(torch.randn(300, 300))
        ended.set()

    with pytest.raises(ValueError, match="of the second"):
        side_by_side.run([works, fails], CPU)
    assert ended.is_set()
    assert torch.get_num_threads() == 2
    assert side_by_side.run(meeting(), CPU) == ["first", "second"]


def test_gradients_are_those_of_one_after_another():
    torch.set_num_threads(1)  # the same products either way

    def gradients(side_by_side):
        generator = torch.Generator().manual_seed(0)
        models = [torch.nn.Linear(64, 64, bias=False) for _ in range(2)]
        for model in models:
            torch.nn.init.normal_(model.weight, generator=generator)
        x = torch.randn(500, 64, generator=generator)
        calls = [lambda m=m: m(x).tanh().square().sum().backward() for m in models]
        side_by_side.run(calls, CPU)
        return [m.weight.grad for m in models]

    alone = gradients(SideBySide(independent=False))
    together = gradients(SideBySide(independent=True, most=2))
    for one, other in zip(alone, together, strict=True):
        assert torch.equal(one, other)
