"""The causal convolution against an outsider and differences; its kernels compiled here, and run where a GPU is."""

import re

import cases
import emulator
import numpy as np
import pytest
import test_kernels
from scipy.signal import lfilter

from mambacupy import check_gradients, checks_conv, kernels
from mambacupy.ops import conv_kernels, plans
from mambacupy.ops.causal_conv1d import causal_conv1d, causal_conv1d_bwd, causal_conv1d_fwd, causal_conv1d_update
from mambacupy.reference import conv as reference

BASE = {
    "batch": 2, "dim": 24, "length": 70, "width": 4, "dtype": "float32", "weight_dtype": None, "dy_dtype": None,
    "order": "length", "bias": True, "initial_state": True, "dfinal_state": True, "activation": "silu", "reverse": False,
}  # fmt: skip

ROWS = {
    "base": {},
    **{f"{d}": {"dtype": d} for d in ("float16", "bfloat16", "float64")},
    "bfloat16-aligned": {"dtype": "bfloat16", "length": 72},
    "bfloat16-aligned-reverse": {"dtype": "bfloat16", "length": 72, "reverse": True},
    "bfloat16-float32-weight": {"dtype": "bfloat16", "weight_dtype": "float32", "length": 72},
    "bfloat16-float32-dy": {"dtype": "bfloat16", "dy_dtype": "float32", "length": 72},
    "channels": {"order": "channel"},
    "channels-bfloat16": {"order": "channel", "dtype": "bfloat16"},
    "channels-bfloat16-float32-weight": {"order": "channel", "dtype": "bfloat16", "weight_dtype": "float32"},
    "channels-bfloat16-float32-dy": {"order": "channel", "dtype": "bfloat16", "dy_dtype": "float32"},
    "channels-float64": {"order": "channel", "dtype": "float64"},
    "channels-reverse": {"order": "channel", "reverse": True},
    "reverse": {"reverse": True},
    "no-activation": {"activation": None},
    "no-bias": {"bias": False},
    "no-states": {"initial_state": False, "dfinal_state": False},
    "no-initial-state": {"initial_state": False},
    "no-dfinal-state": {"dfinal_state": False},
    **{f"width-{n}": {"width": n, "length": 72} for n in (1, 2, 3, 5, 8, 9, 33)},
    **{f"width-{n}-channels": {"width": n, "order": "channel"} for n in (1, 2, 3, 5, 8, 9)},
    "width-9-reverse": {"width": 9, "reverse": True},
    **{f"length-{n}": {"length": n} for n in (1, 2, 3, 4, 8, 1000, 3000)},
    **{f"length-{n}-channels": {"length": n, "order": "channel"} for n in (1, 2, 3, 130, 1000)},
    **{f"length-{n}-width-9": {"length": n, "width": 9} for n in (1, 7)},
    "dim-1": {"dim": 1},
    "dim-37-channels": {"dim": 37, "order": "channel"},
    "batch-0": {"batch": 0},
    "dim-0": {"dim": 0},
    "length-0": {"length": 0},
    "length-0-width-9": {"length": 0, "width": 9},
}


def make(seed=0, **changes):
    """Arguments by name, keyword options, dy and dfinal_state."""
    case = BASE | changes
    rng = np.random.default_rng(seed)
    dtype = cases.DTYPES[case["dtype"]]
    weight_dtype = cases.DTYPES[case["weight_dtype"] or case["dtype"]]
    batch, dim, length, width = (case[name] for name in ("batch", "dim", "length", "width"))

    def tensor(dtype):
        if case["order"] == "channel":
            return rng.standard_normal((batch, length, dim)).astype(dtype).swapaxes(1, 2)  # (batch, dim, length)
        return rng.standard_normal((batch, dim, length)).astype(dtype)

    def state(name):
        return rng.standard_normal((batch, dim, width - 1)).astype(dtype) if case[name] else None

    arguments = {
        "x": tensor(dtype),
        "weight": rng.standard_normal((dim, width)).astype(weight_dtype),
        "bias": rng.standard_normal(dim).astype(weight_dtype) if case["bias"] else None,
        "initial_state": state("initial_state"),
    }
    options = {"activation": case["activation"], "reverse": case["reverse"]}
    return arguments, options, tensor(cases.DTYPES[case["dy_dtype"] or case["dtype"]]), state("dfinal_state")


