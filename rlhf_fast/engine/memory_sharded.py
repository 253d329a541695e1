"""What a plan comes to on each of several GPUs.

With one GPU these are the plan's own numbers. With N the state is sharded N ways; this form is not
built yet, and the formulas are those it will be held to (P parameters, L layers, bf16 compute):

    update, score  (held bytes) / N + 4 P / L + what a role needs while it runs
    generate       (held bytes, keys and values) / N + W + what decoding needs

4 P / L is two layers gathered. W, the weights that generation reads, is 0 for one GPU (they alias
those that are trained) and for a frozen trunk in tensor-parallel slices; 2 P / N for such slices of
fp32 weights; 2 P where every GPU gathers the whole model to generate samples of its own.
"""

from __future__ import annotations

from dataclasses import dataclass

from rlhf_fast.engine.memory_ledger import PHASES, RESERVED, MemoryPlan
from rlhf_fast.engine.settings import GPU_SHARE

VIEWS = ("alias", "tp", "gather")


@dataclass(frozen=True)
class Sharding:
    """How a plan is spread.

    Args:
        gpus: N.
        view: how generation sees the weights, one of VIEWS; alias needs N = 1.
    """

    gpus: int = 1
    view: str = "alias"

    @classmethod
    def over(cls, gpus: int, kv_heads: int) -> Sharding:
        """Slices where the key/value heads divide, else gathered weights."""
        if gpus == 1:
            return cls()
        return cls(gpus, "gather" if kv_heads % gpus else "tp")

    def generation_weights(self, plan: MemoryPlan) -> int:
        """W of the module's text."""
        if self.view == "alias" or (self.view == "tp" and plan.frozen):
            return 0
        return 2 * plan.parameters // (self.gpus if self.view == "tp" else 1)

    def device(self, plan: MemoryPlan, phase: str) -> int:
        """Bytes on each GPU at the fullest moment of a phase."""
        if self.gpus == 1:
            return plan.device(phase)
        share = plan.resident(phase) // self.gpus
        if phase == "load":
            return share
        if phase == "generate":
            # W are the copies that one GPU would make.
            share = (plan.resident(phase) - plan.copies(phase)) // self.gpus
            return share + self.generation_weights(plan) + plan.transient(phase)
        return share + 4 * plan.parameters // plan.layers + plan.transient(phase)

    def peak(self, plan: MemoryPlan) -> int:
        """The most of all phases."""
        return max(self.device(plan, phase) for phase in PHASES)

    def kv_budget(self, plan: MemoryPlan, capacity: int) -> int:
        """Bytes for keys and values on all GPUs: the engine's share of what is free on each."""
        copies = plan.copies("generate")
        weights = plan.resident("generate") - plan.pages("generate") - copies
        read = copies if self.gpus == 1 else self.generation_weights(plan)
        free = capacity - RESERVED - weights // self.gpus - read
        return self.gpus * int(GPU_SHARE * max(0, free))

    def fits(self, plan: MemoryPlan, capacity: int) -> bool:
        """Whether all phases, and one sample's keys and values, fit into `capacity` bytes."""
        return self.peak(plan) + RESERVED <= capacity and plan.kv.samples >= 1
