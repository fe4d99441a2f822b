"""Benchmarks of the CUDA engine: `python -m moebius bench --device cuda`."""
