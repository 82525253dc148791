"""RMSNorm and LayerNorm of x + residual, and their gradients.

    RMSNorm     y = r / √(mean(r²) + eps)·weight,      r = x + residual
    LayerNorm   y = (r - mean(r)) / √(mean((r - mean(r))²) + eps)·weight + bias

after "Root Mean Square Layer Normalization" (Zhang & Sennrich, 2019) and "Layer Normalization" (Ba et al., 2016). NumPy arrays
run `mambacupy.reference.norm`; CuPy arrays run cuda_src/norm.cu.
"""

import struct

from mambacupy import arrays, checks_dense, kernels
from mambacupy.ops import plans, rows
from mambacupy.reference import norm as reference
from mambacupy.reference.norm import LayerNormGrads, LayerNormSaved, RMSNormGrads, RMSNormSaved

__all__ = [
    "LayerNormGrads",
    "LayerNormSaved",
    "RMSNormGrads",
    "RMSNormSaved",
    "layer_norm_bwd",
    "layer_norm_fwd",
    "rms_norm_bwd",
    "rms_norm_fwd",
]

ROWS_OF_TEAM = 256
"""Rows whose part of dweight one thread adds up: few enough that float32 keeps its digits."""


def rms_norm_fwd(x, weight, residual=None, *, eps=1e-5, residual_dtype=None):
    """Add a residual, and divide each row by its root mean square.

    Parameters
    ----------
    x : array (..., dim)
        float16, bfloat16, float32 or float64. Rows that lie evenly spaced in memory are read in place, other views are copied.
    weight : array (dim,)
        Any of these dtypes up to float32; float64 with float64 x.
    residual : array (..., dim), optional
        Added to x, in float32 at least. Its dtype is as free as the weight's.
    eps : float
        Added to the mean square.
    residual_dtype : dtype or str, optional
        Dtype of residual_out; by default that of residual, without one that of x.

    Returns
    -------
    y : array (..., dim)
        In x's dtype, from the sum before it is rounded to residual_dtype.
    residual_out : array (..., dim)
        x + residual in residual_dtype; x itself where there is nothing to add or convert.
    saved : RMSNormSaved
        For `rms_norm_bwd`: residual_out and weight, by reference, and one number a row.

    Raises
    ------
    TypeError
        An argument is no NumPy or CuPy array, has a dtype that is not supported, or lives elsewhere than x.
    ValueError
        A shape does not fit, or eps is negative or not finite.

    Notes
    -----
    Arithmetic is float32 at least. Results are bit-identical from run to run.
    """
    args = checks_dense.norm("rms_norm_fwd", x, weight, None, residual, eps, residual_dtype)
    if args.xp.__name__ == "numpy":
        return reference.rms_norm_fwd(x, weight, residual, eps=eps, residual_dtype=residual_dtype)
    with kernels.device_of(x):
        y, total, _, rstd = _forward(args, eps, layer=False)
    return y, total, RMSNormSaved(total, weight, rstd, x.dtype, getattr(residual, "dtype", None))


def rms_norm_bwd(dy, saved, dresidual_out=None):
    """Gradient of `rms_norm_fwd`.

    Parameters
    ----------
    dy : array (..., dim)
        Gradient of y: x's dtype, or float32 where that is a 16-bit one.
    saved : RMSNormSaved
        Third result of `rms_norm_fwd`; its arrays must not have been written to since.
    dresidual_out : array (..., dim), optional
        Gradient of residual_out: its dtype, or float32 where that is a 16-bit one. Zero where None.

    Returns
    -------
    RMSNormGrads
        Gradients of x, weight and residual (None if there was none), in their shapes and dtypes. Those of x and residual are
        one array where the dtypes agree.

    Raises
    ------
    TypeError, ValueError
        A gradient is no array of the library and device of `saved`, or its dtype or shape does not fit; `saved` is something
        else.
    """
    checks_dense.norm_bwd("rms_norm_bwd", "rms_norm_fwd", saved, dy, dresidual_out)
    xp = arrays.library_of("rms_norm_bwd", "dy", dy)
    if xp.__name__ == "numpy":
        return reference.rms_norm_bwd(dy, saved, dresidual_out)
    with dy.device:
        dx, dresidual, dweight, _ = _backward(xp, saved, None, None, dy, dresidual_out)
    return RMSNormGrads(dx, dweight, dresidual)


