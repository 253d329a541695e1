"""Bytes by role, part and place in each phase of a PPO step, as planned and as counted."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

from rlhf_fast.engine.paged_cache import pages_wanted

PHASES = ("load", "generate", "score", "update")
ROLES = ("trunk", "actor", "critic", "reference", "reward_model", "generator")
# CUDA context, workspaces of libraries, captured graphs, fragmentation: an estimate, unmeasured.
RESERVED = 1_500_000_000


class Slot(NamedTuple):
    """Whose bytes, of what, and where: `device` or `host`."""

    role: str
    part: str
    place: str = "device"


Ledger = dict[Slot, int]
PAGES = Slot("generator", "kv")
# Of weights and adapters, made by the fused path for a rollout.
COPIES = Slot("generator", "copies")


def add(ledger: Ledger, role: str, part: str, size: int, place: str = "device") -> None:
    """Enter bytes; nothing is entered for none."""
    if size:
        slot = Slot(role, part, place)
        ledger[slot] = ledger.get(slot, 0) + size


def host_block(size: int, pinned: bool) -> int:
    """Bytes of a block of host memory: PyTorch rounds pinned ones up to a power of two."""
    return 1 << (size - 1).bit_length() if pinned and size else size


@dataclass(frozen=True)
class KVPlan:
    """Keys and values.

    Args:
        token_bytes: of one token in all layers.
        page_size: tokens of a page.
        longest: tokens of a sample at the most.
        rows: samples that are to decode side by side.
        budget: bytes there may be; None: no limit is known.
    """

    token_bytes: int
    page_size: int
    longest: int
    rows: int
    budget: int | None

    @property
    def nbytes(self) -> int:
        """Bytes that will be held: page 0, and what is wanted or what there may be."""
        page = self.token_bytes * self.page_size
        pages = pages_wanted(self.rows, self.longest, self.page_size)
        if self.budget is not None:
            pages = min(pages, max(0, self.budget) // page)
        return (pages + 1) * page if pages else 0

    @property
    def sample_bytes(self) -> int:
        """Pages of one sample of the longest length."""
        return -(-self.longest // self.page_size) * self.page_size * self.token_bytes

    @property
    def samples(self) -> int:
        """Samples of the longest length for which the budget has pages; `rows` without a limit."""
        return self.rows if self.budget is None else max(0, self.budget) // self.sample_bytes


@dataclass(frozen=True)
class ShardsAway:
    """Weights of an offloaded role that is cut over ranks, whose layers alone are in host memory.

    Args:
        matrices: bytes of each matrix of the layers.
        rows: bytes of those outside of the layers, which are cut too and stay on the device.
        whole: bytes of vectors and buffers, which every rank has on its device.
        pinned: whether the host memory is.
    """

    matrices: tuple[int, ...]
    rows: int
    whole: int
    pinned: bool

    def on(self, shards: int) -> dict[str, int]:
        """Bytes of one of so many ranks, by place."""
        host = sum(host_block(-(-size // shards), self.pinned) for size in self.matrices)
        return {"device": self.rows // shards + self.whole, "host": host}


@dataclass(frozen=True)
class MemoryPlan:
    """Predicted bytes.

    Args:
        held: phase -> what exists throughout it, or at its fullest moment.
        passes: phase -> role -> part -> bytes that exist while this role runs, one role after the
            other; the generator beside them.
        kv: keys and values.
        parameters: of the model that generates.
        vocabulary: those of them in embedding and head, once where the two are tied.
        embedding: those of the embedding alone.
        layers: of that model.
        compute: bytes of a value in the type of its products.
        frozen: whether that model is a frozen trunk.
        adapted: roles that hold adapters on it and no model.
        buckets: role -> bytes of the largest bucket in which ranks that hold what it trains whole
            sum its gradients.
        away: offloaded role -> its weights where it is cut over ranks.
        notes: what is estimated or assumed.
    """

    held: Mapping[str, Ledger]
    passes: Mapping[str, Mapping[str, Mapping[str, int]]]
    kv: KVPlan
    parameters: int
    vocabulary: int
    embedding: int
    layers: int
    compute: int
    frozen: bool
    adapted: frozenset[str]
    buckets: Mapping[str, int]
    away: Mapping[str, ShardsAway]
    notes: tuple[str, ...] = ()

    def device(self, phase: str) -> int:
        """Bytes on the device at the fullest moment of a phase."""
        return self.resident(phase) + self.transient(phase)

    def resident(self, phase: str) -> int:
        """Bytes on the device whichever role runs."""
        return sum(n for slot, n in self.held[phase].items() if slot.place == "device")

    def transient(self, phase: str) -> int:
        """Bytes of the generator, and of the role that needs the most while it runs."""
        sizes = {role: sum(parts.values()) for role, parts in self.passes[phase].items()}
        return sizes.pop("generator", 0) + max(sizes.values(), default=0)

    def host(self, phase: str) -> int:
        """Bytes in host memory."""
        return sum(n for slot, n in self.held[phase].items() if slot.place == "host")

    def least(self) -> int:
        """Bytes of the fullest phase, with keys and values of one sample."""
        return max(
            self.device(phase)
            - self.pages(phase)
            + (self.kv.sample_bytes if PAGES in self.held[phase] or phase == "generate" else 0)
            for phase in PHASES
        )

    def pages(self, phase: str) -> int:
        """Bytes of keys and values."""
        return self.held[phase].get(PAGES, 0)

    def copies(self, phase: str) -> int:
        """Bytes of what the fused path copies of weights and adapters."""
        return self.held[phase].get(COPIES, 0)

    def limited(self, kv_budget: int) -> MemoryPlan:
        """The same with so many bytes for keys and values at most."""
        kv = replace(self.kv, budget=kv_budget)
        held = {
            phase: ledger | ({PAGES: kv.nbytes} if PAGES in ledger else {})
            for phase, ledger in self.held.items()
        }
        return replace(self, kv=kv, held=held)
