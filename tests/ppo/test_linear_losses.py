"""The fused losses of the trainer against log-probs of whole logits, and what exists at once."""

import dataclasses
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from rlhf_fast.config import AlgorithmConfig, KLConfig
from rlhf_fast.data.collate import PackedBatch
from rlhf_fast.engine.hybrid import HybridEngine
from rlhf_fast.models.dropout import disable_dropout
from rlhf_fast.models.vocabulary import likeliest_tokens
from rlhf_fast.ppo.exact_kl import read_both
from rlhf_fast.ppo.layout import build_microbatch, response_slots
from rlhf_fast.ppo.losses import policy_loss
from rlhf_fast.ppo.scoring import Scoring
from rlhf_fast.stages.sft import nll_sum
from rlhf_fast.types import IGNORE_INDEX
from tests.models.test_vocabulary import LowRank
from tests.models.tiny import build
from tests.ppo import synthetic
from tests.ppo.synthetic import learner, random_rollout, small_config

TEMPERATURE = 0.8
RULES = {
    "plain": {},
    "entropy": {"entropy_coef": 0.1},
    "dual": {"dual_clip": 1.5, "clip_eps_low": 0.05, "clip_eps_high": 0.1},
}
KL = {
    "reward": KLConfig(coef=0.1),
    "loss-k1": KLConfig(coef=0.3, placement="loss"),
    "loss-k3": KLConfig(coef=0.3, placement="loss", estimator="k3"),
    "loss-exact": KLConfig(coef=0.3, placement="loss", estimator="exact"),
}


def built(rules, kl, model_type="llama", **overrides):
    """(learner on small models, microbatch of a random rollout whose ratios are not 1)."""
    config = small_config(**rules)
    sampling = dataclasses.replace(config.sampling, temperature=TEMPERATURE)
    config = dataclasses.replace(config, kl=kl, sampling=sampling)
    ppo = learner(config)
    ppo.roles.actor.module = build(model_type, vocab_size=synthetic.VOCAB, **overrides)
    ppo.roles.reference.module = build(model_type, seed=5, vocab_size=synthetic.VOCAB, **overrides)
    for role in (ppo.roles.actor, ppo.roles.reference):
        disable_dropout(role.module)
    experience, _ = ppo.prepare(ppo.score(random_rollout()))
    count = len(experience.scored.rollout)
    microbatch = build_microbatch(
        experience,
        list(range(count)),
        advantages=experience.advantages,
        weights=torch.rand_like(experience.advantages),
        num_loss_tokens=int(experience.scored.loss_mask.sum()),
    )
    noise = torch.randn(microbatch.old_logprobs.shape, generator=torch.Generator().manual_seed(1))
    old = torch.where(microbatch.loss_mask, microbatch.old_logprobs + 0.3 * noise, 0.0)
    return ppo, dataclasses.replace(microbatch, old_logprobs=old)


def stock_logits(module, sequences):
    parts = sequences.ids.split(sequences.lengths.tolist())
    return torch.cat([module(input_ids=ids[None]).logits[0] for ids in parts]).double()


def exact_kl(ppo, sequences):
    """[N] KL by its sum over the vocabulary."""
    ours = (stock_logits(ppo.roles.actor.module, sequences) / TEMPERATURE).log_softmax(-1)
    theirs = (stock_logits(ppo.roles.reference.module, sequences) / TEMPERATURE).log_softmax(-1)
    return (ours.exp() * (ours - theirs.detach())).sum(-1)


def expected_loss(ppo, microbatch):
    """The update's policy loss from stock logits, its log-probs and entropies in fp64."""
    kl, keep = ppo.config.kl, microbatch.loss_mask
    exact = kl.estimator == "exact"
    module = ppo.roles.actor.module
    every = (stock_logits(module, microbatch.sequences) / TEMPERATURE).log_softmax(-1)
    chosen = every.gather(-1, microbatch.targets.clamp(min=0)[:, None]).squeeze(-1)
    output = policy_loss(
        microbatch,
        torch.where(keep, chosen, 0).float(),
        torch.where(keep, -(every.exp() * every).sum(-1), 0).float(),
        algorithm=ppo.config.algorithm,
        kl=dataclasses.replace(kl, placement="reward") if exact else kl,
        kl_coef=kl.coef,
    )
    if not exact:
        return output.loss, output
    penalty = torch.where(keep, exact_kl(ppo, microbatch.sequences), 0).sum()
    metrics = {**output.metrics, "kl": penalty.detach()}
    loss = output.loss + kl.coef * penalty / microbatch.num_loss_tokens
    return loss, dataclasses.replace(output, metrics=metrics)


