"""The selective scan on a GPU: from checked CuPy arrays to launches of the kernels in cuda_src/.

What follows from shapes, strides, alignment and options alone (specialised kernels, grids, numbers) is a plan: made once, and
found again by calls on arrays of the same kind, which then only allocate and fill in pointers.
"""

import math
from typing import NamedTuple

from mambacupy import arrays, kernels
from mambacupy.ops import mapping
from mambacupy.reference import CHUNK, SelectiveScanGrads


# ---------------------------------------------------------------------------------------------------- memory order
def _is_native(x, axis):
    """Whether neighbours along `axis` are neighbours in memory and no element is split."""
    return (x.strides[axis] == x.itemsize or x.shape[axis] == 1) and _is_whole(x)


def _is_whole(x):
    """Whether every element lies at a multiple of its size, as kernels read it: pairs of a complex one, too."""
    return not any(s % x.itemsize for s in (kernels.address(x), *x.strides))


def _made_whole(args):
    """The arguments without views that split elements, such as complex ones of an odd number of floats a row."""
    split = {}
    for name in ("A", "B", "C", "D", "delta_bias", "initial_state"):
        x = getattr(args, name)
        if x is not None and not _is_whole(x):
            split[name] = x.copy()
    return args._replace(**split) if split else args


def _in_order(x, axis):
    """A copy of x in which `axis` is contiguous."""
    return x.copy() if axis == 2 else x.swapaxes(1, 2).copy().swapaxes(1, 2)


def _empty(xp, shape, dtype, axis):
    """Fresh memory (…, dim, length) in which length (axis 2) or dim (axis 1) is contiguous."""
    *outer, dim, length = shape
    return xp.empty(shape, dtype) if axis == 2 else xp.empty((*outer, length, dim), dtype).swapaxes(-1, -2)


