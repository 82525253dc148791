"""A few small scans that reach every kind of memory access, for compute-sanitizer: see `make sanitize`."""

import cupy as cp

from mambacupy import selective_scan_fwd
from tests import cases

ROWS = ("base", "bfloat16", "complex-bfloat16", "channel-order-bfloat16", "groups-differ", "constant-BC", "zoh", "reverse",
        "length-1", "length-65", "state-5", "state-300", "dim-7", "float64")  # fmt: skip


def main():
    cp.cuda.set_allocator(None)  # an allocation of its own for every array, so that stepping over an end is seen
    for row in ROWS:
        arguments, options = cases.make(**cases.ROWS[row])
        given = {}
        for name, x in arguments.items():
            given[name] = None if x is None else cp.asarray(x)
        y, last_state, _ = selective_scan_fwd(**given, **options)
        print(row, float(cp.abs(y.astype(cp.float64)).sum()), float(cp.abs(last_state).sum()), flush=True)


if __name__ == "__main__":
    main()
