"""place_tokens and record_tokens: every implementation against the specification, word by word."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_fast_kernels import native, triton_support
from rlhf_fast_kernels.decode_fields import (
    BROKEN,
    CONTEXT,
    FIELDS,
    LIMIT,
    LIVE,
    NO_STOP,
    SAMPLE,
    STEP,
    TOKEN,
    Drawn,
    Places,
    Record,
)
from rlhf_fast_kernels.decode_state import (
    place_tokens,
    prepare_place,
    prepare_record,
    record_tokens,
)

BUILT = native.missing("place_tokens", "record_tokens") is None
needs_core = pytest.mark.skipif(not BUILT, reason="no compiled module on this machine")
IMPLS = ["reference", *(["cpu"] if BUILT else [])]
if triton_support.installed() and triton_support.interpreting():
    IMPLS.append("triton")


def state_of(**fields: list[int]) -> torch.Tensor:
    """A state with room to spare, of which the rows in use are a strided view."""
    rows = len(next(iter(fields.values())))
    state = torch.full((FIELDS, rows + 3), -7)
    names = {"sample": SAMPLE, "token": TOKEN, "context": CONTEXT, "step": STEP, "limit": LIMIT}
    names |= {"live": LIVE, "broken": BROKEN}
    state[:, :rows] = 0
    for name, values in fields.items():
        state[names[name], :rows] = torch.tensor(values)
    return state[:, :rows]


def empty_places(rows: int) -> Places:
    wide = [torch.full((rows,), 99) for _ in range(3)]
    return Places(*wide, torch.full((rows,), 99, dtype=torch.int32))


def record_of(samples: int, columns: int) -> Record:
    return Record(
        torch.full((samples, columns), -5),
        torch.full((samples, columns), 0.5),
        torch.full((samples, columns), 0.25),
        torch.zeros(samples, dtype=torch.int64),
        torch.zeros(samples, dtype=torch.bool),
    )


@pytest.mark.parametrize("impl", IMPLS)
def test_where_tokens_go(impl):
    # The first token of a page, one inside it, and a row that has ended.
    state = state_of(token=[11, 12, -1], context=[4, 6, 5], live=[1, 1, 0])
    table = torch.tensor([[3, 8], [5, 2], [7, 1]], dtype=torch.int32)
    places = empty_places(3)
    place_tokens(state, table, 4, places, impl=impl)
    assert places.ids.tolist() == [11, 12, 0]
    assert places.positions.tolist() == [4, 6, 4]
    assert places.slots.tolist() == [8 * 4, 2 * 4 + 2, -1]
    assert places.contexts.tolist() == [5, 7, 5]
    assert state[CONTEXT].tolist() == [5, 7, 5]


@pytest.mark.parametrize("impl", IMPLS)
def test_what_becomes_of_rows(impl):
    # Goes on; meets a stop id; draws its last; cannot draw; had ended; stops with its last.
    state = state_of(
        sample=[4, 2, 0, 1, 3, 5],
        step=[2, 2, 3, 1, 2, 3],
        limit=[4] * 6,
        live=[1, 1, 1, 1, 0, 1],
    )
    drawn = Drawn(
        torch.tensor([9, 6, 8, -1, 6, 7]),
        torch.tensor([-0.1, -0.2, -0.3, float("nan"), -0.5, -0.6]),
        torch.tensor([-1.0, -2.0, -3.0, float("nan"), -5.0, -6.0]),
    )
    stops = torch.tensor([[6, 7]] * 5 + [[7, NO_STOP]])
    record = record_of(6, 4)
    record_tokens(state, stops, drawn, record, impl=impl)
    assert state[LIVE].tolist() == [1, 0, 0, 0, 0, 0]
    assert state[STEP].tolist() == [3, 3, 4, 2, 2, 4]
    assert state[BROKEN].tolist() == [0, 0, 0, 1, 0, 0]
    assert state[TOKEN].tolist() == drawn.tokens.tolist()
    assert record.ended.tolist() == [False, False, True, False, False, True]
    assert record.lengths[[4, 2, 0, 1, 5]].tolist() == [3, 3, 4, 2, 4]
    for row, (sample, column) in enumerate([(4, 2), (2, 2), (0, 3), (1, 1)]):
        assert record.tokens[sample, column] == drawn.tokens[row]
        for out, value in ((record.logprobs, drawn[1]), (record.raw_logprobs, drawn[2])):
            torch.testing.assert_close(out[sample, column], value[row], equal_nan=True)
    # Nothing else was touched, the row that had ended least of all.
    assert int((record.tokens == -5).sum()) == 6 * 4 - 5
    assert (record.tokens[3] == -5).all()
    assert (record.logprobs[3] == 0.5).all()


@pytest.mark.parametrize("impl", IMPLS[1:])
@settings(max_examples=25, deadline=None)
@given(rows=st.integers(1, 70), page=st.integers(1, 9), width=st.integers(1, 4), seed=st.integers())
def test_steps_follow_the_specification(impl, rows, page, width, seed):
    """Some steps in a row, as in a burst, on random states: every tensor equals."""
    generator = torch.Generator().manual_seed(seed % 2**62)

    def draw(low: int, high: int, *shape: int) -> torch.Tensor:
        return torch.randint(low, high, shape, generator=generator)

    limit = draw(2, 9, rows)
    state = torch.zeros(FIELDS, rows + 1, dtype=torch.int64)[:, :rows]
    state[SAMPLE] = torch.randperm(rows + 2, generator=generator)[:rows]
    state[CONTEXT], state[STEP], state[LIMIT] = draw(1, 20, rows), draw(1, 2, rows), limit
    state[LIVE] = draw(0, 2, rows)
    table = draw(1, 50, rows, 40).to(torch.int32)
    stops = draw(NO_STOP, 6, rows, width)
    tokens = draw(-1, 12, 5, rows)
    logprobs = torch.randn(5, 2, rows, generator=generator)
    results = []
    for name in ("reference", impl):
        mine, places, record = state.clone(), empty_places(rows), record_of(rows + 2, 10)
        seen = []
        for step in range(5):
            place_tokens(mine, table, page, places, impl=name)
            seen += [t.clone() for t in places]
            drawn = Drawn(tokens[step], *logprobs[step])
            record_tokens(mine, stops, drawn, record, impl=name)
        # The length of a sample whose row was never live is its generator's to say.
        lived = state[SAMPLE][state[LIVE] > 0]
        results.append([mine, *seen, *record[:3], record.lengths[lived], record.ended])
    for want, got in zip(*results, strict=True):
        assert torch.equal(want, got)


@needs_core
def test_prepared_calls_read_their_buffers_anew():
    state = state_of(sample=[0, 1], token=[5, 6], context=[2, 3], limit=[9, 9], live=[1, 1])
    table, places, record = torch.ones(2, 4, dtype=torch.int32), empty_places(2), record_of(2, 9)
    drawn = Drawn(torch.tensor([5, 6]), torch.zeros(2), torch.zeros(2))
    stops = torch.full((2, 1), 8)
    place = prepare_place(state, table, 4, places)
    keep = prepare_record(state, stops, drawn, record)
    place()
    keep()
    drawn.tokens.copy_(torch.tensor([7, 8]))
    place()
    keep()
    assert places.positions.tolist() == [3, 4]
    assert record.tokens[:, :2].tolist() == [[5, 7], [6, 8]]
    assert record.ended.tolist() == [False, True]


@pytest.mark.parametrize("impl", IMPLS)
def test_no_rows(impl):
    state = torch.zeros(FIELDS, 4, dtype=torch.int64)[:, :0]
    table = torch.zeros(0, 2, dtype=torch.int32)
    place_tokens(state, table, 4, empty_places(0), impl=impl)
    none = torch.zeros(0)
    drawn, stops = Drawn(none.long(), none, none), torch.zeros(0, 1, dtype=torch.int64)
    record_tokens(state, stops, drawn, record_of(0, 3), impl=impl)


def good_place() -> dict[str, object]:
    return {
        "state": torch.zeros(FIELDS, 2, dtype=torch.int64),
        "page_table": torch.zeros(2, 3, dtype=torch.int32),
        "page_size": 4,
        "places": empty_places(2),
    }


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"state": torch.zeros(FIELDS, 2)}, TypeError, "state must be torch.int64"),
        ({"state": torch.zeros(3, 2).long()}, ValueError, "state has shape"),
        ({"state": torch.zeros(2, FIELDS).long().T}, ValueError, "adjacent"),
        ({"page_table": torch.zeros(2, 3).long()}, TypeError, "page_table must be torch.int32"),
        ({"page_table": torch.zeros(3, 3).int()}, ValueError, "page_table has shape"),
        ({"page_size": 0}, ValueError, "page_size must be positive"),
        ({"places": empty_places(3)}, ValueError, "ids has shape"),
    ],
)
def test_bad_places(change, error, message):
    with pytest.raises(error, match=f"place_tokens: {message}|place_tokens: .*{message}"):
        place_tokens(**(good_place() | change))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"stops": torch.zeros(3, 1).long()}, ValueError, "stops has shape"),
        ({"stops": torch.zeros(1, 2).long().expand(2, 2)}, ValueError, "contiguous"),
        ({"drawn": Drawn(*[torch.zeros(2)] * 3)}, TypeError, "drawn tokens must be torch.int64"),
        ({"record": record_of(4, 6)._replace(lengths=torch.zeros(4))}, TypeError, "lengths must"),
        (
            {"record": record_of(4, 6)._replace(ended=torch.zeros(3, dtype=torch.bool))},
            ValueError,
            "ended has shape",
        ),
    ],
)
def test_bad_records(change, error, message):
    drawn = Drawn(torch.zeros(2, dtype=torch.int64), torch.zeros(2), torch.zeros(2))
    good = {
        "state": torch.zeros(FIELDS, 2, dtype=torch.int64),
        "stops": torch.zeros(2, 1, dtype=torch.int64),
        "drawn": drawn,
        "record": record_of(4, 6),
    }
    with pytest.raises(error, match=f"record_tokens: .*{message}"):
        record_tokens(**(good | change))
