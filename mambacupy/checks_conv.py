"""The gate of the causal convolution and of the one-token updates; wording and rules are those of `mambacupy.checks`."""

from typing import Any, NamedTuple

from mambacupy import arrays
from mambacupy.arrays import dtype_name
from mambacupy.checks import _RULES, _all_there, _check_float, _check_gradient_dtype, _wrong_dtype, _wrong_shape


class ConvArguments(NamedTuple):
    """Arguments of a causal convolution that passed the gate."""

    xp: Any
    x: Any
    weight: Any
    bias: Any
    initial_state: Any
    silu: bool
    reverse: bool
    batch: int
    dim: int
    length: int
    width: int


def causal_conv1d(operation, x, weight, bias, activation, initial_state, reverse):
    """Check the arguments of a causal convolution.

    Returns
    -------
    ConvArguments

    Raises
    ------
    TypeError, ValueError
        As `mambacupy.ops.causal_conv1d.causal_conv1d` documents.
    """
    _all_there(operation, "; only bias and initial_state may be left out", x=x, weight=weight)
    xp = arrays.namespace(operation, x=x, weight=weight, bias=bias, initial_state=initial_state)
    _check_float(operation, "x", x)
    if x.ndim != 3:
        hint = "; a single sequence is x[None]" if x.ndim == 2 else ""
        raise _wrong_shape(operation, "x", x, {"batch": None, "dim": None, "length": None}, hint)
    batch, dim, length = x.shape
    width = _check_filter(operation, x, weight, bias, activation, dim)
    if initial_state is not None:
        _check_window(operation, "initial_state", initial_state, x, batch, dim, width)
    return ConvArguments(
        xp, x, weight, bias, initial_state, activation == "silu", bool(reverse), batch, dim, length, width
    )  # fmt: skip


def causal_conv1d_bwd(operation, saved, dy, dfinal_state):
    """Check the gradients that enter a causal convolution's backward pass.

    Returns
    -------
    ConvArguments
        Those of the forward pass.

    Raises
    ------
    TypeError, ValueError
        As `mambacupy.ops.causal_conv1d.causal_conv1d_bwd` documents.
    """
    try:
        x, weight, bias, initial_state, activation, reverse = (
            saved.x, saved.weight, saved.bias, saved.initial_state, saved.activation, saved.reverse,
        )  # fmt: skip
    except AttributeError:
        raise TypeError(
            f"{operation}: saved is of type {type(saved).__qualname__}, wanted the third result of causal_conv1d_fwd"
        ) from None
    args = causal_conv1d(operation, x, weight, bias, activation, initial_state, reverse)
    if dy is None:
        raise TypeError(
            f"{operation}: dy is None, wanted an array of x's shape {x.shape}; zeros if only final_state has a gradient"
        )
    arrays.namespace(operation, **{"saved.x": x}, dy=dy, dfinal_state=dfinal_state)
    if dy.shape != x.shape:
        raise _wrong_shape(operation, "dy", dy, {"batch": args.batch, "dim": args.dim, "length": args.length})
    _check_gradient_dtype(operation, "dy", dy, "x", x.dtype)
    if dfinal_state is not None:
        _check_window(operation, "dfinal_state", dfinal_state, x, args.batch, args.dim, args.width)
    return args


def causal_conv1d_update(operation, state, x, weight, bias, activation):
    """Check the arguments of one step of a causal convolution.

    Returns
    -------
    (module, int)
        The array library, and the width of the filter.

    Raises
    ------
    TypeError, ValueError
        As `mambacupy.ops.causal_conv1d.causal_conv1d_update` documents.
    """
    _all_there(operation, "; only bias may be left out", state=state, x=x, weight=weight)
    xp = arrays.namespace(operation, state=state, x=x, weight=weight, bias=bias)
    batch, dim = _check_token(operation, x)
    width = _check_filter(operation, x, weight, bias, activation, dim)
    _check_window(operation, "state", state, x, batch, dim, width)
    _check_writable(operation, state)
    return xp, width


class UpdateArguments(NamedTuple):
    """Arguments of a state update that passed the gate. B and C are `(batch, groups, dstate)`."""

    xp: Any
    state: Any
    x: Any
    dt: Any
    A: Any
    B: Any
    C: Any
    D: Any
    z: Any
    dt_bias: Any
    batch: int
    dim: int
    dstate: int
    complex: bool