def _widest_access(layout, axis, tensors, fresh_row):
    """Elements moved by one instruction: 16 bytes where all tensors are aligned for it, and the largest that fits else.

    They are neighbours in a tile: steps of it, or channels. `fresh_row` is the stride, in elements, of the rows of arrays that
    are yet to be allocated.
    """
    vector = min(16 // min(x.itemsize for x in tensors), layout.tile if axis == 2 else layout.block_channels)
    while fresh_row % vector or any(
        (kernels.address(x) | x.strides[0] | x.strides[3 - axis]) % (vector * x.itemsize) for x in tensors
    ):
        vector //= 2
    return vector


def _strides(x, **axes):
    """Strides of x by name, in elements, along the axes given; zeros for None."""
    return {name: 0 if x is None else x.strides[axis] // x.itemsize for name, axis in axes.items()}


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
    mapping: mapping.Mapping
    blocks_per_batch: int
    slices: list  # (slice of the states or None for all, launches)
    sums: list  # (name of parts, shape of parts, name of the gradient, launch), after the slices


_plans = {}


def _planned(make, args, delta_softplus, reverse, *incoming):
    """The plan `make(args, delta_softplus, reverse, *incoming)`, from memory where it was made before for arguments of the same
    kind; `incoming` are arrays or None."""
    given = (args.u, args.delta, args.A, args.B, args.C, args.D, args.z, args.delta_bias, args.initial_state, *incoming)
    key = (make, kernels.device(), args.zoh, delta_softplus, reverse, *map(_kind, given))
    plan = _plans.get(key)
    if plan is None:
        if len(_plans) >= 1024:
            _plans.clear()
        plan = _plans[key] = make(args, delta_softplus, reverse, *incoming)
    return plan


def _kind(x):
    """All of an array that a plan depends on: an access is up to 32 bytes wide, where dy is wider than u."""
    return None if x is None else (x.dtype.num, x.shape, x.strides, kernels.address(x) & 31)


class _Common(NamedTuple):
    """What the plans of both directions share."""

    axis: int
    copied: tuple
    constants: dict
    numbers: dict
    blocks_per_batch: int


def _common(args, layout, tensors, delta_softplus, reverse):
    """`tensors` are those of u's shape, by name, without those that are None."""
    axis = 1 if args.u.strides[2] != args.u.itemsize and _is_native(args.u, 1) else 2
    copied = tuple(name for name, x in tensors.items() if not _is_native(x, axis))
    tensors = {name: _in_order(x, axis) if name in copied else x for name, x in tensors.items()}
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
        "VECTOR": _widest_access(layout, axis, tensors.values(), fresh_row),
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
        **_strides(args.A, A_dim=0, A_state=1),
        **_strides(args.D, D_dim=0),
        **_strides(args.delta_bias, bias_dim=0),
    }
    for name in ("u", "delta", "z", "dy"):
        numbers |= _strides(tensors.get(name), **{f"{name}_batch": 0, f"{name}_row": 3 - axis})
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

    def prepare(carries_only):
        constants = common.constants | {"CARRIES_ONLY": carries_only}
        return kernels.get(file, name, constants, layout.shared_bytes).prepare(blocks, layout.threads * layout.teams, numbers)

    if layout.splits == 1:
        return [prepare(0)]
    real = kernels.C_TYPES[arrays.compute_dtype(args.u.dtype).name]
    types = {"BACKWARD": backward, "STATE_T": f"Complex<{real}>" if args.complex else real, "REAL": real}
    combine = kernels.get("combine_carries.cu", "combine_carries", types)
    numbers = numbers | {"batch": args.batch} | _strides(entering, enters_batch=0, enters_dim=1, enters_state=2)
    states = args.batch * args.dim * numbers["state"]
    return [prepare(1), combine.prepare(-(-states // 256), 256, numbers), prepare(0)]


_LAST_AXIS_IS_STATE = {
    "A", "initial_state", "last_state", "states", "carries", "enters",
    "dlast_state", "dinitial_state", "dA_parts", "dB_parts", "dC_parts",
}  # fmt: skip


def _slice_of(given, here):
    """The arrays of a launch, cut to a slice of the states."""
    if here is None:
        return given
    cut = {}
    for name, x in given.items():
        if x is None:
            cut[name] = None
        elif name in _LAST_AXIS_IS_STATE or (name in "BC" and x.ndim == 2):
            cut[name] = x[..., here]
        else:
            cut[name] = x[:, :, here] if name in "BC" else x
    return cut


def _arrays(args, plan, tensors, outputs):
    """What both directions hand to their launches."""
    xp, real = args.xp, arrays.compute_dtype(args.u.dtype)
    given = {"A": args.A, "B": args.B, "C": args.C, "D": args.D, "delta_bias": args.delta_bias, **tensors, **outputs}
    for name in plan.copied:
        given[name] = _in_order(given[name], plan.axis)
    given["carries"] = given["totals"] = None
    if plan.mapping.splits > 1:
        given["carries"] = xp.empty((args.batch, plan.mapping.splits, args.dim, args.state), args.A.dtype)
        given["totals"] = xp.empty((args.batch, plan.mapping.splits, args.dim), real)
    return given


def _run(plan, given, between):
    """Launch slice by slice; `between(is_first, is_last)` gives the arrays by which one adds to the one before."""
    last = len(plan.slices) - 1
    for index, (here, launches) in enumerate(plan.slices):
        now = _slice_of(given | between(index == 0, index == last), here)
        for launch in launches:
            launch(now)


# ---------------------------------------------------------------------------------------------------- forward
def _plan_forward(args, delta_softplus, reverse):
    most = mapping.states_of_a_launch(args, forward=True)
    layout = mapping.forward(args, min(args.state, most), kernels.device())
    tensors = {name: x for name, x in (("u", args.u), ("delta", args.delta), ("z", args.z)) if x is not None}
    common = _common(args, layout, tensors, delta_softplus, reverse)
    numbers = common.numbers | _strides(args.initial_state, init_batch=0, init_dim=1, init_state=2)
    slices = [
        (here, _launches(args, layout, "selective_scan_fwd", common, numbers | {"state": count}, args.initial_state, 0))
        for here, count in _slices(args.state, most)
    ]
    return _Plan(common.axis, common.copied, layout, common.blocks_per_batch, slices, [])


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
    args = _made_whole(args)
    plan = _planned(_plan_forward, args, bool(delta_softplus), bool(reverse))
    y = _empty(xp, args.u.shape, args.u.dtype, plan.axis)
    tensors = {"u": args.u, "delta": args.delta, "z": args.z}
    outputs = {"y": y, "last_state": last_state, "states": states}
    given = _arrays(args, plan, tensors, outputs) | {"initial_state": args.initial_state, "enters": args.initial_state}
    parts = None
    if len(plan.slices) > 1:  # every slice of the states but the last leaves its part of Σ_n C·h here
        parts = _empty(xp, args.u.shape, arrays.compute_dtype(args.u.dtype), plan.axis)
    _run(plan, given, lambda first, last: {"parts_in": None if first else parts, "parts_out": None if last else parts})
    return y, last_state, states


# ---------------------------------------------------------------------------------------------------- backward
def _plan_backward(args, delta_softplus, reverse, dy, dlast_state):
    most = mapping.states_of_a_launch(args, forward=False)
    layout = mapping.backward(args, min(args.state, most), kernels.device())
    tensors = {"u": args.u, "delta": args.delta, "z": args.z, "dy": dy}
    tensors = {name: x for name, x in tensors.items() if x is not None}
    common = _common(args, layout, tensors, delta_softplus, reverse)
    common = common._replace(constants=common.constants | {"DY_T": kernels.C_TYPES[dy.dtype.name]})
    numbers = common.numbers | {"plane": args.u.size}
    numbers |= _strides(dlast_state, dlast_batch=0, dlast_dim=1, dlast_state_stride=2)
    slices = [
        (here, _launches(args, layout, "selective_scan_bwd", common, numbers | {"state": count}, dlast_state, 1))
        for here, count in _slices(args.state, most)
    ]
    return _Plan(common.axis, common.copied, layout, common.blocks_per_batch, slices, _plan_sums(args, layout, common))


def _plan_sums(args, layout, common):
    """Sums over blocks: those over batch and time of constants, and those over channels of varying B and C."""
    count = args.batch * layout.splits
    sums = [("dA", (count, args.dim, args.state), _sum_of_constant(args, args.A, count))]
    for name, x in (("dD", args.D), ("dbias", args.delta_bias)):
        if x is not None:
            sums.append((name, (count, args.dim), _sum_of_constant(args, x, count)))
    for name, x, groups in (("dB", args.B, args.groups_B), ("dC", args.C, args.groups_C)):
        if groups == 0:
            sums.append((name, (count, args.dim, args.state), _sum_of_constant(args, x, count)))
        else:
            shape = (args.batch, common.blocks_per_batch, args.length, args.state)
            sums.append((name, shape, _sum_of_varying(args, x, groups, common.blocks_per_batch // groups)))
    return sums


def _sum_constants(args, out_dtype, shares):
    real = kernels.C_TYPES[arrays.compute_dtype(args.u.dtype).name]
    return {"REAL": real, "OUT_T": kernels.C_TYPES[arrays.real_of(out_dtype).name], "REALS": 1 + args.complex, "SHARES": shares}


def _sum_of_constant(args, x, count):
    size = x.size * (2 if x.dtype.kind == "c" else 1)
    unused = dict.fromkeys(("rows", "columns", "out_outer", "out_column", "out_row", "out_real", "out_groups", "out_group"), 0)
    shares = 1 if count <= 16 else 32
    kernel = kernels.get("sum_parts.cu", "sum_parts", _sum_constants(args, x.dtype, shares))
    return kernel.prepare(-(-size * shares // 256), 256, unused | {"count": count, "size": size})


def _sum_of_varying(args, x, groups, count):
    """The gradient is C-contiguous in x's shape: (batch, groups, state, length), or interleaved."""
    columns = args.state * (1 + args.complex)
    blocks = args.batch * groups * -(-args.length // 32) * -(-columns // 32)
    row = args.length * (1 + args.complex)  # reals of one state
    numbers = {
        "count": count, "size": 0, "rows": args.length, "columns": columns, "out_groups": groups,
        "out_outer": groups * args.state * row, "out_group": args.state * row, "out_column": row,
        "out_row": 1 + args.complex, "out_real": 1,
    }  # fmt: skip
    return kernels.get("sum_parts.cu", "sum_turned", _sum_constants(args, x.dtype, 1)).prepare(blocks, 256, numbers)


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
    args = _made_whole(args)
    if dlast_state is not None and not _is_whole(dlast_state):
        dlast_state = dlast_state.copy()
    plan = _planned(_plan_backward, args, bool(delta_softplus), bool(reverse), dy, dlast_state)
    real = arrays.compute_dtype(args.u.dtype)
    du, ddelta = (_empty(xp, args.u.shape, args.u.dtype, plan.axis) for _ in range(2))
    dz = None if args.z is None else _empty(xp, args.u.shape, args.u.dtype, plan.axis)
    outputs = {"du": du, "ddelta": ddelta, "dz": dz, "dinitial_state": dinitial, "dD_parts": None, "dbias_parts": None}
    for name, shape, _ in plan.sums:
        outputs[f"{name}_parts"] = xp.empty(shape, args.A.dtype if len(shape) > 2 else real)
    tensors = {"u": args.u, "delta": args.delta, "z": args.z, "dy": dy}
    given = _arrays(args, plan, tensors, outputs)
    given |= {"states": states, "dlast_state": dlast_state, "enters": dlast_state}
    between = None
    if len(plan.slices) > 1:  # every slice of the states but the last leaves its part of the sums over n here
        between = _empty(xp, (3, *args.u.shape), real, plan.axis)
    _run(plan, given, lambda first, last: {"sums_in": None if first else between, "sums_out": None if last else between})

    shapes = {"dA": args.A, "dD": args.D, "dbias": args.delta_bias, "dB": B, "dC": C}
    grads = dict.fromkeys(shapes)
    for name, _, launch in plan.sums:
        grads[name] = xp.empty(shapes[name].shape, shapes[name].dtype)
        launch({"parts": given[f"{name}_parts"], "out": grads[name]})
    return SelectiveScanGrads(du, ddelta, grads["dA"], grads["dB"], grads["dC"], grads["dD"], dz, grads["dbias"], dinitial)
