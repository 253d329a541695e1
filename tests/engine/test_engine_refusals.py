"""What the engine must notice: models that are not what they seem, and models that change."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import nn

from rlhf_fast.engine.host_memory import available_host_memory
from rlhf_fast.engine.hybrid import HybridEngine
from rlhf_fast.engine.requests import Request
from rlhf_fast.engine.settings import EngineSettings
from rlhf_fast.errors import GenerationError
from rlhf_fast.models.forward import enable_gradient_checkpointing, set_compute_dtype
from rlhf_fast.types import SamplingParams
from tests.engine.test_generator import PATHS, batch_of, build, ragged, run, trainer_logprobs
from tests.engine.test_hybrid import bytes_of_pages, engine_for

GREEDY = SamplingParams(6, temperature=0.0)


def patch_mlp(module: Any) -> None:
    mlp = module.model.layers[1].mlp
    stock = mlp.forward
    mlp.forward = lambda x: 2 * stock(x)


def bias_on_one(module: Any) -> None:
    for layer in module.model.layers:
        old = layer.self_attn.k_proj
        layer.self_attn.k_proj = nn.Linear(old.in_features, old.out_features, bias=True)


def share_between_layers(module: Any) -> None:
    first, second = module.model.layers
    second.self_attn.q_proj.weight = first.self_attn.q_proj.weight


def overlap(module: Any) -> None:
    first, second = module.model.layers
    second.mlp.up_proj.weight.data = first.mlp.up_proj.weight.data


def transposed_head(module: Any) -> None:
    module.lm_head.weight.data = module.lm_head.weight.data.t().contiguous().t()


def scaled_embedding(module: Any) -> None:
    class Doubled(nn.Embedding):
        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(ids)

    old = module.model.embed_tokens
    module.model.embed_tokens = Doubled(*old.weight.shape)
    module.model.embed_tokens.weight = old.weight


def epsilon_of_one(module: Any) -> None:
    module.model.layers[1].post_attention_layernorm.variance_epsilon = 0.5


def short_rows(module: Any) -> None:
    module.model.embed_tokens.max_norm = 0.1


CHANGES = [
    patch_mlp, bias_on_one, share_between_layers, overlap, transposed_head, scaled_embedding,
    epsilon_of_one, short_rows,
]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_a_model_that_is_not_stock_runs_through_its_modules(
    change: Callable[[Any], None],
) -> None:
    module = build()
    change(module)
    engine = engine_for(module)
    assert engine.path == "modules"
    rollout = engine.generate(batch_of(ragged()), GREEDY, samples_per_prompt=1, seeds=range(6))
    for s, expected in enumerate(trainer_logprobs(module, rollout)):
        got = rollout.rollout_logprobs[s, : len(expected)].tolist()
        assert got == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize(
    ("name", "change", "code"),
    [
        ("qwen2-tied", lambda m: setattr(m.lm_head, "weight", nn.Parameter(
            m.lm_head.weight.detach().clone())), "RF4031"),
        ("gpt2", lambda m: m.double(), "RF4031"),
        ("gpt2", lambda m: set_compute_dtype(m, "bfloat16"), "RF4031"),
        ("qwen3", lambda m: set_compute_dtype(m, "bfloat16"), "RF4031"),
    ],
)  # fmt: skip
def test_a_change_after_the_engine_was_made_is_refused(
    name: str, change: Callable[[Any], Any], code: str
) -> None:
    module = build(name)
    engine = engine_for(module)
    change(module)
    with pytest.raises(GenerationError, match=code):
        engine.generate(batch_of([[3, 4]]), GREEDY, samples_per_prompt=1, seeds=[0])


@pytest.mark.parametrize(
    "change", [patch_mlp, lambda m: m.model.norm.register_forward_hook(lambda *x: 2 * x[-1])]
)
def test_hooks_and_patches_put_on_later_take_part(change: Callable[[Any], Any]) -> None:
    module = build()
    engine, fused = engine_for(module), engine_for(module, "fused")
    request = {"samples_per_prompt": 1, "seeds": range(6)}
    engine.generate(batch_of(ragged()), GREEDY, **request)
    change(module)
    rollout = engine.generate(batch_of(ragged()), GREEDY, **request)
    assert engine.path == "modules"
    assert engine.attention is None
    for s, expected in enumerate(trainer_logprobs(module, rollout)):
        got = rollout.rollout_logprobs[s, : len(expected)].tolist()
        assert got == pytest.approx(expected, abs=1e-5)
    with pytest.raises(GenerationError, match="RF4032"):
        fused.generate(batch_of(ragged()), GREEDY, **request)


def epsilons(module: Any) -> None:
    for part in module.modules():
        if hasattr(part, "variance_epsilon"):
            part.variance_epsilon = 0.5


def sharper(module: Any) -> None:
    module.model.layers[0].self_attn.scaling = 2.0


def slower(module: Any) -> None:
    module.model.rotary_emb.inv_freq.mul_(0.25)


def larger_tables(module: Any) -> None:
    module.model.rotary_emb.attention_scaling = 1.5


@pytest.mark.parametrize("change", [epsilons, sharper, slower, larger_tables])
@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_numbers_of_modules_are_read_anew_in_every_rollout(
    name: str, change: Callable[[Any], None]
) -> None:
    module = build(name)
    engine = engine_for(module, "fused")
    request = {"samples_per_prompt": 1, "seeds": range(6)}
    engine.generate(batch_of(ragged()), GREEDY, **request)
    change(module)
    rollout = engine.generate(batch_of(ragged()), GREEDY, **request)
    for s, expected in enumerate(trainer_logprobs(module, rollout)):
        got = rollout.rollout_logprobs[s, : len(expected)].tolist()
        assert got == pytest.approx(expected, abs=2e-5)


@pytest.mark.parametrize("path", ["auto", "modules", "padded"])
def test_a_compiled_model_generates_as_it_trains(path: str) -> None:
    module = build()
    compiled: Any = torch.compile(module, backend="eager")
    rollout = engine_for(compiled, path).generate(
        batch_of(ragged()), GREEDY, samples_per_prompt=1, seeds=range(6)
    )
    for s, expected in enumerate(trainer_logprobs(module, rollout)):
        got = rollout.rollout_logprobs[s, : len(expected)].tolist()
        assert got == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("path", ["auto", *(path for path in PATHS if path != "fused")])
def test_a_float64_model_generates(path: str) -> None:
    module = build().double()
    rollout = engine_for(module, path).generate(
        batch_of(ragged()), GREEDY, samples_per_prompt=1, seeds=range(6)
    )
    for s, expected in enumerate(trainer_logprobs(module, rollout)):
        got = rollout.rollout_logprobs[s, : len(expected)].tolist()
        assert got == pytest.approx(expected, abs=1e-6)


def checkpointed_by_transformers(module: Any) -> None:
    module.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})


def asking_for_gradients(module: Any) -> None:
    module.enable_input_require_grads()


@pytest.mark.parametrize(
    "change", [enable_gradient_checkpointing, checkpointed_by_transformers, asking_for_gradients]
)
@pytest.mark.parametrize("adapted", [False, True])
def test_gradient_checkpointing_leaves_the_fused_forward(
    change: Callable[[Any], None], adapted: bool
) -> None:
    module = build()
    model: Any = peft.get_peft_model(module, peft.LoraConfig(r=2)) if adapted else module
    engine = engine_for(model, "fused")
    request = {"samples_per_prompt": 1, "seeds": range(6)}
    expected = engine.generate(batch_of(ragged()), GREEDY, **request)
    change(model)
    model.train()
    found = engine.generate(batch_of(ragged()), GREEDY, **request)
    assert torch.equal(found.rollout_logprobs, expected.rollout_logprobs)


def test_prompt_learning_is_refused() -> None:
    peft = pytest.importorskip("peft")
    module = peft.get_peft_model(
        build(), peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    )
    with pytest.raises(GenerationError, match=r"RF4003.*tokens before the prompt"):
        engine_for(module)


@pytest.mark.parametrize("path", ["fused", "modules", "padded"])
def test_a_callers_autocast_changes_nothing_for_a_float32_model(path: str) -> None:
    module = build()
    plain = run(module, ragged(3), GREEDY, path=path)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = run(module, ragged(3), GREEDY, path=path)
    assert torch.equal(inside.rollout_logprobs, plain.rollout_logprobs)


@pytest.mark.parametrize("path", ["fused", "modules", "padded"])
@pytest.mark.parametrize("length", [1, 3])
def test_a_stop_string_completed_by_the_last_token_ends_the_sample(path: str, length: int) -> None:
    module, prompt = build(), [[5, 6]]
    free = run(module, prompt, SamplingParams(length, temperature=0.0), eos_ids=[], path=path)
    last = free.response_ids()[0][-1]
    rollout = run(
        module,
        prompt,
        SamplingParams(length, temperature=0.0, stop_strings=(f"<{last}>",)),
        eos_ids=[],
        decode=lambda batch: ["".join(f"<{i}>" for i in ids) for ids in batch],
        path=path,
    )
    assert rollout.ended.tolist() == [True]


def test_a_group_starts_as_far_as_pages_reach_instead_of_giving_way() -> None:
    settings = EngineSettings(page_size=4, poison=True, kv_bytes=bytes_of_pages(12))
    engine = HybridEngine(build(), eos_ids=[], settings=settings)
    sampling = SamplingParams(17)
    requests = [Request(tuple(p), sampling, tuple(range(8)), 17.0) for p in ragged(2)]
    tight = engine.complete(requests)
    assert engine.preemptions == 0
    roomy = HybridEngine(build(), eos_ids=[], settings=EngineSettings()).complete(requests)
    assert torch.equal(tight.tokens, roomy.tokens)


def test_the_padded_path_keeps_to_the_budget_too() -> None:
    engine = engine_for(build(), "padded", kv_bytes=bytes_of_pages(2))
    with pytest.raises(GenerationError, match="RF4007"):
        engine.generate(batch_of([[3, 4, 5]]), GREEDY, samples_per_prompt=1, seeds=[0])


def test_available_memory_counts_page_cache_and_a_containers_limit(tmp_path: Path) -> None:
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal: 90 kB\nMemFree: 10 kB\nMemAvailable: 70 kB\n")
    assert available_host_memory(meminfo, tmp_path) == 70 * 1024
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "memory.current").write_text("1000\n")
    assert available_host_memory(meminfo, tmp_path) == 70 * 1024
    (tmp_path / "memory.max").write_text("5000\n")
    assert available_host_memory(meminfo, tmp_path) == 4000
    assert available_host_memory() > 0
