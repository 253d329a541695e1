"""From hidden states to log-probs: every kind of head against stock logits, and how much exists."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn
from torch.nn.utils import parametrize

from rlhf_fast.models.dropout import disable_dropout
from rlhf_fast.models.forward import set_compute_dtype
from rlhf_fast.models.roles import Actor, Reference
from rlhf_fast.models.vocabulary import HEAD_MODEL_TYPES, likeliest_tokens
from rlhf_fast.types import IGNORE_INDEX, PackedSequences
from tests.models.tiny import VOCAB, build, next_token_targets, random_sequences

LENGTHS = [6, 1, 11, 4]
TEMPERATURE = 0.7

# Heads with and without bias, tied to the embedding and not, scaled and capped.
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama-tied": ("llama", {"tie_word_embeddings": True}),
    "qwen2": ("qwen2", {}),
    "gpt2-tied": ("gpt2", {}),
    "gpt2-untied": ("gpt2", {"tie_word_embeddings": False}),
    "phi-bias": ("phi", {}),
    "granite-scale": ("granite", {}),
    "gemma2-cap": ("gemma2", {"final_logit_softcapping": 2.0}),
    "cohere-scale": ("cohere", {}),
    "opt": ("opt", {}),
}


def batch() -> tuple[PackedSequences, Tensor]:
    sequences = random_sequences(LENGTHS)
    targets = next_token_targets(sequences)
    targets[7:10] = IGNORE_INDEX
    return sequences, targets


def stock(module: nn.Module, sequences: PackedSequences, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probs and entropies in fp64 from the stock logits of every sequence alone."""
    bounds = itertools.pairwise(sequences.cu_seqlens.tolist())
    logits = [module(input_ids=sequences.ids[None, a:b]).logits[0] for a, b in bounds]
    every = (torch.cat(logits).double() / TEMPERATURE).log_softmax(-1)
    keep = targets != IGNORE_INDEX
    chosen = every.gather(-1, targets.clamp(min=0)[:, None]).squeeze(-1)
    return torch.where(keep, chosen, 0), torch.where(keep, -(every.exp() * every).sum(-1), 0)


def made(name: str) -> nn.Module:
    model_type, overrides = VARIANTS[name]
    module: nn.Module = build(model_type, **overrides)
    disable_dropout(module)
    if name == "phi-bias":
        nn.init.normal_(module.lm_head.bias)  # transformers starts it at 0
    return module


def gradients(module: nn.Module, logprobs: Tensor, entropy: Tensor) -> dict[str, Tensor]:
    module.zero_grad()
    (logprobs.square().sum() + 0.3 * entropy.sum()).backward()
    return {n: p.grad.clone() for n, p in module.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("model_type", sorted(HEAD_MODEL_TYPES))
def test_the_head_of_every_known_architecture_is_what_it_is_taken_for(model_type: str) -> None:
    actor = Actor(build(model_type))
    assert actor.vocabulary_head() is not None
    sequences, targets = batch()
    with torch.no_grad():
        ours = actor.logprobs(sequences, targets, temperature=TEMPERATURE, with_entropy=True)
        expected = stock(actor.module, sequences, targets)
    for found, wanted in zip(ours, expected, strict=True):
        assert found is not None
        torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-5)


# In fp64 transformers computes the norms of cohere in fp32, and padded gemma2 is NaN.
IN_DOUBLE = [name for name in VARIANTS if name not in ("gemma2-cap", "cohere-scale")]


@pytest.mark.parametrize(
    ("name", "dtype"),
    [*((n, torch.float32) for n in VARIANTS), *((n, torch.float64) for n in IN_DOUBLE)],
)
def test_gradients_equal_those_of_stock_logits(name: str, dtype: torch.dtype) -> None:
    module = made(name).to(dtype)
    sequences, targets = batch()
    logprobs, entropy = Actor(module, chunk_rows=4).logprobs(
        sequences, targets, temperature=TEMPERATURE, with_entropy=True
    )
    assert entropy is not None
    ours = gradients(module, logprobs, entropy)
    expected = gradients(module, *stock(module, sequences, targets))
    assert ours.keys() == expected.keys()
    exact = dtype == torch.float64
    for key, wanted in expected.items():
        torch.testing.assert_close(
            ours[key], wanted, rtol=1e-9 if exact else 1e-4, atol=1e-9 if exact else 1e-4
        )


def test_bfloat16_rounds_operands_and_not_the_logits() -> None:
    """Closer to the fp32 head over the same hidden states than logits rounded to bf16 are."""
    sequences, targets = batch()
    actor = Actor(build("llama"))
    set_compute_dtype(actor.module, "bfloat16")
    with torch.no_grad():
        ours, _ = actor.logprobs(sequences, targets)
        rows = actor.head_rows(sequences)
        assert rows is not None
        assert rows.head.compute_dtype == torch.bfloat16
        operands = [x.bfloat16().double() for x in (rows.hidden, rows.head.weight)]
        logits = operands[0] @ operands[1].t()
        index = targets.clamp(min=0)[:, None]
        keep = targets != IGNORE_INDEX
        exact = logits.log_softmax(-1).gather(-1, index).squeeze(-1)[keep]
        rounded = logits.bfloat16().double().log_softmax(-1).gather(-1, index).squeeze(-1)[keep]
    torch.testing.assert_close(ours[keep].double(), exact, rtol=1e-6, atol=1e-6)
    assert (rounded - exact).abs().max() > 100 * (ours[keep] - exact).abs().max()


