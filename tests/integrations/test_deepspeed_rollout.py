"""Our engine behind DeepSpeed's rollout interface, beside DeepSpeed's own on its own engines."""

from __future__ import annotations

import gc
import importlib.metadata
import os
import weakref
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from rlhf_fast.engine.settings import EngineSettings
from rlhf_fast.errors import EnvironmentFault, GenerationError
from rlhf_fast.integrations import deepspeed_rollout
from rlhf_fast.integrations.deepspeed_rollout import fast_rollout
from tests.integrations.peers import installed

installed("deepspeed", "0.19.8")

import deepspeed  # noqa: E402
from deepspeed.runtime.rollout import (  # noqa: E402
    HybridEngineRollout,
    ResponseTokenBatch,
    RolloutBatch,
    RolloutConfig,
    RolloutEngine,
    RolloutRequest,
    SamplingConfig,
    build_rollout,
)
from deepspeed.runtime.rollout import base as rollout_base  # noqa: E402
from transformers import LlamaConfig, LlamaForCausalLM  # noqa: E402

VOCAB, PAD, NO_END = 48, 0, 47


def tokens(end: int = NO_END, pad: int | None = PAD) -> Any:
    """What both engines read of a tokenizer."""
    return SimpleNamespace(pad_token_id=pad, eos_token_id=end)


def model(seed: int = 0) -> LlamaForCausalLM:
    """fp32, with weights large enough that greedy responses are not one token over and over."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.3,
        pad_token_id=None,
        bos_token_id=None,
        eos_token_id=None,
    )
    return LlamaForCausalLM(config)


def prompts() -> RolloutRequest:
    """Three prompts of 5, 2 and 4 tokens, padded on the left."""
    ids = torch.tensor([[7, 8, 9, 10, 11], [0, 0, 0, 12, 13], [0, 14, 15, 16, 17]])
    mask = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 0, 1, 1], [0, 1, 1, 1, 1]])
    return RolloutRequest(ids, mask)


def same(a: RolloutBatch, b: RolloutBatch) -> bool:
    return torch.equal(a.input_ids, b.input_ids) and torch.equal(a.attention_mask, b.attention_mask)


def theirs(engine: Any, end: int, request: RolloutRequest, new_tokens: int) -> RolloutBatch:
    """Greedy samples of DeepSpeed's own engine, which runs `generate` of transformers."""
    own = HybridEngineRollout(engine, tokens(end))
    batch = own.generate(request, SamplingConfig(new_tokens, temperature=0.0))
    # It always fills the width; the interface asks for the longest sequence.
    width = int(batch.attention_mask.nonzero()[:, 1].max()) + 1
    return RolloutBatch(
        batch.input_ids[:, :width], batch.attention_mask[:, :width], batch.response_start_idx
    )


def an_end_token(engine: Any) -> int:
    """A token with which the responses of some prompts end early."""
    free = theirs(engine, NO_END, prompts(), 8)
    return int(free.input_ids[0, 7])


# ---- the interface ------------------------------------------------------------------------------


def test_it_is_a_rollout_engine_of_deepspeed() -> None:
    rollout = fast_rollout(model(), tokens())
    assert isinstance(rollout, RolloutEngine)
    assert rollout.name == "rlhf_fast"


def test_greedy_is_what_deepspeeds_own_engine_returns() -> None:
    module = model()
    engine = SimpleNamespace(module=module)
    end = an_end_token(engine)
    expected = theirs(engine, end, prompts(), 8)
    responses = expected.attention_mask[:, 5:].sum(1)
    assert len(set(responses.tolist())) > 1
    found = fast_rollout(engine, tokens(end)).generate(
        prompts(), SamplingConfig(8, temperature=0.0)
    )
    for name in ("input_ids", "attention_mask", "response_start_idx"):
        a, b = getattr(found, name), getattr(expected, name)
        assert a.dtype == b.dtype
        assert torch.equal(a, b)


