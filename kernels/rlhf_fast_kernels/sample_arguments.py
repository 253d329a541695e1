"""Arguments of `sample`: what is legal, and how a setting reaches an implementation."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

OP = "sample"


class SampleOutput(NamedTuple):
    """One token a row; see `sample` for the distributions.

    Attributes:
        tokens: [B] int64; -1 for an unusable row.
        logprobs: [B] of the distribution that was drawn from, after every filter.
        raw_logprobs: [B] of softmax(logits / temperature), before the filters.
        entropy: [B] of the distribution of `raw_logprobs`, or None.
    """

    tokens: Tensor
    logprobs: Tensor
    raw_logprobs: Tensor
    entropy: Tensor | None


class Setting(NamedTuple):
    """A number for all rows, or a contiguous tensor [B], which then rules."""

    tensor: Tensor | None
    value: float

    def per_row(self, rows: int, dtype: torch.dtype) -> Tensor:
        """[rows] contiguous, on the CPU if it was a number."""
        if self.tensor is None:
            return torch.full((rows,), self.value, dtype=dtype, device="cpu")
        return self.tensor.to(dtype).expand(rows).contiguous()

    @property
    def either(self) -> float | Tensor:
        return self.value if self.tensor is None else self.tensor


class Draw(NamedTuple):
    """A validated call."""

    logits: Tensor
    vocab: int
    seeds: Tensor
    step: Setting
    temperature: Setting
    top_k: Setting
    top_p: Setting
    min_p: Setting


# name -> (dtype of a kernel, upper end, whether that end is legal)
_RANGES = {
    "temperature": (torch.float32, math.inf, False),
    "top_k": (torch.int64, math.inf, True),
    "top_p": (torch.float32, 1.0, True),
    "min_p": (torch.float32, 1.0, True),
}


def _expected(name: str) -> str:
    _, end, _ = _RANGES[name]
    return "0 (off) or more" if name == "top_k" else f"in [0, {'inf)' if end == math.inf else '1]'}"


def _check_tensor(name: str, tensor: Tensor, logits: Tensor, integer: bool) -> None:
    rows = logits.shape[0]
    if tensor.shape not in (torch.Size([]), torch.Size([rows])):
        raise ValueError(
            f"{OP}: {name} must be a number or a tensor of shape () or ({rows},), as logits "
            f"{tuple(logits.shape)} have {rows} rows, got {tuple(tensor.shape)}"
        )
    fits = tensor.dtype == torch.int64 if integer else tensor.is_floating_point()
    if not fits:
        wanted = "int64" if integer else "floating point"
        raise TypeError(f"{OP}: {name} must be {wanted}, got {tensor.dtype}")
    if tensor.device != logits.device:
        raise ValueError(f"{OP}: logits on {logits.device} but {name} on {tensor.device}")


def _legal(name: str, value: Any) -> Any:
    _, end, closed = _RANGES[name]
    return (value >= 0) & ((value <= end) if closed else (value < end))


def _setting(name: str, value: float | Tensor, logits: Tensor) -> Setting:
    dtype = _RANGES[name][0]
    integer = dtype == torch.int64
    if isinstance(value, Tensor):
        _check_tensor(name, value, logits, integer)
        return Setting(value.detach().to(dtype).expand(logits.shape[0]).contiguous(), 0)
    if integer and not isinstance(value, int):
        raise TypeError(f"{OP}: {name} must be an integer, got {value!r}")
    if not _legal(name, value):
        raise ValueError(f"{OP}: {name} must be {_expected(name)}, got {value}")
    return Setting(None, value if integer else float(value))


def collect(
    logits: Tensor,
    seeds: Tensor,
    step: int | Tensor,
    temperature: float | Tensor,
    top_k: int | Tensor,
    top_p: float | Tensor,
    min_p: float | Tensor,
    vocab_size: int | None,
) -> Draw:
    """Check everything that can be checked without reading data.

    Raises:
        ValueError, TypeError: naming the argument and what was expected.
    """
    if logits.dim() != 2:
        raise ValueError(f"{OP}: logits must be [B, V], got {tuple(logits.shape)}")
    if not logits.is_floating_point():
        raise TypeError(f"{OP}: logits must be floating point, got {logits.dtype}")
    rows, columns = logits.shape
    if rows > 0 and columns == 0:
        raise ValueError(f"{OP}: the vocabulary (last dim of logits) is empty")
    if vocab_size is not None and not 0 < vocab_size <= columns:
        raise ValueError(
            f"{OP}: vocab_size must be in [1, {columns}] for logits {tuple(logits.shape)}, "
            f"got {vocab_size}"
        )
    _check_tensor("seeds", seeds, logits, integer=True)
    if seeds.dim() == 0:
        raise ValueError(f"{OP}: seeds must have shape ({rows},), one a row, got ()")
    if isinstance(step, Tensor):
        _check_tensor("step", step, logits, integer=True)
        steps = Setting(step.expand(rows), 0)
    else:
        steps = Setting(None, int(step))
    return Draw(
        logits.detach(),
        columns if vocab_size is None else vocab_size,
        seeds.contiguous(),
        steps,
        _setting("temperature", temperature, logits),
        _setting("top_k", top_k, logits),
        _setting("top_p", top_p, logits),
        _setting("min_p", min_p, logits),
    )


def validate_data(call: Draw) -> None:
    """The checks that read data; on an accelerator they would cost a synchronisation."""
    for name in _RANGES:
        tensor = getattr(call, name).tensor
        if tensor is None:
            continue
        wrong = ~_legal(name, tensor)
        if wrong.any():
            row = int(wrong.nonzero()[0])
            raise ValueError(
                f"{OP}: {name} must be {_expected(name)}, got {tensor[row].item()} at row {row}"
            )


def validate_out(out: SampleOutput, logits: Tensor, with_entropy: bool) -> None:
    """Buffers to write to: contiguous, of the dtypes that `sample` would return."""
    wide = torch.float64 if logits.dtype == torch.float64 else torch.float32
    wanted = {"tokens": torch.int64, "logprobs": wide, "raw_logprobs": wide}
    if with_entropy:
        wanted["entropy"] = wide
    for name, dtype in wanted.items():
        buffer = getattr(out, name)
        if buffer is None or buffer.shape != logits.shape[:1] or not buffer.is_contiguous():
            shape = None if buffer is None else tuple(buffer.shape)
            raise ValueError(
                f"{OP}: out.{name} must be contiguous of shape ({logits.shape[0]},), got {shape}"
            )
        if buffer.dtype != dtype or buffer.device != logits.device:
            raise ValueError(
                f"{OP}: out.{name} must be {dtype} on {logits.device}, "
                f"got {buffer.dtype} on {buffer.device}"
            )
