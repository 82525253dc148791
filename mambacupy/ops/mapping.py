"""How a scan's work is laid out over threads, blocks and parts of time: chosen by shape, here and nowhere else.

The words are those of cuda_src/tile.cuh: LANES lanes hold the states of a channel, SLOTS in each; a lane serves CHANNELS
channels; a block holds TILE steps of its channels in shared memory; time may be cut into `splits` parts.
"""

import math
from typing import NamedTuple

from mambacupy import arrays
from mambacupy.reference import CHUNK

ENOUGH_WARPS = 8
"""Warps for a multiprocessor: two for each of its schedulers. With fewer, time is cut into parts and states are spread over
more lanes."""

CHUNKS_OF_A_PART = 2
"""Chunks in a part of time at least, in the forward kernel: a part must be worth the launch that finds what enters it."""

MOST_PARTS_CHAINED = 32
"""Parts of time of which each finds by itself what enters it, in the forward direction: so many take less time than a launch
that finds it for all."""

MOST_PARTS_IN_A_RELAY = 32
"""The same of parts that hand on to each other within a launch."""

MOST_STATES_CHAINED = 64
"""States of a lane times parts of time in such a launch, forward: what a lane may have to chain. With more, parts are of two
chunks, if that leaves the GPU full."""

MOST_TURNS_OF_A_RELAY = 4
"""How many times such a launch may fill the GPU, backward: a part that is a chunk costs more than a chunk of a longer part."""

FULL_BLOCK, COST_OF_HALF_A_BLOCK = 128, 1.08
"""Threads of a block's team, forward. Time for a channel in a block of half the size, relative to a full one: fewer channels
share a load of B and C."""

COST_OF_A_LONE_BLOCK, COST_OF_MORE_WARPS = 1.05, 0.95
"""The same for a block of any size that has a multiprocessor for itself; and with twice the warps."""

MOST_LANES_DOUBLED = 160
"""Lanes of a lone block, two a channel, up to which it has twice as many, with half the states: these still have 96 registers
each, and four schedulers share them more evenly."""

LEAST_OF_A_LONE_BLOCK = 60
"""Such lanes that take no longer than fewer would: each step waits for the one before."""

COST_OF_PARTS = 1.25
"""Time for a channel where time is cut into parts, relative to one launch without: they run their recurrence twice, as far as
states remember."""


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
    buffers: int = 2  # tiles in shared memory
    relay: bool = False  # parts of time hand on to each other within a launch; backward a part is a chunk then

    @property
    def constants(self):
        """As the kernels name them."""
        names = ("lanes", "slots", "channels", "tile", "threads", "blocks_per_sm", "shared_bytes")
        return {name.upper(): getattr(self, name) for name in names}

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


def states_of_a_launch_forward(args):
    """States that one launch covers. More are scanned slice by slice, each adding its part of every sum over them."""
    return 1024 // _bytes(args)[1]


def states_of_a_launch_backward(args, device):
    """The same for the backward kernel: those of a warp's lanes, or of as many as shared memory has room for."""
    lanes, slots = 32, _slots_backward(args)
    while lanes > 1 and _backward_shared_bytes(args, lanes, slots, 1, 32) > device.shared_bytes:
        lanes //= 2
    return lanes * slots


