"""Steps and on_sequences: the bits of the calls one by one, fewer rows, early ends, refusals."""

from __future__ import annotations

import pytest
import torch

from rlhf_fast_kernels import PagedAttention, native
from rlhf_fast_kernels.decode_fields import (
    CONTEXT,
    FIELDS,
    LIMIT,
    LIVE,
    SAMPLE,
    STEP,
    TOKEN,
    Drawn,
    Record,
)
from rlhf_fast_kernels.decode_state import prepare_record
from rlhf_fast_kernels.linear_small import prepare as prepare_linear
from rlhf_fast_kernels.rms_norm import prepare as prepare_norm
from rlhf_fast_kernels.row_ops import Steps, are_bound, on_sequences, prepare_gather

pytestmark = pytest.mark.skipif(
    native.missing("BoundOps") is not None, reason="no compiled module on this machine"
)
ROWS, WIDTH = 40, 32


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(params=[1, 2, 5])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


class Layer:
    """Embedding, norm with a residual, attention over pages, product."""

    def __init__(self, cu_queries: torch.Tensor | None = None) -> None:
        sequences = ROWS if cu_queries is None else len(cu_queries) - 1
        self.table, self.ids = draw(50, WIDTH), torch.randint(50, (ROWS,))
        self.residual, self.hidden = draw(ROWS, WIDTH, seed=1), torch.zeros(ROWS, WIDTH)
        self.x, self.out = torch.zeros(ROWS, WIDTH), torch.zeros(ROWS, 70)
        self.attended = torch.zeros(ROWS, 2, 16)
        self.norm, self.weight = draw(WIDTH, seed=2), draw(70, WIDTH, seed=3)
        keys, values = draw(sequences + 1, 8, 2, 16, seed=4), draw(sequences + 1, 8, 2, 16, seed=5)
        self.pages = torch.arange(sequences, dtype=torch.int32)[:, None] + 1
        lengths = torch.full((sequences,), 7, dtype=torch.int32)
        q = self.hidden.view(ROWS, 2, 16)
        attend = PagedAttention(q, keys, values, self.pages, lengths, cu_queries, out=self.attended)
        self.kept = keys, values, lengths
        self.calls = [
            prepare_gather(self.table, self.ids, self.x),
            prepare_norm(self.x, self.norm, 1e-6, self.residual, 0.0, self.hidden),
            attend.bind(q, keys, values, self.attended),
            prepare_linear(self.attended.view(ROWS, WIDTH), self.weight, None, None, self.out),
        ]


@pytest.mark.parametrize("rows", [ROWS, 17, 3, 0])
def test_the_bits_of_the_calls_one_by_one(threads, rows):
    torch.manual_seed(0)
    alone = Layer()
    torch.manual_seed(0)
    together = Layer()
    for call in alone.calls:
        call()
    steps = Steps(together.calls)
    assert steps.rows == ROWS
    assert steps.run(rows) == 1
    for name in ("x", "hidden", "residual", "attended", "out"):
        one, two = getattr(alone, name)[:rows], getattr(together, name)[:rows]
        if name == "out" and rows < 5:  # linear_small then adds in another order
            torch.testing.assert_close(one, two)
        else:
            assert torch.equal(one, two), name
    assert not together.out[rows:].any()


def test_whole_sequences_then_a_row_of_each(threads):
    bounds = torch.tensor([0, 5, 6, 13, 20, 21, 28, 34, 40], dtype=torch.int32)
    torch.manual_seed(0)
    alone = Layer(bounds)
    torch.manual_seed(0)
    together = Layer(bounds)
    ends = bounds[1:].long() - 1
    for call in alone.calls:
        call()
    last = torch.zeros(8, 70)
    gather = prepare_gather(together.out, ends, last)
    on_sequences(together.calls, [gather], bounds, ROWS)()
    assert torch.equal(together.attended, alone.attended)
    assert torch.equal(last, alone.out[ends])


def test_a_step_in_which_a_row_ends_is_the_last(threads):
    state = torch.zeros(FIELDS, ROWS, dtype=torch.int64)
    state[SAMPLE], state[LIVE], state[LIMIT] = torch.arange(ROWS), 1, 9
    state[LIMIT, 21] = 4
    state[CONTEXT], state[STEP], state[TOKEN] = 1, 1, 1
    drawn = Drawn(torch.full((ROWS,), 3), torch.zeros(ROWS), torch.zeros(ROWS))
    record = Record(
        torch.zeros(ROWS, 9, dtype=torch.int64),
        *(torch.zeros(ROWS, 9) for _ in range(2)),
        torch.ones(ROWS, dtype=torch.int64),
        torch.zeros(ROWS, dtype=torch.bool),
    )
    stops = torch.full((ROWS, 1), -2)
    steps = Steps([prepare_record(state, stops, drawn, record)])
    assert steps.run(ROWS, 8) == 3
    assert state[LIVE].tolist() == [int(i != 21) for i in range(ROWS)]
    assert record.lengths.tolist() == [4] * ROWS
    assert steps.run(20, 8) == 5
    assert record.lengths.tolist() == [9] * 20 + [4] * 20


def test_other_calls_are_made_in_order():
    seen: list[int] = []
    steps = Steps([lambda: seen.append(1), lambda: seen.append(2)])
    assert steps.rows is None
    assert steps.run(7, 2) == 2
    assert seen == [1, 2, 1, 2]
    assert not are_bound([print])


def test_refused():
    x, out = draw(4, 8), torch.zeros(4, 8)
    four = prepare_norm(x, draw(8), 1e-6, None, 0.0, out)
    three = prepare_norm(x[:3], draw(8), 1e-6, None, 0.0, out[:3])
    with pytest.raises(ValueError, match="different numbers of rows"):
        Steps([four, three])
    with pytest.raises(ValueError, match="fewer rows"):
        Steps([four]).run(5)
    heads = draw(2, 2, 8)
    with pytest.raises(ValueError, match="different numbers of rows"):  # rows within rows
        Steps([prepare_norm(heads, draw(8), 1e-6, None, 0.0, heads)])
    bounds = torch.tensor([0, 4], dtype=torch.int32)
    with pytest.raises(ValueError, match="different numbers of rows"):
        on_sequences([three], [], bounds, 4)
