"""Which array library an argument belongs to, and the dtypes that mambacupy computes with.

CuPy is never imported here: an array can only be CuPy's if its owner has imported CuPy already.
"""

import sys

import ml_dtypes
import numpy as np

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
FLOAT32, FLOAT64 = np.dtype(np.float32), np.dtype(np.float64)
COMPLEX64, COMPLEX128 = np.dtype(np.complex64), np.dtype(np.complex128)

FLOAT_DTYPES = {"float16": np.dtype(np.float16), "bfloat16": BFLOAT16, "float32": FLOAT32, "float64": FLOAT64}
"""Dtypes of u, delta, z and varying B and C, by name. bfloat16 is `ml_dtypes.bfloat16` in NumPy and CuPy arrays alike."""

_COMPUTE = {dtype: FLOAT64 if dtype == FLOAT64 else FLOAT32 for dtype in FLOAT_DTYPES.values()}
_COMPLEX_OF = {FLOAT32: COMPLEX64, FLOAT64: COMPLEX128}
_REAL_OF = {COMPLEX64: FLOAT32, COMPLEX128: FLOAT64}


def dtype_name(dtype):
    """Name of a dtype as messages and kernels spell it: 'bfloat16', 'float32', 'complex64'."""
    return np.dtype(dtype).name


def compute_dtype(dtype):
    """Dtype of arithmetic and states for tensors of a float dtype: float64 for float64, float32 for all others."""
    return _COMPUTE[dtype]


def complex_of(dtype):
    """complex64 for float32, complex128 for float64."""
    return _COMPLEX_OF[dtype]


def real_of(dtype):
    """Dtype of the real part: float32 for complex64, float64 for complex128, a real dtype itself."""
    return _REAL_OF.get(dtype, dtype)


def library_of(operation, name, x):
    """Module that x belongs to, numpy or cupy.

    Raises
    ------
    TypeError
        x is no array of either; the message says how to make it one.
    """
    if type(x) is np.ndarray or type(x) is np.memmap:  # numpy.matrix and masked arrays have other arithmetic
        return np
    if isinstance(x, _cupy_ndarray()):
        return sys.modules["cupy"]
    kind = type(x).__qualname__
    if type(x).__module__ != "builtins":
        kind = f"{type(x).__module__}.{kind}"
    if isinstance(x, np.ma.MaskedArray):
        hint = "x.filled(0) gives one with 0 for what is masked"
    elif isinstance(x, np.ndarray):
        hint = "numpy.asarray(x) gives one"
    elif hasattr(x, "__dlpack__"):
        hint = "cupy.from_dlpack(x) gives one on the GPU without a copy, numpy.from_dlpack(x) one on the host"
    else:
        hint = "numpy.asarray(x) or cupy.asarray(x) gives one"
    raise TypeError(f"{operation}: {name} is of type {kind}, wanted a NumPy or CuPy array; {hint}")


def namespace(operation, **named):
    """The array library that all arguments share. CuPy arrays must share their device too.

    Parameters
    ----------
    operation : str
        Named in errors.
    **named : array or None
        Arguments by name, at least one of them an array; None is passed over.

    Returns
    -------
    module
        numpy or cupy.

    Raises
    ------
    TypeError
        Something is no NumPy or CuPy array, the libraries are mixed, or the CuPy arrays are on different devices.
    """
    given = [x for x in named.values() if x is not None]
    kinds = set(map(type, given))
    if kinds == _ONLY_NUMPY:
        return np
    if kinds == {_cupy_ndarray()} and len({x.data.device_id for x in given}) == 1:
        return sys.modules["cupy"]
    return _namespace_of_each(operation, named)


_ONLY_NUMPY = {np.ndarray}


def _cupy_ndarray():
    """The class of CuPy arrays; while CuPy is not imported, the empty tuple (a class of nothing, to isinstance)."""
    return getattr(sys.modules.get("cupy"), "ndarray", ())


def _namespace_of_each(operation, named):
    """`namespace`, argument by argument: for subclasses, and for whatever is wrong."""
    named = {name: x for name, x in named.items() if x is not None}
    libraries = {name: library_of(operation, name, x) for name, x in named.items()}
    if not named:
        raise TypeError(f"{operation}: no argument is an array")
    on_host = [name for name, library in libraries.items() if library is np]
    on_gpu = [name for name in named if name not in on_host]
    if on_host and on_gpu:
        raise TypeError(
            f"{operation}: NumPy and CuPy arrays are mixed ({', '.join(on_host)} from NumPy, {', '.join(on_gpu)} from CuPy); "
            "cupy.asarray(x) moves x to the GPU, cupy.asnumpy(x) to the host"
        )
    if on_gpu:
        by_device = {}
        for name in on_gpu:
            by_device.setdefault(named[name].data.device_id, []).append(name)
        if len(by_device) > 1:
            places = ", ".join(f"{', '.join(names)} on device {device}" for device, names in sorted(by_device.items()))
            raise TypeError(
                f"{operation}: arrays are on different GPUs ({places}); "
                f"`with cupy.cuda.Device({min(by_device)}): x = cupy.asarray(x)` moves x"
            )
    return libraries[next(iter(named))]


def choose(xp, mask, x, y):
    """`xp.where(mask, x, y)` in y's dtype. CuPy's own makes float32 of bfloat16."""
    return xp.where(mask, xp.asarray(x, y.dtype), y).astype(y.dtype, copy=False)


def copy_into(target, source):
    """`target[...] = source`, arrays of one shape. To copy memory takes the host a third of the time of CuPy's own way."""
    same = target.dtype == source.dtype and target.strides == source.strides and target.flags.c_contiguous
    if same and type(target) is _cupy_ndarray():
        with target.device:
            target.data.copy_from_device_async(source.data, target.nbytes)
    else:
        target[...] = source