@pytest.mark.parametrize("pad", [PAD, None])
def test_several_samples_a_prompt(pad: int | None) -> None:
    """Masks by lengths: where padding is the end token, or a token that is drawn, too."""
    request, samples = prompts(), 4
    rollout = fast_rollout(model(), tokens(end=5, pad=pad), seed=3)
    batch = rollout.generate(request, SamplingConfig(12, n_samples_per_prompt=samples))
    assert batch.batch_size == 3 * samples
    assert batch.response_start_idx.tolist() == [5] * 3 * samples
    lengths = rollout.last.lengths
    assert len(set(lengths.tolist())) > 1
    assert batch.seq_len == 5 + int(lengths.max())
    fill = 5 if pad is None else pad
    for s, (ids, mask) in enumerate(zip(batch.input_ids, batch.attention_mask, strict=True)):
        n = int(lengths[s])
        assert ids[:5].tolist() == request.prompt_ids[s // samples].tolist()
        assert mask[:5].tolist() == request.prompt_attention_mask[s // samples].tolist()
        assert mask[5:].tolist() == [1] * n + [0] * (batch.seq_len - 5 - n)
        assert ids[5:].tolist() == rollout.last.response_ids()[s] + [fill] * (batch.seq_len - 5 - n)
        assert bool(rollout.last.ended[s]) == (int(ids[4 + n]) == 5)
    assert torch.equal(ResponseTokenBatch.from_rollout(batch).response_mask.sum(1), lengths)


def test_sampling_options_mean_what_deepspeed_means() -> None:
    """top_k at most 0 is off, a temperature at most 0 is greedy."""
    module = model()

    def draw(**options: Any) -> RolloutBatch:
        return fast_rollout(module, tokens(), seed=1).generate(
            prompts(), SamplingConfig(10, **options)
        )

    assert same(draw(top_k=-1), draw(top_k=0))
    assert not same(draw(top_k=-1), draw(top_k=2))
    greedy = draw(temperature=0.0)
    assert same(draw(temperature=-1.0), greedy)
    assert same(draw(top_k=1), greedy)
    assert same(draw(top_p=1e-6), greedy)
    assert not same(draw(), greedy)


def test_samples_are_a_function_of_seed_step_and_call() -> None:
    module, how = model(), SamplingConfig(10, n_samples_per_prompt=2)

    def calls(seed: int, step: int) -> list[RolloutBatch]:
        rollout = fast_rollout(module, tokens(), seed=seed)
        rollout.sync_weights(step)
        return [rollout.generate(prompts(), how) for _ in range(2)]

    first = calls(1, 7)
    assert all(map(same, first, calls(1, 7)))
    assert not same(*first)
    assert not same(first[0], calls(2, 7)[0])
    assert not same(first[0], calls(1, 8)[0])
    assert not torch.equal(first[0].input_ids[0], first[0].input_ids[1])
    alone = RolloutRequest(prompts().prompt_ids[:1], prompts().prompt_attention_mask[:1])
    rollout = fast_rollout(module, tokens(), seed=1)
    rollout.sync_weights(7)
    assert torch.equal(rollout.generate(alone, how).input_ids, first[0].input_ids[:2])


def test_log_probs_are_those_of_the_model() -> None:
    """`last` holds what `RolloutBatch` has no place for."""
    module = model()
    rollout = fast_rollout(module, tokens())
    batch = rollout.generate(prompts(), SamplingConfig(6, temperature=0.7))
    with torch.no_grad():
        positions = (batch.attention_mask.cumsum(1) - 1).clamp(min=0)
        logits = module(batch.input_ids, batch.attention_mask, positions).logits[:, 4:-1] / 0.7
    expected = logits.log_softmax(-1).gather(-1, batch.input_ids[:, 5:, None]).squeeze(-1)
    torch.testing.assert_close(rollout.last.rollout_logprobs, expected, rtol=1e-4, atol=1e-4)


def test_prompts_padded_on_the_right_are_refused() -> None:
    mask = prompts().prompt_attention_mask.clone()
    mask[2, 4] = 0
    rollout = fast_rollout(model(), tokens())
    with pytest.raises(GenerationError, match=r"RF4041[\s\S]*prompt 2"):
        rollout.generate(RolloutRequest(prompts().prompt_ids, mask), SamplingConfig(2))


def test_shutdown_frees_the_engine_and_keeps_the_model() -> None:
    module = model()
    rollout = fast_rollout(module, tokens())
    rollout.generate(prompts(), SamplingConfig(2))
    engine = weakref.ref(rollout.engine)
    rollout.shutdown()
    rollout.shutdown()
    gc.collect()
    assert engine() is None
    with pytest.raises(GenerationError, match="RF4042"):
        rollout.generate(prompts(), SamplingConfig(2))
    assert torch.isfinite(module(prompts().prompt_ids).logits).all()


# ---- on DeepSpeed's engines ---------------------------------------------------------------------


@pytest.fixture(scope="module", autouse=True)
def one_process() -> Iterator[None]:
    """DeepSpeed's communication with nobody, without the op that it would compile for it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(deepspeed.ops.__compatible_ops__, "deepspeed_shm_comm", False)
        for name, value in {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1}.items():
            patch.setenv(name, str(value))
        patch.setenv("MASTER_ADDR", "127.0.0.1")
        patch.setenv("MASTER_PORT", os.environ.get("MASTER_PORT", "0"))
        yield


def deepspeed_engine(stage: int, dtype: torch.dtype = torch.float32) -> Any:
    module = model()
    settings = {
        "train_batch_size": 1,
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,
        "bf16": {"enabled": dtype == torch.bfloat16},
    }
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.03)
    return deepspeed.initialize(model=module, optimizer=optimizer, config=settings)[0]


def train(engine: Any, batch: RolloutBatch) -> None:
    """A step towards other responses."""
    targets = ResponseTokenBatch.from_rollout(batch)
    logits = targets.select_causal_logits(engine(batch.input_ids, batch.attention_mask).logits)
    logprobs = logits.float().log_softmax(-1).gather(-1, targets.target_ids[..., None]).squeeze(-1)
    engine.backward(logprobs[targets.response_mask].mean())
    engine.step()


@pytest.mark.parametrize(("stage", "path"), [(0, "fused"), (1, "modules"), (2, "modules")])
def test_round_trip(stage: int, path: str) -> None:
    """Rollout, a step of DeepSpeed's, and a rollout from what the step has written."""
    engine = deepspeed_engine(stage)
    hooks = [list(engine.module._forward_pre_hooks), list(engine.module._forward_hooks)]
    assert all(hooks)
    rollout = fast_rollout(engine, tokens())
    assert rollout.engine.path == path, rollout.engine.reason
    greedy = SamplingConfig(8, temperature=0.0)
    seen: list[Tensor] = []
    for step in range(3):
        batch = rollout.generate(prompts(), greedy)
        assert same(batch, theirs(engine, NO_END, prompts(), 8))
        assert rollout.last.weight_version == step
        assert rollout.engine.path == path
        seen.append(batch.input_ids)
        train(engine, batch)
        rollout.sync_weights(step + 1)
    assert not torch.equal(seen[0], seen[1])
    assert not torch.equal(seen[1], seen[2])
    assert [list(engine.module._forward_pre_hooks), list(engine.module._forward_hooks)] == hooks


def test_training_is_the_same_with_and_without_rollouts() -> None:
    """The step finds the parameters where it left them, whichever path read them."""
    batch = theirs(SimpleNamespace(module=model()), NO_END, prompts(), 8)
    for stage in (0, 2):
        ends = []
        for generates in (False, True):
            engine = deepspeed_engine(stage)
            rollout = fast_rollout(engine, tokens()) if generates else None
            for step in range(2):
                if rollout is not None:
                    rollout.generate(prompts(), SamplingConfig(4))
                train(engine, batch)
                if rollout is not None:
                    rollout.sync_weights(step + 1)
            ends.append([p.detach().clone() for p in engine.module.parameters()])
        assert all(map(torch.equal, *ends))


def test_bf16_weights_in_deepspeeds_buffers() -> None:
    engine = deepspeed_engine(1, torch.bfloat16)
    rollout = fast_rollout(engine, tokens())
    before = rollout.generate(prompts(), SamplingConfig(8, temperature=0.0))
    train(engine, before)
    rollout.sync_weights(1)
    assert not same(rollout.generate(prompts(), SamplingConfig(8, temperature=0.0)), before)


def test_partitioned_parameters_and_moved_buffers_are_refused() -> None:
    with pytest.raises(GenerationError, match="RF4044"):
        fast_rollout(deepspeed_engine(2), tokens(), settings=EngineSettings(path="fused"))
    with pytest.raises(GenerationError, match="RF4043"):
        fast_rollout(deepspeed_engine(3), tokens())


def test_another_version_of_deepspeed_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    deepspeed_rollout.fast_rollout_class.cache_clear()
    monkeypatch.setattr(importlib.metadata, "version", lambda _package: "0.18.9")
    with pytest.raises(EnvironmentFault, match=r"RF7302: deepspeed 0\.18\.9"):
        fast_rollout(model(), tokens())


# ---- the factory --------------------------------------------------------------------------------


def test_deepspeeds_factory_knows_our_engine_while_patched() -> None:
    ours, module = RolloutConfig(engine="rlhf_fast"), model()
    with deepspeed_rollout.patched() as report:
        assert report.replaced == ("deepspeed.runtime.rollout.build_rollout",)
        factory = deepspeed.runtime.rollout.build_rollout
        made = factory(ours, student_engine=module, tokenizer=tokens(), seed=5)
        assert isinstance(made, rollout_base.RolloutEngine)
        assert made.seed == 5
        own = factory(RolloutConfig(), student_engine=module, tokenizer=tokens())
        assert isinstance(own, HybridEngineRollout)
        with pytest.raises(ValueError, match="needs both"):
            factory(ours)
        with pytest.raises(ValueError, match="Unknown rollout engine"):
            factory(RolloutConfig(engine="another"))
    assert deepspeed.runtime.rollout.build_rollout is build_rollout
    with pytest.raises(ValueError, match="Unknown rollout engine"):
        build_rollout(ours, student_engine=module, tokenizer=tokens())
