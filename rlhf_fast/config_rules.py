"""The rules a config is held to: type, bounds and choices of each leaf, then rules across keys.

`violations()` returns every fault at once, so that a user corrects a config in one round.
"""

from __future__ import annotations

from collections.abc import Collection

from rlhf_fast.config import EvalConfig, PPOConfig, StageConfig, leaves
from rlhf_fast.config_lora import adapter_violations, lora_violations
from rlhf_fast.config_setting import leaf_violation, type_violation


def violations(config: StageConfig, *, given: Collection[str] = ()) -> list[str]:
    """Every fault of a config: type, bounds and choices of each leaf, then rules across keys.

    Args:
        config: of any stage.
        given: keys that may be empty because their object is at hand: `reward`, `ptx.data`.
    """
    found = [type_violation(k, v, f) for k, v, f in leaves(config)]
    if any(found):
        return [v for v in found if v is not None]  # the rules below compute with the values
    found = [leaf_violation(k, v, f.metadata) for k, v, f in leaves(config)]
    faults = [v for v in found if v is not None]
    known = ("tensorboard", "wandb", "trackio")
    faults += [
        f"run.sinks: unknown sink {s!r}: expected {', '.join(known)}"
        for s in config.run.sinks
        if s not in known
    ]
    if config.run.overwrite and (config.run.resume_step >= 0 or config.run.resume == "always"):
        faults.append("run.overwrite excludes run.resume=always and run.resume_step: keep one")
    if config.run.resume == "never" and config.run.resume_step >= 0:
        faults.append("run.resume=never excludes run.resume_step: keep one")
    if not isinstance(config, EvalConfig):
        faults += adapter_violations(config.lora)
    if isinstance(config, PPOConfig):
        faults += _ppo_violations(config, given)
    if isinstance(config, EvalConfig):
        faults += [
            f"best_of has {n}: expected 1 to samples_per_prompt={config.samples_per_prompt}"
            for n in config.best_of
            if not 1 <= n <= config.samples_per_prompt
        ]
    return faults


def _ppo_violations(config: PPOConfig, given: Collection[str]) -> list[str]:
    faults = []
    rollout, algorithm = config.rollout, config.algorithm
    samples = rollout.prompts * rollout.samples_per_prompt
    if samples % algorithm.minibatches:
        divisors = [n for n in range(1, samples + 1) if samples % n == 0]
        near = sorted(sorted(divisors, key=lambda n: abs(n - algorithm.minibatches))[:2])
        faults.append(
            f"algorithm.minibatches={algorithm.minibatches} does not divide rollout.prompts="
            f"{rollout.prompts} x rollout.samples_per_prompt={rollout.samples_per_prompt}: "
            f"take {' or '.join(map(str, near))}"
        )
    if algorithm.estimator in ("rloo", "grpo") and rollout.samples_per_prompt < 2:
        faults.append(
            f"algorithm.estimator={algorithm.estimator} needs rollout.samples_per_prompt of at "
            f"least 2, got {rollout.samples_per_prompt}"
        )
    if 0 < algorithm.dual_clip <= 1:
        faults.append(f"algorithm.dual_clip={algorithm.dual_clip}: expected 0 (off) or more than 1")
    if config.sampling.temperature == 0:
        faults.append(
            "sampling.temperature=0: PPO needs samples, take more than 0 (0.7 to 1.0 usual)"
        )
    judged = config.reward.model or config.reward.function or config.lora.reward_adapter
    if not (judged or "reward" in given):
        faults.append("reward.model and reward.function are both empty: name at least one")
    if config.ptx.coef > 0 and not (config.ptx.data or "ptx.data" in given):
        faults.append("ptx.coef is set but ptx.data is empty: name the pretraining rows")
    if config.kl.adaptive and config.kl.coef == 0:
        faults.append("kl.adaptive with kl.coef=0: a multiplicative controller never leaves 0")
    if config.kl.estimator == "exact" and config.kl.placement == "reward":
        estimator = algorithm.estimator
        others = [] if estimator == "gae" else [f"algorithm.estimator={estimator}"]
        others += ["reward.whiten"] if config.reward.whiten else []
        faults += [
            f"kl.estimator=exact in the reward is not defined with {other}: take kl.placement=loss"
            for other in others
        ]
    faults += _anchor_violations(config)
    longest = config.data.max_prompt_length + config.sampling.max_new_tokens
    if longest > config.data.max_length:
        faults.append(
            f"data.max_prompt_length={config.data.max_prompt_length} + sampling.max_new_tokens="
            f"{config.sampling.max_new_tokens} exceeds data.max_length={config.data.max_length}"
        )
    faults += lora_violations(
        config.lora,
        estimator=algorithm.estimator,
        critic=config.critic,
        reward_model=config.reward.model,
    )
    return faults + _memory_violations(config, given)


