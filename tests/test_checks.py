"""The gate: a table of what it turns away, each row one change to a valid case and its message, and what it lets in."""

import io
import re
import sys
import timeit
import types

import cases
import ml_dtypes
import numpy as np
import pytest

import mambacupy
from mambacupy import checks
from mambacupy.reference import SelectiveScanGrads

NAMES = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias", "initial_state")
COMPLEX = {"complex": True}


def turned(x):
    return x.swapaxes(-1, -2)


def first_rows(x):
    return x[:1]


def shorter(x):
    return x[..., 1:]


def pairs(x):
    return np.repeat(x, 2, -1)


def through_a_file(x):
    """What numpy.load gives back for bfloat16: raw bytes, whose dtype is V2."""
    file = io.BytesIO()
    np.save(file, x)
    return np.load(io.BytesIO(file.getvalue()))


def to(dtype):
    return lambda x: x.astype(dtype)


LONG_FLOAT = np.dtype(np.longdouble)
NO_ARRAY = "wanted a NumPy or CuPy array; numpy.asarray(x) or cupy.asarray(x) gives one"
TENSOR = "wanted (batch=2, dim=24, length=70)"
STATE = "wanted (batch=2, dim=24, state=16)"
VARYING = "wanted (batch=2, state=16, length=70)"
GROUPED = "wanted (batch=2, groups, state=16, length=70)"
ANY_RANK = "wanted (batch=2, groups, state=16, length=70), the same without groups, or (dim=24, state=16) if constant"
CONSTANT = "wanted (dim=24, state=16)"
TWO_AXES = "of two axes is constant, one that varies is (batch, groups, state, length)"
TWO_LAYOUTS = "is complex of length 70, or real of length 140 and interleaved (re, im, re, im, …)"
FLOATS = "wanted float16, bfloat16, float32 or float64"

