"""One model on several ranks that decode in step: what they exchange in a forward.

Each rank holds a slice of every layer: some heads, some columns of the MLP, some rows of embedding
and head. All ranks run the same schedule on the same tokens and meet four times:

    embedding    each looks up the ids it holds; sum           [tokens, H] all-reduce
    attention    each adds what its heads give; sum            [tokens, H] all-reduce a layer
    MLP          the same for its columns                      [tokens, H] all-reduce a layer
    drawing      rows are dealt out, each rank collects the    [rows, V] all-to-all: every rank
                 logits of its own from all, draws their       receives 1 / n of it
                 tokens, and tells the others                  24 bytes a row all-gather

A row is drawn by one rank from the logits of the whole vocabulary, with the op of a single device:
filters and log-probs are exact, and every rank learns the same tokens, so no schedule can drift.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from rlhf_fast.distributed.collectives import all_gather_rows
from rlhf_fast_kernels import SampleOutput, sample


@dataclass(frozen=True)
class TensorParallel:
    """The ranks that decode one model in step.

    Args:
        group: their process group.
        rank: of this one among them.
        size: how many they are.
        vocabulary: rows V of the whole embedding and head; rank r holds rows
            [r * ceil(V / size), (r + 1) * ceil(V / size)) of both, as far as there are any.
    """

    group: dist.ProcessGroup
    rank: int
    size: int
    vocabulary: int

    @property
    def _rows(self) -> int:
        return -(-self.vocabulary // self.size)

    @property
    def first_row(self) -> int:
        """The token id of this rank's first row."""
        return min(self.rank * self._rows, self.vocabulary)

    @property
    def own_rows(self) -> int:
        """Rows that this rank holds."""
        return min(self._rows, self.vocabulary - self.first_row)

    def sum(self, x: Tensor) -> Tensor:
        """Sum over the ranks, in fp32; in place, and returned."""
        total = x.float()
        dist.all_reduce(total, group=self.group)
        return x if total is x else x.copy_(total)

    def embed(self, ids: Tensor, embedding: Tensor, out: Tensor) -> Tensor:
        """Embeddings of the whole vocabulary's ids.

        Args:
            ids: [N] int64.
            embedding: [own rows, H].
            out: [N, H], written.
        """
        local = ids - self.first_row
        ours = (local >= 0) & (local < len(embedding))
        if len(embedding) == 0:
            out.zero_()
        else:
            torch.index_select(embedding, 0, torch.where(ours, local, 0), out=out)
            out.masked_fill_(~ours[:, None], 0.0)
        return self.sum(out)

    def drawing(
        self,
        logits: Tensor,
        *,
        seeds: Tensor,
        step: Tensor,
        temperature: Tensor,
        top_k: Tensor | int,
        top_p: Tensor | float,
        min_p: Tensor | float,
        out: SampleOutput,
    ) -> Callable[[], None]:
        """A call that draws one token a row, the same on all ranks.

        Everything is read when it is called, so that it can follow the forward again and again.

        Args:
            logits: [B, own rows] float32 of this rank's part of the vocabulary.
            seeds, step, temperature, top_k, top_p, min_p: [B] or numbers, as `sample` takes them;
                the same on all ranks.
            out: [B] each, without entropy; written.
        """
        rows, device = len(logits), logits.device
        share = -(-rows // self.size)  # rows that a rank draws; the last may have fewer
        first = min(self.rank * share, rows)
        mine = slice(first, min(first + share, rows))
        count = mine.stop - mine.start
        sent = torch.zeros(self.size, share, self._rows, device=device)
        received = torch.empty_like(sent)
        # int64 holds a token and, bit for bit, its two log-probs.
        told = torch.zeros(share, 2, dtype=torch.int64, device=device)
        heard = torch.empty(self.size * share, 2, dtype=torch.int64, device=device)
        settings: dict[str, Any] = {
            "temperature": temperature,
            "top_k": top_k,
            "top_p": top_p,
            "min_p": min_p,
        }
        for name, value in settings.items():
            settings[name] = value[mine] if isinstance(value, Tensor) else value
        drawn = SampleOutput(
            torch.empty(count, dtype=torch.int64, device=device),
            torch.empty(count, device=device),
            torch.empty(count, device=device),
            None,
        )

        def call() -> None:
            sent.view(self.size * share, -1)[:rows, : logits.shape[1]] = logits
            dist.all_to_all_single(received, sent, group=self.group)
            whole = received[:, :count].transpose(0, 1).reshape(count, self.size * self._rows)
            if count:
                sample(
                    whole,
                    seeds=seeds[mine],
                    step=step[mine],
                    vocab_size=self.vocabulary,
                    with_entropy=False,
                    out=drawn,
                    **settings,
                )
                told[:count, 0] = drawn.tokens
                pairs = torch.stack((drawn.logprobs, drawn.raw_logprobs), 1)
                told[:count, 1] = pairs.view(torch.int64).squeeze(1)
            all_gather_rows(heard, told, self.group)
            pairs = heard[:rows, 1:].contiguous().view(torch.float32)
            out.tokens.copy_(heard[:rows, 0])
            out.logprobs.copy_(pairs[:, 0])
            out.raw_logprobs.copy_(pairs[:, 1])

        return call
