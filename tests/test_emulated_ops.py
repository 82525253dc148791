"""Kernels of the model's operations without a GPU: their text run by the emulator, against float64."""

import shutil

import cases
import emulator
import numpy as np
import pytest
import scans

from mambacupy import arrays, checks_conv, checks_dense, kernels
from mambacupy.ops import conv_kernels, linear, loss, norm, plans, selective_state_update, training
from mambacupy.reference import conv, state_update
from mambacupy.reference import loss as reference_loss
from mambacupy.reference import norm as reference_norm
from mambacupy.reference import training as reference_training

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="the emulator needs g++")

TOLERANCE = {"float16": 6e-4, "bfloat16": 4e-3, "float32": 2e-6, "float64": 1e-14}
BASE = {"dim": 24, "length": 70, "width": 4, "dtype": "bfloat16", "order": "length", "activation": "silu", "reverse": False}
BASE |= {"multiprocessors": emulator.H100.multiprocessors}
ROWS = {
    "base": {},
    "float32": {"dtype": "float32"},
    "float64": {"dtype": "float64"},
    "channel-order": {"order": "channel"},
    "channel-order-reverse": {"order": "channel", "reverse": True},
    "reverse": {"reverse": True},
    "no-activation": {"activation": None},
    "width-1": {"width": 1},
    "width-8": {"width": 8, "order": "channel"},
    "width-11": {"width": 11},
    "length-2": {"length": 2},
    "length-520-dim-7": {"length": 520, "dim": 7},
    "blocks-in-turn": {"length": 1100, "multiprocessors": 1},
    "blocks-in-turn-reverse": {"length": 1100, "multiprocessors": 1, "reverse": True, "dtype": "float32"},
}


@pytest.fixture
def memory(monkeypatch):
    emulator.install(monkeypatch)
    return emulator.Memory()


@pytest.fixture
def normal(memory):
    """Random arrays that are aligned as CuPy's are."""
    rng = np.random.default_rng(0)

    def make(*shape, dtype):
        x = memory.empty(shape, np.dtype(dtype))
        x[...] = rng.standard_normal(shape) + (1j * rng.standard_normal(shape) if x.dtype.kind == "c" else 0)
        return x

    return make


def wide(x):
    return None if x is None else x.astype(np.complex128 if x.dtype.kind == "c" else np.float64)


@pytest.mark.parametrize("row", ROWS)
def test_convolution(memory, monkeypatch, row):
    case = BASE | ROWS[row]
    monkeypatch.setattr(kernels, "device", lambda: emulator.H100._replace(multiprocessors=case["multiprocessors"]))
    rng = np.random.default_rng(0)
    dtype, shape = cases.DTYPES[case["dtype"]], (2, case["dim"], case["length"])
    like = cases.make(**{k: case[k] for k in ("dim", "length", "dtype", "order")})[0]["u"]
    x, dy = (cases.like(like, rng.standard_normal(shape)) for _ in range(2))
    wide = np.float64 if case["dtype"] == "float64" else np.float32
    weight, bias = rng.standard_normal((case["dim"], case["width"])).astype(wide), rng.standard_normal(case["dim"]).astype(wide)
    first, dlast = (rng.standard_normal((2, case["dim"], case["width"] - 1)).astype(dtype) for _ in range(2))

    args = checks_conv.causal_conv1d("test", x, weight, bias, case["activation"], first, case["reverse"])
    args = args._replace(xp=memory)
    y, last = conv_kernels.forward(args, True)
    grads = conv_kernels.backward(args, dy, dlast)

    double = (a.astype(np.float64) for a in (x, weight, bias))
    options = {"activation": case["activation"], "reverse": case["reverse"]}
    wanted, wanted_last, saved = conv.causal_conv1d_fwd(*double, initial_state=first.astype(np.float64), **options)
    wanted_grads = conv.causal_conv1d_bwd(dy.astype(np.float64), saved, dlast.astype(np.float64))
    assert cases.relative_error(y, wanted) <= TOLERANCE[case["dtype"]]
    assert np.array_equal(last.astype(np.float64), wanted_last)
    for name, one, two in zip(grads._fields, grads, wanted_grads, strict=True):
        assert cases.relative_error(one, two) <= TOLERANCE[one.dtype.name], name


