"""The state update against the scan, of which it is one step; its kernel compiled here, and run where a GPU is."""

import re

import cases
import numpy as np
import pytest
import test_kernels

from mambacupy import checks_conv, kernels, selective_scan
from mambacupy.ops import selective_state_update as module
from mambacupy.ops.selective_state_update import selective_state_update

STEPS = 5

ROWS = {
    "base": {},
    **{f"{d}": {"dtype": d} for d in ("float16", "bfloat16", "float64")},
    **{f"complex-{d}": {"complex": True, "dtype": d} for d in ("float32", "float64", "bfloat16")},
    "groups": {"B": 3, "C": 3},
    "groups-differ": {"B": 4, "C": 6, "dtype": "bfloat16"},
    "groups-dim": {"B": 24, "C": 24},
    "groups-complex": {"B": 2, "C": 2, "complex": True},
    "no-D": {"D": False},
    "no-z": {"z": False},
    "no-bias": {"delta_bias": False},
    "no-softplus": {"delta_softplus": False},
    **{f"state-{n}": {"state": n} for n in (1, 2, 3, 8, 17, 64, 100, 128, 300)},
    "state-6-bfloat16": {"state": 6, "dtype": "bfloat16"},
    "state-70-complex": {"state": 70, "complex": True},
    "dim-1": {"dim": 1},
    "dim-37": {"dim": 37},
    "batch-1": {"batch": 1},
    "batch-0": {"batch": 0},
    "batch-33": {"batch": 33},
    "batch-33-state-6-bfloat16": {"batch": 33, "state": 6, "dtype": "bfloat16"},
    "batch-33-state-1-complex": {"batch": 33, "state": 1, "complex": True},
    "dim-0": {"dim": 0},
}


def make(**changes):
    return cases.make(length=STEPS, **changes)


def steps(arguments, options, state):
    """y of every step, (batch, dim, length); `state` is updated in place."""
    names = {"u": "x", "delta": "dt", "B": "B", "C": "C", "z": "z"}
    fixed = {"A": arguments["A"], "D": arguments["D"], "dt_bias": arguments["delta_bias"]}
    outputs = []
    for t in range(STEPS):
        now = {to: None if arguments[name] is None else arguments[name][..., t] for name, to in names.items()}
        outputs.append(selective_state_update(state, **now, **fixed, dt_softplus=options["delta_softplus"]))
    return outputs


# Relative error in the 2-norm, by dtype: of y, which is rounded to it, and of states, which float32 keeps for all but float64.
Y_TOLERANCE = {"float16": 4e-4, "bfloat16": 3e-3, "float32": 6e-7, "float64": 1e-14, "complex": 2e-6}
STATE_TOLERANCE = {"float16": 6e-7, "bfloat16": 6e-7, "float32": 6e-7, "float64": 1e-14, "complex": 2e-6}


def tolerance(case, table):
    """Of a table by dtype; complex float32 states have an entry of their own, 16-bit results do not need it."""
    dtype = case["dtype"]
    return max(table[dtype], table["complex"]) if case["complex"] and dtype != "float64" else table[dtype]


@pytest.mark.parametrize("row", ROWS)
def test_step_by_step_is_the_scan(row):
    arguments, options = make(**ROWS[row])
    wanted, last = selective_scan(**arguments, **options, return_last_state=True)
    state = arguments["initial_state"].copy()
    y = np.stack(steps(arguments, options, state), 2)  # length x (batch, dim) -> (batch, dim, length)
    case = cases.BASE | ROWS[row]
    assert (y.dtype, state.dtype) == (wanted.dtype, last.dtype)
    assert cases.relative_error(state, last) <= 2e-7 * (1e-8 if case["dtype"] == "float64" else 1)
    assert cases.relative_error(y, wanted.astype(np.float64)) <= tolerance(case, Y_TOLERANCE)


@pytest.mark.parametrize("x", [-100.0, -16.0, -8.0, 0.0, 19.99, 20.01, 50.0])
def test_softplus_is_the_scans_at_its_ends(x):
    one, dt = np.ones((1, 1), np.float32), np.full((1, 1), x, np.float32)
    state = np.zeros((1, 1, 1), np.float32)
    selective_state_update(state, one, dt, -0 * one, one, one, dt_softplus=True)  # A = 0: the state is Δ
    assert state[0, 0, 0] == pytest.approx(np.logaddexp(0, x), rel=2e-7)


