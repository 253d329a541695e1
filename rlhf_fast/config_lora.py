"""Settings of LoRA mode: one frozen trunk, an adapter for each role (docs/lora.md)."""

from __future__ import annotations

from dataclasses import dataclass

from rlhf_fast.config_setting import setting

ALL_LINEAR = "all-linear"


@dataclass(frozen=True)
class LoraConfig:
    """Adapters of actor, critic and reward model on one frozen trunk, the actor's directory."""

    rank: int = setting(0, "rank of new adapters; 0 is off: full fine-tuning", low=0)
    alpha: float = setting(16.0, "an adapter's output is scaled by alpha / rank", above=0)
    targets: list[str] = setting(
        [ALL_LINEAR],
        "layers with an adapter, by the end of their names; all-linear: those of the blocks",
    )
    actor_adapter: str = setting(
        "",
        "peft directory the actor starts from, with its own rank, alpha and targets; a frozen "
        "copy is the reference. Empty: a new adapter, and the bare trunk is the reference",
    )
    reward_adapter: str = setting(
        "", "peft directory with a score head: the reward model, and where the critic starts"
    )
    merge_on_export: bool = setting(
        False, "export a merged full model beside the adapter; made on a copy"
    )


def lora_violations(
    lora: LoraConfig, *, estimator: str, critic: str, reward_model: str
) -> list[str]:
    """Every fault of the section, given what else of a PPO config it touches."""
    faults = []
    if lora.rank == 0:
        used = [
            name
            for name in ("actor_adapter", "reward_adapter", "merge_on_export")
            if getattr(lora, name)
        ]
        return [f"lora.{name} is set but lora.rank=0: take a rank of at least 1" for name in used]
    if not lora.targets:
        faults.append(f"lora.targets is empty: name layers, or {ALL_LINEAR}")
    if ALL_LINEAR in lora.targets and len(lora.targets) > 1:
        faults.append(f"lora.targets has {ALL_LINEAR} and more: take one or the other")
    if critic and estimator == "gae":
        faults.append(
            f"critic={critic} with lora.rank={lora.rank}: the critic lives on the actor's trunk; "
            "leave it empty"
        )
    if lora.reward_adapter and reward_model:
        faults.append("lora.reward_adapter and reward.model are both set: keep one")
    return faults
