"""The selective scan: public calls, and how they become one kernel.

    h_t = exp(Δ_t·A)·h_{t-1} + Δ_t·B_t·u_t,    y_t = (Σ_n C_t·h_t + D·u_t)·silu(z_t)

after "Mamba: Linear-Time Sequence Modeling with Selective State Spaces" (Gu & Dao, 2023), algorithm 2. NumPy arrays run
`mambacupy.reference`; CuPy arrays run `cuda_src/selective_scan_fwd.cu`, launched at the end of this file.
"""

import math

from mambacupy import arrays, checks, kernels, reference
from mambacupy.reference import CHUNK, SelectiveScanGrads, SelectiveScanSaved

__all__ = [
    "SelectiveScanGrads",
    "SelectiveScanSaved",
    "selective_scan",
    "selective_scan_fwd",
]


def selective_scan(
    u,
    delta,
    A,
    B,
    C,
    D=None,
    z=None,
    delta_bias=None,
    *,
    delta_softplus=False,
    initial_state=None,
    reverse=False,
    discretization="euler",
    return_last_state=False,
):
    """Scan a batch of sequences through Mamba's selective state space model.

    Parameters
    ----------
    u : array (batch, dim, length)
        Input. float16, bfloat16, float32 or float64. Length-contiguous and channel-contiguous memory (a
        `(batch, length, dim)` array seen through `.transpose(0, 2, 1)`) are both native; other views are copied.
    delta : array (batch, dim, length)
        Step sizes before bias and softplus, in the unit of time that 1/A has. u's dtype.
    A : array (dim, state)
        Diagonal of the state matrix. float32 or complex64; float64 or complex128 with float64 `u`.
    B, C : array
        Constant `(dim, state)` in A's dtype, or varying `(batch, state, length)` or `(batch, groups, state, length)` in any
        of u's dtypes. Channel d reads group `d // (dim // groups)`. With complex A varying B and C are complex, or real of
        length `2 * length` holding re, im, re, im, ….
    D : array (dim,), optional
        Weight of the skip connection.
    z : array (batch, dim, length), optional
        Gate: the output is multiplied by silu(z). u's dtype.
    delta_bias : array (dim,), optional
        Added to delta.
    delta_softplus : bool
        Whether softplus is applied to delta + delta_bias.
    initial_state : array (batch, dim, state), optional
        State before the first step, in A's dtype. Zero where None.
    reverse : bool
        Let time run from the last step to the first.
    discretization : {"euler", "zoh"}
        Input term Δ·B·u, as Mamba's own kernels have it, or the exact zero-order hold (exp(ΔA) - 1)/A·B·u.
    return_last_state : bool
        Also return the state after the final step.

    Returns
    -------
    y : array (batch, dim, length)
        In u's dtype and memory order.
    last_state : array (batch, dim, state)
        Only with `return_last_state`. In A's dtype.

    Raises
    ------
    TypeError
        An argument is no NumPy or CuPy array, has a dtype that is not supported, or lives elsewhere than u.
    ValueError
        A shape does not fit, or there is no such discretization.

    Notes
    -----
    CuPy arrays are scanned on their device and the current stream, without synchronising. Arithmetic and states are float32
    at least. Results are bit-identical from run to run.
    """
    y, last_state, _ = _scan(
        "selective_scan", u, delta, A, B, C, D, z, delta_bias, initial_state,
        delta_softplus, reverse, discretization, save=False,
    )  # fmt: skip
    return (y, last_state) if return_last_state else y


def selective_scan_fwd(
    u,
    delta,
    A,
    B,
    C,
    D=None,
    z=None,
    delta_bias=None,
    *,
    delta_softplus=False,
    initial_state=None,
    reverse=False,
    discretization="euler",
):
    """Scan, and keep what the gradient needs: `selective_scan` for training.

    Parameters are those of `selective_scan`.

    Returns
    -------
    y, last_state : array
        As `selective_scan` gives them.
    saved : SelectiveScanSaved
        The arguments, by reference, and the states at every 64th step: `4 * state / 64` bytes an element of u.
    """
    return _scan(
        "selective_scan_fwd", u, delta, A, B, C, D, z, delta_bias, initial_state,
        delta_softplus, reverse, discretization, save=True,
    )  # fmt: skip


