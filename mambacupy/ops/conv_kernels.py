"""The causal convolution on a GPU: from checked CuPy arrays to launches of the kernels in cuda_src/causal_conv1d*.cu."""

from typing import Any, NamedTuple

from mambacupy import arrays, kernels
from mambacupy.ops import plans
from mambacupy.ops.mapping import power_of_two
from mambacupy.reference.conv import CausalConv1dGrads

THREADS = 128
"""Threads of a block of wide filters, and of one step."""

THREADS_OF = {("forward", 1): 64, ("forward", 2): 128, ("backward", 1): 128, ("backward", 2): 64}
"""Threads of a block by direction and contiguous axis: what measured best over shapes."""

WIDEST = 8
"""The widest filter that is kept in registers. Wider ones run plain loops over memory."""

CHUNKS, WARPS = 4, 24
"""Where steps are contiguous: packs that a thread walks; backward, where each part reads more of its neighbours, all that there
are beyond so many warps on each multiprocessor."""

EARLY = 2
"""Chunks of time before their loads, backward, lines are asked into L2, where blocks take turns on the multiprocessors. Where
all run at once it is slower."""

LEAST_STEPS, MOST_STEPS, BLOCKS = 16, 256, 4
"""Where channels are contiguous: steps of a part, forward always the least. Backward, where a part walks width - 1 steps more,
the most, and blocks on each multiprocessor at a time, for the common filters."""

KEPT_BYTES = 64
"""Size of the filters of a thread's channels where channels are contiguous. As much again goes into each window; more would
leave registers for too few warps to hide the latency of memory."""


def _planned(make, args, *incoming):
    """The plan `make(args, *incoming)`; `incoming` are arrays or None."""
    tensors = (args.x, args.weight, args.bias, args.initial_state, *incoming)
    return plans.planned(make, (args, *incoming), tensors, (args.silu, args.reverse))


def _axis(x):
    """The axis of x that is contiguous in memory, 1 or 2; a single step is as channel-contiguous as it is anything."""
    return 1 if (x.strides[2] != x.itemsize or x.shape[2] == 1) and plans.is_native(x, 1) else 2


def _weight_vector(args, vector):
    """Entries of weight read at once where a thread has `vector` channels."""
    x = args.weight
    if x.strides != (args.width * x.itemsize, x.itemsize):
        return 1
    count = 16 // x.itemsize
    while count > 1 and (vector * args.width % count or kernels.address(x) % (count * x.itemsize)):
        count //= 2
    return count


