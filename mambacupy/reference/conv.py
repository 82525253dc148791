"""The causal depthwise convolution in NumPy, forward and backward, and its one-step update.

With e, the initial state followed by x, in the order in which time is walked (W the width of the filter):

    p_t = bias + Σ_j w_j·e_{t+j},      y = silu(p) or p,      final state = the last W-1 of e

    dp = dy·σ(p)·(1 + p·(1 - σ(p)))    or dy
    de_i = Σ_j w_j·dp_{i-j},  the gradient of the final state on top of its last W-1
    dw_j = Σ_t dp_t·e_{t+j},  dbias = Σ_t dp_t

float64 input is computed in float64 throughout and serves as the oracle; everything else in float32. One batch entry at a
time, so that memory beyond the results stays small.
"""

from typing import Any, NamedTuple

import numpy as np

from mambacupy import arrays, checks_conv
from mambacupy.reference.functions import sigmoid


class CausalConv1dSaved(NamedTuple):
    """What the backward pass of a causal convolution needs: its arguments, by reference."""

    x: Any
    weight: Any
    bias: Any
    initial_state: Any
    activation: Any
    reverse: bool


class CausalConv1dGrads(NamedTuple):
    """Gradients of a causal convolution, each in its argument's shape and dtype; None where the argument was None."""

    x: Any
    weight: Any
    bias: Any
    initial_state: Any


def causal_conv1d(
    x, weight, bias=None, *, activation=None, initial_state=None, reverse=False, return_final_state=False
):  # fmt: skip
    """`mambacupy.ops.causal_conv1d.causal_conv1d` for NumPy arrays."""
    y, final_state, _ = _forward("causal_conv1d", x, weight, bias, activation, initial_state, reverse)
    return (y, final_state) if return_final_state else y


def causal_conv1d_fwd(x, weight, bias=None, *, activation=None, initial_state=None, reverse=False):
    """`mambacupy.ops.causal_conv1d.causal_conv1d_fwd` for NumPy arrays."""
    return _forward("causal_conv1d_fwd", x, weight, bias, activation, initial_state, reverse)


def _forward(operation, x, weight, bias, activation, initial_state, reverse):
    args = checks_conv.causal_conv1d(operation, x, weight, bias, activation, initial_state, reverse)
    y, final_state = _like(x), np.empty((args.batch, args.dim, args.width - 1), x.dtype)
    y_walked = _turned(args, y)
    w, b = _filter(args.weight, args.bias, arrays.compute_dtype(x.dtype))
    with np.errstate(over="ignore", invalid="ignore"):
        for i in range(args.batch):
            e = _extended(args, i)
            p = _filtered(e, w, b)
            y_walked[i] = p / (1 + np.exp(-p)) if args.silu else p
            final_state[i] = e[:, args.length :]
    return y, final_state, CausalConv1dSaved(x, weight, bias, initial_state, activation, reverse)


def causal_conv1d_bwd(dy, saved, dfinal_state=None):
    """`mambacupy.ops.causal_conv1d.causal_conv1d_bwd` for NumPy arrays."""
    args = checks_conv.causal_conv1d_bwd("causal_conv1d_bwd", saved, dy, dfinal_state)
    real, length, before = arrays.compute_dtype(args.x.dtype), args.length, args.width - 1
    w, b = _filter(args.weight, args.bias, real)
    dx, dinitial = _like(args.x), np.empty((args.batch, args.dim, before), args.x.dtype)
    dx_walked, dy_walked = _turned(args, dx), _turned(args, dy)
    dw, db = np.zeros((args.dim, args.width), real), np.zeros(args.dim, real)
    with np.errstate(over="ignore", invalid="ignore"):
        for i in range(args.batch):
            e, dp = _extended(args, i), dy_walked[i].astype(real)  # (dim, W-1 + length), (dim, length)
            if args.silu:
                p = _filtered(e, w, b)
                s = sigmoid(p)
                dp *= s * (1 + p * (1 - s))
            de = np.zeros_like(e)
            for j in range(args.width):
                de[:, j : j + length] += w[:, j : j + 1] * dp
                dw[:, j] += (dp * e[:, j : j + length]).sum(1)
            db += dp.sum(1)
            if dfinal_state is not None:
                de[:, length:] += dfinal_state[i]
            dinitial[i], dx_walked[i] = de[:, :before], de[:, before:]
    return CausalConv1dGrads(
        dx,
        dw.astype(args.weight.dtype),
        None if args.bias is None else db.astype(args.bias.dtype),
        None if args.initial_state is None else dinitial,
    )


def causal_conv1d_update(state, x, weight, bias=None, *, activation=None):
    """`mambacupy.ops.causal_conv1d.causal_conv1d_update` for NumPy arrays."""
    checks_conv.causal_conv1d_update("causal_conv1d_update", state, x, weight, bias, activation)
    real = arrays.compute_dtype(x.dtype)
    e = np.concatenate((state, x[:, :, None]), 2).astype(real, copy=False)  # (batch, dim, W)
    with np.errstate(over="ignore", invalid="ignore"):
        p = _filtered(e, *_filter(weight, bias, real))[:, :, 0]  # (batch, dim, 1) -> (batch, dim)
        y = (p / (1 + np.exp(-p)) if activation == "silu" else p).astype(x.dtype)
    state[...] = e[:, :, 1:]
    return y


# ---------------------------------------------------------------------------------------------------- parts of the above
def _turned(args, x):
    """x with its last axis in the order in which time is walked."""
    return x[..., ::-1] if args.reverse else x


def _filter(weight, bias, real):
    """weight (dim, W), and bias (dim, 1), in the dtype of arithmetic."""
    return weight.astype(real), None if bias is None else bias.astype(real)[:, None]  # (dim,) -> (dim, 1)


def _extended(args, i):
    """e of batch entry i: (dim, W-1 + length)."""
    before = args.width - 1
    e = np.empty((args.dim, before + args.length), arrays.compute_dtype(args.x.dtype))
    e[:, :before] = 0 if args.initial_state is None else args.initial_state[i]
    e[:, before:] = _turned(args, args.x)[i]
    return e


def _filtered(e, weight, bias):
    """p (..., dim, length) of e (..., dim, W-1 + length). The order of the sum is the same for every length."""
    width = weight.shape[1]
    length = e.shape[-1] - (width - 1)
    p = np.zeros((*e.shape[:-1], length), e.dtype)
    if bias is not None:
        p += bias
    for j in range(width):
        p += weight[:, j : j + 1] * e[..., j : j + length]
    return p


def _like(x):
    """Fresh memory in x's shape, dtype and memory order."""
    if x.strides[2] != x.itemsize and x.strides[1] == x.itemsize:
        batch, dim, length = x.shape
        return np.empty((batch, length, dim), x.dtype).swapaxes(1, 2)  # (batch, length, dim) -> (batch, dim, length)
    return np.empty(x.shape, x.dtype)
