"""The backward kernel on a GPU, against the float64 oracle, finite differences, and itself."""

import cases
import numpy as np
import pytest

from mambacupy import reference, selective_scan_bwd, selective_scan_fwd

pytestmark = pytest.mark.gpu

# Relative error in the 2-norm by the dtype of u: of gradients that are stored in it, and of those that are not.
STORED = {"float16": 5e-4, "bfloat16": 4e-3, "float32": 1e-6, "float64": 1e-13}
KEPT_WIDE = {"float16": 1e-6, "bfloat16": 1e-6, "float32": 1e-6, "float64": 1e-13}
IN_TENSOR_DTYPE = ("u", "delta", "z")


@pytest.fixture(scope="module")
def cp():
    return pytest.importorskip("cupy")


def incoming(cp_or_np, arguments, seed=9):
    """dy and dlast_state for a case, as NumPy arrays."""
    rng = np.random.default_rng(seed)
    u, A = arguments["u"], arguments["A"]
    dy = cases.like(u, rng.standard_normal(u.shape))
    last = rng.standard_normal((u.shape[0], *A.shape))
    if A.dtype.kind == "c":
        last = last + 1j * rng.standard_normal(last.shape)
    return dy, last.astype(A.dtype)


def oracle(arguments, options, dy, dlast_state):
    wide = cases.in_double(arguments | {"dy": dy, "dlast_state": dlast_state})
    dy, dlast_state = wide.pop("dy"), wide.pop("dlast_state")
    return reference.selective_scan_bwd(dy, reference.selective_scan_fwd(**wide, **options)[2], dlast_state)


def on_gpu(arguments, options, dy, dlast_state):
    saved = selective_scan_fwd(**{k: None if x is None else cases.to_gpu(x) for k, x in arguments.items()}, **options)[2]
    return selective_scan_bwd(cases.to_gpu(dy), saved, None if dlast_state is None else cases.to_gpu(dlast_state))


def compare(got, wanted, dtype):
    """Names of gradients that are too far from the oracle's, with their errors."""
    wrong = {}
    for name in reference.SelectiveScanGrads._fields:
        one, two = getattr(got, name), getattr(wanted, name)
        assert (one is None) == (two is None), name
        if one is None:
            continue
        assert one.shape == two.shape
        stored = name in IN_TENSOR_DTYPE or one.dtype == cases.DTYPES[dtype]
        error = cases.relative_error(one.get(), two)
        if not error <= (STORED if stored else KEPT_WIDE)[dtype]:
            wrong[name] = error
    return wrong


@pytest.mark.parametrize("row", cases.ROWS)
def test_row(cp, row):
    arguments, options = cases.make(**cases.ROWS[row])
    dy, dlast_state = incoming(cp, arguments)
    got = on_gpu(arguments, options, dy, dlast_state)
    with cp.cuda.Stream(non_blocking=True) as stream:
        again = on_gpu(arguments, options, dy, dlast_state)
        stream.synchronize()
    assert compare(got, oracle(arguments, options, dy, dlast_state), (cases.BASE | cases.ROWS[row])["dtype"]) == {}
    for name, one, two in zip(got._fields, got, again, strict=True):
        if one is not None:
            assert one.get().tobytes() == two.get().tobytes(), name
            assert one.dtype == arguments[name].dtype


# Errors of the original implementation on this case, measured on the same kind of GPU.
PEER = {
    "float32": dict(
        u=1.3e-7, delta=1.8e-7, A=4.3e-7, B=2.1e-7, C=2.1e-7, D=1.2e-7, z=1.3e-7, delta_bias=2.0e-7
    ),
    "bfloat16": dict(
        u=1.67e-3, delta=1.61e-3, A=4.2e-7, B=1.67e-3, C=1.66e-3, D=1.0e-7, z=2.37e-3, delta_bias=2.0e-7
    ),
}  # fmt: skip


@pytest.mark.parametrize("dtype", PEER)
@pytest.mark.parametrize("order", ["length", "channel"])
def test_errors_are_no_larger_than_the_peers(cp, dtype, order):
    arguments, options = cases.make(dim=64, length=1000, dtype=dtype, order=order, initial_state=False)
    arguments["A"] = np.tile(-np.arange(1.0, 17.0, dtype=np.float32), (64, 1))
    dy, _ = incoming(cp, arguments)
    got, wanted = on_gpu(arguments, options, dy, None), oracle(arguments, options, dy, None)
    errors = {name: cases.relative_error(getattr(got, name).get(), getattr(wanted, name)) for name in PEER[dtype]}
    assert {name: (error, PEER[dtype][name]) for name, error in errors.items() if not error <= PEER[dtype][name]} == {}
