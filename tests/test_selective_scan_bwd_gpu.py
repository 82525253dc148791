"""The backward kernel on a GPU, against the float64 oracle, finite differences, and itself."""

import functools

import cases
import numpy as np
import pytest
import scans

from mambacupy import checks, kernels, selective_scan_bwd, selective_scan_fwd
from mambacupy.gradients import check_gradients
from mambacupy.ops import mapping, plans

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def cp():
    return pytest.importorskip("cupy")


def on_gpu(arguments, options, dy, dlast_state):
    saved = selective_scan_fwd(**{k: None if x is None else cases.to_gpu(x) for k, x in arguments.items()}, **options)[2]
    return selective_scan_bwd(cases.to_gpu(dy), saved, None if dlast_state is None else cases.to_gpu(dlast_state))


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
    dy, dlast_state = scans.incoming(arguments)
    got = on_gpu(arguments, options, dy, dlast_state)
    with cp.cuda.Stream(non_blocking=True) as stream:
        again = on_gpu(arguments, options, dy, dlast_state)
        stream.synchronize()
    assert scans.wrong_gradients(got, scans.oracle(arguments, options, dy, dlast_state), cases.BASE | cases.ROWS[row]) == {}
    for name, one, two in zip(got._fields, got, again, strict=True):
        if one is not None:
            assert one.get().tobytes() == two.get().tobytes(), name
            assert one.dtype == arguments[name].dtype


# Errors of the original implementation on this case, measured on the same kind of GPU.
PEER = {
    "float32": dict(
        u=1.3e-7, delta=1.8e-7, A=4.3e-7, B=2.1e-7, C=2.1e-7, D=1.2e-7, z=1.3e-7, delta_bias=2.0e-7
    ),
    "bfloat16": dict(
        u=1.67e-3, delta=1.61e-3, A=4.2e-7, B=1.67e-3, C=1.66e-3, D=1.0e-7, z=2.37e-3, delta_bias=2.0e-7
    ),
}  # fmt: skip


@pytest.mark.parametrize("dtype", PEER)
@pytest.mark.parametrize("order", ["length", "channel"])
def test_errors_are_no_larger_than_the_peers(cp, dtype, order):
    """Nor than that of the exact gradient rounded once to the dtype it is stored in, which no kernel can beat."""
    arguments, options = cases.make_for_peer(dtype, order)
    dy, _ = scans.incoming(arguments)
    got, wanted = on_gpu(arguments, options, dy, None), scans.oracle(arguments, options, dy, None)
    wrong = {}
    for name, peer in PEER[dtype].items():
        one, two = getattr(got, name), getattr(wanted, name)
        rounded = cases.relative_error(two.astype(one.dtype), two)
        error = cases.relative_error(one.get(), two)
        if not error <= max(peer, 1.001 * rounded):
            wrong[name] = error, peer, rounded
    assert wrong == {}


PARTS = [
    {},
    {"reverse": True},
    {"complex": True},
    {"dtype": "bfloat16", "order": "channel"},
    {"B": "constant", "C": "constant"},
]


@pytest.mark.parametrize("changes", PARTS)
def test_parts_of_time(cp, changes):
    """Few channels and many steps: time is cut into parts that run side by side."""
    case = {"batch": 1, "dim": 5, "length": 5000 + 37} | changes
    arguments, options = cases.make(**case)
    args = checks.selective_scan("test", **arguments, discretization="euler")
    assert mapping.backward(args, args.state, kernels.device()).splits > 1
    dy, dlast_state = scans.incoming(arguments)
    got = on_gpu(arguments, options, dy, dlast_state)
    assert scans.wrong_gradients(got, scans.oracle(arguments, options, dy, dlast_state), cases.BASE | case) == {}


def test_parts_of_time_that_forget(cp):
    """States that decay fast: what a part hands on is gathered from its end, and not to its beginning."""
    case = {"batch": 1, "dim": 5, "length": 5000 + 37}
    arguments, options = cases.make(**case)
    arguments["A"] *= 30
    dy, dlast_state = scans.incoming(arguments)
    got = on_gpu(arguments, options, dy, dlast_state)
    assert scans.wrong_gradients(got, scans.oracle(arguments, options, dy, dlast_state), cases.BASE | case) == {}


def test_last_state_alone_and_dy_alone(cp):
    arguments, options = cases.make()
    dy, dlast_state = scans.incoming(arguments)
    for one, two in ((dy, None), (np.zeros_like(dy), dlast_state)):
        got = on_gpu(arguments, options, one, two)
        wanted = scans.oracle(arguments, options, one, np.zeros_like(dlast_state) if two is None else two)
        assert scans.wrong_gradients(got, wanted, cases.BASE) == {}


def test_dy_may_be_wider_than_u(cp):
    arguments, options = cases.make(dtype="bfloat16")
    dy, dlast_state = scans.incoming(arguments)
    narrow = on_gpu(arguments, options, dy, dlast_state)
    wide = on_gpu(arguments, options, dy.astype(np.float32), dlast_state)
    for name, one, two in zip(narrow._fields, narrow, wide, strict=True):
        assert one.get().tobytes() == two.get().tobytes(), name


