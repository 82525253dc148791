"""Linear maps and embeddings in NumPy, forward and backward.

    linear      y = x @ weight.T + bias          dx = dy @ weight,  dweight = dyᵀ @ x,  dbias = Σ_rows dy
    embedding   y_i = weight[token_i]            dweight[v] = Σ_{i: token_i = v} dy_i

16-bit products are computed in float32 and rounded once.
"""

import math
from typing import Any, NamedTuple

import numpy as np

from mambacupy import arrays, checks_dense


class LinearSaved(NamedTuple):
    """What a linear map's backward pass needs: its arguments, by reference."""

    x: Any
    weight: Any
    bias: Any


class LinearGrads(NamedTuple):
    """Gradients of a linear map, each in its argument's shape and dtype; None where there was no bias."""

    x: Any
    weight: Any
    bias: Any


class EmbeddingSaved(NamedTuple):
    """What an embedding's backward pass needs: the tokens, by reference, and what weight was like."""

    tokens: Any
    vocabulary: int
    dim: int
    dtype: Any


class EmbeddingGrads(NamedTuple):
    """Gradient of an embedding, in weight's shape and dtype."""

    weight: Any


def rows(x):
    """(..., n) -> (rows, n), also where there are no rows."""
    return x.reshape(math.prod(x.shape[:-1]), x.shape[-1])


def linear_fwd(x, weight, bias=None):
    """`mambacupy.ops.linear.linear_fwd` for NumPy arrays."""
    checks_dense.linear("linear_fwd", x, weight, bias)
    real = arrays.compute_dtype(x.dtype)
    y = rows(x).astype(real, copy=False) @ weight.T.astype(real, copy=False)
    if bias is not None:
        y += bias.astype(real, copy=False)
    y = y.reshape(*x.shape[:-1], weight.shape[0])  # (rows, out) -> (..., out)
    return y.astype(x.dtype, copy=False), LinearSaved(x, weight, bias)


def linear_bwd(dy, saved, *, dtype=None, onto=None):
    """`mambacupy.ops.linear.linear_bwd` for NumPy arrays."""
    _, dtype = checks_dense.linear_bwd("linear_bwd", saved, dy, dtype, onto)
    x, weight, bias = saved
    real = arrays.compute_dtype(x.dtype)
    dy = np.concatenate(dy, axis=-1) if isinstance(dy, tuple) else dy
    dy = rows(dy).astype(real, copy=False)
    dx = (dy @ weight.astype(real, copy=False)).reshape(x.shape)  # (rows, in) -> (..., in)
    dx = dx if onto is None else dx + onto.astype(real, copy=False)
    dweight = dy.T @ rows(x).astype(real, copy=False)
    dbias = None if bias is None else dy.sum(0, dtype=np.float64).astype(dtype)
    return LinearGrads(dx.astype(x.dtype, copy=False), dweight.astype(dtype, copy=False), dbias)


def embedding_fwd(tokens, weight):
    """`mambacupy.ops.linear.embedding_fwd` for NumPy arrays."""
    checks_dense.embedding("embedding_fwd", tokens, weight)
    return weight[tokens], EmbeddingSaved(tokens, *weight.shape, weight.dtype)


def embedding_bwd(dy, saved, *, onto=None):
    """`mambacupy.ops.linear.embedding_bwd` for NumPy arrays: tokens sorted, then sums over those that are equal."""
    checks_dense.embedding_bwd("embedding_bwd", saved, dy, onto)
    dweight = np.zeros((saved.vocabulary, saved.dim), saved.dtype) if onto is None else onto.copy()
    tokens = saved.tokens.ravel()
    if dy.size:
        order = np.argsort(tokens, kind="stable")
        found, starts = np.unique(tokens[order], return_index=True)
        terms = rows(dy)[order].astype(arrays.compute_dtype(saved.dtype), copy=False)
        dweight[found] = (dweight[found] + np.add.reduceat(terms, starts, axis=0)).astype(saved.dtype)
    return EmbeddingGrads(dweight)
