"""Other projects' functions, imported when asked for and brought to one signature an op.

    found, absent = peers.find("logprobs", device)
    for peer in found: contenders[peer.name] = peer.function
    session.report.absent |= absent

What is not installed, or cannot run on the device, is absent with a reason and never an error.
Signatures; T tokens, V vocabulary, H hidden, B rows, R columns:

    logprobs          (logits [T, V], labels [T]) -> logprobs [T], entropy [T] or None
    linear_logprobs   (hidden [T, H], weight [V, H], labels [T]) -> logprobs [T], entropy or None
    linear_ce         (hidden [T, H], weight [V, H], labels [T]) -> mean negative log-prob
    linear_ppo_loss   (hidden [B, R, H], weight [V, H], labels, old_logprobs, mask [B, R],
                      advantages [B]) -> clipped policy loss, mean over the tokens of the mask
    logits_ppo_loss   the same from logits [B, R + 1, V], whose last column is not read
    gae               (rewards, values, mask [B, R], gamma, gae_lambda) -> whitened advantages,
                      returns
    policy_loss       (logprobs, old_logprobs, advantages, mask [B, R]) -> mean clipped policy loss
    value_loss        (values, old_values, returns, mask [B, R]) -> half the mean clipped error
    whiten            (x, mask [B, R]) -> whitened x

Clip ranges are 0.2, temperature 1, no KL term. How a peer differs from its neighbours (no entropy,
logits overwritten in backward, gradient filtered) is in its name. TRL's step loop of GAE is code of
its trainer, not a function; the eager loop of bench_gae has its form.

Written against Liger 0.8.5, verl 0.9.1, TRL 1.12 (the last with PPO of those tried) and 1.16,
cut-cross-entropy of June 2025, flash-attn 2 and PyTorch 2.13.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

CLIP = 0.2

Load = Callable[[], Callable[..., Any]]


@dataclass(frozen=True)
class Peer:
    """A function of the op's signature, ready to be called."""

    name: str
    op: str
    function: Callable[..., Any]


@dataclass(frozen=True)
class _Entry:
    name: str
    op: str
    load: Load
    cuda: bool


_entries: list[_Entry] = []


def find(op: str, device: torch.device | str) -> tuple[list[Peer], dict[str, str]]:
    """The peers of an op that can run on this device, and the others with the reason."""
    found, absent = [], {}
    for entry in _entries:
        if entry.op != op:
            continue
        if entry.cuda and torch.device(device).type != "cuda":
            absent[entry.name] = "runs on CUDA devices only"
            continue
        try:
            found.append(Peer(entry.name, op, entry.load()))
        except Exception as problem:  # whatever a foreign import raises leaves one peer out
            absent[entry.name] = f"{type(problem).__name__}: {problem}".split("\n")[0]
    return found, absent


def usable(
    op: str, device: torch.device | str, trial: Callable[[Callable[..., Any]], Any]
) -> tuple[dict[str, Callable[..., Any]], dict[str, str]]:
    """`find`, by name, without those whose trial run raises: a shape or dtype they do not take."""
    found, absent = find(op, device)
    functions = {}
    for peer in found:
        try:
            trial(peer.function)
        except Exception as problem:  # as varied as the peers
            absent[peer.name] = f"{type(problem).__name__}: {problem}".split("\n")[0]
        else:
            functions[peer.name] = peer.function
    return functions, absent


def names(op: str | None = None) -> list[str]:
    """The names of all peers, or of an op's."""
    return [entry.name for entry in _entries if op in (None, entry.op)]


def ops() -> list[str]:
    """The ops that have peers here."""
    return list(dict.fromkeys(entry.op for entry in _entries))


def _peer(name: str, op: str, *, cuda: bool = False) -> Callable[[Load], Load]:
    def add(load: Load) -> Load:
        _entries.append(_Entry(name, op, load, cuda))
        return load

    return add


def _get(module: str, *attributes: str) -> Any:
    """One attribute of a module, or a tuple; ImportError where the release lacks it."""
    found = importlib.import_module(module)
    absent = [name for name in attributes if not hasattr(found, name)]
    if absent:
        raise ImportError(f"this release of {module} has no {', '.join(absent)}")
    values = tuple(getattr(found, name) for name in attributes)
    return values[0] if len(values) == 1 else values


# ---- log-prob and entropy from logits ------------------------------------------------------------


@_peer("TRL", "logprobs")
def _trl_logprobs() -> Callable[..., Any]:
    log_softmax, entropy = _get("trl.trainer.utils", "selective_log_softmax", "entropy_from_logits")
    return lambda logits, labels: (log_softmax(logits, labels), entropy(logits))


@_peer("TRL, no entropy", "logprobs")
def _trl_logprobs_alone() -> Callable[..., Any]:
    log_softmax = _get("trl.trainer.utils", "selective_log_softmax")
    return lambda logits, labels: (log_softmax(logits, labels), None)


