"""Checks on loaded models and tokenizers, each with one clear error."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from rlhf_fast.errors import ModelError

# Same vocabulary, other merges or normaliser: only encoding shows it.
_PROBE = "The quick brown fox, isn't it? 12345 <b>x_y</b>  naïve\n\tλ 日本 🙂"
_PAD_LIKE = ("<pad>", "[PAD]", "<|pad|>", "<PAD>", "<|finetune_right_pad_id|>", "<|endoftext|>")
_NEW_PAD = "<|pad|>"


def check_finite(module: nn.Module, where: str) -> None:
    """Raise ModelError naming the first parameter or buffer that holds NaN or Inf."""
    named = [*module.named_parameters(), *module.named_buffers()]
    bad = [n for n, t in named if t.is_floating_point() and not bool(torch.isfinite(t).all())]
    if bad:
        raise ModelError(
            "RF3020",
            f"NaN or Inf in {len(bad)} loaded weight tensors",
            where=f"{where}: {', '.join(bad[:5])}",
            remedy="the run that wrote them had diverged; use an earlier checkpoint",
        )


def check_vocabulary(tokenizer: Any, module: nn.Module, *, role: str = "model") -> None:
    """Raise ModelError if the tokenizer can produce ids that the model has no embedding for.

    Args:
        tokenizer: encodes what the model reads.
        module: a Hugging Face model.
        role: what to call it in the message.
    """
    model: Any = module
    rows = int(model.get_input_embeddings().weight.shape[0])
    largest = max(tokenizer.get_vocab().values(), default=-1)
    if largest >= rows:
        raise ModelError(
            "RF3021",
            f"the tokenizer has ids up to {largest}, the model has {rows} embedding rows",
            where=f"{role} ({type(module).__name__})",
            expected=f"at most {rows} ids, 0 to {rows - 1}",
            remedy="use the tokenizer the model was trained with, "
            "or model.resize_token_embeddings(len(tokenizer)) before SFT",
        )


def check_context(
    module: nn.Module, prompt_length: int, response_length: int, *, role: str = "model"
) -> None:
    """Raise ModelError if a prompt and its response do not fit into the model's positions.

    Args:
        module: a Hugging Face model.
        prompt_length: tokens of the longest prompt.
        response_length: tokens of the longest response.
        role: what to call the model in the message.
    """
    limit = max_positions(module)
    total = prompt_length + response_length
    if limit is not None and total > limit:
        raise ModelError(
            "RF3022",
            f"prompt ({prompt_length}) plus response ({response_length}) is {total} tokens, "
            f"the model has {limit} positions",
            where=f"{role} ({type(module).__name__})",
            expected=f"at most {limit} tokens together",
            remedy="lower sampling.max_new_tokens or data.max_prompt_length",
        )


def check_positions(module: nn.Module, longest: int) -> None:
    """Raise ModelError if the longest row of `longest` tokens does not fit into the positions."""
    limit = max_positions(module)
    if limit is not None and longest > limit:
        raise ModelError(
            "RF3050",
            f"the longest row has {longest} tokens, the model {limit} positions",
            where="data.max_length",
            expected=f"at most {limit} tokens",
            remedy=f"set data.max_length={limit} or less",
        )


def max_positions(module: nn.Module) -> int | None:
    """Tokens of the longest sequence the model was made for; None if its config names none."""
    limit = getattr(module.config, "max_position_embeddings", None)
    return limit if isinstance(limit, int) and limit > 0 else None


def check_same_tokenizer(first: Any, second: Any, *, names: str = "policy, reward model") -> None:
    """Raise ModelError unless both tokenizers give the same ids to the same text.

    Args:
        first: tokenizer whose ids are handed over.
        second: tokenizer of the model that reads them.
        names: what to call the two in the message.
    """
    difference = _tokenizer_difference(first, second)
    if difference is not None:
        raise ModelError(
            "RF3023",
            f"the tokenizers differ: {difference}",
            where=names,
            expected="one tokenizer, so that ids mean the same to both models",
            remedy="train the reward model from the same base, or score with retokenize=True",
        )


def _tokenizer_difference(first: Any, second: Any) -> str | None:
    if first is second:
        return None
    one, other = dict(first.get_vocab()), dict(second.get_vocab())
    _leave_out_new_pad(first, one, other)
    _leave_out_new_pad(second, other, one)
    if one != other:
        names = [t for t in {**one, **other} if one.get(t) != other.get(t)]
        shown = ", ".join(f"{t!r} {one.get(t)} and {other.get(t)}" for t in sorted(names)[:3])
        return f"{len(one)} and {len(other)} tokens, {len(names)} with other ids ({shown})"
    for attribute in ("eos_token_id", "bos_token_id"):
        ids = getattr(first, attribute), getattr(second, attribute)
        if ids[0] != ids[1]:
            return f"{attribute} {ids[0]} and {ids[1]}"
    ids_one, ids_other = (t(_PROBE, add_special_tokens=False)["input_ids"] for t in (first, second))
    if ids_one != ids_other:
        return "same vocabulary, but they split text differently"
    return None


def _leave_out_new_pad(tokenizer: Any, own: dict[str, int], of_other: dict[str, int]) -> None:
    """Drop a pad token that `choose_pad_token` has added, so that an export is still like its base.

    Nobody reads it, and its id is not one that means something else to the other tokenizer.
    """
    pad = tokenizer.pad_token
    if pad == _NEW_PAD and pad not in of_other and own.get(pad) not in of_other.values():
        own.pop(pad, None)


def choose_pad_token(tokenizer: Any, embedding_rows: int) -> int:
    """Make sure the tokenizer has a pad token, and return its id.

    Nothing here reads pad ids (lengths travel beside the tokens), but other software that loads an
    export does. In this order: the tokenizer's own; an existing token made for padding; a new one
    if the embedding has a spare row, so that no embedding is resized; else EOS.

    Args:
        tokenizer: changed in place.
        embedding_rows: rows of the model's input embedding.
    """
    chosen: int | None = tokenizer.pad_token_id
    if chosen is not None:
        return chosen
    vocab = tokenizer.get_vocab()
    known = [t for t in _PAD_LIKE if t in vocab and t != tokenizer.eos_token]
    if known:
        tokenizer.pad_token = known[0]
    elif max(vocab.values(), default=-1) + 1 < embedding_rows:
        tokenizer.add_special_tokens({"pad_token": _NEW_PAD})
    elif tokenizer.eos_token is not None:
        tokenizer.pad_token = tokenizer.eos_token
    else:
        raise ModelError(
            "RF3024",
            "the tokenizer has neither a pad token nor an end-of-sequence token",
            expected="at least eos_token",
            remedy="set tokenizer.eos_token and save the tokenizer again",
        )
    pad: int = tokenizer.pad_token_id
    return pad
