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

from benchmarks.rows import ROWS
from benchmarks.timing import copy_bandwidth, median_seconds, sets_to_exceed_cache
from mambacupy import arrays, kernels, reference, selective_scan, selective_scan_bwd, selective_scan_fwd

ROOT = Path(__file__).resolve().parent.parent


def arguments(row, order="length", seed=0):
    """Random arguments of a row, as a trained Mamba's look: steps of about 0.05, decays of 1 to `state`."""
    rng = cp.random.default_rng(seed)
    dtype = arrays.FLOAT_DTYPES[row.dtype]

    def tensor(shift=0.0):
        shape = (row.batch, row.dim, row.length) if order == "length" else (row.batch, row.length, row.dim)
        x = (rng.standard_normal(shape, dtype=cp.float32) + cp.float32(shift)).astype(dtype)
        return x if order == "length" else x.swapaxes(1, 2)

    A = -cp.tile(cp.arange(1, row.state + 1, dtype=cp.float32), (row.dim, 1))
    if row.complex:
        A = A + 1j * rng.standard_normal(A.shape, dtype=cp.float32)
    length = row.length * (2 if row.complex else 1)
    B, C = (rng.standard_normal((row.batch, row.state, length), dtype=cp.float32).astype(dtype) for _ in "BC")
    ones = cp.ones(row.dim, cp.float32)
    return {
        "u": tensor(), "delta": tensor(-3.0), "A": A, "B": B, "C": C,
        "D": ones, "z": tensor(), "delta_bias": ones * 0.1, "delta_softplus": True,
    }  # fmt: skip


def time_row(row, bandwidth):
    """Median milliseconds of both directions in both memory orders, and the share of copy bandwidth that forward reaches."""
    element = arrays.FLOAT_DTYPES[row.dtype].itemsize
    size = row.batch * row.dim * row.length
    result = {"row": row.name, "forward_ms": {}, "backward_ms": {}}
    for order in ("length", "channel"):
        sets = [arguments(row, order, seed) for seed in range(min(8, sets_to_exceed_cache(4 * size * element)))]
        forward = median_seconds([lambda s=s: selective_scan(**s) for s in sets])
        saved = [selective_scan_fwd(**s)[2] for s in sets]
        backward = median_seconds(
            [lambda s=s, kept=kept: selective_scan_bwd(s["z"], kept) for s, kept in zip(sets, saved, strict=True)]
        )
        result["forward_ms"][order] = round(forward * 1e3, 4)
        result["backward_ms"][order] = round(backward * 1e3, 4)
        if order == "length":
            result["forward_share_of_copy_bandwidth"] = round(4 * size * element / forward / bandwidth, 3)
            result["bytes_kept_an_element"] = round(saved[0].states.nbytes / size, 3)
        del sets, saved
        cp.get_default_memory_pool().free_all_blocks()
    return result | {"peer_forward_ms": row.peer_forward_ms, "peer_backward_ms": row.peer_backward_ms}


def errors():
    """Relative errors in the 2-norm against the float64 reference, B2 D64 L1000 N16, A = -(1..16)."""
    found = {}
    for dtype in ("float32", "bfloat16", "float16"):
        given = arguments(ROWS[0]._replace(batch=2, dim=64, length=1000, dtype=dtype))
        host = {k: cp.asnumpy(x).astype(np.float64) if isinstance(x, cp.ndarray) else x for k, x in given.items()}
        y, _, saved = selective_scan_fwd(**given)
        wanted_y, _, wanted_saved = reference.selective_scan_fwd(**host)
        got = {"y": y} | selective_scan_bwd(given["z"], saved)._asdict()
        wanted = {"y": wanted_y} | reference.selective_scan_bwd(host["z"], wanted_saved)._asdict()
        found[dtype] = {name: _relative_error(x, wanted[name]) for name, x in got.items() if x is not None}
    return found


def _relative_error(got, wanted):
    return float(f"{np.linalg.norm(cp.asnumpy(got).astype(np.float64) - wanted) / np.linalg.norm(wanted):.3g}")


def host_microseconds():
    """Host time of a warm call on small arrays."""
    given = arguments(ROWS[0]._replace(batch=1, dim=64, length=64))
    _, _, saved = selective_scan_fwd(**given)
    calls = {"forward": lambda: selective_scan(**given), "backward": lambda: selective_scan_bwd(given["z"], saved)}
    return {name: _host_microseconds(call) for name, call in calls.items()}


def _host_microseconds(call, calls=200, repeats=5):
    best = float("inf")
    for _ in range(repeats):
        cp.cuda.get_current_stream().synchronize()
        start = time.perf_counter()
        for _ in range(calls):
            call()
        best = min(best, time.perf_counter() - start)
    return round(best / calls * 1e6, 1)


def run_tests():
    """Counts of the GPU tests' outcomes; the run ends here if one fails."""
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "--require-gpu", "-p", "no:cacheprovider", "tests"]
    if importlib.util.find_spec("xdist"):
        command += ["-n", "6"]  # most of the time goes into compiling
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
    name = properties["name"].decode()
    record = {
        "device": name,
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
    record["relative_errors"] = errors()
    record["host_microseconds_per_call"] = host_microseconds()
    record["rows"] = []
    for row in ROWS:
        if options.only in row.name:
            record["rows"].append(time_row(row, bandwidth))
            print(json.dumps(record["rows"][-1]), flush=True)
    print(json.dumps({k: v for k, v in record.items() if k != "rows"}), flush=True)
    if options.output or not (options.no_tests or options.only):
        slug = re.sub(r"[^A-Za-z0-9]+", "-", name).strip("-")
        path = options.output or ROOT / "benchmarks" / "records" / f"{slug}.json"
        path.write_text(json.dumps(record, indent=1) + "\n")
        print(f"wrote {path}")


if __name__ == "__main__":
    main()
