"""One pass over the tokens by each implementation of `ppo_loss`: loss, metrics and gradients.

`token_gradients` is what other ops call, once per chunk of tokens. Nothing here validates, builds a
graph or waits for a device.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from rlhf_fast_kernels import native, reference, triton_support
from rlhf_fast_kernels.ppo_arguments import OP, PPO_KL_ESTIMATORS, Inputs, Settings
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


# ---- C++ and CUDA C++ ---------------------------------------------------------------------------

# The values of `DeviceNumber::Type` in csrc/cuda/ppo_loss.h.
_NUMBER_TYPES = {torch.float32: 0, torch.float64: 1, torch.int64: 2}


def _launch_cpu(
    inputs: Inputs, mask: Tensor, normalizer: float | Tensor, settings: Settings, needs: Needs
) -> Raw:
    return _call(inputs, mask, float(normalizer), settings, needs, native.thread_count())


def _launch_cuda(
    inputs: Inputs, mask: Tensor, normalizer: float | Tensor, settings: Settings, needs: Needs
) -> Raw:
    count = _number_on(mask.device, normalizer)
    number = (count.data_ptr(), _NUMBER_TYPES[count.dtype]) if isinstance(count, Tensor) else count
    size = native.core().ppo_loss_workspace(mask.numel())
    workspace = torch.empty(size, dtype=torch.float64, device=mask.device)
    placement = (*_stream(mask.device), workspace.data_ptr())
    return _call(inputs, mask, number, settings, needs, placement)


def _call(
    inputs: Inputs,
    mask: Tensor,
    normalizer: float | tuple[int, int],
    settings: Settings,
    needs: Needs,
    placement: int | tuple[int, int, int],
) -> Raw:
    loss, sums, extrema = _results(mask.device)
    grads = _gradients(mask, needs)
    dense = [None if x is None else x.contiguous() for x in vars(inputs).values()]
    mask = mask.contiguous()
    native.core().ppo_loss(
        tuple(None if x is None else (x.data_ptr(), native.DTYPE_CODES[x.dtype]) for x in dense),
        mask.data_ptr(),
        mask.numel(),
        normalizer,
        settings.native(),
        tuple(0 if x is None else x.data_ptr() for x in (loss, sums, extrema, *grads)),
        placement,
    )
    return loss, sums, extrema, grads[0], grads[1], grads[2], grads[3]


def _results(device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    loss = torch.empty((), dtype=torch.float32, device=device)
    return loss, loss.new_empty(len(PPO_SUM_NAMES)), loss.new_empty(2)


def _gradients(mask: Tensor, needs: Needs) -> list[Tensor | None]:
    return [
        torch.empty(mask.shape, dtype=torch.float32, device=mask.device) if need else None
        for need in needs
    ]


def _number_on(device: torch.device, normalizer: float | Tensor) -> float | Tensor:
    """The number if the host has it, otherwise a tensor of a type that kernels read."""
    if not isinstance(normalizer, Tensor):
        return float(normalizer)
    if normalizer.device != device:
        return float(normalizer)
    return normalizer if normalizer.dtype in _NUMBER_TYPES else normalizer.to(torch.float64)


def _stream(device: torch.device) -> tuple[int, int]:
    return device.index or 0, torch.cuda.current_stream(device).cuda_stream


def _scale_cuda(
    gradients: Sequence[Tensor | None], upstream: Tensor, dtypes: Sequence[torch.dtype | None]
) -> list[Tensor | None]:
    scaled = _like(gradients, dtypes)
    present = next(x for x in gradients if x is not None)
    native.core().ppo_loss_scale(
        tuple(0 if x is None else x.data_ptr() for x in gradients),
        tuple(None if x is None else (x.data_ptr(), native.DTYPE_CODES[x.dtype]) for x in scaled),
        present.numel(),
        upstream.data_ptr(),
        *_stream(present.device),
    )
    return scaled


def _like(
    gradients: Sequence[Tensor | None], dtypes: Sequence[torch.dtype | None]
) -> list[Tensor | None]:
    pairs = zip(gradients, dtypes, strict=True)
    return [None if x is None else torch.empty_like(x, dtype=dtype) for x, dtype in pairs]


# ---- Triton -------------------------------------------------------------------------------------


def _launch_triton(
    inputs: Inputs, mask: Tensor, normalizer: float | Tensor, settings: Settings, needs: Needs
) -> Raw:
    kernels, device = triton_support.kernels(OP), mask.device
    loss, sums, extrema = _results(device)
    grads = _gradients(mask, needs)
    dense = {name: None if x is None else x.contiguous() for name, x in vars(inputs).items()}
    if settings.value_clip_eps is None:
        dense["old_values"] = None
    tiles = kernels.tiles_of(mask.numel())
    workspace = torch.empty(tiles * kernels.SLOTS, dtype=torch.float32, device=device)
    count = _number_on(device, normalizer)
    number = (count, 0.0) if isinstance(count, Tensor) else (None, count)
    s = settings
    if tiles > 0:
        triton_support.launch(
            *(kernels.tile_kernel, tiles, device),
            *(*dense.values(), mask.contiguous().view(torch.uint8), *grads, workspace, *number),
            *(mask.numel(), 1.0 - s.clip_eps_low, 1.0 + s.clip_eps_high, s.dual_clip),
            *(float(s.entropy_coef), float(s.kl_coef), float(s.value_clip_eps or 0.0)),
            *(float(s.value_coef), float(s.log_ratio_clamp)),
            ESTIMATOR=1 + PPO_KL_ESTIMATORS.index(s.kl_estimator),
            OWN=s.kl_gradient == "own",
            BLOCK=kernels.TILE,
            num_warps=kernels.TILE_WARPS,
        )
    triton_support.launch(
        *(kernels.finish_kernel, 1, device, workspace, loss, sums, extrema, *number, tiles),
        *(float(s.entropy_coef), float(s.kl_coef), float(s.value_coef)),
        HAS_POLICY=inputs.logprobs is not None,
        HAS_KL=inputs.ref_logprobs is not None or inputs.kl is not None,
        HAS_ENTROPY=inputs.entropy is not None,
        HAS_VALUES=inputs.values is not None,
        BLOCK=kernels.ROWS,
        num_warps=kernels.FINISH_WARPS,
    )
    return loss, sums, extrema, grads[0], grads[1], grads[2], grads[3]


def _scale_triton(
    gradients: Sequence[Tensor | None], upstream: Tensor, dtypes: Sequence[torch.dtype | None]
) -> list[Tensor | None]:
    kernels, scaled = triton_support.kernels(OP), _like(gradients, dtypes)
    present = next(x for x in gradients if x is not None)
    if present.numel() > 0:
        triton_support.launch(
            *(kernels.scale_kernel, kernels.tiles_of(present.numel()), present.device),
            *(upstream, *gradients, *scaled, present.numel()),
            BLOCK=kernels.TILE,
            num_warps=kernels.TILE_WARPS,
        )
    return scaled


# ---- the table ----------------------------------------------------------------------------------


def scale(
    impl: str,
    gradients: Sequence[Tensor | None],
    upstream: Tensor,
    dtypes: Sequence[torch.dtype | None],
) -> list[Tensor | None]:
    """New tensors: the gradients times `upstream` [] fp32, read on its device, in these dtypes."""
    return _SCALES[impl](gradients, upstream, dtypes)


_LAUNCHERS: dict[str, Callable[..., Raw]] = {
    "reference": _launch_reference,
    "cpu": _launch_cpu,
    "cuda": _launch_cuda,
    "triton": _launch_triton,
}
_SCALES: dict[str, Callable[..., list[Tensor | None]]] = {
    "cuda": _scale_cuda,
    "triton": _scale_triton,
}
