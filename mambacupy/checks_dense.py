"""The gate of norms, linear maps, embedding and cross-entropy; wording and rules are those of `mambacupy.checks`."""

import functools
import math
import numbers
from typing import Any, NamedTuple

import numpy as np

from mambacupy import arrays
from mambacupy.arrays import dtype_name
from mambacupy.checks import _RULES, _all_there, _check_float, _check_gradient_dtype, _wrong_dtype, _wrong_shape


class NormArguments(NamedTuple):
    """Arguments of a norm that passed the gate. `total_dtype` is that of x + residual."""

    xp: Any
    x: Any
    weight: Any
    bias: Any
    residual: Any
    total_dtype: Any


def norm(operation, x, weight, bias, residual, eps, residual_dtype):
    """Check the arguments of RMSNorm (bias None) or LayerNorm.

    Returns
    -------
    NormArguments

    Raises
    ------
    TypeError, ValueError
        As `mambacupy.ops.norm.rms_norm_fwd` documents.
    """
    _all_there(operation, x=x, weight=weight)
    xp = arrays.namespace(operation, x=x, weight=weight, bias=bias, residual=residual)
    _check_float(operation, "x", x)
    if not x.ndim or not x.shape[-1]:
        raise ValueError(f"{operation}: x has shape {x.shape}, wanted (..., dim) with dim at least 1")
    allowed = _RULES[x.dtype][2]
    for name, parameter in (("weight", weight), ("bias", bias)):
        if parameter is not None:
            if parameter.shape != x.shape[-1:]:
                raise _wrong_shape(operation, name, parameter, {"dim": x.shape[-1]})
            if parameter.dtype not in allowed:
                raise _wrong_dtype(operation, name, parameter, allowed, _because_of(x))
    if bias is not None and bias.dtype != weight.dtype:
        raise _wrong_dtype(operation, "bias", bias, (weight.dtype,), ", the dtype of weight")
    if residual is not None:
        _check_like(operation, "residual", residual, "x", x.shape)
        if residual.dtype not in allowed:
            raise _wrong_dtype(operation, "residual", residual, allowed, _because_of(x))
    if isinstance(eps, bool) or not isinstance(eps, numbers.Real):
        raise TypeError(f"{operation}: eps is of type {type(eps).__qualname__}, wanted a number")
    if not (math.isfinite(eps) and eps >= 0):
        raise ValueError(f"{operation}: eps is {eps!r}, wanted a finite number, at least 0")
    total_dtype = (x if residual is None else residual).dtype
    if residual_dtype is not None:
        named = arrays.FLOAT_DTYPES.get(residual_dtype) if isinstance(residual_dtype, str) else None
        try:
            total_dtype = np.dtype(residual_dtype) if named is None else named
        except TypeError:
            total_dtype = None
        if total_dtype not in allowed:
            wanted = ", ".join(map(dtype_name, allowed))
            raise TypeError(f"{operation}: residual_dtype is {residual_dtype!r}, wanted one of {wanted}{_because_of(x)}")
    return NormArguments(xp, x, weight, bias, residual, total_dtype)


def norm_bwd(operation, forward, saved, dy, dresidual_out):
    """Check the gradients that enter a norm's backward pass.

    Raises
    ------
    TypeError, ValueError
        As `mambacupy.ops.norm.rms_norm_bwd` documents.
    """
    _check_saved(operation, saved, forward, "third", "residual_out", "weight", "rstd", "x_dtype")
    total = saved.residual_out
    _all_there(operation, dy=dy)
    arrays.namespace(operation, **{"saved.residual_out": total}, dy=dy, dresidual_out=dresidual_out)
    _check_gradient(operation, "dy", dy, "x", total.shape, saved.x_dtype)
    if dresidual_out is not None:
        _check_gradient(operation, "dresidual_out", dresidual_out, "residual_out", total.shape, total.dtype)


def linear(operation, x, weight, bias):
    """Check the arguments of a linear map.

    Returns
    -------
    module
        The array library.

    Raises
    ------
    TypeError, ValueError
        As `mambacupy.ops.linear.linear_fwd` documents.
    """
    _all_there(operation, x=x, weight=weight)
    xp = arrays.namespace(operation, x=x, weight=weight, bias=bias)
    _check_float(operation, "x", x)
    if not x.ndim:
        raise ValueError(f"{operation}: x has shape (), wanted (..., in)")
    if weight.ndim != 2 or weight.shape[1] != x.shape[-1]:
        raise _wrong_shape(operation, "weight", weight, {"out": None, "in": x.shape[-1]})
    if bias is not None and bias.shape != weight.shape[:1]:
        raise _wrong_shape(operation, "bias", bias, {"out": weight.shape[0]})
    for name, parameter in (("weight", weight), ("bias", bias)):
        if parameter is not None and parameter.dtype != x.dtype:
            raise _wrong_dtype(operation, name, parameter, (x.dtype,), ", the dtype of x")
    if xp is not np:
        _check_products(operation)
    return xp


