"""What operations over the last axis share on a GPU: arrays as rows, the width of an access, and sums over rows."""

import math

from mambacupy import kernels
from mambacupy.ops import plans


def row_stride(x):
    """From one row of x (..., dim) to the next, in elements; None where a row is not contiguous or no one number says it."""
    if x.shape[-1] != 1 and x.strides[-1] != x.itemsize:
        return None
    stride = following = None
    for size, step in zip(reversed(x.shape[:-1]), reversed(x.strides[:-1]), strict=True):
        if size == 1:
            continue
        if stride is None:
            stride = step
        elif step != following:
            return None
        following = step * size
    if stride is None:  # there is one row
        return x.shape[-1]
    return None if stride % x.itemsize else stride // x.itemsize


def as_rows(xp, x):
    """x, or a contiguous copy where need be, and its `row_stride`."""
    stride = row_stride(x)
    return (x, stride) if stride is not None and not kernels.address(x) % x.itemsize else (x.copy(), x.shape[-1])


def contiguous(xp, x):
    """x, or a contiguous copy where need be; None stays None. An array that is contiguous may still split its elements."""
    return None if x is None else plans.whole(xp.ascontiguousarray(x))


def widest_access(dim, *tensors):
    """Elements moved by one instruction: the most with at most 16 bytes of the narrowest tensor for which rows of `dim` are
    whole packs and all rows begin aligned.

    Parameters
    ----------
    dim : int
        Also the row stride of arrays that are yet to be allocated.
    *tensors : (array, int, ...)
        An array of which no element is split, and its strides, in elements.
    """
    starts = (start for x, *strides in tensors for start in (kernels.address(x) // x.itemsize, *strides))
    return math.gcd(16 // min(x.itemsize for x, *_ in tensors), dim, *starts)


def sum_parts(xp, *pairs):
    """For each pair (parts, like) the sum of parts (count, size) over the first axis, in a fixed order, in the shape and dtype
    of `like`. Parts are fresh memory, of one dtype."""
    sums = tuple(plans.Sum(like.dtype.name, *parts.shape) for parts, like in pairs)
    outs = [xp.empty(like.shape, like.dtype) for _, like in pairs]
    in_turn = [x for (parts, _), out in zip(pairs, outs, strict=True) for x in (parts, out)]
    plans.sums_of_parts(pairs[0][0].dtype.name, sums)(kernels.addresses((None, *in_turn)))
    return outs
