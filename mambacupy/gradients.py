"""Hand-written gradients of any forward/backward pair, checked against finite differences in float64."""

import contextlib
import itertools
import math
from collections.abc import Mapping

import numpy as np

from mambacupy import arrays
from mambacupy.arrays import COMPLEX128, FLOAT64, dtype_name

FLOOR = 1e-6
"""Slopes below this part of the outputs' size are lost in rounding: their error is taken relative to this part instead."""


def check_gradients(fwd, bwd, inputs, *, tolerance=1e-6, directions=8, seed=0):
    """Compare the gradients that `bwd` gives with finite differences of `fwd`.

    Parameters
    ----------
    fwd : callable
        `fwd(**inputs) -> (output, ..., saved)`: one output or more, then what bwd needs.
    bwd : callable
        `bwd(doutput, saved, *dfurther_outputs) -> gradients`, by name in a dict or NamedTuple, where further names are passed
        over, or in a tuple in the order of `inputs`. Those of complex numbers are ∂L/∂Re + i·∂L/∂Im.
    inputs : dict
        Arguments of fwd by name. NumPy or CuPy arrays of float64 and complex128 are differentiated; what is no array of
        floating-point numbers (bool, str, None, integers) is handed through.
    tolerance : float
        Largest relative error that passes.
    directions : int
        An input of at most so many real numbers is checked number by number, a larger one along so many random directions.
    seed : int
        Of the random directions and of the gradients that enter bwd: the same seed gives the same errors.

    Returns
    -------
    dict
        Relative error of each gradient by the name of its input, in the 2-norm over the directions.

    Raises
    ------
    AssertionError
        An error exceeds the tolerance. The message names those inputs, worst first.
    TypeError, ValueError
        Something is not what is wanted above, or a gradient is missing or not of its input's shape and dtype.

    Notes
    -----
    bwd is given random weights w, and slopes are those of L = Σ Re(conj(w)·output): central differences whose steps start at
    1/16 of the input's size and halve, extrapolated to 0 by Ridders' method.

    Examples
    --------
    >>> def fwd(x, y): return x @ y, (x, y)
    >>> def bwd(dproduct, saved): return dproduct @ saved[1].T, saved[0].T @ dproduct
    >>> errors = check_gradients(fwd, bwd, {"x": numpy.ones((2, 3)), "y": numpy.ones((3, 4))})
    """
    floats = _float_arrays(inputs)
    xp, rng = arrays.namespace("check_gradients", **floats), np.random.default_rng(seed)
    errors, faults = {}, {}
    with contextlib.nullcontext() if xp is np else next(iter(floats.values())).device:
        outputs, saved = _results(fwd, inputs)
        weights = [_normal(xp, rng, y) / (_rms(y) or 1) for y in outputs]
        floor = FLOOR * math.sqrt(sum(_dot(w * y, w * y) for w, y in zip(weights, outputs, strict=True)))
        gradients = _by_name(bwd(weights[0], saved, *weights[1:]), floats)
        for name, x in floats.items():
            size = max(_rms(x), 1e-3)
            vectors = _directions(xp, rng, name, x, directions)
            got = np.array([_dot(gradients[name], v) for v in vectors.values()])
            slopes = [_slope(fwd, inputs, name, v, size, weights) for v in vectors.values()]
            wanted, uncertainty = np.array(slopes).reshape(-1, 2).T
            off = np.abs(got - wanted)
            norm = max(np.linalg.norm(wanted), floor / size * math.sqrt(len(wanted))) or 1.0
            errors[name] = float(np.linalg.norm(off) / norm)
            if not errors[name] <= tolerance:
                i = np.argmax(off)  # NaN counts as largest
                values = f"bwd gives {got[i]:.9g}, differences {wanted[i]:.9g}"
                faults[name] = f"{name} by {errors[name]:.2g} ({list(vectors)[i]} {values})"
                if not np.linalg.norm(uncertainty) <= tolerance * norm:
                    faults[name] += ", where differences are uncertain: fwd is not smooth, or its outputs are not accurate"
    if faults:
        worst = sorted(faults, key=lambda name: -np.nan_to_num(errors[name], nan=math.inf))
        text = "; ".join(faults[name] for name in worst)
        raise AssertionError(f"check_gradients: wanted relative errors up to {tolerance:g}, gradients are off: {text}")
    return errors