def selective_state_update(operation, state, x, dt, A, B, C, D, z, dt_bias):
    """Check the arguments of one step of a selective scan.

    Returns
    -------
    UpdateArguments

    Raises
    ------
    TypeError, ValueError
        As `mambacupy.ops.selective_state_update.selective_state_update` documents.
    """
    _all_there(operation, "; only D, z and dt_bias may be left out", state=state, x=x, dt=dt, A=A, B=B, C=C)
    xp = arrays.namespace(operation, state=state, x=x, dt=dt, A=A, B=B, C=C, D=D, z=z, dt_bias=dt_bias)
    batch, dim = _check_token(operation, x)
    for name, tensor in (("dt", dt), ("z", z)):
        if tensor is not None:
            if tensor.shape != x.shape:
                raise _wrong_shape(operation, name, tensor, {"batch": batch, "dim": dim})
            if tensor.dtype != x.dtype:
                raise _wrong_dtype(operation, name, tensor, (x.dtype,), ", the dtype of x")
    real, complex_of_real, varying = _RULES[x.dtype]
    because = f" because x is {dtype_name(x.dtype)}"
    if A.ndim != 2 or A.shape[0] != dim or A.shape[1] == 0:
        raise _wrong_shape(operation, "A", A, {"dim": dim, "dstate": None}, " with dstate at least 1")
    if A.dtype not in (real, complex_of_real):
        raise _wrong_dtype(operation, "A", A, (real, complex_of_real), because)
    dstate, is_complex = A.shape[1], A.dtype == complex_of_real
    for name, parameter in (("D", D), ("dt_bias", dt_bias)):
        if parameter is not None:
            if parameter.shape != (dim,):
                raise _wrong_shape(operation, name, parameter, {"dim": dim})
            if parameter.dtype != real:
                raise _wrong_dtype(operation, name, parameter, (real,), because)
    B, C = (_grouped(operation, name, k, A, varying, is_complex, batch, dim) for name, k in (("B", B), ("C", C)))
    if state.shape != (batch, dim, dstate):
        raise _wrong_shape(operation, "state", state, {"batch": batch, "dim": dim, "dstate": dstate})
    if state.dtype != A.dtype:
        raise _wrong_dtype(operation, "state", state, (A.dtype,), ", the dtype of A")
    _check_writable(operation, state)
    return UpdateArguments(xp, state, x, dt, A, B, C, D, z, dt_bias, batch, dim, dstate, is_complex)


# ---------------------------------------------------------------------------------------------------- parts of the above
def _check_token(operation, x):
    """Batch and dim of the x of one step."""
    _check_float(operation, "x", x)
    if x.ndim != 2:
        hint = "; this takes one step, write x[:, :, 0]" if x.ndim == 3 and x.shape[2] == 1 else ""
        raise _wrong_shape(operation, "x", x, {"batch": None, "dim": None}, hint)
    return x.shape


def _check_filter(operation, x, weight, bias, activation, dim):
    """Width of the filter."""
    if activation is not None and activation != "silu":
        raise ValueError(f"{operation}: activation is {activation!r}, wanted None or 'silu'")
    allowed, because = _RULES[x.dtype][2], f" because x is {dtype_name(x.dtype)}"
    if weight.ndim != 2 or weight.shape[0] != dim or weight.shape[1] == 0:
        hint = " with width at least 1"
        if weight.ndim == 3 and weight.shape[1] == 1:
            hint = "; write weight[:, 0]"  # the (dim, 1, width) of checkpoints
        raise _wrong_shape(operation, "weight", weight, {"dim": dim, "width": None}, hint)
    if weight.dtype not in allowed:
        raise _wrong_dtype(operation, "weight", weight, allowed, because)
    if bias is not None:
        if bias.shape != (dim,):
            raise _wrong_shape(operation, "bias", bias, {"dim": dim})
        if bias.dtype != weight.dtype:
            raise _wrong_dtype(operation, "bias", bias, (weight.dtype,), ", the dtype of weight")
    return weight.shape[1]


def _check_window(operation, name, state, x, batch, dim, width):
    if state.shape != (batch, dim, width - 1):
        raise _wrong_shape(operation, name, state, {"batch": batch, "dim": dim, "width - 1": width - 1})
    if state.dtype != x.dtype:
        raise _wrong_dtype(operation, name, state, (x.dtype,), ", the dtype of x")


def _check_writable(operation, state):
    """A state that is to be updated in place must be writable, and no two of its entries may share their memory."""
    if not getattr(state.flags, "writeable", True):  # CuPy's arrays always are, and have no such flag
        raise ValueError(f"{operation}: state is read-only, wanted an array that can be updated in place; write state.copy()")
    if state.size and any(stride == 0 and size > 1 for stride, size in zip(state.strides, state.shape, strict=True)):
        raise ValueError(
            f"{operation}: state is a broadcast view of strides {state.strides}, wanted an array that can be updated in place; "
            "write state.copy()"
        )


def _grouped(operation, name, x, A, varying, is_complex, batch, dim):
    """B or C as (batch, groups, dstate)."""
    dstate = A.shape[1]
    wanted = (A.dtype,) if is_complex else varying
    if x.dtype not in wanted:
        raise _wrong_dtype(operation, name, x, wanted, f" because A is {dtype_name(A.dtype)}")
    if x.ndim == 2 and x.shape == (batch, dstate):
        return x.reshape((batch, 1, dstate))  # (batch, dstate) -> (batch, 1, dstate), a view
    if x.ndim == 3 and x.shape == (batch, x.shape[1], dstate) and x.shape[1] and dim % x.shape[1] == 0:
        return x
    hint = f", or the same without groups; groups divide dim = {dim}"
    raise _wrong_shape(operation, name, x, {"batch": batch, "groups": None, "dstate": dstate}, hint)