def in_double(x):
    return None if x is None else x.astype(np.float64)


# ---------------------------------------------------------------------------------------------------- NumPy
@pytest.mark.parametrize("row", ROWS)
def test_forward_is_a_filter(row):
    """scipy's FIR filter, run over the initial state and then x."""
    arguments, options, _, _ = make(**ROWS[row])
    x, weight, bias, initial = (in_double(a) for a in arguments.values())
    y, final, _ = causal_conv1d_fwd(**arguments, **options)
    walked = x[..., ::-1] if options["reverse"] else x
    before = weight.shape[1] - 1
    e = np.concatenate((np.zeros((*x.shape[:2], before)) if initial is None else initial, walked), 2)
    p = np.zeros(x.shape)
    for b, c in np.ndindex(*x.shape[:2]):
        p[b, c] = lfilter(weight[c, ::-1], 1.0, e[b, c])[before:] + (0 if bias is None else bias[c])
    wanted = p / (1 + np.exp(-p)) if options["activation"] else p
    case = BASE | ROWS[row]
    assert cases.relative_error(y, wanted[..., ::-1] if options["reverse"] else wanted) <= STORED[case["dtype"]]
    assert np.array_equal(final, e[..., e.shape[2] - before :])
    assert (y.shape, y.dtype) == (x.shape, arguments["x"].dtype) and final.dtype == y.dtype
    if y.size and x.shape[2] > 1:
        assert np.argsort(y.strides).tolist() == np.argsort(arguments["x"].strides).tolist()
    y, again = causal_conv1d(**arguments, **options, return_final_state=True)
    assert np.array_equal(again, final) and np.array_equal(causal_conv1d(**arguments, **options), y)


@pytest.mark.parametrize("width", [1, 2, 4, 9])
@pytest.mark.parametrize("length", [1, 3, 12])
@pytest.mark.parametrize("options", [{}, {"activation": "silu"}, {"activation": "silu", "reverse": True}])
def test_gradients(width, length, options):
    arguments, _, _, _ = make(batch=2, dim=3, length=length, width=width, dtype="float64")
    if width == 1:
        arguments["initial_state"] = None
    check_gradients(causal_conv1d_fwd, causal_conv1d_bwd, arguments | options)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("width", [1, 4, 9])
def test_any_split_is_one_convolution(width, reverse):
    arguments, options, _, _ = make(length=7, width=width, reverse=reverse)
    x = arguments.pop("x")
    whole, last = causal_conv1d(x, **arguments, **options, return_final_state=True)
    for split in range(8):
        parts = [x[..., split:], x[..., :split]] if reverse else [x[..., :split], x[..., split:]]
        state, got = arguments["initial_state"], []
        for part in parts:
            y, state = causal_conv1d(part, **arguments | {"initial_state": state}, **options, return_final_state=True)
            got.append(y)
        assert np.array_equal(np.concatenate(got[::-1] if reverse else got, 2), whole) and np.array_equal(state, last)


@pytest.mark.parametrize("dtype", cases.DTYPES)
@pytest.mark.parametrize("width", [1, 2, 4, 9])
def test_update_step_by_step_is_the_convolution(dtype, width):
    arguments, options, _, _ = make(length=6, width=width, dtype=dtype)
    whole, last = causal_conv1d(**arguments, **options, return_final_state=True)
    x, state = arguments.pop("x"), np.repeat(arguments.pop("initial_state"), 2, 1)[:, ::2]  # any view is updated in place
    y = [causal_conv1d_update(state, x[..., t], **arguments, activation=options["activation"]) for t in range(6)]
    assert np.array_equal(np.stack(y, 2), whole) and np.array_equal(state, last)


