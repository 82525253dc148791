"""Products of two matrices on a GPU: cuBLAS, asked directly where CuPy's own way there is longer.

CuPy multiplies matrices of 16-bit numbers well, but a call takes the host some 40 us, copies a matrix whose rows lie apart,
rounds what is summed up in float32, adds to nothing, and refuses inside a stream's capture. The library that CuPy has loaded
can do all of it, by `cublasLtMatmul`, and chooses among its kernels once for all products of a kind. Other dtypes, and an
installation where it is not found, take CuPy's way.
"""

import ctypes
import functools
import sys
from types import SimpleNamespace

import numpy as np

from mambacupy import arrays, kernels
from mambacupy.ops import plans

__all__ = ["WORKSPACE_BYTES", "available", "product"]

WORKSPACE_BYTES = 32 * 2**20
"""Scratch memory that the library may ask for, at most."""

_TYPES = {"float32": 0, "float16": 2, "bfloat16": 14}  # of cudaDataType_t
_COMPUTE_32F = 68  # of cublasComputeType_t
_TRANSA, _TRANSB = 3, 4  # of cublasLtMatmulDescAttributes_t
_COUNT, _TO_NEXT = 5, 6  # of cublasLtMatrixLayoutAttribute_t: matrices, and how far from one to the next
_MOST_WORKSPACE, _ALIGNMENT_OF_A = 1, 5  # of cublasLtMatmulPreferenceAttributes_t; those of B, C and D follow
_16_BIT = {arrays.FLOAT_DTYPES["float16"], arrays.BFLOAT16}
_FACTORS = (ctypes.c_float * 2)(0, 1)
_ZERO, _ONE = ctypes.addressof(_FACTORS), ctypes.addressof(_FACTORS) + 4


def available(xp):
    """Whether 16-bit products go to the library directly, and so may be captured."""
    return _library(xp) is not None


def product(xp, a, b, out=None, accumulate=False, dtype=None, workspace=None):
    """a @ b.

    Parameters
    ----------
    xp : module
        cupy.
    a, b : array (rows, inner), (inner, columns)
        Of one dtype.
    out : array (rows, columns) or (parts, rows, columns), optional
        C-contiguous; where the product goes. It has no part in a and b. With parts, of which inner is a multiple, it is that of
        equal parts of inner, each by itself: for whoever adds them up where it reads them.
    accumulate : bool
        Add to what is in `out`.
    dtype : dtype, optional
        Of the product, where there is no `out`: a's by default, or float32, in which 16-bit products are summed up.
    workspace : array of WORKSPACE_BYTES, optional
        Scratch memory; a capture needs it, because what the pool lends is lent to others when the graph runs.

    Returns
    -------
    array (rows, columns), or `out`
    """
    made = out
    if a.dtype in _16_BIT and a.dtype == b.dtype and 0 not in a.shape and b.shape[1] and _library(xp) is not None:
        if made is None:
            made = xp.empty((a.shape[0], b.shape[1]), a.dtype if dtype is None else dtype)
        if _multiplied(xp, a, b, made, accumulate, workspace):
            return made
    result = _by_operator(a, b)
    if out is None:
        return result if dtype is None else result.astype(dtype, copy=False)
    if out.ndim == 3:  # one part has all of it
        if not accumulate:
            out[1:] = 0
        made = out[0]
    made[...] = result + made if accumulate else result
    return out


def _by_operator(a, b):
    """a @ b. CuPy takes a product with one element for elementwise arithmetic, and would round each of its terms: that one is
    float32."""
    if a.shape[0] == b.shape[1] == 1:
        real = arrays.compute_dtype(a.dtype)
        return (a.astype(real, copy=False) @ b.astype(real, copy=False)).astype(a.dtype, copy=False)
    return a @ b


def _multiplied(xp, a, b, out, accumulate, workspace):
    """Whether the library has done it."""
    plan = plans.planned(_plan, (xp, a, b, out), (a, b, out), ())
    if plan is None:
        return False
    if plan.copied:
        return _multiplied(xp, *(x if _layout(x) else xp.ascontiguousarray(x) for x in (a, b)), out, accumulate, workspace)
    if workspace is None and plan.workspace_bytes:
        workspace = xp.empty(plan.workspace_bytes, np.dtype(np.uint8))
    plan.run(xp, *map(kernels.address, (a, b, out, workspace)), _ONE if accumulate else _ZERO)
    return True


def _plan(xp, a, b, out):
    """How matrices of a kind are multiplied; None where the library does not."""
    copied = not (_layout(a) and _layout(b))
    plan = SimpleNamespace(copied=True) if copied else _Plan(_library(xp), xp, a, b, out)
    return plan if copied or plan.found else None


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


