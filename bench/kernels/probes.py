"""The limits of the machine, measured in the same process: memory bandwidth and matrix products.

A probe takes its turn between the contenders, so that a slow minute of the machine slows both.
`calibrate` runs all of them before and after the tables: where the two disagree, the machine
changed under the run.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any, Protocol

import torch

from .device import clock_of, seconds
from .environment import DTYPE_NAMES, gpu_clocks

CPU_PRODUCT = (1024, 1024, 1024)
GPU_PRODUCT = (8192, 8192, 8192)
COPY_BYTES = 1 << 30
LOAD_CALLS = 400  # products of GPU_PRODUCT in flight while the clocks are read: about half a second


class Probe(Protocol):
    """`run` moves `bytes` or multiplies `flops`; `name` heads the column of the fraction."""

    name: str
    device: torch.device

    def run(self, k: int) -> Any: ...


class ReadProbe:
    """Reads 384 MiB once, with torch's threads and the fastest of its reductions."""

    name = "of read"
    device = torch.device("cpu")

    def __init__(self) -> None:
        x = torch.ones(96 << 20)
        reductions: tuple[Callable[[], Any], ...] = (x.sum, x.amax, lambda: torch.dot(x, x))
        for reduction in reductions:
            reduction()
        self.bytes = x.numel() * x.element_size()
        self.reduction = min(reductions, key=lambda r: min(seconds(r)[0] for _ in range(5)))

    def run(self, k: int) -> Any:
        return self.reduction()

    def gb_per_s(self, repeats: int = 9) -> float:
        return self.bytes / _median_seconds(self, repeats) / 1e9


class CopyProbe:
    """Copies 1 GiB on the GPU; bytes read and bytes written both count."""

    name = "of copy"

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.source = torch.ones(COPY_BYTES, dtype=torch.uint8, device=device)
        self.target = torch.empty_like(self.source)
        self.bytes = 2 * COPY_BYTES

    def run(self, k: int) -> Any:
        self.target.copy_(self.source)

    def gb_per_s(self, repeats: int = 9) -> float:
        return self.bytes / _median_seconds(self, repeats) / 1e9


BandwidthProbe = ReadProbe | CopyProbe


def bandwidth_probe(device: torch.device) -> BandwidthProbe:
    return CopyProbe(device) if device.type == "cuda" else ReadProbe()


class MatmulProbe:
    """A [m, k] times a [k, n] matrix of normal numbers, as torch multiplies them.

    With the shape of an op's own product, the fraction of the probe in the op's time says how far
    the op is from its bare matrix product.
    """

    name = "of matmul"

    def __init__(
        self,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        shape: tuple[int, int, int] | None = None,
    ) -> None:
        self.device = torch.device(device)
        self.dtype = dtype
        on_gpu = self.device.type == "cuda"
        self.shape = shape or (GPU_PRODUCT if on_gpu else CPU_PRODUCT)
        m, n, k = self.shape
        generator = torch.Generator(self.device).manual_seed(0)
        # Products of zeros run faster than any real data: fewer bits flip.
        self.left = torch.randn(m, k, device=self.device, generator=generator).to(dtype)
        self.right = torch.randn(k, n, device=self.device, generator=generator).to(dtype)
        self.product = torch.empty(m, n, dtype=dtype, device=self.device)
        self.flops = 2 * m * n * k

    def run(self, k: int) -> Any:
        torch.mm(self.left, self.right, out=self.product)

    def tflops(self, repeats: int = 9) -> float:
        return self.flops / _median_seconds(self, repeats) / 1e12


def _median_seconds(probe: Probe, repeats: int) -> float:
    clock = clock_of(probe.device)
    clock.turn(probe.run, (0,))
    samples = [sample for _ in range(repeats) for sample in clock.turn(probe.run, (0,))]
    return statistics.median(sample.seconds for sample in samples)


def calibrate(bandwidth: BandwidthProbe, repeats: int = 5) -> dict[str, float]:
    """GB/s, matmul TFLOP/s by dtype and, on a GPU, clock, power and temperature under load."""
    device = bandwidth.device
    kind = "copy" if device.type == "cuda" else "read"
    found = {f"{kind}_gb_per_s": bandwidth.gb_per_s(repeats)}
    dtypes = (torch.bfloat16,) if device.type == "cuda" else (torch.float32, torch.bfloat16)
    for dtype in dtypes:
        product = MatmulProbe(dtype, device)
        found[f"matmul_{DTYPE_NAMES[dtype]}_tflop_per_s"] = product.tflops(repeats)
        if device.type == "cuda":
            found |= _clocks_under_load(product)
    return found


def _clocks_under_load(product: MatmulProbe) -> dict[str, float]:
    for _ in range(LOAD_CALLS):
        product.run(0)
    found = gpu_clocks(product.device)
    torch.cuda.synchronize(product.device)
    return found
