"""transformers' continuous batching: the oracle of our runner, and a path with our sampler."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import ContinuousBatchingConfig, GenerationConfig

from rlhf_fast.engine.hybrid import HybridEngine
from rlhf_fast.engine.progress import Progress
from rlhf_fast.engine.requests import Completions, Request
from rlhf_fast.engine.settings import EngineSettings
from rlhf_fast.engine.transformers_path import version_fault
from rlhf_fast.engine.transformers_runner import PAGE_SIZE
from rlhf_fast.errors import GenerationError
from rlhf_fast.models.forward import set_compute_dtype
from rlhf_fast.types import SamplingParams
from tests.engine.architectures import tiny
from tests.engine.test_generator import (
    EOS,
    batch_of,
    build,
    ragged,
    run,
)
from tests.engine.test_hybrid import bytes_of_pages, engine_for

pytestmark = pytest.mark.skipif(version_fault() is not None, reason=f"{version_fault()}")

GREEDY = SamplingParams(12, temperature=0.0)
# transformers runs neither GPT-NeoX nor OPT so, and Gemma 2 without its softcap.
ORACLES = ("llama", "llama-bias", "mistral", "qwen2", "qwen3", "gemma", "gemma3", "gpt2")


def generate_batch(module: Any, prompts: list[list[int]]) -> list[tuple[list[int], list[float]]]:
    """(tokens, log-probs) of stock greedy continuous batching."""
    outputs = module.generate_batch(
        inputs=prompts,
        generation_config=GenerationConfig(
            max_new_tokens=12, do_sample=False, eos_token_id=EOS, pad_token_id=0
        ),
        continuous_batching_config=ContinuousBatchingConfig(
            **{PAGE_SIZE: 4}, num_blocks=64, max_batch_tokens=64, return_logprobs=True
        ),
    )
    assert all(output.error is None for output in outputs.values())
    return [(output.generated_tokens, output.logprobs) for output in outputs.values()]


# ---- the oracle ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ORACLES)
def test_the_engine_equals_continuous_batching_on_the_same_weights(name: str) -> None:
    module, prompts = build(name), ragged()
    engine = engine_for(module)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.3)
    seen = []
    for _ in range(2):
        rollout = engine.generate(batch_of(prompts), GREEDY, samples_per_prompt=1, seeds=range(6))
        # Afterwards, so it reads the parameters as the engine has laid them out.
        for s, (tokens, logprobs) in enumerate(generate_batch(module, prompts)):
            assert rollout.response_ids()[s] == tokens
            got = rollout.rollout_logprobs[s, : len(tokens)].tolist()
            assert got == pytest.approx(logprobs, abs=1e-5)
        seen.append(rollout.response_ids())
        module.train()
        module(
            input_ids=torch.tensor([[3, 4, 5]]), labels=torch.tensor([[3, 4, 5]])
        ).loss.backward()
        optimizer.step()
    assert seen[0] != seen[1]


# ---- the path -----------------------------------------------------------------------------------


def requests() -> list[Request]:
    """One of every kind of setting, with stop strings and ids that some of them meet."""
    kinds = [
        SamplingParams(9, temperature=0.0),
        SamplingParams(14, temperature=1.3, stop_token_ids=tuple(range(40, 50))),
        SamplingParams(11, top_k=5),
        SamplingParams(16, temperature=0.7, top_p=0.8, stop_strings=("7", "<9>")),
        SamplingParams(5, min_p=0.05),
    ]
    prompts = ragged(len(kinds))
    return [Request(tuple(prompts[i]), kind, (i, i + 50)) for i, kind in enumerate(kinds)]


def texts(batch: list[list[int]]) -> list[str]:
    return ["".join(f"<{i}>" for i in ids) for ids in batch]


def complete(path: str, **settings: Any) -> Completions:
    chosen = EngineSettings(path=path, page_size=4, **settings)
    engine = HybridEngine(build(), eos_ids=[EOS], decode=texts, settings=chosen)
    return engine.complete(requests())


def same(ours: Completions, theirs: Completions) -> None:
    mask = torch.arange(ours.tokens.shape[1]) < ours.lengths[:, None]
    assert torch.equal(ours.lengths, theirs.lengths)
    assert torch.equal(ours.ended, theirs.ended)
    assert torch.equal(ours.tokens.where(mask, 0), theirs.tokens.where(mask, 0))
    for name in ("logprobs", "raw_logprobs"):
        ours_, theirs_ = (getattr(out, name).where(mask, 0) for out in (ours, theirs))
        torch.testing.assert_close(ours_, theirs_, atol=1e-5, rtol=0)


@pytest.mark.parametrize("max_batch", [64, 3])
def test_requests_with_settings_of_their_own_are_those_of_our_runner(max_batch: int) -> None:
    ours = complete("modules")
    assert 0 < int(ours.ended.sum()) < 10
    same(complete("transformers", max_batch=max_batch), ours)


def test_samples_that_run_out_of_pages_go_on_with_the_same_tokens() -> None:
    same(complete("transformers", kv_bytes=bytes_of_pages(14)), complete("modules"))


def test_a_prompt_longer_than_a_step_is_read_in_chunks() -> None:
    prompts = [list(range(3, 33)), list(range(5, 25)), [7]]
    sampling = SamplingParams(10)
    chunked = run(
        build(), prompts, sampling, path="transformers", settings={"prefill_tokens": 16}, group=2
    )
    whole = run(build(), prompts, sampling, path="modules", group=2)
    assert chunked.response_ids() == whole.response_ids()


def test_all_samples_are_handed_over_when_the_model_is_free() -> None:
    module = build()
    engine = engine_for(module, "transformers")
    seen: list[list[int]] = []
    engine.on_finished = lambda samples, out: seen.append(samples)
    engine.generate(batch_of(ragged()), GREEDY, samples_per_prompt=1, seeds=range(6))
    assert seen == [list(range(6))]


def test_progress_is_what_our_runner_reports() -> None:
    reports: list[Progress] = []
    engine = engine_for(build(), "transformers")
    engine.on_progress = reports.append
    engine.generate(batch_of(ragged()), SamplingParams(9), samples_per_prompt=2, seeds=range(12))
    assert all(p.finished + p.running + p.waiting == p.samples == 12 for p in reports)
    assert all(p.tokens_per_second > 0 for p in reports)
    assert reports[-1].finished == 12


def test_a_manager_kept_on_the_model_is_not_taken_over() -> None:
    module, prompts = build(), ragged(3)
    expected = run(build(), prompts, GREEDY, path="modules").response_ids()
    module.generate_batch(
        inputs=[[5, 6, 7]],
        generation_config=GenerationConfig(max_new_tokens=2, do_sample=True, eos_token_id=-1),
        continuous_batching_config=ContinuousBatchingConfig(
            **{PAGE_SIZE: 4}, num_blocks=8, max_batch_tokens=16
        ),
        persistent_manager=True,
    )
    assert run(module, prompts, GREEDY, path="transformers").response_ids() == expected


@pytest.mark.parametrize("fails", [False, True])
def test_the_models_attention_is_what_it_was(fails: bool) -> None:
    module = build()
    module.set_attn_implementation("eager")
    if fails:
        module.model.layers[1].mlp.forward = lambda x: x @ x
        with pytest.raises(GenerationError, match="RF4036"):
            run(module, ragged(2), GREEDY, path="transformers")
    else:
        run(module, ragged(2), GREEDY, path="transformers")
    assert module.config._attn_implementation == "eager"


# ---- refusals -----------------------------------------------------------------------------------


def autocast() -> Any:
    module = build()
    set_compute_dtype(module, "bfloat16")
    return module


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (lambda: build("gpt_neox"), "gpt_neox"),
        (lambda: build("gemma2"), "gemma2"),
        (lambda: tiny("gemma3_text", attn_logit_softcapping=2.0), "softcap"),
        (autocast, "bf16 over fp32 masters"),
    ],
)
def test_what_it_would_get_wrong_is_refused(make: Any, why: str) -> None:
    with pytest.raises(GenerationError, match=rf"(?s)RF4032.*{why}"):
        engine_for(make(), "transformers")


def test_bfloat16_switched_on_later_is_refused() -> None:
    module = build()
    engine = engine_for(module, "transformers")
    set_compute_dtype(module, "bfloat16")
    with pytest.raises(GenerationError, match=r"RF4032.*has changed"):
        engine.generate(batch_of([[3, 4]]), GREEDY, samples_per_prompt=1, seeds=[0])


def test_pages_that_hold_no_sample_are_refused() -> None:
    engine = engine_for(build(), "transformers", kv_bytes=bytes_of_pages(3))
    with pytest.raises(GenerationError, match="RF4007"):
        engine.generate(batch_of([[3, 4]]), GREEDY, samples_per_prompt=1, seeds=[0])


def test_tokens_that_transformers_did_not_take_are_an_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from rlhf_fast.engine.transformers_sampler import SeededSampler

    stock = SeededSampler.__call__

    def other(self: SeededSampler, *arguments: torch.Tensor) -> torch.Tensor:
        return stock(self, *arguments).roll(1, dims=1)

    monkeypatch.setattr(SeededSampler, "__call__", other)
    with pytest.raises(GenerationError, match=r"(?s)RF4036.*not what was drawn"):
        run(build(), ragged(2), GREEDY, path="transformers")
