"""Products of two matrices on a GPU: cuBLAS, asked directly where CuPy's own way there is longer.

CuPy multiplies matrices of 16-bit numbers well, but a call takes the host some 40 us, copies a matrix whose rows lie apart,
rounds what is summed up in float32, adds to nothing, and refuses inside a stream's capture. The library that CuPy has loaded
can do all of it, by `cublasGemmEx`. Other dtypes, and an installation where it is not found, take CuPy's way.
"""

import ctypes
import functools
import sys

from mambacupy import arrays, kernels

__all__ = ["product"]

_TYPES = {"float32": 0, "float16": 2, "bfloat16": 14}  # cudaDataType_t
_COMPUTE_32F, _DEFAULT_ALGORITHM = 68, -1
_MOST = 2**31 - 1


def product(xp, a, b, out=None, accumulate=False, dtype=None):
    """a @ b.

    Parameters
    ----------
    xp : module
        cupy.
    a, b : array (rows, inner), (inner, columns)
        Of one dtype.
    out : array (rows, columns), optional
        C-contiguous; where the product goes. It has no part in a and b.
    accumulate : bool
        Add to what is in `out`.
    dtype : dtype, optional
        Of the product, where there is no `out`: a's by default, or float32, in which 16-bit products are summed up.

    Returns
    -------
    array (rows, columns)
    """
    made = out
    if a.dtype.name in _16_BIT and a.dtype == b.dtype and 0 not in a.shape and b.shape[1] and _library(xp) is not None:
        (a, left), (b, right) = _laid_out(xp, a), _laid_out(xp, b)
        if max(*a.shape, *b.shape, left[1], right[1]) <= _MOST:
            if made is None:
                made = xp.empty((a.shape[0], b.shape[1]), dtype or a.dtype)
            _multiply(xp, a, left, b, right, made, accumulate)
            return made
    result = _by_operator(a, b)
    if out is None:
        return result if dtype is None else result.astype(dtype, copy=False)
    out[...] = result + out if accumulate else result
    return out


def _by_operator(a, b):
    """a @ b. CuPy takes a product with one element for elementwise arithmetic, and would round each of its terms: that one is
    float32."""
    if a.shape[0] == b.shape[1] == 1:
        real = arrays.compute_dtype(a.dtype)
        return (a.astype(real, copy=False) @ b.astype(real, copy=False)).astype(a.dtype, copy=False)
    return a @ b


_16_BIT = ("float16", "bfloat16")


def _layout(x):
    """(transposed, stride): whether columns of x are contiguous instead of rows, and how far from one to the next, in elements;
    None where neither is contiguous."""
    (rows, columns), item = x.shape, x.itemsize
    for transposed, (count, size), (far, near) in ((0, x.shape, x.strides), (1, (columns, rows), x.strides[::-1])):
        if near != item and size != 1:
            continue
        if count == 1:
            return transposed, max(1, size)
        if far >= size * item and far % item == 0:
            return transposed, far // item
    return None


def _laid_out(xp, x):
    """x, or a copy where it has no layout, and its layout."""
    layout = _layout(x)
    return (x, layout) if layout else (xp.ascontiguousarray(x), (0, max(1, x.shape[1])))


def _multiply(xp, a, left, b, right, out, accumulate):
    """cuBLAS counts along columns: what is asked of it is outᵀ = bᵀ·aᵀ."""
    library, handle = _library(xp), ctypes.c_void_p(xp.cuda.device.get_cublas_handle())
    _succeed(library.cublasSetStream_v2(handle, ctypes.c_void_p(xp.cuda.get_current_stream().ptr)))
    kind, (rows, inner), columns = _TYPES[a.dtype.name], a.shape, b.shape[1]
    (b_transposed, b_stride), (a_transposed, a_stride) = right, left
    _succeed(
        library.cublasGemmEx(
            handle, b_transposed, a_transposed, columns, rows, inner, ctypes.byref(ctypes.c_float(1)),
            ctypes.c_void_p(kernels.address(b)), kind, b_stride, ctypes.c_void_p(kernels.address(a)), kind, a_stride,
            ctypes.byref(ctypes.c_float(accumulate)), ctypes.c_void_p(kernels.address(out)), _TYPES[out.dtype.name], columns,
            _COMPUTE_32F, _DEFAULT_ALGORITHM,
        )
    )  # fmt: skip


def _succeed(status):
    if status:
        raise RuntimeError(f"product: cuBLAS answers with status {status}")


@functools.cache
def _library(xp):
    """The cuBLAS that CuPy has loaded, or None."""
    if xp.__name__ != "cupy":
        return None
    xp.cuda.device.get_cublas_handle()  # loads it
    major = xp.cuda.runtime.runtimeGetVersion() // 1000
    try:
        library = ctypes.CDLL(f"cublas64_{major}.dll" if sys.platform == "win32" else f"libcublas.so.{major}")
        for name in ("cublasSetStream_v2", "cublasGemmEx"):
            getattr(library, name).restype = ctypes.c_int
        return library
    except (OSError, AttributeError):
        return None
