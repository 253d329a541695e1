"""Problems for the ops on a head that is cut over ranks, and what one process makes of them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from tests.kernels.linear_cases import SETTINGS, draw, generator, head, leaves, per_token

WIDTH, REF_WIDTH = 16, 10
ROWS = ("hidden", "labels", "ref_hidden", "mask", "upstream", *per_token(1, 2))
SLICED = ("weight", "bias", "ref_weight")


@dataclass(frozen=True)
class Case:
    """Rows of the weight by rank, tokens by rank, and how the ops are called.

    Attributes:
        bounds: first row of each rank's slice, and V.
        counts: tokens of each rank.
        options: of all ops.
        hidden, weight: dtypes.
        bias, own_temperatures: whether there are any.
        whole_reference: whether each rank has all rows of the reference's head.
    """

    bounds: tuple[int, ...]
    counts: tuple[int, ...]
    options: dict[str, Any] = field(default_factory=dict)
    hidden: torch.dtype = torch.float32
    weight: torch.dtype = torch.float32
    bias: bool = False
    own_temperatures: bool = False
    whole_reference: bool = False

    @property
    def ranks(self) -> int:
        return len(self.counts)

    def problem(self) -> dict[str, Any]:
        """All tensors, of all tokens and of the whole vocabulary."""
        tokens, vocab = sum(self.counts), self.bounds[-1]
        hidden, weight, labels = head(tokens, WIDTH, vocab)
        ref_hidden, ref_weight, _ = head(tokens, REF_WIDTH, vocab, seed=30)
        mask = torch.arange(tokens) % 4 != 1
        temperature = 0.5 + torch.rand(tokens, generator=generator(7))
        return {
            "hidden": hidden.to(self.hidden),
            "weight": weight.to(self.weight),
            "bias": draw(vocab, seed=5).to(self.weight) if self.bias else None,
            "labels": labels % self.options.get("vocab_size", vocab),
            "ref_hidden": ref_hidden.to(self.hidden),
            "ref_weight": ref_weight.to(self.weight),
            "mask": mask,
            "temperature": temperature if self.own_temperatures else 0.7,
            "upstream": draw(tokens, 2, seed=9),
            **per_token(tokens, vocab),
        }

    def part(self, rank: int) -> dict[str, Any]:
        """What a rank has of them; NaN in whatever belongs to tokens that do not count."""
        found = self.problem()
        start = sum(self.counts[:rank])
        rows = slice(start, start + self.counts[rank])
        cut = slice(self.bounds[rank], self.bounds[rank + 1])
        names = (*ROWS, "temperature") if self.own_temperatures else ROWS
        for name in names:
            found[name] = found[name][rows]
        for name in names:
            if found[name].is_floating_point() and name not in ("upstream", "temperature"):
                found[name] = found[name].clone()
                found[name][~found["mask"]] = torch.nan
        for name in SLICED:
            whole = found[name] is None or (name == "ref_weight" and self.whole_reference)
            found[name] = found[name] if whole else found[name][cut]
        return found


def wide(problem: dict[str, Any]) -> dict[str, Any]:
    """In fp64."""
    return {
        name: x.double() if isinstance(x, Tensor) and x.is_floating_point() else x
        for name, x in problem.items()
    }


def run(ops: Any, problem: dict[str, Any], options: dict[str, Any]) -> dict[str, Tensor]:
    """Outputs and gradients of the three ops, by `<op>.<name>`."""
    mask, found = problem["mask"], {}
    labels = torch.where(mask, problem["labels"], -100)
    shared = {"temperature": problem["temperature"], **options}
    ref = {"ref_hidden": problem["ref_hidden"], "ref_weight": problem["ref_weight"]}
    per = {name: problem[name] for name in ("old_logprobs", "advantages", "weights")}

    def keep(op: str, own: list[Any], **outputs: Any) -> None:
        for name, x in zip(("d_hidden", "d_weight", "d_bias"), own, strict=True):
            outputs[name] = None if x is None else x.grad
        found.update({f"{op}.{n}": x.detach() for n, x in outputs.items() if x is not None})

    def fresh() -> list[Any]:
        return leaves(problem["hidden"], problem["weight"], problem["bias"])

    for with_entropy in (True, False):
        own = fresh()
        logprobs, entropy = ops.linear_logprobs(
            own[0], own[1], labels, bias=own[2], with_entropy=with_entropy, **shared
        )
        g, h = problem["upstream"].unbind(1)
        score = g * logprobs if entropy is None else g * logprobs + h * entropy
        score.sum().backward()
        keep(f"logprobs{with_entropy}", own, logprobs=logprobs, entropy=entropy)

    estimates = {
        "k3": {"ref_logprobs": problem["ref_logprobs"]},
        "exact": {**ref, "entropy_coef": 0.0},
        "bonus": {**ref, "kl_estimator": "exact"},
    }
    for name, more in estimates.items():
        own = fresh()
        out = ops.linear_ppo_loss(
            *(own[0], own[1], labels),
            **{**SETTINGS, "kl_estimator": "k3" if name == "k3" else "exact", **more},
            **{"mask": mask, "bias": own[2], "normalizer": 11.0, **per, **shared},
        )
        (0.5 * out.loss).backward()
        sums = {f"sum_{n}": x for n, x in out.metrics.items()}
        keep(name, own, sum_loss=out.loss, logprobs=out.logprobs, entropy=out.entropy, **sums)
        found[f"{name}.max"] = torch.stack(list(out.extrema.values()))

    own = fresh()
    kl = ops.linear_kl(*(own[0], own[1], *ref.values()), **{"bias": own[2], "mask": mask, **shared})
    (problem["upstream"][:, 0] * kl).sum().backward()
    keep("kl", own, kl=kl)
    return found
