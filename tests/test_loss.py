"""Softmax cross-entropy: NumPy against scipy and finite differences, the kernels against NumPy in float64."""

import functools

import dense
import numpy as np
import pytest
from scipy.special import log_softmax, softmax

from mambacupy.gradients import check_gradients
from mambacupy.ops import loss
from mambacupy.ops.loss import softmax_cross_entropy_bwd, softmax_cross_entropy_fwd
from mambacupy.reference import loss as reference

BASE = {
    "shape": (3, 7),
    "vocabulary": 40,
    "dtype": "float32",
    "targets": "int64",
    "ignored": 4,
    "ignore_index": -1,
    "shift": 0.0,
}
ROWS = {
    "base": {},
    **{dtype: {"dtype": dtype} for dtype in ("float16", "bfloat16", "float64")},
    "int32": {"targets": "int32"},
    "int8": {"targets": "int8"},
    **{f"vocabulary-{n}": {"vocabulary": n} for n in (1, 2, 33, 2048, 2056, 4099, 50280)},
    "vocabulary-50280-bfloat16": {"vocabulary": 50280, "dtype": "bfloat16"},
    "vocabulary-5003-bfloat16": {"vocabulary": 5003, "dtype": "bfloat16"},
    "one-axis": {"shape": ()},
    "three-axes": {"shape": (2, 3, 4)},
    "rows-3000": {"shape": (3000,)},
    "no-rows": {"shape": (0,)},
    "none-ignored": {"ignored": 0},
    "all-ignored": {"ignored": 21},
    "ignore-a-class": {"ignore_index": 5},
    "ignore-minus-100": {"ignore_index": -100},
    "shift-up": {"shift": 1e4},
    "shift-down": {"shift": -1e4},
}


def make(row):
    """logits, targets and options."""
    case = BASE | ROWS[row]
    logits = (3 * dense.normal(1, *case["shape"], case["vocabulary"]) + case["shift"]).astype(dense.DTYPES[case["dtype"]])
    targets = np.asarray(np.random.default_rng(2).integers(0, case["vocabulary"], case["shape"]), case["targets"])
    if targets.ndim:
        targets.reshape(-1)[: case["ignored"]] = case["ignore_index"]
    return logits, targets, {"ignore_index": case["ignore_index"]}


def by_scipy(logits, targets, ignore_index, dloss=1.0):
    flat, wanted = dense.wide(logits).reshape(-1, logits.shape[-1]), targets.ravel()
    kept = np.flatnonzero(wanted != ignore_index)
    grad = np.zeros(flat.shape)
    if not len(kept):
        return 0.0, loss.CrossEntropyGrads(grad.reshape(logits.shape))
    grad[kept] = softmax(flat[kept], -1)
    grad[kept, wanted[kept]] -= 1
    value = -log_softmax(flat[kept], -1)[np.arange(len(kept)), wanted[kept]].mean()
    return value, loss.CrossEntropyGrads((grad * dloss / len(kept)).reshape(logits.shape))


def check(row, to=lambda x: x):
    logits, targets, options = make(row)
    value, saved = softmax_cross_entropy_fwd(to(logits), to(targets), **options)
    grads = softmax_cross_entropy_bwd(0.75, saved)
    wanted, wanted_grads = by_scipy(logits, targets, **options, dloss=0.75)
    real = "float64" if logits.dtype == np.float64 else "float32"
    assert value.shape == () and value.dtype.name == real
    assert abs(float(value) - wanted) <= {"float64": 1e-13, "float32": 4e-7}[real] * max(1.0, abs(wanted))
    assert grads.logits.dtype == logits.dtype
    assert dense.errors(grads, wanted_grads) == {}
    return value, grads


@pytest.mark.parametrize("row", ROWS)
def test_row(row):
    check(row)


@pytest.mark.parametrize("options", [{}, {"ignore_index": 3}])
def test_finite_differences(options):
    targets = np.array([[0, 3, 2], [4, -1 if not options else 3, 3]])
    forward = functools.partial(softmax_cross_entropy_fwd, **options)
    check_gradients(forward, softmax_cross_entropy_bwd, {"logits": dense.normal(1, 2, 3, 5), "targets": targets})


def test_blocks_of_rows_do_not_show(monkeypatch):
    logits, targets, _ = make("bfloat16")
    whole = softmax_cross_entropy_fwd(logits, targets)
    monkeypatch.setattr(reference, "BLOCK_SIZE", 90)  # two rows and a bit
    parts = softmax_cross_entropy_fwd(logits, targets)
    assert whole[0] == parts[0]
    one, two = (softmax_cross_entropy_bwd(1.0, saved).logits for saved in (whole[1], parts[1]))
    assert one.tobytes() == two.tobytes()


