"""What cuBLAS is asked for, by a stand-in that does it on the host's memory."""

import ctypes
from types import SimpleNamespace

import cases
import emulator
import numpy as np
import pytest

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


@pytest.fixture
def library(monkeypatch):
    emulator.install(monkeypatch)
    library = Library()
    monkeypatch.setattr(products, "_library", lambda xp: library)
    return library


@pytest.fixture
def xp(library):
    memory = emulator.Memory()
    stream = SimpleNamespace(ptr=0)
    memory.cuda = SimpleNamespace(device=SimpleNamespace(get_cublas_handle=lambda: 1), get_current_stream=lambda: stream)
    return memory


VIEWS = {
    "as they lie": lambda a, b: (a, b.T.copy()),
    "right turned": lambda a, b: (a, b.T),
    "left turned": lambda a, b: (a.T, b),
    "both turned": lambda a, b: (a.T, b.T.copy().T),
    "rows apart": lambda a, b: (a[:, 3:8], b[2:7]),
    "every other row": lambda a, b: (a[::2, :6], b[:6]),
    "columns apart": lambda a, b: (a.T[:, ::3], b[::3]),
    "one row": lambda a, b: (a[:1], b.T),
    "one column": lambda a, b: (a, b[:1].T),
    "one term": lambda a, b: (a[:, :1], b[:1]),
    "one number": lambda a, b: (a[:1], b[:1].T),
}


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("wide", [False, True])
def test_products(xp, library, view, dtype, wide):
    rng = np.random.default_rng(0)
    a, b = VIEWS[view](*(rng.integers(-8, 9, (10, 11)).astype(cases.DTYPES[dtype]) for _ in range(2)))
    wanted = a.astype(float) @ b.astype(float)
    made = products.product(xp, a, b, dtype=np.float32 if wide else None)
    assert made.dtype == (np.float32 if wide else a.dtype) and library.calls == 1
    assert np.array_equal(made.astype(float), wanted.astype(made.dtype).astype(float))
    assert products.product(xp, a, b, made, accumulate=True) is made
    assert cases.relative_error(made, 2 * wanted) <= (0 if wide else 4e-3)
    assert np.array_equal(products.product(xp, a, b, made), wanted.astype(made.dtype))
    assert library.calls == 3


@pytest.mark.parametrize("view", [lambda a: a[:, ::2], lambda a: a[:, ::-1], lambda a: np.broadcast_to(a[:1], a.shape)])
def test_other_matrices_are_copied(xp, library, view):
    a = np.arange(20.0).reshape(4, 5).astype(np.float16)
    made = products.product(xp, view(a), view(a).T, dtype=np.float32)
    assert np.array_equal(made, view(a).astype(float) @ view(a).T.astype(float)) and library.calls == 1


def test_other_dtypes_take_the_operator(xp, library):
    a = np.arange(20.0).reshape(4, 5).astype(np.float32)
    assert np.array_equal(products.product(xp, a, a.T), a @ a.T)
    out = np.ones((4, 4), np.float32)
    products.product(xp, a, a.T, out, accumulate=True)
    assert np.array_equal(out, a @ a.T + 1) and library.calls == 0


def test_an_error_of_the_library_is_told(xp, library, monkeypatch):
    monkeypatch.setattr(library, "cublasGemmEx", lambda *_: 13, raising=False)
    with pytest.raises(RuntimeError, match="cuBLAS answers with status 13"):
        products.product(xp, np.ones((2, 3), np.float16), np.ones((3, 2), np.float16))
