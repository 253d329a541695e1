"""Log-probs and losses of a vocabulary head whose rows lie on the ranks of a group.

Rank r holds rows [bounds[r], bounds[r + 1]) of the weight [V, H], and has N_r hidden states of its
own tokens. Neither the whole weight nor [tokens, V] logits exist anywhere: the ranks lend each
other their hidden rows, a chunk at a time, and each reads the logits of its slice.

With n ranks, m the largest number of rows that count on a rank, K chunks, c the bytes of the
compute dtype and 4 those of fp32, a rank receives per call

    linear_logprobs    forward    (n - 1) m (H c + 8 + 24)          K + 3 collectives
                       backward   (n - 1) m (H c + H 4 + 32)        2 K + 1
    linear_ppo_loss    at once    (n - 1) m (H c + H 4 + 8 + 24 + 8 q)   4 K + 2, backward none
    linear_kl          forward    (n - 1) m (H c + H' c + 8 + 24)   2 K + 3
                       backward   (n - 1) m (H c + H' c + H 4 + 32) 3 K + 1

and n - 1 counts of 8 bytes. Without the entropy, 24 and 32 are 16; q is 2, and 4 with an entropy
bonus. The exact KL in the loss adds H' c + 24 + 32 and K collectives. Temperatures of their own add
8 a row. Without a gradient for the hidden states H 4 and K collectives fall away, without any
gradient 8 q and K as well.

Gathering the weight for a call instead moves (n - 1) / n V H c, twice if it is not kept for
backward, and (n - 1) / n V H 4 for its gradient, whatever the tokens: less than the above from
about n m = V rows on, at V H (c + 4) bytes more memory on every rank. The products are the same.

Memory of a call: logits of one chunk, [rows, V_r] fp32, where rows is `chunk_rows` of all ranks
together (and as much again for the reference's and for gradients in another dtype); two chunks of
hidden rows; the slice's gradient; for a later backward 16 or 24 bytes a row of this rank and 8 of
every rank.

What all ranks must do alike: the calls and their order, settings, which tensors are given, which of
them require gradients, and whether backward runs. A rank without rows takes
part with hidden states [0, H]; its loss is 0, and its backward holds the others' gradients of its
slice. The upstream gradient of the loss of `linear_ppo_loss` must be one number on all ranks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from rlhf_fast.distributed.vocab_kl import ShardedKL
from rlhf_fast.distributed.vocab_logprobs import ShardedLogprobs, likeliest_rows
from rlhf_fast.distributed.vocab_loss import ShardedPPOLoss
from rlhf_fast.distributed.vocab_rows import Group
from rlhf_fast.distributed.vocab_slice import head_of
from rlhf_fast_kernels import LinearPPOLossOutput, dispatch
from rlhf_fast_kernels.linear_arguments import (
    Tokens,
    compute_dtype_of,
    plain,
    select_tokens,
    temperature_of,
    validate_head,
    validate_label_range,
    validate_labels,
    validate_selection,
    validate_softcap,
)
from rlhf_fast_kernels.linear_chunks import Call
from rlhf_fast_kernels.linear_kl import Side
from rlhf_fast_kernels.linear_ppo_autograd import policy_inputs
from rlhf_fast_kernels.linear_ppo_chunks import Problem
from rlhf_fast_kernels.linear_ppo_loss import FlatCall, validate_tokens
from rlhf_fast_kernels.ppo_arguments import Settings, validate_normalizer
from rlhf_fast_kernels.ppo_metrics import as_output


@dataclass(frozen=True)
class VocabParallel:
    """The ops on a head whose rows lie on the ranks of a group; satisfies `HeadShards`.

    Args:
        group: the ranks.
        bounds: [n + 1] rows of the weight, ascending from 0 to V: rank r holds those from
            `bounds[r]` to `bounds[r + 1]`. Slices may differ in size and be empty.

    Raises:
        ValueError: bounds that do not fit the group.
    """

    group: Group
    bounds: tuple[int, ...]

    def __post_init__(self) -> None:
        ordered = list(self.bounds) == sorted(self.bounds) and self.bounds[:1] == (0,)
        if not ordered or len(self.bounds) != self.group.size() + 1 or self.bounds[-1] < 1:
            raise ValueError(
                f"bounds must ascend from 0 to V in {self.group.size() + 1} numbers, got "
                f"{self.bounds}"
            )

    @classmethod
    def like_shard(cls, group: Group, rows: int) -> VocabParallel:
        """With the slices of DTensor's `Shard(0)`: ceil(rows / n) each, as long as there are."""
        size = -(-rows // group.size())
        return cls(group, tuple(min(r * size, rows) for r in range(group.size() + 1)))

    @property
    def vocab(self) -> int:
        """V, rows of the whole weight."""
        return self.bounds[-1]

    @property
    def rows(self) -> slice:
        """Those of this rank."""
        rank = self.group.rank()
        return slice(self.bounds[rank], self.bounds[rank + 1])

    def local(self, parameter: Tensor) -> Tensor:
        """This rank's rows of a weight or bias, with graph.

        Args:
            parameter: a DTensor that is cut so; or a tensor of all rows, whole on every rank, of
                which each rank's gradient is then that of its rows alone.
        """
        return parameter.to_local() if isinstance(parameter, DTensor) else self._own(parameter)

    def __deepcopy__(self, _memo: Any) -> VocabParallel:
        return self  # a copied module's head lies on the same ranks

    # ---- the ops ------------------------------------------------------------------------------

    def linear_logprobs(
        self,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        *,
        bias: Tensor | None = None,
        temperature: float | Tensor = 1.0,
        softcap: float | None = None,
        with_entropy: bool = True,
        ignore_index: int = -100,
        rows: Tensor | None = None,
        vocab_size: int | None = None,
        compute_dtype: torch.dtype | None = None,
        chunk_rows: int | None = None,
        impl: str | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """`rlhf_fast_kernels.linear_logprobs` of this rank's tokens.

        Args:
            hidden: [..., H] of this rank's tokens.
            weight: [V_r, H], this rank's rows. Its gradient is that of all ranks' tokens.
            labels: [...] int64 in [0, V), or `ignore_index`.
            bias: [V_r] or None.
            chunk_rows: rows of all ranks together whose logits of a slice exist at once, at least
                one of each rank; None: what suits the device.
            temperature, softcap, with_entropy, ignore_index, rows, vocab_size, compute_dtype, impl:
                as there.

        Returns:
            (log-probs, entropy or None), fp32 of labels' shape.

        Raises:
            ValueError, TypeError: as there; also a weight without exactly this rank's rows.
        """
        op = "linear_logprobs"
        validate_labels(op, hidden, labels)
        scale, per_row = temperature_of(op, temperature, labels)
        call = self._call(
            *(op, hidden, weight, bias, scale, softcap, vocab_size, compute_dtype, chunk_rows),
            *(with_entropy, impl),
        )
        flat = labels.reshape(-1)
        with torch.autocast(hidden.device.type, enabled=False):
            keep = None if rows is not None else flat != ignore_index
            tokens = self._tokens(op, flat, keep, rows, per_row, call)
            logprobs, entropy = ShardedLogprobs.apply(
                *(hidden.reshape(-1, hidden.shape[-1]), weight, bias),
                *(tokens, call, self.group, self.vocab),
            )
        return logprobs.view(labels.shape), None if entropy is None else entropy.view(labels.shape)

    def linear_ppo_loss(
        self,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        *,
        old_logprobs: Tensor,
        advantages: Tensor,
        normalizer: float | Tensor,
        mask: Tensor | None = None,
        rows: Tensor | None = None,
        bias: Tensor | None = None,
        temperature: float | Tensor = 1.0,
        softcap: float | None = None,
        vocab_size: int | None = None,
        clip_eps_low: float = 0.2,
        clip_eps_high: float = 0.2,
        dual_clip: float | None = None,
        entropy_coef: float = 0.0,
        ref_logprobs: Tensor | None = None,
        ref_hidden: Tensor | None = None,
        ref_weight: Tensor | None = None,
        ref_bias: Tensor | None = None,
        kl_coef: float = 0.0,
        kl_estimator: str = "k3",
        kl_gradient: str = "k2",
        weights: Tensor | None = None,
        log_ratio_clamp: float = 20.0,
        compute_dtype: torch.dtype | None = None,
        chunk_rows: int | None = None,
        impl: str | None = None,
    ) -> LinearPPOLossOutput:
        """`rlhf_fast_kernels.linear_ppo_loss` of this rank's tokens.

        Gradients are formed in forward, so the loss must be used as it is or times a constant that
        is the same on all ranks, and once.

        Args:
            hidden, weight, labels, bias, chunk_rows: as in `linear_logprobs`.
            normalizer: the loss tokens of the whole optimizer step, over all ranks.
            ref_weight, ref_bias: of the reference, this rank's rows, or all V.
            others: as there.

        Returns:
            loss and metrics of this rank's tokens, to be summed over ranks.

        Raises:
            ValueError, TypeError: as there; also a weight without exactly this rank's rows.
        """
        op = "linear_ppo_loss"
        validate_labels(op, hidden, labels)
        validate_normalizer(normalizer)
        validate_selection(op, mask, rows, chunk_rows)
        settings = Settings(
            *(clip_eps_low, clip_eps_high, dual_clip, entropy_coef, kl_coef),
            kl_estimator=kl_estimator,
            kl_gradient=kl_gradient,
            value_clip_eps=None,
            value_coef=1.0,
            log_ratio_clamp=log_ratio_clamp,
        )
        tensors = (old_logprobs, advantages, ref_logprobs, weights)
        validate_tokens(labels, mask, tensors, settings)
        scale, per_row = temperature_of(op, temperature, labels)
        call = self._call(
            *(op, hidden, weight, bias, scale, softcap, vocab_size, compute_dtype, chunk_rows),
            *(True, impl),
        )
        reference = self._reference(op, hidden, ref_hidden, ref_weight, ref_bias, call)
        if (reference is None) == (kl_estimator == "exact"):
            raise ValueError(f"{op}: ref_hidden and ref_weight go with kl_estimator='exact'")
        flat = FlatCall(
            *(hidden, weight, bias, labels, mask, rows, per_row, tensors, (None, None, None))
        )
        with torch.autocast(hidden.device.type, enabled=False):
            tokens = self._tokens(op, flat.labels, flat.keep, rows, per_row, call)
            head = head_of(weight, bias, call)
            inputs = policy_inputs(tokens, flat.tensors, head.accumulate)
            problem = Problem(
                flat.hidden.detach(), head, tokens, inputs, normalizer, settings, reference, call
            )
            loss, sums, extrema, logprobs, entropy = ShardedPPOLoss.apply(
                *(flat.hidden, weight, bias, problem, self.group, self.vocab),
                torch.is_grad_enabled(),
            )
        out = as_output(loss, sums, extrema, flat.policy_part(kl_estimator))
        shape = labels.shape
        return LinearPPOLossOutput(*out, logprobs.view(shape), entropy.view(shape))

    def linear_kl(
        self,
        hidden: Tensor,
        weight: Tensor,
        ref_hidden: Tensor,
        ref_weight: Tensor,
        *,
        bias: Tensor | None = None,
        ref_bias: Tensor | None = None,
        mask: Tensor | None = None,
        rows: Tensor | None = None,
        temperature: float | Tensor = 1.0,
        softcap: float | None = None,
        vocab_size: int | None = None,
        compute_dtype: torch.dtype | None = None,
        chunk_rows: int | None = None,
        impl: str | None = None,
    ) -> Tensor:
        """`rlhf_fast_kernels.linear_kl` of this rank's tokens.

        Args:
            hidden, weight, bias, chunk_rows: as in `linear_logprobs`.
            ref_weight, ref_bias: of the reference, this rank's rows, or all V.
            others: as there.

        Returns:
            [...] fp32, nats.

        Raises:
            ValueError, TypeError: as there; also a weight without exactly this rank's rows.
        """
        op, shape = "linear_kl", hidden.shape[:-1]
        validate_selection(op, mask, rows, chunk_rows)
        labels = torch.zeros(shape, dtype=torch.int64, device=hidden.device)
        scale, per_row = temperature_of(op, temperature, labels)
        call = self._call(
            *(op, hidden, weight, bias, scale, softcap, vocab_size, compute_dtype, chunk_rows),
            *(False, impl),
        )
        reference = self._reference(op, hidden, ref_hidden, ref_weight, ref_bias, call)
        assert reference is not None
        if mask is not None and (mask.dtype != torch.bool or mask.shape != shape):
            raise ValueError(
                f"{op}: mask must be bool {tuple(shape)}, got {mask.dtype} {tuple(mask.shape)}"
            )
        keep = None if mask is None else mask.reshape(-1)
        with torch.autocast(hidden.device.type, enabled=False):
            tokens = self._tokens(op, labels.reshape(-1), keep, rows, per_row, call)
            kl = ShardedKL.apply(
                *(hidden.reshape(-1, hidden.shape[-1]), weight, bias),
                *(reference, tokens, call, self.group, self.vocab),
            )
        return kl.view(shape)

    @torch.no_grad()
    def likeliest(
        self,
        hidden: Tensor,
        weight: Tensor,
        *,
        bias: Tensor | None = None,
        compute_dtype: torch.dtype | None = None,
    ) -> Tensor:
        """[N] int64: the row of the whole weight with the largest logit; of equal ones the first.

        Args:
            hidden: [N, H] of this rank's tokens.
            weight, bias: this rank's rows.
            compute_dtype: as in `linear_logprobs`.
        """
        op = "linear_logprobs"
        call = self._call(
            *(op, hidden, weight, bias, 1.0, None, None, compute_dtype, None, False, None)
        )
        with torch.autocast(hidden.device.type, enabled=False):
            head = head_of(weight, bias, call)
            return likeliest_rows(hidden, head, call, self.group, self.vocab)

    # ---- arguments ----------------------------------------------------------------------------

    def _call(
        self,
        op: str,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        scale: float,
        softcap: float | None,
        vocab_size: int | None,
        compute_dtype: torch.dtype | None,
        chunk_rows: int | None,
        with_entropy: bool,
        impl: str | None,
    ) -> Call:
        self._validate_head(op, hidden, weight, bias)
        validate_softcap(op, softcap)
        validate_selection(op, None, None, chunk_rows)
        real = self.vocab if vocab_size is None else vocab_size
        if not 0 < real <= self.vocab:
            raise ValueError(f"{op}: vocab_size must lie in [1, {self.vocab}], got {vocab_size}")
        compute = compute_dtype_of(hidden, compute_dtype)
        chosen = dispatch.choose(op, impl, hidden, weight, hidden.new_empty(0, dtype=compute))
        start = min(self.rows.start, real)
        scalars = (scale, softcap, real, chunk_rows, with_entropy)
        return Call(chosen.impl, compute, *scalars, vocab_start=start)

    def _validate_head(
        self, op: str, hidden: Tensor, weight: Tensor, bias: Tensor | None, prefix: str = ""
    ) -> None:
        plain(op, **{f"{prefix}hidden": hidden, f"{prefix}weight": weight, f"{prefix}bias": bias})
        rows = self.rows.stop - self.rows.start
        if weight.shape != (rows, hidden.shape[-1]):
            raise ValueError(
                f"{op}: {prefix}weight must be [{rows}, {hidden.shape[-1]}] here, rows "
                f"{self.rows.start} to {self.rows.stop} of {self.vocab}; got {tuple(weight.shape)}"
            )
        if rows > 0:
            validate_head(op, hidden, weight, bias, prefix)

    def _tokens(
        self,
        op: str,
        labels: Tensor,
        keep: Tensor | None,
        rows: Tensor | None,
        temperature: Tensor | None,
        call: Call,
    ) -> Tokens:
        tokens = select_tokens(op, labels, keep, rows, temperature)
        assert call.vocab_size is not None
        validate_label_range(op, tokens.labels, call.vocab_size)
        return tokens

    def _reference(
        self,
        op: str,
        hidden: Tensor,
        ref_hidden: Tensor | None,
        ref_weight: Tensor | None,
        ref_bias: Tensor | None,
        call: Call,
    ) -> Side | None:
        if ref_hidden is None or ref_weight is None:
            return None
        if ref_hidden.shape[:-1] != hidden.shape[:-1]:
            raise ValueError(
                f"{op}: ref_hidden {tuple(ref_hidden.shape)} must have the tokens of hidden "
                f"{tuple(hidden.shape)}"
            )
        weight, bias = (None if x is None else self._own(x) for x in (ref_weight, ref_bias))
        assert weight is not None
        self._validate_head(op, ref_hidden, weight, bias, prefix="ref_")
        rows = ref_hidden.detach().reshape(-1, ref_hidden.shape[-1])
        return Side(rows, head_of(weight, bias, call))

    def _own(self, whole: Tensor) -> Tensor:
        """This rank's rows of what has all of them; anything else is returned."""
        return whole[self.rows] if whole.shape[0] == self.vocab else whole
