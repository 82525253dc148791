"""What a record holds about the selective scan: times, errors, memory."""

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import cases
import cupy as cp
import numpy as np
import scans

from benchmarks import models
from benchmarks.rows import ROWS
from benchmarks.timing import free, median_seconds, sets_to_exceed_cache
from mambacupy import arrays, reference, selective_scan, selective_scan_bwd, selective_scan_fwd

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
    """Median milliseconds of both directions in both memory orders, beside what limits them."""
    times = {f"{direction}_{order}_ms": ms for order in ("length", "channel") for direction, ms in time_order(row, order)}
    clock, units = cp.cuda.Device().attributes["ClockRate"] * 1e3, cp.cuda.Device().attributes["MultiProcessorCount"]
    limits = {
        "forward_memory_ms": row.forward_bytes / bandwidth * 1e3,
        "forward_exponentials_ms": row.forward_exponentials / (16 * units * clock) * 1e3,
        "forward_issue_ms": row.forward_instructions / (4 * units * clock) * 1e3,
        "backward_memory_ms": row.backward_bytes / bandwidth * 1e3,
    }
    peers = {"peer_forward_ms": row.peer_forward_ms, "peer_backward_ms": row.peer_backward_ms}
    share = {"forward_share_of_copy_bandwidth": round(limits["forward_memory_ms"] / times["forward_length_ms"], 3)}
    return {"row": row.name, **times, **{name: round(ms, 4) for name, ms in limits.items()}, **share, **peers}


def time_order(row, order):
    """("forward", ms) and ("backward", ms) in one memory order."""
    sets = [arguments(row, order, seed) for seed in range(min(8, sets_to_exceed_cache(row.forward_bytes)))]
    forward = median_seconds([lambda s=s: selective_scan(**s) for s in sets])
    saved = [selective_scan_fwd(**s)[2] for s in sets]
    calls = [lambda s=s, kept=kept: selective_scan_bwd(s["z"], kept) for s, kept in zip(sets, saved, strict=True)]
    backward = median_seconds(calls)
    del sets, saved, calls
    free()
    return ("forward", round(forward * 1e3, 4)), ("backward", round(backward * 1e3, 4))


def sweeps():
    """Milliseconds against length (batch 1, dim 1536), against batch (dim 1536, length 512), and of an odd length beside an
    even one (batch 8, dim 2048); bfloat16, 16 states."""
    base = ROWS[0]._replace(batch=1, dim=1536)
    rows = {"length": [base._replace(length=2**n) for n in range(8, 21, 2)]}
    rows["batch"] = [base._replace(length=512, batch=4**n) for n in range(5)]
    rows["odd length"] = [ROWS[0]._replace(length=n) for n in (4095, 4096)]
    found = {}
    for name, varied in rows.items():
        times = [dict(time_order(row, "length")) for row in varied]
        found[name] = {str(getattr(row, name.split()[-1])): ms for row, ms in zip(varied, times, strict=True)}
    return found


def first_call_seconds():
    """A fresh process's first call with an empty kernel cache, and the next process's, without the import of CuPy."""
    code = (
        "import cupy, time, mambacupy; x = cupy.ones((1, 64, 64), 'float32'); A = -cupy.ones((64, 16), 'float32')\n"
        "B = cupy.ones((1, 16, 64), 'float32'); cupy.cuda.get_current_stream().synchronize(); start = time.perf_counter()\n"
        "mambacupy.selective_scan(x, x, A, B, B); cupy.cuda.get_current_stream().synchronize()\n"
        "print(time.perf_counter() - start)"
    )
    with tempfile.TemporaryDirectory() as cache:
        environment = os.environ | {"CUPY_CACHE_DIR": cache}
        command = [sys.executable, "-c", code]
        runs = [
            subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True) for _ in range(2)
        ]
    return dict(zip(("compiling", "from_cache"), (round(float(run.stdout), 3) for run in runs), strict=True))


def errors():
    """Relative errors in the 2-norm against the float64 reference, in the case that the tests compare with the original."""
    found = {}
    for dtype in ("float32", "bfloat16", "float16"):
        host, options = cases.make_for_peer(dtype, "length")
        dy, _ = scans.incoming(host)
        given = {name: None if x is None else cp.asarray(x) for name, x in host.items()}
        y, _, saved = selective_scan_fwd(**given, **options)
        wanted_y, _, _ = reference.selective_scan_fwd(**cases.in_double(host), **options)
        got = {"y": y} | selective_scan_bwd(cp.asarray(dy), saved)._asdict()
        wanted = {"y": wanted_y} | scans.oracle(host, options, dy, None)._asdict()
        found[dtype] = {name: _relative_error(x, wanted[name]) for name, x in got.items() if x is not None}
    return found


def _relative_error(got, wanted):
    return float(f"{np.linalg.norm(cp.asnumpy(got).astype(np.float64) - wanted) / np.linalg.norm(wanted):.3g}")


def host_microseconds():
    """Host time of a warm call on small arrays: in the fastest of many loops, so short that some meet nobody else at work."""
    given = arguments(ROWS[0]._replace(batch=1, dim=64, length=64))
    _, _, saved = selective_scan_fwd(**given)
    calls = {"forward": lambda: selective_scan(**given), "backward": lambda: selective_scan_bwd(given["z"], saved)}
    calls["state update"] = dict(models.state_update(1))[""]
    return {name: _host_microseconds(call) for name, call in calls.items()}


def _host_microseconds(call, calls=50, repeats=80):
    best = float("inf")
    for _ in range(repeats):
        cp.cuda.get_current_stream().synchronize()
        start = time.perf_counter()
        for _ in range(calls):
            call()
        best = min(best, time.perf_counter() - start)
    return round(best / calls * 1e6, 1)


def bytes_kept_an_element():
    """Memory that the forward pass keeps for the backward pass beyond its arguments, bfloat16, 16 states."""
    row = ROWS[0]._replace(batch=1, dim=64, length=4096)
    return selective_scan_fwd(**arguments(row))[2].states.nbytes / row.elements
