"""PPO runs with the memory section: the same numbers in less space, resumed to the same bits."""

import dataclasses
import os
import signal

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from rlhf_fast.config import MemoryConfig, OptimConfig
from rlhf_fast.errors import ConfigError, Interrupted
from rlhf_fast.metrics import read_metrics
from rlhf_fast.models.roles import Reference
from tests.models.tiny import random_sequences
from tests.ppo.synthetic import tiny_config
from tests.stages.test_ppo import judge, policy, settings, tokenizer, trainer, without_times

__all__ = ["tokenizer"]

AWAY = MemoryConfig(reference="offload", reward_model="offload", optimizer_state="offload")


def wide_policy(tokenizer):
    """A policy of which all but a per cent is in large matrices."""
    config = tiny_config()
    config.vocab_size = len(tokenizer)
    config.eos_token_id = tokenizer.eos_token_id
    config.hidden_size, config.intermediate_size = 64, 256
    config.head_dim = config.hidden_size // config.num_attention_heads
    config.num_key_value_heads = 2
    config.tie_word_embeddings = True
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config)


def weights(folder, name="model"):
    return (folder / name / "model.safetensors").read_bytes()


def test_what_is_offloaded_changes_no_bit_of_a_run(tmp_path, tokenizer):
    model = {"reward_function": None}
    folders = [tmp_path / name for name in ("resident", "away")]
    seen = []
    for folder, memory in zip(folders, (MemoryConfig(), AWAY), strict=True):
        ppo = trainer(
            folder,
            tokenizer,
            settings(folder, memory=memory),
            reward_model=judge(tokenizer, tmp_path / "judge"),
            **model,
        )
        optimizers = [ppo.roles.actor_optimizer, ppo.roles.critic_optimizer]
        generate = ppo.roles.generator.generate

        def watched(*args, generate=generate, optimizers=optimizers, **more):
            seen.append([o._host.away for o in optimizers])
            return generate(*args, **more)

        ppo.roles.generator.generate = watched
        ppo.train()
        assert not any(o._host.away for o in optimizers)
    assert seen == [[False, False]] * 3 + [[True, True]] * 3
    assert without_times(folders[0]) == without_times(folders[1])
    for name in ("model", "critic"):
        assert weights(folders[0], name) == weights(folders[1], name)


def test_a_generator_that_fails_leaves_the_optimizer_states_on_the_device(tmp_path, tokenizer):
    ppo = trainer(tmp_path, tokenizer, settings(tmp_path, memory=AWAY))

    def fail(*args, **more):
        raise MemoryError

    ppo.roles.generator.generate = fail
    with pytest.raises(MemoryError):
        ppo.train()
    assert not ppo.roles.actor_optimizer._host.away


@pytest.mark.parametrize(
    "memory",
    [MemoryConfig(value_head="actor"), MemoryConfig(optimizer="adamw8bit", value_head="actor")],
)
def test_each_mode_resumes_to_the_same_bits(tmp_path, tokenizer, memory):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    trainer(whole, tokenizer, settings(whole, memory=memory)).train()

    def interrupt(step, output):
        if step == 2:
            os.kill(os.getpid(), signal.SIGINT)

    changed = settings(parts, memory=memory)
    with pytest.raises(Interrupted):
        trainer(parts, tokenizer, changed, on_step=interrupt).train()
    # Where things lie may change on the way.
    moved = dataclasses.replace(memory, reference="offload", optimizer_state="offload")
    trainer(parts, tokenizer, settings(parts, memory=moved)).train()
    assert without_times(parts) == without_times(whole)
    for name in ("model", "critic"):
        assert weights(parts, name) == weights(whole, name)


def test_what_is_trained_may_not_change_on_the_way(tmp_path, tokenizer):
    trainer(tmp_path, tokenizer, settings(tmp_path, total_steps=1)).train()
    memory = MemoryConfig(value_head="actor")
    with pytest.raises(Exception, match=r"memory\.value_head"):
        trainer(tmp_path, tokenizer, settings(tmp_path, memory=memory)).train()


def test_a_critic_on_the_trunk_is_exported_as_a_whole_classifier(tmp_path, tokenizer):
    config = settings(tmp_path, memory=MemoryConfig(value_head="actor"))
    ppo = trainer(tmp_path, tokenizer, config)
    ppo.train()
    assert ppo.roles.critic_optimizer is None
    critic = AutoModelForSequenceClassification.from_pretrained(tmp_path / "critic")
    ids = random_sequences([6]).ids
    with torch.no_grad():
        hidden = critic.base_model(input_ids=ids[None]).last_hidden_state
        found = critic.score(hidden)[0, :, 0]
        expected = ppo.roles.critic.values(random_sequences([6]))
    assert float(expected.abs().max()) > 0
    torch.testing.assert_close(found, expected)
    row = read_metrics(tmp_path / "metrics.jsonl")[-1]
    assert row["loss/value_avg"] > 0