def error(call):
    arguments, options, dy, dfinal = make(batch=2, dim=3, length=5)
    with pytest.raises((TypeError, ValueError)) as raised:
        call(arguments, options, dy, dfinal)
    return f"{raised.type.__name__} {raised.value}"


def forward_with(**changes):
    def call(arguments, options, dy, dfinal):
        changed = {k: change(arguments[k]) if callable(change) else change for k, change in changes.items()}
        causal_conv1d(**(arguments | options | changed))

    return call


def backward_with(**changes):
    def call(arguments, options, dy, dfinal):
        given = {"dy": dy, "saved": causal_conv1d_fwd(**arguments, **options)[2], "dfinal_state": dfinal}
        causal_conv1d_bwd(**given | {k: change(given[k]) if callable(change) else change for k, change in changes.items()})

    return call


def update_with(**changes):
    def call(arguments, options, dy, dfinal):
        given = {"state": arguments["initial_state"], "x": arguments["x"][:, :, 0], "weight": arguments["weight"]}
        causal_conv1d_update(**given | {k: change(given[k]) for k, change in changes.items()})

    return call


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (forward_with(x=None), r"TypeError causal_conv1d: x is None, wanted an array"),
        (forward_with(x=lambda x: x.tolist()), r"TypeError causal_conv1d: x is of type list"),
        (
            forward_with(x=lambda x: x.astype(int)),
            r"TypeError causal_conv1d: x is int64, wanted float16, .*astype\('float32'\)",
        ),
        (forward_with(x=lambda x: x[0]), r"ValueError .*x has shape \(3, 5\), wanted \(batch, dim, length\); .*x\[None\]"),
        (forward_with(weight=lambda w: w[:, None]), r"ValueError .*weight has shape \(3, 1, 4\), .*write weight\[:, 0\]"),
        (forward_with(weight=lambda w: w[:2]), r"ValueError .*weight has shape \(2, 4\), wanted \(dim=3, width\)"),
        (forward_with(weight=lambda w: w[:, :0]), r"ValueError .*weight has shape \(3, 0\).* with width at least 1"),
        (forward_with(weight=lambda w: w.astype(np.float64)), r"TypeError .*weight is float64.* because x is float32"),
        (forward_with(bias=lambda b: b[:2]), r"ValueError .*bias has shape \(2,\), wanted \(dim=3,\)"),
        (
            forward_with(bias=lambda b: b.astype(np.float16)),
            r"TypeError .*bias is float16, wanted float32, the dtype of weight",
        ),
        (forward_with(activation="relu"), r"ValueError .*activation is 'relu', wanted None or 'silu'"),
        (forward_with(initial_state=lambda s: s[..., 1:]), r"ValueError .*initial_state .*\(batch=2, dim=3, width - 1=3\)"),
        (forward_with(initial_state=lambda s: s.astype(float)), r"TypeError .*initial_state is float64, .*the dtype of x"),
        (backward_with(saved=3), r"TypeError causal_conv1d_bwd: saved is of type int"),
        (backward_with(dy=None), r"TypeError causal_conv1d_bwd: dy is None"),
        (backward_with(dy=lambda d: d[..., 1:]), r"ValueError .*dy has shape \(2, 3, 4\), wanted \(batch=2, dim=3, length=5\)"),
        (backward_with(dy=lambda d: d.astype(np.float16)), r"TypeError .*dy is float16, wanted float32 because x is float32"),
        (backward_with(dfinal_state=lambda d: d[:1]), r"ValueError .*dfinal_state has shape \(1, 3, 3\)"),
        (update_with(x=lambda x: x[:, :, None]), r"ValueError causal_conv1d_update: x has shape \(2, 3, 1\).*x\[:, :, 0\]"),
        (update_with(state=lambda s: np.broadcast_to(s[:1], s.shape)), r"ValueError .*state is read-only.*state.copy\(\)"),
        (update_with(state=lambda s: s[:, :, :2]), r"ValueError .*state has shape \(2, 3, 2\)"),
    ],
)
def test_errors(call, message):
    assert re.match(message, error(call))


