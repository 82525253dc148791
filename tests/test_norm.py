"""RMSNorm and LayerNorm: NumPy against the equations and finite differences, the kernels against NumPy in float64."""

import functools
import math

import dense
import ml_dtypes
import numpy as np
import pytest

from mambacupy import checks_dense
from mambacupy.gradients import check_gradients
from mambacupy.ops import norm
from mambacupy.ops.norm import layer_norm_bwd, layer_norm_fwd, rms_norm_bwd, rms_norm_fwd

PAIRS = {"rms": (rms_norm_fwd, rms_norm_bwd), "layer": (layer_norm_fwd, layer_norm_bwd)}

BASE = {
    "kind": "rms", "shape": (2, 5, 96), "dtype": "float32", "weight": "float32", "residual": "float32",
    "residual_dtype": None, "bias": True, "dtotal": True,
}  # fmt: skip
ROWS = {
    "base": {},
    "layer": {"kind": "layer"},
    "layer-no-bias": {"kind": "layer", "bias": False},
    **{f"dim-{n}": {"shape": (7, n)} for n in (1, 2, 3, 16, 48, 80, 769, 2560, 9001, 20000)},
    **{f"layer-dim-{n}": {"kind": "layer", "shape": (7, n)} for n in (2, 769, 2560, 9001, 20000)},
    "one-axis": {"shape": (33,)},
    "rows-3000": {"shape": (3000, 24)},
    "layer-rows-3000": {"kind": "layer", "shape": (3000, 24)},
    **{f"{t}-stream-float32": {"dtype": t, "shape": (5, 768)} for t in ("float16", "bfloat16")},
    "layer-bfloat16": {"kind": "layer", "dtype": "bfloat16", "shape": (5, 768)},
    "bfloat16-throughout": {"dtype": "bfloat16", "weight": "bfloat16", "residual": "bfloat16"},
    "float32-stream-bfloat16": {"residual": "bfloat16"},
    "float64": {"dtype": "float64", "weight": "float64", "residual": "float64"},
    "layer-float64-dim-9000": {
        "kind": "layer", "shape": (3, 9000), "dtype": "float64", "weight": "float64", "residual": "float64",
    },
    "no-residual": {"residual": None},
    "no-residual-wider": {"dtype": "bfloat16", "residual": None, "residual_dtype": "float32"},
    "no-dtotal": {"dtotal": False},
}  # fmt: skip


def make(row):
    """Arguments of the forward pass by name, dy, and dresidual_out."""
    case = BASE | ROWS[row]
    shape, real = case["shape"], case["weight"]
    arguments = {
        "x": dense.normal(1, *shape, dtype=case["dtype"]) + dense.DTYPES[case["dtype"]].type(1.5),
        "weight": dense.normal(2, shape[-1], dtype=real),
    }
    if case["kind"] == "layer":
        arguments["bias"] = dense.normal(3, shape[-1], dtype=real) if case["bias"] else None
    arguments["residual"] = case["residual"] and dense.normal(4, *shape, dtype=case["residual"])
    dy = dense.normal(5, *shape, dtype=case["dtype"])
    total = case["residual_dtype"] or case["residual"] or case["dtype"]
    return arguments, case, dy, dense.normal(6, *shape, dtype=total) if case["dtotal"] else None


def by_hand(kind, x, weight, bias=None, residual=None, eps=1e-5):
    """Row by row, along the definition."""
    y = np.empty(x.shape)
    for at in np.ndindex(x.shape[:-1]):
        r = [float(a) for a in x[at]]
        if residual is not None:
            r = [a + float(b) for a, b in zip(r, residual[at], strict=True)]
        mean = math.fsum(r) / len(r) if kind == "layer" else 0.0
        scale = math.sqrt(math.fsum((a - mean) ** 2 for a in r) / len(r) + eps)
        for i, a in enumerate(r):
            y[(*at, i)] = (a - mean) / scale * float(weight[i]) + (0.0 if bias is None else float(bias[i]))
    return y


@pytest.mark.parametrize("row", ROWS)
def test_forward_follows_the_definition(row):
    arguments, case, _, _ = make(row)
    before = {k: None if a is None else a.copy() for k, a in arguments.items()}
    y, total, _ = PAIRS[case["kind"]][0](**arguments, residual_dtype=case["residual_dtype"])
    assert y.dtype == arguments["x"].dtype and y.shape == arguments["x"].shape
    assert dense.cases.relative_error(y, by_hand(case["kind"], **arguments)) <= dense.STORED[y.dtype.name]
    wanted = dense.wide(arguments["x"]) + (0 if arguments["residual"] is None else dense.wide(arguments["residual"]))
    assert total.dtype.name == (case["residual_dtype"] or case["residual"] or case["dtype"])
    assert dense.cases.relative_error(total, wanted) <= dense.STORED[total.dtype.name]
    assert all(a is None or a.tobytes() == before[k].tobytes() for k, a in arguments.items())


