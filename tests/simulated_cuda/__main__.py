"""Run a script or a module with a simulated CUDA device, as `python` would."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

from tests.simulated_cuda.loading import load

if __name__ == "__main__":
    load()
    arguments = sys.argv[1:]
    if not arguments:
        raise SystemExit("usage: python -m tests.simulated_cuda [-m module | script.py] ...")
    if arguments[0] == "-m":
        sys.argv = arguments[1:]
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = arguments
        sys.path.insert(0, str(Path(arguments[0]).parent))
        runpy.run_path(arguments[0], run_name="__main__")
