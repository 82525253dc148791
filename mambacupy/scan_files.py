"""Scan arrays that lie in files, block by block along time with the state carried.

Nothing is loaded as a whole: inputs are views of their files, outputs are written in place. On a GPU the blocks pass through
two slots, so that reading block i + 1 and writing block i - 1 overlap the kernel of block i.
"""

import os
from pathlib import Path
from typing import NamedTuple

import numpy as np

from mambacupy import checks, reference
from mambacupy.npy_files import FileError, open_array, open_npz
from mambacupy.ops.selective_scan import selective_scan


class Kind(NamedTuple):
    """A kind of work on files: what messages call it, and the arguments it takes."""

    what: str
    required: tuple
    optional: tuple

    @property
    def names(self):
        return self.required + self.optional


SCAN = Kind("scan", ("u", "delta", "A", "B", "C"), ("D", "z", "delta_bias", "initial_state"))

VARYING = ("u", "delta", "B", "C", "z", "dy")
"""Arguments with an axis of time, their last. B and C may also be constant."""

BLOCK_BYTES = 64 * 2**20
"""Size of u's part in a block, where the caller does not choose the block's length."""


# ---------------------------------------------------------------------------------------------------- inputs
def read_inputs(source, overrides, kind=SCAN):
    """Arguments from a folder or an `.npz` file, and single files that override them.

    Parameters
    ----------
    source : path or None
        A folder of `u.npy`, `delta.npy`, …, or an `.npz` file with these names.
    overrides : dict
        Argument name to `.npy` file.
    kind : Kind
        Which arguments there are, and which must be given.

    Returns
    -------
    (dict, dict, list)
        Arrays by argument name (None where absent), the file of each, and the names found that are no argument.

    Raises
    ------
    FileError
    """
    arrays, files, ignored = {}, {}, []
    if source is not None:
        source = Path(source)
        if os.path.isdir(source):
            found = {name.removesuffix(".npy"): source / name for name in _listed(source) if name.endswith(".npy")}
            for name in kind.names:
                if name in found and name not in overrides:
                    arrays[name], files[name] = open_array(found[name]), str(found[name])
        else:
            found = open_npz(source, set(kind.names) - set(overrides))
            for name in kind.names:
                if name in found and name not in overrides:
                    arrays[name], files[name] = found[name], f"{source}:{name}.npy"
        ignored = [name for name in found if name not in kind.names]
    for name, path in overrides.items():
        arrays[name], files[name] = open_array(path), str(path)
    missing = [name for name in kind.required if name not in arrays]
    if missing:
        where = f"{source}: " if source is not None else ""
        raise FileError(
            f"{where}no {', '.join(f'{name}.npy' for name in missing)}; a {kind.what} needs "
            f"{', '.join(kind.required[:-1])} and {kind.required[-1]} (name single files with --{missing[0]} FILE)"
        )
    return {name: arrays.get(name) for name in kind.names}, files, ignored


def _listed(folder):
    try:
        return sorted(os.listdir(folder))
    except OSError as error:
        raise FileError(f"{folder}: {error.strerror}") from None


def check(arguments, options):
    """Pass the arguments through the gate without reading them.

    Raises
    ------
    TypeError, ValueError
        Worded with the argument's name after `scan: `.
    """
    return checks.selective_scan("scan", **arguments, discretization=options["discretization"])


