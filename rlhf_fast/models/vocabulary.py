"""From hidden states to log-probs of tokens, without the logits of all of them at once.

Three kinds of heads, in order of preference:

- one linear map, whose weight the fused ops read themselves (`vocabulary_head`);
- a module that does more than that (LoRA, quantised weights, hooks) between a trunk and a rule for
  scale and softcap that are known: the module runs on a few rows at a time;
- architectures outside `HEAD_MODEL_TYPES`: what lies behind the trunk is known to their own forward
  alone, which makes the logits of a microbatch as it always does.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from rlhf_fast.distributed.vocabulary_shards import full_rows, is_read_by_rows
from rlhf_fast.models.forward import (
    PACKED_MODEL_TYPES,
    autocast,
    compute_dtype,
    device_of,
    packed_hidden,
    right_pad,
)
from rlhf_fast.transfer import sent
from rlhf_fast.types import IGNORE_INDEX, PackedSequences, VocabularyHead
from rlhf_fast_kernels import linear_logprobs, logprobs_from_logits

# Logits are output embedding of the trunk's last hidden states, but for scale and softcap: a test
# holds each of them against the stock logits.
HEAD_MODEL_TYPES = PACKED_MODEL_TYPES | {
    "cohere",
    "cohere2",
    "gemma2",
    "gemma3_text",
    "olmo",
    "opt",
    "stablelm",
}

# Rows that a head's own module is given at once.
MODULE_ROWS = 512

# What the ops multiply; fp8 is not among them.
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def has_known_head(module: nn.Module) -> bool:
    """Whether logits are made of the trunk's hidden states in a way that is known here."""
    config: Any = module.config
    return config.model_type in HEAD_MODEL_TYPES


def vocabulary_head(
    module: nn.Module, *, vocab_size: int | None = None, chunk_rows: int | None = None
) -> VocabularyHead | None:
    """The head of a causal LM as numbers, or None if it is more than one linear map.

    Args:
        module: causal LM.
        vocab_size: ids that exist; None: every row of the weight.
        chunk_rows: rows whose logits the ops may make at once; None: what suits the device.
    """
    if not has_known_head(module):
        return None
    model: Any = module
    head = model.get_output_embeddings()
    if not _is_plain_linear(head):
        return None
    return VocabularyHead(
        weight=full_rows(head.weight),
        bias=head.bias,
        softcap=_softcap(module),
        scale=_scale(module),
        vocab_size=vocab_size,
        compute_dtype=torch.bfloat16 if compute_dtype(module) == "bfloat16" else None,
        chunk_rows=chunk_rows,
    )


