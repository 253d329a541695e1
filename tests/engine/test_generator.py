"""Generation against transformers' `generate`, against itself in other batches, and abused.

Every path of the engine meets the same contract: the fused forward, the modules over pages,
transformers' continuous batching, and the padded generator.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GemmaConfig,
    GemmaForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from rlhf_fast.engine.batching import pad_left, plan_batches
from rlhf_fast.engine.hybrid import HybridEngine
from rlhf_fast.engine.progress import Progress
from rlhf_fast.engine.settings import EngineSettings
from rlhf_fast.engine.transformers_path import version_fault
from rlhf_fast.errors import GenerationError
from rlhf_fast.models.forward import set_compute_dtype
from rlhf_fast.protocols import Generator
from rlhf_fast.seeds import derive_seed
from rlhf_fast.types import PackedSequences, PromptBatch, Rollout, SamplingParams

VOCAB, POSITIONS, EOS = 61, 48, 2
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": POSITIONS,
    "initializer_range": 0.3,
    "eos_token_id": EOS,
    "bos_token_id": 1,
    "pad_token_id": 0,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
FAMILIES: dict[str, Callable[[], nn.Module]] = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SIZES)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SIZES, head_dim=8)),
    "qwen2-tied": lambda: Qwen2ForCausalLM(Qwen2Config(**SIZES, tie_word_embeddings=True)),
    "llama-bias": lambda: LlamaForCausalLM(
        LlamaConfig(**SIZES, attention_bias=True, mlp_bias=True, rope_parameters=LLAMA3_ROPE)
    ),
    "gpt2": lambda: GPT2LMHeadModel(
        GPT2Config(
            vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=4, n_positions=POSITIONS,
            initializer_range=0.3, eos_token_id=EOS, bos_token_id=1, pad_token_id=0,
        )
    ),
    "gpt_neox": lambda: GPTNeoXForCausalLM(
        GPTNeoXConfig(**{**SIZES, "num_key_value_heads": 4}, rotary_pct=0.5)
    ),
    "opt": lambda: OPTForCausalLM(
        OPTConfig(
            vocab_size=VOCAB, hidden_size=32, ffn_dim=48, num_hidden_layers=2, dropout=0.0,
            num_attention_heads=4, max_position_embeddings=POSITIONS, init_std=0.3,
            word_embed_proj_dim=32, eos_token_id=EOS, bos_token_id=1, pad_token_id=0,
        )
    ),
    "gemma": lambda: GemmaForCausalLM(GemmaConfig(**SIZES, head_dim=8)),
    # Windows, softcaps of scores and logits, norms on both sides of a block.
    "gemma2": lambda: Gemma2ForCausalLM(
        Gemma2Config(
            **SIZES, head_dim=8, sliding_window=5, attn_logit_softcapping=2.0,
            final_logit_softcapping=3.0, query_pre_attn_scalar=8, attn_implementation="eager",
        )
    ),
    # Two rotary tables: one for windows, one for full attention.
    "gemma3": lambda: Gemma3ForCausalLM(
        Gemma3TextConfig(
            **SIZES, head_dim=8, sliding_window=5,
            layer_types=["sliding_attention", "full_attention"],
        )
    ),
    # A window shorter than the prompts: transformers' own cache layers carry it.
    "mistral": lambda: MistralForCausalLM(MistralConfig(**SIZES, sliding_window=5)),
}  # fmt: skip


FUSED = ("llama", "llama-bias", "mistral", "qwen2", "qwen2-tied", "qwen3")
# (path, family): what each path can run, without repeating all of it on the slower ones.
RUNS = [
    *(("fused", name) for name in FUSED),
    *(("modules", name) for name in FAMILIES if name != "llama-bias"),
    *(("transformers", name) for name in ("llama", "mistral", "gpt2") if version_fault() is None),
    *(("padded", name) for name in ("llama", "mistral", "gpt2")),
]
PATHS = tuple(dict.fromkeys(path for path, _ in RUNS))
# These compute in bf16 over fp32 weights.
OVER_MASTERS = ("fused", "modules", "padded")


@pytest.fixture(params=PATHS)
def path(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def build(name: str = "llama", seed: int = 0) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return FAMILIES[name]()


def batch_of(prompts: list[list[int]]) -> PromptBatch:
    n = len(prompts)
    return PromptBatch(
        PackedSequences.from_lists(prompts),
        tuple(range(100, 100 + n)),
        ({},) * n,
        tuple(f"text of prompt {i}" for i in range(n)),
    )


def ragged(n: int = 6, seed: int = 1) -> list[list[int]]:
    g = torch.Generator().manual_seed(seed)
    sizes = torch.randint(1, 14, (n,), generator=g).tolist()
    return [torch.randint(3, VOCAB, (size,), generator=g).tolist() for size in sizes]


def seeds_for(count: int) -> list[int]:
    return [derive_seed(0, 0, s, 0) for s in range(count)]


def run(
    module: nn.Module,
    prompts: list[list[int]],
    sampling: SamplingParams,
    group: int = 1,
    path: str = "auto",
    settings: dict[str, Any] | None = None,
    **options: Any,
) -> Rollout:
    chosen = EngineSettings(path=path, page_size=4, poison=True, **(settings or {}))
    generator = HybridEngine(module, **{"eos_ids": [EOS], "settings": chosen, **options})
    return generator.generate(
        batch_of(prompts),
        sampling,
        samples_per_prompt=group,
        seeds=seeds_for(len(prompts) * group),
    )


def trainer_logprobs(module: Any, rollout: Rollout, temperature: float = 1.0) -> list[list[float]]:
    """Teacher-forced log-probs of each response: one unpadded forward a sample, fp32."""
    rows, sequences = [], rollout.sequences()
    for s, n in enumerate(rollout.lengths.tolist()):
        ids = sequences.select([s]).ids
        with torch.no_grad():
            logits = module.eval()(input_ids=ids[None]).logits[0].float() / temperature
        table = torch.log_softmax(logits, -1)[-n - 1 : -1]
        rows.append(table.gather(-1, ids[-n:, None]).squeeze(-1).tolist())
    return rows


@pytest.mark.parametrize(("path", "name"), RUNS)
@pytest.mark.parametrize("max_batch", [256, 4])
def test_greedy_equals_transformers_generate(path: str, name: str, max_batch: int) -> None:
    module, prompts = build(name), ragged()
    rollout = run(
        module,
        prompts,
        SamplingParams(20, temperature=0.0),
        path=path,
        settings={"max_batch": max_batch},
    )
    padded = pad_left(batch_of(prompts).sequences, range(len(prompts)), torch.device("cpu"))
    expected = module.eval().generate(
        padded.ids,
        attention_mask=padded.mask.long(),
        max_new_tokens=20,
        do_sample=False,
        eos_token_id=EOS,
        pad_token_id=0,
    )[:, padded.ids.shape[1] :]
    for row, ids in enumerate(rollout.response_ids()):
        theirs = expected[row].tolist()
        stop = theirs.index(EOS) + 1 if EOS in theirs else len(theirs)
        assert ids == theirs[:stop]
        assert bool(rollout.ended[row]) == (EOS in theirs)


@pytest.mark.parametrize(("path", "name"), RUNS)
def test_a_sample_does_not_depend_on_its_batch(path: str, name: str) -> None:
    module, prompts = build(name), ragged(5)
    sampling = SamplingParams(16, temperature=0.9)
    together, alone = (
        run(module, prompts, sampling, group=3, path=path, settings={"max_batch": size})
        for size in (64, 1)
    )
    assert together.response_ids() == alone.response_ids()
    torch.testing.assert_close(
        together.rollout_logprobs, alone.rollout_logprobs, atol=2e-5, rtol=1e-4
    )
    assert len({tuple(r) for r in together.response_ids()}) > 10  # seeds do differ


def test_longrope_follows_each_sample_and_not_its_batch() -> None:
    rope = {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "factor": 4.0,
        "short_factor": [1.0, 1.5, 2.0, 2.5],
        "long_factor": [3.0, 5.0, 7.0, 9.0],
        "original_max_position_embeddings": 20,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = LlamaForCausalLM(LlamaConfig(**SIZES, rope_parameters=rope))
    # Below the limit to the end, and beyond it from the first token on.
    prompts = [[5] * 6, list(range(4, 28)), [7, 8, 9]]
    rollout = run(module, prompts, SamplingParams(8), path="auto")
    for s, expected in enumerate(trainer_logprobs(module, rollout)):
        got = rollout.rollout_logprobs[s, : len(expected)].tolist()
        assert got == pytest.approx(expected, abs=2e-5)


def test_order_of_prompts_changes_nothing(path: str) -> None:
    module, prompts = build(), ragged(8)
    generator = HybridEngine(module, eos_ids=[EOS], settings=EngineSettings(path=path, max_batch=3))
    order = [5, 2, 7, 0, 1, 6, 4, 3]
    sampling, seeds = SamplingParams(12), seeds_for(8)
    straight = generator.generate(
        batch_of(prompts), sampling, samples_per_prompt=1, seeds=seeds
    ).response_ids()
    shuffled = generator.generate(
        batch_of([prompts[i] for i in order]),
        sampling,
        samples_per_prompt=1,
        seeds=[seeds[i] for i in order],
    ).response_ids()
    assert shuffled == [straight[i] for i in order]


@pytest.mark.parametrize(("path", "name"), RUNS)
def test_rollout_logprobs_equal_the_trainers(path: str, name: str) -> None:
    module = build(name)
    sampling = SamplingParams(14, temperature=0.7, top_k=20, top_p=0.9, min_p=0.01)
    rollout = run(module, ragged(), sampling, group=2, path=path)
    # In fp64: the stock fp32 forward is up to 9e-6 off itself.
    exact = copy.deepcopy(module).double()
    for s, expected in enumerate(trainer_logprobs(exact, rollout, 0.7)):
        got = rollout.rollout_logprobs[s, : len(expected)].tolist()
        assert got == pytest.approx(expected, abs=1e-5)


def test_bfloat16_autocast_stays_near_float32(path: str) -> None:
    module = build()
    set_compute_dtype(module, "bfloat16")
    path = path if path in OVER_MASTERS else "modules"
    rollout = run(module, ragged(), SamplingParams(12), group=2, path=path)
    flat = [x for row in trainer_logprobs(build(), rollout) for x in row]
    gap = (rollout.rollout_logprobs[rollout.response_mask] - torch.tensor(flat)).abs()
    assert 0 < float(gap.mean()) < 0.1  # bf16 was really used, and is near


def test_shape_and_mask_contract(path: str) -> None:
    module = build()
    rollout = run(module, ragged(10), SamplingParams(30, temperature=1.5), group=4, path=path)
    assert rollout.lengths.max() == rollout.responses.shape[1]
    assert 0 < int(rollout.ended.sum()) < len(rollout)
    for s, n in enumerate(rollout.lengths.tolist()):
        ids = rollout.responses[s].tolist()
        assert rollout.response_mask[s].tolist() == [t < n for t in range(len(ids))]
        assert ids[n:] == [0] * (len(ids) - n)
        assert (ids[n - 1] == EOS) == bool(rollout.ended[s])
        assert EOS not in ids[: n - 1]
        assert bool((rollout.rollout_logprobs[s, :n] < 0).all())
        assert bool((rollout.rollout_logprobs[s, n:] == 0).all())
        assert bool(rollout.ended[s]) or n == 30


def _always(module: Any, token: int) -> Any:
    """Make a Llama say one token whatever it reads."""
    with torch.no_grad():
        module.model.norm.weight.zero_()
        module.lm_head = nn.Linear(module.config.hidden_size, VOCAB, bias=True)
        module.lm_head.bias.fill_(-100.0)
        module.lm_head.bias[token] = 100.0
    return module


def test_eos_first_gives_a_response_of_length_one(path: str) -> None:
    rollout = run(_always(build(), EOS), ragged(3), SamplingParams(10), group=2, path=path)
    assert rollout.responses.tolist() == [[EOS]] * 6
    assert rollout.lengths.tolist() == [1] * 6
    assert bool(rollout.ended.all())
    assert bool(rollout.rollout_logprobs.isfinite().all())


def test_no_eos_runs_to_the_limit_and_is_not_ended(path: str) -> None:
    rollout = run(_always(build(), 9), ragged(3), SamplingParams(10), path=path)
    assert rollout.lengths.tolist() == [10] * 3
    assert not bool(rollout.ended.any())


def test_stop_token_ids_end_a_response_and_stay_in_it(path: str) -> None:
    rollout = run(
        _always(build(), 9), ragged(3), SamplingParams(10, stop_token_ids=(9,)), path=path
    )
    assert rollout.responses.tolist() == [[9]] * 3
    assert bool(rollout.ended.all())


def _letters(batch: list[list[int]]) -> list[str]:
    return ["".join(chr(ord("a") + i % 26) * (1 + i % 2) for i in ids) for ids in batch]


def test_stop_strings_cut_right_after_the_completing_token(path: str) -> None:
    module, prompts = build(), ragged(8)
    free = run(module, prompts, SamplingParams(25, temperature=1.2), eos_ids=[], path=path)
    text = _letters(free.response_ids())
    stop = text[0][9:12]  # spans several tokens, ends anywhere inside one
    sampling = SamplingParams(25, temperature=1.2, stop_strings=("nowhere", stop))
    rollout = run(module, prompts, sampling, eos_ids=[], decode=_letters, path=path)
    assert bool(rollout.ended[0])
    for row, ids in enumerate(free.response_ids()):
        cuts = [t for t in range(1, 26) if stop in _letters([ids[:t]])[0]]
        length = cuts[0] if cuts else 25
        assert rollout.response_ids()[row] == ids[:length]
        assert bool(rollout.ended[row]) == bool(cuts)


def test_stop_strings_without_a_decoder_are_refused(path: str) -> None:
    with pytest.raises(GenerationError, match="RF4002"):
        run(build(), ragged(1), SamplingParams(3, stop_strings=("x",)), path=path)


def test_modes_come_back_even_after_an_exception(path: str) -> None:
    module = build()
    module.train()
    module.model.layers[0].eval()
    before = [part.training for part in module.modules()]

    def fail(progress: Progress) -> None:
        raise KeyboardInterrupt

    run(module, ragged(2), SamplingParams(3), path=path)
    assert [part.training for part in module.modules()] == before
    with pytest.raises(KeyboardInterrupt):
        run(module, ragged(2), SamplingParams(3), on_progress=fail, path=path)
    assert [part.training for part in module.modules()] == before


def test_modes_come_back_if_the_interrupt_comes_while_they_are_set(
    path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = build()
    module.train()
    stock = type(module).eval

    def interrupted(part: nn.Module) -> None:
        stock(part)
        raise KeyboardInterrupt

    monkeypatch.setattr(type(module), "eval", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(module, ragged(2), SamplingParams(3), path=path)
    assert all(part.training for part in module.modules())


def test_dropout_is_off(path: str) -> None:
    config = LlamaConfig(**SIZES, attention_dropout=0.5)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = LlamaForCausalLM(config)
    module.train()
    first = run(module, ragged(3), SamplingParams(8), path=path)
    assert (
        first.response_ids() == run(module, ragged(3), SamplingParams(8), path=path).response_ids()
    )


def test_training_works_after_generating_under_inference_mode_and_outer_autocast(path: str) -> None:
    module = build()
    with torch.inference_mode():
        run(module, ragged(2), SamplingParams(3), path=path)
    set_compute_dtype(module, "bfloat16")
    path = path if path in OVER_MASTERS else "modules"
    with torch.autocast("cpu", dtype=torch.bfloat16):
        run(module, ragged(2), SamplingParams(3), path=path)
        module(input_ids=torch.tensor([[3, 4, 5]])).logits.float().sum().backward()
    assert all(p.grad is not None for p in module.parameters())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_generation_sees_every_weight_change(path: str, dtype: Any) -> None:
    path = path if path in OVER_MASTERS or dtype == "float32" else "modules"
    greedy = SamplingParams(6, temperature=0.0)

    def negated(module: Any) -> Any:
        with torch.no_grad():
            for p in module.parameters():
                p.mul_(-1.0)
        return module

    module, fresh = build(), negated(build())
    for each in (module, fresh):
        set_compute_dtype(each, dtype)
    engine = HybridEngine(module, eos_ids=[], settings=EngineSettings(path=path))

    def ids() -> list[list[int]]:
        prompts = batch_of(ragged(2))
        rollout = engine.generate(prompts, greedy, samples_per_prompt=1, seeds=[0, 0])
        return rollout.response_ids()

    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == "bfloat16"):
        old = ids()
        negated(module)
        new = ids()
    expected = run(fresh, ragged(2), greedy, eos_ids=[], path=path).response_ids()
    assert new == expected != old


def test_global_random_state_is_untouched(path: str) -> None:
    state = torch.get_rng_state()
    run(build(), ragged(2), SamplingParams(5), path=path)
    assert torch.equal(torch.get_rng_state(), state)


def test_progress_counts_up_to_everything(path: str) -> None:
    seen: list[Progress] = []
    rollout = run(
        build(),
        ragged(5),
        SamplingParams(20, temperature=1.5),
        group=2,
        path=path,
        settings={"max_batch": 4},
        on_progress=seen.append,
    )
    assert [p.finished for p in seen] == sorted(p.finished for p in seen)
    assert seen[-1][:3] == (10, 10, int(rollout.lengths.sum()))
    if path != "padded":
        assert max(p.running for p in seen) == 4
        assert (seen[0].waiting, seen[-1].waiting) == (6, 0)
    if path in ("fused", "modules"):
        assert 0 < max(p.cache_use for p in seen) <= 1
        assert seen[-1].cache_use == 0


def test_from_tokenizer_reads_both_sources_of_eos(path: str) -> None:
    class Tokenizer:
        eos_token_id = 7

    module = build()
    module.generation_config.eos_token_id = [2, 5]
    assert HybridEngine.from_tokenizer(
        module, Tokenizer(), settings=EngineSettings(path=path)
    ).eos_ids == (2, 5, 7)


def test_satisfies_the_protocol_and_stamps_the_weight_version(path: str) -> None:
    generator = HybridEngine(
        build(), eos_ids=[EOS], weight_version=lambda: 41, settings=EngineSettings(path=path)
    )
    assert isinstance(generator, Generator)
    rollout = generator.generate(
        batch_of([[3]]), SamplingParams(2), samples_per_prompt=1, seeds=[5]
    )
    assert rollout.weight_version == 41


def test_weights_changed_during_a_rollout_are_an_error(path: str) -> None:
    versions = iter(range(100))
    with pytest.raises(GenerationError, match="RF4008"):
        run(build(), ragged(2), SamplingParams(2), path=path, weight_version=lambda: next(versions))


def test_an_empty_batch_is_legal(path: str) -> None:
    rollout = run(build(), [], SamplingParams(5), path=path)
    assert len(rollout) == 0


def test_non_finite_weights_abort_with_the_prompt_and_the_parameter(path: str) -> None:
    module = build()
    with torch.no_grad():
        module.model.layers[1].mlp.up_proj.weight[0, 0] = math.nan
    with pytest.raises(GenerationError) as caught:
        run(module, ragged(3), SamplingParams(5), group=2, path=path)
    message = str(caught.value)
    assert caught.value.code == "RF4010"
    for part in ("model.layers.1.mlp.up_proj.weight", "response token 0", "uid 10", "text of"):
        assert part in message


def test_non_finite_logits_of_one_token_abort_at_its_step(path: str) -> None:
    # Token 9 leads to a NaN embedding: the first step is sound, the second is not.
    module = _always(build(), 9)
    module.model.norm.weight.data.fill_(1.0)
    module.lm_head.weight.data.mul_(1e-3)
    module.model.embed_tokens.weight.data[9] = math.nan
    with pytest.raises(GenerationError, match="response token 1"):
        run(module, [[3, 4]], SamplingParams(5), path=path)


@pytest.mark.parametrize(
    ("code", "arguments"),
    [
        ("RF4001", {"sampling": SamplingParams(5, top_p=2.0)}),
        ("RF4004", {"seeds": [1]}),
        ("RF4004", {"samples_per_prompt": 0, "seeds": []}),
        ("RF4005", {"prompts": batch_of([[3], []])}),
        ("RF4006", {"prompts": batch_of([[3], [4] * 44])}),
        ("RF4009", {"prompts": batch_of([[3], [4, VOCAB]])}),
    ],
)
def test_bad_requests_name_themselves(path: str, code: str, arguments: dict[str, Any]) -> None:
    request: dict[str, Any] = {
        "prompts": batch_of([[3], [4]]),
        "sampling": SamplingParams(5),
        "samples_per_prompt": 1,
        "seeds": [1, 2],
        **arguments,
    }
    with pytest.raises(GenerationError) as caught:
        HybridEngine(build(), eos_ids=[EOS], settings=EngineSettings(path=path)).generate(**request)
    assert caught.value.code == code
    if code in ("RF4005", "RF4006", "RF4009"):
        assert "prompt 1 (uid 101): 'text of prompt 1'" in str(caught.value)


def test_an_architecture_without_key_value_cache_is_refused_by_name() -> None:
    config = MambaConfig(vocab_size=VOCAB, hidden_size=16, num_hidden_layers=1, state_size=4)
    with pytest.raises(GenerationError, match="MambaForCausalLM"):
        HybridEngine(MambaForCausalLM(config), eos_ids=[EOS])


def test_prompt_of_exactly_the_model_length_is_accepted(path: str) -> None:
    rollout = run(build(), [[5] * (POSITIONS - 6)], SamplingParams(6), eos_ids=[], path=path)
    assert rollout.lengths.tolist() == [6]


def test_plan_shares_prompts_balances_and_respects_the_budget() -> None:
    lengths = [3, 9, 5, 7]
    batches = plan_batches(lengths, 3, 10, max_batch=8)
    assert sorted(s for b in batches for s in b) == list(range(12))
    assert [len(b) for b in batches] == [6, 6]  # not 8 and 4
    assert batches[0] == [3, 4, 5, 9, 10, 11]
    for batch in plan_batches(lengths, 3, 10, max_batch=8, max_batch_tokens=40):
        assert len(batch) * (max(lengths[s // 3] for s in batch) + 10) <= 40
    with pytest.raises(GenerationError, match="RF4007"):
        plan_batches(lengths, 1, 10, max_batch=8, max_batch_tokens=18)
    assert plan_batches([], 2, 10, max_batch=8) == []


def test_left_padding_counts_positions_from_zero() -> None:
    padded = pad_left(PackedSequences.from_lists([[7, 8], [4, 5, 6, 9], [3]]), [2, 1, 0],
                      torch.device("cpu"))  # fmt: skip
    assert padded.ids.tolist() == [[0, 0, 0, 3], [4, 5, 6, 9], [0, 0, 7, 8]]
    assert padded.mask.long().tolist() == [[0, 0, 0, 1], [1, 1, 1, 1], [0, 0, 1, 1]]
    assert padded.positions.tolist() == [[0, 0, 0, 0], [0, 1, 2, 3], [0, 0, 0, 1]]


@pytest.mark.parametrize("path", ["fused", "modules", "padded"])
def test_the_default_device_of_a_program_changes_nothing(path: str) -> None:
    module, prompts = build("llama"), ragged(5)
    want = run(module, prompts, SamplingParams(6, temperature=0.8), group=2, path=path)
    batch, seeds = batch_of(prompts), seeds_for(10)
    torch.set_default_device("meta")  # what is made without a device has no data
    try:
        engine = HybridEngine(module, eos_ids=[EOS], settings=EngineSettings(path=path))
        options = {"samples_per_prompt": 2, "seeds": seeds}
        found = engine.generate(batch, SamplingParams(6, temperature=0.8), **options)
    finally:
        torch.set_default_device(None)
    assert found.response_ids() == want.response_ids()