def oracle(arguments, case, dy, dtotal):
    forward, backward = PAIRS[case["kind"]]
    wide = {k: dense.wide(a) for k, a in arguments.items()}
    y, total, saved = forward(**wide)
    return y, total, backward(dense.wide(dy), saved, dense.wide(dtotal))


def narrowest(case):
    """Of what the backward pass reads in place of r."""
    return case["residual_dtype"] or case["residual"] or case["dtype"]


@pytest.mark.parametrize("row", ROWS)
def test_gradients_by_dtype(row):
    arguments, case, dy, dtotal = make(row)
    forward, backward = PAIRS[case["kind"]]
    saved = forward(**arguments, residual_dtype=case["residual_dtype"])[2]
    got = backward(dy, saved, dtotal)
    assert dense.errors(got, oracle(arguments, case, dy, dtotal)[2], narrowest(case)) == {}
    for name, x in arguments.items():
        assert x is None or getattr(got, name).dtype == x.dtype, name
    if arguments["residual"] is not None:
        assert (got.residual is got.x) == (arguments["residual"].dtype == arguments["x"].dtype)


@pytest.mark.parametrize("kind", PAIRS)
@pytest.mark.parametrize("changes", [{}, {"residual": None}, {"bias": None}, {"shape": (4, 1)}, {"shape": (7,)}, {"eps": 0.3}])
def test_finite_differences(kind, changes):
    shape = changes.get("shape", (3, 2, 7))
    inputs = {"x": dense.normal(1, *shape), "weight": dense.normal(2, shape[-1]), "residual": dense.normal(3, *shape)}
    if kind == "layer":
        inputs["bias"] = dense.normal(4, shape[-1])
    inputs |= {k: v for k, v in changes.items() if k in inputs}
    forward, backward = PAIRS[kind]
    check_gradients(functools.partial(forward, eps=changes.get("eps", 1e-5)), backward, inputs)


def test_nothing_is_copied_where_nothing_is_added():
    x, weight = dense.normal(1, 3, 8, dtype="bfloat16"), np.ones(8, np.float32)
    _, total, saved = rms_norm_fwd(x, weight)
    assert total is x and saved.residual_out is x and saved.weight is weight
    assert rms_norm_fwd(x, weight, residual_dtype=np.float32)[1].dtype == np.float32
    assert saved.rstd.nbytes == 3 * 4, "what is kept besides: one number a row"


def test_a_float32_stream_keeps_what_16_bits_would_lose():
    x, residual = np.full((1, 4), 2**-10, ml_dtypes.bfloat16), np.ones((1, 4), np.float32)
    assert (rms_norm_fwd(x, np.ones(4, np.float32), residual)[1] == 1 + 2**-10).all()


def test_layer_norm_of_a_large_mean_keeps_its_digits():
    x = (dense.normal(1, 3, 512) + 300).astype(np.float32)
    got, wanted = (layer_norm_fwd(a, np.ones(512, a.dtype), eps=0.0)[0] for a in (x, dense.wide(x)))
    assert dense.cases.relative_error(got, wanted) <= 1e-5  # E[x²] - E[x]² would have 1e-2


@pytest.mark.parametrize("kind", PAIRS)
@pytest.mark.parametrize("shape", [(0, 4), (2, 0, 4)])
def test_no_rows(kind, shape):
    forward, backward = PAIRS[kind]
    x, weight = np.zeros(shape), np.ones(4)
    y, total, saved = forward(x, weight, residual=x)
    grads = backward(y, saved, total)
    assert y.shape == total.shape == grads.x.shape == shape and (grads.weight == 0).all()


