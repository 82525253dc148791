"""Softmax cross-entropy, and its gradient.

    loss = mean over rows that are not ignored of  log Σ_j exp(l_j) - l_target

NumPy arrays run `mambacupy.reference.loss`; CuPy arrays run cuda_src/cross_entropy.cu.
"""

from mambacupy import arrays, checks_dense, kernels
from mambacupy.ops import plans, rows
from mambacupy.reference import loss as reference
from mambacupy.reference.loss import CrossEntropyGrads, CrossEntropySaved

__all__ = ["CrossEntropyGrads", "CrossEntropySaved", "softmax_cross_entropy_bwd", "softmax_cross_entropy_fwd"]


def softmax_cross_entropy_fwd(logits, targets, *, ignore_index=-1):
    """Mean negative log-likelihood of the targets.

    Parameters
    ----------
    logits : array (..., vocabulary)
        float16, bfloat16, float32 or float64. A slice such as `logits[:, :-1]` is read in place.
    targets : array (...)
        Of integers: classes from 0 to vocabulary - 1, or ignore_index.
    ignore_index : int
        Targets of this value do not count, and their logits have no gradient.

    Returns
    -------
    loss : array ()
        float32 (float64 for float64 logits); 0 where no target counts.
    saved : CrossEntropySaved
        Logits and targets, by reference, and two numbers a row.

    Raises
    ------
    TypeError
        An argument is no NumPy or CuPy array, has a dtype that is not supported, or lives elsewhere than the other.
    ValueError
        A shape does not fit, or NumPy targets are out of range.

    Notes
    -----
    Arithmetic is float32 at least, a block of rows at a time; nothing of the logits' size is allocated. To look into CuPy
    targets would mean to wait for the GPU: there, a target out of range makes the loss NaN.
    """
    xp = checks_dense.cross_entropy("softmax_cross_entropy_fwd", logits, targets, ignore_index)
    ignore_index = int(ignore_index)
    if xp.__name__ == "numpy":
        return reference.softmax_cross_entropy_fwd(logits, targets, ignore_index=ignore_index)
    real, count = arrays.compute_dtype(logits.dtype), targets.size
    with logits.device:
        maximum, total, losses = (xp.empty(count, real) for _ in range(3))
        result = {"loss": xp.zeros((), real), "count": xp.zeros((), real)}
        saved = CrossEntropySaved(logits, targets, maximum, total, result["count"], ignore_index)
        if count:
            given = {"maximum": maximum, "total": total, "losses": losses, "dloss": None, "dlogits": None} | result
            _launch(xp, "cross_entropy_fwd", logits, targets, ignore_index, given)
            _launch(xp, "cross_entropy_mean", logits, targets, ignore_index, given)
    return result["loss"], saved


def softmax_cross_entropy_bwd(dloss, saved):
    """Gradient of `softmax_cross_entropy_fwd`.

    Parameters
    ----------
    dloss : array () or number
        Gradient of loss, in its dtype; 1.0 where loss is what is minimised.
    saved : CrossEntropySaved
        Second result of `softmax_cross_entropy_fwd`; its arrays must not have been written to since.

    Returns
    -------
    CrossEntropyGrads
        Gradient of the logits, in their shape and dtype.

    Raises
    ------
    TypeError, ValueError
        dloss is no such number, or no array of the library and device of `saved`; `saved` is something else.
    """
    dloss = checks_dense.cross_entropy_bwd("softmax_cross_entropy_bwd", saved, dloss)
    logits, targets, maximum, total, count, ignore_index = saved
    xp = arrays.library_of("softmax_cross_entropy_bwd", "saved.logits", logits)
    if xp.__name__ == "numpy":
        return reference.softmax_cross_entropy_bwd(dloss, saved)
    with logits.device:
        dlogits = xp.empty(logits.shape, logits.dtype)
        if targets.size:
            given = {"maximum": maximum, "total": total, "losses": None, "loss": None, "count": count, "dloss": dloss}
            _launch(xp, "cross_entropy_bwd", logits, targets, ignore_index, given | {"dlogits": dlogits})
    return CrossEntropyGrads(dlogits)


def _two_strides(x):
    """How rows of x (..., n) lie: (inner, outer, row), so that row r is r // inner·outer + r % inner·row elements from the
    first; None where they lie otherwise, or are not contiguous."""
    if x.ndim < 3:
        stride = rows.row_stride(x)
        return None if stride is None else (1, stride, 0)
    for axis in range(x.ndim - 1):  # axes before it are the outer ones
        outer, inner = x[(..., *(0,) * (x.ndim - 1 - axis), slice(None))], x[(0,) * axis]
        strides = rows.row_stride(outer), rows.row_stride(inner)
        if None not in strides:
            return inner.size // x.shape[-1], *strides
    return None


def _launch(xp, name, logits, targets, ignore_index, given):
    vocabulary = logits.shape[-1]
    strides = _two_strides(logits)
    if strides is None or not plans.is_whole(logits):
        logits, strides = logits.copy(), (1, vocabulary, 0)
    targets = targets.ravel()  # (...) -> (rows,)
    if targets.dtype.name not in _INTEGERS:
        targets = targets.astype("int64")
    inner, outer, row = strides
    # Short rows: a warp each, eight side by side. Long ones: a block each.
    mean = name == "cross_entropy_mean"
    threads, team = (1024, 1024) if mean else (256, 32 if vocabulary <= 2048 else 256)
    tensors = [(logits, outer, row)] if given["dlogits"] is None else [(logits, outer, row), (given["dlogits"],)]
    constants = {
        "MEAN": int(mean), "THREADS": threads, "TEAM": team, "VECTOR": rows.widest_access(vocabulary, *tensors),
        "X_T": kernels.C_TYPES[logits.dtype.name], "TARGET_T": _INTEGERS[targets.dtype.name],
        "REAL": kernels.C_TYPES[arrays.compute_dtype(logits.dtype).name],
    }  # fmt: skip
    numbers = {
        "rows": targets.size, "inner": inner, "vocab": vocabulary, "logits_outer": outer, "logits_row": row,
        "ignore_index": ignore_index,
    }  # fmt: skip
    blocks = 1 if mean else -(-targets.size // (threads // team))
    given = given | {"logits": logits, "targets": rows.contiguous(xp, targets), "dloss": plans.whole(given["dloss"])}
    plans.prepared("cross_entropy.cu", name, constants, blocks, threads, numbers)(given)


_INTEGERS = {"int32": "int", "int64": "long long"}