@pytest.mark.parametrize("rules", RULES)
@pytest.mark.parametrize("kl", KL)
def test_the_update_is_that_of_stock_logits(rules, kl):
    compare(*built(RULES[rules], KL[kl]))


@pytest.mark.parametrize("model_type", ["gpt2", "granite", "gemma2", "phi", "opt"])
@pytest.mark.parametrize("kl", ["reward", "loss-exact"])
def test_the_update_of_other_heads_is_that_of_stock_logits(model_type, kl):
    compare(*built(RULES["entropy"], KL[kl], model_type))


def update_loss(ppo, microbatch):
    """The policy loss as `_backward` makes it."""
    reference = ppo._reference_rows(microbatch.sequences)
    return ppo._policy_loss(microbatch, ppo.roles.actor.head_rows(microbatch.sequences), reference)


def compare(ppo, microbatch):
    module = ppo.roles.actor.module.eval()
    ppo.roles.reference.module.eval().requires_grad_(False)
    found = update_loss(ppo, microbatch)
    found.loss.backward()
    ours = {n: p.grad.clone() for n, p in module.named_parameters() if p.grad is not None}
    module.zero_grad()
    loss, expected = expected_loss(ppo, microbatch)
    loss.backward()
    assert found.loss.item() == pytest.approx(loss.item(), rel=1e-5, abs=1e-6)
    assert found.metrics.keys() == expected.metrics.keys()
    assert found.extrema.keys() == expected.extrema.keys()
    for name, value in expected.metrics.items():
        assert float(found.metrics[name]) == pytest.approx(float(value), rel=1e-4, abs=1e-4), name
    for name, parameter in module.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(ours[name], parameter.grad, rtol=1e-3, atol=2e-5)


def test_a_head_with_an_adapter_takes_the_update_through_its_log_probs():
    ppo, microbatch = built(RULES["entropy"], KL["loss-k3"])
    module = ppo.roles.actor.module
    module.set_output_embeddings(LowRank(module.lm_head))
    assert ppo.roles.actor.vocabulary_head() is None
    compare(ppo, microbatch)


def test_a_reported_entropy_has_no_gradient():
    """Without a bonus the entropy is a metric, whichever way it is made."""
    ppo, microbatch = built({}, KL["reward"])
    gradients = []
    for algorithm in (AlgorithmConfig(), AlgorithmConfig(entropy_coef=1e-30)):
        ppo.config = dataclasses.replace(ppo.config, algorithm=algorithm)
        ppo.roles.actor.module.zero_grad()
        output = update_loss(ppo, microbatch)
        output.loss.backward()
        assert float(output.metrics["entropy"]) > 0
        gradients.append(ppo.roles.actor.module.lm_head.weight.grad.clone())
    torch.testing.assert_close(*gradients)


# ---- the exact KL in the reward -----------------------------------------------------------------


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "granite", "gemma2"])
def test_exact_kl_in_the_reward_is_the_sum_over_the_vocabulary(model_type):
    ppo, _ = built({}, KLConfig(coef=0.1, estimator="exact"), model_type)
    rollout = random_rollout()
    scored = ppo.score(rollout)
    slots = response_slots(rollout, range(len(rollout)))
    with torch.no_grad():
        kl = exact_kl(ppo, slots.sequences).float()
    expected = torch.zeros_like(scored.old_logprobs)
    slots.to_padded(kl, expected)
    expected = torch.where(rollout.response_mask, expected, 0.0)
    torch.testing.assert_close(scored.exact_kl, expected, rtol=1e-4, atol=1e-5)
    assert torch.all(scored.exact_kl[~rollout.response_mask] == 0)
    plain = dataclasses.replace(ppo.config, kl=KLConfig(coef=0.1))
    other = Scoring(plain, ppo.roles, ppo.side_by_side).score(rollout)
    assert other.exact_kl is None
    torch.testing.assert_close(scored.old_logprobs, other.old_logprobs)
    torch.testing.assert_close(scored.ref_logprobs, other.ref_logprobs)


