"""`linear_ppo_loss` under autograd: gradients made in forward are given away in backward."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rlhf_fast_kernels import triton_support
from rlhf_fast_kernels.first_order import first_order
from rlhf_fast_kernels.linear_arguments import (
    Tokens,
    select_tokens,
    validate_label_range,
    vocabulary_of,
)
from rlhf_fast_kernels.linear_chunks import Call
from rlhf_fast_kernels.linear_head import Head
from rlhf_fast_kernels.linear_kl import Side
from rlhf_fast_kernels.linear_ppo_chunks import Problem, Result, run
from rlhf_fast_kernels.ppo_arguments import Inputs, Settings
from rlhf_fast_kernels.reference import PPO_SUM_NAMES

OP = "linear_ppo_loss"

# The per-token tensors that are read beside log-probs and entropy.
POLICY_TENSORS = ("old_logprobs", "advantages", "ref_logprobs", "weights")


def policy_inputs(tokens: Tokens, tensors: list[Tensor | None], dtype: torch.dtype) -> Inputs:
    """What `ppo_loss` reads of the n tokens that count, in the dtype that logits have."""
    picked = {
        name: None if x is None else tokens.pick(x).to(dtype)
        for name, x in zip(POLICY_TENSORS, tensors, strict=True)
    }
    absent = dict.fromkeys(Inputs.__annotations__, None)
    return Inputs(**{**absent, **picked})


def reference_of(compute: torch.dtype, reference_head: list[Tensor | None]) -> Side | None:
    hidden, weight, bias = reference_head
    if hidden is None or weight is None:
        return None
    return Side(hidden.detach(), Head(weight.detach(), bias, compute))


# ---- eager autograd -----------------------------------------------------------------------------


class LinearPPOLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        problem: Problem,
        weight_out: Tensor | None,
        wants_gradient: bool,
    ) -> tuple[Tensor, ...]:
        needs = tuple(need and wants_gradient for need in ctx.needs_input_grad[:3])
        result = run(problem, needs, weight_out)  # type: ignore[arg-type]
        tensors, ctx.problem_of = problem.unpack()
        ctx.save_for_backward(*tensors)  # and not in ctx, which may outlive the backward
        ctx.needs, ctx.weight_out = needs, weight_out
        ctx.dtypes = [None if x is None else x.dtype for x in (hidden, weight, bias)]
        ctx.gradients = result.grads
        constants = (result.sums, result.extrema, *_spread(result, problem))
        ctx.mark_non_differentiable(*constants)
        ctx.set_materialize_grads(False)
        return result.loss, *constants

    @staticmethod
    @first_order(OP)
    def backward(ctx: Any, upstream: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
        if upstream is None:
            return (None,) * 6
        tensors = ctx.saved_tensors  # complains if the optimizer has stepped in between
        # The forward's gradients are given away, not copied: autograd may accumulate into them.
        # Only a second backward of a retained graph computes them again.
        gradients, ctx.gradients = ctx.gradients, None
        if ctx.weight_out is not None:
            _require_direct_use(gradients is not None, upstream)
            assert gradients is not None
            gradients = (gradients[0], None, gradients[2])
        elif gradients is None:
            with torch.autocast(upstream.device.type, enabled=False):
                gradients = run(ctx.problem_of(tensors), ctx.needs).grads
        for gradient in gradients:
            if gradient is not None:
                scale_in_place(gradient, upstream)
        typed = (
            None if g is None else g.to(dtype)
            for g, dtype in zip(gradients, ctx.dtypes, strict=True)
        )
        return *typed, None, None, None


def _spread(result: Result, problem: Problem) -> tuple[Tensor, Tensor]:
    count = problem.hidden.shape[0]
    return tuple(  # type: ignore[return-value]
        problem.tokens.spread(x, count) for x in (result.logprobs, result.entropy)
    )


def _require_direct_use(first: bool, upstream: Tensor) -> None:
    """What was added to weight_out in forward can neither be scaled nor added a second time."""
    if not first:
        raise RuntimeError(f"{OP}: with weight_out, backward can run once")
    if upstream.device.type == "cpu" and float(upstream) != 1.0:
        raise RuntimeError(
            f"{OP}: with weight_out the loss must be used as it is, but its upstream gradient is "
            f"{float(upstream)}; use grad_scale={float(upstream)}"
        )


def scale_in_place(x: Tensor, factor: Tensor) -> None:
    """x *= factor []; where the factor is 1, which an accelerator alone knows, x is not touched."""
    if x.device.type == "cpu":
        if float(factor) != 1.0:
            x.mul_(factor)
    elif triton_support.on_triton(x.device) is None and x.dtype in triton_support.DTYPES:
        triton_support.kernels(OP).scale_unless_one(x, factor)
    else:
        x.mul_(factor)


# ---- torch.library, for torch.compile -----------------------------------------------------------


@torch.library.custom_op(f"rlhf_fast::{OP}", mutates_args=())
def linear_ppo_loss_op(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    keep: Tensor | None,
    rows: Tensor | None,
    temperature: Tensor | None,
    old_logprobs: Tensor,
    advantages: Tensor,
    ref_logprobs: Tensor | None,
    weights: Tensor | None,
    ref_hidden: Tensor | None,
    ref_weight: Tensor | None,
    ref_bias: Tensor | None,
    normalizer: Tensor,
    needs: list[bool],
    impl: str,
    compute: torch.dtype,
    scale: float,
    softcap: float | None,
    vocab_size: int | None,
    chunk_rows: int | None,
    grad_scale: float,
    clip_eps_low: float,
    clip_eps_high: float,
    dual_clip: float | None,
    entropy_coef: float,
    kl_coef: float,
    kl_estimator: str,
    kl_gradient: str,
    log_ratio_clamp: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    settings = Settings(
        clip_eps_low,
        clip_eps_high,
        dual_clip,
        entropy_coef,
        kl_coef,
        kl_estimator,
        kl_gradient,
        None,
        1.0,
        log_ratio_clamp,
    )
    tokens = select_tokens(OP, labels, keep, rows, temperature)
    validate_label_range(OP, tokens.labels, vocabulary_of(weight, vocab_size, None))
    call = Call(impl, compute, scale, softcap, vocab_size, chunk_rows, with_entropy=True)
    head = Head(weight, bias, compute)
    problem = Problem(
        hidden,
        head,
        tokens,
        policy_inputs(tokens, [old_logprobs, advantages, ref_logprobs, weights], head.accumulate),
        normalizer if normalizer.device.type != "cpu" else float(normalizer),
        settings,
        reference_of(compute, [ref_hidden, ref_weight, ref_bias]),
        call,
        grad_scale,
    )
    result = run(problem, (needs[0], needs[1], needs[2]))
    d_hidden, d_weight, d_bias = (weight.new_empty(0) if g is None else g for g in result.grads)
    logprobs, entropy = (x.clone() for x in _spread(result, problem))
    return result.loss, result.sums, result.extrema, logprobs, entropy, d_hidden, d_weight, d_bias


@linear_ppo_loss_op.register_fake
def _op_fake(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, *rest: Any
) -> tuple[Tensor, ...]:
    needs = rest[11]
    kind = torch.float64 if hidden.dtype == torch.float64 else torch.float32

    def make(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=kind, device=hidden.device)

    tokens = labels.shape[0]
    return (
        *(make(), make(len(PPO_SUM_NAMES)), make(2), make(tokens), make(tokens)),
        torch.empty_like(hidden) if needs[0] else weight.new_empty(0),
        make(*weight.shape) if needs[1] else weight.new_empty(0),
        make(weight.shape[0]) if needs[2] else weight.new_empty(0),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*output[5:])
    ctx.needs = inputs[15]
    ctx.dtypes = [x.dtype if isinstance(x, Tensor) else None for x in inputs[:3]]


def _op_backward(ctx: Any, upstream: Tensor, *_: Tensor) -> tuple[Any, ...]:
    grads = (
        (grad * upstream).to(dtype) if need and dtype is not None else None
        for grad, need, dtype in zip(ctx.saved_tensors, ctx.needs, ctx.dtypes, strict=True)
    )
    return *grads, *(None,) * 28


linear_ppo_loss_op.register_autograd(_op_backward, setup_context=_setup_context)