# ---- heads that are more than one linear map ----------------------------------------------------


class LowRank(nn.Linear):
    """An output layer with an adapter, as peft puts it in place."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__(base.in_features, base.out_features, bias=False)
        self.weight = base.weight
        self.down = nn.Linear(base.in_features, 2, bias=False)
        self.up = nn.Linear(2, base.out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.up(self.down(x))


def _low_rank(module: Any) -> None:
    module.set_output_embeddings(LowRank(module.get_output_embeddings()))


def _hook(module: Any) -> None:
    module.lm_head.register_forward_hook(lambda layer, inputs, output: 1.5 * output)


def _early_hook(module: Any) -> None:
    module.lm_head.register_forward_pre_hook(lambda layer, inputs: (0.5 * inputs[0],))


class Doubled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2.0 * weight


def _parametrised(module: Any) -> None:
    parametrize.register_parametrization(module.lm_head, "weight", Doubled())


def _replaced_forward(module: Any) -> None:
    head = module.lm_head
    head.forward = lambda x: nn.functional.linear(x, head.weight).neg()


CHANGES = [_low_rank, _hook, _early_hook, _parametrised, _replaced_forward]


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("model_type", ["llama", "granite", "gemma2"])
def test_a_head_that_does_more_goes_through_its_own_module(
    change: Callable[[Any], None], model_type: str
) -> None:
    module = build(model_type, tie_word_embeddings=False)
    torch.manual_seed(0)
    change(module)
    actor = Actor(module, chunk_rows=4)
    assert actor.vocabulary_head() is None
    sequences, targets = batch()
    assert actor.head_rows(sequences) is None
    logprobs, entropy = actor.logprobs(
        sequences, targets, temperature=TEMPERATURE, with_entropy=True
    )
    assert entropy is not None
    expected, expected_entropy = stock(module, sequences, targets)
    torch.testing.assert_close(logprobs.double(), expected, rtol=1e-5, atol=1e-5)
    ours = gradients(module, logprobs, entropy)
    # Against fp64: fp32 gradients of some parameters are sums of hundreds of terms.
    for key, wanted in gradients(module, expected, expected_entropy).items():
        torch.testing.assert_close(ours[key], wanted, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("layers", [["lm_head", "q_proj"], ["q_proj"]])
def test_adapters_of_peft(layers: list[str]) -> None:
    """On the head they go through the module; elsewhere the head is as before, and frozen."""
    adapters = LoraConfig(target_modules=layers, r=2, init_lora_weights=False)
    module = inject_adapter_in_model(adapters, build("llama"))
    actor = Actor(module)
    sequences, targets = batch()
    assert (actor.vocabulary_head() is None) == ("lm_head" in layers)
    logprobs, entropy = actor.logprobs(
        sequences, targets, temperature=TEMPERATURE, with_entropy=True
    )
    assert entropy is not None
    expected = stock(module, sequences, targets)
    torch.testing.assert_close(logprobs.double(), expected[0], rtol=1e-5, atol=1e-5)
    ours = gradients(module, logprobs, entropy)
    assert all("lora" in name for name in ours)
    for key, wanted in gradients(module, *expected).items():
        torch.testing.assert_close(ours[key], wanted, rtol=1e-4, atol=1e-4)


def test_its_module_is_given_a_few_rows_at_a_time() -> None:
    sizes: list[int] = []
    actor = Actor(build("llama"), chunk_rows=4)
    actor.module.lm_head.register_forward_hook(lambda *a: sizes.append(a[2].numel()))
    sequences = random_sequences(LENGTHS)
    actor.logprobs(sequences, next_token_targets(sequences))
    rows = sum(LENGTHS) - len(LENGTHS)
    assert max(sizes) <= 4 * VOCAB
    assert sum(sizes) == rows * VOCAB


def test_an_unknown_architecture_makes_its_own_logits() -> None:
    module = build("llama")
    sequences, targets = batch()
    expected, _ = Actor(module).logprobs(sequences, targets)
    module.config.model_type = "unheard-of"
    actor = Actor(module)
    assert actor.vocabulary_head() is None
    found, _ = actor.logprobs(sequences, targets)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    rows = torch.arange(5)
    assert torch.equal(
        likeliest_tokens(module, sequences, rows), likeliest_tokens(build("llama"), sequences, rows)
    )


def test_a_reference_gives_hidden_states_without_a_graph() -> None:
    sequences, _ = batch()
    rows = Reference(build("llama")).head_rows(sequences)
    assert rows is not None
    assert not rows.hidden.requires_grad
    assert not rows.head.weight.requires_grad
    rows = Actor(build("llama"), vocab_size=30, chunk_rows=3).head_rows(sequences)
    assert rows is not None
    assert rows.hidden.requires_grad
    assert (rows.head.vocab_size, rows.head.chunk_rows) == (30, 3)
