"""AdamW with both moments in 8 bits: 2.03 bytes a parameter instead of 8.

Block-wise as in Dettmers et al. 2022, "8-bit optimizers via block-wise quantization": 256 values
share one fp32 scale, the largest magnitude among them, so an outlier coarsens its own block alone.
The codes are a geometric ladder, level k of K being

    scale * r^(k - K),    r = 10^(decades / (K - 1)),    level 0 is exact 0

    m  K = 127 and a sign, 5 decades: r = 1.096        v  K = 255, 10 decades: r = 1.095

so the error relative to a value is below r - 1 however small the value, down to the lowest level;
v spans twice the decades of m because it holds squares. Values are rounded to one of their two
neighbours at random, with the mean kept: rounding to the nearest would never let a moment move by
less than half a level, and (1 - beta2) of v usually is less. Below the lowest level m is rounded to
0 or to it, again with the mean kept; v is rounded up to it, so that no step is divided by an
unfounded 0. The draws are keyed by seed, parameter and step: a run resumed repeats them.

The update itself reads the moments before they are rounded. Chunks of 2^20 values are decoded at a
time; no fp32 copy of a large tensor's state ever exists. Tensors below 4096 values (norms, biases)
keep fp32 moments.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.optim import Optimizer

from rlhf_fast.seeds import derive_seed

BLOCK = 256
CHUNK = 1 << 20
SMALL = 4096
_DECADES = {True: 5.0, False: 10.0}
_SIGNED_ZERO = 128
# Moment -> its scales, and whether it has a sign.
SCALES = {"exp_avg": ("scale_m", True), "exp_avg_sq": ("scale_v", False)}


@functools.cache
def ladder(signed: bool, device: torch.device) -> Tensor:
    """[K + 1] float32 magnitudes of levels 0 to K, relative to the scale."""
    top = 127 if signed else 255
    exponents = (torch.arange(top + 1, dtype=torch.float64) - top) * (_DECADES[signed] / (top - 1))
    levels = torch.pow(10.0, exponents)
    levels[0] = 0.0
    return levels.to(device, torch.float32)


def encode(values: Tensor, uniform: Tensor, *, signed: bool) -> tuple[Tensor, Tensor]:
    """Codes and scales of values.

    Args:
        values: [n] float32, finite; not negative unless `signed`.
        uniform: [n] float32 in [0, 1), the draws that round.
        signed: of which of the two ladders.

    Returns:
        codes: [n] uint8.
        scales: [ceil(n / 256)] float32.
    """
    n = values.numel()
    blocks = F.pad(values.abs(), (0, -n % BLOCK)).view(-1, BLOCK)
    scales = blocks.amax(dim=1)
    safe = torch.where(scales > 0, scales, 1.0)
    share = (blocks / safe[:, None]).view(-1)[:n]
    levels = ladder(signed, values.device)
    top = levels.numel() - 1
    steps_per_e = (top - 1) / (_DECADES[signed] * math.log(10.0))
    below = (share.log() * steps_per_e + top).floor().clamp(1, top - 1).int()
    low, high = levels.index_select(0, below), levels.index_select(0, below + 1)
    code = below + (uniform * (high - low) < share - low).int()
    lowest = uniform * levels[1] < share if signed else share > 0
    code = torch.where(share < levels[1], lowest.int(), code)
    if signed:
        code = torch.where(values < 0, _SIGNED_ZERO - code, _SIGNED_ZERO + code)
    return code.to(torch.uint8), scales


def decode(codes: Tensor, scales: Tensor, *, signed: bool) -> Tensor:
    """[n] float32 values of codes [n] and the scales of their blocks."""
    n, levels = codes.numel(), ladder(signed, codes.device)
    code = codes.int()
    if signed:
        offset = code - _SIGNED_ZERO
        share = levels.index_select(0, offset.abs()) * offset.sign()
    else:
        share = levels.index_select(0, code)
    return (F.pad(share, (0, -n % BLOCK)).view(-1, BLOCK) * scales[:, None]).view(-1)[:n]


class AdamW8bit(Optimizer):
    """AdamW (Loshchilov & Hutter 2019) whose moments are stored as 8-bit codes.

    State of a parameter: `step`; `exp_avg` and `exp_avg_sq` in its shape, uint8 with `scale_m` and
    `scale_v` [blocks] float32 if it is large and contiguous, else float32.

    Args:
        params: parameters or groups, float32.
        lr, betas, eps, weight_decay: as in `torch.optim.AdamW`.
        seed: of the draws that round.
    """

    def __init__(
        self,
        params: Iterable[Any],
        *,
        lr: float,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float = 0.0,
        seed: int = 0,
    ) -> None:
        settings = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, settings)
        self._seed = seed
        listed = [p for group in self.param_groups for p in group["params"]]
        self._index = {p: index for index, p in enumerate(listed)}

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Apply the gradients; parameters without one keep their state."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._step_one(parameter, group)

    def _step_one(self, parameter: Tensor, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        if not state:
            state.update(fresh_state(parameter))
        state["step"] += 1
        step = int(state["step"])
        assert parameter.grad is not None
        if "scale_m" not in state:
            _update(
                *(parameter, parameter.grad, state["exp_avg"], state["exp_avg_sq"]), group, step
            )
            return
        draws = torch.Generator(parameter.device)
        draws.manual_seed(derive_seed(self._seed, self._index[parameter], step))
        weights, grads = parameter.view(-1), parameter.grad.reshape(-1)
        slots = [
            (state[name].view(-1), state[scale], signed) for name, (scale, signed) in SCALES.items()
        ]
        for part, blocks in _chunks(weights.numel()):
            m, v = (
                decode(codes[part], scales[blocks], signed=signed)
                for codes, scales, signed in slots
            )
            _update(weights[part], grads[part], m, v, group, step)
            for moment, (codes, scales, signed) in zip((m, v), slots, strict=True):
                uniform = torch.rand(moment.shape, generator=draws, device=moment.device)
                codes[part], scales[blocks] = encode(moment, uniform, signed=signed)


def fresh_state(parameter: Tensor) -> dict[str, Tensor]:
    """The state of a parameter before its first step; of a meta tensor, its sizes alone."""
    step = torch.zeros(())
    if parameter.numel() < SMALL or not parameter.is_contiguous():
        moments = {
            name: torch.zeros_like(parameter, dtype=torch.float32)
            for name in ("exp_avg", "exp_avg_sq")
        }
        return {"step": step} | moments
    blocks = -(-parameter.numel() // BLOCK)
    return {
        "step": step,
        "exp_avg": torch.full_like(parameter, _SIGNED_ZERO, dtype=torch.uint8),
        "exp_avg_sq": torch.zeros_like(parameter, dtype=torch.uint8),
        "scale_m": torch.zeros(blocks, device=parameter.device),
        "scale_v": torch.zeros(blocks, device=parameter.device),
    }


def widened(slots: Mapping[str, Any]) -> dict[str, Any]:
    """The state of a parameter with moments of fp32 in host memory, whatever blocks they were in.

    Args:
        slots: live state of `AdamW8bit`; moments that are fp32 already stay what they are.
    """
    found = dict(slots)
    for name, (scale_name, signed) in SCALES.items():
        scales = found.pop(scale_name, None)
        if scales is None:
            continue
        codes = found[name].view(-1)
        values = torch.empty(codes.numel())
        for part, blocks in _chunks(codes.numel()):
            values[part] = decode(codes[part], scales[blocks], signed=signed).cpu()
        found[name] = values.view(found[name].shape)
    return found


def narrowed(parameter: Tensor, slots: Mapping[str, Any]) -> dict[str, Any]:
    """The state that `AdamW8bit` keeps of a parameter, from one with moments of fp32.

    Rounded to the nearest level: of what `widened` made of the same blocks, the same bits. (But for
    values so small that fp32 has fewer digits for them, below 1e-38.)

    Args:
        parameter: whose device the moments go to.
        slots: moments in its shape, which stay in fp32 where it is small.
    """
    fresh = fresh_state(parameter)
    if "scale_m" not in fresh:
        return {**slots, **{name: slots[name].to(parameter.device) for name in SCALES}}
    for name, (scale_name, signed) in SCALES.items():
        values, codes, scales = slots[name].view(-1), fresh[name].view(-1), fresh[scale_name]
        for part, blocks in _chunks(codes.numel()):
            chunk = values[part].to(parameter.device)
            nearest = torch.full_like(chunk, 0.5)
            codes[part], scales[blocks] = encode(chunk, nearest, signed=signed)
    return {**slots, **fresh, "step": slots["step"]}


def _chunks(count: int) -> Iterator[tuple[slice, slice]]:
    """Values and blocks of every chunk of so many values."""
    for start in range(0, count, CHUNK):
        yield slice(start, start + CHUNK), slice(start // BLOCK, (start + CHUNK) // BLOCK)


def _update(
    weights: Tensor, grads: Tensor, m: Tensor, v: Tensor, group: dict[str, Any], step: int
) -> None:
    """One step of AdamW, in place on weights and moments."""
    (beta1, beta2), lr = group["betas"], float(group["lr"])
    m.lerp_(grads, 1.0 - beta1)
    v.mul_(beta2).addcmul_(grads, grads, value=1.0 - beta2)
    spread = v.sqrt().div_(math.sqrt(1.0 - beta2**step)).add_(group["eps"])
    weights.mul_(1.0 - lr * group["weight_decay"])
    weights.addcdiv_(m, spread, value=-lr / (1.0 - beta1**step))
