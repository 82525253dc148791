"""The gate every argument passes, and its wording.

A check looks at attributes only: no device is touched, and a message is put together only when it is raised. Errors say what
came, what was wanted and, where there is one, what to write instead. TypeError is for kinds and dtypes, ValueError for shapes.
"""

from typing import Any, NamedTuple

from mambacupy import arrays

_FLOATS = frozenset(arrays.FLOAT_DTYPES.values())
_A_DTYPES = {
    arrays.FLOAT32: frozenset((arrays.FLOAT32, arrays.COMPLEX64)),
    arrays.FLOAT64: frozenset((arrays.FLOAT64, arrays.COMPLEX128)),
}
DISCRETIZATIONS = ("euler", "zoh")


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


def _shape(operation, name, x, wanted, meaning):
    if x.shape != wanted:
        raise ValueError(f"{operation}: {name} has shape {x.shape}, wanted {meaning} = {wanted}")


def _dtype(operation, name, x, wanted, because):
    if x.dtype != wanted:
        raise TypeError(f"{operation}: {name} is {x.dtype.name}, wanted {wanted.name}, {because}; write {name}.astype({wanted.name!r})")


def _float_tensor(operation, name, x):
    if x.dtype not in _FLOATS:
        if not x.dtype.isnative and x.dtype.newbyteorder("=") in _FLOATS:
            raise TypeError(
                f"{operation}: {name} is {x.dtype.name} in foreign byte order; write {name}.astype({x.dtype.name!r})"
            )
        raise TypeError(
            f"{operation}: {name} is {x.dtype.name}, wanted float16, bfloat16, float32 or float64; "
            f"write for instance {name}.astype('float32')"
        )


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
    xp = arrays.namespace(
        operation, u=u, delta=delta, A=A, B=B, C=C, D=D, z=z, delta_bias=delta_bias, initial_state=initial_state
    )
    for name, x in (("u", u), ("delta", delta), ("A", A), ("B", B), ("C", C)):
        if x is None:
            raise TypeError(f"{operation}: {name} is None, wanted an array; only D, z, delta_bias and initial_state may be left out")
    if discretization not in DISCRETIZATIONS:
        raise ValueError(f"{operation}: discretization is {discretization!r}, wanted 'euler' or 'zoh'")

    _float_tensor(operation, "u", u)
    if u.ndim != 3:
        raise ValueError(f"{operation}: u has shape {u.shape}, wanted three axes (batch, dim, length)")
    batch, dim, length = u.shape
    for name, x in (("delta", delta), ("z", z)):
        if x is not None:
            _shape(operation, name, x, u.shape, "u's shape (batch, dim, length)")
            _dtype(operation, name, x, u.dtype, "the dtype of u")

    real = arrays.compute_dtype(u.dtype)
    if A.dtype not in _A_DTYPES[real]:
        raise TypeError(
            f"{operation}: A is {A.dtype.name}, wanted {real.name} or {arrays.complex_of(real).name} because u is {u.dtype.name}"
        )
    if A.ndim != 2 or A.shape[0] != dim or A.shape[1] == 0:
        raise ValueError(f"{operation}: A has shape {A.shape}, wanted (dim, state) = ({dim}, at least 1)")
    state = A.shape[1]
    is_complex = A.dtype.kind == "c"
    for name, x in (("D", D), ("delta_bias", delta_bias)):
        if x is not None:
            _shape(operation, name, x, (dim,), "(dim,)")
            _dtype(operation, name, x, real, f"because u is {u.dtype.name}")
    if initial_state is not None:
        _shape(operation, "initial_state", initial_state, (batch, dim, state), "(batch, dim, state)")
        _dtype(operation, "initial_state", initial_state, A.dtype, "the dtype of A")

    B, groups_B = _coefficient(operation, "B", B, u, A, is_complex, (batch, dim, length, state))
    C, groups_C = _coefficient(operation, "C", C, u, A, is_complex, (batch, dim, length, state))
    return ScanArguments(
        xp, u, delta, A, B, C, D, z, delta_bias, initial_state,
        batch, dim, length, state, groups_B, groups_C, is_complex, discretization == "zoh",
    )  # fmt: skip


def _coefficient(operation, name, x, u, A, is_complex, sizes):
    """B or C with its groups: constant (0), or a view with a groups axis."""
    batch, dim, length, state = sizes
    if x.ndim == 2:
        _shape(operation, name, x, (dim, state), "(dim, state), as for a constant " + name)
        _dtype(operation, name, x, A.dtype, f"the dtype of A, because it is constant in time")
        return x, 0
    if x.ndim not in (3, 4):
        raise ValueError(
            f"{operation}: {name} has shape {x.shape}, wanted (dim, state) if constant, or (batch, state, length) or "
            "(batch, groups, state, length) if varying"
        )
    if x.dtype.kind == "c":
        if not is_complex:
            raise TypeError(f"{operation}: {name} is {x.dtype.name} but A is {A.dtype.name}; a complex {name} needs a complex A")
        _dtype(operation, name, x, A.dtype, "the dtype of A")
        wanted_length = length
    else:
        _float_tensor(operation, name, x)
        if (x.dtype == arrays.FLOAT64) != (u.dtype == arrays.FLOAT64):
            raise TypeError(
                f"{operation}: {name} is {x.dtype.name} and u is {u.dtype.name}; float64 is float64 throughout, "
                f"write {name}.astype({u.dtype.name!r})"
            )
        wanted_length = 2 * length if is_complex else length
    groups = 1 if x.ndim == 3 else x.shape[1]
    wanted = (batch, state, wanted_length) if x.ndim == 3 else (batch, groups, state, wanted_length)
    if x.shape != wanted:
        axes = "(batch, state, length)" if x.ndim == 3 else "(batch, groups, state, length)"
        hint = ""
        if is_complex and x.dtype.kind != "c":
            hint = (
                f"; with a complex A, {name} is either complex of length {length}, or real and interleaved "
                f"(re, im, re, im, …) of length {2 * length}"
            )
        raise ValueError(f"{operation}: {name} has shape {x.shape}, wanted {axes} = {wanted}{hint}")
    if groups == 0 or dim % groups:
        raise ValueError(f"{operation}: {name} has shape {x.shape} with {groups} groups, which do not divide dim = {dim}")
    return (x[:, None] if x.ndim == 3 else x), groups


def selective_scan_bwd(operation, saved, dy, dlast_state):
    """Check the gradients that enter a selective scan's backward pass.

    Raises
    ------
    TypeError, ValueError
        As `mambacupy.selective_scan_bwd` documents.
    """
    u, A = saved.u, saved.A
    arrays.namespace(operation, **{"saved.u": u}, dy=dy, dlast_state=dlast_state)
    if dy is None:
        raise TypeError(f"{operation}: dy is None, wanted an array of u's shape {u.shape}; zeros if only last_state counts")
    _shape(operation, "dy", dy, u.shape, "u's shape (batch, dim, length)")
    if dy.dtype != u.dtype and dy.dtype != arrays.compute_dtype(u.dtype):
        raise TypeError(
            f"{operation}: dy is {dy.dtype.name}, wanted u's {u.dtype.name} or {arrays.compute_dtype(u.dtype).name}"
        )
    if dlast_state is not None:
        wanted = (u.shape[0], u.shape[1], A.shape[1])
        _shape(operation, "dlast_state", dlast_state, wanted, "(batch, dim, state)")
        _dtype(operation, "dlast_state", dlast_state, A.dtype, "the dtype of A")
