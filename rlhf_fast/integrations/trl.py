"""TRL's log-probs, entropy, masked statistics and per-token method on our kernels.

    from rlhf_fast.integrations import trl
    trl.install()                     # or: with trl.patched(): trainer.train()

TRL 1.12 and 1.16. Between the two TRL removed its PPO trainer, and GRPO and RLOO went from logits
to a head that makes none: in 1.12 their `_get_per_token_logps_and_entropies` is replaced, in 1.16
the head's `ChunkedLogProbFunction`, which that method calls. Text only: with images TRL's own
method runs, on our log-probs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from rlhf_fast.integrations.patching import Patch, Replacement, Report, constant
from rlhf_fast.integrations.peer_ops import (
    label_logprobs,
    masked_total,
    moments_fit,
    row_entropy,
    scale_to_unit,
)
from rlhf_fast_kernels import linear_logprobs, logprobs_from_logits, masked_moments

_IGNORED = -100
# What `ChunkedLogProbFunction` of TRL 1.16 returns where nobody says which.
_OPTIONAL_OUTPUTS = ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1")

# ---- log-probs and entropy from logits ----------------------------------------------------------


def _fused_dtype(logits: Tensor) -> torch.dtype:
    """TRL 1.16 has a kernel of its own for accelerators, but not for fp64: its results are fp32."""
    own = logits.device.type == "cpu" or logits.dtype == torch.float64
    return logits.dtype if own else torch.float32


def _own_dtype(logits: Tensor) -> torch.dtype:
    return logits.dtype


def _theirs_to_the_bit(logits: Tensor) -> bool:
    """TRL's tests hold half precision on CPUs to its own roundings, which are not the nearest."""
    return logits.device.type == "cpu" and logits.dtype in (torch.bfloat16, torch.float16)


def _selective_log_softmax(
    dtype: Callable[[Tensor], torch.dtype], own: Callable[..., Tensor]
) -> Callable[..., Tensor]:
    def selective_log_softmax(
        logits: Tensor,
        index: Tensor,
        temperature: float = 1.0,
        row_mask: Tensor | None = None,
    ) -> Tensor:
        """log softmax(logits / temperature) at `index` `[...]`; logits `[..., V]`.

        Rows whose `row_mask` is 0 are not read and give 0. An index of several entries a row, and
        half precision on a CPU, run TRL's own function. TRL 1.12 has neither temperature nor
        row_mask.
        """
        if index.dim() != logits.dim() - 1 or _theirs_to_the_bit(logits):
            options: dict[str, Any] = {} if row_mask is None else {"row_mask": row_mask}
            options |= {} if temperature == 1.0 else {"temperature": temperature}
            return own(logits, index, **options)
        return label_logprobs(logits, _labels(index, row_mask), temperature).to(dtype(logits))

    return selective_log_softmax


def _entropy_from_logits(
    dtype: Callable[[Tensor], torch.dtype], own: Callable[..., Tensor]
) -> Callable[..., Tensor]:
    def entropy_from_logits(logits: Tensor, chunk_size: int = 128) -> Tensor:
        """Entropy of each row in nats, `[...]`; a logit of -inf adds nothing. Needs no chunks.

        Half precision on a CPU runs TRL's own function.
        """
        if _theirs_to_the_bit(logits):
            return own(logits, chunk_size)
        return row_entropy(logits).to(dtype(logits))

    return entropy_from_logits


