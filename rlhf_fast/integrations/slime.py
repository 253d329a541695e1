"""slime's GAE, discounted returns, log-probs and entropy on our kernels.

    --custom-megatron-init-path rlhf_fast.integrations.slime.megatron_init

switches it on in every training process; in a program of your own `slime.install()`. slime is not
on PyPI (a package of that name there is another one): what is checked is the version of an
installed checkout, 0.3.1, and the arguments of every function that is replaced, since the checkout
moves between releases.

The losses and KL estimates per token are slime's own: each is a number a token with its gradient,
which no kernel of ours returns, and slime compiles them.
"""

from __future__ import annotations

import importlib.metadata
import inspect
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from rlhf_fast.errors import EnvironmentFault
from rlhf_fast.integrations.patching import Patch, Replacement, Report, constant
from rlhf_fast.integrations.peer_ops import gae_over_all_columns, vocabulary_group
from rlhf_fast_kernels import logprobs_from_logits

# ---- advantages ---------------------------------------------------------------------------------


def vanilla_gae(
    rewards: Tensor, values: Tensor, gamma: float, lambd: float
) -> tuple[Tensor, Tensor]:
    """Advantages and returns `[B, T]` of values' dtype, over every column: slime pads with 0."""
    return gae_over_all_columns(rewards, values, None, gamma, lambd)


def chunked_gae(
    rewards: Tensor, values: Tensor, gamma: float, lambd: float, chunk_size: int = 128
) -> tuple[Tensor, Tensor]:
    """`vanilla_gae`; there is nothing to cut into chunks."""
    return gae_over_all_columns(rewards, values, None, gamma, lambd)


def chunked_discounted_returns(rewards: Tensor, discount: float, chunk_size: int = 128) -> Tensor:
    """Sum over k of discount^k rewards[:, t + k], `[B, T]` of rewards' dtype."""
    return gae_over_all_columns(rewards, torch.zeros_like(rewards), None, discount, 1.0)[0]


# ---- log-probs and entropy ----------------------------------------------------------------------


def _vocabulary_group(tp_group: Any) -> Any:
    """slime's None is the group of all ranks, where there are several."""
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    if tp_group is None and distributed:
        tp_group = torch.distributed.group.WORLD
    return vocabulary_group(tp_group)


def log_probs_and_entropy(
    logits: Tensor, tokens: Tensor, tp_group: Any, with_entropy: bool, with_entropy_grad: bool
) -> tuple[Tensor, Tensor | None]:
    """(log-probs `[N, 1]`, entropy `[N]` or None), fp32, in one read of the logits.

    Args:
        logits: `[N, V]`, or this rank's columns of as many as every other's.
        tokens: `[N]` ids of the whole vocabulary.
        tp_group: over which the vocabulary is split; None: all ranks, where there are several.
        with_entropy: whether to return the entropy.
        with_entropy_grad: whether it has a gradient.
    """
    log_probs, entropy = logprobs_from_logits(
        logits, tokens, group=_vocabulary_group(tp_group), with_entropy=with_entropy
    )
    if entropy is not None and not with_entropy_grad:
        entropy = entropy.detach()
    return log_probs.unsqueeze(-1), entropy


def _log_probs_and_entropy(own: Callable[..., Any]) -> Callable[..., Any]:
    def calculate_log_probs_and_entropy(
        logits: Tensor,
        tokens: Tensor,
        tp_group: Any,
        with_entropy: bool = False,
        chunk_size: int = -1,
        log_prob_keep_mask: Tensor | None = None,
        with_entropy_grad: bool = True,
    ) -> tuple[Tensor, Tensor | None]:
        """`log_probs_and_entropy` on an accelerator, which needs no chunks.

        slime's own function runs with a mask of the entries that were sampled from, for no token,
        and on CPUs, where slime does not train and its tests ask for the very bits of its sums.
        """
        if log_prob_keep_mask is None and logits.device.type != "cpu" and logits.shape[0] > 0:
            return log_probs_and_entropy(logits, tokens, tp_group, with_entropy, with_entropy_grad)
        return own(
            logits,
            tokens,
            tp_group,
            with_entropy=with_entropy,
            chunk_size=chunk_size,
            log_prob_keep_mask=log_prob_keep_mask,
            with_entropy_grad=with_entropy_grad,
        )

    return calculate_log_probs_and_entropy


# ---- the switch ---------------------------------------------------------------------------------


def _checked(build: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """`build` of a replacement that is refused where slime's function takes other arguments."""

    def checked(own: Any) -> Any:
        ours = build(own)
        theirs, known = (list(inspect.signature(f).parameters) for f in (own, ours))
        if theirs != known:
            raise EnvironmentFault(
                "RF7303",
                f"slime's {own.__name__} takes {', '.join(theirs)}",
                expected=f"{', '.join(known)}; nothing of slime was replaced",
                remedy="use slime as it was tagged 0.3.1, or train without the adapter",
            )
        return ours

    return checked


_PPO_UTILS = "slime.utils.ppo_utils"
_PATCH = Patch(
    "slime",
    {
        "0.3.1": (
            Replacement(_PPO_UTILS, "vanilla_gae", _checked(constant(vanilla_gae))),
            Replacement(_PPO_UTILS, "chunked_gae", _checked(constant(chunked_gae))),
            Replacement(
                _PPO_UTILS,
                "chunked_discounted_returns",
                _checked(constant(chunked_discounted_returns)),
            ),
            Replacement(
                _PPO_UTILS, "calculate_log_probs_and_entropy", _checked(_log_probs_and_entropy)
            ),
        )
    },
)


def _require_checkout() -> None:
    try:
        importlib.metadata.version("slime")
    except importlib.metadata.PackageNotFoundError as error:
        raise EnvironmentFault(
            "RF7301",
            "slime is not installed",
            expected="a checkout of slime 0.3.1 that pip knows; the package of that name on PyPI "
            "is another one",
            remedy="pip install --no-deps --editable . in the checkout",
        ) from error


def install() -> Report:
    """Replace in this process for good.

    Raises:
        EnvironmentFault: RF7301 to RF7304; RF7303 also for a function with other arguments.
    """
    _require_checkout()
    return _PATCH.install()


def megatron_init(args: Any) -> None:
    """`install`, for `--custom-megatron-init-path`."""
    install()


def patched() -> AbstractContextManager[Report]:
    """Replace inside a `with` block; raises as `install`."""
    _require_checkout()
    return _PATCH.scoped()


def uninstall() -> None:
    """Give slime its own functions back."""
    _PATCH.remove()