def linear_bwd(operation, saved, dy, dtype, onto):
    """Check the gradient that enters a linear map's backward pass.

    Returns
    -------
    (module, dtype)
        The array library; the dtype of the gradients of weight and bias.

    Raises
    ------
    TypeError, ValueError
        As `mambacupy.ops.linear.linear_bwd` documents.
    """
    _check_saved(operation, saved, "linear_fwd", "second", "x", "weight", "bias")
    _all_there(operation, dy=dy)
    x, weight = saved.x, saved.weight
    parts = {f"dy[{i}]": part for i, part in enumerate(dy)} if isinstance(dy, tuple) else {"dy": dy}
    xp = arrays.namespace(operation, **{"saved.x": x, "saved.weight": weight}, **parts, onto=onto)
    if onto is not None:
        _check_like(operation, "onto", onto, "x", x.shape)
        if onto.dtype != x.dtype:
            raise _wrong_dtype(operation, "onto", onto, (x.dtype,), ", the dtype of x")
    outs = weight.shape[:1] if "dy" in parts else [part.shape[-1] if part.ndim else 0 for part in parts.values()]
    for (name, part), out in zip(parts.items(), outs, strict=True):
        _check_gradient(operation, name, part, "y", (*x.shape[:-1], out), x.dtype)
    if sum(outs) != weight.shape[0]:
        raise ValueError(f"{operation}: the parts of dy have {' + '.join(map(str, outs))} columns, wanted {weight.shape[0]}")
    if dtype is None:
        return xp, x.dtype
    wanted, real = np.dtype(dtype), arrays.compute_dtype(x.dtype)
    if wanted not in (x.dtype, real):
        names = " or ".join(dict.fromkeys(map(dtype_name, (x.dtype, real))))
        raise TypeError(f"{operation}: dtype is {dtype_name(wanted)}, wanted {names} because x is {dtype_name(x.dtype)}")
    return xp, wanted


def embedding(operation, tokens, weight):
    """Check the arguments of an embedding; where the tokens lie on the host, their values too.

    Returns
    -------
    module
        The array library.

    Raises
    ------
    TypeError, ValueError
        As `mambacupy.ops.linear.embedding_fwd` documents.
    """
    _all_there(operation, tokens=tokens, weight=weight)
    xp = arrays.namespace(operation, tokens=tokens, weight=weight)
    _check_integers(operation, "tokens", tokens)
    _check_float(operation, "weight", weight)
    if weight.ndim != 2:
        raise _wrong_shape(operation, "weight", weight, {"vocabulary": None, "dim": None})
    if xp is np:
        _check_range(operation, "tokens", tokens, (tokens < 0) | (tokens >= weight.shape[0]), weight.shape[0], "")
    return xp


def embedding_bwd(operation, saved, dy, onto):
    """Check the gradient that enters an embedding's backward pass, and what is added to.

    Returns
    -------
    module
        The array library.

    Raises
    ------
    TypeError, ValueError
        As `mambacupy.ops.linear.embedding_bwd` documents.
    """
    _check_saved(operation, saved, "embedding_fwd", "second", "tokens", "vocabulary", "dtype")
    _all_there(operation, dy=dy)
    xp = arrays.namespace(operation, **{"saved.tokens": saved.tokens}, dy=dy, onto=onto)
    _check_gradient(operation, "dy", dy, "y", (*saved.tokens.shape, saved.dim), saved.dtype)
    if onto is not None:
        _check_like(operation, "onto", onto, "weight", (saved.vocabulary, saved.dim))
        if onto.dtype != saved.dtype:
            raise _wrong_dtype(operation, "onto", onto, (saved.dtype,), ", the dtype of weight")
    return xp


