"""Compile the C++ of the simulated device, once for each version of PyTorch and of the sources.

PyTorch must not be imported here: what is built is loaded before it.
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib.metadata
import importlib.util
import os
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).resolve().parent
BUILD = HERE.parents[1] / "build" / "simulated_cuda"
LIBRARIES = {
    "simulated_cuda": ("memory.cpp", "device.cpp", "ops.cpp", "captures.cpp"),
    "simulated_nccl": ("process_group.cpp",),
}
FLAGS = ("-O1", "-std=c++20", "-fPIC", "-w", "-DUSE_DISTRIBUTED", "-DUSE_C10D_GLOO")


def torch_folder() -> Path:
    """Where PyTorch is installed."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        raise RuntimeError("PyTorch is not installed")
    return Path(spec.origin).parent


def built() -> dict[str, Path]:
    """The libraries, built if they are not yet."""
    key = hashlib.sha256(f"{importlib.metadata.version('torch')} {sys.version}".encode())
    for source in sorted((*HERE.glob("*.cpp"), *HERE.glob("*.h"), Path(__file__))):
        key.update(source.read_bytes())
    folder = BUILD / key.hexdigest()[:16]
    folder.mkdir(parents=True, exist_ok=True)
    libraries = {name: folder / f"{name}.so" for name in LIBRARIES}
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # of several test processes one builds
        if not all(library.exists() for library in libraries.values()):
            _build(folder)
    return libraries


def _build(folder: Path) -> None:
    compiler = os.environ.get("CXX", "c++")
    torch = torch_folder()
    include = (torch / "include", torch / "include/torch/csrc/api/include")
    folders = [f"-I{path}" for path in (*include, sysconfig.get_paths()["include"])]

    def compiled(name: str, source: str) -> Path:
        out = folder / f"{source}.o"
        define = f"-DTORCH_EXTENSION_NAME={name}"
        _run([compiler, *FLAGS, define, *folders, "-c", str(HERE / source), "-o", str(out)])
        return out

    with ThreadPoolExecutor(max_workers=int(os.environ.get("MAX_JOBS", "2"))) as pool:
        objects = {
            name: [pool.submit(compiled, name, source) for source in sources]
            for name, sources in LIBRARIES.items()
        }
        link = [f"-L{torch / 'lib'}", "-ltorch", "-ltorch_cpu", "-lc10", "-ltorch_python"]
        for name, parts in objects.items():
            inputs = [str(part.result()) for part in parts]
            unfinished = folder / f"{name}.unfinished"
            _run([compiler, "-shared", *inputs, *link, "-o", str(unfinished)])
            unfinished.rename(folder / f"{name}.so")


def _run(command: list[str]) -> None:
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}\n{result.stderr[-4000:]}")
