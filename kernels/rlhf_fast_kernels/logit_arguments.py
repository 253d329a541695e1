"""Arguments of `logprobs_from_logits`: what is legal."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from rlhf_fast_kernels.logit_rows import OP, row_layout
from rlhf_fast_kernels.logit_settings import RowSettings

Scale = float | Tensor


class Arguments(NamedTuple):
    """What the public function was given beside logits and labels."""

    temperature: Scale
    softcap: float | None
    rows: Tensor | None
    vocab_size: int | None
    group: Any
    vocab_start: int | None
    ignore_index: int


def validate(logits: Tensor, labels: Tensor, arguments: Arguments) -> None:
    """The checks that need shapes, dtypes and numbers only."""
    _validate_shapes(logits, labels, arguments.rows)
    _validate_vocabulary(logits, labels, arguments)
    temperature, softcap = arguments.temperature, arguments.softcap
    if isinstance(temperature, Tensor):
        if temperature.shape not in (labels.shape, torch.Size([])):
            raise ValueError(
                f"{OP}: a temperature tensor must have the shape of labels "
                f"{tuple(labels.shape)}, got {tuple(temperature.shape)}"
            )
        if temperature.device != logits.device:
            raise ValueError(
                f"{OP}: logits on {logits.device} but temperature on {temperature.device}"
            )
    elif not 0.0 < temperature < float("inf"):
        raise ValueError(f"{OP}: temperature must be positive and finite, got {temperature}")
    if softcap is not None and not 0.0 < softcap < float("inf"):
        raise ValueError(f"{OP}: softcap must be None or positive and finite, got {softcap}")


def _validate_shapes(logits: Tensor, labels: Tensor, rows: Tensor | None) -> None:
    if not logits.is_floating_point():
        raise TypeError(f"{OP}: logits must be floating point, got {logits.dtype}")
    if labels.dtype != torch.int64:
        raise TypeError(f"{OP}: labels must be int64, got {labels.dtype}")
    if labels.device != logits.device:
        raise ValueError(f"{OP}: logits on {logits.device} but labels on {labels.device}")
    if rows is None:
        if logits.dim() < 1 or labels.shape != logits.shape[:-1]:
            raise ValueError(
                f"{OP}: labels must have the shape of logits without the vocabulary, "
                f"got labels {tuple(labels.shape)} for logits {tuple(logits.shape)}"
            )
        return
    if rows.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"{OP}: rows must be int64 or int32, got {rows.dtype}")
    if rows.device != logits.device:
        raise ValueError(f"{OP}: logits on {logits.device} but rows on {rows.device}")
    if rows.dim() != 1 or labels.shape != rows.shape:
        raise ValueError(
            f"{OP}: with rows [M], labels must be [M] too, got rows {tuple(rows.shape)} and "
            f"labels {tuple(labels.shape)}"
        )
    if logits.dim() < 2:
        raise ValueError(f"{OP}: rows needs logits [..., V], got {tuple(logits.shape)}")


def _validate_vocabulary(logits: Tensor, labels: Tensor, arguments: Arguments) -> None:
    width, size, start = logits.shape[-1], arguments.vocab_size, arguments.vocab_start
    if arguments.group is None:
        if start is not None:
            raise ValueError(f"{OP}: vocab_start is for a shard and needs group")
        if width == 0 and labels.numel() > 0:
            raise ValueError(f"{OP}: the vocabulary (last dim of logits) is empty")
        if size is not None and not 0 < size <= width:
            raise ValueError(
                f"{OP}: vocab_size must be between 1 and the last dim of logits {width}, got {size}"
            )
        return
    if start is not None and size is None:
        raise ValueError(f"{OP}: vocab_start needs vocab_size, because shards may differ")
    if start is not None and start < 0:
        raise ValueError(f"{OP}: vocab_start must not be negative, got {start}")
    if size is not None and size <= 0:
        raise ValueError(f"{OP}: vocab_size must be positive, got {size}")


def row_settings(logits: Tensor, labels: Tensor, arguments: Arguments) -> RowSettings:
    """The arguments as the implementations take them."""
    temperature: Tensor | None = None
    scale = 1.0
    if isinstance(arguments.temperature, Tensor):
        temperature = arguments.temperature.detach().expand(labels.shape)
    else:
        scale = float(arguments.temperature)
    start, size = arguments.vocab_start or 0, arguments.vocab_size
    if arguments.group is not None and arguments.vocab_start is None:
        start = dist.get_rank(arguments.group) * logits.shape[-1]
        if size is None:
            size = dist.get_world_size(arguments.group) * logits.shape[-1]
    softcap = None if arguments.softcap is None else float(arguments.softcap)
    return RowSettings(temperature, scale, softcap, arguments.ignore_index, start, size)


# ---- checks that read data, which on an accelerator would cost a synchronisation -----------------


def validate_data(
    labels: Tensor, settings: RowSettings, rows: Tensor | None, shape: torch.Size
) -> None:
    end = settings.labels_end(shape[-1])
    bad = ((labels < 0) | (labels >= end)) & (labels != settings.ignore_index)
    if bad.any():
        row = _first(bad)
        raise ValueError(
            f"{OP}: label {int(labels[row])} at row {row} is neither in [0, {end}) "
            f"nor ignore_index ({settings.ignore_index})"
        )
    if settings.temperature is not None:
        wrong = ~((settings.temperature > 0) & torch.isfinite(settings.temperature))
        if wrong.any():
            row = _first(wrong)
            raise ValueError(
                f"{OP}: temperature {float(settings.temperature[row])} at row {row} "
                "must be positive and finite"
            )
    if rows is not None:
        _validate_rows(rows, shape[:-1].numel())


def _validate_rows(rows: Tensor, count: int) -> None:
    outside = (rows < 0) | (rows >= count)
    if outside.any():
        at = _first(outside)
        raise ValueError(f"{OP}: rows[{at[0]}] = {int(rows[at])} is not in [0, {count})")
    uses = torch.bincount(rows, minlength=1)
    if bool((uses > 1).any()):
        raise ValueError(f"{OP}: rows holds {int(uses.argmax())} {int(uses.max())} times")


def _first(found: Tensor) -> tuple[int, ...]:
    return tuple(int(i) for i in found.nonzero()[0])


def ends_in_leaf(logits: Tensor) -> bool:
    """Whether what is written over the logits ends in a leaf that is trained, or a view of one."""
    owner = logits if logits._base is None else logits._base
    return owner.is_leaf and owner.requires_grad


def validate_no_leaf(op: str, logits: Tensor) -> None:
    """A gradient written over the logits must not end in a leaf, nor by way of a view of one."""
    if ends_in_leaf(logits):
        what = (
            "a leaf tensor" if logits._base is None else "the leaf tensor that logits is a view of,"
        )
        raise ValueError(f"{op}: inplace_backward would overwrite {what} with its gradient")


def validate_inplace(logits: Tensor) -> None:
    validate_no_leaf(OP, logits)
    layout = row_layout(logits)
    if layout is None:
        raise ValueError(f"{OP}: inplace_backward needs rows contiguous at one or two strides")
    vocab = logits.shape[-1]
    if any(n > 1 and stride < vocab for n, stride in zip(layout[:2], layout[2:], strict=True)):
        raise ValueError(f"{OP}: inplace_backward needs rows that do not share memory")
