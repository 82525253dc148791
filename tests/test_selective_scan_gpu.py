"""The forward kernel on a GPU, against the float64 oracle and against itself."""

from concurrent.futures import ThreadPoolExecutor

import cases
import numpy as np
import pytest
import scans

from mambacupy import checks, kernels, reference, selective_scan, selective_scan_fwd
from mambacupy.ops import mapping, plans

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def cp():
    return pytest.importorskip("cupy")


def on_gpu(arguments):
    return {k: None if x is None else cases.to_gpu(x) for k, x in arguments.items()}


@pytest.mark.parametrize("row", cases.ROWS)
def test_row(cp, monkeypatch, row):
    """As on a GPU that the row fills: one with a single multiprocessor."""
    alike = kernels.device()._replace(multiprocessors=1)
    monkeypatch.setattr(kernels, "device", lambda: alike)
    monkeypatch.setattr(plans, "_plans", {})
    check(cp, row)


@pytest.mark.parametrize("row", cases.FEW_CHANNELS)
def test_few_channels(cp, monkeypatch, row):
    monkeypatch.setattr(plans, "_plans", {})
    check(cp, row)


def check(cp, row):
    arguments, options = cases.make(**cases.ROWS[row])
    got = selective_scan_fwd(**on_gpu(arguments), **options)
    again = selective_scan_fwd(**on_gpu(arguments), **options)
    got, again = (*got[:2], got[2].states), (*again[:2], again[2].states)
    assert scans.wrong_results(got, arguments, options, cases.BASE | cases.ROWS[row]) == {}
    assert got[0].dtype == arguments["u"].dtype and got[1].dtype == arguments["A"].dtype
    assert np.argsort(got[0].strides).tolist() == np.argsort(cases.to_gpu(arguments["u"]).strides).tolist()
    for one, two in zip(got, again, strict=True):
        assert cp.asnumpy(one).tobytes() == cp.asnumpy(two).tobytes()


# Errors of the original implementation on this case, measured on the same kind of GPU.
@pytest.mark.parametrize(("dtype", "peer"), [("float32", 1.3e-7), ("bfloat16", 1.69e-3)])
@pytest.mark.parametrize("order", ["length", "channel"])
def test_error_is_no_larger_than_the_peers(cp, dtype, peer, order):
    arguments, options = cases.make_for_peer(dtype, order)
    wanted = reference.selective_scan(**cases.in_double(arguments), **options)
    got = selective_scan(**on_gpu(arguments), **options)
    assert cases.relative_error(cp.asnumpy(got), wanted) <= peer


@pytest.mark.parametrize(
    "changes", [{}, {"reverse": True}, {"complex": True}, {"dtype": "bfloat16"}, {"discretization": "zoh"}]
)
def test_parts_of_time(cp, changes):
    """Few channels and many steps: time is cut into parts that run side by side."""
    arguments, options = cases.make(**({"batch": 1, "dim": 5, "length": 5000 + 37} | changes))
    args = checks.selective_scan("test", **arguments, discretization="euler")
    assert mapping.forward(args, args.state, kernels.device()).splits > 1
    y, last_state, saved = selective_scan_fwd(**on_gpu(arguments), **options)
    assert scans.wrong_results((y, last_state, saved.states), arguments, options, cases.BASE | changes) == {}


@pytest.mark.parametrize("order", ["length", "channel"])
@pytest.mark.parametrize(("dtype", "length"), [("float32", 136), ("bfloat16", 136), ("bfloat16", 135)])
@pytest.mark.parametrize("dim", [3100, 4100, 5200, 8200])
def test_a_block_for_each_multiprocessor(cp, dim, dtype, length, order):
    """Channels that just fill the GPU with one block each, whatever its size: no parts of time, and several lanes a channel."""
    changes = {"batch": 1, "dim": dim, "length": length, "dtype": dtype, "order": order, "state": 16}
    arguments, options = cases.make(**changes)
    y, last_state, saved = selective_scan_fwd(**on_gpu(arguments), **options)
    assert scans.wrong_results((y, last_state, saved.states), arguments, options, cases.BASE | changes) == {}


