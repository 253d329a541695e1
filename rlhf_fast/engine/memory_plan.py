"""Memory of a PPO run before anything is loaded, from config.json of its models.

What exists in which phase, by the rules of docs/memory.md and docs/lora.md:

    load      weights, as the roles are built
    generate  weights, moments (offloaded: in host memory), keys and values, copies (below)
    score     weights, moments (as above); a streamed model while it reads
    update    weights, gradients, moments

and while a role runs: its activations, the logits of a chunk, autocast's copies of its weights.
The fused path copies fp32 weights that enter bf16 products, and adapters, for each rollout;
`engine.keep_memory` holds keys and values and the copy of the weights in the later phases too.
With `engine.overlap_scoring` a role reads finished samples beside the generator.
Microbatches are taken as full, and samples as long as the config allows.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from rlhf_fast.adamw8bit import fresh_state
from rlhf_fast.config import PPOConfig
from rlhf_fast.distributed.gradients import buckets_of
from rlhf_fast.distributed.placement import decoder_layers, vocabulary_modules
from rlhf_fast.engine.memory_activations import ForwardPlan, runs_layer_ops
from rlhf_fast.engine.memory_copies import adapter_copies, weight_copies
from rlhf_fast.engine.memory_ledger import (
    COPIES,
    PAGES,
    PHASES,
    KVPlan,
    Ledger,
    MemoryPlan,
    ShardsAway,
    add,
    host_block,
)
from rlhf_fast.engine.memory_models import ModelConfigs, RolePlan, role_plans
from rlhf_fast.engine.module_forward import cache_shape_of
from rlhf_fast.engine.paged_cache import default_page_size
from rlhf_fast.engine.path_choice import choose_path

Passes = dict[str, dict[str, dict[str, int]]]


def plan_memory(
    config: PPOConfig,
    models: ModelConfigs,
    *,
    roles: Mapping[str, RolePlan] | None = None,
    device: str = "cuda",
    kv_budget: int | None = None,
    longest_prompt: int | None = None,
) -> MemoryPlan:
    """Predict bytes per role, part and phase.

    Args:
        config: of the run.
        models: configs of its models.
        roles: what `role_plans` makes of the two, if it is at hand.
        device: its type decides page sizes, chunks and whether host memory is pinned.
        kv_budget: bytes for keys and values at most, where `engine.kv_gb` does not say; None: no
            limit.
        longest_prompt: tokens, where that is known; None: `data.max_prompt_length`.

    Raises:
        ModelError: as `role_plans`.
    """
    roles = role_plans(config, models) if roles is None else roles
    held = _held(config, roles, pinned=device != "cpu")
    generating = roles["trunk" if "trunk" in roles else "actor"].module
    path = choose_path(generating, config.engine.path)[0]
    passes, notes = _passes(config, roles, device, fused=path == "fused")
    if config.engine.kv_gb:
        kv_budget = int(config.engine.kv_gb * 1e9)
    longest = longest_prompt or config.data.max_prompt_length
    longest += config.sampling.max_new_tokens
    token_bytes = cache_shape_of(generating).token_bytes
    kv = _keys_and_values(config, token_bytes, longest, device, kv_budget)
    if path == "padded":
        # A batch's cache lives and dies in the forward; it grows by an eighth.
        passes["generate"]["generator"]["kv"] = kv.nbytes * 9 // 8
        notes += ("the architecture generates in padded batches: their cache is an estimate",)
    if path == "transformers":
        notes += ("transformers' continuous batching: its pages and masks are not counted",)
    wish = config.engine.overlap_scoring
    if path in ("fused", "modules") and (wish == "on" or (wish == "auto" and device != "cpu")):
        passes["generate"] |= passes["score"]
    keep = config.engine.keep_memory
    # A GPU gets the pages back after each rollout, host memory keeps them for the next.
    for phase in PHASES[1:] if keep or device == "cpu" else ("generate",):
        add(held[phase], *PAGES[:2], kv.nbytes if path in ("fused", "modules") else 0)
    if path == "fused":
        add(held["generate"], *COPIES[:2], adapter_copies(roles["actor"], generating))
        for phase in PHASES[1:] if keep else ("generate",):
            add(held[phase], *COPIES[:2], weight_copies(generating))
    shape = roles["actor"].shape
    assert shape is not None
    embedding, *heads = vocabulary_modules(generating)
    vocabulary = {part.weight for part in (embedding, *heads)}  # tied: one
    return MemoryPlan(
        *(held, passes, kv),
        parameters=sum(p.numel() for p in generating.parameters()),
        vocabulary=sum(weight.numel() for weight in vocabulary),
        embedding=embedding.weight.numel(),
        layers=shape.layers,
        compute=2 if config.run.dtype == "bfloat16" else 4,
        frozen="trunk" in roles,
        adapted=frozenset(name for name, role in roles.items() if role.rank),
        buckets={name: _largest_bucket(role) for name, role in roles.items() if role.trained},
        away={
            name: _away(role.module, pinned=device != "cpu")
            for name, role in roles.items()
            if role.streamed is not None
        },
        notes=notes,
    )


def _away(module: Any, *, pinned: bool) -> ShardsAway:
    layers = decoder_layers(module.base_model)
    inside = set() if layers is None else set(layers.parameters())
    # A scalar head is one row, which nobody can cut.
    cut = [p for p in module.parameters() if p.dim() > 1 and len(p) > 1]
    whole = sum(t.nbytes for t in (*module.parameters(), *module.buffers()))
    whole -= sum(p.nbytes for p in cut)
    rows = sum(p.nbytes for p in cut if p not in inside)
    return ShardsAway(tuple(p.nbytes for p in cut if p in inside), rows, whole, pinned)


def _largest_bucket(role: RolePlan) -> int:
    return max(sum(p.nbytes for p in bucket) for bucket in buckets_of(role.trained))


def _keys_and_values(
    config: PPOConfig, token_bytes: int, longest: int, device: str, budget: int | None
) -> KVPlan:
    size = config.engine.page_size or default_page_size(device)
    samples = config.rollout.prompts * config.rollout.samples_per_prompt
    return KVPlan(token_bytes, size, longest, min(samples, config.rollout.max_batch), budget)


# ---- what exists throughout a phase -------------------------------------------------------------


def _held(config: PPOConfig, roles: Mapping[str, RolePlan], *, pinned: bool) -> dict[str, Ledger]:
    held: dict[str, Ledger] = {phase: {} for phase in PHASES}
    away = config.memory.optimizer_state == "offload"
    for name, role in roles.items():
        moments = [_moments(config, parameter) for parameter in role.trained]
        on_host = sum(host_block(n, pinned) for sizes in moments for n in sizes[1:])
        everywhere = sum(map(sum, moments))
        counters = sum(sizes[0] for sizes in moments)
        for phase in PHASES:
            _add_weights(held[phase], name, role, pinned=pinned)
            if phase == "load":
                continue
            resting = away and phase != "update"
            add(held[phase], name, "moments", counters if resting else everywhere)
            add(held[phase], name, "moments", on_host if away else 0, "host")
        gradients = [parameter.nbytes for parameter in role.trained]
        one = max(gradients, default=0)
        total = one if config.memory.step_in_backward else sum(gradients)
        add(held["update"], name, "gradients", total)
    return held


def _add_weights(ledger: Ledger, name: str, role: RolePlan, *, pinned: bool) -> None:
    if role.streamed is None:
        add(ledger, name, "weights", role.nbytes)
        return
    buffers = sum(b.nbytes for b in role.module.buffers())
    add(ledger, name, "weights", buffers)
    add(ledger, name, "weights", sum(host_block(n, pinned) for n in role.streamed.blocks), "host")


def _moments(config: PPOConfig, parameter: Tensor) -> list[int]:
    """Bytes of each state tensor of a parameter; the step counter, which never moves, first."""
    if config.memory.optimizer == "adamw8bit":
        state = fresh_state(parameter)
        return [state.pop("step").nbytes, *(t.nbytes for t in state.values())]
    return [4, parameter.nbytes, parameter.nbytes]


# ---- what exists while a role runs --------------------------------------------------------------


def _passes(
    config: PPOConfig, roles: Mapping[str, RolePlan], device: str, *, fused: bool
) -> tuple[Passes, tuple[str, ...]]:
    passes: Passes = {phase: {} for phase in PHASES}
    compute = 2 if config.run.dtype == "bfloat16" else 4
    unknown = False
    for name, role in roles.items():
        if role.shape is None:
            continue
        unknown |= not role.shape.known
        plan = ForwardPlan(
            role.shape,
            config.microbatch_tokens,
            compute,
            rank=role.rank,
            adapted=role.adapted,
            checkpointing=config.gradient_checkpointing,
            lean=runs_layer_ops(role.shape, compute, device),
        )
        passes["score"][name] = _scoring(name, role, plan, device)
        if role.trained:
            passes["update"][name] = _updating(config, name, role, plan, device)
    passes["generate"]["generator"] = _generating(config, roles["actor"], compute, fused=fused)
    if config.kl.estimator == "exact":
        _add_exact_kl(config, roles, passes, device)
    notes = ("activations of this architecture are estimates",) if unknown else ()
    return passes, notes


def _scoring(name: str, role: RolePlan, plan: ForwardPlan, device: str) -> dict[str, int]:
    parts = {"activations": plan.without_graph(), "casts": role.casts}
    if name in ("actor", "reference"):
        parts["logits"] = plan.head(device, trained=False)
    if role.streamed is not None:
        parts["streamed"] = role.streamed.device
    return parts


def _updating(
    config: PPOConfig, name: str, role: RolePlan, plan: ForwardPlan, device: str
) -> dict[str, int]:
    parts = {"activations": plan.saved() + plan.recomputed(), "casts": role.casts}
    if name == "actor":
        parts["logits"] = plan.head(device, trained=True)
    return parts


def _generating(config: PPOConfig, actor: RolePlan, compute: int, *, fused: bool) -> dict[str, int]:
    assert actor.shape is not None
    samples = config.rollout.prompts * config.rollout.samples_per_prompt
    rows = min(samples, config.rollout.max_batch)
    tokens = min(config.engine.prefill_tokens, rows * config.data.max_prompt_length)
    plan = ForwardPlan(actor.shape, max(tokens, rows), compute, rank=actor.rank)
    # Decoding calls the head as a layer; scoring and update read it chunk by chunk.
    head = 2 * actor.shape.vocab * actor.shape.width if compute == 2 and not actor.rank else 0
    return {
        "activations": plan.without_graph(),
        # Logits of a decoding step, and what the sampler makes of them.
        "logits": 2 * 4 * rows * actor.shape.vocab,
        "casts": 0 if fused else actor.casts + head,
    }


def _add_exact_kl(
    config: PPOConfig, roles: Mapping[str, RolePlan], passes: Passes, device: str
) -> None:
    """The reference's hidden states, head and logits beside the actor's."""
    actor, reference = roles["actor"], roles["reference"]
    assert actor.shape is not None
    compute = 2 if config.run.dtype == "bfloat16" else 4
    plan = ForwardPlan(actor.shape, config.microbatch_tokens, compute, rank=actor.rank)
    phase = "score" if config.kl.placement == "reward" else "update"
    trained = phase == "update"
    parts = passes[phase]["actor"]
    parts["logits"] = plan.head(device, trained=trained, sides=2)
    parts["activations"] += 4 * plan.tokens * plan.shape.width
    if reference.streamed is not None:
        parts["streamed"] = 4 * plan.shape.vocab * plan.shape.width
        if trained:
            passes[phase]["reference"] = _scoring(
                "reference", reference, dataclasses.replace(plan, rank=0), device
            )
