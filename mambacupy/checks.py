"""The gate every argument passes, and its wording.

A check reads attributes and nothing else: no device is touched, nothing is copied, and a message is put together only when it
is raised. A message says what came, what was wanted and, where there is one, what to write instead. TypeError is for kinds and
dtypes, ValueError for shapes and values.
"""

from typing import Any, NamedTuple

import numpy as np

from mambacupy import arrays
from mambacupy.arrays import BFLOAT16, COMPLEX64, COMPLEX128, FLOAT32, FLOAT64, dtype_name

CHUNK = 64
"""Steps between the states that a selective scan keeps for its backward pass."""

_FLOATS = tuple(arrays.FLOAT_DTYPES.values())
_UP_TO_32_BITS = _FLOATS[:3]

_RULES = dict.fromkeys(_UP_TO_32_BITS, (FLOAT32, COMPLEX64, _UP_TO_32_BITS)) | {FLOAT64: (FLOAT64, COMPLEX128, (FLOAT64,))}
"""What u's dtype asks of the others: dtype of the parameters, of a complex A, and those of real varying B and C."""


class ScanArguments(NamedTuple):
    """Arguments of a selective scan that passed the gate. B and C are `(dim, state)` where their groups are 0, and
    `(batch, groups, state, length)` views of what was given otherwise."""

    xp: Any
    u: Any
    delta: Any
    A: Any
    B: Any
    C: Any
    D: Any
    z: Any
    delta_bias: Any
    initial_state: Any
    batch: int
    dim: int
    length: int
    state: int
    groups_B: int
    groups_C: int
    complex: bool
    zoh: bool


def selective_scan(operation, u, delta, A, B, C, D, z, delta_bias, initial_state, discretization):
    """Check the arguments of a selective scan.

    Returns
    -------
    ScanArguments

    Raises
    ------
    TypeError, ValueError
        As `mambacupy.selective_scan` documents.
    """
    _all_there(operation, "; only D, z, delta_bias and initial_state may be left out", u=u, delta=delta, A=A, B=B, C=C)
    xp = arrays.namespace(
        operation, u=u, delta=delta, A=A, B=B, C=C, D=D, z=z, delta_bias=delta_bias, initial_state=initial_state
    )
    if not isinstance(discretization, str) or discretization not in ("euler", "zoh"):
        raise ValueError(f"{operation}: discretization is {discretization!r}, wanted 'euler' or 'zoh'")

    dtype = u.dtype
    _check_float(operation, "u", u)
    real, complex_of_real, varying = _RULES[dtype]
    shape = u.shape
    if len(shape) != 3:
        hint = "; a single sequence is u[None]" if len(shape) == 2 else ""
        raise _wrong_shape(operation, "u", u, {"batch": None, "dim": None, "length": None}, hint)
    batch, dim, length = shape
    if delta.shape != shape:
        raise _wrong_shape(operation, "delta", delta, {"batch": batch, "dim": dim, "length": length})
    if delta.dtype != dtype:
        raise _wrong_dtype(operation, "delta", delta, (dtype,), ", the dtype of u")
    if z is not None:
        if z.shape != shape:
            raise _wrong_shape(operation, "z", z, {"batch": batch, "dim": dim, "length": length})
        if z.dtype != dtype:
            raise _wrong_dtype(operation, "z", z, (dtype,), ", the dtype of u")

    A_shape, A_dtype = A.shape, A.dtype
    if len(A_shape) != 2 or A_shape[0] != dim:
        raise _wrong_shape(operation, "A", A, {"dim": dim, "state": None})
    state = A_shape[1]
    if state == 0:
        raise _wrong_shape(operation, "A", A, {"dim": dim, "state": None}, " with state at least 1")
    is_complex = A_dtype == complex_of_real
    if not is_complex and A_dtype != real:
        raise _wrong_dtype(operation, "A", A, (real, complex_of_real), f" because u is {dtype_name(dtype)}")
    if D is not None:
        if D.shape != (dim,):
            raise _wrong_shape(operation, "D", D, {"dim": dim})
        if D.dtype != real:
            raise _wrong_dtype(operation, "D", D, (real,), f" because u is {dtype_name(dtype)}")
    if delta_bias is not None:
        if delta_bias.shape != (dim,):
            raise _wrong_shape(operation, "delta_bias", delta_bias, {"dim": dim})
        if delta_bias.dtype != real:
            raise _wrong_dtype(operation, "delta_bias", delta_bias, (real,), f" because u is {dtype_name(dtype)}")
    if initial_state is not None:
        _check_state(operation, "initial_state", initial_state, batch, dim, A)

    B, groups_B = _coefficient(operation, "B", B, shape, A, varying, is_complex)
    C, groups_C = _coefficient(operation, "C", C, shape, A, varying, is_complex)
    return ScanArguments(
        xp, u, delta, A, B, C, D, z, delta_bias, initial_state,
        batch, dim, length, state, groups_B, groups_C, is_complex, discretization == "zoh",
    )  # fmt: skip


