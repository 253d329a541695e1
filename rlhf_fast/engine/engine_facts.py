"""What can be asked of a `HybridEngine`: the last rollout, and what it holds now."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rlhf_fast.engine.decode_graphs import GraphReport
from rlhf_fast.engine.fused_forward import FusedForward
from rlhf_fast.engine.progress import GenerationSummary
from rlhf_fast.engine.runner import Runner
from rlhf_fast.engine.sharded_views import WeightView

if TYPE_CHECKING:
    from rlhf_fast.engine.generator import HFGenerator
    from rlhf_fast.engine.transformers_runner import TransformersRunner


class EngineFacts:
    """Properties of the engine that nothing of its work depends on.

    Attributes:
        view: how sharded parameters are seen; None: they are read where they lie.
    """

    view: WeightView | None
    _runner: Runner | TransformersRunner | None
    _padded: HFGenerator | None

    @property
    def last(self) -> GenerationSummary | None:
        """What the last rollout took; None before the first."""
        source = self._padded if self._runner is None else self._runner
        return None if source is None else source.last

    @property
    def kv_bytes(self) -> int:
        """Bytes of the pages that exist now; 0 on the paths whose cache ends with a rollout."""
        cache = self._runner.cache if isinstance(self._runner, Runner) else None
        return 0 if cache is None else cache.nbytes

    @property
    def copied_bytes(self) -> int:
        """Bytes of copies of weights and adapters that exist now, those of a view included."""
        forward = self._runner.forward if isinstance(self._runner, Runner) else None
        beside = 0 if self.view is None else self.view.nbytes
        return beside + (forward.copied_bytes if isinstance(forward, FusedForward) else 0)

    @property
    def graphs(self) -> GraphReport:
        """What the CUDA graphs of the last rollout were; none off a GPU."""
        return self._runner.last_graphs if isinstance(self._runner, Runner) else GraphReport()

    @property
    def preemptions(self) -> int:
        """Samples of the last rollout that gave their pages back and were recomputed."""
        return 0 if self.last is None else self.last.preemptions
