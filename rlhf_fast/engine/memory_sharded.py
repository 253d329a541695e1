"""What a plan comes to on each of several GPUs.

With one GPU these are the plan's own numbers. With N of them that hold a model between them, for P
parameters in L layers and c bytes of the compute type (2 under bf16, else 4):

    held              1 / N of weights, gradients and moments; adapters are whole on every GPU
    score             held + G blocks of c P / L + what a role needs while it runs
    update            held + G blocks of c P / L + (c + 4) P / L + what a role needs while it runs,
                      or held + a bucket of the gradients that are whole on every GPU
    generate          held + keys and values + W + what decoding needs

N is the number of GPUs over `distributed.replicas`; with as many replicas as GPUs each holds what
one alone would hold. Keys and values are divided by the number of all GPUs.

G = 3 blocks are gathered at a time: the one that computes and those fetched ahead. In backward the
gradients of a block exist whole, in the compute type and in the fp32 buffer that is reduced. After
it, gradients that are whole on every GPU (of whole models, or of adapters) are summed in copies of
256 MB or one tensor. W, the weights that generation reads, is

    0                 for one GPU (they alias those that are trained), and for tensor-parallel
                      slices in the type they are read in
    c (P - E) / N     for slices of fp32 weights under bf16, E of them in the embedding, which is
                      read where it lies
    c P               where every GPU gathers the model to generate samples of its own
    c 2 P / L         of the layers, embedding and head, where layers are gathered one by one; of
                      the two layers one is there between two forwards

The embedding of a model that is trained is gathered in fp32, 2 more a parameter of it under bf16,
and a head that is tied to it apart from it, in bf16.
"""

from __future__ import annotations

from dataclasses import dataclass

from rlhf_fast.distributed.sharding import PREFETCHED_BLOCKS
from rlhf_fast.engine.memory_ledger import COPIES, PAGES, PHASES, RESERVED, Ledger, MemoryPlan, Slot
from rlhf_fast.engine.settings import GPU_SHARE

VIEWS = ("alias", "tp", "gather", "layerwise")
# Blocks that exist whole at a time, see `distributed.sharding.PREFETCHED_BLOCKS`.
_BLOCKS = 1 + PREFETCHED_BLOCKS


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
        layers = plan.parameters - plan.vocabulary
        if self.view == "alias":
            return 0
        if self.view == "tp":
            copied = 0 if plan.frozen or plan.compute == 4 else layers + self._head(plan)
            return plan.compute * copied // self.shards
        blocks = 2 * layers // plan.layers if self.view == "layerwise" else layers
        embedding = plan.embedding * (plan.compute if plan.frozen else 4)
        return plan.compute * (blocks + self._head(plan)) + embedding

    def _head(self, plan: MemoryPlan) -> int:
        """Parameters of a head that is read apart from the embedding."""
        tied = plan.vocabulary == plan.embedding
        if tied and not plan.frozen and plan.compute != 4:
            return plan.embedding
        return plan.vocabulary - plan.embedding

    def _read(self, plan: MemoryPlan) -> int:
        """Bytes beside the shards while samples are drawn, between two forwards."""
        read = self.generation_weights(plan)
        adapters = plan.held["generate"].get(Slot("actor", "weights"), 0) if plan.frozen else 0
        if self.view == "layerwise":
            one = plan.compute * (plan.parameters - plan.vocabulary) // plan.layers
            return read - one + adapters // plan.layers
        # A frozen trunk is read as it is: what one GPU copies are the actor's adapters, of which
        # slices are about as much in all. Whoever gathers the trunk holds them twice.
        read += plan.copies("generate") if plan.frozen else 0
        return read + (adapters if self.view == "gather" else 0)

    def held(self, plan: MemoryPlan, phase: str) -> int:
        """Bytes on each GPU throughout a phase, without W."""
        return sum(
            size
            for slot, size in self.ledger(plan, phase).items()
            if slot.place == "device" and (slot != COPIES or self.shards == 1)
        )

    def ledger(self, plan: MemoryPlan, phase: str) -> Ledger:
        """What each GPU holds throughout a phase, W in the place of one GPU's copies."""
        found = {slot: self._share(plan, slot, size) for slot, size in plan.held[phase].items()}
        if self.shards > 1:
            found.pop(COPIES, None)
            read = self._read(plan) if phase == "generate" else 0
            if read:
                found[COPIES] = read
            for role, away in plan.away.items():
                for place, size in away.on(self.shards).items():
                    found[Slot(role, "weights", place)] = size
        return found

    def _share(self, plan: MemoryPlan, slot: Slot, size: int) -> int:
        if slot == PAGES:
            return size // self.gpus
        whole = slot == COPIES or slot.role in plan.adapted
        return size if whole else size // self.shards

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
            running = plan.transient(phase)
        else:
            per_parameter = plan.compute * _BLOCKS + (plan.compute + 4 if phase == "update" else 0)
            running = per_parameter * plan.parameters // plan.layers + plan.transient(phase)
        return share + max(running, self._bucket(plan) if phase == "update" else 0)

    def _bucket(self, plan: MemoryPlan) -> int:
        """Bytes of the copy in which gradients are summed, once backward is over."""
        whole = (n for role, n in plan.buckets.items() if self.shards == 1 or role in plan.adapted)
        return max(whole, default=0)

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
