"""Gradients against finite differences: those of the scan, row by row, and the check itself."""

from functools import partial
from typing import Any, NamedTuple

import cases
import ml_dtypes
import numpy as np
import pytest

import mambacupy
from mambacupy.gradients import check_gradients
from mambacupy.reference import SelectiveScanGrads

SMALL = {"dtype": "float64", "dim": 4, "length": 9, "state": 3}
ZOH = {"discretization": "zoh"}
NAMES = SelectiveScanGrads._fields

ROWS = {
    "base": {},
    **{f"B-{B}-C-{C}": {"B": B, "C": C} for B in ("varying", "constant", 2, 4) for C in ("varying", "constant", 2, 4)},
    **{
        f"complex-B-{B}-C-{C}": {"complex": True, "B": B, "C": C}
        for B in ("varying", "constant", "interleaved", 2)
        for C in ("varying", "constant", "interleaved", 2)
    },
    "zoh": ZOH,
    "zoh-constant": ZOH | {"B": "constant", "C": "constant"},
    "zoh-groups": ZOH | {"B": 2, "C": 4},
    "zoh-complex": ZOH | {"complex": True},
    "zoh-complex-interleaved": ZOH | {"complex": True, "B": "interleaved", "C": "interleaved"},
    "zoh-complex-constant": ZOH | {"complex": True, "B": "constant", "C": "constant"},
    "zoh-reverse": ZOH | {"reverse": True},
    "zoh-no-softplus": ZOH | {"delta_softplus": False},
    "no-D": {"D": False},
    "no-z": {"z": False},
    "no-bias": {"delta_bias": False},
    "no-initial-state": {"initial_state": False},
    "no-options": {"D": False, "z": False, "delta_bias": False, "initial_state": False},
    "no-softplus": {"delta_softplus": False},
    "no-softplus-complex": {"delta_softplus": False, "complex": True},
    "reverse": {"reverse": True},
    "reverse-complex": {"reverse": True, "complex": True},
    "reverse-constant": {"reverse": True, "B": "constant", "C": "constant"},
    "channel-order": {"order": "channel"},
    "channel-order-reverse": {"order": "channel", "reverse": True},
    **{f"length-{n}": {"length": n} for n in (1, 2, 63, 64, 65, 128, 130)},
    **{f"length-{n}-reverse": {"length": n, "reverse": True} for n in (1, 63, 64, 65, 130)},
    **{f"length-{n}-zoh-complex": ZOH | {"length": n, "complex": True} for n in (64, 65)},
    "state-1": {"state": 1},
    "dim-1": {"dim": 1},
    "batch-1": {"batch": 1},
    "all-1": {"batch": 1, "dim": 1, "length": 1, "state": 1},
}


def inputs_of(**changes):
    """A case's arrays and options."""
    arguments, options = cases.make(**SMALL | changes)
    return arguments | options


def check(inputs, **keywords):
    return check_gradients(mambacupy.selective_scan_fwd, mambacupy.selective_scan_bwd, inputs, **keywords)


# ---------------------------------------------------------------------------------------------------- the scan
@pytest.mark.parametrize("row", ROWS)
def test_row(row):
    inputs = inputs_of(**ROWS[row])
    errors = check(inputs)
    assert list(errors) == [name for name in NAMES if inputs[name] is not None]
    assert max(errors.values()) <= 1e-8


A_VALUES = {
    "0": [0.0, 0.0, 0.0],
    "near-0": [1e-9, -1e-9, -1e-4],
    "mixed": [0.0, -1e-9, -0.3],
    "series-border": [-0.5, -0.49999, -0.50001],  # where Δ = 1, phi' goes over from its series to its quotient
    "beyond-the-border": [-0.3, -3.0, -30.0],
    "positive": [0.3, 0.5, 2.0],
    "signs": [-2.0, 0.0, 2.0],
}


@pytest.mark.parametrize("discretization", ["euler", "zoh"])
@pytest.mark.parametrize("turn", [1, 1j, (1 + 1j) / 2**0.5], ids=["real", "imaginary", "complex"])
@pytest.mark.parametrize("values", A_VALUES)
def test_values_of_A(values, turn, discretization):
    inputs = inputs_of(complex=turn != 1, delta_softplus=False, delta_bias=False, discretization=discretization)
    inputs["A"] = np.tile(np.multiply(A_VALUES[values], turn), (4, 1))
    inputs["delta"] = np.where(np.arange(9) % 3, 1.0, inputs["delta"])
    assert max(check(inputs, directions=24).values()) <= 1e-8


@pytest.mark.parametrize("delta", [-30.0, -5.0, 0.0, 5.0, 19.5, 21.0, 40.0])
def test_softplus_near_and_far(delta):
    inputs = inputs_of()
    inputs["delta"] = inputs["delta"] * 0.01 + delta
    inputs["A"] = inputs["A"] * 0.01
    inputs["delta_bias"] = inputs["delta_bias"] * 0.01
    check(inputs)


