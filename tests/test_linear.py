"""Linear maps and embeddings: NumPy against the equations and finite differences, GPU against NumPy in float64."""

import dense
import numpy as np
import pytest

from mambacupy.gradients import check_gradients
from mambacupy.ops import linear, products
from mambacupy.ops.linear import embedding_bwd, embedding_fwd, linear_bwd, linear_fwd

BASE = {"shape": (2, 5, 24), "out": 36, "dtype": "float32", "bias": True}
ROWS = {
    "base": {},
    "no-bias": {"bias": False},
    **{dtype: {"dtype": dtype, "shape": (64, 160)} for dtype in ("float16", "bfloat16", "float64")},
    "one-number-bfloat16": {"dtype": "bfloat16", "shape": (1, 999), "out": 1},
    "one-weight-bfloat16": {"dtype": "bfloat16", "shape": (999, 1), "out": 1},
    "one-axis": {"shape": (24,)},
    "rows-1000-bfloat16": {"shape": (1000, 16), "dtype": "bfloat16"},
    "no-rows": {"shape": (0, 24)},
    "no-input": {"shape": (3, 0)},
    "no-output": {"out": 0},
}


def make(row):
    """x, weight, bias and dy."""
    case = BASE | ROWS[row]
    *outer, inner = case["shape"]
    shapes = case["shape"], (case["out"], inner), (case["out"],), (*outer, case["out"])
    x, weight, bias, dy = (dense.normal(i, *shape, dtype=case["dtype"]) for i, shape in enumerate(shapes))
    return x, weight, bias if case["bias"] else None, dy


def check_linear(row, to=lambda x: x, back=lambda x: x):
    """Products against sums by einsum in float64."""
    x, weight, bias, dy = make(row)
    y, saved = linear_fwd(to(x), to(weight), None if bias is None else to(bias))
    grads = linear_bwd(to(dy), saved)
    count = int(np.prod(x.shape[:-1]))
    w8 = dense.wide(weight)
    x8, dy8 = (dense.wide(a).reshape(count, a.shape[-1]) for a in (x, dy))
    wanted = {
        "y": (np.einsum("ri,oi->ro", x8, w8) + (0 if bias is None else dense.wide(bias))).reshape(dy.shape),
        "x": np.einsum("ro,oi->ri", dy8, w8).reshape(x.shape),
        "weight": np.einsum("ro,ri->oi", dy8, x8),
        "bias": None if bias is None else dy8.sum(0),
    }
    for name, two in wanted.items():
        one = y if name == "y" else getattr(grads, name)
        assert (one is None) == (two is None), name
        if two is not None:
            one = back(one)
            assert one.shape == two.shape and one.dtype == x.dtype, name
            scale = 2 if name == "y" else 1  # on a GPU the product is rounded, then the sum with the bias
            assert dense.cases.relative_error(one, two) <= scale * dense.STORED[x.dtype.name], name


@pytest.mark.parametrize("row", ROWS)
def test_linear(row):
    check_linear(row)


@pytest.mark.parametrize("shape", [(3, 2, 5), (7, 5), (5,)])
@pytest.mark.parametrize("bias", [True, False])
def test_linear_by_finite_differences(shape, bias):
    inputs = {"x": dense.normal(1, *shape), "weight": dense.normal(2, 4, 5), "bias": dense.normal(3, 4) if bias else None}
    check_gradients(linear_fwd, linear_bwd, inputs)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_products_of_16_bits_accumulate_in_float32(dtype):
    """1 + 4096 terms of 2^-12: each is lost where the sum has 16 bits."""
    x = np.full((2, 4097), 2**-12, dense.DTYPES[dtype])
    x[:, 0] = 1
    ones = np.ones((3, 4097), x.dtype)
    y, saved = linear_fwd(x, ones, np.zeros(3, x.dtype))
    assert y.dtype == x.dtype and (y == 2).all()
    rows = np.ascontiguousarray(x.T)
    grads = linear_bwd(rows, linear_fwd(np.ones((4097, 1), x.dtype), np.ones((2, 1), x.dtype), np.zeros(2, x.dtype))[1])
    assert (grads.weight == 2).all() and (grads.bias == 2).all()
    assert saved.x is x, "nothing is kept but the arguments"