def test_no_wide_copy_of_all_logits_is_made_or_kept():
    import tracemalloc

    logits, targets = np.zeros((4096, 4096), np.float16), np.zeros(4096, np.int32)
    tracemalloc.start()
    _, saved = softmax_cross_entropy_fwd(logits, targets)
    forward = tracemalloc.get_traced_memory()[1]
    grads = softmax_cross_entropy_bwd(1.0, saved)
    both = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert saved.logits is logits and saved.targets is targets
    assert forward < 0.5 * logits.nbytes and both < logits.nbytes + 0.6 * logits.nbytes
    assert grads.logits.nbytes == logits.nbytes


def test_what_is_not_finite():
    logits = dense.normal(1, 4, 6, dtype="float32")
    logits[0, 2] = -np.inf  # a class that is ruled out
    value, saved = softmax_cross_entropy_fwd(logits, np.array([0, 1, 2, 3]))
    assert np.isfinite(value) and softmax_cross_entropy_bwd(1.0, saved).logits[0, 2] == 0
    assert softmax_cross_entropy_fwd(logits[:1], np.array([2]))[0] == np.inf
    logits[1] = np.nan
    value, saved = softmax_cross_entropy_fwd(logits, np.array([0, -1, 2, 3]))
    assert np.isfinite(value), "what is ignored may be anything"
    assert np.isfinite(softmax_cross_entropy_bwd(1.0, saved).logits).all()
    assert np.isnan(softmax_cross_entropy_fwd(logits, np.array([0, 1, 2, 3]))[0])


def test_dloss_may_be_a_number_or_an_array():
    logits, targets, _ = make("base")
    _, saved = softmax_cross_entropy_fwd(logits, targets)
    one, *more = (softmax_cross_entropy_bwd(d, saved).logits for d in (2, 2.0, np.float32(2), np.full((), 2, np.float32)))
    assert all(one.tobytes() == two.tobytes() for two in more)


L, T = np.zeros((2, 4), np.float32), np.zeros(2, np.int64)
ERRORS = {
    "logits-none": ((None, T), {}, TypeError, "logits is None"),
    "logits-integers": ((T, T), {}, TypeError, "logits is int64"),
    "no-classes": ((L[:, :0], T), {}, ValueError, r"logits has shape \(2, 0\), wanted \(\.\.\., vocabulary\)"),
    "targets-float": ((L, L[:, 0]), {}, TypeError, "targets is float32, wanted int32 or int64"),
    "targets-shape": ((L, T[:1]), {}, ValueError, r"targets has shape \(1,\), wanted \(2,\)"),
    "target-beyond": ((L, T + 4), {}, ValueError, r"targets holds 4 at \(0,\), wanted 0 to 3 or -1, which is ignored"),
    "target-negative": ((L, T - 1), {"ignore_index": 0}, ValueError, r"targets holds -1 at \(0,\), wanted 0 to 3 or 0"),
    "ignore_index": ((L, T), {"ignore_index": 1.0}, TypeError, "ignore_index is of type float, wanted an integer"),
}


@pytest.mark.parametrize("row", ERRORS)
def test_errors(row):
    arguments, options, kind, message = ERRORS[row]
    with pytest.raises(kind, match="softmax_cross_entropy_fwd: " + message):
        softmax_cross_entropy_fwd(*arguments, **options)


def test_errors_of_the_backward_pass():
    saved = softmax_cross_entropy_fwd(L, T)[1]
    for dloss, kept, kind, message in (
        (None, saved, TypeError, "dloss is None"),
        ("1", saved, TypeError, "dloss is of type str"),
        (np.ones(2, np.float32), saved, ValueError, r"dloss has shape \(2,\), wanted \(\)"),
        (np.ones(()), saved, TypeError, "dloss is float64, wanted float32, the dtype of loss"),
        (1.0, L, TypeError, "saved is of type ndarray, wanted the second result of softmax_cross_entropy_fwd"),
    ):
        with pytest.raises(kind, match="softmax_cross_entropy_bwd: " + message):
            softmax_cross_entropy_bwd(dloss, kept)


# ---------------------------------------------------------------------------------------------------- kernels, without a GPU
def launch(row):
    """Both directions of a row, as they would be launched."""
    logits, targets, options = make(row)
    if not targets.size:
        return
    _, saved = softmax_cross_entropy_fwd(logits, targets, **options)
    given = {"maximum": saved.maximum, "total": saved.total, "losses": saved.total, "loss": saved.count, "count": saved.count}
    for name in ("cross_entropy_fwd", "cross_entropy_mean", "cross_entropy_bwd"):
        outputs = {"dloss": saved.count, "dlogits": logits} if name.endswith("bwd") else {"dloss": None, "dlogits": None}
        loss._launch(np, name, logits, targets, options["ignore_index"], given | outputs)


@pytest.mark.parametrize(("file", "constants"), dense.instantiations(launch, ROWS))
def test_compiles_without_spills(file, constants):
    dense.compiles(file, constants)


