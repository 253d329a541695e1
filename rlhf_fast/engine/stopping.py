"""When a response ends: EOS and stop tokens by id, stop strings by incremental decoding."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from rlhf_fast.engine.sampling_params import is_int64
from rlhf_fast.errors import GenerationError

Decode = Callable[[list[list[int]]], list[str]]


def stops_of(module: nn.Module, tokenizer: Any) -> tuple[list[int], Decode]:
    """(ids that end a response, how to decode) of a model and its tokenizer.

    Chat models end their turn with another token than the tokenizer's EOS and name it in their
    generation config, so both are read.
    """
    config = getattr(module, "generation_config", None)
    named = (tokenizer.eos_token_id, getattr(config, "eos_token_id", None))
    ids = [i for entry in named for i in (entry if isinstance(entry, list) else [entry])]

    def decode(batch: list[list[int]]) -> list[str]:
        return tokenizer.batch_decode(
            batch, skip_special_tokens=False, clean_up_tokenization_spaces=False
        )

    return [i for i in ids if i is not None], decode


def checked_eos_ids(eos_ids: Any) -> tuple[int, ...]:
    """The ids, each once, ascending.

    Raises:
        GenerationError: RF4046, not a collection of whole numbers of 64 bits.
    """
    ids = list(eos_ids) if isinstance(eos_ids, Iterable) else None
    if ids is None or not all(map(is_int64, ids)):
        raise GenerationError(
            "RF4046",
            f"eos_ids={eos_ids!r} are not ids",
            expected="the ids that end a response, such as [tokenizer.eos_token_id]; [] for none",
            remedy="use HybridEngine.from_tokenizer, which asks tokenizer and model",
        )
    return tuple(sorted(set(map(int, ids))))


def require_decode(strings: Sequence[str], decode: Decode | None) -> None:
    """Refuse stop strings where nothing can decode.

    Raises:
        GenerationError: RF4002.
    """
    if strings and decode is None:
        raise GenerationError(
            "RF4002",
            "stop_strings need a tokenizer to decode with",
            where="SamplingParams.stop_strings",
            remedy="build the engine with HybridEngine.from_tokenizer, or pass decode=",
        )


class StopRule:
    """Decides after every token which responses are complete.

    A response ends with the token that completes a stop string; the token stays whole, so the text
    may run past the stop string by the rest of that token.

    Args:
        token_ids: ids that end a response, EOS among them.
        strings: texts that end a response wherever they appear in its decoded text.
        decode: turns lists of ids into texts, special tokens included; needed for `strings`.
        device: where tokens live.
    """

    def __init__(
        self,
        token_ids: Sequence[int],
        strings: Sequence[str],
        decode: Decode | None,
        device: torch.device,
    ) -> None:
        self._ids = torch.tensor(sorted(set(token_ids)), dtype=torch.int64, device=device)
        self._strings = tuple(strings)
        require_decode(self._strings, decode)
        self._decode = decode
        # A token yields at least one byte of text, so this many tokens hold any match that the
        # newest one completes; the margin covers tokens that decode to nothing.
        self._window = 8 + max((len(s.encode()) for s in self._strings), default=0)

    def ends(self, tokens: Tensor) -> Tensor:
        """[B] bool: the newest tokens [B] that are EOS or a stop token."""
        return (tokens.unsqueeze(-1) == self._ids).any(-1)

    def completed(self, responses: Tensor) -> Tensor:
        """[B] bool: rows of responses [B, t] whose text now contains a stop string.

        To be asked after every token: only the tail is decoded, and the whole only to confirm.
        """
        if not self._strings or self._decode is None:
            return torch.zeros(responses.shape[0], dtype=torch.bool, device=responses.device)
        tails = self._decode(responses[:, -self._window :].tolist())
        suspects = [row for row, text in enumerate(tails) if self._contains(text)]
        texts = self._decode(responses[suspects].tolist()) if suspects else []
        hits = [row for row, text in zip(suspects, texts, strict=True) if self._contains(text)]
        found = torch.zeros(responses.shape[0], dtype=torch.bool)
        found[hits] = True
        return found.to(responses.device)

    def _contains(self, text: str) -> bool:
        return any(s in text for s in self._strings)