@pytest.mark.parametrize("width", [1, 4, 8, 20])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_convolution_of_one_token(memory, normal, width, dtype):
    state, x = normal(3, 7, width - 1, dtype=cases.DTYPES[dtype]), normal(3, 7, dtype=cases.DTYPES[dtype])
    weight, bias, after = normal(7, width, dtype="f4"), normal(7, dtype="f4"), wide(state)
    wanted = conv.causal_conv1d_update(after, wide(x), wide(weight), wide(bias), activation="silu")
    y = conv_kernels.update(memory, state, x, weight, bias, True, width)
    assert cases.relative_error(y, wanted) <= TOLERANCE[dtype]
    assert np.array_equal(wide(state), after)


@pytest.mark.parametrize("state_size", [1, 6, 16, 130])
@pytest.mark.parametrize(("dtype", "A_dtype"), [("bfloat16", "f4"), ("float32", "c8"), ("float64", "f8")])
@pytest.mark.parametrize(("batch", "groups"), [(3, ()), (3, (2,)), (33, (2,))])
def test_state_update(memory, normal, state_size, dtype, A_dtype, batch, groups):
    element, A_dtype = cases.DTYPES[dtype], np.dtype(A_dtype)
    state, A = normal(batch, 10, state_size, dtype=A_dtype), normal(10, state_size, dtype=A_dtype)
    A.real[...] = -abs(A.real)
    x, dt, z = (normal(batch, 10, dtype=element) for _ in range(3))
    B, C = (normal(batch, *groups, state_size, dtype=A_dtype if A_dtype.kind == "c" else element) for _ in range(2))
    D, bias = (normal(10, dtype=A.real.dtype) for _ in range(2))
    given, after = (x, dt, A, B, C, D, z, bias), wide(state)
    wanted = state_update.selective_state_update(after, *map(wide, given), dt_softplus=True)
    args = checks_conv.selective_state_update("test", state, *given)._replace(xp=memory)
    y = selective_state_update._on_gpu(selective_state_update._plan(args, True), (state, *given))
    assert cases.relative_error(y, wanted) <= TOLERANCE[dtype]
    assert cases.relative_error(state, after) <= TOLERANCE["float64" if dtype == "float64" else "float32"]


@pytest.mark.parametrize("dim", [1, 24, 769, 5000])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("centred", [False, True], ids=["rms", "layer"])
def test_norm(memory, normal, dim, dtype, centred):
    if centred and dim == 1:
        pytest.skip("one number is its own mean")
    x, dy = (normal(2, 5, dim, dtype=cases.DTYPES[dtype]) for _ in range(2))
    residual, dtotal = (normal(2, 5, dim, dtype="f4") for _ in range(2))
    weight, bias = normal(dim, dtype="f4"), normal(dim, dtype="f4") if centred else None
    args = checks_dense.norm("test", x, weight, bias, residual, 1e-5, None)._replace(xp=memory)
    y, total, mean, rstd = norm._forward(args, 1e-5, centred)
    if centred:
        saved = norm.LayerNormSaved(total, weight, bias, mean, rstd, x.dtype, residual.dtype)
        forward, backward = reference_norm.layer_norm_fwd, reference_norm.layer_norm_bwd
        wanted, wanted_total, kept = forward(wide(x), wide(weight), wide(bias), wide(residual))
    else:
        saved = norm.RMSNormSaved(total, weight, rstd, x.dtype, residual.dtype)
        forward, backward = reference_norm.rms_norm_fwd, reference_norm.rms_norm_bwd
        wanted, wanted_total, kept = forward(wide(x), wide(weight), wide(residual))
    dx, dresidual, dweight, dbias = norm._backward(memory, saved, mean, bias, dy, dtotal)
    grads = backward(wide(dy), kept, wide(dtotal))
    assert cases.relative_error(y, wanted) <= TOLERANCE[dtype]
    assert cases.relative_error(total, wanted_total) <= 1e-7
    assert cases.relative_error(dx, grads.x) <= TOLERANCE[dtype]
    assert cases.relative_error(dresidual, grads.residual) <= TOLERANCE["float32"]
    assert cases.relative_error(dweight, grads.weight) <= TOLERANCE["float32"]
    assert not centred or cases.relative_error(dbias, grads.bias) <= TOLERANCE["float32"]


