"""What all launches on a GPU share: plans, the order of arrays in memory, and sums over blocks.

What follows from shapes, strides, alignment and options alone (specialised kernels, grids, numbers) is a plan: made once, and
found again by calls on arrays of the same kind, which then only allocate and fill in pointers.
"""

import math
from typing import NamedTuple

from mambacupy import kernels
from mambacupy.ops.mapping import power_of_two

_plans = {}


def planned(make, given, tensors, options):
    """What `make(*given)` returns, from memory where it was called before with such arrays and options.

    Parameters
    ----------
    make : callable
        Checks the arguments, where that was not done before, and makes a plan. None is not remembered: it stands for whatever
        needs no plan.
    given : tuple
        Its arguments.
    tensors : sequence of array or None
        All arrays among them. A plan may depend on what they are, where they are and how they lie, not on what they hold.
    options : tuple
        All else that the checks and the plan depend on.
    """
    try:
        key = (make, *options, *map(_kind, tensors))
        plan = _plans.get(key)
    except (AttributeError, TypeError, ValueError):  # not only CuPy arrays, or an option that is no key
        key = plan = None
    if plan is None:
        plan = make(*given)  # not while that error is handled: whatever make complains of stands for itself
        if key is not None and plan is not None:
            _remember(key, plan)
    return plan


def prepared(file, name, constants, blocks, threads, numbers):
    """A launch as `kernels.Kernel.prepare` makes it, of the kernel `name` of a file; from memory where it was made before."""
    key = (file, name, blocks, threads, *constants.items(), *numbers.items())
    return _remembered(key, _prepare, file, name, constants, blocks, threads, numbers)


def _remembered(key, make, *given):
    plan = _plans.get(key)
    if plan is None:
        plan = make(*given)
        _remember(key, plan)
    return plan


def _remember(key, plan):
    if len(_plans) >= 1024:
        _plans.clear()
    _plans[key] = plan


def _kind(x):
    """All of a CuPy array that a plan depends on: an access is up to 32 bytes wide, where dy is wider than u."""
    if x is None:
        return None
    data = x.data
    return type(x), x.dtype, x.shape, x.strides, data.ptr & 31, data.device_id


def _prepare(file, name, constants, blocks, threads, numbers):
    return kernels.get(file, name, constants).prepare(blocks, threads, numbers)


# ---------------------------------------------------------------------------------------------------- sums over blocks
class Sum(NamedTuple):
    """out[o][n][t] = Σ_j parts[o][j][t][n], of `outer` o, `count` j, `rows` t and `columns` n: a plain sum where rows is 1.

    Parts and `out` are contiguous and begin aligned, as fresh memory does. A complex value is two columns.
    """

    out: str  # name of its dtype, without "complex"
    count: int
    columns: int
    rows: int = 1
    outer: int = 1
    stride: int = 0  # numbers from one part to the next, where there are more than rows·columns


MOST_SUMS = 5
"""Sums in a launch, as sum_parts.cu has them."""

OUTPUTS_OF_A_THREAD, PARTS_AHEAD = 4, 6
"""Of sum_parts.cu: outputs of a thread, and how many parts of them it reads at once."""

ENOUGH_THREADS = 2**17
"""Threads of a sum that keep the memory of a large GPU busy: 1024 for each of 128 multiprocessors, more than run at once, so
that none is left with a block of its own at the end."""

_TYPES = {"float16": 1, "bfloat16": 2}


def sums_of_parts(real, sums, reals=1, places=None, overlap=False):
    """The launch that adds up parts in a fixed order. It takes addresses, of which the first is null.

    Parameters
    ----------
    real : str
        Name of the dtype of all parts.
    sums : tuple of Sum
        At most MOST_SUMS; an `out` is of the dtype `real`, or of 16 bits.
    reals : int
        2 where values are complex.
    places : tuple of int, optional
        Where among the addresses parts and out of each of `sums` are, in turn: right behind the null by default.
    overlap : bool
        Let it begin while the kernel in front of it ends, which leaves the parts.
    """
    places = places or tuple(range(1, 2 * len(sums) + 1))
    return _remembered(("sums", real, sums, reals, places, overlap), _prepare_sums, real, sums, reals, places, overlap)


def _prepare_sums(real, sums, reals, places, overlap):
    layouts = [_layout_of_sum(x, real) for x in sums]
    layouts += [dict.fromkeys(layouts[0], 0)] * (MOST_SUMS - len(sums))
    numbers = {f"{name}{k}": value for k, layout in enumerate(layouts) for name, value in layout.items()} | {"reals": reals}
    blocks = sum(layout["blocks"] for layout in layouts)
    names = [f"{name}{k}" for k in range(MOST_SUMS) for name in ("parts", "out")]
    order = dict.fromkeys(names, 0) | dict(zip(names, places, strict=False))
    constants = {"REAL": kernels.C_TYPES[real]} | ({"OVERLAP": 1} if overlap else {})
    kernel = kernels.get("sum_parts.cu", "sum_parts", constants)
    return kernel.prepare(blocks, 256, numbers, order=order, **({"overlap": True} if overlap else {}))


