"""The gradient of a scan of arrays that lie in files, block by block along time.

A first pass keeps the state that enters each block. A second takes the blocks from the last one walked to the first: each is
scanned once more from its state, and hands the gradient of that state to the block before it.
"""

import contextlib

import numpy as np

from mambacupy import checks, scan_files
from mambacupy.ops.selective_scan import SelectiveScanSaved, selective_scan, selective_scan_bwd, selective_scan_fwd
from mambacupy.reference import CHUNK
from mambacupy.scan_files import SCAN, Kind, take, varies

GRADIENT = Kind("gradient", (*SCAN.required, "dy"), (*SCAN.optional, "dlast_state"))


def check(arguments, options):
    """Pass the arguments through the gates of both passes without reading them.

    Raises
    ------
    TypeError, ValueError
        Worded with the argument's name after `gradient: `.
    """
    scanned = {name: arguments[name] for name in SCAN.names}
    checked = checks.selective_scan("gradient", **scanned, discretization=options["discretization"])
    saved = SelectiveScanSaved(**scanned, states=None, **options)
    checks.selective_scan_bwd("gradient", saved, arguments["dy"], arguments["dlast_state"])
    return checked


def wanted(arguments):
    """Names of the arguments that get a gradient."""
    return [name for name in SCAN.names if arguments[name] is not None]


def blocks_of_time(u, block_length, reverse):
    """Slices of memory's time in the order in which they are walked, of whole chunks: rounded up.

    So the states that the backward pass starts from are those of a scan in one piece.
    """
    block_length = block_length or scan_files.default_block_length(u)
    return list(scan_files.blocks_of_time(u.shape[2], -(-block_length // CHUNK) * CHUNK, reverse))


def grad_blocks(arguments, options, blocks, grads, states, device=None):
    """Write the gradients of a scan, block by block.

    Parameters
    ----------
    arguments : dict
        Arrays by name, as `read_inputs` gives them.
    options : dict
        delta_softplus, reverse, discretization.
    blocks : list of slice
        As `blocks_of_time` gives them.
    grads : dict
        For every argument in `wanted`, an array of its shape and dtype that receives the gradient.
    states : array (blocks, batch, dim, state)
        Memory for the state that enters each block.
    device : int or None
        CUDA device; None for the CPU.

    Yields
    ------
    float
        How much of the work is done, after each block of both passes; 1 when everything is written.
    """
    lengths = [block.stop - block.start for block in blocks]
    done, work = 0, sum(lengths[:-1]) + sum(lengths)
    with _place(device) as (upload, download):
        constant = {name: upload(x) for name, x in arguments.items() if x is not None and not varies(name, x)}
        state, carry = (constant.pop(name, None) for name in ("initial_state", "dlast_state"))
        zeros = np.zeros(states.shape[1:], states.dtype)
        state, carry = (upload(zeros) if x is None else x for x in (state, carry))

        def part(block, without):
            cut = {name: take(name, x, block, arguments) for name, x in arguments.items() if name not in (*constant, *without)}
            return {name: None if x is None else upload(x) for name, x in cut.items()} | constant

        # Functions, so that a block's arrays are let go before the next one's are made.
        def advance(block, state):
            now = part(block, ("initial_state", "dlast_state", "z", "dy"))  # the gate z acts on y alone
            return selective_scan(**now, **options, initial_state=state, return_last_state=True)[1]

        def differentiate(block, state, carry):
            now = part(block, ("initial_state", "dlast_state"))
            dy = now.pop("dy")
            _, _, saved = selective_scan_fwd(**now, **options, initial_state=state)
            found = selective_scan_bwd(dy, saved, carry)
            for name, x in grads.items():
                if name in sums:
                    _add(sums[name], download(getattr(found, name)))
                elif name != "initial_state":
                    take(name, x, block, arguments)[...] = download(getattr(found, name))
            return found.initial_state

        sums = {  # in double precision, so that their rounding does not grow with the number of blocks
            name: np.zeros(x.shape, np.result_type(x.dtype, np.float64))
            for name, x in grads.items()
            if not varies(name, x) and name != "initial_state"
        }
        for index, block in enumerate(blocks):
            states[index] = download(state)
            if index < len(blocks) - 1:
                state = advance(block, state)
                done += lengths[index]
                yield done / work
        for index, block in reversed(list(enumerate(blocks))):
            carry = differentiate(block, upload(states[index]), carry)
            done += lengths[index]
            yield done / work

        with np.errstate(over="ignore", invalid="ignore"):
            for name, total in sums.items():
                grads[name][...] = total
        if "initial_state" in grads:
            grads["initial_state"][...] = download(carry)
    yield 1.0


def _add(total, x):
    with np.errstate(over="ignore", invalid="ignore"):
        total += x


@contextlib.contextmanager
def _place(device):
    """The functions that bring an array to where it is computed with, and back."""
    if device is None:
        yield (lambda x: x), (lambda x: x)
        return
    import cupy

    with cupy.cuda.Device(device):
        yield (lambda x: cupy.asarray(np.ascontiguousarray(x))), cupy.asnumpy
