"""AdamW's step, clipping and rounding over many arrays at once.

NumPy arrays run `mambacupy.reference.training`; CuPy arrays run cuda_src/adamw.cu, cuda_src/clip.cu and cuda_src/round.cu, one
launch for all arrays of the same dtypes: a launch for each would take the host longer than the GPU.
"""

import math
import struct

import numpy as np

from mambacupy import arrays, kernels
from mambacupy.ops import plans, rows
from mambacupy.reference import training as reference

__all__ = ["adamw", "clip", "rounded"]

THREADS, ITEMS = 256, 4
"""Of a block, and packs of a thread, as cuda_src/many.cuh has them."""


def adamw(params, grads, means, squares, decays, numbers):
    """A step of `mambacupy.optim.AdamW`.

    Parameters
    ----------
    params, grads, means, squares : list of array
        Of the same shapes. Means and squares float32, or float64 for float64 parameters.
    decays : list of bool
        For each array, whether `decay` applies to it.
    numbers : tuple of float
        β1, 1 - β1, β2, 1 - β2, 1 - β1^t, 1 - β2^t, eps, rate, decay.

    Returns
    -------
    params, means, squares : list of array
        In fresh memory and in the dtypes given.

    Raises
    ------
    TypeError
        Arrays are not all of one library and device.
    ValueError
        A shape differs from its parameter's.
    """
    named = {"params": params, "grads": grads, "means": means, "squares": squares}
    xp = _check("adamw", named)
    if xp is np:
        return reference.adamw(params, grads, means, squares, decays, numbers)
    with params[0].device:
        return _adamw(xp, params, grads, means, squares, decays, numbers)


def clip(grads, most):
    """Gradients scaled so that their norm, over all arrays together, is at most `most`.

    Parameters
    ----------
    grads : list of array
    most : float

    Returns
    -------
    grads : list of array
        In fresh memory and in their dtypes.
    norm : array ()
        Before, in float32, or float64 where a gradient is. Nothing waits for a GPU.
    """
    xp = _check("clip", {"grads": grads})
    if xp is np:
        return reference.clip(grads, most)
    with grads[0].device:
        return _clip(xp, grads, most)


def rounded(given, dtype):
    """Copies of float32 arrays in float16 or bfloat16.

    Parameters
    ----------
    given : list of array
    dtype : dtype

    Returns
    -------
    list of array
        In fresh memory.
    """
    xp = _check("rounded", {"given": given})
    if xp is np:
        return reference.rounded(given, dtype)
    with given[0].device:
        return _rounded(xp, given, dtype)


def _check(operation, named):
    """The library that all arrays share; they are alike in shape."""
    first, firsts = next(iter(named.items()))
    xp = arrays.library_of(operation, first, firsts[0])
    shapes = None
    for name, given in named.items():
        kinds = set(map(type, given))
        if kinds != {type(firsts[0])} or (xp is not np and len({x.data.device_id for x in (firsts[0], *given)}) > 1):
            for x in given:
                arrays.namespace(operation, **{f"{first}[0]": firsts[0], name: x})  # which complains
        own = [x.shape for x in given]
        shapes = shapes or own
        for shape, wanted in zip(own, shapes, strict=True) if own != shapes else ():
            if shape != wanted:
                raise ValueError(f"{operation}: {name} has an array of shape {shape}, wanted {wanted} as in {first}")
    return xp


def _adamw(xp, params, grads, means, squares, decays, numbers):
    given = [_plain(xp, nest) for nest in (params, grads, means, squares)]
    made = [_fresh(xp, nest) for nest in (params, means, squares)]
    facts = struct.unpack("9q", struct.pack("9d", *numbers))
    for dtypes, members in _groups(*given[:3]):
        many = _Many(xp, [[nest[i] for i in members] for nest in (*given, *made)], [int(decays[i]) for i in members], facts)
        constants = {name: kernels.C_TYPES[dtype] for name, dtype in zip(("P_T", "G_T", "REAL"), dtypes, strict=True)}
        many.launch("adamw.cu", "adamw", constants, many.blocks, {}, {})
    return made


