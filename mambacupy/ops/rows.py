"""What operations over the last axis share on a GPU: arrays as rows, the width of an access, and launches made once."""

import functools

from mambacupy import kernels


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


def widest_access(dim, *tensors):
    """Elements moved by one instruction: the most with at most 16 bytes of the narrowest tensor for which rows of `dim` are
    whole packs and all rows begin aligned.

    Parameters
    ----------
    dim : int
        Also the row stride of arrays that are yet to be allocated.
    *tensors : (array, int, ...)
        An array and its strides, in elements.
    """
    vector = 16 // min(x.itemsize for x, *_ in tensors)
    while dim % vector or any(
        (kernels.address(x) % (vector * x.itemsize)) or any(stride % vector for stride in strides) for x, *strides in tensors
    ):
        vector //= 2
    return vector


@functools.lru_cache(1024)
def _prepared(file, name, constants, blocks, threads, numbers):
    return kernels.get(file, name, dict(constants)).prepare(blocks, threads, dict(numbers))


def launch(file, name, constants, blocks, threads, numbers, arrays):
    """Launch the kernel `name` of a file; what does not change from call to call is made once (kernels.Kernel.prepare)."""
    _prepared(file, name, tuple(constants.items()), blocks, threads, tuple(numbers.items()))(arrays)


def sum_parts(xp, parts, like):
    """Sum of parts (count, size) over the first axis, in a fixed order, in the shape and dtype of `like`."""
    count, size = parts.shape
    out = xp.empty(like.shape, like.dtype)
    shares = 1 if count <= 16 else 32  # threads that share an output
    types = {"REAL": kernels.C_TYPES[parts.dtype.name], "OUT_T": kernels.C_TYPES[like.dtype.name], "REALS": 1, "SHARES": shares}
    unused = dict.fromkeys(("rows", "columns", "out_outer", "out_column", "out_row", "out_real", "out_groups", "out_group"), 0)
    numbers = {"count": count, "size": size} | unused
    launch("sum_parts.cu", "sum_parts", types, -(-size * shares // 256), 256, numbers, {"parts": parts, "out": out})
    return out
