"""From hidden states to numbers: vocabulary logits, log-probs of targets, scalar heads."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from rlhf_fast.errors import ModelError
from rlhf_fast.models.forward import autocast, packed_hidden, right_pad, runs_packed
from rlhf_fast.types import IGNORE_INDEX, PackedSequences
from rlhf_fast_kernels import logprobs_from_logits

CALIBRATION_KEY = "rlhf_fast_calibration"

# 2^26 fp32 logits are 256 MiB: above that a chunk's logits are recomputed in backward.
MAX_LOGITS_ELEMENTS = 1 << 26


@dataclass(frozen=True)
class Calibration:
    """calibrated score = gain * raw + bias."""

    gain: float = 1.0
    bias: float = 0.0

    def apply(self, raw: Tensor) -> Tensor:
        """The calibrated scores, shape kept; the identity returns `raw` itself."""
        return raw if self == Calibration() else raw * self.gain + self.bias


def set_calibration(module: nn.Module, gain: float, bias: float) -> None:
    """Store a calibration in the module's config, so that it is saved in config.json.

    `RewardModel` and `Critic` apply it wherever they score. Plain transformers ignores the key and
    returns the raw score.
    """
    if not (math.isfinite(gain) and math.isfinite(bias)):
        raise ModelError(
            "RF3003",
            f"calibration is not finite: gain {gain}, bias {bias}",
            remedy="look at the scores it was fitted on; do they vary?",
        )
    setattr(module.config, CALIBRATION_KEY, {"gain": float(gain), "bias": float(bias)})


def get_calibration(module: nn.Module) -> Calibration:
    """The calibration stored in the module's config; the identity if there is none."""
    stored = getattr(module.config, CALIBRATION_KEY, None)
    return Calibration(**stored) if stored else Calibration()


def scalar_head(module: nn.Module) -> nn.Linear:
    """The last linear layer of a sequence classifier with one label."""
    head = getattr(module, "score", None)
    if not isinstance(head, nn.Linear) or head.out_features != 1:
        found = f"{type(module).__name__} with {getattr(module.config, 'num_labels', '?')} labels"
        raise ModelError(
            "RF3004",
            "the model has no scalar head",
            where=found,
            expected="a sequence classifier whose `score` layer maps hidden states to one number",
            remedy="load it with load_sequence_classifier(path, init_head=True)",
        )
    return head


def scalar_outputs(module: nn.Module, hidden: Tensor) -> Tensor:
    """[n] float32 calibrated outputs of the scalar head for hidden rows [n, H].

    The head runs in fp32 even under autocast: bf16 would round a score of 4 to steps of 1/64.
    """
    head = scalar_head(module)
    with torch.autocast(hidden.device.type, enabled=False):
        raw = head(hidden.to(head.weight.dtype)).squeeze(-1).float()
    return get_calibration(module).apply(raw)


def target_logprobs(
    module: nn.Module,
    sequences: PackedSequences,
    targets: Tensor,
    *,
    temperature: float,
    with_entropy: bool,
    vocab_size: int | None = None,
    max_logits_elements: int = MAX_LOGITS_ELEMENTS,
) -> tuple[Tensor, Tensor | None]:
    """Log-probs of `targets` and entropies, [N] float32 each, exact 0 where IGNORE_INDEX.

    Only rows with a target meet the vocabulary, in chunks of at most `max_logits_elements` logits;
    with more than one chunk, each chunk's logits are dropped and recomputed in backward.

    Args:
        module: causal LM.
        sequences: N packed tokens.
        targets: [N] int64.
        temperature: divides the logits.
        with_entropy: also return the entropy of the distribution at each target.
        vocab_size: leave out logits at and beyond this id: padded rows of the embedding that
            belong to no token. None keeps all.
        max_logits_elements: as above.
    """
    model: Any = module
    rows, labels, index = _target_rows(module, sequences, targets)

    def chunk(rows: Tensor, labels: Tensor) -> tuple[Tensor, Tensor | None]:
        logits = _logits(module, rows) if runs_packed(module) else rows
        logits = logits if vocab_size is None else logits[:, :vocab_size]
        logprobs, entropy = logprobs_from_logits(
            logits, labels, temperature=temperature, with_entropy=with_entropy
        )
        return logprobs, entropy if with_entropy else None

    with autocast(module):
        width = model.get_output_embeddings().weight.shape[0]
        size = max(1, max_logits_elements // width)
        if len(labels) <= size or not runs_packed(module):
            parts = [chunk(rows, labels)]
        else:
            parts = [
                _recomputed(chunk, *pair)
                for pair in zip(rows.split(size), labels.split(size), strict=True)
            ]
    shape = targets.numel()
    logprobs = _scatter(torch.cat([p[0] for p in parts]), index, shape)
    if not with_entropy:
        return logprobs, None
    return logprobs, _scatter(torch.cat([p[1] for p in parts if p[1] is not None]), index, shape)


def _target_rows(
    module: nn.Module, sequences: PackedSequences, targets: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """(rows [n, H], labels [n], index [n]): what the head reads, for positions with a target.

    For architectures outside `PACKED_MODEL_TYPES` the rows are logits [n, V] of the model's own
    forward: its head may scale, cap or project in a way only it knows.
    """
    if runs_packed(module):
        source = packed_hidden(module, sequences)
    else:
        ids, mask = right_pad(sequences.to(next(module.parameters()).device))
        with autocast(module):
            output = module(input_ids=ids, attention_mask=mask.long(), use_cache=False)
        source = output.logits[mask]
    targets = targets.to(source.device)
    index = torch.nonzero(targets != IGNORE_INDEX).squeeze(1)
    return source.index_select(0, index), targets.index_select(0, index), index


def _logits(module: nn.Module, rows: Tensor) -> Tensor:
    """[n, V] logits, with the scale that the packed architectures may put behind the head."""
    model: Any = module
    logits: Tensor = model.get_output_embeddings()(rows)
    scaling = getattr(model.config, "logits_scaling", None)
    return logits if scaling is None else logits / scaling


def _recomputed(function: Any, rows: Tensor, labels: Tensor) -> Any:
    if not torch.is_grad_enabled():
        return function(rows, labels)
    return checkpoint(function, rows, labels, use_reentrant=False, preserve_rng_state=False)


def _scatter(values: Tensor, index: Tensor, size: int) -> Tensor:
    out = torch.zeros(size, dtype=torch.float32, device=values.device)
    return out.index_copy(0, index, values)