def _verl_logprobs(entropy_name: str | None) -> Callable[..., Any]:
    module = "verl.utils.torch_functional"
    logprobs = _get(module, "logprobs_from_logits")
    if entropy_name is None:
        return lambda logits, labels: (logprobs(logits, labels, inplace_backward=False), None)
    entropy = _get(module, entropy_name)
    return lambda logits, labels: (
        logprobs(logits, labels, inplace_backward=False),
        entropy(logits),
    )


@_peer("verl", "logprobs")
def _verl_logprobs_and_entropy() -> Callable[..., Any]:
    return _verl_logprobs("entropy_from_logits")


@_peer("verl, entropy by chunks", "logprobs")
def _verl_logprobs_and_entropy_by_chunks() -> Callable[..., Any]:
    return _verl_logprobs("entropy_from_logits_with_chunking")


@_peer("verl, no entropy", "logprobs")
def _verl_logprobs_alone() -> Callable[..., Any]:
    return _verl_logprobs(None)


def _flash_attn(inplace: bool) -> Callable[..., Any]:
    loss = _get("flash_attn.ops.triton.cross_entropy", "cross_entropy_loss")
    return lambda logits, labels: (-loss(logits, labels, inplace_backward=inplace)[0], None)


@_peer("flash-attn, no entropy", "logprobs", cuda=True)
def _flash_attn_new() -> Callable[..., Any]:
    return _flash_attn(inplace=False)


@_peer("flash-attn, no entropy, in place", "logprobs", cuda=True)
def _flash_attn_in_place() -> Callable[..., Any]:
    return _flash_attn(inplace=True)


@_peer("Liger cross entropy, no entropy, in place", "logprobs", cuda=True)
def _liger_logprobs() -> Callable[..., Any]:
    loss = _get("liger_kernel.transformers.functional", "liger_cross_entropy")

    def run(logits: Tensor, labels: Tensor) -> tuple[Tensor, None]:
        return -loss(logits, labels, reduction="none"), None

    return run


# ---- log-prob and entropy from hidden states -----------------------------------------------------


def _liger_scaled(with_entropy: bool) -> Callable[..., Any]:
    scaled = _get("liger_kernel.ops", "LigerFusedLinearScaledCrossEntropyFunction")

    def run(hidden: Tensor, weight: Tensor, labels: Tensor) -> tuple[Tensor, Tensor | None]:
        found = scaled.apply(hidden, weight, labels, 1.0, -100, 1, with_entropy)
        return (-found[0], found[1]) if with_entropy else (-found, None)

    return run


@_peer("Liger scaled CE", "linear_logprobs")
def _liger_scaled_and_entropy() -> Callable[..., Any]:
    return _liger_scaled(with_entropy=True)


@_peer("Liger scaled CE, no entropy", "linear_logprobs")
def _liger_scaled_alone() -> Callable[..., Any]:
    return _liger_scaled(with_entropy=False)