def cross_entropy(operation, logits, targets, ignore_index):
    """Check the arguments of the softmax cross-entropy; where the targets lie on the host, their values too.

    Returns
    -------
    module
        The array library.

    Raises
    ------
    TypeError, ValueError
        As `mambacupy.ops.loss.softmax_cross_entropy_fwd` documents.
    """
    _all_there(operation, logits=logits, targets=targets)
    xp = arrays.namespace(operation, logits=logits, targets=targets)
    _check_float(operation, "logits", logits)
    _check_integers(operation, "targets", targets)
    if not logits.ndim or not logits.shape[-1]:
        raise ValueError(f"{operation}: logits has shape {logits.shape}, wanted (..., vocabulary) with at least one class")
    if targets.shape != logits.shape[:-1]:
        raise ValueError(
            f"{operation}: targets has shape {targets.shape}, wanted {logits.shape[:-1]}, "
            "the shape of logits without its last axis"
        )
    if isinstance(ignore_index, bool) or not isinstance(ignore_index, numbers.Integral):
        raise TypeError(f"{operation}: ignore_index is of type {type(ignore_index).__qualname__}, wanted an integer")
    if xp is np:
        outside = (targets != ignore_index) & ((targets < 0) | (targets >= logits.shape[-1]))
        _check_range(operation, "targets", targets, outside, logits.shape[-1], f" or {ignore_index}, which is ignored")
    return xp


def cross_entropy_bwd(operation, saved, dloss):
    """Check the gradient that enters the cross-entropy's backward pass.

    Returns
    -------
    array ()
        dloss as an array of the logits' library, on their device.

    Raises
    ------
    TypeError, ValueError
        As `mambacupy.ops.loss.softmax_cross_entropy_bwd` documents.
    """
    _check_saved(operation, saved, "softmax_cross_entropy_fwd", "second", "logits", "targets", "maximum", "total", "count")
    _all_there(operation, dloss=dloss)
    real = arrays.compute_dtype(saved.logits.dtype)
    if isinstance(dloss, numbers.Real) and not isinstance(dloss, bool):  # NumPy's scalars among them
        xp = arrays.library_of(operation, "saved.logits", saved.logits)
        return xp.asarray(dloss, real)
    arrays.namespace(operation, **{"saved.logits": saved.logits}, dloss=dloss)
    if dloss.shape != ():
        raise ValueError(f"{operation}: dloss has shape {dloss.shape}, wanted (), the shape of loss")
    if dloss.dtype != real:
        raise _wrong_dtype(operation, "dloss", dloss, (real,), ", the dtype of loss")
    return dloss


def lengths(operation, x, lengths):
    """Check how many steps of each row of x (batch, length, …) are no padding; where they lie on the host, their values too.

    Returns
    -------
    array (batch,)
        Of int64, from 0 to length; None where there is no padding: without lengths, or without steps.

    Raises
    ------
    TypeError, ValueError
        As `mambacupy.layers.MambaMixer` documents.
    """
    if lengths is None:
        return None
    xp, (batch, length) = arrays.namespace(operation, x=x, lengths=lengths), x.shape[:2]
    _check_integers(operation, "lengths", lengths)
    if lengths.shape != (batch,):
        raise _wrong_shape(operation, "lengths", lengths, {"batch": batch})
    if xp is np:
        _check_range(operation, "lengths", lengths, (lengths < 0) | (lengths > length), length + 1, ", the length of x")
    return lengths.astype(np.int64, copy=False).clip(0, length) if length else None


# ---------------------------------------------------------------------------------------------------- parts of the above
def _because_of(x):
    """What follows the dtypes that will do. A dtype takes as long to name as all checks of a norm."""
    return f" because x is {dtype_name(x.dtype)}"


@functools.cache
def _check_products(operation):
    """Complain if CuPy has no cuBLAS: of itself it would only name a file that it does not find."""
    from mambacupy import environment  # whose imports take as long as all others of `import mambacupy`

    missing = environment.explain_missing_products()
    if missing:
        raise RuntimeError(f"{operation}: {missing}")


def _check_integers(operation, name, x):
    if x.dtype.kind not in "iu":
        raise TypeError(f"{operation}: {name} is {dtype_name(x.dtype)}, wanted int32 or int64; write {name}.astype('int64')")


def _check_range(operation, name, x, outside, end, further):
    if outside.any():
        at = tuple(int(i) for i in np.argwhere(outside)[0])
        raise ValueError(f"{operation}: {name} holds {x[at]} at {at}, wanted 0 to {end - 1}{further}")


def _check_like(operation, name, x, other, shape):
    if x.shape != shape:
        raise ValueError(f"{operation}: {name} has shape {x.shape}, wanted {shape}, the shape of {other}")


def _check_gradient(operation, name, x, other, shape, dtype):
    _check_like(operation, name, x, other, shape)
    _check_gradient_dtype(operation, name, x, other, dtype)


def _check_saved(operation, saved, forward, which, *names):
    if not all(hasattr(saved, name) for name in names):
        kind = type(saved).__qualname__
        raise TypeError(f"{operation}: saved is of type {kind}, wanted the {which} result of {forward}")