@pytest.mark.parametrize("vocabulary", [1, 11, 2056, 5001])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_cross_entropy(memory, normal, vocabulary, dtype):
    logits = normal(2, 5, vocabulary, dtype=cases.DTYPES[dtype])[:, :-1]  # rows of a batch entry lie apart
    targets = np.random.default_rng(1).integers(0, vocabulary, (2, 4))
    targets[0, 1] = -1
    rows_kept = {name: memory.empty((8,), "f4") for name in ("maximum", "total", "losses")}
    found, count, dloss = np.zeros((), "f4"), np.zeros((), "f4"), np.array(1.5, "f4")
    given = rows_kept | {"dloss": None, "dlogits": None, "loss": found, "count": count}
    loss._launch(memory, "cross_entropy_fwd", logits, targets, -1, given)
    loss._launch(memory, "cross_entropy_mean", logits, targets, -1, given)
    wanted, kept = reference_loss.softmax_cross_entropy_fwd(wide(logits), targets)
    assert found == pytest.approx(wanted, rel=1e-5, abs=1e-6)
    dlogits = memory.empty(logits.shape, logits.dtype)
    given |= {"losses": None, "loss": None, "dloss": dloss, "dlogits": dlogits}
    loss._launch(memory, "cross_entropy_bwd", logits, targets, -1, given)
    wanted = reference_loss.softmax_cross_entropy_bwd(np.float64(1.5), kept).logits
    assert cases.relative_error(dlogits, wanted) <= 2 * TOLERANCE[dtype]


@pytest.mark.parametrize("dim", [1, 24])
@pytest.mark.parametrize(("dtype", "dy_dtype"), [("bfloat16", "bfloat16"), ("bfloat16", "float32"), ("float32", "float32")])
@pytest.mark.parametrize("distinct", [2, 50])
def test_embedding(memory, normal, dim, dtype, dy_dtype, distinct):
    weight = normal(50, dim, dtype=cases.DTYPES[dtype])
    tokens = np.random.default_rng(2).integers(0, distinct, (3, 47))
    y = memory.empty((3, 47, dim), weight.dtype)
    linear._embedding_forward(memory, tokens, weight, y)
    assert np.array_equal(y, weight[tokens])
    dy, dweight, wanted = (
        normal(3, 47, dim, dtype=cases.DTYPES[dy_dtype]),
        np.zeros(weight.shape, weight.dtype),
        np.zeros((50, dim)),
    )
    linear._embedding_backward(memory, dy, linear.EmbeddingSaved(tokens, 50, dim, weight.dtype), dweight)
    wanted = np.zeros(weight.shape)
    np.add.at(wanted, tokens, wide(dy))
    assert cases.relative_error(dweight, wanted) <= TOLERANCE[dtype]


# ---------------------------------------------------------------------------------------------------- many arrays at once
MANY = {
    "float32": [("float32", (70, 64)), ("float32", (3,)), ("float32", (0, 4)), ("float32", (5001,)), ("float32", ())],
    "mixed": [("bfloat16", (33, 7)), ("float32", (9000,)), ("float64", (7,)), ("float16", (4200,)), ("float32", (1,))],
}


@pytest.fixture(params=MANY)
def many(request, normal):
    """Lists of arrays of some dtypes and sizes, made by a function of what to do with their dtypes."""
    shapes = [(cases.DTYPES[dtype], shape) for dtype, shape in MANY[request.param]]
    return lambda of=np.dtype: [normal(*shape, dtype=of(dtype)) for dtype, shape in shapes]


