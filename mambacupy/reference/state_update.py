"""One step of the selective scan in NumPy, in place: the expressions are those of `mambacupy.reference.scan`, so that a scan
and its steps one by one agree to the rounding of one sum."""

import numpy as np

from mambacupy import arrays, checks_conv
from mambacupy.reference.functions import softplus


def selective_state_update(state, x, dt, A, B, C, D=None, z=None, dt_bias=None, *, dt_softplus=False):
    """`mambacupy.ops.selective_state_update.selective_state_update` for NumPy arrays."""
    args = checks_conv.selective_state_update("selective_state_update", state, x, dt, A, B, C, D, z, dt_bias)
    real, span = arrays.compute_dtype(x.dtype), args.dim // args.B.shape[1]
    with np.errstate(over="ignore", invalid="ignore"):
        step, u = dt.astype(real), x.astype(real)  # (batch, dim)
        if dt_bias is not None:
            step = step + dt_bias
        if dt_softplus:
            step = softplus(step)
        drive = (step * u)[:, :, None] * np.repeat(args.B, span, 1).astype(A.dtype)  # (batch, groups, N) -> (batch, dim, N)
        h = np.exp(step[:, :, None] * A) * state + drive
        y = (h * np.repeat(args.C, args.dim // args.C.shape[1], 1).astype(A.dtype)).sum(2)  # (batch, dim, N) -> (batch, dim)
        if args.complex:
            y = 2 * y.real
        if D is not None:
            y = y + D * u
        if z is not None:
            gate = z.astype(real)
            y = y * (gate / (1 + np.exp(-gate)))
        state[...] = h
        return y.astype(x.dtype)
