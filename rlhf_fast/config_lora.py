"""Settings of LoRA mode: one frozen trunk, an adapter for each role (docs/lora.md)."""

from __future__ import annotations

from dataclasses import dataclass

from rlhf_fast.config_setting import setting

ALL_LINEAR = "all-linear"


@dataclass(frozen=True)
class AdapterConfig:
    """Train a LoRA adapter on a frozen model instead of the model."""

    rank: int = setting(0, "rank of new adapters; 0 is off: full fine-tuning", low=0)
    alpha: float = setting(16.0, "an adapter's output is scaled by alpha / rank", above=0)
    targets: list[str] = setting(
        [ALL_LINEAR],
        "layers with an adapter, by the end of their names; all-linear: those of the blocks",
    )
    merge_on_export: bool = setting(
        False, "export a merged full model, made on a copy, and the adapter beside it"
    )


@dataclass(frozen=True)
class LoraConfig(AdapterConfig):
    """Adapters of actor, critic and reward model on one frozen trunk, the actor's directory."""

    actor_adapter: str = setting(
        "",
        "peft directory the actor starts from, with its own rank, alpha and targets; a frozen "
        "copy is the reference. Empty: a new adapter, and the bare trunk is the reference",
    )
    reward_adapter: str = setting(
        "", "peft directory with a score head: the reward model, and where the critic starts"
    )


def adapter_violations(lora: AdapterConfig) -> list[str]:
    """Every fault within the section."""
    if lora.rank == 0:
        names = ("actor_adapter", "reward_adapter", "merge_on_export")
        used = [name for name in names if getattr(lora, name, False)]
        return [f"lora.{name} is set but lora.rank=0: take a rank of at least 1" for name in used]
    if not lora.targets:
        return [f"lora.targets is empty: name layers, or {ALL_LINEAR}"]
    if ALL_LINEAR in lora.targets and len(lora.targets) > 1:
        return [f"lora.targets has {ALL_LINEAR} and more: take one or the other"]
    return []


def lora_violations(
    lora: LoraConfig, *, estimator: str, critic: str, reward_model: str
) -> list[str]:
    """Faults of the section together with what else of a PPO config it touches."""
    if lora.rank == 0:
        return []
    faults = []
    if critic and estimator == "gae":
        faults.append(
            f"critic={critic} with lora.rank={lora.rank}: the critic lives on the actor's trunk; "
            "leave it empty"
        )
    if lora.reward_adapter and reward_model:
        faults.append("lora.reward_adapter and reward.model are both set: keep one")
    return faults
