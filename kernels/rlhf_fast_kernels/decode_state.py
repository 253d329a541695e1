"""What surrounds the forward of a decoding step: where each row's token goes, and what it drew.

A row r of a running batch is a column of the integer state [FIELDS, capacity]:

    SAMPLE   index among the completions        LIMIT    tokens it may draw
    TOKEN    drawn last, not yet in the cache   SEED     of its draws
    CONTEXT  tokens in the cache                TOP_K    its setting, 0 is off
    STEP     tokens drawn                       LIVE     1 until it ends, then 0
                                                BROKEN   1 once it could draw nothing

Before the forward, `place_tokens`, for live rows:

    context += 1     position = context - 1
    slot = table[position div page] * page + position mod page

A row that has ended reads its last token again, stores nothing (slot -1) and keeps its context.
After the sampler, `record_tokens`, for live rows:

    completions[sample, step] = what was drawn     step += 1     length[sample] = step
    broken if token < 0, ended if it is a stop id; live unless ended, broken or step = limit

These are some thirty small operations of PyTorch, which cost more than the forward of a small model
on a CPU and 60 launches on a GPU. Nothing waits for the device, so both may be captured in a graph.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from rlhf_fast_kernels import dispatch, native, triton_support
from rlhf_fast_kernels.decode_fields import FIELDS, NO_STOP, SAMPLE, STEP, Drawn, Places, Record
from rlhf_fast_kernels.reference import decode_state as reference

PLACE, RECORD = "place_tokens", "record_tokens"


def _check(op: str, name: str, tensor: Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    """Rows that follow one another, elements of a row adjacent."""
    if tensor.dtype is not dtype:
        raise TypeError(f"{op}: {name} must be {dtype}, got {tensor.dtype}")
    if tensor.shape != shape or (tensor.numel() > 0 and tensor.stride(-1) != 1):
        raise ValueError(
            f"{op}: {name} has shape {tuple(tensor.shape)}, strides {tensor.stride()}, expected "
            f"{shape} with adjacent elements of a row"
        )


def _check_state(op: str, state: Tensor) -> int:
    """The number of rows."""
    rows = state.shape[-1]
    _check(op, "state", state, torch.int64, (FIELDS, rows))
    return rows


def _check_places(state: Tensor, page_table: Tensor, page_size: int, places: Places) -> None:
    rows = _check_state(PLACE, state)
    if page_size < 1:
        raise ValueError(f"{PLACE}: page_size must be positive, got {page_size}")
    _check(PLACE, "page_table", page_table, torch.int32, (rows, page_table.shape[-1]))
    for name, tensor in places._asdict().items():
        dtype = torch.int32 if name == "contexts" else torch.int64
        _check(PLACE, name, tensor, dtype, (rows,))


def _check_record(state: Tensor, stops: Tensor, drawn: Drawn, record: Record) -> None:
    rows = _check_state(RECORD, state)
    _check(RECORD, "stops", stops, torch.int64, (rows, stops.shape[-1]))
    for name, tensor in drawn._asdict().items():
        dtype = torch.int64 if name == "tokens" else torch.float32
        _check(RECORD, f"drawn {name}", tensor, dtype, (rows,))
    samples, columns = record.tokens.shape
    _check(RECORD, "tokens", record.tokens, torch.int64, (samples, columns))
    _check(RECORD, "logprobs", record.logprobs, torch.float32, (samples, columns))
    _check(RECORD, "raw_logprobs", record.raw_logprobs, torch.float32, (samples, columns))
    _check(RECORD, "lengths", record.lengths, torch.int64, (samples,))
    _check(RECORD, "ended", record.ended, torch.bool, (samples,))
    if not all(t.is_contiguous() for t in (stops, *record)):
        raise ValueError(f"{RECORD}: stops and completions must be contiguous")


# ---- C++ ----------------------------------------------------------------------------------------


def prepare_place(
    state: Tensor, page_table: Tensor, page_size: int, places: Places
) -> Callable[[], None]:
    """`place_tokens` in C++ as a call without arguments, for buffers that stay where they are.

    Addresses and shapes are read now; the caller made sure that they fit, and keeps them alive.
    """
    bound: Callable[[], None] = native.core().place_tokens(
        *(state.shape[1], state.data_ptr(), state.stride(0)),
        *(page_table.data_ptr(), page_table.stride(0), page_size),
        *(tensor.data_ptr() for tensor in places),
    )
    return bound


def prepare_record(
    state: Tensor, stops: Tensor, drawn: Drawn, record: Record
) -> Callable[[], None]:
    """`record_tokens`, see `prepare_place`."""
    bound: Callable[[], None] = native.core().record_tokens(
        *(state.shape[1], state.data_ptr(), state.stride(0)),
        *(stops.data_ptr(), stops.shape[1]),
        *(tensor.data_ptr() for tensor in drawn),
        record.tokens.shape[1],
        *(tensor.data_ptr() for tensor in record),
    )
    return bound


def _place_native(state: Tensor, page_table: Tensor, page_size: int, places: Places) -> None:
    prepare_place(state, page_table, page_size, places)()


def _record_native(state: Tensor, stops: Tensor, drawn: Drawn, record: Record) -> None:
    prepare_record(state, stops, drawn, record)()


# ---- Triton -------------------------------------------------------------------------------------


def _place_triton(state: Tensor, page_table: Tensor, page_size: int, places: Places) -> None:
    kernels = triton_support.kernels("decode_state")
    triton_support.launch(
        kernels.place_tokens_kernel,
        -(-state.shape[1] // kernels.BLOCK),
        state.device,
        *(state, state.stride(0), state.shape[1]),
        *(page_table, page_table.stride(0), page_size, *places),
        BLOCK=kernels.BLOCK,
        num_warps=1,
    )


def _record_triton(state: Tensor, stops: Tensor, drawn: Drawn, record: Record) -> None:
    kernels = triton_support.kernels("decode_state")
    triton_support.launch(
        kernels.record_tokens_kernel,
        -(-state.shape[1] // kernels.BLOCK),
        state.device,
        *(state, state.stride(0), state.shape[1], stops, stops.shape[1], *drawn),
        *(record.tokens.shape[1], *record[:4], record.ended.view(torch.uint8)),
        BLOCK=kernels.BLOCK,
        num_warps=1,
    )


# ---- public functions ---------------------------------------------------------------------------


def place_tokens(
    state: Tensor, page_table: Tensor, page_size: int, places: Places, *, impl: str | None = None
) -> None:
    """Make room for the tokens drawn last and say where they go; updates CONTEXT.

    Args:
        state: `[FIELDS, n]` int64, the rows in use; fields may be strided.
        page_table: `[n, pages]` int32; holds the page of each row's next token.
        page_size: tokens of a page.
        places: written.
        impl: implementation by name, see `rlhf_fast_kernels.dispatch`.

    Raises:
        ValueError, TypeError: shapes, strides or dtypes that do not fit.
    """
    _check_places(state, page_table, page_size, places)
    if state.shape[1] > 0:
        dispatch.choose(PLACE, impl, state).function(state, page_table, page_size, places)


def record_tokens(
    state: Tensor, stops: Tensor, drawn: Drawn, record: Record, *, impl: str | None = None
) -> None:
    """Write what live rows drew to their samples, and see which of them go on.

    Args:
        state: `[FIELDS, n]` int64; TOKEN, STEP, LIVE and BROKEN are updated. No two rows have the
            same SAMPLE, and a row that ended has drawn at least one token.
        stops: `[n, stop ids]` int64, contiguous, padded with NO_STOP.
        drawn: by the sampler; a token below 0 marks an unusable row.
        record: completions, contiguous; what live rows drew is written to column STEP.
        impl: implementation by name, see `rlhf_fast_kernels.dispatch`.

    Raises:
        ValueError, TypeError: shapes, strides or dtypes that do not fit.
    """
    _check_record(state, stops, drawn, record)
    if state.shape[1] > 0:
        dispatch.choose(RECORD, impl, state).function(state, stops, drawn, record)


def _example(
    device: torch.device, generator: torch.Generator
) -> tuple[Tensor, Tensor, Places, Tensor, Drawn, Record]:
    """Seven rows in a state of nine, of all kinds."""
    rows, samples, columns = 7, 9, 12
    draw = partial(torch.randint, generator=generator)
    state = torch.zeros(FIELDS, 9, dtype=torch.int64)
    state[:, :rows] = torch.stack(
        [
            torch.randperm(samples, generator=generator)[:rows],
            draw(0, 50, (rows,)),
            draw(1, 30, (rows,)),
            draw(1, columns, (rows,)),
            torch.full((rows,), columns),
            draw(0, 1000, (rows,)),
            torch.zeros(rows, dtype=torch.int64),
            torch.tensor([1, 0, 1, 1, 1, 0, 1]),
            torch.zeros(rows, dtype=torch.int64),
        ]
    )
    wide = partial(torch.zeros, rows, dtype=torch.int64)
    places = Places(wide(), wide(), wide(), torch.zeros(rows, dtype=torch.int32))
    drawn = Drawn(
        torch.tensor([3, 4, 5, -1, 7, 8, 9]),
        *(torch.rand(rows, generator=generator) for _ in range(2)),
    )
    stops = torch.tensor([[5, NO_STOP], [4, 5], [5, 6], [1, 2], [1, 7], [2, 3], [2, NO_STOP]])
    real = partial(torch.rand, samples, columns, generator=generator)
    record = Record(
        draw(0, 50, (samples, columns)),
        real(),
        real(),
        torch.zeros(samples, dtype=torch.int64),
        torch.zeros(samples, dtype=torch.bool),
    )
    record.lengths[state[SAMPLE, :rows]] = state[STEP, :rows]
    table = draw(1, 20, (rows, 4)).to(torch.int32)
    return (
        *(state.to(device)[:, :rows], table.to(device)),
        *(Places(*(t.to(device) for t in places)), stops.to(device)),
        *(Drawn(*(t.to(device) for t in drawn)), Record(*(t.to(device) for t in record))),
    )


def _selftest_of(op: str) -> dispatch.SelftestCase:
    def case(
        device: torch.device, _dtype: torch.dtype, generator: torch.Generator
    ) -> dispatch.SelftestRun:
        seed = int(torch.randint(2**31, (1,), generator=generator))

        def run(impl: str) -> tuple[Tensor, ...]:
            example = _example(device, torch.Generator().manual_seed(seed))
            state, table, places, stops, drawn, record = example
            if op == PLACE:
                place_tokens(state, table, 8, places, impl=impl)
                return (state, *places)
            record_tokens(state, stops, drawn, record, impl=impl)
            return (state, *record)

        return run

    return case


dispatch.register(PLACE, "reference", reference.place_tokens)
dispatch.register(PLACE, "cpu", _place_native, native.on_cpu(PLACE, "BoundOp"))
triton_support.register(PLACE, _place_triton)
dispatch.register_selftest(PLACE, _selftest_of(PLACE))
dispatch.register(RECORD, "reference", reference.record_tokens)
dispatch.register(RECORD, "cpu", _record_native, native.on_cpu(RECORD, "BoundOp"))
triton_support.register(RECORD, _record_triton)
dispatch.register_selftest(RECORD, _selftest_of(RECORD))
