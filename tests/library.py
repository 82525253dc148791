"""A stand-in for cuBLAS that multiplies on the host's memory."""

import ctypes
from types import SimpleNamespace

import cases
import numpy as np

from mambacupy.ops import products

CTYPES = {0: np.dtype("f4"), 2: np.dtype("f2"), 14: cases.DTYPES["bfloat16"]}


def at(pointer, dtype, rows, columns, stride):
    """The matrix that cuBLAS sees: columns are contiguous, `stride` apart."""
    assert stride >= max(1, rows)
    size = ((columns - 1) * stride + rows) * dtype.itemsize
    flat = np.frombuffer((ctypes.c_char * size).from_address(pointer.value), dtype)
    return np.lib.stride_tricks.as_strided(flat, (rows, columns), (dtype.itemsize, stride * dtype.itemsize))


class Library:
    """`cublasGemmEx` in float64, rounded once."""

    def __init__(self):
        self.calls = 0

    def cublasSetStream_v2(self, handle, stream):
        self.scratch = 0  # as the real one forgets it
        return 0

    def cublasSetWorkspace_v2(self, handle, at, size):
        self.scratch = size.value
        return 0

    def cublasGemmEx(self, handle, turn_a, turn_b, m, n, k, alpha, a, a_type, a_stride, b, b_type, b_stride, beta, c, c_type,
                     c_stride, compute, algorithm):  # fmt: skip
        self.calls += 1
        assert (compute, algorithm, alpha._obj.value) == (68, -1, 1.0)
        a = at(a, CTYPES[a_type], *((k, m) if turn_a else (m, k)), a_stride).astype(float)
        b = at(b, CTYPES[b_type], *((n, k) if turn_b else (k, n)), b_stride).astype(float)
        c = at(c, CTYPES[c_type], m, n, c_stride)
        c.flags.writeable or c.setflags(write=True)
        before = beta._obj.value * c.astype(float) if beta._obj.value else 0
        c[...] = ((a.T if turn_a else a) @ (b.T if turn_b else b) + before).astype(c.dtype)
        return 0


def install(monkeypatch, memory):
    """From here on 16-bit products on `memory`, as `emulator` has it, are this library's, which comes back."""
    library, stream = Library(), SimpleNamespace(ptr=0)
    memory.cuda = SimpleNamespace(device=SimpleNamespace(get_cublas_handle=lambda: 1), get_current_stream=lambda: stream)
    monkeypatch.setattr(products, "_library", lambda xp: library)
    return library