def test_linear_of_views():
    x, weight = dense.normal(1, 3, 8, 6), dense.normal(2, 6, 8)
    turned, cut = x.swapaxes(1, 2)[..., ::-1], weight.T[:4, ::2]
    for one, two in ((turned, weight), (x[:, ::2, :3], cut)):
        assert np.allclose(linear_fwd(one, two)[0], linear_fwd(one.copy(), two.copy())[0], rtol=1e-13)


@pytest.mark.parametrize("row", ["base", "bfloat16", "one-number-bfloat16", "no-rows"])
def test_parts_of_dy_and_wide_gradients(row, to=lambda x: x, back=lambda x: x):
    """As from one dy; what 16-bit products add up comes back unrounded where float32 is asked for."""
    x, weight, _, dy = make(row)
    weight, dy = np.concatenate([weight, weight[::-1]]), np.concatenate([dy, 2 * dy[..., :1], dy[..., 1:]], axis=-1)
    bias, cut = weight[:, :1].sum(1), dy.shape[-1] // 2
    real = np.dtype("float64" if x.dtype == "float64" else "float32")
    saved = linear_fwd(to(x), to(weight), to(bias))[1]
    parts = to(dy[..., :cut].copy()), to(dy[..., cut:].copy())
    grads = linear_bwd(parts, saved, dtype=real, onto=to(x[..., ::-1].copy()))
    whole = linear_bwd(dense.wide(dy), linear_fwd(*map(dense.wide, (x, weight, bias)))[1])
    whole = whole._replace(x=whole.x + x[..., ::-1])
    for name, dtype in (("x", x.dtype), ("weight", real), ("bias", real)):
        one, two = back(getattr(grads, name)), getattr(whole, name)
        assert one.shape == two.shape and one.dtype == dtype
        scale = 2 if name == "x" else 1  # on a GPU the sum with each part's product is rounded
        assert not two.size or dense.cases.relative_error(one, two) <= scale * dense.STORED[dtype.name], name


def test_a_gradient_is_added_to_one_of_x():
    saved = linear_fwd(X, W)[1]
    with pytest.raises(ValueError, match=r"linear_bwd: onto has shape \(1, 4\), wanted \(2, 4\), the shape of x"):
        linear_bwd(np.zeros((2, 3), X.dtype), saved, onto=X[:1])
    with pytest.raises(TypeError, match="linear_bwd: onto is float64, wanted float32, the dtype of x"):
        linear_bwd(np.zeros((2, 3), X.dtype), saved, onto=dense.wide(X))
    with pytest.raises(TypeError, match="linear_bwd: dtype is float16, wanted float32 because x is float32"):
        linear_bwd(np.zeros((2, 3), X.dtype), saved, dtype="float16")


# ---------------------------------------------------------------------------------------------------- embedding
TOKENS = {
    "base": {},
    **{dtype: {"dtype": dtype} for dtype in ("float16", "bfloat16", "float64")},
    "int64": {"tokens": "int64"},
    "uint16": {"tokens": "uint16"},
    **{f"vocabulary-{n}": {"vocabulary": n} for n in (1, 2, 33, 5000)},
    **{f"count-{n}": {"shape": (n,), "vocabulary": 3} for n in (1, 31, 32, 33, 64, 1000)},
    "dim-33": {"dim": 33},
    "dim-1": {"dim": 1},
    "dim-1000-bfloat16": {"dim": 1000, "dtype": "bfloat16"},
    "no-tokens": {"shape": (0, 4)},
    "no-axis": {"shape": ()},
    "no-dim": {"dim": 0},
}
EMBEDDING = {"shape": (3, 70), "vocabulary": 11, "dim": 16, "dtype": "float32", "tokens": "int32"}


def make_embedding(row):
    case = EMBEDDING | TOKENS[row]
    tokens = np.asarray(np.random.default_rng(0).integers(0, case["vocabulary"], case["shape"]), case["tokens"])
    weight = dense.normal(1, case["vocabulary"], case["dim"], dtype=case["dtype"])
    return tokens, weight, dense.normal(2, *tokens.shape, case["dim"], dtype=case["dtype"])


def rows_one_by_one(tokens, dy, like):
    dweight = np.zeros(like.shape)
    for at in np.ndindex(tokens.shape):
        dweight[tokens[at]] += dense.wide(dy[at])
    return linear.EmbeddingGrads(dweight)