def test_a_critic_beside_a_head_on_the_trunk_is_refused(tmp_path, tokenizer):
    config = settings(tmp_path, memory=MemoryConfig(value_head="actor"))
    with pytest.raises(ConfigError, match="RF1043"):
        trainer(tmp_path, tokenizer, config, critic=judge(tokenizer, tmp_path / "judge"))


def test_a_streamed_reference_is_a_copy_of_the_actor_as_loaded(tmp_path, tokenizer):
    ppo = trainer(tmp_path, tokenizer, settings(tmp_path, memory=AWAY))
    sequences = random_sequences([5, 7])
    targets = torch.roll(sequences.ids, -1)
    expected, _ = Reference(policy(tokenizer).eval()).logprobs(sequences, targets)
    ppo.train()
    assert torch.equal(ppo.roles.reference.logprobs(sequences, targets)[0], expected)


@pytest.mark.parametrize("value_head", ["separate", "actor"])
def test_stepping_in_backward_changes_no_bit_of_a_run(tmp_path, tokenizer, value_head):
    optim = OptimConfig(lr=1e-3, max_grad_norm=0.0)
    for name, in_backward in (("after", False), ("inside", True)):
        memory = MemoryConfig(step_in_backward=in_backward, value_head=value_head)
        changes = {"memory": memory, "actor_optim": optim, "critic_optim": optim}
        trainer(tmp_path / name, tokenizer, settings(tmp_path / name, **changes)).train()
    for name in ("model", "critic"):
        assert weights(tmp_path / "inside", name) == weights(tmp_path / "after", name)
    rows = without_times(tmp_path / "inside"), without_times(tmp_path / "after")
    assert rows[0][-1] == pytest.approx(rows[1][-1])  # norms are added up in another order


def test_frozen_models_of_ours_hold_the_bytes_they_compute_in(tmp_path, tokenizer):
    run = dataclasses.replace(settings(tmp_path).run, dtype="bfloat16")
    given = policy(tokenizer, 3)
    ppo = trainer(tmp_path, tokenizer, settings(tmp_path, run=run))
    theirs = trainer(tmp_path, tokenizer, settings(tmp_path, run=run), reference=given)
    for role, layers in (
        (ppo.roles.reference, torch.bfloat16),
        (theirs.roles.reference, torch.float32),
        (ppo.roles.actor, torch.float32),
    ):
        trunk = role.module.model
        assert trunk.layers[0].mlp.up_proj.weight.dtype == layers
        assert trunk.embed_tokens.weight.dtype == trunk.norm.weight.dtype == torch.float32
    assert ppo.train().steps == 3


BITS8 = MemoryConfig(optimizer="adamw8bit")
TRUNK = MemoryConfig(value_head="actor")


@pytest.mark.parametrize(
    ("memory", "sampling", "between"),
    [
        (MemoryConfig(), 24.0, 24.0),
        (BITS8, 12 + 1 / 16, 12 + 1 / 16),
        (TRUNK, 12.0, 12.0),
        (dataclasses.replace(TRUNK, optimizer="adamw8bit"), 6 + 1 / 32, 6 + 1 / 32),
        (AWAY, 8.0, 24.0),
        (dataclasses.replace(AWAY, value_head="actor"), 4.0, 12.0),
    ],
)
def test_bytes_per_parameter_are_those_of_the_page(tmp_path, tokenizer, memory, sampling, between):
    """Trained weights and moments on the device while sampling, and between two steps."""
    config = settings(tmp_path, memory=memory, total_steps=2)
    model = wide_policy(tokenizer)
    size = sum(p.numel() for p in model.parameters())
    ppo = trainer(tmp_path, tokenizer, config, model=model)
    roles = ppo.roles
    optimizers = [o for o in (roles.actor_optimizer, roles.critic_optimizer) if o is not None]

    def held():
        parts = [p for o in optimizers for p in o.parameters]
        parts += [p.grad for p in parts if p.grad is not None]
        parts += [
            value
            for o in optimizers
            if not o._host.away
            for slots in o.optimizer.state.values()
            for value in slots.values()
            if value.dim()
        ]
        return sum(part.nbytes for part in parts) / size

    found, generate = [], roles.generator.generate

    def watched(*args, **more):
        found.append(held())
        return generate(*args, **more)

    roles.generator.generate = watched
    ppo.train()
    # In the first step there are no moments yet; norms keep fp32 ones.
    assert found[1] == pytest.approx(sampling, rel=0.02)
    assert held() == pytest.approx(between, rel=0.02)