def target_logprobs(
    module: nn.Module,
    sequences: PackedSequences,
    targets: Tensor,
    *,
    temperature: float,
    with_entropy: bool,
    vocab_size: int | None = None,
    chunk_rows: int | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Log-probs of `targets` and entropies, [N] float32 each, exact 0 where IGNORE_INDEX.

    Only rows with a target meet the vocabulary, a chunk of them at a time; backward makes each
    chunk's logits again.

    Args:
        module: causal LM.
        sequences: N packed tokens.
        targets: [N] int64.
        temperature: divides the logits.
        with_entropy: also return the entropy of the distribution at each target.
        vocab_size: leave out logits at and beyond this id: padded rows of the embedding that
            belong to no token. None keeps all.
        chunk_rows: rows whose logits exist at once; None: what suits the device.
    """
    device = device_of(module)
    # Targets on the host are looked through there: an accelerator that looks has to be waited for.
    chosen = _rows_with_target(targets) if targets.device != device else None
    chosen = None if chosen is None else sent(chosen, device)
    targets = sent(targets, device)
    head = vocabulary_head(module, vocab_size=vocab_size, chunk_rows=chunk_rows)
    if head is not None:
        return linear_logprobs(
            packed_hidden(module, sequences),
            head.weight,
            targets,
            rows=chosen,
            with_entropy=with_entropy,
            **head.settings(temperature),
        )
    settings = {
        "temperature": temperature * _scale(module),
        "softcap": _softcap(module),
        "vocab_size": vocab_size,
        "with_entropy": with_entropy,
    }
    return _module_logprobs(
        *(module, sequences, targets),
        _rows_with_target(targets) if chosen is None else chosen,
        chunk_rows or MODULE_ROWS,
        settings,
    )


def _rows_with_target(targets: Tensor) -> Tensor:
    return torch.nonzero(targets != IGNORE_INDEX).squeeze(1)


def _module_logprobs(
    module: nn.Module,
    sequences: PackedSequences,
    targets: Tensor,
    index: Tensor,
    chunk_rows: int,
    settings: dict[str, Any],
) -> tuple[Tensor, Tensor | None]:
    """As `target_logprobs`, where logits are what a module says they are; `index`: the targets."""
    labels = targets.index_select(0, index)
    model: Any = module
    head = model.get_output_embeddings()

    def read(rows: Tensor, labels: Tensor) -> Any:
        return logprobs_from_logits(head(rows), labels, **settings)

    with autocast(module):
        if has_known_head(module):
            rows = packed_hidden(module, sequences).index_select(0, index)
            parts = _in_chunks(read, rows, labels, chunk_rows)
        else:
            logits = stock_logits(module, sequences).index_select(0, index)
            parts = [logprobs_from_logits(logits, labels, **settings)]
    logprobs, entropy = zip(*parts, strict=True)
    return (
        _scatter(torch.cat(logprobs), index, targets),
        _scatter(torch.cat(entropy), index, targets) if settings["with_entropy"] else None,
    )


def stock_logits(module: nn.Module, sequences: PackedSequences) -> Tensor:
    """[N, V] logits of the model's own forward over right-padded sequences."""
    ids, mask = right_pad(sequences.to(device_of(module)))
    with autocast(module):
        output = module(input_ids=ids, attention_mask=mask.long(), use_cache=False)
    logits: Tensor = output.logits[mask]
    return logits


def likeliest_tokens(module: nn.Module, sequences: PackedSequences, rows: Tensor) -> Tensor:
    """[M] int64 argmax of the next-token distribution at packed positions `rows` [M].

    Neither scale nor softcap moves the argmax, so a known head is its output embedding, which is
    given a few rows at a time.
    """
    rows = rows.to(device_of(module))
    if not has_known_head(module):
        return stock_logits(module, sequences).index_select(0, rows).argmax(-1)
    hidden = packed_hidden(module, sequences).index_select(0, rows)
    model: Any = module
    head = model.get_output_embeddings()
    read: Callable[[Tensor], Tensor] = head
    if is_read_by_rows(head):  # gathered once: ranks have other numbers of chunks
        read = partial(functional.linear, weight=full_rows(head.weight), bias=head.bias)
    with autocast(module):
        return torch.cat([read(chunk).argmax(-1) for chunk in hidden.split(MODULE_ROWS)])


def _is_plain_linear(head: Any) -> bool:
    """Whether calling `head` is its weight and bias and nothing else.

    Subclasses (LoRA, parametrisations, quantised layers), hooks, a replaced forward and weights
    that are no ordinary tensors (quantised, sharded by others) do something that reading the weight
    misses. Rows that `shard_module` made are the weight, cut.
    """
    rows = is_read_by_rows(head)
    return (
        type(head) is nn.Linear
        and not any(getattr(head, name) for name in _HOOKS)
        and ("forward" not in vars(head) or rows)
        and (type(head.weight) is nn.Parameter or rows)
        and head.weight.dtype in _DTYPES
    )


def _scale(module: nn.Module) -> float:
    """What the architecture divides its logits by."""
    config: Any = module.config
    if config.model_type == "granite":
        return float(config.logits_scaling)
    if config.model_type in ("cohere", "cohere2"):
        return 1.0 / float(config.logit_scale)
    return 1.0


def _softcap(module: nn.Module) -> float | None:
    config: Any = module.config
    if config.model_type not in ("gemma2", "gemma3_text"):
        return None
    cap = config.final_logit_softcapping
    return None if cap is None else float(cap)


def _in_chunks(
    function: Callable[[Tensor, Tensor], Any], rows: Tensor, labels: Tensor, size: int
) -> list[Any]:
    """`function` of chunks of `size` rows; with more than one, backward runs it again."""
    if len(labels) <= size:
        return [function(rows, labels)]
    return [
        checkpoint(function, *pair, use_reentrant=False, preserve_rng_state=False)
        if torch.is_grad_enabled()
        else function(*pair)
        for pair in zip(rows.split(size), labels.split(size), strict=True)
    ]


def _scatter(values: Tensor, index: Tensor, like: Tensor) -> Tensor:
    out = torch.zeros(like.shape, dtype=torch.float32, device=values.device)
    return out.index_copy(0, index, values)
