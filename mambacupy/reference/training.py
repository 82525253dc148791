"""AdamW's step, clipping and rounding in NumPy, over lists of arrays."""

import numpy as np

from mambacupy import arrays


def adamw(params, grads, means, squares, decays, numbers):
    """`mambacupy.ops.training.adamw` for NumPy arrays."""
    beta1, rest1, beta2, rest2, correction1, correction2, eps, rate, decay = numbers
    found = [], [], []
    for p, g, m, v, decays_too in zip(params, grads, means, squares, decays, strict=True):
        wide, g = p.astype(m.dtype), g.astype(m.dtype)
        m, v = beta1 * m + rest1 * g, beta2 * v + rest2 * g**2
        change = m / correction1 / (np.sqrt(v / correction2) + eps)
        p = (wide - rate * (change + decay * wide if decays_too else change)).astype(p.dtype)
        for results, x in zip(found, (p, m, v), strict=True):
            results.append(x)
    return found


def clip(grads, most):
    """`mambacupy.ops.training.clip` for NumPy arrays."""
    norm = sum((g.astype(arrays.compute_dtype(g.dtype)) ** 2).sum() for g in grads) ** 0.5
    scale = np.minimum(1, most / (norm + 1e-6))
    return [(g * scale).astype(g.dtype) for g in grads], norm


def rounded(given, dtype):
    """`mambacupy.ops.training.rounded` for NumPy arrays."""
    return [x.astype(dtype) for x in given]
