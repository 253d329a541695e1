"""One pass over the tokens by each implementation of `ppo_loss`: loss, metrics and gradients.

`token_gradients` is what other ops call, once per chunk of tokens. Nothing here validates, builds a
graph or waits for a device.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from rlhf_fast_kernels import native, reference
from rlhf_fast_kernels.ppo_arguments import Inputs, Settings
from rlhf_fast_kernels.reference import PPO_SUM_NAMES

# loss [], sums, extrema, and the gradients of logprobs, entropy, values and kl
Raw = tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None]
Needs = tuple[bool, bool, bool, bool]


def token_gradients(
    impl: str,
    inputs: Inputs,
    mask: Tensor,
    normalizer: float | Tensor,
    settings: Settings,
    needs: tuple[bool, bool, bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """The objective of some tokens, its metrics and its gradients, without a graph.

    Args:
        impl: `"reference"`, `"cpu"`, `"cuda"` or `"triton"`.
        inputs: tensors of one shape, that of `mask`; see `ppo_loss`.
        normalizer: a number, or a one-element tensor, which is read on its device.
        needs: whether the gradients of logprobs, entropy and values are wanted.

    Returns:
        loss [], sums [len(PPO_SUM_NAMES)], extrema [2], and the three gradients of the loss, fp32
        in the shape of `mask` (fp64 from the reference for fp64 inputs), None where not wanted.
    """
    return launch(impl, inputs, mask, normalizer, settings, (*needs, False))[:6]


def launch(
    impl: str,
    inputs: Inputs,
    mask: Tensor,
    normalizer: float | Tensor,
    settings: Settings,
    needs: Needs,
) -> Raw:
    """As `token_gradients`, with the gradient of `kl` as a fourth."""
    return _LAUNCHERS[impl](inputs, mask, normalizer, settings, needs)


# ---- reference ----------------------------------------------------------------------------------


def _launch_reference(
    inputs: Inputs, mask: Tensor, normalizer: float | Tensor, settings: Settings, needs: Needs
) -> Raw:
    fields: dict[str, Any] = {
        name: None if x is None else x.detach() for name, x in vars(inputs).items()
    }
    names = ("logprobs", "entropy", "values", "kl")
    compute = reference.output_dtype(inputs.logprobs, inputs.values)
    leaves: dict[str, Tensor] = {}
    for name, need in zip(names, needs, strict=True):
        x = fields[name]
        if need and x is not None:
            fields[name] = leaves[name] = x.to(compute, copy=True).requires_grad_()
    with torch.enable_grad():
        loss, sums, extrema = reference.ppo_loss(
            **fields, mask=mask, normalizer=normalizer, **vars(settings)
        )
    wanted = list(leaves.values())
    found = dict(zip(leaves, torch.autograd.grad(loss, wanted) if wanted else (), strict=True))
    d_logprobs, d_entropy, d_values, d_kl = map(found.get, names)
    return loss.detach(), sums, extrema, d_logprobs, d_entropy, d_values, d_kl


# ---- C++ ----------------------------------------------------------------------------------------


def _launch_cpu(
    inputs: Inputs, mask: Tensor, normalizer: float | Tensor, settings: Settings, needs: Needs
) -> Raw:
    loss = torch.empty((), dtype=torch.float32)
    sums = torch.empty(len(PPO_SUM_NAMES), dtype=torch.float32)
    extrema = torch.empty(2, dtype=torch.float32)
    grads = [torch.empty(mask.shape, dtype=torch.float32) if need else None for need in needs]
    dense = [None if x is None else x.contiguous() for x in vars(inputs).values()]
    mask = mask.contiguous()
    native.core().ppo_loss(
        tuple(None if x is None else (x.data_ptr(), native.DTYPE_CODES[x.dtype]) for x in dense),
        mask.data_ptr(),
        mask.numel(),
        float(normalizer),
        settings.native(),
        tuple(0 if x is None else x.data_ptr() for x in (loss, sums, extrema, *grads)),
        native.thread_count(),
    )
    return loss, sums, extrema, grads[0], grads[1], grads[2], grads[3]


_LAUNCHERS: dict[str, Callable[..., Any]] = {"reference": _launch_reference, "cpu": _launch_cpu}
