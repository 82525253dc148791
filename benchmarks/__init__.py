"""Measures and records; never asserts a time. `python -m benchmarks.gpu` runs all of it."""