# Rows: case, argument, what is done to it, and the message after the operation's name, in which … stands for any text.
SHAPES = {
    "u-1-axis": ({}, "u", lambda x: x[0, 0], "u has shape (70,), wanted (batch, dim, length)"),
    "u-2-axes": ({}, "u", lambda x: x[0], "u has shape (24, 70), wanted (batch, dim, length); a single sequence is u[None]"),
    "u-4-axes": ({}, "u", lambda x: x[None], "u has shape (1, 2, 24, 70), wanted (batch, dim, length)"),
    "delta-length": ({}, "delta", shorter, f"delta has shape (2, 24, 69), {TENSOR}"),
    "delta-batch": ({}, "delta", first_rows, f"delta has shape (1, 24, 70), {TENSOR}"),
    "delta-rank": ({}, "delta", lambda x: x[0], f"delta has shape (24, 70), {TENSOR}"),
    "delta-turned": ({}, "delta", turned, f"delta has shape (2, 70, 24), {TENSOR}; write delta.swapaxes(-1, -2)"),
    "z-dim": ({}, "z", lambda x: x[:, 1:], f"z has shape (2, 23, 70), {TENSOR}"),
    "z-turned": ({}, "z", turned, f"z has shape (2, 70, 24), {TENSOR}; write z.swapaxes(-1, -2)"),
    "A-rank": ({}, "A", lambda x: x[:, 0], "A has shape (24,), wanted (dim=24, state)"),
    "A-dim": ({}, "A", lambda x: x[1:], "A has shape (23, 16), wanted (dim=24, state)"),
    "A-turned": ({}, "A", turned, "A has shape (16, 24), wanted (dim=24, state); write A.swapaxes(-1, -2)"),
    "A-no-state": ({}, "A", lambda x: x[:, :0], "A has shape (24, 0), wanted (dim=24, state) with state at least 1"),
    "A-empty": ({"dim": 0}, "A", lambda x: x[:, :0], "A has shape (0, 0), wanted (dim=0, state) with state at least 1"),
    "D-dim": ({}, "D", shorter, "D has shape (23,), wanted (dim=24,)"),
    "D-rank": ({}, "D", lambda x: x[None], "D has shape (1, 24), wanted (dim=24,)"),
    "bias-dim": ({}, "delta_bias", first_rows, "delta_bias has shape (1,), wanted (dim=24,)"),
    "bias-rank": ({}, "delta_bias", lambda x: x[0, ...], "delta_bias has shape (), wanted (dim=24,)"),
    "state-batch": ({}, "initial_state", first_rows, f"initial_state has shape (1, 24, 16), {STATE}"),
    "state-state": ({}, "initial_state", shorter, f"initial_state has shape (2, 24, 15), {STATE}"),
    "state-rank": ({}, "initial_state", lambda x: x[0], f"initial_state has shape (24, 16), {STATE}"),
    "state-turned": (
        *({}, "initial_state", turned),
        f"initial_state has shape (2, 16, 24), {STATE}; write initial_state.swapaxes(-1, -2)",
    ),
    "B-1-axis": ({}, "B", lambda x: x[0, 0], f"B has shape (70,), {ANY_RANK}"),
    "B-2-axes": ({}, "B", lambda x: x[0], f"B has shape (16, 70), {CONSTANT}; B {TWO_AXES}"),
    "C-5-axes": ({}, "C", lambda x: x[None, None], f"C has shape (1, 1, 2, 16, 70), {ANY_RANK}"),
    "B-batch": ({}, "B", first_rows, f"B has shape (1, 16, 70), {VARYING}"),
    "B-state": ({}, "B", lambda x: x[:, 1:], f"B has shape (2, 15, 70), {VARYING}"),
    "B-length": ({}, "B", shorter, f"B has shape (2, 16, 69), {VARYING}"),
    "B-turned": ({}, "B", turned, f"B has shape (2, 70, 16), {VARYING}; write B.swapaxes(-1, -2)"),
    "C-state": ({}, "C", lambda x: x[:, 1:], f"C has shape (2, 15, 70), {VARYING}"),
    "C-turned": ({}, "C", turned, f"C has shape (2, 70, 16), {VARYING}; write C.swapaxes(-1, -2)"),
    "B-groups-batch": ({"B": 3}, "B", first_rows, f"B has shape (1, 3, 16, 70), {GROUPED}"),
    "B-groups-state": ({"B": 3}, "B", lambda x: x[:, :, 1:], f"B has shape (2, 3, 15, 70), {GROUPED}"),
    "C-groups-length": ({"C": 3}, "C", shorter, f"C has shape (2, 3, 16, 69), {GROUPED}"),
    "C-groups-turned": ({"C": 3}, "C", turned, f"C has shape (2, 3, 70, 16), {GROUPED}; write C.swapaxes(-1, -2)"),
    "B-groups-do-not-divide": (
        *({"B": 5}, "B", lambda x: x),
        f"B has shape (2, 5, 16, 70) with 5 groups, but dim = 24 is not divisible by 5; {GROUPED} with groups dividing 24",
    ),
    "B-more-groups-than-channels": (
        *({"B": 48}, "B", lambda x: x),
        f"B has shape (2, 48, 16, 70) with 48 groups, but dim = 24 is not divisible by 48; {GROUPED} with groups dividing 24",
    ),
    "C-no-groups": (
        *({"C": 3}, "C", lambda x: x[:, :0]),
        f"C has shape (2, 0, 16, 70) with 0 groups, but wants at least one; {GROUPED} with groups dividing 24",
    ),
    "B-constant-dim": ({"B": "constant"}, "B", lambda x: x[1:], f"B has shape (23, 16), {CONSTANT}; B {TWO_AXES}"),
    "C-constant-turned": (
        *({"C": "constant"}, "C", turned),
        f"C has shape (16, 24), {CONSTANT}; write C.swapaxes(-1, -2)",
    ),
    "B-pairs-real-A": (
        *({}, "B", pairs),
        f"B has shape (2, 16, 140), {VARYING}; interleaved (re, im) values in B need a complex A",
    ),
    "C-complex-and-pairs": (
        *(COMPLEX, "C", pairs),
        f"C has shape (2, 16, 140), {VARYING}; with a complex A, C {TWO_LAYOUTS}",
    ),
    "B-real-of-length-complex-A": (
        *(COMPLEX, "B", lambda x: x.real),
        f"B has shape (2, 16, 70), wanted (batch=2, state=16, length=140); with a complex A, B {TWO_LAYOUTS}",
    ),
    "B-turned-complex": (COMPLEX, "B", turned, f"B has shape (2, 70, 16), {VARYING}; write B.swapaxes(-1, -2)"),
    "B-state-of-nothing": (
        *({"length": 0}, "B", lambda x: x[:, 1:]),
        "B has shape (2, 15, 0), wanted (batch=2, state=16, length=0)",
    ),
}