def _slope(fwd, inputs, name, v, size, weights):
    """Slope of L along v, and its uncertainty: Richardson extrapolation over halved steps, and of all entries of its tableau
    the one that agrees best with the two it was made of."""
    best, uncertainty, row = math.nan, math.inf, []
    for level in range(4, 16):
        h = size * 0.5**level
        with np.errstate(over="ignore", invalid="ignore"):  # the first steps may be too long
            after, before = (_results(fwd, {**inputs, name: (inputs[name] + s * v)[...]})[0] for s in (h, -h))
            difference = sum(_dot(w, a - b) for w, a, b in zip(weights, after, before, strict=True))
        coarser, row = row, [difference / (2 * h)]
        for k, former in enumerate(coarser):
            row.append(row[k] + (row[k] - former) / (4 ** (k + 1) - 1))
            change = max(abs(row[k + 1] - row[k]), abs(row[k + 1] - former))
            if change < uncertainty:
                best, uncertainty = row[k + 1], change
        if uncertainty <= 1e-11 * abs(best):
            break
    return best, uncertainty


def _directions(xp, rng, name, x, count):
    """Arrays like x, by a description: one for each real number of x, or `count` random directions."""
    parts = {"": 1, ".imag": 1j} if x.dtype.kind == "c" else {"": 1}
    if x.size * len(parts) > count:
        return {f"along random direction {i}": _normal(xp, rng, x) for i in range(count)}
    found = {}
    for entry, (part, unit) in itertools.product(np.ndindex(x.shape), parts.items()):
        v = np.zeros(x.shape, x.dtype)
        v[entry] = unit
        found[f"at {name}[{', '.join(map(str, entry))}]{part}"] = xp.asarray(v)
    return found


def _normal(xp, rng, x):
    """Random numbers in the shape and dtype of x."""
    values = rng.standard_normal((2, *x.shape))
    return xp.asarray(values[0] + 1j * values[1] if x.dtype.kind == "c" else values[0])


def _dot(x, y):
    with np.errstate(over="ignore", invalid="ignore"):  # infinite gradients are told by the message
        return float((x.conj() * y).real.sum())


def _rms(x):
    return math.sqrt(_dot(x, x) / (x.size or 1))


# ---------------------------------------------------------------------------------------------------- what comes in
def _float_arrays(inputs):
    """The arrays of floating-point numbers among the inputs."""
    if not isinstance(inputs, Mapping):
        raise TypeError(f"check_gradients: inputs is {_kind(inputs)}, wanted a dict of fwd's arguments")
    floats = {}
    for name, x in inputs.items():
        if hasattr(x, "ndim") and not isinstance(x, np.generic):
            arrays.library_of("check_gradients", name, x)
            if x.dtype.kind not in "biuSUO":
                floats[name] = x
    if not floats:
        raise TypeError(f"check_gradients: none of the inputs ({', '.join(inputs)}) is an array of float64 or complex128")
    for name, x in floats.items():
        _check_double(name, x, f"; write {name}.astype({'complex128' if x.dtype.kind == 'c' else 'float64'!r})")
    return floats


def _check_double(what, x, hint=""):
    wanted = "wanted an array of float64 or complex128"
    if not hasattr(x, "dtype"):
        raise TypeError(f"check_gradients: {what} is {_kind(x)}, {wanted}")
    if x.dtype not in (FLOAT64, COMPLEX128):
        came = dtype_name(x.dtype)
        raise TypeError(f"check_gradients: {what} is {came}, {wanted}: differences of other numbers have too few digits{hint}")


def _results(fwd, inputs):
    """Outputs of fwd, and what it saved."""
    results = fwd(**inputs)
    if not isinstance(results, tuple) or len(results) < 2:
        raise TypeError(f"check_gradients: fwd returns {_kind(results)}, wanted a tuple (output, ..., saved)")
    for i, y in enumerate(results[:-1]):
        _check_double(f"result {i} of fwd", y)
    return results[:-1], results[-1]


def _kind(x):
    if x is None:
        return "None"
    return f"a tuple of {len(x)}" if isinstance(x, tuple) else f"an object of type {type(x).__qualname__}"


def _by_name(gradients, floats):
    """Gradients by the name of their input, each in its shape and dtype."""
    if hasattr(gradients, "_asdict"):
        gradients = gradients._asdict()
    elif isinstance(gradients, tuple) and len(gradients) == len(floats):
        gradients = dict(zip(floats, gradients, strict=True))
    elif not isinstance(gradients, Mapping):
        wanted = f"wanted a dict or NamedTuple by name, or a tuple of {len(floats)}: gradients of {', '.join(floats)}"
        raise TypeError(f"check_gradients: bwd returns {_kind(gradients)}, {wanted}")
    for name, x in floats.items():
        g, wanted = gradients.get(name), f"wanted an array of {name}'s shape {x.shape} and dtype {dtype_name(x.dtype)}"
        if not hasattr(g, "dtype"):
            raise TypeError(f"check_gradients: the gradient of {name} is {_kind(g)}, {wanted}")
        if g.shape != x.shape:
            raise ValueError(f"check_gradients: the gradient of {name} has shape {g.shape}, {wanted}")
        if g.dtype != x.dtype:
            raise TypeError(f"check_gradients: the gradient of {name} is {dtype_name(g.dtype)}, {wanted}")
    return gradients