@pytest.mark.parametrize("which", ["y", "last_state"])
@pytest.mark.parametrize("row", ["base", "complex-B-2-C-constant", "zoh", "reverse", "length-65", "zoh-complex"])
def test_one_output_alone(row, which):
    inputs = inputs_of(**ROWS[row])

    def fwd(**arguments):
        y, last_state, saved = mambacupy.selective_scan_fwd(**arguments)
        return (y if which == "y" else last_state), saved

    def bwd(gradient, saved):
        dy, dlast_state = (gradient, None) if which == "y" else (np.zeros_like(saved.u), gradient)
        return mambacupy.selective_scan_bwd(dy, saved, dlast_state)

    errors = check_gradients(fwd, bwd, inputs)
    assert max(errors.values()) <= 1e-9
    if which == "last_state":  # which neither C, D nor z has part in
        saved = fwd(**inputs)[1]
        grads = bwd(np.ones_like(inputs["initial_state"]), saved)
        assert not any(np.any(g) for g in (grads.C, grads.D, grads.z))


def test_options_and_arrays_can_be_bound():
    inputs = inputs_of()
    bound = {name: inputs.pop(name) for name in ("A", "D", "delta_softplus")}
    errors = check_gradients(partial(mambacupy.selective_scan_fwd, **bound), mambacupy.selective_scan_bwd, inputs)
    assert set(errors) == set(NAMES) - {"A", "D"}


# ---------------------------------------------------------------------------------------------------- wrong gradients are found
def spoilt(name, change):
    """selective_scan_bwd with one gradient changed."""

    def bwd(*arguments):
        grads = mambacupy.selective_scan_bwd(*arguments)
        return grads._replace(**{name: change(getattr(grads, name))})

    return bwd


def one_entry(g):
    g.flat[-1] *= 1.01
    return g


CHANGES = {
    "scaled": lambda g: g * 1.001,
    "one-entry": one_entry,
    "turned": lambda g: -g,
    "zero": lambda g: 0 * g,
    "nan": lambda g: g * np.nan,
    "infinite": lambda g: g * np.inf,
    "conjugate": np.conj,
}


COMPLEX_NAMES = ("A", "B", "C", "initial_state")


@pytest.mark.parametrize(("name", "change"), [(n, c) for n in NAMES for c in CHANGES if c != "conjugate" or n in COMPLEX_NAMES])
def test_a_wrong_gradient_is_found(name, change):
    inputs = inputs_of(complex=True)
    with pytest.raises(AssertionError, match=f"^check_gradients: wanted relative errors up to 1e-06, .* off: {name} by [^;]*$"):
        check_gradients(mambacupy.selective_scan_fwd, spoilt(name, CHANGES[change]), inputs)


@pytest.mark.parametrize("shape", [(3, 3), (1, 2)], ids=["random", "each-number"])
def test_a_transposed_gradient_is_found(shape):
    inputs = {"x": numbers(*shape, unit=1), "y": numbers(*shape[::-1], unit=2)}
    with pytest.raises((AssertionError, ValueError), match=r"^check_gradients: .*x"):
        check_gradients(*product_pair(lambda g: g.T), inputs)


def product_pair(change=lambda g: g):
    """A matrix product, its gradients in a tuple, and something done to the first."""

    def fwd(x, y):
        return x @ y, (x, y)

    def bwd(dproduct, saved):
        x, y = saved
        return change(dproduct @ y.conj().T), x.conj().T @ dproduct

    return fwd, bwd


def test_the_message_names_the_worst_first_and_where():
    def fwd(x, y, z):
        return x * y * z, (x, y, z)

    def bwd(dout, saved):
        x, y, z = saved
        wrong = x * z * dout * [1, 1, 2]
        return {"x": 1.01 * y * z * dout, "y": wrong, "z": x * y * dout}

    inputs = {"x": np.array([1.0, 2.0, 3.0]), "y": np.array([2.0, 2.0, 2.0]), "z": np.ones(3)}
    with pytest.raises(AssertionError) as error:
        check_gradients(fwd, bwd, inputs)
    message = str(error.value)
    assert message.index("; x by 0.01 (at x[") > message.index("off: y by ")
    assert "(at y[2] bwd gives " in message and " z by" not in message and "uncertain" not in message
    numbers = [float(text.split(" ")[-1]) for text in message.partition("at y[2] ")[2].partition(")")[0].split(",")]
    assert numbers[0] == pytest.approx(2 * numbers[1])


