"""KL(actor || reference) over the whole vocabulary, from hidden states and heads of both."""

from __future__ import annotations

import torch
from torch import Tensor

from rlhf_fast.errors import ModelError
from rlhf_fast.transfer import sent
from rlhf_fast.types import IGNORE_INDEX, HeadRows, VocabularyHead


def require_exact_kl(actor: VocabularyHead | None, reference: VocabularyHead | None) -> None:
    """Refuse heads that the exact KL cannot be read from.

    Args:
        actor, reference: the heads; only the shape of the weights is looked at. None: more than one
            linear map.

    Raises:
        ModelError: RF3026, a head that is more than one linear map; RF3027, heads that differ in
            vocabulary, softcap or scale; RF3073, a reference whose rows lie on other ranks than the
            actor's. A reference with all rows on each rank goes with any actor.
    """
    for role, head in (("actor", actor), ("reference", reference)):
        if head is None:
            raise ModelError(
                "RF3026",
                "kl.estimator=exact needs a vocabulary head that is one linear map",
                where=role,
                expected="an unmodified nn.Linear of a known architecture",
                remedy="take kl.estimator=k1, k2 or k3, or merge adapters into the weights first",
            )
    assert actor is not None
    assert reference is not None
    ours, theirs = _rule(actor), _rule(reference)
    differing = [name for name in ours if ours[name] != theirs[name]]
    if differing:
        found = ", ".join(f"{name} {ours[name]} and {theirs[name]}" for name in differing)
        raise ModelError(
            "RF3027",
            f"the heads of actor and reference differ: {found}",
            where="actor, reference",
            expected="one vocabulary, softcap and scale for kl.estimator=exact",
            remedy="take a reference of the same base model, or kl.estimator=k1, k2 or k3",
        )

    if reference.shards not in (None, actor.shards):
        raise ModelError(
            "RF3073",
            "the heads of actor and reference are not cut alike over the ranks",
            where="actor, reference",
            expected="the same rows of both on each rank, or all rows of the reference's on each",
            remedy="shard both models over the same ranks, or keep the reference whole",
        )


def _rule(head: VocabularyHead) -> dict[str, object]:
    return {
        "rows": head.rows,
        "tokens": head.rows if head.vocab_size is None else head.vocab_size,
        "softcap": head.softcap,
        "scale": head.scale,
    }


@torch.no_grad()
def read_both(
    actor: HeadRows | None, reference: HeadRows | None, targets: Tensor, *, temperature: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probs of actor and reference and KL(actor || reference), [N] float32 each.

    Args:
        actor, reference: hidden states of the same N tokens, and heads.
        targets: [N] int64; where IGNORE_INDEX all three are exact 0.
        temperature: as in sampling.

    Raises:
        ModelError: as `require_exact_kl`.
    """
    require_exact_kl(*(None if rows is None else rows.head for rows in (actor, reference)))
    assert actor is not None
    assert reference is not None
    # Looked up once for all three, where the targets are: an accelerator has to be waited for.
    device = actor.hidden.device
    chosen = sent((targets != IGNORE_INDEX).nonzero().squeeze(1), device)
    targets = sent(targets, device)
    old, ref = (
        rows.head.ops.linear_logprobs(
            rows.hidden,
            rows.head.weight,
            targets,
            rows=chosen,
            with_entropy=False,
            **rows.head.settings(temperature),
        )[0]
        for rows in (actor, reference)
    )
    kl = actor.head.ops.linear_kl(
        actor.hidden,
        actor.head.weight,
        reference.hidden,
        reference.head.weight,
        ref_bias=reference.head.bias,
        rows=chosen,
        **actor.head.settings(temperature),
    )
    return old, ref, kl
