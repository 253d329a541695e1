"""Generation from sharded parameters: the tokens of one process, and what the ranks exchange."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard

from rlhf_fast.distributed.placement import ADJACENT
from rlhf_fast.distributed.world import World
from rlhf_fast.engine.hybrid import HybridEngine
from rlhf_fast.engine.requests import Completions, Request
from rlhf_fast.engine.settings import EngineSettings
from rlhf_fast.engine.sharded_views import WeightView
from rlhf_fast.engine.twin import put, twin_of
from rlhf_fast.engine.view_choice import choose_view
from rlhf_fast.engine.view_gather import GatherView
from rlhf_fast.engine.view_tp import slice_of
from rlhf_fast.errors import GenerationError
from rlhf_fast.models.forward import set_compute_dtype
from rlhf_fast.types import SamplingParams
from tests.distributed.ranks import on_ranks
from tests.engine.architectures import tiny
from tests.engine.test_fused_lora import trunk_of
from tests.engine.test_generator import EOS, build, ragged
from tests.engine.watching import Seen, watched

GREEDY = SamplingParams(6, temperature=0.0)
FILTERED = SamplingParams(6, temperature=1.1, top_k=12, top_p=0.9, min_p=0.01)
SAMPLERS = [GREEDY, SamplingParams(7, temperature=0.8), FILTERED]
ODD_VOCABULARY = 61


def llama(vocab: int = ODD_VOCABULARY, **more: Any) -> nn.Module:
    module: nn.Module = tiny("llama", **{"vocab_size": vocab, "num_key_value_heads": 4, **more})
    return module


MODELS: dict[str, Callable[[], nn.Module]] = {
    "llama": llama,
    "llama-bias": lambda: llama(attention_bias=True, mlp_bias=True),
    "qwen2-tied": lambda: tiny("qwen2", num_key_value_heads=4, tie_word_embeddings=True),
    "qwen3": lambda: tiny("qwen3", num_key_value_heads=4),
}


def _local(whole: Tensor, dim: int, world: World) -> Tensor:
    pieces = whole.chunk(world.shards, dim)
    if world.shard_rank < len(pieces):
        return pieces[world.shard_rank].contiguous()
    return whole.narrow(dim, 0, 0).contiguous()


def sharded(module: nn.Module, world: World, *, slices: bool = True, adjacent: bool = True) -> Any:
    """The module with parameters cut over the ranks, by itself: no FSDP is needed to generate.

    `slices`: along the dims of tensor parallelism, vectors whole; else all along dim 0. `adjacent`:
    the parts of fused projections lie side by side.
    """
    result = copy.deepcopy(module)
    for name, parameter in list(result.named_parameters()):
        dim = slice_of(name, 0).dim if slices else 0
        if dim is not None:
            _cut(result, name, parameter, _local(parameter.detach(), dim, world), dim, world)
    if adjacent:
        _join(result, world)
    return result


def _cut(
    module: nn.Module, name: str, whole: Tensor, local: Tensor, dim: int, world: World
) -> None:
    cut = DTensor.from_local(
        *(local, world.shard_mesh, [Shard(dim)]),
        run_check=False,
        shape=whole.shape,
        stride=whole.stride(),
    )
    put(module, name, cut)


def _join(module: nn.Module, world: World) -> None:
    named = dict(module.named_parameters())
    for first, *others in ADJACENT:
        for name in list(named):
            if f".{first}." not in name or "lora" in name or name.endswith("bias"):
                continue
            for kind in ("weight", "bias"):
                names = [
                    name.replace(f".{first}.", f".{other}.").replace(".weight", f".{kind}")
                    for other in (first, *others)
                ]
                parts = [named[n].to_local() for n in names if n in named]
                if not parts:
                    continue
                joined = torch.cat([p.detach() for p in parts])
                views = joined.split([len(p) for p in parts])
                for n, view in zip(names, views, strict=True):
                    _cut(module, n, named[n], view, 0, world)


def engine_over(view: WeightView, **settings: Any) -> HybridEngine:
    return _engine(view.module, view, **settings)


def _engine(module: nn.Module, view: WeightView | None = None, **settings: Any) -> HybridEngine:
    chosen = EngineSettings(page_size=4, poison=True, **settings)
    return HybridEngine(module, eos_ids=[EOS], settings=chosen, view=view)


def drawn_by(engine: HybridEngine, count: int = 4, expected: float | None = None) -> Completions:
    """Two samples each of the first prompts, greedy, plain and filtered ones side by side."""
    requests = [
        Request(tuple(prompt), SAMPLERS[i % len(SAMPLERS)], (2 * i, 2 * i + 1), expected)
        for i, prompt in enumerate(ragged()[:count])
    ]
    return engine.complete(requests)


def assert_same(got: Completions, expected: Completions) -> None:
    assert torch.equal(got.lengths, expected.lengths)
    assert torch.equal(got.ended, expected.ended)
    real = torch.arange(got.tokens.shape[1]) < got.lengths[:, None]
    assert torch.equal(got.tokens[real], expected.tokens[real])
    for name in ("logprobs", "raw_logprobs"):
        ours, theirs = getattr(got, name)[real], getattr(expected, name)[real]
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def entered(view: WeightView) -> tuple[Seen, int]:
    """What it takes to switch to generation, and the bytes that the view holds then."""
    with ExitStack() as inside:
        with watched() as seen:
            inside.enter_context(view.reading())
        return seen, view.nbytes


# ---- tp -----------------------------------------------------------------------------------------


def _tensor_parallel(world: World, names: list[str]) -> dict[str, Any]:
    facts: dict[str, Any] = {}
    for name in names:
        module = MODELS[name]()
        trained = sharded(module, world)
        view = choose_view(trained, twin_of(module), world)
        engine = engine_over(view)
        reference = _engine(module)
        assert (view.name, engine.path, reference.path) == ("tp", "fused", "fused"), view.reason
        # What the optimizer writes is what is generated from: no copy exists.
        with torch.no_grad():
            for part in trained.parameters():
                (part.to_local() if isinstance(part, DTensor) else part).mul_(1.25)
            for whole in module.parameters():
                whole.mul_(1.25)
        assert_same(drawn_by(engine), drawn_by(reference))
        seen, held = entered(view)
        facts[name] = (held, seen.collectives, seen.moved, seen.allocated)
    return facts


@pytest.mark.parametrize(("ranks", "names"), [(2, [*MODELS]), (4, ["llama", "qwen2-tied"])])
def test_slices_generate_the_tokens_of_one_process_and_a_switch_moves_nothing(
    ranks: int, names: list[str]
) -> None:
    for facts in on_ranks(ranks, _tensor_parallel, names):
        assert facts == dict.fromkeys(names, (0, [], 0, 0))


def _gather_watched(world: World) -> tuple[Seen, int, int, int]:
    module = llama()
    whole = choose_view(sharded(module, world), twin_of(module), world, "gather")
    assert isinstance(whole, GatherView)
    seen, held = entered(whole)
    scattered = sharded(module, world, adjacent=False)
    copies, copied = entered(choose_view(scattered, twin_of(module), world, "tp"))
    assert (copies.collectives, copies.moved) == ([], 0)
    assert copies.allocated >= copied > 0
    return (
        seen,
        whole.gatherer.gathered_bytes,
        held,
        4 * sum(p.numel() for p in module.parameters()),
    )


def test_a_switch_that_gathers_or_copies_is_seen_with_its_bytes() -> None:
    """Else the zeros of the test above would say nothing."""
    for seen, gathered, held, size in on_ranks(2, _gather_watched):
        assert seen.collectives == ["c10d::allreduce_", *["c10d::_allgather_base_"] * 3]
        # A rank gives each gather its half and room for both; one number is agreed on before.
        assert seen.moved == 3 * gathered + 8
        # Biases and vectors are whole on every rank; the rest comes from the other one by half.
        assert 0.4 * size < gathered < 0.6 * size
        assert seen.allocated >= held >= size


def _tensor_parallel_corners(world: World) -> dict[str, Any]:
    facts: dict[str, Any] = {}
    module = llama()
    reference = drawn_by(_engine(module))
    # Pages for one sample and a little, and lengths that were expected to be short: samples give
    # way, on all ranks at the same moment.
    view = choose_view(sharded(module, world), twin_of(module), world)
    token = 2 * 2 * (4 // world.shards) * 8 * 4
    engine = engine_over(view, kv_bytes=(9 + world.rank) * 4 * token)
    assert_same(drawn_by(engine, expected=1.0), reference)
    facts["preemptions"] = engine.preemptions
    # Chunks of prefill, bursts and one row a rank at most.
    engine = engine_over(view, prefill_tokens=3, burst=4, max_batch=1)
    assert_same(drawn_by(engine), reference)
    # Projections that do not lie side by side, vectors that are sharded: copied and gathered.
    scattered = sharded(module, world, adjacent=False)
    norm = scattered.model.norm.weight
    _cut(scattered, "model.norm.weight", norm, _local(norm.detach(), 0, world), 0, world)
    copied = choose_view(scattered, twin_of(module), world, "tp")
    engine = engine_over(copied)
    assert_same(drawn_by(engine), reference)
    facts["released"] = copied.nbytes
    # fp32 masters under bf16: operands of products in bf16 for a rollout, tied heads apart; the
    # rest is read where it lies.
    half = MODELS["qwen2-tied"]()
    set_compute_dtype(half, "bfloat16")
    low = choose_view(sharded(half, world), twin_of(half), world)
    whole = choose_view(sharded(half, world, slices=False), twin_of(half), world, "gather")
    reference = drawn_by(_engine(half))
    for view in (low, whole):
        got = drawn_by(engine_over(view))
        first = got.raw_logprobs[:, 0] - reference.raw_logprobs[:, 0]
        facts[f"bf16 {view.name}"] = float(first.abs().max())
    facts["bf16 residual"] = str(low.module.get_input_embeddings().weight.dtype)
    operands = sum(p.numel() for n, p in half.named_parameters() if n.endswith("proj.weight"))
    operands += half.get_input_embeddings().weight.numel()
    with low.reading():
        facts["bf16 bytes"] = low.nbytes / (2 * operands / world.shards)
    # A shard that moved is an error, not old weights.
    trained = sharded(module, world)
    moved = choose_view(trained, twin_of(module), world)
    engine = engine_over(moved)
    with torch.no_grad():
        weight = trained.model.layers[0].self_attn.o_proj.weight
        weight._local_tensor = weight._local_tensor.clone()
    with pytest.raises(GenerationError, match="RF4031"):
        drawn_by(engine)
    return facts


def test_slices_under_preemption_in_chunks_copied_and_in_bf16() -> None:
    for facts in on_ranks(2, _tensor_parallel_corners):
        assert facts["preemptions"] > 0
        assert facts["released"] == 0
        # Biases, and padding between groups, are all there is beside the operands.
        assert 1.0 <= facts["bf16 bytes"] < 1.3
        assert facts["bf16 residual"] == "torch.float32"
        assert facts["bf16 tp"] < 0.05
        assert facts["bf16 gather"] == 0.0


# ---- gather and layerwise -----------------------------------------------------------------------


def _gathered(world: World) -> dict[str, Any]:
    facts: dict[str, Any] = {}
    for name, make in {
        "llama": lambda: llama(num_key_value_heads=2, num_attention_heads=2),
        "qwen2-tied": lambda: build("qwen2-tied"),
        "qwen3": MODELS["qwen3"],
        "gpt2": lambda: build("gpt2"),
    }.items():
        module = make()
        trained = sharded(module, world, slices=False, adjacent=False)
        view = choose_view(trained, twin_of(module), world)
        engine = engine_over(view)
        facts[name] = (view.name, engine.path, view.reason, view.nbytes)
        reference = _engine(module)
        # Every rank has prompts and lengths of its own, and one has none.
        assert_same(drawn_by(engine, world.rank), drawn_by(reference, world.rank))
        with view.reading():
            whole = sum(4 * p.numel() for p in module.parameters())
            facts[f"{name} held"] = view.nbytes / whole
        slow = engine_over(choose_view(trained, twin_of(module), world, "layerwise"))
        assert slow.path == "modules"
        assert_same(drawn_by(slow, 2), drawn_by(reference, 2))
    return facts


def test_gathered_weights_let_ranks_take_different_numbers_of_steps() -> None:
    for facts in on_ranks(4, _gathered):
        assert facts["llama"][:2] == ("gather", "fused")
        assert facts["llama"][2].endswith("2 attention heads do not divide into 4 shards")
        assert facts["qwen3"][2].endswith("is cut along dim 0, not cut along dim 1")
        assert facts["gpt2"][:2] == ("gather", "modules")
        for name in ("llama", "qwen2-tied", "qwen3", "gpt2"):
            assert facts[name][3] == 0
            assert 1.0 <= facts[f"{name} held"] < 1.1


def _adapters(world: World) -> list[str]:
    trunk = trunk_of("llama-bias", ["all-linear"], ["actor", "critic"])
    module = trunk.model
    bare = drawn_by(_engine(module))
    names = []
    with trunk.adapter("actor"):
        reference = drawn_by(_engine(module))
        assert not torch.equal(reference.raw_logprobs, bare.raw_logprobs)
        for slices in (True, False):
            trained = sharded(module, world, slices=slices, adjacent=slices)
            view = choose_view(trained, twin_of(module), world)
            # Whichever is active later: the twin has one for good.
            with trunk.adapter("critic"):
                assert_same(drawn_by(engine_over(view)), reference)
            names.append(view.name)
            # Nothing is held or gathered of the adapters that do not generate.
            held = {name for name, _ in view.module.named_parameters() if ".lora_" in name}
            assert held == {
                f"{key[: -len('.weight')]}.actor.weight" for key in trunk.tensors("actor")
            }
    # A trunk in bf16 is read where it lies; only its fp32 parts that enter products are copied.
    trunk = trunk_of("llama", ["all-linear"])
    set_compute_dtype(trunk.model, "bfloat16")
    with trunk.adapter("actor"):
        twin = twin_of(trunk.model)
        trunk.hold_in(torch.bfloat16)
        low = choose_view(sharded(trunk.model, world), twin, world)
        reference = drawn_by(_engine(trunk.model))
        gaps = drawn_by(engine_over(low)).raw_logprobs[:, 0] - reference.raw_logprobs[:, 0]
    assert float(gaps.abs().max()) < 0.05
    assert (
        low.module.get_input_embeddings().weight.dtype
        is trunk.model.get_input_embeddings().weight.dtype
    )
    return names


def test_adapters_take_part_in_both_views() -> None:
    assert on_ranks(2, _adapters) == [["tp", "gather"]] * 2


def _refusals(world: World) -> None:
    module = build("gpt2")
    trained = sharded(module, world, slices=False, adjacent=False)
    for wish, why in (("tp", "no fused forward for gpt2"), ("zero", "no weight view")):
        with pytest.raises(GenerationError, match=f"RF4037[\\s\\S]*{why}"):
            choose_view(trained, twin_of(module), world, wish)
    sliced = llama()
    parts = sharded(sliced, world)
    view = choose_view(parts, twin_of(sliced), world)
    for path in ("modules", "padded"):
        with pytest.raises(GenerationError, match="RF4037"):
            engine_over(view, path=path)
    whole = choose_view(parts, twin_of(sliced), world, path="modules")
    assert (whole.name, engine_over(whole, path="modules").path) == ("gather", "modules")


def test_a_view_that_cannot_run_is_refused_with_the_reason() -> None:
    on_ranks(2, _refusals)
