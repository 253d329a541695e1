"""The page allocator: sharing, copy-on-write, all or nothing, errors; C++ beside Python."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from rlhf_fast_kernels import PageAllocator, native

BUILT = native.missing("PageAllocator") is None
IMPLS = ["reference", *(["cpu"] if BUILT else [])]
PAGE = 4


@pytest.fixture(params=IMPLS)
def make(request):
    def build(num_pages: int = 17, page_size: int = PAGE) -> PageAllocator:
        return PageAllocator(num_pages, page_size, impl=request.param)

    return build


def grow(pages: PageAllocator, handles, lengths) -> list[list[int]]:
    extension = pages.extend(handles, lengths)
    assert extension.missing == 0
    assert extension.copies.dtype == torch.int32
    pages.check()
    return extension.copies.tolist()


def slots_of(pages: PageAllocator, handle: int) -> list[int]:
    out = torch.empty(pages.length(handle), dtype=torch.int64)
    assert pages.fill_slots(handle, 0, pages.length(handle), out) == len(out)
    return out.tolist()


def test_lists_do_not_go_to_the_default_device(make):
    pages = make()
    with torch.device("meta"):
        prompt = pages.create()
        assert pages.extend([prompt], [5]).missing == 0
        child = pages.fork(prompt, 1)
        copies = pages.extend([prompt, *child], [6, 6]).copies
    assert copies.device.type == "cpu"
    assert copies.tolist() == [[2, 3]]


def test_a_new_pool_is_free_but_for_the_reserved_page(make):
    pages = make(17)
    assert (pages.free_pages, pages.used_pages, pages.live_handles) == (16, 0, 0)
    handle = pages.create()
    assert grow(pages, handle, 64) == []
    assert sorted(pages.pages(handle)) == list(range(1, 17))
    assert (pages.free_pages, pages.used_pages, pages.live_handles) == (0, 16, 1)


def test_extend_takes_a_page_only_at_a_page_border(make):
    pages = make()
    handle = pages.create()
    held = []
    for length in range(1, 10):
        assert pages.pages_needed(handle, length) == (length % PAGE == 1)
        grow(pages, handle, length)
        held.append(len(pages.pages(handle)))
        assert pages.length(handle) == length
    assert held == [1, 1, 1, 1, 2, 2, 2, 2, 3]


def test_all_or_nothing(make):
    pages = make(6)
    a, b = pages.create(), pages.create()
    grow(pages, [a, b], [4, 5])
    before = pages.pages(a), pages.pages(b), pages.free_pages
    extension = pages.extend([a, b], [9, 13])  # 2 + 2 of 2
    assert extension.missing == 2
    assert extension.copies.shape == (0, 2)
    assert (pages.pages(a), pages.pages(b), pages.free_pages) == before
    assert (pages.length(a), pages.length(b)) == (4, 5)
    assert pages.pages_needed([a, b], [9, 13]) == 4
    pages.check()


def test_forks_share_pages_and_the_last_writer_does_not_copy(make):
    pages = make()
    prompt = pages.create()
    grow(pages, prompt, 6)
    full, partial = pages.pages(prompt)
    others = pages.fork(prompt, 3)
    assert pages.used_pages == 2
    assert pages.live_handles == 4
    assert all(pages.pages(h) == [full, partial] and pages.length(h) == 6 for h in others)
    assert pages.pages_needed([prompt, *others], [7] * 4) == 3
    copies = grow(pages, [prompt, *others], [7] * 4)
    own = [pages.pages(h)[1] for h in (prompt, *others)]
    assert copies == [[partial, page] for page in own[:3]]
    assert own[3] == partial
    assert len(set(own)) == 4
    assert all(pages.pages(h)[0] == full for h in others)


def test_a_fork_at_a_page_border_copies_nothing(make):
    pages = make()
    prompt = pages.create()
    grow(pages, prompt, 8)
    (other,) = pages.fork(prompt, 1)
    assert grow(pages, [prompt, other], [9, 9]) == []
    assert pages.pages(prompt)[:2] == pages.pages(other)[:2]
    assert pages.pages(prompt)[2] != pages.pages(other)[2]


def test_copies_that_do_not_fit_change_nothing(make):
    pages = make(4)
    prompt = pages.create()
    grow(pages, prompt, 6)
    others = pages.fork(prompt, 2)
    assert pages.extend([prompt, *others], [7] * 3).missing == 1  # 2 copies, 1 page is free
    pages.check()
    assert len(grow(pages, [prompt], [7])) == 1
    assert pages.extend(others, [7, 7]).missing == 1
    pages.release(others[0])
    assert grow(pages, others[1], 7) == []


def test_without_growth_a_shared_page_stays_shared(make):
    pages = make()
    prompt = pages.create()
    grow(pages, prompt, 6)
    (other,) = pages.fork(prompt, 1)
    assert grow(pages, [prompt, other], [6, 6]) == []
    assert pages.pages(prompt) == pages.pages(other)


def test_truncate_drops_pages_and_what_remains_shared_is_copied(make):
    pages = make()
    prompt = pages.create()
    grow(pages, prompt, 9)
    (other,) = pages.fork(prompt, 1)
    pages.truncate(other, 3)
    pages.check()
    assert pages.pages(other) == pages.pages(prompt)[:1]
    assert pages.used_pages == 3
    ((source, own),) = grow(pages, other, 4)  # token 3 of the prompt must survive
    assert source == pages.pages(prompt)[0]
    assert pages.pages(other) == [own]
    pages.truncate([prompt, other], [0, 0])
    assert pages.used_pages == 0
    assert pages.live_handles == 2


def test_release_frees_only_what_nobody_else_holds(make):
    pages = make()
    prompt = pages.create()
    grow(pages, prompt, 6)
    (other,) = pages.fork(prompt, 1)
    pages.release(prompt)
    assert pages.used_pages == 2
    pages.release(other)
    assert (pages.used_pages, pages.live_handles) == (0, 0)
    pages.check()


def test_pages_come_back_last_in_first_out(make):
    pages = make()
    a, b = pages.create(), pages.create()
    grow(pages, [a, b], [8, 4])
    first, second = pages.pages(a)
    pages.release(a)
    c = pages.create()
    assert c == a
    grow(pages, c, 8)
    assert pages.pages(c) == [first, second]


def test_take_freed_lists_pages_that_are_free_still(make):
    pages = make()
    a, b = pages.create(), pages.create()
    grow(pages, [a, b], [8, 4])
    gone = pages.pages(a)
    pages.release(a)
    assert sorted(pages.take_freed()) == sorted(gone)
    assert pages.take_freed() == []
    pages.truncate(b, 0)
    grow(pages, b, 1)
    assert pages.take_freed() == []  # handed out again: poison would hit a live page
    pages.truncate(b, 0)
    assert len(pages.take_freed()) == 1


def test_tables_and_slots(make):
    pages = make()
    a, b, c = (pages.create() for _ in range(3))
    grow(pages, [a, b], [6, 9])
    table = torch.full((4, 5), -1, dtype=torch.int32)
    pages.fill_table([b, c, a], table[:, 1:4])
    pad = [-1]
    assert table.tolist() == [
        pad + pages.pages(b) + pad,
        pad * 5,
        pad + pages.pages(a) + pad * 2,
        pad * 5,
    ]
    want = [pages.pages(b)[t // PAGE] * PAGE + t % PAGE for t in range(9)]
    assert slots_of(pages, b) == want
    out = torch.full((8,), -1, dtype=torch.int64)
    assert pages.fill_slots([b, a, c], [3, 5, 0], [4, 1, 0], out) == 5
    assert out.tolist() == [*want[3:7], pages.pages(a)[1] * PAGE + 1, -1, -1, -1]


@pytest.mark.parametrize("kind", [list, np.array, torch.tensor])
def test_batches_of_every_kind(make, kind):
    pages = make()
    a, b = pages.create(), pages.create()
    assert grow(pages, kind([a, b]), kind([3, 5])) == []
    pages.truncate(kind([b, a]), kind([4, 2]))
    assert (pages.length(a), pages.length(b)) == (2, 4)
    wide = torch.tensor([[a, 0], [b, 0]])[:, 0]
    assert grow(pages, wide, [6, 6]) == []


def test_empty_batches(make):
    pages = make()
    assert grow(pages, [], []) == []
    pages.truncate([], [])
    pages.fill_table([], torch.empty(0, 0, dtype=torch.int32))
    assert pages.fill_slots([], [], [], torch.empty(0, dtype=torch.int64)) == 0
    assert pages.fork(pages.create(), 0) == []


@pytest.mark.parametrize(
    ("action", "message"),
    [
        (lambda p, h: p.release(99), "release: unknown handle 99"),
        (lambda p, h: p.release(-1), "unknown handle -1"),
        (lambda p, h: (p.release(h), p.release(h)), "released"),
        (lambda p, h: p.fork(99, 1), "fork: unknown handle"),
        (lambda p, h: p.fork(h, -1), "count is -1"),
        (lambda p, h: p.length(99), "length: unknown handle"),
        (lambda p, h: p.extend(h, -1), "length -1"),
        (lambda p, h: p.extend(h, 5), "length 5 for handle 0 of length 6"),
        (lambda p, h: p.extend(h, 2**41), "2\\^40"),
        (lambda p, h: p.extend([h, h], [7, 8]), "given twice"),
        (lambda p, h: p.extend([h, 99], [7, 8]), "unknown handle 99"),
        (lambda p, h: p.extend([h], [7, 8]), "1 handles and 2 lengths"),
        (lambda p, h: p.extend(h, 7.5), "float"),
        (lambda p, h: p.extend(torch.tensor([h], dtype=torch.int32), [7]), "int32"),
        (lambda p, h: p.pages_needed(h, 5), "pages_needed: length 5"),
        (lambda p, h: p.truncate(h, 7), "truncate: length 7"),
        (lambda p, h: p.truncate(h, -1), "length -1"),
        (lambda p, h: p.fill_table(h, torch.zeros(1, 1, dtype=torch.int32)), "holds 2 pages"),
        (lambda p, h: p.fill_table([h], torch.zeros(0, 4, dtype=torch.int32)), "1 rows"),
        (lambda p, h: p.fill_table([h], torch.zeros(1, 4)), "float32"),
        (lambda p, h: p.fill_table([h], torch.zeros(4, 2, dtype=torch.int32).T), "adjacent"),
        (lambda p, h: p.fill_slots(h, 0, 7, torch.zeros(9, dtype=torch.int64)), "which has 6"),
        (lambda p, h: p.fill_slots(h, -1, 2, torch.zeros(9, dtype=torch.int64)), "from -1"),
        (lambda p, h: p.fill_slots(h, 0, -2, torch.zeros(9, dtype=torch.int64)), "-2 tokens"),
        (lambda p, h: p.fill_slots(h, 0, 6, torch.zeros(5, dtype=torch.int64)), "5 elements"),
        (lambda p, h: p.fill_slots(h, 0, [1, 2], torch.zeros(9, dtype=torch.int64)), "2 counts"),
        (lambda p, h: p.fill_slots(h, 0, 6, torch.zeros(9, dtype=torch.int32)), "int32"),
    ],
)
def test_bad_calls_say_what_is_wrong_and_change_nothing(make, action, message):
    pages = make()
    handle = pages.create()
    grow(pages, handle, 6)
    with pytest.raises(ValueError, match=message):
        action(pages, handle)
    pages.check()
    assert pages.used_pages == (2 if pages.live_handles else 0)


@pytest.mark.parametrize(("num_pages", "page_size"), [(1, 4), (0, 4), (-3, 4), (2**31, 4), (8, 0)])
def test_bad_pools(make, num_pages, page_size):
    with pytest.raises(ValueError, match=r"num_pages|page_size"):
        make(num_pages, page_size)


def test_unknown_implementation():
    with pytest.raises(ValueError, match="triton"):
        PageAllocator(4, 4, impl="triton")


class Machine(RuleBasedStateMachine):
    """C++ against Python, page by page; and against tokens that are really written and copied."""

    def __init__(self) -> None:
        super().__init__()
        self.pools = [PageAllocator(12, 3, impl=impl) for impl in IMPLS]
        self.cache = torch.full((12, 3), -1, dtype=torch.int64)
        self.tokens: dict[int, list[int]] = {}
        self.written = 0

    def both(self, call):
        results = [call(pool) for pool in self.pools]
        assert all(result == results[0] for result in results)
        return results[0]

    def pick(self, data) -> int:
        return data.draw(st.sampled_from(sorted(self.tokens)))

    @rule()
    def create(self):
        self.tokens[self.both(lambda pool: pool.create())] = []

    @precondition(lambda self: self.tokens)
    @rule(data=st.data(), count=st.integers(0, 3))
    def fork(self, data, count):
        parent = self.pick(data)
        for child in self.both(lambda pool: pool.fork(parent, count)):
            self.tokens[child] = list(self.tokens[parent])

    @precondition(lambda self: self.tokens)
    @rule(data=st.data())
    def release(self, data):
        handle = self.pick(data)
        self.both(lambda pool: pool.release(handle))
        del self.tokens[handle]
        self.poison()

    @precondition(lambda self: self.tokens)
    @rule(data=st.data())
    def truncate(self, data):
        handle = self.pick(data)
        length = data.draw(st.integers(0, len(self.tokens[handle])))
        self.both(lambda pool: pool.truncate(handle, length))
        self.tokens[handle] = self.tokens[handle][:length]
        self.poison()

    @precondition(lambda self: self.tokens)
    @rule(data=st.data())
    def extend(self, data):
        handles = data.draw(st.lists(st.sampled_from(sorted(self.tokens)), unique=True))
        more = data.draw(st.lists(st.integers(0, 7), min_size=len(handles), max_size=len(handles)))
        lengths = [len(self.tokens[h]) + m for h, m in zip(handles, more, strict=True)]
        needed = self.both(lambda pool: pool.pages_needed(handles, lengths))
        free = self.pools[0].free_pages

        def call(pool):
            extension = pool.extend(handles, lengths)
            return extension.missing, extension.copies.tolist()

        missing, copies = self.both(call)
        assert missing == max(0, needed - free)
        if missing:
            return
        assert self.pools[0].free_pages == free - needed
        for source, destination in copies:
            self.cache[destination] = self.cache[source]
        for handle, length in zip(handles, lengths, strict=True):
            before = len(self.tokens[handle])
            new = list(range(self.written, self.written + length - before))
            self.written += len(new)
            slots = torch.empty(len(new), dtype=torch.int64)
            self.pools[0].fill_slots(handle, before, len(new), slots)
            self.cache.view(-1)[slots] = torch.tensor(new, dtype=torch.int64)
            self.tokens[handle] += new

    def poison(self):
        for page in self.both(lambda pool: pool.take_freed()):
            self.cache[page] = -1

    @invariant()
    def every_sequence_reads_its_own_tokens(self):
        for handle, tokens in self.tokens.items():
            slots = self.both(lambda pool, handle=handle: slots_of(pool, handle))
            assert self.cache.view(-1)[torch.tensor(slots, dtype=torch.int64)].tolist() == tokens
            self.both(lambda pool, handle=handle: pool.pages(handle))

    @invariant()
    def counts_hold(self):
        self.both(lambda pool: (pool.check(), pool.free_pages, pool.used_pages))
        assert self.both(lambda pool: pool.live_handles) == len(self.tokens)
        assert (self.cache[0] == -1).all()


TestMachine = Machine.TestCase
TestMachine.settings = settings(
    max_examples=60,
    stateful_step_count=25,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