@pytest.mark.parametrize("row", TOKENS)
def test_embedding(row):
    tokens, weight, dy = make_embedding(row)
    y, saved = embedding_fwd(tokens, weight)
    assert y.dtype == weight.dtype and y.shape == dy.shape
    for at in np.ndindex(tokens.shape):
        assert (y[at] == weight[tokens[at]]).all()
    grads = embedding_bwd(dy, saved)
    assert grads.weight.dtype == weight.dtype
    assert dense.errors(grads, rows_one_by_one(tokens, dy, weight)) == {}


def check_onto(row, to=np.asarray, back=np.asarray):
    tokens, weight, dy = make_embedding(row)
    other = dense.normal(3, *weight.shape, dtype=weight.dtype.name)
    _, saved = embedding_fwd(to(tokens), to(weight))
    got = embedding_bwd(to(dy), saved, onto=to(other.copy()))
    rows = rows_one_by_one(tokens, dy, weight).weight
    assert dense.errors(linear.EmbeddingGrads(back(got.weight)), linear.EmbeddingGrads(rows + dense.wide(other))) == {}


@pytest.mark.parametrize("row", TOKENS)
def test_embedding_onto_another_gradient(row):
    check_onto(row)


def test_embedding_by_finite_differences():
    tokens = np.array([[0, 3, 3], [4, 0, 3]])
    check_gradients(embedding_fwd, embedding_bwd, {"tokens": tokens, "weight": dense.normal(1, 5, 3)})


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_rows_of_16_bits_are_summed_in_float32(dtype):
    weight = np.zeros((2, 8), dense.DTYPES[dtype])
    dy = np.full((4097, 8), 2**-12, weight.dtype)
    dy[0] = 1
    _, saved = embedding_fwd(np.ones(4097, np.int32), weight)
    assert (embedding_bwd(dy, saved).weight == np.array([[0], [2]])).all()
    assert (embedding_bwd(dy.astype(np.float32), saved).weight[1] == 2).all()


# ---------------------------------------------------------------------------------------------------- errors
X, W = np.zeros((2, 4), np.float32), np.zeros((3, 4), np.float32)
T = np.zeros(5, np.int32)
ERRORS = {
    "x-none": (linear_fwd, (None, W), TypeError, "x is None"),
    "x-integers": (linear_fwd, (T, W), TypeError, "x is int32"),
    "x-no-axis": (linear_fwd, (np.zeros((), np.float32), W), ValueError, r"x has shape \(\), wanted \(\.\.\., in\)"),
    "weight-turned": (linear_fwd, (X, W.T), ValueError, r"weight has shape \(4, 3\), wanted \(out, in=4\); write weight"),
    "weight-axes": (linear_fwd, (X, W[0]), ValueError, r"weight has shape \(4,\), wanted \(out, in=4\)"),
    "weight-dtype": (linear_fwd, (X, W.astype(float)), TypeError, "weight is float64, wanted float32, the dtype of x"),
    "bias-shape": (linear_fwd, (X, W, W[0]), ValueError, r"bias has shape \(4,\), wanted \(out=3,\)"),
    "bias-dtype": (linear_fwd, (X, W, np.zeros(3)), TypeError, "bias is float64, wanted float32"),
    "dy-shape": (linear_bwd, (X, linear_fwd(X, W)[1]), ValueError, r"dy has shape \(2, 4\), wanted \(2, 3\), the shape of y"),
    "dy-dtype": (linear_bwd, (np.zeros((2, 3)), linear_fwd(X, W)[1]), TypeError, "dy is float64, wanted float32"),
    "dy-parts": (linear_bwd, ((X, X), linear_fwd(X, W)[1]), ValueError, r"the parts of dy have 4 \+ 4 columns, wanted 3"),
    "saved": (linear_bwd, (X, None), TypeError, "saved is of type NoneType, wanted the second result of linear_fwd"),
    "tokens-float": (embedding_fwd, (X, W), TypeError, r"tokens is float32, wanted int32 or int64; write tokens.astype"),
    "tokens-list": (embedding_fwd, ([1], W), TypeError, "tokens is of type list"),
    "tokens-negative": (embedding_fwd, (T - 1, W), ValueError, r"tokens holds -1 at \(0,\), wanted 0 to 2"),
    "tokens-beyond": (embedding_fwd, (T + 3, W), ValueError, r"tokens holds 3 at \(0,\), wanted 0 to 2"),
    "table-axes": (embedding_fwd, (T, W[0]), ValueError, r"weight has shape \(4,\), wanted \(vocabulary, dim\)"),
    "embedding-dy": (embedding_bwd, (X, embedding_fwd(T, W)[1]), ValueError, r"dy has shape \(2, 4\), wanted \(5, 4\)"),
    "embedding-saved": (embedding_bwd, (X, 3), TypeError, "saved is of type int, wanted the second result of embedding_fwd"),
}  # fmt: skip


