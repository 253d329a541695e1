"""What `gae` and `rewards_and_gae` ask of their inputs."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from rlhf_fast_kernels.checked_mode import reads_values
from rlhf_fast_kernels.reference import KL_ESTIMATORS

GAE_KL_ESTIMATORS = (*KL_ESTIMATORS, "exact")


def check_floats(op: str, name: str, x: Tensor, shape: torch.Size, like: Tensor) -> None:
    """Shape, dtype and device of one tensor; `like` are the values."""
    if x.shape != shape:
        raise ValueError(f"{op}: {name} has shape {tuple(x.shape)}, expected {tuple(shape)}")
    if not x.dtype.is_floating_point:
        raise TypeError(f"{op}: {name} must be floating point, got {x.dtype}")
    if x.device != like.device:
        raise ValueError(f"{op}: {name} is on {x.device}, values are on {like.device}")


def check_layout(
    op: str,
    values: Tensor,
    mask: Tensor | None,
    bootstrap: Tensor | None,
    cu_seqlens: Tensor | None,
) -> int:
    """Shapes of padded or packed inputs; returns the number of rows or segments."""
    packed = cu_seqlens is not None
    if values.dim() != (1 if packed else 2):
        wanted = "[N] with cu_seqlens" if packed else "[S, R] (or [N] with cu_seqlens)"
        raise ValueError(f"{op}: values has shape {tuple(values.shape)}, expected {wanted}")
    if not values.dtype.is_floating_point:
        raise TypeError(f"{op}: values must be floating point, got {values.dtype}")
    rows = values.shape[0] if cu_seqlens is None else _check_offsets(op, cu_seqlens, values)
    if mask is not None:
        check_mask(op, mask, values, "values")
    elif not packed:
        raise ValueError(f"{op}: mask is needed for padded [S, R] tensors")
    if bootstrap is not None:
        check_floats(op, "bootstrap", bootstrap, torch.Size([rows]), values)
    return rows


def check_mask(op: str, mask: Tensor, like: Tensor, name: str) -> None:
    """A bool mask of the shape and device of `like`, which the caller calls `name`."""
    if mask.dtype != torch.bool:
        raise TypeError(f"{op}: mask must be bool, got {mask.dtype}")
    if mask.shape != like.shape or mask.device != like.device:
        raise ValueError(
            f"{op}: mask has shape {tuple(mask.shape)} on {mask.device}, "
            f"expected that of {name}: {tuple(like.shape)} on {like.device}"
        )


def _check_offsets(op: str, cu_seqlens: Tensor, values: Tensor) -> int:
    """Number of segments."""
    if cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{op}: cu_seqlens must be int32 or int64, got {cu_seqlens.dtype}")
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 1 or cu_seqlens.device != values.device:
        raise ValueError(
            f"{op}: cu_seqlens has shape {tuple(cu_seqlens.shape)} on {cu_seqlens.device}, "
            f"expected [K + 1] on {values.device}"
        )
    return cu_seqlens.shape[0] - 1


def check_segments(op: str, cu_seqlens: Tensor | None, tokens: int) -> None:
    """On the CPU and in checked mode: reading the offsets of an accelerator would stall it."""
    if cu_seqlens is None or not reads_values(cu_seqlens):
        return
    ends = cu_seqlens.tolist()
    rising = all(a <= b for a, b in pairwise(ends))
    if ends[0] != 0 or ends[-1] != tokens or not rising:
        raise ValueError(
            f"{op}: cu_seqlens must rise from 0 to the number of tokens ({tokens}), got {ends}"
            if len(ends) <= 16
            else f"{op}: cu_seqlens must rise from 0 to the number of tokens ({tokens}), "
            f"got [{ends[0]}, ..., {ends[-1]}]{'' if rising else ' with a falling step'}"
        )


def check_scores(op: str, scores: Tensor, rows: int, values: Tensor) -> None:
    """One score per sequence, or one per token."""
    if scores.shape != values.shape and scores.shape != (rows,):
        raise ValueError(
            f"{op}: scores has shape {tuple(scores.shape)}, expected {(rows,)} "
            f"(one per sequence) or {tuple(values.shape)} (one per token)"
        )
    check_floats(op, "scores", scores, scores.shape, values)


def check_kl(
    op: str,
    ref_logprobs: Tensor | None,
    kl: Tensor | None,
    kl_estimator: str,
    log_ratio_clamp: float | None,
    values: Tensor,
) -> None:
    """Where the KL comes from: an estimate from the log-probs, or given per token."""
    if kl_estimator not in GAE_KL_ESTIMATORS:
        raise ValueError(
            f"{op}: kl_estimator must be one of {GAE_KL_ESTIMATORS}, got {kl_estimator!r}"
        )
    if ref_logprobs is not None:
        check_floats(op, "ref_logprobs", ref_logprobs, values.shape, values)
    if (kl_estimator == "exact") != (kl is not None):
        given = "absent" if kl is None else "given"
        raise ValueError(
            f"{op}: kl and kl_estimator='exact' go together; "
            f"kl is {given}, kl_estimator is {kl_estimator!r}"
        )
    if kl is not None:
        check_floats(op, "kl", kl, values.shape, values)
        if ref_logprobs is not None:
            raise ValueError(f"{op}: give kl (exact) or ref_logprobs (k1, k2, k3), not both")
        if log_ratio_clamp is not None:
            raise ValueError(
                f"{op}: log_ratio_clamp bounds the log ratio of an estimate, "
                f"an exact kl has none; got {log_ratio_clamp}"
            )


def check_discount(op: str, gamma: float, gae_lambda: float) -> tuple[float, float]:
    """Both in [0, 1], as floats."""
    if not 0 <= gamma <= 1:
        raise ValueError(f"{op}: gamma must lie in [0, 1], got {gamma}")
    if not 0 <= gae_lambda <= 1:
        raise ValueError(f"{op}: gae_lambda must lie in [0, 1], got {gae_lambda}")
    return float(gamma), float(gae_lambda)


def check_bound(op: str, name: str, bound: float | None) -> float | None:
    """A positive bound as a float; None: no bound."""
    if bound is None:
        return None
    if not bound > 0:
        raise ValueError(f"{op}: {name} must be positive, got {bound}")
    return float(bound)
