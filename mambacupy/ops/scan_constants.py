"""A mixer's parameters as the scan takes them: A = -exp(A_log), and D and dt_bias in the dtype of arithmetic.

NumPy arrays take NumPy's functions; CuPy arrays cuda_src/scan_constants.cu, one launch where CuPy's own functions are five.
"""

import numpy as np

from mambacupy import arrays, kernels
from mambacupy.ops import plans, rows

__all__ = ["scan_constants"]

THREADS = 256


def scan_constants(A_log, D, dt_bias, dtype):
    """A, D and dt_bias of a scan.

    Parameters
    ----------
    A_log : array (dim, state)
    D, dt_bias : array (dim,)
        Any of the float dtypes, each its own.
    dtype : dtype
        float32 or float64.

    Returns
    -------
    A, D, dt_bias : array
        In that dtype. D and dt_bias are the arguments where they have it.
    """
    if arrays.namespace("scan_constants", A_log=A_log, D=D, dt_bias=dt_bias) is np:
        return -np.exp(A_log.astype(dtype, copy=False)), D.astype(dtype, copy=False), dt_bias.astype(dtype, copy=False)
    with kernels.device_of(A_log):
        return _on_gpu(arrays.library_of("scan_constants", "A_log", A_log), A_log, D, dt_bias, dtype)


_ARRAYS = ("A_log", "D", "dt_bias", "A", "real_D", "real_dt_bias")


def _on_gpu(xp, A_log, D, dt_bias, dtype):
    given = A_log, D, dt_bias
    contiguous, launch = plans.planned(_plan, (given, dtype), given, (dtype,))
    if not contiguous:
        given = [rows.contiguous(xp, x) for x in given]
    A = xp.ndarray(A_log.shape, dtype)
    real_D, real_dt_bias = (None if x.dtype == dtype else xp.ndarray(x.shape, dtype) for x in (D, dt_bias))
    launch(kernels.addresses((*given, A, real_D, real_dt_bias)))
    return A, D if real_D is None else real_D, dt_bias if real_dt_bias is None else real_dt_bias


def _plan(given, dtype):
    """Whether kernels can read the arrays as they lie, and the launch."""
    A_log, D, dt_bias = given
    types = {"A_T": A_log.dtype, "D_T": D.dtype, "BIAS_T": dt_bias.dtype, "REAL": dtype}
    constants = {name: kernels.C_TYPES[kind.name] for name, kind in types.items()}
    kernel = kernels.get("scan_constants.cu", "scan_constants", constants)
    numbers, blocks = {"count": A_log.size, "dim": D.size}, -(-max(A_log.size, D.size) // THREADS)
    order = {name: place for place, name in enumerate(_ARRAYS)}
    contiguous = all(x.flags.c_contiguous and plans.is_whole(x) for x in given)
    return contiguous, kernel.prepare(blocks, THREADS, numbers, order=order)
