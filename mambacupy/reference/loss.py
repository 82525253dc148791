"""Softmax cross-entropy in NumPy, forward and backward.

    loss = mean over rows that are not ignored of  log Σ_j exp(l_j) - l_target
    dl_j = dloss/count·(exp(l_j) / Σ_k exp(l_k) - [j = target])

Rows are taken in blocks: there is never a float32 copy of all logits. Each row keeps its maximum m and Σ_j exp(l_j - m), not
their combination, because float32 has few digits left for exp(l - lse) where |lse| is large.
"""

from typing import Any, NamedTuple

import numpy as np

from mambacupy import arrays, checks_dense
from mambacupy.reference.linear import rows

BLOCK_SIZE = 1 << 20
"""Logits that are held in float32 at a time."""


class CrossEntropySaved(NamedTuple):
    """What the backward pass needs: logits and targets by reference, two numbers a row, and how many rows count."""

    logits: Any  # (..., vocabulary)
    targets: Any  # (...)
    maximum: Any  # (rows,), m = max_j l_j
    total: Any  # (rows,), Σ_j exp(l_j - m)
    count: Any  # (), targets that are not ignored
    ignore_index: int


class CrossEntropyGrads(NamedTuple):
    """Gradient of the loss, in the logits' shape and dtype."""

    logits: Any


def softmax_cross_entropy_fwd(logits, targets, *, ignore_index=-1):
    """`mambacupy.ops.loss.softmax_cross_entropy_fwd` for NumPy arrays."""
    checks_dense.cross_entropy("softmax_cross_entropy_fwd", logits, targets, ignore_index)
    real = arrays.compute_dtype(logits.dtype)
    flat, wanted = rows(logits), targets.ravel()
    maximum, total, losses = np.empty((3, len(flat)), real)
    kept = wanted != ignore_index
    with np.errstate(invalid="ignore", over="ignore", divide="ignore"):
        for here in _blocks(flat):
            block = flat[here].astype(real)
            maximum[here] = block.max(1)
            block -= maximum[here, None]
            losses[here] = -block[np.arange(len(block)), np.where(kept[here], wanted[here], 0)]
            total[here] = np.exp(block, out=block).sum(1)
            losses[here] += np.log(total[here])
    count = np.array(np.count_nonzero(kept), real)
    # float64: the mean of many rows keeps the digits that one row has
    loss = np.array(losses[kept].sum(dtype=np.float64) / max(float(count), 1.0), real)
    return loss, CrossEntropySaved(logits, targets, maximum, total, count, ignore_index)


def softmax_cross_entropy_bwd(dloss, saved):
    """`mambacupy.ops.loss.softmax_cross_entropy_bwd` for NumPy arrays."""
    dloss = checks_dense.cross_entropy_bwd("softmax_cross_entropy_bwd", saved, dloss)
    logits, targets, maximum, total, count, ignore_index = saved
    real = maximum.dtype
    dlogits = np.empty(logits.shape, logits.dtype)
    flat, dflat, wanted = rows(logits), rows(dlogits), targets.ravel()
    scale = real.type(dloss / max(float(count), 1.0))
    with np.errstate(invalid="ignore", over="ignore"):
        for here in _blocks(flat):
            block = flat[here].astype(real)
            block -= maximum[here, None]
            np.exp(block, out=block)
            block /= total[here, None]
            kept = wanted[here] != ignore_index
            block[np.flatnonzero(kept), wanted[here][kept]] -= 1
            block *= scale
            block[~kept] = 0  # also where logits are not finite
            dflat[here] = block
    return CrossEntropyGrads(dlogits)


def _blocks(flat):
    """Slices of rows."""
    step = max(1, BLOCK_SIZE // flat.shape[1])
    return [slice(first, min(first + step, len(flat))) for first in range(0, len(flat), step)]