def test_a_long_sequence(cp):
    arguments, options = cases.make(batch=1, dim=3, length=1_000_003, state=4, dtype="float64")
    wanted, last = reference.selective_scan(**arguments, **options, return_last_state=True)
    y, got = selective_scan(**on_gpu(arguments), **options, return_last_state=True)
    assert cases.relative_error(cp.asnumpy(y), wanted) <= 1e-14
    assert cases.relative_error(cp.asnumpy(got), last) <= 1e-14


@pytest.mark.parametrize("split", [1, 63, 64, 100])
def test_a_scan_in_two_parts_is_one_scan(cp, split):
    arguments, options = cases.make(length=150)
    whole, last = selective_scan(**on_gpu(arguments), **options, return_last_state=True)
    state, parts = arguments["initial_state"], []
    for here in (slice(0, split), slice(split, None)):
        part = {k: x[..., here] if k in ("u", "delta", "z", "B", "C") else x for k, x in arguments.items()}
        part["initial_state"] = state
        y, state = selective_scan(**on_gpu(part), **options, return_last_state=True)
        parts.append(cp.asnumpy(y))
        state = cp.asnumpy(state)
    assert np.concatenate(parts, 2).tobytes() == cp.asnumpy(whole).tobytes()
    assert state.tobytes() == cp.asnumpy(last).tobytes()


VIEWS = {
    "slice-of-length": lambda x: x[:, :, 1:65],
    "slice-of-channels": lambda x: x[:, 1:25],
    "every-second-step": lambda x: x[:, :, ::2],
    "every-second-channel": lambda x: x[:, ::2],
    "backwards": lambda x: x[:, :, ::-1],
    "backwards-channels": lambda x: x[:, ::-1],
    "aligned-slice": lambda x: x[:, :, 8:72],
}


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("order", ["length", "channel"])
def test_views_are_never_misread(cp, view, dtype, order):
    wide, options = cases.make(dim=49, length=131, dtype=dtype, order=order)
    names = ("u", "delta", "z")
    views = {k: VIEWS[view](wide[k]) for k in names}
    batch, dim, length = views["u"].shape
    arguments, _ = cases.make(batch=batch, dim=dim, length=length, dtype=dtype)
    wanted = reference.selective_scan(**cases.in_double(arguments | views), **options)
    gpu = on_gpu(arguments) | {k: VIEWS[view](cases.to_gpu(wide[k])) for k in names}
    got = selective_scan(**gpu, **options)
    assert cases.relative_error(cp.asnumpy(got), wanted) <= scans.Y[dtype]


def test_broadcast_views_and_transposed_coefficients(cp):
    arguments, options = cases.make()
    gpu = on_gpu(arguments)
    wanted = cp.asnumpy(selective_scan(**gpu, **options))
    transposed = {k: cp.ascontiguousarray(gpu[k].swapaxes(1, 2)).swapaxes(1, 2) for k in ("B", "C")}
    assert cp.asnumpy(selective_scan(**(gpu | transposed), **options)).tobytes() == wanted.tobytes()
    once = cp.asarray(arguments["u"][:1])
    spread = selective_scan(**(gpu | {"u": cp.broadcast_to(once, gpu["u"].shape)}), **options)
    copied = selective_scan(**(gpu | {"u": cp.repeat(once, 2, 0)}), **options)
    assert cp.asnumpy(spread).tobytes() == cp.asnumpy(copied).tobytes()
    mixed = selective_scan(**(gpu | {"z": cases.to_gpu(cases.make(order="channel")[0]["z"])}), **options)
    assert mixed.strides == gpu["u"].strides


@pytest.mark.parametrize("change", [{"batch": 0}, {"length": 0}, {"dim": 0}])
def test_empty(cp, change):
    arguments, options = cases.make(**change)
    y, last, _ = selective_scan_fwd(**on_gpu(arguments), **options)
    assert y.shape == arguments["u"].shape
    assert cp.asnumpy(last).tobytes() == arguments["initial_state"].tobytes()


