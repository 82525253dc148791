"""Run the GPU tests and the benchmark rows, and write benchmarks/records/<device>.json.

    python -m benchmarks.gpu [--only TEXT] [--no-tests] [--output FILE]

Needs CuPy and pytest; the package itself need not be installed (PYTHONPATH=. from the repository).
"""

import argparse
import importlib.util
import json
import re
import subprocess
import sys
import time
from pathlib import Path

import cupy as cp
import numpy as np

from benchmarks import measure, models
from benchmarks.rows import ROWS
from benchmarks.timing import copy_bandwidth
from mambacupy import kernels

ROOT = Path(__file__).resolve().parent.parent


def run_tests():
    """Counts of the GPU tests' outcomes; the run ends here if one fails."""
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "--require-gpu", "-p", "no:cacheprovider", "tests"]
    if importlib.util.find_spec("xdist"):
        command += ["-n", "12"]  # most of the time goes into compiling
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    summary = done.stdout.strip().splitlines()[-1]
    print(summary, flush=True)
    if done.returncode:
        sys.exit(done.stdout[-6000:] + done.stderr[-2000:])
    return {what: int(n) for n, what in re.findall(r"(\d+) (passed|failed|skipped|deselected)", summary)}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="time only rows whose name contains this")
    parser.add_argument("--no-tests", action="store_true", help="skip the tests; nothing is recorded then")
    parser.add_argument("--output", type=Path, help="write the record here instead of benchmarks/records/")
    options = parser.parse_args()

    properties = cp.cuda.runtime.getDeviceProperties(0)
    device = properties["name"].decode()
    record = {
        "device": device,
        "cuda_src": kernels.digest(),
        "date": time.strftime("%Y-%m-%d"),
        "versions": {
            "python": sys.version.split()[0],
            "numpy": np.__version__,
            "cupy": cp.__version__,
            "cuda_driver": cp.cuda.runtime.driverGetVersion(),
            "nvrtc": ".".join(map(str, cp.cuda.nvrtc.getVersion())),
        },
    }
    if not options.no_tests:
        record["tests"] = run_tests()
    bandwidth = copy_bandwidth()
    record["copy_terabytes_per_second"] = round(bandwidth / 1e12, 3)
    for name in ("errors", "host_microseconds", "first_call_seconds", "bytes_kept_an_element"):
        record[name] = getattr(measure, name)()
    record["rows"] = []
    for row in ROWS:
        if options.only in row.name:
            record["rows"].append(measure.time_row(row, bandwidth))
            print(json.dumps(record["rows"][-1]), flush=True)
    path = options.output
    if path is None and not (options.no_tests or options.only):
        slug = re.sub(r"[^A-Za-z0-9]+", "-", device).strip("-")
        path = ROOT / "benchmarks" / "records" / f"{slug}.json"

    def save():
        if path:
            path.parent.mkdir(exist_ok=True)
            path.write_text(json.dumps(record, indent=1) + "\n")
            print(f"wrote {path}", flush=True)

    if not options.only:
        record["sweeps"] = measure.sweeps()
    print(json.dumps({k: v for k, v in record.items() if k != "rows"}), flush=True)
    save()
    record["models"] = models.measure(options.only)
    save()


if __name__ == "__main__":
    main()
