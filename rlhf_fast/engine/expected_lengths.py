"""How long responses to each prompt were: what admission expects of the next rollout.

Part of a checkpoint: it decides who decodes beside whom, and with that the last bit of logits.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

# Weight of the newest rollout in the running mean of a prompt: policies change.
_NEWEST = 0.5


class ExpectedLengths(Mapping[int, float]):
    """uid -> running mean of response tokens, for prompts that were seen."""

    def __init__(self) -> None:
        self._means: dict[int, float] = {}

    def __getitem__(self, uid: int) -> float:
        return self._means[uid]

    def __iter__(self) -> Any:
        return iter(self._means)

    def __len__(self) -> int:
        return len(self._means)

    def observe(self, uids: Sequence[int], lengths: Sequence[int]) -> None:
        """Take in a rollout.

        Args:
            uids: B prompts.
            lengths: S = B*G response tokens, G to each prompt in turn.
        """
        group = len(lengths) // max(1, len(uids))
        for b, uid in enumerate(uids):
            mean = sum(lengths[b * group : (b + 1) * group]) / group
            known = self._means.get(uid, mean)
            self._means[uid] = known + _NEWEST * (mean - known)

    def state_dict(self) -> dict[str, Any]:
        """Plain values for a checkpoint."""
        return {"uids": list(self._means), "means": list(self._means.values())}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a checkpoint."""
        pairs = zip(state["uids"], state["means"], strict=True)
        self._means = {int(uid): float(mean) for uid, mean in pairs}