DTYPES = {
    "u-integer": ({}, "u", to(np.int64), f"u is int64, {FLOATS}; write u.astype('float32')"),
    "u-object": ({}, "u", to(object), f"u is object, {FLOATS}; write u.astype('float32')"),
    "u-text": ({}, "u", to("U4"), f"u is str128, {FLOATS}"),
    "u-complex": ({}, "u", to(np.complex64), f"u is complex64, {FLOATS}; it must be real: write u.real"),
    "u-float128": ({"dtype": "float64"}, "u", to(LONG_FLOAT), f"u is {LONG_FLOAT.name}, {FLOATS}; write u.astype('float64')"),
    "u-foreign": (
        *({}, "u", lambda x: x.astype(x.dtype.newbyteorder())),
        f"u is float32 in foreign byte order, {FLOATS}… in this machine's; write u.astype(u.dtype.newbyteorder('='))",
    ),
    "u-from-a-file": (
        *({"dtype": "bfloat16"}, "u", through_a_file),
        f"u is void16, {FLOATS}; if this is bfloat16 that numpy.save wrote, write u.view(ml_dtypes.bfloat16)",
    ),
    "u-void-of-8-bytes": ({"dtype": "float64"}, "u", lambda x: x.view("V8"), f"u is void64, {FLOATS}"),
    "delta-float64": (
        *({}, "delta", to(np.float64)),
        "delta is float64, wanted float32, the dtype of u; write delta.astype('float32')",
    ),
    "delta-of-bfloat16-u": (
        *({"dtype": "bfloat16"}, "delta", to(np.float32)),
        "delta is float32, wanted bfloat16, the dtype of u; write delta.astype('bfloat16')",
    ),
    "delta-integer": (
        *({"dtype": "float16"}, "delta", to(np.int8)),
        "delta is int8, wanted float16, the dtype of u; write delta.astype('float16')",
    ),
    "delta-from-a-file": (
        *({"dtype": "bfloat16"}, "delta", through_a_file),
        "delta is void16, wanted bfloat16, the dtype of u; if this is … write delta.view(ml_dtypes.bfloat16)",
    ),
    "z-bool": ({}, "z", to(bool), "z is bool, wanted float32, the dtype of u; write z.astype('float32')"),
    "z-void-is-no-float32": ({}, "z", lambda x: x.view("V4"), "z is void32, wanted float32, the dtype of u"),
    "A-of-u": (
        *({"dtype": "bfloat16"}, "A", to(ml_dtypes.bfloat16)),
        "A is bfloat16, wanted float32 or complex64 because u is bfloat16; write A.astype('float32')",
    ),
    "A-wide": (
        *({}, "A", to(np.float64)),
        "A is float64, wanted float32 or complex64 because u is float32; write A.astype('float32')",
    ),
    "A-wide-complex": (
        *(COMPLEX, "A", to(np.complex128)),
        "A is complex128, wanted float32 or complex64 because u is float32; write A.astype('complex64')",
    ),
    "A-narrow": (
        *({"dtype": "float64"}, "A", to(np.float32)),
        "A is float32, wanted float64 or complex128 because u is float64; write A.astype('float64')",
    ),
    "A-narrow-complex": (
        *({"dtype": "float64", "complex": True}, "A", to(np.complex64)),
        "A is complex64, wanted float64 or complex128 because u is float64; write A.astype('complex128')",
    ),
    "A-foreign": (
        *({}, "A", lambda x: x.astype(x.dtype.newbyteorder())),
        "A is float32 in foreign byte order, wanted float32 or complex64 …; write A.astype(A.dtype.newbyteorder('='))",
    ),
    "D-half": (
        *({"dtype": "float16"}, "D", to(np.float16)),
        "D is float16, wanted float32 because u is float16; write D.astype('float32')",
    ),
    "D-complex": (
        *(COMPLEX, "D", to(np.complex64)),
        "D is complex64, wanted float32 because u is float32; it must be real: write D.real",
    ),
    "bias-wide": (
        *({}, "delta_bias", to(np.float64)),
        "delta_bias is float64, wanted float32 because u is float32; write delta_bias.astype('float32')",
    ),
    "bias-narrow": (
        *({"dtype": "float64"}, "delta_bias", to(np.float32)),
        "delta_bias is float32, wanted float64 because u is float64; write delta_bias.astype('float64')",
    ),
    "state-half": (
        *({"dtype": "float16"}, "initial_state", to(np.float16)),
        "initial_state is float16, wanted float32, the dtype of A; write initial_state.astype('float32')",
    ),
    "state-real": (
        *(COMPLEX, "initial_state", lambda x: x.real),
        "initial_state is float32, wanted complex64, the dtype of A; write initial_state.astype('complex64')",
    ),
    "state-complex": (
        *({}, "initial_state", to(np.complex64)),
        "initial_state is complex64, wanted float32, the dtype of A; it must be real: write initial_state.real",
    ),
    "B-integer": (
        *({}, "B", to(np.int32)),
        "B is int32, wanted float16, bfloat16 or float32 because A is float32; write B.astype('float32')",
    ),
    "B-wide": (
        *({}, "B", to(np.float64)),
        "B is float64, wanted float16, bfloat16 or float32 because A is float32; write B.astype('float32')",
    ),
    "C-narrow": (
        *({"dtype": "float64"}, "C", to(np.float32)),
        "C is float32, wanted float64 because A is float64; write C.astype('float64')",
    ),
    "C-from-a-file": (
        *({"dtype": "bfloat16"}, "C", through_a_file),
        "C is void16, wanted float16, bfloat16 or float32 because A is float32; if … write C.view(ml_dtypes.bfloat16)",
    ),
    "B-complex-real-A": (
        *({}, "B", to(np.complex64)),
        "B is complex64 but A is float32; a complex B needs a complex A: write A.astype('complex64'), or B.real",
    ),
    "C-complex-real-A-double": (
        *({"dtype": "float64"}, "C", to(np.complex128)),
        "C is complex128 but A is float64; a complex C needs a complex A: write A.astype('complex128'), or C.real",
    ),
    "C-wide-complex": (
        *(COMPLEX, "C", to(np.complex128)),
        "C is complex128, wanted float16, bfloat16, float32 or complex64 because A is complex64; write C.astype('complex64')",
    ),
    "B-constant-half": (
        *({"dtype": "float16", "B": "constant"}, "B", to(np.float16)),
        "B is float16, wanted float32, the dtype of A, because this B is constant; write B.astype('float32')",
    ),
    "C-constant-real": (
        *({"complex": True, "C": "constant"}, "C", lambda x: x.real),
        "C is float32, wanted complex64, the dtype of A, because this C is constant; write C.astype('complex64')",
    ),
    "B-constant-complex": (
        *({"B": "constant"}, "B", to(np.complex64)),
        "B is complex64, wanted float32, the dtype of A, because this B is constant; it must be real: write B.real",
    ),
}

