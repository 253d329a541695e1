"""The four roles against stock transformers outputs."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from torch import Tensor, nn

from rlhf_fast.errors import ModelError, RewardError
from rlhf_fast.models.dropout import disable_dropout, dropout_before
from rlhf_fast.models.forward import set_compute_dtype
from rlhf_fast.models.heads import Calibration, get_calibration, set_calibration
from rlhf_fast.models.roles import Actor, Critic, Reference, RewardModel, microbatches
from rlhf_fast.protocols import PolicyModel, ValueModel
from rlhf_fast.types import IGNORE_INDEX, PackedSequences
from tests.models.tiny import (
    build,
    build_classifier,
    next_token_targets,
    random_sequences,
)

LENGTHS = [6, 1, 11, 4]
MODEL_TYPES = ["llama", "gpt2", "granite", "gemma2", "opt"]


def stock_logprobs(
    model: nn.Module, sequences: PackedSequences, targets: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """Log-probs and entropies in fp64 from the stock logits of every sequence alone."""
    logprobs, entropies = [], []
    bounds = sequences.cu_seqlens.tolist()
    for a, b in itertools.pairwise(bounds):
        logits = model(input_ids=sequences.ids[None, a:b]).logits[0].double() / temperature
        every = logits.log_softmax(-1)
        keep = targets[a:b] != IGNORE_INDEX
        chosen = every.gather(-1, targets[a:b].clamp(min=0)[:, None]).squeeze(-1)
        logprobs.append(torch.where(keep, chosen, 0.0))
        entropies.append(torch.where(keep, -(every.exp() * every).sum(-1), 0.0))
    return torch.cat(logprobs), torch.cat(entropies)


@pytest.mark.parametrize("model_type", MODEL_TYPES)
@pytest.mark.parametrize("chunk_rows", [None, 5])
def test_logprobs_equal_stock(model_type: str, chunk_rows: int | None) -> None:
    actor = Actor(build(model_type), chunk_rows=chunk_rows)
    assert isinstance(actor, PolicyModel)
    sequences = random_sequences(LENGTHS)
    targets = next_token_targets(sequences)
    targets[7:10] = IGNORE_INDEX
    with torch.no_grad():
        ours, entropy = actor.logprobs(sequences, targets, temperature=0.7, with_entropy=True)
        stock, stock_entropy = stock_logprobs(actor.module, sequences, targets, 0.7)
    assert ours.dtype == torch.float32
    assert entropy is not None
    assert (ours[targets == IGNORE_INDEX] == 0).all()
    torch.testing.assert_close(ours.double(), stock, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(entropy.double(), stock_entropy, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("model_type", ["llama", "opt"])
def test_chunks_recompute_to_the_same_gradients(model_type: str) -> None:
    sequences = random_sequences(LENGTHS)
    targets = next_token_targets(sequences)
    gradients = []
    for chunk_rows in (None, 4, 1):
        actor = Actor(build(model_type), chunk_rows=chunk_rows)
        logprobs, entropy = actor.logprobs(sequences, targets, with_entropy=True)
        assert entropy is not None
        (logprobs.square().sum() + 0.3 * entropy.sum()).backward()
        gradients.append([p.grad for p in actor.module.parameters() if p.grad is not None])
    stock = build(model_type)
    disable_dropout(stock)
    logprobs, entropy = stock_logprobs(stock, sequences, targets, 1.0)
    (logprobs.square().sum() + 0.3 * entropy.sum()).backward()
    gradients.append([p.grad for p in stock.parameters() if p.grad is not None])
    for whole, *others in zip(*gradients, strict=True):
        for other in others:
            torch.testing.assert_close(whole, other, rtol=1e-4, atol=1e-4)


def test_all_ignored_is_exact_zero_with_a_graph() -> None:
    actor = Actor(build("llama"))
    sequences = random_sequences(LENGTHS)
    targets = torch.full_like(sequences.ids, IGNORE_INDEX)
    logprobs, entropy = actor.logprobs(sequences, targets, with_entropy=True)
    assert entropy is not None
    assert (logprobs == 0).all()
    assert (entropy == 0).all()
    logprobs.sum().backward()
    assert all((p.grad == 0).all() for p in actor.module.parameters() if p.grad is not None)


def test_padded_vocabulary_rows_leave_the_softmax() -> None:
    sequences = random_sequences(LENGTHS)
    sequences = PackedSequences(sequences.ids % 30, sequences.positions, sequences.cu_seqlens)
    targets = next_token_targets(sequences)
    module = build("llama")
    with torch.no_grad():
        ours, _ = Actor(module, vocab_size=30).logprobs(sequences, targets)
        logits = [
            module(input_ids=ids[None]).logits[0, :, :30] for ids in sequences.ids.split(LENGTHS)
        ]
    every = torch.cat(logits).log_softmax(-1)
    expected = every.gather(-1, targets.clamp(min=0)[:, None]).squeeze(-1)
    keep = targets != IGNORE_INDEX
    torch.testing.assert_close(ours[keep], expected[keep], rtol=1e-5, atol=1e-5)


def test_actor_in_train_mode_repeats_itself() -> None:
    actor = Actor(build("gpt2"))
    actor.module.train()
    sequences = random_sequences(LENGTHS)
    targets = next_token_targets(sequences)
    first, _ = actor.logprobs(sequences, targets)
    second, _ = actor.logprobs(sequences, targets)
    assert torch.equal(first, second)


@pytest.mark.parametrize("model_type", ["gpt2", "llama", "starcoder2", "mixtral"])
def test_dropout_is_off_everywhere_and_remembered(model_type: str) -> None:
    settings = {
        "gpt2": {"attn_pdrop": 0.2, "resid_pdrop": 0.3, "embd_pdrop": 0.4},
        "llama": {"attention_dropout": 0.2},
        "starcoder2": {"attention_dropout": 0.2, "residual_dropout": 0.3},
        "mixtral": {"attention_dropout": 0.2, "router_jitter_noise": 0.5},
    }[model_type]
    model = build(model_type, **settings).train()
    ids = random_sequences([12]).ids[None]
    assert not torch.equal(model(input_ids=ids).logits, model(input_ids=ids).logits)
    disable_dropout(model)
    disable_dropout(model)
    assert torch.equal(model(input_ids=ids).logits, model(input_ids=ids).logits)
    assert all(getattr(model.config, name) == 0 for name in settings)
    assert settings.items() <= dropout_before(model).items()


@pytest.mark.parametrize("chunk_rows", [None, 5])
def test_bfloat16_trains_fp32_masters(chunk_rows: int | None) -> None:
    sequences = random_sequences(LENGTHS)
    targets = next_token_targets(sequences)
    gradients = []
    for dtype in ("float32", "bfloat16"):
        actor = Actor(build("llama"), chunk_rows=chunk_rows)
        set_compute_dtype(actor.module, dtype)  # type: ignore[arg-type]
        logprobs, entropy = actor.logprobs(sequences, targets, with_entropy=True)
        assert entropy is not None
        assert logprobs.dtype == entropy.dtype == torch.float32
        with torch.no_grad():
            assert torch.equal(actor.logprobs(sequences, targets)[0], logprobs)
        logprobs.sum().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in actor.module.parameters()]))
    exact, rounded = gradients
    assert rounded.dtype == torch.float32
    assert torch.nn.functional.cosine_similarity(exact, rounded, dim=0) > 0.999


def test_weight_version_counts() -> None:
    actor = Actor(build("llama"))
    assert actor.weight_version == 0
    assert [actor.bump_version(), actor.bump_version(), actor.weight_version] == [1, 2, 2]


def test_reference_is_frozen_and_has_no_graph() -> None:
    module = build("llama")
    sequences = random_sequences(LENGTHS)
    targets = next_token_targets(sequences)
    expected, _ = Actor(copy.deepcopy(module)).logprobs(sequences, targets)
    reference = Reference(module)
    logprobs, entropy = reference.logprobs(sequences, targets)
    assert torch.equal(logprobs, expected)
    assert entropy is None
    assert not logprobs.requires_grad
    assert not any(p.requires_grad for p in reference.module.parameters())
    assert not reference.module.training


def stock_values(model: nn.Module, sequences: PackedSequences) -> Tensor:
    """Raw score of every prefix by stock transformers, one prefix at a time."""
    bounds, out = sequences.cu_seqlens.tolist(), []
    model = copy.deepcopy(model).eval()
    model.config.pad_token_id = None
    for a, b in itertools.pairwise(bounds):
        for end in range(a + 1, b + 1):
            out.append(model(input_ids=sequences.ids[None, a:end]).logits[0, 0])
    return torch.stack(out)


@pytest.mark.parametrize("model_type", ["llama", "qwen3", "gpt2", "gpt_neox", "opt"])
def test_values_are_the_score_of_every_prefix(model_type: str) -> None:
    critic = Critic(build_classifier(model_type))
    assert isinstance(critic, ValueModel)
    sequences = random_sequences(LENGTHS)
    values = critic.values(sequences)
    assert values.dtype == torch.float32
    with torch.no_grad():
        stock = stock_values(critic.module, sequences)
    torch.testing.assert_close(values.detach(), stock, rtol=1e-5, atol=1e-5)
    values.sum().backward()
    assert critic.module.score.weight.grad is not None


@pytest.mark.parametrize("budget", [1, 8, 16384])
def test_scores_read_the_last_token_and_nothing_else(budget: int) -> None:
    module = build_classifier("llama", pad_token_id=7, eos_token_id=7)
    # Sequences full of the pad id: a reader that looks for pads would read elsewhere.
    sequences = PackedSequences.from_lists([[7, 5, 7, 7], [7], [4, 5, 6], [7, 7]])
    values = Critic(copy.deepcopy(module)).values(sequences).detach()
    scores = RewardModel(module).score_sequences(sequences, token_budget=budget)
    torch.testing.assert_close(scores, values[[3, 4, 7, 9]], rtol=1e-6, atol=1e-6)
    assert not scores.requires_grad


def test_calibration_is_applied_by_reward_model_and_critic() -> None:
    module = build_classifier("llama")
    sequences = random_sequences(LENGTHS)
    raw = RewardModel(copy.deepcopy(module)).score_sequences(sequences)
    values = Critic(copy.deepcopy(module)).values(sequences)
    set_calibration(module, gain=2.0, bias=-0.5)
    assert get_calibration(module) == Calibration(2.0, -0.5)
    torch.testing.assert_close(RewardModel(module).score_sequences(sequences), 2 * raw - 0.5)
    torch.testing.assert_close(Critic(module).values(sequences), 2 * values - 0.5)
    with pytest.raises(ModelError, match="RF3003"):
        set_calibration(module, gain=float("nan"), bias=0.0)


def test_scores_are_finer_than_bfloat16() -> None:
    module = build_classifier("llama")
    set_compute_dtype(module, "bfloat16")
    scores = RewardModel(module).score_sequences(random_sequences(LENGTHS))
    assert scores.dtype == torch.float32
    assert not torch.equal(scores, scores.bfloat16().float())


def test_an_empty_sequence_cannot_be_scored() -> None:
    reward_model = RewardModel(build_classifier("llama"))
    with pytest.raises(RewardError, match=r"(?s)RF5001.*sequence 1"):
        reward_model.score_sequences(random_sequences([3, 0]))
    assert reward_model.score_sequences(random_sequences([])).shape == (0,)


def test_a_causal_lm_is_no_critic() -> None:
    with pytest.raises(ModelError, match=r"(?s)RF3004.*LlamaForCausalLM"):
        Critic(build("llama"))


def test_microbatches_cover_everything_once_within_the_budget() -> None:
    lengths = [3, 9, 1, 4, 12, 2, 2]
    groups = microbatches(lengths, 8)
    assert sorted(i for g in groups for i in g) == list(range(7))
    assert all(sum(lengths[i] for i in g) <= 8 or len(g) == 1 for g in groups)
    assert microbatches([], 8) == []
