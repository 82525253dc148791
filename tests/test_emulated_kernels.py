"""The scan's kernels without a GPU: their text run by the emulator, against the float64 oracle."""

import shutil

import cases
import emulator
import pytest
import scans

from mambacupy import checks, kernels
from mambacupy.ops import scan_kernels

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="the emulator needs g++")

FEW = ("base", "complex-bfloat16", "float64", "groups-differ", "constant-BC", "zoh-complex", "reverse",
       "channel-order-bfloat16", "length-1", "state-5", "state-100", "state-32-channel-order-bfloat16", "dim-7")  # fmt: skip
SMALL = kernels.Device(multiprocessors=4, shared_bytes=65536, shared_bytes_of_multiprocessor=65536)
OTHERS = {
    "parts of time": ({"batch": 1, "dim": 5, "length": 1100, "state": 4}, emulator.H100),
    "parts of time, reverse": ({"batch": 1, "dim": 5, "length": 1100, "state": 4, "reverse": True}, emulator.H100),
    "parts of time, some empty": ({"batch": 1, "dim": 5, "length": 1200, "state": 4}, emulator.H100),
    "parts of time, some empty, reverse": ({"batch": 1, "dim": 5, "length": 1200, "state": 4, "reverse": True}, emulator.H100),
    "64 KiB of shared memory": ({"dim": 130}, SMALL),
    "64 KiB of shared memory, float64": ({"dim": 130, "dtype": "float64"}, SMALL),
}


def rows(config):
    chosen = cases.ROWS if config.getoption("--emulate-all") else {row: cases.ROWS[row] for row in FEW}
    return {row: (changes, emulator.H100) for row, changes in chosen.items()} | OTHERS


def pytest_generate_tests(metafunc):
    if "row" in metafunc.fixturenames:
        chosen = rows(metafunc.config)
        metafunc.parametrize(("row", "device"), [pytest.param(*row, id=name) for name, row in chosen.items()])


def test_row(monkeypatch, row, device):
    check(monkeypatch, device, cases.BASE | row, *cases.make(**row))


@pytest.mark.parametrize("reverse", [False, True])
def test_parts_of_time_that_forget(monkeypatch, reverse):
    """States that decay fast: what a part hands on is gathered from its end, and not to its beginning."""
    case = {"batch": 1, "dim": 5, "length": 1100, "state": 4, "reverse": reverse}
    arguments, options = cases.make(**case)
    arguments["A"] *= 30
    check(monkeypatch, emulator.H100, cases.BASE | case, arguments, options)


def check(monkeypatch, device, case, arguments, options):
    dy, dlast_state = scans.incoming(arguments)
    emulator.install(monkeypatch, device)
    args = checks.selective_scan("test", **arguments, discretization=options["discretization"])
    args = args._replace(xp=emulator.Memory())
    direction = options["delta_softplus"], options["reverse"]
    got = scan_kernels.forward(args, *direction, True)
    grads = scan_kernels.backward(args, *direction, got[2], dy, dlast_state, arguments["B"], arguments["C"])
    assert scans.wrong_results(got, arguments, options, case) == {}
    assert scans.wrong_gradients(grads, scans.oracle(arguments, options, dy, dlast_state), case) == {}