def layer_norm_fwd(x, weight, bias=None, residual=None, *, eps=1e-5, residual_dtype=None):
    """Add a residual, and bring each row to mean 0 and variance 1.

    Parameters
    ----------
    x, weight, residual, eps, residual_dtype
        As `rms_norm_fwd` takes them.
    bias : array (dim,), optional
        Added to y; weight's dtype.

    Returns
    -------
    y, residual_out : array (..., dim)
        As `rms_norm_fwd` gives them.
    saved : LayerNormSaved
        For `layer_norm_bwd`: residual_out, weight and bias, by reference, and two numbers a row.

    Raises
    ------
    TypeError, ValueError
        As from `rms_norm_fwd`.
    """
    args = checks_dense.norm("layer_norm_fwd", x, weight, bias, residual, eps, residual_dtype)
    if args.xp.__name__ == "numpy":
        return reference.layer_norm_fwd(x, weight, bias, residual, eps=eps, residual_dtype=residual_dtype)
    with kernels.device_of(x):
        y, total, mean, rstd = _forward(args, eps, layer=True)
    return y, total, LayerNormSaved(total, weight, bias, mean, rstd, x.dtype, getattr(residual, "dtype", None))


def layer_norm_bwd(dy, saved, dresidual_out=None):
    """Gradient of `layer_norm_fwd`; parameters and errors are those of `rms_norm_bwd`.

    Returns
    -------
    LayerNormGrads
        Gradients of x, weight, bias and residual (the last two None where the argument was), in their shapes and dtypes.
        Those of x and residual are one array where the dtypes agree.
    """
    checks_dense.norm_bwd("layer_norm_bwd", "layer_norm_fwd", saved, dy, dresidual_out)
    xp = arrays.library_of("layer_norm_bwd", "dy", dy)
    if xp.__name__ == "numpy":
        return reference.layer_norm_bwd(dy, saved, dresidual_out)
    with dy.device:
        dx, dresidual, dweight, dbias = _backward(xp, saved, saved.mean, saved.bias, dy, dresidual_out)
    return LayerNormGrads(dx, dweight, dbias, dresidual)


