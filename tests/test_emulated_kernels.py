"""The scan's kernels without a GPU: their text run by the emulator, against the float64 oracle."""

import shutil

import cases
import emulator
import numpy as np
import pytest
import scans

from mambacupy import kernels, reference

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="the emulator needs g++")

FEW = ("base", "complex-bfloat16", "float64", "groups-differ", "constant-BC", "zoh-complex", "reverse",
       "channel-order-bfloat16", "length-1", "state-5", "state-100", "state-32-channel-order-bfloat16", "dim-7")  # fmt: skip
SMALL = kernels.Device(multiprocessors=4, shared_bytes=65536, shared_bytes_of_multiprocessor=65536)
ONE, FOUR, EIGHT = (emulator.H100._replace(multiprocessors=n) for n in (1, 4, 8))
OTHERS = {
    "parts of time": ({"batch": 1, "dim": 5, "length": 2100, "state": 4}, SMALL),
    "parts of time, reverse": ({"batch": 1, "dim": 5, "length": 2100, "state": 4, "reverse": True}, SMALL),
    "more parts of time than chain themselves": ({"batch": 1, "dim": 2, "length": 4300, "state": 2}, emulator.H100),
    "a block for each multiprocessor": ({"batch": 1, "dim": 312, "length": 70, "state": 16}, FOUR),
    "a block for each, channel order": ({"batch": 1, "dim": 312, "length": 70, "state": 16, "order": "channel"}, FOUR),
    "two channels a lane": ({"batch": 1, "dim": 141, "length": 70, "state": 30}, ONE),
    "two channels a lane, reverse": ({"batch": 1, "dim": 141, "length": 70, "state": 30, "reverse": True}, ONE),
    **{
        f"rows across packs, {dtype}{', reverse' * reverse}, length {length}": (
            {"dim": 24, "length": length, "state": 4, "dtype": dtype, "reverse": reverse},
            emulator.FULL,
        )
        for dtype in ("bfloat16", "float32")
        for reverse in (False, True)
        for length in (197, 222, 333)
    },
    **{
        f"rows across packs, whole blocks{', reverse' * reverse}, length {length}": (
            {"batch": 1, "dim": 64, "length": length, "dtype": "bfloat16", "reverse": reverse},
            emulator.FULL,
        )
        for reverse in (False, True)
        for length in (197, 222, 333)
    },
    "parts of time in a relay": ({"batch": 1, "dim": 20, "length": 1001, "state": 4}, emulator.H100),
    "parts of time in a relay, reverse": ({"dim": 20, "length": 1001, "state": 4, "reverse": True}, emulator.H100),
    "parts of time in a relay, channel order": (
        {"dim": 24, "length": 600, "state": 16, "dtype": "bfloat16", "order": "channel"},
        emulator.H100,
    ),
    "parts of time in a relay, no softplus": ({"dim": 5, "length": 330, "state": 3, "delta_softplus": False}, emulator.H100),
    "parts of time in a relay, complex": ({"dim": 5, "length": 300, "complex": True, "initial_state": False}, emulator.H100),
    "parts of time in a relay, groups": ({"dim": 24, "length": 300, "B": 4, "C": 6}, emulator.H100),
    "parts of time in a relay, constant B and C": ({"dim": 5, "length": 300, "B": "constant", "C": "constant"}, emulator.H100),
    "parts of time in a relay, slices of the states": ({"batch": 1, "dim": 3, "length": 200, "state": 300}, emulator.H100),
    "parts of time in a relay that fills the GPU twice": ({"dim": 40, "length": 450, "state": 16}, EIGHT),
    "rows across packs, complex": (
        {"dim": 5, "length": 197, "complex": True, "dtype": "bfloat16", "B": "interleaved", "C": "interleaved"},
        emulator.FULL,
    ),
    "rows across packs, channel order, 40 states": (
        {"length": 197, "state": 40, "dtype": "bfloat16", "order": "channel"},
        emulator.FULL,
    ),
    "rows across packs, parts of time": ({"dim": 7, "length": 1101, "dtype": "bfloat16", "reverse": True}, emulator.H100),
    "64 KiB of shared memory": ({"dim": 130}, SMALL),
    "64 KiB of shared memory, float64": ({"dim": 130, "dtype": "float64"}, SMALL),
}


def rows(config):
    chosen = cases.ROWS if config.getoption("--emulate-all") else {row: cases.ROWS[row] for row in FEW}
    few = {f"{row}, few channels": (cases.ROWS[row], emulator.H100) for row in cases.FEW_CHANNELS}
    return {row: (changes, emulator.FULL) for row, changes in chosen.items()} | few | OTHERS


def pytest_generate_tests(metafunc):
    if "row" in metafunc.fixturenames:
        chosen = rows(metafunc.config)
        metafunc.parametrize(("row", "device"), [pytest.param(*row, id=name) for name, row in chosen.items()])


def test_row(monkeypatch, row, device):
    check(monkeypatch, device, cases.BASE | row, *cases.make(**row))