def test_adamw(memory, many):
    params, grads, means, squares = many(), many(), many(arrays.compute_dtype), many(arrays.compute_dtype)
    squares = [v * v for v in squares]
    decays, numbers = [i % 2 == 0 for i in range(len(params))], (0.9, 0.1, 0.95, 0.05, 0.271, 0.142625, 1e-8, 0.01, 0.1)
    for _ in range(2):  # the second call finds its plan
        got = training._adamw(memory, params, grads, means, squares, decays, numbers)
    wanted = reference_training.adamw(*(list(map(wide, x)) for x in (params, grads, means, squares)), decays, numbers)
    for nest, right in zip(got, wanted, strict=True):
        for one, two in zip(nest, right, strict=True):
            assert cases.relative_error(one, two) <= TOLERANCE[one.dtype.name]


@pytest.mark.parametrize("most", [0.5, 1e6])
def test_clipping(memory, many, most):
    grads = many()
    got, norm = training._clip(memory, grads, most)
    wanted, right = reference_training.clip(list(map(wide, grads)), most)
    assert norm == pytest.approx(right, rel=1e-6)
    for one, two in zip(got, wanted, strict=True):
        assert cases.relative_error(one, two) <= TOLERANCE[one.dtype.name]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_rounding(memory, normal, dtype):
    given = [normal(*shape, dtype="f4") for shape in ((70, 64), (3,), (0, 4), (5001,), (1,))]
    given[1][:] = np.nan, np.inf, 65519  # the last number that float16 rounds to one
    for x, wanted in zip(training._rounded(memory, given, cases.DTYPES[dtype]), given, strict=True):
        assert x.shape == wanted.shape and x.dtype == cases.DTYPES[dtype]
        assert np.array_equal(wide(x), wide(wanted.astype(x.dtype)), equal_nan=True)


def test_clipping_what_is_not_finite(memory, normal):
    grads = [normal(40, dtype="f4"), normal(5, dtype="f4")]
    grads[1][2] = np.nan
    got, norm = training._clip(memory, grads, 1.0)
    assert np.isnan(norm) and all(np.isnan(g).all() for g in got)


# ---------------------------------------------------------------------------------------------------- sums over blocks
SUMS = {
    "one part": ("float32", 1, [plans.Sum("float32", 1, 40)]),
    "fewer parts than are read at once": ("float32", 1, [plans.Sum("float32", 5, 1030)]),
    "more parts than shares": ("float32", 1, [plans.Sum("float32", 700, 9)]),
    "shares, wide": ("float32", 1, [plans.Sum("bfloat16", 100, 64)]),
    "float64": ("float64", 1, [plans.Sum("float64", 33, 10), plans.Sum("float64", 9, 6, 70, 2), plans.Sum("float64", 3, 7, 5)]),
    "turned": ("float32", 1, [plans.Sum("bfloat16", 12, 16, 1000)]),
    "turned, many columns": ("float32", 1, [plans.Sum("float16", 2, 100, 37, 3)]),
    "turned, no wide access": ("float32", 1, [plans.Sum("float32", 20, 5, 67, 2)]),
    "turned, complex": ("float32", 2, [plans.Sum("float32", 20, 12, 67, 2), plans.Sum("float32", 3, 2, 9),
                                       plans.Sum("float32", 2, 11)]),
    "turned, few rows": ("float32", 1, [plans.Sum("float32", 3, 700, 4, stride=3500),
                                        plans.Sum("float32", 3, 700, stride=3500)]),
    "five": ("float32", 1, [plans.Sum("float32", 8, 64), plans.Sum("float32", 8, 4), plans.Sum("float32", 8, 4),
                            plans.Sum("bfloat16", 40, 16, 50, 2), plans.Sum("float16", 40, 16, 50, 2)]),
    "threads enough": ("float32", 1, [plans.Sum("bfloat16", 7, 64, 8200)]),
}  # fmt: skip


@pytest.mark.parametrize("row", SUMS)
def test_sums_of_parts(memory, normal, row):
    real, reals, sums = SUMS[row]
    pairs, wanted = [], []
    for x in sums:
        size = x.rows * x.columns
        parts = normal(x.outer, x.count, max(size, x.stride), dtype=real)
        pairs.append((parts, memory.empty((x.outer * size,), cases.DTYPES[x.out])))
        total = wide(parts)[:, :, :size].sum(1).reshape(x.outer, x.rows, -1, reals if x.columns % reals == 0 else 1)
        wanted.append(total.swapaxes(1, 2).ravel())  # (outer, t, n, reals) -> (outer, n, t, reals)
    plans.sums_of_parts(real, tuple(sums), reals)(kernels.addresses((None, *(x for pair in pairs for x in pair))))
    for (_, out), total, x in zip(pairs, wanted, sums, strict=True):
        assert cases.relative_error(out, total) <= {"float32": 1e-7, "float64": 1e-15}.get(x.out, TOLERANCE[x.out]), x


