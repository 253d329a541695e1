"""What a stage shows and logs of its generator."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from rlhf_fast.engine.dealt_generator import DealtGenerator
from rlhf_fast.engine.hybrid import HybridEngine
from rlhf_fast.engine.progress import Progress
from rlhf_fast.protocols import Generator

# Often enough to look alive; a redraw of the bar costs more than a decoding step of a small model.
SECONDS_BETWEEN_REPORTS = 0.25


def engine_of(generator: Generator) -> HybridEngine | None:
    """The engine behind a generator; None if it is of another kind."""
    inner: Any = generator
    while not isinstance(inner, HybridEngine) and hasattr(inner, "generator"):
        inner = inner.generator  # dealt over ranks, under an adapter, with other ends
    return inner if isinstance(inner, HybridEngine) else None


def show_generation(engine: HybridEngine | None, show: Callable[[Progress], None]) -> None:
    """Have the engine call `show` a few times a second while it generates, and at the end.

    Whoever was called before is called as well: memory is counted there.
    """
    if engine is None:
        return
    before = engine.on_progress

    def report(progress: Progress) -> None:
        if before is not None:
            before(progress)
        show(progress)

    engine.on_progress = report
    engine.progress_seconds = SECONDS_BETWEEN_REPORTS


def generation_fields(progress: Progress) -> dict[str, object]:
    """What stands beside a bar while samples are drawn; nothing once all are there."""
    if progress.finished == progress.samples:
        return {}
    return {
        "tok/s": round(progress.tokens_per_second),
        "running": progress.running,
        "waiting": progress.waiting,
        "kv": f"{progress.cache_use:.0%}",
    }


def generation_metrics(generator: Generator) -> dict[str, float]:
    """`rollout/...` of the generator's last call, on all ranks together; see docs/metrics.md."""
    source = generator if isinstance(generator, DealtGenerator) else engine_of(generator)
    last = None if source is None else source.last
    if last is None:
        return {}
    metrics = {
        "rollout/tokens_per_second": last.tokens_per_second,
        "rollout/preemptions": float(last.preemptions),
    }
    if last.peak_cache_use is not None:
        metrics["rollout/peak_kv_use"] = last.peak_cache_use
    return metrics