def test_a_view_is_updated_in_place_and_nothing_beside_it():
    arguments, options = make()
    wanted = arguments["initial_state"].copy()
    y = steps(arguments, options, wanted)
    room = np.full((2, 24, 40), 7.0, np.float32)
    view = room[:, ::-1, 3:35:2]
    view[...] = arguments["initial_state"]
    for one, two in zip(steps(arguments, options, view), y, strict=True):
        assert np.array_equal(one, two)
    assert np.array_equal(view, wanted) and (room[:, :, 4:34:2] == 7).all() and (room[:, :, 35:] == 7).all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"state": None}, r"TypeError selective_state_update: state is None, wanted an array"),
        ({"x": lambda x: x[:, :, None]}, r"ValueError .*: x has shape \(2, 24, 1\), .*write x\[:, :, 0\]"),
        ({"x": lambda x: x.astype(int)}, r"TypeError .*: x is int64"),
        ({"dt": lambda x: x[:1]}, r"ValueError .*: dt has shape \(1, 24\), wanted \(batch=2, dim=24\)"),
        ({"z": lambda x: x.astype(np.float16)}, r"TypeError .*: z is float16, wanted float32, the dtype of x"),
        ({"A": lambda x: x[:3]}, r"ValueError .*: A has shape \(3, 16\), wanted \(dim=24, dstate\)"),
        ({"A": lambda x: x[:, :0]}, r"ValueError .*: A has shape \(24, 0\)"),
        ({"A": lambda x: x.astype(np.float64)}, r"TypeError .*: A is float64, wanted float32 or complex64"),
        ({"D": lambda x: x[1:]}, r"ValueError .*: D has shape \(23,\)"),
        ({"dt_bias": lambda x: x.astype(np.float16)}, r"TypeError .*: dt_bias is float16, wanted float32"),
        ({"B": lambda x: x[:, :3]}, r"ValueError .*: B has shape \(2, 3\), wanted \(batch=2, groups, dstate=16\), or the same"),
        ({"C": lambda x: np.stack([x] * 5, 1)}, r"ValueError .*: C has shape \(2, 5, 16\).*groups divide dim = 24"),
        ({"B": lambda x: x.astype(np.complex64)}, r"TypeError .*: B is complex64.*write B.real"),
        (
            {"state": lambda x: x[:, :, 1:]},
            r"ValueError .*: state has shape \(2, 24, 15\), wanted \(batch=2, dim=24, dstate=16\)",
        ),
        ({"state": lambda x: x.astype(np.float16)}, r"TypeError .*: state is float16, wanted float32, the dtype of A"),
        ({"state": lambda x: np.broadcast_to(x[:1], x.shape)}, r"ValueError .*: state is read-only.*state.copy\(\)"),
    ],
)
def test_errors(changes, message):
    a, _ = make()
    given = {"state": a["initial_state"], "x": a["u"][..., 0], "dt": a["delta"][..., 0], "z": a["z"][..., 0], "A": a["A"]}
    given |= {"B": a["B"][..., 0], "C": a["C"][..., 0], "D": a["D"], "dt_bias": a["delta_bias"]}
    with pytest.raises((TypeError, ValueError)) as raised:
        selective_state_update(**given | {k: change(given[k]) if callable(change) else change for k, change in changes.items()})
    assert re.match(message, f"{raised.type.__name__} {raised.value}")


# ---------------------------------------------------------------------------------------------------- the kernel, without a GPU
@pytest.fixture
def recorder(monkeypatch):
    return test_kernels.record(monkeypatch)


def launch(arguments, state=None):
    a = {k: v[..., 0] if v is not None and k in ("u", "delta", "z", "B", "C") else v for k, v in arguments.items()}
    state = a["initial_state"] if state is None else state
    B, C = np.ascontiguousarray(a["B"]), np.ascontiguousarray(a["C"])
    tensors = (state, a["u"], a["delta"], a["A"], B, C, a["D"], a["z"], a["delta_bias"])
    module._on_gpu(module._plan(checks_conv.selective_state_update("test", *tensors), True), tensors)