def _anchor_violations(config: PPOConfig) -> list[str]:
    """Log-probs of the generator as the anchor: their ratio is capped, and a forward is saved."""
    algorithm = config.algorithm
    if algorithm.old_logprobs != "rollout":
        return []
    faults = []
    if algorithm.rollout_correction <= 1:
        faults.append(
            "algorithm.old_logprobs=rollout needs algorithm.rollout_correction above 1, got "
            f"{algorithm.rollout_correction}: nothing else bounds the ratio to the generator where "
            "advantages are negative (2 usual)"
        )
    if config.memory.value_head == "actor":
        faults.append(
            "algorithm.old_logprobs=rollout with memory.value_head=actor saves nothing: the values "
            "come from the actor's forward, take recompute"
        )
    if config.kl.estimator == "exact" and config.kl.placement == "reward":
        faults.append(
            "algorithm.old_logprobs=rollout with kl.estimator=exact in the reward saves nothing: "
            "the exact KL reads the actor's forward, take recompute"
        )
    return faults


def _memory_violations(config: PPOConfig, given: Collection[str]) -> list[str]:
    faults, memory, algorithm = [], config.memory, config.algorithm
    shared = memory.value_head == "actor"
    if shared and algorithm.estimator != "gae":
        faults.append(
            f"memory.value_head=actor with algorithm.estimator={algorithm.estimator}, which has no "
            "critic: take gae, or memory.value_head=separate"
        )
    if shared and config.critic:
        faults.append("memory.value_head=actor excludes critic: its head starts at zero, keep one")
    if shared and config.lora.rank > 0:
        faults.append(
            "memory.value_head=actor excludes lora.rank: the critic's adapter is on the actor's "
            "trunk already"
        )
    if memory.reference == "offload" and config.lora.rank > 0 and not config.reference:
        faults.append(
            "memory.reference=offload with lora.rank and no reference: the reference is the trunk "
            "without adapters, there is none to offload"
        )
    known = config.reward.model or "reward" in given
    if memory.reward_model == "offload" and not known:
        faults.append("memory.reward_model=offload without reward.model: there is none to offload")
    if memory.step_in_backward:
        faults += [f"memory.step_in_backward {fault}" for fault in _step_in_backward_faults(config)]
    return faults


def _step_in_backward_faults(config: PPOConfig) -> list[str]:
    """A gradient that is applied as it is made can be neither scaled, added to nor taken back."""
    faults = []
    optims = {"actor_optim": config.actor_optim}
    if config.algorithm.estimator == "gae" and config.memory.value_head == "separate":
        optims["critic_optim"] = config.critic_optim
    for name, optim in optims.items():
        if optim.max_grad_norm > 0:
            faults.append(
                f"needs {name}.max_grad_norm=0, got {optim.max_grad_norm}: the norm is known only "
                "after the last gradient"
            )
    samples = config.rollout.prompts * config.rollout.samples_per_prompt
    length = config.data.max_prompt_length + config.sampling.max_new_tokens
    largest = -(-samples // config.algorithm.minibatches) * length
    if largest > config.microbatch_tokens:
        faults.append(
            f"needs a minibatch that is one microbatch: {samples} samples in "
            f"algorithm.minibatches={config.algorithm.minibatches} of up to {length} tokens each "
            f"are up to {largest} tokens, microbatch_tokens={config.microbatch_tokens}: raise "
            "either"
        )
    if config.algorithm.target_kl > 0:
        faults.append(
            "excludes algorithm.target_kl: the step it would call off has been taken by then"
        )
    if config.ptx.coef > 0:
        faults.append("excludes ptx.coef: its gradients come from a second backward")
    return faults
