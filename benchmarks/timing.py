"""Time kernels by device events, over input sets that together exceed the L2 cache."""

import functools
import gc

import cupy as cp
import numpy as np

L2_BYTES = 64 * 2**20
BUSY_BYTES = 2**29


def copy_bandwidth():
    """Bytes a second that a device-to-device copy of 1 GiB reads and writes."""
    source, target = cp.empty(2**30, cp.uint8), cp.empty(2**30, cp.uint8)
    seconds = median_seconds([lambda: cp.copyto(target, source)])
    return 2 * source.nbytes / seconds


def median_seconds(calls, repeats=20):
    """Median time of one call on the device; the calls, alike but for their data, are taken in turn."""
    for call in calls:
        call()
    events = [(cp.cuda.Event(), cp.cuda.Event()) for _ in range(max(repeats, len(calls)))]
    cp.cuda.get_current_stream().synchronize()
    _keep_busy()
    for index, (start, stop) in enumerate(events):
        start.record()
        calls[index % len(calls)]()
        stop.record()
    cp.cuda.get_current_stream().synchronize()
    return float(np.median([cp.cuda.get_elapsed_time(start, stop) for start, stop in events])) / 1e3


def _keep_busy():
    """Give the device some milliseconds of work, under which the host gets ahead: its own time must not be measured."""
    source, target = _room()
    for _ in range(16):
        cp.copyto(target, source)


@functools.cache
def _room():
    return cp.zeros(BUSY_BYTES, cp.uint8), cp.empty(BUSY_BYTES, cp.uint8)


def free():
    """Give memory that no array holds back to the device."""
    gc.collect()
    cp.get_default_memory_pool().free_all_blocks()


def sets_to_exceed_cache(bytes_of_one):
    """How many input sets a row rotates among."""
    return max(1, -(-2 * L2_BYTES // bytes_of_one))
