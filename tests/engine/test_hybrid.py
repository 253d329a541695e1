"""The hybrid engine: modes, shared weights, pages, preemption, and training beside generation."""

from __future__ import annotations

import copy
import itertools
import json
from typing import Any

import pytest
import torch
from torch import nn

from rlhf_fast.engine.expected_lengths import ExpectedLengths
from rlhf_fast.engine.hybrid import HybridEngine, Mode
from rlhf_fast.engine.requests import Request
from rlhf_fast.engine.settings import EngineSettings
from rlhf_fast.engine.weights import AliasedWeights
from rlhf_fast.errors import GenerationError
from rlhf_fast.types import SamplingParams
from tests.engine.test_generator import (
    EOS,
    FAMILIES,
    VOCAB,
    batch_of,
    build,
    ragged,
    run,
    seeds_for,
    trainer_logprobs,
)

PAGED = ("fused", "modules")


@pytest.fixture(params=PAGED)
def path(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def engine_for(module: nn.Module, path: str = "auto", **settings: Any) -> HybridEngine:
    chosen = EngineSettings(path=path, page_size=4, poison=True, **settings)
    return HybridEngine(module, eos_ids=[EOS], settings=chosen)


def bytes_of_pages(pages: int) -> int:
    """Key-value memory of so many pages of 4 tokens of the Llama of `build`."""
    return pages * 4 * 2 * 2 * 2 * 8 * 4


# ---- weights ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FAMILIES)
def test_aliasing_changes_no_bit_of_any_output(name: str) -> None:
    module = build(name).eval()
    ids = torch.arange(3, 11)[None]
    before = module(input_ids=ids).logits
    names = dict(module.named_parameters())
    AliasedWeights(module)
    assert torch.equal(module(input_ids=ids).logits, before)
    assert all(p is names[n] for n, p in module.named_parameters())


def test_fused_projections_are_views_of_what_training_updates() -> None:
    module = build("qwen2")
    weights = AliasedWeights(module)
    layer = module.model.layers[1]
    attention = layer.self_attn
    parts = [attention.q_proj, attention.k_proj, attention.v_proj]
    joined = weights.concatenated([p.weight for p in parts])
    biases = weights.concatenated([p.bias for p in parts])
    assert joined is not None
    assert biases is not None
    optimizer = torch.optim.SGD(module.parameters(), lr=0.5)
    module(input_ids=torch.tensor([[3, 4, 5]])).logits.sum().backward()
    optimizer.step()
    assert torch.equal(joined, torch.cat([p.weight for p in parts]))
    assert torch.equal(biases, torch.cat([p.bias for p in parts]))
    assert weights.concatenated([layer.mlp.down_proj.weight, attention.q_proj.weight]) is None


def test_tied_embeddings_stay_tied_and_are_held_once() -> None:
    module = build("qwen2-tied")
    weights = AliasedWeights(module)
    assert module.lm_head.weight is module.model.embed_tokens.weight
    held = sum(p.numel() * 4 for p in module.parameters())
    assert held <= weights.nbytes < held + 256 * len(list(module.parameters()))


def test_memory_that_was_given_up_comes_back_for_the_same_parameters() -> None:
    """What a server does between two updates of its weights."""
    module, kept = build(), build().state_dict()
    engine = engine_for(module, "fused")
    asked = {"samples_per_prompt": 1, "seeds": [0]}
    before = engine.generate(batch_of([[3]]), SamplingParams(4), **asked)
    weights = AliasedWeights.of(module)
    parameters = list(module.parameters())
    weights.give_up()
    assert {p.untyped_storage().nbytes() for p in parameters} == {0}
    weights.allocate_again()
    assert all(a is b for a, b in zip(parameters, module.parameters(), strict=True))
    module.load_state_dict(kept)
    after = engine.generate(batch_of([[3]]), SamplingParams(4), **asked)
    assert torch.equal(after.responses, before.responses)


def test_flat_buffers_may_lie_where_the_caller_wants_them() -> None:
    module = build()
    made: list[torch.Tensor] = []

    def allocate(count: int, dtype: torch.dtype) -> torch.Tensor:
        made.append(torch.full((count,), 7.0, dtype=dtype))
        return made[-1]

    weights = AliasedWeights.of(module, allocate=allocate)
    assert [buffer.data_ptr() for buffer in weights.buffers.values()] == [made[0].data_ptr()]
    assert all(p.untyped_storage().data_ptr() == made[0].data_ptr() for p in module.parameters())


@pytest.mark.parametrize("how", ["moved", "cast and back", "replaced"])
def test_weights_that_left_their_place_are_refused(how: str) -> None:
    module = build()
    engine = engine_for(module, "fused")
    if how == "moved":
        module.model.norm.weight.data = module.model.norm.weight.data.clone()
    elif how == "cast and back":
        module.double().float()
    else:
        module.load_state_dict(build(seed=1).state_dict(), assign=True)
    with pytest.raises(GenerationError, match="RF4031"):
        engine.generate(batch_of([[3]]), SamplingParams(2), samples_per_prompt=1, seeds=[0])


def test_a_switch_allocates_and_copies_no_weight() -> None:
    module = build()
    engine = engine_for(module, "fused")
    addresses = [p.data_ptr() for p in module.parameters()]
    for _ in range(3):
        engine.generate(batch_of([[3]]), SamplingParams(2), samples_per_prompt=1, seeds=[0])
    assert [p.data_ptr() for p in module.parameters()] == addresses


# ---- modes --------------------------------------------------------------------------------------


def test_modes_exclude_each_other(path: str) -> None:
    engine = engine_for(build(), path)
    request = (batch_of([[3]]), SamplingParams(2))
    assert engine.mode is Mode.TRAIN
    with engine.scoring():
        assert engine.mode is Mode.SCORE
        with pytest.raises(GenerationError, match="RF4033"):
            engine.generate(*request, samples_per_prompt=1, seeds=[0])
        with pytest.raises(GenerationError, match="RF4033"), engine.scoring():
            pass
    assert engine.mode is Mode.TRAIN
    engine.generate(*request, samples_per_prompt=1, seeds=[0])
    assert engine.mode is Mode.TRAIN


def test_an_optimizer_step_while_weights_are_read_is_refused(path: str) -> None:
    module = build()
    engine = engine_for(module, path)
    optimizer = torch.optim.SGD(module.parameters(), lr=1.0)
    engine.guard(optimizer)
    before = copy.deepcopy(module.state_dict())
    module(input_ids=torch.tensor([[3, 4]])).logits.sum().backward()

    def step(_: Any) -> None:
        optimizer.step()

    engine.on_progress = step
    with pytest.raises(GenerationError, match=r"RF4034.*generate"):
        engine.generate(batch_of([[3]]), SamplingParams(2), samples_per_prompt=1, seeds=[0])
    with engine.scoring(), pytest.raises(GenerationError, match=r"RF4034.*score"):
        optimizer.step()
    assert all(torch.equal(v, before[k]) for k, v in module.state_dict().items())
    optimizer.step()
    assert not torch.equal(module.lm_head.weight, before["lm_head.weight"])


def test_an_exception_in_generation_leaves_engine_and_training_usable(path: str) -> None:
    module = build()
    module.train()
    engine = engine_for(module, path)
    expected = run(module, ragged(4), SamplingParams(9), path=path).response_ids()

    def fail(_: Any) -> None:
        raise RuntimeError("in the middle")

    engine.on_progress = fail
    request = {"samples_per_prompt": 1, "seeds": seeds_for(4)}
    with pytest.raises(RuntimeError, match="in the middle"):
        engine.generate(batch_of(ragged(4)), SamplingParams(9), **request)
    engine.on_progress = None
    assert engine.mode is Mode.TRAIN
    assert module.training
    module(input_ids=torch.tensor([[3, 4]])).logits.sum().backward()
    assert all(p.grad is not None for p in module.parameters())
    again = engine.generate(batch_of(ragged(4)), SamplingParams(9), **request)
    assert again.response_ids() == expected


@pytest.mark.parametrize(
    ("name", "wish", "found"),
    [
        ("llama", "auto", "fused"),
        ("gpt2", "auto", "modules"),
        ("gemma2", "auto", "modules"),
        ("llama", "padded", "padded"),
    ],
)
def test_the_path_is_chosen_by_architecture(name: str, wish: str, found: str) -> None:
    engine = engine_for(build(name), wish)
    assert engine.path == found
    assert engine.reason


def test_a_path_that_cannot_run_says_why() -> None:
    with pytest.raises(GenerationError, match=r"RF4032.*gpt2"):
        engine_for(build("gpt2"), "fused")
    module = build()
    module.model.layers[0].mlp.up_proj.register_forward_hook(lambda *_: None)
    with pytest.raises(GenerationError, match=r"RF4032.*up_proj has forward hooks"):
        engine_for(module, "fused")
    assert engine_for(module).path == "modules"


def test_a_model_whose_own_attention_drops_the_softcap_is_refused() -> None:
    module = build("gemma2")
    module.config._attn_implementation = "sdpa"  # what transformers before 5.21 chooses
    with pytest.raises(GenerationError, match="RF4045"):
        engine_for(module)
    module.set_attn_implementation("eager")
    assert engine_for(module).path == "modules"


@pytest.mark.parametrize("eos_ids", [3, None, [None], "</s>", [2.0], [1 << 63]])
def test_eos_ids_that_are_none_are_refused(eos_ids: Any) -> None:
    with pytest.raises(GenerationError, match="RF4046"):
        HybridEngine(build(), eos_ids=eos_ids)


# ---- training beside generation -----------------------------------------------------------------


def train(module: nn.Module, steps: int, path: str | None) -> list[list[list[int]]]:
    """`steps` of AdamW on random tokens, each followed by a rollout if there is a path."""
    engine = None if path is None else engine_for(module, path)
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-2)
    generator = torch.Generator().manual_seed(3)
    seen = []
    for _ in range(steps):
        ids = torch.randint(3, VOCAB, (2, 9), generator=generator)
        module(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if engine is not None:
            rollout = engine.generate(
                batch_of(ragged(3)), SamplingParams(5), samples_per_prompt=2, seeds=seeds_for(6)
            )
            seen.append(rollout.response_ids())
    return seen


def test_training_is_bit_identical_with_and_without_generation(path: str) -> None:
    alone, together = build(), build()
    train(alone, 50, None)
    rollouts = train(together, 50, path)
    for name, parameter in together.named_parameters():
        assert torch.equal(parameter, alone.get_parameter(name)), name
    assert sum(a != b for a, b in itertools.pairwise(rollouts)) > 40


# ---- pages --------------------------------------------------------------------------------------

SAMPLING = SamplingParams(17, temperature=1.2)


@pytest.mark.parametrize("pages", [9, 12, 20])
@pytest.mark.parametrize("temperature", [0.0, 1.2])
def test_samples_survive_preemption(path: str, pages: int, temperature: float) -> None:
    module, sampling = build(), SamplingParams(17, temperature=temperature)
    expected = run(module, ragged(), sampling, group=3, path=path, eos_ids=[])
    engine = HybridEngine(
        module,
        eos_ids=[],
        settings=EngineSettings(
            path=path, page_size=4, poison=True, kv_bytes=bytes_of_pages(pages)
        ),
    )
    rollout = engine.generate(
        batch_of(ragged()), sampling, samples_per_prompt=3, seeds=seeds_for(18)
    )
    assert rollout.response_ids() == expected.response_ids()
    torch.testing.assert_close(
        rollout.rollout_logprobs, expected.rollout_logprobs, atol=2e-5, rtol=1e-4
    )


def test_wrong_expectations_end_in_preemption_not_in_a_failure() -> None:
    module = build()
    # Everybody is believed to stop at once, so all are admitted, and all go on to the limit.
    requests = [Request(tuple(p), SAMPLING, (s,), 1.0) for s, p in enumerate(ragged())]
    engines = [
        HybridEngine(
            module,
            eos_ids=[],
            settings=EngineSettings(page_size=4, poison=True, kv_bytes=bytes_of_pages(pages)),
        )
        for pages in (1000, 12)
    ]
    assert engines[0].last is None
    free, tight = (engine.complete(requests) for engine in engines)
    peaks = [engine.last.peak_cache_use for engine in engines if engine.last is not None]
    assert 0 < peaks[0] < peaks[1] <= 1  # type: ignore[operator]
    assert peaks[1] > 0.9  # type: ignore[operator]
    assert engines[0].preemptions == 0
    assert engines[1].preemptions > 3
    assert torch.equal(free.tokens, tight.tokens)
    assert torch.equal(free.lengths, tight.lengths)


@pytest.mark.parametrize("prefill_tokens", [1, 3, 7, 8192])
def test_chunked_prefill_changes_nothing(path: str, prefill_tokens: int) -> None:
    module = build()
    expected = run(module, ragged(), SAMPLING, group=2, path="padded")
    rollout = run(
        module, ragged(), SAMPLING, group=2, path=path, settings={"prefill_tokens": prefill_tokens}
    )
    assert rollout.response_ids() == expected.response_ids()


@pytest.mark.parametrize("burst", [1, 2, 5, 16])
def test_bursts_change_nothing(path: str, burst: int) -> None:
    module = build()
    expected = run(module, ragged(), SAMPLING, group=2, path="padded")
    rollout = run(
        module,
        ragged(),
        SAMPLING,
        group=2,
        path=path,
        settings={"burst": burst, "max_batch": 5},
    )
    assert rollout.response_ids() == expected.response_ids()
    assert torch.equal(rollout.ended, expected.ended)


def test_samples_of_one_prompt_share_its_pages() -> None:
    prompt, engine = list(range(3, 19)), engine_for(build(), "fused")
    used = []
    engine.on_progress = lambda p: used.append(p.cache_use * p.running)
    pages = []

    def watch(_: Any) -> None:
        cache = engine._runner.cache  # type: ignore[union-attr]
        assert cache is not None
        pages.append(cache.allocator.used_pages)

    engine.on_progress = watch
    engine.generate(batch_of([prompt]), SamplingParams(3), samples_per_prompt=8, seeds=range(8))
    # 16 prompt tokens fill 4 pages, held once; every sample has a page for its own tokens.
    assert max(pages) <= 4 + 8


def test_equal_prompts_of_different_requests_share_their_prefill() -> None:
    module, tokens = build(), []
    engine = engine_for(module, "modules")
    module.register_forward_pre_hook(
        lambda _, args, kwargs: tokens.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    prompt = tuple(range(3, 15))
    out = engine.complete([Request(prompt, SamplingParams(4), (s,)) for s in (1, 2, 3)])
    assert tokens[0] == len(prompt)
    assert len({tuple(row) for row in out.tokens.tolist()}) > 1


def test_all_pages_return_and_poisoned_ones_are_never_read(path: str) -> None:
    engine = engine_for(build(), path, max_batch=5)
    for round_ in range(3):
        rollout = engine.generate(
            batch_of(ragged(8, seed=round_)), SAMPLING, samples_per_prompt=2, seeds=seeds_for(16)
        )
        cache = engine._runner.cache  # type: ignore[union-attr]
        assert cache is not None
        assert cache.allocator.used_pages == 0
        assert cache.allocator.live_handles == 0
        cache.allocator.check()
        assert bool(cache._storage[:, :, 1:].isnan().all())  # everything was freed, so poisoned
        assert bool(rollout.rollout_logprobs.isfinite().all())


def test_a_budget_too_small_for_one_sample_is_refused_before_anything_runs(path: str) -> None:
    engine = engine_for(build(), path, kv_bytes=bytes_of_pages(3))
    seen: list[Any] = []
    engine.on_progress = seen.append
    with pytest.raises(GenerationError, match=r"(?s)RF4007.*16 tokens.*text of prompt 1"):
        engine.generate(
            batch_of([[3], list(range(3, 10))]),
            SamplingParams(10),
            samples_per_prompt=1,
            seeds=[0, 1],
        )
    assert not seen
    tiny = engine_for(build(), path, kv_bytes=10)
    with pytest.raises(GenerationError, match=r"RF4007.*one page"):
        tiny.generate(batch_of([[3]]), SamplingParams(2), samples_per_prompt=1, seeds=[0])


# ---- requests -----------------------------------------------------------------------------------


def test_every_request_has_settings_of_its_own(path: str) -> None:
    module = build()
    settings = [
        SamplingParams(5, temperature=0.0),
        SamplingParams(12, temperature=0.7),
        SamplingParams(9, temperature=1.3, top_k=5),
        SamplingParams(14, top_p=0.7, stop_token_ids=(7, 9, 11)),
        SamplingParams(3, min_p=0.2),
        SamplingParams(1, temperature=2.0),
    ]
    prompts = ragged()
    together = engine_for(module, path).complete(
        [
            Request(tuple(p), sampling, (s,))
            for s, (p, sampling) in enumerate(zip(prompts, settings, strict=True))
        ]
    )
    for s, (prompt, sampling) in enumerate(zip(prompts, settings, strict=True)):
        alone = engine_for(module, path).complete([Request(tuple(prompt), sampling, (s,))])
        n = int(alone.lengths)
        assert int(together.lengths[s]) == n <= sampling.max_new_tokens
        assert together.tokens[s, :n].tolist() == alone.tokens[0, :n].tolist()
        torch.testing.assert_close(
            together.logprobs[s, :n], alone.logprobs[0, :n], atol=2e-5, rtol=0
        )
        assert bool(together.ended[s]) == bool(alone.ended[0])


def test_log_probs_of_what_was_drawn_and_of_the_policy(path: str) -> None:
    sampling = SamplingParams(12, temperature=0.8, top_k=4)
    prompts = ragged()
    module = build()
    out = engine_for(module, path).complete(
        [Request(tuple(p), sampling, (s,)) for s, p in enumerate(prompts)]
    )
    for s, prompt in enumerate(prompts):
        n = int(out.lengths[s])
        ids = torch.tensor([*prompt, *out.tokens[s, :n].tolist()])
        with torch.no_grad():
            logits = module.eval()(input_ids=ids[None]).logits[0, -n - 1 : -1] / 0.8
        drawn = out.tokens[s, :n, None]
        raw = logits.log_softmax(-1).gather(-1, drawn)[:, 0]
        kept = logits.where(logits >= logits.topk(4).values[:, -1:], -torch.inf)
        processed = kept.log_softmax(-1).gather(-1, drawn)[:, 0]
        torch.testing.assert_close(out.raw_logprobs[s, :n], raw, atol=1e-5, rtol=0)
        torch.testing.assert_close(out.logprobs[s, :n], processed, atol=1e-5, rtol=0)


def test_samples_follow_the_policys_distribution(path: str) -> None:
    module, count = build(), 4000
    prompt = [5, 9, 4]
    out = engine_for(module, path).complete(
        [Request(tuple(prompt), SamplingParams(1, temperature=1.5), tuple(range(count)))]
    )
    with torch.no_grad():
        logits = module.eval()(input_ids=torch.tensor([prompt])).logits[0, -1].double()
    expected = (logits / 1.5).softmax(-1) * count
    counts = torch.bincount(out.tokens[:, 0], minlength=VOCAB).double()
    often = expected >= 5
    statistic = ((counts - expected)[often] ** 2 / expected[often]).sum()
    degrees = int(often.sum()) - 1
    # Wilson-Hilferty: the cube root of chi-square / degrees is nearly normal; 4 sigma.
    spread = 2 / (9 * degrees)
    assert float((statistic / degrees) ** (1 / 3)) < 1 - spread + 4 * spread**0.5


def test_finished_samples_are_reported_while_others_go_on(path: str) -> None:
    engine = engine_for(build(), path)
    reports: list[list[int]] = []
    lengths: dict[int, int] = {}

    def finished(samples: list[int], out: Any) -> None:
        reports.append(samples)
        lengths.update({s: int(out.lengths[s]) for s in samples})

    engine.on_finished = finished
    rollout = engine.generate(
        batch_of(ragged(8)), SamplingParams(20, temperature=1.5), samples_per_prompt=1,
        seeds=seeds_for(8),
    )  # fmt: skip
    assert len(reports) > 1
    assert sorted(s for report in reports for s in report) == list(range(8))
    assert [lengths[s] for s in range(8)] == rollout.lengths.tolist()


def test_a_peft_adapter_takes_part_and_is_what_training_updates() -> None:
    peft = pytest.importorskip("peft")
    base = build()
    module = peft.get_peft_model(
        base, peft.LoraConfig(r=2, target_modules=["q_proj", "up_proj"], init_lora_weights=False)
    ).eval()
    engine = engine_for(module)
    greedy = SamplingParams(8, temperature=0.0)
    request = {"samples_per_prompt": 1, "seeds": seeds_for(6)}
    rollout = engine.generate(batch_of(ragged()), greedy, **request)
    for s, expected in enumerate(trainer_logprobs(module, rollout)):
        got = rollout.rollout_logprobs[s, : len(expected)].tolist()
        assert got == pytest.approx(expected, abs=1e-5)
    with module.disable_adapter():
        plain = engine.generate(batch_of(ragged()), greedy, **request)
    assert plain.response_ids() != rollout.response_ids()


def test_admission_learns_lengths_and_takes_them_through_a_checkpoint() -> None:
    engine = engine_for(build())
    prompts = batch_of(ragged(4))
    request = {"samples_per_prompt": 2, "seeds": seeds_for(8)}
    rollout = engine.generate(prompts, SamplingParams(20, temperature=1.5), **request)
    means = rollout.lengths.view(4, 2).double().mean(1).tolist()
    assert [engine.expected[uid] for uid in prompts.uid] == means
    resumed = ExpectedLengths()
    resumed.load_state_dict(json.loads(json.dumps(engine.expected.state_dict())))
    assert dict(resumed) == dict(engine.expected)
    resumed.observe([prompts.uid[0]], [0, 0])
    assert resumed[prompts.uid[0]] == means[0] / 2


@pytest.mark.parametrize("path", ["fused", "padded"])
def test_reports_that_are_not_due_are_not_made(path: str) -> None:
    engine = engine_for(build(), path, max_batch=4)
    seen: list[Any] = []
    engine.on_progress = seen.append
    engine.progress_seconds = 3600.0
    rollout = engine.generate(
        batch_of(ragged(6)), SamplingParams(9), samples_per_prompt=2, seeds=seeds_for(12)
    )
    tokens = int(rollout.lengths.sum())
    assert len(seen) == 2  # the first, and the last whatever the clock says
    assert seen[-1][:5] == (12, 12, tokens, 0, 0)
    assert engine.last is not None
    assert engine.last.tokens == tokens
    assert engine.last.tokens_per_second > 0


def test_a_job_that_finds_no_room_lends_its_logits_to_nobody(path: str) -> None:
    """Of two jobs of one prefill, one starts two samples and the other none: two rows, two jobs."""
    module = build()
    full = Request((5, 6, 7, 8), SamplingParams(4, temperature=0.0), (1, 2))
    begun = Request((9, 10, 11, 12, 13), SamplingParams(3, temperature=0.0), (3,))
    tight = engine_for(module, path, kv_bytes=bytes_of_pages(5)).complete([full, begun])
    alone = engine_for(module, path).complete([full])
    for sample in range(2):
        length = int(alone.lengths[sample])
        assert tight.tokens[sample, :length].tolist() == alone.tokens[sample, :length].tolist()
        torch.testing.assert_close(tight.raw_logprobs[sample], alone.raw_logprobs[sample])


@pytest.mark.parametrize(
    "size", [{"max_batch": 0}, {"prefill_tokens": 0}, {"page_size": -1}, {"max_batch": 2.5}]
)
def test_sizes_with_which_nothing_can_run_are_refused(size: dict[str, Any]) -> None:
    with pytest.raises(GenerationError, match=rf"RF4038[\s\S]*{next(iter(size))}"):
        EngineSettings(**size)
