"""The selective scan on a GPU: from checked CuPy arrays to launches of the kernels in cuda_src/."""

import math
from typing import NamedTuple

from mambacupy import arrays, kernels
from mambacupy.ops import mapping, plans
from mambacupy.reference import CHUNK, SelectiveScanGrads


# ---------------------------------------------------------------------------------------------------- B and C
def _coefficient(name, x, groups, complex_states, layout):
    """Constants and numbers by which a kernel finds B or C."""
    strides = _coefficient_strides(x, groups, complex_states)
    constants = {
        f"{name}_T": kernels.C_TYPES[arrays.real_of(x.dtype).name],
        f"{name}_VARIES": int(groups > 0),
        f"{name}_TIME_FAST": int(abs(strides["time"]) <= abs(strides["state"])),
        f"{name}_VECTOR": _widest_coefficient_access(x, groups, strides, complex_states, layout),
    }
    return constants, {f"{name}_{key}": value for key, value in strides.items()} | {f"groups_of_{name}": groups or 1}


def _widest_coefficient_access(x, groups, strides, complex_states, layout):
    """Entries of B or C moved by one instruction: 16 bytes where neighbours lie side by side and aligned."""
    if groups == 0:
        return 1
    time_fast = abs(strides["time"]) <= abs(strides["state"])
    fast, slow = ("time", "state") if time_fast else ("state", "time")
    reals = 2 if complex_states else 1
    if strides[fast] != reals or (complex_states and strides["imag"] != 1):
        return 1
    real_bytes = arrays.real_of(x.dtype).itemsize
    vector = min(16 // (reals * real_bytes), layout.tile if time_fast else layout.lanes * layout.slots)
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
class _Plan(NamedTuple):
    axis: int  # of u that is contiguous in memory, and of all tensors like u
    copied: tuple  # names of tensors that have to be copied into that order
    split: tuple  # names of other arrays that have to be copied because their elements lie across boundaries
    mapping: mapping.Mapping
    slices: list  # (slice of the states or None for all, launches)
    room: tuple  # of what only the launches of a call need: where each array begins, by name, and bytes in all
    sums: tuple = ()  # names of the gradients that are sums over blocks
    launch_sums: object = None  # after the slices


def _planned(make, args, delta_softplus, reverse, *incoming):
    """The plan `make(args, delta_softplus, reverse, *incoming)`; `incoming` are arrays or None."""
    delta_softplus, reverse = bool(delta_softplus), bool(reverse)
    tensors = (args.u, args.delta, args.A, args.B, args.C, args.D, args.z, args.delta_bias, args.initial_state, *incoming)
    options = (args.zoh, delta_softplus, reverse)
    return plans.planned(make, (args, delta_softplus, reverse, *incoming), tensors, options)


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
    B_constants, B_numbers = _coefficient("B", args.B, args.groups_B, args.complex, layout)
    C_constants, C_numbers = _coefficient("C", args.C, args.groups_C, args.complex, layout)
    fresh_row = args.length if axis == 2 else args.dim
    constants = {
        "U_T": kernels.C_TYPES[args.u.dtype.name],
        **B_constants,
        **C_constants,
        "COMPLEX": int(args.complex),
        "ZOH": int(args.zoh),
        "REVERSE": int(reverse),
        "TIME_CONTIGUOUS": int(axis == 2),
        "VECTOR": plans.widest_access(axis, [*tensors.values()], layout.tile if axis == 2 else layout.block_channels),
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
        "delta_softplus": int(delta_softplus),
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


def _launches(args, layout, name, common, numbers, entering, backward):
    """Launches that scan one slice of the states: the kernel, and before it those that find what enters each part of time."""
    file, blocks = f"{name}.cu", args.batch * layout.splits * common.blocks_per_batch

    chains = not backward and 1 < layout.splits <= mapping.MOST_PARTS_CHAINED

    def prepare(carries_only):
        constants = common.constants | {"CARRIES_ONLY": carries_only, "CHAINS": int(chains)}
        return kernels.get(file, name, constants, layout.shared_bytes).prepare(blocks, layout.threads * layout.teams, numbers)

    if layout.splits == 1:
        return [prepare(0)]
    if chains:
        return [prepare(1), prepare(0)]
    real = kernels.C_TYPES[arrays.compute_dtype(args.u.dtype).name]
    types = {"BACKWARD": backward, "STATE_T": f"Complex<{real}>" if args.complex else real, "REAL": real}
    combine = kernels.get("combine_carries.cu", "combine_carries", types)
    numbers = numbers | {"batch": args.batch} | plans.strides(entering, enters_batch=0, enters_dim=1, enters_state=2)
    states = args.batch * args.dim * numbers["state"]
    return [prepare(1), combine.prepare(-(-states // 256), 256, numbers), prepare(0)]


_LAST_AXIS_IS_STATE = {
    "A", "initial_state", "last_state", "states", "carries", "enters",
    "dlast_state", "dinitial_state", "dA_parts", "dB_parts", "dC_parts",
}  # fmt: skip


def _carries(args, layout):
    """Bytes of what parts of time hand on."""
    if layout.splits == 1:
        return {}
    channels = args.batch * layout.splits * args.dim
    real_bytes = arrays.compute_dtype(args.u.dtype).itemsize
    return {"carries": channels * args.state * args.A.itemsize, "totals": channels * real_bytes}


def _slice_of(given, here):
    """The arrays of a launch, cut to a slice of the states."""
    cut, state_bytes = {}, given["A"].itemsize
    for name, x in given.items():
        if x is None:
            cut[name] = None
        elif type(x) is int:  # an address
            cut[name] = x + here.start * state_bytes if name in _LAST_AXIS_IS_STATE else x
        elif name in _LAST_AXIS_IS_STATE or (name in "BC" and x.ndim == 2):
            cut[name] = x[..., here]
        else:
            cut[name] = x[:, :, here] if name in "BC" else x
    return cut


def _arrays(args, plan, more):
    """All arrays of a call by name, each as the plan wants it; `more` are those beside its arguments."""
    given = {
        "u": args.u, "delta": args.delta, "A": args.A, "B": args.B, "C": args.C, "D": args.D, "z": args.z,
        "delta_bias": args.delta_bias, "initial_state": args.initial_state, "carries": None, "totals": None, **more,
    }  # fmt: skip
    for name in plan.copied:
        given[name] = plans.in_order(given[name], plan.axis)
    for name in plan.split:
        given[name] = given[name].copy()
    starts, size = plan.room
    if size:  # one allocation, of which kernels get addresses: arrays of their own would cost the host as much each
        given["room"] = room = args.xp.empty((size,), "u1")
        address = kernels.address(room)
        for name, start in starts.items():
            given[name] = address + start
    return given


def _run(plan, given, sums, came, left):
    """Launch slice by slice; by `sums`, to the kernel `came` and `left`, each adds to the one before."""
    last = len(plan.slices) - 1
    for index, (here, launches) in enumerate(plan.slices):
        given[came] = None if index == 0 else sums
        given[left] = None if index == last else sums
        now = given if here is None else _slice_of(given, here)
        for launch in launches:
            launch(now)


# ---------------------------------------------------------------------------------------------------- forward
def _plan_forward(args, delta_softplus, reverse):
    args, split = _made_whole(args)
    most = mapping.states_of_a_launch(args, forward=True)
    layout = mapping.forward(args, min(args.state, most), kernels.device())
    tensors = {name: x for name, x in (("u", args.u), ("delta", args.delta), ("z", args.z)) if x is not None}
    common = _common(args, layout, tensors, delta_softplus, reverse)
    numbers = common.numbers | plans.strides(args.initial_state, init_batch=0, init_dim=1, init_state=2)
    slices = [
        (here, _launches(args, layout, "selective_scan_fwd", common, numbers | {"state": count}, args.initial_state, 0))
        for here, count in _slices(args.state, most)
    ]
    return _Plan(common.axis, common.copied, split, layout, slices, plans.room(_carries(args, layout)))


def forward(args, delta_softplus, reverse, save):
    """Scan.

    Parameters
    ----------
    args : checks.ScanArguments
        Of CuPy arrays on the current device.
    delta_softplus, reverse, save : bool
        `save`: keep the states at chunk borders.

    Returns
    -------
    y, last_state, states : array
        `states` (batch, chunks, dim, state) holds the state that enters each chunk; None without `save`.
    """
    xp, batch, dim, length, state = args.xp, args.batch, args.dim, args.length, args.state
    last_state = xp.empty((batch, dim, state), args.A.dtype)
    states = xp.empty((batch, -(-length // CHUNK), dim, state), args.A.dtype) if save else None
    if args.u.size == 0:
        last_state[...] = 0 if args.initial_state is None else args.initial_state
        return xp.empty(args.u.shape, args.u.dtype), last_state, states
    plan = _planned(_plan_forward, args, delta_softplus, reverse)
    y = plans.empty(xp, args.u.shape, args.u.dtype, plan.axis)
    given = _arrays(args, plan, {"y": y, "last_state": last_state, "states": states})
    given["enters"] = given["initial_state"]
    parts = None
    if len(plan.slices) > 1:  # every slice of the states but the last leaves its part of Σ_n C·h here
        parts = plans.empty(xp, args.u.shape, arrays.compute_dtype(args.u.dtype), plan.axis)
    _run(plan, given, parts, "parts_in", "parts_out")
    return y, last_state, states


# ---------------------------------------------------------------------------------------------------- backward
def _plan_backward(args, delta_softplus, reverse, dy, dlast_state):
    args, split = _made_whole(args)
    if dlast_state is not None and not plans.is_whole(dlast_state):
        dlast_state, split = dlast_state.copy(), (*split, "dlast_state")
    most = mapping.states_of_a_launch(args, forward=False)
    layout = mapping.backward(args, min(args.state, most), kernels.device())
    tensors = {"u": args.u, "delta": args.delta, "z": args.z, "dy": dy}
    tensors = {name: x for name, x in tensors.items() if x is not None}
    common = _common(args, layout, tensors, delta_softplus, reverse)
    common = common._replace(constants=common.constants | {"DY_T": kernels.C_TYPES[dy.dtype.name]})
    numbers = common.numbers | {"plane": args.u.size}
    numbers |= plans.strides(dlast_state, dlast_batch=0, dlast_dim=1, dlast_state_stride=2)
    slices = [
        (here, _launches(args, layout, "selective_scan_bwd", common, numbers | {"state": count}, dlast_state, 1))
        for here, count in _slices(args.state, most)
    ]
    sums = _sums(args, layout, common)
    real = arrays.compute_dtype(args.u.dtype)
    sizes = {f"{name}_parts": x.outer * x.count * x.rows * x.columns * real.itemsize for name, x in sums.items()}
    launch_sums = plans.sums_of_parts(real.name, tuple(sums.values()), 1 + args.complex)
    room = plans.room(_carries(args, layout) | sizes)
    return _Plan(common.axis, common.copied, split, layout, slices, room, tuple(sums), launch_sums)


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


def backward(args, delta_softplus, reverse, states, dy, dlast_state, B, C):
    """Gradients of a scan.

    Parameters
    ----------
    args : checks.ScanArguments
        The forward scan's.
    delta_softplus, reverse : bool
        As they were.
    states : array (batch, chunks, dim, state)
        As `forward` kept them.
    dy, dlast_state : array
        Gradients of y and, or None, of last_state.
    B, C : array
        As the caller gave them; their gradients have their shapes.

    Returns
    -------
    SelectiveScanGrads
    """
    xp, batch, dim, state = args.xp, args.batch, args.dim, args.state
    dinitial = None if args.initial_state is None else xp.empty((batch, dim, state), args.A.dtype)
    if args.u.size == 0:
        if dinitial is not None:
            dinitial[...] = 0 if dlast_state is None else dlast_state
        zeros = [
            None if x is None else xp.zeros(x.shape, x.dtype)
            for x in (args.u, args.delta, args.A, B, C, args.D, args.z, args.delta_bias)
        ]
        return SelectiveScanGrads(*zeros, dinitial)
    plan = _planned(_plan_backward, args, delta_softplus, reverse, dy, dlast_state)
    real = arrays.compute_dtype(args.u.dtype)
    du, ddelta = (plans.empty(xp, args.u.shape, args.u.dtype, plan.axis) for _ in range(2))
    dz = None if args.z is None else plans.empty(xp, args.u.shape, args.u.dtype, plan.axis)
    outputs = {
        "du": du, "ddelta": ddelta, "dz": dz, "dinitial_state": dinitial, "dD_parts": None, "dbias_parts": None,
        "dy": dy, "states": states, "dlast_state": dlast_state,
    }  # fmt: skip
    given = _arrays(args, plan, outputs)
    given["enters"] = given["dlast_state"]
    sums = None
    if len(plan.slices) > 1:  # every slice of the states but the last leaves its part of the sums over n here
        sums = plans.empty(xp, (3, *args.u.shape), real, plan.axis)
    _run(plan, given, sums, "sums_in", "sums_out")

    shapes = {"dA": args.A, "dD": args.D, "dbias": args.delta_bias, "dB": B, "dC": C}
    grads = {name: None if x is None else xp.empty(x.shape, x.dtype) for name, x in shapes.items()}
    plan.launch_sums([(given[f"{name}_parts"], grads[name]) for name in plan.sums])
    return SelectiveScanGrads(du, ddelta, grads["dA"], grads["dB"], grads["dC"], grads["dD"], dz, grads["dbias"], dinitial)