def sliced(x, more):
    """x as a slice of longer rows."""
    longer = np.zeros((*x.shape[:2], x.shape[2] + more), x.dtype)
    longer[..., 1 : 1 + x.shape[2]] = x
    return longer[..., 1 : 1 + x.shape[2]]


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize(("length", "more", "names"), [(200, 8, ("u", "delta", "z")), (200, 3, ("u",)), (197, 4, ("delta",))])
def test_slices_of_longer_rows(monkeypatch, length, more, names, reverse):
    """Tensors that lie across packs each in its own way, and outputs that do or do not."""
    case = {"batch": 1, "dim": 64, "length": length, "dtype": "bfloat16", "reverse": reverse}
    arguments, options = cases.make(**case)
    arguments |= {name: sliced(arguments[name], more) for name in names}
    check(monkeypatch, emulator.FULL, cases.BASE | case, arguments, options)


FORGETFUL = {
    "fast": lambda A: 30 * A,  # what a part hands on is gathered from its end, and not to its beginning
    "just not": lambda A: np.broadcast_to(-0.4 * (1 + np.arange(A.shape[1]) / 40), A.shape),
    "some states slow": lambda A: np.broadcast_to(np.where(np.arange(A.shape[1]) % 2, -60.0, -0.2), A.shape),
    "at once": lambda A: np.where(np.arange(A.shape[1]) % 2, -1e30, A),
}


@pytest.mark.parametrize(("device", "length"), [(SMALL, 2100), (emulator.H100, 1000)], ids=["apart", "relay"])
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("kind", FORGETFUL)
def test_parts_of_time_that_forget(monkeypatch, kind, reverse, device, length):
    case = {"batch": 1, "dim": 5, "length": length, "state": 8, "reverse": reverse}
    arguments, options = cases.make(**case)
    arguments["A"] = np.ascontiguousarray(FORGETFUL[kind](arguments["A"]), arguments["A"].dtype)
    check(monkeypatch, device, cases.BASE | case, arguments, options)


def test_an_infinite_decay_forgets_at_once(monkeypatch):
    results = []
    for A in (-1e30, -np.inf):
        arguments, options = cases.make(state=3, dim=5, length=33)
        arguments["A"][:, 1] = A
        results.append(run(monkeypatch, emulator.H100, arguments, options, *scans.incoming(arguments))[0])
    for one, two in zip(*results, strict=True):
        assert np.isfinite(one).all() and one.tobytes() == two.tobytes()


@pytest.mark.parametrize("length", [256, 255])
def test_an_infinity_of_u_stays_one_without_D(monkeypatch, length):
    arguments, options = cases.make(state=1, length=length, D=False, z=False)
    arguments["u"][:, :, 100] = np.inf
    y = run(monkeypatch, emulator.FULL, arguments, options, *scans.incoming(arguments))[0][0]
    assert np.isfinite(y[:, :, :100]).all() and np.isinf(y[:, :, 100]).all() and not np.isnan(y).any()


@pytest.mark.parametrize(("device", "length"), [(SMALL, 2176), (emulator.H100, 1024)], ids=["apart", "relay"])
@pytest.mark.parametrize(("dtype", "A", "small"), [("float32", 1.0, 1e-25), ("float64", 7.0, 1e-250)])
@pytest.mark.parametrize("reverse", [False, True])
def test_parts_of_time_that_grow(monkeypatch, dtype, A, small, reverse, device, length):
    """The decay over a part overflows, though nothing that it multiplies does: what is 0 stays 0, and what is small grows."""
    case = {"batch": 1, "dim": 3, "length": length, "state": 4, "dtype": dtype, "delta_softplus": False, "reverse": reverse}
    arguments, options = cases.make(**case, delta_bias=False)
    dy, dlast_state = scans.incoming(arguments)
    steps = np.arange(length)[::-1] if reverse else np.arange(length)  # in the order of the walk
    arguments["A"][...] = A
    arguments["delta"][...] = np.where(steps < length - 128, 0, 0.9)  # all growth lies in the last part, of 128 steps
    arguments["u"][..., steps < length - 8] = dy[..., steps > length - 120] = 0
    arguments["initial_state"] *= small
    got, grads = run(monkeypatch, device, arguments, options, dy, dlast_state * small)
    y, last_state, _ = reference.selective_scan_fwd(**cases.in_double(arguments), **options)
    wanted = scans.oracle(arguments, options, dy, dlast_state * small)
    most = 0.9 * A * 128 * np.finfo(dtype).eps  # e^x amplifies a rounding of x by x
    assert cases.relative_error(got[0], y) <= most and cases.relative_error(got[1], last_state) <= most
    assert {
        n: cases.relative_error(x, w)
        for n, x, w in zip(wanted._fields, grads, wanted, strict=True)
        if x is not None and not cases.relative_error(x, w) <= most
    } == {}


def check(monkeypatch, device, case, arguments, options):
    dy, dlast_state = scans.incoming(arguments)
    got, grads = run(monkeypatch, device, arguments, options, dy, dlast_state)
    assert scans.wrong_results(got, arguments, options, case) == {}
    assert scans.wrong_gradients(grads, scans.oracle(arguments, options, dy, dlast_state), case) == {}


def run(monkeypatch, device, arguments, options, dy, dlast_state):
    """(y, last_state, states), and the gradients."""
    emulator.install(monkeypatch, device)
    return emulator.scan(arguments, options, dy, dlast_state)
