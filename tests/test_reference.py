"""The scan in NumPy against outsiders: loops written along the equations, SciPy, and series in exact numbers."""

import functools
import math
from fractions import Fraction

import cases
import numpy as np
import pytest
import scipy.linalg
import scipy.signal

from mambacupy import reference
from mambacupy.reference import CHUNK, selective_scan, selective_scan_fwd

TENSORS = ("u", "delta", "z")
DOUBLE = {"dtype": "float64"}
ROUNDED = {"float16": 2**-11, "bfloat16": 2**-8, "float32": 2e-6, "float64": 1e-13}


# ---------------------------------------------------------------------------------------------------- loops
def expanded(x, dim, length, is_complex):
    """B or C as (batch, dim, state, length), every number where it is used."""
    if x.ndim == 2:
        return x[None, :, :, None]
    if is_complex and x.dtype.kind != "c":
        x = x[..., 0::2] + 1j * x[..., 1::2]
    groups = 1 if x.ndim == 3 else x.shape[1]
    channels = [d // (dim // groups) for d in range(dim)]
    return (x[:, None] if x.ndim == 3 else x)[:, channels]


def by_steps(u, delta, A, B, C, D, z, delta_bias, initial_state, delta_softplus, reverse, discretization):
    """y, last_state, and the state before every step walked: the equations, a step and a state at a time."""
    batch, dim, length = u.shape
    is_complex = A.dtype.kind == "c"
    B, C = (expanded(x, dim, length, is_complex) for x in (B, C))
    walk = range(length - 1, -1, -1) if reverse else range(length)
    y, before = np.zeros((batch, dim, length)), np.zeros((batch, length, dim, A.shape[1]), A.dtype)
    last = np.zeros((batch, dim, A.shape[1]), A.dtype)
    for n in range(A.shape[1]):
        h = np.zeros((batch, dim), A.dtype) if initial_state is None else initial_state[:, :, n]
        for t in walk:
            before[:, t, :, n] = h
            dhat = delta[:, :, t] + (0 if delta_bias is None else delta_bias)
            step = np.where(dhat > 20, dhat, np.log1p(np.exp(np.minimum(dhat, 20)))) if delta_softplus else dhat
            a = step * A[:, n]
            factor = step if discretization == "euler" else step * phi(a)
            h = np.exp(a) * h + factor * B[:, :, n, t % B.shape[3]] * u[:, :, t]
            term = C[:, :, n, t % C.shape[3]] * h
            y[:, :, t] += 2 * term.real if is_complex else term
        last[:, :, n] = h
    if D is not None:
        y += D[:, None] * u
    return (y if z is None else y * z / (1 + np.exp(-z))), last, before


def phi(a):
    """(exp(a) - 1)/a through sinh: exp(a/2)·sinh(a/2)/(a/2)."""
    half = np.where(a == 0, 1, a / 2)
    return np.where(a == 0, 1, np.exp(half) * np.sinh(half) / half)


@functools.cache
def row_by_steps(row):
    """Arguments and options of a row of cases, at most 200 steps long, and its results by steps in double."""
    changes = cases.ROWS[row]
    arguments, options = cases.make(**changes | {"length": min(changes.get("length", 70), 200)})
    return arguments, options, by_steps(**cases.in_double(arguments), **options)


@pytest.mark.parametrize("row", cases.ROWS)
def test_row_in_double(row):
    arguments, options, (y, last, before) = row_by_steps(row)
    got = selective_scan_fwd(**cases.in_double(arguments), **options)
    assert cases.relative_error(got[0], y) <= 1e-14
    assert cases.relative_error(got[1], last) <= 1e-14
    length = y.shape[2]
    starts = [min(t + CHUNK, length) - 1 if options["reverse"] else t for t in range(0, length, CHUNK)]
    assert cases.relative_error(got[2].states, before[:, starts]) <= 1e-14


@pytest.mark.parametrize("row", cases.ROWS)
def test_row_in_its_own_dtype(row):
    arguments, options, (y, last, _) = row_by_steps(row)
    got = selective_scan_fwd(**arguments, **options)
    dtype = (cases.BASE | cases.ROWS[row])["dtype"]
    assert cases.relative_error(got[0], y) <= ROUNDED[dtype]
    assert cases.relative_error(got[1], last) <= (1e-13 if dtype == "float64" else 1e-6)
    assert (got[0].dtype, got[1].dtype, got[2].states.dtype) == (arguments["u"].dtype, *[arguments["A"].dtype] * 2)
    assert cases.is_channel_contiguous(got[0]) == cases.is_channel_contiguous(arguments["u"])


# ---------------------------------------------------------------------------------------------------- SciPy
@pytest.mark.parametrize("is_complex", [False, True])
@pytest.mark.parametrize("length", [1, 64, 65, 500])
def test_constant_coefficients_are_a_linear_filter(length, is_complex):
    """y = Σ_n C_n·Δ·B_n / (1 - Ā_n q) u + D u, each term a recursive filter."""
    dim, state, step = 3, 4, 0.1
    case = DOUBLE | {"batch": 2, "dim": dim, "length": length, "state": state, "complex": is_complex}
    arguments, options = cases.make(**case, B="constant", C="constant", z=False, delta_bias=False, delta_softplus=False)
    u, A, B, C, D = (arguments[name] for name in ("u", "A", "B", "C", "D"))
    arguments["delta"] = np.full(u.shape, step)
    y, last = selective_scan(**arguments, **options, return_last_state=True)
    wanted, wanted_last = np.empty_like(u), np.empty_like(last)
    for d in range(dim):
        wanted[:, d] = D[d] * u[:, d]
        for n in range(state):
            decay = np.exp(step * A[d, n])
            before = decay * arguments["initial_state"][:, d, n, None]
            h, _ = scipy.signal.lfilter([step * B[d, n]], [1, -decay], u[:, d], zi=before)
            wanted[:, d] += (1 + is_complex) * (C[d, n] * h).real
            wanted_last[:, d, n] = h[:, -1]
    assert cases.relative_error(y, wanted) <= 1e-13
    assert cases.relative_error(last, wanted_last) <= 1e-13


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("method", ["cont2discrete", "expm"])
def test_zero_order_hold_is_exact(method, reverse):
    """Every step is the exact solution of h' = A·h + B·u, y = C·h + D·u, where u holds still during Δ."""
    arguments, options = cases.make(
        **DOUBLE, batch=1, dim=2, length=20, state=3, z=False, delta_bias=False, delta_softplus=False,
        B="constant", C="constant", discretization="zoh", reverse=reverse,
    )  # fmt: skip
    arguments["A"][0, :2] = 0, -1e-9
    u, delta, A, B, C, D = (arguments[name] for name in ("u", "delta", "A", "B", "C", "D"))
    y, last = selective_scan(**arguments, **options, return_last_state=True)
    walk = range(20)[::-1] if reverse else range(20)
    wanted, h = np.empty_like(u), arguments["initial_state"][0].copy()
    for d in range(2):
        for t in walk:
            step = delta[0, d, t]
            if method == "expm":
                system = np.zeros((4, 4))
                system[:3, :3], system[:3, 3] = np.diag(A[d]), B[d]
                whole = scipy.linalg.expm(system * step)
                decay, drive = whole[:3, :3], whole[:3, 3]
            else:
                system = np.diag(A[d]), B[d][:, None], C[d][None], np.array([[D[d]]])
                decay, drive, *_ = scipy.signal.cont2discrete(system, step, method="zoh")
            h[d] = decay @ h[d] + drive.ravel() * u[0, d, t]
            wanted[0, d, t] = C[d] @ h[d] + D[d] * u[0, d, t]
    assert cases.relative_error(y, wanted) <= 1e-13
    assert cases.relative_error(last[0], h) <= 1e-13


def test_zero_order_hold_does_not_depend_on_how_time_is_cut():
    """Two steps with the same u are one of twice the length; Euler's rule has this only in the limit."""
    arguments, options = cases.make(
        **DOUBLE, length=40, z=False, delta_bias=False, delta_softplus=False, B="constant", discretization="zoh"
    )  # fmt: skip
    halved = {**arguments, "u": arguments["u"].repeat(2, 2), "delta": arguments["delta"].repeat(2, 2) / 2}
    halved["C"] = arguments["C"].repeat(2, 2)
    one, last = selective_scan(**arguments, **options, return_last_state=True)
    two, last_of_two = selective_scan(**halved, **options, return_last_state=True)
    assert cases.relative_error(two[..., 1::2], one) <= 1e-13
    assert cases.relative_error(last_of_two, last) <= 1e-13


# ---------------------------------------------------------------------------------------------------- functions of numbers
def exact_phi(a, derivative=False):
    """phi or phi' of a complex number by its series in whole multiples of 2^-300: Σ a^k/(k+1)!, Σ (k+1)·a^k/(k+2)!."""
    one = 2**300
    re, im = (int(Fraction(float(x)) * one) for x in (a.real, a.imag))
    total, term = [0, 0], [one, 0]  # term = a^k
    for k in range(100):  # enough for |a| up to 20
        up, down = (k + 1, math.factorial(k + 2)) if derivative else (1, math.factorial(k + 1))
        total = [x + y * up // down for x, y in zip(total, term, strict=True)]
        term = [(re * term[0] - im * term[1]) // one, (re * term[1] + im * term[0]) // one]
    return complex(*(float(Fraction(x, one)) for x in total))


SIZES = (0, 1e-300, 1e-12, 1e-9, 1e-4, *np.geomspace(0.01, 0.49, 40), 0.499, 0.5, 0.501, 1, 3, 20)
NUMBERS = [sign * x for x in SIZES for sign in (1, -1)]
EPS = {np.float32: 2.0**-23, np.float64: 2.0**-52}


@pytest.mark.parametrize("is_complex", [False, True])
@pytest.mark.parametrize("dtype", EPS)
@pytest.mark.parametrize("name", ["phi", "phi_derivative"])
def test_phi(name, dtype, is_complex):
    a = np.array(NUMBERS, dtype)
    if is_complex:
        a = (a[:, None] * np.exp(1j * np.pi * np.arange(8) / 8)).astype(np.result_type(dtype, np.complex64)).ravel()
    wanted = np.array([exact_phi(x, name == "phi_derivative") for x in a])
    got = getattr(reference, name)(a)
    assert got.dtype == a.dtype
    assert np.all(abs(got - wanted) <= 8 * EPS[dtype] * abs(wanted))


@pytest.mark.parametrize("dtype", EPS)
def test_softplus_and_sigmoid(dtype):
    x = np.array([-1000, -104, -80, -30, -20, -5, -1, -1e-3, 0, 1e-3, 1, 5, 19.999, 20, 20.001, 30, 80, 1000], dtype)
    with np.errstate(under="ignore"):
        softplus, sigmoid = reference.softplus(x), reference.sigmoid(x)
        e = np.exp(-np.abs(x.astype(np.longdouble)))
    assert softplus.dtype == sigmoid.dtype == dtype
    wanted = np.where(x > 20, x, np.log1p(e) + np.maximum(x, 0))  # 20.001 is returned as it is, 2e-9 too little
    np.testing.assert_allclose(softplus, wanted.astype(float), rtol=4 * EPS[dtype], atol=np.finfo(dtype).smallest_normal)
    wanted = np.where(x >= 0, 1, e) / (1 + e)
    np.testing.assert_allclose(sigmoid, wanted.astype(float), rtol=4 * EPS[dtype], atol=np.finfo(dtype).smallest_normal)


# ---------------------------------------------------------------------------------------------------- one scan, said anew
KINDS = ["base", "bfloat16", "float64", "complex", "complex-groups", "constant-BC", "groups-differ", "zoh", "reverse", "no-z"]


def part(arguments, steps):
    """The arguments of some steps."""
    return {name: x[..., steps] if name in (*TENSORS, "B", "C") and x is not None and x.ndim > 2 else x
            for name, x in arguments.items()}  # fmt: skip


def results(arguments, options):
    y, last, saved = selective_scan_fwd(**arguments, **options)
    return y, last, saved.states


def assert_same(got, wanted):
    for one, two in zip(got, wanted, strict=True):
        assert (one.shape, one.dtype, one.tobytes()) == (two.shape, two.dtype, two.tobytes())


@pytest.mark.parametrize("split", [1, 63, 64, 65, 149])
@pytest.mark.parametrize("row", KINDS)
def test_a_scan_in_two_parts_is_one_scan(row, split):
    arguments, options = cases.make(**cases.ROWS[row] | {"length": 150})
    whole, last = selective_scan(**arguments, **options, return_last_state=True)
    parts, state, here = {}, arguments["initial_state"], [slice(0, split), slice(split, None)]
    for steps in here[::-1] if options["reverse"] else here:
        given = part(arguments, steps) | {"initial_state": state}
        parts[steps.start], state = selective_scan(**given, **options, return_last_state=True)
    assert_same((np.concatenate([parts[0], parts[split]], 2), state), (whole, last))


@pytest.mark.parametrize("length", [1, 63, 64, 65, 130])
@pytest.mark.parametrize("row", KINDS)
def test_reverse_is_flipped_time(row, length):
    arguments, options = cases.make(**cases.ROWS[row] | {"length": length, "reverse": True})
    y, last = selective_scan(**arguments, **options, return_last_state=True)
    flipped = part(arguments, slice(None, None, -1))
    wanted, wanted_last = selective_scan(**flipped, **options | {"reverse": False}, return_last_state=True)
    assert_same((y, last), (wanted[..., ::-1], wanted_last))


@pytest.mark.parametrize("is_complex", [False, True])
@pytest.mark.parametrize("name", ["B", "C"])
def test_constant_is_varying_that_does_not_vary(name, is_complex):
    arguments, options = cases.make(**DOUBLE | {"complex": is_complex, "dim": 5, name: "constant"})
    constant = arguments[name]
    varying = np.broadcast_to(constant[None, :, :, None], (2, 5, 16, 70))
    for other in (varying, np.ascontiguousarray(varying)):
        got, wanted = (results(arguments | {name: x}, options) for x in (other, constant))
        for one, two in zip(got, wanted, strict=True):
            assert cases.relative_error(one, two) <= 1e-15


@pytest.mark.parametrize("row", ["groups-3", "groups-differ", "complex-groups"])
def test_groups_are_scans_of_their_channels(row):
    arguments, options = cases.make(**cases.ROWS[row])
    y, last = selective_scan(**arguments, **options, return_last_state=True)
    for d in range(24):
        one = {k: x if x is None else x[:, d : d + 1] if x.ndim == 3 else x[d : d + 1] for k, x in arguments.items()}
        for name in ("B", "C"):
            one[name] = arguments[name][:, d // (24 // arguments[name].shape[1])]
        got, got_last = selective_scan(**one, **options, return_last_state=True)
        assert cases.relative_error(got, y[:, d : d + 1]) <= 1e-6
        assert cases.relative_error(got_last, last[:, d : d + 1]) <= 1e-6


def other_order(x):
    return np.asfortranarray(x)


def every_second(x):
    return np.repeat(x, 2, -1)[..., ::2]


def negative_strides(x):
    return np.ascontiguousarray(x[..., ::-1])[..., ::-1]


def inside(x):
    """A window of a larger array, starting at an odd address."""
    larger = np.zeros([n + 2 for n in x.shape], x.dtype)
    window = larger[tuple(slice(1, -1) for _ in x.shape)]
    window[...] = x
    return window


@pytest.mark.parametrize("view", [other_order, every_second, negative_strides, inside])
@pytest.mark.parametrize("row", [*KINDS, "complex-bfloat16"])
def test_memory_order_does_not_matter(row, view):
    arguments, options = cases.make(**cases.ROWS[row])
    wanted = results(arguments, options)
    viewed = {name: None if x is None else view(x) for name, x in arguments.items()}
    assert_same(results(viewed, options), wanted)
    for name, x in arguments.items():
        if x is not None:
            assert_same(results(arguments | {name: viewed[name]}, options), wanted)
    gradient = reference.selective_scan_bwd(wanted[0], selective_scan_fwd(**arguments, **options)[2], wanted[1])
    again = reference.selective_scan_bwd(view(wanted[0]), selective_scan_fwd(**viewed, **options)[2], view(wanted[1]))
    for one, two in zip(again, gradient, strict=True):
        assert one is None or cases.relative_error(one, two) <= 1e-6


@pytest.mark.parametrize("row", ["base", "complex", "zoh", "groups-3", "reverse"])
def test_channels_and_batch_entries_are_independent_of_their_neighbours(row):
    """A block's size must not show: results of one batch entry alone are those of many."""
    arguments, options = cases.make(**cases.ROWS[row] | {"batch": 5})
    y, last, states = results(arguments, options)
    for b in range(5):
        one = {name: x[b : b + 1] if name not in ("A", "D", "delta_bias") else x for name, x in arguments.items()}
        for got, whole in zip(results(one, options), (y, last, states), strict=True):
            assert cases.relative_error(got, whole[b : b + 1]) <= 1e-6


# ---------------------------------------------------------------------------------------------------- memory and dtypes
EMPTY = [{"batch": 0}, {"dim": 0}, {"length": 0}, {"dim": 0, "B": "constant", "C": "constant"}, {"length": 0, "B": 3, "C": 3},
         {"length": 0, "initial_state": False}, {"batch": 0, "dim": 0, "length": 0}]  # fmt: skip


@pytest.mark.parametrize("is_complex", [False, True])
@pytest.mark.parametrize("sizes", EMPTY, ids=str)
def test_empty(sizes, is_complex):
    arguments, options = cases.make(**sizes, complex=is_complex)
    y, last, saved = selective_scan_fwd(**arguments, **options)
    u, A, initial = (arguments[name] for name in ("u", "A", "initial_state"))
    assert y.shape == u.shape and last.shape == (u.shape[0], *A.shape)
    assert np.array_equal(last, np.zeros_like(last) if initial is None else initial)
    grads = reference.selective_scan_bwd(y, saved, last)
    for name, g in grads._asdict().items():
        x = arguments[name]
        assert g is None if x is None else (g.shape, g.dtype) == (x.shape, x.dtype)
    assert initial is None or np.array_equal(grads.initial_state, last)
    assert not any(np.any(g) for name, g in grads._asdict().items() if g is not None and name != "initial_state")


@pytest.mark.parametrize(
    "case", [{}, {"complex": True}, {"complex": True, "B": "interleaved"}, {"B": 3}, {"discretization": "zoh"}]
)
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_is_computed_in_single_and_rounded_once(dtype, case):
    arguments, options = cases.make(**case | {"dtype": dtype})
    single = {k: x.astype(np.float32) if x is not None and x.dtype == cases.DTYPES[dtype] else x for k, x in arguments.items()}
    y, last, saved = selective_scan_fwd(**arguments, **options)
    wide_y, wide_last, wide_saved = selective_scan_fwd(**single, **options)
    assert_same((y, last, saved.states), (wide_y.astype(y.dtype), wide_last, wide_saved.states))
    grads = reference.selective_scan_bwd(y, saved, last)
    wide = reference.selective_scan_bwd(y.astype(np.float32), wide_saved, last)
    assert_same(grads, [g.astype(arguments[name].dtype) for name, g in wide._asdict().items()])


@pytest.mark.parametrize("row", [k for k, row in cases.ROWS.items() if row.get("dtype", "float32") == "float32"])
def test_gradients_in_single_are_close_to_double(row):
    case = cases.ROWS[row] | {"length": min(cases.ROWS[row].get("length", 70), 200)}
    arguments, options = cases.make(**case)
    wide = cases.in_double(arguments)
    got, wanted = (
        reference.selective_scan_bwd(y, saved, last)
        for y, last, saved in (selective_scan_fwd(**given, **options) for given in (arguments, wide))
    )
    for name, one, two in zip(got._fields, got, wanted, strict=True):
        assert (one is None) == (two is None), name
        assert one is None or cases.relative_error(one, two) <= 1e-5, name


@pytest.mark.parametrize("row", [*KINDS, "channel-order", "complex-bfloat16", "length-1", "no-initial-state"])
def test_inputs_are_left_alone_and_results_are_fresh(row):
    arguments, options = cases.make(**cases.ROWS[row])
    given = {name: x for name, x in arguments.items() if x is not None}
    for x in given.values():
        x.setflags(write=False)
    before = {name: x.tobytes() for name, x in given.items()}
    y, last, saved = selective_scan_fwd(**arguments, **options)
    y.setflags(write=False)
    last.setflags(write=False)
    saved.states.setflags(write=False)
    grads = [g for g in reference.selective_scan_bwd(y, saved, last) if g is not None]
    assert {name: x.tobytes() for name, x in given.items()} == before
    assert all(getattr(saved, name) is x for name, x in arguments.items())
    fresh = [y, last, saved.states, *grads]
    for i, x in enumerate(fresh):
        assert not any(np.may_share_memory(x, other) for other in [*given.values(), *fresh[:i]])
    assert all(g.flags.writeable for g in grads)


@pytest.mark.parametrize("name", ["u", "delta", "A", "D", "z", "delta_bias", "initial_state"])
@pytest.mark.parametrize("row", ["base", "complex", "zoh", "constant-BC", "reverse"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_nan_stays_in_its_channel(row, name, value):
    arguments, options = cases.make(**cases.ROWS[row])
    wanted = results(arguments, options)
    spoilt = arguments[name].copy()
    channel = (slice(None), 5) if spoilt.ndim == 3 else 5
    spoilt[channel] = value
    got = results(arguments | {name: spoilt}, options)
    assert value == np.inf or np.isnan(got[0][:, 5]).any()
    for one, two in zip(got, wanted, strict=True):
        axis = one.ndim - 2
        assert np.array_equal(np.delete(one, 5, axis), np.delete(two, 5, axis))


@pytest.mark.parametrize("reverse", [False, True])
def test_a_nan_stays_in_its_future(reverse):
    arguments, options = cases.make(reverse=reverse, length=150)
    wanted, _ = selective_scan(**arguments, **options, return_last_state=True)
    arguments["u"][1, 3, 70] = np.nan
    got, last = selective_scan(**arguments, **options, return_last_state=True)
    reached = np.zeros(got.shape, bool)
    reached[1, 3, : 71 if reverse else None] = True
    if not reverse:
        reached[1, 3, :70] = False
    assert np.array_equal(np.isnan(got), reached) and np.array_equal(got[~reached], wanted[~reached])
    assert np.isnan(last[1, 3]).all() and np.isfinite(last[0]).all()


def test_no_warnings_from_numbers_that_overflow():
    arguments, options = cases.make(length=3)
    arguments["delta"][:] = 50
    arguments["A"] = np.abs(arguments["A"])
    arguments["z"][:] = -200
    with np.errstate(all="raise", under="ignore"):
        y, last, saved = selective_scan_fwd(**arguments, **options)
        reference.selective_scan_bwd(y, saved, last)
    assert not np.isfinite(last).all()