VIEWS = {
    "slice-of-length": lambda x: x[:, :, 1:65],
    "every-second-channel": lambda x: x[:, ::2],
    "backwards": lambda x: x[:, :, ::-1],
}


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("order", ["length", "channel"])
def test_views_are_never_misread(cp, view, order):
    cut, names = VIEWS[view], ("u", "delta", "z")
    wide, options = cases.make(dim=49, length=131, dtype="bfloat16", order=order)
    wide_dy, _ = scans.incoming(wide)
    batch, dim, length = cut(wide["u"]).shape
    rest, _ = cases.make(batch=batch, dim=dim, length=length, dtype="bfloat16")
    _, dlast_state = scans.incoming(rest)
    wanted = scans.oracle(rest | {k: cut(wide[k]) for k in names}, options, cut(wide_dy), dlast_state)
    given = {k: cp.asarray(x) for k, x in rest.items()} | {k: cut(cases.to_gpu(wide[k])) for k in names}
    saved = selective_scan_fwd(**given, **options)[2]
    got = selective_scan_bwd(cut(cases.to_gpu(wide_dy)), saved, cp.asarray(dlast_state))
    assert scans.wrong_gradients(got, wanted, cases.BASE | {"dtype": "bfloat16"}) == {}


@pytest.mark.parametrize("changes", [{"batch": 0}, {"length": 0}, {"dim": 0}])
def test_empty(cp, changes):
    arguments, options = cases.make(**changes)
    dy, dlast_state = scans.incoming(arguments)
    got, wanted = on_gpu(arguments, options, dy, dlast_state), scans.oracle(arguments, options, dy, dlast_state)
    for name, one, two in zip(got._fields, got, wanted, strict=True):
        assert one.shape == two.shape and np.array_equal(one.get(), two), name


@pytest.mark.parametrize("discretization", ["euler", "zoh"])
@pytest.mark.parametrize("is_complex", [False, True])
def test_finite_differences_on_the_device(cp, discretization, is_complex):
    arguments, options = cases.make(
        dim=4, length=67, state=3, dtype="float64", complex=is_complex, B=2, C="constant", discretization=discretization
    )
    check_gradients(
        functools.partial(selective_scan_fwd, **options),
        selective_scan_bwd,
        {k: cp.asarray(x) for k, x in arguments.items()},
    )


def test_softplus_at_its_ends(cp):
    """∂/∂delta vanishes with the step at very negative delta, keeps relative accuracy there, and is that of Δ above 20."""
    for value in (-100, -80, -40, -16, -8, 0, 8, 19.99, 20.01, 50):
        ones = np.ones((1, 1, 2), np.float32)
        one = np.ones((1, 1), np.float32)
        arguments = {"u": ones, "delta": ones * value, "A": -one * 0.01, "B": one, "C": one}
        got = on_gpu(arguments, {"delta_softplus": True}, ones, None)
        wanted = scans.oracle(arguments, {"delta_softplus": True}, ones, None)
        for name in ("u", "delta", "A", "B"):
            one, two = getattr(got, name).get(), getattr(wanted, name)
            assert cases.relative_error(one, two) <= 2e-6 or abs(two).max() < 1e-37, (name, value)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_nan_and_inf_stay_in_their_channel_and_its_sums(cp, bad):
    arguments, options = cases.make()
    dy, dlast_state = scans.incoming(arguments)
    clean = on_gpu(arguments, options, dy, dlast_state)
    arguments["u"][1, 5, 20] = bad
    got = on_gpu(arguments, options, dy, dlast_state)
    for name in ("u", "delta", "z", "initial_state"):
        one, two = getattr(got, name).get(), getattr(clean, name).get()
        one[1, 5] = two[1, 5]
        assert one.tobytes() == two.tobytes(), name
    for name in ("A", "D", "delta_bias"):
        one, two = getattr(got, name).get(), getattr(clean, name).get()
        one[5] = two[5]
        assert one.tobytes() == two.tobytes(), name
    for name in "BC":
        one, two = getattr(got, name).get(), getattr(clean, name).get()
        assert one[0].tobytes() == two[0].tobytes(), name
    assert not np.isfinite(got.z.get()[1, 5, 20:]).any()


@pytest.mark.parametrize("order", ["length", "channel"])
def test_past_two_to_the_31_elements(cp, order):
    batch, dim, length = 3, 4096, 180_000
    shape = (batch, dim, length) if order == "length" else (batch, length, dim)
    u = cp.zeros(shape, cp.float16)
    u[...] = (cp.arange(shape[-1]) % 7).astype(cp.float16) * cp.float16(0.125)
    u *= cp.arange(1, batch + 1).astype(cp.float16)[:, None, None]
    u = u if order == "length" else u.swapaxes(1, 2)
    A, constant = -cp.ones((dim, 1), cp.float32), cp.ones((dim, 1), cp.float32)
    whole = selective_scan_bwd(u, selective_scan_fwd(u, u, A, constant, constant)[2])
    kept = whole.u[2:].copy(), whole.delta[2:].copy()
    del whole
    part = selective_scan_bwd(u[2:], selective_scan_fwd(u[2:], u[2:], A, constant, constant)[2])
    assert bool((kept[0] == part.u).all()) and bool((kept[1] == part.delta).all())
    del part, kept, u
    cp.get_default_memory_pool().free_all_blocks()


def test_many_channels_and_batches(cp):
    for batch, dim in ((1, 70_000), (70_000, 1)):
        case = {"batch": batch, "dim": dim, "length": 3, "state": 2}
        arguments, options = cases.make(**case)
        dy, dlast_state = scans.incoming(arguments)
        got = on_gpu(arguments, options, dy, dlast_state)
        assert scans.wrong_gradients(got, scans.oracle(arguments, options, dy, dlast_state), cases.BASE | case) == {}
