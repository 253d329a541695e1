"""The PPO objective of a microbatch: value, metrics and all gradients in one pass.

Per token, with A the advantage, R the return and everything but lp, H, v a constant:

    ratio  = exp(clamp(lp - lp_old, -c, c))                        c = log_ratio_clamp
    pg     = max(-A ratio, -A clip(ratio, 1 - eps_low, 1 + eps_high))
    pg     = min(pg, -dual_clip A)             where A < 0         (Ye et al. 2020)
    d      = clamp(lp - lp_ref, -c, c)
    kl     = d | d^2 / 2 | exp(-d) - 1 + d                         (k1 | k2 | k3, Schulman 2020)
             or as given: KL(policy || reference) over the whole vocabulary   (exact)
    vl     = max((v - R)^2, (v_old + clip(v - v_old, -e, e) - R)^2) / 2      e = value_clip_eps

    loss   = sum over mask of (w pg + value_coef vl + kl_coef kl - entropy_coef H) / normalizer

`normalizer` is the number of loss tokens of the whole optimizer step, over all microbatches and
ranks, so that gradients do not depend on how the step was split.

Gradient of the KL term. With samples from the policy, the expected gradient of the *estimate* is
zero for k1, that of KL(policy || reference) for k2 and that of KL(reference || policy) for k3. What
PPO wants is the second, so with `kl_gradient="k2"` the term has the value of `kl_estimator` and the
gradient d * grad lp; `kl_gradient="own"` differentiates the estimate: 1, d or 1 - exp(-d). The
clamp of d is passed straight through: a token that drifted further than c is still pulled back.
The exact KL is an input with a graph of its own: it receives kl_coef / normalizer.

Ties follow torch: `maximum` and `minimum` split the gradient evenly between equal branches and
`clamp` passes it at its bounds, so ratio == 1 + eps_high still learns.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from rlhf_fast_kernels import dispatch, native, reference, triton_support
from rlhf_fast_kernels.first_order import first_order
from rlhf_fast_kernels.ppo_arguments import (
    OP,
    Inputs,
    Settings,
    validate_inputs,
    validate_normalizer,
    validate_settings,
)
from rlhf_fast_kernels.ppo_launchers import Needs, launch, scale, token_gradients
from rlhf_fast_kernels.ppo_metrics import PPOLossOutput, as_output
from rlhf_fast_kernels.reference import PPO_SUM_NAMES
from rlhf_fast_kernels.registry import is_plain

__all__ = ["ppo_loss", "token_gradients"]

FAST_DTYPES = tuple(native.DTYPE_CODES)
_NO_GRADIENTS: Needs = (False, False, False, False)

# ---- eager autograd -----------------------------------------------------------------------------


class _PPOLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logprobs: Tensor | None,
        entropy: Tensor | None,
        values: Tensor | None,
        kl: Tensor | None,
        impl: str,
        inputs: Inputs,
        mask: Tensor,
        normalizer: float | Tensor,
        settings: Settings,
    ) -> tuple[Tensor, Tensor, Tensor]:
        ctx.call = impl, normalizer, settings
        needs = ctx.needs_input_grad[:4]
        loss, sums, extrema, *gradients = launch(impl, inputs, mask, normalizer, settings, needs)
        if impl == "cpu":
            ctx.gradients = gradients
            ctx.save_for_backward(mask, *vars(inputs).values())
        else:
            ctx.save_for_backward(*gradients)
        ctx.dtypes = [None if x is None else x.dtype for x in (logprobs, entropy, values, kl)]
        ctx.mark_non_differentiable(sums, extrema)
        ctx.set_materialize_grads(False)
        return loss, sums, extrema

    @staticmethod
    @first_order(OP)
    def backward(ctx: Any, upstream: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
        if upstream is None:
            return (None,) * 9
        scaled = _scale_on_cpu if ctx.call[0] == "cpu" else _scale_on_device
        return *scaled(ctx, upstream), *(None,) * 5


def _scale_on_device(ctx: Any, upstream: Tensor) -> list[Tensor | None]:
    """A copy, which costs a GPU next to nothing; the host does not look at `upstream`."""
    return scale(ctx.call[0], ctx.saved_tensors, upstream, ctx.dtypes)


def _scale_on_cpu(ctx: Any, upstream: Tensor) -> list[Tensor | None]:
    """The forward's gradients are given away, not copied: autograd may accumulate into them.

    Only a second backward of a retained graph computes them again.
    """
    gradients, ctx.gradients = ctx.gradients, None
    if gradients is None:
        mask, *tensors = ctx.saved_tensors
        impl, normalizer, settings = ctx.call
        call = (impl, Inputs(*tensors), mask, normalizer, settings)
        gradients = launch(*call, ctx.needs_input_grad[:4])[3:]
    if float(upstream) != 1.0:
        gradients = [None if x is None else x.mul_(upstream) for x in gradients]
    pairs = zip(gradients, ctx.dtypes, strict=True)
    return [x if x is None or x.dtype == dtype else x.to(dtype) for x, dtype in pairs]


# ---- torch.library, for torch.compile -----------------------------------------------------------


def _pack(arguments: tuple[Any, ...]) -> tuple[Inputs, Tensor, Tensor, Settings]:
    return Inputs(*arguments[:10]), arguments[10], arguments[11], Settings(*arguments[12:-1])


@torch.library.custom_op("rlhf_fast::ppo_loss", mutates_args=())
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
    kl: Tensor | None,
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
    impl: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    arguments = (
        *(logprobs, old_logprobs, advantages, entropy, ref_logprobs, weights),
        *(values, old_values, returns, kl),
        *(mask, normalizer),
        *(clip_eps_low, clip_eps_high, dual_clip, entropy_coef, kl_coef, kl_estimator, kl_gradient),
        *(value_clip_eps, value_coef, log_ratio_clamp, impl),
    )
    needs = (logprobs is not None, entropy is not None, values is not None, kl is not None)
    loss, sums, extrema, *grads = launch(impl, *_pack(arguments), needs)
    d_logprobs, d_entropy, d_values, d_kl = (loss.new_empty(0) if g is None else g for g in grads)
    return loss, sums, extrema, d_logprobs, d_entropy, d_values, d_kl


@_op.register_fake
def _op_fake(*arguments: Any) -> tuple[Tensor, ...]:
    inputs, mask, _, _ = _pack(arguments)
    loss = torch.empty((), dtype=torch.float32, device=mask.device)
    differentiable = (inputs.logprobs, inputs.entropy, inputs.values, inputs.kl)
    grads = (loss.new_empty(0 if x is None else mask.shape) for x in differentiable)
    return loss, loss.new_empty(len(PPO_SUM_NAMES)), loss.new_empty(2), *grads


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    tensors = _pack(inputs)[0]
    ctx.save_for_backward(*output[3:])
    leaves = (tensors.logprobs, tensors.entropy, tensors.values, tensors.kl)
    ctx.dtypes = [None if x is None else x.dtype for x in leaves]


def _op_backward(ctx: Any, upstream: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    scaled = [
        None if dtype is None else (grad * upstream).to(dtype)
        for grad, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
    ]
    grads: list[Tensor | None] = [None] * len(ctx.needs_input_grad)
    grads[0], grads[3], grads[6], grads[9] = scaled
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
    kl: Tensor | None = None,
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
    the PyTorch reference). Gradients flow to `logprobs`, `entropy`, `values` and `kl` only. The
    policy part (logprobs, old_logprobs, advantages) or the value part (values, returns) may be
    absent.

    Args:
        mask: bool; tokens where it is false change nothing, whatever their slots hold.
        normalizer: loss tokens of the whole optimizer step, a number or a one-element tensor. 0 is
            legal (a step without loss tokens) and gives loss 0.
        clip_eps_low, clip_eps_high: the ratio is clipped to [1 - low, 1 + high].
        dual_clip: bound c > 1 of the loss for negative advantages, -c A; None for none.
        entropy, entropy_coef: per-token entropy in nats and the weight of its bonus.
        ref_logprobs, kl_coef, kl_estimator, kl_gradient: the KL term, see the module docstring.
        kl: the KL term itself, per token, where `kl_estimator` is "exact": the divergence over the
            whole vocabulary, as `linear_kl` gives it; `ref_logprobs` is then absent.
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
    policy = (logprobs, old_logprobs, advantages, entropy, ref_logprobs, weights)
    inputs = Inputs(*policy, values, old_values, returns, kl)
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
    traced = torch.compiler.is_compiling() or not is_plain((mask, *vars(inputs).values()))
    if traced and chosen.impl != "reference":
        count = torch.as_tensor(normalizer, dtype=torch.float64)
        raw = _op(*vars(inputs).values(), mask, count, *vars(settings).values(), chosen.impl)
        raw = (raw[0], *(x.detach() for x in raw[1:3]))
    else:
        raw = chosen.function(inputs, mask, normalizer, settings)
    loss, sums, extrema, *_ = raw
    return as_output(loss, sums, extrema, inputs)


def _run(
    impl: str, inputs: Inputs, mask: Tensor, normalizer: float | Tensor, settings: Settings
) -> tuple[Tensor, Tensor, Tensor]:
    leaves = (inputs.logprobs, inputs.entropy, inputs.values, inputs.kl)
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in leaves):
        return _PPOLoss.apply(*leaves, impl, inputs, mask, normalizer, settings)
    return launch(impl, inputs, mask, normalizer, settings, _NO_GRADIENTS)[:3]


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

    tensors: dict[str, Any] = {name: draw() for name in Inputs.__annotations__ if name != "kl"}
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
dispatch.register(OP, "cpu", partial(_run, "cpu"), native.on_cpu(OP), dtypes=FAST_DTYPES)
dispatch.register(
    OP,
    "cuda",
    partial(_run, "cuda"),
    native.on_cuda(OP, "ppo_loss_scale"),
    dtypes=FAST_DTYPES,
)
triton_support.register(OP, partial(_run, "triton"))
dispatch.register_selftest(OP, _selftest)
