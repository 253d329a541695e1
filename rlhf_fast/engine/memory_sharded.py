"""What a plan comes to on each of several GPUs.

With one GPU these are the plan's own numbers. With N of them that hold a model between them, for P
parameters in L layers and bf16 compute:

    held              1 / N of weights, gradients and moments; adapters are whole on every GPU
    score             held + G blocks of 2 P / L + what a role needs while it runs
    update            held + G blocks of 2 P / L + 6 P / L + what a role needs while it runs
    generate          held + keys and values + W + what decoding needs

N is the number of GPUs over `distributed.replicas`; with as many replicas as GPUs each holds what
one alone would hold. Keys and values are divided by the number of all GPUs.

G = 3 blocks are gathered in bf16 at a time: the one that computes and those fetched ahead. In
backward the gradients of a block exist whole, in bf16 and in the fp32 buffer that is reduced. W,
the weights that generation reads, is 0 for one GPU (they alias those that are trained) and for a
frozen trunk in tensor-parallel slices; 2 P / N for such slices of fp32 weights; 2 P where every GPU
gathers the whole model to generate samples of its own (and 2 more a parameter of the embedding,
which stays in fp32); two layers of that, embedding and head, where they are gathered one by one.
"""

from __future__ import annotations

from dataclasses import dataclass

from rlhf_fast.distributed.sharding import PREFETCHED_BLOCKS
from rlhf_fast.engine.memory_ledger import COPIES, PAGES, PHASES, RESERVED, MemoryPlan
from rlhf_fast.engine.settings import GPU_SHARE

VIEWS = ("alias", "tp", "gather", "layerwise")
# Blocks that exist whole at a time, see `distributed.sharding.PREFETCHED_BLOCKS`; bytes a parameter
# of a block's gradients, bf16 and fp32.
_BLOCKS, _GRADIENT_BYTES = 1 + PREFETCHED_BLOCKS, 6


@dataclass(frozen=True)
class Sharding:
    """How a plan is spread.

    Args:
        gpus: how many.
        view: how generation sees the weights, one of VIEWS; alias needs N = 1.
        replicas: copies of the model; they divide the GPUs.
    """

    gpus: int = 1
    view: str = "alias"
    replicas: int = 1

    @classmethod
    def over(cls, gpus: int, replicas: int, wish: str, *, sliced: bool) -> Sharding:
        """As `distributed.weights` wishes; auto: slices where shards can be those, else gathered.

        Where there is not even memory for that, a run gathers layer by layer: this is not foreseen.
        """
        if gpus == 1:
            return cls()
        if gpus == replicas:
            return cls(gpus, "alias", replicas)
        found = "tp" if sliced else "gather"
        return cls(gpus, found if wish == "auto" else wish, replicas)

    @property
    def shards(self) -> int:
        """N of the module's text."""
        return self.gpus // self.replicas

    def generation_weights(self, plan: MemoryPlan) -> int:
        """W of the module's text."""
        if self.view == "alias" or (self.view == "tp" and plan.frozen):
            return 0
        if self.view == "layerwise":
            blocks = 2 * (plan.parameters - plan.vocabulary) // plan.layers
            return 2 * (blocks + plan.vocabulary)
        return 2 * plan.parameters // (self.shards if self.view == "tp" else 1)

    def held(self, plan: MemoryPlan, phase: str) -> int:
        """Bytes on each GPU throughout a phase, without W."""
        whole = parts = 0
        for slot, size in plan.held[phase].items():
            if slot.place != "device" or (slot == COPIES and self.shards > 1):
                continue  # copies are what one GPU would make in the place of W
            if slot == PAGES:
                whole += size // self.gpus
            elif slot.role in plan.adapted:
                whole += size
            else:
                parts += size
        return whole + parts // self.shards

    def device(self, plan: MemoryPlan, phase: str) -> int:
        """Bytes on each GPU at the fullest moment of a phase."""
        if self.gpus == 1:
            return plan.device(phase)
        share = self.held(plan, phase)
        if phase == "load":
            return share
        if phase == "generate":
            return share + self.generation_weights(plan) + plan.transient(phase)
        if self.shards == 1:
            return share + plan.transient(phase)
        per_parameter = 2 * _BLOCKS + (_GRADIENT_BYTES if phase == "update" else 0)
        return share + per_parameter * plan.parameters // plan.layers + plan.transient(phase)

    def peak(self, plan: MemoryPlan) -> int:
        """The most of all phases."""
        return max(self.device(plan, phase) for phase in PHASES)

    def kv_budget(self, plan: MemoryPlan, capacity: int) -> int:
        """Bytes for keys and values on all GPUs: the engine's share of what is free on each."""
        if self.gpus == 1:
            used = plan.resident("generate") - plan.pages("generate")
        else:
            pages = plan.pages("generate") // self.gpus
            used = self.held(plan, "generate") - pages + self.generation_weights(plan)
        free = capacity - RESERVED - used
        return self.gpus * int(GPU_SHARE * max(0, free))

    def fits(self, plan: MemoryPlan, capacity: int) -> bool:
        """Whether all phases, and one sample's keys and values, fit into `capacity` bytes."""
        return self.peak(plan) + RESERVED <= capacity and plan.kv.samples >= 1