def _steps(length, blocks, at_a_time):
    """Steps of a part, of which there are so many that the GPU is filled a whole number of times, or just not; `blocks` of a
    part, and of those that run at a time."""
    turns = -(-blocks * -(-length // MOST_STEPS) // at_a_time)
    splits = max(1, turns * at_a_time // blocks)
    return min(MOST_STEPS, max(LEAST_STEPS, -(-length // splits // 8) * 8))


def _layout(args, axis, direction, tensors):
    """Constants, numbers and blocks of a launch: which steps and channels a thread has."""
    vector = plans.widest_access(axis, tensors)
    of_block, multiprocessors, early = THREADS_OF[direction, axis], kernels.device().multiprocessors, 0
    if axis == 2:
        lanes = min(32, power_of_two(-(-args.length // vector)))
        splits = -(-args.length // (CHUNKS * lanes * vector))
        if direction == "backward":
            wanted, threads = 32 * WARPS * multiprocessors, args.batch * args.dim * lanes
            early = EARLY if threads > wanted and splits > 1 else 0
            splits = max(1, min(wanted // threads, splits))
        steps = -(-args.length // (splits * lanes * vector)) * lanes * vector
        threads, weight_vector = args.batch * args.dim * lanes, 1
    else:
        real_bytes = arrays.compute_dtype(args.x.dtype).itemsize
        while vector > 1 and vector * args.width * real_bytes > KEPT_BYTES:
            vector //= 2
        lanes, threads = 1, args.batch * (args.dim // vector)
        steps = LEAST_STEPS
        if direction == "backward":
            steps = _steps(args.length, -(-threads // of_block), BLOCKS * multiprocessors)
        weight_vector = _weight_vector(args, vector)
    splits = -(-args.length // steps)
    constants = {
        "X_T": kernels.C_TYPES[args.x.dtype.name],
        "W_T": kernels.C_TYPES[args.weight.dtype.name],
        "WIDTH": args.width,
        "THREADS": of_block,
        "SILU": int(args.silu),
        "REVERSE": int(args.reverse),
        "TIME_CONTIGUOUS": int(axis == 2),
        "VECTOR": vector,
        "LANES": lanes,
        "WEIGHT_VECTOR": weight_vector,
    }
    if direction == "backward":
        constants["EARLY"] = early
    numbers = {"batch": args.batch, "dim": args.dim, "length": args.length, "steps": steps, "splits": splits}
    return constants, numbers, -(-threads * splits // of_block)


def _parameters(args):
    """Strides of what is not of x's shape."""
    return {
        **plans.strides(args.weight, weight_dim=0, weight_tap=1),
        **plans.strides(args.bias, bias_dim=0),
        **plans.strides(args.initial_state, init_batch=0, init_dim=1, init_tap=2),
    }


def _rows(axis, fresh, **tensors):
    """Strides of the tensors of x's shape; the one called `fresh` is yet to be allocated."""
    first = next(iter(tensors.values()))
    row = first.shape[axis]
    numbers = {f"{fresh}_batch": first.shape[1] * first.shape[2], f"{fresh}_row": row}
    for name, x in tensors.items():
        numbers |= plans.strides(x, **{f"{name}_batch": 0, f"{name}_row": 3 - axis})
    return numbers


_OTHERS = ("weight", "bias", "initial_state")
"""Arguments that are not of x's shape."""


def _whole(args):
    """The arguments with every stride a whole number of elements."""
    return args._replace(**{name: plans.whole(getattr(args, name)) for name in _OTHERS})


class _Forward(NamedTuple):
    """All of a convolution but its arrays."""

    axis: int  # of x that is contiguous in memory
    copied: bool  # x, into that order
    split: bool  # whether elements of other arrays lie across boundaries
    fresh: list  # what a call allocates
    launch: Any


_FORWARD = ("x", "weight", "bias", "initial_state", "y", "final_state")
_ORDER = {name: 1 + place for place, name in enumerate(_FORWARD)}
"""Where what stands among the addresses of a forward launch: null, then arrays."""


def _plan_forward(args, wants_final_state):
    axis = _axis(args.x)
    copied = not plans.is_native(args.x, axis)
    x, whole = plans.in_order(args.x, axis) if copied else args.x, _whole(args)
    constants, numbers, blocks = _layout(whole, axis, "forward", [x])
    numbers |= _rows(axis, "y", x=x) | _parameters(whole)
    kernel = kernels.get("causal_conv1d.cu", "causal_conv1d", constants)
    fresh = plans.fresh({"y": (x.shape, x.dtype, plans.fresh_strides(x, axis))})
    if wants_final_state:  # by itself: the caller keeps it for longer
        fresh += plans.fresh({"final_state": (_state_shape(args), x.dtype, None)})
    split = any(getattr(args, name) is not getattr(whole, name) for name in _OTHERS)
    return _Forward(axis, copied, split, fresh, kernel.prepare(blocks, constants["THREADS"], numbers, order=_ORDER))


def _state_shape(args):
    return args.batch, args.dim, args.width - 1


def forward(args, wants_final_state):
    """Convolve.

    Parameters
    ----------
    args : checks_conv.ConvArguments
    wants_final_state : bool

    Returns
    -------
    y, final_state : array
        final_state is None where it is not wanted.
    """
    if args.x.size == 0 or args.width > WIDEST:
        return _wide_forward(_whole(args), wants_final_state)
    tensors = (args.x, args.weight, args.bias, args.initial_state)
    options = args.silu, args.reverse, wants_final_state
    plan = plans.planned(_plan_forward, (args, wants_final_state), tensors, options)
    if plan.split:
        args = _whole(args)
    x = plans.in_order(args.x, plan.axis) if plan.copied else args.x
    made, fresh, _ = plans.allocate(args.xp, plan.fresh)
    y, final_state = made if wants_final_state else (*made, None)
    plan.launch([0, *kernels.addresses((x, args.weight, args.bias, args.initial_state)), *fresh, 0])
    return y, final_state


def _fill_final_state(args, final_state):
    """The last width - 1 entries of the initial state followed by the steps walked."""
    before = args.width - 1
    walked = args.x[:, :, ::-1] if args.reverse else args.x
    kept = max(0, before - args.length)  # entries that the initial state has left
    final_state[:, :, kept:] = walked[:, :, max(0, args.length - before) :]
    final_state[:, :, :kept] = 0 if args.initial_state is None else args.initial_state[:, :, before - kept :]


# ---------------------------------------------------------------------------------------------------- backward
def _plan_backward(args, dy, dfinal_state):
    axis = _axis(args.x)
    tensors = {"x": args.x, "dy": dy}
    copied = tuple(name for name, x in tensors.items() if not plans.is_native(x, axis))
    tensors = {name: plans.in_order(x, axis) if name in copied else x for name, x in tensors.items()}
    constants, numbers, blocks = _layout(args, axis, "backward", list(tensors.values()))
    constants["DY_T"] = kernels.C_TYPES[dy.dtype.name]
    numbers |= _rows(axis, "dx", **tensors) | _parameters(args)
    numbers |= plans.strides(dfinal_state, dfinal_batch=0, dfinal_dim=1, dfinal_tap=2)
    launch = kernels.get("causal_conv1d_bwd.cu", "causal_conv1d_bwd", constants).prepare(blocks, constants["THREADS"], numbers)
    count = args.batch * numbers["splits"]
    return axis, copied, count, launch, _sum(args, count)


def _sum(args, count):
    """Launch that adds up `count` parts (width then bias, dim): dweight is (dim, width)."""
    real, stride = arrays.compute_dtype(args.x.dtype).name, (args.width + (args.bias is not None)) * args.dim
    sums = [plans.Sum(args.weight.dtype.name, count, args.dim, rows=args.width, stride=stride)]
    if args.bias is not None:
        sums.append(plans.Sum(args.bias.dtype.name, count, args.dim, stride=stride))
    return plans.sums_of_parts(real, tuple(sums))


def backward(args, dy, dfinal_state):
    """Gradients of a causal convolution.

    Parameters
    ----------
    args : checks_conv.ConvArguments
        The forward call's.
    dy, dfinal_state : array
        Gradients of y and, or None, of final_state.

    Returns
    -------
    CausalConv1dGrads
    """
    xp, args, dfinal_state = args.xp, _whole(args), plans.whole(dfinal_state)
    dinitial_state = None if args.initial_state is None else xp.empty(_state_shape(args), args.x.dtype)
    if args.x.size == 0:
        if dinitial_state is not None:
            dinitial_state[...] = 0 if dfinal_state is None else dfinal_state
        zeros = [None if x is None else xp.zeros(x.shape, x.dtype) for x in (args.x, args.weight, args.bias)]
        return CausalConv1dGrads(*zeros, dinitial_state)
    given = {
        "weight": args.weight, "bias": args.bias, "initial_state": args.initial_state, "dfinal_state": dfinal_state,
        "dinitial_state": dinitial_state,
    }  # fmt: skip
    rows, real = args.width + (args.bias is not None), arrays.compute_dtype(args.x.dtype)
    if args.width > WIDEST:
        dx, parts, launch_sum = _wide_backward(args, dy, dfinal_state, given)
    else:
        axis, copied, count, launch, launch_sum = _planned(_plan_backward, args, dy, dfinal_state)
        tensors = {"x": args.x, "dy": dy}
        given |= {name: plans.in_order(x, axis) if name in copied else x for name, x in tensors.items()}
        dx = plans.empty(xp, args.x.shape, args.x.dtype, axis)
        parts = xp.empty((count, rows, args.dim), real)
        launch(given | {"dx": dx, "parts": parts})
    dweight, dbias = xp.empty(args.weight.shape, args.weight.dtype), None
    sums = [None, parts, dweight]
    if args.bias is not None:
        dbias = xp.empty(args.bias.shape, args.bias.dtype)
        sums += [parts[:, args.width], dbias]
    launch_sum(kernels.addresses(sums))
    return CausalConv1dGrads(dx, dweight, dbias, dinitial_state)


# ---------------------------------------------------------------------------------------------------- any width
STEPS_OF_A_SUM = 1024
"""Steps in a part of a wide filter's gradient."""


def _wide(args, x, dy=None, dfinal_state=None):
    """What prepares a launch of a kernel of causal_conv1d_wide.cu, given its name and how many threads it wants; and the axis
    along which those are neighbours."""
    axis = _axis(x)
    constants = {
        "X_T": kernels.C_TYPES[x.dtype.name],
        "W_T": kernels.C_TYPES[args.weight.dtype.name],
        "DY_T": kernels.C_TYPES[(x if dy is None else dy).dtype.name],
        "SILU": int(args.silu),
        "REVERSE": int(args.reverse),
        "TIME_FAST": int(axis == 2),
    }
    numbers = {"batch": args.batch, "dim": args.dim, "length": args.length, "width": args.width, "steps": STEPS_OF_A_SUM}
    numbers |= {"splits": -(-args.length // STEPS_OF_A_SUM), "y_batch": args.dim * args.length}
    numbers |= {"y_dim": args.length if axis == 2 else 1, "y_time": 1 if axis == 2 else args.dim}
    numbers |= plans.strides(x, x_batch=0, x_dim=1, x_time=2) | plans.strides(dy, dy_batch=0, dy_dim=1, dy_time=2)
    numbers |= _parameters(args) | plans.strides(dfinal_state, dfinal_batch=0, dfinal_dim=1, dfinal_tap=2)

    def prepare(name, threads):
        return kernels.get("causal_conv1d_wide.cu", name, constants).prepare(-(-threads // THREADS), THREADS, numbers)

    return axis, numbers["splits"], prepare


_NONE = dict.fromkeys(("dy", "dfinal_state", "y", "dx", "dinitial_state", "dp", "parts"))


def _wide_forward(args, wants_final_state):
    xp, x = args.xp, plans.whole(args.x)
    final_state = None
    if wants_final_state:
        final_state = xp.empty(_state_shape(args), x.dtype)
        _fill_final_state(args, final_state)
    axis, _, prepare = _wide(args, x)
    y = plans.empty(xp, x.shape, x.dtype, axis)
    if x.size:
        given = {"x": x, "weight": args.weight, "bias": args.bias, "initial_state": args.initial_state, "y": y}
        prepare("causal_conv1d_wide", x.size)(_NONE | given)
    return y, final_state


def _wide_backward(args, dy, dfinal_state, given):
    """dx, the parts of dweight and dbias, and the launch that adds them up."""
    xp, x, dy = args.xp, plans.whole(args.x), plans.whole(dy)
    axis, splits, prepare = _wide(args, x, dy, dfinal_state)
    real, rows = arrays.compute_dtype(x.dtype), args.width + (args.bias is not None)
    dx, dp = plans.empty(xp, x.shape, x.dtype, axis), plans.empty(xp, x.shape, real, axis)
    parts = xp.empty((args.batch * splits, rows, args.dim), real)
    given = _NONE | given | {"x": x, "dy": dy, "dx": dx, "dp": dp, "parts": parts}
    prepare("wide_dp", x.size)(given)
    prepare("wide_de", args.batch * args.dim * (args.length + args.width - 1))(given)
    prepare("wide_dw", parts.size)(given)
    return dx, parts, _sum(args, args.batch * splits)


# ---------------------------------------------------------------------------------------------------- one step
def plan_update(state, x, weight, bias, silu, width, overlap=False):
    """The launch of one step, given a dict with all of these arrays and y (batch, dim), by name. With `overlap` it may begin
    before the kernel in front has ended, of which only x is expected."""
    constants = {
        "X_T": kernels.C_TYPES[x.dtype.name],
        "W_T": kernels.C_TYPES[weight.dtype.name],
        "SILU": int(silu),
        "REVERSE": 0,
        "WIDTH": width,
        "OVERLAP": int(overlap),
    }
    numbers = {"batch": x.shape[0], "dim": x.shape[1]}
    numbers |= plans.strides(x, x_batch=0, x_dim=1) | plans.strides(bias, bias_dim=0)
    numbers |= plans.strides(state, state_batch=0, state_dim=1, state_tap=2) | plans.strides(weight, weight_dim=0, weight_tap=1)
    kernel = kernels.get("causal_conv1d_update.cu", "causal_conv1d_update", constants)
    return kernel.prepare(-(-x.size // THREADS), THREADS, numbers, **({"overlap": True} if overlap else {}))


def update(xp, state, x, weight, bias, silu, width):
    """One step; `state` is shifted in place. Arguments have passed `checks_conv.causal_conv1d_update`."""
    y = xp.empty(x.shape, x.dtype)
    if x.size:
        x, weight, bias, here = (plans.whole(a) for a in (x, weight, bias, state))
        launch = plans.planned(plan_update, (here, x, weight, bias, silu, width), (here, x, weight, bias), (silu,))
        launch({"state": here, "x": x, "weight": weight, "bias": bias, "y": y})
        if here is not state:
            state[...] = here
    return y