def test_padded_vocabulary_is_left_out_of_the_exact_kl():
    ppo, _ = built({}, KLConfig(coef=0.1, estimator="exact"))
    slots = response_slots(random_rollout(), range(8))
    targets = slots.targets(random_rollout().response_mask)
    # Ids up to 22 are drawn; the last rows of the weight are padding once more are made.
    for role in (ppo.roles.actor, ppo.roles.reference):
        role.module.resize_token_embeddings(synthetic.VOCAB + 9)
        role.vocab_size = synthetic.VOCAB
    rows = [r.head_rows(slots.sequences) for r in (ppo.roles.actor, ppo.roles.reference)]
    _, _, kl = read_both(*rows, targets, temperature=1.0)
    ours, theirs = (
        stock_logits(r.module, slots.sequences)[:, : synthetic.VOCAB].log_softmax(-1)
        for r in (ppo.roles.actor, ppo.roles.reference)
    )
    expected = torch.where(targets != IGNORE_INDEX, (ours.exp() * (ours - theirs)).sum(-1), 0)
    torch.testing.assert_close(kl.double(), expected, rtol=1e-4, atol=1e-5)


# ---- what exists at once ------------------------------------------------------------------------


class Largest(TorchDispatchMode):
    """Elements of the largest memory that any tensor made inside lies in."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, torch.Tensor):
                size = x.untyped_storage().nbytes() // x.element_size()
                self.elements = max(self.elements, size)
        return out


BIG_VOCAB = 4096
MOST = BIG_VOCAB * 48  # weights are BIG_VOCAB x 16


def wide(monkeypatch, kl, chunk_rows):
    monkeypatch.setattr(synthetic, "VOCAB", BIG_VOCAB)
    monkeypatch.setattr("rlhf_fast.models.vocabulary.MODULE_ROWS", 8)
    config = dataclasses.replace(small_config(), kl=kl)
    ppo = learner(config)
    for role in (ppo.roles.actor, ppo.roles.reference):
        role.chunk_rows = chunk_rows
    return ppo, random_rollout(prompts=8, group=4, columns=12)


def sft(ppo, rollout):
    """Loss and accuracy of the supervised stage, and its backward."""
    slots = response_slots(rollout, range(len(rollout)))
    targets = slots.targets(rollout.response_mask)
    batch = PackedBatch(slots.sequences, targets, targets != IGNORE_INDEX)
    (nll_sum(ppo.roles.actor, batch) / 7).backward()
    rows = torch.nonzero(batch.loss_mask).squeeze(1)
    likeliest_tokens(ppo.roles.actor.module, batch.sequences, rows)


def update(ppo, rollout):
    """Scoring and update of PPO."""
    experience, _ = ppo.prepare(ppo.score(rollout))
    ppo.update(experience)


def generate(ppo, rollout):
    HybridEngine(ppo.roles.actor.module, eos_ids=[]).generate(
        rollout.prompts, ppo.sampling, samples_per_prompt=2, seeds=range(16)
    )


CASES = [
    (sft, KLConfig()),
    (generate, KLConfig()),
    *((update, kl) for kl in (*KL.values(), KLConfig(estimator="exact"))),
]


@pytest.mark.parametrize(("stage", "kl"), CASES)
def test_no_stage_holds_the_logits_of_all_tokens(monkeypatch, stage, kl):
    ppo, rollout = wide(monkeypatch, kl, 8)
    tokens = int(rollout.response_mask.sum())
    assert tokens * BIG_VOCAB > 2 * MOST
    with Largest() as largest:
        stage(ppo, rollout)
    assert largest.elements <= MOST


@pytest.mark.parametrize("stage", [sft, update])
def test_the_watch_sees_logits_where_there_are_some(monkeypatch, stage):
    ppo, rollout = wide(monkeypatch, KLConfig(), 10**6)
    with Largest() as largest:
        stage(ppo, rollout)
    assert largest.elements >= int(rollout.response_mask.sum()) * BIG_VOCAB
