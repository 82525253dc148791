"""How a scan's work is laid out over threads, blocks and parts of time: chosen by shape, here and nowhere else.

The words are those of cuda_src/tile.cuh: LANES lanes hold the states of a channel, SLOTS in each; a lane serves CHANNELS
channels; a block holds TILE steps of its channels in shared memory; time may be cut into `splits` parts.
"""

from typing import NamedTuple

from mambacupy import arrays
from mambacupy.reference import CHUNK

ENOUGH_WARPS = 1024
"""Two warps for each scheduler of a large GPU. With fewer, time is cut into parts and states are spread over more lanes."""

CHUNKS_OF_A_PART = 8
"""Chunks in a part of time at least: a part must be worth the launch that finds what enters it."""


class Mapping(NamedTuple):
    """Compile-time constants of a scan kernel, and what its launch needs beside them."""

    lanes: int
    slots: int
    channels: int
    tile: int
    threads: int  # of a team
    teams: int  # of a block: the forward kernel has one for elements and one for the recurrence
    blocks_per_sm: int  # that the compiler leaves registers for
    splits: int
    shared_bytes: int  # dynamic shared memory

    @property
    def constants(self):
        """As the kernels name them."""
        names = ("LANES", "SLOTS", "CHANNELS", "TILE", "THREADS", "BLOCKS_PER_SM", "SHARED_BYTES")
        values = (self.lanes, self.slots, self.channels, self.tile, self.threads, self.blocks_per_sm, self.shared_bytes)
        return dict(zip(names, values, strict=True))

    @property
    def block_channels(self):
        """Channels of a block."""
        return self.threads // self.lanes * self.channels


def power_of_two(n):
    """The smallest power of two that is at least n."""
    return 1 << (n - 1).bit_length()


def _bytes(args):
    """Size of a real number and of a state."""
    real = arrays.compute_dtype(args.u.dtype).itemsize
    return real, real * (2 if args.complex else 1)


def states_of_a_launch(args, forward):
    """States that one launch covers. More are scanned slice by slice, each adding its part of every sum over them."""
    return (1024 if forward else 256) // _bytes(args)[1]


def _parts_of_time(args, wanted):
    return max(1, min(wanted, -(-args.length // CHUNK) // CHUNKS_OF_A_PART))


def _shared_bytes_for_two(device):
    """Shared memory of a block that leaves room for another on its multiprocessor."""
    return min(device.shared_bytes, device.shared_bytes_of_multiprocessor // 2 - 1024)


def forward(args, state, device):
    """Mapping of the forward kernel for `state` states a channel, on a `kernels.Device`.

    Eight states a lane (four complex ones) are enough independent work to hide the latencies of one step, and leave little to
    add up across lanes. Parts of time cost their recurrence twice, so they come only where they fill a GPU that is mostly idle;
    lanes cost sums across them, and come where there are still too few warps.
    """
    real_bytes, state_bytes = _bytes(args)
    slots = min(4 if args.complex else 8, power_of_two(state))
    lanes = power_of_two(-(-state // slots))
    lanes_wanted, lanes_given = 32 * ENOUGH_WARPS, args.batch * args.dim * lanes
    splits = _parts_of_time(args, lanes_wanted // lanes_given) if lanes_given * 3 <= lanes_wanted else 1
    while slots > 1 and lanes < 32 and 2 * args.batch * args.dim * lanes * splits <= lanes_wanted:
        slots, lanes = slots // 2, lanes * 2
    threads = 128
    channels = threads // lanes
    tile = 32
    while tile > 1:
        varying = (args.groups_B > 0) + (args.groups_C > 0)
        elements = 2 * tile * channels * (2 + min(lanes, 4)) * real_bytes
        coefficients = 2 * varying * tile * (lanes * slots * state_bytes + 16)
        shared_bytes = elements + coefficients + 2 * channels * real_bytes + 1024
        in_registers = tile * channels * args.u.itemsize // threads  # bytes of each tensor that a thread holds
        if in_registers <= 32 and shared_bytes <= _shared_bytes_for_two(device):
            break
        tile //= 2
    return Mapping(lanes, slots, 1, tile, threads, 2, 2, splits, shared_bytes)


def backward(args, state, device):
    """Mapping of the backward kernel for `state` states a channel, on a `kernels.Device`.

    A lane holds Ā and h of 8 steps of its states: four states of each of two channels fill its registers. The size of a block
    follows from shared memory, of which two blocks are to fit on a multiprocessor.
    """
    real_bytes, state_bytes = _bytes(args)
    slots = min(16 // state_bytes, power_of_two(state))
    lanes = power_of_two(-(-state // slots))
    sizes = ((2, 128), (2, 64), (2, 32), (1, 32)) if lanes > 1 else ((1, 128), (1, 64), (1, 32))
    for channels, threads in sizes:
        shared_bytes = _backward_shared_bytes(args, lanes, slots, channels, threads, real_bytes, state_bytes)
        # One channel a lane halves its work, and comes only where a block would have no room at all.
        most = device.shared_bytes if (channels, threads) == (2, 32) else _shared_bytes_for_two(device)
        if shared_bytes <= most:
            break
    blocks = args.batch * -(-args.dim // (threads // lanes * channels))
    wanted = 2 * device.multiprocessors // blocks
    splits = _parts_of_time(args, wanted) if wanted >= 2 else 1
    return Mapping(lanes, slots, channels, CHUNK, threads, 1, 256 // threads, splits, shared_bytes)


def _backward_shared_bytes(args, lanes, slots, channels, threads, real_bytes, state_bytes):
    """An upper bound of sizeof(Shared) in selective_scan_bwd.cu, which checks it."""
    varying = (args.groups_B > 0) + (args.groups_C > 0)
    elements = (3 * CHUNK + 2) * threads // lanes * channels * real_bytes
    kept = (8 + 3 - varying) * channels * slots * threads * state_bytes
    coefficients = varying * CHUNK * (lanes * slots * state_bytes + 16)
    sums = 2 * threads // 32 * (8 if varying else 1) * 2 * lanes * slots * state_bytes
    return elements + kept + coefficients + sums + 1024