def _slots_backward(args):
    """Most states of a channel in a lane of the backward kernel."""
    real_bytes, state_bytes = _bytes(args)
    one_is_constant = (args.groups_B > 0) != (args.groups_C > 0)
    room = 8 if args.zoh or real_bytes == 8 or one_is_constant else 16
    return max(room // state_bytes, 1)


def _parts_of_time(args, wanted, least):
    """How many parts of whole chunks, at least so many, there are to be. None is empty."""
    chunks = -(-args.length // CHUNK)
    share = -(-chunks // max(1, min(wanted, chunks // least)))
    return -(-chunks // share)


def _shared_bytes_for_two(device):
    """Shared memory of a block that leaves room for another on its multiprocessor."""
    return min(device.shared_bytes, device.shared_bytes_of_multiprocessor // 2 - 1024)


def _most_work(args, splits, threads, block_channels, device):
    """Lanes of the multiprocessor that gets the most blocks, blocks of half the size at their cost."""
    blocks = args.batch * splits * -(-args.dim // block_channels)
    return -(-blocks // device.multiprocessors) * threads * (1 if threads == FULL_BLOCK else COST_OF_HALF_A_BLOCK)


def forward(args, state, device):
    """Mapping of the forward kernel for `state` states a channel, on a `kernels.Device`.

    Many channels: two blocks a multiprocessor, or more of half the size, and time in order. As few as blocks that have a
    multiprocessor each can hold: these, where they are faster, with more warps. Fewer: time in parts, in one launch where all
    that is prepared of a part fits into shared memory and all parts run at once, else in two.
    """
    mapping = _in_blocks(args, state, device, relay=False)
    alone, cost = _alone(args, state, device)
    if cost < _cost(args, state, mapping, device):
        return alone
    if 1 < mapping.splits <= MOST_PARTS_IN_A_RELAY:
        relay = _in_blocks(args, state, device, relay=True)
        blocks = min(device.shared_bytes_of_multiprocessor // (relay.shared_bytes + 1024), relay.blocks_per_sm)
        if relay.shared_bytes <= device.shared_bytes and _blocks(args, relay) <= blocks * device.multiprocessors:
            return relay
    return mapping


def _lanes_forward(args, state):
    """Lanes of a channel at least, and states in each: eight (four complex ones) are enough independent work to hide the
    latencies of one step, and leave little to add up across lanes."""
    slots = min(4 if args.complex else 8, power_of_two(state))
    return power_of_two(-(-state // slots)), slots


def _in_blocks(args, state, device, relay):
    """The mapping in blocks of one size, whose parts of time, if there are any, hand on to each other within a launch or not.

    Parts of time cost their recurrence twice, so they come only where they fill a GPU that is mostly idle; lanes cost sums
    across them, and come where there are still too few warps. Where there are more than enough and B and C are long, a lane
    serves two channels with what it reads of them. float64 gets twice the registers a thread.
    """
    lanes, slots = _lanes_forward(args, state)
    lanes_wanted, lanes_given = 32 * ENOUGH_WARPS * device.multiprocessors, args.batch * args.dim * lanes
    wanted = lanes_wanted // lanes_given if lanes_given * 3 <= lanes_wanted else 1
    splits = _parts_of_time(args, wanted, CHUNKS_OF_A_PART)
    if relay:
        splits = _parts_of_time(args, min(wanted, MOST_PARTS_IN_A_RELAY), 1)
        if splits * slots > MOST_STATES_CHAINED and 2 * lanes_given * splits > lanes_wanted:
            splits = _parts_of_time(args, min(wanted, MOST_PARTS_IN_A_RELAY), 2)
    while slots > 1 and lanes < 32 and 2 * args.batch * args.dim * lanes * splits <= lanes_wanted:
        slots, lanes = slots // 2, lanes * 2
    real_bytes, state_bytes = _bytes(args)
    channels = 2 if lanes >= 4 and state_bytes == 4 and not args.zoh and lanes_given >= 2 * lanes_wanted else 1
    work = {size: _most_work(args, splits, size, size // lanes * channels, device) for size in (FULL_BLOCK, FULL_BLOCK // 2)}
    threads = min(work, key=work.get)
    blocks_per_sm = (256 if real_bytes == 4 else 128) // threads
    mapping = Mapping(lanes, slots, channels, 1, threads, 2, blocks_per_sm, splits, 0)
    mapping = _with_tile(args, mapping, _shared_bytes_for_two(device), 32)
    if not relay:
        return mapping
    chunks = -(-args.length // CHUNK)
    buffers = power_of_two(-(-chunks // splits) * CHUNK // mapping.tile)
    return mapping._replace(shared_bytes=_forward_shared_bytes(args, mapping, buffers), buffers=buffers, relay=True)


def _alone(args, state, device):
    """The mapping in blocks of which every multiprocessor gets one at most, and about the same, and its cost as in `_cost`:
    infinite if there is none."""
    lanes, slots = _lanes_forward(args, state)
    if lanes > 2 or slots == 1 or _bytes(args)[1] > 4:
        return None, math.inf
    # Channels are a multiple of 8, for the sake of `column` in tile.cuh. With 128 lanes float32 would spill.
    sizes = (48, 64, 80, *((128,) if args.u.itemsize == 2 else ()), 160, 192) if lanes == 2 else (96, 160, 192)
    for size in sizes:
        if args.batch * -(-args.dim // (size // lanes)) <= device.multiprocessors:
            # The elements of float32 are twice the accesses: of few channels they need the warps that come with more lanes.
            doubled = size <= MOST_LANES_DOUBLED
            more = 4 if size <= 64 and args.u.itemsize == 4 else 2 if doubled else 1
            mapping = Mapping(lanes * more, slots // more, 1, 1, size * more, 2, 1, 1, 0)
            # With several lanes a channel, threads have little in their registers: tiles are longer, and fewer. But teams of
            # five warps have no more registers than those of six, and spill where rows are not aligned.
            has_long_tiles = mapping.threads > 256 or (mapping.lanes > 2 and mapping.threads != 160)
            cost = max(size * (COST_OF_MORE_WARPS if doubled else COST_OF_A_LONE_BLOCK), LEAST_OF_A_LONE_BLOCK)
            return _with_tile(args, mapping, device.shared_bytes, 64 if has_long_tiles else 32), cost
    return None, math.inf


def _with_tile(args, mapping, room, longest):
    """The mapping with the longest tile whose elements fit into registers, 64 bytes of each tensor a thread, and into shared
    memory with all that belongs to it; tiles of 64 steps leave fewer registers."""
    for tile in (64, 32, 16, 8, 4, 2, 1):
        mapping = mapping._replace(tile=tile)
        mapping = mapping._replace(shared_bytes=_forward_shared_bytes(args, mapping, mapping.buffers))
        in_registers = tile * mapping.block_channels // mapping.threads * args.u.itemsize
        if tile <= longest and in_registers <= (64 if tile < 64 else 32) and mapping.shared_bytes <= room:
            break
    return mapping


def _cost(args, state, mapping, device):
    """Lanes of the multiprocessor that gets the most, at as few a channel as there can be, for all of time."""
    work = _most_work(args, mapping.splits, mapping.threads, mapping.block_channels, device)
    lanes, parts = _lanes_forward(args, state)[0], COST_OF_PARTS if mapping.splits > 1 else 1
    return work * lanes / mapping.lanes / mapping.splits * parts


def _forward_shared_bytes(args, mapping, buffers):
    """An upper bound of sizeof(Shared) in selective_scan_fwd.cu, which checks it."""
    real_bytes, state_bytes = _bytes(args)
    varying = (args.groups_B > 0) + (args.groups_C > 0)
    pairs = 1 if mapping.lanes < 4 else 2  # of numbers, of an element
    coefficients = varying * (mapping.lanes * mapping.slots * state_bytes + 16)  # of a step
    of_channel, channels = 2 * pairs * buffers * mapping.tile + 2, mapping.block_channels
    return of_channel * channels * real_bytes + buffers * mapping.tile * coefficients + 1024


def backward(args, state, device):
    """Mapping of the backward kernel for `state` states a channel, on a `kernels.Device`.

    A lane holds Ā and h of 8 steps of its states: four float32 states of each of two channels fill its registers, or half as
    many where float64, zero-order hold, or sums over channels beside sums over time need more for each. The size of a block
    follows from shared memory, of which two blocks are to fit on a multiprocessor.

    Where such blocks leave the GPU partly idle, states are spread over twice as many lanes, in blocks of which three fit on a
    multiprocessor: if parts of time hand on to each other, or if all of these blocks run at once, and either the GPU would not
    be full even with time cut into parts, or these blocks fill half of it without parts, whose carries cost a launch.
    """
    slots = min(_slots_backward(args), max(power_of_two(state) // 2, 1))  # two lanes at least can share two channels
    mapping, relay = (_backward_of(args, state, slots, 2, device, relay) for relay in (False, True))
    if slots == 1 or mapping.lanes == 32 or mapping.channels == 1 or _bytes(args)[0] == 8 or args.zoh:
        return relay
    wider, most = _backward_of(args, state, slots // 2, 3, device, True), 3 * device.multiprocessors
    if (wider.channels, wider.threads) != (2, 128):
        return relay
    if wider.relay:
        return wider
    if _blocks(args, wider) > most:
        return mapping
    is_full = _blocks(args, mapping) > 0.9 * 2 * device.multiprocessors
    return wider if not is_full or (mapping.splits > 1 and wider.splits == 1) else mapping


def _blocks(args, mapping):
    return args.batch * mapping.splits * -(-args.dim // mapping.block_channels)


def _backward_of(args, state, slots, blocks_per_sm, device, relay):
    """The mapping with so many states in a lane, and with blocks of which so many fit on a multiprocessor if any does; with or
    without parts of time that hand on to each other."""
    lanes = power_of_two(-(-state // slots))
    sizes = [(2, 128), (2, 64), (2, 32), (1, 32)] if lanes > 1 and _bytes(args)[1] <= 8 else [(1, 128), (1, 64), (1, 32)]
    room = min(device.shared_bytes, device.shared_bytes_of_multiprocessor // blocks_per_sm - 1024)

    def fits(size):  # one channel a lane halves its work, and comes only where a block would have no room at all
        return _backward_shared_bytes(args, lanes, slots, *size) <= (device.shared_bytes if size == (2, 32) else room)

    channels, threads = next(filter(fits, sizes), sizes[-1])
    blocks, places = args.batch * -(-args.dim // (threads // lanes * channels)), blocks_per_sm * device.multiprocessors
    wanted, chunks = places // blocks, -(-args.length // CHUNK)
    relay = relay and wanted >= 2 and 1 < chunks <= min(MOST_PARTS_IN_A_RELAY, MOST_TURNS_OF_A_RELAY * wanted)
    splits = chunks if relay else _parts_of_time(args, wanted, 1) if wanted >= 2 and args.length > 4 * CHUNK else 1
    shared_bytes = _backward_shared_bytes(args, lanes, slots, channels, threads)
    blocks_per_sm = blocks_per_sm * 128 // threads
    return Mapping(lanes, slots, channels, CHUNK, threads, 1, blocks_per_sm, splits, shared_bytes, relay=relay)


def _backward_shared_bytes(args, lanes, slots, channels, threads):
    """An upper bound of sizeof(Shared) in selective_scan_bwd.cu, which checks it."""
    real_bytes, state_bytes = _bytes(args)
    varying = (args.groups_B > 0) + (args.groups_C > 0)
    elements = (3 * CHUNK + 6 + 2 * max(2, threads // 32)) * (threads // lanes * channels) * real_bytes
    kept = 7 * channels * slots * threads * state_bytes
    coefficients = varying * CHUNK * (lanes * slots * state_bytes + 8)
    columns = max(varying * lanes * slots * state_bytes, 16)  # of a step: dB and dC of a lane group
    sums = threads // 32 * columns * (4 * 32 // lanes + 8 * (2 if columns <= 64 * real_bytes else 1))
    return elements + kept + coefficients + sums + 256
