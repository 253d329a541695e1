"""A memory plan as a table for people and as numbers for machines."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

from rich.console import Console
from rich.table import Table

from rlhf_fast.engine.memory_ledger import PHASES, RESERVED, ROLES, MemoryPlan
from rlhf_fast.stages.plan import PlanResult

_SHARDED = "one model over those of a replica (docs/distributed.md); unmeasured on GPUs"
Row = tuple[str, str, list[int]]


def show_plan(result: PlanResult) -> None:
    """Print the table and what follows from it: rich on a terminal, plain lines elsewhere."""
    rows = [*_rows(result.plan), *_totals(result)]
    print(_title(result))
    if sys.stdout.isatty():
        table = Table()
        for name in ("role", "part"):
            table.add_column(name)
        for phase in PHASES:
            table.add_column(phase, justify="right")
        for role, part, sizes in rows:
            style = "bold" if role == "total" else None
            table.add_row(role, part, *map(_gb, sizes), style=style)
        Console().print(table)
    else:
        print(f"{'role':14}{'part':26}" + "".join(f"{phase:>10}" for phase in PHASES))
        for role, part, sizes in rows:
            print(f"{role:14}{part:26}" + "".join(f"{_gb(n):>10}" for n in sizes))
    print("\n".join(_conclusions(result)))


def plan_as_json(result: PlanResult) -> dict[str, Any]:
    """Everything in bytes."""
    sharding, capacity = result.sharding, result.capacity
    report: dict[str, Any] = {
        "gpus": sharding.gpus,
        "gpu_memory": capacity,
        "reserved": RESERVED,
        "fits": result.fits,
        **_numbers(result, result.plan),
        "notes": list(result.notes),
    }
    if sharding.gpus > 1:
        replicas = sharding.replicas
        report["sharding"] = {"view": sharding.view, "replicas": replicas, "note": _SHARDED}
    if result.advice is not None:
        report["advice"] = {
            "fits": result.advice.fits,
            "config": dict(result.advice.changes),
            "overrides": result.advice.overrides(),
            **_numbers(result, result.advice.plan),
        }
    return report


def _numbers(result: PlanResult, plan: MemoryPlan) -> dict[str, Any]:
    phases = {}
    for phase in PHASES:
        entries = [
            {**slot._asdict(), "bytes": size, "while_running": False}
            for slot, size in plan.held[phase].items()
        ] + [
            {"role": role, "part": part, "place": "device", "bytes": size, "while_running": True}
            for role, parts in plan.passes[phase].items()
            for part, size in parts.items()
            if size
        ]
        phases[phase] = {
            "device": plan.device(phase),
            "host": plan.host(phase),
            "each_gpu": result.sharding.device(plan, phase),
            "entries": entries,
        }
    kv = plan.kv
    return {
        "phases": phases,
        "kv": {
            "token_bytes": kv.token_bytes,
            "page_size": kv.page_size,
            "sample_tokens": kv.longest,
            "sample_bytes": kv.sample_bytes,
            "budget": kv.budget,
            "samples_side_by_side": kv.samples,
            "samples_wanted": kv.rows,
        },
    }


def _rows(plan: MemoryPlan) -> Iterator[Row]:
    slots = {slot for phase in PHASES for slot in plan.held[phase]}
    order = {role: index for index, role in enumerate(ROLES)}
    for slot in sorted(slots, key=lambda s: (order[s.role], s.place, s.part)):
        where = " (host)" if slot.place == "host" else ""
        sizes = [plan.held[phase].get(slot, 0) for phase in PHASES]
        yield slot.role, slot.part + where, sizes
    running = [
        (role, part) for p in PHASES for role, parts in plan.passes[p].items() for part in parts
    ]
    for role, part in sorted(set(running), key=lambda pair: (order[pair[0]], pair[1])):
        sizes = [plan.passes[phase].get(role, {}).get(part, 0) for phase in PHASES]
        if any(sizes):
            yield role, f"{part} *", sizes


def _totals(result: PlanResult) -> Iterator[Row]:
    plan, sharding = result.plan, result.sharding
    yield "total", "device", [plan.device(phase) for phase in PHASES]
    if sharding.gpus > 1:
        name = f"each of {sharding.gpus} GPUs ({sharding.view})"
        yield "total", name, [sharding.device(plan, phase) for phase in PHASES]
    host = [plan.host(phase) for phase in PHASES]
    if any(host):
        yield "total", "host", host


def _title(result: PlanResult) -> str:
    gpus, plan = result.sharding.gpus, result.plan
    each = "" if result.capacity is None else f" of {_gb(result.capacity)} GB"
    return (
        f"{plan.parameters / 1e9:.2f} billion parameters, {result.config.run.dtype}, "
        f"{gpus} GPU{'s' if gpus > 1 else ''}{each}; GB are 1e9 bytes"
    )


def _conclusions(result: PlanResult) -> Iterator[str]:
    plan, sharding = result.plan, result.sharding
    yield (
        "* while the role runs, one role after the other; the totals count the largest, and the "
        "generator beside it"
    )
    if sharding.gpus > 1:
        yield f"{sharding.gpus} GPUs, weights view {sharding.view}: {_SHARDED}"
    for note in result.notes:
        yield f"note: {note}"
    if result.capacity is None:
        yield f"needs {_gb(sharding.peak(plan))} GB and {_gb(RESERVED)} GB for CUDA itself"
        yield from _cache(plan)
        return
    needed = sharding.peak(plan) + RESERVED
    verdict = "fits" if result.fits else "does not fit"
    yield (
        f"{verdict}: {_gb(needed)} GB of {_gb(result.capacity)} GB at the fullest moment, "
        f"{_gb(RESERVED)} GB for CUDA itself included (an estimate)"
    )
    if result.advice is None:
        yield from _cache(plan)
        return
    advice = result.advice
    least = sharding.peak(advice.plan) + RESERVED
    if advice.fits:
        yield f"it fits ({_gb(least)} GB) with:"
    else:
        yield f"it does not fit by changes of the config; nearest ({_gb(least)} GB) with:"
    yield f"  {advice.overrides()}"
    yield from _cache(advice.plan)


def _cache(plan: MemoryPlan) -> Iterator[str]:
    kv = plan.kv
    if kv.budget is None:
        yield f"keys and values: {_gb(kv.nbytes)} GB for {kv.rows} samples of {kv.longest} tokens"
        return
    yield (
        f"keys and values: {_gb(max(0, kv.budget))} GB are left, {kv.samples} samples of "
        f"{kv.longest} tokens side by side (rollout.max_batch and the batch ask for {kv.rows})"
    )


def _gb(size: int) -> str:
    if size == 0:
        return "-"
    return f"{size / 1e9:.2f}" if size >= 5_000_000 else "<0.01"
