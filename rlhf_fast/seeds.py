"""Random draws keyed by counters: none depends on rank, batch or what was drawn before."""

from __future__ import annotations

import hashlib


def derive_seed(*key: int) -> int:
    """A 63-bit seed from integers: stable over processes, machines and Python versions.

    A sample of a rollout has the key (run seed, step, prompt uid, index in its group).
    """
    text = ":".join(map(str, key)).encode("ascii")
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little") >> 1
