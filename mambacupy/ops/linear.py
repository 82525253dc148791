"""Linear maps and embeddings, and their gradients.

    linear      y = x @ weight.T + bias
    embedding   y_i = weight[token_i]

Matrix products are the array library's own. NumPy arrays run `mambacupy.reference.linear`; CuPy arrays run cuBLAS, and
cuda_src/embedding.cu.
"""

from mambacupy import arrays, checks_dense, kernels
from mambacupy.ops import plans, rows
from mambacupy.ops.products import product
from mambacupy.reference import linear as reference
from mambacupy.reference.linear import EmbeddingGrads, EmbeddingSaved, LinearGrads, LinearSaved

__all__ = [
    "EmbeddingGrads",
    "EmbeddingSaved",
    "LinearGrads",
    "LinearSaved",
    "embedding_bwd",
    "embedding_fwd",
    "linear_bwd",
    "linear_fwd",
]

CHUNK = 32
"""Sorted tokens whose gradients one thread of cuda_src/embedding.cu adds up."""


def linear_fwd(x, weight, bias=None):
    """y = x @ weight.T + bias.

    Parameters
    ----------
    x : array (..., in)
        float16, bfloat16, float32 or float64.
    weight : array (out, in)
        x's dtype.
    bias : array (out,), optional
        x's dtype.

    Returns
    -------
    y : array (..., out)
        In x's dtype.
    saved : LinearSaved
        The arguments, by reference.

    Raises
    ------
    TypeError
        An argument is no NumPy or CuPy array, has a dtype that is not supported, or lives elsewhere than x.
    ValueError
        A shape does not fit.

    Notes
    -----
    16-bit products are accumulated in float32; on a GPU they run on tensor cores, and are rounded before the bias is added.
    """
    xp = checks_dense.linear("linear_fwd", x, weight, bias)
    if xp.__name__ == "numpy":
        return reference.linear_fwd(x, weight, bias)
    with kernels.device_of(x):
        y = product(xp, reference.rows(x), weight.T)
        if bias is not None:
            y += bias
    return y.reshape(*x.shape[:-1], weight.shape[0]), LinearSaved(x, weight, bias)  # (rows, out) -> (..., out)


def linear_bwd(dy, saved, *, dtype=None, onto=None):
    """Gradient of `linear_fwd`.

    Parameters
    ----------
    dy : array (..., out), or tuple of such
        Gradient of y: x's dtype, or float32 where that is a 16-bit one, which is rounded first on a GPU. A tuple has its parts
        along the last axis, which need not be joined.
    saved : LinearSaved
        Second result of `linear_fwd`; its arrays must not have been written to since.
    dtype : dtype, optional
        Of the gradients of weight and bias: x's by default, or float32 where that is a 16-bit one.
    onto : array (..., in), optional
        What the gradient of x is added to, of x's dtype: where x went elsewhere too. It may be written to.

    Returns
    -------
    LinearGrads
        Gradients of x, weight and bias (None if there was none), in their shapes and dtypes.

    Raises
    ------
    TypeError, ValueError
        dy is no array of the library and device of `saved`, or its dtype or shape does not fit; `saved` is something else.
    """
    xp, dtype = checks_dense.linear_bwd("linear_bwd", saved, dy, dtype, onto)
    if xp.__name__ == "numpy":
        return reference.linear_bwd(dy, saved, dtype=dtype, onto=onto)
    x, weight, bias = saved
    with x.device:
        parts = [reference.rows(part).astype(x.dtype, copy=False) for part in (dy if isinstance(dy, tuple) else (dy,))]
        x_rows = reference.rows(x)
        dx = None if onto is None else reference.rows(xp.ascontiguousarray(onto))
        start, dweight = 0, None if len(parts) == 1 else xp.empty(weight.shape, dtype)
        for part in parts:
            rows_of_part = slice(start, start + part.shape[1])
            dx = product(xp, part, weight[rows_of_part], dx, accumulate=dx is not None)
            made = product(xp, part.T, x_rows, None if dweight is None else dweight[rows_of_part], dtype=dtype)
            start = rows_of_part.stop
        dweight = made if dweight is None else dweight
        dbias = None
        if bias is not None:  # as products, sums over rows are accumulated in float32 whatever the dtype
            ones = xp.ones((1, len(x_rows)), x.dtype)
            dbias = xp.concatenate([product(xp, ones, part, dtype=dtype)[0] for part in parts])  # (1, out) -> (out,)
    return LinearGrads(dx.reshape(x.shape), dweight, dbias)  # (rows, in) -> (..., in)


