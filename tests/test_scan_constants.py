"""What a mixer's parameters become for the scan: the kernel, emulated and on a GPU, against NumPy."""

import shutil

import cases
import emulator
import numpy as np
import pytest

from mambacupy import arrays
from mambacupy.ops import scan_constants as module
from mambacupy.ops.scan_constants import scan_constants

ROWS = {
    "float16": ("float16", "float16", "float16", "float32"),
    "bfloat16": ("bfloat16", "bfloat16", "bfloat16", "float32"),
    "float32": ("float32", "float32", "float32", "float32"),
    "mixed": ("float32", "float16", "bfloat16", "float32"),
    "float64": ("float64", "float32", "float64", "float64"),
}
ERRORS = {"float32": 2e-7, "float64": 4e-16}


def make(*dtypes, dim=37, state=5):
    rng = np.random.default_rng(0)
    shapes = (dim, state), (dim,), (dim,)
    return [rng.standard_normal(shape).astype(arrays.FLOAT_DTYPES[d]) for shape, d in zip(shapes, dtypes, strict=True)]


def check(made, given, dtype):
    wanted = [-np.exp(given[0].astype(np.float64)), given[1].astype(dtype), given[2].astype(dtype)]
    assert [x.dtype for x in made] == [np.dtype(dtype)] * 3
    assert np.abs(made[0] / wanted[0] - 1).max() <= ERRORS[dtype]
    assert np.array_equal(made[1], wanted[1]) and np.array_equal(made[2], wanted[2])


@pytest.mark.parametrize("row", ROWS)
def test_numpy(row):
    *dtypes, real = ROWS[row]
    given = make(*dtypes)
    check(scan_constants(*given, np.dtype(real)), given, real)


@pytest.mark.parametrize("row", ROWS)
def test_emulated(monkeypatch, row):
    if shutil.which("g++") is None:
        pytest.skip("the emulator needs g++")
    emulator.install(monkeypatch)
    *dtypes, real = ROWS[row]
    given = make(*dtypes)
    made = module._on_gpu(emulator.Memory(), *given, np.dtype(real))
    check(made, given, real)
    assert (made[1] is given[1]) == (dtypes[1] == real)


@pytest.mark.gpu
@pytest.mark.parametrize("row", ROWS)
def test_on_a_gpu(row):
    *dtypes, real = ROWS[row]
    given = make(*dtypes)
    check([x.get() for x in scan_constants(*map(cases.to_gpu, given), np.dtype(real))], given, real)


@pytest.mark.gpu
def test_views_and_nothing_on_a_gpu():
    given = make("float16", "float16", "float16", dim=10)
    views = [cases.to_gpu(np.repeat(x, 2, 0))[::2] for x in given]
    check([x.get() for x in scan_constants(*views, np.dtype("float32"))], given, "float32")
    empty = map(cases.to_gpu, make("float16", "float16", "float16", dim=0))
    assert [x.shape for x in scan_constants(*empty, np.dtype("float32"))] == [(0, 5), (0,), (0,)]


@pytest.mark.gpu
def test_copies_on_a_gpu():
    import cupy as cp

    source = cp.arange(12, dtype=cp.float32).reshape(3, 4)
    for target in (cp.zeros((3, 4), cp.float32), cp.zeros((3, 4), cp.float16), cp.zeros((3, 8), cp.float32)[:, ::2]):
        arrays.copy_into(target, source)
        assert (target == source).all()
