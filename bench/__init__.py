"""Benchmarks: `bench` in a checkout, `rlhf_fast_bench` where the package is installed."""