X, W = np.zeros((2, 4), np.float32), np.zeros(4, np.float32)
ERRORS = {
    "x-none": ((None, W), {}, TypeError, "x is None"),
    "x-list": (([1.0], W), {}, TypeError, "x is of type list"),
    "x-integers": ((X.astype(int), W), {}, TypeError, r"x is int64, .* write x.astype\('float32'\)"),
    "x-no-axis": ((np.float32(1)[...], W), {}, ValueError, r"x has shape \(\), wanted \(\.\.\., dim\)"),
    "dim-0": ((X[:, :0], W[:0]), {}, ValueError, r"x has shape \(2, 0\), wanted .* at least 1"),
    "weight-shape": ((X, W[:3]), {}, ValueError, r"weight has shape \(3,\), wanted \(dim=4,\)"),
    "weight-dtype": ((X, W.astype(float)), {}, TypeError, "weight is float64, wanted float16, bfloat16 or float32"),
    "weight-of-float64": ((X.astype(float), W), {}, TypeError, "weight is float32, wanted float64"),
    "residual-shape": ((X, W, X[:1]), {}, ValueError, r"residual has shape \(1, 4\), wanted \(2, 4\), the shape of x"),
    "residual-dtype": ((X, W, X.astype(complex)), {}, TypeError, "residual is complex128"),
    "eps-negative": ((X, W), {"eps": -1.0}, ValueError, "eps is -1.0, wanted"),
    "eps-nan": ((X, W), {"eps": math.nan}, ValueError, "eps is nan"),
    "eps-text": ((X, W), {"eps": "1e-5"}, TypeError, "eps is of type str"),
    "residual_dtype-int": ((X, W), {"residual_dtype": "int32"}, TypeError, "residual_dtype is 'int32', wanted one of float16"),
    "residual_dtype-text": ((X, W), {"residual_dtype": "half-ish"}, TypeError, "residual_dtype is 'half-ish'"),
}


@pytest.mark.parametrize("row", ERRORS)
def test_errors(row):
    arguments, options, kind, message = ERRORS[row]
    with pytest.raises(kind, match="rms_norm_fwd: " + message):
        rms_norm_fwd(*arguments, **options)


def test_errors_of_layer_norm_and_of_the_backward_passes():
    with pytest.raises(ValueError, match=r"layer_norm_fwd: bias has shape \(3,\)"):
        layer_norm_fwd(X, W, W[:3])
    with pytest.raises(TypeError, match="layer_norm_fwd: bias is float16, wanted float32, the dtype of weight"):
        layer_norm_fwd(X, W, W.astype(np.float16))
    saved = rms_norm_fwd(X, W)[2]
    for dy, more, kind, message in (
        (None, (), TypeError, "dy is None"),
        (X[:1], (), ValueError, r"dy has shape \(1, 4\), wanted \(2, 4\)"),
        (X.astype(float), (), TypeError, "dy is float64, wanted float32"),
        (X, (X[:1],), ValueError, "dresidual_out has shape"),
        (X, (X.astype(np.float16),), TypeError, "dresidual_out is float16"),
    ):
        with pytest.raises(kind, match="rms_norm_bwd: " + message):
            rms_norm_bwd(dy, saved, *more)
    with pytest.raises(TypeError, match="rms_norm_bwd: saved is of type tuple, wanted the third result of rms_norm_fwd"):
        rms_norm_bwd(X, ())


# ---------------------------------------------------------------------------------------------------- kernels, without a GPU
def launch(row):
    """Both directions of a row, as they would be launched."""
    arguments, case, dy, dtotal = make(row)
    layer = case["kind"] == "layer"
    args = checks_dense.norm(
        "test", arguments["x"], arguments["weight"], arguments.get("bias"), arguments["residual"], 1e-5, case["residual_dtype"]
    )
    _, total, mean, rstd = norm._forward(args, 1e-5, layer)
    saved = norm.RMSNormSaved(total, args.weight, rstd, args.x.dtype, getattr(args.residual, "dtype", None))
    norm._backward(np, saved, mean, args.bias, dy, dtotal)


@pytest.mark.parametrize(("file", "constants"), dense.instantiations(launch, ROWS))
def test_compiles_without_spills(file, constants):
    dense.compiles(file, constants)


def test_launches_get_what_the_struct_names(monkeypatch):
    launched = dense.record(monkeypatch)
    for row in ROWS:
        launch(row)
    dense.check_launches(launched, "norm_fwd", "norm_bwd", "norm_bwd_weight", "sum_parts")


@pytest.mark.parametrize("row", ROWS)
def test_threads_cover_every_row_and_column_once(row, monkeypatch):
    launched = dense.record(monkeypatch)
    launch(row)
    for _, name, constants, blocks, threads, numbers, _ in launched:
        if name not in ("norm_fwd", "norm_bwd"):
            continue
        team, teams = constants["TEAM"], threads // constants["TEAM"]
        assert team & (team - 1) == 0 and threads == team * teams == constants["THREADS"]
        assert numbers["dim"] % constants["VECTOR"] == 0
        if constants["KEPT"]:
            assert 0 <= constants["ITEMS"] * team * constants["VECTOR"] - numbers["dim"] < team * constants["VECTOR"]
        held = teams if name == "norm_fwd" else numbers["rows_of_part"]
        assert held % teams == 0 and 0 <= blocks * held - numbers["rows"] < held