@_peer("verl torch", "linear_logprobs")
def _verl_fused_linear() -> Callable[..., Any]:
    fused = _get("verl.utils.experimental.torch_functional", "FusedLinearForPPO")()

    def run(hidden: Tensor, weight: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        logprobs, entropy = fused(hidden, weight, labels, temperature=1.0)
        return logprobs, entropy

    return run


@_peer("verl Triton", "linear_logprobs", cuda=True)
def _verl_triton() -> Callable[..., Any]:
    linear = _get("verl.utils.kernel.linear_cross_entropy", "linear_cross_entropy")

    def run(hidden: Tensor, weight: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        logprobs, entropy = linear(hidden, weight, labels, 1.0, "none")
        return logprobs, entropy

    return run


def _cut_cross_entropy(impl: str) -> Callable[..., Any]:
    linear = _get("cut_cross_entropy", "linear_cross_entropy")
    if impl != "cce" and impl not in _get("cut_cross_entropy.cce_utils", "CCEPresets").names:
        raise ImportError(f"this release of cut_cross_entropy has no {impl}")

    def run(hidden: Tensor, weight: Tensor, labels: Tensor) -> tuple[Tensor, None]:
        return -linear(hidden, weight, labels, reduction="none", impl=impl), None

    return run


@_peer("CCE, gradient filtered, no entropy", "linear_logprobs", cuda=True)
def _cce() -> Callable[..., Any]:
    return _cut_cross_entropy("cce")


@_peer("CCE exact, no entropy", "linear_logprobs", cuda=True)
def _cce_exact() -> Callable[..., Any]:
    return _cut_cross_entropy("cce_exact")


# ---- mean cross entropy from hidden states -------------------------------------------------------


@_peer("Liger FLCE", "linear_ce", cuda=True)
def _liger_flce() -> Callable[..., Any]:
    return _get("liger_kernel.transformers.functional", "liger_fused_linear_cross_entropy")


def _torch_linear(**settings: Any) -> Callable[..., Any]:
    linear = _get("torch.nn.functional", "linear_cross_entropy")
    options = _get("torch.nn", "LinearCrossEntropyOptions")(**settings)
    return lambda hidden, weight, labels: linear(hidden, weight, labels, options=options)


@_peer("PyTorch linear_cross_entropy", "linear_ce")
def _torch_linear_auto() -> Callable[..., Any]:
    return _torch_linear()


@_peer("PyTorch linear_cross_entropy, accurate", "linear_ce")
def _torch_linear_accurate() -> Callable[..., Any]:
    return _torch_linear(acc_policy="accurate")


@_peer("PyTorch linear_cross_entropy, not chunked", "linear_ce")
def _torch_linear_reference() -> Callable[..., Any]:
    linear = _get("torch.nn.functional", "linear_cross_entropy")
    return lambda hidden, weight, labels: linear(hidden, weight, labels)


# ---- PPO loss from hidden states or logits -------------------------------------------------------


def with_policy_loss(linear_logprobs: Callable[..., Any]) -> Callable[..., Any]:
    """A `linear_logprobs` peer followed by the eager policy loss: the op `linear_ppo_loss`."""

    def run(
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        old_logprobs: Tensor,
        mask: Tensor,
        advantages: Tensor,
    ) -> Tensor:
        flat = hidden.reshape(-1, hidden.shape[-1])
        logprobs = linear_logprobs(flat, weight, labels.reshape(-1))[0].view_as(old_logprobs)
        ratio = (logprobs.float() - old_logprobs).clamp(-20.0, 20.0).exp()
        weight_of = -advantages.unsqueeze(-1)
        token = torch.maximum(weight_of * ratio, weight_of * ratio.clamp(1 - CLIP, 1 + CLIP))
        return torch.where(mask, token, 0.0).sum() / mask.sum()

    return run


def _liger_grpo(compiled: bool) -> Callable[..., Any]:
    fused = _get("liger_kernel.chunked_loss", "LigerFusedLinearGRPOLoss")
    loss = fused(
        beta=0.0, compiled=compiled, use_ref_model=False, epsilon_low=CLIP, epsilon_high=CLIP
    )

    def run(
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        old_logprobs: Tensor,
        mask: Tensor,
        advantages: Tensor,
    ) -> Tensor:
        found = loss(
            hidden, weight, labels, mask.long(), advantages, old_per_token_logps=old_logprobs
        )
        return found[0]

    return run


@_peer("Liger chunked GRPO loss", "linear_ppo_loss")
def _liger_chunked() -> Callable[..., Any]:
    return _liger_grpo(compiled=True)


@_peer("Liger chunked GRPO loss, not compiled", "linear_ppo_loss")
def _liger_chunked_eager() -> Callable[..., Any]:
    return _liger_grpo(compiled=False)


@_peer("Liger Triton GRPO loss, in place", "logits_ppo_loss", cuda=True)
def _liger_triton_grpo() -> Callable[..., Any]:
    loss = _get("liger_kernel.transformers.grpo_loss", "triton_grpo_loss")

    def run(
        logits: Tensor, labels: Tensor, old_logprobs: Tensor, mask: Tensor, advantages: Tensor
    ) -> Tensor:
        return loss(
            logits,
            old_logprobs,
            None,
            labels,
            advantages,
            completion_mask=mask.long(),
            temperature=1.0,
            beta=0.0,
            eps_low=CLIP,
            eps_high=CLIP,
            loss_type="dapo",
            reduce=True,
        )[0]

    return run


# ---- ops over tokens -----------------------------------------------------------------------------


@_peer("verl", "gae")
def _verl_gae() -> Callable[..., Any]:
    advantages_and_returns = _get("verl.trainer.ppo.core_algos", "compute_gae_advantage_return")

    def run(
        rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, gae_lambda: float
    ) -> tuple[Tensor, Tensor]:
        advantages, returns = advantages_and_returns(
            rewards, values, mask.to(rewards.dtype), gamma, gae_lambda
        )
        return advantages, returns

    return run


@_peer("verl, dual clip at 3", "policy_loss")
def _verl_policy_loss() -> Callable[..., Any]:
    loss = _get("verl.trainer.ppo.core_algos", "compute_policy_loss")

    def run(logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor) -> Tensor:
        float_mask = mask.to(logprobs.dtype)
        return loss(old_logprobs, logprobs, advantages, float_mask, cliprange=CLIP)[0]

    return run


@_peer("verl", "value_loss")
def _verl_value_loss() -> Callable[..., Any]:
    loss = _get("verl.trainer.ppo.core_algos", "compute_value_loss")

    def run(values: Tensor, old_values: Tensor, returns: Tensor, mask: Tensor) -> Tensor:
        return loss(values, returns, old_values, mask.to(values.dtype), cliprange_value=CLIP)[0]

    return run


@_peer("verl", "whiten")
def _verl_whiten() -> Callable[..., Any]:
    whiten = _get("verl.utils.torch_functional", "masked_whiten")
    return lambda x, mask: whiten(x, mask.to(x.dtype))


@_peer("TRL", "whiten")
def _trl_whiten() -> Callable[..., Any]:
    return _get("trl.experimental.ppo.ppo_trainer", "masked_whiten")
