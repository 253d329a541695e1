"""Where the time of our own step goes, by phase and kind of work, on one thread.

    python -m bench.ppo.profile_step [--preset cpu|tiny] [--lengths fixed,long-tailed]

One model after another on one thread, so that the parts of a phase add up to it; the shares are
those of two threads as well, where policy and critic run side by side. Kinds:

    layers      decoder layers, whole: their products, attention, SwiGLU, rotation, norms
    products    matrix products outside of layers: those of the vocabulary head
    kernels     our other ops: log-probs, losses, norms outside of layers
    optimizer   fused AdamW
    elementwise all other operations of PyTorch
    python      between operations: Python, autograd's engine. Of generation it is the engine's own
                loop in C++ with all that it computes, which PyTorch's profiler cannot see into

Times are those of the profiler, which lengthens what is short: the share of `python` is an upper
bound.
"""

from __future__ import annotations

import argparse
import importlib
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any
from unittest import mock

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from rlhf_fast.data import collate_prompts
from rlhf_fast_kernels import linear_head

from .case import KINDS, PRESETS, Case, build_models
from .our_step import build_trainer

PHASES = ("generate", "score", "prepare", "update")
KINDS_OF_WORK = ("layers", "products", "kernels", "optimizer", "elementwise", "python")
PREFIX = "phase: "
LAYER, PRODUCT = (
    "layer",
    "product",
)  # what the profiler does not see by itself, C++ called by Python
PRODUCTS = ("aten::mm", "aten::addmm", "aten::addmm_", "aten::bmm", "aten::baddbmm")
KERNELS = ("_Swiglu", "_Rotary", "_TrainedRmsNorm", "LinearPPOLoss", "_LinearLogprobs", "rlhf_fast")
WARMUPS = 2


def kind_of(name: str) -> str:
    """The kind of work of an event of the profiler."""
    if name == PRODUCT or name in PRODUCTS:
        return "products"
    if name == LAYER or ("PackedAttention" in name and "autograd::" not in name):
        return "layers"
    if any(name.lstrip(":").startswith(kernel) for kernel in KERNELS) or "PPOLoss" in name:
        return "python" if name.startswith("autograd::") else "kernels"
    if "_fused_adamw" in name:
        return "optimizer"
    return "elementwise" if name.startswith("aten::") else "python"


def phase_of(event: Any) -> str | None:
    """The phase that an event happened in."""
    while event is not None:
        if event.name.startswith(PREFIX):
            return str(event.name.removeprefix(PREFIX))
        event = event.cpu_parent
    return None


def profile_step(case: Case) -> dict[str, dict[str, float]]:
    """Phase -> kind of work -> seconds of one step, printed as well."""
    case = replace(case, threads=1, side_by_side=1)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        found = _profiled(case)
    finally:
        torch.set_num_threads(threads)
    print(f"\nour step on one thread, {case.lengths} lengths, seconds (share of the phase)")
    print(f"{'phase':10}" + "".join(f"{kind:>16}" for kind in KINDS_OF_WORK) + f"{'all':>9}")
    for phase in PHASES:
        whole = sum(found[phase].values())
        cells = [f"{found[phase].get(k, 0.0):.3f}" for k in KINDS_OF_WORK]
        shares = [f"({found[phase].get(k, 0.0) / max(whole, 1e-9):.0%})" for k in KINDS_OF_WORK]
        row = "".join(f"{cell:>9} {share:>6}" for cell, share in zip(cells, shares, strict=True))
        print(f"{phase:10}{row}{whole:9.3f}", flush=True)
    return found


@contextmanager
def _named() -> Iterator[None]:
    """Names in the profile for what our ops call in C++."""
    layer = importlib.import_module("rlhf_fast_kernels.decoder_layer")
    with ExitStack() as stack:
        for owner, function, name in (
            (layer, "_forward", LAYER),
            (layer, "_backward", LAYER),
            (linear_head, "matmul", PRODUCT),
        ):
            named = record_function(name)(getattr(owner, function))
            stack.enter_context(mock.patch.object(owner, function, named))
        yield


def _profiled(case: Case) -> dict[str, dict[str, float]]:
    with tempfile.TemporaryDirectory() as folder:
        trainer = build_trainer(case, build_models(case), folder)

        def step() -> None:
            batch = [trainer.data[i] for i in trainer.sampler.next_batch()]
            trainer.learner.step(collate_prompts(batch))

        for _ in range(WARMUPS):
            step()
        trainer.learner.phase = lambda name: record_function(PREFIX + name)
        with _named(), profile(activities=[ProfilerActivity.CPU]) as profiler:
            step()
    found: dict[str, dict[str, float]] = {phase: defaultdict(float) for phase in PHASES}
    for event in profiler.events():
        phase = phase_of(event)
        if phase is not None:
            found[phase][kind_of(event.name)] += event.self_cpu_time_total / 1e6
    return {phase: dict(kinds) for phase, kinds in found.items()}


def main(arguments: Sequence[str] | None = None) -> int:
    """Profile and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--preset", choices=tuple(PRESETS), default="cpu")
    parser.add_argument("--lengths", choices=KINDS, default="fixed")
    options = parser.parse_args(sys.argv[1:] if arguments is None else arguments)
    profile_step(replace(PRESETS[options.preset], lengths=options.lengths))
    return 0


if __name__ == "__main__":
    sys.exit(main())