KINDS = {
    **{
        f"{name}-missing": (
            *({}, name, lambda x: None),
            f"{name} is None, wanted an array; only D, z, delta_bias and initial_state may be left out",
        )
        for name in ("u", "delta", "A", "B", "C")
    },
    **{f"{name}-list": ({}, name, lambda x: x.tolist(), f"{name} is of type list, {NO_ARRAY}") for name in NAMES},
}

VALUES = {
    "unknown": ({}, "discretization", lambda x: "exact", "discretization is 'exact', wanted 'euler' or 'zoh'"),
    "none": ({}, "discretization", lambda x: None, "discretization is None, wanted 'euler' or 'zoh'"),
    "capital": ({}, "discretization", lambda x: x.title(), "discretization is 'Euler', wanted 'euler' or 'zoh'"),
}

TABLE = [
    pytest.param(*row[:3], error, row[3], id=name)
    for error, rows in ((ValueError, SHAPES | VALUES), (TypeError, DTYPES | KINDS))
    for name, row in rows.items()
    if name != "u-float128" or LONG_FLOAT.itemsize > 8
]


def contents(arguments):
    """Everything of the arrays that a call could change."""
    found = {k: x for k, x in arguments.items() if isinstance(x, np.ndarray)}
    return {k: (id(x), x.shape, x.strides, x.dtype, x.tobytes()) for k, x in found.items()}


def assert_message(error, operation, wanted):
    """The message is `operation: wanted`, where … stands for any text."""
    assert re.fullmatch(".*".join(map(re.escape, f"{operation}: {wanted}".split("…"))), str(error.value)), str(error.value)


