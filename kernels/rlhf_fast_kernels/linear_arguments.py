"""Arguments that the ops on hidden states and a vocabulary head share."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from rlhf_fast_kernels.checked_mode import reads_values

_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class Tokens(NamedTuple):
    """The rows that meet the vocabulary.

    Attributes:
        places: [n] int64, where they are among the N flattened tokens; None: all of them in order.
        labels: [n] int64.
        temperature: [n] fp32, or None where one number serves all.
    """

    places: Tensor | None
    labels: Tensor
    temperature: Tensor | None

    def take(self, x: Tensor, start: int, stop: int) -> Tensor:
        """Rows [start, stop) of what belongs to all N tokens."""
        if self.places is None:
            return x[start:stop]
        return x.index_select(0, self.places[start:stop])

    def pick(self, x: Tensor) -> Tensor:
        """[n, ...] of what belongs to all N tokens."""
        return x if self.places is None else x.index_select(0, self.places)

    def spread(self, x: Tensor, tokens: int) -> Tensor:
        """[N, ...] from [n, ...]: exact 0 at tokens that were left out."""
        if self.places is None:
            return x
        out = x.new_zeros((tokens, *x.shape[1:]))
        return out.index_copy_(0, self.places, x)


def plain(op: str, **tensors: Tensor | None) -> None:
    """Refuse DTensors: gathering one here would undo its sharding behind the caller's back."""
    for name, x in tensors.items():
        if x is not None and type(x).__name__ == "DTensor":
            raise TypeError(
                f"{op}: {name} is a DTensor; pass its local shard (to_local()) together with "
                "group, or let FSDP unshard the head first"
            )


def validate_head(
    op: str, hidden: Tensor, weight: Tensor, bias: Tensor | None, prefix: str = ""
) -> None:
    """Shapes, dtypes and devices of hidden states [..., H] and a head [V, H], [V]."""
    plain(op, **{f"{prefix}hidden": hidden, f"{prefix}weight": weight, f"{prefix}bias": bias})
    if weight.dim() != 2 or hidden.dim() < 1 or hidden.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"{op}: {prefix}hidden must be [..., H] and {prefix}weight [V, H], "
            f"got {tuple(hidden.shape)} and {tuple(weight.shape)}"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(
            f"{op}: {prefix}bias has shape {tuple(bias.shape)}, expected {tuple(weight.shape[:1])}"
        )
    for name, x in (("hidden", hidden), ("weight", weight), ("bias", bias)):
        if x is None:
            continue
        if x.dtype not in _FLOATS:
            raise TypeError(f"{op}: {prefix}{name} must be floating point, got {x.dtype}")
        if x.device != hidden.device:
            raise ValueError(
                f"{op}: {prefix}{name} is on {x.device}, {prefix}hidden on {hidden.device}"
            )
    if weight.shape[0] == 0 and hidden.numel() > 0:
        raise ValueError(f"{op}: the vocabulary (first dim of {prefix}weight) is empty")


def validate_labels(op: str, hidden: Tensor, labels: Tensor) -> None:
    """Labels [...] int64 beside hidden states [..., H]."""
    if labels.shape != hidden.shape[:-1]:
        raise ValueError(
            f"{op}: labels must have the shape of hidden without its last dim, "
            f"got labels {tuple(labels.shape)} for hidden {tuple(hidden.shape)}"
        )
    if labels.dtype != torch.int64:
        raise TypeError(f"{op}: labels must be int64, got {labels.dtype}")
    if labels.device != hidden.device:
        raise ValueError(f"{op}: hidden on {hidden.device} but labels on {labels.device}")


def validate_label_range(op: str, labels: Tensor, vocab: int) -> None:
    """On the CPU and in checked mode: looking at an accelerator's labels would stall it."""
    if not reads_values(labels):
        return
    bad = (labels < 0) | (labels >= vocab)
    if bad.any():
        at = int(bad.nonzero()[0])
        raise ValueError(
            f"{op}: label {int(labels[at])} of the {at}-th token that counts is not in [0, {vocab})"
        )


def validate_reference(
    op: str,
    hidden: Tensor,
    weight: Tensor,
    reference: tuple[Tensor, Tensor, Tensor | None],
) -> None:
    """The reference's (hidden, weight, bias) beside the actor's: same tokens, same vocabulary."""
    ref_hidden, ref_weight, ref_bias = reference
    validate_head(op, ref_hidden, ref_weight, ref_bias, prefix="ref_")
    if ref_hidden.shape[:-1] != hidden.shape[:-1] or ref_weight.shape[0] != weight.shape[0]:
        raise ValueError(
            f"{op}: ref_hidden {tuple(ref_hidden.shape)} and ref_weight {tuple(ref_weight.shape)} "
            f"must have the tokens of hidden {tuple(hidden.shape)} and the vocabulary of weight "
            f"{tuple(weight.shape)}"
        )
    if ref_hidden.device != hidden.device:
        raise ValueError(f"{op}: ref_hidden is on {ref_hidden.device}, hidden on {hidden.device}")