# ---------------------------------------------------------------------------------------------------- kernels, without a GPU
@pytest.fixture
def recorder(monkeypatch):
    return test_kernels.record(monkeypatch)


def run_all(arguments, options, dy, dfinal):
    """Every launch that a case makes, on NumPy arrays that stand in for CuPy's."""
    args = checks_conv.causal_conv1d(
        "test", arguments["x"], arguments["weight"], arguments["bias"], options["activation"], arguments["initial_state"],
        options["reverse"],
    )  # fmt: skip
    args = args._replace(xp=emulator.Memory())
    conv_kernels.forward(args, True)
    conv_kernels.backward(args, dy, dfinal)
    if args.initial_state is not None and args.length:
        x = arguments["x"][:, :, 0]
        conv_kernels.update(np, args.initial_state, x, args.weight, args.bias, args.silu, args.width)


@pytest.mark.parametrize("row", ROWS)
def test_launches_get_what_the_struct_names(recorder, row):
    run_all(*make(**ROWS[row]))
    for file, _, constants, blocks, threads, numbers, given in recorder.launched:
        pointers, wanted = kernels.parameter_names(kernels.specialise(file, dict(constants)))
        assert set(pointers) <= set(given) and set(wanted) <= set(numbers) | {"first_block"}
        assert blocks > 0 and threads in (64, 128, 256)
        constants = dict(constants)
        if "VECTOR" in constants:  # whole packs: what the kernels rely on
            axis = numbers["length"] if constants["TIME_CONTIGUOUS"] else numbers["dim"]
            lanes, vector = constants["LANES"], constants["VECTOR"]
            assert axis % vector == 0 and numbers["steps"] * numbers["splits"] >= numbers["length"]
            assert numbers["steps"] * (numbers["splits"] - 1) < numbers["length"]
            if constants["TIME_CONTIGUOUS"]:
                assert numbers["steps"] % (lanes * vector) == 0
                threads_wanted = numbers["batch"] * numbers["dim"] * lanes * numbers["splits"]
            else:
                threads_wanted = numbers["batch"] * (numbers["dim"] // vector) * numbers["splits"]
            assert blocks == -(-threads_wanted // threads)


def test_aligned_memory_is_moved_16_bytes_at_a_time(recorder):
    """Or 8 of 16-bit channels, four filters being as many as a thread's registers hold."""
    for order in ("length", "channel"):
        for dtype, vector in (("bfloat16", 8 if order == "length" else 4), ("float32", 4), ("float64", 2)):
            recorder.compiled.clear()
            arguments, options, dy, dfinal = make(order=order, dtype=dtype, length=72)
            run_all(arguments, options, dy, dfinal)
            assert dict(recorder.compiled[0][2])["VECTOR"] == vector
    arguments["x"] = arguments["x"][:, 1:]  # off the border of 16 bytes
    recorder.compiled.clear()
    args = {k: x[..., 1:, :] if x.ndim == 3 and k != "x" else x[1:] if k != "x" else x for k, x in arguments.items()}
    run_all(args, options, dy[:, 1:], dfinal[:, 1:])
    assert dict(recorder.compiled[0][2])["VECTOR"] == 1


COMPILED = {
    "base": {"dtype": "bfloat16", "weight_dtype": "float32", "length": 72},
    "channels": {"dtype": "bfloat16", "weight_dtype": "float32", "order": "channel"},
    "channels-reverse": {"dtype": "bfloat16", "weight_dtype": "float32", "order": "channel", "reverse": True},
    "channels-bfloat16": {"dtype": "bfloat16", "weight_dtype": "bfloat16", "order": "channel"},
    "channels-float32-dy": {"dtype": "bfloat16", "weight_dtype": "float32", "dy_dtype": "float32", "order": "channel"},
    "channels-float32": {"order": "channel"},
    "channels-width-2": {"dtype": "bfloat16", "order": "channel", "width": 2},
    "channels-width-3": {"dtype": "bfloat16", "order": "channel", "width": 3},
    "channels-width-8": {"dtype": "bfloat16", "order": "channel", "width": 8},
    "channels-width-8-float64": {"dtype": "float64", "order": "channel", "width": 8},
    "width-8": {"dtype": "bfloat16", "width": 8, "length": 72},
    "width-8-float64": {"dtype": "float64", "width": 8},
    "width-1": {"dtype": "float16", "width": 1},
    "width-9": {"dtype": "bfloat16", "width": 9, "reverse": True},
}


@pytest.mark.parametrize("row", COMPILED)
@pytest.mark.parametrize("architecture", ["75", "80", "90", "100", "120"])
def test_compiles_without_spills(recorder, row, architecture):
    pytest.importorskip("cupy", reason="the compile tests need CuPy and NVRTC (the extra `test`)")
    run_all(*make(**COMPILED[row]))
    for file, constants in dict.fromkeys((file, constants) for file, _, constants in recorder.compiled if "conv" in file):
        _, log = kernels.compile_for(architecture, kernels.specialise(file, dict(constants)))
        assert re.findall(r"Used (\d+) registers", log)
        assert {int(n) for n in re.findall(r"(\d+) bytes spill", log)} == {0}, (file, constants)


# ---------------------------------------------------------------------------------------------------- kernels, on a GPU
# Relative error in the 2-norm by the dtype of what is stored.
STORED = {"float16": 4e-4, "bfloat16": 3e-3, "float32": 1e-6, "float64": 1e-14}


def on_gpu(arguments):
    return {k: None if x is None else cases.to_gpu(x) for k, x in arguments.items()}


def compare(cp, arguments, options, dy, dfinal):
    gpu = on_gpu(arguments)
    y, final, saved = causal_conv1d_fwd(**gpu, **options)
    grads = causal_conv1d_bwd(cases.to_gpu(dy), saved, None if dfinal is None else cases.to_gpu(dfinal))
    wide = {k: in_double(x) for k, x in arguments.items()}
    wanted_y, wanted_final, wide_saved = reference.causal_conv1d_fwd(**wide, **options)
    wanted = reference.causal_conv1d_bwd(in_double(dy), wide_saved, in_double(dfinal))
    got = {"y": y, "final_state": final} | grads._asdict()
    for name, right in ({"y": wanted_y, "final_state": wanted_final} | wanted._asdict()).items():
        assert (right is None) == (got[name] is None), name
        if right is not None:
            assert got[name].shape == right.shape, name
            assert got[name].dtype == arguments.get(name, arguments["x"]).dtype, name
            assert cases.relative_error(cp.asnumpy(got[name]), right) <= STORED[got[name].dtype.name], name
    return y, got


@pytest.mark.gpu
@pytest.mark.parametrize("row", ROWS)
def test_row_on_a_gpu(row):
    cp = pytest.importorskip("cupy")
    arguments, options, dy, dfinal = make(**ROWS[row])
    y, got = compare(cp, arguments, options, dy, dfinal)
    _, again = compare(cp, arguments, options, dy, dfinal)
    for name, x in got.items():
        assert x is None or cp.asnumpy(x).tobytes() == cp.asnumpy(again[name]).tobytes(), name
    if y.size and y.shape[2] > 1:
        assert np.argsort(y.strides).tolist() == np.argsort(cases.to_gpu(arguments["x"]).strides).tolist()


@pytest.mark.gpu
@pytest.mark.parametrize("reverse", [False, True])
def test_blocks_in_turn_on_a_gpu(monkeypatch, reverse):
    """As where there are many more blocks than run at once, whose backward pass asks for lines ahead of time."""
    cp = pytest.importorskip("cupy")
    device = kernels.device()._replace(multiprocessors=1)
    monkeypatch.setattr(kernels, "device", lambda: device)
    monkeypatch.setattr(plans, "_plans", {})
    compare(cp, *make(dim=40, length=2100, dtype="bfloat16", reverse=reverse))


VIEWS = {
    "slice-of-length": lambda x: x[:, :, 1:65],
    "slice-of-channels": lambda x: x[:, 1:25],
    "every-second-step": lambda x: x[:, :, ::2],
    "every-second-channel": lambda x: x[:, ::2],
    "backwards": lambda x: x[:, :, ::-1],
    "backwards-channels": lambda x: x[:, ::-1],
    "aligned-slice": lambda x: x[:, :, 8:72],
    "one-batch-entry-again": lambda x: x[[0]].repeat(2, 0) if isinstance(x, np.ndarray) else _again(x),
}


def _again(x):
    import cupy

    return cupy.broadcast_to(x[:1], x.shape)


@pytest.mark.gpu
@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("width", [4, 9])
@pytest.mark.parametrize("order", ["length", "channel"])
def test_views_are_never_misread(view, width, order):
    cp = pytest.importorskip("cupy")
    arguments, options, dy, _ = make(dim=49, length=131, dtype="bfloat16", order=order, width=width)
    x, dy_there = VIEWS[view](cases.to_gpu(arguments["x"])), VIEWS[view](cases.to_gpu(dy))
    dim = x.shape[1]
    few = {k: a[:, :dim] if a.ndim == 3 else a[:dim] for k, a in arguments.items() if k != "x"}
    y, _, saved = causal_conv1d_fwd(x, **on_gpu(few), **options)
    got = causal_conv1d_bwd(dy_there, saved)
    host, host_dy = VIEWS[view](arguments["x"]), VIEWS[view](dy)
    wide = {k: in_double(a) for k, a in few.items()}
    wanted_y, _, wide_saved = reference.causal_conv1d_fwd(in_double(host), **wide, **options)
    assert cases.relative_error(cp.asnumpy(y), wanted_y) <= STORED["bfloat16"]
    wanted = reference.causal_conv1d_bwd(in_double(host_dy), wide_saved)
    for name, right in wanted._asdict().items():
        assert cases.relative_error(cp.asnumpy(getattr(got, name)), right) <= STORED["bfloat16"], name


@pytest.mark.gpu
@pytest.mark.parametrize("order", ["length", "channel"])
@pytest.mark.parametrize("sizes", [(1, 70_000), (70_000, 1)])
def test_many_channels_and_batches(order, sizes):
    cp = pytest.importorskip("cupy")
    compare(cp, *make(batch=sizes[0], dim=sizes[1], length=3, order=order))


@pytest.mark.gpu
@pytest.mark.parametrize("order", ["length", "channel"])
def test_past_two_to_the_31_elements(order):
    cp = pytest.importorskip("cupy")
    shape = (3, 4096, 180_000) if order == "length" else (3, 180_000, 4096)
    x = cp.zeros(shape, cp.float16)
    x = x if order == "length" else x.swapaxes(1, 2)
    x[2, -1, -3:] = cp.arange(1, 4)
    y = causal_conv1d(x, cp.ones((4096, 4), cp.float16))
    assert y[2, -1, -4:].get().tolist() == [0, 1, 3, 6] and float(y[0].max()) == 0


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", cases.DTYPES)
@pytest.mark.parametrize("width", [1, 2, 4, 16, 17])
def test_updates_on_a_gpu(dtype, width):
    cp = pytest.importorskip("cupy")
    arguments, options, _, _ = make(length=5, width=width, dtype=dtype)
    whole, last = causal_conv1d(**arguments, **options, return_final_state=True)
    gpu = on_gpu(arguments)
    x, state = gpu.pop("x"), cp.repeat(gpu.pop("initial_state"), 2, 1)[:, ::2]
    y = [causal_conv1d_update(state, x[..., t], **gpu, activation=options["activation"]).get() for t in range(5)]
    assert cases.relative_error(np.stack(y, 2), in_double(whole)) <= 2 * STORED[dtype]
    assert np.array_equal(state.get(), last)