def test_errors_of_what_is_added_to():
    _, saved = embedding_fwd(T, W)
    dy = np.zeros((5, 4), W.dtype)
    with pytest.raises(ValueError, match=r"embedding_bwd: onto has shape \(2, 4\), wanted \(3, 4\), the shape of weight"):
        embedding_bwd(dy, saved, onto=X)
    with pytest.raises(TypeError, match="embedding_bwd: onto is float64, wanted float32, the dtype of weight"):
        embedding_bwd(dy, saved, onto=dense.wide(W))


@pytest.mark.parametrize("row", ERRORS)
def test_errors(row):
    call, arguments, kind, message = ERRORS[row]
    with pytest.raises(kind, match=f"{call.__name__}: {message}"):
        call(*arguments)


# ---------------------------------------------------------------------------------------------------- kernels, without a GPU
def launch(row):
    """Both directions of an embedding, as they would be launched."""
    tokens, weight, dy = make_embedding(row)
    if dy.size:
        linear._embedding_forward(np, tokens, weight, np.empty_like(dy))
        linear._embedding_backward(np, dy, embedding_fwd(tokens, weight)[1], np.zeros_like(weight))


@pytest.mark.parametrize(("file", "constants"), dense.instantiations(launch, TOKENS))
def test_compiles_without_spills(file, constants):
    dense.compiles(file, constants)