def test_a_kink_is_told_from_a_wrong_gradient():
    def fwd(x):
        return np.sqrt(np.abs(x)), x

    with pytest.raises(AssertionError, match=r"x\[1\].*, where differences are uncertain: fwd is not smooth"):
        check_gradients(fwd, lambda dy, x: {"x": dy * np.array([0.5, 1.0])}, {"x": np.array([1.0, 1e-5])})


def test_the_tolerance_decides():
    scan = partial(check_gradients, mambacupy.selective_scan_fwd, spoilt("A", lambda g: g * 1.001), inputs_of())
    errors = scan(tolerance=1e-2)
    assert errors["A"] == pytest.approx(1e-3, rel=1e-3) and max(e for name, e in errors.items() if name != "A") < 1e-9
    with pytest.raises(AssertionError, match=r"up to 0\.0009, .* A by 0\.001 "):
        scan(tolerance=9e-4)


def test_the_seed_repeats():
    inputs = inputs_of()
    assert check(inputs) == check(inputs) != check(inputs, seed=1)


# ---------------------------------------------------------------------------------------------------- users' own pairs
class Gradients(NamedTuple):
    x: Any


def numbers(*shape, unit=1j):
    rng = np.random.default_rng(0)
    return np.asarray(rng.standard_normal(shape) + unit * rng.standard_normal(shape))


@pytest.mark.parametrize("container", [lambda g: (g,), lambda g: {"x": g, "other": None}, Gradients])
@pytest.mark.parametrize("unit", [1, 1j])
@pytest.mark.parametrize("shape", [(1,), (7,), (3, 5), (2, 30), (0, 4)])
def test_cumulative_sum(shape, unit, container):
    def fwd(x, axis):
        return np.cumsum(x, axis), axis

    def bwd(dy, axis):
        return container(np.flip(np.cumsum(np.flip(dy, axis), axis), axis))

    errors = check_gradients(fwd, bwd, {"x": numbers(*shape, unit=unit), "axis": len(shape) - 1})
    assert list(errors) == ["x"] and errors["x"] <= 1e-12


@pytest.mark.parametrize("unit", [1, 1j])
def test_a_single_number(unit):
    """NumPy turns arrays without axes into scalars wherever it can: they are let through."""

    def fwd(x):
        assert type(x) is np.ndarray
        return x**2, x

    assert check_gradients(fwd, lambda dy, x: (2 * x.conj() * dy,), {"x": numbers(unit=unit)})["x"] <= 1e-12


@pytest.mark.parametrize("shape", [(1, 2), (3, 4)], ids=["each-number", "random"])
@pytest.mark.parametrize("unit", [1, 1j])
def test_matrix_product(shape, unit):
    inputs = {"x": numbers(*shape, unit=unit), "y": numbers(*shape[::-1], unit=unit) + 1}
    assert max(check_gradients(*product_pair(), inputs).values()) <= 1e-12


def test_complex_to_real_and_back():
    def fwd(z, r):
        return np.abs(z) ** 2 * r, np.exp(1j * r), (z, r)

    def bwd(dabs, saved, dphase):
        z, r = saved
        return {"z": 2 * z * r * dabs, "r": np.abs(z) ** 2 * dabs + (1j * np.exp(1j * r) * dphase.conj()).real}

    for n in (2, 40):
        assert max(check_gradients(fwd, bwd, {"z": numbers(n), "r": numbers(n, unit=1)}).values()) <= 1e-11


@pytest.mark.parametrize("scale", [1e-6, 1e-3, 1.0, 1e3, 1e9])
def test_sizes_far_from_1(scale):
    """Functions that bend on the scale of their argument, whatever that is."""
    x = scale * np.random.default_rng(0).uniform(0.5, 2, 20)

    def fwd(x):
        return np.exp(-x / scale), x

    errors = check_gradients(fwd, lambda dy, x: (-dy * np.exp(-x / scale) / scale,), {"x": x})
    assert errors["x"] <= 1e-8


def test_no_gradient_at_all():
    """Differences of what does not depend on an input are 0, or rounding, which counts as 0."""

    def fwd(x, unused):
        return np.exp(x - x.max()) / np.exp(x - x.max()).sum() * np.ones(3), (x, unused)

    inputs = {"x": np.array([1.0]), "unused": np.ones(3)}
    errors = check_gradients(fwd, lambda dy, saved: (np.zeros(1), np.zeros(3)), inputs)
    assert errors == {"x": 0.0, "unused": 0.0}
    shifted = lambda shift: (np.array([0.1, 0.7]) + shift - shift, shift)  # noqa: E731
    assert check_gradients(shifted, lambda dy, shift: {"shift": 0 * shift}, {"shift": np.array([0.3])})["shift"] <= 1e-6
    with pytest.raises(AssertionError, match="unused by"):
        check_gradients(fwd, lambda dy, saved: (np.zeros(1), np.full(3, 1e-6)), inputs)


