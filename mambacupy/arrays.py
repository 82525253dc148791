"""Which array library an argument belongs to, and the dtypes mambacupy computes with.

CuPy is never imported here: an array can only be CuPy's if its owner has imported CuPy already.
"""

import sys

import ml_dtypes
import numpy as np

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
FLOAT32, FLOAT64 = np.dtype(np.float32), np.dtype(np.float64)
COMPLEX64, COMPLEX128 = np.dtype(np.complex64), np.dtype(np.complex128)

FLOAT_DTYPES = {"float16": np.dtype(np.float16), "bfloat16": BFLOAT16, "float32": FLOAT32, "float64": FLOAT64}
"""Dtypes of u, delta, z and varying B and C."""

_COMPUTE = {dtype: FLOAT64 if dtype == FLOAT64 else FLOAT32 for dtype in FLOAT_DTYPES.values()}
_REAL_OF = {COMPLEX64: FLOAT32, COMPLEX128: FLOAT64}
_COMPLEX_OF = {FLOAT32: COMPLEX64, FLOAT64: COMPLEX128}


def compute_dtype(dtype):
    """Dtype of arithmetic and states for tensors of a float dtype: float64 for float64, float32 for all others."""
    return _COMPUTE[dtype]


def real_of(dtype):
    """Dtype of the real part: float32 for complex64, float64 for complex128, a real dtype itself."""
    return _REAL_OF.get(dtype, dtype)


def complex_of(dtype):
    """complex64 for float32, complex128 for float64."""
    return _COMPLEX_OF[dtype]


def library_of(operation, name, x):
    """Module that x belongs to, numpy or cupy.

    Raises
    ------
    TypeError
        x is no array of either; the message says how to make it one.
    """
    if type(x) is np.ndarray or type(x) is np.memmap:
        return np
    cupy = sys.modules.get("cupy")
    if cupy is not None and isinstance(x, cupy.ndarray):
        return cupy
    kind = f"{type(x).__module__}.{type(x).__qualname__}"
    if isinstance(x, np.ndarray):
        hint = "pass a plain array: numpy.asarray(x), with masked entries filled"
    elif hasattr(x, "__dlpack__"):
        hint = "cupy.from_dlpack(x) or numpy.from_dlpack(x) makes it one without a copy"
    else:
        hint = "numpy.asarray(x) or cupy.asarray(x) makes it one"
    raise TypeError(f"{operation}: {name} is a {kind}, wanted a NumPy or CuPy array; {hint}")


def namespace(operation, **named):
    """The array library that all arguments share, and their device.

    Parameters
    ----------
    operation : str
        Named in errors.
    **named : array or None
        Arguments by name; None is passed over.

    Returns
    -------
    module
        numpy or cupy.

    Raises
    ------
    TypeError
        Something is no NumPy or CuPy array, the libraries are mixed, or the CuPy arrays are on different devices.
    """
    first = first_name = library = None
    for name, x in named.items():
        if x is None:
            continue
        own = np if type(x) is np.ndarray else library_of(operation, name, x)
        if first is None:
            first, first_name, library = x, name, own
        elif own is not library:
            raise TypeError(
                f"{operation}: {first_name} is a {library.__name__} array and {name} a {own.__name__} array; "
                "move one of them: cupy.asarray(x) to the GPU, cupy.asnumpy(x) to the host"
            )
        elif library is not np and x.device != first.device:
            raise TypeError(
                f"{operation}: {first_name} is on device {first.device.id} and {name} on device {x.device.id}; "
                "wanted all arrays on one device"
            )
    return library
