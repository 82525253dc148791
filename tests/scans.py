"""What the tests of the scan's kernels share: incoming gradients, the oracle's answer, and how far a kernel may be from it."""

import cases
import numpy as np

from mambacupy import reference

# Relative error in the 2-norm, by the dtype of u. y and the gradients of tensors are rounded to it; states and other gradients
# are float32 (float64).
Y = {"float16": 4e-4, "bfloat16": 3e-3, "float32": 6e-7, "float64": 1e-14}
STATE = {"float16": 6e-7, "bfloat16": 6e-7, "float32": 6e-7, "float64": 1e-14}
STORED = {"float16": 5e-4, "bfloat16": 4e-3, "float32": 1e-6, "float64": 1e-13}
KEPT_WIDE = {"float16": 1e-6, "bfloat16": 1e-6, "float32": 1e-6, "float64": 1e-13}


def incoming(arguments, seed=9):
    """dy and dlast_state for a case, as NumPy arrays."""
    rng = np.random.default_rng(seed)
    u, A = arguments["u"], arguments["A"]
    dy = cases.like(u, rng.standard_normal(u.shape))
    last = rng.standard_normal((u.shape[0], *A.shape))
    if A.dtype.kind == "c":
        last = last + 1j * rng.standard_normal(last.shape)
    return dy, last.astype(A.dtype)


def oracle(arguments, options, dy, dlast_state):
    """Gradients in float64."""
    wide = cases.in_double(arguments | {"dy": dy, "dlast_state": dlast_state})
    dy, dlast_state = wide.pop("dy"), wide.pop("dlast_state")
    return reference.selective_scan_bwd(dy, reference.selective_scan_fwd(**wide, **options)[2], dlast_state)


def wrong_results(got, arguments, options, case):
    """Which of (y, last_state, states) are too far from the oracle's, with their errors."""
    y, last_state, saved = reference.selective_scan_fwd(**cases.in_double(arguments), **options)
    wrong = {}
    for name, one, two, table in (("y", got[0], y, Y), ("last_state", got[1], last_state, STATE),
                                  ("states", got[2], saved.states, STATE)):  # fmt: skip
        error = cases.relative_error(to_host(one), two)
        if not error <= table[case["dtype"]]:
            wrong[name] = error
    return wrong


def wrong_gradients(got, wanted, case):
    """Which gradients are too far from the oracle's, with their errors."""
    wrong = {}
    for name, one, two in zip(reference.SelectiveScanGrads._fields, got, wanted, strict=True):
        assert (one is None) == (two is None), name
        if one is None:
            continue
        assert one.shape == two.shape
        stored = name in ("u", "delta", "z") or (name in "BC" and one.dtype == cases.DTYPES[case["dtype"]])
        error = cases.relative_error(to_host(one), two)
        most = (STORED if stored else KEPT_WIDE)[case["dtype"]]
        if not error <= most:
            wrong[name] = error
    return wrong


def to_host(x):
    return x.get() if hasattr(x, "get") else x