def _layout_of_sum(x, real):
    """The numbers of a sum. Threads share an output where outputs alone make too few threads, until each has no more parts than
    it reads at once. A tile has 32 columns, whole lines of memory, and more where there are few rows."""
    outputs, shares = x.outer * x.rows * x.columns, 1
    while shares < 32 and shares * PARTS_AHEAD < x.count and outputs * shares < ENOUGH_THREADS * OUTPUTS_OF_A_THREAD:
        shares *= 2
    tile, stride = 256 * OUTPUTS_OF_A_THREAD // shares, x.stride or x.rows * x.columns
    wide = min(power_of_two(x.columns), max(32, tile // power_of_two(x.rows)))
    blocks = x.outer * -(-x.rows // (tile // wide)) * -(-x.columns // wide)
    widest = 2 if real == "float64" else 4  # numbers in 16 bytes
    return {
        "blocks": blocks, "count": x.count, "stride": stride, "rows": x.rows, "columns": x.columns,
        "shares": shares, "wide": wide, "vector": 1 if x.columns % widest or stride % widest else widest,
        "type": 0 if x.out == real else _TYPES[x.out],
    }  # fmt: skip


# ---------------------------------------------------------------------------------------------------- memory
def is_whole(x):
    """Whether every element lies at a multiple of its size, as kernels read it: pairs of a complex one, too."""
    return math.gcd(x.itemsize, kernels.address(x), *x.strides) == x.itemsize


def whole(x):
    """x, or a copy of it where an element does not lie at a multiple of its size. None stays None."""
    return x if x is None or is_whole(x) else x.copy()


def is_native(x, axis):
    """Whether neighbours along `axis` are neighbours in memory and no element is split."""
    return (x.strides[axis] == x.itemsize or x.shape[axis] == 1) and is_whole(x)


def in_order(x, axis):
    """A copy of x (batch, dim, length) in which `axis` is contiguous."""
    return x.copy() if axis == 2 else x.swapaxes(1, 2).copy().swapaxes(1, 2)  # (batch, length, dim) in between


def empty(xp, shape, dtype, axis):
    """Fresh memory (…, dim, length) in which length (axis 2) or dim (axis 1) is contiguous."""
    *outer, dim, length = shape
    return xp.empty(shape, dtype) if axis == 2 else xp.empty((*outer, length, dim), dtype).swapaxes(-1, -2)


def fresh_strides(x, axis):
    """Strides of fresh memory of x's shape (batch, dim, length), and dtype, in which `axis` is contiguous."""
    (_, dim, length), size = x.shape, x.itemsize
    return (dim * length * size, size, dim * size) if axis == 1 else None


def strides(x, **axes):
    """Strides of x by name, in elements, along the axes given; zeros for None."""
    return {name: 0 if x is None else x.strides[axis] // x.itemsize for name, axis in axes.items()}


def widest_access(axis, tensors, most=16):
    """Elements moved by one instruction: 16 bytes where all tensors are aligned for it, and the largest that fits else.

    Parameters
    ----------
    axis : int
        The contiguous one, 1 or 2; a pack of elements divides it, so that it fits arrays yet to be allocated.
    tensors : sequence of arrays (batch, dim, length)
        Of one shape, no element split.
    most : int
        A power of two.
    """
    most = min(most, 16 // min(x.itemsize for x in tensors))
    starts = (n // x.itemsize for x in tensors for n in (kernels.address(x), x.strides[0], x.strides[3 - axis]))
    return math.gcd(most, tensors[0].shape[axis], *starts)


TOGETHER = 2**23
"""Bytes up to which arrays share an allocation: a GPU has filled them before the host could allocate one by one, and an array
that is kept keeps no more than this beside it."""


class Fresh(NamedTuple):
    """One allocation of a call."""

    size: int
    names: tuple  # of arrays, and of what kernels alone see, by its address
    starts: tuple  # of these
    arrays: tuple  # (start, shape, dtype, strides or None where C-contiguous)


def fresh(arrays, scratch=None):
    """How to allocate arrays: together, or one by one where they are large.

    Parameters
    ----------
    arrays : dict
        (shape, dtype, strides or None) by name.
    scratch : dict, optional
        Bytes by name.

    Returns
    -------
    list of Fresh
        For `allocate`.
    """
    sizes = {name: math.prod(shape) * dtype.itemsize for name, (shape, dtype, _) in arrays.items()}
    starts, size = room(sizes | (scratch or {}))
    if size > TOGETHER and len(starts) > 1:
        alone = [fresh({name: x}) for name, x in arrays.items()] + [fresh({}, {name: n}) for name, n in (scratch or {}).items()]
        return [one for (one,) in alone]
    placed = tuple((starts[name], *x) for name, x in arrays.items())
    return [Fresh(size, tuple(starts), tuple(starts.values()), placed)] if starts else []


def allocate(xp, allocations):
    """Fresh arrays; the addresses of these and of scratch; and what scratch lasts as long as.

    Returns
    -------
    arrays, addresses, held : list
        In the order of the names in `allocations`.
    """
    made, addresses, held, ndarray = [], [], [], xp.ndarray
    for size, _, starts, arrays in allocations:
        memory = xp.cuda.alloc(size)
        first = memory.ptr
        made += [ndarray(shape, dtype, memory + start, strides) for start, shape, dtype, strides in arrays]
        addresses += [first + start for start in starts]
        held.append(memory)
    return made, addresses, held


def room(sizes):
    """Where arrays of so many bytes begin in one allocation, by name, aligned as a fresh one; and the size of all."""
    starts, size = {}, 0
    for name, count in sizes.items():
        starts[name] = size
        size += -(-count // 256) * 256
    return starts, size