def changed(case, name, change):
    arguments, options = cases.make(**case)
    arguments |= options
    return arguments | {name: change(arguments[name])}


@pytest.mark.parametrize(("case", "name", "change", "kind", "message"), TABLE)
def test_turned_away(case, name, change, kind, message):
    arguments = changed(case, name, change)
    before = contents(arguments)
    with pytest.raises(kind) as error:
        mambacupy.selective_scan(**arguments)
    assert type(error.value) is kind
    assert_message(error, "selective_scan", message)
    assert contents(arguments) == before


def test_rows_are_different():
    messages = [row.values[4] for row in TABLE]
    assert len(set(messages)) == len(messages) - 1  # B-turned reads the same for a real and a complex A


@pytest.mark.parametrize(("case", "name", "change", "kind", "message"), [row for row in TABLE if "; write " in row.values[4]])
def test_hints_help(case, name, change, kind, message):
    arguments = changed(case, name, change)
    with pytest.raises(kind) as error:
        mambacupy.selective_scan(**arguments)
    expression = str(error.value).rpartition("write ")[2]
    arguments[name] = eval(expression, {"ml_dtypes": ml_dtypes, name: arguments[name]})
    mambacupy.selective_scan(**arguments)


def test_each_operation_names_itself():
    arguments, _ = cases.make()
    with pytest.raises(ValueError, match=r"^selective_scan_fwd: discretization is 'exact'"):
        mambacupy.selective_scan_fwd(**arguments, discretization="exact")


# ---------------------------------------------------------------------------------------------------- what is let in
EMPTY = {
    "batch-0": {"batch": 0},
    "dim-0": {"dim": 0},
    "dim-0-groups": {"dim": 0, "B": 2, "C": 3},
    "dim-0-constant": {"dim": 0, "B": "constant", "C": "constant"},
    "length-0": {"length": 0},
    "length-0-interleaved": {"length": 0, "complex": True, "B": "interleaved", "C": "interleaved"},
    "all-0-channel-order": {"batch": 0, "dim": 0, "length": 0, "order": "channel"},
}
VALID = {k: row for k, row in cases.ROWS.items() if not {"state", "dim", "length"} & row.keys()} | EMPTY