# ---------------------------------------------------------------------------------------------------- blocks of time
def default_block_length(u):
    """Steps whose part of u is BLOCK_BYTES large, in whole chunks."""
    step = max(1, u.shape[0] * u.shape[1] * u.itemsize)
    return max(1, BLOCK_BYTES // step // reference.CHUNK) * reference.CHUNK


def blocks_of_time(length, block_length, reverse):
    """Slices of memory's time, one by one in the order in which they are walked."""
    starts = range(0, length, block_length)
    return (slice(t, min(t + block_length, length)) for t in (reversed(starts) if reverse else starts))


def varies(name, x):
    """Whether argument x is cut into blocks."""
    return name in VARYING and x.ndim > 2


def take(name, x, block, arguments):
    """The part of argument x, or of its gradient, that belongs to a block of time."""
    if x is None or not varies(name, x):
        return x
    if name in "BC" and arguments["A"].dtype.kind == "c" and x.dtype.kind != "c":
        return x[..., 2 * block.start : 2 * block.stop]
    return x[..., block]


# ---------------------------------------------------------------------------------------------------- the scan
def scan_blocks(arguments, options, y, last_state=None, device=None, block_length=None):
    """Scan into `y`, block by block.

    Parameters
    ----------
    arguments : dict
        Arrays by name, as `read_inputs` gives them.
    options : dict
        delta_softplus, reverse, discretization.
    y : array (batch, dim, length)
        Receives the output.
    last_state : array (batch, dim, state), optional
        Receives the state after the final step.
    device : int or None
        CUDA device; None for the CPU.
    block_length : int, optional
        Steps in a block.

    Yields
    ------
    float
        How much of the work is done, after each block; 1 when everything is written.
    """
    length = arguments["u"].shape[2]
    run = _on_cpu(arguments, options, y) if device is None else _on_gpu(arguments, options, y, device)
    next(run)
    done = 0
    for block in blocks_of_time(length, block_length or default_block_length(arguments["u"]), options["reverse"]):
        run.send(block)
        done += block.stop - block.start
        yield done / length
    state = run.send(None)
    if last_state is not None:
        last_state[...] = state
    yield 1.0


def _on_cpu(arguments, options, y):
    """Takes blocks, gives the state after each; after None, the last state."""
    state = arguments["initial_state"]
    if state is None:
        state = np.zeros((*y.shape[:2], arguments["A"].shape[1]), arguments["A"].dtype)
    while (block := (yield state)) is not None:
        part = {name: take(name, x, block, arguments) for name, x in arguments.items()}
        part["initial_state"] = state
        y[..., block], state = selective_scan(**part, **options, return_last_state=True)
    yield state


def _on_gpu(arguments, options, y, device):
    """As `_on_cpu`, with copies in streams of their own."""
    import cupy
    import cupyx

    with cupy.cuda.Device(device):
        compute, upload, download = (cupy.cuda.Stream(non_blocking=True) for _ in range(3))
        with upload:
            constant = {
                name: cupy.asarray(np.ascontiguousarray(x))
                for name, x in arguments.items()
                if x is not None and not varies(name, x)
            }
        upload.synchronize()
        state = constant.pop("initial_state", None)
        if state is None:
            state = cupy.zeros((*y.shape[:2], arguments["A"].shape[1]), arguments["A"].dtype)
        cupy.cuda.get_current_stream().synchronize()
        slots = [_Slot(), _Slot()]
        count = 0
        while (block := (yield None)) is not None:
            slot = slots[count % 2]
            count += 1
            slot.drain(y)
            part = {}
            with upload:
                for name, x in arguments.items():
                    if name in constant or x is None or name == "initial_state":
                        continue
                    host = slot.pinned(cupyx, name, take(name, x, block, arguments))
                    part[name] = slot.keep(name, cupy.empty(host.shape, host.dtype))
                    part[name].set(host, stream=upload)
                uploaded = upload.record()
            with compute:
                compute.wait_event(uploaded)
                out, state = selective_scan(**part, **constant, **options, initial_state=state, return_last_state=True)
                computed = compute.record()
            with download:
                download.wait_event(computed)
                slot.fetch(cupyx, out, block, download)
        for index in range(count, count + 2):  # the older slot first
            slots[index % 2].drain(y)
        compute.synchronize()
        yield cupy.asnumpy(state)


class _Slot:
    """Pinned memory for one block in flight, its device arrays, and its output on the way to the file."""

    def __init__(self):
        self._pinned, self._kept, self._pending = {}, {}, None

    def pinned(self, cupyx, name, x):
        """A copy of x in pinned memory that is reused from block to block."""
        flat = self._pinned.get(name)
        if flat is None or flat.size < x.size:
            flat = self._pinned[name] = cupyx.empty_pinned((x.size,), x.dtype)
        host = flat[: x.size].reshape(x.shape)
        host[...] = x
        return host

    def keep(self, name, array):
        """Hold a device array until the slot is drained: the streams outlive the names."""
        self._kept[name] = array
        return array

    def fetch(self, cupyx, out, block, stream):
        """Start copying a block's output to the host."""
        host = self.pinned(cupyx, "y", np.broadcast_to(np.zeros((), out.dtype), out.shape))
        out.get(stream=stream, out=host, blocking=False)
        self._pending = (host, block, stream.record())
        self.keep("y", out)

    def drain(self, y):
        """Wait for the slot's output and write it to its place."""
        if self._pending is None:
            return
        host, block, arrived = self._pending
        arrived.synchronize()
        y[..., block] = host
        self._pending, self._kept = None, {}