def test_a_sum_keeps_what_rounding_drops(memory, normal):
    """Each share of the parts is as exact as one rounding of it."""
    parts = memory.empty((3200, 4), np.dtype("f4"))
    parts[...] = 1e-4
    parts[:32] = 1e4
    out = memory.empty((4,), parts.dtype)
    plans.sums_of_parts("float32", (plans.Sum("float32", 3200, 4),))(kernels.addresses((None, parts, out)))
    assert cases.relative_error(out, wide(parts).sum(0)) <= 1e-7


# ---------------------------------------------------------------------------------------------------- parts of time
@pytest.mark.parametrize("splits", [2, 8, 19])
@pytest.mark.parametrize("backward", [0, 1])
@pytest.mark.parametrize("dtype", ["f4", "c16"])
def test_chained_parts_of_time(memory, normal, dtype, backward, splits):
    batch, dim, state = 2, 5, 6
    carries, A = normal(batch, splits, dim, state, dtype=dtype), normal(dim, state, dtype=dtype)
    A.real[...] = -abs(A.real)
    totals = normal(batch, splits, dim, dtype=A.real.dtype)
    totals[...] = abs(totals)
    enters = normal(batch, dim, state, dtype=dtype)
    wanted, now = wide(carries), wide(enters)
    for split in range(splits)[:: -1 if backward else 1]:
        whole = np.exp(wide(A) * wide(totals)[:, split, :, None])
        wanted[:, split], now = now, wide(carries)[:, split] + (whole.conj() if backward else whole) * now
    real = {"f4": "float", "c16": "double"}[dtype]
    constants = {"BACKWARD": backward, "STATE_T": f"Complex<{real}>" if dtype == "c16" else real, "REAL": real}
    numbers = {"batch": batch, "splits": splits, "dim": dim, "state": state, "state_total": state}
    numbers |= plans.strides(A, A_dim=0, A_state=1) | plans.strides(enters, enters_batch=0, enters_dim=1, enters_state=2)
    launch = plans.prepared("combine_carries.cu", "combine_carries", constants, 1, 256, numbers)
    launch({"carries": carries, "totals": totals, "A": A, "enters": enters})
    assert cases.relative_error(carries, wanted) <= (1e-14 if dtype == "c16" else 5e-7)


# ---------------------------------------------------------------------------------------------------- anywhere in memory
@pytest.fixture(params=["split", "off by one"])
def moved(request):
    """Moves an array to where its elements are split, or to where they are whole and no wider access is aligned."""

    def move(x):
        offset = 1 if request.param == "split" else x.itemsize
        room = np.empty(x.nbytes + 64, np.uint8)
        start = -room.ctypes.data % 32 + offset
        y = room[start : start + x.nbytes].view(x.dtype).reshape(x.shape)
        y[...] = x
        return y

    return move