def embedding_fwd(tokens, weight):
    """Rows of a table.

    Parameters
    ----------
    tokens : array (...)
        Of integers, from 0 to vocabulary - 1.
    weight : array (vocabulary, dim)
        float16, bfloat16, float32 or float64.

    Returns
    -------
    y : array (..., dim)
        In weight's dtype.
    saved : EmbeddingSaved
        The tokens, by reference, and what weight was like.

    Raises
    ------
    TypeError
        An argument is no NumPy or CuPy array, has a dtype that is not supported, or lives elsewhere than the other.
    ValueError
        weight is no matrix, or NumPy tokens are out of range.

    Notes
    -----
    To look into CuPy tokens would mean to wait for the GPU: there, a token out of range reads NaN.
    """
    xp = checks_dense.embedding("embedding_fwd", tokens, weight)
    if xp.__name__ == "numpy":
        return reference.embedding_fwd(tokens, weight)
    saved = EmbeddingSaved(tokens, *weight.shape, weight.dtype)
    with weight.device:
        y = xp.empty((*tokens.shape, weight.shape[1]), weight.dtype)
        if y.size:
            _embedding_forward(xp, tokens, weight, y)
    return y, saved


def embedding_bwd(dy, saved, *, onto=None):
    """Gradient of `embedding_fwd`.

    Parameters
    ----------
    dy : array (..., dim)
        Gradient of y: weight's dtype, or float32 where that is a 16-bit one.
    saved : EmbeddingSaved
        Second result of `embedding_fwd`; its tokens must not have been written to since.
    onto : array (vocabulary, dim), optional
        What the gradient is added to, of weight's dtype: where weight went elsewhere too. It may be written to.

    Returns
    -------
    EmbeddingGrads
        Gradient of weight, in its shape and dtype: rows of dy summed in float32 at least, in the order of their tokens.

    Raises
    ------
    TypeError, ValueError
        dy is no array of the library and device of `saved`, or its dtype or shape does not fit; `saved` is something else.

    Notes
    -----
    Tokens are sorted and equal ones added up in a fixed order, so results are bit-identical from run to run. CuPy tokens out of
    range have no gradient.
    """
    xp = checks_dense.embedding_bwd("embedding_bwd", saved, dy, onto)
    if xp.__name__ == "numpy":
        return reference.embedding_bwd(dy, saved, onto=onto)
    with dy.device:
        dweight = xp.zeros((saved.vocabulary, saved.dim), saved.dtype) if onto is None else rows.contiguous(xp, onto)
        if dy.size:
            _embedding_backward(xp, dy, saved, dweight)
    return EmbeddingGrads(dweight)


def _embedding_forward(xp, tokens, weight, y):
    tokens, (vocabulary, dim) = _plain(xp, tokens), weight.shape
    weight, weight_row = rows.as_rows(xp, weight)
    vector = rows.widest_access(dim, (weight, weight_row), (y,))
    numbers = {"count": tokens.size, "dim": dim, "vocabulary": vocabulary, "weight_row": weight_row, "dy_row": 0}
    given = _UNUSED | {"tokens": tokens, "weight": weight, "y": y}
    blocks = -(-tokens.size * (dim // vector) // 256)
    constants = _constants(0, vector, tokens, weight.dtype, weight.dtype)
    plans.prepared("embedding.cu", "embedding_fwd", constants, blocks, 256, numbers)(given)


def _embedding_backward(xp, dy, saved, dweight):
    tokens, dim = _plain(xp, saved.tokens), saved.dim
    if saved.vocabulary >= 2**31:
        tokens = tokens.astype("int64")
    tokens = xp.where((tokens < 0) | (tokens >= saved.vocabulary), tokens.dtype.type(saved.vocabulary), tokens)
    order = xp.argsort(tokens, kind="stable").astype("int64", copy=False)
    tokens = tokens[order]
    dy, dy_row = rows.as_rows(xp, dy)
    real = arrays.compute_dtype(saved.dtype)
    vector = rows.widest_access(dim, (dy, dy_row), (dweight,))
    chunks = -(-tokens.size // CHUNK)
    heads, tails = (xp.empty((chunks, dim), real) for _ in range(2))
    numbers = {"count": tokens.size, "dim": dim, "vocabulary": saved.vocabulary, "weight_row": 0, "dy_row": dy_row}
    given = {"tokens": tokens, "dy": dy, "order": order, "dweight": dweight, "heads": heads, "tails": tails}
    blocks = -(-chunks * (dim // vector) // 256)
    constants = _constants(1, vector, tokens, saved.dtype, dy.dtype)
    for name in ("embedding_bwd", "embedding_join"):
        plans.prepared("embedding.cu", name, constants, blocks, 256, numbers)(_UNUSED | given)


_UNUSED = dict.fromkeys(("tokens", "weight", "y", "dy", "order", "dweight", "heads", "tails"))


def _plain(xp, tokens):
    """Contiguous tokens (count,) of int32 or int64."""
    tokens = tokens.ravel()  # (...) -> (count,)
    if tokens.dtype.name not in _INTEGERS:
        tokens = tokens.astype("int64")
    return rows.contiguous(xp, tokens)


_INTEGERS = {"int32": "int", "int64": "long long"}


def _constants(backward, vector, tokens, dtype, dy_dtype):
    types = {"W_T": dtype, "DY_T": dy_dtype, "REAL": arrays.compute_dtype(dtype)}
    types = {name: kernels.C_TYPES[d.name] for name, d in types.items()}
    return {"BACKWARD": backward, "VECTOR": vector, "CHUNK": CHUNK, "TOKEN_T": _INTEGERS[tokens.dtype.name]} | types