def selective_scan_bwd(operation, saved, dy, dlast_state):
    """Check the gradients that enter a selective scan's backward pass; what was saved has passed the gate before.

    Raises
    ------
    TypeError, ValueError
        As `mambacupy.selective_scan_bwd` documents.
    """
    try:
        u, A, _ = saved.u, saved.A, saved.states
    except AttributeError:
        raise TypeError(
            f"{operation}: saved is of type {type(saved).__qualname__}, wanted the third result of selective_scan_fwd"
        ) from None
    if dy is None:
        raise TypeError(
            f"{operation}: dy is None, wanted an array of u's shape {u.shape}; zeros if only last_state has a gradient"
        )
    arrays.namespace(operation, **{"saved.u": u}, dy=dy, dlast_state=dlast_state)
    dtype, (batch, dim, length) = u.dtype, u.shape
    if dy.shape != u.shape:
        raise _wrong_shape(operation, "dy", dy, {"batch": batch, "dim": dim, "length": length})
    _check_gradient_dtype(operation, "dy", dy, "u", dtype)
    if dlast_state is not None:
        _check_state(operation, "dlast_state", dlast_state, batch, dim, A)


def saved_states(operation, saved):
    """Check that the states saved by a selective scan are those that it gave: kernels read them as they lie.

    Raises
    ------
    TypeError, ValueError
    """
    u, A, states = saved.u, saved.A, saved.states
    if states is None:
        raise TypeError(f"{operation}: saved.states is None, wanted the states that selective_scan_fwd gave")
    arrays.namespace(operation, **{"saved.u": u, "saved.states": states})
    (batch, dim, length), state = u.shape, A.shape[1]
    wanted = (batch, -(-length // CHUNK), dim, state)
    if states.shape != wanted or states.dtype != A.dtype or not states.flags.c_contiguous:
        order = "" if states.flags.c_contiguous else ", not C-contiguous"
        raise ValueError(
            f"{operation}: saved.states has shape {states.shape}, {dtype_name(states.dtype)}{order}, "
            f"wanted {wanted}, {dtype_name(A.dtype)}, as selective_scan_fwd gave it"
        )


def _all_there(operation, hint="", /, **named):
    for name, x in named.items():
        if x is None:
            raise TypeError(f"{operation}: {name} is None, wanted an array{hint}")


def _check_float(operation, name, x):
    if x.dtype not in _RULES:
        raise _wrong_dtype(operation, name, x, _FLOATS, "")


def _check_gradient_dtype(operation, name, x, other, dtype):
    """A gradient has the dtype of what it is the gradient of, or that of its arithmetic."""
    if x.dtype != dtype and x.dtype != arrays.compute_dtype(dtype):
        wanted = tuple(dict.fromkeys((dtype, arrays.compute_dtype(dtype))))
        raise _wrong_dtype(operation, name, x, wanted, f" because {other} is {dtype_name(dtype)}")


def _check_state(operation, name, x, batch, dim, A):
    if x.shape != (batch, dim, A.shape[1]):
        raise _wrong_shape(operation, name, x, {"batch": batch, "dim": dim, "state": A.shape[1]})
    if x.dtype != A.dtype:
        raise _wrong_dtype(operation, name, x, (A.dtype,), ", the dtype of A")


def _coefficient(operation, name, x, u_shape, A, varying, is_complex):
    """B or C and its groups: 0 if it is constant; else it comes back with a groups axis."""
    batch, dim, length = u_shape
    shape, dtype = x.shape, x.dtype
    if len(shape) == 2:
        if shape != A.shape:
            hint = f"; {name} of two axes is constant, one that varies is (batch, groups, state, length)"
            raise _wrong_shape(operation, name, x, {"dim": dim, "state": A.shape[1]}, hint)
        if dtype != A.dtype:
            raise _wrong_dtype(operation, name, x, (A.dtype,), f", the dtype of A, because this {name} is constant")
        return x, 0

    if dtype in varying:
        wanted_length = 2 * length if is_complex else length
    elif is_complex and dtype == A.dtype:
        wanted_length = length
    else:
        raise _wrong_coefficient_dtype(operation, name, x, A, varying, is_complex)
    if len(shape) == 3:
        if shape != (batch, A.shape[1], wanted_length):
            raise _wrong_coefficient_shape(operation, name, x, u_shape, A, is_complex, wanted_length)
        return x.reshape((batch, 1, *shape[1:])), 1  # a view; CuPy makes it in half the time of x[:, None]
    if len(shape) != 4 or shape != (batch, shape[1], A.shape[1], wanted_length) or not shape[1] or dim % shape[1]:
        raise _wrong_coefficient_shape(operation, name, x, u_shape, A, is_complex, wanted_length)
    return x, shape[1]


# ---------------------------------------------------------------------------------------------------- wording
def _wrong_shape(operation, name, x, wanted, hint=""):
    """The ValueError for a shape. `wanted` maps axes to sizes, None where any size will do."""
    if x.ndim == len(wanted) > 1:
        turned = (*x.shape[:-2], x.shape[-1], x.shape[-2])
        if turned != x.shape and all(size is None or size == got for size, got in zip(wanted.values(), turned, strict=True)):
            hint = f"; write {name}.swapaxes(-1, -2)"
    return ValueError(f"{operation}: {name} has shape {x.shape}, wanted {_axes(wanted)}{hint}")


def _axes(sizes):
    """'(batch=2, groups, state=16, length=128)'"""
    parts = [axis if size is None else f"{axis}={size}" for axis, size in sizes.items()]
    return f"({', '.join(parts)}{',' if len(parts) == 1 else ''})"


def _wrong_coefficient_shape(operation, name, x, u_shape, A, is_complex, wanted_length):
    """The ValueError for a varying B or C, whose dtype is right."""
    batch, dim, length = u_shape
    wanted = {"batch": batch, "groups": None, "state": A.shape[1], "length": wanted_length}
    if x.ndim not in (3, 4):
        constant = _axes({"dim": dim, "state": A.shape[1]})
        return _wrong_shape(operation, name, x, wanted, f", the same without groups, or {constant} if constant")
    if x.ndim == 3:
        del wanted["groups"]
    if x.shape[-1] == wanted_length and x.shape[0] == batch and x.shape[-2] == A.shape[1]:
        groups = x.shape[1]
        fault = f"but dim = {dim} is not divisible by {groups}" if groups else "but wants at least one"
        return ValueError(
            f"{operation}: {name} has shape {x.shape} with {groups} groups, {fault}; "
            f"wanted {_axes(wanted)} with groups dividing {dim}"
        )
    hint = ""
    if is_complex:
        hint = (
            f"; with a complex A, {name} is complex of length {length}, "
            f"or real of length {2 * length} and interleaved (re, im, re, im, …)"
        )
    elif x.shape[-1] == 2 * length != length:
        hint = f"; interleaved (re, im) values in {name} need a complex A"
    return _wrong_shape(operation, name, x, wanted, hint)


def _wrong_coefficient_dtype(operation, name, x, A, varying, is_complex):
    """The TypeError for a varying B or C."""
    if x.dtype.kind == "c" and not is_complex:
        return TypeError(
            f"{operation}: {name} is {dtype_name(x.dtype)} but A is {dtype_name(A.dtype)}; a complex {name} needs a complex A: "
            f"write A.astype({dtype_name(arrays.complex_of(A.dtype))!r}), or {name}.real"
        )
    wanted = (*varying, A.dtype) if is_complex else varying
    return _wrong_dtype(operation, name, x, wanted, f" because A is {dtype_name(A.dtype)}")


def _wrong_dtype(operation, name, x, wanted, because):
    """The TypeError for a dtype. `wanted` are the dtypes that will do, `because` follows them in the message."""
    came, names = x.dtype, [dtype_name(dtype) for dtype in wanted]
    wanted_text = f"{', '.join(names[:-1])} or {names[-1]}" if len(names) > 1 else names[0]
    start = f"{operation}: {name} is {dtype_name(came)}"
    if not came.isnative:
        return TypeError(
            f"{start} in foreign byte order, wanted {wanted_text}{because}, in this machine's; "
            f"write {name}.astype({name}.dtype.newbyteorder('='))"
        )
    if came.type is np.void and came.itemsize == 2 and BFLOAT16 in wanted:
        hint = f"; if this is bfloat16 that numpy.save wrote, write {name}.view(ml_dtypes.bfloat16)"
    elif came.kind == "c" and wanted[-1].kind != "c":
        hint = f"; it must be real: write {name}.real"
    elif came.kind in "biufcO" or came in _RULES:
        hint = f"; write {name}.astype({dtype_name(_nearest(came, wanted))!r})"
    else:
        hint = ""
    return TypeError(f"{start}, wanted {wanted_text}{because}{hint}")


def _nearest(came, wanted):
    """Which of the wanted dtypes to propose: float64 for wide floats, else float32, and complex for complex."""
    preferred = COMPLEX64 if came.kind == "c" else FLOAT64 if came.kind == "f" and came.itemsize > 8 else FLOAT32
    return preferred if preferred in wanted else wanted[-1] if came.kind == "c" else wanted[0]