def test_inputs_are_left_alone():
    inputs = inputs_of()
    before = {name: x.tobytes() for name, x in inputs.items() if isinstance(x, np.ndarray)}
    for name in before:
        inputs[name].setflags(write=False)
    check(inputs)
    assert before == {name: inputs[name].tobytes() for name in before}


# ---------------------------------------------------------------------------------------------------- what is turned away
X = np.arange(3.0)


def good(x):
    return 2 * x, None


def double(dy, saved):
    return {"x": 2 * dy}


def gives(*gradients):
    return lambda dy, saved: gradients[0] if len(gradients) == 1 else gradients


SHAPE = r"wanted an array of x's shape (3,) and dtype float64"
DOUBLE = "wanted an array of float64 or complex128"
DIGITS = f"{DOUBLE}: differences of other numbers have too few digits"
WANTED = "wanted a dict or NamedTuple by name, or a tuple of 1: gradients of x"

MESSAGES = {
    "inputs-list": (TypeError, good, double, [X], "inputs is an object of type list, wanted a dict of fwd's arguments"),
    "inputs-empty": (TypeError, good, double, {}, "none of the inputs () is an array of float64 or complex128"),
    "inputs-no-array": (
        *(TypeError, good, double, {"x": [1.0], "n": 3, "flags": np.ones(2, bool)}),
        "none of the inputs (x, n, flags) is an array of float64 or complex128",
    ),
    **{
        f"inputs-{dtype}": (
            *(TypeError, good, double, {"x": X.astype(dtype)}),
            f"x is {np.dtype(dtype).name}, {DIGITS}; write x.astype('{wanted}')",
        )
        for dtype, wanted in (
            *((np.float32, "float64"), (np.float16, "float64"), (ml_dtypes.bfloat16, "float64")),
            *((np.complex64, "complex128"), (">f8", "float64")),
        )
    },
    "inputs-masked": (
        *(TypeError, good, double, {"x": np.ma.array(X)}),
        "x is of type numpy.ma.MaskedArray, wanted a NumPy or CuPy array; x.filled(0) gives one with 0 for what is masked",
    ),
    "fwd-array": (
        *(TypeError, lambda x: x, double, {"x": X}),
        "fwd returns an object of type ndarray, wanted a tuple (output, ..., saved)",
    ),
    "fwd-one": (TypeError, lambda x: (x,), double, {"x": X}, "fwd returns a tuple of 1, wanted a tuple (output, ..., saved)"),
    "fwd-none": (
        *(TypeError, lambda x: (x, None, x), double, {"x": X}),
        f"result 1 of fwd is None, {DOUBLE}",
    ),
    "fwd-float32": (
        *(TypeError, lambda x: (x.astype(np.float32), x), double, {"x": X}),
        f"result 0 of fwd is float32, {DIGITS}",
    ),
    "bwd-array": (TypeError, good, gives(X), {"x": X}, f"bwd returns an object of type ndarray, {WANTED}"),
    "bwd-two": (TypeError, good, gives(X, X), {"x": X}, f"bwd returns a tuple of 2, {WANTED}"),
    "gradient-missing": (TypeError, good, gives({}), {"x": X}, f"the gradient of x is None, {SHAPE}"),
    "gradient-none": (TypeError, good, gives((None,)), {"x": X}, f"the gradient of x is None, {SHAPE}"),
    "gradient-list": (
        *(TypeError, good, gives({"x": [1.0]}), {"x": X}),
        f"the gradient of x is an object of type list, {SHAPE}",
    ),
    "gradient-shape": (ValueError, good, gives({"x": X[:, None]}), {"x": X}, f"the gradient of x has shape (3, 1), {SHAPE}"),
    "gradient-dtype": (
        *(TypeError, good, gives({"x": X.astype(np.float32)}), {"x": X}),
        f"the gradient of x is float32, {SHAPE}",
    ),
    "gradient-complex": (TypeError, good, gives({"x": X * 1j}), {"x": X}, f"the gradient of x is complex128, {SHAPE}"),
}


@pytest.mark.parametrize(("kind", "fwd", "bwd", "inputs", "message"), MESSAGES.values(), ids=MESSAGES)
def test_turned_away(kind, fwd, bwd, inputs, message):
    with pytest.raises(kind) as error:
        check_gradients(fwd, bwd, inputs)
    assert type(error.value) is kind
    assert str(error.value) == f"check_gradients: {message}"


@pytest.mark.parametrize("name", NAMES)
def test_a_missing_gradient_of_the_scan_is_found(name):
    with pytest.raises(TypeError, match=f"^check_gradients: the gradient of {name} is None, wanted an array of {name}'s shape"):
        check_gradients(mambacupy.selective_scan_fwd, spoilt(name, lambda g: None), inputs_of())