@pytest.mark.parametrize("row", ROWS)
def test_launches_get_what_the_struct_names(recorder, row):
    arguments, _ = make(**ROWS[row])
    launch(arguments)
    case = cases.BASE | ROWS[row]
    assert len(recorder.launched) == (case["batch"] * case["dim"] > 0)
    for file, _, constants, blocks, threads, numbers, given in recorder.launched:
        pointers, wanted = kernels.parameter_names(kernels.specialise(file, dict(constants)))
        assert set(pointers) <= set(given) and set(wanted) <= set(numbers) | {"first_block"}
        entries = -(-case["batch"] // dict(constants)["ENTRIES"])
        assert blocks * threads >= entries * case["dim"] * dict(constants)["LANES"] > (blocks - 1) * threads


def test_states_that_do_not_lie_side_by_side_are_moved_one_by_one(recorder):
    arguments, _ = make()
    launch(arguments)
    launch(arguments, np.repeat(arguments["initial_state"], 2, 2)[:, :, ::2])
    assert [dict(constants)["VECTOR"] for *_, constants in recorder.compiled] == [4, 1]


@pytest.mark.parametrize("row", ["base", "bfloat16", "float64", "complex-float32", "complex-float64", "state-300"])
@pytest.mark.parametrize("architecture", ["75", "90", "120"])
def test_compiles_without_spills(recorder, row, architecture):
    pytest.importorskip("cupy", reason="the compile tests need CuPy and NVRTC (the extra `test`)")
    launch(make(**ROWS[row])[0])
    ((file, _, constants),) = recorder.compiled
    _, log = kernels.compile_for(architecture, kernels.specialise(file, dict(constants)))
    assert max(int(n) for n in re.findall(r"Used (\d+) registers", log)) <= 128
    # of the kernel itself: NVIDIA's reduction of large double angles, which complex128 calls, has 8 bytes of its own
    assert re.search(r"properties for selective_state_update\n.* (\d+) bytes spill stores, (\d+) bytes", log).groups() == (
        "0",
        "0",
    )


# ---------------------------------------------------------------------------------------------------- the kernel, on a GPU
def on_gpu(arguments):
    return {k: None if x is None else cases.to_gpu(x) for k, x in arguments.items()}


@pytest.mark.gpu
@pytest.mark.parametrize("row", ROWS)
def test_row_on_a_gpu(row):
    cp = pytest.importorskip("cupy")
    arguments, options = make(**ROWS[row])
    wanted, last = selective_scan(**cases.in_double(arguments), **options, return_last_state=True)
    gpu, results = on_gpu(arguments), []
    for _ in range(2):
        state = gpu["initial_state"].copy()
        y = cp.stack(steps(gpu, options, state), 2)
        results.append((y.get(), state.get()))
    (y, state), (again, again_state) = results
    assert (y.tobytes(), state.tobytes()) == (again.tobytes(), again_state.tobytes())
    case = cases.BASE | ROWS[row]
    assert cases.relative_error(y, wanted) <= tolerance(case, Y_TOLERANCE)
    assert cases.relative_error(state, last) <= tolerance(case, STATE_TOLERANCE)
    scanned, scanned_last = selective_scan(
        **gpu, **options, return_last_state=True
    )  # the two kernels agree with each other too
    assert cases.relative_error(y, scanned.get().astype(np.float64)) <= tolerance(case, Y_TOLERANCE)
    assert cases.relative_error(state, scanned_last.get()) <= tolerance(case, STATE_TOLERANCE)


@pytest.mark.gpu
def test_a_view_on_a_gpu():
    cp = pytest.importorskip("cupy")
    arguments, options = make()
    gpu = on_gpu(arguments)
    wanted = gpu["initial_state"].copy()
    steps(gpu, options, wanted)
    room = cp.full((2, 24, 40), 7, cp.float32)
    view = room[:, ::-1, 3:35:2]
    view[...] = gpu["initial_state"]
    steps(gpu, options, view)
    assert cases.relative_error(view.get(), wanted.get()) <= 2e-7
    assert (room[:, :, 4:34:2] == 7).all() and (room[:, :, 35:] == 7).all()
    with pytest.raises(ValueError, match="broadcast view"):
        steps(gpu, options, cp.broadcast_to(wanted[:1], wanted.shape))


@pytest.mark.gpu
@pytest.mark.parametrize("sizes", [(1, 70_000), (70_000, 1)])
def test_many_channels_and_batches(sizes):
    cp = pytest.importorskip("cupy")
    arguments, options = make(batch=sizes[0], dim=sizes[1], state=2)
    wanted, _ = selective_scan(**cases.in_double(arguments), **options, return_last_state=True)
    gpu = on_gpu(arguments)
    y = cp.stack(steps(gpu, options, gpu["initial_state"]), 2)
    assert cases.relative_error(y.get(), wanted) <= Y_TOLERANCE["float32"]