def test_launches_get_what_the_struct_names(monkeypatch):
    launched = dense.record(monkeypatch)
    for row in TOKENS:
        launch(row)
    dense.check_launches(launched, "embedding_fwd", "embedding_bwd", "embedding_join")
    for _, name, constants, blocks, threads, numbers, _ in launched:
        units = numbers["count"] if name == "embedding_fwd" else -(-numbers["count"] // constants["CHUNK"])
        assert 0 <= blocks * threads - units * numbers["dim"] // constants["VECTOR"] < threads


def test_sorted_tokens_put_those_out_of_range_last(monkeypatch):
    launched = dense.record(monkeypatch)
    tokens = np.array([2, -5, 0, 9, 2], np.int32)
    linear._embedding_backward(
        np, dense.normal(1, 5, 4), linear.EmbeddingSaved(tokens, 3, 4, np.dtype(float)), np.zeros((3, 4))
    )
    arrays = launched[0][-1]
    assert arrays["tokens"].tolist() == [0, 2, 2, 3, 3] and arrays["order"].tolist() == [2, 0, 4, 1, 3]


def test_a_product_of_one_element_is_float32():
    """CuPy multiplies it element by element, and rounds every term: here a stand-in does."""

    class Rounds(np.ndarray):
        def __matmul__(self, other):
            terms = np.asarray(self).ravel() * np.asarray(other).ravel()
            return np.asarray(terms.astype(np.float32).sum(keepdims=True)[None]).astype(self.dtype)

    a = np.full((1, 1000), 1 + 2**-7, dense.DTYPES["bfloat16"])
    got = products.product(np, a.view(Rounds), a.T.view(Rounds))
    assert dense.cases.relative_error(np.asarray(got), [[1000 * (1 + 2**-7) ** 2]]) <= 2e-3


# ---------------------------------------------------------------------------------------------------- on a GPU
@pytest.fixture(scope="module")
def cp():
    return pytest.importorskip("cupy")


@pytest.mark.gpu
@pytest.mark.parametrize("row", ROWS)
def test_gpu_linear(cp, row):
    check_linear(row, cp.asarray, lambda x: x.get())


@pytest.mark.gpu
@pytest.mark.parametrize("row", ["base", "bfloat16", "one-number-bfloat16", "no-rows"])
def test_gpu_parts_of_dy_and_wide_gradients(cp, row):
    test_parts_of_dy_and_wide_gradients(row, cp.asarray, lambda x: x.get())


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_gpu_products_of_matrices_as_they_lie(cp, dtype):
    """Turned, with rows apart, of one row or column; into an array, and on top of what is in it."""
    a, b = (cp.asarray(dense.normal(i, 70, 80, dtype=dtype)) for i in range(2))
    pairs = [(a, b.T), (a.T, b), (a[:, 8:20], b[:12]), (a[::2, :16], b[3:19]), (a[:, ::2], b[30:]), (a[:1], b.T), (a, b[:1].T)]
    for one, two in [*pairs, (a[:, :1], b[:1]), (a[:, ::-1], b.T)]:
        wanted = dense.wide(one.get()) @ dense.wide(two.get())
        out = cp.ones(wanted.shape, "float32")
        products.product(cp, one, two, out, accumulate=True)
        assert dense.cases.relative_error(products.product(cp, one, two).get(), wanted) <= dense.STORED[dtype]
        assert dense.cases.relative_error(out.get(), wanted + 1) <= (dense.STORED["float32"] if dtype != "float32" else 1e-5)
    assert dtype == "float32" or products._library(cp) is not None, "the library that CuPy has loaded is not found"


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_gpu_products_of_16_bits_accumulate_in_float32(cp, dtype):
    x = cp.full((2, 4097), 2**-12, dense.DTYPES[dtype])
    x[:, 0] = 1
    y, _ = linear_fwd(x, cp.ones((3, 4097), x.dtype), cp.zeros(3, x.dtype))
    assert y.dtype == x.dtype and bool((y == 2).all())


@pytest.mark.gpu
@pytest.mark.parametrize("row", TOKENS)
def test_gpu_embedding(cp, row):
    tokens, weight, dy = make_embedding(row)
    y, saved = embedding_fwd(cp.asarray(tokens), cp.asarray(weight))
    assert y.get().tobytes() == weight[tokens].tobytes()
    got, again = (embedding_bwd(cp.asarray(dy), saved) for _ in range(2))
    assert dense.errors(got, rows_one_by_one(tokens, dy, weight)) == {}
    assert got.weight.get().tobytes() == again.weight.get().tobytes()


@pytest.mark.gpu
@pytest.mark.parametrize("row", TOKENS)
def test_gpu_embedding_onto_another_gradient(cp, row):
    check_onto(row, cp.asarray, lambda x: x.get())


@pytest.mark.gpu
def test_gpu_tokens_out_of_range(cp):
    tokens, weight = np.array([1, -1, 3, 2**31 - 1, 1], np.int32), dense.normal(1, 3, 8)
    y, saved = embedding_fwd(cp.asarray(tokens), cp.asarray(weight))
    assert cp.isnan(y[1:4]).all() and (y[0].get() == weight[1]).all()
    dy = dense.normal(2, 5, 8)
    got = embedding_bwd(cp.asarray(dy), saved).weight.get()
    assert np.array_equal(got, np.stack((0 * dy[0], dy[0] + dy[4], 0 * dy[0])))


@pytest.mark.gpu
def test_gpu_views_and_finite_differences(cp):
    tokens = cp.asarray(np.arange(24, dtype=np.int32).reshape(4, 6) % 5)[::2, ::-1]
    weight = cp.asarray(dense.normal(1, 10, 12))
    wanted = weight.get()[::2, 2:10][tokens.get()]
    assert np.array_equal(embedding_fwd(tokens, weight[::2, 2:10])[0].get(), wanted)
    assert np.array_equal(embedding_fwd(tokens, weight.T[:6, :])[0].get(), weight.get().T[:6][tokens.get()])
    check_gradients(embedding_fwd, embedding_bwd, {"tokens": tokens, "weight": weight})
    inputs = {"x": dense.normal(1, 3, 2, 5), "weight": dense.normal(2, 4, 5), "bias": dense.normal(3, 4)}
    check_gradients(linear_fwd, linear_bwd, {k: cp.asarray(x) for k, x in inputs.items()})