@pytest.mark.parametrize("row", VALID)
def test_let_in(row):
    arguments, options = cases.make(**VALID[row])
    for x in arguments.values():
        if x is not None:
            x.setflags(write=False)
    before = contents(arguments)
    y, last, saved = mambacupy.selective_scan_fwd(**arguments, **options)
    u, A = arguments["u"], arguments["A"]
    batch, dim, length = u.shape
    assert (y.shape, y.dtype) == (u.shape, u.dtype)
    assert (last.shape, last.dtype) == ((batch, dim, A.shape[1]), A.dtype)
    assert (saved.states.shape, saved.states.dtype) == ((batch, -(-length // 64), dim, A.shape[1]), A.dtype)
    assert y.strides == u.strides or not y.size
    if length == 0:
        assert last.tobytes() == arguments["initial_state"].tobytes()
    assert contents(arguments) == before
    assert not any(np.shares_memory(got, x) for got in (y, last) for x in arguments.values() if x is not None)

    only_y = mambacupy.selective_scan(**arguments, **options)
    y_again, last_again = mambacupy.selective_scan(**arguments, **options, return_last_state=True)
    assert only_y.tobytes() == y_again.tobytes() == y.tobytes() and last_again.tobytes() == last.tobytes()


@pytest.mark.parametrize(
    ("order", "view", "contiguous"),
    [
        ("length", np.s_[:, :, ::2], 2),
        ("length", np.s_[:, ::-1, 1:], 2),
        ("channel", np.s_[:, 1:, 1:], 1),
        ("channel", np.s_[:, ::2], 2),
    ],
)
def test_views_keep_the_order_they_have(order, view, contiguous):
    arguments, options = cases.make(order=order)
    u, delta, z = (arguments[name][view] for name in ("u", "delta", "z"))
    batch, dim, length = u.shape
    others, _ = cases.make(batch=batch, dim=dim, length=length)
    y = mambacupy.selective_scan(**others | {"u": u, "delta": delta, "z": z}, **options)
    dense = y if contiguous == 2 else y.swapaxes(1, 2)
    assert dense.shape[2] > 1 and dense.flags.c_contiguous


@pytest.mark.parametrize("B", ["varying", "constant", 3])
def test_coefficients_pass_without_a_copy(B):
    arguments, _ = cases.make(B=B)
    args = checks.selective_scan("op", **arguments, discretization="zoh")
    assert all(getattr(args, name) is arguments[name] for name in NAMES if name not in ("B", "C"))
    assert np.shares_memory(args.B, arguments["B"]) and args.B.ndim == (2 if B == "constant" else 4)
    assert (args.groups_B, args.groups_C, args.C.shape) == ({"varying": 1, "constant": 0, 3: 3}[B], 1, (2, 1, 16, 70))
    assert (args.batch, args.dim, args.length, args.state) == (2, 24, 70, 16)
    assert (args.xp, args.complex, args.zoh) == (np, False, True)


class CupyArray:
    """A CuPy array of which only attributes can be read, as no device is there."""

    def __init__(self, shape, dtype):
        self.shape, self.dtype, self.ndim = shape, dtype, len(shape)
        self.data = types.SimpleNamespace(device_id=0)

    def reshape(self, shape):
        return CupyArray(shape, self.dtype)


def test_no_device_is_touched(monkeypatch):
    stub = types.SimpleNamespace(ndarray=CupyArray)
    monkeypatch.setitem(sys.modules, "cupy", stub)
    arguments = {k: CupyArray(x.shape, x.dtype) for k, x in cases.make(B=3)[0].items()}
    args = checks.selective_scan("op", **arguments, discretization="euler")
    assert args.xp is stub and args.C.shape == (2, 1, 16, 70)
    arguments["z"] = CupyArray((2, 70, 24), np.dtype(np.float32))
    with pytest.raises(ValueError, match=r"z has shape \(2, 70, 24\), .*; write z\.swapaxes\(-1, -2\)$"):
        checks.selective_scan("op", **arguments, discretization="euler")


@pytest.mark.parametrize("row", ["base", "complex-groups", "constant-BC"])
def test_the_gate_is_quick(row):
    arguments, _ = cases.make(**cases.ROWS[row])
    seconds = min(
        timeit.repeat(lambda: checks.selective_scan("op", **arguments, discretization="euler"), number=20, repeat=200)
    )
    assert seconds / 20 < 60e-6  # about 4 µs


# ---------------------------------------------------------------------------------------------------- backward
NO_SAVED = "wanted the third result of selective_scan_fwd"

BACKWARD = {
    "saved-none": ({}, "saved", lambda x: None, TypeError, f"saved is of type NoneType, {NO_SAVED}"),
    "saved-array": ({}, "saved", lambda x: x.u, TypeError, f"saved is of type ndarray, {NO_SAVED}"),
    "saved-all-results": ({}, "saved", lambda x: (x.u, x.u, x), TypeError, f"saved is of type tuple, {NO_SAVED}"),
    "saved-grads": (
        *({}, "saved", lambda x: SelectiveScanGrads(*x[:9]), TypeError),
        f"saved is of type SelectiveScanGrads, {NO_SAVED}",
    ),
    "dy-none": (
        *({}, "dy", lambda x: None, TypeError),
        "dy is None, wanted an array of u's shape (2, 24, 70); zeros if only last_state has a gradient",
    ),
    "dy-list": ({}, "dy", lambda x: x.tolist(), TypeError, f"dy is of type list, {NO_ARRAY}"),
    "dy-length": ({}, "dy", shorter, ValueError, f"dy has shape (2, 24, 69), {TENSOR}"),
    "dy-rank": ({}, "dy", lambda x: x[0], ValueError, f"dy has shape (24, 70), {TENSOR}"),
    "dy-turned": ({}, "dy", turned, ValueError, f"dy has shape (2, 70, 24), {TENSOR}; write dy.swapaxes(-1, -2)"),
    "dy-wide": (
        *({}, "dy", to(np.float64), TypeError),
        "dy is float64, wanted float32 because u is float32; write dy.astype('float32')",
    ),
    "dy-other-half": (
        *({"dtype": "bfloat16"}, "dy", to(np.float16), TypeError),
        "dy is float16, wanted bfloat16 or float32 because u is bfloat16; write dy.astype('float32')",
    ),
    "dy-narrow": (
        *({"dtype": "float64"}, "dy", to(np.float32), TypeError),
        "dy is float32, wanted float64 because u is float64; write dy.astype('float64')",
    ),
    "dy-complex": (
        *(COMPLEX, "dy", to(np.complex64), TypeError),
        "dy is complex64, wanted float32 because u is float32; it must be real: write dy.real",
    ),
    "dstate-list": ({}, "dlast_state", lambda x: x.tolist(), TypeError, f"dlast_state is of type list, {NO_ARRAY}"),
    "dstate-batch": ({}, "dlast_state", first_rows, ValueError, f"dlast_state has shape (1, 24, 16), {STATE}"),
    "dstate-turned": (
        *({}, "dlast_state", turned, ValueError),
        f"dlast_state has shape (2, 16, 24), {STATE}; write dlast_state.swapaxes(-1, -2)",
    ),
    "dstate-half": (
        *({"dtype": "bfloat16"}, "dlast_state", to(ml_dtypes.bfloat16), TypeError),
        "dlast_state is bfloat16, wanted float32, the dtype of A; write dlast_state.astype('float32')",
    ),
    "dstate-real": (
        *(COMPLEX, "dlast_state", lambda x: x.real, TypeError),
        "dlast_state is float32, wanted complex64, the dtype of A; write dlast_state.astype('complex64')",
    ),
}


def gradients(case):
    """Valid arguments of the backward gate."""
    arguments, options = cases.make(**case)
    y, last, saved = mambacupy.selective_scan_fwd(**arguments, **options)
    return {"saved": saved, "dy": y, "dlast_state": last}


@pytest.mark.parametrize(("case", "name", "change", "kind", "message"), BACKWARD.values(), ids=BACKWARD)
def test_gradients_turned_away(case, name, change, kind, message):
    arguments = gradients(case)
    arguments[name] = change(arguments[name])
    with pytest.raises(kind) as error:
        checks.selective_scan_bwd("selective_scan_bwd", **arguments)
    assert type(error.value) is kind
    assert_message(error, "selective_scan_bwd", message)
    hint = str(error.value).rpartition("; write ")[2]
    if hint != str(error.value):
        checks.selective_scan_bwd("op", **arguments | {name: eval(hint, {name: arguments[name]})})


def test_gradients_of_another_library_are_turned_away(monkeypatch):
    monkeypatch.setitem(sys.modules, "cupy", types.SimpleNamespace(ndarray=CupyArray))
    arguments = gradients({})
    arguments["dy"] = CupyArray((2, 24, 70), np.dtype(np.float32))
    with pytest.raises(TypeError, match=r"^op: NumPy and CuPy .* \(saved\.u, dlast_state from NumPy, dy from CuPy\)"):
        checks.selective_scan_bwd("op", **arguments)


@pytest.mark.parametrize("row", ["base", "bfloat16", "float64", "complex", *EMPTY])
def test_gradients_let_in(row):
    arguments = gradients(VALID[row])
    wide = arguments["dy"].astype(np.float64 if row == "float64" else np.float32)
    for change in ({}, {"dy": wide}, {"dlast_state": None}):
        given = arguments | change
        before = contents(given)
        checks.selective_scan_bwd("op", **given)
        assert contents(given) == before


STATES = {
    "none": (lambda states: None, TypeError, r"saved\.states is None"),
    "no-array": (lambda states: states.tolist(), TypeError, r"saved\.states"),
    "fewer": (lambda states: states[..., :2].copy(), ValueError, r"shape \(2, 2, 24, 2\).* wanted \(2, 2, 24, 16\)"),
    "dtype": (lambda states: states.astype(np.float64), ValueError, "float64, wanted .* float32"),
    "order": (np.asfortranarray, ValueError, "not C-contiguous"),
}


@pytest.mark.parametrize("change", STATES)
def test_saved_states_are_those_that_were_given(change):
    arguments, options = cases.make()
    y, _, saved = mambacupy.selective_scan_fwd(**arguments, **options)
    changed, error, message = STATES[change]
    with pytest.raises(error, match=message):
        mambacupy.selective_scan_bwd(y, saved._replace(states=changed(saved.states)))


def test_an_error_stands_for_itself():
    """Not for one of ours that was handled on the way to it."""
    arguments, _ = cases.make()
    with pytest.raises(ValueError) as caught:
        mambacupy.selective_scan(**arguments | {"z": arguments["z"][:, :3]})
    assert caught.value.__context__ is None