STRIDES = {
    "contiguous": (lambda x: x, 8),
    "columns": (lambda x: x[..., 2:6], 8),
    "every-second-row": (lambda x: x[:, ::2], 16),
    "first-rows": (lambda x: x[:, :3], None),
    "one-of-batch": (lambda x: x[1:2, :3], 8),
    "backwards": (lambda x: x[::-1, ::-1], -8),
    "rows-backwards": (lambda x: x[..., ::-1], None),
    "turned": (lambda x: x.swapaxes(1, 2), None),
    "broadcast": (lambda x: np.broadcast_to(x[0, 0], x.shape), 0),
    "one-column": (lambda x: x[..., 3:4], 8),
}


@pytest.mark.parametrize("view", STRIDES)
def test_row_strides(view):
    cut, wanted = STRIDES[view]
    x = cut(np.arange(3 * 6 * 8.0).reshape(3, 6, 8))
    assert norm.rows.row_stride(x) == wanted
    if wanted is not None:
        at = np.arange(math.prod(x.shape[:-1])) * wanted + (x.ravel()[0] if x.size else 0)
        assert (x.reshape(-1, x.shape[-1])[:, 0] == at).all()


# ---------------------------------------------------------------------------------------------------- on a GPU
@pytest.fixture(scope="module")
def cp():
    return pytest.importorskip("cupy")


def on_gpu(cp, arguments, case, dy, dtotal):
    forward, backward = PAIRS[case["kind"]]
    given = {k: None if x is None else cp.asarray(x) for k, x in arguments.items()}
    y, total, saved = forward(**given, residual_dtype=case["residual_dtype"])
    return y, total, backward(cp.asarray(dy), saved, None if dtotal is None else cp.asarray(dtotal))


@pytest.mark.gpu
@pytest.mark.parametrize("row", ROWS)
def test_gpu_row(cp, row):
    arguments, case, dy, dtotal = make(row)
    got, again = on_gpu(cp, arguments, case, dy, dtotal), on_gpu(cp, arguments, case, dy, dtotal)
    wanted = oracle(arguments, case, dy, dtotal)
    for one, two in zip(got[:2], wanted[:2], strict=True):
        assert dense.cases.relative_error(one.get(), two) <= dense.STORED[one.dtype.name]
    assert dense.errors(got[2], wanted[2], narrowest(case)) == {}
    for one, two in zip((*got[:2], *got[2]), (*again[:2], *again[2]), strict=True):
        assert one is None or one.get().tobytes() == two.get().tobytes()


@pytest.mark.gpu
@pytest.mark.parametrize("view", STRIDES)
def test_gpu_views_are_never_misread(cp, view):
    cut, whole = STRIDES[view][0], dense.normal(1, 3, 6, 8, dtype="float32")
    x = cut(whole)
    weight = dense.normal(2, x.shape[-1], dtype="float32")
    wanted = oracle({"x": x, "weight": weight, "residual": x}, BASE, x, x)
    given = cp.broadcast_to(cp.asarray(x[0, 0]), x.shape) if view == "broadcast" else cut(cp.asarray(whole))
    y, total, saved = rms_norm_fwd(given, cp.asarray(weight), given)
    got = rms_norm_bwd(given, saved, given)
    assert dense.cases.relative_error(y.get(), wanted[0]) <= 1e-6 and dense.cases.relative_error(total.get(), wanted[1]) <= 1e-6
    assert dense.errors(got, wanted[2]) == {}


@pytest.mark.gpu
@pytest.mark.parametrize("kind", PAIRS)
def test_gpu_finite_differences(cp, kind):
    inputs = {"x": dense.normal(1, 3, 37), "weight": dense.normal(2, 37), "residual": dense.normal(3, 3, 37)}
    if kind == "layer":
        inputs["bias"] = dense.normal(4, 37)
    check_gradients(*PAIRS[kind], {k: cp.asarray(x) for k, x in inputs.items()})


@pytest.mark.gpu
def test_gpu_past_two_to_the_31_elements(cp):
    x = cp.ones((2**21 + 3, 1024), cp.float16)
    x[-1] = cp.arange(1024) % 7
    y, _, saved = rms_norm_fwd(x, cp.ones(1024, cp.float32))
    assert bool((y[-1] == rms_norm_fwd(x[-1:], cp.ones(1024, cp.float32))[0][0]).all()) and bool((y[0] == y[-2]).all())
    grads = rms_norm_bwd(x, saved)
    assert bool((grads.x[-1] == rms_norm_bwd(x[-1:], rms_norm_fwd(x[-1:], cp.ones(1024, cp.float32))[2]).x[0]).all())
    del x, y, saved, grads
    cp.get_default_memory_pool().free_all_blocks()