def _clip(xp, grads, most):
    given = _plain(xp, grads)
    made = _fresh(xp, grads)
    groups = []
    for (dtype,), members in _groups(given):
        groups.append((dtype, _Many(xp, [[nest[i] for i in members] for nest in (given, made)])))
    count, first = sum(many.blocks for _, many in groups), 0
    real = "float64" if any(dtype == "float64" for dtype, _ in groups) else "float32"
    buffers = {"parts": xp.empty(max(1, count), np.dtype(real)), "result": xp.empty(2, np.dtype(real))}
    numbers = {"count": count, "most": struct.unpack("q", struct.pack("d", most))[0]}
    types = [{"X_T": kernels.C_TYPES[dtype], "REAL": kernels.C_TYPES[real]} for dtype, _ in groups]
    for (_, many), constants in zip(groups, types, strict=True):
        many.launch("clip.cu", "sum_of_squares", constants, many.blocks, buffers, numbers | {"first_part": first})
        first += many.blocks
    groups[0][1].launch("clip.cu", "clip_norm", types[0], 1, buffers, numbers | {"first_part": 0})
    for (_, many), constants in zip(groups, types, strict=True):
        many.launch("clip.cu", "clip_scale", constants, many.blocks, buffers, numbers | {"first_part": 0})
    return made, buffers["result"][0]


def _plain(xp, given):
    """Arrays as kernels read them: contiguous, and whole. Almost all are, and asked in the shortest way."""
    address = kernels.address
    return [x if x.flags.c_contiguous and not address(x) % x.itemsize else rows.contiguous(xp, x) for x in given]


def _rounded(xp, given, dtype):
    given = _plain(xp, given)
    made = _fresh(xp, given, dtype)
    many = _Many(xp, [given, made])
    many.launch("round.cu", "round_all", {"Y_T": kernels.C_TYPES[dtype.name]}, many.blocks, {}, {})
    return made


def _fresh(xp, like, dtype=None):
    """Arrays of these shapes and dtypes, or one dtype, in one allocation: hundreds, made where a step's activations have just
    been freed, would leave the pool in pieces too small for those of the next."""
    dtypes = [dtype or x.dtype for x in like]
    starts, size = plans.room({i: x.size * kind.itemsize for i, (x, kind) in enumerate(zip(like, dtypes, strict=True))})
    made = [(starts[i], x.shape, kind, None) for i, (x, kind) in enumerate(zip(like, dtypes, strict=True))]
    return plans.allocate(xp, [plans.Fresh(size, (), (), made)])[0]


def _groups(*nests):
    """For arrays of the same dtypes in all nests: the dtypes' names, and which places they have."""
    found = {}
    for i, numbers in enumerate(zip(*([x.dtype.num for x in nest] for nest in nests), strict=True)):
        found.setdefault(numbers, []).append(i)
    return [(tuple(nest[members[0]].dtype.name for nest in nests), members) for members in found.values()]


class _Many:
    """The table of cuda_src/many.cuh, for launches over arrays of the same dtypes.

    Parameters
    ----------
    xp : module
    lists : list of list of array
        A kernel's columns of addresses. An array's neighbours in the other lists have its size; all are contiguous.
    flags : list of int, optional
        A column before those.
    facts : sequence of int
        Numbers in front of the rows.
    """

    def __init__(self, xp, lists, flags=None, facts=()):
        addresses = np.array([[kernels.address(x) for x in one] for one in lists])
        widths = np.array([one[0].itemsize for one in lists])
        self.vector = math.gcd(16 // int(widths.max()), int(np.gcd.reduce(addresses // widths[:, None], axis=None)))
        sizes = tuple(x.size for x in lists[0])
        given = sizes, THREADS * ITEMS * self.vector
        device = getattr(getattr(lists[0][0], "device", None), "id", None)  # the plan holds an array there
        self.owner, firsts = plans.planned(_owners, (xp, *given), (), (*given, device))
        self.blocks = self.owner.size
        columns = [sizes, firsts, *([flags] if flags else []), *addresses]
        rows_of_table = np.array(columns, np.int64).T.ravel()
        self.table = xp.asarray(np.concatenate([np.array(facts, np.int64), rows_of_table]))

    def launch(self, file, name, constants, blocks, buffers, numbers):
        """Launch the kernel `name` of a file."""
        launch = plans.prepared(file, name, constants | {"VECTOR": self.vector}, blocks, THREADS, numbers)
        launch({"owner": self.owner, "table": self.table} | buffers)


def _owners(xp, sizes, chunk):
    """For each block the array of which it has a chunk; for each array its first block."""
    counts = [-(-size // chunk) for size in sizes]
    firsts = np.cumsum([0, *counts[:-1]])
    owner = xp.asarray(np.repeat(np.arange(len(sizes)), counts))
    if xp.__name__ == "cupy":  # the plan keeps it for every stream, so it has to be there
        xp.cuda.get_current_stream().synchronize()
    return owner, firsts
