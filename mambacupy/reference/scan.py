"""The selective scan in NumPy, forward and backward: the oracle for the kernels, and what runs without a GPU.

    Δ_t = softplus(delta_t + delta_bias)                         step size            (or delta_t + delta_bias)
    Ā_t = exp(Δ_t·A)                                             decay
    b_t = Δ_t·B_t·u_t     or exactly  Δ_t·phi(Δ_t·A)·B_t·u_t     input                phi(a) = (exp(a) - 1)/a
    h_t = Ā_t·h_{t-1} + b_t                                      state
    y_t = (Σ_n C_t·h_t + D·u_t)·silu(z_t)                        output               (complex A: 2·Re Σ_n)

after "Mamba: Linear-Time Sequence Modeling with Selective State Spaces" (Gu & Dao, 2023), equations 1 to 4. float64 input is
computed in float64 throughout and serves as the oracle; everything else in float32.

Glossary of the axes in shape comments
    T    steps of one block of time, at most CHUNK        L  length        N  state
    R    batch entries of one block                       W  channels of one block, all of one group of B and of C
"""

from typing import Any, NamedTuple

import numpy as np

from mambacupy import arrays, checks
from mambacupy.checks import CHUNK
from mambacupy.reference.functions import phi, phi_derivative, sigmoid, softplus

BLOCK_STATES = 4096
"""Numbers that one step of a block updates: enough to outweigh the overhead of a NumPy call."""

CACHED_STATES = 8 * BLOCK_STATES
"""Numbers that a buffer of several steps holds: few enough to stay in cache."""


class _Saved(NamedTuple):
    u: Any
    delta: Any
    A: Any
    B: Any
    C: Any
    D: Any
    z: Any
    delta_bias: Any
    initial_state: Any
    states: Any
    delta_softplus: bool
    reverse: bool
    discretization: str


class SelectiveScanSaved(_Saved):
    """What a scan's backward pass needs: the arguments, by reference, and `states` (batch, ceil(length / 64), dim, state),
    the state before the first step walked in each 64 steps of time.

    `plan` is that of the call on a GPU which gave this. It stands for all that the arrays are: the backward pass need not look
    at them again. It belongs to these very arrays: what else is built, by `_replace` or by `copy`, has none.
    """

    plan = None

    def __reduce__(self):  # what `copy` and `pickle` build may have other arrays
        return SelectiveScanSaved, tuple(self)


class SelectiveScanGrads(NamedTuple):
    """Gradients of a scan, each in its argument's shape, layout and dtype; None where the argument was None. For complex
    numbers, ∂L/∂Re + i·∂L/∂Im."""

    u: Any
    delta: Any
    A: Any
    B: Any
    C: Any
    D: Any
    z: Any
    delta_bias: Any
    initial_state: Any


def selective_scan(u, delta, A, B, C, D=None, z=None, delta_bias=None, *, return_last_state=False, **options):
    """`mambacupy.selective_scan` for NumPy arrays."""
    y, last_state, _ = _forward("selective_scan", u, delta, A, B, C, D, z, delta_bias, save=False, **options)
    return (y, last_state) if return_last_state else y


def selective_scan_fwd(u, delta, A, B, C, D=None, z=None, delta_bias=None, **options):
    """`mambacupy.selective_scan_fwd` for NumPy arrays."""
    return _forward("selective_scan_fwd", u, delta, A, B, C, D, z, delta_bias, save=True, **options)


