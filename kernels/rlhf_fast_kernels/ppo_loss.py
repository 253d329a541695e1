"""The PPO objective of a microbatch: value, metrics and all gradients in one pass.

Per token, with A the advantage, R the return and everything but lp, H, v a constant:

    ratio  = exp(clamp(lp - lp_old, -c, c))                        c = log_ratio_clamp
    pg     = max(-A ratio, -A clip(ratio, 1 - eps_low, 1 + eps_high))
    pg     = min(pg, -dual_clip A)             where A < 0         (Ye et al. 2020)
    d      = clamp(lp - lp_ref, -c, c)
    kl     = d | d^2 / 2 | exp(-d) - 1 + d                         (k1 | k2 | k3, Schulman 2020)
    vl     = max((v - R)^2, (v_old + clip(v - v_old, -e, e) - R)^2) / 2      e = value_clip_eps

    loss   = sum over mask of (w pg + value_coef vl + kl_coef kl - entropy_coef H) / normalizer

`normalizer` is the number of loss tokens of the whole optimizer step, over all microbatches and
ranks, so that gradients do not depend on how the step was split.

Gradient of the KL term. With samples from the policy, the expected gradient of the *estimate* is
zero for k1, that of KL(policy || reference) for k2 and that of KL(reference || policy) for k3. What
PPO wants is the second, so with `kl_gradient="k2"` the term has the value of `kl_estimator` and the
gradient d * grad lp; `kl_gradient="own"` differentiates the estimate: 1, d or 1 - exp(-d). The
clamp of d is passed straight through: a token that drifted further than c is still pulled back.

Ties follow torch: `maximum` and `minimum` split the gradient evenly between equal branches and
`clamp` passes it at its bounds, so ratio == 1 + eps_high still learns.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rlhf_fast_kernels import dispatch, native, reference
from rlhf_fast_kernels.ppo_arguments import (
    OP,
    Inputs,
    Settings,
    validate_inputs,
    validate_normalizer,
    validate_settings,
)
from rlhf_fast_kernels.ppo_metrics import PPOLossOutput, as_output
from rlhf_fast_kernels.reference import PPO_SUM_NAMES

FAST_DTYPES = tuple(native.DTYPE_CODES)

# ---- C++ launcher -------------------------------------------------------------------------------

# loss [], sums, extrema, and the gradients of logprobs, entropy and values
_Raw = tuple[
    Tensor,
    Tensor,
    Tensor,
    Tensor | None,
    Tensor | None,
    Tensor | None,
]


def _forward_cpu(
    inputs: Inputs,
    mask: Tensor,
    normalizer: float,
    settings: Settings,
    needs_grad: tuple[bool, bool, bool],
) -> _Raw:
    """Loss, metrics and the requested gradients (fp32, flat order of the mask, shape of mask)."""
    loss = torch.zeros((), dtype=torch.float32)
    sums = torch.zeros(len(PPO_SUM_NAMES), dtype=torch.float32)
    extrema = torch.full((2,), -torch.inf, dtype=torch.float32)
    grads = [torch.empty(mask.shape, dtype=torch.float32) if need else None for need in needs_grad]
    if mask.numel() > 0:
        mask = mask.contiguous()
        dense = [None if x is None else x.detach().contiguous() for x in vars(inputs).values()]
        native.core().ppo_loss(
            tuple(
                None if x is None else (x.data_ptr(), native.DTYPE_CODES[x.dtype]) for x in dense
            ),
            mask.data_ptr(),
            mask.numel(),
            normalizer,
            settings.native(),
            tuple(0 if x is None else x.data_ptr() for x in (loss, sums, extrema, *grads)),
            native.thread_count(),
        )
    return loss, sums, extrema, grads[0], grads[1], grads[2]


# ---- eager autograd -----------------------------------------------------------------------------


class _PPOLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logprobs: Tensor | None,
        entropy: Tensor | None,
        values: Tensor | None,
        inputs: Inputs,
        mask: Tensor,
        normalizer: float,
        settings: Settings,
    ) -> tuple[Tensor, Tensor, Tensor]:
        loss, sums, extrema, *ctx.gradients = _forward_cpu(
            inputs, mask, normalizer, settings, ctx.needs_input_grad[:3]
        )
        ctx.save_for_backward(mask, *vars(inputs).values())
        ctx.normalizer, ctx.settings = normalizer, settings
        ctx.dtypes = [None if x is None else x.dtype for x in (logprobs, entropy, values)]
        ctx.mark_non_differentiable(sums, extrema)
        ctx.set_materialize_grads(False)
        return loss, sums, extrema

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, upstream: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
        nothing = (None,) * 4
        if upstream is None:
            return None, None, None, *nothing
        # The forward's gradients are given away, not copied: autograd may accumulate into them.
        # Only a second backward of a retained graph computes them again.
        gradients, ctx.gradients = ctx.gradients, None
        if gradients is None:
            mask, *tensors = ctx.saved_tensors
            needs = ctx.needs_input_grad[:3]
            call = (Inputs(*tensors), mask, ctx.normalizer, ctx.settings, needs)
            gradients = _forward_cpu(*call)[3:]
        if float(upstream) != 1.0:
            gradients = [None if x is None else x.mul_(upstream) for x in gradients]
        typed = zip(gradients, ctx.dtypes, strict=True)
        return *(None if x is None else x.to(dtype) for x, dtype in typed), *nothing


# ---- torch.library, for torch.compile -----------------------------------------------------------


def _pack(arguments: tuple[Any, ...]) -> tuple[Inputs, Tensor, Tensor, Settings]:
    return Inputs(*arguments[:9]), arguments[9], arguments[10], Settings(*arguments[11:])


@torch.library.custom_op("rlhf_fast::ppo_loss", mutates_args=(), device_types="cpu")
def _op(
    logprobs: Tensor | None,
    old_logprobs: Tensor | None,
    advantages: Tensor | None,
    entropy: Tensor | None,
    ref_logprobs: Tensor | None,
    weights: Tensor | None,
    values: Tensor | None,
    old_values: Tensor | None,
    returns: Tensor | None,
    mask: Tensor,
    normalizer: Tensor,
    clip_eps_low: float,
    clip_eps_high: float,
    dual_clip: float | None,
    entropy_coef: float,
    kl_coef: float,
    kl_estimator: str,
    kl_gradient: str,
    value_clip_eps: float | None,
    value_coef: float,
    log_ratio_clamp: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    inputs = Inputs(
        logprobs,
        old_logprobs,
        advantages,
        entropy,
        ref_logprobs,
        weights,
        values,
        old_values,
        returns,
    )
    settings = Settings(
        clip_eps_low,
        clip_eps_high,
        dual_clip,
        entropy_coef,
        kl_coef,
        kl_estimator,
        kl_gradient,
        value_clip_eps,
        value_coef,
        log_ratio_clamp,
    )
    wanted = (logprobs is not None, entropy is not None, values is not None)
    loss, sums, extrema, *grads = _forward_cpu(inputs, mask, float(normalizer), settings, wanted)
    d_logprobs, d_entropy, d_values = (loss.new_empty(0) if g is None else g for g in grads)
    return loss, sums, extrema, d_logprobs, d_entropy, d_values


@_op.register_fake
def _op_fake(*arguments: Any) -> tuple[Tensor, ...]:
    inputs, mask, _, _ = _pack(arguments)
    loss = torch.empty((), dtype=torch.float32, device=mask.device)
    differentiable = (inputs.logprobs, inputs.entropy, inputs.values)
    grads = (loss.new_empty(0 if x is None else mask.shape) for x in differentiable)
    return loss, loss.new_empty(len(PPO_SUM_NAMES)), loss.new_empty(2), *grads


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    tensors = _pack(inputs)[0]
    ctx.save_for_backward(*output[3:])
    ctx.dtypes = [
        None if x is None else x.dtype for x in (tensors.logprobs, tensors.entropy, tensors.values)
    ]


def _op_backward(ctx: Any, upstream: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    scaled = [
        None if dtype is None else (grad * upstream).to(dtype)
        for grad, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
    ]
    grads: list[Tensor | None] = [None] * 21
    grads[0], grads[3], grads[6] = scaled
    return tuple(grads)


_op.register_autograd(_op_backward, setup_context=_setup_context)


# ---- the public functions -----------------------------------------------------------------------


def ppo_loss(
    *,
    mask: Tensor,
    normalizer: float | Tensor,
    logprobs: Tensor | None = None,
    old_logprobs: Tensor | None = None,
    advantages: Tensor | None = None,
    clip_eps_low: float = 0.2,
    clip_eps_high: float = 0.2,
    dual_clip: float | None = None,
    entropy: Tensor | None = None,
    entropy_coef: float = 0.0,
    ref_logprobs: Tensor | None = None,
    kl_coef: float = 0.0,
    kl_estimator: str = "k3",
    kl_gradient: str = "k2",
    values: Tensor | None = None,
    old_values: Tensor | None = None,
    returns: Tensor | None = None,
    value_clip_eps: float | None = 0.2,
    value_coef: float = 1.0,
    weights: Tensor | None = None,
    log_ratio_clamp: float = 20.0,
    impl: str | None = None,
) -> PPOLossOutput:
    """Clipped PPO policy loss, clipped value loss, KL and entropy terms, with their metrics.

    All tensors have one shape, padded `[S, R]` or packed `[N]`, fp32 or bf16 (fp16 and fp64 run in
    the PyTorch reference). Gradients flow to `logprobs`, `entropy` and `values` only. The policy
    part (logprobs, old_logprobs, advantages) or the value part (values, returns) may be absent.

    Args:
        mask: bool; tokens where it is false change nothing, whatever their slots hold.
        normalizer: loss tokens of the whole optimizer step, a number or a one-element tensor. 0 is
            legal (a step without loss tokens) and gives loss 0.
        clip_eps_low, clip_eps_high: the ratio is clipped to [1 - low, 1 + high].
        dual_clip: bound c > 1 of the loss for negative advantages, -c A; None for none.
        entropy, entropy_coef: per-token entropy in nats and the weight of its bonus.
        ref_logprobs, kl_coef, kl_estimator, kl_gradient: the KL term, see the module docstring.
        value_clip_eps: values are clipped to old_values +- this; None for the plain squared error.
        weights: per-token importance weights of the policy loss, constants.
        log_ratio_clamp: log ratios are clamped to +- this before any exponential.
        impl: implementation by name, see `rlhf_fast_kernels.dispatch`.

    Returns:
        `PPOLossOutput`. An all-masked microbatch has loss exactly 0 and zero gradients.

    Raises:
        ValueError, TypeError: parts that do not go together, differing shapes, settings out of
            range.
    """
    inputs = Inputs(
        logprobs,
        _constant(old_logprobs),
        _constant(advantages),
        entropy,
        _constant(ref_logprobs),
        _constant(weights),
        values,
        _constant(old_values),
        _constant(returns),
    )
    settings = Settings(
        clip_eps_low,
        clip_eps_high,
        dual_clip,
        entropy_coef,
        kl_coef,
        kl_estimator,
        kl_gradient,
        value_clip_eps,
        value_coef,
        log_ratio_clamp,
    )
    validate_inputs(inputs, mask)
    validate_settings(settings, inputs)
    validate_normalizer(normalizer)
    chosen = dispatch.choose(OP, impl, *inputs.present().values())
    if torch.compiler.is_compiling() and chosen.impl == "cpu":
        count = torch.as_tensor(normalizer, dtype=torch.float64)
        raw = _op(*vars(inputs).values(), mask, count, *vars(settings).values())
    else:
        raw = chosen.function(inputs, mask, normalizer, settings)
    loss, sums, extrema, *_ = raw
    return as_output(loss, sums, extrema, inputs)


def _constant(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.detach()


def _run_cpu(
    inputs: Inputs, mask: Tensor, normalizer: float | Tensor, settings: Settings
) -> tuple[Tensor, Tensor, Tensor]:
    return _PPOLoss.apply(
        inputs.logprobs,
        inputs.entropy,
        inputs.values,
        inputs,
        mask,
        float(normalizer),
        settings,
    )


def _run_reference(
    inputs: Inputs, mask: Tensor, normalizer: float | Tensor, settings: Settings
) -> tuple[Tensor, Tensor, Tensor]:
    return reference.ppo_loss(**vars(inputs), mask=mask, normalizer=normalizer, **vars(settings))


# ---- registration -------------------------------------------------------------------------------


def _selftest(
    device: torch.device, dtype: torch.dtype, generator: torch.Generator
) -> dispatch.SelftestRun:
    def draw() -> Tensor:
        return (0.3 * torch.randn(4, 333, generator=generator)).to(device, dtype)

    tensors: dict[str, Any] = {name: draw() for name in Inputs.__annotations__}
    mask = (torch.rand(4, 333, generator=generator) < 0.8).to(device)

    def run(impl: str) -> tuple[Tensor, ...]:
        leaves: dict[str, Any] = {name: x.clone().requires_grad_() for name, x in tensors.items()}
        out = ppo_loss(
            **leaves,
            mask=mask,
            normalizer=mask.sum(),
            dual_clip=3.0,
            entropy_coef=0.01,
            kl_coef=0.1,
            impl=impl,
        )
        out.loss.backward()
        grads = (leaves[name].grad for name in ("logprobs", "entropy", "values"))
        means = (x / mask.sum() for x in out.metrics.values())
        return out.loss.detach(), *means, *(g for g in grads if g is not None)

    return run


dispatch.register(OP, "reference", _run_reference)
dispatch.register(OP, "cpu", _run_cpu, native.on_cpu(OP), dtypes=FAST_DTYPES)
dispatch.register_selftest(OP, _selftest)