def validate_selection(
    op: str, mask: Tensor | None, rows: Tensor | None, chunk_rows: int | None
) -> None:
    """Tokens are named once, and chunks have rows."""
    if mask is not None and rows is not None:
        raise ValueError(f"{op}: mask and rows both name the tokens that count; give one")
    if chunk_rows is not None and chunk_rows < 1:
        raise ValueError(f"{op}: chunk_rows must be at least 1, got {chunk_rows}")


def validate_softcap(op: str, softcap: float | None) -> None:
    if softcap is not None and not 0.0 < softcap < float("inf"):
        raise ValueError(f"{op}: softcap must be positive and finite, or None, got {softcap}")


def temperature_of(
    op: str, temperature: float | Tensor, like: Tensor
) -> tuple[float, Tensor | None]:
    """(scalar, None) or (1.0, [N] fp32 flat); `like` has the shape of labels."""
    if not isinstance(temperature, Tensor):
        if not 0.0 < temperature < float("inf"):
            raise ValueError(f"{op}: temperature must be positive and finite, got {temperature}")
        return float(temperature), None
    if temperature.shape not in (like.shape, torch.Size([])) or temperature.device != like.device:
        raise ValueError(
            f"{op}: a temperature tensor must have the shape of labels {tuple(like.shape)} on "
            f"{like.device}, got {tuple(temperature.shape)} on {temperature.device}"
        )
    return 1.0, temperature.detach().expand(like.shape).reshape(-1).to(torch.float32)


def select_tokens(
    op: str,
    labels: Tensor,
    keep: Tensor | None,
    rows: Tensor | None,
    temperature: Tensor | None,
) -> Tokens:
    """The tokens that meet the vocabulary.

    Args:
        op: for messages.
        labels: [N] int64.
        keep: [N] bool; None: every token.
        rows: [n] integer indices of the tokens that count, if the caller knows them; otherwise they
            are looked up, for which an accelerator has to be waited for.
        temperature: [N] fp32 or None.
    """
    index = rows
    if index is None and keep is not None:
        index = keep.nonzero().squeeze(1)
    elif index is not None:
        if index.dim() != 1 or index.dtype not in (torch.int32, torch.int64):
            raise ValueError(
                f"{op}: rows must be a 1-D int32 or int64 tensor, got {index.dtype} "
                f"{tuple(index.shape)}"
            )
        index = index.to(labels.device, torch.int64)
        if reads_values(index):
            _check_rows(op, index, labels.shape[0])
    if index is None or (rows is None and index.shape[0] == labels.shape[0]):
        tokens = Tokens(None, labels, temperature)
    else:
        chosen = None if temperature is None else temperature.index_select(0, index)
        tokens = Tokens(index, labels.index_select(0, index), chosen)
    _check_temperatures(op, tokens.temperature)
    return tokens


def _check_temperatures(op: str, temperature: Tensor | None) -> None:
    if temperature is None or not reads_values(temperature):
        return
    if not bool(((temperature > 0) & temperature.isfinite()).all()):
        raise ValueError(f"{op}: every temperature must be positive and finite")


def _check_rows(op: str, index: Tensor, tokens: int) -> None:
    if index.numel() == 0:
        return
    if int(index.min()) < 0 or int(index.max()) >= tokens:
        raise ValueError(f"{op}: rows must lie in [0, {tokens})")
    if int(torch.bincount(index, minlength=1).max()) > 1:
        raise ValueError(f"{op}: rows must not repeat a token")


def compute_dtype_of(hidden: Tensor, wanted: torch.dtype | None) -> torch.dtype:
    """The dtype that products round their operands to: as asked, autocast's, or hidden's."""
    if wanted is not None:
        return wanted
    if torch.is_autocast_enabled(hidden.device.type) and hidden.dtype != torch.float64:
        return torch.get_autocast_dtype(hidden.device.type)
    return hidden.dtype


def is_distributed(group: Any) -> bool:
    """Whether a process group has more than one rank."""
    return group is not None and torch.distributed.get_world_size(group) > 1


def validate_group(op: str, group: Any, vocab_size: int | None, vocab_start: int | None) -> None:
    """A shard that does not begin at rank * V must say how large the vocabulary is."""
    if vocab_start is None:
        return
    if not is_distributed(group):
        raise ValueError(f"{op}: vocab_start is for shards: it needs group")
    if vocab_size is None or not 0 <= vocab_start <= vocab_size:
        raise ValueError(
            f"{op}: vocab_start needs vocab_size, and to lie in [0, vocab_size]; got {vocab_start} "
            f"and {vocab_size}"
        )


def vocabulary_of(weight: Tensor, vocab_size: int | None, group: Any) -> int:
    """How many labels exist: as said, or the rows of the weight on all ranks."""
    if vocab_size is not None:
        return vocab_size
    ranks = torch.distributed.get_world_size(group) if is_distributed(group) else 1
    return weight.shape[0] * ranks
