"""What cuBLAS is asked for, by a stand-in that does it on the host's memory."""

import cases
import emulator
import library as stand_in
import numpy as np
import pytest

from mambacupy.ops import plans, products


@pytest.fixture
def xp(monkeypatch):
    emulator.install(monkeypatch)
    return emulator.Memory()


@pytest.fixture
def library(monkeypatch, xp):
    return stand_in.install(monkeypatch, xp)


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


@pytest.mark.parametrize("view", ["as they lie", "right turned", "left turned", "both turned", "rows apart"])
def test_parts_of_a_product(xp, library, view):
    rng = np.random.default_rng(0)
    a, b = VIEWS[view](*(rng.integers(-8, 9, (10, 10)).astype(np.float16) for _ in range(2)))
    inner = a.shape[1] // 5
    out = xp.empty((5, a.shape[0], b.shape[1]), np.dtype(np.float32))
    assert products.product(xp, a, b, out) is out and library.calls == 1
    for part, made in enumerate(out):
        here = slice(part * inner, (part + 1) * inner)
        assert np.array_equal(made, a[:, here].astype(float) @ b[here].astype(float))


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


def test_an_error_of_the_library_is_told(xp, library):
    library.status = 13
    with pytest.raises(RuntimeError, match="cuBLAS answers with status 13"):
        products.product(xp, np.ones((2, 3), np.float16), np.ones((3, 2), np.float16))


def test_scratch_memory_is_the_one_given(xp, library):
    room = np.empty(64, np.uint8)
    for workspace in (None, room):
        products.product(xp, np.ones((2, 3), np.float16), np.ones((3, 2), np.float16), workspace=workspace)
    assert library.workspaces[0] != library.workspaces[1] == room.__array_interface__["data"][0]
    library.workspace_bytes = 0
    products.product(xp, np.ones((3, 3), np.float16), np.ones((3, 2), np.float16))
    assert library.workspaces[2] is None


def test_a_plan_is_made_once_for_matrices_of_a_kind_and_what_it_made_is_destroyed(xp, library, monkeypatch):
    monkeypatch.setattr(plans, "_kind", lambda x: x is not None and (x.strides, x.__array_interface__["data"][0] & 31))
    room = np.ones(64, np.float16)
    start = -room.__array_interface__["data"][0] % 32 // 2
    for first in (start, start + 1, start + 1):
        products.product(xp, room[first : first + 6].reshape(2, 3), np.ones((3, 2), np.float16))
    made = len(library.things) - 1
    assert made == 2 * 5 and library.alignments[1] == 2
    plans._plans.clear()
    assert library.things == [None] * (made + 1)


def test_what_the_library_has_no_kernel_for_takes_the_operator(xp, library, monkeypatch):
    monkeypatch.setattr(library, "cublasLtMatmulAlgoGetHeuristic", lambda *_: 15, raising=False)
    a = np.arange(6.0).reshape(2, 3).astype(np.float16)
    out = np.ones((2, 2), np.float32)
    assert np.array_equal(products.product(xp, a, a.T), a @ a.T)
    assert np.array_equal(products.product(xp, a, a.T, out, accumulate=True), a @ a.T + 1) and library.calls == 0
