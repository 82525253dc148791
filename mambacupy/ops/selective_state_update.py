"""One step of the selective scan, in place: what decoding token by token runs.

    h = exp(Δ·A)·h + Δ·B·x,    y = (Σ_n C·h + D·x)·silu(z)

after "Mamba: Linear-Time Sequence Modeling with Selective State Spaces" (Gu & Dao, 2023), algorithm 2. NumPy arrays run
`mambacupy.reference.state_update`; CuPy arrays run cuda_src/selective_state_update.cu.
"""

from typing import Any, NamedTuple

from mambacupy import arrays, checks_conv, kernels
from mambacupy.ops import plans
from mambacupy.ops.conv_kernels import THREADS
from mambacupy.ops.mapping import power_of_two
from mambacupy.reference import state_update as reference

__all__ = ["selective_state_update"]

ENTRIES, MANY = 4, 8
"""Batch entries of which a thread has the same channel, and how many there have to be for that: fewer leave the GPU idle."""


def selective_state_update(state, x, dt, A, B, C, D=None, z=None, dt_bias=None, *, dt_softplus=False):
    """Take one step of `mambacupy.selective_scan` (Euler's form), and update the state in place.

    Parameters
    ----------
    state : array (batch, dim, dstate)
        State before the step, in A's dtype: an initial or last state of the scan. Overwritten; any strides.
    x : array (batch, dim)
        Input. float16, bfloat16, float32 or float64.
    dt : array (batch, dim)
        Step sizes before bias and softplus, in x's dtype.
    A : array (dim, dstate)
        Diagonal of the state matrix. float32 or complex64; float64 or complex128 with float64 `x`.
    B, C : array (batch, dstate) or (batch, groups, dstate)
        In any of x's dtypes; with a complex A, in A's. Channel d reads group `d // (dim // groups)`. A constant coefficient
        (dim, dstate) of the scan is one of dim groups: `xp.broadcast_to(B, (batch, dim, dstate))`.
    D, dt_bias : array (dim,), optional
        Weight of the skip connection, and what is added to dt. float32; float64 with float64 `x`.
    z : array (batch, dim), optional
        Gate: the output is multiplied by silu(z). x's dtype.
    dt_softplus : bool
        Whether softplus, the scan's, is applied to dt + dt_bias.

    Returns
    -------
    y : array (batch, dim)
        In x's dtype, C-contiguous.

    Raises
    ------
    TypeError
        An argument is no NumPy or CuPy array, has a dtype that is not supported, or lives elsewhere than x.
    ValueError
        A shape does not fit; or state is read-only, or a broadcast view.

    Notes
    -----
    CuPy arrays are updated on their device and the current stream, without synchronising. A scan and its steps one by one agree
    to the rounding of the sum over states; results are bit-identical from run to run.
    """
    tensors = (state, x, dt, A, B, C, D, z, dt_bias)
    plan = plans.planned(_checked_plan, (tensors, bool(dt_softplus)), tensors, (bool(dt_softplus),))
    if plan is None:
        return reference.selective_state_update(state, x, dt, A, B, C, D, z, dt_bias, dt_softplus=dt_softplus)
    with kernels.device_of(x):
        return _on_gpu(plan, tensors)


_ARRAYS = ("state", "x", "dt", "A", "B", "C", "D", "z", "dt_bias")


_ORDER = {name: i for i, name in enumerate((*_ARRAYS, "y"))}


class _Plan(NamedTuple):
    """All of a step but its arrays."""

    xp: Any
    split: tuple  # places of arrays that have to be copied because their elements lie across boundaries
    launch: Any  # None where there is nothing to do


def _on_gpu(plan, tensors):
    state, x, *_ = tensors
    y = plan.xp.ndarray(x.shape, x.dtype)
    if plan.split:
        tensors = [x.copy() if place in plan.split else x for place, x in enumerate(tensors)]
    if plan.launch is not None:
        plan.launch(kernels.addresses((*tensors, y)))
    if tensors[0] is not state:
        state[...] = tensors[0]
    return y


def _checked_plan(tensors, dt_softplus):
    """Check the arguments. The plan of a step on a GPU, None for one on the host."""
    args = checks_conv.selective_state_update("selective_state_update", *tensors)
    if args.xp.__name__ == "numpy":
        return None
    with kernels.device_of(args.x):
        return _plan(args, dt_softplus)


def _plan(args, dt_softplus):
    if args.x.size == 0:
        return _Plan(args.xp, (), None)
    copies = {name: x.copy() for name in _ARRAYS if (x := getattr(args, name)) is not None and not plans.is_whole(x)}
    return _Plan(args.xp, tuple(map(_ARRAYS.index, copies)), _launch(args._replace(**copies), dt_softplus))


def _launch(args, dt_softplus):
    reals = 2 if args.complex else 1
    with_states = {"state": args.state, "A": args.A, "B": args.B, "C": args.C}
    vector = 16 // args.A.itemsize
    while vector > 1 and not (args.dstate % vector == 0 and all(_fits(x, vector) for x in with_states.values())):
        vector //= 2
    lanes = min(32, power_of_two(-(-args.dstate // vector)))
    entries = min(ENTRIES, lanes) if args.batch >= MANY else 1
    constants = {
        "U_T": kernels.C_TYPES[args.x.dtype.name],
        "B_T": kernels.C_TYPES[arrays.real_of(args.B.dtype).name],
        "C_T": kernels.C_TYPES[arrays.real_of(args.C.dtype).name],
        "COMPLEX": int(args.complex),
        "LANES": lanes,
        "ENTRIES": entries,
        "VECTOR": vector,
    }
    numbers = {
        "batch": args.batch,
        "dim": args.dim,
        "dstate": args.dstate,
        "span_of_B": args.dim // args.B.shape[1],
        "span_of_C": args.dim // args.C.shape[1],
        "dt_softplus": int(dt_softplus),
        **plans.strides(args.x, x_batch=0, x_dim=1),
        **plans.strides(args.dt, dt_batch=0, dt_dim=1),
        **plans.strides(args.z, z_batch=0, z_dim=1),
        **plans.strides(args.D, D_dim=0),
        **plans.strides(args.dt_bias, bias_dim=0),
    }
    of_states = {
        **plans.strides(args.state, state_batch=0, state_dim=1, state_n=2),
        **plans.strides(args.A, A_dim=0, A_n=1),
        **plans.strides(args.B, B_batch=0, B_group=1, B_n=2),
        **plans.strides(args.C, C_batch=0, C_group=1, C_n=2),
    }
    numbers |= {name: stride * reals for name, stride in of_states.items()}
    threads = -(-args.batch // entries) * args.dim * lanes
    kernel = kernels.get("selective_state_update.cu", "selective_state_update", constants)
    return kernel.prepare(-(-threads // THREADS), THREADS, numbers, order=_ORDER)


def _fits(x, vector):
    """Whether `vector` neighbours along the last axis can be moved at once."""
    outer = kernels.address(x)
    for stride in x.strides[:-1]:
        outer |= stride
    return x.strides[-1] == x.itemsize and outer % (vector * x.itemsize) == 0