def selective_log_softmax_and_entropy(
    logits: Tensor,
    index: Tensor,
    entropy_requires_grad: bool = True,
    temperature: float = 1.0,
    row_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Both in one read of the logits; see the two functions. TRL 1.16."""
    labels = _labels(index, row_mask)
    logprobs, entropy = logprobs_from_logits(logits, labels, temperature=temperature)
    assert entropy is not None
    entropy = entropy if entropy_requires_grad else entropy.detach()
    dtype = _fused_dtype(logits)
    return logprobs.to(dtype), entropy.to(dtype)


def _labels(index: Tensor, row_mask: Tensor | None) -> Tensor:
    labels = index.to(torch.int64)
    return labels if row_mask is None else torch.where(row_mask != 0, labels, _IGNORED)


# ---- GRPO and RLOO of TRL 1.12 ------------------------------------------------------------------


def _per_token_method(own: Callable[..., Any]) -> Callable[..., Any]:
    def _get_per_token_logps_and_entropies(
        self: Any,
        model: Any,
        input_ids: Tensor,
        attention_mask: Tensor,
        logits_to_keep: int,
        batch_size: int | None = None,
        compute_entropy: bool = False,
        compute_aux_loss: bool = False,
        **images: Any,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Log-probs and entropies `[B, logits_to_keep]` at the sampling temperature, one read."""
        if any(x is not None for x in images.values()):
            given = (model, input_ids, attention_mask, logits_to_keep, batch_size)
            return own(self, *given, compute_entropy, compute_aux_loss, **images)
        parts = [
            _completion_scores(
                self, model, *rows, logits_to_keep, compute_entropy, compute_aux_loss
            )
            for rows in _batches(input_ids, attention_mask, batch_size)
        ]
        logprobs, entropies, aux_losses = zip(*parts, strict=True)
        entropy = torch.cat(entropies) if compute_entropy else None
        aux_loss = torch.stack(aux_losses).mean() if compute_aux_loss else None
        return torch.cat(logprobs), entropy, aux_loss

    return _get_per_token_logps_and_entropies


def _batches(
    input_ids: Tensor, attention_mask: Tensor, batch_size: int | None
) -> Iterator[tuple[Tensor, Tensor]]:
    size = batch_size or len(input_ids)
    return zip(input_ids.split(size), attention_mask.split(size), strict=True)


def _completion_scores(
    trainer: Any,
    model: Any,
    input_ids: Tensor,
    attention_mask: Tensor,
    count: int,
    with_entropy: bool,
    with_aux_loss: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Of the last `count` tokens of each row; the logits are read where the model left them."""
    options: dict[str, Any] = {"use_cache": False}
    if "logits_to_keep" in trainer.model_kwarg_keys:
        options["logits_to_keep"] = count + 1
    if with_aux_loss:
        options["output_router_logits"] = True
    outputs = model(input_ids=input_ids, attention_mask=attention_mask, **options)
    # The logits at a token are about the next one: the last are about none.
    logits = outputs.logits[:, -count - 1 : -1]
    logprobs, entropy = logprobs_from_logits(
        logits,
        input_ids[:, -count:],
        temperature=trainer.temperature,
        with_entropy=with_entropy,
    )
    if entropy is not None:
        bonus = getattr(trainer, "_entropy_bonus_enabled", False)
        entropy = (entropy if bonus else entropy.detach()).to(logits.dtype)
    aux_loss = outputs.aux_loss if with_aux_loss else None
    return logprobs.to(logits.dtype), entropy, aux_loss


# ---- the head of TRL 1.16 -----------------------------------------------------------------------


def _chunked_logprobs(own: Any) -> Any:
    class ChunkedLogProbFunction:
        """Stands where TRL calls `ChunkedLogProbFunction.apply`."""

        @staticmethod
        def apply(
            hidden: Tensor,
            weight: Tensor,
            bias: Tensor | None,
            targets: Tensor,
            temperature: float,
            chunk_size: int,
            final_logit_softcapping: float | None = None,
            logit_scale: float = 1.0,
            outputs: tuple[str, ...] = _OPTIONAL_OUTPUTS,
        ) -> tuple[Tensor | None, ...]:
            """(logprobs `[N]`, entropy `[N]` or None, None, None, None), fp32.

            Further outputs, a scale of the logits and a head sharded by ZeRO-3 are TRL's own.
            """
            further = set(outputs) - {"log_probs", "entropy"}
            if further or logit_scale != 1.0 or hasattr(weight, "ds_id"):
                call = (hidden, weight, bias, targets, temperature, chunk_size)
                return own.apply(*call, final_logit_softcapping, logit_scale, outputs)
            logprobs, entropy = linear_logprobs(
                hidden,
                weight,
                targets,
                bias=bias,
                temperature=temperature,
                softcap=final_logit_softcapping,
                with_entropy="entropy" in outputs,
            )
            return logprobs, entropy, None, None, None

    return ChunkedLogProbFunction


# ---- masked statistics of TRL 1.12's PPO --------------------------------------------------------


def masked_mean(values: Tensor, mask: Tensor, axis: int | None = None) -> Tensor:
    """Mean of the slots of mask true; what the others hold, NaN included, changes nothing."""
    count = mask.sum() if axis is None else mask.sum(axis)
    return masked_total(values, mask, axis) / count


def masked_var(values: Tensor, mask: Tensor, unbiased: bool = True) -> Tensor:
    """Variance over the slots of mask true, with Bessel's correction if unbiased.

    Raises:
        ValueError: unbiased over fewer than two slots; of one, TRL makes NaN.
    """
    total = mask.sum()
    if unbiased and total <= 1:
        raise ValueError("a sample variance needs a mask with more than one true slot")
    if moments_fit(values, mask):
        count, _, m2 = masked_moments(values, mask.bool()).unbind()
        return (m2 / (count - int(unbiased))).to(values.dtype)
    variance = masked_mean((values - masked_mean(values, mask)).square(), mask)
    return variance * (total / (total - 1)) if unbiased else variance


def masked_whiten(values: Tensor, mask: Tensor, shift_mean: bool = True) -> Tensor:
    """Every slot less the mean, over the spread, of those of mask true."""
    variance = masked_var(values, mask)
    if moments_fit(values, mask):
        return scale_to_unit(values, mask, shift_mean)
    mean = masked_mean(values, mask)
    scaled = (values - mean) * torch.rsqrt(variance + 1e-8)
    return scaled if shift_mean else scaled + mean


_UTILS, _PPO = "trl.trainer.utils", "trl.experimental.ppo.ppo_trainer"


def _from_logits(dtype: Callable[[Tensor], torch.dtype]) -> tuple[Replacement, ...]:
    return (
        Replacement(_UTILS, "selective_log_softmax", partial(_selective_log_softmax, dtype)),
        Replacement(_UTILS, "entropy_from_logits", partial(_entropy_from_logits, dtype)),
    )


_METHOD = "_get_per_token_logps_and_entropies"
_PATCH = Patch(
    "trl",
    {
        "1.16.0": (
            *_from_logits(_fused_dtype),
            Replacement(
                _UTILS,
                "selective_log_softmax_and_entropy",
                constant(selective_log_softmax_and_entropy),
            ),
            Replacement("trl.kernels.chunked_logprob", "ChunkedLogProbFunction", _chunked_logprobs),
        ),
        "1.12.0": (
            *_from_logits(_own_dtype),
            Replacement("trl.trainer.grpo_trainer", f"GRPOTrainer.{_METHOD}", _per_token_method),
            Replacement("trl.trainer.rloo_trainer", f"RLOOTrainer.{_METHOD}", _per_token_method),
            Replacement(_PPO, "masked_mean", constant(masked_mean)),
            Replacement(_PPO, "masked_var", constant(masked_var)),
            Replacement(_PPO, "masked_whiten", constant(masked_whiten)),
        ),
    },
)


def install() -> Report:
    """Replace in this process for good. Raises EnvironmentFault, see `Patch.install`."""
    return _PATCH.install()


def patched() -> AbstractContextManager[Report]:
    """Replace inside a `with` block."""
    return _PATCH.scoped()


def uninstall() -> None:
    """Give TRL its own functions back."""
    _PATCH.remove()