# ---------------------------------------------------------------------------------------------------- launches
def _layout(dim, vector, most):
    """How rows are laid over threads: constants of the kernel. `most`: elements that a thread keeps in registers."""
    packs = dim // vector
    team = 1
    while team < 32 and team < packs:
        team *= 2
    while team < 512 and -(-packs // team) * vector > most:
        team *= 2
    items = -(-packs // team)
    kept = items * vector <= most
    return {
        "KEPT": int(kept), "THREADS": max(team, 128), "TEAM": team, "VECTOR": vector, "ITEMS": items if kept else 1,
    }  # fmt: skip


def _forward_layout(dim, vector, most):
    """The same where rows are read once: as many threads a row as have equal shares of it, each with 16 bytes of the widest
    tensor at a time. What they keep is little, so that many rows are under way."""
    packs = dim // vector
    team = min(512, packs & -packs)
    if team < 32 or packs // team * vector > most:
        return _layout(dim, vector, most)
    return {"KEPT": 1, "THREADS": max(team, 128), "TEAM": team, "VECTOR": vector, "ITEMS": packs // team}


def _types(**dtypes):
    return {name: kernels.C_TYPES[dtype.name] for name, dtype in dtypes.items()}


def _forward(args, eps, layer):
    """y, the sum, and mean (None without `layer`) and rstd of each row."""
    xp, x, weight, bias, residual, total_dtype = args
    real = arrays.compute_dtype(x.dtype)
    y = xp.ndarray(x.shape, x.dtype)
    total = x if residual is None and total_dtype == x.dtype else xp.ndarray(x.shape, total_dtype)
    rstd = xp.ndarray(x.shape[:-1], real)
    mean = xp.ndarray(x.shape[:-1], real) if layer else None
    if x.size == 0:
        return y, total, mean, rstd
    given = x, residual, weight, bias
    as_they_lie, launch = plans.planned(_plan_forward, (args, eps, layer), given, (eps, layer, total_dtype.num))
    if not as_they_lie:
        given = _in_rows(xp, *given)
    launch(kernels.addresses((None, *given, y, None if total is x else total, mean, rstd)))
    return y, total, mean, rstd


_FORWARD = ("x", "residual", "weight", "bias", "y", "residual_out", "mean", "rstd")
_UNUSED = dict.fromkeys(("dy", "dresidual_out", "dx", "dresidual", "dweight_parts", "dbias_parts"), 0)
_ORDER = _UNUSED | {name: 1 + place for place, name in enumerate(_FORWARD)}
"""Where what stands among the addresses of a forward launch: null, then arrays."""


def _in_rows(xp, x, residual, weight, bias):
    """The arrays as kernels read them: themselves, or copies."""
    x, residual = (None if r is None else rows.as_rows(xp, r)[0] for r in (x, residual))
    return x, residual, rows.contiguous(xp, weight), rows.contiguous(xp, bias)


def _plan_forward(args, eps, layer):
    """Whether kernels can read the arrays as they lie, and the launch."""
    xp, x, weight, bias, residual, total_dtype = args
    given = x, residual, weight, bias
    x, residual, weight, bias = lying = _in_rows(xp, *given)
    as_they_lie = all(one is other for one, other in zip(given, lying, strict=True))
    real, dim = arrays.compute_dtype(x.dtype), x.shape[-1]
    x_row, residual_row = (0 if r is None else rows.row_stride(r) for r in (x, residual))
    tensors = [(x, x_row), (weight,), *((t,) for t in (bias,) if t is not None)]
    if residual is not None:
        tensors.append((residual, residual_row))
    writes_total = residual is not None or total_dtype != x.dtype
    widest = max(x.itemsize, residual.itemsize if residual is not None else 0, total_dtype.itemsize if writes_total else 0)
    vector = min(rows.widest_access(dim, *tensors), 16 // widest)
    layout = _forward_layout(dim, vector, 128 // real.itemsize)
    constants = layout | {"BACKWARD": 0, "LAYER": int(layer), "HAS_RESIDUAL": int(residual is not None)}
    constants |= _types(
        X_T=x.dtype, W_T=weight.dtype, RESIDUAL_T=x.dtype if residual is None else residual.dtype,
        TOTAL_T=total_dtype, REAL=real, DY_T=x.dtype, DTOTAL_T=total_dtype,
    )  # fmt: skip
    count = x.size // dim
    numbers = {
        "rows": count, "dim": dim, "x_row": x_row, "residual_row": residual_row, "total_row": dim, "dy_row": 0,
        "dtotal_row": 0, "rows_of_part": 0, "eps": struct.unpack("q", struct.pack("d", eps))[0],
    }  # fmt: skip
    blocks = -(-count // (layout["THREADS"] // layout["TEAM"]))
    kernel = kernels.get("norm.cu", "norm_fwd", constants)
    return as_they_lie, kernel.prepare(blocks, layout["THREADS"], numbers, order=_ORDER)


def _rows_of_part(count, layout):
    """Rows of which one block sums dweight: as many as keep the device busy, a multiple of those it has beside each other."""
    teams = layout["THREADS"] // layout["TEAM"]
    blocks = kernels.device().multiprocessors * layout["BLOCKS_PER_SM"]  # all of them run at the same time
    return teams * min(-(-count // (teams * blocks)), ROWS_OF_TEAM)


def _backward(xp, saved, mean, bias, dy, dtotal):
    """dx, dresidual, dweight and dbias; None for the second and last where there was no such argument."""
    total, weight, rstd = saved.residual_out, saved.weight, saved.rstd
    real, dim, x_dtype = rstd.dtype, dy.shape[-1], saved.x_dtype
    dx = dresidual = xp.empty(dy.shape, x_dtype)
    own_residual = saved.residual_dtype not in (None, x_dtype)
    if own_residual:
        dresidual = xp.empty(dy.shape, saved.residual_dtype)
    if saved.residual_dtype is None:
        dresidual = None
    if dy.size == 0:
        return dx, dresidual, xp.zeros(weight.shape, weight.dtype), None if bias is None else xp.zeros(bias.shape, bias.dtype)

    total, total_row = rows.as_rows(xp, total)
    dy, dy_row = rows.as_rows(xp, dy)
    weight_rows = rows.contiguous(xp, weight)
    dtotal_row = 0
    if dtotal is not None:
        dtotal, dtotal_row = rows.as_rows(xp, dtotal)
    tensors = total, weight_rows, dy, dtotal, dx, dresidual if own_residual else None
    options = total_row, dy_row, dtotal_row, mean is not None
    parts, launches = plans.planned(_plan_backward, (*tensors, *options), tensors, options)
    dweight_parts = xp.empty((parts, dim), real)
    dbias_parts = None if bias is None else xp.empty((parts, dim), real)
    given = {
        "x": None, "residual": None, "weight": weight_rows, "bias": None, "y": None, "residual_out": total, "mean": mean,
        "rstd": rstd, "dy": dy, "dresidual_out": dtotal, "dx": dx, "dresidual": dresidual if own_residual else None,
        "dweight_parts": dweight_parts, "dbias_parts": dbias_parts,
    }  # fmt: skip
    for launch in launches:
        launch(given)
    pairs = [(dweight_parts, weight)] if bias is None else [(dweight_parts, weight), (dbias_parts, bias)]
    dweight, dbias = (*rows.sum_parts(xp, *pairs), None)[:2]
    return dx, dresidual, dweight, dbias


def _plan_backward(total, weight, dy, dtotal, dx, dresidual, total_row, dy_row, dtotal_row, layer):
    """How many parts dweight is summed up in, and the launches."""
    real, dim = arrays.compute_dtype(dx.dtype), dy.shape[-1]
    tensors = [(total, total_row), (dy, dy_row), (weight,), (dx,), *((t,) for t in (dresidual,) if t is not None)]
    if dtotal is not None:
        tensors.append((dtotal, dtotal_row))
    layout = _layout(dim, rows.widest_access(dim, *tensors), (64 if layer else 96) // real.itemsize)
    layout["BLOCKS_PER_SM"] = 512 // layout["THREADS"]  # 128 registers a thread, which is what it takes
    constants = layout | {"BACKWARD": 1, "LAYER": int(layer), "HAS_RESIDUAL": int(dresidual is not None)}
    constants |= _types(
        X_T=dx.dtype, W_T=weight.dtype, RESIDUAL_T=dx.dtype if dresidual is None else dresidual.dtype, TOTAL_T=total.dtype,
        REAL=real, DY_T=dy.dtype, DTOTAL_T=total.dtype if dtotal is None else dtotal.dtype,
    )  # fmt: skip
    count, threads = dy.size // dim, layout["THREADS"]
    rows_of_part = _rows_of_part(count, layout)
    parts = -(-count // rows_of_part)
    numbers = {
        "rows": count, "dim": dim, "x_row": 0, "residual_row": 0, "total_row": total_row, "dy_row": dy_row,
        "dtotal_row": dtotal_row, "rows_of_part": rows_of_part, "eps": 0,
    }  # fmt: skip
    launches = [plans.prepared("norm.cu", "norm_bwd", constants, parts, threads, numbers)]
    if not layout["KEPT"]:
        blocks = parts * -(-dim // (layout["VECTOR"] * threads))
        launches.append(plans.prepared("norm.cu", "norm_bwd_weight", constants, blocks, threads, numbers))
    return parts, launches
