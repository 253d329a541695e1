"""One forward of the actor's trunk for log-probs and values."""

from __future__ import annotations

from torch import Tensor

from rlhf_fast.errors import ModelError
from rlhf_fast.transfer import sent
from rlhf_fast.types import IGNORE_INDEX, HeadRows, VocabularyHead


def require_trunk_head(actor: VocabularyHead | None) -> None:
    """Refuse an actor whose log-probs do not come from hidden states that a critic could read too.

    Raises:
        ModelError: RF3071.
    """
    if actor is None:
        raise ModelError(
            "RF3071",
            "memory.value_head=actor needs a vocabulary head that is one linear map",
            where="actor",
            expected="an unmodified nn.Linear of a known architecture",
            remedy="take memory.value_head=separate",
        )


def row_logprobs(rows: HeadRows, targets: Tensor, *, temperature: float) -> Tensor:
    """[N] float32 log-probs of `targets` from hidden states, exact 0 where IGNORE_INDEX."""
    device, chosen = rows.hidden.device, None
    if targets.device != device:  # looked through on the host, so the accelerator is not waited for
        chosen = sent((targets != IGNORE_INDEX).nonzero().squeeze(1), device)
    return rows.head.ops.linear_logprobs(
        rows.hidden,
        rows.head.weight,
        sent(targets, device),
        rows=chosen,
        with_entropy=False,
        **rows.head.settings(temperature),
    )[0]
