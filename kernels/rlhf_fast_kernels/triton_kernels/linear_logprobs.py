"""The fused kernel of linear_logprobs: hidden states and head to sums over the vocabulary.

The vocabulary is cut into splits of a fixed width. One program multiplies one block of rows with
one split, tile by tile, and folds each tile of logits into three numbers a row while it is still
in registers: (maximum, sum, weighted sum). Logits are never written. A second kernel merges a
row's splits in their order. Neither the tiles nor the splits depend on the number of rows, so the
bits of a row do not depend on the rows beside it.

Programs run in groups of row blocks: all row blocks of a group visit a split before any visits
the next, so the group's hidden states stay in the L2 cache and the weight is read from memory once
a group.

Exponents and -inf are treated as in `triton_kernels/logprobs_from_logits.py`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from rlhf_fast_kernels.logit_settings import RowSettings, RowStats
from rlhf_fast_kernels.triton_kernels.logprobs_from_logits import (
    LOG2E,
    _label_state,
    _log2e_over_temperature,
    _tanh,
)
from rlhf_fast_kernels.triton_support import AotCase, interpreting, launch

MERGE_ROWS = 128
STRIP = tl.constexpr(64)
GROUP_BYTES = 8 << 20  # of hidden states: a sixth of an H100's L2 cache, a fifth of an A100's
GROUP_BLOCKS = 16

# ---- parts of kernels ---------------------------------------------------------------------------


@triton.jit
def _merge(top, total, weighted, other_top, other_total, other_weighted, factor):
    """Sums of two sets of columns as those of their union.

    Weighted sums hold distances to the maximum. Distances are bounded where they are factors,
    because -inf would add -inf * 0; NaN survives in the totals.
    """
    highest = tl.maximum(top, other_top)
    shift = tl.where(highest == -float("inf"), 0.0, highest)
    distance = (top - shift) * factor
    other_distance = (other_top - shift) * factor
    share, other_share = tl.exp2(distance), tl.exp2(other_distance)
    weighted = (weighted + total * tl.maximum(distance, -1000.0)) * share
    weighted += (other_weighted + other_total * tl.maximum(other_distance, -1000.0)) * other_share
    return highest, total * share + other_total * other_share, weighted


@triton.jit
def _products(
    hidden,
    weight,
    row,
    column,
    hidden_stride,
    weight_stride,
    width,
    ALIGNED: tl.constexpr,
    UPCAST: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
):
    """A tile of hidden weight^T, summed over H in fp32."""
    at = tl.arange(0, BLOCK_WIDTH)
    left = hidden + row.to(tl.int64)[:, None] * hidden_stride + at[None, :]
    # Offsets within a tile fit 32 bits, and so half the registers.
    right = column[None, :] * weight_stride + at[:, None]
    sums = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), tl.float32)
    for start in range(0, width, BLOCK_WIDTH):
        if ALIGNED:
            x, w = tl.load(left), tl.load(weight + right)
        else:
            inside = at < width - start
            x = tl.load(left, mask=inside[None, :], other=0.0)
            w = tl.load(weight + right, mask=inside[:, None], other=0.0)
        if UPCAST:  # the interpreter holds bf16 as raw bits
            x, w = x.to(tl.float32), w.to(tl.float32)
        sums = tl.dot(x, w, sums, input_precision="ieee")
        left += BLOCK_WIDTH
        weight += BLOCK_WIDTH
    return sums


@triton.jit
def _inside(x, start, last, label, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr):
    """(the tile with -inf from column `last` on, each row's entry in column `label` or 0).

    In strips: the compiler keeps the numbers of the columns in registers for the whole loop over
    tiles, and those of a strip are few enough to leave the accumulator in peace.
    """
    strip = start + tl.arange(0, BLOCK_COLUMNS // STRIP) * STRIP
    column = tl.arange(0, STRIP)[None, None, :]
    x = tl.reshape(x, (BLOCK_ROWS, BLOCK_COLUMNS // STRIP, STRIP))
    x = tl.where(column < (last - strip)[None, :, None], x, -float("inf"))
    wanted = label[:, None] - strip[None, :]
    own = tl.where(column == wanted[:, :, None], x, 0.0)
    return tl.reshape(x, (BLOCK_ROWS, BLOCK_COLUMNS)), tl.sum(tl.sum(own, axis=2), axis=1)


# ---- kernels ------------------------------------------------------------------------------------


@triton.jit
def split_sums(
    hidden,
    weight,
    bias,
    labels,
    rows,
    temperature,
    partials,
    label_logits,
    count,
    row_count,
    hidden_stride,
    weight_stride,
    width,
    columns,
    split_columns,
    splits,
    group_blocks,
    vocab_start,
    ignore_index,
    scale,
    softcap,
    ENTROPY: tl.constexpr,
    CAPPED: tl.constexpr,
    ALIGNED: tl.constexpr,
    UPCAST: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
):
    program = tl.program_id(0)
    group = program // (group_blocks * splits)
    inside_group = program % (group_blocks * splits)
    blocks = tl.minimum(group_blocks, tl.cdiv(count, BLOCK_ROWS) - group * group_blocks)
    block = group * group_blocks + inside_group % blocks
    split = inside_group // blocks

    slot = block * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    real = slot < count
    label = tl.load(labels + slot, mask=real, other=ignore_index)
    if tl.max((label != ignore_index).to(tl.int32), axis=0) == 0:
        return
    row = tl.minimum(slot, count - 1)
    factor = _log2e_over_temperature(temperature, row, scale)
    if rows is not None:
        # Out of range is NaN in the end; here it only must not be read.
        row = tl.minimum(tl.maximum(tl.load(rows + row), 0), row_count - 1)

    first = split * split_columns
    last = tl.minimum(first + split_columns, columns)
    label_column = label - vocab_start
    label_column = tl.where((label_column >= 0) & (label_column < columns), label_column, -1)
    label_column = label_column.to(tl.int32)
    top = tl.full((BLOCK_ROWS,), -float("inf"), tl.float32)
    total = tl.zeros((BLOCK_ROWS,), tl.float32)
    weighted = tl.zeros((BLOCK_ROWS,), tl.float32)
    label_logit = tl.zeros((BLOCK_ROWS,), tl.float32)
    factors = factor + tl.zeros((BLOCK_ROWS,), tl.float32)
    for start in range(first, last, BLOCK_COLUMNS):
        readable = tl.minimum(tl.arange(0, BLOCK_COLUMNS), columns - 1 - start)
        x = _products(
            hidden,
            weight + tl.cast(start, tl.int64) * weight_stride,
            row,
            readable,
            hidden_stride,
            weight_stride,
            width,
            ALIGNED,
            UPCAST,
            BLOCK_ROWS,
            BLOCK_COLUMNS,
            BLOCK_WIDTH,
        )
        if bias is not None:
            x += tl.load(bias + start + readable).to(tl.float32)[None, :]
        if CAPPED:
            x = softcap * _tanh(x / softcap)
        x, own = _inside(x, start, last, label_column, BLOCK_ROWS, BLOCK_COLUMNS)
        label_logit += own
        tile_top = tl.max(x, axis=1)
        shift = tl.where(tile_top == -float("inf"), 0.0, tile_top)
        distance = (x - shift[:, None]) * factors[:, None]
        power = tl.exp2(distance)
        tile_total = tl.sum(power, axis=1)
        tile_weighted = tl.zeros((BLOCK_ROWS,), tl.float32)
        if ENTROPY:
            tile_weighted = tl.sum(tl.maximum(distance, -1000.0) * power, axis=1)
        top, total, weighted = _merge(
            top, total, weighted, tile_top, tile_total, tile_weighted, factors
        )
    at = partials + tl.cast(split, tl.int64) * count + slot
    size = tl.cast(splits, tl.int64) * count
    tl.store(at, top, mask=real)
    tl.store(at + size, total, mask=real)
    if ENTROPY:
        tl.store(at + 2 * size, weighted, mask=real)
    here = real & (label_column >= first) & (label_column < last)
    tl.store(label_logits + slot, label_logit, mask=here)


@triton.jit
def merge_splits(
    labels,
    rows,
    temperature,
    partials,
    label_logits,
    logprobs,
    entropy,
    lse,
    count,
    row_count,
    columns,
    splits,
    vocab_start,
    vocab_size,
    ignore_index,
    scale,
    SHARD: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
):
    slot = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    real = slot < count
    label = tl.load(labels + slot, mask=real, other=ignore_index)
    used = label != ignore_index
    factor = _log2e_over_temperature(temperature, tl.minimum(slot, count - 1), scale)
    factor += tl.zeros((BLOCK_ROWS,), tl.float32)
    top = tl.full((BLOCK_ROWS,), -float("inf"), tl.float32)
    total = tl.zeros((BLOCK_ROWS,), tl.float32)
    weighted = tl.zeros((BLOCK_ROWS,), tl.float32)
    size = tl.cast(splits, tl.int64) * count
    for split in range(splits):
        at = partials + tl.cast(split, tl.int64) * count + slot
        split_top = tl.load(at, mask=used, other=0.0)
        split_total = tl.load(at + size, mask=used, other=0.0)
        split_weighted = tl.zeros((BLOCK_ROWS,), tl.float32)
        if entropy is not None:
            split_weighted = tl.load(at + 2 * size, mask=used, other=0.0)
        top, total, weighted = _merge(
            top, total, weighted, split_top, split_total, split_weighted, factor
        )
    if rows is not None:
        row = tl.load(rows + slot, mask=used, other=0)
        total = tl.where((row >= 0) & (row < row_count), total, float("nan"))
    shift = tl.where(top == -float("inf"), 0.0, top)
    log2_total = tl.log2(total)
    log2_lse = shift.to(tl.float64) * factor.to(tl.float64) + log2_total.to(tl.float64)
    nats = log2_lse * tl.full((), 0.6931471805599453, tl.float64)
    tl.store(lse + slot, tl.where(used, nats, 0.0), mask=real)
    if entropy is not None:
        value = (log2_total - weighted / total) * 0.6931471805599453
        tl.store(entropy + slot, tl.where(used, value, 0.0), mask=real)
    _, here, legal = _label_state(label, vocab_start, vocab_size, columns)
    x = tl.load(label_logits + slot, mask=used & here, other=0.0)
    if SHARD:
        result = tl.where(legal, tl.where(here, x * factor, 0.0), float("nan"))
    else:
        result = tl.where(here, (x - shift) * factor - log2_total, float("nan"))
    tl.store(logprobs + slot, tl.where(used, result * 0.6931471805599453, 0.0), mask=real)


# ---- launches -----------------------------------------------------------------------------------


class Tiles(NamedTuple):
    """Launch settings of `split_sums`: not from the number of rows, since they decide the bits.

    Attributes:
        rows, columns, width: a tile of logits and the slice of H that a step multiplies.
        split_columns: columns one program goes through; the partial sums of a split are 12 bytes.
        num_warps, num_stages: as at the launch.
    """

    rows: int
    columns: int
    width: int
    split_columns: int = 4096
    num_warps: int = 8
    num_stages: int = 3

    def blocks(self) -> dict[str, int]:
        """The constants of the kernel."""
        return {
            "BLOCK_ROWS": self.rows, "BLOCK_COLUMNS": self.columns, "BLOCK_WIDTH": self.width
        }  # fmt: skip


# 128 x 256 takes 128 registers of accumulator a thread, or tensor memory, and 144 KiB of shared
# memory; on sm_80 it spills, and sm_86, 89 and 120 have 99 KiB.
LARGE = Tiles(128, 256, 64)
MEDIUM = Tiles(128, 128, 64)
FP32 = Tiles(64, 128, 32)
UNEVEN = Tiles(64, 64, 32)  # masks and single loads take the registers
INTERPRETED = Tiles(16, 128, 32, split_columns=256)


def tiles(device: torch.device, dtype: torch.dtype, width: int) -> Tiles:
    """The largest tiles whose registers do not spill; `width` is H."""
    if interpreting():
        return INTERPRETED
    if dtype == torch.float32:
        chosen = FP32
    else:
        recent = torch.cuda.get_device_capability(device)[0] in (9, 10)
        chosen = LARGE if recent else MEDIUM
    return chosen if width % chosen.width == 0 else UNEVEN


def _aligned(x: Tensor) -> Tensor:
    """Every row at a multiple of 16 bytes, for loads of as many; a copy if need be."""
    fits = x.stride(0) % 16 == 0 and x.data_ptr() % 16 == 0
    return x if fits else x.clone(memory_format=torch.contiguous_format)


def forward(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    settings: RowSettings,
    stats: RowStats,
    shard: bool,
    rows: Tensor | None,
) -> None:
    """Fill `stats`, as `linear_fused.fused_stats` describes it; last dims are contiguous."""
    device, count, width = hidden.device, labels.shape[0], hidden.shape[1]
    columns = settings.columns(weight.shape[0])
    chosen = tiles(device, hidden.dtype, width)
    aligned = width % chosen.width == 0
    if aligned:
        hidden, weight = _aligned(hidden), _aligned(weight)
    splits, blocks = triton.cdiv(columns, chosen.split_columns), triton.cdiv(count, chosen.rows)
    partials = torch.empty((3, splits, count), dtype=torch.float32, device=device)
    label_logits = torch.empty(count, dtype=torch.float32, device=device)
    block_bytes = max(1, chosen.rows * width * hidden.element_size())
    numbers = (settings.ignore_index, LOG2E / settings.scale)
    if splits > 0:
        launch(
            split_sums,
            blocks * splits,
            device,
            *(hidden, weight, bias, labels, rows, settings.temperature, partials, label_logits),
            *(count, hidden.shape[0], hidden.stride(0), weight.stride(0), width, columns),
            *(chosen.split_columns, splits),
            max(1, min(GROUP_BLOCKS, GROUP_BYTES // block_bytes)),
            settings.vocab_start,
            *numbers,
            settings.softcap or 1.0,
            ENTROPY=stats.entropy is not None,
            CAPPED=settings.softcap is not None,
            ALIGNED=aligned,
            UPCAST=interpreting(),
            **chosen.blocks(),
            num_warps=chosen.num_warps,
            num_stages=chosen.num_stages,
        )
    launch(
        merge_splits,
        triton.cdiv(count, MERGE_ROWS),
        device,
        *(labels, rows, settings.temperature, partials, label_logits, *stats),
        *(count, hidden.shape[0], columns, splits),
        *(settings.vocab_start, settings.labels_end(weight.shape[0]), *numbers),
        SHARD=shard,
        BLOCK_ROWS=MERGE_ROWS,
        num_warps=4,
    )


# ---- ahead of time ------------------------------------------------------------------------------

_SIZES = ("count", "row_count", "columns", "splits", "vocab_start", "ignore_index")
_COMMON = {
    "labels": "*i64",
    "partials": "*fp32",
    "label_logits": "*fp32",
    "scale": "fp32",
    **dict.fromkeys(_SIZES, "i32"),
}
_OPTIONAL = {"rows": "*i64", "temperature": "*fp32"}


def _sums_case(
    dtype: str, chosen: Tiles, *, plain: bool = False, ones: tuple[str, ...] = (), **options: object
) -> AotCase:
    """Without (`plain`) or with bias, rows, temperature and softcap; `ones`: sizes that are 1."""
    sizes = ("hidden_stride", "weight_stride", "width", "split_columns", "group_blocks")
    signature = {**_COMMON, **dict.fromkeys(sizes, "i32"), "softcap": "fp32"}
    signature |= dict.fromkeys(("hidden", "weight"), f"*{dtype}")
    constants = {"ENTROPY": True, "CAPPED": not plain, "ALIGNED": chosen != UNEVEN, "UPCAST": False}
    constants |= chosen.blocks()
    optional = {**_OPTIONAL, "bias": f"*{dtype}"}
    if plain:
        constants |= dict.fromkeys(optional)
    else:
        signature |= optional
    signature, constants = _specialised(signature, constants, ones)
    multiples = ("hidden", "weight", "hidden_stride", "weight_stride") if chosen != UNEVEN else ()
    options |= {"num_warps": chosen.num_warps, "num_stages": chosen.num_stages}
    return AotCase(split_sums, signature, constants, multiples_of_16=multiples, **options)


def _merge_case(*, shard: bool, ones: tuple[str, ...] = ()) -> AotCase:
    results = {"logprobs": "*fp32", "entropy": "*fp32", "lse": "*fp64", "vocab_size": "i32"}
    constants = {"SHARD": shard, "BLOCK_ROWS": MERGE_ROWS}
    signature, constants = _specialised({**_COMMON, **_OPTIONAL, **results}, constants, ones)
    return AotCase(merge_splits, signature, constants)


def _specialised(
    signature: dict[str, str], constants: dict[str, object], ones: tuple[str, ...]
) -> tuple[dict[str, str], dict[str, object]]:
    """A launch compiles sizes that are 1 as constants, which not every operation takes."""
    rest = {name: kind for name, kind in signature.items() if name not in ones}
    return rest, {**constants, **dict.fromkeys(ones, 1)}


_ONES = ("count", "row_count", "splits")

AOT_CASES = (
    _sums_case("bf16", MEDIUM, plain=True),
    _sums_case("fp16", MEDIUM),
    _sums_case("bf16", LARGE, plain=True, oldest=90),
    _sums_case("bf16", LARGE, oldest=90),
    _sums_case("bf16", LARGE, ones=(*_ONES, "group_blocks"), oldest=90),
    _sums_case("bf16", UNEVEN),
    _sums_case("fp32", FP32, plain=True),
    _sums_case("fp32", FP32),
    _sums_case("fp32", UNEVEN),
    _merge_case(shard=False),
    _merge_case(shard=True, ones=_ONES),
)
