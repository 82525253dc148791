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


def _on_gpu(xp, A_log, D, dt_bias, dtype):
    A = xp.empty(A_log.shape, dtype)
    given = {name: rows.contiguous(xp, x) for name, x in (("A_log", A_log), ("D", D), ("dt_bias", dt_bias))}
    made = {name: xp.empty(x.shape, dtype) for name, x in (("D", D), ("dt_bias", dt_bias)) if x.dtype != dtype}
    types = {"A_T": A_log.dtype, "D_T": D.dtype, "BIAS_T": dt_bias.dtype, "REAL": dtype}
    constants = {name: kernels.C_TYPES[kind.name] for name, kind in types.items()}
    numbers, blocks = {"count": A.size, "dim": D.size}, -(-max(A.size, D.size) // THREADS)
    if blocks:
        launch = plans.prepared("scan_constants.cu", "scan_constants", constants, blocks, THREADS, numbers)
        launch(given | {"A": A, "real_D": made.get("D"), "real_dt_bias": made.get("dt_bias")})
    return A, made.get("D", D), made.get("dt_bias", dt_bias)