# ---------------------------------------------------------------------------------------------------- arguments as blocks
class _Scan:
    """A scan's arguments with time turned so that it is walked forwards, cut into blocks that fit into cache."""

    def __init__(self, args, delta_softplus, reverse):
        self.args, self.delta_softplus, self.reverse = args, delta_softplus, reverse
        self.real = arrays.compute_dtype(args.u.dtype)
        self.dtype = args.A.dtype
        self.u, self.delta, self.z = (self.turned(x) for x in (args.u, args.delta, args.z))
        self.B = self._parts(args.B, args.groups_B)
        self.C = self._parts(args.C, args.groups_C)

    def turned(self, x):
        """x with its last axis in the order in which time is walked."""
        return x[..., ::-1] if self.reverse and x is not None else x

    def _parts(self, x, groups):
        """A varying coefficient as its real and imaginary part (None if it has none), both (batch, groups, N, L)."""
        if groups == 0:
            return None
        if not self.args.complex:
            return self.turned(x), None
        if x.dtype.kind == "c":
            return self.turned(x.real), self.turned(x.imag)
        return self.turned(x[..., 0::2]), self.turned(x[..., 1::2])

    def channel_blocks(self):
        """Slices of batch and of channels such that the channels share their groups."""
        args = self.args
        if args.dim == 0:
            return
        span = np.gcd(args.dim // (args.groups_B or 1), args.dim // (args.groups_C or 1))
        width = int(min(span, max(1, BLOCK_STATES // args.state)))
        rows = int(max(1, BLOCK_STATES // (args.state * width)))
        for first in range(0, args.dim, span):
            for c in range(first, first + span, width):
                for b in range(0, args.batch, rows):
                    yield slice(b, min(b + rows, args.batch)), slice(c, min(c + width, first + span))

    def chunks(self):
        """Pairs of a slice of walked time and the chunk of memory's time that it is, in the order in which they are walked."""
        length = self.args.length
        chunks = -(-length // CHUNK)
        for walked in range(chunks):
            chunk = chunks - 1 - walked if self.reverse else walked
            begin, end = chunk * CHUNK, min((chunk + 1) * CHUNK, length)
            if self.reverse:
                begin, end = length - end, length - begin
            yield slice(begin, end), chunk

    def tensor(self, x, rows, channels, time):
        """A block of u, delta or z, time first."""
        return np.ascontiguousarray(x[rows, channels, time].transpose(2, 0, 1), self.real)  # (R, W, T) -> (T, R, W)

    def step(self, rows, channels, time):
        """Δ and the step before softplus, dhat."""
        dhat = self.tensor(self.delta, rows, channels, time)  # (T, R, W)
        if self.args.delta_bias is not None:
            dhat = dhat + self.args.delta_bias[channels]
        return (softplus(dhat) if self.delta_softplus else dhat), dhat

    def coefficient(self, name, rows, channels, time):
        """A block of B or C that broadcasts against (T, R, N, W)."""
        parts, constant = (self.B, self.args.B) if name == "B" else (self.C, self.args.C)
        if parts is None:
            return np.ascontiguousarray(constant[channels]).T  # (W, N) -> (N, W)
        group = channels.start // (self.args.dim // parts[0].shape[1])
        re, im = (None if x is None else x[rows, group, :, time].transpose(2, 0, 1) for x in parts)  # (R, N, T) -> (T, R, N)
        value = np.empty(re.shape, self.dtype)
        value.real = re
        if im is not None:
            value.imag = im
        return value[..., None]  # (T, R, N) -> (T, R, N, 1)

    def decay_and_input(self, dt, x, B, A, out=None):
        """Ā and b, both (T, R, N, W), into the two buffers `out` if given."""
        shape = dt.shape[:2] + A.shape  # (T, R, N, W)
        decay, drive = out if out is not None else (np.empty(shape, self.dtype), np.empty(shape, self.dtype))
        np.multiply(dt[:, :, None], A, out=decay)  # (T, R, W) -> (T, R, 1, W)
        np.multiply((dt * x)[:, :, None], B, out=drive)
        if self.args.zoh:
            drive *= phi(decay)
        np.exp(decay, out=decay)
        return decay, drive

    def read_out(self, h, C):
        """Σ_n C·h of a block of states, or twice its real part."""
        if C.ndim == 2:
            sums = (h * C).sum(2)  # (T, R, N, W) -> (T, R, W)
        else:
            sums = np.matmul(C.swapaxes(2, 3), h)[:, :, 0]  # (T, R, 1, N) @ (T, R, N, W) -> (T, R, W)
        return 2 * sums.real if self.args.complex else sums


def _advance(h, decay, drive, scratch):
    """h_t = Ā_t·h_{t-1} + b_t for every step of a block. `drive` holds b before and h after."""
    for a, b in zip(decay, drive, strict=True):
        np.multiply(a, h, out=scratch)
        b += scratch
        h = b
    return h


# ---------------------------------------------------------------------------------------------------- forward
def _forward(
    operation,
    u,
    delta,
    A,
    B,
    C,
    D,
    z,
    delta_bias,
    *,
    save,
    delta_softplus=False,
    initial_state=None,
    reverse=False,
    discretization="euler",
):
    args = checks.selective_scan(operation, u, delta, A, B, C, D, z, delta_bias, initial_state, discretization)
    scan = _Scan(args, delta_softplus, reverse)
    batch, dim, length, state = args.batch, args.dim, args.length, args.state
    last_state = np.empty((batch, dim, state), A.dtype)
    states = np.empty((batch, -(-length // CHUNK), dim, state), A.dtype) if save else None
    y = _like(u)
    y_walked = scan.turned(y)

    with np.errstate(over="ignore", invalid="ignore"):
        for rows, channels in scan.channel_blocks():
            A_block = np.ascontiguousarray(A[channels]).T  # (W, N) -> (N, W)
            h = np.zeros((rows.stop - rows.start, *A_block.shape), A.dtype)  # (R, N, W)
            if initial_state is not None:
                h[...] = initial_state[rows, channels].swapaxes(1, 2)  # (R, W, N) -> (R, N, W)
            few = max(1, min(CHUNK, CACHED_STATES // h.size))  # steps whose Ā and b stay in cache
            buffers = np.empty((2, few, *h.shape), A.dtype)
            scratch = np.empty_like(h)
            for time, chunk in scan.chunks():
                if save:
                    states[rows, chunk, channels] = h.swapaxes(1, 2)  # (R, N, W) -> (R, W, N)
                x = scan.tensor(scan.u, rows, channels, time)  # (T, R, W)
                dt, _ = scan.step(rows, channels, time)
                B_t = scan.coefficient("B", rows, channels, time)
                C_t = scan.coefficient("C", rows, channels, time)
                out = np.empty_like(x)
                for t in range(0, len(x), few):
                    now = slice(t, min(t + few, len(x)))
                    decay, hs = scan.decay_and_input(
                        dt[now], x[now], B_t[_steps(B_t, now)], A_block, out=buffers[:, : now.stop - t]
                    )
                    h[...] = _advance(h, decay, hs, scratch)
                    out[now] = scan.read_out(hs, C_t[_steps(C_t, now)])
                if D is not None:
                    out += D[channels] * x
                if z is not None:
                    gate = scan.tensor(scan.z, rows, channels, time)
                    out *= gate / (1 + np.exp(-gate))
                y_walked[rows, channels, time] = out.transpose(1, 2, 0)  # (T, R, W) -> (R, W, T)
            last_state[rows, channels] = h.swapaxes(1, 2)  # (R, N, W) -> (R, W, N)

    saved = SelectiveScanSaved(
        u, delta, A, B, C, D, z, delta_bias, initial_state, states, delta_softplus, reverse, discretization
    )
    return y, last_state, saved


def _steps(coefficient, steps):
    """Index of some steps of a block's B or C; one that is constant (N, W) has no steps."""
    return ... if coefficient.ndim == 2 else steps


def _like(u):
    """Fresh memory in u's shape, dtype and memory order."""
    if u.strides[2] != u.itemsize and u.strides[1] == u.itemsize:
        batch, dim, length = u.shape
        return np.empty((batch, length, dim), u.dtype).swapaxes(1, 2)
    return np.empty(u.shape, u.dtype)


# ---------------------------------------------------------------------------------------------------- backward
def selective_scan_bwd(dy, saved, dlast_state=None):
    """`mambacupy.selective_scan_bwd` for NumPy arrays.

    Written along the equations, chunk by chunk from the last one walked to the first, with λ_t = ∂L/∂h_t:

        λ_t = gy_t·C_t + Ā_{t+1}·λ_{t+1},     gy = dy·silu(z)
        dB_t = Σ_channels λ_t·Δ_t·u_t         dC_t = Σ_channels gy_t·h_t
        dA   = Σ_t λ_t·Δ_t·(Ā_t·h_{t-1})      dΔ_t = Σ_n λ_t·(A·Ā_t·h_{t-1} + B_t·u_t)
        du_t = D·gy_t + Δ_t·Σ_n λ_t·B_t       dz_t = dy_t·y_t·σ(z_t)·(1 + z_t·(1 - σ(z_t)))

    Complex A: every factor of λ is conjugated, gy·C counts twice, and what meets a real number keeps its real part.
    """
    checks.selective_scan_bwd("selective_scan_bwd", saved, dy, dlast_state)
    checks.saved_states("selective_scan_bwd", saved)
    u, delta, A, B, C, D, z, delta_bias, initial_state, states, delta_softplus, reverse, discretization = saved
    args = checks.selective_scan("selective_scan_bwd", u, delta, A, B, C, D, z, delta_bias, initial_state, discretization)
    scan = _Scan(args, delta_softplus, reverse)
    real, complex_states = scan.real, args.complex
    twice = 2 if complex_states else 1
    dy_walked = scan.turned(dy)

    du, ddelta, dz = _like(u), _like(u), None if z is None else _like(u)
    du_walked, ddelta_walked, dz_walked = scan.turned(du), scan.turned(ddelta), scan.turned(dz)
    dA = np.zeros(A.shape, A.dtype)
    dD = None if D is None else np.zeros(D.shape, D.dtype)
    dbias = None if delta_bias is None else np.zeros(delta_bias.shape, delta_bias.dtype)
    dinitial = np.empty((args.batch, args.dim, args.state), A.dtype)
    dB, dC = (_zeros_for(scan, x, groups) for x, groups in ((args.B, args.groups_B), (args.C, args.groups_C)))

    with np.errstate(over="ignore", invalid="ignore"):
        for rows, channels in scan.channel_blocks():
            A_block = np.ascontiguousarray(A[channels]).T  # (W, N) -> (N, W)
            # What the steps after this chunk hand to it: Ā_{t+1}·λ_{t+1}, or the gradient of last_state at the end.
            carry = np.zeros((rows.stop - rows.start, *A_block.shape), A.dtype)  # (R, N, W)
            if dlast_state is not None:
                carry[...] = dlast_state[rows, channels].swapaxes(1, 2)  # (R, W, N) -> (R, N, W)
            for time, chunk in reversed(list(scan.chunks())):
                x = scan.tensor(scan.u, rows, channels, time)  # (T, R, W), as all tensors below without a comment
                dt, dhat = scan.step(rows, channels, time)
                B_t = scan.coefficient("B", rows, channels, time)
                C_t = scan.coefficient("C", rows, channels, time)
                before = states[rows, chunk, channels].swapaxes(1, 2)  # (R, W, N) -> (R, N, W)

                decay, h = scan.decay_and_input(dt, x, B_t, A_block)
                _advance(before, decay, h, np.empty_like(carry))
                h_before = np.concatenate((before[None], h[:-1]))  # h_{t-1}, (T, R, N, W)
                decayed = decay * h_before  # Ā_t·h_{t-1}

                gy = scan.tensor(dy_walked, rows, channels, time)
                if z is not None:
                    gate = scan.tensor(scan.z, rows, channels, time)
                    s = sigmoid(gate)
                    out = scan.read_out(h, C_t)
                    if D is not None:
                        out = out + D[channels] * x
                    dz_walked[rows, channels, time] = (gy * out * s * (1 + gate * (1 - s))).transpose(1, 2, 0)
                    gy = gy * gate * s

                lam = twice * gy[:, :, None] * C_t.conj()  # λ, (T, R, N, W)
                for t in reversed(range(len(lam))):
                    lam[t] += carry
                    carry = decay[t].conj() * lam[t]

                if args.zoh:  # b = c·B·u with c = Δ·phi(ΔA), ∂c/∂Δ = Ā, ∂c/∂A = Δ²·phi'(ΔA)
                    a = dt[:, :, None] * A_block
                    factor = dt[:, :, None] * phi(a)
                    by_A = dt[:, :, None] * decayed + dt[:, :, None] ** 2 * phi_derivative(a) * B_t * x[:, :, None]
                    by_dt = A_block * decayed + decay * B_t * x[:, :, None]
                else:
                    factor = dt[:, :, None]
                    by_A = dt[:, :, None] * decayed
                    by_dt = A_block * decayed + B_t * x[:, :, None]

                dx = (lam * (factor * B_t).conj()).sum(2).real  # (T, R, N, W) -> (T, R, W)
                if D is not None:
                    dx = dx + D[channels] * gy
                    dD[channels] += (gy * x).sum((0, 1))
                d_step = (lam * by_dt.conj()).sum(2).real  # (T, R, N, W) -> (T, R, W)
                if delta_softplus:
                    d_step = d_step * np.where(dhat > 20, real.type(1), sigmoid(dhat))
                if delta_bias is not None:
                    dbias[channels] += d_step.sum((0, 1))
                du_walked[rows, channels, time] = dx.transpose(1, 2, 0)  # (T, R, W) -> (R, W, T)
                ddelta_walked[rows, channels, time] = d_step.transpose(1, 2, 0)

                dA[channels] += (lam * by_A.conj()).sum((0, 1)).T  # (N, W) -> (W, N)
                _accumulate(scan, dB, args.groups_B, rows, channels, time, lam * factor.conj() * x[:, :, None])
                _accumulate(scan, dC, args.groups_C, rows, channels, time, twice * gy[:, :, None] * h.conj())
            dinitial[rows, channels] = carry.swapaxes(1, 2)  # (R, N, W) -> (R, W, N)

        dB, dC = (_in_layout(scan, d, x, g) for d, x, g in ((dB, B, args.groups_B), (dC, C, args.groups_C)))
    return SelectiveScanGrads(du, ddelta, dA, dB, dC, dD, dz, dbias, None if initial_state is None else dinitial)


def _zeros_for(scan, x, groups):
    """Sums for dB or dC: (dim, state) if constant, (batch, groups, N, L) in walked time otherwise."""
    if groups == 0:
        return np.zeros(x.shape, scan.dtype)
    return np.zeros((scan.args.batch, groups, scan.args.state, scan.args.length), scan.dtype)


def _accumulate(scan, total, groups, rows, channels, time, terms):
    """Add a block's terms (T, R, N, W) to dB or dC."""
    if groups == 0:
        total[channels] += terms.sum((0, 1)).T  # (N, W) -> (W, N)
    else:
        group = channels.start // (scan.args.dim // groups)
        total[rows, group, :, time] += terms.sum(3).transpose(1, 2, 0)  # (T, R, N) -> (R, N, T)


def _in_layout(scan, total, x, groups):
    """dB or dC in the shape, layout and dtype of the argument x."""
    if groups == 0:
        return total
    total = scan.turned(total)
    if scan.args.complex and x.dtype.kind != "c":
        total = np.stack((total.real, total.imag), -1)  # (batch, groups, N, L, 2): the pairs of the interleaved layout
    return np.ascontiguousarray(total.reshape(x.shape), x.dtype)
