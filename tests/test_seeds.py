"""Seeds keyed by counters."""

from rlhf_fast.seeds import derive_seed


def test_derived_seed_is_stable_and_has_no_collisions():
    assert derive_seed(1, 2, 3, 4) == 2429351365415745036
    keys = {
        derive_seed(r, s, u, g)
        for r in range(3) for s in range(5) for u in range(50) for g in range(8)
    }  # fmt: skip
    assert len(keys) == 3 * 5 * 50 * 8
    assert all(0 <= key < 2**63 for key in keys)
    assert derive_seed(1, 11, 1, 1) != derive_seed(11, 1, 1, 1) != derive_seed(1, 1, 11, 1)
