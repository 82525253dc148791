"""A few small scans that reach every kind of memory access, for compute-sanitizer: see `make sanitize`."""

import cases
import cupy as cp

from mambacupy import selective_scan_bwd, selective_scan_fwd

ROWS = ("base", "bfloat16", "complex-bfloat16", "channel-order-bfloat16", "groups-differ", "constant-BC", "zoh", "reverse",
        "length-1", "length-65", "state-5", "state-32-channel-order-bfloat16", "state-300", "dim-7", "float64")  # fmt: skip


def main():
    cp.cuda.set_allocator(None)  # an allocation of its own for every array, so that stepping over an end is seen
    rows = {row: cases.ROWS[row] for row in ROWS} | {"parts of time": {"batch": 1, "dim": 3, "length": 1100}}
    for row, changes in rows.items():
        arguments, options = cases.make(**changes)
        given = {name: None if x is None else cases.to_gpu(x) for name, x in arguments.items()}
        y, last_state, saved = selective_scan_fwd(**given, **options)
        grads = selective_scan_bwd(y, saved, last_state)
        cp.cuda.get_current_stream().synchronize()
        print(row, *(f"{float(abs(x).astype(cp.float64).sum()):.6g}" for x in (y, last_state, grads.u, grads.A)), flush=True)


if __name__ == "__main__":
    main()
