"""Dtypes, and whose array an argument is. CuPy arrays are stand-ins here: a class in a stub of the module `cupy`."""

import os
import subprocess
import sys
import types
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from mambacupy import arrays, kernels

ROOT = Path(__file__).parent.parent


class CupyArray:
    """What `arrays` may read of a CuPy array."""

    def __init__(self, device=0):
        self.data = types.SimpleNamespace(device_id=device)


@pytest.fixture
def cupy(monkeypatch):
    stub = types.SimpleNamespace(ndarray=CupyArray)
    monkeypatch.setitem(sys.modules, "cupy", stub)
    return stub


# ---------------------------------------------------------------------------------------------------- dtypes
@pytest.mark.parametrize(
    ("name", "given", "compute", "complex_states"),
    [
        ("float16", np.float16, "float32", "complex64"),
        ("bfloat16", ml_dtypes.bfloat16, "float32", "complex64"),
        ("float32", np.float32, "float32", "complex64"),
        ("float64", np.float64, "float64", "complex128"),
    ],
)
def test_dtypes(name, given, compute, complex_states):
    dtype = arrays.FLOAT_DTYPES[name]
    assert dtype == np.dtype(given) and arrays.dtype_name(given) == name
    assert arrays.compute_dtype(dtype) == compute
    assert arrays.complex_of(arrays.compute_dtype(dtype)) == complex_states
    assert arrays.real_of(np.dtype(complex_states)) == compute
    assert arrays.real_of(dtype) == dtype


def test_kernels_have_a_type_for_every_dtype():
    assert list(arrays.FLOAT_DTYPES) == list(kernels.C_TYPES)


# ---------------------------------------------------------------------------------------------------- whose array
X = np.ones(3)
MATRIX = np.ones((1, 1)).view(np.matrix)  # the constructor warns


def test_numpy_arrays_are_numpys(tmp_path):
    np.save(tmp_path / "x.npy", X)
    mapped = np.load(tmp_path / "x.npy", mmap_mode="r")
    assert arrays.library_of("op", "x", X) is np
    assert arrays.library_of("op", "x", mapped) is np
    assert arrays.namespace("op", u=X, D=None) is np
    assert arrays.namespace("op", u=mapped, D=X) is np


def test_cupy_arrays_are_cupys(cupy):
    class Subclass(CupyArray):
        pass

    assert arrays.library_of("op", "x", CupyArray()) is cupy
    assert arrays.namespace("op", u=CupyArray(1), D=None, A=CupyArray(1)) is cupy
    assert arrays.namespace("op", u=CupyArray(), A=Subclass()) is cupy


@pytest.mark.parametrize("loaded", [False, True], ids=["without-cupy", "with-cupy"])
@pytest.mark.parametrize(
    ("x", "kind", "hint"),
    [
        ([1.0], "list", "numpy.asarray(x) or cupy.asarray(x) gives one"),
        (1.0, "float", "numpy.asarray(x) or cupy.asarray(x) gives one"),
        (np.float32(1), "numpy.float32", "numpy.asarray(x) or cupy.asarray(x) gives one"),
        (MATRIX, "numpy.matrix", "numpy.asarray(x) gives one"),
        (np.ma.masked_equal(X, 1), "numpy.ma.MaskedArray", "x.filled(0) gives one with 0 for what is masked"),
        (
            type("Tensor", (), {"__module__": "torch", "__dlpack__": lambda self: None})(),
            "torch.Tensor",
            "cupy.from_dlpack(x) gives one on the GPU without a copy, numpy.from_dlpack(x) one on the host",
        ),
    ],
    ids=["list", "number", "numpy-scalar", "matrix", "masked", "torch"],
)
def test_what_is_no_array(x, kind, hint, loaded, monkeypatch):
    monkeypatch.setitem(sys.modules, "cupy", types.SimpleNamespace(ndarray=CupyArray) if loaded else None)
    kind = kind.replace("numpy.ma.", f"{np.ma.MaskedArray.__module__}.")
    with pytest.raises(TypeError) as error:
        arrays.library_of("op", "delta", x)
    assert str(error.value) == f"op: delta is of type {kind}, wanted a NumPy or CuPy array; {hint}"
    with pytest.raises(TypeError, match=r"^op: delta is of type"):
        arrays.namespace("op", u=X, D=None, delta=x)


def test_hints_for_numpys_subclasses_work():
    assert arrays.library_of("op", "x", np.asarray(MATRIX)) is np
    assert arrays.library_of("op", "x", np.ma.masked_equal(X, 1).filled(0)) is np


def test_libraries_are_not_mixed(cupy):
    with pytest.raises(TypeError) as error:
        arrays.namespace("op", u=CupyArray(), delta=X, A=CupyArray(), B=X, D=None)
    text = str(error.value)
    assert text.startswith("op: NumPy and CuPy arrays are mixed (delta, B from NumPy, u, A from CuPy)")
    assert "cupy.asarray(x)" in text and "cupy.asnumpy(x)" in text


def test_devices_are_not_mixed(cupy):
    with pytest.raises(TypeError) as error:
        arrays.namespace("op", u=CupyArray(3), delta=CupyArray(1), A=CupyArray(3), D=None)
    text = str(error.value)
    assert text.startswith("op: arrays are on different GPUs (delta on device 1, u, A on device 3)")
    assert "with cupy.cuda.Device(1): x = cupy.asarray(x)" in text


def test_something_must_be_an_array():
    with pytest.raises(TypeError, match=r"^op: no argument is an array$"):
        arrays.namespace("op", u=None)


# ---------------------------------------------------------------------------------------------------- import
def python(code, cwd):
    """What a fresh interpreter prints that finds this checkout's package."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=cwd, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_numpy_arrays_need_neither_cupy_nor_scipy(tmp_path):
    scan = "x, p = np.ones((1, 2, 3), np.float32), np.ones((2, 1), np.float32); mambacupy.selective_scan(x, x, -p, p, p)"
    loaded = "print(*sorted({'cupy', 'scipy'} & {name.split('.')[0] for name in sys.modules}))"
    assert python(f"import sys, numpy as np, mambacupy; {scan}; {loaded}", tmp_path).split() == []


def test_public_names_need_no_cupy(tmp_path):
    wanted = {"selective_scan", "selective_scan_fwd", "selective_scan_bwd", "selective_state_update", "check_gradients"}
    wanted |= {f"causal_conv1d{end}" for end in ("", "_fwd", "_bwd", "_update")}
    wanted |= {f"{name}{end}" for name in ("SelectiveScan", "CausalConv1d") for end in ("Grads", "Saved")}
    code = "from mambacupy import *; names = dir(); import sys; print('cupy' in sys.modules, *names)"
    loaded, *names = python(code, tmp_path).split()
    assert loaded == "False" and {name for name in names if name[0] != "_"} == wanted


def test_import_adds_little_to_numpys(tmp_path):
    code = "import numpy, time; start = time.perf_counter(); import mambacupy; print(time.perf_counter() - start)"
    assert any(float(python(code, tmp_path)) < 0.1 for _ in range(10))  # 0.03 s; a busy machine gets ten tries
