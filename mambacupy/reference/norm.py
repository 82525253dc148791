"""RMSNorm and LayerNorm of a sum, x + residual, in NumPy, forward and backward.

    r = x + residual
    RMSNorm     x̂ = r / √(mean(r²) + eps)                         y = x̂·weight
    LayerNorm   x̂ = (r - mean(r)) / √(mean((r - mean(r))²) + eps)     y = x̂·weight + bias

after "Root Mean Square Layer Normalization" (Zhang & Sennrich, 2019), equation 4, and "Layer Normalization" (Ba et al., 2016),
equation 4. Means are over the last axis. float64 is computed in float64, everything else in float32.
"""

from typing import Any, NamedTuple

import numpy as np

from mambacupy import arrays, checks_dense


class RMSNormSaved(NamedTuple):
    """What RMSNorm's backward pass needs: `residual_out` and `weight` by reference, and one number a row."""

    residual_out: Any  # (..., dim)
    weight: Any
    rstd: Any  # (...), 1/√(mean(r²) + eps)
    x_dtype: Any
    residual_dtype: Any  # of the argument residual, or None


class LayerNormSaved(NamedTuple):
    """What LayerNorm's backward pass needs: `residual_out`, `weight` and `bias` by reference, and two numbers a row."""

    residual_out: Any  # (..., dim)
    weight: Any
    bias: Any
    mean: Any  # (...)
    rstd: Any  # (...), one over the standard deviation
    x_dtype: Any
    residual_dtype: Any  # of the argument residual, or None


class RMSNormGrads(NamedTuple):
    """Gradients of RMSNorm, each in its argument's shape and dtype; None where there was no residual. x and residual enter by
    their sum, so where their dtypes agree, their gradients are one and the same array."""

    x: Any
    weight: Any
    residual: Any


class LayerNormGrads(NamedTuple):
    """Gradients of LayerNorm, each in its argument's shape and dtype; None where there was none. x and residual enter by their
    sum, so where their dtypes agree, their gradients are one and the same array."""

    x: Any
    weight: Any
    bias: Any
    residual: Any


def rms_norm_fwd(x, weight, residual=None, *, eps=1e-5, residual_dtype=None):
    """`mambacupy.ops.norm.rms_norm_fwd` for NumPy arrays."""
    args = checks_dense.norm("rms_norm_fwd", x, weight, None, residual, eps, residual_dtype)
    y, total, _, rstd = _forward(args, eps, centred=False)
    return y, total, RMSNormSaved(total, weight, rstd, x.dtype, getattr(residual, "dtype", None))


def layer_norm_fwd(x, weight, bias=None, residual=None, *, eps=1e-5, residual_dtype=None):
    """`mambacupy.ops.norm.layer_norm_fwd` for NumPy arrays."""
    args = checks_dense.norm("layer_norm_fwd", x, weight, bias, residual, eps, residual_dtype)
    y, total, mean, rstd = _forward(args, eps, centred=True)
    return y, total, LayerNormSaved(total, weight, bias, mean, rstd, x.dtype, getattr(residual, "dtype", None))


def rms_norm_bwd(dy, saved, dresidual_out=None):
    """`mambacupy.ops.norm.rms_norm_bwd` for NumPy arrays.

    With g = weight·dy:  dr = (g - x̂·mean(x̂·g))·rstd + dresidual_out,   dweight = Σ_rows dy·x̂
    """
    checks_dense.norm_bwd("rms_norm_bwd", "rms_norm_fwd", saved, dy, dresidual_out)
    dx, dresidual, dweight, _ = _backward(saved, None, dy, dresidual_out)
    return RMSNormGrads(dx, dweight, dresidual)


def layer_norm_bwd(dy, saved, dresidual_out=None):
    """`mambacupy.ops.norm.layer_norm_bwd` for NumPy arrays.

    With g = weight·dy:  dr = (g - mean(g) - x̂·mean(x̂·g))·rstd + dresidual_out,   dweight = Σ_rows dy·x̂,   dbias = Σ_rows dy
    """
    checks_dense.norm_bwd("layer_norm_bwd", "layer_norm_fwd", saved, dy, dresidual_out)
    dx, dresidual, dweight, dbias = _backward(saved, saved.mean, dy, dresidual_out)
    return LayerNormGrads(dx, dweight, None if saved.bias is None else dbias.astype(saved.bias.dtype), dresidual)


def _forward(args, eps, centred):
    """y, the sum, and mean (None unless centred) and rstd of each row."""
    _, x, weight, bias, residual, total_dtype = args
    real = arrays.compute_dtype(x.dtype)
    wide = x.astype(real)
    if residual is not None:
        wide += residual.astype(real)
    # What is normalised is the sum before it is rounded to total_dtype.
    total = x if residual is None and total_dtype == x.dtype else wide.astype(total_dtype)
    mean = wide.mean(-1) if centred else None
    if centred:
        wide -= mean[..., None]
    rstd = (1 / np.sqrt((wide * wide).mean(-1) + real.type(eps))).astype(real)
    y = wide * rstd[..., None] * weight.astype(real)
    if bias is not None:
        y += bias.astype(real)
    return y.astype(x.dtype), total, mean, rstd


def _backward(saved, mean, dy, dresidual_out):
    """dx, dresidual (None if there was none), dweight, and Σ_rows dy in float64."""
    real, dim = saved.rstd.dtype, dy.shape[-1]
    rstd, dy = saved.rstd[..., None], dy.astype(real)
    normal = saved.residual_out.astype(real)
    if mean is not None:
        normal -= mean[..., None]
    normal *= rstd  # x̂
    g = dy * saved.weight.astype(real)
    dr = g - normal * (normal * g).mean(-1, keepdims=True)
    if mean is not None:
        dr -= g.mean(-1, keepdims=True)
    dr *= rstd
    if dresidual_out is not None:
        dr += dresidual_out.astype(real)
    # (..., dim) -> (rows, dim); NumPy adds rows up one by one, so in float64
    dweight = (dy * normal).reshape(-1, dim).sum(0, dtype=np.float64).astype(saved.weight.dtype)
    dbias = dy.reshape(-1, dim).sum(0, dtype=np.float64)
    dx, dresidual = dr.astype(saved.x_dtype), None
    if saved.residual_dtype is not None:
        dresidual = dx if saved.residual_dtype == saved.x_dtype else dr.astype(saved.residual_dtype)
    return dx, dresidual, dweight, dbias
