"""A stand-in for cuBLASLt that multiplies on the host's memory."""

import ctypes
from types import SimpleNamespace

import cases
import numpy as np

from mambacupy.ops import products

DTYPES = {0: np.dtype("f4"), 2: np.dtype("f2"), 14: cases.DTYPES["bfloat16"]}


class Library:
    """In float64, rounded once. What is created are places in `things`, of which those destroyed are None."""

    def __init__(self, workspace_bytes=64):
        self.calls, self.things, self.workspaces, self.workspace_bytes, self.status = 0, [None], [], workspace_bytes, 0

    def _create(self, pointer, **thing):
        self.things.append(thing)
        pointer._obj.value = len(self.things) - 1
        return 0

    def cublasLtMatmulDescCreate(self, pointer, compute, scale):
        assert (compute, scale) == (68, 0)
        return self._create(pointer)

    def cublasLtMatrixLayoutCreate(self, pointer, kind, rows, columns, stride):
        assert stride >= max(1, rows)
        return self._create(pointer, dtype=DTYPES[kind], rows=rows, columns=columns, stride=stride)

    def cublasLtMatmulPreferenceCreate(self, pointer):
        return self._create(pointer)

    def _set(self, of, attribute, value, size):
        assert size == ctypes.sizeof(value._obj)
        self.things[of][attribute] = value._obj.value
        return 0

    cublasLtMatmulDescSetAttribute = cublasLtMatmulPreferenceSetAttribute = cublasLtMatrixLayoutSetAttribute = _set

    def _destroy(self, of):
        self.things[of] = None
        return 0

    cublasLtMatmulDescDestroy = cublasLtMatrixLayoutDestroy = cublasLtMatmulPreferenceDestroy = _destroy

    def cublasLtMatmulAlgoGetHeuristic(self, handle, operation, a, b, c, d, preference, wanted, choice, count):
        assert self.things[preference][1] == products.WORKSPACE_BYTES
        self.things[operation]["alignments"] = self.alignments = [self.things[preference][i] for i in (5, 6, 7, 8)]
        choice._obj.algorithm[0], choice._obj.workspace_bytes, count._obj.value = 77, self.workspace_bytes, 1
        return 0

    def cublasLtMatmul(self, handle, operation, alpha, a, a_layout, b, b_layout, beta, c, c_layout, d, d_layout, algorithm,
                       workspace, size, stream):  # fmt: skip
        assert ctypes.c_uint64.from_address(algorithm).value == 77 and (c, c_layout) == (d, d_layout)
        assert size == self.workspace_bytes and bool(workspace) == bool(size)
        assert all(x % n == 0 for x, n in zip((a, b, c, d), self.things[operation]["alignments"], strict=True))
        self.calls += 1
        self.workspaces.append(workspace)
        a, b, c = (self._at(x, self.things[layout]) for x, layout in ((a, a_layout), (b, b_layout), (c, c_layout)))
        a, b = (x.swapaxes(1, 2) if self.things[operation][i] else x for i, x in ((3, a), (4, b)))
        alpha, beta = (ctypes.c_float.from_address(x).value for x in (alpha, beta))
        assert alpha == 1
        before = beta * c.astype(float) if beta else 0
        c[...] = (a.astype(float) @ b.astype(float) + before).astype(c.dtype)
        return self.status

    def _at(self, address, layout):
        """Matrices (count, rows, columns)."""
        dtype, rows, columns, stride = (layout[name] for name in ("dtype", "rows", "columns", "stride"))
        count, to_next = layout.get(5, 1), layout.get(6, 0)
        size = ((count - 1) * to_next + (columns - 1) * stride + rows) * dtype.itemsize
        flat = np.frombuffer((ctypes.c_char * size).from_address(address), dtype)
        strides = (n * dtype.itemsize for n in (to_next, 1, stride))
        return np.lib.stride_tricks.as_strided(flat, (count, rows, columns), tuple(strides))


def install(monkeypatch, memory):
    """From here on 16-bit products on `memory`, as `emulator` has it, are this library's, which comes back."""
    library, stream = Library(), SimpleNamespace(ptr=0)
    memory.cuda = SimpleNamespace(device=SimpleNamespace(get_cublas_handle=lambda: 1), get_current_stream=lambda: stream)
    monkeypatch.setattr(products, "_library", lambda xp: library)
    return library