def _scan(
    operation,
    u,
    delta,
    A,
    B,
    C,
    D,
    z,
    delta_bias,
    initial_state,
    delta_softplus,
    reverse,
    discretization,
    save,
):
    args = checks.selective_scan(operation, u, delta, A, B, C, D, z, delta_bias, initial_state, discretization)
    if args.xp.__name__ == "numpy":
        options = {"delta_softplus": delta_softplus, "initial_state": initial_state, "reverse": reverse}
        options["discretization"] = discretization
        if save:
            return reference.selective_scan_fwd(u, delta, A, B, C, D, z, delta_bias, **options)
        y, last_state = reference.selective_scan(u, delta, A, B, C, D, z, delta_bias, return_last_state=True, **options)
        return y, last_state, None
    with args.u.device:
        y, last_state, states = _launch(args, delta_softplus, reverse, save)
    saved = SelectiveScanSaved(
        u, delta, A, B, C, D, z, delta_bias, initial_state, states, delta_softplus, reverse, discretization
    )
    return y, last_state, saved


# ---------------------------------------------------------------------------------------------------- the kernel's launch
ENOUGH_WARPS = 1024
"""Two warps for each scheduler of a large GPU: below this, a channel's states are spread over more lanes."""


def _mapping(channels, state, compute_bytes, complex_states):
    """How a channel's states are spread over lanes, and how much of the sequence a block holds at a time.

    Eight states a lane (four complex ones) are enough independent work to hide the latencies of one step, and leave little to
    add up across lanes. Where there are few channels, more lanes with fewer states each keep the GPU busier.
    """
    state_bytes = compute_bytes * (2 if complex_states else 1)
    slots = min(4 if complex_states else 8, _power_of_two(state))
    lanes = _power_of_two(-(-state // slots))
    while slots > 1 and lanes < 32 and channels * lanes < 32 * ENOUGH_WARPS:
        slots, lanes = slots // 2, lanes * 2
    slots = max(slots, _power_of_two(-(-state // 32)))
    lanes = min(lanes, 32)
    threads = 128
    block_channels = threads // lanes
    # Three limits keep shared memory under 48 KiB: the elements of a tile, the values of B and C in it, and 32 steps.
    tile = min(32, 4096 // compute_bytes // block_channels, 8192 // (lanes * slots * state_bytes))
    return {
        "LANES": lanes,
        "SLOTS": slots,
        "CHANNELS": 1,
        "TILE": tile,
        "THREADS": threads,
        "BLOCKS_PER_SM": 3,
    }


def _power_of_two(n):
    """The smallest power of two that is at least n."""
    return 1 << (n - 1).bit_length()


def _slice_of_states(compute_bytes, complex_states):
    """States that one launch covers; more are scanned slice by slice, each adding its part of the output."""
    return 1024 // (compute_bytes * (2 if complex_states else 1))


def _is_native(x, axis):
    """Whether neighbours along `axis` are neighbours in memory and no stride splits an element."""
    size = x.itemsize
    return (x.strides[axis] == size or x.shape[axis] == 1) and not any(s % size for s in x.strides)


def _in_order(x, axis, xp):
    """x itself where `axis` is contiguous, or a copy of it in which it is."""
    if x is None or _is_native(x, axis):
        return x
    return xp.ascontiguousarray(x) if axis == 2 else xp.ascontiguousarray(x.swapaxes(1, 2)).swapaxes(1, 2)


def _widest_access(tile, axis, tensors):
    """Elements moved by one instruction: 16 bytes where all tensors are aligned for it, and the largest that fits else."""
    size = tensors[0].itemsize
    vector = min(16 // size, tile)
    bits = 0
    for x in tensors:
        bits |= kernels.address(x) | x.strides[0] | x.strides[3 - axis]
    while vector > 1 and bits % (vector * size):
        vector //= 2
    return vector


def _coefficient(name, x, groups, complex_states):
    """Constants and parameters by which the kernel finds B or C.

    Complex values are pairs of reals, either side by side (complex arrays) or `imag` apart (the interleaved real layout).
    """
    strides = [s // x.itemsize for s in x.strides]
    if groups == 0:
        strides = {"batch": 0, "group": strides[0], "state": strides[1], "time": 0, "imag": 0}
    else:
        imag = 0
        if complex_states and x.dtype.kind == "c":
            *strides, imag = *(2 * s for s in strides), 1
        elif complex_states:
            imag = strides[3]
            strides[3] *= 2
        strides = dict(zip(("batch", "group", "state", "time", "imag"), (*strides, imag), strict=True))
    element = arrays.real_of(x.dtype).name
    time_fast = int(abs(strides["time"]) <= abs(strides["state"]))
    constants = {
        f"{name}_T": kernels.C_TYPES[element],
        f"{name}_VARIES": int(groups > 0),
        f"{name}_TIME_FAST": time_fast,
    }
    params = {f"{name}_{key}": value for key, value in strides.items()} | {f"groups_of_{name}": groups or 1}
    return constants, params


def _launch(args, delta_softplus, reverse, save):
    xp, batch, dim, length, state = args.xp, args.batch, args.dim, args.length, args.state
    A, D, delta_bias, initial_state = args.A, args.D, args.delta_bias, args.initial_state
    real = arrays.compute_dtype(args.u.dtype)
    last_state = xp.empty((batch, dim, state), A.dtype)
    axis = 1 if args.u.strides[2] != args.u.itemsize and _is_native(args.u, 1) else 2
    u, delta, z = (_in_order(x, axis, xp) for x in (args.u, args.delta, args.z))
    y = xp.empty((batch, dim, length), u.dtype) if axis == 2 else xp.empty((batch, length, dim), u.dtype).swapaxes(1, 2)
    chunks = -(-length // CHUNK)
    states = xp.empty((batch, chunks, dim, state), A.dtype) if save else None
    if length == 0 or batch == 0 or dim == 0:
        last_state[...] = 0 if initial_state is None else initial_state
        return y, last_state, states

    slice_of_states = _slice_of_states(real.itemsize, args.complex)
    mapping = _mapping(batch * dim, min(state, slice_of_states), real.itemsize, args.complex)
    B_constants, B_params = _coefficient("B", args.B, args.groups_B, args.complex)
    C_constants, C_params = _coefficient("C", args.C, args.groups_C, args.complex)
    tensors = [x for x in (u, delta, z, y) if x is not None]
    constants = {
        "U_T": kernels.C_TYPES[u.dtype.name],
        **B_constants,
        **C_constants,
        "COMPLEX": int(args.complex),
        "ZOH": int(args.zoh),
        "REVERSE": int(reverse),
        "TIME_CONTIGUOUS": int(axis == 2),
        "VECTOR": _widest_access(mapping["TILE"], axis, tensors),
        **mapping,
    }
    kernel = kernels.get("selective_scan_fwd.cu", "selective_scan_fwd", constants)

    # A block's channels share one group of B and one of C: spans are the channels between two group borders of either.
    span = math.gcd(dim // (args.groups_B or 1), dim // (args.groups_C or 1))
    blocks_per_span = -(-span // (mapping["THREADS"] // mapping["LANES"] * mapping["CHANNELS"]))
    blocks_per_batch = dim // span * blocks_per_span
    params = {
        "u": u, "delta": delta, "z": z, "y": y, "D": D, "delta_bias": delta_bias,
        "dim": dim, "length": length, "state_total": state, "span": span,
        "blocks_per_span": blocks_per_span, "blocks_per_batch": blocks_per_batch,
        **B_params, **C_params,
        "delta_softplus": int(delta_softplus),
    }  # fmt: skip
    for name, x in (("u", u), ("delta", delta), ("z", z), ("y", y)):
        params[f"{name}_batch"], params[f"{name}_row"] = _strides(x, 0, 3 - axis)
    params["A_dim"], params["A_state"] = _strides(A, 0, 1)
    (params["D_dim"],) = _strides(D, 0)
    (params["bias_dim"],) = _strides(delta_bias, 0)
    params["init_batch"], params["init_dim"], params["init_state"] = _strides(initial_state, 0, 1, 2)

    if state <= slice_of_states:
        params |= {"A": A, "B": args.B, "C": args.C, "initial_state": initial_state, "last_state": last_state}
        params |= {"states": states, "state": state, "parts_in": None, "parts_out": None}
        kernel(batch * blocks_per_batch, mapping["THREADS"], params)
        return y, last_state, states

    # Every slice of the states but the last leaves its part of Σ_n C·h in `parts`, in y's memory order.
    parts = xp.empty((batch, dim, length) if axis == 2 else (batch, length, dim), real)
    for first in range(0, state, slice_of_states):
        here = slice(first, min(first + slice_of_states, state))
        params |= {
            "A": A[:, here],
            "B": args.B[:, here] if args.groups_B == 0 else args.B[:, :, here],
            "C": args.C[:, here] if args.groups_C == 0 else args.C[:, :, here],
            "initial_state": None if initial_state is None else initial_state[:, :, here],
            "last_state": last_state[:, :, here],
            "states": None if states is None else states[..., here],
            "state": here.stop - here.start,
            "parts_in": None if first == 0 else parts,
            "parts_out": None if here.stop == state else parts,
        }
        kernel(batch * blocks_per_batch, mapping["THREADS"], params)
    return y, last_state, states


def _strides(x, *axes):
    """Strides along the axes, in elements; zeros for None."""
    return tuple(0 if x is None else x.strides[axis] // x.itemsize for axis in axes)
