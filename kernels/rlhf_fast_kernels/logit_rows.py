"""Arguments of `logprobs_from_logits`: what is legal, and where the rows lie in memory."""

from __future__ import annotations

import torch
from torch import Tensor

OP = "logprobs_from_logits"
Scale = float | Tensor


# ---- validation ---------------------------------------------------------------------------------


def validate(logits: Tensor, labels: Tensor, temperature: Scale) -> None:
    if logits.dim() < 1 or labels.shape != logits.shape[:-1]:
        raise ValueError(
            f"{OP}: labels must have the shape of logits without the vocabulary, "
            f"got labels {tuple(labels.shape)} for logits {tuple(logits.shape)}"
        )
    if not logits.is_floating_point():
        raise TypeError(f"{OP}: logits must be floating point, got {logits.dtype}")
    if labels.dtype != torch.int64:
        raise TypeError(f"{OP}: labels must be int64, got {labels.dtype}")
    if labels.device != logits.device:
        raise ValueError(f"{OP}: logits on {logits.device} but labels on {labels.device}")
    if logits.shape[-1] == 0 and labels.numel() > 0:
        raise ValueError(f"{OP}: the vocabulary (last dim of logits) is empty")
    if isinstance(temperature, Tensor):
        if temperature.shape not in (labels.shape, torch.Size([])):
            raise ValueError(
                f"{OP}: a temperature tensor must have the shape of labels "
                f"{tuple(labels.shape)}, got {tuple(temperature.shape)}"
            )
    elif not 0.0 < temperature < float("inf"):
        raise ValueError(f"{OP}: temperature must be positive and finite, got {temperature}")


def validate_data(labels: Tensor, vocab: int, temperature: Scale, ignore_index: int) -> None:
    """The checks that read data; on an accelerator they would cost a synchronisation."""
    bad = ((labels < 0) | (labels >= vocab)) & (labels != ignore_index)
    if bad.any():
        row = tuple(int(i) for i in bad.nonzero()[0])
        raise ValueError(
            f"{OP}: label {int(labels[row])} at row {row} is neither in [0, {vocab}) "
            f"nor ignore_index ({ignore_index})"
        )
    if isinstance(temperature, Tensor):
        wrong = ~((temperature > 0) & torch.isfinite(temperature))
        if wrong.any():
            row = tuple(int(i) for i in wrong.nonzero()[0])
            raise ValueError(
                f"{OP}: temperature {float(temperature[row])} at row {row} "
                "must be positive and finite"
            )


def validate_inplace(logits: Tensor) -> None:
    if logits.is_leaf and logits.requires_grad:
        raise ValueError(f"{OP}: inplace_backward would overwrite a leaf tensor with its gradient")
    layout = row_layout(logits)
    if layout is None:
        raise ValueError(f"{OP}: inplace_backward needs rows contiguous at one or two strides")
    vocab = logits.shape[-1]
    if any(n > 1 and stride < vocab for n, stride in zip(layout[:2], layout[2:], strict=True)):
        raise ValueError(f"{OP}: inplace_backward needs rows that do not share memory")


def row_layout(logits: Tensor) -> tuple[int, int, int, int] | None:
    """(outer, inner, outer stride, inner stride) of the rows in elements.

    Two strides describe every view that slices or transposes the leading dims of a 3-D tensor.
    None where they do not suffice, or where the vocabulary itself is strided.
    """
    vocab = logits.shape[-1]
    if vocab > 1 and logits.stride(-1) != 1:
        return None
    merged: list[tuple[int, int]] = []
    for size, stride in zip(logits.shape[:-1], logits.stride()[:-1], strict=True):
        if size == 1:
            continue
        if merged and merged[-1][1] == size * stride:
            merged[-1] = (merged[-1][0] * size, stride)
        else:
            merged.append((size, stride))
    if len(merged) > 2:
        return None
    while len(merged) < 2:
        merged.insert(0, (1, 0))
    (outer, outer_stride), (inner, inner_stride) = merged
    return outer, inner, outer_stride, inner_stride


def addressable(logits: Tensor) -> tuple[Tensor, tuple[int, int, int, int]]:
    layout = row_layout(logits)
    if layout is None:
        logits = logits.contiguous()
        layout = row_layout(logits)
        assert layout is not None
    return logits, layout