class _Plan:
    """How the library multiplies matrices of a kind. It counts along columns: what is asked of it is outᵀ = bᵀ·aᵀ."""

    copied = False

    def __init__(self, library, xp, a, b, out):
        self.library, self.made = library, []
        (a_transposed, a_stride), (b_transposed, b_stride) = _layout(a), _layout(b)
        self.operation = self._make("MatmulDesc", _COMPUTE_32F, _TYPES["float32"])
        for attribute, transposed in ((_TRANSA, b_transposed), (_TRANSB, a_transposed)):
            self._set("MatmulDesc", self.operation, attribute, ctypes.c_int32(transposed))
        (rows, columns), kind = out.shape[-2:], _TYPES[a.dtype.name]
        parts = out.shape[0] if out.ndim == 3 else 1
        inner = a.shape[1] // parts
        self.b = self._make("MatrixLayout", kind, *((inner, columns) if b_transposed else (columns, inner)), b_stride)
        self.a = self._make("MatrixLayout", kind, *((rows, inner) if a_transposed else (inner, rows)), a_stride)
        self.out = self._make("MatrixLayout", _TYPES[out.dtype.name], columns, rows, columns)
        if parts > 1:
            far = inner * (1 if b_transposed else b_stride), inner * (a_stride if a_transposed else 1), rows * columns
            for layout, to_next in zip((self.b, self.a, self.out), far, strict=True):
                self._set("MatrixLayout", layout, _COUNT, ctypes.c_int32(parts))
                self._set("MatrixLayout", layout, _TO_NEXT, ctypes.c_int64(to_next))
        preference = self._make("MatmulPreference")
        self._set("MatmulPreference", preference, _MOST_WORKSPACE, ctypes.c_uint64(WORKSPACE_BYTES))
        for i, x in enumerate((b, a, out, out)):
            aligned = kernels.address(x) & 31  # as much of the address as plans are told apart by
            self._set("MatmulPreference", preference, _ALIGNMENT_OF_A + i, ctypes.c_uint32(aligned & -aligned or 32))
        self.choice, count = _Choice(), ctypes.c_int(0)
        layouts = self.b, self.a, self.out, self.out
        status = library.cublasLtMatmulAlgoGetHeuristic(
            _handle(xp), self.operation, *layouts, preference, 1, ctypes.byref(self.choice), ctypes.byref(count)
        )
        self.found = not status and count.value == 1 and not self.choice.status
        self.workspace_bytes = self.choice.workspace_bytes
        self.algorithm = ctypes.addressof(self.choice)

    def run(self, xp, a, b, out, workspace, beta):
        """Launch, given addresses."""
        stream = xp.cuda.get_current_stream().ptr
        _succeed(
            self.library.cublasLtMatmul(
                _handle(xp), self.operation, _ONE, b, self.b, a, self.a, beta, out, self.out, out, self.out, self.algorithm,
                workspace if self.workspace_bytes else None, self.workspace_bytes, stream,
            )
        )  # fmt: skip

    def _make(self, kind, *given):
        pointer = ctypes.c_void_p()
        _succeed(getattr(self.library, f"cublasLt{kind}Create")(ctypes.byref(pointer), *given))
        self.made.append((kind, pointer.value))
        return pointer.value

    def _set(self, kind, of, attribute, value):
        _succeed(getattr(self.library, f"cublasLt{kind}SetAttribute")(of, attribute, ctypes.byref(value), ctypes.sizeof(value)))

    def __del__(self):
        for kind, pointer in self.made:
            getattr(self.library, f"cublasLt{kind}Destroy")(pointer)


class _Choice(ctypes.Structure):
    """cublasLtMatmulHeuristicResult_t, which begins with the algorithm."""

    _fields_ = [
        ("algorithm", ctypes.c_uint64 * 8), ("workspace_bytes", ctypes.c_size_t), ("status", ctypes.c_int),
        ("waves", ctypes.c_float), ("_", ctypes.c_int * 4),
    ]  # fmt: skip


def _succeed(status):
    if status:
        raise RuntimeError(f"product: cuBLAS answers with status {status}")


def _handle(xp):
    """CuPy's of this thread and device; one of cuBLAS is one of its light library too."""
    return xp.cuda.device.get_cublas_handle()


@functools.cache
def _library(xp):
    """The cuBLASLt that CuPy's cuBLAS has loaded, or None."""
    if xp.__name__ != "cupy":
        return None
    _handle(xp)  # loads it
    major = xp.cuda.runtime.runtimeGetVersion() // 1000
    try:
        library = ctypes.CDLL(f"cublasLt64_{major}.dll" if sys.platform == "win32" else f"libcublasLt.so.{major}")
        return _declared(library)
    except (OSError, AttributeError):
        return None


def _declared(library):
    """The library with the types of what its functions take."""
    pointer, number, size = ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t
    takes = {
        "MatmulDescCreate": [pointer, number, number],
        "MatrixLayoutCreate": [pointer, number, ctypes.c_uint64, ctypes.c_uint64, ctypes.c_int64],
        "MatmulPreferenceCreate": [pointer],
        "MatmulAlgoGetHeuristic": [pointer] * 7 + [number, pointer, pointer],
        "Matmul": [pointer] * 14 + [size, pointer],
    }
    for kind in ("MatmulDesc", "MatrixLayout", "MatmulPreference"):
        takes[f"{kind}Destroy"] = [pointer]
        takes[f"{kind}SetAttribute"] = [pointer, number, pointer, size]
    for name, types in takes.items():
        function = getattr(library, f"cublasLt{name}")
        function.argtypes, function.restype = types, ctypes.c_int
    return library