@pytest.mark.parametrize("dtype", ["bfloat16", "float64"])
def test_norm_anywhere_in_memory(memory, normal, moved, dtype):
    element = cases.DTYPES[dtype]
    x, dy, residual, dtotal = (moved(normal(2, 5, 24, dtype=element)) for _ in range(4))
    weight, bias = (moved(normal(24, dtype=element)) for _ in range(2))
    args = checks_dense.norm("test", x, weight, bias, residual, 1e-5, None)._replace(xp=memory)
    y, total, mean, rstd = norm._forward(args, 1e-5, True)
    saved = norm.LayerNormSaved(moved(total), weight, bias, mean, rstd, x.dtype, residual.dtype)
    dx, _, dweight, dbias = norm._backward(memory, saved, mean, bias, dy, dtotal)
    wanted, _, kept = reference_norm.layer_norm_fwd(x, weight, bias, residual)
    grads = reference_norm.layer_norm_bwd(dy, kept, dtotal)
    for one, two in ((y, wanted), (dx, grads.x), (dweight, grads.weight), (dbias, grads.bias)):
        assert cases.relative_error(wide(one), wide(two)) <= 2 * TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_cross_entropy_anywhere_in_memory(memory, normal, moved, dtype):
    logits, targets = moved(normal(3, 40, dtype=cases.DTYPES[dtype])), moved(np.array([5, -1, 39]))
    given = {name: memory.empty((3,), "f4") for name in ("maximum", "total", "losses")}
    given |= {"dloss": moved(np.array(1.5, "f4")), "loss": np.zeros((), "f4"), "count": np.zeros((), "f4")}
    for name in ("cross_entropy_fwd", "cross_entropy_mean"):
        loss._launch(memory, name, logits, targets, -1, given | {"dlogits": None})
    dlogits = memory.empty(logits.shape, logits.dtype)
    loss._launch(memory, "cross_entropy_bwd", logits, targets, -1, given | {"dlogits": dlogits})
    wanted, kept = reference_loss.softmax_cross_entropy_fwd(wide(logits), targets)
    assert given["loss"] == pytest.approx(wanted, rel=1e-5)
    wanted = reference_loss.softmax_cross_entropy_bwd(np.float64(1.5), kept).logits
    assert cases.relative_error(dlogits, wanted) <= 2 * TOLERANCE[dtype]


def test_embedding_anywhere_in_memory(memory, normal, moved):
    weight, dy = moved(normal(50, 24, dtype="f4")), moved(normal(7, 24, dtype="f4"))
    tokens = moved(np.arange(7) * 5)
    y, dweight = memory.empty((7, 24), "f4"), np.zeros((50, 24), "f4")
    linear._embedding_forward(memory, tokens, weight, y)
    linear._embedding_backward(memory, dy, linear.EmbeddingSaved(tokens, 50, 24, weight.dtype), dweight)
    assert np.array_equal(y, weight[tokens])
    assert np.array_equal(dweight[tokens], dy)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_many_arrays_anywhere_in_memory(memory, normal, moved, dtype):
    given = [[moved(normal(3, 40, dtype=cases.DTYPES[dtype])), moved(normal(7, dtype=cases.DTYPES[dtype]))] for _ in range(2)]
    means = [[moved(normal(*p.shape, dtype="f4")) for p in given[0]] for _ in range(2)]
    for v in means[1]:
        v[...] = v * v
    numbers = (0.9, 0.1, 0.95, 0.05, 0.271, 0.142625, 1e-8, 0.01, 0.1)
    got = training._adamw(memory, *given, *means, [True, False], numbers)
    wanted = reference_training.adamw(*(list(map(wide, x)) for x in (*given, *means)), [True, False], numbers)
    for one, two in zip((*got[0], *got[2]), (*wanted[0], *wanted[2]), strict=True):
        assert cases.relative_error(wide(one), two) <= TOLERANCE[dtype]
    clipped, _ = training._clip(memory, given[0], 0.5)
    wanted, _ = reference_training.clip(list(map(wide, given[0])), 0.5)
    for one, two in zip(clipped, wanted, strict=True):
        assert cases.relative_error(wide(one), two) <= 2 * TOLERANCE[dtype]
    for one, two in zip(training._rounded(memory, means[0], cases.DTYPES["float16"]), means[0], strict=True):
        assert np.array_equal(one, two.astype(np.float16))


@pytest.mark.parametrize("is_complex", [False, True])
def test_scan_anywhere_in_memory(memory, moved, is_complex):
    """A later call copies what the first one copied."""
    arguments, options = cases.make(complex=is_complex, B=3)
    dy, dlast_state = map(moved, scans.incoming(arguments))
    arguments = {name: None if x is None else moved(x) for name, x in arguments.items()}
    wanted = scans.oracle(arguments, options, dy, dlast_state)
    for calls in (1, 2):
        got, grads = emulator.scan(arguments, options, dy, dlast_state, calls)
        case = cases.BASE | {"complex": is_complex}
        assert scans.wrong_results(got, arguments, options, case) == {}
        assert scans.wrong_gradients(grads, wanted, case) == {}
