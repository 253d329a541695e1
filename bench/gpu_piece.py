"""One piece of `bench.gpu_suite` in a process of its own.

    python -m bench.gpu_piece NAME --json FILE [--tiny]

Writes what it found with what it was measured on; returns 0 if its checks passed. With `--tiny` it
runs at its smallest on the CPU.
"""

from __future__ import annotations

import argparse
import faulthandler
import json
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from .engine import gpu_pieces
from .kernels.environment import environment

STEPS = ("step-1b-full", "step-8b-lora", "leaks")  # of gpu_steps


def pieces(setup: gpu_pieces.Setup) -> dict[str, Callable[[], dict[str, Any]]]:
    """Everything that has a name here; steps need packages that the others can do without."""

    def step(name: str) -> dict[str, Any]:
        from . import gpu_steps

        return gpu_steps.pieces(setup)[name]()

    return {**gpu_pieces.pieces(setup), **{name: partial(step, name) for name in STEPS}}


def run(name: str, setup: gpu_pieces.Setup) -> dict[str, Any]:
    """A piece with its surroundings; an exception is a result."""
    start = time.perf_counter()
    try:
        result = pieces(setup)[name]()
    except Exception as error:
        traceback.print_exc()
        result = {"passed": False, "error": f"{type(error).__name__}: {error}"}
    rows = result.pop("rows", None)
    record = {
        "environment": environment(torch.get_num_threads(), setup.device),
        "piece": name,
        "tiny": setup.tiny,
        "seconds": time.perf_counter() - start,
        "result": result,
    }
    # Where the page and the comparison look for rows; those of a mapping stay with the result.
    return record | ({"rows": rows} if isinstance(rows, list) else {})


def main(arguments: Sequence[str] | None = None) -> int:
    names = list(pieces(gpu_pieces.Setup(torch.device("cpu"), True)))
    parser = argparse.ArgumentParser(description="one piece of the GPU suite")
    parser.add_argument("name", choices=names)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--tiny", action="store_true", help="at its smallest, on the CPU")
    options = parser.parse_args(arguments)
    setup = gpu_pieces.Setup(torch.device("cpu" if options.tiny else "cuda"), options.tiny)
    record = run(options.name, setup)
    options.json.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return 0 if record["result"]["passed"] else 1


if __name__ == "__main__":
    faulthandler.register(signal.SIGTERM, chain=True)  # a piece that hangs tells where
    sys.exit(main())
