"""The policy's PPO objective from hidden states and the vocabulary head, gradients included.

The same terms as `ppo_loss` (ratio, clips, dual clip, entropy bonus, KL), with log-probs and
entropy read off one chunk of logits at a time. Every term of a token depends on that token's own
log-prob and entropy (and constants), so the gradient of its logits is known as soon as its row has
been read. It is formed there and then, while the chunk is in memory:

    logits = x W^T       (logp, H, lse) = sums of the row       g, h = dloss/dlogp, dloss/dH
    D = ( g (1[label] - p) - h p (z - lse + H) ) / temperature    dx = D W    dW += D^T x

That is 6 T H V flops for forward and backward together. An op that returns log-probs has to compute
the logits again in its backward: 8 T H V. Prompt and padding rows are left out of every product.

The exact KL(actor || reference) over the whole vocabulary, instead of an estimate from the sampled
token, costs the reference's logits, 2 T H V more, and no further pass (`kl_estimator="exact"`).

Because gradients exist when forward returns, the loss must be used as it is or times a constant:
backward scales them by the upstream gradient. `normalizer` and `weights` carry every division and
weight, so that this holds for token means, sequence means and global token counts alike.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from rlhf_fast_kernels import dispatch, reference
from rlhf_fast_kernels.linear_arguments import (
    compute_dtype_of,
    select_tokens,
    temperature_of,
    validate_group,
    validate_head,
    validate_label_range,
    validate_labels,
    validate_reference,
    validate_selection,
    validate_softcap,
    vocabulary_of,
)
from rlhf_fast_kernels.linear_chunks import Call, checked_gradients, register_chunked
from rlhf_fast_kernels.linear_head import Head
from rlhf_fast_kernels.linear_kl import linear_kl
from rlhf_fast_kernels.linear_logprobs import linear_logprobs
from rlhf_fast_kernels.linear_ppo_autograd import (
    OP,
    POLICY_TENSORS,
    LinearPPOLoss,
    linear_ppo_loss_op,
    policy_inputs,
    reference_of,
)
from rlhf_fast_kernels.linear_ppo_chunks import Problem
from rlhf_fast_kernels.ppo_arguments import (
    Inputs,
    Settings,
    validate_inputs,
    validate_normalizer,
    validate_settings,
)
from rlhf_fast_kernels.ppo_metrics import as_output
from rlhf_fast_kernels.reference import PPO_SUM_NAMES

IGNORE_INDEX = -100


class LinearPPOLossOutput(NamedTuple):
    """What `linear_ppo_loss` returns.

    Attributes:
        loss: [] fp32, differentiable, already divided by the normalizer.
        metrics, extrema: as in `PPOLossOutput`, without the value part.
        logprobs: of the labels' shape, fp32, detached; exact 0 at tokens that were left out.
        entropy: the same of the entropy.
    """

    loss: Tensor
    metrics: dict[str, Tensor]
    extrema: dict[str, Tensor]
    logprobs: Tensor
    entropy: Tensor


def linear_ppo_loss(
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
    grad_scale: float = 1.0,
    weight_out: Tensor | None = None,
    compute_dtype: torch.dtype | None = None,
    chunk_rows: int | None = None,
    group: Any = None,
    vocab_start: int | None = None,
    sum_hidden_gradient: bool = True,
    impl: str | None = None,
) -> LinearPPOLossOutput:
    """Clipped PPO policy loss of hidden states and a vocabulary head; see the module for the maths.

    Gradients flow to `hidden`, `weight` and `bias`, whichever require one, and are formed in
    forward (not under `torch.no_grad`). Keep the call outside activation checkpointing, which would
    run it twice.

    Args:
        hidden, weight, labels, bias, temperature, softcap, vocab_size, compute_dtype, chunk_rows,
            group, vocab_start, sum_hidden_gradient: as in `linear_logprobs`.
        old_logprobs: of labels' shape: log-probs of the labels under the policy that sampled them.
        advantages: of labels' shape.
        normalizer: what the sum over tokens is divided by: the loss tokens of the whole optimizer
            step, over all microbatches and ranks. A number, or a tensor of one element.
        mask: bool of labels' shape; tokens where it is false cost nothing and change nothing. None:
            labels other than -100.
        rows: `[n]` int64, the flat indices of the tokens that count, instead of `mask`; saves an
            accelerator from being waited for.
        clip_eps_low, clip_eps_high, dual_clip, entropy_coef, ref_logprobs, kl_coef, kl_gradient,
            weights, log_ratio_clamp: as in `ppo_loss`.
        kl_estimator: `"k1"`, `"k2"`, `"k3"` from `ref_logprobs`, or `"exact"`: KL over the whole
            vocabulary, with its own gradient, from the next three.
        ref_hidden, ref_weight, ref_bias: hidden states `[..., H']` and head `[V, H']`, `[V]` of the
            reference, under the same temperature and softcap.
        grad_scale: number that the gradients, not the loss, are multiplied by, for example the
            number of ranks whose gradients will be averaged.
        weight_out: fp32 `[V, H]` contiguous buffer (a main gradient) that the weight's gradient is
            added to, in forward; `weight` itself then receives none, and the loss must be used as
            it is.
        impl: whose row kernels, see `rlhf_fast_kernels.dispatch`.

    Returns:
        `LinearPPOLossOutput(loss, metrics, extrema, logprobs, entropy)`.

    Raises:
        ValueError, TypeError, RuntimeError: as `linear_logprobs` and `ppo_loss`; also a second
            backward, or on the CPU a scaled loss, with `weight_out`.
    """
    validate_head(OP, hidden, weight, bias)
    validate_labels(OP, hidden, labels)
    validate_softcap(OP, softcap)
    validate_group(OP, group, vocab_size, vocab_start)
    validate_normalizer(normalizer)
    validate_selection(OP, mask, rows, chunk_rows)
    _validate_weight_out(weight, weight_out)
    settings = Settings(
        clip_eps_low,
        clip_eps_high,
        dual_clip,
        entropy_coef,
        kl_coef,
        kl_estimator,
        kl_gradient,
        value_clip_eps=None,
        value_coef=1.0,
        log_ratio_clamp=log_ratio_clamp,
    )
    tensors = (old_logprobs, advantages, ref_logprobs, weights)
    reference_head = (ref_hidden, ref_weight, ref_bias)
    validate_tokens(labels, mask, tensors, settings)
    _validate_reference(hidden, weight, reference_head, settings)
    scale, per_row = temperature_of(OP, temperature, labels)
    compute = compute_dtype_of(hidden, compute_dtype)
    impl = dispatch.choose(OP, impl, hidden, weight, hidden.new_empty(0, dtype=compute)).impl
    shape = (scale, softcap, vocab_size, chunk_rows)
    flat = FlatCall(hidden, weight, bias, labels, mask, rows, per_row, tensors, reference_head)
    with torch.autocast(hidden.device.type, enabled=False):
        if torch.compiler.is_compiling():
            if group is not None or weight_out is not None:
                raise ValueError(f"{OP}: group and weight_out are not for torch.compile")
            run = _composed if impl == "reference" else _compiled
            raw = run(flat, normalizer, settings, impl, compute, shape, grad_scale)
        else:
            call = Call(impl, compute, *shape, True, group, sum_hidden_gradient, vocab_start)
            raw = _eager(flat, normalizer, settings, call, grad_scale, weight_out)
    loss, sums, extrema, logprobs, token_entropy = raw
    given = flat.policy_part(kl_estimator)
    out = as_output(loss, sums, extrema, given)
    return LinearPPOLossOutput(*out, logprobs.view(labels.shape), token_entropy.view(labels.shape))


class FlatCall:
    """The tensors of a call with tokens in one dim."""

    def __init__(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        mask: Tensor | None,
        rows: Tensor | None,
        temperature: Tensor | None,
        tensors: tuple[Tensor | None, ...],
        reference_head: tuple[Tensor | None, ...],
    ) -> None:
        self.hidden = hidden.reshape(-1, hidden.shape[-1])
        self.weight, self.bias = weight, bias
        self.labels = labels.reshape(-1)
        self.rows, self.temperature = rows, temperature
        keep = labels != IGNORE_INDEX if mask is None else mask
        self.keep = None if rows is not None else keep.reshape(-1)
        self.tensors = [None if x is None else x.detach().reshape(-1) for x in tensors]
        ref_hidden, *head = (None if x is None else x.detach() for x in reference_head)
        rows_of = None if ref_hidden is None else ref_hidden.reshape(-1, ref_hidden.shape[-1])
        self.reference_head = [rows_of, *head]

    def policy_part(self, kl_estimator: str) -> Inputs:
        """Which metrics there are, as `as_output` reads it off the inputs."""
        some = self.tensors[0]
        absent = dict.fromkeys(Inputs.__annotations__)
        present = {"logprobs": some, "entropy": some, "ref_logprobs": self.tensors[2]}
        present["kl"] = some if kl_estimator == "exact" else None
        return Inputs(**{**absent, **present})


_Raw = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def _eager(
    flat: FlatCall,
    normalizer: float | Tensor,
    settings: Settings,
    call: Call,
    grad_scale: float,
    weight_out: Tensor | None,
) -> _Raw:
    tokens = select_tokens(OP, flat.labels, flat.keep, flat.rows, flat.temperature)
    vocabulary = vocabulary_of(flat.weight, call.vocab_size, call.group)
    validate_label_range(OP, tokens.labels, vocabulary)
    bias = None if flat.bias is None else flat.bias.detach()
    head = Head(flat.weight.detach(), bias, call.compute)
    problem = Problem(
        flat.hidden.detach(),
        head,
        tokens,
        policy_inputs(tokens, flat.tensors, head.accumulate),
        normalizer,
        settings,
        reference_of(call.compute, flat.reference_head),
        call,
        grad_scale,
    )
    return LinearPPOLoss.apply(
        flat.hidden, flat.weight, flat.bias, problem, weight_out, torch.is_grad_enabled()
    )


def _compiled(
    flat: FlatCall,
    normalizer: float | Tensor,
    settings: Settings,
    impl: str,
    compute: torch.dtype,
    shape: tuple[Any, ...],
    grad_scale: float,
) -> _Raw:
    differentiable = (flat.hidden, flat.weight, flat.bias)
    needs = [torch.is_grad_enabled() and x is not None and x.requires_grad for x in differentiable]
    count = torch.as_tensor(normalizer, dtype=torch.float64)
    scalars = {k: v for k, v in vars(settings).items() if not k.startswith("value_")}
    raw = linear_ppo_loss_op(
        *(*differentiable, flat.labels, flat.keep, flat.rows, flat.temperature),
        *(*flat.tensors, *flat.reference_head, count, needs, impl, compute, *shape, grad_scale),
        *scalars.values(),
    )
    loss, *constants = raw[:5]
    return (loss, *(x.detach() for x in constants))


def _composed(
    flat: FlatCall,
    normalizer: float | Tensor,
    settings: Settings,
    impl: str,
    compute: torch.dtype,
    shape: tuple[Any, ...],
    grad_scale: float,
) -> _Raw:
    """As `_compiled`, of ops with a gradient each: the reference's loss is differentiated by
    autograd, which an op of torch.library does without.
    """
    scale, softcap, vocab_size, chunk_rows = shape
    options: dict[str, Any] = {
        "temperature": scale if flat.temperature is None else flat.temperature,
        "softcap": softcap,
        "vocab_size": vocab_size,
        "compute_dtype": compute,
        "chunk_rows": chunk_rows,
        "impl": impl,
    }
    keep = flat.keep
    if keep is None:
        assert flat.rows is not None
        keep = torch.zeros_like(flat.labels, dtype=torch.bool).index_fill(0, flat.rows.long(), True)
    chosen, bias = torch.where(keep, flat.labels, IGNORE_INDEX), flat.bias
    logprobs, entropy = linear_logprobs(flat.hidden, flat.weight, chosen, bias=bias, **options)
    ref_hidden, ref_weight, ref_bias = flat.reference_head
    kl = None
    if ref_hidden is not None and ref_weight is not None:
        heads = (flat.hidden, flat.weight, ref_hidden, ref_weight)
        kl = linear_kl(*heads, bias=bias, ref_bias=ref_bias, mask=keep, **options)
    rest: dict[str, Any] = dict.fromkeys(("values", "old_values", "returns"))
    rest |= dict(zip(POLICY_TENSORS, flat.tensors, strict=True)) | vars(settings)
    loss, sums, extrema = reference.ppo_loss(
        logprobs=logprobs, entropy=entropy, kl=kl, mask=keep, normalizer=normalizer, **rest
    )
    loss = loss.detach() + grad_scale * (loss - loss.detach())
    assert entropy is not None
    return loss, sums.detach(), extrema.detach(), logprobs.detach(), entropy.detach()


# ---- validation ---------------------------------------------------------------------------------


def validate_tokens(
    labels: Tensor,
    mask: Tensor | None,
    tensors: tuple[Tensor | None, ...],
    settings: Settings,
) -> None:
    """The per-token tensors by the rules of `ppo_loss`; `labels` stands for what is made here."""
    old_logprobs, advantages, ref_logprobs, weights = tensors
    exact = settings.kl_estimator == "exact"
    inputs = Inputs(
        logprobs=old_logprobs,
        old_logprobs=old_logprobs,
        advantages=advantages,
        entropy=old_logprobs,
        ref_logprobs=ref_logprobs,
        weights=weights,
        values=None,
        old_values=None,
        returns=None,
        kl=old_logprobs if exact else None,
    )
    validate_inputs(inputs, torch.ones_like(labels, dtype=torch.bool) if mask is None else mask)
    validate_settings(settings, inputs)
    if mask is not None and mask.shape != labels.shape:
        raise ValueError(
            f"{OP}: mask has shape {tuple(mask.shape)}, labels have {tuple(labels.shape)}"
        )


def _validate_reference(
    hidden: Tensor,
    weight: Tensor,
    reference_head: tuple[Tensor | None, Tensor | None, Tensor | None],
    settings: Settings,
) -> None:
    ref_hidden, ref_weight, ref_bias = reference_head
    exact = settings.kl_estimator == "exact"
    whole = ref_hidden is not None and ref_weight is not None
    if exact != whole or (not exact and any(x is not None for x in reference_head)):
        raise ValueError(
            f"{OP}: ref_hidden, ref_weight (and ref_bias) go together with kl_estimator='exact'"
        )
    if ref_hidden is None or ref_weight is None:
        return
    validate_reference(OP, hidden, weight, (ref_hidden, ref_weight, ref_bias))


def _validate_weight_out(weight: Tensor, weight_out: Tensor | None) -> None:
    if weight_out is None:
        return
    if torch.is_grad_enabled() and not weight.requires_grad:
        raise ValueError(f"{OP}: weight_out is given, but weight requires no gradient")
    if (
        weight_out.shape != weight.shape
        or weight_out.dtype != torch.float32
        or weight_out.device != weight.device
        or not weight_out.is_contiguous()
    ):
        raise ValueError(
            f"{OP}: weight_out must be contiguous fp32 {tuple(weight.shape)} on {weight.device}, "
            f"got {weight_out.dtype} {tuple(weight_out.shape)} on {weight_out.device}"
        )


# ---- registration -------------------------------------------------------------------------------


def _selftest(
    device: torch.device, dtype: torch.dtype, generator: torch.Generator
) -> dispatch.SelftestRun:
    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    hidden = draw(9, 32).to(device, dtype)
    weight = (draw(1027, 32) / 4).to(device, dtype)
    labels = torch.randint(0, 1027, (9,), generator=generator).to(device)
    per_token = {
        "old_logprobs": (draw(9) - 7.0).to(device),
        "advantages": draw(9).to(device),
        "ref_logprobs": (draw(9) - 7.0).to(device),
    }
    mask = (torch.arange(9) % 4 != 1).to(device)
    numbers = {"entropy_coef": 0.01, "kl_coef": 0.1, "normalizer": 7.0}
    # The reference has no default of its own: these are the public function's.
    defaults: dict[str, Any] = {"clip_eps_low": 0.2, "clip_eps_high": 0.2, "dual_clip": None}
    defaults |= {"kl_estimator": "k3", "kl_gradient": "k2", "weights": None}
    defaults |= {"value_clip_eps": None, "value_coef": 1.0, "log_ratio_clamp": 20.0}
    defaults |= dict.fromkeys(("values", "old_values", "returns"))

    def run(impl: str) -> tuple[Tensor, ...]:
        leaves = [x.float().clone().requires_grad_() for x in (hidden, weight)]
        shared: dict[str, Any] = {"mask": mask, "compute_dtype": dtype, **per_token, **numbers}
        if impl == "reference":
            loss, sums, _ = reference.linear_ppo_loss(
                leaves[0], leaves[1], labels, **shared, **defaults
            )
            metrics = dict(zip(PPO_SUM_NAMES, sums.unbind(), strict=True))
        else:
            out = linear_ppo_loss(leaves[0], leaves[1], labels, **shared, impl=impl)
            loss, metrics = out.loss, out.metrics
        loss.backward()
        means = (metrics[name] / numbers["normalizer"] for name in ("entropy", "kl"))
        return loss.detach(), *means, *checked_gradients(leaves, dtype)

    return run


register_chunked(OP, "logprobs_from_logits_forward", "logprobs_from_logits_backward", "ppo_loss")
dispatch.register_selftest(OP, _selftest)
