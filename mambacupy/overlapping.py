"""Launches of kernels that may begin while the one in front of them ends: programmatic dependent launch.

CuPy cannot say this of a launch, so the driver is asked for it directly, by `cuLaunchKernelEx`. It pays for short kernels in a
row that have something to do before they need what the last one made; they wait for it in `wait_for_previous` of
cuda_src/common.cuh.
"""

import ctypes
import functools
import sys

__all__ = ["OverlapError", "overlapping"]

_PROGRAMMATIC_STREAM_SERIALIZATION = 6  # of enum CUlaunchAttributeID


class OverlapError(RuntimeError):
    """The driver has no such launches, or refuses one."""


class _Attribute(ctypes.Structure):
    """CUlaunchAttribute: 8 bytes that say which, and a union of 64."""

    _fields_ = [("id", ctypes.c_int), ("_", ctypes.c_int), ("value", ctypes.c_int), ("rest", ctypes.c_int * 15)]


class _Config(ctypes.Structure):
    """CUlaunchConfig."""

    _fields_ = [
        ("grid", ctypes.c_uint * 3), ("block", ctypes.c_uint * 3), ("shared_bytes", ctypes.c_uint),
        ("stream", ctypes.c_void_p), ("attributes", ctypes.POINTER(_Attribute)), ("attribute_count", ctypes.c_uint),
    ]  # fmt: skip


def overlapping(blocks, threads, argument, shared_bytes=0):
    """A launch of a kernel of one argument, on the current stream.

    Parameters
    ----------
    blocks, threads : int
        Size of the grid and of a block.
    argument : NumPy array
        Passed by value, as it is at each launch.
    shared_bytes : int
        Dynamic shared memory of a block.

    Returns
    -------
    callable
        Launches the `cupy.cuda.Function` it is given.

    Raises
    ------
    OverlapError
        At the call: the driver does not launch this way.
    """
    import cupy

    attribute = _Attribute(_PROGRAMMATIC_STREAM_SERIALIZATION, 0, 1)
    config = _Config((blocks, 1, 1), (threads, 1, 1), shared_bytes, None, ctypes.pointer(attribute), 1)
    pointers, current = (ctypes.c_void_p * 1)(argument.ctypes.data), cupy.cuda.get_current_stream
    kept = ctypes.byref(config), pointers, argument  # made here, because it takes as long as a launch

    def launch(function):
        config.stream = current().ptr
        status = _driver()(kept[0], ctypes.c_void_p(function.ptr), pointers, None)
        if status:
            raise OverlapError(f"cuLaunchKernelEx: error {status} of the CUDA driver")

    return launch


@functools.cache
def _driver():
    try:
        return ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1").cuLaunchKernelEx
    except (OSError, AttributeError) as error:
        raise OverlapError(f"no cuLaunchKernelEx: {error}") from None
