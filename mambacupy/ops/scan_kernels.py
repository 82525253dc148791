"""The selective scan on a GPU: from checked CuPy arrays to launches of the kernels in cuda_src/."""

import math
import operator
from dataclasses import dataclass
from typing import Any, NamedTuple

from mambacupy import arrays, kernels
from mambacupy.ops import mapping, plans
from mambacupy.reference import CHUNK, SelectiveScanGrads


# ---------------------------------------------------------------------------------------------------- B and C
def _coefficient(name, args, x, groups, layout):
    """Constants and numbers by which a kernel finds B or C."""
    strides = _coefficient_strides(x, groups, args.complex)
    reals = 2 if args.complex else 1
    constants = {
        f"{name}_T": kernels.C_TYPES[arrays.real_of(x.dtype).name],
        f"{name}_VARIES": int(groups > 0),
        f"{name}_TIME_FAST": int(abs(strides["time"]) <= abs(strides["state"])),
        f"{name}_VECTOR": _widest_coefficient_access(args, x, groups, strides, layout),
        f"{name}_DENSE": int(strides["time"] == reals),
    }
    return constants, {f"{name}_{key}": value for key, value in strides.items()} | {f"groups_of_{name}": groups or 1}


def _widest_coefficient_access(args, x, groups, strides, layout):
    """Entries of B or C moved by one instruction: 16 bytes where neighbours lie side by side and aligned."""
    if groups == 0:
        return 1
    time_fast = abs(strides["time"]) <= abs(strides["state"])
    fast, slow = ("time", "state") if time_fast else ("state", "time")
    reals = 2 if args.complex else 1
    if strides[fast] != reals or (args.complex and strides["imag"] != 1):
        return 1
    real_bytes = arrays.real_of(x.dtype).itemsize
    most = min(16 // (reals * real_bytes), layout.tile if time_fast else layout.lanes * layout.slots)
    # A whole number of accesses in all that there is, so that none is cut at its end.
    vector = math.gcd(most, args.length if time_fast else args.state)
    outer = (strides["batch"] | strides["group"] | strides[slow]) * real_bytes | kernels.address(x)
    while vector > 1 and outer % (vector * reals * real_bytes):
        vector //= 2
    return vector


def _coefficient_strides(x, groups, complex_states):
    """In real elements. Complex values are pairs of reals `imag` apart: 1 in complex arrays, the stride of the last axis in the
    interleaved real layout."""
    strides = [s // x.itemsize for s in x.strides]
    if groups == 0:
        return {"batch": 0, "group": strides[0], "state": strides[1], "time": 0, "imag": 0}
    imag = 0
    if complex_states and x.dtype.kind == "c":
        *strides, imag = *(2 * s for s in strides), 1
    elif complex_states:
        imag = strides[3]
        strides[3] *= 2
    return dict(zip(("batch", "group", "state", "time", "imag"), (*strides, imag), strict=True))


# ---------------------------------------------------------------------------------------------------- plans
@dataclass(frozen=True, eq=False)
class _Plan:
    """All of a call but its arrays. As a key it stands for itself."""

    xp: Any
    axis: int  # of u that is contiguous in memory, and of all tensors like u
    names: tuple  # of the arrays that come
    fresh: list  # what a call allocates
    results: Any  # picks the results from the fresh arrays and a None behind them
    order: dict = None  # where what stands among the addresses that launches get, by name
    copied: tuple = ()  # names of tensors that have to be copied into that order
    split: tuple = ()  # names of other arrays that have to be copied because their elements lie across boundaries
    slices: list = ()  # (slice of the states or None for all, launches); none where u is empty
    launch_sums: Any = None  # after the slices


def _made_whole(args):
    """The arguments without views that split elements, such as complex ones of an odd number of floats a row; and the names of
    what had to be copied for it."""
    names = ("A", "B", "C", "D", "delta_bias", "initial_state")
    split = {name: x.copy() for name in names if (x := getattr(args, name)) is not None and not plans.is_whole(x)}
    return args._replace(**split), tuple(split)


class _Common(NamedTuple):
    """What the plans of both directions share."""

    axis: int
    copied: tuple
    constants: dict
    numbers: dict
    blocks_per_batch: int


def _common(args, layout, tensors, delta_softplus, reverse):
    """`tensors` are those of u's shape, by name, without those that are None."""
    axis = 1 if args.u.strides[2] != args.u.itemsize and plans.is_native(args.u, 1) else 2
    copied = tuple(name for name, x in tensors.items() if not plans.is_native(x, axis))
    tensors = {name: plans.in_order(x, axis) if name in copied else x for name, x in tensors.items()}
    # A block's channels share one group of B and one of C: spans are the channels between two group borders of either.
    span = math.gcd(args.dim // (args.groups_B or 1), args.dim // (args.groups_C or 1))
    blocks_per_span = -(-span // layout.block_channels)
    B_constants, B_numbers = _coefficient("B", args, args.B, args.groups_B, layout)
    C_constants, C_numbers = _coefficient("C", args, args.C, args.groups_C, layout)
    fresh_row = args.length if axis == 2 else args.dim
    # An item is as wide as an access is at most, however many accesses its alignment demands; none of these is cut at an end.
    item = math.gcd(16 // args.u.itemsize, layout.tile if axis == 2 else layout.block_channels)
    access = plans.widest_access(axis, [*tensors.values()], item if axis == 2 else math.gcd(item, span))
    constants = {
        "U_T": kernels.C_TYPES[args.u.dtype.name],
        **B_constants,
        **C_constants,
        "COMPLEX": int(args.complex),
        "ZOH": int(args.zoh),
        "REVERSE": int(reverse),
        "SOFTPLUS": int(delta_softplus),
        "GATED": int(args.z is not None),
        "TIME_CONTIGUOUS": int(axis == 2),
        "VECTOR": item,
        "ACCESS": access,
        "OUT_ACCESS": math.gcd(item, fresh_row if axis == 2 else math.gcd(fresh_row, span)),
        **layout.constants,
    }
    numbers = {
        "dim": args.dim,
        "length": args.length,
        "state_total": args.state,
        "span": span,
        "blocks_per_span": blocks_per_span,
        "blocks_per_batch": args.dim // span * blocks_per_span,
        "splits": layout.splits,
        **B_numbers,
        **C_numbers,
        **plans.strides(args.A, A_dim=0, A_state=1),
        **plans.strides(args.D, D_dim=0),
        **plans.strides(args.delta_bias, bias_dim=0),
    }
    for name in ("u", "delta", "z", "dy"):
        numbers |= plans.strides(tensors.get(name), **{f"{name}_batch": 0, f"{name}_row": 3 - axis})
    for name in ("y", "du"):  # allocated by the call
        numbers |= {f"{name}_batch": args.dim * args.length, f"{name}_row": fresh_row}
    return _Common(axis, copied, constants, numbers, numbers["blocks_per_batch"])


def _slices(state, most):
    """Pairs of a slice of the states (None for all of them) and how many it holds."""
    if state <= most:
        return [(None, state)]
    return [(slice(n, min(n + most, state)), min(most, state - n)) for n in range(0, state, most)]


def _launches(args, layout, name, common, numbers, entering, backward, order):
    """Launches that scan one slice of the states: the kernel, and before it those that find what enters each part of time."""
    file, blocks = f"{name}.cu", args.batch * layout.splits * common.blocks_per_batch

    chains = not backward and 1 < layout.splits <= mapping.MOST_PARTS_CHAINED

    def prepare(carries_only, **options):
        constants = common.constants | {"CARRIES_ONLY": carries_only, "RELAY": int(layout.relay), "CHAINS": int(chains)}
        kernel = kernels.get(file, name, constants, layout.shared_bytes)
        return kernel.prepare(blocks, layout.threads * layout.teams, numbers, order=order, **options)

    if layout.splits == 1:
        return [prepare(0)]
    if layout.relay:
        clear = kernels.get("clear.cu", "clear", {}).prepare(-(-blocks // 256), 256, {"count": blocks}, order=order)
        return [clear, prepare(0, **({"overlap": True} if kernels.device().overlaps else {}))]
    if chains:
        return [prepare(1), prepare(0)]
    real = kernels.C_TYPES[arrays.compute_dtype(args.u.dtype).name]
    types = {"BACKWARD": backward, "STATE_T": f"Complex<{real}>" if args.complex else real, "REAL": real}
    combine = kernels.get("combine_carries.cu", "combine_carries", types)
    numbers = numbers | {"batch": args.batch} | plans.strides(entering, enters_batch=0, enters_dim=1, enters_state=2)
    states = args.batch * args.dim * numbers["state"]
    return [prepare(1), combine.prepare(-(-states // 256), 256, numbers, order=order), prepare(0)]


def _carries(args, layout, blocks_per_batch):
    """Bytes of what parts of time hand on."""
    if layout.splits == 1:
        return {}
    parts = args.batch * layout.splits
    if layout.relay:
        of_block = layout.threads * layout.channels * layout.slots * 2 * args.A.itemsize
        return {"handed": parts * blocks_per_batch * of_block, "published": parts * blocks_per_batch * 4}
    real_bytes = arrays.compute_dtype(args.u.dtype).itemsize
    return {"carries": parts * args.dim * args.state * args.A.itemsize, "totals": parts * args.dim * real_bytes}


# ---------------------------------------------------------------------------------------------------- calls
_FORWARD = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias", "initial_state")
"""Arrays of a call, as `SelectiveScanSaved` orders them."""

_BACKWARD = (*_FORWARD, "states", "dy", "dlast_state")

_MAY_BE_MISSING = (
    "carries", "totals", "handed", "published", "states", "dz", "dD", "dbias", "dinitial_state", "dD_parts", "dbias_parts",
)  # fmt: skip


def _order(names, fresh, enters, came, left):
    """Where what stands among the addresses of a call: null, what `came` and what `left` in sums over slices of the states, the
    arrays that come, and fresh memory. `enters` names the states that enter where the walk begins."""
    order = {name: 3 + i for i, name in enumerate((*names, *(name for one in fresh for name in one.names)))}
    return dict.fromkeys(_MAY_BE_MISSING, 0) | {came: 1, left: 2} | order | {"enters": order[enters]}


def _results(fresh, names):
    """What picks arrays by name from the fresh ones and a None behind them."""
    made = [name for one in fresh for name in one.names[: len(one.arrays)]]
    return operator.itemgetter(*(made.index(name) if name in made else -1 for name in names))


def _as_wanted(plan, tensors):
    """The arrays that came, copied where the plan says so."""
    if not plan.copied and not plan.split:
        return tensors
    given = dict(zip(plan.names, tensors, strict=True))
    for name in plan.copied:
        given[name] = plans.in_order(given[name], plan.axis)
    for name in plan.split:
        given[name] = given[name].copy()
    return [*given.values()]


def _run(plan, tensors, fresh, sums):
    """Launch slice by slice; by `sums`, to the kernel what came and what left, each adds to the one before. `fresh` are
    addresses of what was allocated."""
    addresses, last = [0, 0, 0, *kernels.addresses(tensors), *fresh], len(plan.slices) - 1
    for index, (here, launches) in enumerate(plan.slices):
        if last:
            addresses[1:3] = 0 if index == 0 else sums, 0 if index == last else sums
        now = addresses if here is None else _slice_of(plan, tensors, addresses, here.start)
        for launch in launches:
            launch(now)
    if plan.launch_sums:
        plan.launch_sums(addresses)


_FRESH_STATES = ("last_state", "states", "carries", "dinitial_state", "dA_parts", "dB_parts", "dC_parts")


def _slice_of(plan, tensors, addresses, start):
    """The addresses moved on to a slice of the states that begins at `start`."""
    given = dict(zip(plan.names, tensors, strict=True))
    distances = dict.fromkeys(_FRESH_STATES, start * given["A"].itemsize)  # states are their last axis
    for name in ("A", "B", "C", "initial_state", "dlast_state"):
        if (x := given.get(name)) is not None:  # where B and C vary, time comes behind the states
            distances[name] = start * x.strides[-2 if name in "BC" and x.ndim > 2 else -1]
    moved = list(addresses)
    for name, distance in distances.items():
        if moved[place := plan.order.get(name, 0)]:
            moved[place] += distance
    return moved


# ---------------------------------------------------------------------------------------------------- forward
def plan_forward(args, delta_softplus, reverse, save):
    """The plan of a scan of such arrays.

    Parameters
    ----------
    args : checks.ScanArguments
        Of CuPy arrays on the current device.
    delta_softplus, reverse, save : bool
        `save`: keep the states at chunk borders.
    """
    if args.u.size == 0:
        fresh = _fresh_results(args, 2, save, {})
        return _Plan(args.xp, 2, _FORWARD, fresh, _results(fresh, _RESULTS))
    args, split = _made_whole(args)
    most = mapping.states_of_a_launch_forward(args)
    layout = mapping.forward(args, min(args.state, most), kernels.device())
    tensors = {name: x for name, x in (("u", args.u), ("delta", args.delta), ("z", args.z)) if x is not None}
    common = _common(args, layout, tensors, delta_softplus, reverse)
    more = {"SLICED": int(args.state > most), "BUFFERS": layout.buffers}
    common = common._replace(constants=common.constants | more)
    numbers = common.numbers | plans.strides(args.initial_state, init_batch=0, init_dim=1, init_state=2)
    fresh = _fresh_results(args, common.axis, save, _carries(args, layout, common.blocks_per_batch))
    order = _order(_FORWARD, fresh, "initial_state", "parts_in", "parts_out")
    slices = [
        (here, _launches(args, layout, "selective_scan_fwd", common, numbers | {"state": count}, args.initial_state, 0, order))
        for here, count in _slices(args.state, most)
    ]
    results = _results(fresh, _RESULTS)
    return _Plan(args.xp, common.axis, _FORWARD, fresh, results, order, common.copied, split, slices)


_RESULTS = ("y", "last_state", "states")


def _fresh_results(args, axis, save, scratch):
    """Allocations of a scan, one for each array: the caller keeps them for different times."""
    results = {"y": _like_u(args, axis), "last_state": ((args.batch, args.dim, args.state), args.A.dtype, None)}
    if save:
        results["states"] = ((args.batch, -(-args.length // CHUNK), args.dim, args.state), args.A.dtype, None)
    return sum((plans.fresh({name: x}) for name, x in results.items()), plans.fresh({}, scratch))


def _like_u(args, axis):
    """What `plans.fresh` wants to know of an array like u."""
    return args.u.shape, args.u.dtype, plans.fresh_strides(args.u, axis)


def forward(plan, tensors):
    """Scan.

    Parameters
    ----------
    plan : from `plan_forward`
    tensors : sequence of array or None
        Arguments as `selective_scan` orders them, up to delta_bias, and initial_state.

    Returns
    -------
    y, last_state, states : array
        `states` (batch, chunks, dim, state) holds the state that enters each chunk; None where the plan does not save them.
    """
    tensors = _as_wanted(plan, tensors)
    made, addresses, held = plans.allocate(plan.xp, plan.fresh)
    y, last_state, states = plan.results((*made, None))
    u, initial_state = tensors[0], tensors[-1]
    if not plan.slices:
        last_state[...] = 0 if initial_state is None else initial_state
    parts = None
    if len(plan.slices) > 1:  # every slice of the states but the last leaves its part of Σ_n C·h here
        parts = plans.empty(plan.xp, u.shape, arrays.compute_dtype(u.dtype), plan.axis)
    _run(plan, tensors, addresses, kernels.address(parts))
    del held  # not before all is launched
    return y, last_state, states


# ---------------------------------------------------------------------------------------------------- backward
def plan_backward(args, delta_softplus, reverse, dy, dlast_state, B, C):
    """The plan of a scan's gradients.

    Parameters
    ----------
    args : checks.ScanArguments
        The forward scan's.
    delta_softplus, reverse : bool
        As they were.
    dy, dlast_state : array
        Gradients of y and, or None, of last_state.
    B, C : array
        As the caller gave them; their gradients have their shapes.
    """
    if args.u.size == 0:
        fresh = _fresh_gradients(args, 2, B, C, {})
        return _Plan(args.xp, 2, _BACKWARD, fresh, _results(fresh, _GRADIENTS))
    args, split = _made_whole(args)
    if dlast_state is not None and not plans.is_whole(dlast_state):
        dlast_state, split = dlast_state.copy(), (*split, "dlast_state")
    most = mapping.states_of_a_launch_backward(args, kernels.device())
    layout = mapping.backward(args, min(args.state, most), kernels.device())
    tensors = {"u": args.u, "delta": args.delta, "z": args.z, "dy": dy}
    tensors = {name: x for name, x in tensors.items() if x is not None}
    common = _common(args, layout, tensors, delta_softplus, reverse)
    sliced = int(args.state > most)
    more = {"DY_T": kernels.C_TYPES[dy.dtype.name], "SLICED": sliced}
    common = common._replace(constants=common.constants | more)
    numbers = common.numbers | {"plane": args.u.size}
    numbers |= plans.strides(dlast_state, dlast_batch=0, dlast_dim=1, dlast_state_stride=2)
    sums = _sums(args, layout, common)
    real = arrays.compute_dtype(args.u.dtype)
    sizes = {f"{name}_parts": x.outer * x.count * x.rows * x.columns * real.itemsize for name, x in sums.items()}
    fresh = _fresh_gradients(args, common.axis, B, C, _carries(args, layout, common.blocks_per_batch) | sizes)
    order = _order(_BACKWARD, fresh, "dlast_state", "sums_in", "sums_out")
    slices = [
        (here, _launches(args, layout, "selective_scan_bwd", common, numbers | {"state": count}, dlast_state, 1, order))
        for here, count in _slices(args.state, most)
    ]
    places = tuple(order[x] for name in sums for x in (f"{name}_parts", name))
    overlap = layout.relay and kernels.device().overlaps  # it costs the host a microsecond, and saves one of a short kernel
    launch_sums = plans.sums_of_parts(real.name, tuple(sums.values()), 1 + args.complex, places, overlap)
    results = _results(fresh, _GRADIENTS)
    return _Plan(args.xp, common.axis, _BACKWARD, fresh, results, order, common.copied, split, slices, launch_sums)


def _sums(args, layout, common):
    """Sums over blocks by name: those over batch and time of constants, and those over channels of varying B and C."""
    reals, count = 1 + args.complex, args.batch * layout.splits

    def of_constant(x):
        return plans.Sum(arrays.real_of(x.dtype).name, count, x.size * (2 if x.dtype.kind == "c" else 1))

    def of_varying(x, groups):  # the gradient is C-contiguous in x's shape: (batch, groups, state, length), or interleaved
        rows, columns = (args.length, args.state * reals) if args.state > 1 else (1, args.length * reals)
        blocks = common.blocks_per_batch // groups
        return plans.Sum(arrays.real_of(x.dtype).name, blocks, columns, rows, args.batch * groups)

    sums = {"dA": of_constant(args.A)}
    sums |= {name: of_constant(x) for name, x in (("dD", args.D), ("dbias", args.delta_bias)) if x is not None}
    for name, x, groups in (("dB", args.B, args.groups_B), ("dC", args.C, args.groups_C)):
        sums[name] = of_varying(x, groups) if groups else of_constant(x)
    return sums


def _fresh_gradients(args, axis, B, C, scratch):
    """Allocations of the gradients: of parameters, which are kept for long, and of all else."""

    def like(**named):
        return {name: (x.shape, x.dtype, None) for name, x in named.items() if x is not None}

    parameters = like(dA=args.A, dD=args.D, dbias=args.delta_bias)
    others = like(dB=B, dC=C, dinitial_state=args.initial_state) | dict.fromkeys(("du", "ddelta"), _like_u(args, axis))
    if args.z is not None:
        others["dz"] = _like_u(args, axis)
    return plans.fresh(parameters) + plans.fresh(others, scratch)


def backward(plan, tensors):
    """Gradients of a scan.

    Parameters
    ----------
    plan : from `plan_backward`
    tensors : sequence of array or None
        Arguments of the forward scan, as `forward` takes them; states, as it kept them; dy, and dlast_state.

    Returns
    -------
    SelectiveScanGrads
    """
    tensors = _as_wanted(plan, tensors)
    dy, dlast_state = tensors[-2:]
    made, addresses, held = plans.allocate(plan.xp, plan.fresh)
    grads = SelectiveScanGrads(*plan.results((*made, None)))
    if not plan.slices:
        for x in grads:
            if x is not None:
                x[...] = 0
        if grads.initial_state is not None and dlast_state is not None:
            grads.initial_state[...] = dlast_state
        return grads
    sums = None
    if len(plan.slices) > 1:  # every slice of the states but the last leaves its part of the sums over n here
        sums = plans.empty(plan.xp, (3, *dy.shape), arrays.compute_dtype(dy.dtype), plan.axis)
    _run(plan, tensors, addresses, kernels.address(sums))
    del held  # not before all is launched
    return grads


_GRADIENTS = ("du", "ddelta", "dA", "dB", "dC", "dD", "dz", "dbias", "dinitial_state")
"""In the order of `SelectiveScanGrads`."""
