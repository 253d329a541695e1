"""Decoder layers over packed segments, forward and backward: one op each, parts, transformers.

    python -m bench.kernels.bench_decoder_layer [--case 12x64x128x512x4x4 ...] [--threads 2]
                                                [--repeats 9] [--quick] [--json FILE]

A case is segments x length x width x inner width x query heads x kv heads, fp32, of a Llama; four
layers, so that what they keep is out of the caches when backward reads it, as in a model. q, k and
v lie side by side, as the engine lays them out. Contenders:

    cpu             rlhf_fast_kernels.decoder_layer
    parts           the same layers as norms, products, rotation, attention and SwiGLU, each a node
    transformers    stock layers with SDPA on the segments as a batch (all of one length, so that
                    nothing is padded)

Errors are the output's, against fp64. Flops are those of the products, three times, and of causal
attention; bytes are x, out, their gradients, the weights twice and their gradients.
"""

from __future__ import annotations

import copy
import functools
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding

from rlhf_fast.engine.weights import AliasedWeights
from rlhf_fast.models.packed_attention import PackedLayout, packed_attention_mode
from rlhf_fast.types import PackedSequences
from rlhf_fast_kernels import native

from . import harness

LAYERS = 4
CASES = ("12x64x128x512x4x4", "8x256x256x1024x8x2", "4x512x512x1408x16x8")
ERROR_LIMIT = 1e-4
Run = Callable[[Tensor], Tensor]


class Stack:
    """Four layers with their input."""

    def __init__(self, sizes: Sequence[int]) -> None:
        self.segments, self.length, width, inner, heads, kv_heads = sizes
        self.config = LlamaConfig(
            hidden_size=width,
            intermediate_size=inner,
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            num_hidden_layers=LAYERS,
            attn_implementation="sdpa",
        )
        torch.manual_seed(0)
        self.stock = nn.ModuleList(LlamaDecoderLayer(self.config, i) for i in range(LAYERS))
        self.rotary = LlamaRotaryEmbedding(self.config)
        self.x = torch.randn(self.segments * self.length, width)
        self.above = torch.randn_like(self.x)

    def packed(self, *, watched: bool) -> Run:
        """Over packed tokens; with a hook on a projection the layer runs as its parts."""
        layers: Any = copy.deepcopy(self.stock)
        layers.config = self.config
        AliasedWeights.of(layers)
        if watched:
            for layer in layers:
                layer.self_attn.o_proj.register_forward_hook(lambda *_: None)
        ids = torch.zeros(self.segments * self.length, dtype=torch.int64)
        lengths = torch.full((self.segments,), self.length)
        sequences = PackedSequences.from_flat(ids, lengths)
        layout = PackedLayout.build(sequences, torch.device("cpu"))
        tables = self.rotary(self.x[None], sequences.positions[None])

        def run(x: Tensor) -> Tensor:
            with packed_attention_mode(layers):
                out = through(layers, x[None], position_embeddings=tables, packed_layout=layout)
            return out.squeeze(0)

        return self._with_backward(run, layers)

    def batched(self) -> Run:
        """transformers as it is."""
        layers = copy.deepcopy(self.stock)
        return self._with_backward(functools.partial(self._as_batch, layers), layers)

    def exact(self) -> Tensor:
        """The output in fp64."""
        with torch.no_grad():
            return self._as_batch(copy.deepcopy(self.stock).double(), self.x.double())

    def _as_batch(self, layers: nn.ModuleList, x: Tensor) -> Tensor:
        positions = torch.arange(self.length).expand(self.segments, -1)
        tables = self.rotary(x[None], positions)
        rows = x.unflatten(0, (self.segments, self.length))
        return through(layers, rows, position_embeddings=tables).flatten(0, 1)

    def _with_backward(self, forward: Run, layers: nn.Module) -> Run:
        def run(x: Tensor) -> Tensor:
            x = x.detach().requires_grad_()
            out = forward(x)
            layers.zero_grad(set_to_none=True)
            out.backward(self.above)
            return out.detach()

        return run

    def flops(self) -> int:
        c, tokens = self.config, self.segments * self.length
        heads = c.num_attention_heads * c.head_dim
        kv = c.num_key_value_heads * c.head_dim
        weights = c.hidden_size * (2 * heads + 2 * kv + 3 * c.intermediate_size)
        pairs = self.segments * self.length * (self.length + 1) // 2
        return LAYERS * (3 * 2 * tokens * weights + 7 * 2 * pairs * heads)


def through(layers: nn.ModuleList, rows: Tensor, **options: Any) -> Tensor:
    for layer in layers:
        rows = layer(rows, **options)
    return rows


def run_case(session: harness.Session, case: str) -> None:
    stack = Stack([int(part) for part in case.split("x")])
    runs = {
        "cpu": stack.packed(watched=False),
        "parts": stack.packed(watched=True),
        "transformers": stack.batched(),
    }
    want = stack.exact()
    inputs = [stack.x] + [torch.randn_like(stack.x) for _ in range(3)]

    def contender(label: str) -> harness.Contender:
        error = float((runs[label](stack.x).double() - want).abs().max())
        ours = label == "cpu"
        return harness.Contender(
            label, lambda k: runs[label](inputs[k]), error, ERROR_LIMIT, ours=ours
        )

    weights = sum(p.numel() for p in stack.stock.parameters())
    rows = harness.measure(
        f"[{case}] fp32, {len(stack.x)} tokens, forward and backward",
        [contender(label) for label in runs],
        sets=len(inputs),
        bytes_moved=4 * (4 * stack.x.numel() + 3 * weights),
        flops=stack.flops(),
        **session.limits(),
    )
    session.add(rows)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = harness.parser("decoder layers over packed segments")
    parser.add_argument("--case", nargs="+", help="SEGMENTSxLENGTHxHIDDENxINNERxHQxHKV")
    options = parser.parse_args(arguments)
    session = harness.start(options)
    if session.device.type != "cpu":
        print("nothing to measure: on a GPU a layer runs as its parts", file=sys.stderr)
        return 1
    reason = native.missing("packed_attention_backward", "swiglu")
    if reason is not None:
        print(f"nothing to measure: {reason}", file=sys.stderr)
        return 1
    cases = options.case or CASES
    for case in cases[:2] if session.quick else cases:
        run_case(session, case)
    return session.finish()


if __name__ == "__main__":
    sys.exit(main())
