"""Memory of this process as the system counts it: every allocator, every library."""

from __future__ import annotations

import ctypes
import gc
from pathlib import Path

_PROC = Path("/proc/self")
_RESET_PEAK = "5"  # man 5 proc: writing 5 to clear_refs resets VmHWM


def resident() -> int:
    """Bytes resident now, after the allocator has given its free pages back."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc has it
    if trim is not None:
        trim(ctypes.c_size_t(0))
    return _status("VmRSS")


def reset_peak() -> None:
    """Count the peak from here on."""
    (_PROC / "clear_refs").write_text(_RESET_PEAK, encoding="utf-8")


def peak() -> int:
    """Most bytes resident since `reset_peak`."""
    return _status("VmHWM")


def _status(key: str) -> int:
    for line in (_PROC / "status").read_text(encoding="utf-8").splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) << 10
    raise KeyError(key)