def test_launches_get_what_the_struct_names(monkeypatch):
    launched = dense.record(monkeypatch)
    for row in ROWS:
        launch(row)
    dense.check_launches(launched, "cross_entropy_fwd", "cross_entropy_mean", "cross_entropy_bwd")
    for _, name, constants, blocks, threads, numbers, _ in launched:
        teams = threads // constants["TEAM"]
        assert constants["THREADS"] == threads and constants["TEAM"] in (32, threads)
        assert blocks == (1 if name == "cross_entropy_mean" else -(-numbers["rows"] // teams))
        assert numbers["vocab"] % constants["VECTOR"] == 0


VIEWS = {
    "contiguous": lambda x: x,
    "but-the-last-step": lambda x: x[:, :-1],
    "some-classes": lambda x: x[..., 8:16],
    "steps-and-classes": lambda x: x[:, 1:, :8],
    "every-second": lambda x: x[::2, ::3],
    "backwards": lambda x: x[::-1, ::-1],
    "time-first": lambda x: x.swapaxes(0, 1),
    "classes-first": lambda x: x.swapaxes(0, 2),
    "one-axis": lambda x: x[1, 2],
    "two-axes": lambda x: x[:, 1],
    "four-axes": lambda x: x.reshape(2, 3, 2, 4, 24)[:, :, :, 1:],
    "five-axes": lambda x: x.reshape(2, 3, 2, 2, 2, 24)[:, :2, :, :1],
}


@pytest.mark.parametrize("view", VIEWS)
def test_rows_are_found_in_any_view(view):
    x = VIEWS[view](np.arange(6 * 8 * 24).reshape(6, 8, 24))
    strides = loss._two_strides(x)
    assert (strides is None) == (view in ("classes-first", "five-axes"))
    if strides is not None:
        inner, outer, row = strides
        r = np.arange(x.size // x.shape[-1])
        assert (x.reshape(-1, x.shape[-1])[:, 0] - x.ravel()[0] == r // inner * outer + r % inner * row).all()


# ---------------------------------------------------------------------------------------------------- on a GPU
@pytest.fixture(scope="module")
def cp():
    return pytest.importorskip("cupy")


@pytest.mark.gpu
@pytest.mark.parametrize("row", ROWS)
def test_gpu_row(cp, row):
    (value, grads), (again, grads_again) = check(row, cp.asarray), check(row, cp.asarray)
    assert value.get().tobytes() == again.get().tobytes()
    assert grads.logits.get().tobytes() == grads_again.logits.get().tobytes()


@pytest.mark.gpu
@pytest.mark.parametrize("view", VIEWS)
def test_gpu_views_are_never_misread(cp, view):
    x = dense.normal(1, 6, 8, 24, dtype="bfloat16")
    logits = VIEWS[view](x)
    targets = np.arange(logits.size // logits.shape[-1]).reshape(logits.shape[:-1]) % logits.shape[-1]
    value, saved = softmax_cross_entropy_fwd(VIEWS[view](cp.asarray(x)), cp.asarray(targets))
    wanted, wanted_grads = by_scipy(logits, targets, -1)
    assert abs(float(value) - wanted) <= 1e-6 * wanted
    assert dense.errors(softmax_cross_entropy_bwd(cp.ones((), cp.float32), saved), wanted_grads) == {}


@pytest.mark.gpu
def test_gpu_what_is_not_finite_or_out_of_range(cp):
    logits = dense.normal(1, 4, 3000, dtype="float32")
    logits[0, :2900] = -np.inf
    logits[1] = np.nan
    for targets, finite in (
        ([2950, -1, 2, 3], True),
        ([2950, 1, 2, 3], False),
        ([2950, -1, 2, 3000], False),
        ([-2, -1, 2, 3], False),
    ):
        value, saved = softmax_cross_entropy_fwd(cp.asarray(logits), cp.asarray(np.array(targets)))
        grads = softmax_cross_entropy_bwd(1.0, saved).logits.get()
        assert bool(np.isfinite(value.get())) == finite
        assert np.isfinite(grads[2]).all() and bool(np.isfinite(grads).all()) == finite
        if finite:
            assert not grads[0, :2900].any() and not grads[1].any()


@pytest.mark.gpu
def test_gpu_finite_differences(cp):
    inputs = {"logits": cp.asarray(dense.normal(1, 2, 3, 50)), "targets": cp.asarray(np.array([[0, 3, 2], [4, -1, 49]]))}
    check_gradients(softmax_cross_entropy_fwd, softmax_cross_entropy_bwd, inputs)


@pytest.mark.gpu
def test_gpu_past_two_to_the_31_elements(cp):
    logits = cp.zeros((45_000, 50_280), cp.float16)
    logits[-1] = cp.arange(50_280) % 7
    targets = cp.full(45_000, -1)
    targets[-1] = 5
    value, saved = softmax_cross_entropy_fwd(logits, targets)
    alone, saved_alone = softmax_cross_entropy_fwd(logits[-1:], targets[-1:])
    assert float(value) == float(alone)
    assert bool(
        (softmax_cross_entropy_bwd(1.0, saved).logits[-1] == softmax_cross_entropy_bwd(1.0, saved_alone).logits[0]).all()
    )
    del logits, saved, saved_alone
    cp.get_default_memory_pool().free_all_blocks()
