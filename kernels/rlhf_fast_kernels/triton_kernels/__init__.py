"""Triton kernels, one module an op; import them through `triton_support.kernels(op)` only."""
