"""AReaL's log-probs and entropy on our kernels.

    from rlhf_fast.integrations import areal
    areal.install()                   # or: with areal.patched(): trainer.train()

AReaL 1.0.4: its FSDP, Megatron and Archon engines and its tree attention call these two by name.
What else it computes per token is its own: the losses return statistics per token, which our ops
sum up; the normalisation of advantages sums in fp64; GAE is no function that could be replaced.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

from torch import Tensor

from rlhf_fast.integrations.patching import Patch, Replacement, Report, constant
from rlhf_fast.integrations.peer_ops import vocabulary_group
from rlhf_fast_kernels import logprobs_from_logits


def gather_logprobs(
    logits: Tensor,
    labels: Tensor,
    temperature: float = 1.0,
    tp_group: Any = None,
    chunk_size: int = 1024,
) -> Tensor:
    """log softmax(logits / temperature)[label], fp32 of labels' shape.

    Args:
        logits: `[..., V]`, or this rank's columns of as many as every other's.
        labels: `[...]` ids of the whole vocabulary.
        temperature: positive.
        tp_group: over which the vocabulary is split.
        chunk_size: not needed: nothing of the logits' size is made.
    """
    return logprobs_from_logits(
        logits,
        labels,
        temperature=temperature,
        group=vocabulary_group(tp_group),
        with_entropy=False,
    )[0]


def gather_logprobs_entropy(
    logits: Tensor,
    labels: Tensor,
    temperature: float = 1.0,
    tp_group: Any = None,
    chunk_size: int = 1024,
) -> tuple[Tensor, Tensor]:
    """`gather_logprobs` and the entropy of the same distribution in nats, in one read."""
    logprobs, entropy = logprobs_from_logits(
        logits, labels, temperature=temperature, group=vocabulary_group(tp_group)
    )
    assert entropy is not None
    return logprobs, entropy


# ---- the switch ---------------------------------------------------------------------------------

_VOCAB_PARALLEL = "areal.utils.functional.vocab_parallel"
_PATCH = Patch(
    "areal",
    {
        "1.0.4": (
            Replacement(_VOCAB_PARALLEL, "gather_logprobs", constant(gather_logprobs)),
            Replacement(
                _VOCAB_PARALLEL, "gather_logprobs_entropy", constant(gather_logprobs_entropy)
            ),
        )
    },
)


def install() -> Report:
    """Replace in this process for good. Raises EnvironmentFault, see `Patch.install`."""
    return _PATCH.install()


def patched() -> AbstractContextManager[Report]:
    """Replace inside a `with` block."""
    return _PATCH.scoped()


def uninstall() -> None:
    """Give AReaL its own functions back."""
    _PATCH.remove()