def test_many_channels_and_batches(cp):
    for batch, dim in ((1, 70_000), (70_000, 1)):
        arguments, options = cases.make(batch=batch, dim=dim, length=3, state=2)
        wanted = reference.selective_scan(**cases.in_double(arguments), **options)
        assert cases.relative_error(cp.asnumpy(selective_scan(**on_gpu(arguments), **options)), wanted) <= 6e-7


@pytest.mark.parametrize("order", ["length", "channel"])
def test_past_two_to_the_31_elements(cp, order):
    batch, dim, length = 3, 4096, 180_000  # 2.2e9 elements; the last batch entry begins past 2^30 and ends past 2^31
    shape = (batch, dim, length) if order == "length" else (batch, length, dim)
    u = cp.zeros(shape, cp.float16)
    u[...] = (cp.arange(shape[-1]) % 7).astype(cp.float16)
    u *= cp.arange(1, batch + 1).astype(cp.float16)[:, None, None]
    u = u if order == "length" else u.swapaxes(1, 2)
    A, BC = -cp.ones((dim, 1), cp.float32), cp.ones((dim, 1), cp.float32)
    whole, last = selective_scan(u, u, A, BC, BC, return_last_state=True)
    part, part_last = selective_scan(u[2:], u[2:], A, BC, BC, return_last_state=True)
    assert bool((whole[2:] == part).all()) and bool((last[2:] == part_last).all())
    del whole, part
    cp.get_default_memory_pool().free_all_blocks()


def test_a_non_default_stream_and_no_synchronisation(cp):
    arguments, options = cases.make()
    gpu = on_gpu(arguments)
    wanted = cp.asnumpy(selective_scan(**gpu, **options))
    with cp.cuda.Stream(non_blocking=True) as stream:
        late = cp.empty_like(gpu["u"])
        big = cp.ones((4096, 4096), cp.float32)
        for _ in range(20):
            big = big @ big * 1e-4
        late[...] = gpu["u"]
        y = selective_scan(**(gpu | {"u": late}), **options)
        assert not stream.done
        stream.synchronize()
    assert cp.asnumpy(y).tobytes() == wanted.tobytes()


def test_threads_at_the_same_time(cp):
    gpu, options = on_gpu(cases.make()[0]), cases.make()[1]
    given = [gpu | {"u": gpu["u"] * n} for n in range(8)]
    wanted = [cp.asnumpy(selective_scan(**one, **options)) for one in given]
    with ThreadPoolExecutor(8) as pool:
        for _ in range(20):
            got = pool.map(lambda one: cp.asnumpy(selective_scan(**one, **options)), given)
            assert [y.tobytes() for y in got] == [y.tobytes() for y in wanted]


def test_nan_stays_in_its_channel(cp):
    arguments, options = cases.make()
    clean = cp.asnumpy(selective_scan(**on_gpu(arguments), **options))
    arguments["u"][1, 5, 20] = np.nan
    y = cp.asnumpy(selective_scan(**on_gpu(arguments), **options))
    assert np.isnan(y[1, 5, 20:]).all()
    y[1, 5, 20:] = clean[1, 5, 20:]
    assert y.tobytes() == clean.tobytes()


def test_softplus_at_its_ends(cp):
    delta = np.array([-100, -80, -40, -16, -8, -1, 0, 1, 19.99, 20.01, 50, 1e4], np.float32)
    u = np.ones((1, 1, 1), np.float32)
    one = np.ones((1, 1), np.float32)
    for value in delta:
        args = (u, np.full((1, 1, 1), value), np.zeros((1, 1), np.float32), one, one)
        wanted = reference.selective_scan(*(x.astype(np.float64) for x in args), delta_softplus=True)
        got = cp.asnumpy(selective_scan(*map(cp.asarray, args), delta_softplus=True))
        assert cases.relative_error(got, wanted) <= 5e-7 or wanted.item() < 1.2e-38
