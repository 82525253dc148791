"""Measures and records; never asserts a time. `python -m benchmarks.gpu` runs all of it."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parent.parent / "tests"))  # errors and sanitizer take the tests' own cases
